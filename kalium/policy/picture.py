"""Draws where an invocation stood when a verdict fell: the states it went through, where it could go, and what was refused.

As lines for a terminal and as a graph for Graphviz. What is drawn comes from the verdict log; a policy of the same version
adds what else the states would have allowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kalium.policy.automaton import MessageAutomaton
from kalium.policy.message import printable
from kalium.policy.render import escaped

MESSAGE_TEXT_MAX = 160
STEPS_DRAWN_MAX = 40  # the last ones of a longer path
EDGES_DRAWN_MAX = 200  # of a larger automaton, those alone that touch a state of the path


@dataclass(frozen=True)
class Step:
    """One verdict: what was sent, by which line, and the states afterwards. `states` are empty where the guard had none to say."""

    message: str
    line: int
    states: tuple[int, ...]
    allowed: bool
    reason: str

    def text(self) -> str:
        """The message, fit for a terminal and for a label."""
        return printable(self.message, MESSAGE_TEXT_MAX)


@dataclass(frozen=True)
class Scene:
    """What is drawn. `steps` are the earlier verdicts of the invocation, in order; `automaton` is None when no policy is at hand."""

    title: str
    steps: Sequence[Step]
    last: Step
    automaton: MessageAutomaton | None

    def moves(self) -> list[tuple[tuple[int, ...], Step]]:
        """The steps that moved the cursor, each with the states before it; that of `last` too when it was allowed."""
        before = tuple(sorted(self.automaton.start)) if self.automaton is not None else ()
        found = []
        for step in (*self.steps, self.last):
            if step.allowed and step.states:
                found.append((before, step))
                before = step.states
        return found

    def states(self) -> tuple[int, ...]:
        """Where the invocation stood when `last` came, or where it stands since, if it was allowed. Empty: not known."""
        moves = self.moves()
        if self.last.states and not self.last.allowed:
            return self.last.states
        if moves:
            return moves[-1][1].states
        return tuple(sorted(self.automaton.start)) if self.automaton is not None else ()


def text(scene: Scene) -> list[str]:
    """The picture as lines of ASCII."""
    moves = scene.moves()
    shown = moves[-STEPS_DRAWN_MAX:]
    width = max([len(step.text()) for _, step in shown] + [len(symbol) for symbol, *_ in _choices(scene)] + [len(scene.last.text())])
    lines = [scene.title]
    if len(moves) > len(shown):
        lines.append(f"  ... {len(moves) - len(shown)} earlier messages")
    if shown:
        lines.append(f"  ({_name(shown[0][0])})")
    for number, (_, step) in enumerate(shown):
        lines.append(f"   |  {step.text():<{width}}  {_line(step)}".rstrip())
        if number < len(shown) - 1:
            lines.append(f"  ({_name(step.states)})")
    lines.append(f"  ({_name(scene.states())})  <-- {'here it stands since' if scene.last.allowed else 'here it stood'}")
    lines += [f"   +->  {symbol:<{width}}  {line}  to state {target}" for symbol, line, target in _choices(scene)]
    if scene.automaton is not None and scene.automaton.accepts(frozenset(scene.states())):
        lines.append("   +->  the invocation may end")
    if not scene.last.allowed:
        lines.append(f"   X--  {scene.last.text():<{width}}  refused: {scene.last.reason}")
    return lines


def _choices(scene: Scene) -> Iterator[tuple[str, str, int]]:
    """(message, line, target) of what the states would have allowed, by the policy."""
    if scene.automaton is None:
        return
    edges = sorted({edge for state in scene.states() for edge in scene.automaton.leaving(state)})
    for number, target in edges[:STEPS_DRAWN_MAX]:
        symbol = scene.automaton.symbols[number]
        yield printable(symbol.text, MESSAGE_TEXT_MAX), f"line {symbol.line}", target


def dot(scene: Scene) -> str:
    """The picture in the DOT language: the way in bold, the current states filled, what was refused dashed and red."""
    lines = [
        f'digraph "{escaped(printable(scene.title, MESSAGE_TEXT_MAX))}" {{', "  rankdir=LR;",
        '  node [shape=circle, fontname="sans-serif"];', '  edge [fontname="sans-serif"];',
    ]  # fmt: skip
    current = scene.states()
    way = [(source, step, target) for before, step in scene.moves() for source in before or (-1,) for target in step.states]
    edges = _edges(scene)
    states = {*current, *(state for source, _, target in (*way, *edges) for state in (source, target))}
    for state in sorted(states):
        shape = "doublecircle" if scene.automaton is not None and state in scene.automaton.accept else "circle"
        filled = ', style=filled, fillcolor="gold"' if state in current else ""
        lines.append(f'  {_node(state)} [label="{_name((state,) if state >= 0 else ())}", shape={shape}{filled}];')
    walked = {(source, step.line, target) for source, step, target in way}
    for source, number, target in edges:
        assert scene.automaton is not None
        symbol = scene.automaton.symbols[number]
        bold = ", penwidth=3" if (source, symbol.line, target) in walked else ""
        lines.append(
            f'  {_node(source)} -> {_node(target)} [label="{escaped(printable(symbol.text, MESSAGE_TEXT_MAX))}\\nline {symbol.line}"{bold}];'
        )
    if scene.automaton is None:
        lines += [
            f'  {_node(source)} -> {_node(target)} [label="{escaped(step.text())}\\n{_line(step)}", penwidth=3];' for source, step, target in way
        ]
    if not scene.last.allowed:
        lines.append(f'  refused [label="refused\\n{escaped(scene.last.reason)}", shape=box, color=red, fontcolor=red];')
        lines += [
            f'  {_node(state)} -> refused [label="{escaped(scene.last.text())}", style=dashed, color=red, fontcolor=red];'
            for state in current or (-1,)
        ]
        if not current:
            lines.append(f'  {_node(-1)} [label="?"];')
    return "\n".join([*lines, "}"]) + "\n"


def _edges(scene: Scene) -> list[tuple[int, int, int]]:
    if scene.automaton is None:
        return []
    if len(scene.automaton.edges) <= EDGES_DRAWN_MAX:
        return list(scene.automaton.edges)
    touched = {*scene.states(), *(state for before, step in scene.moves() for state in (*before, *step.states))}
    return [edge for edge in scene.automaton.edges if edge[0] in touched][:EDGES_DRAWN_MAX]


def _node(state: int) -> str:
    return f"s{state}" if state >= 0 else "start"


def _name(states: Sequence[int]) -> str:
    return ", ".join(map(str, states)) or "?"


def _line(step: Step) -> str:
    return f"line {step.line}" if step.line else ""
