"""Which pods of a cluster get a function's requests."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from kalium.engine.config import Config, KubernetesConfig, Listener, RuntimeClass
from kalium.engine.deployment import Refused, parse
from kalium.engine.instance import Health
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

    async def played() -> list[tuple[str, bool]]:
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

    return asyncio.run(played())


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


def test_a_functions_constraints_lead_to_no_node_that_the_site_keeps_from_functions() -> None:
    listener, path = Listener("127.0.0.1", 1), Path("/nowhere")
    cluster = KubernetesConfig(path, RUNTIMES, {"zone": "functions"})
    config = Config(listener, listener, "admin", path, {}, cluster, path, 8080, "/_/health", None)

    def selector(constraint: str) -> Any:
        deployment = parse({"service": "pay", "image": "pay:1", "constraints": [constraint]}, RUNTIMES, KEEPS)
        return deployment_object(deployment, "a.1", config, cluster)["spec"]["template"]["spec"]["nodeSelector"]

    assert selector("disk=ssd") == {"zone": "functions", "disk": "ssd"}
    assert selector("zone=functions") == {"zone": "functions"}
    with pytest.raises(Refused, match="where it is functions"):
        selector("zone=control")
