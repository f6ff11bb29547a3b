"""The answer to STATUS: counts of the controller, and the agents' reports put together, in no more than a frame holds.

An agent's report is the word of a peer: whatever it holds, the answer stays within the bounds of the wire.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from kalium.controller.registry import Agent, Registry
from kalium.protocol.frames import Report
from kalium.protocol.limits import FRAME_BYTES_MAX, INT_MAX, ITEMS_MAX

ROWS_BYTES_MAX = FRAME_BYTES_MAX // 2
COUNTS_BYTES_MAX = FRAME_BYTES_MAX // 8  # of each of the three maps
EVERY_NODE = "*"  # the node of a row that stands for all of them

# node, app, function, mode, version, asked, and of how many instances that is true
Row = tuple[str, str, str, str, int, str, int]


def rows_of(registry: Registry) -> list[Row]:
    """One row for each node, function, mode and version, those first that are not as the policy asks.

    When they are more than a frame holds, the nodes are put together; when that is still too much, the last ones are left out.
    """
    rows = list(_rows(registry))
    if not _fits(rows):
        counts: Counter[tuple[str, str, str, int, str]] = Counter()
        for _, *what, count in rows:
            counts[tuple(what)] += count  # type: ignore[index]  # a slice of a tuple loses its types
        rows = [(EVERY_NODE, *what, min(count, INT_MAX)) for what, count in counts.items()]
    rows.sort(key=lambda row: (row[3] == row[5], row))
    fitting = []
    room = ROWS_BYTES_MAX
    for row in islice(rows, ITEMS_MAX):
        room -= _bytes_of(row)
        if room < 0:
            break
        fitting.append(row)
    return fitting


def sum_of(maps: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The sum of counts, key by key; of more keys than a frame holds, the largest counts."""
    total: Counter[str] = Counter()
    for each in maps:
        for key, count in each.items():
            total[key] += max(count, 0)
    fitting = {}
    room = COUNTS_BYTES_MAX
    for key, count in sorted(total.items(), key=lambda item: (-item[1], item[0]))[:ITEMS_MAX]:
        room -= len(key.encode()) + 16
        if room < 0:
            break
        fitting[key] = min(count, INT_MAX)
    return fitting


def reports_of(registry: Registry) -> list[Report]:
    """The last report of each agent that has made one."""
    return [agent.report for agent in registry.agents.values() if agent.report is not None]


def _rows(registry: Registry) -> Iterator[Row]:
    newest = registry.newest()
    for agent in registry.agents.values():
        for app, function, mode, version, count in _columns(agent):
            published = newest.get(app)
            automaton = published.policy.functions.get(function) if published is not None else None
            yield agent.node, app, function, mode, version, automaton.mode.value if automaton is not None else "", count


def _columns(agent: Agent) -> Iterator[tuple[str, str, str, int, int]]:
    said = agent.report
    return zip(said.app, said.function, said.mode, said.version, said.count, strict=True) if said is not None else iter(())


def _fits(rows: list[Row]) -> bool:
    return len(rows) <= ITEMS_MAX and sum(map(_bytes_of, rows)) <= ROWS_BYTES_MAX


def _bytes_of(row: Row) -> int:
    """An upper bound of what a row takes: five texts, two numbers and their heads."""
    return sum(len(value.encode()) if isinstance(value, str) else 0 for value in row) + 5 * 3 + 2 * 9
