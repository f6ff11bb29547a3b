"""What lint reports beyond the compiler's errors, and where the compiler stops at a bound."""

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from kalium.errors import KaliumError
from kalium.policy.automaton import CompiledPolicy, FunctionAutomaton
from kalium.policy.compile import compile_policy
from kalium.policy.limits import REPEAT_MAX, STATES_MAX
from kalium.policy.lint import lint, lint_compiled
from kalium.policy.source import Severity

HEAD = """\
schema: kalium/v1
app: shop
version: 1
mode: enforce
peers:
  gateway: {host: gateway, port: 8080, protocol: http, role: gateway}
  api: {host: api.example, port: 80, protocol: http}
entries: [f]
functions:
  g: {messages: []}
  f:
    messages:
      - {invoke: g}
"""
GOOD = HEAD + "      - {http: GET, peer: api, path: /}\n"
LAST_LINE = 14
MAIL = GOOD.replace("entries:", "  mail: {host: mail, port: 25, protocol: smtp}\nentries:").replace("{http: GET, peer: api, path: /}", "{smtp: mail}")


def found(text: str) -> list[tuple[str, str, int]]:
    return [(finding.severity.name, finding.code, finding.line) for finding in lint(text.encode("utf-8"))]


def test_a_policy_that_says_what_it_means_has_no_findings() -> None:
    assert found(GOOD) == []


@pytest.mark.parametrize(
    ("text", "severity", "code", "line"),
    [
        (GOOD.replace("[f]", "[]"), "ERROR", "policy.no_entries", 8),
        (GOOD.replace("mode: enforce", "mode: audit"), "NOTE", "policy.mode", 4),
        (HEAD, "WARNING", "policy.unused_peer", 7),
        (GOOD.replace("  g: {messages: []}\n", "  g: {messages: []}\n  h: {messages: []}\n"), "WARNING", "policy.never_started", 11),
        (GOOD.replace("g: {messages: []}", "g: {messages: [{invoke: f}]}"), "WARNING", "policy.recursion", 10),
        (GOOD.replace("g: {messages: []}", "g: {messages: [], max_body: 1048577}"), "WARNING", "policy.raised_max_body", 10),
        (GOOD.replace("path: /}", "path: '/a/{b}'}"), "NOTE", "policy.wildcard", LAST_LINE),
        (GOOD.replace("path: /}", "path: /a/*}"), "WARNING", "policy.literal_star", LAST_LINE),
        (GOOD.replace("path: /}", "path: /, query: [page]}"), "NOTE", "policy.query", LAST_LINE),
        (GOOD.replace("mode: enforce", "mode: off"), "WARNING", "policy.mode_off", 10),
        (GOOD.replace("g: {messages: []}", "g: {messages: [], mode: off}"), "WARNING", "policy.mode_off", 10),
        (GOOD + "    mode: off\n", "WARNING", "policy.mode_off", LAST_LINE + 1),
        (GOOD + "    mode: off\n", "WARNING", "policy.no_token", 13),
        (GOOD + "    mode: learn\n", "NOTE", "policy.mode", LAST_LINE + 1),
        (GOOD + "    max_inflight: 2\n", "WARNING", "policy.raised_max_inflight", LAST_LINE + 1),
        (GOOD.replace("path: /}", "path: /, retries: 2}"), "WARNING", "policy.raised_retries", LAST_LINE),
        (GOOD.replace("GET, peer: api, path: /}", "POST, peer: api, path: /, retries: 1}"), "WARNING", "policy.raised_retries", LAST_LINE),
        (GOOD.replace("path: /}", "path: /, upgrade: websocket}"), "WARNING", "policy.upgrade", LAST_LINE),
        (MAIL, "NOTE", "policy.any_address", LAST_LINE + 1),
        (MAIL.replace("mail}", "mail, from: a@b}"), "NOTE", "policy.any_address", LAST_LINE + 1),
        (GOOD + "    startup:\n      - {http: GET, peer: api, path: '/{a}'}\n", "NOTE", "policy.wildcard", LAST_LINE + 2),
        (GOOD + "    tail:\n      - {http: GET, peer: api, path: '/a/{b}'}\n", "NOTE", "policy.wildcard", LAST_LINE + 2),
        (GOOD + "      - choice:\n          - {invoke: g}\n          - [{invoke: g}]\n", "WARNING", "policy.redundant_branch", 17),
    ],
)  # fmt: skip
def test_each_finding_stands_at_its_line(text: str, severity: str, code: str, line: int) -> None:
    assert (severity, code, line) in found(text), found(text)


def test_lines_that_name_what_they_stand_for_are_not_reported() -> None:
    whole = MAIL.replace("mail}", "mail, from: a@b, to: [c@d]}")

    assert found(whole) == [("WARNING", "policy.unused_peer", 7)]
    assert found(GOOD.replace("path: /}", "path: /, retries: 1}")) == []


def test_a_callee_of_a_function_in_mode_off_is_an_entry_or_off_too() -> None:
    is_off = GOOD + "    mode: off\n"

    assert "policy.no_token" not in {code for _, code, _ in found(is_off.replace("[f]", "[f, g]"))}
    assert "policy.no_token" not in {code for _, code, _ in found(is_off.replace("g: {messages: []}", "g: {messages: [], mode: off}"))}
    assert [code for _, code, _ in found(GOOD.replace("mode: enforce", "mode: off"))] == ["policy.mode_off", "policy.mode_off"]


def test_branches_that_differ_are_not_redundant() -> None:
    choice = """\
      - choice:
          - {invoke: g}
          - [{invoke: g}, {invoke: g}]
          - {repeat: {invoke: g}, at_most: 2}
          - {repeat: {invoke: g}, at_most: 3}
"""

    assert found(GOOD + choice) == []


def test_an_error_of_the_compiler_is_a_finding_too() -> None:
    assert found(GOOD.replace("invoke: g", "invok: g")) == [("ERROR", "policy.unknown_key", 13)]


def changed(policy: CompiledPolicy, **fields: Any) -> CompiledPolicy:
    """`policy` with another function f, as another compiler could have written it."""
    return replace(policy, functions={**policy.functions, "f": replace(policy.functions["f"], **fields)})


def test_a_compiled_policy_is_looked_through_for_what_nothing_reaches() -> None:
    policy = CompiledPolicy.parse(compile_policy(GOOD.encode(), "shop.yml"))
    function: FunctionAutomaton = policy.functions["f"]

    unreachable = lint_compiled(changed(policy, states=4))
    dead = lint_compiled(changed(policy, accept=frozenset({1})))
    never_sent = lint_compiled(changed(policy, symbols=(*function.symbols, replace(function.symbols[0], line=99))))

    assert lint_compiled(policy) == []
    assert [(finding.code, finding.severity) for finding in unreachable] == [("policy.unreachable_state", Severity.ERROR)]
    assert [(finding.code, finding.severity) for finding in dead] == [("policy.dead_state", Severity.WARNING)]
    assert [(finding.code, finding.line) for finding in never_sent] == [("policy.unreachable_message", 99)]


def refusal(text: str) -> KaliumError:
    with pytest.raises(KaliumError) as caught:
        compile_policy(text.encode("utf-8"), "shop.yml")
    return caught.value


REPEATED = "{repeat: {invoke: g}, at_most: 70}"


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        (f"      - {{invoke: g}}\n      - parallel: [{REPEATED}, {REPEATED}]\n", 15),
        (f"      - repeat: {{repeat: {{invoke: g}}, at_most: {REPEAT_MAX}}}\n        at_most: {REPEAT_MAX}\n", 14),
        ("      - repeat: {repeat: {repeat: {repeat: {invoke: g}, at_most: 256}, at_most: 256}, at_most: 256}\n        at_most: 256\n", 14),
    ],
    ids=["product", "nested repeats", "work"],
)
def test_an_automaton_beyond_the_bound_is_refused_in_time(steps: str, line: int) -> None:
    """The error names the construct, and comes before memory or patience is used up."""
    begun = time.process_time()  # its own: who else wants the processor says nothing of it

    error = refusal(HEAD + steps)

    assert (error.code, error.found) == ("policy.too_large", f"line {line}: function f has more than {STATES_MAX} states")
    assert time.process_time() - begun < 30


def test_the_largest_parallel_product_that_fits_is_taken() -> None:
    """63 rounds are 64 states, and 64 times 64 is the bound."""
    rounds = "{repeat: {invoke: g}, at_least: 63, at_most: 63}"
    text = HEAD.replace(
        "      - {invoke: g}\n",
        f"      - parallel:\n          - {rounds}\n          - {rounds.replace('invoke: g', 'http: GET, peer: api, path: /')}\n",
    )

    policy = json.loads(compile_policy(text.encode(), "shop.yml"))

    assert policy["functions"]["f"]["states"] == STATES_MAX
    assert policy["app_cfg"]["f"]["states"] == 64


def test_more_messages_than_an_executor_holds_are_refused() -> None:
    error = refusal(HEAD + "      - {invoke: g}\n" * 1024)

    assert (error.code, "1025 messages, at most 1024" in error.found) == ("policy.too_large", True)
