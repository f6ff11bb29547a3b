"""One HTTPS request and nothing else: what mediating it costs."""

from typing import Any

from watchdog import Event, Failure
from web import fetch


def handle(event: Event) -> Any:
    """Fetch the image that the input names, drop it, and answer with the input."""
    if not isinstance(event.body, dict) or not isinstance(event.body.get("MediaUrl0"), str):
        raise Failure(400, "the body has no MediaUrl0")
    fetch(event.body["MediaUrl0"])
    return event.body
