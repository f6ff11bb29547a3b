"""Reads a policy's YAML into plain values that remember their lines, and holds what is found wrong in it.

Only a small part of YAML is taken: mappings, lists, texts, whole numbers, true, false and null, in UTF-8. What a reviewer could
misread is refused: repeated keys, anchors and aliases, tags, tabs, several documents. All further values are texts, so
`mode: yes` or `version: 1.5` are refused by the schema instead of becoming something else.
"""

from __future__ import annotations

import difflib
import enum
import hashlib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from kalium.errors import EXIT_NO, KaliumError
from kalium.policy.limits import MESSAGE_TEXT_MAX, SOURCE_BYTES_MAX, SOURCE_DEPTH_MAX, SOURCE_NODES_MAX
from kalium.policy.message import printable

Path = tuple[str | int, ...]  # from the document's root: keys and list positions

_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})\Z")
_CONSTANTS: Mapping[str, bool | None] = {"true": True, "false": False, "null": None, "~": None, "": None}
# YAML counts these as line breaks and editors do not: the lines of verdicts would be wrong.
_ODD_BREAKS = "\x0b\x0c\x85\u2028\u2029\ufeff"


class Severity(enum.IntEnum):
    """What a finding means: ERROR compiles to nothing or to a denial of everything, NOTE is only shown."""

    NOTE = 0
    WARNING = 1
    ERROR = 2


@dataclass(frozen=True)
class Finding:
    """Something that a policy's author should know. `code` is stable, `line` is 0 when it concerns the whole file."""

    severity: Severity
    code: str
    line: int
    found: str
    next_step: str

    def error(self, attempted: str) -> KaliumError:
        """The finding as the error of a command that cannot go on because of it."""
        where = f"line {self.line}: " if self.line else ""
        return KaliumError(self.code, attempted, where + self.found, self.next_step, EXIT_NO)


def error_at(code: str, line: int, found: str, next_step: str) -> Finding:
    """A finding that stops the compiler. What was found may quote the source, so it is made printable."""
    return Finding(Severity.ERROR, code, line, printable(found, MESSAGE_TEXT_MAX), next_step)


def did_you_mean(word: str, known: Collection[str]) -> str:
    """The beginning of a next step: the known word that `word` resembles, or all of them when they are few."""
    close = difflib.get_close_matches(word, sorted(known), n=1)
    if close:
        return f'write "{close[0]}"'
    return f"use one of {', '.join(known)}" if 0 < len(known) <= 12 else "correct it"


class SourceRefused(Exception):
    """The YAML itself is refused; carries the one finding that says why."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(finding.found)
        self.finding = finding


@dataclass(frozen=True)
class Source:
    """A policy's text: `document` as plain values, `lines` of every value by its path (a mapping's value: its key's line)."""

    document: Any
    lines: Mapping[Path, int]
    sha256: str

    def line(self, path: Path) -> int:
        """The line of the value at `path`, or of the nearest one around it that is there."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read(data: bytes) -> Source:
    """Read one YAML document. Raises SourceRefused."""
    document, lines = _Reader(_events(_text(data))).document()
    return Source(document, lines, hashlib.sha256(data).hexdigest())


def _refuse(code: str, line: int, found: str, next_step: str) -> SourceRefused:
    return SourceRefused(error_at(code, line, found, next_step))


def _text(data: bytes) -> str:
    if len(data) > SOURCE_BYTES_MAX:
        raise _refuse(
            "policy.too_large", 0, f"{len(data)} bytes, at most {SOURCE_BYTES_MAX}", "split the application or write its paths as templates"
        )
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _refuse("policy.yaml", line, f"byte {data[error.start]:#04x} is not UTF-8", "save the file as UTF-8") from error
    for number, line_text in enumerate(text.split("\n"), start=1):
        if "\t" in line_text:
            raise _refuse("policy.yaml", number, "a tab", "use spaces: YAML does not indent with tabs")
        if any(character in _ODD_BREAKS or character == "\r" for character in line_text.removesuffix("\r")):
            raise _refuse("policy.yaml", number, "a character that only some programs take for the end of a line", "delete it")
    return text


def _events(text: str) -> Iterator[yaml.Event]:
    """The parser's events, bounded in number and depth before anything is built from them."""
    depth = 0
    try:
        for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
            line = line_of(event)
            if count > SOURCE_NODES_MAX:
                raise _refuse("policy.too_large", line, f"more than {SOURCE_NODES_MAX} values", "split the application")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > SOURCE_DEPTH_MAX:
                    raise _refuse("policy.too_large", line, f"nested deeper than {SOURCE_DEPTH_MAX}", "write it flatter")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            yield event
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _refuse(
            "policy.yaml", mark.line + 1 if mark else 0, f"not YAML: {error.problem or error.context}", "correct the indentation or the punctuation"
        ) from error
    except yaml.YAMLError as error:
        raise _refuse("policy.yaml", 0, f"not YAML: {error}", "save the file as plain text") from error


def line_of(event: yaml.Event) -> int:
    """The line on which what `event` says begins, counted as editors do."""
    assert event.start_mark is not None, "events of a text have marks"
    return event.start_mark.line + 1


class _Reader:
    """Builds plain values from events by descent; the depth is bounded by `_events`."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self._lines: dict[Path, int] = {}

    def document(self) -> tuple[Any, Mapping[Path, int]]:
        next(self._events)  # the stream's start
        start = next(self._events)
        if not isinstance(start, yaml.DocumentStartEvent):
            raise _refuse("policy.yaml", 1, "an empty file", "begin with `schema: kalium/v1`; `kalium policy schema` describes the rest")
        if start.version or start.tags:
            raise _refuse("policy.yaml", 1, "a YAML directive", "delete the line that begins with %")
        first = next(self._events)
        value = self._value(first, (), line_of(first))
        next(self._events)  # the document's end
        after = next(self._events)
        if not isinstance(after, yaml.StreamEndEvent):
            raise _refuse("policy.yaml", line_of(after), "a second document", "keep one policy in a file")
        return value, self._lines

    def _value(self, event: yaml.Event, path: Path, line: int) -> Any:
        """The value that begins with `event`; `line` is what `lines` shall say of it."""
        here = line_of(event)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise _refuse("policy.yaml", here, "an anchor or alias", "write the part out: a reviewer reads what stands there")
        if getattr(event, "tag", None):
            raise _refuse("policy.yaml", here, "a tag", "delete what begins with !; quote a text that looks like a number")
        self._lines[path] = line
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(item := next(self._events), yaml.SequenceEndEvent):
                items.append(self._value(item, (*path, len(items)), line_of(item)))
            return items
        assert isinstance(event, yaml.ScalarEvent)
        return self._scalar(event)

    def _mapping(self, path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(key_event := next(self._events), yaml.MappingEndEvent):
            line = line_of(key_event)
            if not isinstance(key_event, yaml.ScalarEvent) or key_event.anchor or key_event.tag:
                raise _refuse("policy.yaml", line, "a key that is not a plain text", "write keys as plain words")
            key = self._plain(key_event)
            inner = (*path, key)
            if key in found:
                raise _refuse("policy.duplicate_key", line, f'key "{key}" appears twice, first on line {self._lines[inner]}', "keep one of them")
            found[key] = self._value(next(self._events), inner, line)
        return found

    def _scalar(self, event: yaml.ScalarEvent) -> str | int | bool | None:
        text = self._plain(event)
        if event.style is not None:  # quoted or block text
            return text
        if _WHOLE.match(text):
            return int(text)
        return _CONSTANTS.get(text, text)

    def _plain(self, event: yaml.ScalarEvent) -> str:
        text: str = event.value
        if not all(" " <= character <= "~" for character in text):
            raise _refuse("policy.yaml", line_of(event), f"a text with other than printable ASCII: {text!a}", "write it in plain ASCII on one line")
        return text
