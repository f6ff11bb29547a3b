"""`kalium status`: what is in force, for people and programs, and the exit code that a monitoring script looks at."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from controller_samples import compiled
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from kalium.audit.chain import Chain, Writer
from kalium.cli.main import main
from kalium.policy.envelope import sign
from kalium.protocol.frames import StatusReport

WELL = StatusReport(
    {"shop": 7}, agents=2, calls=3, invocations=4, controller="c1", controllers=("c1", "c2"), store="redis", started_ms=1_700_000_000_000,
    node=("n1", "n2"), app=("shop", "shop"), function=("buy", "pay"), asked=("enforce", "audit"), mode=("enforce", "audit"), version=(7, 7),
    count=(2, 1), denied={"shop out_of_order": 5}, would_deny={"shop unknown_peer": 2}, fail_modes={"shop last_known": 1}, evicted={"timeout": 1},
)  # fmt: skip

Answer = Callable[[StatusReport], Path]


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Answer:
    """Let a controller answer with a report; returns the configuration's path."""
    key = Ed25519PrivateKey.generate()
    (tmp_path / "policies").mkdir()
    (tmp_path / "policies" / "shop.signed.json").write_bytes(sign(compiled(7), key))
    (tmp_path / "operator.pub").write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    config = tmp_path / "controller.json"
    config.write_text(
        json.dumps(
            {
                "listen": {"host": "127.0.0.1", "port": 1}, "tls": {"ca": "ca", "cert": "c", "key": "k"}, "operator_key": "operator.pub",
                "policies_dir": "policies",
            }
        )
    )  # fmt: skip

    def answers(report: StatusReport) -> Path:
        monkeypatch.setattr("kalium.cli.status.client.status", lambda _config: report)
        monkeypatch.setattr("kalium.cli.status.time.time", lambda: 1_700_000_000 + 2 * 86400 + 3 * 3600 + 59)
        return config

    return answers


def test_a_site_that_is_well_is_shown_whole(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--config", str(answer(WELL))]) == 0

    assert (
        capsys.readouterr().out
        == """\
controller   c1, up 2 d 3 h since 2023-11-14 22:13:20 UTC
store        redis
others       c2
agents       2
live         3 calls, 4 invocations
audit        there is no audit log

APP   VERSION  ASKED
shop  7        enforce

FUNCTION  NODE  VERSION  INSTANCES  ASKED    EFFECTIVE
shop/buy  n1    7        2          enforce  enforce
shop/pay  n2    7        1          audit    audit

DENIED  REASON        COUNT
shop    out_of_order  5

WOULD-DENY  REASON        COUNT
shop        unknown_peer  2

WITHOUT-CONTROLLER  FAIL-MODE   COUNT
shop                last_known  1

EVICTED  COUNT
timeout  1
"""
    )


@pytest.mark.parametrize("mode", ["audit", "learn", "off", "none", ""])
def test_enforce_that_is_asked_and_not_in_force_is_a_no(mode: str, answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    config = answer(dataclasses.replace(WELL, mode=(mode, "audit")))

    assert main(["status", "--config", str(config)]) == 1
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("shop/buy")]
    assert line.endswith(f"{mode}  <-- NOT IN FORCE")
    assert main(["status", "--config", str(config), "--output", "json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert (document["ok"], [row["function"] for row in document["instances"] if not row["in_force"]]) == (False, ["buy"])


def test_a_function_that_the_policy_does_not_have_is_no_failure_of_enforcement(answer: Answer) -> None:
    """An instance of a function that the newest version dropped runs until the gateway has removed it."""
    assert main(["status", "--config", str(answer(dataclasses.replace(WELL, asked=("", "audit"), mode=("none", "audit"))))]) == 0


def test_programs_get_the_same_facts(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    main(["status", "--config", str(answer(WELL)), "--output", "json"])

    document = json.loads(capsys.readouterr().out)
    assert document["apps"] == [{"app": "shop", "version": 7, "mode": "enforce"}]
    assert document["denied"] == [{"app": "shop", "reason": "out_of_order", "count": 5}]
    assert document["fail_modes"] == [{"app": "shop", "fail_mode": "last_known", "count": 1}]
    assert document["instances"][0] == {
        "node": "n1", "app": "shop", "function": "buy", "asked": "enforce", "mode": "enforce", "version": 7, "count": 2, "in_force": True,
    }  # fmt: skip


def test_a_mode_is_shown_only_of_the_version_in_force(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    """The directory may hold one that the controller has refused."""
    main(["status", "--config", str(answer(dataclasses.replace(WELL, policies={"shop": 6}))), "--output", "json"])

    assert json.loads(capsys.readouterr().out)["apps"] == [{"app": "shop", "version": 6, "mode": "?"}]


def test_the_audit_logs_heads_are_shown(answer: Answer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The controller's own, and what it has on record of each node's: two places to compare with the nodes' logs."""
    config = answer(WELL)
    config.write_text(json.dumps({**json.loads(config.read_text()), "audit": {"log": "audit.jsonl", "key": "audit.key"}}))
    chain = Chain(Writer("controller", "c1", "1" * 16, "2" * 16), lambda _: b"", 1 << 20)
    chain.open(now_ms=1)
    for number in (4, 7):
        chain.append("anchor", {"node": "n1", "audit_seq": number, "audit_hash": f"{number:064x}"}, now_ms=2)
    place = chain.append("policy", {"app": "shop"}, now_ms=3)
    (tmp_path / "audit.jsonl").write_bytes(b"".join(part.data for part in chain.take()) + b'{"prev":"torn')

    main(["status", "--config", str(config)])

    assert f"audit        entry {place.seq} {place.hash[:12]}; on record of nodes: n1 7 000000000000\n" in capsys.readouterr().out
    (tmp_path / "audit.jsonl").unlink()
    main(["status", "--config", str(config), "--output", "json"])
    assert json.loads(capsys.readouterr().out)["audit"]["fault"] == "No such file or directory"


def test_what_a_peer_reports_cannot_write_on_the_terminal(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\nshop/buy"

    main(["status", "--config", str(answer(dataclasses.replace(WELL, node=(evil, evil), function=(evil, evil), mode=(evil, evil))))])

    out = capsys.readouterr().out
    assert "\x1b" not in out and "\nshop/buy" not in out


def test_a_controller_that_holds_nothing_says_so(answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    main(["status", "--config", str(answer(StatusReport({}, 0, 0, 0)))])

    assert capsys.readouterr().out.endswith("\n\nno policy is loaded\n\nno instance is running\n")
