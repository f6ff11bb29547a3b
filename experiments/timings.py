"""The timing logs of the nodes' agents, read while a task runs: what each judged message took, phase by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from experiments.errors import RunRefused
from experiments.site import Site
from experiments.tails import LogTails

# In the order of the published list (i) to (vii).
PHASES = ("record", "open", "event", "local", "controller", "total", "reseal")
POLL_SECONDS = 0.01
ABSENT = -1


@dataclass(frozen=True)
class Timing:
    """One judged message. `spans_ns` holds every phase of PHASES; None where the phase cannot occur."""

    function: str
    invocation: str
    kind: str
    size: int
    spans_ns: Mapping[str, int | None]

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Timing:
        """The message of a line of the log."""
        spans = {phase: int(record[f"{phase}_ns"]) for phase in PHASES}
        return cls(
            function=str(record["function"]),
            invocation=str(record["invocation"]),
            kind=str(record["kind"]),
            size=int(record["bytes"]),
            spans_ns={phase: None if span == ABSENT else span for phase, span in spans.items()},
        )


class TimingLog:
    """What the agents of all nodes write from the moment this is made."""

    def __init__(self, site: Site) -> None:
        self._tails = LogTails(site.timings, site.nodes)

    def new(self) -> list[Timing]:
        """Messages measured since the last call. Raises RunRefused when the log says that some are missing."""
        timings = []
        for record in self._tails.new_records():
            if record.get("event") == "timings_lost":
                raise RunRefused(
                    "timings.lost", f"read {self._tails}", f"{record.get('dropped')} samples of {record.get('function')} found no room",
                    "run it again on a quieter machine; a run with lost samples is not used",
                )  # fmt: skip
            if record.get("event") == "timing":
                timings.append(Timing.of(record))
        return timings

    def until(self, enough: Callable[[list[Timing]], bool], *, seconds_max: float) -> list[Timing]:
        """Messages measured since the last call, as soon as `enough` says so of them, or after `seconds_max`."""
        gathered = self.new()
        deadline = time.monotonic() + seconds_max
        while not enough(gathered) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            gathered += self.new()
        return gathered
