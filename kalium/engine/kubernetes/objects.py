"""A deployment as objects of Kubernetes and back, and what a pod's status says. Nothing here asks anybody.

The objects are those of faas-netes: a Deployment and a Service of the function's name, the label `faas_function`, one container of that name.
What a client gave is read back out of the Deployment, so that it has no second home.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kalium.engine.config import Config, KubernetesConfig
from kalium.engine.deployment import (
    APP_ANNOTATION,
    INFLIGHT_ANNOTATION,
    NAMESPACE,
    OURS,
    Deployment,
    Guarding,
    Refused,
    parse,
)
from kalium.engine.kubernetes.api import Object
from kalium.engine.limits import DRAIN_SECONDS_MAX, READY_SECONDS_MAX, STOP_SECONDS

ENGINE_LABEL = OURS + "engine"
ENGINE = "gateway"
SELECTOR = f"{ENGINE_LABEL}={ENGINE}"  # what is ours, and the only thing that is touched
FUNCTION_LABEL = "faas_function"
REVISION_LABEL = OURS + "revision"  # on pods: DEPLOYMENT.NUMBER, so that one tells of which deployment it is, and whether of the last
FUNCTION_ANNOTATION = OURS + "function"
PROCESS_VARIABLE = "fprocess"  # as OpenFaaS calls it
SCRAPE_ANNOTATION = "prometheus.io.scrape"  # faas-netes's
NODES_OWN = "localhost/"  # of images that were brought to the nodes, and are in no registry
SECRETS_FOLDER = "/var/openfaas/secrets"
KEEPS = frozenset({"limits", "requests", "constraints"})

OURS_LABELS = frozenset({ENGINE_LABEL, FUNCTION_LABEL, REVISION_LABEL})
NOT_THE_CLIENTS = ("deployment.kubernetes.io/", "kubectl.kubernetes.io/", SCRAPE_ANNOTATION)

# A container that waits for one of these does not start by itself soon; the others are steps on the way.
IMAGE_TROUBLE = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError", "RegistryUnavailable"})
START_TROUBLE = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError", "CrashLoopBackOff", "PreCreateHookError"})


@dataclass(frozen=True)
class Found:
    """A Deployment of ours, read back."""

    deployment: Deployment
    uid: str
    revision: str
    replicas: int
    created: str
    refusal: str  # why no pod of it is made, in the words of an admission policy or a quota; ""


@dataclass(frozen=True)
class Pod:
    """What matters of a pod."""

    uid: str
    name: str
    function: str
    revision: str
    runtime_class: str
    identity: tuple[str, str]  # the app and the function that its guard was told; "" without
    address: str
    node: str
    is_ready: bool
    is_running: bool
    is_ending: bool  # it was deleted, and may still finish what it has
    ended: str  # why the only run of its container that counts is over; ""
    image_trouble: str  # why its image is not there; ""
    start_trouble: str  # why its container does not start; ""
    unscheduled: str  # why no node takes it; ""


def lineage(revision: str) -> str:
    """The part of a revision that all pods of one Deployment share."""
    return revision.partition(".")[0]


def first_revision(unique: str) -> str:
    """The revision of a new Deployment; `unique` is no other's."""
    return f"{unique}.1"


def next_revision(revision: str, *others: str) -> str:
    """The revision after that, and after those of the others that are of its lineage."""
    head = lineage(revision)
    numbers = [other.partition(".")[2] for other in (revision, *others) if lineage(other) == head]
    return f"{head}.{max(int(number) if number.isdigit() else 0 for number in numbers) + 1}"


# To Kubernetes


def deployment_object(deployment: Deployment, revision: str, config: Config, cluster: KubernetesConfig) -> Object:
    """The Deployment of a function. Raises Refused when it asks for nodes that the site gives to no function."""
    name = deployment.name
    for label, value in deployment.constraints:
        if cluster.node_selector.get(label, value) != value:
            raise Refused(400, f"constraints holds {label}={value}, but functions of this site run where it is {cluster.node_selector[label]}")
    ours = {FUNCTION_LABEL: name, ENGINE_LABEL: ENGINE}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "labels": {**deployment.labels, **ours},
            "annotations": {**deployment.annotations, SCRAPE_ANNOTATION: "false"},
        },
        "spec": {
            "replicas": deployment.replicas,
            "revisionHistoryLimit": 2,
            "selector": {"matchLabels": {FUNCTION_LABEL: name}},
            # An old pod goes when a new one is ready, and not before.
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {
                    "labels": {**deployment.labels, **ours, REVISION_LABEL: revision},
                    "annotations": pod_annotations(deployment, is_guarded=cluster.runtimes[deployment.runtime].guarded),
                },
                "spec": _pod_spec(deployment, config, cluster),
            },
        },
    }


def pod_annotations(deployment: Deployment, *, is_guarded: bool) -> dict[str, str]:
    """Who a function's instance is, and what its guard is told. Nothing else becomes an annotation of a sandbox.

    A pod without a guard has none: what has them is taken for a function of an app, and refused without a guard.
    """
    if not is_guarded:
        return {}
    inflight = deployment.annotations.get(INFLIGHT_ANNOTATION)
    return {
        FUNCTION_ANNOTATION: deployment.name,
        APP_ANNOTATION: deployment.app,
        **deployment.for_guard,
        **({INFLIGHT_ANNOTATION: inflight} if inflight else {}),
    }


def _pod_spec(deployment: Deployment, config: Config, cluster: KubernetesConfig) -> Object:
    spec: Object = {
        "runtimeClassName": cluster.runtimes[deployment.runtime].name,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "Always",
        "dnsPolicy": "ClusterFirst",
        "terminationGracePeriodSeconds": int(DRAIN_SECONDS_MAX),
        "nodeSelector": {**cluster.node_selector, **dict(deployment.constraints)},
        "hostAliases": host_aliases(config.hosts),
        "containers": [_container(deployment, config)],
    }
    if deployment.secrets:
        sources = [{"secret": {"name": name, "items": [{"key": name, "path": name}]}} for name in deployment.secrets]
        spec["volumes"] = [{"name": "secrets", "projected": {"defaultMode": 0o444, "sources": sources}}]
        spec["containers"][0]["volumeMounts"] = [{"name": "secrets", "mountPath": SECRETS_FOLDER, "readOnly": True}]
    return spec


def _container(deployment: Deployment, config: Config) -> Object:
    probe = {"httpGet": {"path": config.health_path, "port": config.function_port, "scheme": "HTTP"}}
    variables = {**({PROCESS_VARIABLE: deployment.process} if deployment.process else {}), **deployment.variables}
    return {
        "name": deployment.name,
        "image": deployment.image,
        # For what is missing under localhost/ the node would ask whoever listens on its own port 80, without TLS.
        "imagePullPolicy": "Never" if deployment.image.startswith(NODES_OWN) else "IfNotPresent",
        "ports": [{"name": "http", "containerPort": config.function_port, "protocol": "TCP"}],
        # Kubernetes replaces $(NAME) in values; a doubled dollar is a dollar.
        "env": [{"name": key, "value": value.replace("$", "$$")} for key, value in sorted(variables.items())],
        "resources": {key: dict(value) for key, value in (("limits", deployment.limits), ("requests", deployment.requests)) if value},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": deployment.is_read_only,
        },
        # Asked every second until it answers, and rarely after that: the gateway itself asks when a request fails, and questions cost what is
        # measured.
        "startupProbe": {**probe, "periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": int(READY_SECONDS_MAX)},
        "readinessProbe": {**probe, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 3},
        # The gateway learns within this time that a pod is being deleted, and sends nothing more; only then is its process told to end.
        "lifecycle": {"preStop": {"sleep": {"seconds": STOP_SECONDS}}},
    }


def host_aliases(hosts: Mapping[str, str]) -> list[Object]:
    """The names of the configuration, by address."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, address in sorted(hosts.items()):
        names[address].append(name)
    return [{"ip": address, "hostnames": names[address]} for address in sorted(names)]


def service_object(deployment: Deployment, owner: str, port: int) -> Object:
    """The Service of a function, which goes with its Deployment."""
    name = deployment.name
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": NAMESPACE,
            "labels": {FUNCTION_LABEL: name, ENGINE_LABEL: ENGINE},
            "annotations": {SCRAPE_ANNOTATION: "false"},
            "ownerReferences": [{"apiVersion": "apps/v1", "kind": "Deployment", "name": name, "uid": owner}],
        },
        "spec": {
            "type": "ClusterIP",
            "selector": {FUNCTION_LABEL: name},
            "ports": [{"name": "http", "protocol": "TCP", "port": port, "targetPort": port}],
        },
    }


def secret_object(name: str, value: bytes) -> Object:
    """A secret of functions: its only key is its name, as OpenFaaS has it."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {ENGINE_LABEL: ENGINE}},
        "type": "Opaque",
        "data": {name: base64.b64encode(value).decode("ascii")},
    }


# From Kubernetes


def is_ours(found: Object) -> bool:
    """Whether this gateway made it, or another with the same state."""
    return bool((found["metadata"].get("labels") or {}).get(ENGINE_LABEL) == ENGINE)


def read_deployment(found: Object, runtimes: Mapping[str, Guarding], node_selector: Mapping[str, str]) -> Found:
    """A Deployment of ours, read back. Raises Refused, KeyError, TypeError, ValueError or IndexError when somebody made it what it cannot be."""
    metadata, spec = found["metadata"], found["spec"]
    template, container = spec["template"], spec["template"]["spec"]["containers"][0]
    variables = {entry["name"]: str(entry.get("value", "")).replace("$$", "$") for entry in container.get("env") or ()}
    selector, resources = template["spec"].get("nodeSelector") or {}, container.get("resources") or {}
    secrets = [
        source["secret"]["name"]
        for volume in template["spec"].get("volumes") or ()
        for source in (volume.get("projected") or {}).get("sources") or ()
        if "secret" in source
    ]
    document = {
        "service": metadata["name"],
        "image": container["image"],
        "envProcess": variables.pop(PROCESS_VARIABLE, ""),
        "envVars": variables,
        "labels": {key: value for key, value in (metadata.get("labels") or {}).items() if key not in OURS_LABELS},
        "annotations": {key: value for key, value in (metadata.get("annotations") or {}).items() if not key.startswith(NOT_THE_CLIENTS)},
        "secrets": secrets,
        "readOnlyRootFilesystem": bool((container.get("securityContext") or {}).get("readOnlyRootFilesystem")),
        "constraints": [f"{key}={value}" for key, value in selector.items() if node_selector.get(key) != value],
        "limits": resources.get("limits"),
        "requests": resources.get("requests"),
    }
    return Found(
        deployment=parse(document, runtimes, KEEPS),
        uid=str(metadata["uid"]),
        revision=str(template["metadata"]["labels"][REVISION_LABEL]),
        replicas=int(spec.get("replicas", 1)),
        created=str(metadata["creationTimestamp"]),
        refusal=_refusal(found),
    )


def _refusal(found: Object) -> str:
    for condition in (found.get("status") or {}).get("conditions") or ():
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            return str(condition.get("message") or condition.get("reason") or "no pod of it can be made")
    return ""


def read_pod(found: Object) -> Pod:
    """What matters of a pod of ours. Raises KeyError or TypeError for what is no pod."""
    metadata, status = found["metadata"], found.get("status") or {}
    labels = metadata.get("labels") or {}
    conditions: dict[str, Any] = {condition["type"]: condition for condition in status.get("conditions") or ()}
    annotations = metadata.get("annotations") or {}
    container: Any = next(iter(status.get("containerStatuses") or ()), {})
    state = container.get("state") or {}
    waiting = state.get("waiting") or {}
    scheduled = conditions.get("PodScheduled") or {}
    return Pod(
        uid=str(metadata["uid"]),
        name=str(metadata["name"]),
        function=str(labels.get(FUNCTION_LABEL, "")),
        revision=str(labels.get(REVISION_LABEL, "")),
        runtime_class=str((found.get("spec") or {}).get("runtimeClassName") or ""),
        identity=(str(annotations.get(APP_ANNOTATION, "")), str(annotations.get(FUNCTION_ANNOTATION, ""))),
        address=str(status.get("podIP") or ""),
        node=str((found.get("spec") or {}).get("nodeName") or ""),
        is_ready=(conditions.get("Ready") or {}).get("status") == "True",
        is_running="running" in state,
        is_ending="deletionTimestamp" in metadata,
        ended=_ended(status, container),
        image_trouble=_waits(waiting, IMAGE_TROUBLE),
        start_trouble=_waits(waiting, START_TROUBLE),
        unscheduled=str(scheduled.get("message") or scheduled.get("reason") or "") if scheduled.get("status") == "False" else "",
    )


def _waits(waiting: Mapping[str, Any], reasons: frozenset[str]) -> str:
    reason = waiting.get("reason")
    return f"{reason}: {waiting.get('message') or 'nothing more is said'}" if reason in reasons else ""


def _ended(status: Mapping[str, Any], container: Mapping[str, Any]) -> str:
    """Why the container's first run is over; a second one in the same sandbox is not the instance that was admitted."""
    over = (container.get("state") or {}).get("terminated") or (container.get("lastState") or {}).get("terminated")
    if over:
        message = f" ({over['message']})" if over.get("message") else ""
        return f"its process ended with exit code {over.get('exitCode')}: {over.get('reason') or 'no reason is given'}{message}"
    if container.get("restartCount"):
        return "its container was started again"
    if status.get("phase") in ("Failed", "Succeeded"):
        return f"its pod is over: {status.get('message') or status.get('reason') or status['phase']}"
    return ""
