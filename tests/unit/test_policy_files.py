"""The policies that the project ships: they allow and deny what their examples say, and agree where they have to."""

from pathlib import Path

import pytest

from experiments.entries import ENTRIES, FUNCTIONS, MASTER
from kalium.policy import examples
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.compile import compile_policy
from kalium.policy.lint import lint
from kalium.policy.source import Severity

FOLDER = Path(__file__).resolve().parents[2] / "policies"
NAMES = ("hello-retail", "hello-retail-audit", "hello-retail-strict")
BENCHMARK, AUDIT, STRICT = NAMES


def source_of(name: str) -> bytes:
    return (FOLDER / f"{name}.yml").read_bytes()


def policy_of(name: str) -> CompiledPolicy:
    return CompiledPolicy.parse(compile_policy(source_of(name), name))


def test_every_policy_has_its_examples() -> None:
    policies = {path.stem for path in FOLDER.glob("*.yml") if not path.stem.endswith(".examples")}

    assert policies == set(NAMES) == {path.name.removesuffix(".examples.yml") for path in FOLDER.glob("*.examples.yml")}


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_does_what_its_examples_say(name: str) -> None:
    count, findings = examples.run((FOLDER / f"{name}.examples.yml").read_bytes(), policy_of(name))

    assert findings == []
    assert count > 0


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_the_functions_hold_in_every_policy(name: str) -> None:
    """The functions are the same; what a client may start is each policy's own."""
    text = (FOLDER / f"{BENCHMARK}.examples.yml").read_text(encoding="ascii")
    shared = text[: text.index("starts:")] + text[text.index("examples:\n") :]

    count, findings = examples.run(shared.encode("ascii"), policy_of(name))

    assert findings == []
    assert count >= 10


@pytest.mark.parametrize("name", NAMES)
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
