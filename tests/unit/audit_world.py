"""A disk in memory on which everything may fail, and logs that stand on it or in text."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from kalium.audit.chain import Chain, Line, Place, Writer, parse
from kalium.audit.journal import Disk, Found, Journal, LogFile, read_ends
from kalium.audit.verify import Anchor, Report, Source, Verification

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = KEY.public_key()
RUN = "00f1e2d3c4b5a697"
LOG = "fedcba9876543210"
T = 1_790_000_000_000
PATH = Path("/log/audit.jsonl")
FULL = OSError(errno.ENOSPC, "No space left on device")


class MemoryFile(LogFile):
    """Bytes that have been written, and those of them that survive a power cut."""

    def __init__(self, disk: MemoryDisk) -> None:
        self.disk = disk
        self.data = b""
        self.on_disk = b""
        self.dirty = b""

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, count: int, offset: int) -> bytes:
        return self.data[offset : offset + count]

    def write(self, data: bytes) -> None:
        try:
            self.disk.may("write")
        except OSError:
            self.data, self.dirty = self.data + data[: len(data) // 2], self.dirty + data[: len(data) // 2]
            raise
        self.data, self.dirty = self.data + data, self.dirty + data

    def truncate(self, size: int) -> None:
        self.disk.may("truncate")
        cut = len(self.data) - size
        self.data, self.on_disk, self.dirty = self.data[:size], self.on_disk[:size], self.dirty[: max(0, len(self.dirty) - cut)]

    def sync(self) -> None:
        """A sync that fails leaves nothing behind for the next one, as Linux does."""
        try:
            self.disk.may("sync")
            if len(self.on_disk) + len(self.dirty) == len(self.data):
                self.on_disk = self.data
        finally:
            self.dirty = b""

    def is_at(self, path: Path) -> bool:
        return self.disk.names.get(path) is self

    def close(self) -> None:
        pass


class MemoryDisk(Disk):
    """`broken` is the operation that fails, "" for none."""

    def __init__(self) -> None:
        self.names: dict[Path, MemoryFile] = {}
        self.durable: dict[Path, MemoryFile] = {}
        self.broken = ""
        self.done: list[str] = []

    def may(self, operation: str) -> None:
        self.done.append(operation)
        if operation == self.broken:
            raise FULL

    def open(self, path: Path) -> LogFile:
        self.may("open")
        return self.names.setdefault(path, MemoryFile(self))

    def newest_rotated(self, path: Path) -> Path | None:
        return max((name for name in self.names if name != path), default=None)

    def ends(self, path: Path) -> Found | bytes:
        return read_ends(self.names[path].read, self.names[path].size)

    def rename(self, path: Path, target: Path) -> None:
        self.may("rename")
        assert target not in self.names
        self.names[target] = self.names.pop(path)

    def sync_folder(self, folder: Path) -> None:
        self.may("sync")
        self.durable = dict(self.names)

    def kill(self) -> None:
        """The writer is gone. What it had written gets to the disk with the next sync."""
        self.broken = ""
        for file in self.names.values():
            file.dirty = file.data[len(file.on_disk) :]

    def cut_power(self, kept: int) -> None:
        """Of what was not synced, `kept` bytes of each file have got to the disk by themselves."""
        self.broken = ""
        self.names = dict(self.durable)
        for file in self.names.values():
            file.data = file.on_disk = file.on_disk + file.data[len(file.on_disk) :][:kept]
            file.dirty = b""

    def sources(self) -> Iterator[Source]:
        for name in [*sorted(name for name in self.names if name != PATH), PATH]:
            if name in self.names:
                yield source(str(name), self.names[name].data)


class Run:
    """One start of a writer on a disk."""

    def __init__(self, disk: MemoryDisk, *, fsync: str = "always", bytes_max: int = 1 << 20, now_ms: int = T) -> None:
        self.now_ms = now_ms
        self.journal = Journal(
            PATH, KEY.sign, writer="agent", name="node0", run=RUN, fsync=fsync, bytes_max=bytes_max, now_ms=now_ms, disk=disk
        )  # fmt: skip

    def add(self, count: int = 1) -> None:
        for _ in range(count):
            self.journal.chain.append("verdict", {"id": "00f1e2d300000001"}, now_ms=self.now_ms)

    def flush(self, *, is_last: bool = False) -> bool:
        """Whether all of the work was done."""
        try:
            place = self.journal.flush_begin(now_ms=self.now_ms, is_last=is_last, is_moved=self.journal.is_moved())
            self.journal.flush_end(place, now_ms=self.now_ms, is_last=is_last)
        except OSError:
            self.journal.failed(now_ms=self.now_ms)
            return False
        return True


def source(name: str, data: bytes) -> Source:
    """A file to verify."""
    whole = split(data)

    def read_line(limit: int) -> bytes:
        if not whole:
            return b""
        line = whole.pop(0)
        if len(line) > limit:
            whole.insert(0, line[limit:])
            line = line[:limit]
        return line

    return Source(name, read_line)


def split(data: bytes) -> list[bytes]:
    """Lines with their feeds; the last one may have none."""
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])


def whole_log(entries: int = 12, *, bytes_max: int = 1 << 20, restarts: int = 1, every_ms: int = 300, node: str = "node0") -> list[tuple[str, bytes]]:
    """The files of a log that ends with a head, oldest first: `entries` after each of `restarts` + 1 starts."""
    who = Writer("agent", node, RUN, LOG)
    files: list[tuple[str, bytes]] = []
    data, place, file_seq, now_ms = b"", Place(), 0, T
    for _ in range(restarts + 1):
        chain = Chain(who, KEY.sign, bytes_max, place, file_seq, len(data))
        chain.open(now_ms=now_ms)
        for number in range(entries):
            now_ms += every_ms
            chain.append("verdict", {"id": f"{number:016x}", "reason": "out_of_order", "message": "https GET images /"}, now_ms=now_ms)
        chain.seal(now_ms=now_ms)
        for part in chain.take():
            if part.rotated:
                files.append((PATH.name + part.rotated, data))
                data = b""
            data += part.data
        place, file_seq, now_ms = chain.place, chain.file_seq, now_ms + 5000
    return [*files, (PATH.name, data)]


def lines_of(files: Iterable[tuple[str, bytes]]) -> list[Line]:
    """All lines, each of which has to be one."""
    found = [parse(raw) for _, data in files for raw in split(data)]
    assert None not in found
    return [line for line in found if line is not None]


def anchor(line: Line, *, node: str = "node0", at_ms: int = T) -> Anchor:
    return Anchor(node, Place(line.seq, line.hash), at_ms, "controller.jsonl:1")


def verify(files: Iterable[tuple[str, bytes]], *, anchors: Iterable[Anchor] | None = None, key: Any = PUBLIC) -> Report:
    return Verification(key, anchors=anchors).run(source(name, data) for name, data in files)


def codes(report: Report) -> set[str]:
    return {finding.code for finding in report.findings}


def rehashed(lines: list[Line], change: Callable[[int, bytes], bytes]) -> bytes:
    """What somebody without the key makes of a log: entries changed, and every hash computed anew."""
    chain = Chain(Writer("", "", "", ""), KEY.sign, 1 << 40)
    for number, line in enumerate(lines):
        chain._put(change(number, line.entry))
    return b"".join(part.data for part in chain.take())
