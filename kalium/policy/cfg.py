"""From a CFG over messages to an automaton: constructs, and states that are what may still happen.

Loops carry a bound, so every CFG is a finite set of sequences and its automaton has no cycle. A state is made from its
behaviour (may the invocation end here, and which message leads where), and the same behaviour is the same state. That
merges equal futures, keeps parallel parts small, and numbers states by structure alone: same CFG, same automaton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kalium.policy.limits import STATES_MAX

WORK_MAX = 2_000_000  # edges looked at while one function is compiled, a few seconds; states alone would not bound it


@dataclass(frozen=True)
class Send:
    """One message: a symbol of the function, by its number. `join`: the group of invocations that it belongs to, 0 for none."""

    symbol: int
    join: int = 0


@dataclass(frozen=True)
class Barrier:
    """Nothing is sent: here every invocation of the group that was made has been answered. Only the controller sees it."""

    join: int


@dataclass(frozen=True)
class Steps:
    """One after the other; of nothing: the empty sequence."""

    parts: tuple[Cfg, ...]


@dataclass(frozen=True)
class Choice:
    """Exactly one of the branches."""

    branches: tuple[Cfg, ...]


@dataclass(frozen=True)
class Parallel:
    """All branches in any interleaving. `line` is named when their product is too large."""

    branches: tuple[Cfg, ...]
    line: int = 0


@dataclass(frozen=True)
class Repeat:
    """The body at least `low` and at most `high` times; an optional part is a repeat from 0 to 1."""

    body: Cfg
    low: int
    high: int
    line: int = 0


Cfg = Send | Barrier | Steps | Choice | Parallel | Repeat

Numbering = Callable[[Send | Barrier], int | None]  # what an automaton says where the CFG has this; None: nothing is there


def symbol_of(part: Send | Barrier) -> int | None:
    """The numbering of a function's own automaton, which has messages and no barriers."""
    return part.symbol if isinstance(part, Send) else None


def parts_of(cfg: Cfg) -> tuple[Cfg, ...]:
    """The CFGs directly inside `cfg`."""
    if isinstance(cfg, (Send, Barrier)):
        return ()
    if isinstance(cfg, Repeat):
        return (cfg.body,)
    return cfg.parts if isinstance(cfg, Steps) else cfg.branches


def leaves_of(cfg: Cfg) -> Iterator[Send | Barrier]:
    """The messages and barriers of `cfg`, in the order of the text."""
    if isinstance(cfg, (Send, Barrier)):
        yield cfg
    for part in parts_of(cfg):
        yield from leaves_of(part)


class TooManyStates(Exception):
    """The automaton would be larger than an executor takes; `line` of the construct that made it so, 0 when none did alone."""

    def __init__(self, line: int, found: str = f"more than {STATES_MAX} states") -> None:
        super().__init__(found)
        self.line = line


@dataclass(frozen=True)
class Automaton:
    """States are numbered from the start, 0, by distance; `edges` are (from, symbol, to), rising."""

    states: int
    accept: tuple[int, ...]
    edges: tuple[tuple[int, int, int], ...]


class Behaviours:
    """All states made so far. A state's edges lead to states with lower numbers only, as they were made before it."""

    END = 0  # nothing more may be sent, and the invocation may end

    def __init__(self) -> None:
        self._edges: list[tuple[tuple[int, int], ...]] = []
        self._may_end: list[bool] = []
        self._known: dict[tuple[bool, tuple[tuple[int, int], ...]], int] = {}
        self._work = 0
        self._line = 0
        self.state(True, ())

    def state(self, may_end: bool, edges: Iterable[tuple[int, int]]) -> int:
        """The state with this behaviour; `edges` are (symbol, to) in any order."""
        behaviour = (may_end, tuple(sorted(set(edges))))
        self._work += 1 + len(behaviour[1])
        if self._work > WORK_MAX:
            raise TooManyStates(self._line)
        number = self._known.setdefault(behaviour, len(self._edges))
        if number == len(self._edges):
            self._edges.append(behaviour[1])
            self._may_end.append(may_end)
        return number

    def build(self, cfg: Cfg, after: int, number: Numbering = symbol_of) -> int:
        """The state from which `cfg` may happen and then what may happen from `after`. What `number` leaves out does not happen."""
        if isinstance(cfg, (Send, Barrier)):
            numbered = number(cfg)
            return after if numbered is None else self.state(False, [(numbered, after)])
        if isinstance(cfg, Steps):
            for part in reversed(cfg.parts):
                after = self.build(part, after, number)
            return after
        if isinstance(cfg, Choice):
            return self._either([self.build(branch, after, number) for branch in cfg.branches])
        self._line = cfg.line or self._line
        if isinstance(cfg, Repeat):
            rest = after
            for _ in range(cfg.high - cfg.low):
                rest = self._either([self.build(cfg.body, rest, number), after])
            for _ in range(cfg.low):
                rest = self.build(cfg.body, rest, number)
            return rest
        product = self.END
        for branch in cfg.branches:
            product = self._interleaved(product, self.build(branch, self.END, number), cfg.line)
        return self._then(product, after)

    def _either(self, states: list[int]) -> int:
        return self.state(any(self._may_end[state] for state in states), [edge for state in states for edge in self._edges[state]])

    def _then(self, first: int, after: int) -> int:
        """`first` with `after` in the place of every end."""
        made: dict[int, int] = {}
        for state in self._reachable(first):
            edges = [(symbol, made[target]) for symbol, target in self._edges[state]]
            ends = self._may_end[state]
            made[state] = self.state(ends and self._may_end[after], edges + list(self._edges[after] if ends else ()))
        return made[first]

    def _interleaved(self, left: int, right: int, line: int) -> int:
        """Both in any interleaving: the shuffle product of two languages."""
        lefts, rights = self._reachable(left), self._reachable(right)
        if len(lefts) * len(rights) > STATES_MAX:
            raise TooManyStates(line)
        made: dict[tuple[int, int], int] = {}
        for one in lefts:
            for other in rights:
                edges = [(symbol, made[target, other]) for symbol, target in self._edges[one]]
                edges += [(symbol, made[one, target]) for symbol, target in self._edges[other]]
                made[one, other] = self.state(self._may_end[one] and self._may_end[other], edges)
        return made[left, right]

    def _reachable(self, start: int) -> list[int]:
        """States reachable from `start`, rising: each after all that it leads to."""
        found, waiting = {start}, [start]
        while waiting:
            fresh = {target for _, target in self._edges[waiting.pop()]} - found
            found |= fresh
            waiting.extend(fresh)
        return sorted(found)

    def prefixes(self, start: int, into: Behaviours) -> int:
        """The state in `into` with the same edges, where the invocation may end at any time: then equal edges are equal states."""
        made: dict[int, int] = {}
        for state in self._reachable(start):
            made[state] = into.state(True, [(symbol, made[target]) for symbol, target in self._edges[state]])
        return made[start]

    def numbered(self, start: int) -> Automaton:
        """The automaton that begins at `start`. Raises TooManyStates."""
        order = {start: 0}
        waiting = [start]
        for state in waiting:  # grows while it is read: breadth first
            for _, target in self._edges[state]:
                if target not in order:
                    order[target] = len(order)
                    waiting.append(target)
        if len(order) > STATES_MAX:
            raise TooManyStates(self._line)
        edges = sorted((order[state], symbol, order[target]) for state in order for symbol, target in self._edges[state])
        return Automaton(len(order), tuple(sorted(order[state] for state in order if self._may_end[state])), tuple(edges))
