"""How long to wait before what failed is tried again."""

from __future__ import annotations

import random
from collections.abc import Callable

from kalium.registrar.limits import BACKOFF_SECONDS_LEAST


class Backoff:
    """Doubles from the least to `seconds_max`; each wait is shortened at random by up to a half, so that nodes do not return together."""

    def __init__(self, seconds_max: float, *, chance: Callable[[], float] = random.random) -> None:
        self._seconds_max = seconds_max
        self._chance = chance
        self._next = BACKOFF_SECONDS_LEAST

    def wait(self) -> float:
        """The next wait, in seconds."""
        seconds, self._next = self._next, min(2 * self._next, self._seconds_max)
        return seconds * (1 - self._chance() / 2)

    def reset(self) -> None:
        """It went well."""
        self._next = BACKOFF_SECONDS_LEAST
