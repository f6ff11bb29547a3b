"""What is found in an audit log that somebody has changed, and what is said not to be known."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from audit_world import KEY, LOG, PATH, PUBLIC, RUN, T, anchor, codes, lines_of, rehashed, source, split, verify, whole_log
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from kalium.audit import files as audit_files
from kalium.audit import verify as verify_module
from kalium.audit.chain import LINE_BYTES_MAX, Chain, Line, Place, Writer, digest, head_entry, parse, signed_bytes
from kalium.audit.verify import FINDINGS_MAX, Verification
from kalium.cli.main import main

Files = list[tuple[str, bytes]]

SMALL = 3000  # bytes of a file: a log of several
WHOLE = whole_log(bytes_max=SMALL)
LINES = lines_of(WHOLE)
LAST = LINES[-1]


def test_the_log_of_these_tests_has_several_files_starts_and_heads() -> None:
    report = verify(WHOLE)

    assert report.findings == []
    assert (report.writer, report.name, report.log) == ("agent", "node0", LOG)
    assert len(report.files) == 4
    assert (report.starts, report.unsigned, report.torn_bytes) == (2, 0, 0)
    assert report.heads > len(report.files)
    assert (report.first_seq, report.last_seq, report.signed_seq, report.entries) == (1, LAST.seq, LAST.seq, LAST.seq)
    assert report.unknown == ["whether entries were cut off the end: only anchors that a controller has on record tell that (--anchors)"]


def test_with_an_anchor_on_the_last_entry_only_the_future_is_unknown() -> None:
    report = verify(WHOLE, anchors=[anchor(LINES[3]), anchor(LAST, at_ms=7)])

    assert report.findings == []
    assert (report.anchors, report.anchored_seq, report.anchored_ms) == (2, LAST.seq, 7)
    assert report.unknown == [f"whether entries behind {LAST.seq} were cut off the end: the newest anchor that agrees is of that one"]


# One change, of any kind and at any place, to a log whose last head is anchored.
Change = Callable[[Any], Files]


def flipped(data: Any) -> Files:
    number, changed = data.draw(st.integers(0, len(WHOLE) - 1)), list(WHOLE)
    name, raw = changed[number]
    bit = data.draw(st.integers(0, 8 * len(raw) - 1))
    changed[number] = (name, raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :])
    return changed


def _with_lines(number: int, lines: Sequence[bytes]) -> Files:
    return [(name, b"".join(lines)) if each == number else (name, raw) for each, (name, raw) in enumerate(WHOLE)]


def _lines_of_a_file(data: Any) -> tuple[int, list[bytes]]:
    number = data.draw(st.integers(0, len(WHOLE) - 1))
    return number, split(WHOLE[number][1])


def removed(data: Any) -> Files:
    number, lines = _lines_of_a_file(data)
    del lines[data.draw(st.integers(0, len(lines) - 1))]
    return _with_lines(number, lines)


def swapped(data: Any) -> Files:
    number, lines = _lines_of_a_file(data)
    one, other = sorted(data.draw(st.sets(st.integers(0, len(lines) - 1), min_size=2, max_size=2)))
    lines[one], lines[other] = lines[other], lines[one]
    return _with_lines(number, lines)


def repeated(data: Any) -> Files:
    number, lines = _lines_of_a_file(data)
    copied = data.draw(st.sampled_from(LINES))
    lines.insert(data.draw(st.integers(0, len(lines))), _raw(copied))
    return _with_lines(number, lines)


def cut_off(data: Any) -> Files:
    number = data.draw(st.integers(0, len(WHOLE) - 1))
    name, raw = WHOLE[number]
    kept = raw[: data.draw(st.integers(0, len(raw) - 1))]
    return [(each, kept if each == name else content) for each, content in WHOLE]


def without_a_later_file(data: Any) -> Files:
    number = data.draw(st.integers(1, len(WHOLE) - 1))
    return WHOLE[:number] + WHOLE[number + 1 :]


def with_names_exchanged(data: Any) -> Files:
    one, other = sorted(data.draw(st.sets(st.integers(0, len(WHOLE) - 1), min_size=2, max_size=2)))
    changed = list(WHOLE)
    changed[one], changed[other] = (WHOLE[one][0], WHOLE[other][1]), (WHOLE[other][0], WHOLE[one][1])
    return changed


def inserted(data: Any) -> Files:
    number = data.draw(st.integers(0, len(WHOLE) - 1))
    name, raw = WHOLE[number]
    at = data.draw(st.integers(0, len(raw) - (number == len(WHOLE) - 1)))
    changed = list(WHOLE)
    changed[number] = (name, raw[:at] + data.draw(st.binary(min_size=1, max_size=40)) + raw[at:])
    return changed


def _raw(line: Line) -> bytes:
    return b'{"prev":"%s","hash":"%s","entry":%s}\n' % (line.prev.encode(), line.hash.encode(), line.entry)


@settings(max_examples=1000)
@given(
    st.sampled_from([flipped, removed, swapped, repeated, cut_off, without_a_later_file, with_names_exchanged, inserted]),
    st.data(),
)
def test_any_single_change_is_found(change: Change, data: Any) -> None:
    """Also when the files are put into the order of their entries first, as the command does."""
    changed = change(data)

    report = verify(sorted(changed, key=lambda each: _first_seq(each[1])), anchors=[anchor(LAST)])

    assert report.findings or changed == WHOLE


def _first_seq(raw: bytes) -> int:
    line = parse(raw.partition(b"\n")[0] + b"\n")
    return line.seq if line is not None else 1 << 60


@settings(max_examples=300)
@given(st.integers(0, len(LINES) - 1), st.data())
def test_without_the_key_nothing_can_be_rewritten_up_to_the_last_head(number: int, data: Any) -> None:
    """An entry is changed and every hash behind it computed anew; the heads stay, or are made with another key."""
    other = Ed25519PrivateKey.generate() if data.draw(st.booleans()) else None
    prev: list[str] = []

    def change(at: int, entry: bytes) -> bytes:
        if at == number:
            return entry.replace(b'"time_ms":17', b'"time_ms":16')
        if at > number and other is not None and LINES[at].event == "head":
            return head_entry(LINES[at].seq, LINES[at].time_ms, other.sign(signed_bytes(prev[-1], LINES[at].seq, LINES[at].time_ms)))
        return entry

    chain = Chain(Writer("", "", "", ""), KEY.sign, 1 << 40)
    for at, line in enumerate(LINES):
        prev.append(chain.place.hash)
        chain._put(change(at, line.entry))
    forged = b"".join(part.data for part in chain.take())

    report = verify([("all", forged)])

    assert "signature" in codes(report)


@pytest.mark.parametrize("number", [0, 1, len(LINES) - 2])
def test_an_entry_with_a_hash_of_its_own_again_is_found_at_the_next_line(number: int) -> None:
    """Every head still verifies, because each is as it was: only the link between the two lines is broken."""
    changed = LINES[number].entry.replace(b'"time_ms":17', b'"time_ms":16')
    forged = replace(LINES[number], entry=changed, hash=digest(LINES[number].prev, changed))
    lines = [*LINES[:number], forged, *LINES[number + 1 :]]

    report = verify([("all", b"".join(map(_raw, lines)))])

    assert "link" in codes(report)
    assert {finding.line for finding in report.findings if finding.code == "link"} == {number + 2}


def test_a_rewritten_log_whose_heads_were_cut_out_says_that_it_lacks_them() -> None:
    lines = lines_of(whole_log(every_ms=300, restarts=0))
    headless = [line for line in lines if line.event != "head"]
    data = rehashed(headless, lambda number, entry: entry.replace(b'"seq":%d,' % headless[number].seq, b'"seq":%d,' % (number + 1)))

    report = verify([("audit.jsonl", data)])

    assert codes(report) == {"unsigned"}
    assert report.unknown[0].startswith(f"the last {len(headless)} entries: no head is behind them")


def test_one_rewritten_within_its_last_second_is_not_found_and_that_is_said() -> None:
    chain = Chain(Writer("agent", "node0", RUN, LOG), KEY.sign, 1 << 20)
    chain.open(now_ms=T)
    chain.seal(now_ms=T)
    chain.append("verdict", {"id": "1"}, now_ms=T + 5)
    data = b"".join(part.data for part in chain.take())
    forged = rehashed(lines_of([("", data)]), lambda _number, entry: entry.replace(b'"id":"1"', b'"id":"2"'))

    report, anchored = verify([("a", forged)]), verify([("a", forged)], anchors=[anchor(lines_of([("", data)])[-1])])

    assert report.findings == []
    assert report.unknown[0] == "the last 1 entries: no head is behind them yet, so whoever may write the file may have changed them"
    assert codes(anchored) == {"anchor"}


@pytest.mark.parametrize(
    "spell",
    [
        lambda entry: entry.replace(b'"event":"head",', b'"event":"head","x":1,'),
        lambda entry: entry[:-1] + b" }",
        lambda entry: entry.replace(b'"time_ms":179', b'"time_ms":178'),
        lambda entry: entry.replace(b'=="}', b'="}'),
    ],
)
def test_nothing_of_a_last_head_is_free_to_be_changed(spell: Callable[[bytes], bytes]) -> None:
    """Its line is covered by no later one: its signature and its one spelling have to hold it."""
    forged = rehashed(LINES, lambda number, entry: spell(entry) if number == len(LINES) - 1 else entry)

    assert codes(verify([("all", forged)])) - {"beginning"} == {"signature"}


def test_bits_behind_the_last_byte_of_a_signature_are_not_free_either() -> None:
    digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def other_spelling(number: int, entry: bytes) -> bytes:
        if number < len(LINES) - 1:
            return entry
        at = len(entry) - 5
        return entry[:at] + bytes([digits[digits.index(entry[at]) + 1]]) + entry[at + 1 :]

    assert codes(verify([("all", rehashed(LINES, other_spelling))])) - {"beginning"} == {"signature"}


def test_another_key_is_found_at_the_first_head() -> None:
    report = verify(WHOLE, key=Ed25519PrivateKey.generate().public_key())

    assert codes(report) == {"signature"}
    assert (report.signed_seq, report.unsigned) == (0, LAST.seq)


def test_without_a_key_it_says_that_anybody_may_have_written_it() -> None:
    report = verify(WHOLE, key=None)

    assert report.findings == []
    assert report.unknown[0] == "who wrote it: no key was given, so anybody may have made the whole chain"


def test_files_that_were_taken_away_at_the_beginning_are_a_missing_prefix_and_no_finding() -> None:
    """Old files may be moved to an archive; then the rest still verifies."""
    report = verify(WHOLE[2:], anchors=[anchor(LINES[0]), anchor(LAST)])

    first = lines_of(WHOLE[2:])[0].seq
    assert report.findings == []
    assert report.unknown[0] == f"entries 1 to {first - 1}: they are in none of the files given"
    assert report.unknown[-1] == f"1 anchors of entries before {first}"


def test_what_was_cut_off_inside_the_first_file_is_a_finding() -> None:
    name, raw = WHOLE[0]

    report = verify([("copy", b"".join(split(raw)[2:])), *WHOLE[1:]])

    assert codes(report) == {"beginning"}
    assert name.endswith(".000000000001")


def test_what_was_cut_off_up_to_a_restart_is_a_finding() -> None:
    lines = lines_of(whole_log())
    second = next(line for line in lines[1:] if line.event == "open")

    report = verify([("copy", b"".join(_raw(line) for line in lines[second.seq - 1 :]))])

    assert codes(report) == {"beginning"}


def test_a_file_of_another_log_is_found() -> None:
    other = lines_of(whole_log(entries=2, restarts=0, node="node1"))

    report = verify([("a", b"".join(map(_raw, LINES))), ("b", b"".join(map(_raw, other)))])

    assert {"log", "order"} <= codes(report)


def test_a_torn_line_is_said_at_the_end_and_found_in_the_middle() -> None:
    torn = [(name, raw + b'{"prev":') if name == PATH.name else (name, raw) for name, raw in WHOLE]

    report = verify(torn, anchors=[anchor(LAST)])

    assert report.findings == []
    assert report.torn_bytes == 8
    assert "the last 8 bytes: a line that is being written, or was when its writer was killed" in report.unknown
    assert codes(verify([(WHOLE[0][0], WHOLE[0][1] + b"{"), *WHOLE[1:]])) == {"torn"}


def test_what_a_killed_writer_left_unsigned_is_covered_by_the_next_start() -> None:
    """Hours may lie between its last entry and that start."""
    chain = Chain(Writer("agent", "node0", RUN, LOG), KEY.sign, 1 << 20)
    chain.open(now_ms=T)
    chain.append("verdict", {"id": "1"}, now_ms=T + 1)
    first = b"".join(part.data for part in chain.take())
    again = Chain(Writer("agent", "node0", RUN, LOG), KEY.sign, 1 << 20, chain.place, 1, len(first))
    again.open(now_ms=T + 3_600_000, torn=b"{")
    again.seal(now_ms=T + 3_600_001)

    report = verify([("a", first + again.take()[0].data)])

    assert report.findings == []
    assert (report.starts, report.unsigned, report.adopted) == (2, 0, 2)


def test_what_somebody_else_wrote_while_the_writer_was_down_is_signed_by_its_next_start_and_that_is_said() -> None:
    """The writer goes on behind any line whose hash is right; that it had not written it shows in nothing but the missing head."""
    chain = Chain(Writer("agent", "node0", RUN, LOG), KEY.sign, 1 << 20)
    chain.open(now_ms=T)
    chain.append("verdict", {"id": "1"}, now_ms=T + 1)
    chain.seal(now_ms=T + 2)
    data = b"".join(part.data for part in chain.take())
    forger = Chain(Writer("agent", "node0", RUN, LOG), lambda _: b"", 1 << 20, chain.place, 1, len(data))
    for number in range(3):
        forger.open(now_ms=T + 3)
        forger.append("verdict", {"id": f"forged {number}"}, now_ms=T + 3)
    data += forger.take()[0].data
    again = Chain(Writer("agent", "node0", RUN, LOG), KEY.sign, 1 << 20, forger.place, 1, len(data))
    again.open(now_ms=T + 3_600_000)
    again.seal(now_ms=T + 3_600_001)

    report = verify([("a", data + again.take()[0].data)])

    assert (report.findings, report.unsigned, report.adopted) == ([], 0, 6)
    assert any(text.startswith("6 entries that stood without a head") for text in report.unknown)


def test_a_clock_that_jumps_is_counted_and_no_finding() -> None:
    chain = Chain(Writer("agent", "node0", RUN, LOG), KEY.sign, 1 << 20)
    chain.open(now_ms=T)
    for jump in (5, -3_600_000, 10, 7_200_000, 20):
        chain.append("verdict", {"id": "1"}, now_ms=T + jump)
    chain.seal(now_ms=T)

    report = verify([("a", b"".join(part.data for part in chain.take()))])

    assert report.findings == []
    assert report.clock_back == 3


def test_anchors_that_go_back_say_that_the_log_was_begun_anew() -> None:
    report = verify(WHOLE, anchors=[anchor(LINES[5]), anchor(LINES[2]), anchor(LAST)])

    assert codes(report) == {"anew"}


def test_an_anchor_behind_the_end_says_that_the_end_was_cut_off() -> None:
    report = verify(WHOLE[:-1], anchors=[anchor(LINES[2]), anchor(LAST)])

    assert codes(report) == {"cut"}
    assert report.findings[0].text == f"an anchor of node0 is of entry {LAST.seq}, and the log ends with {report.last_seq}: its end was cut off"


def test_a_full_file_ends_with_a_head() -> None:
    name, raw = WHOLE[0]
    lines = split(raw)

    assert verify([WHOLE[0]]).findings == []
    for kept in (b"".join(lines[:-1]), raw[:-1], b""):
        assert codes(verify([(name, kept)])) & {"end", "empty"}


def test_an_empty_log_is_a_finding_and_its_anchors_too() -> None:
    assert codes(verify([("a", b"")], anchors=[anchor(LAST)])) == {"empty", "cut"}


def test_an_anchor_of_an_entry_that_was_cut_out_is_found() -> None:
    lines = [raw for raw in map(_raw, LINES) if b'"seq":5,' not in raw]

    report = verify([("a", b"".join(lines))], anchors=[anchor(LINES[4]), anchor(LAST)])

    assert {"missing", "anchor"} <= codes(report)


def test_lines_without_end_and_lines_of_no_event_are_found_and_the_rest_is_read() -> None:
    long = b"x" * (3 * LINE_BYTES_MAX) + b"\n"

    report = verify([("a", b"".join([*map(_raw, LINES[:2]), long, *map(_raw, LINES[2:])]))])

    assert {"form"} <= codes(report)
    assert report.entries == len(LINES)
    unknown = rehashed(LINES[:2], lambda number, entry: entry.replace(b'"verdict"', b'"nothing"') if number == 1 else entry)
    assert codes(verify([("a", unknown)])) == {"form"}
    broken = rehashed(LINES[:2], lambda number, entry: entry[:-1] + b",}" if number == 1 else entry)
    assert codes(verify([("a", broken)])) == {"form"}


def test_findings_are_bounded() -> None:
    report = verify([("a", b"x\n" * (FINDINGS_MAX + 5))])

    assert len(report.findings) == FINDINGS_MAX
    assert report.findings_beyond == 6  # and that there is no entry


def test_without_msgspec_the_same_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """An auditor's machine may have no more than the cryptography package."""
    monkeypatch.setattr(verify_module, "_is_json", json.loads)
    broken = rehashed(LINES[:2], lambda number, entry: entry[:-1] + b",}" if number == 1 else entry)

    assert codes(verify([("a", broken)])) == {"form"}


def test_a_hundred_mebibytes_are_verified_in_constant_memory() -> None:
    """The same lines again and again would be found, so memory alone is looked at: no table grows with the log."""
    verification = Verification(PUBLIC)
    list(verification.lines([source("a", b"".join(map(_raw, LINES)))]))

    sizes = {name: len(value) for name, value in vars(verification).items() if isinstance(value, (list, dict, set))}
    assert sizes == {}
    assert {name: len(value) for name, value in vars(verification.report).items() if isinstance(value, list)} == {
        "files": 1, "findings": 3, "unknown": 1,
    }  # fmt: skip


# The command


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Files of an agent's log, a controller's log that anchors it, and their public keys."""
    for name, raw in WHOLE:
        (tmp_path / name).write_bytes(raw)
    controller = Ed25519PrivateKey.from_private_bytes(b"c" * 32)
    chain = Chain(Writer("controller", "c1", RUN, "c" * 16), controller.sign, SMALL)
    chain.open(now_ms=T)
    for line in (LINES[2], LINES[7], LAST):
        for node, own in (("node0", line.hash), ("node9", "0" * 64)):
            chain.append("anchor", {"node": node, "audit_seq": line.seq, "audit_hash": own}, now_ms=T + line.seq)
    chain.seal(now_ms=T + 99)
    data = b""
    for part in chain.take():
        if part.rotated:
            (tmp_path / f"controller.jsonl{part.rotated}").write_bytes(data)
            data = b""
        data += part.data
    (tmp_path / "controller.jsonl").write_bytes(data)
    for name, key in (("agent.pub", PUBLIC), ("controller.pub", controller.public_key())):
        (tmp_path / name).write_bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return tmp_path


def command(site: Path, *options: str, log: str = "audit.jsonl", key: str = "agent.pub") -> int:
    return main(["audit", "verify", *map(str, site.glob(f"{log}*")), "--key", str(site / key), *options])


def anchored(site: Path) -> list[str]:
    return ["--anchors", *map(str, site.glob("controller.jsonl*")), "--anchors-key", str(site / "controller.pub")]


def test_the_command_verifies_a_log_with_its_anchors(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(site, *anchored(site), "--output", "json") == 0

    report = json.loads(capsys.readouterr().out)
    assert (report["good"], report["name"], report["anchors"], report["anchored_seq"]) == (True, "node0", 3, LAST.seq)
    assert [(each["good"], each["name"], each["unsigned"]) for each in report["controllers"]] == [(True, "c1", 0)]
    assert command(site, *anchored(site)) == 0
    out = capsys.readouterr().out
    assert "agent node0: good\n" in out
    assert "controller c1: good\n" in out
    assert "3 anchors that agree" in out


def test_the_command_says_no_and_where(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = site / "audit.jsonl"
    path.write_bytes(path.read_bytes().replace(b"out_of_order", b"allowed_12345", 1))

    assert command(site) == 1

    out = capsys.readouterr().out
    assert "agent node0: NOT GOOD, 1 findings" in out
    assert f"finding[edited]: {path}:" in out


def test_the_command_finds_a_cut_that_only_the_controller_knows_of(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = site / "audit.jsonl"
    path.write_bytes(b"".join(split(path.read_bytes())[:1]))

    assert command(site) == 0  # and says that it cannot know
    assert "not known: whether entries were cut off the end" in capsys.readouterr().out
    assert command(site, *anchored(site)) == 1
    assert "finding[cut]" in capsys.readouterr().out


def test_the_command_finds_a_controllers_log_that_was_edited(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = site / "controller.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"node9"', b'"node8"', 1))

    assert command(site, *anchored(site)) == 1
    assert "controller c1: NOT GOOD" in capsys.readouterr().out
    assert command(site, log="controller.jsonl", key="controller.pub") == 1


def test_what_cannot_be_read_is_no_answer(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "verify", str(site / "nothing"), "--key", str(site / "agent.pub")]) == 3
    assert "error[audit.file]" in capsys.readouterr().err
    assert command(site, key="nothing.pub") == 3
    assert "error[audit.key]" in capsys.readouterr().err


def test_entries_are_shown(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = [str(path) for path in site.glob("audit.jsonl*")]

    assert main(["audit", "show", *logs, "--event", "verdict", "--last", "2", "--output", "json"]) == 0
    verdicts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [verdict["id"] for verdict in verdicts] == [f"{10:016x}", f"{11:016x}"]
    assert main(["audit", "show", *logs]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == LAST.seq
    assert 'verdict    id=0000000000000000 reason=out_of_order message="https GET images /"' in out
    assert main(["audit", "show", *logs, "--event", "outage"]) == 1


def test_files_are_put_into_the_order_of_their_entries(site: Path) -> None:
    paths = sorted(site.glob("audit.jsonl*"), reverse=True)
    (site / "audit.jsonl.empty").write_bytes(b"")

    ordered = audit_files.in_order([site / "audit.jsonl.empty", *paths])

    assert [path.name for path in ordered] == [*(name for name, _ in WHOLE), "audit.jsonl.empty"]


def test_a_file_that_grows_is_read_up_to_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_bytes(b"".join(map(_raw, LINES[:4])))
    read = next(iter(sources := audit_files.sources([path])))
    with path.open("ab") as file:
        file.write(_raw(LINES[4])[:50])

    lines = []
    while raw := read.read_line(LINE_BYTES_MAX):
        lines.append(raw)

    assert b"".join(lines) == b"".join(map(_raw, LINES[:4]))
    assert list(sources) == []


def test_anchors_of_two_controllers_are_merged(tmp_path: Path) -> None:
    for number, chosen in enumerate([LINES[0:12:2], LINES[1:12:2]]):
        chain = Chain(Writer("controller", f"c{number}", RUN, f"{number}" * 16), KEY.sign, 1 << 20)
        chain.open(now_ms=T)
        for line in chosen:
            chain.append("anchor", {"node": "node0", "audit_seq": line.seq, "audit_hash": line.hash}, now_ms=T)
        chain.seal(now_ms=T)
        (tmp_path / f"c{number}").write_bytes(chain.take()[0].data)
    anchors = audit_files.Anchors(sorted(tmp_path.iterdir()), "node0", PUBLIC)

    places = [each.place for each in anchors]

    assert places == [Place(line.seq, line.hash) for line in LINES[:12]]
    assert [report.is_good for report in anchors.reports] == [True, True]


def test_it_is_fast() -> None:
    """A bound that a slow machine keeps: verification of a day's log must not take a day."""
    data = b"".join(map(_raw, lines_of(whole_log(entries=20_000, restarts=0, every_ms=1, bytes_max=1 << 30))))
    began = time.process_time()  # its own: who else wants the processor says nothing of it

    report = verify([("a", data)])

    assert report.findings == []
    assert len(data) / (time.process_time() - began) > 2 * 1024 * 1024
