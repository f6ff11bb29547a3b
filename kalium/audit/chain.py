"""The lines of an audit log, and when a head is due. No I/O and no clock: time comes in as `now_ms`, signing as a function.

A line is {"prev":P,"hash":H,"entry":E} with H = SHA-256(P + "\\n" + E), so one hash stands for everything before it. A head is an
entry that signs the hash in front of it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT = "kalium-audit/v1"
START = "0" * 64  # what the first line of a log names as the one before it
HEAD_MS = 1000  # no entry is added while one that is so old has no head behind it
ENTRY_BYTES_MAX = 64 * 1024
LINE_BYTES_MAX = ENTRY_BYTES_MAX + 256
HEAD_LINE_BYTES_MAX = 512
EVENTS = frozenset({"open", "head", "verdict", "policy", "mode", "anchor", "suppressed", "outage", "agent", "step"})

_LINE = re.compile(
    rb'\{"prev":"([0-9a-f]{64})","hash":"([0-9a-f]{64})","entry":'
    rb'(\{"seq":([1-9][0-9]{0,17}),"time_ms":(0|[1-9][0-9]{0,15}),"event":"([a-z_]{1,32})"(?:,.*)?\})\}\n'
)

Sign = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Line:
    """A line as it was read. `entry` is the bytes between the last colon of its frame and the brace that ends it."""

    prev: str
    hash: str
    entry: bytes
    seq: int
    time_ms: int
    event: str

    @property
    def has_its_hash(self) -> bool:
        """Whether `hash` is that of `prev` and `entry`."""
        return digest(self.prev, self.entry) == self.hash

    def fields(self) -> dict[str, Any]:
        """The entry as JSON. Raises ValueError for one that is none."""
        value = json.loads(self.entry)
        assert isinstance(value, dict)  # the frame begins and ends with a brace
        return value


def parse(raw: bytes) -> Line | None:
    """The parts of one whole line with its line feed; None for what no writer has made. Hashes are not checked."""
    found = _LINE.fullmatch(raw)
    if found is None:
        return None
    prev, own, entry, seq, time_ms, event = found.groups()
    return Line(prev.decode(), own.decode(), entry, int(seq), int(time_ms), event.decode())


def digest(prev: str, entry: bytes) -> str:
    """The hash of a line."""
    return hashlib.sha256(prev.encode() + b"\n" + entry).hexdigest()


def signed_bytes(prev: str, seq: int, time_ms: int) -> bytes:
    """What a head with this place in the chain signs."""
    return f"{FORMAT}\n{prev}\n{seq}\n{time_ms}".encode()


def head_entry(seq: int, time_ms: int, signature: bytes) -> bytes:
    """The one spelling of a head, so that nothing in its line is free to be changed."""
    return f'{{"seq":{seq},"time_ms":{time_ms},"event":"head","signature":"{base64.b64encode(signature).decode()}"}}'.encode()


def suffix(first_seq: int) -> str:
    """What a file's name gets behind it once the next file has begun: the number of its first entry."""
    return f".{first_seq:012d}"


@dataclass(frozen=True)
class Writer:
    """Who writes a log. `log` names the chain, `run` this start of the writer, each by 16 hexadecimal digits."""

    writer: str  # agent or controller
    name: str  # of the node, or of the controller
    run: str
    log: str


@dataclass(frozen=True)
class Place:
    """The last line of a chain: its number and its hash."""

    seq: int = 0
    hash: str = START


@dataclass(frozen=True)
class Part:
    """Lines to append. With `rotated`, a new file begins with them, and the one before gets that behind its name."""

    data: bytes
    rotated: str = ""


@dataclass
class Chain:
    """Adds entries behind `place`. `take` gives out the lines once; not shared between threads."""

    who: Writer
    sign: Sign
    bytes_max: int  # of a file; one entry alone may be longer
    place: Place = field(default_factory=Place)
    file_seq: int = 0  # of the current file's first entry; 0: it has none yet
    file_bytes: int = 0  # of the current file
    unsigned_ms: int | None = None  # time of the oldest entry without a head behind it
    _parts: list[Part] = field(default_factory=list)
    _lines: bytearray = field(default_factory=bytearray)
    _rotated: str = ""

    @property
    def waiting(self) -> int:
        """Bytes that `take` would give out."""
        return len(self._lines) + sum(len(part.data) for part in self._parts)

    def open(self, *, now_ms: int, torn: bytes = b"") -> None:
        """Say that the writer has started, and which half-written line it has found and cut off."""
        why = "restart" if self.file_seq else "rotation" if self.place.seq else "first"
        self._add("open", self._opening(why, torn), now_ms)

    def append(self, event: str, fields: Mapping[str, Any], *, now_ms: int) -> Place:
        """Add an entry, and a head before it when one is due. Raises ValueError for an entry beyond ENTRY_BYTES_MAX, and adds nothing."""
        assert event in EVENTS - {"open", "head"}, event
        assert not {"seq", "time_ms", "event"} & fields.keys(), fields
        self._add(event, fields, now_ms)
        return self.place

    def is_head_due(self, *, now_ms: int) -> bool:
        """Whether an entry has waited long enough for its head. A clock that went back does not make it wait longer."""
        return self.unsigned_ms is not None and not 0 <= now_ms - self.unsigned_ms < HEAD_MS

    def seal(self, *, now_ms: int) -> None:
        """Sign what has no head behind it yet."""
        if self.unsigned_ms is not None:
            seq = self.place.seq + 1
            self._put(head_entry(seq, now_ms, self.sign(signed_bytes(self.place.hash, seq, now_ms))))
            self.unsigned_ms = None

    def start_file(self, *, now_ms: int) -> None:
        """Go on in a new file. The current one ends with a head."""
        self.seal(now_ms=now_ms)
        self._cut()
        self._rotated, self.file_seq, self.file_bytes = suffix(self.file_seq), 0, 0
        self._add("open", self._opening("rotation", b""), now_ms)

    def take(self) -> list[Part]:
        """The lines since the last call."""
        self._cut()
        parts, self._parts = self._parts, []
        return parts

    def _opening(self, why: str, torn: bytes) -> dict[str, Any]:
        return {
            "writer": self.who.writer,
            "name": self.who.name,
            "run": self.who.run,
            "log": self.who.log,
            "why": why,
            "torn_bytes": len(torn),
            "torn_sha256": hashlib.sha256(torn).hexdigest() if torn else "",
        }

    def _add(self, event: str, fields: Mapping[str, Any], now_ms: int) -> None:
        rest = json.dumps(fields, separators=(",", ":"), allow_nan=False)[1:-1].encode()
        if len(rest) > ENTRY_BYTES_MAX - 128:
            raise ValueError(f"an entry of {len(rest)} bytes, at most {ENTRY_BYTES_MAX - 128}")
        if self.is_head_due(now_ms=now_ms):
            self.seal(now_ms=now_ms)
        if self.file_seq and self.file_bytes + len(rest) + 256 + HEAD_LINE_BYTES_MAX > self.bytes_max and event != "open":
            self.start_file(now_ms=now_ms)
        self._put(b'{"seq":%d,"time_ms":%d,"event":"%s"%s%s}' % (self.place.seq + 1, now_ms, event.encode(), b"," if rest else b"", rest))
        if self.unsigned_ms is None:
            self.unsigned_ms = now_ms

    def _put(self, entry: bytes) -> None:
        own = digest(self.place.hash, entry)
        line = b'{"prev":"%s","hash":"%s","entry":%s}\n' % (self.place.hash.encode(), own.encode(), entry)
        self.place = Place(self.place.seq + 1, own)
        self.file_seq = self.file_seq or self.place.seq
        self.file_bytes += len(line)
        self._lines += line

    def _cut(self) -> None:
        if self._lines or self._rotated:
            self._parts.append(Part(bytes(self._lines), self._rotated))
            self._lines.clear()
            self._rotated = ""
