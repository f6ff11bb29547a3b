"""What the controller puts on record, and whether it still can.

Most of it is said to the log already, so that the log's lines are what is recorded: a line and its entry cannot differ.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from kalium.audit.journal import Journal
from kalium.audit.keys import private_key
from kalium.audit.rate import Rate
from kalium.audit.writer import AuditWriter, wall_ms
from kalium.controller.config import AuditFiles
from kalium.controller.log import LogLine

ANCHOR_EVERY_MS = 60_000  # of one agent, and only when its log has grown
ANCHORS_MAX = 4096  # agents that are remembered; a forgotten one may be anchored once more within the minute
TEXT_MAX = 512  # bytes of any text that comes from outside

# Line of the log -> event of the entry, and what it says happened.
AUDITED = {
    "policy_loaded": ("policy", "loaded"),
    "policy_refused": ("policy", "refused"),
    "agent_connected": ("agent", "connected"),
    "connection_closed": ("agent", "closed"),
    "connection_refused": ("agent", "refused"),
    "step_denied": ("step", "denied"),
}
# Lines about the controller itself. An eviction is no verdict: what was evicted is denied when it asks again.
NOT_AUDITED = frozenset(
    {
        "audit_failed", "audit_off", "audit_well", "certificate_loaded", "certificate_refused", "invocation_evicted", "listening",
        "metrics_listening", "policies_unreadable", "stopped", "stopping", "store_connected", "store_lost",
    }
)  # fmt: skip


class AuditLog(Protocol):
    """Where the controller's decisions are put on record."""

    @property
    def healthy(self) -> bool:
        """Whether what is recorded gets onto the disk. While it does not, no step may be taken."""

    def record(self, event: str, **fields: Any) -> None:
        """Take one entry. It never waits."""


class NoAudit:
    """Of a site without an audit log."""

    healthy = True

    def record(self, event: str, **fields: Any) -> None:
        """Forget it."""


class Recorder(Protocol):
    """What an Audit needs of an AuditWriter."""

    @property
    def healthy(self) -> bool:
        """As AuditWriter.healthy."""

    def record(self, event: str, fields: Mapping[str, Any]) -> bool:
        """As AuditWriter.record."""

    def close(self) -> int:
        """As AuditWriter.close."""


class Audit:
    """An audit log with the controller's bounds: of entries from one source, and of anchors of one agent."""

    def __init__(self, *, clock_ms: Callable[[], int] = wall_ms, rate: Rate | None = None) -> None:
        """`writer` is set by who makes the two, because each tells the other something."""
        self.writer: Recorder | None = None
        self.entries = 0  # since the start
        self._clock_ms = clock_ms
        self._rate = Rate() if rate is None else rate
        self._anchors: OrderedDict[str, tuple[int, tuple[int, str]]] = OrderedDict()  # node -> when, what
        self._failed_ms = 0
        self._error = ""
        self._refused = 0  # steps since the log has failed

    @property
    def healthy(self) -> bool:
        """As AuditLog.healthy."""
        return self.writer is not None and self.writer.healthy

    def record(self, event: str, **fields: Any) -> None:
        """As AuditLog.record. An anchor is left out when the agent's last one is less than a minute old, or the same."""
        if event == "anchor" and not self._is_new_anchor(**fields):
            return
        self._put(event, fields)

    def logging(self, log: LogLine) -> LogLine:
        """`log`, whose lines about policies, agents and denials are also recorded."""

        def audited(event: str, **fields: Any) -> None:
            log(event, **fields)
            kind, what = AUDITED.get(event, ("", ""))
            if kind == "step" and not self.healthy:
                self._refused += 1  # it is no decision, and the outage says how many there were
            elif kind and self._rate.admits(_source_of(event, fields), str(fields.get("reason", what)), now_ms=self._clock_ms()):
                self._put(kind, {"what": what, **fields})

        return audited

    def sweep(self, *, is_last: bool = False) -> None:
        """Once a second: say what was beyond the bounds."""
        for source, counts in self._rate.suppressed(now_ms=self._clock_ms(), is_last=is_last):
            self._put("suppressed", {"source": source, "counts": counts})

    def failed(self, error: OSError) -> None:
        """The log cannot be written."""
        self._failed_ms, self._error = self._clock_ms(), error.strerror or str(error)

    def well(self, lost: int) -> None:
        """It can be written again, or has kept up again."""
        refused, self._refused = self._refused, 0
        error, self._error = self._error or "the disk was slower than the entries", ""
        since_ms, self._failed_ms = self._failed_ms or self._clock_ms(), 0
        self._put("outage", {"what": "audit_log", "error": error, "since_ms": since_ms, "lost": lost, "refused": refused})

    def close(self) -> int:
        """Write the rest. Returns the bytes that were lost."""
        self.sweep(is_last=True)
        return self.writer.close() if self.writer is not None else 0

    def _put(self, event: str, fields: Mapping[str, Any]) -> None:
        if self.writer is not None:
            self.entries += 1
            self.writer.record(event, {name: value[:TEXT_MAX] if isinstance(value, str) else value for name, value in fields.items()})

    def _is_new_anchor(self, *, node: str, audit_seq: int, audit_hash: str) -> bool:
        if not node or audit_seq < 1 or not re.fullmatch(r"[0-9a-f]{64}", audit_hash):
            return False  # an agent without an audit log, or with one that says nothing
        now_ms, said = self._clock_ms(), (audit_seq, audit_hash)
        at_ms, before = self._anchors.get(node, (now_ms - ANCHOR_EVERY_MS, None))
        if said == before or 0 <= now_ms - at_ms < ANCHOR_EVERY_MS:
            return False
        self._anchors[node] = (now_ms, said)
        self._anchors.move_to_end(node)
        if len(self._anchors) > ANCHORS_MAX:
            self._anchors.popitem(last=False)
        return True


def _source_of(event: str, fields: Mapping[str, Any]) -> str:
    """Whose allowance an entry takes: one that nobody can choose, so that nobody can have many.

    A denial takes its node's: an agent may name any instance. Strangers have one for each reason, so that those without a certificate
    do not hide what is done with a stolen one.
    """
    if event == "connection_refused":
        return f"refused: {fields.get('reason', '')}"
    return str(fields.get("node", ""))


def open_audit(files: AuditFiles, name: str, *, log: LogLine, loop: asyncio.AbstractEventLoop) -> Audit:
    """The controller's audit log, with its thread. Raises KaliumError audit.key or audit.log.

    A disk that cannot be written is no error: then no step is taken until it can.
    """
    audit = Audit()

    def failed(error: OSError) -> None:
        audit.failed(error)
        log("audit_failed", file=str(files.log), detail=error.strerror or str(error))

    def well(lost: int) -> None:
        audit.well(lost)
        log("audit_well", file=str(files.log))

    key = private_key(files.key)
    journal = Journal(
        files.log, key.sign, writer="controller", name=name, run=secrets.token_hex(8), fsync=files.fsync,
        bytes_max=files.max_mib * 1024 * 1024, now_ms=wall_ms(),
    )  # fmt: skip
    audit.writer = AuditWriter(
        journal,
        on_failed=lambda error: _in_loop(loop, failed, error),
        on_well=lambda lost: _in_loop(loop, well, lost),
    )
    return audit


def _in_loop(loop: asyncio.AbstractEventLoop, tell: Callable[[Any], None], what: Any) -> None:
    """Tell the loop's thread, as long as there is a loop."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(tell, what)
