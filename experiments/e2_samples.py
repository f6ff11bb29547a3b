"""samples.csv of E2: the cells of the experiment, and one row a judged message."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pandas as pd

from experiments.entries import E2_LOAD, E2_LOAD_OFF
from experiments.errors import RunRefused
from experiments.timings import PHASES, Timing

COLUMNS = ("workload", "call", "protocol", "bytes", "block", "seq", "invocation", *(f"{phase}_ns" for phase in PHASES))
AGAIN = "run `fab run-e2` again; samples are never repaired"


@dataclass(frozen=True)
class Cell:
    """Equal messages: what is sent, by which system call, with a head of how many bytes.

    The workloads: `https-get` on one connection an invocation, `https-get-fresh` on a connection each, `https-get-off` as https-get
    in a function whose mode is off, `invoke` in clear through the gateway.
    """

    workload: str
    call: str
    size: int

    def __str__(self) -> str:
        return f"{self.workload} by {self.call} with {self.size} bytes"

    @property
    def function(self) -> str:
        """Which function sends them."""
        return E2_LOAD_OFF if self.workload == "https-get-off" else E2_LOAD

    @property
    def protocol(self) -> str:
        return "http" if self.workload == "invoke" else "https"

    @property
    def kind(self) -> str:
        """As the timing log and the verdict log name them."""
        return {"invoke": "invoke", "https-get-off": "off"}.get(self.workload, "https")

    @property
    def is_fresh(self) -> bool:
        return self.workload == "https-get-fresh"

    def holds(self, timing: Timing) -> bool:
        """Whether `timing` is of a message of this cell. With mode off the guard sees records, and the handshake's are smaller."""
        fits = timing.size >= self.size if self.kind == "off" else timing.size == self.size
        return timing.function == self.function and timing.kind == self.kind and fits


class E2SampleFile:
    """samples.csv while a run writes it; each batch is on disk when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("x", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(COLUMNS)

    def __enter__(self) -> E2SampleFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def write(self, cell: Cell, block: int, first: int, timings: Iterable[Timing]) -> None:
        """Append messages of one cell in one block, numbered from `first`; what cannot occur stays empty."""
        self._writer.writerows(
            (
                cell.workload, cell.call, cell.protocol, cell.size, block, seq, timing.invocation, *(timing.spans_ns[phase] for phase in PHASES),
            )
            for seq, timing in enumerate(timings, start=first)
        )  # fmt: skip
        self._file.flush()


def read(path: Path, parameters: Mapping[str, Any]) -> pd.DataFrame:
    """samples.csv, one row a message. Other columns, or counts that the run's parameters did not plan, are refused."""
    frame = pd.read_csv(path, encoding="utf-8")
    if tuple(frame.columns) != COLUMNS:
        raise RunRefused("samples.columns", f"read {path}", f"its columns are {list(frame.columns)}, expected {list(COLUMNS)}", AGAIN)
    counts = {key: int(count) for key, count in frame.groupby(["workload", "call", "bytes", "block"]).size().items()}
    for cell in parameters["cells"]:
        for block in range(int(parameters["blocks"])):
            found = counts.pop((cell["workload"], cell["call"], cell["size"], block), 0)
            if found != int(parameters["messages"]):
                raise RunRefused(
                    "samples.missing", f"read {path}",
                    f"{cell['workload']} by {cell['call']} in block {block} has {found} samples, not {parameters['messages']}", AGAIN,
                )  # fmt: skip
    if counts:
        raise RunRefused("samples.unplanned", f"read {path}", f"it has samples of {next(iter(counts))}, which the run did not plan", AGAIN)
    return frame
