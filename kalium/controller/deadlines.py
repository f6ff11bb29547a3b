"""Things that expire: adding, removing and finding the next one due cost the same whatever waits."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Deadlines(Generic[Item]):
    """Items in the order of their deadlines. The lifetime is one, so the order of adding is that order.

    An OrderedDict and not a dict: finding the first key of a dict is linear in the keys deleted before it.
    """

    def __init__(self, lifetime_ns: int) -> None:
        self._lifetime_ns = lifetime_ns
        self._deadline_ns: OrderedDict[Item, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._deadline_ns)

    def add(self, item: Item, *, now_ns: int) -> None:
        """Let `item` expire one lifetime from now. An item that waits already starts anew."""
        self._deadline_ns.pop(item, None)
        self._deadline_ns[item] = now_ns + self._lifetime_ns

    def discard(self, item: Item) -> None:
        """Let `item`, if it waits, never expire."""
        self._deadline_ns.pop(item, None)

    def is_due(self, item: Item, *, now_ns: int) -> bool:
        """Whether `item` waits and its time is over."""
        deadline_ns = self._deadline_ns.get(item)
        return deadline_ns is not None and now_ns >= deadline_ns

    def next_due(self, *, now_ns: int) -> Item | None:
        """The first item whose time is over; None when there is none. It waits until it is discarded."""
        for item, deadline_ns in self._deadline_ns.items():
            return item if now_ns >= deadline_ns else None
        return None


class Buckets(Generic[Item]):
    """Items with deadlines of any distance that many of them share: one set for each deadline, and a heap of the deadlines.

    Who adds an item remembers its deadline.
    """

    def __init__(self) -> None:
        self._sets: dict[int, set[Item]] = {}
        self._heap: list[int] = []

    def add(self, item: Item, deadline_ns: int) -> None:
        """Let `item`, which does not wait yet, be due then."""
        waiting = self._sets.get(deadline_ns)
        if waiting is None:
            waiting = self._sets[deadline_ns] = set()
            heapq.heappush(self._heap, deadline_ns)
        waiting.add(item)

    def discard(self, item: Item, deadline_ns: int) -> None:
        """Let `item`, which was to be due then, never be due."""
        self._sets[deadline_ns].discard(item)  # an empty set goes when its time has come

    def next_due(self, *, now_ns: int) -> Item | None:
        """Take an item whose time is over; None when there is none."""
        return self._sets[self._heap[0]].pop() if self.has_due(now_ns=now_ns) else None

    def has_due(self, *, now_ns: int) -> bool:
        """Whether `next_due` has something to give."""
        while self._heap and now_ns >= self._heap[0]:
            if self._sets[self._heap[0]]:
                return True
            del self._sets[heapq.heappop(self._heap)]
        return False
