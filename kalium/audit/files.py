"""Logs on a disk, for who reads them: in the order of their entries, up to where they reach when they are opened."""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from kalium.audit.chain import LINE_BYTES_MAX, Line, parse
from kalium.audit.verify import Anchor, Report, Source, Verification, anchors_of
from kalium.errors import KaliumError


def first_line(path: Path) -> Line | None:
    """The first line, or None when it is none of an audit log. Raises KaliumError audit.file."""
    try:
        with path.open("rb") as file:
            return parse(file.readline(LINE_BYTES_MAX + 1))
    except OSError as error:
        raise _unreadable(path, error) from error


def in_order(paths: Iterable[Path]) -> list[Path]:
    """The files in the order of their first entries, however they are named. Those without one come last."""
    found = [(first_line(path), path) for path in paths]
    return [path for _, path in sorted(found, key=lambda each: (each[0] is None, each[0].seq if each[0] else 0))]


def name_in(line: Line | None, key: str) -> str:
    """What the entry `open` that begins a file says of its writer; "" when it says nothing."""
    try:
        return str(line.fields().get(key, "")) if line is not None else ""
    except ValueError:
        return ""


def sources(paths: Sequence[Path]) -> Iterator[Source]:
    """The files, one open at a time. A file that grows is read as far as it reached when it was opened.

    Raises KaliumError audit.file.
    """
    for path in paths:
        try:
            with path.open("rb", buffering=1024 * 1024) as file:
                yield Source(str(path), _bounded(file, path))
        except OSError as error:
            raise _unreadable(path, error) from error


def _bounded(file: BinaryIO, path: Path) -> Callable[[int], bytes]:
    left = os.fstat(file.fileno()).st_size

    def read_line(limit: int) -> bytes:
        nonlocal left
        try:
            raw = file.readline(min(limit, left))
        except OSError as error:
            raise _unreadable(path, error) from error
        left -= len(raw)
        return raw

    return read_line


class Anchors:
    """What the logs of controllers have on record of a node, read along with the node's log and verified on the way."""

    def __init__(self, paths: Iterable[Path], node: str, key: Ed25519PublicKey | None) -> None:
        """`paths` are of one or more controllers, in any order."""
        self.reports: list[Report] = []
        self._node = node
        self._key = key
        self._logs: dict[str, list[Path]] = {}
        for path in paths:
            self._logs.setdefault(name_in(first_line(path), "log"), []).append(path)

    def __iter__(self) -> Iterator[Anchor]:
        """In the order of the entries that they are of. Read to the end, `reports` has one report for each controller."""
        return heapq.merge(*(self._of(in_order(paths)) for paths in self._logs.values()), key=lambda anchor: anchor.place.seq)

    def _of(self, paths: Sequence[Path]) -> Iterator[Anchor]:
        verification = Verification(self._key)
        self.reports.append(verification.report)
        for anchor in anchors_of(verification.lines(sources(paths)), verification.where):
            if anchor.node == self._node:
                yield anchor


def entries(paths: Sequence[Path]) -> Iterator[Mapping[str, object]]:
    """The entries as they stand in the files, unverified. What is no line is left out."""
    for source in sources(paths):
        while raw := source.read_line(LINE_BYTES_MAX + 1):
            line = parse(raw)
            if line is not None:
                try:
                    yield line.fields()
                except ValueError:
                    continue


def _unreadable(path: Path, error: OSError) -> KaliumError:
    return KaliumError(
        "audit.file", f"cannot read the audit log {path}", error.strerror or str(error), "name the files of one log; root may read them"
    )
