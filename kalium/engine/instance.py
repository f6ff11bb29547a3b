"""One running sandbox of a function as the data path sees it, and how it is asked whether it works. What made it is a back-end's matter."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress

from kalium.engine import upstream
from kalium.engine.deadline import within
from kalium.engine.deployment import Deployment
from kalium.engine.limits import PROBE_PAUSE_SECONDS, PROBE_SECONDS_MAX, READY_SECONDS_MAX, RETIRED_BYTES_MAX

RETIRED = "retired"  # the guard's reason (docs/reference/policy.md) for a request that it does not let in any more


class NotReady(Exception):
    """The instance ended or is retired, or did not answer its health path with 200 in time."""


class Instance:
    """A sandbox of a function. Its `alarm` is heard by whoever keeps it: it has ended or is retired, or a request to it failed."""

    def __init__(self, deployment: Deployment, identity: str, *, is_guarded: bool) -> None:
        self.deployment = deployment
        self.id = identity
        self.is_guarded = is_guarded
        self.has_ended = False  # the sandbox's process is gone
        self.is_retired = False  # its guard lets no more requests in
        self.alarm = asyncio.Event()
        self.breaker = upstream.Breaker()

    @property
    def name(self) -> str:
        """What people call it: the container's or the pod's name."""
        raise NotImplementedError

    def host(self) -> str:
        """The address that requests go to."""
        raise NotImplementedError

    def end(self, reason: str) -> None:
        """Take note that it is gone, and with it the answer to a request that is still in it: a dead sandbox closes nothing."""
        self.has_ended = True
        self.alarm.set()
        self.breaker.trip(reason)

    def retires(self, answer: upstream.Answer) -> bool:
        """Whether `answer` is that of a guard that lets no more requests in; then it has not let this one in either.

        Where no guard is, a program's own words are the program's.
        """
        if not self.is_guarded or answer.status != 503 or len(answer.body) > RETIRED_BYTES_MAX:
            return False
        try:
            said = json.loads(answer.body)
        except ValueError:
            return False
        if not isinstance(said, dict) or said.get("error") != RETIRED:
            return False
        self.is_retired = True
        self.alarm.set()
        return True


class Health:
    """Asks instances for their health path."""

    def __init__(self, port: int, path: str) -> None:
        self.port = port
        self.path = path

    async def until_ready(self, instance: Instance) -> None:
        """Return when the health path answers 200. Raises NotReady at the deadline, or at once when the process ends or its guard retires it."""
        deadline = time.monotonic() + READY_SECONDS_MAX
        pause, pause_max = PROBE_PAUSE_SECONDS
        while True:
            instance.alarm.clear()
            found = "nothing" if instance.has_ended or instance.is_retired else await self._probe_or_alarm(instance)
            if instance.has_ended:
                raise NotReady("its process ended")
            if instance.is_retired:
                raise NotReady("its guard lets no more requests in")
            if found == "200":
                return
            if time.monotonic() > deadline:
                raise NotReady(f"{self.path} answered {found} after {READY_SECONDS_MAX:.0f} s")
            with suppress(asyncio.TimeoutError):
                await within(pause, instance.alarm.wait())
            pause = min(pause * 1.5, pause_max)

    async def _probe_or_alarm(self, instance: Instance) -> str:
        """What the probe found; cut short by an alarm, because nothing answers from where a sandbox was."""
        tasks = asyncio.ensure_future(self._probe(instance)), asyncio.ensure_future(instance.alarm.wait())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return tasks[0].result() if tasks[0].done() else "nothing"
        finally:
            for task in tasks:
                task.cancel()

    async def _probe(self, instance: Instance) -> str:
        """One body-less GET of the health path: the status as text, or why there is none."""
        request = upstream.Request("GET", self.path, (), b"")
        try:
            answer = await upstream.exchange(instance.host(), self.port, request, instance.breaker, seconds_max=PROBE_SECONDS_MAX)
        except upstream.UpstreamError as error:
            return f"nothing ({error})"
        instance.retires(answer)
        return str(answer.status)
