"""Where ids and tokens come from."""

from __future__ import annotations

import os
from collections.abc import Callable

DIGITS = 32  # of each: 128 bits
DRAWN_BYTES = 4096  # at once: a system call for each token would cost as much as the step that it is for


class Mint:
    """Gives 32 fresh hexadecimal digits, 128 random bits of the system's generator, at each call."""

    def __init__(self, *, draw: Callable[[int], bytes] = os.urandom) -> None:
        self._draw = draw
        self._digits = ""
        self._taken = 0

    def __call__(self) -> str:
        """The next 32 digits. No digit is given twice."""
        taken = self._taken
        if taken == len(self._digits):
            self._digits = self._draw(DRAWN_BYTES).hex()
            taken = 0
        self._taken = end = taken + DIGITS
        return self._digits[taken:end]


assert DRAWN_BYTES * 2 % DIGITS == 0  # a piece is never shorter
