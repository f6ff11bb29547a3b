"""The picture is stored: the assignment is complete."""

from typing import Any

from watchdog import Event, Failure


def handle(event: Event) -> Any:
    """The input, marked as complete."""
    body = event.body
    if not isinstance(body, dict) or not isinstance(body.get("photographer"), dict):
        raise Failure(400, "the body has no photographer")
    return {**body, "photographer": {**body["photographer"], "status": "complete"}, "assignmentComplete": "true"}
