"""Which pods of a cluster get a function's requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from kalium.engine.config import Config, KubernetesConfig, Listener, RuntimeClass
from kalium.engine.deployment import Deployment, Refused, parse
from kalium.engine.instance import Health
from kalium.engine.kubernetes.api import Rejected
from kalium.engine.kubernetes.backend import KubernetesBackend
from kalium.engine.kubernetes.functions import ClusterFunction, Hands
from kalium.engine.kubernetes.objects import KEEPS, Found, Pod, deployment_object, read_pod

RUNTIMES = {"stock": RuntimeClass("gvisor", False), "kalium": RuntimeClass("kalium", True)}
OURS = {"kalium.io/app": "shop", "kalium.io/function": "pay"}


def found(runtime: str, revision: str) -> Found:
    """The function `pay` as its Deployment says."""
    annotations = {"kalium.io/app": "shop"} if runtime == "kalium" else {}
    document = {"service": "pay", "image": "pay:1", "labels": {"kalium.io/runtime": runtime}, "annotations": annotations}
    return Found(parse(document, RUNTIMES), uid="d", revision=revision, replicas=1, created="2026-01-01T00:00:00Z", refusal="")


def pod(name: str, revision: str, runtime_class: str | None, annotations: dict[str, str] | None = None) -> Pod:
    """A ready pod with the labels of `pay`, which whoever may make pods can give it."""
    return read_pod({
        "metadata": {"uid": name, "name": name, "labels": {"faas_function": "pay", "kalium.io/revision": revision}, "annotations": annotations},
        "spec": {"nodeName": "node1", "runtimeClassName": runtime_class},
        "status": {"podIP": "10.217.1.9", "conditions": [{"type": "Ready", "status": "True"}], "containerStatuses": [{"state": {"running": {}}}]},
    })  # fmt: skip


def serving(first: Found, *later: Found, pods: tuple[Pod, ...]) -> list[tuple[str, bool]]:
    """Which pods get requests in the end, and whether each may say for its guard that it is retired."""

    async def story() -> list[tuple[str, bool]]:
        tasks: list[asyncio.Task[None]] = []

        def spawn(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
            tasks.append(asyncio.get_running_loop().create_task(work))
            return tasks[-1]

        async def delete_pod(_: Pod) -> None: ...

        async def last_words(_: Pod) -> str:
            return ""

        hands = Hands(
            health=Health(8080, "/_/health"), log=lambda *_, **__: None, spawn=spawn, delete_pod=delete_pod, last_words=last_words,
            warning_of=lambda _: "",
        )  # fmt: skip
        function = ClusterFunction(first, hands, RUNTIMES)
        for seen in pods:
            function.see(seen)
        for update in later:
            function.update(update)
        taken = sorted((instance.name, instance.is_guarded) for instance in function.slots.ready() if hasattr(instance, "name"))
        function.close()
        for task in tasks:
            task.cancel()
        return taken

    return asyncio.run(story())


def test_a_guarded_functions_pod_gets_its_requests() -> None:
    assert serving(found("kalium", "a.1"), pods=(pod("own", "a.1", "kalium", OURS),)) == [("own", True)]
    assert serving(found("stock", "a.1"), pods=(pod("own", "a.1", "gvisor"),)) == [("own", False)]


@pytest.mark.parametrize(
    ("runtime_class", "annotations"),
    [
        ("gvisor", None),
        (None, None),
        (None, OURS),
        ("kalium", {**OURS, "kalium.io/app": "bank"}),
        ("kalium", {**OURS, "kalium.io/function": "ship"}),
        ("kalium", None),
    ],
)
def test_a_pod_that_only_has_a_guarded_functions_labels_gets_none(runtime_class: str | None, annotations: dict[str, str] | None) -> None:
    stranger = pod("stranger", "a.1", runtime_class, annotations)

    assert serving(found("kalium", "a.1"), pods=(stranger,)) == []
    assert serving(found("kalium", "a.1"), pods=(pod("own", "a.1", "kalium", OURS), stranger)) == [("own", True)]


def test_pods_without_a_guard_serve_no_more_once_the_function_has_one() -> None:
    """Also before the first pod with a guard is ready, which it never may be."""
    assert serving(found("stock", "a.1"), found("kalium", "a.2"), pods=(pod("old", "a.1", "gvisor"),)) == []


def test_a_function_that_was_given_a_guard_hears_it() -> None:
    """`retired` is a guard's word, and whether there is one is the pod's matter."""
    pods = (pod("old", "a.1", "gvisor"), pod("new", "a.2", "kalium", OURS))

    assert serving(found("stock", "a.1"), found("kalium", "a.2"), pods=pods) == [("new", True)]
    pods = (pod("old", "a.1", "kalium", OURS), pod("new", "a.2", "gvisor"))
    assert serving(found("kalium", "a.1"), found("stock", "a.2"), pods=pods) == [("new", False)]


def config_with(node_selector: dict[str, str]) -> tuple[Config, KubernetesConfig]:
    listener, path = Listener("127.0.0.1", 1), Path("/nowhere")
    cluster = KubernetesConfig(path, RUNTIMES, node_selector)
    return Config(listener, listener, "admin", path, {}, cluster, path, 8080, "/_/health", None), cluster


class FakeApi:
    """An API server with objects by their path. It takes no Service whose name begins with a digit, as the real one."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, Any]] = {}
        self._version = 0

    async def ask(self, method: str, path: str, *, body: Any = None, **_: Any) -> dict[str, Any]:
        if method == "POST":
            path = f"{path}/{body['metadata']['name']}"
            if path in self.objects:
                raise Rejected(409, "AlreadyExists", "already exists")
            if "/services/" in path and body["metadata"]["name"][0].isdigit():
                raise Rejected(422, "Invalid", "a DNS-1035 label must start with an alphabetic character")
        elif path not in self.objects:
            raise Rejected(404, "NotFound", "not found")
        if method == "DELETE":
            return self.objects.pop(path)
        if method in ("POST", "PUT"):
            self._version += 1
            given = {"uid": f"uid-{self._version}", **body["metadata"]}
            made = {"creationTimestamp": "2026-01-01T00:00:00Z", "resourceVersion": str(self._version)}
            self.objects[path] = {**body, "metadata": given | made}
        return self.objects[path]


def played(api: FakeApi, story: Callable[[KubernetesBackend], Coroutine[Any, Any, None]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Play a story with a gateway on that API server, of which nothing starts."""
    monkeypatch.setattr("kalium.engine.kubernetes.backend.ADMIT_SECONDS_MAX", 0)
    backend = KubernetesBackend(*config_with({}), lambda *_, **__: None, lambda _: None)
    monkeypatch.setattr(backend, "_api", api)
    for watcher in (backend._deployments, backend._pods):
        watcher.lost, watcher.reflection.is_synced = "", True
    asyncio.run(story(backend))


SERVICES, DEPLOYMENTS = "/api/v1/namespaces/openfaas-fn/services", "/apis/apps/v1/namespaces/openfaas-fn/deployments"
STRANGERS: dict[str, Any] = {"metadata": {"name": "pay", "uid": "stranger", "labels": {}}, "spec": {}}


def deployment(name: str = "pay", image: str = "pay:1") -> Deployment:
    return parse({"service": name, "image": image}, RUNTIMES, KEEPS)


def test_a_service_that_the_gateway_did_not_make_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name is refused for a function, and neither that nor a removal takes it away."""
    api = FakeApi()
    api.objects[f"{SERVICES}/pay"] = STRANGERS

    async def story(backend: KubernetesBackend) -> None:
        with pytest.raises(Refused, match="a Service pay that this gateway did not make"):
            await backend.deploy(deployment(), must_exist=False)
        assert list(api.objects) == [f"{SERVICES}/pay"]

        del api.objects[f"{SERVICES}/pay"]
        await backend.deploy(deployment(), must_exist=False)
        assert set(api.objects) == {f"{DEPLOYMENTS}/pay", f"{SERVICES}/pay"}
        api.objects[f"{SERVICES}/pay"] = STRANGERS
        with pytest.raises(Refused, match="did not make"):
            await backend.deploy(deployment(image="pay:2"), must_exist=True)
        assert api.objects[f"{DEPLOYMENTS}/pay"]["spec"]["template"]["spec"]["containers"][0]["image"] == "pay:1"
        await backend.remove("pay")
        assert list(api.objects) == [f"{SERVICES}/pay"]

    played(api, story, monkeypatch)


def test_what_cannot_have_a_service_is_not_left_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeApi()

    async def story(backend: KubernetesBackend) -> None:
        with pytest.raises(Refused, match="DNS-1035"):
            await backend.deploy(deployment("1st"), must_exist=False)
        assert (api.objects, backend.all()) == ({}, [])

    played(api, story, monkeypatch)


def test_a_functions_constraints_lead_to_no_node_that_the_site_keeps_from_functions() -> None:
    config, cluster = config_with({"zone": "functions"})

    def selector(constraint: str) -> Any:
        asked = parse({"service": "pay", "image": "pay:1", "constraints": [constraint]}, RUNTIMES, KEEPS)
        return deployment_object(asked, "a.1", config, cluster)["spec"]["template"]["spec"]["nodeSelector"]

    assert selector("disk=ssd") == {"zone": "functions", "disk": "ssd"}
    assert selector("zone=functions") == {"zone": "functions"}
    with pytest.raises(Refused, match="where it is functions"):
        selector("zone=control")


@pytest.mark.parametrize(
    ("image", "policy"), [("localhost/kalium/pay:0123", "Never"), ("docker.io/library/pay:1", "IfNotPresent"), ("pay:1", "IfNotPresent")]
)
def test_an_image_that_was_brought_to_the_nodes_is_asked_of_nobody(image: str, policy: str) -> None:
    made = deployment_object(deployment(image=image), "a.1", *config_with({}))

    assert made["spec"]["template"]["spec"]["containers"][0]["imagePullPolicy"] == policy
