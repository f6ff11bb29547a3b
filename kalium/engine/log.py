"""The gateway's log: one JSON object a line, with an event out of a closed set and fields out of another.

Never a body, an environment or a secret. There is no line for an invocation that was answered: every system under comparison is
served by this gateway, and verdicts are the agent's to log.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

# Event -> level. `error`: a person must act. `warning`: the gateway coped, and the line says how.
EVENTS = {
    "call_failed": "warning",
    "call_lost": "warning",
    "call_unreadable": "error",
    "callback_failed": "warning",
    "cluster_back": "info",
    "cluster_lost": "warning",
    "function_deployed": "info",
    "function_removed": "info",
    "function_scaled": "info",
    "function_unreadable": "error",
    "function_updated": "info",
    "instance_ended": "warning",
    "instance_failed": "warning",
    "instance_left": "error",
    "instance_ready": "info",
    "instance_retired": "info",
    "instance_suspected": "warning",
    "invocation_failed": "warning",
    "leftover_removed": "warning",
    "listening": "info",
    "request_failed": "error",
    "stopped": "info",
    "stopping": "info",
    "unregister_failed": "warning",
}
FIELDS = frozenset(
    "address app call container data_address detail function functions image instance node path replicas runtime seconds status".split()  # noqa: SIM905
)

LogLine = Callable[..., None]  # log(event, **fields)


class Log:
    """Writes lines to `stream`, stamped with the wall clock in milliseconds. A subclass has events and fields of its own."""

    events: Mapping[str, str] = EVENTS
    fields = FIELDS

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.time) -> None:
        self._stream = stream
        self._clock = clock

    def __call__(self, event: str, **fields: Any) -> None:
        """Write one line and flush it: a program that follows the file must not wait for a buffer."""
        assert self.fields.issuperset(fields), self.fields.symmetric_difference(fields)
        record = {"event": event, "level": self.events[event], "time_ms": round(self._clock() * 1000), **fields}
        print(json.dumps(record, separators=(",", ":")), file=self._stream, flush=True)
