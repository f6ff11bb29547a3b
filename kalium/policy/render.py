"""Shows a compiled policy to people: as text for a terminal, as a graph for Graphviz."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kalium.policy.automaton import CompiledPolicy, FunctionAutomaton


def text(policy: CompiledPolicy, functions: Sequence[str]) -> str:
    """The policy's head, then each of `functions` as a table of states: what may be sent there, and where that leads."""
    return "\n".join([*_head(policy), *(line for name in functions for line in _function(policy, policy.functions[name]))]) + "\n"


def _head(policy: CompiledPolicy) -> Iterator[str]:
    yield f"app {policy.app}, version {policy.version}, mode {policy.mode.value}, deadline {policy.deadline_ms} ms"
    for name in sorted(policy.peers):
        peer = policy.peers[name]
        extra = f", schema {peer.schema}" if peer.schema else ", gateway" if peer.gateway else ""
        yield f"peer {name}: {peer.protocol.value} {peer.host}:{peer.port}{extra}"
    yield f"entries: {', '.join(sorted(policy.entries)) or 'none'}"


def _function(policy: CompiledPolicy, function: FunctionAutomaton) -> Iterator[str]:
    entry = "entry" if function.name in policy.entries else "started by invocations only"
    yield ""
    yield f"function {function.name}: {entry}, {_count(function.states, 'state')}, {_count(len(function.symbols), 'message')}"
    if not function.edges:
        yield "  sends nothing"
        return
    width = max(len(function.symbols[symbol].text) for _, symbol, _ in function.edges)
    for state in range(function.states):
        marks = [mark for mark, holds in (("start", state in function.start), ("may end", state in function.accept)) if holds]
        yield f"  state {state}{' (' + ', '.join(marks) + ')' if marks else ''}"
        for number, target in function.leaving(state):
            symbol = function.symbols[number]
            yield f"    {symbol.text:<{width}}  -> {target}   line {symbol.line}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def dot(policy: CompiledPolicy, functions: Sequence[str]) -> str:
    """`functions` as one graph in the DOT language, a cluster each. A double circle: the invocation may end there."""
    lines = [f'digraph "{policy.app}" {{', "  rankdir=LR;", '  node [shape=circle, fontname="sans-serif"];', '  edge [fontname="sans-serif"];']
    for index, name in enumerate(functions):
        function = policy.functions[name]
        lines += [f'  subgraph "cluster_{index}" {{', f'    label="{name}";']
        for state in range(function.states):
            shape = "doublecircle" if state in function.accept else "circle"
            weight = ", style=bold" if state in function.start else ""
            lines.append(f'    f{index}_{state} [label="{state}", shape={shape}{weight}];')
        for source, number, target in function.edges:
            symbol = function.symbols[number]
            lines.append(f'    f{index}_{source} -> f{index}_{target} [label="{_escaped(symbol.text)}\\nline {symbol.line}"];')
        lines.append("  }")
    return "\n".join([*lines, "}"]) + "\n"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"')
