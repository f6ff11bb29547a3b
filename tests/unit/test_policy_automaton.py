"""The Python executor and the compiler against the vectors that Go reads too, and against Go's own constants."""

import base64
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from kalium.errors import KaliumError
from kalium.policy import envelope, limits
from kalium.policy.automaton import VERBS, CompiledPolicy, LabelKey, MessageAutomaton, Verdict
from kalium.policy.compile import TABLES_OF_VERB, compile_policy
from kalium.policy.message import Kind, Message, Reason, printable

ROOT = Path(__file__).resolve().parents[2]
VECTORS = ROOT / "tests" / "vectors" / "policies"
GO = ROOT / "runtime" / "internal" / "policy"


def accepted() -> list[Any]:
    files = sorted(path for path in VECTORS.glob("*.json") if path.stem not in ("refused", "envelopes"))
    return [json.loads(path.read_text(encoding="ascii")) for path in files]


def message_of(fields: dict[str, Any]) -> Message:
    names = {"from": "sender"}
    values: dict[str, Any] = {names.get(name, name): tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Message(Kind(values.pop("kind")), **values)


@pytest.mark.parametrize("vector", accepted(), ids=lambda vector: str(vector["name"]))
def test_a_source_compiles_to_the_bytes_of_its_vector(vector: dict[str, Any]) -> None:
    assert compile_policy(vector["source"].encode("ascii"), vector["name"]).decode("ascii") == vector["compiled"]


@pytest.mark.parametrize("vector", accepted(), ids=lambda vector: str(vector["name"]))
def test_every_message_gets_the_verdict_of_its_vector(vector: dict[str, Any]) -> None:
    policy = CompiledPolicy.parse(vector["compiled"].encode("ascii"))
    for run in vector["runs"]:
        function = policy.functions[run["function"]]
        automaton: MessageAutomaton | None = function.startup if run.get("startup") else function
        assert automaton is not None
        states = automaton.start
        for step in run["steps"]:
            message = message_of(step["message"])
            verdict, states = (automaton.step_tail if step.get("tail") else automaton.step)(states, message)

            assert message.text() == step["text"]
            expected = tuple(step["expected"])
            assert verdict == Verdict(step["allowed"], Reason(step["reason"]), expected, step["line"], tuple(step["states"]), step["retries"])
        assert automaton.accepts(states) == run["may_end"]


@pytest.mark.parametrize("vector", accepted(), ids=lambda vector: str(vector["name"]))
def test_every_invocation_gets_the_answer_of_its_vector(vector: dict[str, Any]) -> None:
    policy = CompiledPolicy.parse(vector["compiled"].encode("ascii"))
    for run in vector["app_runs"]:
        states = policy.start(run["function"])
        for step in run["steps"]:
            key = LabelKey(step["callee"], step["asynchronous"], step["callback"])
            after, label = policy.step(run["function"], states, key, step["open"])

            assert policy.expected(run["function"], states, step["open"]) == step["expected"]
            assert (bool(after), label) == (step["allowed"], step["label"])
            states = after or states
            assert sorted(states) == step["states"]


def test_the_vectors_show_every_kind_of_verdict() -> None:
    """A vector set that denies nothing, or for one reason only, would prove little."""
    steps = [step for vector in accepted() for run in vector["runs"] for step in run["steps"]]

    assert {step["reason"] for step in steps} == {"allowed", "out_of_order", "not_in_policy"}
    assert {step["message"]["kind"] for step in steps} == {kind.value for kind in Kind}
    assert any(len(step["states"]) > 1 for step in steps)
    assert any(len(step["expected"]) == limits.EXPECTED_MAX for step in steps)
    assert any(state > 63 for step in steps for state in step["states"])


def test_the_vectors_are_what_their_generator_writes() -> None:
    """Nobody edits them by hand, and a change of the compiler shows in them."""
    rendered = runpy.run_path(str(VECTORS.parent / "generate_policies.py"))["rendered"]()

    assert {path.name: path.read_text(encoding="ascii") for path in VECTORS.iterdir()} == rendered


@pytest.mark.parametrize("document", json.loads((VECTORS / "refused.json").read_text(encoding="ascii")), ids=lambda document: str(document["name"]))
def test_a_document_with_one_broken_rule_is_refused(document: dict[str, str]) -> None:
    compiled = document["compiled"].encode("utf-8").ljust(int(document.get("pad_to_bytes", "0")))

    with pytest.raises(KaliumError) as caught:
        CompiledPolicy.parse(compiled)

    assert caught.value.code == document["code"]


@pytest.mark.parametrize(
    "compiled",
    [b"\xff", b"\xef\xbb\xbf{}", '{"app":"\u00e9"}'.encode("utf-16"), b"[" * 500_000, b"1" * 5000, b'{"a":"\\ud800"}', b"null", b"Infinity"],
    ids=["not utf-8", "byte order mark", "utf-16", "nested", "digits", "lone surrogate", "null", "infinity"],
)
def test_bytes_that_json_readers_disagree_about_are_refused(compiled: bytes) -> None:
    with pytest.raises(KaliumError) as caught:
        CompiledPolicy.parse(compiled)

    assert caught.value.code == "policy.malformed"


ENVELOPES = json.loads((VECTORS / "envelopes.json").read_text(encoding="ascii"))
PUBLIC_KEY = Ed25519PublicKey.from_public_bytes(base64.b64decode(ENVELOPES["public_key"]))


@pytest.mark.parametrize("vector", ENVELOPES["good"], ids=lambda vector: str(vector["name"]))
def test_a_good_envelope_holds(vector: dict[str, Any]) -> None:
    policy = envelope.verify(vector["envelope"].encode("ascii"), PUBLIC_KEY)

    assert (policy.app, policy.version) == (vector["app"], vector["version"])


@pytest.mark.parametrize("vector", ENVELOPES["refused"], ids=lambda vector: str(vector["name"]))
def test_a_bad_envelope_does_not_hold(vector: dict[str, Any]) -> None:
    with pytest.raises(KaliumError) as caught:
        envelope.verify(vector["envelope"].encode("ascii"), PUBLIC_KEY)

    assert (caught.value.code, caught.value.exit_code) == (vector["code"], 1)


def test_signing_is_deterministic_and_names_its_key() -> None:
    key = Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)
    compiled = accepted()[0]["compiled"].encode("ascii")

    signed = envelope.sign(compiled, key)

    assert signed == envelope.sign(compiled, key)
    assert json.loads(signed)["key_id"] == envelope.key_id(key.public_key())
    assert b'"signature":"' in signed and b" " not in signed
    assert envelope.read(signed).compiled == compiled


def test_nothing_is_signed_that_no_guard_would_take() -> None:
    with pytest.raises(KaliumError) as caught:
        envelope.sign(b'{"format":"kalium-compiled/v1"}', Ed25519PrivateKey.generate())

    assert caught.value.code == "policy.malformed"


def test_the_zero_verdict_denies() -> None:
    assert not Verdict().allowed


def test_a_cursor_in_no_state_allows_nothing() -> None:
    policy = CompiledPolicy.parse(accepted()[0]["compiled"].encode("ascii"))
    function = policy.functions["f"]

    verdict, states = function.step(frozenset(), Message(Kind.INVOKE, "gateway", callee="g"))

    assert (verdict.allowed, verdict.expected, states) == (False, (), frozenset())
    assert policy.step("f", frozenset(), LabelKey("g")) == (frozenset(), -1)
    assert policy.expected("f", frozenset()) == []


def test_a_text_is_printable_and_bounded() -> None:
    """Names inside messages are chosen by the function; a log reader's terminal must not interpret them."""
    hostile = Message(Kind.HTTP, "api", "GET", "/\x1b[2J\u202e" + "x" * 400)

    text = hostile.text()

    assert text.startswith("http GET api /?[2J?xxx")
    assert (len(text), text[-3:]) == (limits.MESSAGE_TEXT_MAX, "...")
    assert printable("\u00e9" * 300, 300) == "?" * 300


def go_constants() -> dict[str, int]:
    """The constants of the Go executor by name."""
    text = "\n".join((GO / name).read_text(encoding="utf-8") for name in ("parse.go", "policy.go", "message.go", "envelope.go"))
    found = re.findall(r"^(?:const )?\t?(\w+Max) +=? *= ([0-9_ *<]+?)(?: //.*)?$", text, re.MULTILINE)
    return {name: eval(value, {}) for name, value in found}  # noqa: S307  # digits and operators of our own source


def test_the_bounds_are_those_of_the_go_executor() -> None:
    ours = {
        "compiledBytesMax": limits.COMPILED_BYTES_MAX, "symbolsMax": limits.SYMBOLS_MAX, "labelsMax": limits.LABELS_MAX,
        "statesMax": limits.STATES_MAX, "edgesMax": limits.EDGES_MAX, "functionsMax": limits.FUNCTIONS_MAX, "peersMax": limits.PEERS_MAX,
        "listMax": limits.LIST_MAX,
        "nameBytesMax": limits.NAME_BYTES_MAX, "deadlineMSMax": limits.DEADLINE_MS_MAX, "timeoutMSMax": limits.TIMEOUT_MS_MAX,
        "bodyBytesMax": limits.BODY_BYTES_MAX, "retriesMax": limits.RETRIES_MAX, "inflightMax": limits.INFLIGHT_MAX,
        "depthMax": limits.DEPTH_MAX, "MessageTextMax": limits.MESSAGE_TEXT_MAX,
        "ExpectedMax": limits.EXPECTED_MAX, "envelopeBytesMax": limits.ENVELOPE_BYTES_MAX,
    }  # fmt: skip

    assert go_constants() == ours


def test_the_reasons_are_those_of_the_go_executor() -> None:
    text = (GO / "message.go").read_text(encoding="utf-8")

    assert re.findall(r'^\tReason\w+ +Reason = "(\w+)"$', text, re.MULTILINE) == [reason.value for reason in Reason]


def test_the_verbs_are_those_of_the_go_executor_and_of_the_statement_rules() -> None:
    text = (GO / "parse.go").read_text(encoding="utf-8")
    listed = re.search(r"var verbs = map\[string\]bool\{(.*?)\n\}", text, re.DOTALL)

    assert listed is not None
    assert set(re.findall(r'"([a-z-]+)": true', listed[1])) == set(VERBS) == set(TABLES_OF_VERB)
