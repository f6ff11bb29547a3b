"""A chain in files: found again at the start, written in batches, made durable by a stated policy, healed after a failure.

Nothing here runs by itself: a writer calls `flush` when `due_ms` says so. Files are never deleted. The current one is PATH; one
that is full is PATH with the number of its first entry behind it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kalium.audit.chain import HEAD_MS, LINE_BYTES_MAX, Chain, Line, Part, Place, Sign, Writer, parse
from kalium.errors import KaliumError

FSYNC = ("always", "interval", "never")
SYNC_MS = 1000  # of `interval`: the longest that written lines wait
RETRY_MS = 1000  # after a failure
UNSYNCED_BYTES_MAX = 4 * 1024 * 1024  # they are kept in memory, so that many are made durable earlier
TORN_BYTES_MAX = 2 * 1024 * 1024  # a batch is smaller, so more than this without a line feed is no torn line of ours


class LogFile:
    """One open file. Everything that can fail on a disk goes through it."""

    def __init__(self, path: Path) -> None:
        """Open or create `path`, and lock it: two writers would make two chains. Raises OSError."""
        self._handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o640)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._handle)
            raise OSError(error.errno, "another process writes it") from error
        if not stat.S_ISREG(os.fstat(self._handle).st_mode):
            os.close(self._handle)
            raise OSError(errno.EINVAL, "it is no regular file")

    @property
    def size(self) -> int:
        """In bytes."""
        return os.fstat(self._handle).st_size

    def read(self, count: int, offset: int) -> bytes:
        """`count` bytes from `offset` on, fewer at the end."""
        return os.pread(self._handle, count, offset)

    def write(self, data: bytes) -> None:
        """Append all of `data`; after an error a part of it may be there."""
        view = memoryview(data)
        while view:
            view = view[os.write(self._handle, view) :]

    def truncate(self, size: int) -> None:
        """Cut what is behind `size` off."""
        os.ftruncate(self._handle, size)

    def sync(self) -> None:
        """Wait until what was written survives a power cut."""
        os.fdatasync(self._handle)

    def is_at(self, path: Path) -> bool:
        """Whether `path` leads here."""
        mine, there = os.fstat(self._handle), path.lstat()
        return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)

    def close(self) -> None:
        """Release it."""
        os.close(self._handle)


@dataclass(frozen=True)
class Found:
    """What an earlier run has left in a file: its first and last whole line, and the half one behind."""

    first: Line
    last: Line
    whole_bytes: int
    torn: bytes


def read_ends(read: Callable[[int, int], bytes], size: int) -> Found | bytes:
    """The ends of a file of `size` bytes; only the torn bytes when there is no whole line.

    Raises ValueError when the first or the last line is none of ours, or does not verify by itself.
    """
    tail_bytes = min(size, TORN_BYTES_MAX + LINE_BYTES_MAX)
    tail = read(tail_bytes, size - tail_bytes)
    whole, feed, torn = tail.rpartition(b"\n")
    if len(torn) > TORN_BYTES_MAX or (not feed and tail_bytes < size):
        raise ValueError(f"it ends in more than {TORN_BYTES_MAX} bytes without a line feed")
    if not feed:
        return torn
    last = parse(whole[whole.rfind(b"\n") + 1 :] + b"\n")
    if last is None or not last.has_its_hash:
        raise ValueError("its last line does not verify")
    first = parse(read(min(size, LINE_BYTES_MAX), 0).partition(b"\n")[0] + b"\n")
    if first is None or not first.has_its_hash or first.event != "open":
        raise ValueError("its first line is no entry `open` that verifies")
    return Found(first, last, size - len(torn), torn)


class Disk:
    """The file system as a journal uses it; tests put failures in its place."""

    def open(self, path: Path) -> LogFile:
        """Open or create a file."""
        return LogFile(path)

    def newest_rotated(self, path: Path) -> Path | None:
        """The file that was full before `path`."""
        name = re.compile(re.escape(path.name) + r"\.\d{12,18}")
        return max((each for each in path.parent.iterdir() if name.fullmatch(each.name)), key=lambda each: int(each.suffix[1:]), default=None)

    def ends(self, path: Path) -> Found | bytes:
        """As read_ends, of a file that nobody writes any more."""
        with path.open("rb") as file:
            return read_ends(lambda count, offset: os.pread(file.fileno(), count, offset), path.stat().st_size)

    def rename(self, path: Path, target: Path) -> None:
        """Give a file a name that is not taken. Raises OSError."""
        if target.exists():  # only the writer, which holds the lock, makes such names
            raise FileExistsError(errno.EEXIST, f"{target.name} is there already")
        path.rename(target)

    def sync_folder(self, folder: Path) -> None:
        """Make the names in a folder durable."""
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Journal:
    """One writer's files. Not shared between threads; only the chain may be, locked also around `flush_begin` and `due_ms`."""

    def __init__(
        self, path: Path, sign: Sign, *, writer: str, name: str, fsync: str, bytes_max: int, now_ms: int, disk: Disk | None = None, run: str = ""
    ) -> None:
        """Find the chain, or begin one. Raises KaliumError audit.log when it cannot be continued; nothing is changed then."""
        assert fsync in FSYNC, fsync
        self.path = path
        self._fsync = fsync
        self._disk = disk or Disk()
        try:
            self._file = self._disk.open(path)
            try:
                self.chain, torn, self._size = self._continued(sign, writer, name, run or secrets.token_hex(8), bytes_max)
                if torn:
                    self._file.truncate(self._size)
                if fsync != "never":
                    # What a writer that was killed had written may not be on the disk yet, and is not in our memory.
                    self._file.sync()
                    self._disk.sync_folder(path.parent)
            except BaseException:
                self._file.close()
                raise
        except (OSError, ValueError) as error:
            raise KaliumError(
                "audit.log", f"cannot continue the audit log {path}", getattr(error, "strerror", None) or str(error),
                f"see what happened to it: `kalium audit verify {path}* --key PUB`; then move those files away, and a new log begins",
            ) from error  # fmt: skip
        self._synced = self._size  # bytes that survive a power cut
        self._unsynced: list[bytes] = []  # what was written behind them
        self._backlog: list[Part] = []  # taken from the chain, not written
        self._is_torn = False  # a write has failed: a part of it may be there
        self._is_unsure = False  # a sync has failed: what was written since the last one may be lost
        self._is_placed = True  # the name of the file is durable
        self._unsynced_ms: int | None = None  # since when something waits to be synced
        self._retry_ms: int | None = None
        self._written = self.durable = self.chain.place  # durable: the last entry that is there for good, as far as `fsync` goes
        self.chain.open(now_ms=now_ms, torn=torn)

    def _continued(self, sign: Sign, writer: str, name: str, run: str, bytes_max: int) -> tuple[Chain, bytes, int]:
        """The chain behind what is in the files, the torn line of the current one, and the bytes of its whole lines."""
        found = read_ends(self._file.read, self._file.size)
        if isinstance(found, Found):
            who = Writer(writer, name, run, _log_of(found.first))
            return Chain(sign=sign, who=who, bytes_max=bytes_max, place=Place(found.last.seq, found.last.hash), file_seq=found.first.seq,
                         file_bytes=found.whole_bytes), found.torn, found.whole_bytes  # fmt: skip
        place, log = Place(), secrets.token_hex(8)
        before = self._disk.newest_rotated(self.path)
        if before is not None:
            older = self._disk.ends(before)
            if not isinstance(older, Found) or older.torn:
                raise ValueError(f"{before.name}, the file before it, is not whole")
            place, log = Place(older.last.seq, older.last.hash), _log_of(older.first)
        return Chain(sign=sign, who=Writer(writer, name, run, log), bytes_max=bytes_max, place=place), found, 0

    def due_ms(self, *, now_ms: int) -> int | None:
        """In how many milliseconds `flush` has work without new entries; None: never."""
        if self._retry_ms is not None:
            return max(0, min(RETRY_MS, self._retry_ms - now_ms))
        waits = []
        if self.chain.unsigned_ms is not None:
            waits.append(0 if self.chain.is_head_due(now_ms=now_ms) else self.chain.unsigned_ms + HEAD_MS - now_ms)
        if self._unsynced_ms is not None:
            waits.append(max(0, min(SYNC_MS, self._unsynced_ms + SYNC_MS - now_ms)))
        return min(waits, default=None)

    def flush_begin(self, *, now_ms: int, is_last: bool = False, is_moved: bool = False) -> Place:
        """Take what the chain has, with a head when one is due; `flush_end` writes it. Returns the place that will be written."""
        if is_moved and not any(part.rotated for part in self._backlog):
            self.chain.start_file(now_ms=now_ms)
        if is_last or self.chain.is_head_due(now_ms=now_ms):
            self.chain.seal(now_ms=now_ms)
        self._backlog += self.chain.take()
        return self.chain.place

    def flush_end(self, place: Place, *, now_ms: int, is_last: bool = False) -> None:
        """Write and sync what is due. Raises OSError; then nothing is lost, and the next flush goes on from there."""
        try:
            self._write(place, now_ms, is_last=is_last)
        except OSError:
            self.failed(now_ms=now_ms)
            raise
        self._retry_ms = None

    def failed(self, *, now_ms: int) -> None:
        """Let the next flush be due a while later."""
        self._retry_ms = now_ms + RETRY_MS

    def _write(self, place: Place, now_ms: int, *, is_last: bool) -> None:
        self._repair()
        while self._backlog:
            part = self._backlog[0]
            if part.rotated:
                self._rotate(part.rotated)
                part = self._backlog[0] = Part(part.data)
            self._is_torn = True
            self._file.write(part.data)
            self._is_torn = False
            self._backlog.pop(0)
            self._size += len(part.data)
            if self._fsync != "never":
                self._unsynced.append(part.data)
                if self._unsynced_ms is None:
                    self._unsynced_ms = now_ms
        self._written = place
        if self._fsync == "never":
            self.durable = place
        elif self._unsynced_ms is not None and (is_last or self._is_sync_due(now_ms)):
            self._sync()

    def close(self) -> None:
        """Release the file."""
        self._file.close()

    @property
    def unwritten_bytes(self) -> int:
        """Of entries that are in no file yet."""
        return sum(len(part.data) for part in self._backlog)

    def is_moved(self) -> bool:
        """Whether somebody has moved or removed the current file, so that a new one has to be begun."""
        try:
            return not self._file.is_at(self.path)
        except FileNotFoundError:
            return True

    def _is_sync_due(self, now_ms: int) -> bool:
        assert self._unsynced_ms is not None
        return (
            self._fsync == "always"
            or not 0 <= now_ms - self._unsynced_ms < SYNC_MS
            or self._size - self._synced >= UNSYNCED_BYTES_MAX
        )  # fmt: skip

    def _repair(self) -> None:
        """Bring the file into the state that the last success left.

        After a failed sync Linux calls pages clean that never reached the disk, so that a second sync would succeed and prove
        nothing: what was not synced is written again.
        """
        if self._is_torn:
            self._file.truncate(self._size)
            self._is_torn = False
        if self._is_unsure:
            self._file.truncate(self._synced)
            self._size = self._synced
            self._is_torn = True
            self._file.write(b"".join(self._unsynced))
            self._is_torn = False
            self._size += sum(map(len, self._unsynced))
            self._sync()

    def _sync(self) -> None:
        self._is_unsure = True
        self._file.sync()
        if not self._is_placed:
            self._disk.sync_folder(self.path.parent)
            self._is_placed = True
        self._is_unsure = False
        self._synced = self._size
        self._unsynced.clear()
        self._unsynced_ms = None
        self.durable = self._written

    def _rotate(self, behind: str) -> None:
        """Go on in a new file. Cut off in between, the next start finds the chain in the file that has been renamed."""
        if self._fsync != "never":
            self._sync()
        if not self.is_moved():
            self._disk.rename(self.path, self.path.with_name(self.path.name + behind))
        file = self._disk.open(self.path)
        if file.size:
            file.close()
            raise OSError(0, "a file that another process has begun is in its place")
        self._file.close()
        self._file = file
        self._size = self._synced = 0
        self._is_placed = False


def _log_of(first: Line) -> str:
    """Which log a file belongs to."""
    try:
        log = first.fields()["log"]
    except (ValueError, KeyError) as error:
        raise ValueError("its first line names no log") from error
    if not isinstance(log, str) or not re.fullmatch(r"[0-9a-f]{16}", log):
        raise ValueError("its first line names no log")
    return log
