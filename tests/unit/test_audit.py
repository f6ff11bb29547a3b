"""Audit logs as they are written: the lines, the files, what survives a failure, and how much one source may put on record."""

from __future__ import annotations

import base64
import hashlib
import importlib
import itertools
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from audit_world import KEY, PATH, PUBLIC, RUN, MemoryDisk, Run, T, codes, lines_of, source
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import given, settings
from hypothesis import strategies as st

from kalium.audit.chain import ENTRY_BYTES_MAX, LINE_BYTES_MAX, Chain, Place, Writer, parse
from kalium.audit.journal import RETRY_MS, SYNC_MS, TORN_BYTES_MAX, UNSYNCED_BYTES_MAX, Disk, Found, Journal, LogFile, read_ends
from kalium.audit.keys import private_key, public_key
from kalium.audit.rate import Rate
from kalium.audit.verify import Verification
from kalium.audit.writer import PENDING_BYTES_MAX, AuditWriter
from kalium.errors import KaliumError

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
WAIT_S = 20.0


def until(claim: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not claim():
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s in vain for {what}"
        time.sleep(0.005)


def test_the_vectors_are_what_their_generator_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(VECTORS))
    generator = importlib.import_module("generate_audit")
    monkeypatch.setattr(generator, "FOLDER", tmp_path)

    generator.main()

    sys.modules.pop("generate_audit")
    for name in ("written.json", "found.json"):
        assert (tmp_path / name).read_bytes() == (VECTORS / "audit" / name).read_bytes()


def test_a_line_is_what_the_specification_says() -> None:
    """By hand, because the vectors come from the code that they are held against."""
    chain = Chain(Writer("agent", "n", "r", "l"), KEY.sign, 1 << 20)

    chain.append("verdict", {"id": "x"}, now_ms=5)
    chain.seal(now_ms=6)

    line, head = chain.take()[0].data.decode().splitlines()
    entry = '{"seq":1,"time_ms":5,"event":"verdict","id":"x"}'
    own = hashlib.sha256(("0" * 64 + "\n" + entry).encode()).hexdigest()
    assert line == f'{{"prev":"{"0" * 64}","hash":"{own}","entry":{entry}}}'
    fields = json.loads(head)["entry"]
    PUBLIC.verify(base64.b64decode(fields.pop("signature")), f"kalium-audit/v1\n{own}\n2\n6".encode())
    assert fields == {"seq": 2, "time_ms": 6, "event": "head"}


@pytest.mark.parametrize("case", json.loads((VECTORS / "audit" / "found.json").read_text()), ids=lambda case: str(case["name"]))
def test_the_ends_of_a_file(case: dict[str, Any]) -> None:
    data = case["data"].encode("latin-1")

    def read(count: int, offset: int) -> bytes:
        return bytes(data[offset : offset + count])

    if "error" in case:
        with pytest.raises(KaliumError, match="line"):
            Run(disk_with(data))
    elif case["whole_bytes"] == 0:
        assert read_ends(read, len(data)) == data
    else:
        found = read_ends(read, len(data))
        assert isinstance(found, Found)
        assert (found.last.seq, found.last.hash, found.first.seq) == (case["seq"], case["hash"], case["first_seq"])
        assert (found.whole_bytes, len(found.torn), found.first.fields()["log"]) == (case["whole_bytes"], case["torn_bytes"], case["log"])


def disk_with(data: bytes) -> MemoryDisk:
    disk = MemoryDisk()
    file = disk.open(PATH)
    file.write(data)
    return disk


@pytest.mark.parametrize("size", [TORN_BYTES_MAX, TORN_BYTES_MAX + 1, TORN_BYTES_MAX + LINE_BYTES_MAX + 1])
def test_a_tail_without_a_line_feed_is_no_torn_line_when_it_is_too_long(size: int) -> None:
    def read(count: int, offset: int) -> bytes:
        return b"\0" * count

    if size == TORN_BYTES_MAX:
        assert read_ends(read, size) == b"\0" * size
    else:
        with pytest.raises(ValueError, match="without a line feed"):
            read_ends(read, size)


def test_an_entry_that_is_too_long_adds_nothing() -> None:
    chain = Chain(Writer("agent", "n", "r", "l"), KEY.sign, 1 << 20)

    with pytest.raises(ValueError, match="at most"):
        chain.append("verdict", {"message": "x" * ENTRY_BYTES_MAX}, now_ms=0)

    assert (chain.waiting, chain.place) == (0, Place())


OPERATIONS = st.one_of(
    st.tuples(st.just("add"), st.integers(0, 8)),
    st.tuples(st.just("wait"), st.integers(-500, 1500)),
    st.tuples(st.just("flush"), st.just(0)),
    st.tuples(st.just("break"), st.sampled_from(["write", "truncate", "sync", "rename", "open"])),
    st.tuples(st.just("mend"), st.just(0)),
    st.tuples(st.just("kill"), st.just(0)),
    st.tuples(st.just("power"), st.integers(0, 2000)),
)


@settings(max_examples=200)
@given(st.sampled_from(["always", "interval", "never"]), st.lists(OPERATIONS, max_size=30))
def test_no_durable_entry_is_lost_and_the_log_verifies(fsync: str, operations: list[tuple[str, Any]]) -> None:
    """Whatever fails, and whenever the writer or the machine ends."""
    disk = MemoryDisk()
    run = Run(disk, fsync=fsync, bytes_max=3000)
    durable: set[Place] = set()
    for operation, amount in operations:
        durable.add(run.journal.durable)
        if operation == "add":
            run.add(amount)
        elif operation == "wait":
            run.now_ms += amount
        elif operation == "flush":
            run.flush()
        elif operation == "break":
            disk.broken = amount
        elif operation == "mend":
            disk.broken = ""
        elif operation == "kill":
            disk.kill()
            run = Run(disk, fsync=fsync, bytes_max=3000, now_ms=run.now_ms)
        elif operation == "power" and fsync != "never":
            disk.cut_power(amount)
            run = Run(disk, fsync=fsync, bytes_max=3000, now_ms=run.now_ms)
    disk.broken = ""

    assert run.flush(is_last=True)

    report = Verification(PUBLIC).run(disk.sources())
    assert report.findings == []
    assert (report.unsigned, report.torn_bytes, report.last_seq) == (0, 0, run.journal.chain.place.seq)
    there = {Place(line.seq, line.hash) for line in lines_of((str(name), file.data) for name, file in disk.names.items())}
    assert durable - {Place()} <= there
    assert run.journal.durable == run.journal.chain.place


@pytest.mark.parametrize(("fsync", "expected"), [("always", [True, True, True]), ("interval", [False, True, True]), ("never", [False, False, False])])
def test_what_is_synced_when(fsync: str, expected: list[bool]) -> None:
    """Behind each batch; at most a second later; never."""
    disk = MemoryDisk()
    run = Run(disk, fsync=fsync)
    synced = []

    def flush(at_ms: int, *, is_last: bool = False) -> None:
        disk.done.clear()
        run.now_ms = T + at_ms
        run.add()
        assert run.flush(is_last=is_last)
        synced.append("sync" in disk.done)

    flush(0)
    if fsync == "interval":
        flush(SYNC_MS - 1)
        assert synced.pop() is False
        assert run.journal.due_ms(now_ms=run.now_ms) == 1
    flush(SYNC_MS)
    flush(SYNC_MS + 1, is_last=True)

    assert synced == expected


def test_many_bytes_are_synced_earlier() -> None:
    run = Run(MemoryDisk(), fsync="interval", bytes_max=1 << 40)
    while run.journal._size < UNSYNCED_BYTES_MAX:
        run.add(2000)
        assert run.flush()

    assert run.journal._unsynced == []
    assert run.journal._synced == run.journal._size


def test_a_full_file_is_durable_before_the_next_one_is_begun() -> None:
    """The next sync is of the new file alone."""
    disk = MemoryDisk()
    run = Run(disk, fsync="interval", bytes_max=3000)
    run.add(20)

    assert run.flush(is_last=True)

    disk.cut_power(0)
    report = Verification(PUBLIC).run(disk.sources())
    assert report.findings == []
    assert len(report.files) > 2
    assert report.last_seq == run.journal.chain.place.seq


def test_after_a_failed_sync_everything_is_written_again() -> None:
    """Linux calls the pages clean: a second sync alone would succeed and prove nothing."""
    disk = MemoryDisk()
    run = Run(disk)
    run.add(3)
    disk.broken = "sync"
    assert not run.flush()
    place = run.journal.chain.place
    assert run.journal.durable == Place()
    disk.broken = ""

    assert run.flush()

    assert run.journal.durable == place
    disk.cut_power(0)
    assert [line.seq for line in lines_of([("", disk.names[PATH].data)])] == [1, 2, 3, 4]


def test_a_failed_flush_is_due_again_later() -> None:
    disk = MemoryDisk()
    run = Run(disk)
    disk.broken = "write"

    assert not run.flush()

    assert run.journal.due_ms(now_ms=T) == RETRY_MS
    assert run.journal.due_ms(now_ms=T + RETRY_MS + 5) == 0
    assert run.journal.due_ms(now_ms=T - 3_600_000) == RETRY_MS  # the clock went back


@pytest.mark.parametrize(
    ("current", "rotated", "found"),
    [
        (lambda whole: whole.replace(b'"head"', b'"hEad"'), None, "last line"),
        (lambda whole: b"hello\n", None, "last line"),
        (lambda whole: b"", lambda whole: whole[:-1], "not whole"),
        (lambda whole: b"", lambda whole: b"x", "not whole"),
        (lambda whole: b"", lambda whole: whole.replace(b'"open"', b'"oPen"'), "first line"),
    ],
)
def test_a_chain_that_cannot_be_continued_is_refused(tmp_path: Path, current: Any, rotated: Any, found: str) -> None:
    """And nothing is changed: the file is what a person has to look at."""
    disk = MemoryDisk()
    assert Run(disk).flush(is_last=True)
    whole = disk.names[PATH].data
    path = tmp_path / "audit.jsonl"
    path.write_bytes(current(whole))
    if rotated is not None:
        (tmp_path / "audit.jsonl.000000000001").write_bytes(rotated(whole))

    with pytest.raises(KaliumError, match=found) as refused:
        Journal(path, KEY.sign, writer="agent", name="n", fsync="always", bytes_max=1 << 20, now_ms=T)

    assert refused.value.code == "audit.log"
    assert "kalium audit verify" in refused.value.next_step
    assert path.read_bytes() == current(whole)


def test_two_writers_do_not_share_a_log(tmp_path: Path) -> None:
    first = LogFile(tmp_path / "audit.jsonl")

    with pytest.raises(KaliumError, match="another process writes it"):
        Journal(tmp_path / "audit.jsonl", KEY.sign, writer="agent", name="n", fsync="always", bytes_max=1 << 20, now_ms=T)

    first.close()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")

    for path in (tmp_path / "link", Path("/dev/null"), tmp_path):
        with pytest.raises(OSError, match=r"symbolic|regular|directory"):
            LogFile(path)


class FullDisk(Disk):
    """A real disk on which a write finds room for a part alone while `is_full`."""

    is_full = False

    def open(self, path: Path) -> LogFile:
        disk = self

        class File(LogFile):
            def write(self, data: bytes) -> None:
                if disk.is_full:
                    super().write(data[: len(data) // 3])
                    raise OSError(28, "No space left on device")
                super().write(data)

        return File(path)


class Watched:
    """A writer on a real disk, and what it has said."""

    def __init__(self, path: Path, disk: Disk | None = None) -> None:
        self.path = path
        self.failures: list[OSError] = []
        self.well: list[int] = []
        now_ms = time.time_ns() // 1_000_000
        journal = Journal(path, KEY.sign, writer="controller", name="c", run=RUN, fsync="interval", bytes_max=1 << 30, now_ms=now_ms, disk=disk)
        self.writer = AuditWriter(journal, on_failed=self.failures.append, on_well=self.well.append, batch_s=0.002)

    def events(self) -> list[str]:
        report = Verification(PUBLIC)
        events = [line.event for line in report.lines([source(self.path.name, self.path.read_bytes())])]
        assert report.report.findings == []
        return events


def test_many_threads_make_one_log(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "audit.jsonl")
    threads = [threading.Thread(target=lambda: [watched.writer.record("step", {"reason": "x"}) for _ in range(300)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert watched.writer.close() == 0

    events = watched.events()
    assert (events.count("step"), events[-1], watched.writer.durable.seq) == (1200, "head", len(events))
    assert not watched.writer.healthy


def test_a_head_follows_without_further_entries(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "audit.jsonl")

    until(lambda: b'"event":"head"' in watched.path.read_bytes(), "a head")

    watched.writer.close()
    assert watched.events() == ["open", "head"]


def test_a_full_disk_is_said_once_and_loses_only_what_found_no_room(tmp_path: Path) -> None:
    disk = FullDisk()
    watched = Watched(tmp_path / "audit.jsonl", disk)
    disk.is_full = True
    assert watched.writer.record("step", {"reason": "kept"})
    until(lambda: not watched.writer.healthy, "the failure")
    taken = 0
    while watched.writer.record("step", {"reason": "x" * 10_000}):
        taken += 1
        assert taken < PENDING_BYTES_MAX
    assert not watched.writer.record("step", {"reason": "lost"})

    disk.is_full = False

    until(lambda: watched.well, "the recovery")
    watched.writer.close()
    events = watched.events()
    assert (events.count("step"), len(watched.failures), watched.well) == (taken + 1, 1, [2])


def test_what_a_slow_disk_has_no_room_for_is_said_and_nothing_is_healthy_meanwhile(tmp_path: Path) -> None:
    """It fails at nothing, so that no failure says that entries were lost."""
    moving = threading.Event()
    moving.set()

    class SlowDisk(Disk):
        def open(self, path: Path) -> LogFile:
            class File(LogFile):
                def write(self, data: bytes) -> None:
                    moving.wait()
                    super().write(data)

            return File(path)

    watched = Watched(tmp_path / "audit.jsonl", SlowDisk())
    moving.clear()
    while watched.writer.record("step", {"reason": "x" * 10_000}):
        pass
    assert not watched.writer.healthy

    moving.set()

    until(lambda: watched.well, "the word of what was lost")
    assert (watched.well, watched.failures, watched.writer.healthy) == ([1], [], True)
    watched.writer.close()


def test_a_disk_that_is_full_from_the_start_is_no_error_but_nothing_is_healthy(tmp_path: Path) -> None:
    disk = FullDisk()
    disk.is_full = True

    watched = Watched(tmp_path / "audit.jsonl", disk)

    assert not watched.writer.healthy
    assert watched.writer.close() > 0


def test_a_file_that_was_moved_away_is_followed_by_a_new_one(tmp_path: Path) -> None:
    watched = Watched(tmp_path / "audit.jsonl")
    moved = tmp_path / "audit.jsonl.000000000001"
    watched.path.rename(moved)

    watched.writer.record("step", {"reason": "x"})

    until(watched.path.exists, "the new file")
    watched.writer.close()
    lines = lines_of([("", moved.read_bytes()), ("", watched.path.read_bytes())])
    assert [line.seq for line in lines] == list(range(1, len(lines) + 1))
    assert all(after.prev == before.hash for before, after in itertools.pairwise(lines))


def test_one_source_cannot_put_more_on_record_than_its_allowance() -> None:
    rate = Rate(per_second=100, burst=1000)

    admitted = sum(rate.admits("a", "unknown_peer", now_ms=0) for _ in range(5000))
    assert rate.admits("b", "unknown_peer", now_ms=0)
    later = sum(rate.admits("a", "out_of_order", now_ms=1000) for _ in range(500))

    assert (admitted, later) == (1000, 100)
    assert rate.suppressed(now_ms=1000) == [("a", {"out_of_order": 400, "unknown_peer": 4000})]
    assert rate.suppressed(now_ms=1999) == []
    assert not rate.admits("a", "x", now_ms=1000)
    assert rate.suppressed(now_ms=2000) == [("a", {"x": 1})]


def test_sources_beyond_the_bound_share_one_allowance_and_quiet_ones_are_forgotten() -> None:
    rate = Rate(per_second=100, burst=10, sources_max=2)
    assert all(rate.admits(source, "x", now_ms=0) for source in ("a", "b"))

    admitted = sum(rate.admits(f"c{number}", "x", now_ms=0) for number in range(30))

    assert admitted == 10
    assert rate.suppressed(now_ms=0) == [("", {"x": 20})]
    assert rate.suppressed(now_ms=1000) == []
    assert rate._sources == {}


def test_keys_are_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    assert private_key(path).sign(b"x") == KEY.sign(b"x")
    with pytest.raises(KaliumError, match="not a public key"):
        public_key(path)
    path.write_bytes(PUBLIC.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    assert public_key(path) == PUBLIC
    with pytest.raises(KaliumError, match="not an unencrypted private key"):
        private_key(path)
    with pytest.raises(KaliumError, match="No such file"):
        private_key(tmp_path / "nothing")


def test_lines_of_nobody_are_no_lines() -> None:
    chain = Chain(Writer("agent", "n", "r", "l"), KEY.sign, 1 << 20)
    chain.append("verdict", {"id": "x"}, now_ms=5)
    raw = chain.take()[0].data

    assert parse(raw) is not None
    for changed in (
        raw[:-1],
        raw + b"\n",
        b" " + raw,
        raw.replace(b'"seq":1', b'"seq":01'),
        raw.replace(b"verdict", b"Verdict"),
        raw[:70] + raw[71:],
    ):
        assert parse(changed) is None


def test_codes_of_nothing() -> None:
    assert codes(Verification(PUBLIC).run([])) == {"empty"}
