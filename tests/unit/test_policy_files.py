"""The policies that the project ships: they allow and deny what their examples say, and agree where they have to."""

from pathlib import Path

import pytest

from experiments.entries import ENTRIES, FUNCTIONS, MASTER
from kalium.policy import examples, render
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.compile import compile_policy
from kalium.policy.lint import lint
from kalium.policy.source import Severity

FOLDER = Path(__file__).resolve().parents[2] / "policies"
OF_TESTS = Path(__file__).with_name("policies")
NAMES = ("hello-retail", "hello-retail-audit", "hello-retail-strict")
BENCHMARK, AUDIT, STRICT = NAMES
E2 = "e2"


def source_of(name: str) -> bytes:
    return (FOLDER / f"{name}.yml").read_bytes()


def policy_of(name: str) -> CompiledPolicy:
    return CompiledPolicy.parse(compile_policy(source_of(name), name))


def test_every_policy_has_its_examples() -> None:
    policies = {path.stem for path in FOLDER.glob("*.yml") if not path.stem.endswith(".examples")}

    assert policies == {*NAMES, E2} == {path.name.removesuffix(".examples.yml") for path in FOLDER.glob("*.examples.yml")}


@pytest.mark.parametrize("name", [*NAMES, E2])
def test_a_policy_does_what_its_examples_say(name: str) -> None:
    count, findings = examples.run((FOLDER / f"{name}.examples.yml").read_bytes(), policy_of(name))

    assert findings == []
    assert count > 0


def orders() -> CompiledPolicy:
    return CompiledPolicy.parse(compile_policy((OF_TESTS / "orders.yml").read_bytes(), "orders.yml"))


def test_a_policy_of_everything_that_the_benchmark_has_no_use_for_does_what_its_examples_say() -> None:
    count, findings = examples.run((OF_TESTS / "orders.examples.yml").read_bytes(), orders())

    assert findings == []
    assert count >= 10


def test_the_settings_of_its_functions_are_what_it_says() -> None:
    functions = orders().functions
    order, pay, watch, report = (functions[name] for name in ("order", "pay", "watch", "report"))

    assert {name: function.mode.value for name, function in functions.items()} == {
        "order": "enforce", "pay": "enforce", "watch": "enforce", "report": "audit", "legacy": "off",
    }  # fmt: skip
    assert (order.tail_ms, order.quiet_ms, order.retire_ms, order.max_inflight, order.reuse.value) == (5000, 200, 30_000, 1, "always")
    assert (pay.tls.value, pay.reuse.value, order.tls.value) == ("terminate", "never", "open")
    assert (watch.quiet_ms, watch.retire_ms, report.max_inflight) == (500, 5000, 4)
    assert [symbol.retries for symbol in watch.symbols] == [3, 1]
    assert [(symbol.tail, symbol.to) for symbol in order.symbols[2:]] == [(True, ()), (True, ("books@example.org",))]
    assert order.startup is not None
    assert pay.startup is None


def test_lint_says_where_it_is_wide() -> None:
    found = {(finding.code, finding.line) for finding in lint((OF_TESTS / "orders.yml").read_bytes())}

    assert found == {
        ("policy.wildcard", 21), ("policy.query", 21), ("policy.any_address", 27), ("policy.raised_retries", 42), ("policy.upgrade", 43),
        ("policy.mode", 46), ("policy.raised_max_inflight", 47), ("policy.mode_off", 52),
    }  # fmt: skip


def test_it_is_shown_with_its_startup_its_tail_and_its_settings() -> None:
    policy = orders()
    text, graph = render.text(policy, ["order", "pay", "watch", "report"]), render.dot(policy, ["order"])

    assert "function order: entry, 5 states, 4 messages\n" in text
    assert "    smtp mail mail from shop@example.org                        -> 3   line 27, tail\n" in text
    assert "startup of order: 4 states, 1 message\n" in text
    assert "function pay: started by invocations only, 2 states, 1 message, TLS ends in the guard, one invocation an instance\n" in text
    assert "line 42, retries 3\n" in text
    assert "function report: entry, mode audit, 2 states, 1 message, 4 invocations at a time\n" in text
    assert 'label="startup of order"' in graph
    assert "line 27, tail" in graph


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_the_functions_hold_in_every_policy(name: str) -> None:
    """The functions are the same; what a client may start is each policy's own."""
    text = (FOLDER / f"{BENCHMARK}.examples.yml").read_text(encoding="ascii")
    shared = text[: text.index("starts:")] + text[text.index("examples:\n") :]

    count, findings = examples.run(shared.encode("ascii"), policy_of(name))

    assert findings == []
    assert count >= 10


@pytest.mark.parametrize("name", [*NAMES, E2])
def test_the_file_and_the_application_have_one_name(name: str) -> None:
    """The site installs each policy as <app>.signed.json."""
    assert policy_of(name).app == name


@pytest.mark.parametrize("name", NAMES)
def test_the_functions_of_all_three_are_the_same(name: str) -> None:
    def functions(of: str) -> bytes:
        return source_of(of).split(b"\nfunctions:\n")[1]

    assert functions(name) == functions(BENCHMARK)
    assert policy_of(name).peers == policy_of(BENCHMARK).peers


def test_entries_and_modes_are_what_the_experiments_count_on() -> None:
    assert policy_of(BENCHMARK).entries == policy_of(AUDIT).entries == {entry.function for entry in ENTRIES}
    assert policy_of(STRICT).entries == {MASTER}
    assert [policy_of(name).mode.value for name in NAMES] == ["enforce", "audit", "enforce"]
    assert all(set(policy_of(name).functions) == set(FUNCTIONS) for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_lint_has_nothing_to_say_that_the_file_does_not(name: str) -> None:
    """The one warning is the microbenchmark of the strict policy, which its head explains."""
    warnings = [finding.code for finding in lint(source_of(name)) if finding.severity > Severity.NOTE]

    assert warnings == (["policy.never_started"] if name == STRICT else [])
