"""Things that expire, each kind after one lifetime: adding, removing and finding the next one due are O(1)."""

from __future__ import annotations

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
