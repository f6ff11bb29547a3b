"""Who gets a request: the ready instances of one function, each with as many at a time as it takes, and a bounded queue for the rest."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Hashable

from kalium.engine.deadline import within
from kalium.engine.instance import Instance
from kalium.engine.limits import QUEUE_REQUESTS_MAX, QUEUE_SECONDS_MAX


class NoInstance(Exception):
    """The function has no ready instance."""


class Busy(Exception):
    """All instances are busy and the queue is full, or the time in it was up."""


class Slots:
    """Instances with room, instances with requests in them, and requests that wait for one, oldest first."""

    def __init__(self) -> None:
        self._free: deque[Instance] = deque()  # with room, the one that got its last request first in front
        self._busy: Counter[Instance] = Counter()  # how many requests are in it; none with 0
        self._withdrawn: set[Instance] = set()  # busy, and not to be used after that
        self._suspended: set[Instance] = set()  # not to be used until it is offered again
        self._expected: set[Hashable] = set()  # who will soon offer an instance in the place of another
        self._waiting: deque[asyncio.Future[Instance]] = deque()
        self._freed = asyncio.Event()  # a withdrawn instance has finished its request

    def ready(self) -> list[Instance]:
        """Every instance that takes requests, busy or not."""
        return [*self._free, *(instance for instance in self._busy if instance not in self._withdrawn and instance not in self._free)]

    def add(self, instance: Instance) -> None:
        """Offer an instance that is ready. One that was suspended may still have requests in it."""
        assert instance not in self.ready(), "an instance is offered once"
        self._suspended.discard(instance)
        self._withdrawn.discard(instance)
        if self._has_room(instance):
            self._free.append(instance)
        self._serve()

    def expect(self, who: Hashable) -> None:
        """Let requests wait for the instance that `who` is about to make."""
        self._expected.add(who)

    def expect_no_more(self, who: Hashable) -> None:
        """`who` has offered its instance, or will offer none."""
        self._expected.discard(who)
        self._send_away()

    def suspend(self, instance: Instance) -> None:
        """Offer an instance no longer, but let requests wait for it: it is asked whether it still works, and then added or withdrawn."""
        self._suspended.add(instance)
        self._stop_offering(instance)

    def withdraw(self, instance: Instance) -> None:
        """Offer an instance no longer; one that is not offered stays so. Its request, if it has one, goes on."""
        self._suspended.discard(instance)
        self._stop_offering(instance)
        self._send_away()

    async def take(self) -> Instance:
        """An instance with room for a request, which is the caller's until `give_back`. Raises NoInstance or Busy."""
        if self._free and not self._waiting:
            return self._use()
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
        """End a use of an instance."""
        self._busy[instance] -= 1
        if not self._busy[instance]:
            del self._busy[instance]
        if instance not in self._withdrawn:
            if instance not in self._free:
                self._free.append(instance)
            self._serve()
        elif instance not in self._busy:
            self._withdrawn.remove(instance)
            self._freed.set()

    async def drained(self, instance: Instance, seconds_max: float) -> bool:
        """Wait until a withdrawn instance has no requests; whether that came to be within the time."""
        deadline = asyncio.get_running_loop().time() + seconds_max
        while instance in self._busy:
            self._freed.clear()
            try:
                await within(deadline - asyncio.get_running_loop().time(), self._freed.wait())
            except asyncio.TimeoutError:
                return False
        return True

    def _is_empty(self) -> bool:
        return not self._suspended and not self._expected and not self.ready()

    def _has_room(self, instance: Instance) -> bool:
        return self._busy[instance] < instance.deployment.max_inflight

    def _use(self) -> Instance:
        """Put a request into the instance that has the fewest."""
        instance = min(self._free, key=self._busy.__getitem__)
        self._free.remove(instance)
        self._busy[instance] += 1
        if self._has_room(instance):
            self._free.append(instance)
        return instance

    def _stop_offering(self, instance: Instance) -> None:
        if instance in self._busy:
            self._withdrawn.add(instance)
        if instance in self._free:
            self._free.remove(instance)

    def _send_away(self) -> None:
        """Nobody waits for an instance when there will be none."""
        if self._is_empty():
            while self._waiting:
                self._waiting.popleft().set_exception(NoInstance())

    def _serve(self) -> None:
        while self._free and self._waiting:
            self._waiting.popleft().set_result(self._use())
