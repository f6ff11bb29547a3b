"""Shows a compiled policy to people: as text for a terminal, as a graph for Graphviz."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kalium.policy.automaton import AppGraph, CompiledPolicy, FunctionAutomaton, Label, MessageAutomaton, Reuse, Symbol, Tls
from kalium.policy.limits import INFLIGHT_DEFAULT, RETRIES_DEFAULT


def text(policy: CompiledPolicy, functions: Sequence[str]) -> str:
    """The policy's head, then each of `functions` as a table of states: what may be sent there, and where that leads."""
    return "\n".join([*_head(policy), *(line for name in functions for line in _function(policy, policy.functions[name]))]) + "\n"


def _head(policy: CompiledPolicy) -> Iterator[str]:
    deadline = f"deadline {policy.deadline_ms} ms, then {policy.app_edge.value}"
    yield f"app {policy.app}, version {policy.version}, mode {policy.mode.value}, {deadline}"
    for name in sorted(policy.peers):
        peer = policy.peers[name]
        extra = f", schema {peer.schema}" if peer.schema else ", gateway" if peer.gateway else ""
        yield f"peer {name}: {peer.protocol.value} {peer.host}:{peer.port}{extra}"
    yield f"entries: {', '.join(sorted(policy.entries)) or 'none'}"


def _function(policy: CompiledPolicy, function: FunctionAutomaton) -> Iterator[str]:
    about = ["entry" if function.name in policy.entries else "started by invocations only"]
    about += [f"mode {function.mode.value}"] if function.mode is not policy.mode else []
    about += [_count(function.states, "state"), _count(len(function.symbols), "message")]
    about += ["TLS ends in the guard"] if function.tls is Tls.TERMINATE else []
    about += [f"{function.max_inflight} invocations at a time"] if function.max_inflight > INFLIGHT_DEFAULT else []
    about += ["one invocation an instance"] if function.reuse is Reuse.NEVER else []
    yield ""
    yield f"function {function.name}: {', '.join(about)}"
    yield from _states(function)
    if function.startup is not None:
        yield f"startup of {function.name}: {_count(function.startup.states, 'state')}, {_count(len(function.startup.symbols), 'message')}"
        yield from _states(function.startup)
    graph = policy.app_cfg[function.name]
    if _joins(graph):
        yield f"invocations of {function.name}: {_count(graph.states, 'state')}, {_count(_joins(graph), 'join')}"
        yield from _invocations(graph)


def _joins(graph: AppGraph) -> int:
    """How many joins there are. Without any, the invocations say nothing that the messages do not."""
    return sum(label.barrier > 0 for label in graph.labels)


def _invocations(graph: AppGraph) -> Iterator[str]:
    width = max(len(_label(label)) for label in graph.labels)
    edges = {state: [(label, target) for source, label, target in graph.edges if source == state] for state in range(graph.states)}
    for state, leaving in edges.items():
        yield f"  state {state}{' (start)' if state in graph.start else ''}"
        for number, target in leaving:
            label = graph.labels[number]
            marks = [f"join {label.join}"] * (label.join > 0) + [f"retries {label.retries}"] * (label.retries > 0)
            yield f"    {_label(label):<{width}}  -> {target}   {', '.join(marks)}".rstrip()


def _label(label: Label) -> str:
    return f"all of join {label.barrier} answered" if label.barrier else label.key.text()


def _states(automaton: MessageAutomaton) -> Iterator[str]:
    if not automaton.edges:
        yield "  sends nothing"
        return
    width = max(len(automaton.symbols[symbol].text) for _, symbol, _ in automaton.edges)
    for state in range(automaton.states):
        marks = [mark for mark, holds in (("start", state in automaton.start), ("may end", state in automaton.accept)) if holds]
        yield f"  state {state}{' (' + ', '.join(marks) + ')' if marks else ''}"
        for number, target in automaton.leaving(state):
            symbol = automaton.symbols[number]
            yield f"    {symbol.text:<{width}}  -> {target}   {', '.join([f'line {symbol.line}', *_marks(symbol)])}"


def _marks(symbol: Symbol) -> Iterator[str]:
    """What a line says beyond its text, where it is not the default."""
    if symbol.tail:
        yield "tail"
    if symbol.retries != RETRIES_DEFAULT.get(symbol.method, 0):
        yield f"retries {symbol.retries}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def dot(policy: CompiledPolicy, functions: Sequence[str]) -> str:
    """`functions` as one graph in the DOT language, a cluster each, and one for the invocations of those that have joins.

    A double circle: the invocation may end there. Dashed: by the queue. Dotted: passed when all of the join are answered.
    """
    lines = [f'digraph "{policy.app}" {{', "  rankdir=LR;", '  node [shape=circle, fontname="sans-serif"];', '  edge [fontname="sans-serif"];']
    parts: list[tuple[str, MessageAutomaton | None]] = []
    for name in functions:
        parts += [(name, policy.functions[name]), (f"startup of {name}", policy.functions[name].startup)]
    for index, (name, automaton) in enumerate((name, automaton) for name, automaton in parts if automaton is not None):
        lines += [f'  subgraph "cluster_{index}" {{', f'    label="{name}";']
        for state in range(automaton.states):
            shape = "doublecircle" if state in automaton.accept else "circle"
            weight = ", style=bold" if state in automaton.start else ""
            lines.append(f'    f{index}_{state} [label="{state}", shape={shape}{weight}];')
        for source, number, target in automaton.edges:
            symbol = automaton.symbols[number]
            line = ", ".join([f"line {symbol.line}", *_marks(symbol)])
            style = ", style=dashed" if symbol.asynchronous else ""
            lines.append(f'    f{index}_{source} -> f{index}_{target} [label="{escaped(symbol.text)}\\n{line}"{style}];')
        lines.append("  }")
    for name in functions:
        lines += list(_joined_cluster(name, policy.app_cfg[name])) if _joins(policy.app_cfg[name]) else []
    return "\n".join([*lines, "}"]) + "\n"


def _joined_cluster(name: str, graph: AppGraph) -> Iterator[str]:
    yield f'  subgraph "cluster_invocations_{name}" {{'
    yield f'    label="invocations of {name}";'
    for state in range(graph.states):
        yield f'    "{name}_{state}" [label="{state}"{", style=bold" if state in graph.start else ""}];'
    for source, number, target in graph.edges:
        label = graph.labels[number]
        style = ", style=dotted" if label.barrier else ", style=dashed" if label.key.asynchronous else ""
        join = f"\\njoin {label.join}" if label.join else ""
        yield f'    "{name}_{source}" -> "{name}_{target}" [label="{escaped(_label(label))}{join}"{style}];'
    yield "  }"


def escaped(label: str) -> str:
    """`label` between the quotes of the DOT language."""
    return label.replace("\\", "\\\\").replace('"', '\\"')
