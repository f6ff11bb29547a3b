"""A function as objects of Kubernetes: what a pod has, what a client cannot put into it, and that it reads back as it was asked for."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from engine_world import APP, GUARDED, PORT
from hypothesis import given
from hypothesis import strategies as st
from kubernetes_world import Object, cluster_config, condition, ended, running, waiting

from kalium.engine.config import KubernetesConfig
from kalium.engine.deployment import Deployment, Refused, parse
from kalium.engine.kubernetes.objects import (
    KEEPS,
    Found,
    deployment_object,
    first_revision,
    is_ours,
    lineage,
    next_revision,
    read_deployment,
    read_pod,
    secret_object,
    service_object,
)
from kalium.engine.limits import NAME_CHARACTERS_MAX

CONFIG = cluster_config(Path(), node_selector={"kalium.io/functions": "yes"})  # names no file that is read
assert isinstance(CONFIG.backend, KubernetesConfig)
CLUSTER = CONFIG.backend
WHOLE: dict[str, Any] = {
    "envProcess": "python index.py",
    "envVars": {"PRICE": "$5 of $(HOME) and $$", "EMPTY": ""},
    "labels": {**GUARDED, "team": "pay", "com.openfaas.scale.min": "3"},
    "annotations": {**APP, "kalium.io/max-inflight": "4", "kalium.io/timers": "on", "kalium.io/tls": "terminate", "topic": "sales"},
    "secrets": ["key", "other.key"],
    "readOnlyRootFilesystem": True,
    "constraints": ["kubernetes.io/hostname=node1"],
    "limits": {"memory": "64Mi", "cpu": "250m"},
    "requests": {"memory": "32Mi"},
}


def asked(name: str = "echo", image: str = "shop/echo:1", **fields: Any) -> Deployment:
    return parse({"service": name, "image": image, **fields}, CLUSTER.runtimes, KEEPS)


def made(revision: str = "abc.1", **fields: Any) -> Object:
    return deployment_object(asked(**fields), revision, CONFIG, CLUSTER)


def pod_of(**fields: Any) -> Object:
    spec: Object = made(**fields)["spec"]["template"]["spec"]
    return spec


def container_of(**fields: Any) -> Object:
    (container,) = pod_of(**fields)["containers"]
    return dict(container)


def as_answered(document: Object, **status: Any) -> Object:
    """As the API server has it."""
    metadata = {**document["metadata"], "uid": "u1", "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {**document, "metadata": metadata, "status": status}


def read(document: Object) -> Found:
    return read_deployment(document, CLUSTER.runtimes, CLUSTER.node_selector)


# Who a pod is


def test_a_pod_without_a_guard_has_no_annotation_whatever_the_client_gives() -> None:
    annotations = {
        "kalium.io/max-inflight": "4",
        "kalium.io/timers": "on",
        "topic": "sales",
        "dev.gvisor.flag.debug": "true",
        "io.kubernetes.cri": "x",
    }

    template = made(annotations=annotations)["spec"]["template"]

    assert template["metadata"]["annotations"] == {}
    assert template["spec"]["runtimeClassName"] == "gvisor"


def test_a_pod_under_a_guard_says_who_it_is_and_what_its_guard_is_told_and_nothing_else() -> None:
    template = made(**{**WHOLE, "annotations": {**WHOLE["annotations"], "dev.gvisor.flag.debug": "true"}})["spec"]["template"]

    assert template["metadata"]["annotations"] == {
        "kalium.io/function": "echo",
        "kalium.io/app": "shop",
        "kalium.io/max-inflight": "4",
        "kalium.io/timers": "on",
        "kalium.io/tls": "terminate",
    }
    assert template["spec"]["runtimeClassName"] == "kalium-class"


def test_what_was_not_given_is_no_annotation_of_a_pod() -> None:
    template = made(labels=GUARDED, annotations=APP)["spec"]["template"]

    assert template["metadata"]["annotations"] == {"kalium.io/function": "echo", "kalium.io/app": "shop"}


@pytest.mark.parametrize("annotation", ["kalium.io/function", "kalium.io/address", "kalium.io/reason"])
def test_a_client_cannot_say_who_a_pod_is(annotation: str) -> None:
    with pytest.raises(Refused, match="gateway's own"):
        made(labels=GUARDED, annotations={**APP, annotation: "other"})


def test_a_client_s_label_is_not_ours() -> None:
    """A Service selects by it, and the gateway counts by it whose a pod is."""
    document = made(labels={"faas_function": "other", "team": "pay"})
    template = document["spec"]["template"]

    assert template["metadata"]["labels"] == {
        "faas_function": "echo",
        "kalium.io/engine": "gateway",
        "kalium.io/revision": "abc.1",
        "team": "pay",
    }
    assert document["metadata"]["labels"] == {"faas_function": "echo", "kalium.io/engine": "gateway", "team": "pay"}
    assert document["spec"]["selector"] == {"matchLabels": {"faas_function": "echo"}}


@pytest.mark.parametrize("label", ["kalium.io/engine", "kalium.io/revision", "kalium.io/anything"])
def test_our_labels_are_refused(label: str) -> None:
    with pytest.raises(Refused, match="is not known"):
        made(labels={label: "x"})


def test_a_pod_is_where_the_site_and_the_client_want_it() -> None:
    assert pod_of(**WHOLE)["nodeSelector"] == {"kalium.io/functions": "yes", "kubernetes.io/hostname": "node1"}
    assert pod_of()["nodeSelector"] == {"kalium.io/functions": "yes"}


def test_a_client_cannot_have_a_pod_where_the_site_does_not_want_it() -> None:
    with pytest.raises(Refused, match=r"kalium\.io/functions=no") as refused:
        made(constraints=["kalium.io/functions=no"])

    assert refused.value.status == 400
    assert pod_of(constraints=["kalium.io/functions=yes"])["nodeSelector"] == {"kalium.io/functions": "yes"}


# What a pod has


def test_a_container_has_no_capability_and_gets_no_privilege() -> None:
    container = container_of()

    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}, "readOnlyRootFilesystem": False}
    assert container_of(readOnlyRootFilesystem=True)["securityContext"]["readOnlyRootFilesystem"] is True


def test_a_pod_has_nothing_of_its_node_and_nothing_of_the_cluster() -> None:
    spec = pod_of()

    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False
    assert set(spec) == {
        "runtimeClassName", "automountServiceAccountToken", "enableServiceLinks", "restartPolicy", "dnsPolicy", "terminationGracePeriodSeconds",
        "nodeSelector", "hostAliases", "containers",
    }, "a new key of a pod is a new way out of a sandbox: say here why it is none"  # fmt: skip


def test_an_image_is_taken_from_the_node_when_it_is_there() -> None:
    container = container_of()

    assert (container["name"], container["image"], container["imagePullPolicy"]) == ("echo", "shop/echo:1", "IfNotPresent")
    assert container["ports"] == [{"name": "http", "containerPort": PORT, "protocol": "TCP"}]
    assert container_of(image="localhost/echo:1")["imagePullPolicy"] == "Never", "nor is anybody asked for what is the node's own"


def test_a_container_is_asked_for_its_health_path_often_only_until_it_answers() -> None:
    container = container_of()

    for probe in ("startupProbe", "readinessProbe"):
        assert container[probe]["httpGet"] == {"path": "/_/health", "port": PORT, "scheme": "HTTP"}
    assert (container["startupProbe"]["periodSeconds"], container["readinessProbe"]["periodSeconds"]) == (1, 10)
    assert "livenessProbe" not in container, "a second run in the same sandbox is nothing that the gateway serves"


def test_the_names_of_the_configuration_are_those_of_both_runtimes() -> None:
    expected = [{"ip": "127.66.0.1", "hostnames": ["database", "gateway"]}]

    assert pod_of()["hostAliases"] == expected
    assert pod_of(**WHOLE)["hostAliases"] == expected


def test_secrets_are_files_that_are_only_read() -> None:
    spec = pod_of(**WHOLE)

    (volume,) = spec["volumes"]
    assert volume["projected"]["sources"] == [
        {"secret": {"name": "key", "items": [{"key": "key", "path": "key"}]}},
        {"secret": {"name": "other.key", "items": [{"key": "other.key", "path": "other.key"}]}},
    ]
    assert spec["containers"][0]["volumeMounts"] == [{"name": volume["name"], "mountPath": "/var/openfaas/secrets", "readOnly": True}]


def test_a_secret_has_one_key_of_its_name() -> None:
    secret = secret_object("key", b"\x00value")

    assert secret["data"] == {"key": base64.b64encode(b"\x00value").decode()}
    assert is_ours(secret)


def test_a_dollar_in_a_variable_is_a_dollar() -> None:
    """Kubernetes would put another variable's value, or a Service's address, in the place of $(NAME)."""
    variables = {entry["name"]: entry["value"] for entry in container_of(envVars={"PRICE": "$(HOME) $$"}, envProcess="a $(B)")["env"]}

    assert variables == {"PRICE": "$$(HOME) $$$$", "fprocess": "a $$(B)"}


def test_limits_are_kept_and_not_invented() -> None:
    assert container_of()["resources"] == {}
    assert container_of(**WHOLE)["resources"] == {"limits": {"memory": "64Mi", "cpu": "250m"}, "requests": {"memory": "32Mi"}}


def test_an_old_pod_goes_when_a_new_one_is_ready() -> None:
    spec = made(labels={"com.openfaas.scale.min": "3"})["spec"]

    assert spec["replicas"] == 3
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}


def test_a_service_is_of_the_function_and_goes_with_its_deployment() -> None:
    service = service_object(asked(), "u1", PORT)

    assert service["spec"] == {
        "type": "ClusterIP",
        "selector": {"faas_function": "echo"},
        "ports": [{"name": "http", "protocol": "TCP", "port": PORT, "targetPort": PORT}],
    }
    assert service["metadata"]["ownerReferences"] == [{"apiVersion": "apps/v1", "kind": "Deployment", "name": "echo", "uid": "u1"}]
    assert is_ours(service)


@pytest.mark.parametrize("name", ["a", "a" * NAME_CHARACTERS_MAX, "a-" + "0" * (NAME_CHARACTERS_MAX - 2)])
def test_a_name_at_the_limit_is_the_same_everywhere(name: str) -> None:
    document = made(name=name, labels=GUARDED, annotations=APP)

    template = document["spec"]["template"]
    names = {
        document["metadata"]["name"],
        document["spec"]["selector"]["matchLabels"]["faas_function"],
        template["metadata"]["labels"]["faas_function"],
        template["metadata"]["annotations"]["kalium.io/function"],
        template["spec"]["containers"][0]["name"],
        service_object(asked(name), "u1", PORT)["metadata"]["name"],
    }
    assert names == {name}
    assert read(as_answered(document)).deployment.name == name


# Revisions


def test_each_deployment_has_another_revision_of_the_same_lineage() -> None:
    first = first_revision("abc")
    second, third = next_revision(first), next_revision(next_revision(first))

    assert (first, second, third) == ("abc.1", "abc.2", "abc.3")
    assert {lineage(revision) for revision in (first, second, third)} == {"abc"}
    assert next_revision("abc.9") == "abc.10"


def test_what_is_deployed_again_makes_new_pods() -> None:
    """The same image may be another one since."""
    assert made(revision="abc.1")["spec"]["template"] != made(revision="abc.2")["spec"]["template"]


# Back


@pytest.mark.parametrize("fields", [{}, WHOLE, {"labels": GUARDED, "annotations": APP}], ids=["least", "whole", "guarded"])
def test_a_deployment_reads_back_as_it_was_asked_for(fields: dict[str, Any]) -> None:
    found = read(as_answered(json.loads(json.dumps(made(revision="abc.7", **fields)))))

    assert found.deployment == asked(**fields)
    assert (found.uid, found.revision, found.created, found.refusal) == ("u1", "abc.7", "2026-01-01T00:00:00Z", "")
    assert found.replicas == asked(**fields).replicas


@given(st.dictionaries(st.text("abcXYZ_", min_size=1, max_size=5), st.text(max_size=20).filter(lambda text: "\0" not in text), max_size=4))
def test_every_value_of_a_variable_reads_back(variables: dict[str, str]) -> None:
    assert read(as_answered(made(envVars=variables))).deployment.variables == variables


def test_what_controllers_write_is_not_the_client_s() -> None:
    document = as_answered(made(annotations={"topic": "sales"}))
    document["metadata"]["annotations"]["deployment.kubernetes.io/revision"] = "4"
    document["metadata"]["annotations"]["kubectl.kubernetes.io/last-applied-configuration"] = "{}"

    assert read(document).deployment.annotations == {"topic": "sales"}


def test_a_refusal_is_in_the_words_of_who_refused() -> None:
    refused = condition("ReplicaFailure", True, 'pods "echo-1" is forbidden: exceeded quota')

    assert read(as_answered(made(), conditions=[condition("Available", False), refused])).refusal == 'pods "echo-1" is forbidden: exceeded quota'
    assert read(as_answered(made(), conditions=[condition("ReplicaFailure", False, "before")])).refusal == ""


# What a pod's status says


def a_pod(status: Object, **metadata: Any) -> Object:
    labels = {"faas_function": "echo", "kalium.io/revision": "abc.1"}
    return {"metadata": {"uid": "u1", "name": "echo-1", "labels": labels, **metadata}, "spec": {"nodeName": "node1"}, "status": status}


def test_a_pod_that_runs_is_ready_when_the_kubelet_says_so() -> None:
    pod = read_pod(a_pod({**running(), "podIP": "10.0.0.1"}))

    assert (pod.function, pod.revision, pod.address, pod.node) == ("echo", "abc.1", "10.0.0.1", "node1")
    assert (pod.is_running, pod.is_ready, pod.is_ending, pod.ended) == (True, True, False, "")
    assert read_pod(a_pod(running(is_ready=False))).is_ready is False


def test_a_pod_that_is_deleted_is_ending() -> None:
    assert read_pod(a_pod(running(), deletionTimestamp="2026-01-01T00:00:00Z")).is_ending


@pytest.mark.parametrize("status", [{}, {"conditions": None, "containerStatuses": None}, {"containerStatuses": [{}]}])
def test_a_pod_of_which_nothing_is_known_yet_is_no_trouble(status: Object) -> None:
    pod = read_pod(a_pod(status))

    assert (pod.is_ready, pod.is_running, pod.ended, pod.image_trouble, pod.start_trouble, pod.unscheduled) == (False, False, "", "", "", "")


@pytest.mark.parametrize("reason", ["ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"])
def test_an_image_that_is_not_there_is_trouble_with_the_image(reason: str) -> None:
    pod = read_pod(a_pod(waiting(reason, "no such thing")))

    assert (pod.image_trouble, pod.start_trouble) == (f"{reason}: no such thing", "")


@pytest.mark.parametrize("reason", ["CreateContainerError", "RunContainerError", "CreateContainerConfigError"])
def test_a_container_that_cannot_be_made_is_trouble_with_the_start(reason: str) -> None:
    pod = read_pod(a_pod(waiting(reason)))

    assert (pod.image_trouble, pod.start_trouble) == ("", f"{reason}: nothing more is said")


@pytest.mark.parametrize("reason", ["ContainerCreating", "PodInitializing"])
def test_a_step_on_the_way_is_no_trouble(reason: str) -> None:
    pod = read_pod(a_pod(waiting(reason)))

    assert (pod.image_trouble, pod.start_trouble) == ("", "")


def test_a_pod_that_no_node_takes_says_why() -> None:
    status = {"conditions": [condition("PodScheduled", False, "0/3 nodes are available")]}

    assert read_pod(a_pod(status)).unscheduled == "0/3 nodes are available"
    assert read_pod(a_pod({"conditions": [condition("PodScheduled", True)]})).unscheduled == ""


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (ended(3), "exit code 3"),
        ({"containerStatuses": [{"state": {"running": {}}, "restartCount": 1}]}, "started again"),
        ({"containerStatuses": [{"state": {"waiting": {}}, "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}}]}, "OOMKilled"),
        ({"phase": "Failed", "reason": "Evicted", "message": "the node was low on memory"}, "low on memory"),
    ],
)
def test_the_first_run_of_a_container_is_the_only_one(status: Object, told: str) -> None:
    assert told in read_pod(a_pod(status)).ended
