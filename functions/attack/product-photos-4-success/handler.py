"""product-photos-4-success with the hole of hole.py, for the attack suite alone.

success.py is the handler of the real function, by a link: apart from the hole nothing is different.
"""

from typing import Any

import success
from hole import run
from watchdog import Event


def handle(event: Event) -> Any:
    """Run the input's `exploit_success`, then do the function's work."""
    run("exploit_success", event)
    return success.handle(event)
