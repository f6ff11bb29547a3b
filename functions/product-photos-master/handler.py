"""The flow of a picture: received, then marked as complete, then reported; each step gets what the one before answered."""

import os
from typing import Any

from watchdog import Event, Failure
from web import post

STEPS = ("URL_RECEIVE", "URL_SUCCESS", "URL_REPORT")


def handle(event: Event) -> Any:
    """Run the steps of `/photos`. A step that fails ends the flow with 502."""
    if event.path != "/photos":
        raise Failure(404, f"there is no flow {event.path}")
    body = event.body
    for step in STEPS:
        body = post(os.environ[step], body)
    return body
