"""What roles/kalium_admission says to a cluster, asked of a real API server: which pods it refuses, and who may do what."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import builds, images
from cluster.apiserver import PROGRAMS, Answer, Cluster, running

ROOT = Path(__file__).resolve().parents[2]
ACTIVE_SECONDS_MAX = 30.0
ENFORCED = {"hello-retail": ["product-photos-master", "product-photos-1-assign"]}

PLAY: list[dict[str, Any]] = [
    {
        "hosts": "node0",
        "gather_facts": False,
        "vars": {"kalium_kubernetes_pod_cidrs": {"node0": "10.217.0.0/24", "node1": "10.217.1.0/24"}},
        "tasks": [
            {"ansible.builtin.include_vars": {"file": str(ROOT / "roles" / role / kind / "main.yml")}}
            for role, kind in (("kalium_layout", "defaults"), ("kalium_admission", "vars"))
        ]
        + [
            {
                "ansible.builtin.template": {
                    "src": str(ROOT / "roles/kalium_admission/templates") + "/{{ item }}.yaml.j2",
                    "dest": "{{ to }}/{{ item }}.yaml",
                },
                "loop": "{{ kalium_admission_manifests }}",
            }
        ],
    }
]
HOST = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
INVENTORY = {
    "all": {
        "children": {
            **{
                group: {"hosts": {"node0": {**HOST, "kalium_layout_address": "10.139.0.10"}}}
                for group in ("kube_control", "controller", "images", "database")
            },
            "function_nodes": {"hosts": {"node1": {**HOST, "kalium_layout_address": "10.139.0.11"}}},
        }
    }
}


def manifests(folder: Path, **variables: Any) -> list[Path]:
    """The role's manifests, rendered as its tasks render them."""
    folder.mkdir()
    for name, content in (("play.yml", PLAY), ("hosts.json", INVENTORY)):
        (folder / name).write_text(json.dumps(content))
    given = {"kalium_engine": "kubernetes", "kalium_admission_unguarded": "allow", "kalium_admission_enforced": {}, "to": str(folder)} | variables
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", folder / "play.yml", "-i", folder / "hosts.json", "-e", json.dumps(given)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return sorted(folder.glob("*.yaml"))


def apply(cluster: Cluster, files: list[Path]) -> list[Answer]:
    """Namespaces first, as the role has them."""
    ordered = sorted(files, key=lambda path: path.name != "namespace.yaml")
    answers = [cluster.kubectl("apply", "--filename", str(path)) for path in ordered]
    assert [answer.text for answer in answers if answer.status] == []
    return answers


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    programs, built = tmp_path_factory.mktemp("programs"), builds.built()
    for name in PROGRAMS:
        (programs / name).symlink_to(built / ("server" if name in images.SERVERS else name))
    with running(programs, tmp_path_factory.mktemp("apiserver")) as started:
        apply(started, manifests(tmp_path_factory.mktemp("admission") / "allow", kalium_admission_enforced=ENFORCED))
        await_policy(started, pod(runtimeClassName="gvisor"))
        yield started


def pod(**changes: Any) -> dict[str, Any]:
    """A pod with a guard as the gateway makes it; `changes` go into `metadata` or, by default, `spec`."""
    document: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "pay-1", "namespace": "openfaas-fn", "labels": {"faas_function": "pay"},
            "annotations": {"kalium.io/app": "shop", "kalium.io/function": "pay", "kalium.io/timers": "on"},
        },
        "spec": {
            "runtimeClassName": "kalium",
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "containers": [
                {
                    "name": "pay", "image": "pay:1", "ports": [{"containerPort": 8080}],
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [{"name": "secret", "mountPath": "/var/openfaas/secrets", "readOnly": True}],
                }
            ],
            "volumes": [{"name": "secret", "secret": {"secretName": "s"}}],
        },
    }  # fmt: skip
    for name, value in changes.items():
        document["metadata" if name in ("annotations", "labels", "name", "namespace") else "spec"][name] = value
    return document


def unguarded(**changes: Any) -> dict[str, Any]:
    """The same function under stock gVisor, as experiments deploy it."""
    return pod(**{"annotations": {"other": "x"}, "runtimeClassName": "gvisor"} | changes)


def container(name: str) -> dict[str, Any]:
    return {"name": name, "image": "proxy:1", "securityContext": {"allowPrivilegeEscalation": False}}


def create(cluster: Cluster, document: dict[str, Any]) -> Answer:
    """Everything but the writing."""
    return cluster.kubectl("create", "--dry-run=server", "--filename", "-", stdin=document)


def await_policy(cluster: Cluster, refused: dict[str, Any]) -> None:
    """The API server takes a policy up a moment after it was made."""
    deadline = time.monotonic() + ACTIVE_SECONDS_MAX
    while "ValidatingAdmissionPolicy" not in create(cluster, refused).text:
        assert time.monotonic() < deadline, create(cluster, refused).text
        time.sleep(0.2)


def test_a_second_application_changes_nothing(cluster: Cluster, tmp_path: Path) -> None:
    answers = apply(cluster, manifests(tmp_path / "again", kalium_admission_enforced=ENFORCED))

    assert [line for answer in answers for line in answer.text.splitlines() if not line.endswith(" unchanged")] == []


ANOTHER = {"host": "10.217.1.9", "port": 8080}
GET = {"path": "/", "port": 8080}


def probed(make: Callable[..., dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """A pod whose container has these fields, too."""
    document = make()
    document["spec"]["containers"][0] |= fields
    return document


OWN = {"readinessProbe": {"httpGet": GET}, "livenessProbe": {"tcpSocket": {"port": 8080}}, "lifecycle": {"preStop": {"sleep": {"seconds": 1}}}}


@pytest.mark.parametrize(
    "document", [pod(), unguarded(), unguarded(annotations={}), unguarded(runtimeClassName=None), probed(pod, **OWN), probed(unguarded, **OWN)]
)
def test_what_the_gateway_makes_is_admitted(cluster: Cluster, document: dict[str, Any]) -> None:
    answer = create(cluster, document)

    assert answer.status == 0, answer.text


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "under stock gVisor": ("runs with a guard", pod(runtimeClassName="gvisor")),
    "under runc": ("runs with a guard", pod(runtimeClassName=None)),
    "the app alone, under stock gVisor": ("runs with a guard", unguarded(annotations={"kalium.io/app": "shop"})),
    "the function alone, under stock gVisor": ("runs with a guard", unguarded(annotations={"kalium.io/function": "pay"})),
    "no app": ("both annotations", pod(annotations={"kalium.io/function": "pay"})),
    "no function": ("both annotations", pod(annotations={"kalium.io/app": "shop"})),
    "no annotations": ("both annotations", pod(annotations=None)),
    "an app that is no name": ("both annotations", pod(annotations={"kalium.io/app": "a b", "kalium.io/function": "pay"})),
    "another function": ("its name is that of the function", pod(annotations={"kalium.io/app": "shop", "kalium.io/function": "ship"})),
    "a sidecar": ("one container", pod(containers=[*pod()["spec"]["containers"], container("proxy")])),
    "an init container": ("no init", pod(initContainers=[container("init")])),
    "shared processes": ("shares no namespace", pod(shareProcessNamespace=True)),
    "an annotation of gVisor": (
        "annotations of gVisor",
        pod(annotations={"kalium.io/app": "shop", "kalium.io/function": "pay", "dev.gvisor.flag.network": "host"}),
    ),
    "a volume that another pod may mount": (
        "no volume that another pod may mount",
        pod(volumes=[{"name": "secret", "persistentVolumeClaim": {"claimName": "c"}}]),
    ),
    "a folder of a file server": ("no volume that another pod may mount", pod(volumes=[{"name": "secret", "nfs": {"server": "s", "path": "/"}}])),
    "a probe of another pod": ("they name no host", probed(pod, livenessProbe={"httpGet": {**GET, **ANOTHER}})),
    "a probe of another pod, without a guard": ("they name no host", probed(unguarded, readinessProbe={"httpGet": {**GET, **ANOTHER}})),
    "a connection to another pod": ("they name no host", probed(pod, startupProbe={"tcpSocket": ANOTHER})),
    "a request to another pod at the start": ("they name no host", probed(unguarded, lifecycle={"postStart": {"httpGet": {**GET, **ANOTHER}}})),
    "a request to another pod at the end": ("they name no host", probed(pod, lifecycle={"preStop": {"httpGet": {**GET, **ANOTHER}}})),
    "in another namespace": ("run in the namespace openfaas-fn", pod(namespace="default")),
    "an enforced function, by its label": ("functions of hello-retail", unguarded(labels={"faas_function": "product-photos-master"})),
    "an enforced function, by its container": ("functions of hello-retail", unguarded(containers=[container("product-photos-1-assign")])),
}


@pytest.mark.parametrize("case", BAD)
def test_a_pod_that_leads_around_the_guard_is_refused(cluster: Cluster, case: str) -> None:
    message, document = BAD[case]

    answer = create(cluster, document)

    assert answer.status != 0, answer.text
    assert "ValidatingAdmissionPolicy" in answer.text
    assert message in answer.text


@pytest.mark.parametrize(
    "changes",
    [
        {"hostNetwork": True},
        {"hostPID": True},
        {"hostIPC": True},
        {"volumes": [{"name": "secret", "hostPath": {"path": "/"}}]},
        {"containers": [{**pod()["spec"]["containers"][0], "securityContext": {"privileged": True}}]},
    ],
)
@pytest.mark.parametrize("make", [pod, unguarded])
def test_the_hosts_own_things_are_refused_twice(cluster: Cluster, make: Any, changes: dict[str, Any]) -> None:
    """By the namespace's level of pod security, and for pods with a guard by the policy: one of them may be taken away."""
    answer = create(cluster, make(**changes))

    assert answer.status != 0, answer.text
    assert "PodSecurity" in answer.text or "ValidatingAdmissionPolicy" in answer.text
    if make is pod:
        cluster.kubectl("label", "namespace", "openfaas-fn", "pod-security.kubernetes.io/enforce=privileged", "--overwrite")
        try:
            deadline = time.monotonic() + ACTIVE_SECONDS_MAX
            while "PodSecurity" in (text := create(cluster, make(**changes)).text):
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert "ValidatingAdmissionPolicy" in text
        finally:
            cluster.kubectl("label", "namespace", "openfaas-fn", "pod-security.kubernetes.io/enforce=baseline", "--overwrite")


def service(**changes: Any) -> dict[str, Any]:
    """A Service as the gateway makes it; `changes` go into `spec`."""
    spec = {"type": "ClusterIP", "selector": {"faas_function": "pay"}, "ports": [{"name": "http", "port": 8080, "targetPort": 8080}]}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "pay", "namespace": "openfaas-fn"}, "spec": spec | changes}


@pytest.mark.parametrize(
    "changes", [{"type": "NodePort"}, {"type": "LoadBalancer"}, {"externalIPs": ["192.0.2.1"]}, {"type": "ExternalName", "externalName": "a.example"}]
)
def test_no_service_lets_strangers_in_under_an_address_of_the_node(cluster: Cluster, changes: dict[str, Any]) -> None:
    assert create(cluster, service()).status == 0
    answer = create(cluster, service(**changes))

    assert answer.status != 0, answer.text
    assert "reached from inside the cluster alone" in answer.text


def patch(cluster: Cluster, name: str, change: dict[str, Any], *, subresource: str = "") -> Answer:
    words = ["patch", "pod", name, "--namespace", "openfaas-fn", "--patch", json.dumps(change)]
    return cluster.kubectl(*words, *(["--subresource", subresource] if subresource else []))


@pytest.fixture(scope="module")
def running_pods(cluster: Cluster) -> None:
    """One pod with a guard and one without, which were admitted."""
    for document in (pod(name="guarded"), unguarded(name="stock")):
        answer = cluster.kubectl("create", "--filename", "-", stdin=document)
        assert answer.status == 0, answer.text


@pytest.mark.usefixtures("running_pods")
@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("are those that it was made with", {"metadata": {"annotations": {"kalium.io/app": "bank"}}}),
        ("are those that it was made with", {"metadata": {"annotations": {"kalium.io/timers": None}}}),
        ("are those that it was made with", {"metadata": {"annotations": {"kalium.io/tls": "terminate"}}}),
        ("annotations of gVisor", {"metadata": {"annotations": {"dev.gvisor.flag.debug": "true"}}}),
        ("its name is that of the function", {"metadata": {"annotations": {"kalium.io/function": "ship"}}}),
        ("the image of a pod with a guard", {"spec": {"containers": [{"name": "pay", "image": "evil:1"}]}}),
    ],
)
def test_a_pod_with_a_guard_stays_as_it_was_admitted(cluster: Cluster, message: str, change: dict[str, Any]) -> None:
    answer = patch(cluster, "guarded", change)

    assert answer.status != 0, answer.text
    assert message in answer.text


@pytest.mark.usefixtures("running_pods")
def test_other_things_of_a_pod_with_a_guard_may_change(cluster: Cluster) -> None:
    assert patch(cluster, "guarded", {"metadata": {"annotations": {"note": "x"}, "labels": {"a": "b"}}}).status == 0
    assert patch(cluster, "guarded", {"status": {"phase": "Running"}}, subresource="status").status == 0


@pytest.mark.usefixtures("running_pods")
def test_a_pod_without_a_guard_is_not_given_a_functions_name(cluster: Cluster) -> None:
    answer = patch(cluster, "stock", {"metadata": {"annotations": {"kalium.io/app": "shop", "kalium.io/function": "pay"}}})

    assert answer.status != 0
    assert "runs with a guard" in answer.text


@pytest.mark.usefixtures("running_pods")
@pytest.mark.parametrize("name", ["pay-debug", "pay"])
def test_no_ephemeral_container_joins_a_pod_with_a_guard(cluster: Cluster, name: str) -> None:
    answer = patch(cluster, "guarded", {"spec": {"ephemeralContainers": [container(name)]}}, subresource="ephemeralcontainers")

    assert answer.status != 0, answer.text
    assert "no ephemeral containers" in answer.text or "Duplicate value" in answer.text


@pytest.mark.usefixtures("running_pods")
def test_a_site_that_refuses_unguarded_pods_has_none(cluster: Cluster, tmp_path: Path) -> None:
    """Those that run already stay, until somebody changes them."""
    apply(cluster, manifests(tmp_path / "refuse", kalium_admission_unguarded="refuse"))
    try:
        await_policy(cluster, unguarded())
        assert "with a guard only" in create(cluster, unguarded()).text
        assert create(cluster, pod()).status == 0
    finally:
        apply(cluster, manifests(tmp_path / "allow", kalium_admission_enforced=ENFORCED))
    deadline = time.monotonic() + ACTIVE_SECONDS_MAX
    while create(cluster, unguarded()).status != 0:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def may(cluster: Cluster, group: str, *words: str, namespace: str = "openfaas-fn") -> bool:
    return cluster.kubectl("auth", "can-i", *words, "--namespace", namespace, user=f"{group}:x", group=group).text.strip() == "yes"


def test_registrars_see_pods_of_functions_and_nothing_else(cluster: Cluster) -> None:
    allowed = {(verb, "pods") for verb in ("list", "watch")}
    asked = {
        (verb, resource)
        for verb in ("get", "list", "watch", "create", "update", "patch", "delete")
        for resource in ("pods", "secrets", "deployments.apps", "nodes")
    }

    assert {(verb, resource) for verb, resource in asked if may(cluster, "kalium:registrars", verb, resource)} == allowed
    assert not may(cluster, "kalium:registrars", "list", "pods", namespace="kube-system")
    assert not may(cluster, "kalium:registrars", "create", "pods", "--subresource=exec")


def test_the_gateway_deploys_and_enters_no_pod(cluster: Cluster) -> None:
    for verb, resource in (
        ("create", "deployments.apps"),
        ("patch", "services"),
        ("delete", "pods"),
        ("watch", "pods"),
        ("update", "secrets"),
        ("watch", "events"),
    ):
        assert may(cluster, "kalium:gateway", verb, resource), (verb, resource)
    assert may(cluster, "kalium:gateway", "get", "pods", "--subresource=log")
    for words in (
        ("create", "pods"), ("update", "pods"), ("create", "pods", "--subresource=exec"), ("update", "pods", "--subresource=ephemeralcontainers"),
        ("create", "rolebindings.rbac.authorization.k8s.io"), ("delete", "validatingadmissionpolicies.admissionregistration.k8s.io"),
    ):  # fmt: skip
        assert not may(cluster, "kalium:gateway", *words), words
    assert not may(cluster, "kalium:gateway", "list", "secrets", namespace="kube-system")


def test_the_classes_and_the_networks_rules_are_as_the_site_has_them(cluster: Cluster) -> None:
    classes = json.loads(cluster.kubectl("get", "runtimeclasses", "--output", "json").text)["items"]
    assert {(item["metadata"]["name"], item["handler"]) for item in classes} == {("gvisor", "gvisor"), ("kalium", "kalium")}
    assert all(item["scheduling"] == {"nodeSelector": {"kalium.io/runtimes": "yes"}} for item in classes)
    found = json.loads(cluster.kubectl("get", "networkpolicies", "--namespace", "openfaas-fn", "--output", "json").text)["items"]
    policies = {item["metadata"]["name"]: item["spec"] for item in found}
    assert policies["nothing-else"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    sources = [peer["ipBlock"]["cidr"] for peer in policies["invocations-and-probes"]["ingress"][0]["from"]]
    assert sources == ["10.139.0.10/32", "10.139.0.11/32", "10.217.0.0/32", "10.217.0.1/32", "10.217.1.0/32", "10.217.1.1/32"]
    services = policies["services-of-the-site"]["egress"][:-1]
    assert [(rule["to"][0]["ipBlock"]["cidr"], rule["ports"][0]["port"]) for rule in services] == [
        ("10.139.0.10/32", port) for port in (8080, 3306, 4443, 2525)
    ]


def test_a_pods_runtime_class_brings_it_to_a_node_that_has_the_runtime(cluster: Cluster) -> None:
    document = copy.deepcopy(pod(name="selected"))
    answer = cluster.kubectl("create", "--dry-run=server", "--output", "json", "--filename", "-", stdin=document)

    assert json.loads(answer.text)["spec"]["nodeSelector"] == {"kalium.io/runtimes": "yes"}
