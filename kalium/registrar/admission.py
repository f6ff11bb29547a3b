"""Whether a pod may be registered as an instance of a function. What the API server admitted is judged again here: a policy of
admission can be removed by whoever administers the cluster, and this check runs on the node."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kalium.registrar.limits import DETAIL_CHARACTERS_MAX, IMAGE_CHARACTERS_MAX

APP_ANNOTATION = "kalium.io/app"
FUNCTION_ANNOTATION = "kalium.io/function"
GVISOR_ANNOTATIONS = "dev.gvisor."

_UID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
_APP = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9._]{0,251}[A-Za-z0-9])?")
_FUNCTION = re.compile(r"[a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?")  # the name of a container
_IMAGE = re.compile(rf"[!-~]{{1,{IMAGE_CHARACTERS_MAX}}}")
# Volumes that Kubernetes fills itself, or makes for one pod; what is written into another kind may be read by another pod, or elsewhere.
_VOLUMES = frozenset({"secret", "configMap", "projected", "downwardAPI", "emptyDir"})
_OVER = frozenset({"Succeeded", "Failed"})  # phases in which no container runs or will run


@dataclass(frozen=True)
class Place:
    """Whose pods are registered: those of `namespace` that were given to `node`, under the RuntimeClass with the guard."""

    node: str
    namespace: str
    runtime_class: str


@dataclass(frozen=True)
class Registration:
    """What the agent is told of a pod. `container` is the pod's UID; `pod` is its name, for the log only."""

    container: str
    app: str
    function: str
    image: str
    pod: str


@dataclass(frozen=True)
class Refusal:
    """A pod that asks for a guard and is not registered. `reason` is out of a closed set, `detail` for people."""

    container: str
    pod: str
    reason: str
    detail: str


def examine(pod: Mapping[str, Any], place: Place) -> Registration | Refusal | None:
    """Judge a pod as the API server gives it; None: it asks for no guard, it is over, or it is another node's."""
    metadata, spec = _object(pod, "metadata"), _object(pod, "spec")
    annotations = _object(metadata, "annotations")
    app, function, runtime_class = annotations.get(APP_ANNOTATION), annotations.get(FUNCTION_ANNOTATION), spec.get("runtimeClassName")
    is_guarded = app is not None or function is not None or runtime_class == place.runtime_class
    if not is_guarded or spec.get("nodeName") != place.node or metadata.get("namespace") != place.namespace:
        return None
    if _object(pod, "status").get("phase") in _OVER:
        return None
    container, name = _shown(metadata.get("uid")), _shown(metadata.get("name"))
    for reason, detail in _breaches(metadata, spec, place):
        return Refusal(container, name, reason, detail)
    return Registration(container, str(app), str(function), str(spec["containers"][0]["image"]), name)


def _breaches(metadata: Mapping[str, Any], spec: Mapping[str, Any], place: Place) -> Iterator[tuple[str, str]]:
    """The rules that the pod breaks, as reason and detail. Ask for the first one alone: later ones rely on it."""
    annotations = _object(metadata, "annotations")
    app, function = annotations.get(APP_ANNOTATION), annotations.get(FUNCTION_ANNOTATION)
    containers = spec.get("containers") or []
    if not _matches(_UID, metadata.get("uid")):
        yield "uid", "its UID is not one that the API server makes"
    if spec.get("runtimeClassName") != place.runtime_class:
        yield "runtime_class", f"its runtimeClassName is {_shown(spec.get('runtimeClassName'))}, not {place.runtime_class}"
    if not _matches(_APP, app) or not _matches(_FUNCTION, function):
        yield "annotations", f"{APP_ANNOTATION} is {_shown(app)}, {FUNCTION_ANNOTATION} is {_shown(function)}"
    for name in sorted(name for name in annotations if str(name).startswith(GVISOR_ANNOTATIONS)):
        yield "gvisor_annotations", f"it has {_shown(name)}"
    if len(containers) != 1 or not isinstance(containers[0], Mapping):
        yield "containers", f"it has {len(containers)} containers"
    for kind in ("initContainers", "ephemeralContainers"):
        if spec.get(kind):
            yield "containers", f"it has {kind}"
    if containers[0].get("name") != function:
        yield "container_name", f"its container is {_shown(containers[0].get('name'))}, not {function}"
    for share in ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"):
        if spec.get(share):
            yield "namespaces", f"it has {share}"
    if not all(isinstance(volume, Mapping) and set(volume) - {"name"} <= _VOLUMES for volume in spec.get("volumes") or []):
        yield "volumes", f"it has a volume that is none of {', '.join(sorted(_VOLUMES))}"
    if not _matches(_IMAGE, containers[0].get("image")):
        yield "image", "its image is no reference of printable characters"


def _object(record: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = record.get(name)
    return value if isinstance(value, Mapping) else {}


def _matches(pattern: re.Pattern[str], value: object) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _shown(value: object) -> str:
    return str(value)[:DETAIL_CHARACTERS_MAX] if value is not None else "missing"
