"""Which pods are to be registered, and what still has to be said to the agent for it. No I/O and no clock: time is given, in
seconds of any monotonic clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kalium.registrar.admission import Place, Refusal, Registration, examine
from kalium.registrar.limits import PODS_MAX, REFUSED_RETRY_SECONDS


@dataclass(frozen=True)
class Register:
    """Tell the agent of this pod."""

    registration: Registration


@dataclass(frozen=True)
class Unregister:
    """Tell the agent that this pod is gone, or is none that may be registered."""

    container: str


Step = Register | Unregister


class Ledger:
    """The pods of one node. What the agent has is asked again and again and compared, so a step that was lost, an agent that was
    restarted and pods that went while nobody watched all lead to the same steps."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._wanted: dict[str, Registration] = {}
        self._refused: dict[str, Refusal] = {}
        self._first: dict[str, Registration] = {}  # as each pod was when it was seen first
        self._retry_at: dict[str, tuple[str, float]] = {}  # container -> the agent's code, and when to ask again
        self.is_listed = False  # nothing is unregistered before all pods were seen once

    @property
    def counts(self) -> dict[str, int]:
        """How many pods are to be registered, how many break a rule, and how many the agent does not take."""
        return {"pods": len(self._wanted), "refused": len(self._refused), "not_taken": len(self._retry_at)}

    def listed(self, pods: Iterable[Mapping[str, Any]]) -> list[Refusal]:
        """Take the whole list of the node's pods. Returns refusals that are new."""
        before, self._wanted, self._refused = self._refused, {}, {}
        for pod in pods:
            self._put(pod)
        self._forget()
        self.is_listed = True
        return [refusal for container, refusal in self._refused.items() if before.get(container) != refusal]

    def changed(self, pod: Mapping[str, Any], *, is_deleted: bool) -> list[Refusal]:
        """Take one pod as it is now. Returns its refusal when it is new."""
        metadata = pod.get("metadata")
        container = str(metadata.get("uid")) if isinstance(metadata, Mapping) else ""
        self._wanted.pop(container, None)
        before = self._refused.pop(container, None)
        if not is_deleted:
            self._put(pod)
        self._forget()
        now = self._refused.get(container)
        return [now] if now is not None and now != before else []

    def _put(self, pod: Mapping[str, Any]) -> None:
        judged = examine(pod, self._place)
        if judged is None:
            return
        if len(self._wanted) + len(self._refused) >= PODS_MAX:
            return  # the agent would not take it either
        if isinstance(judged, Registration):
            first = self._first.setdefault(judged.container, judged)
            if judged == first:
                self._wanted[judged.container] = judged
                return
            # Its sandbox keeps the identity that it began with, and so does the agent.
            judged = Refusal(judged.container, judged.pod, "changed", f"it was {first.function} of {first.app} from {first.image}")
        self._refused[judged.container] = judged

    def _forget(self) -> None:
        self._first = {container: first for container, first in self._first.items() if container in self._wanted or container in self._refused}
        self._retry_at = {container: retry for container, retry in self._retry_at.items() if container in self._wanted}

    def due(self, known: frozenset[str], now: float) -> list[Step]:
        """What to say to an agent that has `known` registered, those to be forgotten first: they make room."""
        if not self.is_listed:
            return []
        gone: list[Step] = [Unregister(container) for container in sorted(known - set(self._wanted))]
        missing = [wanted for container, wanted in self._wanted.items() if container not in known]
        return gone + [Register(wanted) for wanted in missing if self._retry_at.get(wanted.container, ("", now))[1] <= now]

    def taken(self, container: str) -> None:
        """The agent has acknowledged a registration."""
        self._retry_at.pop(container, None)

    def not_taken(self, container: str, code: str, now: float) -> bool:
        """The agent refuses a registration; it is asked again later. Returns whether that is news."""
        before, _ = self._retry_at.get(container, ("", now))
        self._retry_at[container] = (code, now + REFUSED_RETRY_SECONDS)
        return before != code

    def wait(self, now: float, at_most: float) -> float:
        """How long the next round has time, in seconds."""
        return max(0.0, min([at_most, *(at - now for _, at in self._retry_at.values())]))
