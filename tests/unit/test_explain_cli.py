"""`kalium explain`: from the id of a verdict to its policy line, its state, what led there, and a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kalium.cli import explain
from kalium.cli.main import main
from kalium.policy import picture
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.compile import compile_policy
from kalium.policy.envelope import sign
from kalium.policy.picture import Scene, Step

POLICY = """\
schema: kalium/v1
app: shop
version: 7
mode: enforce
on_unavailable: {app_edge: deny, deadline_ms: 250}
peers:
  gateway: {host: gateway, port: 8080, protocol: http, role: gateway}
  bank: {host: bank.example, port: 443, protocol: https}
entries: [buy]
functions:
  buy:
    messages:
      - {https: GET, peer: bank, path: /rate}
      - {invoke: pay}
      - {https: GET, peer: bank, path: /receipt}
  pay:
    messages:
      - {https: POST, peer: bank, path: /transfer}
"""
CALL, FIRST, SECOND = "c" * 32, "a" * 32, "b" * 32
BASE: dict[str, Any] = {
    "event": "verdict", "node": "node0", "app": "shop", "mode": "enforce", "policy_version": 7, "call": CALL, "peer": "", "allowed": True,
    "would_deny": False, "reason": "allowed", "expected": [], "line": 0, "states": [], "judging": "", "latency_us": 5, "fail_mode": "",
}  # fmt: skip
BUY = {"instance": "1" * 64, "function": "buy", "invocation": FIRST}
PAY = {"instance": "2" * 64, "function": "pay", "invocation": SECOND, "node": "node1"}
T0 = 1_700_000_000_000
DENIED = "0000000100000004"
VERDICTS = [
    {**BASE, **BUY, "id": "0000000100000001", "time_ms": T0, "kind": "start", "message": "start buy"},
    {
        **BASE, **BUY, "id": "0000000100000002", "time_ms": T0 + 4, "kind": "https", "message": "https GET bank /rate", "peer": "bank", "line": 13,
        "states": [1],
    },
    {**BASE, **BUY, "id": "0000000100000003", "time_ms": T0 + 4, "kind": "invoke", "message": "invoke pay", "line": 14, "states": [2]},
    {
        **BASE, **BUY, "id": DENIED, "time_ms": T0 + 20, "kind": "https", "message": "https POST bank /transfer", "peer": "bank", "allowed": False,
        "reason": "not_in_policy", "expected": ["https GET bank /receipt @line 15"], "states": [2],
    },
    {**BASE, **BUY, "id": "0000000100000005", "time_ms": T0 + 21, "kind": "https", "message": "after it", "line": 15, "states": [3]},
]  # fmt: skip
OTHERS = [
    {**BASE, **PAY, "id": "0000000200000001", "time_ms": T0 + 9, "kind": "start", "message": "start pay", "fail_mode": "allow"},
    {**BASE, **PAY, "id": "0000000200000002", "time_ms": T0 + 10, "kind": "https", "message": "https POST bank /transfer", "line": 18, "states": [1]},
    {**BASE, **PAY, "id": "0000000200000003", "time_ms": T0 + 11, "kind": "start", "message": "start pay", "call": "d" * 32},
]


def written(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"event":"verdict","id":"' + DENIED, encoding="utf-8")
    return path


@pytest.fixture
def logs(tmp_path: Path) -> list[str]:
    """The options that name the logs of two nodes."""
    return ["--log", str(written(tmp_path / "node0.jsonl", VERDICTS)), "--log", str(written(tmp_path / "node1.jsonl", OTHERS))]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "shop.yml"
    path.write_text(POLICY, encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def no_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's own policies are not looked at."""
    monkeypatch.setattr(explain, "POLICIES", tmp_path / "policies")


def test_a_denial_is_told_with_its_line_state_path_and_call(logs: list[str], policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", DENIED, *logs, "--policy", str(policy)]) == 0

    assert (
        capsys.readouterr().out
        == f"""\
verdict {DENIED}: denied, not_in_policy
  when        2023-11-14 22:13:20.020 UTC
  where       node node0, instance 111111111111
  function    shop/buy
  call        {CALL}
  invocation  {FIRST}
  mode        enforce
  observed    https POST bank /transfer, peer bank
  expected    https GET bank /receipt @line 15
  policy      version 7, {policy}

invocation of buy
  (0)
   |  https GET bank /rate       line 13
  (1)
   |  invoke pay                 line 14
  (2)  <-- here it stood
   +->  https GET bank /receipt    line 15  to state 3
   X--  https POST bank /transfer  refused: not_in_policy

call {CALL} so far
  +     0 ms * node0 buy: start buy
  +     4 ms * node0 buy: invoke pay
  +     9 ms   node1 pay: start pay  fail mode allow
"""
    )


def test_the_line_of_an_allowed_message_is_quoted(logs: list[str], policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", "0000000100000003", *logs, "--policy", str(policy)])

    out = capsys.readouterr().out
    assert "  line        14: - {invoke: pay}\n" in out
    assert "(2)  <-- here it stands since\n" in out and "X--" not in out


@pytest.mark.parametrize("form", ["compiled", "signed"])
def test_a_policy_without_its_source_gives_the_text_of_the_line_too(
    form: str, logs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signed policy of the site is found by itself."""
    compiled = compile_policy(POLICY.encode(), "x")
    (tmp_path / "policies").mkdir()
    signed = tmp_path / "policies" / "shop.signed.json"
    signed.write_bytes(sign(compiled, Ed25519PrivateKey.generate()))
    (tmp_path / "compiled.json").write_bytes(compiled)

    main(["explain", "0000000100000003", *logs, *(["--policy", str(tmp_path / "compiled.json")] if form == "compiled" else [])])

    assert "  line        14: invoke pay\n" in capsys.readouterr().out


def test_without_the_policy_the_log_alone_is_drawn(logs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", DENIED, *logs]) == 0

    out = capsys.readouterr().out
    assert "policy      version 7, not at hand: " in out
    assert "   |  invoke pay                 line 14\n  (2)  <-- here it stood\n   X--  https POST bank /transfer  refused" in out


def test_a_denial_says_itself_where_it_stood(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What led there may be in a log that was rotated away."""
    log = written(tmp_path / "log", [VERDICTS[3]])

    main(["explain", DENIED, "--log", str(log), "--policy", str(policy)])

    assert "invocation of buy\n  (2)  <-- here it stood\n   +->  https GET bank /receipt    line 15  to state 3\n" in capsys.readouterr().out


def test_another_version_of_the_policy_is_not_taken(logs: list[str], policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its states and lines mean something else."""
    policy.write_text(POLICY.replace("version: 7", "version: 8"), encoding="utf-8")

    assert main(["explain", DENIED, *logs, "--policy", str(policy)]) == 0

    out = capsys.readouterr().out
    assert f"not at hand: {policy} is version 8 of shop" in out
    assert "+->" not in out


def test_a_refused_start_says_what_would_have_begun_it(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = {
        **BASE, **PAY, "id": DENIED, "time_ms": T0, "kind": "start", "message": "start pay", "allowed": False, "reason": "not_an_entry", "call": "",
        "invocation": "",
    }  # fmt: skip
    log = written(tmp_path / "log", [refused])

    assert main(["explain", DENIED, "--log", str(log), "--policy", str(policy)]) == 0

    out = capsys.readouterr().out
    assert "expected    the token of a granted invoke, or an entry: buy\n" in out
    assert "<--" not in out


def test_what_audit_let_pass_moved_nothing(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    passed = [{**record, "mode": "audit", **({"allowed": True, "would_deny": True} if record["id"] == DENIED else {})} for record in VERDICTS]
    log = written(tmp_path / "log", passed)

    main(["explain", DENIED, "--log", str(log), "--policy", str(policy)])

    out = capsys.readouterr().out
    assert out.startswith(f"verdict {DENIED}: would have been denied, not_in_policy\n")
    assert "(2)  <-- here it stood\n" in out and "X--  https POST bank /transfer  refused" in out


def test_an_audit_log_is_read_too(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        {"prev": "0" * 64, "hash": "1" * 64, "entry": {"seq": 1, **VERDICTS[3]}},
        {"prev": "0" * 64, "hash": "1" * 64, "entry": {"event": "head"}},
    ]
    log = written(tmp_path / "audit.jsonl", lines)
    verdicts = written(tmp_path / "verdicts.jsonl", VERDICTS)

    assert main(["explain", DENIED, "--log", str(log), "--log", str(verdicts), "--policy", str(policy)]) == 0

    assert capsys.readouterr().out.count("X--") == 1


def test_the_graph_marks_the_state_the_way_and_the_refusal(logs: list[str], policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", DENIED, *logs, "--policy", str(policy), "--format", "dot"]) == 0

    out = capsys.readouterr().out
    assert out.startswith('digraph "invocation of buy" {\n') and out.endswith("}\n")
    assert '  s2 [label="2", shape=circle, style=filled, fillcolor="gold"];' in out
    assert '  s0 -> s1 [label="https GET bank /rate\\nline 13", penwidth=3];' in out
    assert '  s2 -> s3 [label="https GET bank /receipt\\nline 15"];' in out
    assert '  s2 -> refused [label="https POST bank /transfer", style=dashed, color=red, fontcolor=red];' in out


def test_programs_get_json(logs: list[str], policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", DENIED, *logs, "--policy", str(policy), "--output", "json"]) == 0

    document = json.loads(capsys.readouterr().out)
    assert (document["verdict"]["id"], document["states"]) == (DENIED, [2])
    assert [each["message"] for each in document["invocation"]] == ["start buy", "https GET bank /rate", "invoke pay"]
    assert [each["message"] for each in document["call"]] == ["start buy", "invoke pay", "start pay"]


def test_an_id_that_no_log_has_is_an_answer(logs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "f" * 16, *logs]) == 1

    printed = capsys.readouterr()
    assert (printed.out, "no verdict ffffffffffffffff in" in printed.err) == ("", True)


@pytest.mark.parametrize("text", ["", "F" * 16, "0" * 15, "0" * 17, "../../etc/passwd", "zzzzzzzzzzzzzzzz"])
def test_what_is_no_id_is_wrong_usage(text: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["explain", text])

    assert ended.value.code == 2


def test_what_a_log_holds_cannot_write_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log may come from a machine that was taken over."""
    evil = "\x1b[2J\nverdict: allowed"
    log = written(
        tmp_path / "log",
        [{**VERDICTS[3], **dict.fromkeys(("message", "node", "app", "function", "reason", "mode", "peer", "invocation"), evil), "expected": [evil]}],
    )

    for options in ([], ["--format", "dot"]):
        assert main(["explain", DENIED, "--log", str(log), *options]) == 0

        out = capsys.readouterr().out
        assert "\x1b" not in out and "\nverdict: allowed" not in out


def test_a_long_path_is_cut_and_a_large_automaton_is_not_drawn_whole() -> None:
    repeated = POLICY.replace(
        "      - {invoke: pay}\n", "      - repeat: [ {https: GET, peer: bank, path: /more} ]\n        at_least: 0\n        at_most: 256\n"
    )
    automaton = CompiledPolicy.parse(compile_policy(repeated.encode(), "x")).functions["buy"]
    steps = [Step("https GET bank /more", 14, (number,), True, "allowed") for number in range(1, 100)]
    scene = Scene("x", steps, Step("no", 0, (99,), False, "out_of_order"), automaton)

    lines = picture.text(scene)

    assert (lines[1], len(lines) < 100) == (f"  ... {99 - picture.STEPS_DRAWN_MAX} earlier messages", True)
    assert len(automaton.edges) > picture.EDGES_DRAWN_MAX >= picture.dot(scene).count(" -> ") - 1
