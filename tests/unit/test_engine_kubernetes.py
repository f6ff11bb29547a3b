"""Functions on a cluster: what is deployed begins or is undone, requests go to the pods that should have them, and what fails meanwhile."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from engine_world import APP, GUARDED, http_answer, play, until
from kubernetes_world import (
    OURS,
    Cluster,
    ClusterWorld,
    Object,
    api_server,
    cluster_world,
    condition,
    ended,
    gateway,
    running,
    status_of,
    waiting,
    write_kubeconfig,
)

from kalium.engine.kubernetes.backend import KubernetesBackend
from kalium.errors import KaliumError

RETIRED = http_answer(503, b'{"error": "retired"}')


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short; what happens between them is the same."""
    for module in ("watch", "backend"):
        monkeypatch.setattr(f"kalium.engine.kubernetes.{module}.WATCH_PAUSE_SECONDS", (0.001, 0.01))
    monkeypatch.setattr("kalium.engine.kubernetes.functions.RESTART_PAUSE_SECONDS", (0.0007, 0.0028))
    monkeypatch.setattr("kalium.engine.instance.PROBE_PAUSE_SECONDS", (0.001, 0.004))


def revision_of(pod: Object) -> str:
    return str(pod["metadata"]["labels"]["kalium.io/revision"])


def image_of(pod: Object) -> str:
    return str(pod["spec"]["containers"][0]["image"])


def only_runs(image: str, otherwise: Object) -> Callable[[Object], Object]:
    """A kubelet that has one image."""
    return lambda pod: running() if image_of(pod) == image else otherwise


async def deployed(site: ClusterWorld, **fields: Any) -> None:
    assert await site.deploy(**fields) == (202, "")
    await site.ready(replicas=site.cluster.objects["deployments"]["echo"]["spec"]["replicas"])


# Deploying


def test_a_function_is_deployed_serves_and_is_listed(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            assert await site.deploy(labels=GUARDED, annotations={**APP, "topic": "sales"}) == (202, "")
            described = await site.ready()
            status, text, _ = await site.invoke()
            listed = json.loads((await site.call("GET", "/system/functions"))[1])

            assert (status, text) == (200, "echo-1")
            assert described["annotations"] == {**APP, "topic": "sales", "kalium.io/address": f"127.67.0.1:{site.on.port}"}
            assert [entry["name"] for entry in listed] == ["echo"]
            assert listed[0]["invocationCount"] == 1
            service = site.cluster.objects["services"]["echo"]
            assert service["metadata"]["ownerReferences"][0]["uid"] == site.cluster.objects["deployments"]["echo"]["metadata"]["uid"]

    play(story())


def test_a_deployment_is_accepted_when_a_container_of_it_runs_and_not_before(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(kubelet=lambda pod: waiting("ContainerCreating"))) as site:
            deploying = asyncio.ensure_future(site.deploy())
            await until(site.cluster.pods, "a pod")
            await asyncio.sleep(0.02)
            assert not deploying.done()

            site.cluster.say("echo-1", running(is_ready=False))

            assert await deploying == (202, "")
            assert (await site.describe())["availableReplicas"] == 0, "a 202 is not readiness"
            assert (await site.invoke())[:2] == (503, "No endpoints available for: echo.")

    play(story())


def test_a_deployment_of_which_nothing_is_heard_is_accepted_in_doubt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalium.engine.kubernetes.backend.ADMIT_SECONDS_MAX", 0.02)

    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(kubelet=lambda pod: waiting("ContainerCreating"))) as site:
            assert await site.deploy() == (202, "")

    play(story())


def test_each_deployment_has_new_pods_also_of_the_same_image(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            first = revision_of(site.cluster.pods()[0])

            await deployed(site)
            await until(lambda: site.cluster.made == 2 and len(site.cluster.pods()) == 1, "the old pod to go")

            assert revision_of(site.cluster.pods()[0]) != first
            assert (await site.invoke())[1] == "echo-2"

    play(story())


def test_an_image_that_cannot_be_had_is_told_and_nothing_is_left(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(kubelet=lambda pod: waiting("ErrImagePull", "no such image"))) as site:
            assert await site.deploy() == (400, "cannot deploy echo: ErrImagePull: no such image")

            assert (await site.call("GET", "/system/function/echo"))[0] == 404
            assert (site.cluster.objects["deployments"], site.cluster.objects["services"]) == ({}, {})

    play(story())


def test_an_update_whose_image_cannot_be_had_is_undone(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(kubelet=only_runs("shop/echo:1", waiting("ErrImagePull", "no such image")))) as site:
            await deployed(site, labels={"team": "pay", "com.openfaas.scale.min": "2"}, annotations={"topic": "sales"}, envVars={"A": "$B"})
            before = {key: site.cluster.objects["deployments"]["echo"][key] for key in ("spec", "metadata")}
            described = await site.describe()

            status, text = await site.deploy(method="PUT", image="shop/echo:9", annotations={"topic": "other"})

            assert (status, text) == (400, "cannot deploy echo: ErrImagePull: no such image")
            after = site.cluster.objects["deployments"]["echo"]
            assert after["spec"] == before["spec"]
            for key in ("uid", "labels", "annotations"):
                assert after["metadata"][key] == before["metadata"][key]
            assert await site.describe() == described
            assert (await site.invoke())[0] == 200

    play(story())


def test_what_was_undone_does_not_count_for_the_next_deployment(tmp_path: Path) -> None:
    """Pods of the one that failed may still be there, with their trouble, when the next is deployed."""

    async def story() -> None:
        kubelet: Callable[[Object], Object] = lambda pod: waiting("ErrImagePull", "x") if image_of(pod) == "shop/echo:9" else running()  # noqa: E731
        async with cluster_world(tmp_path, Cluster(kubelet=kubelet, lets_go=False)) as site:
            await deployed(site)
            assert (await site.deploy(image="shop/echo:9"))[0] == 400

            assert await site.deploy(image="shop/echo:2") == (202, "")

            revisions = [revision_of(pod) for pod in site.cluster.pods()]
            assert len(set(revisions)) == len(revisions) == 3, "no revision is that of another deployment"

    play(story())


def test_a_pod_that_a_policy_refuses_is_told_in_its_words_and_nothing_is_left(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(admission=lambda template: "pods are forbidden: no app here")) as site:
            assert await site.deploy() == (400, "cannot deploy echo: pods are forbidden: no app here")

            assert site.cluster.objects["deployments"] == {}

    play(story())


def test_an_update_that_a_policy_refuses_is_undone(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            site.cluster.admission = lambda template: "forbidden" if image_of(template) == "shop/echo:2" else ""

            assert await site.deploy(image="shop/echo:2") == (400, "cannot deploy echo: forbidden")

            assert (await site.describe())["image"] == "shop/echo:1"
            assert (await site.invoke())[:2] == (200, "echo-1")

    play(story())


def test_what_was_refused_before_does_not_refuse_what_corrects_it(tmp_path: Path) -> None:
    """The answer to an update has the status of before it, and so the refusal of what is being replaced."""

    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            site.cluster.admission = lambda template: "" if image_of(template) == "shop/echo:2" else "forbidden: exceeded quota"
            assert (await site.call("POST", "/system/scale-function/echo", {"replicas": 2}))[0] == 202
            await until(lambda: site.on.find("echo").found.refusal, "the refusal to be heard")  # type: ignore[union-attr]

            site.cluster.has_controllers = False
            deploying = asyncio.ensure_future(site.deploy(image="shop/echo:2"))
            await until(lambda: site.cluster.count("PATCH /api/v1/namespaces/openfaas-fn/services"), "the last request of the update")
            await asyncio.sleep(0.02)
            assert not deploying.done(), "controllers have not seen it yet"
            site.cluster.has_controllers = True
            site.cluster.reconcile()

            assert await deploying == (202, "")
            assert (await site.ready())["image"] == "shop/echo:2"

    play(story())


def test_a_correction_that_is_refused_in_the_same_words_is_undone_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            site.cluster.admission = lambda template: "forbidden: exceeded quota"
            assert (await site.call("POST", "/system/scale-function/echo", {"replicas": 2}))[0] == 202
            await until(lambda: site.on.find("echo").found.refusal, "the refusal to be heard")  # type: ignore[union-attr]
            monkeypatch.setattr("kalium.engine.kubernetes.backend.ADMIT_SECONDS_MAX", 0.05)

            assert await site.deploy(image="shop/echo:2") == (400, "cannot deploy echo: forbidden: exceeded quota")

            assert (await site.describe())["image"] == "shop/echo:1"
            assert (await site.invoke())[:2] == (200, "echo-1")

    play(story())


def test_a_refusal_that_has_passed_is_news_when_it_comes_again(tmp_path: Path) -> None:
    """It is not waited for until a deployment would be accepted in doubt."""

    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            site.cluster.admission = lambda template: "forbidden"
            assert (await site.call("POST", "/system/scale-function/echo", {"replicas": 2}))[0] == 202
            function = site.on.find("echo")
            assert function is not None
            await until(lambda: function.found.refusal, "the refusal to be heard")
            site.cluster.has_controllers = False
            deploying = asyncio.ensure_future(site.deploy(image="shop/echo:2"))
            await until(lambda: site.cluster.count("PATCH /api/v1/namespaces/openfaas-fn/services"), "the last request of the update")

            for refused in ([], [condition("ReplicaFailure", True, "forbidden")]):
                deployment = site.cluster.objects["deployments"]["echo"]
                site.cluster.put("deployments", {**deployment, "status": {"conditions": refused}})
                await until(lambda: bool(function.found.refusal) == bool(refused), "that to be heard")  # noqa: B023 -- awaited here
                await asyncio.sleep(0.005)

            assert await asyncio.wait_for(deploying, 5) == (400, "cannot deploy echo: forbidden")

    play(story())


@pytest.mark.parametrize("reason", ["FailedCreatePodSandBox", "FailedMount"])
def test_trouble_with_a_sandbox_may_pass_and_is_the_reason_until_then(tmp_path: Path, reason: str) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(kubelet=lambda pod: waiting("ContainerCreating"))) as site:
            deploying = asyncio.ensure_future(site.deploy())
            await until(lambda: [function for function in site.on._table.values() if function.pods], "a pod to be seen")
            await asyncio.sleep(0.02)
            assert not deploying.done()

            site.cluster.warn("echo-1", reason, "the runtime says no")

            assert await asyncio.wait_for(deploying, 5) == (202, "")
            assert await site.reason() == f"echo-1: {reason}: the runtime says no"
            site.cluster.say("echo-1", running())
            await site.ready()
            assert await site.reason() == ""

    play(story())


def test_other_warnings_are_no_reason(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(kubelet=lambda pod: waiting("ContainerCreating"))) as site:
            deploying = asyncio.ensure_future(site.deploy())
            await until(site.cluster.pods, "a pod")
            site.cluster.warn("echo-1", "Unhealthy", "Startup probe failed")
            await until(lambda: site.on._events.reflection.objects, "the event to be heard")

            assert await site.reason() == ""
            site.cluster.say("echo-1", running(is_ready=False))
            assert await deploying == (202, "")
            assert await site.reason() == ""

    play(story())


def test_a_container_that_cannot_be_made_is_the_reason(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(kubelet=lambda pod: waiting("CreateContainerError", "no such program"))) as site:
            assert await site.deploy() == (202, "")

            assert await site.reason() == "echo-1: CreateContainerError: no such program"

    play(story())


def test_a_pod_that_no_node_takes_is_the_reason_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalium.engine.kubernetes.backend.ADMIT_SECONDS_MAX", 0.02)
    status = {"phase": "Pending", "conditions": [condition("PodScheduled", False, "0/3 nodes are available")]}

    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(kubelet=lambda pod: status)) as site:
            assert await site.deploy() == (202, "")
            assert await site.reason() == "", "a node may be found within seconds"

            monkeypatch.setattr("kalium.engine.kubernetes.functions.PATIENCE_SECONDS", 0.0)
            assert await site.reason() == "echo-1: 0/3 nodes are available"

    play(story())


def test_functions_and_secrets_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FUNCTIONS_MAX", "SECRETS_MAX"):
        monkeypatch.setattr(f"kalium.engine.kubernetes.backend.{name}", 1)

    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            assert [(await site.deploy(name))[0] for name in ("echo", "other", "echo")] == [202, 400, 202]
            secrets = [await site.call("POST", "/system/secrets", {"name": name, "value": "v"}) for name in ("key", "other")]
            assert [status for status, _, _ in secrets] == [202, 400]
            assert (set(site.cluster.objects["deployments"]), set(site.cluster.objects["secrets"])) == ({"echo"}, {"key"})

    play(story())


# A name that something else has


def test_a_deployment_that_is_not_ours_is_refused_and_not_touched(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            theirs = {
                "metadata": {"name": "echo", "labels": {}},
                "spec": {"replicas": 0, "template": {"metadata": {"labels": {"kalium.io/revision": ""}}}},
            }
            before = json.dumps(site.cluster.put("deployments", theirs)["spec"])

            status, text = await site.deploy()

            assert (status, "did not make" in text) == (400, True), text
            assert json.dumps(site.cluster.objects["deployments"]["echo"]["spec"]) == before
            for method, path, body in (
                ("GET", "/system/function/echo", None),
                ("DELETE", "/system/functions", {"functionName": "echo"}),
                ("POST", "/system/scale-function/echo", {"replicas": 3}),
            ):
                assert (await site.call(method, path, body))[0] == 404
            assert (await site.invoke())[0] == 404

    play(story())


def test_a_service_that_is_not_ours_is_refused_and_not_touched(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            site.cluster.put("services", {"metadata": {"name": "echo"}, "spec": {"theirs": True}})

            status, text = await site.deploy()

            assert (status, "did not make" in text) == (400, True), text
            assert site.cluster.objects["deployments"] == {}
            assert site.cluster.objects["services"]["echo"]["spec"] == {"theirs": True}

    play(story())


def test_an_update_is_undone_when_somebody_else_has_the_name_of_its_service(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            site.cluster.drop("services", "echo")
            site.cluster.put("services", {"metadata": {"name": "echo"}, "spec": {"theirs": True}})

            assert (await site.deploy(image="shop/echo:2"))[0] == 400

            assert (await site.describe())["image"] == "shop/echo:1"
            assert (await site.invoke())[0] == 200
            assert (await site.call("DELETE", "/system/functions", {"functionName": "echo"}))[0] == 202
            assert site.cluster.objects["services"]["echo"]["spec"] == {"theirs": True}, "nor when the function is removed"

    play(story())


def test_a_service_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    """A name may begin with a digit as a Deployment's, and not as a Service's."""

    async def story() -> None:
        def no_digits(request: web.BaseRequest) -> web.Response | None:
            is_service = request.method == "POST" and request.path.endswith("/services")
            return status_of(422, "Invalid", "metadata.name: Invalid value: a DNS-1035 label") if is_service else None

        async with cluster_world(tmp_path, Cluster(intercept=no_digits)) as site:
            status, text = await site.deploy(name="1st")

            assert (status, "DNS-1035" in text) == (400, True), text
            assert site.cluster.objects["deployments"] == {}
            assert (await site.call("GET", "/system/function/1st"))[0] == 404

    play(story())


def test_a_service_of_ours_that_is_left_is_taken_over(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            site.cluster.put("services", {"metadata": {"name": "echo", "labels": OURS, "ownerReferences": [{"uid": "of-before"}]}, "spec": {}})

            await deployed(site)

            (owner,) = site.cluster.objects["services"]["echo"]["metadata"]["ownerReferences"]
            assert owner["uid"] == site.cluster.objects["deployments"]["echo"]["metadata"]["uid"]

    play(story())


@pytest.mark.parametrize(("name", "status"), [("absent", 400), ("theirs", 400), ("key", 202)])
def test_secrets_have_to_be_there_and_ours(tmp_path: Path, name: str, status: int) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            site.cluster.put("secrets", {"metadata": {"name": "theirs"}, "data": {"theirs": "dg=="}})
            assert (await site.call("POST", "/system/secrets", {"name": "key", "value": "v"}))[0] == 202

            assert (await site.deploy(secrets=[name]))[0] == status

            assert set(site.cluster.objects["deployments"]) == ({"echo"} if status == 202 else set())

    play(story())


def test_secrets_are_ours_alone_and_their_values_are_asked_for_by_nobody(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            accepted: list[str] = []

            def listens(request: web.BaseRequest) -> None:
                if request.method == "GET" and "/secrets" in request.path:
                    accepted.append(request.headers["Accept"])

            site.cluster.intercept = listens
            site.cluster.put("secrets", {"metadata": {"name": "theirs"}, "data": {"theirs": "dg=="}})

            async def secret(method: str, name: str, value: str = "v") -> int:
                return (await site.call(method, "/system/secrets", {"name": name, "value": value}))[0]

            assert [await secret("POST", "key"), await secret("POST", "key"), await secret("POST", "theirs")] == [202, 409, 409]
            assert [await secret("PUT", "key", "w"), await secret("PUT", "absent"), await secret("PUT", "theirs")] == [202, 404, 404]
            assert site.cluster.objects["secrets"]["key"]["data"] == {"key": "dw=="}
            assert json.loads((await site.call("GET", "/system/secrets"))[1]) == [{"name": "key", "namespace": "openfaas-fn"}]
            assert [await secret("DELETE", "theirs"), await secret("DELETE", "key"), await secret("DELETE", "key")] == [404, 202, 404]
            assert set(site.cluster.objects["secrets"]) == {"theirs"}
            assert accepted
            assert all("PartialObjectMetadata" in accept for accept in accepted)

    play(story())


def test_a_node_that_the_site_does_not_want_is_refused(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path, node_selector={"pool": "functions"}) as site:
            assert (await site.deploy(constraints=["pool=control"]))[0] == 400
            assert site.cluster.objects["deployments"] == {}

    play(story())


# Who gets requests


def test_old_pods_serve_until_a_new_one_is_ready_and_then_no_more(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(lets_go=False)) as site:
            await deployed(site)
            site.cluster.kubelet = lambda pod: running(is_ready=False)
            assert await site.deploy(image="shop/echo:2") == (202, "")

            assert (await site.describe())["availableReplicas"] == 0
            assert (await site.invoke())[1] == "echo-1"
            site.cluster.say("echo-2", running())
            await site.ready()

            assert {(await site.invoke())[1] for _ in range(4)} == {"echo-2"}

    play(story())


def test_ready_pods_of_the_last_revision_take_requests_though_old_ones_are_not_ending_yet(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site, labels={"com.openfaas.scale.min": "2"})
            site.cluster.kubelet = lambda pod: running(is_ready=False)
            assert await site.deploy(image="shop/echo:2", labels={"com.openfaas.scale.min": "2"}) == (202, "")
            new = next(pod["metadata"]["name"] for pod in site.cluster.pods() if image_of(pod) == "shop/echo:2")

            site.cluster.say(new, running())
            await site.ready()

            assert len(site.cluster.pods()) == 4, "both old ones are still there"
            assert {(await site.invoke())[1] for _ in range(4)} == {new}

    play(story())


def test_a_request_that_an_old_pod_has_is_answered_by_it(tmp_path: Path) -> None:
    async def story() -> None:
        release = asyncio.Event()

        async def slow(pod: str, head: str, body: str) -> bytes:
            if pod == "echo-1":
                await release.wait()
            return http_answer(200, pod.encode())

        async with cluster_world(tmp_path, Cluster(answering=slow, lets_go=False)) as site:
            await deployed(site)
            asking = asyncio.ensure_future(site.invoke())
            await until(lambda: site.cluster.requests, "the request to be there")

            await deployed(site, image="shop/echo:2")
            assert (await site.invoke())[1] == "echo-2"
            release.set()

            assert (await asking)[:2] == (200, "echo-1")

    play(story())


def test_a_pod_that_is_ending_gets_no_request(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(lets_go=False)) as site:
            await deployed(site, labels={"com.openfaas.scale.min": "2"})
            site.cluster.kubelet = lambda pod: running(is_ready=False)
            site.cluster.delete_pod("echo-1")
            await site.ready(replicas=1)

            assert {(await site.invoke())[1] for _ in range(4)} == {"echo-2"}

    play(story())


def test_a_pod_of_another_deployment_of_the_name_gets_no_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `kubectl delete --cascade=orphan` leaves one."""

    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            site.cluster.has_controllers = False
            site.cluster.drop("deployments", "echo")
            await until(lambda: site.on.find("echo") is None, "the function to be gone")
            monkeypatch.setattr("kalium.engine.kubernetes.backend.ADMIT_SECONDS_MAX", 0.02)
            assert await site.deploy() == (202, "")

            site.cluster.say("echo-1", {**running(), "message": "the kubelet still has something to say"})
            await until(lambda: site.on._pods.reflection.version == str(site.cluster.version), "that to be heard")

            assert (await site.invoke())[0] == 503
            assert (await site.describe())["availableReplicas"] == 0

    play(story())


def test_a_request_in_a_pod_that_goes_is_answered_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async def never(pod: str, head: str, body: str) -> bytes:
            await asyncio.sleep(60)
            raise AssertionError

        async with cluster_world(tmp_path, Cluster(answering=never)) as site:
            await deployed(site)
            asking = asyncio.ensure_future(site.invoke())
            await until(lambda: site.cluster.requests, "the request to be there")

            site.cluster.drop("pods", "echo-1")

            assert (await asking)[0] == 502

    play(story())


def test_a_process_that_ends_is_replaced_and_what_it_said_is_told(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            site.cluster.kubelet = lambda pod: running(is_ready=False)

            site.cluster.say("echo-1", ended(3))
            await until(lambda: site.cluster.made == 2, "another pod")

            assert "exit code 3" in await site.reason()
            assert await site.reason() == site.events("instance_ended")[0]["detail"]
            assert "something was printed" in await site.reason()
            site.cluster.say("echo-2", running())
            await site.ready()
            assert (await site.invoke())[1] == "echo-2"

    play(story())


def test_a_pod_that_does_not_answer_any_more_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalium.engine.instance.READY_SECONDS_MAX", 0.02)

    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(health=lambda pod: 500 if pod == "echo-1" else 200)) as site:
            await deployed(site)

            site.cluster.say("echo-1", running(is_ready=False))
            await until(lambda: site.cluster.made == 2, "another pod")
            await site.ready()

            assert (await site.invoke())[1] == "echo-2"
            assert "answered 500" in site.events("instance_ended")[0]["detail"]

    play(story())


def test_a_pod_that_the_kubelet_suspects_goes_on_when_it_answers_us(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)

            site.cluster.say("echo-1", running(is_ready=False))
            await until(lambda: site.events("instance_suspected"), "the suspicion")

            assert (await site.invoke())[:2] == (200, "echo-1")
            assert site.cluster.made == 1

    play(story())


def test_a_pod_whose_guard_retires_it_is_replaced_and_the_request_waits(tmp_path: Path) -> None:
    async def story() -> None:
        async def answering(pod: str, head: str, body: str) -> bytes:
            return RETIRED if pod == "echo-1" else http_answer(200, pod.encode())

        async with cluster_world(tmp_path, Cluster(answering=answering)) as site:
            await deployed(site, labels=GUARDED, annotations=APP)

            assert (await site.invoke())[:2] == (200, "echo-2")
            assert site.cluster.requests == ["echo-1", "echo-2"]

    play(story())


def test_a_pod_that_is_retired_is_deleted_when_the_requests_in_it_have_ended(tmp_path: Path) -> None:
    async def story() -> None:
        release = asyncio.Event()

        async def answering(pod: str, head: str, body: str) -> bytes:
            if pod == "echo-1" and body == "first":
                await release.wait()
            elif pod == "echo-1":
                return RETIRED
            return http_answer(200, pod.encode())

        async with cluster_world(tmp_path, Cluster(answering=answering)) as site:
            await deployed(site, labels={**GUARDED, "com.openfaas.scale.min": "2"}, annotations={**APP, "kalium.io/max-inflight": "2"})
            first = [asyncio.ensure_future(site.invoke(body=b"first")) for _ in range(2)]
            await until(lambda: len(site.cluster.requests) == 2 and first[0].done() != first[1].done(), "one of them to be in echo-1")

            await asyncio.gather(*(site.invoke(body=b"second") for _ in range(3)))
            await until(lambda: site.events("instance_retired"), "its end to be told")
            await asyncio.sleep(0.02)
            assert not site.cluster.count("pods/echo-1"), "it still has a request"
            release.set()

            assert {text for _, text, _ in await asyncio.gather(*first)} == {"echo-1", "echo-2"}
            await until(lambda: site.cluster.count("DELETE /api/v1/namespaces/openfaas-fn/pods/echo-1"), "its deletion")

    play(story())


@pytest.mark.parametrize("is_guarded", [True, False])
def test_whether_there_is_a_guard_is_what_the_last_deployment_says(tmp_path: Path, is_guarded: bool) -> None:
    """A program without a guard is not believed when it says `retired`, and a guard is, also when it was another way before."""

    async def story() -> None:
        async def answering(pod: str, head: str, body: str) -> bytes:
            return RETIRED if pod == "echo-2" else http_answer(200, pod.encode())

        guarded: dict[str, Any] = {"labels": GUARDED, "annotations": APP}
        async with cluster_world(tmp_path, Cluster(answering=answering)) as site:
            await deployed(site, **({} if is_guarded else guarded))
            await deployed(site, **(guarded if is_guarded else {}))

            status, text, _ = await site.invoke()

            assert (status, text) == ((200, "echo-3") if is_guarded else (503, '{"error": "retired"}'))

    play(story())


# Scaling, removing


def test_a_function_is_scaled(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)

            assert (await site.call("POST", "/system/scale-function/echo", {"replicas": 3}))[0] == 202
            await site.ready(replicas=3)
            assert len({(await site.invoke())[1] for _ in range(6)}) == 3

            assert (await site.call("POST", "/system/scale-function/echo", {"replicas": 0}))[0] == 202
            assert (await site.describe())["replicas"] == 0
            assert await site.reason() == "it is scaled to 0 replicas"
            assert (await site.invoke())[0] == 503

            assert (await site.call("POST", "/system/scale-function/echo", {"replicas": 1}))[0] == 202
            await site.ready(replicas=1)
            assert [(await site.call("POST", "/system/scale-function/echo", {"replicas": n}))[0] for n in (-1, 17)] == [400, 400]
            assert (await site.call("POST", "/system/scale-function/absent", {"replicas": 1}))[0] == 404

    play(story())


def test_a_function_that_is_scaled_to_nothing_takes_no_request_though_its_pods_do_not_know_yet(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            site.cluster.has_controllers = False

            assert (await site.call("POST", "/system/scale-function/echo", {"replicas": 0}))[0] == 202

            assert (await site.invoke())[0] == 503

    play(story())


def test_a_function_that_is_removed_is_gone_at_once_and_its_pods_are_told_to_end(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(lets_go=False)) as site:
            await deployed(site)
            uid = site.cluster.pods()[0]["metadata"]["uid"]

            assert (await site.call("DELETE", "/system/functions", {"functionName": "echo"}))[0] == 202

            assert (await site.call("GET", "/system/function/echo"))[0] == 404
            assert json.loads((await site.call("GET", "/system/functions"))[1]) == []
            assert (await site.invoke())[0] == 404
            assert (site.cluster.objects["deployments"], site.cluster.objects["services"]) == ({}, {})
            await until(lambda: site.cluster.count("DELETE /api/v1/namespaces/openfaas-fn/pods/echo-1"), "the pod's deletion")
            options = next(body for line, body in site.cluster.bodies if line.startswith("DELETE") and line.endswith("/pods/echo-1"))
            assert (options["preconditions"], options["gracePeriodSeconds"]) == ({"uid": uid}, 1)
            assert (await site.call("DELETE", "/system/functions", {"functionName": "echo"}))[0] == 404

    play(story())


def test_what_was_changed_is_so_before_a_watch_tells(tmp_path: Path) -> None:
    """A client that asks after its 202 sees what it did."""

    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            site.cluster.is_quiet = True

            assert (await site.call("POST", "/system/scale-function/echo", {"replicas": 2}))[0] == 202
            assert (await site.describe())["replicas"] == 2

            assert (await site.call("DELETE", "/system/functions", {"functionName": "echo"}))[0] == 202
            assert (await site.call("GET", "/system/function/echo"))[0] == 404
            assert (await site.invoke())[0] == 404

    play(story())


def test_a_request_in_a_function_that_is_removed_is_answered_when_its_pod_goes(tmp_path: Path) -> None:
    async def story() -> None:
        async def never(pod: str, head: str, body: str) -> bytes:
            await asyncio.sleep(60)
            raise AssertionError

        async with cluster_world(tmp_path, Cluster(answering=never, lets_go=False)) as site:
            await deployed(site)
            asking = asyncio.ensure_future(site.invoke())
            await until(lambda: site.cluster.requests, "the request to be there")
            assert (await site.call("DELETE", "/system/functions", {"functionName": "echo"}))[0] == 202
            await asyncio.sleep(0.01)
            assert not asking.done(), "its pod may still answer"

            site.cluster.drop("pods", "echo-1")

            assert (await asyncio.wait_for(asking, 5))[0] == 502

    play(story())


def test_functions_are_listed_by_name(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            for name in ("zebra", "ant", "middle"):
                assert await site.deploy(name) == (202, "")

            assert [entry["name"] for entry in json.loads((await site.call("GET", "/system/functions"))[1])] == ["ant", "middle", "zebra"]

    play(story())


def test_what_somebody_else_does_to_a_deployment_is_seen(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)

            site.cluster.objects["deployments"]["echo"]["spec"]["replicas"] = 2
            site.cluster.put("deployments", site.cluster.objects["deployments"]["echo"])
            site.cluster.reconcile()
            assert (await site.ready(replicas=2))["replicas"] == 2

            site.cluster.drop("deployments", "echo")
            await until(lambda: site.on.find("echo") is None, "the function to be gone")
            assert (await site.invoke())[0] == 404

    play(story())


def test_a_deployment_that_somebody_made_unreadable_is_said_and_the_others_serve(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            site.cluster.put("events", {"metadata": {"name": "nothing"}})  # nor does an event that says nothing matter
            odd = {
                "metadata": {"name": "odd", "labels": OURS},
                "spec": {"replicas": 0, "template": {"metadata": {"labels": {"kalium.io/revision": "a.1"}}}},
            }
            site.cluster.put("deployments", odd)
            await until(lambda: site.events("function_unreadable"), "the complaint")

            assert site.events("function_unreadable")[0]["path"] == "deployments/odd"
            assert (await site.invoke())[0] == 200
            assert (await site.call("GET", "/system/function/odd"))[0] == 404

    play(story())


def test_usage_is_what_the_metrics_say_of_ready_pods_and_absent_where_there_are_none(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            assert "usage" not in json.loads((await site.call("GET", "/system/function/echo?usage=1"))[1])

            containers = [{"usage": {"cpu": "1500000n", "memory": "2Mi"}}]
            site.cluster.metrics = {"metadata": {}, "items": [{"metadata": {"name": n}, "containers": containers} for n in ("echo-1", "echo-0")]}
            assert json.loads((await site.call("GET", "/system/function/echo?usage=1"))[1])["usage"] == {"cpu": 1.5, "totalMemoryBytes": 2 << 20}

            containers[0]["usage"]["cpu"] = "much"
            assert "usage" not in json.loads((await site.call("GET", "/system/function/echo?usage=1"))[1])

    play(story())


def test_logs_are_those_of_the_pods_with_their_times(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)

            status, text, _ = await site.call("GET", "/system/logs?name=echo&tail=5&since=2026-01-01T01:00:00%2B01:00")

            assert status == 200
            assert [json.loads(line) for line in text.splitlines()] == [
                {
                    "name": "echo",
                    "namespace": "openfaas-fn",
                    "instance": "echo-1",
                    "timestamp": "2026-01-01T00:00:00Z",
                    "text": "something was printed",
                }
            ]

    play(story())


@pytest.mark.parametrize(("status", "told"), [(400, (200, "")), (404, (200, "")), (403, (500, "no rights"))])
def test_a_pod_without_a_log_has_none_and_other_refusals_are_told(tmp_path: Path, status: int, told: tuple[int, str]) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            site.cluster.intercept = lambda request: status_of(status, "x", "no rights") if request.path.endswith("/log") else None

            answered, text, _ = await site.call("GET", "/system/logs?name=echo")

            assert answered == told[0]
            assert told[1] in text
            assert answered != 200 or text == ""

    play(story())


# Two at once


def test_two_deployments_of_one_name_come_one_after_the_other(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(kubelet=lambda pod: waiting("ContainerCreating"))) as site:
            deploying = [asyncio.ensure_future(site.deploy(image=f"shop/echo:{number}")) for number in (1, 2)]
            await until(site.cluster.pods, "a pod of the first")
            await asyncio.sleep(0.02)
            assert (site.cluster.count("POST /apis"), site.cluster.count("PUT /apis")) == (1, 0), "the second waits for the first"

            site.cluster.kubelet = lambda pod: running()
            site.cluster.say("echo-1", running())

            assert await asyncio.gather(*deploying) == [(202, ""), (202, "")]
            await site.ready()
            assert (site.cluster.made, (await site.describe())["image"]) == (2, image_of(site.cluster.pods()[-1]))

    play(story())


def test_a_slow_deployment_of_one_name_does_not_hold_up_another(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(kubelet=only_runs("shop/fast:1", waiting("ContainerCreating")))) as site:
            slow = asyncio.ensure_future(site.deploy())
            await until(site.cluster.pods, "a pod of the slow one")

            assert await site.deploy("fast", image="shop/fast:1") == (202, "")

            assert not slow.done()
            site.cluster.say("echo-1", running())
            assert await slow == (202, "")

    play(story())


def test_a_function_that_is_removed_while_it_is_deployed_is_removed_after_that(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(kubelet=lambda pod: waiting("ContainerCreating"))) as site:
            deploying = asyncio.ensure_future(site.deploy())
            await until(site.cluster.pods, "a pod")
            removing = asyncio.ensure_future(site.call("DELETE", "/system/functions", {"functionName": "echo"}))
            await asyncio.sleep(0.01)
            assert not removing.done()

            site.cluster.say("echo-1", running())

            assert await deploying == (202, "")
            assert (await removing)[0] == 202
            assert site.cluster.objects["deployments"] == {}

    play(story())


def test_a_deployment_that_somebody_deletes_while_it_begins_is_not_waited_for(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path, Cluster(kubelet=lambda pod: waiting("ContainerCreating"))) as site:
            deploying = asyncio.ensure_future(site.deploy())
            await until(lambda: site.cluster.pods() and site.on._table, "a pod")

            site.cluster.drop("deployments", "echo")

            assert await deploying == (202, "")

    play(story())


# A gateway that starts


def test_a_gateway_that_starts_finds_what_there_is(tmp_path: Path) -> None:
    async def story() -> None:
        cluster = Cluster()
        async with api_server(cluster) as url:
            async with gateway(tmp_path, cluster, url) as site:
                await deployed(site, labels={**GUARDED, "com.openfaas.scale.min": "2"}, annotations={**APP, "kalium.io/max-inflight": "4"})
                before = await site.describe()

            async with gateway(tmp_path, cluster, url) as site:
                assert await site.describe() == before, "at once"
                assert {(await site.invoke())[1] for _ in range(4)} == {"echo-1", "echo-2"}
                assert cluster.made == 2, "and nothing was made for it"
                assert await site.deploy(method="PUT") == (202, "")

    play(story())


def test_what_ended_while_there_was_no_gateway_is_replaced(tmp_path: Path) -> None:
    async def story() -> None:
        cluster = Cluster()
        async with api_server(cluster) as url:
            async with gateway(tmp_path, cluster, url) as site:
                await deployed(site)
            cluster.say("echo-1", ended(3))

            async with gateway(tmp_path, cluster, url) as site:
                await site.ready()

                assert (await site.invoke())[1] == "echo-2"

    play(story())


def test_a_gateway_that_starts_without_an_api_server_says_so_until_it_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        cluster = Cluster()
        async with api_server(cluster) as url:
            async with gateway(tmp_path, cluster, url) as site:
                await deployed(site)
            cluster.go_away()
            monkeypatch.setattr("kalium.engine.kubernetes.backend.BEGIN_SECONDS_MAX", 0.02)
            async with gateway(tmp_path, cluster, url) as site:
                assert (await site.invoke())[0] == 503, "a function that may well be there is not 404"
                assert (await site.call("GET", "/system/functions"))[0] == 503
                assert (await site.call("GET", "/system/info"))[0] == 200

                cluster.is_away = False
                await until(lambda: site.events("cluster_back"), "the API server to be heard")

                await site.ready()
                assert (await site.invoke())[0] == 200

    play(story())


def test_a_gateway_without_a_kubeconfig_does_not_start(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            (tmp_path / "gateway.conf").write_text("not: [a", encoding="utf-8")
            backend = KubernetesBackend(site.config, site.on._cluster, lambda event, **fields: None, lambda task: None)
            with pytest.raises(KaliumError, match="kubeconfig"):
                await backend.prepare()
            assert (await site.call("GET", "/system/functions"))[0] == 200, "one that serves goes on with what it read"
            assert await site.deploy() == (202, "")

    play(story())


# An API server that is away, forgets or talks nonsense


def test_requests_go_on_without_the_api_server_and_administration_does_not(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)

            site.cluster.go_away()
            await until(lambda: site.events("cluster_lost"), "the loss to be noticed")

            assert (await site.invoke())[:2] == (200, "echo-1")
            for method, path, body in (
                ("GET", "/system/functions", None),
                ("GET", "/system/function/echo", None),
                ("POST", "/system/functions", {"service": "echo", "image": "shop/echo:2"}),
                ("DELETE", "/system/functions", {"functionName": "echo"}),
                ("POST", "/system/scale-function/echo", {"replicas": 2}),
                ("GET", "/system/secrets", None),
                ("GET", "/system/logs?name=echo", None),
            ):
                status, text, _ = await site.call(method, path, body)
                assert (status, "API server" in text) == (503, True), (method, path, text)
            assert (await site.call("GET", "/system/info"))[0] == 200
            assert (await site.invoke("absent"))[0] == 404

            site.cluster.is_away = False
            await until(lambda: len(site.events("cluster_back")) == 2, "the API server to be back")
            assert (await site.describe())["availableReplicas"] == 1

    play(story())


def test_what_happened_while_the_api_server_was_away_is_known_after_that(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            site.cluster.go_away()
            await until(lambda: site.events("cluster_lost"), "the loss to be noticed")

            site.cluster.drop("pods", "echo-1")
            site.cluster.is_away = False
            await until(lambda: len(site.events("cluster_back")) == 2, "the API server to be back")

            await until(lambda: site.on._pods.reflection.version == str(site.cluster.version), "the news")
            assert (await site.invoke())[:2] == (200, "echo-2")

    play(story())


def test_a_pod_that_was_about_to_be_deleted_is_deleted_later(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            broken = [3]

            def breaks(request: web.BaseRequest) -> web.Response | None:
                if request.method == "DELETE" and "/pods/" in request.path and broken[0]:
                    broken[0] -= 1
                    return status_of(503, "ServiceUnavailable", "etcd has no leader")
                return None

            site.cluster.intercept = breaks
            site.cluster.say("echo-1", ended(3))

            await until(lambda: site.cluster.made == 2, "another pod")
            assert broken == [0]

    play(story())


def test_a_pod_that_may_not_be_deleted_is_said(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            site.cluster.intercept = lambda request: status_of(403, "Forbidden", "gateway cannot delete pods") if request.method == "DELETE" else None

            site.cluster.say("echo-1", ended(3))
            await until(lambda: site.events("instance_left"), "the complaint")

            assert "cannot delete" in site.events("instance_left")[0]["detail"]

    play(story())


@pytest.mark.parametrize("by", ["status", "event", "end", "nonsense", "no JSON"])
def test_a_watch_that_is_over_is_begun_again_and_nothing_is_missed(tmp_path: Path, by: str) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            await until(lambda: len(site.cluster.watches) == 3, "the watches")
            if by == "status":
                site.cluster.forgotten = site.cluster.version + 1
            said: dict[str, Any] = {
                "event": {"type": "ERROR", "object": {"kind": "Status", "code": 410}},
                "nonsense": {"type": "ADDED", "object": {"metadata": {"uid": "u", "resourceVersion": "1"}}},
                "no JSON": b"<html>\n",
            }
            site.cluster.shout(said.get(by))
            site.cluster.drop("pods", "echo-1", silently=by != "end")  # then only a new list tells

            await until(lambda: [pod["metadata"]["name"] for pod in site.on._pods.reflection.objects.values()] == ["echo-2"], "the news")
            await site.ready()
            assert (await site.invoke())[:2] == (200, "echo-2")
            assert not site.events("cluster_lost")

    play(story())


@pytest.mark.parametrize(
    "nonsense",
    [
        lambda: web.Response(text="<html>a proxy's page</html>"),
        lambda: web.json_response([]),
        lambda: web.json_response({"kind": "Status", "metadata": {}, "status": "Success"}),
        lambda: web.json_response({"kind": "Pod", "metadata": "none"}),
        lambda: web.json_response({"metadata": {"resourceVersion": "500"}, "items": [{"metadata": {"uid": "u", "resourceVersion": "1"}}]}),
        lambda: web.json_response({"metadata": {"resourceVersion": "500"}, "items": [None]}),
        lambda: status_of(500, "InternalError", "etcd"),
        lambda: status_of(401, "Unauthorized", "Unauthorized"),
    ],
    ids=["page", "list", "status", "no metadata", "no name", "null", "500", "401"],
)
def test_answers_that_are_none_cost_nothing_but_administration(tmp_path: Path, nonsense: Callable[[], web.Response]) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)
            site.cluster.intercept = lambda request: nonsense()

            status, text = await site.deploy()
            assert (status in (500, 503), text != "") == (True, True), text
            assert "Traceback" not in text
            site.cluster.shout(None)
            await until(lambda: site.events("cluster_lost"), "that to be noticed")
            assert (await site.call("GET", "/system/functions"))[0] == 503
            assert (await site.invoke())[:2] == (200, "echo-1")

            site.cluster.intercept = lambda request: None
            await until(lambda: len(site.events("cluster_back")) == 2, "the API server to be itself again")
            assert (await site.call("GET", "/system/function/echo"))[0] == 200

    play(story())


@pytest.mark.parametrize("answer", [web.Response, lambda: web.json_response({"kind": "Status", "metadata": {}})], ids=["nothing", "status"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_an_answer_of_another_kind_to_a_change_is_told(tmp_path: Path, method: str, answer: Callable[[], web.Response]) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            if method != "POST":
                await deployed(site)

            site.cluster.intercept = lambda request: answer() if request.method == method else None
            told = (await site.call("POST", "/system/scale-function/echo", {"replicas": 2}))[:2] if method == "PATCH" else await site.deploy()

            assert (told[0], "API server" in told[1]) == (503, True), told

    play(story())


def test_an_answer_without_metadata_is_no_object(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            site.cluster.intercept = lambda request: web.json_response({"answer": 1}) if "/secrets/" in request.path else None

            status, text = await site.deploy(secrets=["key"])

            assert (status, "API server" in text) == (503, True), text

    play(story())


@pytest.mark.parametrize(
    ("status", "message", "told"),
    [
        (422, "spec.template: Invalid value", 400),
        (403, 'admission webhook "policy" denied the request', 400),
        (403, 'User "gateway" cannot create resource "deployments"', 500),
        (409, "already exists", 400),
        (429, "too many requests", 503),
        (500, "etcd", 503),
    ],
)
def test_a_refusal_is_the_client_s_or_the_site_s(tmp_path: Path, status: int, message: str, told: int) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            site.cluster.intercept = lambda request: status_of(status, "Reason", message) if request.method == "POST" else None

            answered, text = await site.deploy()

            assert (answered, message in text) == (told, True), text

    play(story())


# A kubeconfig that is renewed


def test_a_kubeconfig_that_is_renewed_is_read_anew(tmp_path: Path) -> None:
    async def story() -> None:
        async with cluster_world(tmp_path) as site:
            await deployed(site)

            site.cluster.token = "second"
            write_kubeconfig(tmp_path / "gateway.conf", site.url, "second")

            assert await site.deploy("other") == (202, "")
            assert (await site.invoke())[0] == 200

    play(story())


def test_what_is_under_way_when_the_kubeconfig_is_renewed_ends_as_it_would(tmp_path: Path) -> None:
    async def story() -> None:
        release, held = asyncio.Event(), asyncio.Event()

        async def holds(request: web.BaseRequest) -> None:
            if request.method == "POST" and request.path.endswith("/deployments") and not held.is_set():
                held.set()
                await release.wait()

        async with cluster_world(tmp_path, Cluster(delay=holds)) as site:
            deploying = asyncio.ensure_future(site.deploy())
            await held.wait()
            before = site.on._api._client
            assert before is not None
            write_kubeconfig(tmp_path / "gateway.conf", site.url, site.cluster.token)
            assert (await site.call("GET", "/system/secrets"))[0] == 200  # the first request with the new one
            release.set()

            assert await deploying == (202, "")
            assert not site.events("cluster_lost"), "nor are watches broken off"
            assert not before.rest.pool_manager.closed
            site.cluster.shout(None)
            await until(lambda: before.rest.pool_manager.closed, "the connections of before to be closed when nothing uses them any more")

    play(story())
