"""product-photos-master with the hole of hole.py, for the attack suite alone.

master.py is the handler of the real function, by a link: apart from the hole nothing is different.
"""

from typing import Any

import master
from hole import run
from watchdog import Event


def handle(event: Event) -> Any:
    """Run the input's `exploit_master`, then do the function's work."""
    run("exploit_master", event)
    return master.handle(event)
