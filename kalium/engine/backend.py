"""What the gateway asks of whatever runs its functions: podman on this machine, or Kubernetes. The API, the proxy and the queue of
asynchronous calls know this file and neither of the two."""

from __future__ import annotations

import asyncio
import weakref
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kalium.engine.deployment import NAMESPACE, OURS, Deployment, Guarding, Refused
from kalium.engine.instance import Instance
from kalium.engine.slots import Slots

ADDRESS_ANNOTATION = OURS + "address"  # "ip:port[,...]" of the ready instances
REASON_ANNOTATION = OURS + "reason"  # why there is no ready instance; not while the first is being made

# Told of every task that ended: an exception in one is a mistake of ours, and stops the engine.
Observe = Callable[["asyncio.Task[None]"], object]


class BackendFailed(Exception):
    """A call that cannot be carried out, for a reason that is neither the client's nor known beforehand."""


class Function(ABC):
    """A deployed function; each back-end adds what keeps its instances alive."""

    def __init__(self, deployment: Deployment, created: str, port: int) -> None:
        self.deployment = deployment
        self.created = created  # RFC 3339
        self.slots = Slots()
        self.invocations = 0
        self._port = port

    @property
    @abstractmethod
    def wanted(self) -> int:
        """How many replicas there should be."""

    @abstractmethod
    def why_not(self) -> str:
        """Why it has no ready instance; "" while nothing has gone wrong."""

    def ready(self) -> list[Instance]:
        """The instances of the current deployment that take requests, always in the same order."""
        current = (instance for instance in self.slots.ready() if instance.deployment is self.deployment)
        return sorted(current, key=lambda instance: instance.id)

    def status(self) -> dict[str, Any]:
        """The function as OpenFaaS's FunctionStatus."""
        ready, document = self.ready(), self.deployment.document()
        annotations = dict(self.deployment.annotations)
        if ready:
            annotations[ADDRESS_ANNOTATION] = ",".join(f"{instance.host()}:{self._port}" for instance in ready)
        elif reason := self.why_not():
            annotations[REASON_ANNOTATION] = reason
        kept = {key: value for key, value in document.items() if value and key not in ("service", "annotations")}
        return {
            **kept,
            "name": document["service"],
            "namespace": NAMESPACE,
            "annotations": annotations,
            "replicas": self.wanted,
            "availableReplicas": len(ready),
            "invocationCount": self.invocations,
            "createdAt": self.created,
        }


@dataclass(frozen=True)
class LogQuery:
    """Which lines of a function's output: at most `tail` of each instance, not older than `since` (RFC 3339, or "")."""

    tail: int
    since: str
    instance: str  # its name; "" means every one
    follow: bool


@dataclass(frozen=True)
class LogLineOf:
    """One line that an instance printed."""

    instance: str
    timestamp: str  # RFC 3339
    text: str


class Turns:
    """Changes of one name come one after the other, those of several at the same time."""

    def __init__(self) -> None:
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    def of(self, name: str) -> asyncio.Lock:
        """The lock that a change of `name` holds."""
        return self._locks.setdefault(name, asyncio.Lock())

    async def all_over(self) -> None:
        """Return when the changes that are under way have ended."""
        for lock in list(self._locks.values()):
            async with lock:
                pass


class Backend(ABC):
    """Runs functions. Begun once, in three steps: `prepare`, then the gateway listens, then `begin`."""

    orchestration: str
    port: int  # where every instance listens
    runtimes: Mapping[str, Guarding]
    keeps: frozenset[str]  # those of `limits`, `constraints` that are kept here; others are refused

    @abstractmethod
    async def prepare(self) -> None:
        """What has to be there before the gateway can listen. Raises KaliumError."""

    @abstractmethod
    async def begin(self) -> None:
        """Begin with what was deployed before. Raises KaliumError."""

    @abstractmethod
    async def stop(self) -> None:
        """Return when no change is under way and nothing of ours runs in this process any more. What is deployed stays so."""

    # Functions

    @abstractmethod
    def find(self, name: str) -> Function | None:
        """The function of that name. Raises Refused when that cannot be known yet."""

    def get(self, name: str) -> Function:
        """The function of that name. Raises Refused."""
        function = self.find(name)
        if function is None:
            raise Refused(404, f"there is no function {name}")
        return function

    @abstractmethod
    def all(self) -> list[Function]:
        """Every function, by name."""

    @abstractmethod
    def check(self) -> None:
        """Raise Refused while what is known here may be out of date, so that nobody administers by it."""

    @abstractmethod
    async def deploy(self, deployment: Deployment, *, must_exist: bool) -> None:
        """Deploy or update. Raises Refused, with everything as it was before."""

    @abstractmethod
    async def scale(self, name: str, replicas: int) -> None:
        """Have so many replicas of a function. Raises Refused."""

    @abstractmethod
    async def remove(self, name: str) -> None:
        """Remove a function. Raises Refused."""

    @abstractmethod
    async def usage(self, function: Function) -> dict[str, float] | None:
        """What its instances use: {"cpu": thousandths of a processor, "totalMemoryBytes"}; None where that cannot be known."""

    @abstractmethod
    def logs(self, function: Function, query: LogQuery) -> AsyncGenerator[LogLineOf | None, None]:
        """What its instances printed, oldest first for each; with `follow` for as long as it is read, and None where there is nothing new.

        Raises Refused or BackendFailed.
        """

    # Secrets

    @abstractmethod
    async def secrets(self) -> list[str]:
        """The names of all secrets; their values are never given to a client."""

    @abstractmethod
    async def put_secret(self, name: str, value: bytes, *, is_new: bool) -> None:
        """Keep a secret. Raises Refused: 409 for a new one that is there, 404 for a changed one that is not."""

    @abstractmethod
    async def forget_secret(self, name: str) -> None:
        """Remove a secret. Raises Refused when there is none."""
