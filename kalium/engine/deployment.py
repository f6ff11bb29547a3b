"""What a client asks to be deployed, checked: OpenFaaS's FunctionDeployment, and what this engine reads out of it."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from kalium.engine.limits import IMAGE_CHARACTERS_MAX, INFLIGHT_MAX, NAME_CHARACTERS_MAX, REPLICAS_MAX, SECRET_BYTES_MAX, VALUES_MAX

NAMESPACE = "openfaas-fn"
OURS = "kalium.io/"  # labels and annotations of this engine
RUNTIME_LABEL = OURS + "runtime"
APP_ANNOTATION = OURS + "app"
INFLIGHT_ANNOTATION = OURS + "max-inflight"
# What the guard reads of a deployment, with the only value that has a meaning: it measures what it judges; it ends TLS, so programs trust it.
GUARD_ANNOTATIONS = {OURS + "timers": "on", OURS + "tls": "terminate"}
SCALE_LABEL = "com.openfaas.scale.min"
RUNTIME_DEFAULT = "stock"

NAME = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?")
IMAGE = re.compile(r"[A-Za-z0-9][-A-Za-z0-9._/:@]*")
VARIABLE = re.compile(r"[-._A-Za-z][-._A-Za-z0-9]*")
SECRET = re.compile(r"[a-z0-9](?:[-.a-z0-9]*[a-z0-9])?")
APP = re.compile(r"[a-z0-9](?:[-a-z0-9]*[a-z0-9])?")


# A node's label and its value, as OpenFaaS spells a constraint.
CONSTRAINT = re.compile(r"([A-Za-z0-9](?:[-A-Za-z0-9_./]*[A-Za-z0-9])?)=([A-Za-z0-9](?:[-A-Za-z0-9_.]*[A-Za-z0-9])?)")
QUANTITY = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,9})?(?:m|k|M|G|T|Ki|Mi|Gi|Ti)?")
RESOURCES = frozenset({"memory", "cpu"})


class Guarding(Protocol):
    """A runtime, as far as a deployment depends on it."""

    @property
    def guarded(self) -> bool:
        """Under a guarded one an instance belongs to an app, whose policy the guard enforces."""


class Refused(Exception):
    """A call that is answered with `status` and `text`."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@dataclass(frozen=True)
class Deployment:
    """A function as it was asked for, and `runtime` and `app`, which were read out of its label and annotation."""

    name: str
    image: str
    runtime: str
    app: str  # "" under a runtime without a guard
    process: str
    variables: Mapping[str, str]
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    secrets: tuple[str, ...]
    is_read_only: bool
    replicas: int
    max_inflight: int  # requests at a time in one instance
    constraints: tuple[tuple[str, str], ...] = ()  # a node's label and the value that it has to have
    limits: Mapping[str, str] = field(default_factory=dict)  # of memory and cpu, as Kubernetes writes quantities
    requests: Mapping[str, str] = field(default_factory=dict)

    @property
    def for_guard(self) -> dict[str, str]:
        """The annotations that the guard reads, beside those that say who the function is."""
        return {name: value for name, value in GUARD_ANNOTATIONS.items() if name in self.annotations}

    def document(self) -> dict[str, Any]:
        """The request that says the same."""
        return {
            "service": self.name,
            "image": self.image,
            "envProcess": self.process,
            "envVars": dict(self.variables),
            "labels": dict(self.labels),
            "annotations": dict(self.annotations),
            "secrets": list(self.secrets),
            "readOnlyRootFilesystem": self.is_read_only,
            "constraints": [f"{label}={value}" for label, value in self.constraints],
            "limits": dict(self.limits),
            "requests": dict(self.requests),
        }


def object_of(text: bytes) -> dict[str, Any]:
    """The JSON object in a request's body. Raises Refused."""
    try:
        document = json.loads(text)
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise Refused(400, "the body is not a JSON object")
    check_namespace(document.get("namespace"))
    return document


def check_namespace(namespace: Any) -> None:
    """Refuse every namespace but ours, which may also be left out."""
    if namespace not in (None, "", NAMESPACE):
        raise Refused(400, f"there is no namespace {namespace!r}: this gateway has {NAMESPACE} alone")


def function_name(value: Any, what: str = "service") -> str:
    """A function's name, given as `what`, with or without our namespace. Raises Refused."""
    if not isinstance(value, str) or not value:
        raise Refused(400, f"{what} is not given")
    name = value.removesuffix("." + NAMESPACE)
    if len(name) > NAME_CHARACTERS_MAX or not NAME.fullmatch(name):
        raise Refused(400, f"{value[:200]!r} is no name of a function: use at most {NAME_CHARACTERS_MAX} lower-case letters, digits and hyphens")
    return name


def parse(document: Mapping[str, Any], runtimes: Mapping[str, Guarding], keeps: frozenset[str] = frozenset()) -> Deployment:
    """Check a FunctionDeployment against the engine's runtimes. Raises Refused for what is wrong and for what cannot be kept.

    `keeps` are those of `limits`, `requests` and `constraints` that the back-end honours.

    Fields that no one here knows are ignored, as OpenFaaS does; known ones that this engine cannot honour are refused,
    because a limit that is silently not there is worse than none.
    """
    name = function_name(document.get("service"))
    image = document.get("image")
    if not isinstance(image, str) or len(image) > IMAGE_CHARACTERS_MAX or not IMAGE.fullmatch(image):
        raise Refused(400, f"image is {str(image)[:200]!r}, and no name of an image")
    for wish in ("limits", "constraints"):
        if document.get(wish) and wish not in keeps:
            raise Refused(400, f"this gateway cannot keep `{wish}`: leave it out")
    process = document.get("envProcess") or ""
    if not isinstance(process, str) or "\0" in process:
        raise Refused(400, "envProcess is not a text")
    is_read_only = document.get("readOnlyRootFilesystem") or False
    if type(is_read_only) is not bool:
        raise Refused(400, "readOnlyRootFilesystem is neither true nor false")
    secrets = document.get("secrets") or []
    if not isinstance(secrets, list) or len(secrets) > VALUES_MAX:
        raise Refused(400, f"secrets is not a list of at most {VALUES_MAX} names")
    labels = _texts(document, "labels")
    annotations = _texts(document, "annotations")
    runtime = _runtime(labels, runtimes)
    for annotation, value in GUARD_ANNOTATIONS.items():
        if annotations.get(annotation, value) != value:
            raise Refused(400, f"annotation {annotation} is {annotations[annotation][:200]!r}: only `{value}` has a meaning")
    return Deployment(
        name=name,
        image=image,
        runtime=runtime,
        app=_app(annotations, runtime, runtimes[runtime].guarded),
        process=process,
        variables=_texts(document, "envVars", VARIABLE.fullmatch),
        labels=labels,
        annotations=annotations,
        secrets=tuple(secret_name(secret) for secret in secrets),
        is_read_only=is_read_only,
        replicas=_count(labels, "label", SCALE_LABEL, REPLICAS_MAX),
        max_inflight=_count(annotations, "annotation", INFLIGHT_ANNOTATION, INFLIGHT_MAX),
        constraints=_constraints(document) if "constraints" in keeps else (),
        limits=_quantities(document, "limits") if "limits" in keeps else {},
        requests=_quantities(document, "requests") if "requests" in keeps else {},
    )


def secret_name(value: Any) -> str:
    """A secret's name, which is a file's name too. Raises Refused."""
    if not isinstance(value, str) or len(value) > NAME_CHARACTERS_MAX or not SECRET.fullmatch(value):
        raise Refused(400, f"{str(value)[:200]!r} is no name of a secret: use lower-case letters, digits, hyphens and dots")
    return value


def secret_value(document: Mapping[str, Any]) -> bytes:
    """The value of a secret in a request's body. Raises Refused."""
    raw, text = document.get("rawValue"), document.get("value")
    try:
        value = base64.b64decode(raw, validate=True) if raw else (text or "").encode("utf-8")
    except (AttributeError, TypeError, binascii.Error, ValueError) as error:
        raise Refused(400, "value is no text, or rawValue is not base64") from error
    if len(value) > SECRET_BYTES_MAX:
        raise Refused(400, f"the secret has more than {SECRET_BYTES_MAX} bytes")
    return value


def _constraints(document: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    value = document.get("constraints") or []
    if not isinstance(value, list) or len(value) > VALUES_MAX:
        raise Refused(400, f"constraints is not a list of at most {VALUES_MAX} texts")
    found: dict[str, str] = {}
    for constraint in value:
        match = CONSTRAINT.fullmatch(constraint) if isinstance(constraint, str) else None
        if match is None or match[1] in found:
            raise Refused(400, f"constraints holds {str(constraint)[:200]!r}: give each label of a node once, as LABEL=VALUE")
        found[match[1]] = match[2]
    return tuple(sorted(found.items()))


def _quantities(document: Mapping[str, Any], what: str) -> dict[str, str]:
    value = _texts(document, what)
    for name, text in value.items():
        if name not in RESOURCES or (text and not QUANTITY.fullmatch(text)):
            raise Refused(400, f"{what} holds {name[:200]!r}: {text[:200]!r}; give memory and cpu as Kubernetes writes them, as 64Mi and 250m")
    return {name: text for name, text in value.items() if text}


def _texts(document: Mapping[str, Any], field: str, is_key: Callable[[str], object] = bool) -> dict[str, str]:
    """An object of texts; absent and null are empty."""
    value = document.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > VALUES_MAX:
        raise Refused(400, f"{field} is not an object of at most {VALUES_MAX} texts")
    for key, text in value.items():
        if not is_key(key) or not isinstance(text, str) or "\0" in text:
            raise Refused(400, f"{field} holds {key[:200]!r}, which is no usable name or has no text as its value")
    return dict(value)


def _runtime(labels: Mapping[str, str], runtimes: Mapping[str, Guarding]) -> str:
    for label in labels:
        if label.startswith(OURS) and label != RUNTIME_LABEL:
            raise Refused(400, f"label {label} is not known: {RUNTIME_LABEL} is the only one of this gateway")
    runtime = labels.get(RUNTIME_LABEL, RUNTIME_DEFAULT)
    if runtime not in runtimes:
        raise Refused(400, f"label {RUNTIME_LABEL} names the runtime {runtime!r}, but there are only {', '.join(sorted(runtimes))}")
    return runtime


def _app(annotations: Mapping[str, str], runtime: str, is_guarded: bool) -> str:
    for annotation in annotations:
        if annotation.startswith(OURS) and annotation not in (APP_ANNOTATION, INFLIGHT_ANNOTATION, *GUARD_ANNOTATIONS):
            raise Refused(400, f"annotation {annotation} is this gateway's own: leave it out")
    app = annotations.get(APP_ANNOTATION)
    if app is not None and not is_guarded:
        raise Refused(400, f"annotation {APP_ANNOTATION} is {app[:200]!r}, but the runtime {runtime} has no guard that could keep to its policy")
    if is_guarded and (app is None or len(app) > NAME_CHARACTERS_MAX or not APP.fullmatch(app)):
        found = "not given" if app is None else f"{app[:200]!r}"
        raise Refused(400, f"annotation {APP_ANNOTATION} is {found}, but the runtime {runtime} runs only functions of an app with a policy")
    return app or ""


def _count(texts: Mapping[str, str], what: str, key: str, count_max: int) -> int:
    """The number from 1 to `count_max` that a label or an annotation gives; 1 without it."""
    text = texts.get(key, "1")
    if not text.isascii() or not text.isdigit() or len(text) > 3 or not 1 <= int(text) <= count_max:
        raise Refused(400, f"{what} {key} is {text[:200]!r}, and not a number from 1 to {count_max}")
    return int(text)
