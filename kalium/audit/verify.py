"""Checks an audit log line by line, in constant memory: what was edited, cut, re-ordered, repeated, swapped or forged.

Without I/O of its own: files come as `Source`, anchors as an iterator. What it cannot know it says in `Report.unknown`.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from kalium.audit.chain import EVENTS, HEAD_MS, LINE_BYTES_MAX, START, Line, Place, head_entry, parse, signed_bytes, suffix

FINDINGS_MAX = 100  # further ones are counted

try:
    import msgspec

    _is_json: Callable[[bytes], Any] = msgspec.json.Decoder(msgspec.Raw).decode
except ModuleNotFoundError:  # an auditor's machine may have no more than `cryptography`
    _is_json = json.loads


@dataclass(frozen=True)
class Source:
    """A file to verify. `read_line(limit)` returns what comes next: a line with its feed, less at the end or at the limit, then b"" """

    name: str
    read_line: Callable[[int], bytes]


@dataclass(frozen=True)
class Anchor:
    """What a controller has put on record of an agent's log: the entry `seq` has this hash. `where` is the line that says so."""

    node: str
    place: Place
    time_ms: int
    where: str


@dataclass(frozen=True)
class Finding:
    """Something that no writer does. `code` is stable, for programs; `seq` 0: of no entry."""

    code: str
    file: str
    line: int
    seq: int
    text: str


@dataclass
class Report:
    """What is known of a log after its verification."""

    writer: str = ""
    name: str = ""
    log: str = ""
    files: list[str] = field(default_factory=list)
    entries: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0
    last_hash: str = START
    heads: int = 0
    signed_seq: int = 0  # of the last head that verifies
    signed_ms: int = 0
    unsigned: int = 0  # entries behind it
    adopted: int = 0  # entries that had no head behind them when their writer was started again, whose head covers them now
    starts: int = 0
    torn_bytes: int = 0  # behind the last whole line
    clock_back: int = 0  # how often an entry is older than the one before
    anchors: int = 0  # that agree
    anchored_seq: int = 0
    anchored_ms: int = 0
    findings: list[Finding] = field(default_factory=list)
    findings_beyond: int = 0
    unknown: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Whether nothing was found."""
        return not self.findings


class Verification:
    """One log. `run` goes through its files once."""

    def __init__(self, key: Ed25519PublicKey | None, *, anchors: Iterable[Anchor] | None = None) -> None:
        """Without `key` signatures are not checked. `anchors` are of the log's node, in the order of their numbers."""
        self.report = Report()
        self._key = key
        self._anchors: Iterator[Anchor] = iter(anchors or ())
        self._has_anchors = anchors is not None
        self._anchor: Anchor | None = None
        self._last_anchor = 0
        self._before = 0  # anchors of entries in front of the first
        self._last = Place()
        self._last_ms = 0
        self._unsigned_ms: int | None = None
        self._unsigned_said = False
        self._adopted = 0  # of report.unsigned, those that are counted in report.adopted
        self._file = ""
        self._line = 0
        self._is_first = True  # no line of the log was seen

    def where(self) -> str:
        """The line that was read last."""
        return f"{self._file}:{self._line}"

    def run(self, sources: Iterable[Source]) -> Report:
        """Verify the files, given in the order of their entries."""
        for _ in self.lines(sources):
            pass
        return self.report

    def lines(self, sources: Iterable[Source]) -> Iterator[Line]:
        """As `run`, handing out each whole line on the way."""
        report = self.report
        for source in sources:
            if report.torn_bytes:
                self._say("torn", 0, f"{report.torn_bytes} bytes without a line feed end a file that another one follows")
                report.torn_bytes = 0
            elif self._file and not self._line:
                self._say("empty", 0, "a file without entries, which another one follows")
            self._file, self._line = source.name, 0
            report.files.append(source.name)
            while raw := source.read_line(LINE_BYTES_MAX + 1):
                self._line += 1
                report.bytes += len(raw)
                if not raw.endswith(b"\n") and len(raw) <= LINE_BYTES_MAX:
                    report.torn_bytes = len(raw)
                    continue  # read_line says b"" next
                line = parse(raw) if len(raw) <= LINE_BYTES_MAX else None
                if line is None:
                    self._say("form", 0, "no line of an audit log")
                    continue
                self._take(line)
                yield line
        self._end()

    def _take(self, line: Line) -> None:
        report, last = self.report, self._last
        if not line.has_its_hash:
            self._say("edited", line.seq, "its hash is not that of its content")
        if self._is_first:
            self._begin(line)
        elif line.prev != last.hash or line.seq != last.seq + 1:
            self._say(*self._broken(line))
        if self._line == 1 or line.event == "open":
            self._opened(line)
            if not report.entries:
                self._advance()  # anchors wait until it is known whose log this is
        elif line.event not in EVENTS:
            self._say("form", line.seq, f"an event {line.event}, which no writer writes")
        if line.time_ms < self._last_ms:
            report.clock_back += 1
        self._sign(line)
        self._last, self._last_ms = Place(line.seq, line.hash), line.time_ms
        report.entries += 1
        report.last_seq, report.last_hash = line.seq, line.hash
        self._match(line)

    def _begin(self, line: Line) -> None:
        self._is_first = False
        self.report.first_seq = line.seq
        if (line.seq == 1) != (line.prev == START):
            self._say("link", line.seq, "entry 1 and no other one begins a log")

    def _broken(self, line: Line) -> tuple[str, int, str]:
        last = self._last
        if line.seq == last.seq + 1:
            return "link", line.seq, f"it does not continue entry {last.seq}: one of the two was edited, or they are of two logs"
        if line.seq > last.seq + 1:
            return "missing", line.seq, f"entries {last.seq + 1} to {line.seq - 1} are missing before it"
        return "order", line.seq, f"it stands behind entry {last.seq}: repeated, moved, or of another log"

    def _opened(self, line: Line) -> None:
        """Hold what `open` says against where it stands."""
        report = self.report
        if line.event != "open":
            self._say("beginning", line.seq, "a file begins with an entry `open`: what stood before it was cut off")
            return
        try:
            fields = line.fields()
        except ValueError:
            return  # said already
        who = tuple(str(fields.get(key, "")) for key in ("writer", "name", "log"))
        if not report.log:
            report.writer, report.name, report.log = who
        elif who != (report.writer, report.name, report.log):
            self._say("log", line.seq, f"it is of the log {who[2]} of {who[0]} {who[1]}, not of {report.log} of {report.writer} {report.name}")
        why = fields.get("why")
        expected = ("first",) if line.seq == 1 else ("rotation",) if self._line == 1 else ("restart",)
        if why not in expected:
            self._say("beginning", line.seq, f"an entry `open` for {why} stands where one for {expected[0]} has to: what stood before it was cut off")
        number = _number_in(self._file)
        if self._line == 1 and number not in (0, line.seq):
            self._say("name", line.seq, f"the file's name says that entry {number} begins it")
        report.starts += why in ("first", "restart")
        # A writer that was killed has left its last second unsigned, and the next one has not looked at more than the hashes.
        self._unsigned_ms, self._unsigned_said = None, False
        report.adopted += report.unsigned - self._adopted
        self._adopted = report.unsigned

    def _sign(self, line: Line) -> None:
        report = self.report
        if line.event != "head":
            try:
                _is_json(line.entry)
            except ValueError as error:
                self._say("form", line.seq, f"the entry is not JSON: {error}")
            report.unsigned += 1
            if self._unsigned_ms is None:
                self._unsigned_ms = line.time_ms
            elif line.time_ms - self._unsigned_ms >= HEAD_MS and not self._unsigned_said:
                self._unsigned_said = True
                self._say("unsigned", line.seq, f"an entry of {line.time_ms - self._unsigned_ms} ms before has no head behind it: heads were cut out")
            return
        report.heads += 1
        if self._is_signed(line):
            report.unsigned, report.signed_seq, report.signed_ms = 0, line.seq, line.time_ms
            self._adopted = 0
        else:
            report.unsigned += 1
            self._say("signature", line.seq, "its signature does not verify: a forged head, or another key")
        self._unsigned_ms, self._unsigned_said = None, False

    def _is_signed(self, line: Line) -> bool:
        signature = _signature_of(line)
        if signature is None:
            return False
        if self._key is None:
            return True
        try:
            self._key.verify(signature, signed_bytes(line.prev, line.seq, line.time_ms))
        except InvalidSignature:
            return False
        return True

    def _advance(self) -> None:
        """Come to the next anchor of this log's node that is of an entry still to come."""
        for anchor in self._anchors:
            if anchor.place.seq < self._last_anchor:
                self._say_anchor("anew", anchor, f"goes back from entry {self._last_anchor} to {anchor.place.seq}: the log was begun anew")
                continue
            self._last_anchor = anchor.place.seq
            if anchor.place.seq < self.report.first_seq:
                self._before += 1
                continue
            self._anchor = anchor
            return
        self._anchor = None

    def _match(self, line: Line) -> None:
        while (anchor := self._anchor) is not None and anchor.place.seq <= line.seq:
            if anchor.place.seq == line.seq and anchor.place.hash == line.hash:
                self.report.anchors += 1
                self.report.anchored_seq, self.report.anchored_ms = line.seq, anchor.time_ms
            elif anchor.place.seq == line.seq:
                self._say("anchor", line.seq, f"{anchor.where} has another hash of it on record")
            else:
                self._say_anchor("anchor", anchor, f"is of entry {anchor.place.seq}, which is not there")
            self._advance()

    def _end(self) -> None:
        report = self.report
        if self._is_first:
            self._say("empty", 0, "there is no entry")
            self._advance()
        elif _number_in(self._file) and (report.torn_bytes or not self._line or report.unsigned):
            self._say("end", 0, "a file that was full ends with a head, and this one does not: its end was cut off")
        while (anchor := self._anchor) is not None:
            self._say_anchor("cut", anchor, f"is of entry {anchor.place.seq}, and the log ends with {report.last_seq}: its end was cut off")
            self._advance()
        report.unknown = list(self._unknown())

    def _unknown(self) -> Iterator[str]:
        report = self.report
        if report.first_seq > 1:
            yield f"entries 1 to {report.first_seq - 1}: they are in none of the files given"
        if self._key is None:
            yield "who wrote it: no key was given, so anybody may have made the whole chain"
        if report.unsigned:
            yield f"the last {report.unsigned} entries: no head is behind them yet, so whoever may write the file may have changed them"
        if report.adopted:
            yield (
                f"{report.adopted} entries that stood without a head when their writer was started again: whoever could write the file"
                " while it was down may have changed them"
            )
        if report.torn_bytes:
            yield f"the last {report.torn_bytes} bytes: a line that is being written, or was when its writer was killed"
        if not self._has_anchors:
            yield "whether entries were cut off the end: only anchors that a controller has on record tell that (--anchors)"
        elif report.anchors:
            yield f"whether entries behind {report.anchored_seq} were cut off the end: the newest anchor that agrees is of that one"
        else:
            yield "whether entries were cut off the end: no anchor is of an entry of this log"
        if self._before:
            yield f"{self._before} anchors of entries before {report.first_seq}"

    def _say_anchor(self, code: str, anchor: Anchor, text: str) -> None:
        self._add(
            Finding(
                code, anchor.where.rpartition(":")[0], int(anchor.where.rpartition(":")[2]), anchor.place.seq, f"an anchor of {anchor.node} {text}"
            )
        )

    def _say(self, code: str, seq: int, text: str) -> None:
        self._add(Finding(code, self._file, self._line, seq, text))

    def _add(self, finding: Finding) -> None:
        if len(self.report.findings) < FINDINGS_MAX:
            self.report.findings.append(finding)
        else:
            self.report.findings_beyond += 1


def _number_in(name: str) -> int:
    """The number of the entry that begins a full file, by its name; 0 for any other name."""
    end = name.rpartition(".")[2]
    return int(end) if end.isdecimal() and suffix(int(end)) == "." + end else 0


def _signature_of(line: Line) -> bytes | None:
    """The signature of a head that is spelt as heads are."""
    try:
        text = line.fields()["signature"]
        signature = base64.b64decode(text, validate=True)
    except (ValueError, KeyError, TypeError, binascii.Error):
        return None
    return signature if line.entry == head_entry(line.seq, line.time_ms, signature) else None


def anchors_of(lines: Iterable[Line], where: Callable[[], str]) -> Iterator[Anchor]:
    """The anchors in a controller's log; `where` names the line that was read last."""
    for line in lines:
        if line.event == "anchor":
            try:
                fields = line.fields()
                yield Anchor(str(fields["node"]), Place(int(fields["audit_seq"]), str(fields["audit_hash"])), line.time_ms, where())
            except (ValueError, KeyError, TypeError):
                continue  # an entry without them anchors nothing
