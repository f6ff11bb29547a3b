"""product-photos-3-receive with a hole: it runs whatever Python its input brings along. For the attack suite alone.

receive.py is the handler of the real function, by a link: apart from the hole nothing is different.
"""

from typing import Any

import receive
from watchdog import Event


def handle(event: Event) -> Any:
    """Run the input's `exploit` with everything that this process may do, then do the function's work."""
    if isinstance(event.body, dict) and "exploit" in event.body:
        exec(event.body["exploit"], {"__name__": "exploit"})  # noqa: S102  this is the hole
    return receive.handle(event)
