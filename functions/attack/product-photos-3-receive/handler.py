"""product-photos-3-receive with the hole of hole.py, for the attack suite alone.

receive.py is the handler of the real function, by a link: apart from the hole nothing is different.
"""

from typing import Any

import receive
from hole import run
from watchdog import Event


def handle(event: Event) -> Any:
    """Run the input's `exploit`, then do the function's work."""
    run("exploit", event)
    return receive.handle(event)
