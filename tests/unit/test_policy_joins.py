"""Asynchronous edges, callbacks, retries and joins: what the compiler takes, and what the app CFG allows while answers are awaited.

The other side is that of test_policy_language: derivatives of the policy's text, where a barrier is a message that nobody sends
and that may be skipped over as long as its group is not open.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import yaml
from hypothesis import event, given, settings
from hypothesis import strategies as st
from test_policy_language import MESSAGES, Expression, Step, derivatives, source_of

from kalium.errors import KaliumError
from kalium.policy import render
from kalium.policy.automaton import AppGraph, CompiledPolicy, FailMode, Label, LabelKey
from kalium.policy.compile import compile_policy
from kalium.policy.examples import NotAMessage, message_of
from kalium.policy.lint import lint
from kalium.policy.message import Message

SILENT = [step for step, _ in MESSAGES if "invoke" not in step]
INVOKES: list[Step] = [{"invoke": "g"}, {"invoke": "h"}, {"invoke": "g", "async": True}, {"invoke": "h", "async": True, "callback": "g"}]


def composed(inner: st.SearchStrategy[Step]) -> st.SearchStrategy[Step]:
    branch = inner | st.lists(inner, min_size=1, max_size=2)
    branches = st.lists(branch, min_size=2, max_size=3)
    return st.one_of(
        st.builds(lambda steps: {"parallel": steps}, branches),
        st.builds(lambda steps: {"parallel": steps, "join": "answered"}, branches),
        st.builds(lambda steps: {"choice": steps}, branches),
        st.builds(lambda body: {"optional": body}, branch),
        st.builds(lambda body, low: {"repeat": body, "at_least": low, "at_most": 2}, branch, st.integers(0, 2)),
    )


LEAVES = st.sampled_from([*SILENT[:1], *INVOKES]) | st.builds(lambda step: {**step, "join": "answered"}, st.sampled_from(INVOKES))
STEPS = st.lists(st.recursive(LEAVES, composed, max_leaves=6), min_size=1, max_size=3)


class Groups:
    """Reads the YAML as nested tuples whose leaves are what the controller sees: (key, group), a barrier's group, or None."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def expression(self, value: Any, group: int = 0) -> Expression:
        if isinstance(value, list):
            return ("sequence", *(self.expression(part, group) for part in value))
        if value.get("join"):
            group = next(self._numbers)
            joined = self.expression({key: part for key, part in value.items() if key != "join"}, group)
            return ("sequence", joined, ("send", group))
        if "invoke" in value:
            return ("send", (LabelKey(value["invoke"], value.get("async", False), value.get("callback", "")), group))
        if "repeat" in value or "optional" in value:
            body = value["repeat"] if "repeat" in value else value["optional"]
            return ("repeat", self.expression(body, group), value.get("at_least", 0), value.get("at_most", 1))
        for kind in ("choice", "parallel"):
            if kind in value:
                return (kind, *(self.expression(part, group) for part in value[kind]))
        return ("send", None)


def follows(e: Expression, part: Any) -> set[Expression]:
    """What may follow `part`, which is no message here but what the controller sees of one."""
    return derivatives(e, part)


def silently(expressions: set[Expression], groups: set[int], open_groups: set[int]) -> set[Expression]:
    """`expressions` and all that follows from them by messages that are no invocations, and by barriers that are passed."""
    found, waiting = set(expressions), list(expressions)
    while waiting:
        e = waiting.pop()
        silent: list[Any] = [None, *(groups - open_groups)]
        fresh = {after for part in silent for after in follows(e, part)} - found
        found |= fresh
        waiting.extend(fresh)
    return found


def graph_of(steps: list[Step]) -> AppGraph | None:
    """The app CFG of f, or None when it is refused for a reason that a text at random may have."""
    try:
        return CompiledPolicy.parse(compile_policy(source_of(steps), "generated")).app_cfg["f"]
    except KaliumError as error:
        if error.code not in ("policy.ambiguous", "policy.join"):
            raise
        event(error.code)
        return None


@settings(max_examples=400, deadline=None)
@given(STEPS, st.data())
def test_the_app_cfg_allows_what_the_text_means_while_answers_are_awaited(steps: list[Step], data: st.DataObject) -> None:
    """At any point, with any invocations unanswered, each key is allowed exactly if the text allows it, in the one group that it has."""
    graph = graph_of(steps)
    if graph is None:
        return
    states, expressions = graph.start, {Groups().expression(steps)}
    groups = {label.barrier for label in graph.labels if label.barrier}
    waiting: Counter[int] = Counter()
    for _ in range(data.draw(st.integers(1, 8))):
        open_groups = set(+waiting)
        possible = silently(expressions, groups, open_groups)
        keys = sorted({label.key for label in graph.labels if not label.barrier})
        meant = {key: {group for group in {0, *groups} if any(follows(e, (key, group)) for e in possible)} for key in keys}

        for key in keys:
            after, number = graph.step(states, key, open_groups)
            assert (bool(after), number >= 0) == (bool(meant[key]), bool(meant[key]))
            assert len(meant[key]) <= 1  # or the compiler would have refused it
            assert not meant[key] or meant[key] == {graph.labels[number].join}
        assert graph.expected(states, open_groups) == [key for key in keys if meant[key]]

        allowed = [key for key in keys if meant[key]]
        if allowed:
            key = data.draw(st.sampled_from(allowed))
            states, number = graph.step(states, key, open_groups)
            expressions = {after for e in possible for after in follows(e, (key, graph.labels[number].join))}
            waiting[graph.labels[number].join] += graph.labels[number].join > 0
        if +waiting:
            waiting.subtract(data.draw(st.lists(st.sampled_from(sorted(+waiting)), max_size=1)))


@settings(max_examples=200, deadline=None)
@given(STEPS, st.data())
def test_the_plain_form_steps_as_the_graph(steps: list[Step], data: st.DataObject) -> None:
    """A store that follows the sentence in AppGraph.plain, and knows nothing else, is where the controller is."""
    graph = graph_of(steps)
    if graph is None:
        return
    plain = graph.plain()
    keys = sorted({label.key for label in graph.labels if not label.barrier})
    states, stored = graph.start, list(plain["start"])
    for _ in range(8):
        key = data.draw(st.sampled_from(keys)) if keys else LabelKey("g")
        open_groups = data.draw(st.sets(st.integers(1, 4)))
        passed = list(stored)
        for state in passed:  # grows while it is read
            passed += [target for group, target in plain["barriers"][state] if group not in open_groups and target not in passed]
        having = [number for number, label in enumerate(plain["labels"]) if label.get("callee") and _key(label) == key]
        edges = sorted((number, target) for state in passed for number, target in plain["edges"][state] if number in having)
        reached = sorted({target for number, target in edges if number == edges[0][0]})
        after, label = graph.step(states, key, open_groups)

        assert (sorted(after), label) == (reached, edges[0][0] if edges else -1)
        states, stored = (after, reached) if after else (states, stored)


def _key(label: dict[str, Any]) -> LabelKey:
    return LabelKey(label["callee"], label["asynchronous"], label["callback"])


def test_guards_see_no_joins() -> None:
    """The function CFG is the one without them: a guard does not know what has been answered."""
    bare: list[Step] = [{"parallel": [{"invoke": "g"}, {"invoke": "h"}]}, MESSAGES[2][0], {"invoke": "g"}]
    joined = [{**bare[0], "join": "answered"}, *bare[1:]]

    without, with_join = (CompiledPolicy.parse(compile_policy(source_of(steps), "generated")) for steps in (bare, joined))

    assert with_join.functions["f"].edges == without.functions["f"].edges
    assert with_join.functions["f"].accept == without.functions["f"].accept
    assert with_join.app_cfg["f"] != without.app_cfg["f"]


def test_where_a_hand_made_policy_is_ambiguous_the_first_label_is_meant() -> None:
    """Retries and joins of one label: the other's edges are not taken, so the cursor allows what one reading allows and no more."""
    key, other = LabelKey("g"), LabelKey("h")
    labels = (Label(key, join=1), Label(key), Label(other))
    graph = AppGraph(4, frozenset({0, 1}), labels, ((0, 1, 2), (1, 0, 3), (1, 1, 2), (2, 2, 2)))

    assert graph.step(graph.start, key) == (frozenset({3}), 0)
    assert graph.step(frozenset({0}), key) == (frozenset({2}), 1)
    assert AppGraph(4, frozenset({0, 1}), labels, ((0, 0, 2), (1, 1, 3))).step(graph.start, key) == (frozenset({2}), 0)
    assert graph.step(frozenset({3}), other) == (frozenset(), -1)


def source(steps: str, more: str = "", entries: str = "f", app_edge: str = "deny") -> bytes:
    return f"""\
schema: kalium/v1
app: shop
version: 1
mode: enforce
on_unavailable: {{app_edge: {app_edge}}}
peers:
  gateway: {{host: gateway, port: 8080, protocol: http, role: gateway}}
  database: {{host: database, port: 3306, protocol: mysql, schema: shop}}
entries: [{entries}]
functions:
  g: {{messages: []}}
  h: {{messages: []}}
  f:
    messages:
      - {{mysql: show-tables}}
{steps}{more}""".encode()


FIRST_LINE = 16


@pytest.mark.parametrize(
    ("steps", "code", "line", "said"),
    [
        ("      - {invoke: g, callback: h}\n", "policy.callback", 0, "so there is no result that h could be called with"),
        ("      - {invoke: g, async: false, callback: h}\n", "policy.callback", 0, "add `async: true`"),
        ("      - {invoke: g, async: true, callback: x}\n", "policy.unknown_function", 0, "x is not a function"),
        ("      - {invoke: g, async: yes}\n", "policy.value", 0, "not true or false"),
        ("      - {invoke: g, retries: 4}\n", "policy.value", 0, "not from 0 to 3"),
        ("      - {invoke: g, join: started}\n", "policy.value", 0, "not one of answered"),
        ("      - {mysql: show-tables, join: answered}\n", "policy.unknown_key", 0, '"join"'),
        ("      - {choice: [{invoke: g}, {invoke: h}], join: answered}\n", "policy.unknown_key", 0, '"join"'),
        (
            "      - parallel: [{mysql: show-tables}, {mysql: select, read: [a]}]\n        join: answered\n",
            "policy.join", 1, "no branch of it invokes a function",
        ),
        ("      - {invoke: g, join: answered}\n  x: {messages: [{invoke: y, join: answered}]}\n  y: {messages: [], mode: off}\n",
         "policy.join", 1, "y is joined, and in mode off nothing says that it has answered"),
        ("      - parallel: [{invoke: z}, {invoke: g}]\n        join: answered\n  z: {messages: [], mode: off}\n", "policy.join", 0, "z is joined"),
        ("      - {optional: {invoke: g, retries: 1}}\n      - {invoke: g}\n", "policy.ambiguous", 1, "line 16 too, which has another retries"),
        ("      - {optional: {invoke: g, join: answered}}\n      - {invoke: g}\n", "policy.ambiguous", 1, "has another join"),
        (
            "      - parallel:\n          - {invoke: g, join: answered}\n          - {invoke: g}\n",
            "policy.ambiguous", 2, "invoke g at one point of f",
        ),
        (
            "      - choice: [{invoke: g, async: true, callback: h}, {invoke: g, async: true}]\n",
            "policy.ambiguous", 0, "invoke g async at one point of f can be invoke g async callback h of line 16 too",
        ),
        (
            """\
      - {repeat: {invoke: g, async: true, callback: h}, at_most: 2}
      - {mysql: show-tables}
      - {optional: {invoke: g, async: true, callback: f}}
      - {invoke: g, async: true, callback: h}
""",
            "policy.ambiguous", 3, "callback f of line 18 too, and the program does not say which",
        ),
        ("      - {invoke: g, join: answered}\n    tail:\n      - {parallel: [{mysql: show-tables}, {invoke: g}], join: answered}\n",
         "policy.invoke", 2, "after the answer"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_an_error(steps: str, code: str, line: int, said: str) -> None:
    with pytest.raises(KaliumError) as caught:
        compile_policy(source(steps), "shop.yml")

    assert caught.value.code == code
    assert caught.value.found.startswith(f"line {FIRST_LINE + line}: ")
    assert said in f"{caught.value.found} {caught.value.next_step}"


@pytest.mark.parametrize(
    "steps",
    [
        # One after the other, each certain: what comes first decides.
        "      - {invoke: g, join: answered}\n      - {invoke: g, retries: 2}\n      - {invoke: g}\n",
        # The same callee in two rounds of fan-out.
        "      - {parallel: [{invoke: g}, {invoke: g}], join: answered}\n      - {parallel: [{invoke: g}, {invoke: h}], join: answered}\n",
        # Told apart by the way it goes.
        "      - {optional: {invoke: g, async: true, retries: 1}}\n      - {invoke: g}\n",
        # Callbacks that something else tells apart.
        "      - {invoke: g, async: true, callback: h}\n      - {invoke: g, async: true}\n",
        """\
      - choice:
          - [{mysql: select, read: [a]}, {invoke: g, async: true, callback: h}]
          - [{mysql: select, read: [b]}, {invoke: g, async: true, callback: f}]
""",
        # The same retries on two lines.
        "      - {choice: [[{invoke: g, retries: 1}, {invoke: h}], {invoke: g, retries: 1}]}\n",
        # An asynchronous edge is joined by the end of its invocation.
        "      - {invoke: g, async: true, join: answered, retries: 3}\n      - {invoke: h}\n",
    ],
)
def test_what_is_certain_is_no_error(steps: str) -> None:
    assert compile_policy(source(steps), "shop.yml")


def test_telling_lines_apart_is_bounded() -> None:
    """Two texts that are long in every way: the compiler says so in time."""
    rounds = "{repeat: {optional: {invoke: g, retries: 1}}, at_most: 60}"
    steps = f"      - {{parallel: [{rounds}, {{repeat: {{invoke: h}}, at_most: 60}}]}}\n      - {{invoke: h, retries: 1}}\n"

    with pytest.raises(KaliumError) as caught:
        compile_policy(source(steps), "shop.yml")

    assert caught.value.code in ("policy.ambiguous", "policy.too_large")


@pytest.mark.parametrize(
    ("text", "code", "line"),
    [
        (source("      - {invoke: g, retries: 1}\n", entries="f, h"), "policy.raised_retries", FIRST_LINE),
        (source("      - {invoke: g, async: true, callback: h}\n", entries="f, h"), "policy.callback_entry", FIRST_LINE),
        (source("      - {invoke: g, join: answered}\n", entries="f, h"), "policy.idle_join", FIRST_LINE),
        (
            source("      - parallel: [{invoke: g, join: answered}, {invoke: h}]\n        join: answered\n      - {mysql: show-tables}\n"),
            "policy.idle_join", FIRST_LINE,
        ),
        (source("      - {invoke: g}\n", entries="f, h", app_edge="allow"), "policy.app_edge", 5),
        (source("      - {invoke: g}\n", entries="f, h", app_edge="last_known"), "policy.app_edge", 5),
        (source("      - {invoke: g, async: true, callback: f}\n", entries="f, h"), "policy.recursion", 13),
    ],
)  # fmt: skip
def test_what_may_not_be_meant_is_a_finding(text: bytes, code: str, line: int) -> None:
    assert (code, line) in [(finding.code, finding.line) for finding in lint(text)]


def test_a_join_that_is_waited_behind_and_a_callback_that_tokens_start_are_not_reported() -> None:
    text = source("      - {invoke: g, join: answered}\n      - {invoke: g, async: true, callback: h}\n")

    assert lint(text) == []


@pytest.mark.parametrize("name", [mode.value for mode in FailMode])
def test_the_fail_mode_is_that_of_the_text(name: str) -> None:
    policy = CompiledPolicy.parse(compile_policy(source("      - {invoke: g}\n", app_edge=name), "shop.yml"))

    assert policy.app_edge is FailMode(name)


def test_without_a_word_app_edges_are_denied() -> None:
    document = yaml.safe_load(source(""))
    del document["on_unavailable"]

    assert CompiledPolicy.parse(compile_policy(yaml.dump(document).encode(), "shop.yml")).app_edge is FailMode.DENY


@pytest.mark.parametrize("text", ["invoke g", "invoke g async", "invoke g async callback h"])
def test_an_invocation_is_read_as_it_is_written(text: str) -> None:
    policy = CompiledPolicy.parse(compile_policy(source("      - {invoke: g}\n"), "shop.yml"))

    assert message_of(text, policy).text() == text
    assert LabelKey("g", "async" in text, "h" if "callback" in text else "").text() == text


@pytest.mark.parametrize("text", ["invoke", "invoke g callback h", "invoke g async h", "invoke g async callback", "invoke g asynchronous"])
def test_what_no_log_writes_is_no_message(text: str) -> None:
    policy = CompiledPolicy.parse(compile_policy(source("      - {invoke: g}\n"), "shop.yml"))

    with pytest.raises(NotAMessage):
        message_of(text, policy)


def test_what_is_waited_for_is_listed() -> None:
    """Who reads the denial sees that it is not the order which is wrong, but the answer that is missing."""
    text = source("      - {parallel: [{invoke: g, join: answered}, {invoke: h, async: true}], join: answered}\n      - {invoke: h}\n")
    policy = CompiledPolicy.parse(compile_policy(text, "shop.yml"))
    states = policy.start("f")
    for key in (LabelKey("h", True), LabelKey("g")):
        states, _ = policy.step("f", states, key)

    assert policy.expected("f", states, {1, 2}) == ["answer of invoke g"]
    assert policy.expected("f", states, {1}) == ["answer of invoke h async"]
    assert policy.expected("f", states) == [f"invoke h @line {FIRST_LINE + 1}"]
    assert isinstance(policy.functions["f"].symbols[1].key(), LabelKey)


def test_a_message_that_is_told_apart_matches_no_other_line() -> None:
    policy = CompiledPolicy.parse(compile_policy(source("      - {invoke: g, async: true, callback: h}\n"), "shop.yml"))
    near = [("g", False, ""), ("g", True, ""), ("g", True, "g"), ("h", True, "h"), ("g", False, "h")]

    assert policy.functions["f"].knows(message_of("invoke g async callback h", policy))
    for callee, asynchronous, callback in near:
        message = Message(policy.functions["f"].symbols[1].kind, "gateway", callee=callee, asynchronous=asynchronous, callback=callback)
        assert not policy.functions["f"].knows(message)


def test_joins_and_ways_are_drawn() -> None:
    steps = "      - {parallel: [{invoke: g, async: true, callback: h}, {invoke: h}], join: answered}\n      - {invoke: g, retries: 1}\n"
    policy = CompiledPolicy.parse(compile_policy(source(steps, app_edge="last_known"), "shop.yml"))

    table, dot = render.text(policy, ["f"]), render.dot(policy, ["f"])

    assert table.startswith("app shop, version 1, mode enforce, deadline 250 ms, then last_known\n")
    drawn = """\
invocations of f: 6 states, 1 join
  state 0 (start)
    invoke g async callback h  -> 1   join 1
    invoke h                   -> 2   join 1
  state 1
    invoke h                   -> 3   join 1
  state 2
    invoke g async callback h  -> 3   join 1
  state 3
    all of join 1 answered     -> 4
  state 4
    invoke g                   -> 5   retries 1
  state 5
"""
    assert table[table.index("invocations of f") :] == drawn
    assert '    "f_3" -> "f_4" [label="all of join 1 answered", style=dotted];' in dot
    assert '    "f_0" -> "f_1" [label="invoke g async callback h\\njoin 1", style=dashed];' in dot
    assert 'label="invoke g async callback h\\nline 16", style=dashed];' in dot


def test_invocations_without_joins_are_not_drawn_twice() -> None:
    policy = CompiledPolicy.parse(compile_policy(source("      - {invoke: g, async: true}\n"), "shop.yml"))

    assert "invocations of" not in render.text(policy, ["f"]) + render.dot(policy, ["f"])
