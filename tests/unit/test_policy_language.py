"""The compiled automaton allows exactly the sequences that the policy's text means.

The other side is a matcher of another kind: derivatives of expressions (Brzozowski 1964, in Antimirov's partial form of 1996),
taken directly from the YAML's structure, without states. Derivatives of a shuffle are those of one side beside the other.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from kalium.policy.automaton import CompiledPolicy, LabelKey
from kalium.policy.cfg import Behaviours, Cfg, Choice, Parallel, Repeat, Send, Steps, parts_of
from kalium.policy.compile import compile_policy
from kalium.policy.message import Kind, Message, Reason

ROOT = Path(__file__).resolve().parents[2]

Step = dict[str, Any]
Expression = tuple[Any, ...]

MESSAGES: list[tuple[Step, Message]] = [
    ({"invoke": "g"}, Message(Kind.INVOKE, "gateway", callee="g")),
    ({"invoke": "h"}, Message(Kind.INVOKE, "gateway", callee="h")),
    ({"mysql": "select", "read": ["a"]}, Message(Kind.MYSQL, "database", verb="select", read=("a",))),
    ({"mysql": "insert", "write": ["a"]}, Message(Kind.MYSQL, "database", verb="insert", write=("a",))),
    ({"http": "GET", "peer": "api", "path": "/"}, Message(Kind.HTTP, "api", "GET", "/")),
]
BEGIN, COMMIT = (Message(Kind.MYSQL, "database", verb=verb) for verb in ("begin", "commit"))
ALPHABET = [message for _, message in MESSAGES] + [BEGIN, COMMIT]


def composed(inner: st.SearchStrategy[Step]) -> st.SearchStrategy[Step]:
    branch = inner | st.lists(inner, min_size=1, max_size=3)
    branches = st.lists(branch, min_size=2, max_size=3)
    return st.one_of(
        st.builds(lambda steps: {"sequence": steps}, st.lists(inner, min_size=1, max_size=3)),
        st.builds(lambda steps: {"choice": steps}, branches),
        st.builds(lambda steps: {"parallel": steps}, branches),
        st.builds(lambda body: {"optional": body}, branch),
        st.builds(
            lambda body, low, more: {"repeat": body, "at_least": low, "at_most": max(1, low + more)}, branch, st.integers(0, 2), st.integers(0, 2)
        ),
    )


STEPS = st.lists(
    st.recursive(st.sampled_from([step for step, _ in MESSAGES]), composed, max_leaves=6)
    | st.builds(lambda step: {"transaction": step}, st.sampled_from([step for step, _ in MESSAGES])),
    max_size=3,
)


def policy_of(steps: list[Step]) -> CompiledPolicy:
    return CompiledPolicy.parse(compile_policy(source_of(steps), "generated"))


def source_of(steps: list[Step], tail: list[Step] | None = None) -> bytes:
    document = {
        "schema": "kalium/v1",
        "app": "generated",
        "version": 1,
        "mode": "enforce",
        "peers": {
            "gateway": {"host": "gateway", "port": 8080, "protocol": "http", "role": "gateway"},
            "api": {"host": "api", "port": 80, "protocol": "http"},
            "database": {"host": "database", "port": 3306, "protocol": "mysql", "schema": "s"},
        },
        "entries": ["f"],
        "functions": {"f": {"messages": steps} | ({"tail": tail} if tail else {}), "g": {"messages": []}, "h": {"messages": []}},
    }

    class WithoutAliases(yaml.SafeDumper):
        """Writes a part that stands in two places twice."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(document, Dumper=WithoutAliases).encode("ascii")


def expression_of(value: Any) -> Expression:
    """The YAML's structure as nested tuples."""
    if isinstance(value, list):
        return ("sequence", *map(expression_of, value))
    (kind,) = value.keys() & {"sequence", "choice", "parallel", "optional", "repeat", "transaction", "invoke", "mysql", "http"}
    inner = value[kind]
    if kind in ("choice", "parallel"):
        return (kind, *map(expression_of, inner))
    if kind in ("optional", "repeat"):
        low, high = (0, 1) if kind == "optional" else (value.get("at_least", 0), value["at_most"])
        return ("repeat", expression_of(inner), low, high)
    if kind == "transaction":
        return ("sequence", ("send", BEGIN), expression_of(inner), ("send", COMMIT))
    return expression_of(inner) if kind == "sequence" else ("send", next(message for step, message in MESSAGES if step == value))


def is_nullable(e: Expression) -> bool:
    if e[0] == "send":
        return False
    if e[0] == "choice":
        return any(map(is_nullable, e[1:]))
    if e[0] == "repeat":
        return e[2] == 0 or is_nullable(e[1])
    return all(map(is_nullable, e[1:]))


def derivatives(e: Expression, message: Message) -> set[Expression]:
    """What may follow `message` in `e`."""
    kind, parts = e[0], e[1:]
    if kind == "send":
        return {("sequence",)} if e[1] == message else set()
    if kind == "choice":
        return {after for part in parts for after in derivatives(part, message)}
    if kind == "parallel":
        return {(kind, *parts[:at], after, *parts[at + 1 :]) for at, part in enumerate(parts) for after in derivatives(part, message)}
    if kind == "repeat":
        body, low, high = parts
        rest = ("repeat", body, max(low - 1, 0), high - 1)
        return {("sequence", after, rest) for after in derivatives(body, message)} if high > 0 else set()
    if not parts:
        return set()
    found: set[Expression] = {("sequence", after, *parts[1:]) for after in derivatives(parts[0], message)}
    return found | (derivatives(("sequence", *parts[1:]), message) if is_nullable(parts[0]) else set())


def after_all(expressions: set[Expression], message: Message) -> set[Expression]:
    return {after for e in expressions for after in derivatives(e, message)}


@settings(max_examples=300)
@given(STEPS, st.data())
def test_the_automaton_allows_what_the_derivatives_allow(steps: list[Step], data: st.DataObject) -> None:
    """Verdict, reason and the right to end agree after every message of any sequence; a denial changes nothing."""
    function = policy_of(steps).functions["f"]
    written = {message for message in ALPHABET if function.knows(message)}
    states, expressions = function.start, {expression_of(steps)}
    for message in data.draw(st.lists(st.sampled_from(ALPHABET), max_size=14)):
        verdict, after = function.step(states, message)
        derived = after_all(expressions, message)

        assert verdict.allowed == bool(derived)
        if not verdict.allowed:
            assert after == states
            assert verdict.reason is (Reason.OUT_OF_ORDER if message in written else Reason.NOT_IN_POLICY)
        states, expressions = (after, derived) if derived else (states, expressions)

        assert function.accepts(states) == any(map(is_nullable, expressions))


@settings(max_examples=200)
@given(
    st.lists(st.recursive(st.sampled_from([step for step, _ in MESSAGES[:2]]), composed, max_leaves=4), max_size=2),
    st.lists(st.recursive(st.sampled_from([step for step, _ in MESSAGES[2:]]), composed, max_leaves=4), min_size=1, max_size=2),
    st.data(),
)
def test_the_tail_follows_the_messages_and_is_all_that_is_left_after_the_answer(steps: list[Step], tail: list[Step], data: st.DataObject) -> None:
    """Until the answer both are one sequence, whose second part may be missing; from then on only its second part moves."""
    function = CompiledPolicy.parse(compile_policy(source_of(steps, tail), "generated")).functions["f"]
    in_tail = {message for message in ALPHABET if any(symbol.tail and symbol.matches(message) for symbol in function.symbols)}
    states, expressions = function.start, {("sequence", expression_of(steps), ("repeat", expression_of(tail), 0, 1))}
    answered_after = data.draw(st.integers(0, 8))
    for number, message in enumerate(data.draw(st.lists(st.sampled_from(ALPHABET), max_size=12))):
        is_answered = number >= answered_after
        verdict, after = (function.step_tail if is_answered else function.step)(states, message)
        derived = after_all(expressions, message) if not is_answered or message in in_tail else set()

        assert verdict.allowed == bool(derived)
        if not verdict.allowed:
            assert after == states
            assert verdict.reason is (Reason.OUT_OF_ORDER if function.knows(message) else Reason.NOT_IN_POLICY)
            assert not is_answered or all(any(symbol.tail and symbol.expected() == text for symbol in function.symbols) for text in verdict.expected)
        states, expressions = (after, derived) if derived else (states, expressions)

        assert function.accepts(states) == any(map(is_nullable, expressions))


@settings(max_examples=150)
@given(STEPS, st.data())
def test_every_allowed_path_can_be_walked_to_an_end(steps: list[Step], data: st.DataObject) -> None:
    """Following what is expected reaches an end: no state is dead, and a sequence of the policy's own is never refused."""
    function = policy_of(steps).functions["f"]
    states, expressions = function.start, {expression_of(steps)}
    for _ in range(400):
        possible = [message for message in ALPHABET if after_all(expressions, message)]
        if not possible:
            break
        message = data.draw(st.sampled_from(possible))
        verdict, states = function.step(states, message)
        expressions = after_all(expressions, message)

        assert verdict.allowed, message
    assert function.accepts(states)
    assert not function.expected(states)


@settings(max_examples=200)
@given(STEPS, st.data())
def test_the_app_cfg_is_the_projection_on_invocations(steps: list[Step], data: st.DataObject) -> None:
    """A callee may be invoked exactly if some messages that are no invocations lead to it."""
    policy = policy_of(steps)
    states, expressions = policy.start("f"), {expression_of(steps)}
    silent = [message for message in ALPHABET if message.kind is not Kind.INVOKE]
    for callee in data.draw(st.lists(st.sampled_from(["g", "h"]), max_size=8)):
        reachable, waiting = set(expressions), list(expressions)
        while waiting:
            e = waiting.pop()
            fresh = {after for message in silent for after in derivatives(e, message)} - reachable
            reachable |= fresh
            waiting.extend(fresh)
        derived = after_all(reachable, Message(Kind.INVOKE, "gateway", callee=callee))
        after, label = policy.step("f", states, LabelKey(callee))

        assert bool(after) == bool(derived) == (label >= 0)
        assert any(text.startswith(f"invoke {callee}") for text in policy.expected("f", states)) == bool(derived)
        states, expressions = (after, derived) if derived else (states, expressions)


def test_the_app_cfg_does_not_know_of_startup_and_tail() -> None:
    """Neither has invocations: before the first request there is no call, and with the answer the invocation has ended."""
    steps, tail = [MESSAGES[0][0], MESSAGES[2][0]], [MESSAGES[3][0], {"optional": MESSAGES[4][0]}]

    bare, tailed = (CompiledPolicy.parse(compile_policy(source_of(steps, part), "generated")) for part in (None, tail))

    assert bare.app_cfg == tailed.app_cfg
    assert bare.functions["f"].states < tailed.functions["f"].states


@settings(max_examples=60)
@given(STEPS)
def test_the_same_source_makes_the_same_bytes(steps: list[Step]) -> None:
    source = source_of(steps)

    assert compile_policy(source, "a.yml") == compile_policy(source, "b.yml")


def test_the_bytes_do_not_depend_on_the_seed_of_hashes() -> None:
    """Sets are iterated in an order that differs by process; none of it may reach the compiled form."""
    program = "import sys; from kalium.policy.compile import compile_policy; sys.stdout.buffer.write(compile_policy(sys.stdin.buffer.read(), 'x'))"
    branches = [[MESSAGES[one][0], {"optional": MESSAGES[other][0]}] for one, other in ((0, 1), (2, 3), (1, 4))]
    source = source_of([{"parallel": branches}, {"repeat": {"choice": [step for step, _ in MESSAGES]}, "at_most": 5}])

    def compiled(seed: str) -> bytes:
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        return subprocess.run([sys.executable, "-c", program], input=source, env=environment, capture_output=True, check=True, timeout=60).stdout

    assert compiled("1") == compiled("2") == compiled("3") != b""


def test_equal_futures_are_one_state() -> None:
    """Both branches end in the same message, so three states are enough for the two paths."""
    behaviours = Behaviours()
    cfg = Choice((Steps((Send(0), Send(2))), Steps((Send(1), Send(2)))))

    automaton = behaviours.numbered(behaviours.build(cfg, Behaviours.END))

    assert (automaton.states, automaton.accept) == (3, (2,))
    assert automaton.edges == ((0, 0, 1), (0, 1, 1), (1, 2, 2))


def test_parts_are_all_that_is_inside() -> None:
    send = Send(0)
    whole: list[tuple[Cfg, tuple[Cfg, ...]]] = [
        (send, ()), (Repeat(send, 0, 1), (send,)), (Steps((send, send)), (send, send)), (Choice((send,)), (send,)), (Parallel((send,)), (send,)),
    ]  # fmt: skip

    assert [parts_of(cfg) for cfg, _ in whole] == [parts for _, parts in whole]
