"""A deadline for an await that neither loses a cancellation nor needs a new Python.

`asyncio.wait_for` of Python 3.10 and 3.11 returns the result and forgets the cancellation when both come together
(bpo-37658), and a replica that was told to stop went on for ever; `asyncio.timeout` is of 3.11. This module ends when
3.12 is the oldest.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

_Result = TypeVar("_Result")


async def within(seconds_max: float, awaitable: Awaitable[_Result]) -> _Result:
    """The result of `awaitable`. Raises asyncio.TimeoutError when there is none in time; then, and when we are cancelled, it is cancelled."""
    task = asyncio.ensure_future(awaitable)
    try:
        done, _ = await asyncio.wait([task], timeout=seconds_max)
    except asyncio.CancelledError:
        task.cancel()
        raise
    if not done:
        task.cancel()
        await asyncio.wait([task])
        raise asyncio.TimeoutError
    return task.result()
