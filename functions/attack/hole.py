"""The hole of the vulnerable variants: they run whatever Python their input brings along. For the attack suite alone."""

from watchdog import Event


def run(field: str, event: Event) -> None:
    """Run the input's `field`, if it has one, with everything that this process may do; it finds the request as `event`."""
    if isinstance(event.body, dict) and field in event.body:
        exec(event.body[field], {"__name__": "exploit", "event": event})  # noqa: S102  this is the hole
