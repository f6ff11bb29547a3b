"""What the controller puts on record, within which bounds, and what it does while it cannot."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from audit_world import KEY, PUBLIC, codes, verify
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from kalium.audit.rate import Rate
from kalium.controller.audit import ANCHOR_EVERY_MS, ANCHORS_MAX, AUDITED, NOT_AUDITED, TEXT_MAX, Audit, open_audit
from kalium.controller.config import AuditFiles
from kalium.controller.log import EVENTS
from kalium.errors import KaliumError

HASH = "ab" * 32
WAIT_S = 20.0


class Recorded:
    """Stands for the writer, and keeps what it is told."""

    healthy = True

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def record(self, event: str, fields: Mapping[str, Any]) -> bool:
        self.entries.append({"event": event, **fields})
        return True

    def close(self) -> int:
        return 0


class Scene:
    """An audit with a clock that the test turns."""

    def __init__(self) -> None:
        self.now_ms = 0
        self.writer = Recorded()
        self.lines: list[str] = []
        self.audit = Audit(clock_ms=lambda: self.now_ms, rate=Rate(per_second=10, burst=20))
        self.audit.writer = self.writer
        self.log = self.audit.logging(lambda event, **_fields: self.lines.append(event))

    def anchor(self, seq: int, node: str = "node0", own: str = HASH) -> None:
        self.audit.record("anchor", node=node, audit_seq=seq, audit_hash=own)


def test_every_event_of_the_log_is_recorded_or_is_known_not_to_be() -> None:
    assert set(AUDITED) | NOT_AUDITED == set(EVENTS)
    assert not set(AUDITED) & NOT_AUDITED


def test_a_line_of_the_log_is_the_entry() -> None:
    scene = Scene()

    scene.log("policy_loaded", app="shop", version=2, file="shop.signed.json", sha256=HASH)
    scene.log("step_denied", question="invoke", reason="edge_not_allowed", instance="c1", detail="x" * 600)
    scene.log("listening", address="127.0.0.1:5000")

    assert scene.writer.entries == [
        {"event": "policy", "what": "loaded", "app": "shop", "version": 2, "file": "shop.signed.json", "sha256": HASH},
        {
            "event": "step", "what": "denied", "question": "invoke", "reason": "edge_not_allowed", "instance": "c1",
            "detail": "x" * TEXT_MAX,
        },
    ]  # fmt: skip
    assert scene.lines == ["policy_loaded", "step_denied", "listening"]


def test_an_agent_is_anchored_once_a_minute_and_when_its_log_has_grown() -> None:
    scene = Scene()
    for at_ms, seq in ((0, 5), (10, 6), (ANCHOR_EVERY_MS - 1, 7), (ANCHOR_EVERY_MS, 8), (3 * ANCHOR_EVERY_MS, 8), (3 * ANCHOR_EVERY_MS + 1, 9)):
        scene.now_ms = at_ms
        scene.anchor(seq)
    scene.anchor(1, node="node1")

    assert [(entry["node"], entry["audit_seq"]) for entry in scene.writer.entries] == [("node0", 5), ("node0", 8), ("node0", 9), ("node1", 1)]


def test_what_anchors_nothing_is_left_out_and_agents_are_bounded() -> None:
    scene = Scene()
    scene.anchor(0, own="")
    scene.anchor(1, own=HASH.upper())
    scene.anchor(1, node="")
    assert scene.writer.entries == []

    for number in range(ANCHORS_MAX + 10):
        scene.anchor(1, node=f"node{number}")

    assert len(scene.audit._anchors) == ANCHORS_MAX


def test_a_flood_of_denials_is_counted_and_said_once_a_second() -> None:
    scene = Scene()

    for number in range(500):
        scene.log("step_denied", question="start", reason="unregistered", instance=f"c{number}", node="node0")
    scene.log("step_denied", question="start", reason="bad_token", instance="c1", node="node1")
    scene.audit.sweep()

    steps = [entry["node"] for entry in scene.writer.entries if entry["event"] == "step"]
    assert (steps.count("node0"), steps.count("node1")) == (20, 1)
    assert scene.writer.entries[-1] == {"event": "suppressed", "source": "node0", "counts": {"unregistered": 480}}


def test_strangers_share_one_allowance_whatever_they_call_themselves() -> None:
    scene = Scene()

    for number in range(100):
        scene.log("connection_refused", reason="tls", node=f"node{number}", peer="192.0.2.1:1")
    scene.log("connection_refused", reason="wrong_identity", node="node0", peer="192.0.2.1:1")
    scene.audit.close()

    assert [entry["reason"] for entry in scene.writer.entries if entry["event"] == "agent"] == ["tls"] * 20 + ["wrong_identity"]
    assert scene.writer.entries[-1]["counts"] == {"tls": 80}


def test_steps_refused_during_an_outage_are_counted_in_it_and_nowhere_else() -> None:
    scene = Scene()
    scene.now_ms = 7
    scene.audit.failed(OSError(28, "No space left on device"))
    scene.writer.healthy = False

    for _ in range(3):
        scene.log("step_denied", question="start", reason="overloaded", instance="c1")
    assert scene.writer.entries == []
    scene.writer.healthy = True
    scene.audit.well(4)

    assert scene.writer.entries == [
        {"event": "outage", "what": "audit_log", "error": "No space left on device", "since_ms": 7, "lost": 4, "refused": 3}
    ]


def test_entries_that_a_slow_disk_had_no_room_for_are_an_outage_too() -> None:
    scene = Scene()
    scene.now_ms = 9

    scene.audit.well(4)

    assert scene.writer.entries == [
        {"event": "outage", "what": "audit_log", "error": "the disk was slower than the entries", "since_ms": 9, "lost": 4, "refused": 0}
    ]


# With real files


def key_at(path: Path) -> Path:
    path.write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def until(claim: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not claim():
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s in vain for {what}"
        time.sleep(0.02)


def test_a_log_that_is_damaged_or_has_no_key_keeps_the_controller_from_starting(tmp_path: Path) -> None:
    loop = asyncio.new_event_loop()
    files = AuditFiles(tmp_path / "audit.jsonl", tmp_path / "audit.key")

    with pytest.raises(KaliumError) as no_key:
        open_audit(files, "c1", log=lambda *_a, **_k: None, loop=loop)
    key_at(files.key)
    files.log.write_bytes(b"hello\n")
    with pytest.raises(KaliumError) as damaged:
        open_audit(files, "c1", log=lambda *_a, **_k: None, loop=loop)

    loop.close()
    assert (no_key.value.code, damaged.value.code) == ("audit.key", "audit.log")


def test_a_controllers_log_verifies(tmp_path: Path) -> None:
    loop = asyncio.new_event_loop()
    files = AuditFiles(tmp_path / "audit.jsonl", key_at(tmp_path / "audit.key"))
    audit = open_audit(files, "c1", log=lambda *_a, **_k: None, loop=loop)

    audit.logging(lambda *_a, **_k: None)("policy_loaded", app="shop", version=2)
    assert audit.close() == 0

    loop.close()
    report = verify([("audit.jsonl", files.log.read_bytes())], key=PUBLIC)
    assert codes(report) == set()
    assert (report.writer, report.name, report.entries, report.unsigned) == ("controller", "c1", 3, 0)
