"""docs/reference/policy.md is what policies are held to: its tables are complete, and its examples are true."""

import re
from pathlib import Path
from typing import Any

from kalium.cli import apply
from kalium.cli.policy import explanation
from kalium.policy import automaton, envelope, examples, limits, lint, render, schema, source
from kalium.policy import compile as compiler
from kalium.policy.automaton import CompiledPolicy, FailMode
from kalium.policy.compile import compile_policy
from kalium.policy.lint import lint as findings_of
from kalium.policy.message import Reason
from kalium.policy.source import Severity

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "reference" / "policy.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def first_column(heading: str) -> list[str]:
    """The code words of the first column of the table below `heading`."""
    section = PAGE.split(f"\n{heading}\n")[1].split("\n#")[0]
    return re.findall(r"`([^`]+)`", "\n".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `")))


def keys_of(*definitions: str) -> set[str]:
    return {key for name in definitions for key in schema.SCHEMA["$defs"][name]["properties"]}


def example_policy() -> CompiledPolicy:
    return CompiledPolicy.parse(compile_policy(blocks("yaml")[0].encode("ascii"), "page"))


def test_every_reason_is_explained_in_its_order() -> None:
    assert first_column("## Reasons") == [reason.value for reason in Reason]


def test_every_key_is_explained() -> None:
    assert set(first_column("### Top level")) == set(schema.SCHEMA["properties"])
    assert set(first_column("### Peers")) == keys_of("peer")
    assert set(first_column("### Functions")) == keys_of("function")
    assert {word.split(":")[0] for word in first_column("### Invocations")} | {"invoke", "peer"} == keys_of("step_invoke")
    assert {word.split(" ")[0] for word in first_column("### When no controller answers")} - {"app_edge"} == {mode.value for mode in FailMode}


def test_every_message_and_construct_is_explained() -> None:
    steps = {name.removeprefix("step_") for name in schema.SCHEMA["$defs"] if name.startswith("step_")}
    messages, constructs = first_column("### Messages"), first_column("### Constructs")
    verbs = {word for word in messages if ":" not in word}

    assert {word.split(":")[0] for word in [*messages, *constructs] if ":" in word} >= steps
    assert verbs == set(automaton.VERBS)


def test_every_code_is_listed() -> None:
    """Codes are stable, so each that the sources raise is in the page, and the page lists no other."""
    modules: tuple[Any, ...] = (apply, automaton, compiler, envelope, examples, lint, schema, source)
    text = "\n".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules)
    raised = set(re.findall(r'"(policy\.[a-z_]+)"', text)) | {f"policy.{name}" for name in re.findall(r'Severity\.[A-Z]+, "([a-z_]+)"', text)}
    section = PAGE.split("## Errors and findings")[1].split("\n## ")[0]
    listed = set(re.findall(r"`(policy\.[a-z_]+)`", section))

    assert listed - raised == {"policy.verdict"}  # raised by the command
    assert raised - listed == set()


def test_the_example_is_drawn_as_the_page_says() -> None:
    policy = example_policy()
    drawn = render.text(policy, ["make-thumbnail"])

    assert blocks("text")[0] == drawn[drawn.index("function make-thumbnail") :]


def test_the_example_denies_as_the_page_says() -> None:
    policy = example_policy()
    function = policy.functions["make-thumbnail"]
    message = examples.message_of("mysql insert write thumbnails", policy)
    verdict, _ = function.step(function.start, message)
    record = {
        "time_ms": 1_769_850_724_310, "app": policy.app, "function": function.name, "message": message.text(), "peer": message.peer,
        "allowed": verdict.allowed, "reason": verdict.reason.value, "expected": list(verdict.expected), "line": verdict.line,
    }  # fmt: skip

    assert blocks("text")[1].splitlines() == list(explanation(record))


def test_the_examples_of_the_page_hold() -> None:
    count, findings = examples.run(blocks("yaml")[3].encode("ascii"), example_policy())

    assert (count, findings) == (1, [])


def test_the_example_policies_have_nothing_but_notes() -> None:
    first, second, third = (findings_of(text.encode("ascii")) for text in blocks("yaml")[:3])

    assert first == third == []
    assert {finding.severity for finding in second} == {Severity.NOTE}
    assert {finding.code for finding in second} == {"policy.wildcard", "policy.any_address", "policy.mode"}


def test_the_limits_are_those_of_the_code() -> None:
    rows = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", PAGE.split("\n## Limits\n")[1].split("\n## ")[0], re.MULTILINE))

    assert rows["source"] == f"{limits.SOURCE_BYTES_MAX // 1024} KiB, {limits.SOURCE_DEPTH_MAX} levels, {limits.SOURCE_NODES_MAX} values"
    assert rows["functions, peers"] == f"{limits.FUNCTIONS_MAX}, {limits.PEERS_MAX}"
    assert rows["messages (lines) of a function"] == str(limits.SYMBOLS_MAX)
    assert rows["labels of its app CFG"] == str(limits.LABELS_MAX)
    assert rows["states, transitions of a function"] == f"{limits.STATES_MAX}, {limits.EDGES_MAX}"
    assert rows["rounds of a repeat"] == str(limits.REPEAT_MAX)
    assert rows["branches of `choice` and `parallel`"] == str(limits.LIST_MAX)
    assert rows["tables of a statement, query keys, segments of a path, recipients"] == str(limits.LIST_MAX)
    assert rows["a message's text in logs; what `expected` lists"] == f"{limits.MESSAGE_TEXT_MAX} bytes; {limits.EXPECTED_MAX}"
    assert rows["compiled form, envelope"] == f"{limits.COMPILED_BYTES_MAX // 1024} KiB, {limits.ENVELOPE_BYTES_MAX // 1024 // 1024} MiB"
    assert rows["`max_inflight`, `retries`"] == f"{limits.INFLIGHT_MAX}, {limits.RETRIES_MAX}"
    for setting, default in (("tail", limits.TAIL_MS_DEFAULT), ("quiet", limits.QUIET_MS_DEFAULT), ("retire", limits.RETIRE_MS_DEFAULT)):
        assert re.search(rf"^\| `{setting}_ms` .*, default {default} \|$", PAGE, re.MULTILINE)
    assert f"default {limits.MAX_BODY_DEFAULT}." in PAGE and f"default {limits.INVOCATION_TIMEOUT_MS_DEFAULT} " in PAGE
    assert f"default {limits.DEADLINE_MS_DEFAULT})" in PAGE
