"""The registrar's log: one JSON object a line, with an event out of a closed set and fields out of another."""

from __future__ import annotations

from collections.abc import Callable

from kalium.engine import log as engine

# Event -> level. `error`: a person must act. `warning`: the registrar coped, and the line says how.
EVENTS = {
    "agent_back": "info",
    "agent_lost": "error",
    "api_lost": "error",
    "listening": "info",
    "pod_refused": "error",
    "pod_registered": "info",
    "pod_unregistered": "info",
    "pods_listed": "info",
    "registration_refused": "error",
    "stopped": "info",
    "stopping": "info",
}
FIELDS = frozenset("app code container detail function image node pod pods reason seconds".split())  # noqa: SIM905

LogLine = Callable[..., None]  # log(event, **fields)


class Log(engine.Log):
    """The gateway's writer of lines, with the registrar's events."""

    events = EVENTS
    fields = FIELDS
