"""The controller's log: one JSON object a line, with an event out of a closed set and fields out of another.

Never a token, a key or a payload. `level` is `info`, `warning` (the controller coped, the line says how) or `error` (a person
has to act).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any, TextIO

# Event -> level. A new event is added here, and to docs/reference/cli.md when programs may rely on it.
EVENTS = {
    "listening": "info",
    "metrics_listening": "info",
    "audit_off": "warning",
    "audit_failed": "error",
    "audit_well": "warning",
    "stopping": "info",
    "stopped": "info",
    "policy_loaded": "info",
    "policy_refused": "error",
    "policies_unreadable": "error",
    "certificate_loaded": "info",
    "certificate_refused": "error",
    "store_connected": "info",
    "store_lost": "error",
    "agent_connected": "info",
    "connection_closed": "info",
    "connection_refused": "warning",
    "step_denied": "warning",
    "invocation_evicted": "warning",
}
FIELDS = frozenset(
    {
        "address",
        "agents",
        "app",
        "call",
        "callee",
        "code",
        "detail",
        "file",
        "function",
        "instance",
        "invocation",
        "label",
        "node",
        "peer",
        "question",
        "reason",
        "sha256",
        "subject",
        "version",
    }
)

LogLine = Callable[..., None]  # log(event, **fields)


class Log:
    """Writes lines to `stream`, stamped with the wall clock in milliseconds."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.time) -> None:
        self._stream = stream
        self._clock = clock
        self._is_flushing = False

    def __call__(self, event: str, **fields: Any) -> None:
        """Write one line, and flush it before the loop waits again: a program that follows the file must not wait for a buffer.

        Lines of one turn of the loop share a flush, so a peer whose steps are denied costs the others no system call a step.
        """
        assert set(fields) <= FIELDS, set(fields) - FIELDS
        line = {"time_ms": int(self._clock() * 1000), "level": EVENTS[event], "event": event, **fields}
        self._stream.write(json.dumps(line, ensure_ascii=True, separators=(",", ":")) + "\n")
        if self._is_flushing:
            return
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self._stream.flush()
        else:
            self._is_flushing = True
            loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_flushing = False
        self._stream.flush()
