"""The verdict logs of the nodes' agents, read while a task runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from experiments.site import Site
from experiments.tails import LogTails

POLL_SECONDS = 0.05
QUIET_SECONDS = 0.3  # the agent batches writes; a log that is still for so long has said what it had to say
SETTLE_SECONDS_MAX = 5.0


@dataclass(frozen=True)
class Verdict:
    """One line of the verdict log; see docs/reference/policy.md for the reasons."""

    record: dict[str, Any]

    @property
    def denied(self) -> bool:
        """It was refused, or would have been in enforce mode."""
        return not self.record.get("allowed", False) or bool(self.record.get("would_deny", False))

    @property
    def app(self) -> str:
        return str(self.record.get("app", ""))

    @property
    def function(self) -> str:
        return str(self.record.get("function", ""))

    @property
    def mode(self) -> str:
        return str(self.record.get("mode", ""))

    @property
    def reason(self) -> str:
        return str(self.record.get("reason", ""))

    @property
    def message(self) -> str:
        return str(self.record.get("message", ""))

    @property
    def peer(self) -> str:
        return str(self.record.get("peer", ""))

    @property
    def kind(self) -> str:
        return str(self.record.get("kind", ""))

    @property
    def latency_us(self) -> int:
        return int(self.record.get("latency_us", 0))

    @property
    def expected(self) -> list[str]:
        return [str(entry) for entry in self.record.get("expected") or []]

    def sentence(self) -> str:
        """The verdict for a person: what was refused, why, and what the policy would have accepted, with its line."""
        expected = "; ".join(self.expected) or "nothing"
        line = f", policy line {self.record['line']}" if self.record.get("line") else ""
        return f"{self.function}: {self.kind} {self.message!r} to {self.peer or '-'}: {self.reason} (expected: {expected}{line})"


class VerdictLog:
    """What the agents of all nodes write from the moment this is made."""

    def __init__(self, site: Site) -> None:
        self._tails = LogTails(site.verdicts, site.nodes)

    def new(self) -> list[Verdict]:
        """Verdicts written since the last call."""
        return [Verdict(record) for record in self._tails.new_records() if record.get("event") == "verdict"]

    def settled(self) -> list[Verdict]:
        """Verdicts written since the last call, after every log has been quiet for QUIET_SECONDS."""
        return self.until(lambda _: False)

    def until(self, enough: Callable[[list[Verdict]], bool]) -> list[Verdict]:
        """Like `settled`, but returns at once when `enough` says so of the verdicts gathered."""
        gathered = self.new()
        deadline = time.monotonic() + SETTLE_SECONDS_MAX
        quiet_since = time.monotonic()
        while not enough(gathered) and time.monotonic() < deadline and time.monotonic() - quiet_since < QUIET_SECONDS:
            time.sleep(POLL_SECONDS)
            fresh = self.new()
            if fresh:
                quiet_since = time.monotonic()
                gathered += fresh
        return gathered
