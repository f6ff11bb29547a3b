"""The attack suite concludes "blocked" only from what receivers saw: capture, receiver, verdicts and outcomes."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from experiments_world import local_site

from experiments.attacks import capture, runner
from experiments.attacks.case import HOLES, Case, Match
from experiments.attacks.receiver import Receiver, request_is_complete
from experiments.attacks.runner import ATTACKERS, CASES, FUNCTIONS, Observation, failures, wire_evidence
from experiments.errors import RunRefused
from experiments.paths import RESULTS_SCHEMA, RunPaths
from experiments.site import CHECKOUT
from experiments.verdicts import Verdict

MARKER = "0123456789abcdef0123456789abcdef"
FUNCTION, GATEWAY, ATTACKER = ("10.137.0.12", 40000), ("10.137.0.1", 8080), ("10.137.0.1", 9999)
Endpoint = tuple[str, int]
SITE = local_site()


def segment(source: Endpoint, target: Endpoint, sequence: int, payload: bytes = b"", *, syn: bool = False) -> bytes:
    """An Ethernet frame with an IPv4 TCP segment; checksums are zero, nobody reads them."""
    tcp = struct.pack("!HHIIBBHHH", source[1], target[1], sequence % (1 << 32), 0, 5 << 4, 2 if syn else 16, 1000, 0, 0) + payload
    addresses = b"".join(bytes(int(part) for part in host.split(".")) for host, _ in (source, target))
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + addresses
    return bytes(12) + b"\x08\x00" + ip + tcp


def pcap(*frames: bytes, link: int = 1) -> bytes:
    header = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, link)
    return header + b"".join(struct.pack("<IIII", 0, 0, len(frame), len(frame)) + frame for frame in frames)


def seen(*frames: bytes, marker: str = MARKER) -> list[tuple[str, int]]:
    return [(str(flow), count) for flow, count in capture.search(pcap(*frames), marker)]


# The capture


def test_a_marker_in_a_segment_counts_the_segments_payload() -> None:
    payload = b"POST /loot " + MARKER.encode()

    assert seen(segment(FUNCTION, ATTACKER, 1, payload)) == [("10.137.0.12:40000 > 10.137.0.1:9999", len(payload))]


def test_a_marker_cut_by_a_segment_boundary_is_found_also_out_of_order_and_across_the_sequence_wrap() -> None:
    first, second = b"xx" + MARKER[:10].encode(), MARKER[10:].encode() + b"yy"
    begin = (1 << 32) - 4

    found = seen(
        segment(FUNCTION, ATTACKER, begin - 1, syn=True),
        segment(FUNCTION, ATTACKER, begin + len(first), second),
        segment(FUNCTION, ATTACKER, begin, first),
    )

    assert found == [("10.137.0.12:40000 > 10.137.0.1:9999", len(first) + len(second))]


def test_halves_that_do_not_touch_are_no_marker() -> None:
    half = MARKER[:16].encode(), MARKER[16:].encode()

    assert seen(segment(FUNCTION, ATTACKER, 1, half[0]), segment(FUNCTION, ATTACKER, 100, half[1])) == []
    assert seen(segment(FUNCTION, ATTACKER, 1, half[0]), segment(FUNCTION, GATEWAY, 17, half[1])) == []


def test_a_new_connection_on_the_same_ports_does_not_hide_behind_the_old_one() -> None:
    found = seen(
        segment(FUNCTION, ATTACKER, 0, syn=True),
        segment(FUNCTION, ATTACKER, 1, b"a" * 500),
        segment(FUNCTION, ATTACKER, 9000, syn=True),
        segment(FUNCTION, ATTACKER, 9001, MARKER.encode()),
    )

    assert found == [("10.137.0.12:40000 > 10.137.0.1:9999", 32)]


def test_a_segment_that_overlaps_what_was_sent_before_is_searched_as_it_was_sent() -> None:
    assert seen(segment(FUNCTION, ATTACKER, 1, b"a" * 100), segment(FUNCTION, ATTACKER, 20, MARKER.encode())) != []


def test_answers_of_services_are_not_messages_of_the_function() -> None:
    data = pcap(segment(GATEWAY, FUNCTION, 1, MARKER.encode()), segment(FUNCTION, GATEWAY, 1, b"x" + MARKER.encode()))

    assert wire_evidence(data, MARKER, [8080]) == (33, "10.137.0.12:40000 > 10.137.0.1:8080: 33 bytes")
    assert wire_evidence(pcap(), MARKER, [8080]) == (0, "none")


def test_a_marker_outside_tcp_is_found_too() -> None:
    frame = bytes(12) + b"\x08\x00" + struct.pack("!BBHHHBBH", 0x45, 0, 60, 0, 0, 64, 17, 0) + bytes(16) + MARKER.encode()

    assert wire_evidence(pcap(frame), MARKER, []) == (len(frame), f"{len(frame)} bytes outside TCP")


def test_a_file_that_is_no_ethernet_capture_is_refused() -> None:
    with pytest.raises(RunRefused, match="not a pcap"):
        capture.search(b"", MARKER)
    with pytest.raises(RunRefused, match="link type 113"):
        capture.search(pcap(link=113), MARKER)


# The receiver


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    """The attacker's server on a free port."""
    with Receiver(("127.0.0.1", 0), tmp_path / "receiver.jsonl") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def send(server: Receiver, data: bytes) -> bytes:
    host, port = str(server.server_address[0]), int(server.server_address[1])
    with socket.create_connection((host, port), timeout=30) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(1000)


@pytest.mark.parametrize("data", [b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", b"raw bytes \xff", b""])
def test_the_receiver_logs_whatever_arrives_and_answers(receiver: Receiver, data: bytes) -> None:
    answer = send(receiver, data)

    assert answer.startswith(b"HTTP/1.1 200")
    lines = [json.loads(line) for line in receiver.log.read_text(encoding="utf-8").splitlines()]
    assert [(line["bytes"], line["data"].encode("latin-1")) for line in lines] == [(len(data), data)]


def test_a_request_is_complete_when_its_announced_body_is_there() -> None:
    head = b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\n"

    assert [request_is_complete(data) for data in (head, head + b"ab", head + b"abc", b"raw", b"GET / HTTP/1.1\r\n\r\n")] == [
        False, False, True, False, False,
    ]  # fmt: skip


# Cases and verdicts


def verdict(kind: str, message: str, *, allowed: bool, peer: str = "", **more: Any) -> Verdict:
    return Verdict({"kind": kind, "message": message, "allowed": allowed, "peer": peer, "reason": "allowed" if allowed else "out_of_order", **more})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_exploit_is_python_and_does_not_carry_its_marker(case: Case) -> None:
    fields = case.fields(MARKER, SITE)

    assert HOLES[case.attacker] in fields
    for source in fields.values():
        compile(source, case.name, "exec")
        assert MARKER not in source and MARKER[::-1] in source
        assert "@" not in source


def test_what_is_exploited_has_a_variant_with_that_hole() -> None:
    """The handler of each variant says which field of the input it runs."""
    for function, field in HOLES.items():
        assert f'run("{field}", event)' in (CHECKOUT / "functions" / "attack" / function / "handler.py").read_text(encoding="utf-8")
    assert all(case.exploits.keys() <= HOLES.keys() for case in CASES)


def test_what_attacks_and_what_is_attacked_are_on_two_nodes() -> None:
    """An invocation is attacked from the node of the attackers; an accomplice is on the other one."""
    attacks = [case for case in CASES if case.category == "scenario-2"]

    assert all(case.denied.fragment in FUNCTIONS and case.denied.fragment not in ATTACKERS for case in attacks)
    assert all(case.exploits.keys() & set(ATTACKERS) for case in attacks)
    assert [case.name for case in attacks if case.attacker not in ATTACKERS] == ["collude"]


def test_a_denial_of_the_exploits_preparations_is_not_a_denial_of_the_hostile_message() -> None:
    """A write that is refused before the allowed one was made shows a broken policy, not a blocked repetition."""
    case = next(case for case in CASES if case.name == "repeat-write")
    early = verdict("mysql", "mysql select read photoAssignmentTable", allowed=False)
    first = verdict("mysql", "mysql insert write storedPhotosTable", allowed=True)
    late = verdict("mysql", "mysql begin", allowed=False)

    assert case.denial([early]) is None
    assert case.denial([first]) is None
    assert case.denial([early, first, late]) == late


def test_a_match_looks_at_kind_and_at_message_or_peer() -> None:
    match = Match(("connect",), "9999")

    assert match.holds(verdict("connect", "connect", allowed=False, peer="10.137.0.1:9999"))
    assert not match.holds(verdict("connect", "connect", allowed=False, peer="10.137.0.1:80"))
    assert not match.holds(verdict("http", "POST 9999", allowed=False))


# Outcomes


def observation(case: Case, system: str, *, received: int = 0, denied: bool = False, benign: str = "") -> Observation:
    return Observation(
        case=case.name, system=system, marker=MARKER if system == "stock" else MARKER[::-1], status=200, answer="200 ''", receiver_bytes=received,
        receiver="its log", denial=verdict("mysql", "mysql begin", allowed=False, line=31, function="f").record if denied else None,
        other_denials=0, benign_problem=benign,
    )  # fmt: skip


def sealed(tmp_path: Path, *, stock: int = 50, enforced: int = 0, denied: bool = True, benign: str = "", frames: tuple[bytes, ...] = ()) -> RunPaths:
    """A run of the suite in which every case went the same way."""
    run = RunPaths.create("attacks", results=tmp_path)
    every = [
        entry
        for case in CASES
        for entry in (
            observation(case, "stock", received=stock),
            observation(case, "kalium-enforce", received=enforced, denied=denied, benign=benign),
        )
    ]
    run.observations.write_text(json.dumps([asdict(entry) for entry in every]), encoding="utf-8")
    run.capture.write_bytes(pcap(*(frames or ((segment(FUNCTION, GATEWAY, 1, MARKER.encode()),) if stock else ()))))
    run.write_record({"schema": RESULTS_SCHEMA, "complete": True, "profile": "full", "service_ports": [8080]})
    run.seal()
    return run


def outcomes(run: RunPaths) -> set[str]:
    return {entry.outcome for entry in runner.judge(run)}


def test_nothing_received_a_denial_and_a_delivery_under_stock_is_blocked(tmp_path: Path) -> None:
    run = sealed(tmp_path)
    runner.derive(run)

    assert outcomes(run) == {"blocked"} and failures(run) == []
    assert run.aggregate.read_text(encoding="utf-8").splitlines() == [
        "name,value,unit", f"cases,{len(CASES)},count", "invalid,0,count", "kalium_enforce_missed_within_scope,0,count", "benign_broken,0,count",
    ]  # fmt: skip
    assert (
        run.summary.read_text(encoding="utf-8").splitlines()[0] == "case,class,system,expected,verdict,marker,stock_delivered,received_bytes,evidence"
    )
    assert "policy line 31" in runner.table(run)


def test_without_a_delivery_under_stock_a_case_is_invalid(tmp_path: Path) -> None:
    run = sealed(tmp_path, stock=0)

    assert outcomes(run) == {"invalid"}
    assert "stock gVisor did not deliver" in failures(run)[0]


def test_without_a_verdict_a_case_is_invalid(tmp_path: Path) -> None:
    run = sealed(tmp_path, denied=False)

    assert outcomes(run) == {"invalid"}
    assert "no verdict denies" in failures(run)[0]


def test_what_a_receiver_saw_is_missed_whatever_the_verdict_says(tmp_path: Path) -> None:
    assert outcomes(sealed(tmp_path, enforced=40)) == {"missed"}


def test_what_the_capture_saw_is_missed_whatever_receiver_and_verdict_say(tmp_path: Path) -> None:
    frames = (segment(FUNCTION, GATEWAY, 1, MARKER.encode()), segment(FUNCTION, ATTACKER, 1, MARKER[::-1].encode()))

    assert outcomes(sealed(tmp_path, frames=frames)) == {"missed"}


def test_a_benign_request_that_broke_fails_the_run(tmp_path: Path) -> None:
    run = sealed(tmp_path, benign="status 500: ''")

    assert len(failures(run)) == len(CASES)
    with pytest.raises(RunRefused, match="benign request"):
        runner.FinishedRun(run).text()
