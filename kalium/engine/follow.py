"""The output of several instances as one: of one after the other, or followed, with those that come while it lasts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress

from kalium.engine.backend import BackendFailed, LogLineOf
from kalium.engine.deadline import within
from kalium.engine.limits import FOLLOW_SECONDS_MAX, FOLLOW_TICK_SECONDS, FOLLOWED_LINES_MAX

Source = Callable[[], AsyncGenerator[LogLineOf, None]]


async def lines_of(sources: Callable[[], Mapping[str, Source]], *, follow: bool) -> AsyncGenerator[LogLineOf | None, None]:
    """The lines of every source: those that there are, or as `followed`."""
    if follow:
        async with aclosing(followed(sources)) as lines:
            async for line in lines:
                yield line
        return
    for source in sources().values():
        async for line in source():
            yield line


async def followed(sources: Callable[[], Mapping[str, Source]]) -> AsyncGenerator[LogLineOf | None, None]:
    """The lines of every source, as they come; None after each FOLLOW_TICK_SECONDS without one. Ends after FOLLOW_SECONDS_MAX.

    `sources` is asked again and again; each of its keys is begun once. A reader that is slow slows the sources down: no more than
    FOLLOWED_LINES_MAX lines wait for it.
    """
    lines: asyncio.Queue[LogLineOf] = asyncio.Queue(FOLLOWED_LINES_MAX)

    async def pump(source: Source) -> None:
        with suppress(BackendFailed):  # its instance has gone; others go on
            async with aclosing(source()) as read:
                async for line in read:
                    await lines.put(line)

    pumps: dict[str, asyncio.Task[None]] = {}
    deadline = time.monotonic() + FOLLOW_SECONDS_MAX
    try:
        while time.monotonic() < deadline:
            for key, source in sources().items():
                if key not in pumps:
                    pumps[key] = asyncio.get_running_loop().create_task(pump(source))
            try:
                line = await within(FOLLOW_TICK_SECONDS, lines.get())
            except asyncio.TimeoutError:
                yield None
            else:
                yield line
    finally:
        for task in pumps.values():
            task.cancel()
        await asyncio.gather(*pumps.values(), return_exceptions=True)
