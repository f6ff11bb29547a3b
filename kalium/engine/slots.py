"""Who gets a request: the ready instances of one function, each with one request at a time, and a bounded queue for the rest."""

from __future__ import annotations

import asyncio
from collections import deque

from kalium.engine.deadline import within
from kalium.engine.host import Instance
from kalium.engine.limits import QUEUE_REQUESTS_MAX, QUEUE_SECONDS_MAX


class NoInstance(Exception):
    """The function has no ready instance."""


class Busy(Exception):
    """All instances are busy and the queue is full, or the time in it was up."""


class Slots:
    """Instances that are free, instances that are busy, and requests that wait for one, oldest first."""

    def __init__(self) -> None:
        self._free: deque[Instance] = deque()
        self._busy: set[Instance] = set()
        self._withdrawn: set[Instance] = set()  # busy, and not to be used after that
        self._suspended: set[Instance] = set()  # not to be used until it is offered again
        self._waiting: deque[asyncio.Future[Instance]] = deque()
        self._freed = asyncio.Event()  # a withdrawn instance has finished its request

    def ready(self) -> list[Instance]:
        """Every instance that takes requests, busy or not."""
        return [*self._free, *(instance for instance in self._busy if instance not in self._withdrawn)]

    def add(self, instance: Instance) -> None:
        """Offer an instance that is ready."""
        assert instance not in self._free and instance not in self._busy, "an instance is offered once"  # noqa: PT018
        self._suspended.discard(instance)
        self._free.append(instance)
        self._serve()

    def suspend(self, instance: Instance) -> None:
        """Offer an instance no longer, but let requests wait for it: it is asked whether it still works, and then added or withdrawn."""
        self._suspended.add(instance)
        self._stop_offering(instance)

    def withdraw(self, instance: Instance) -> None:
        """Offer an instance no longer; one that is not offered stays so. Its request, if it has one, goes on."""
        self._suspended.discard(instance)
        self._stop_offering(instance)
        if self._is_empty():
            while self._waiting:
                self._waiting.popleft().set_exception(NoInstance())

    async def take(self) -> Instance:
        """A free instance, which is the caller's until `give_back`. Raises NoInstance or Busy."""
        if self._free and not self._waiting:
            instance = self._free.popleft()
            self._busy.add(instance)
            return instance
        if self._is_empty():
            raise NoInstance
        if len(self._waiting) >= QUEUE_REQUESTS_MAX:
            raise Busy(f"all instances are busy and {QUEUE_REQUESTS_MAX} requests wait already")
        waiting: asyncio.Future[Instance] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        try:
            await asyncio.wait([waiting], timeout=QUEUE_SECONDS_MAX)
        except asyncio.CancelledError:
            if self._leave(waiting) and waiting.exception() is None:  # it was given one at the same moment
                self.give_back(waiting.result())
            raise
        if self._leave(waiting):
            return waiting.result()
        raise Busy(f"no instance was free within {QUEUE_SECONDS_MAX:.0f} s")

    def _leave(self, waiting: asyncio.Future[Instance]) -> bool:
        """Wait no longer; whether there was an answer."""
        if waiting.done():
            return True
        self._waiting.remove(waiting)
        return False

    def give_back(self, instance: Instance) -> None:
        """End the use of an instance."""
        self._busy.remove(instance)
        if instance in self._withdrawn:
            self._withdrawn.remove(instance)
            self._freed.set()
        else:
            self._free.append(instance)
            self._serve()

    async def drained(self, instance: Instance, seconds_max: float) -> bool:
        """Wait until a withdrawn instance has no request; whether that came to be within the time."""
        deadline = asyncio.get_running_loop().time() + seconds_max
        while instance in self._busy:
            self._freed.clear()
            try:
                await within(deadline - asyncio.get_running_loop().time(), self._freed.wait())
            except asyncio.TimeoutError:
                return False
        return True

    def _is_empty(self) -> bool:
        return not self._suspended and not self.ready()

    def _stop_offering(self, instance: Instance) -> None:
        if instance in self._busy:
            self._withdrawn.add(instance)
        elif instance in self._free:
            self._free.remove(instance)

    def _serve(self) -> None:
        while self._free and self._waiting:
            instance = self._free.popleft()
            self._busy.add(instance)
            self._waiting.popleft().set_result(instance)
