"""samples.csv of E1: written as the samples come, read back with every rule that makes them usable."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd

from experiments.client import Sample
from experiments.errors import RunRefused

COLUMNS = ("entry", "system", "block", "seq", "status", "seconds", "warm", "via", "call_id")
HEADER = ",".join(COLUMNS) + "\n"
AGAIN = "run `fab run-e1` again; samples are never repaired"


class SampleFile:
    """The samples of a block while a run takes them; each batch is on disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("x", encoding="utf-8", newline="")
        self._file.write(HEADER)
        self._writer = csv.writer(self._file, lineterminator="\n")

    def __enter__(self) -> SampleFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def write(self, system: str, block: int, samples: Iterable[Sample]) -> None:
        """Append the samples of one system in one block, in the order they were sent."""
        self._writer.writerows(
            (
                sample.entry, system, block, sample.seq, sample.status, f"{sample.seconds:.9f}", int(sample.warm), sample.via, sample.call_id,
            )
            for sample in samples
        )  # fmt: skip
        self._file.flush()


def read(path: Path) -> pd.DataFrame:
    """samples.csv, one row a request; a file with other columns or an answer that is not 2xx is refused."""
    frame = pd.read_csv(path, encoding="utf-8")
    if tuple(frame.columns) != COLUMNS:
        raise RunRefused("samples.columns", f"read {path}", f"its columns are {list(frame.columns)}, expected {list(COLUMNS)}", AGAIN)
    failed = frame[~frame["status"].between(200, 299)]
    if len(failed):
        first = failed.iloc[0]
        raise RunRefused("samples.status", f"read {path}", f"request {first['call_id']} was answered with status {first['status']}", AGAIN)
    return frame


def require_complete(frame: pd.DataFrame, parameters: Mapping[str, Any], path: Path) -> None:
    """Refuse samples that are fewer or more than the run's own parameters planned, for any entry, system and block."""
    planned = {"gateway": 1 + int(parameters["warm_requests"]), "direct": int(parameters["direct_requests"])}
    counts = {key: int(count) for key, count in frame.groupby(["entry", "system", "block", "via"]).size().items()}
    for via in sorted({"gateway", *frame["via"]}):
        for entry in sorted(set(frame["entry"])):
            for system in sorted(set(frame["system"])):
                for block in range(int(parameters["blocks"])):
                    found = counts.get((entry, system, block, via), 0)
                    if found != planned.get(via):
                        raise RunRefused(
                            "samples.missing",
                            f"read {path}",
                            f"{entry} under {system} in block {block} via {via} has {found} samples, not {planned.get(via)}",
                            AGAIN,
                        )
