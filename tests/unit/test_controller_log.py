"""The controller's log: what a line costs, and when it can be read."""

from __future__ import annotations

import asyncio
import io
import json

from kalium.controller.log import Log


class Stream(io.StringIO):
    """Counts how often it is flushed."""

    flushes = 0

    def flush(self) -> None:
        self.flushes += 1


def test_lines_of_one_turn_of_the_loop_are_flushed_together_before_the_next() -> None:
    stream = Stream()
    log = Log(stream, clock=lambda: 1.5)

    async def story() -> list[int]:
        seen = []
        for _ in range(2):
            for _ in range(100):
                log("step_denied", reason="edge_not_allowed")
            await asyncio.sleep(0)
            seen.append(stream.flushes)
        return seen

    assert asyncio.run(story()) == [1, 2]
    lines = stream.getvalue().splitlines()
    assert len(lines) == 200
    assert json.loads(lines[0]) == {"time_ms": 1500, "level": "warning", "event": "step_denied", "reason": "edge_not_allowed"}


def test_the_last_line_of_a_loop_is_flushed() -> None:
    stream = Stream()
    log = Log(stream)

    async def story() -> None:
        log("stopped")

    asyncio.run(story())
    assert stream.flushes == 1


def test_without_a_loop_each_line_is_flushed() -> None:
    stream = Stream()
    log = Log(stream)
    log("stopping")
    log("stopped")
    assert stream.flushes == 2
