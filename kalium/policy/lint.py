"""Looks for what compiles and may not be meant: peers nobody uses, functions nothing starts, lines wider than they look."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from kalium.policy import compile as compiler
from kalium.policy.automaton import CompiledPolicy, FailMode, MessageAutomaton, Mode, Symbol, is_placeholder
from kalium.policy.cfg import Cfg, Choice, Repeat, Send, Steps, leaves_of, parts_of
from kalium.policy.compile import Draft, DraftFunction
from kalium.policy.limits import INFLIGHT_DEFAULT, MAX_BODY_DEFAULT, RETRIES_DEFAULT
from kalium.policy.message import Kind
from kalium.policy.source import Finding, Severity

Node = TypeVar("Node", bound=Hashable)


def lint(data: bytes) -> list[Finding]:
    """Everything that is to say about the YAML `data`, errors of the compiler included, in the order of lines."""
    draft, findings = compiler.read(data)
    if draft is None:
        return findings
    compiled, too_large = compiler.assemble(draft)
    findings = [*too_large, *_of_draft(draft)]
    if compiled:
        policy = CompiledPolicy.parse(compiled)
        findings += [*_idle_joins(draft, policy), *lint_compiled(policy)]
    return sorted(findings, key=lambda finding: (finding.line, -finding.severity, finding.code, finding.found))


def lint_compiled(policy: CompiledPolicy) -> list[Finding]:
    """What can be said of the compiled form alone: parts that no sequence of messages reaches.

    The compiler makes none of them; a policy from another hand may have some.
    """
    return [finding for name in sorted(policy.functions) for finding in _unreachable(policy, name)]


def _finding(severity: Severity, code: str, line: int, found: str, next_step: str) -> Finding:
    return Finding(severity, f"policy.{code}", line, found, next_step)


def _of_draft(draft: Draft) -> Iterator[Finding]:
    lines = draft.source
    if not draft.entries:
        yield _finding(
            Severity.ERROR, "no_entries", lines.line(("entries",)), "no function is an entry, so nothing can be started", "list one in entries"
        )
    if draft.mode in (Mode.AUDIT, Mode.LEARN):
        yield _lenient(draft.mode, lines.line(("mode",)), "")
    if draft.app_edge is not FailMode.DENY:
        what = "any start and invocation" if draft.app_edge is FailMode.ALLOW else "starts and invocations in any order"
        found = f"app_edge {draft.app_edge.value} allows {what} while no controller answers"
        yield _finding(
            Severity.WARNING, "app_edge", lines.line(("on_unavailable", "app_edge")), found, "write `app_edge: deny`, or run two controllers"
        )
    used = {symbol.peer for function in draft.functions.values() for symbol in function.symbols()}
    for name in draft.peers:
        if name not in used:
            found = f"peer {name} is in no message, and functions may still connect to it"
            yield _finding(Severity.WARNING, "unused_peer", lines.line(("peers", name)), found, "delete it")
    yield from _starts(draft)
    for function in draft.functions.values():
        yield from _of_function(draft, function)


def _lenient(mode: Mode, line: int, of: str) -> Finding:
    return _finding(Severity.NOTE, "mode", line, f"mode {mode.value} refuses no message{of}", "sign `mode: enforce` when the log is clean")


def _of_function(draft: Draft, function: DraftFunction) -> Iterator[Finding]:
    name, path = function.name, ("functions", function.name)

    def line(key: str) -> int:
        return draft.source.line((*path, key))

    if function.mode is Mode.OFF:
        yield _finding(Severity.WARNING, "mode_off", line("mode"), f"the guard of {name} looks at nothing", "write `mode: audit` to see what it does")
        for symbol in function.symbols():
            callee = draft.functions.get(symbol.callee)
            if callee is not None and callee.name not in draft.entries and callee.mode is not Mode.OFF:
                found = f"{callee.name} is no entry, and an invocation by {name}, whose mode is off, carries no token"
                yield _finding(Severity.WARNING, "no_token", symbol.line, found, f"list {callee.name} in entries, or switch {name} on")
    elif function.mode is not draft.mode and function.mode is not Mode.ENFORCE:
        yield _lenient(function.mode, line("mode"), f" of {name}")
    if function.max_body > MAX_BODY_DEFAULT:
        found = f"{name} may send bodies of {function.max_body} bytes, by default {MAX_BODY_DEFAULT}"
        yield _finding(Severity.WARNING, "raised_max_body", line("max_body"), found, "lower it to what the function needs")
    if function.max_inflight > INFLIGHT_DEFAULT:
        found = f"a message of {name} is allowed if one of {function.max_inflight} invocations allows it"
        yield _finding(Severity.WARNING, "raised_max_inflight", line("max_inflight"), found, "let more instances serve one each")
    for cfg in function.cfgs():
        for symbol in cfg.symbols:
            yield from _of_symbol(symbol)
            if symbol.callback in draft.entries:
                found = f"{symbol.callback} is called back with results and is an entry, so clients may send it results as well"
                yield _finding(Severity.WARNING, "callback_entry", symbol.line, found, f"take {symbol.callback} out of entries")
        yield from _redundant(cfg.cfg, cfg.symbols)


def _starts(draft: Draft) -> Iterator[Finding]:
    """Functions that nothing starts, and functions that start each other without end."""
    invokes = {
        name: sorted({started for symbol in function.symbols() for started in (symbol.callee, symbol.callback) if started})
        for name, function in draft.functions.items()
    }
    started = _reachable(draft.entries, invokes)
    for name, function in draft.functions.items():
        if name not in started and draft.entries:
            found = f"{name} is no entry and no function that can be started invokes it"
            yield _finding(Severity.WARNING, "never_started", function.line, found, "list it in entries, add the invocation, or delete it")
        if name in _reachable(invokes[name], invokes):
            found = f"{name} can be invoked by what it invokes, so one call has no bound"
            yield _finding(Severity.WARNING, "recursion", function.line, found, "break the circle, if it is not meant")


def _reachable(starts: Iterable[Node], edges: Mapping[Node, Iterable[Node]]) -> set[Node]:
    found = set(starts)
    waiting = list(found)
    while waiting:
        fresh = set(edges[waiting.pop()]) - found
        found |= fresh
        waiting.extend(fresh)
    return found


def _idle_joins(draft: Draft, policy: CompiledPolicy) -> Iterator[Finding]:
    """Joins that no invocation waits behind."""
    for name, function in draft.functions.items():
        graph = policy.app_cfg[name]
        backward: dict[int, set[int]] = {state: set() for state in range(graph.states)}
        for source, _, target in graph.edges:
            backward[target].add(source)
        waiting = _reachable({source for source, label, _ in graph.edges if not graph.labels[label].barrier}, backward)
        barriers = [(graph.labels[label].barrier, target in waiting) for _, label, target in graph.edges if graph.labels[label].barrier]
        for group in sorted({group for group, _ in barriers} - {group for group, is_waited_behind in barriers if is_waited_behind}):
            line = min(
                function.during.symbols[part.symbol].line for part in leaves_of(function.during.cfg) if isinstance(part, Send) and part.join == group
            )
            found = f"no invocation of {name} follows this join, and nothing else waits for it"
            yield _finding(Severity.WARNING, "idle_join", line, found, "delete `join`, or put what has to wait behind it")


def _of_symbol(symbol: Symbol) -> Iterator[Finding]:
    """Lines that stand for more messages than they name."""
    if any(is_placeholder(segment) for segment in symbol.path.split("/")):
        found = f"{symbol.text}: the placeholder stands for any one segment"
        yield _finding(Severity.NOTE, "wildcard", symbol.line, found, "write the segment out, if there are few")
    if "*" in symbol.path:
        found = f"{symbol.text}: * is an ordinary character of a path"
        yield _finding(Severity.WARNING, "literal_star", symbol.line, found, "write {name} for any one segment")
    if symbol.query:
        found = f"{symbol.text}: each key may be there or not, with any value"
        yield _finding(Severity.NOTE, "query", symbol.line, found, "list only the keys that the function needs")
    if symbol.upgrade:
        found = f"{symbol.text}: what follows the upgrade is not looked at"
        yield _finding(Severity.WARNING, "upgrade", symbol.line, found, "let the function poll, if its peer may be told anything by it")
    if symbol.retries > RETRIES_DEFAULT.get(symbol.method, 0):
        found = f"{symbol.text}: it may be sent {symbol.retries} times more, by default {RETRIES_DEFAULT.get(symbol.method, 0)}"
        whom = symbol.callee or "the peer"
        yield _finding(Severity.WARNING, "raised_retries", symbol.line, found, f"keep the default, unless {whom} takes the same request twice")
    if symbol.kind is Kind.SMTP and not (symbol.sender and symbol.to):
        unnamed = " and ".join(name for name, there in (("sender", symbol.sender), ("recipients", symbol.to)) if not there)
        found = f"{symbol.text}: it stands for any {unnamed}"
        yield _finding(Severity.NOTE, "any_address", symbol.line, found, "list the addresses, if they are known")


def _redundant(cfg: Cfg, symbols: Sequence[Symbol]) -> Iterator[Finding]:
    """Branches of a choice that an earlier branch already is, lines aside."""
    if isinstance(cfg, Choice):
        lines: dict[Hashable, int] = {}
        for branch in cfg.branches:
            shape, line = _shape(branch, symbols), min(_lines(branch, symbols))
            if shape in lines:
                found = f"this branch of a choice is the one of line {lines[shape]} again"
                yield _finding(Severity.WARNING, "redundant_branch", line, found, "delete one of them")
            lines.setdefault(shape, line)
    for part in parts_of(cfg):
        yield from _redundant(part, symbols)


def _shape(cfg: Cfg, symbols: Sequence[Symbol]) -> Hashable:
    """The CFG with its messages in the place of their numbers, equal for equal ones on different lines."""
    if isinstance(cfg, Send):
        return replace(symbols[cfg.symbol], line=0), cfg.join > 0  # the groups of equal branches have other numbers
    if isinstance(cfg, Steps) and len(cfg.parts) == 1:  # a list of one and the one itself are written alike often
        return _shape(cfg.parts[0], symbols)
    bounds = (cfg.low, cfg.high) if isinstance(cfg, Repeat) else ()
    return type(cfg).__name__, bounds, *(_shape(part, symbols) for part in parts_of(cfg))


def _lines(cfg: Cfg, symbols: Sequence[Symbol]) -> Iterator[int]:
    if isinstance(cfg, Send):
        yield symbols[cfg.symbol].line
    for part in parts_of(cfg):
        yield from _lines(part, symbols)


def _unreachable(policy: CompiledPolicy, name: str) -> Iterator[Finding]:
    function = policy.functions[name]
    yield from _unreachable_in(function, f"function {name}")
    if function.startup is not None:
        yield from _unreachable_in(function.startup, f"startup of function {name}")


def _unreachable_in(automaton: MessageAutomaton, what: str) -> Iterator[Finding]:
    forward: dict[int, set[int]] = {state: set() for state in range(automaton.states)}
    backward: dict[int, set[int]] = {state: set() for state in range(automaton.states)}
    for source, _, target in automaton.edges:
        forward[source].add(target)
        backward[target].add(source)
    reached, ending = _reachable(automaton.start, forward), _reachable(automaton.accept, backward)
    for state in range(automaton.states):
        if state not in reached:
            found = f"{what}: state {state} is never reached"
            yield _finding(Severity.ERROR, "unreachable_state", 0, found, "compile the policy again from its source")
        elif state not in ending:
            found = f"{what}: from state {state} it cannot end as the policy wants"
            yield _finding(Severity.WARNING, "dead_state", 0, found, "compile the policy again from its source")
    sent = {symbol for source, symbol, _ in automaton.edges if source in reached}
    for number, symbol in enumerate(automaton.symbols):
        if number not in sent:
            found = f"{what}: {symbol.text} is never reached"
            yield _finding(Severity.ERROR, "unreachable_message", symbol.line, found, "delete it, or compile the policy again from its source")
