"""From the samples of a sealed run of E2 to its summaries: pure functions, and the same run always gives the same bytes.

Bounds of a quantile are those of its order statistics (95 %, by the normal approximation of the binomial): nothing is drawn
at random. They take messages for independent of each other, so they are narrow; the blocks of samples.csv tell more.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from experiments import e2_samples
from experiments.analysis import write_csv
from experiments.paths import RunPaths
from experiments.timings import PHASES

SUMMARY_COLUMNS = ("name", "value", "unit", "low", "high", "n")
PHASE_COLUMNS = ("workload", "call", "protocol", "bytes", "phase", "n", "p50_us", "p99_us", "mean_us", "min_us", "max_us")
WORKLOADS = ("https-get", "https-get-fresh", "invoke", "https-get-off")
CALLS = ("write", "sendto", "sendmsg")
OFF = "https-get-off"
HEADLINE_BYTES = 1024
NORMAL_95 = 1.96
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Key:
    """A cell of the experiment, in the order of results and figures."""

    workload: str
    call: str
    protocol: str
    size: int

    @property
    def order(self) -> tuple[int, int, int]:
        return WORKLOADS.index(self.workload), self.size, CALLS.index(self.call)


@dataclass(frozen=True)
class Quantile:
    """A quantile of samples, between the order statistics that bound it."""

    value: float
    low: float
    high: float
    n: int


# For each cell the microseconds of each phase that occurred.
Spans = dict[Key, dict[str, Floats]]


def quantile(values: Floats, q: float) -> Quantile:
    """The quantile `q` of at least one value."""
    ordered = np.sort(values)
    n = len(ordered)
    spread = NORMAL_95 * math.sqrt(n * q * (1 - q))
    low, high = math.floor(n * q - spread), math.ceil(n * q + spread)
    return Quantile(float(np.quantile(ordered, q)), float(ordered[max(0, min(low, n - 1))]), float(ordered[max(0, min(high, n - 1))]), n)


def latency(values: Sequence[int]) -> dict[str, float]:
    """p50 and p99 of the latencies that the verdict log states, as run.json keeps them."""
    p50, p99 = np.percentile(values, (50, 99))
    return {"n": len(values), "p50": round(float(p50), 1), "p99": round(float(p99), 1)}


def spans_of(frame: pd.DataFrame) -> Spans:
    """Microseconds by cell and phase. A phase that cannot occur in a cell is not there."""
    spans: Spans = {}
    for names, rows in frame.groupby(["workload", "call", "protocol", "bytes"]):
        assert isinstance(names, tuple), "a cell has four names"
        workload, call, protocol, size = names
        columns = {phase: rows[f"{phase}_ns"].dropna().to_numpy(dtype=np.float64) / 1e3 for phase in PHASES}
        spans[Key(str(workload), str(call), str(protocol), int(str(size)))] = {phase: values for phase, values in columns.items() if len(values)}
    return dict(sorted(spans.items(), key=lambda item: item[0].order))


def of_run(run: RunPaths) -> Spans:
    """The spans of a sealed run."""
    record = run.read_sealed()
    return spans_of(e2_samples.read(run.samples, record["parameters"]))


def phase_lines(spans: Spans) -> Iterator[tuple[str, ...]]:
    """Lines of phases.csv: every phase of every cell, empty where it cannot occur."""
    for key, phases in spans.items():
        for phase in PHASES:
            head = (key.workload, key.call, key.protocol, str(key.size), phase)
            values = phases.get(phase)
            if values is None:
                yield (*head, *[""] * 6)
            else:
                p50, p99 = np.quantile(values, (0.5, 0.99))
                yield (*head, str(len(values)), *(f"{value:.3f}" for value in (p50, p99, values.mean(), values.min(), values.max())))


def summary_lines(spans: Spans) -> Iterator[tuple[str, ...]]:
    """Lines of summary.csv."""
    occurred = {phase for key, phases in spans.items() if key.workload != OFF for phase in phases}
    samples = sum(len(phases["total"]) for phases in spans.values())
    yield ("phases", str(len(occurred)), "count", "", "", "")
    yield ("samples", str(samples), "count", "", "", "")
    for name, workload in (("total_local", "https-get"), ("total_controller", "invoke")):
        for key, phases in spans.items():
            if (key.workload, key.call, key.size) == (workload, "write", HEADLINE_BYTES):
                for q in (50, 99):
                    yield _line(f"{name}_p{q}_us", quantile(phases["total"], q / 100))
    for name, is_off in (("total_max_us", False), ("off_max_us", True)):
        totals = [phases["total"] for key, phases in spans.items() if (key.workload == OFF) == is_off]
        if totals:
            together = np.concatenate(totals)
            yield (name, f"{together.max():.3f}", "us", "", "", str(len(together)))


def _line(name: str, found: Quantile) -> tuple[str, ...]:
    return name, f"{found.value:.3f}", "us", f"{found.low:.3f}", f"{found.high:.3f}", str(found.n)


def derive(run: RunPaths) -> None:
    """Write summary.csv and phases.csv of a sealed run."""
    spans = of_run(run)
    write_csv(run.summary, SUMMARY_COLUMNS, summary_lines(spans))
    write_csv(run.phases, PHASE_COLUMNS, phase_lines(spans))


def table(run: RunPaths) -> str:
    """The phases and the latencies of verdicts as a table for the screen: the same numbers as in phases.csv and run.json."""
    spans, record = of_run(run), run.read_sealed()
    lines = [
        f"run e2/{run.stamp} (microseconds inside the guard, p50 / p99; TLS {', '.join(record['tls_versions']) or 'none'})",
        f"{'workload':<16} {'call':<8} {'bytes':>5} {'n':>5}" + "".join(f" {phase:>17}" for phase in PHASES),
    ]
    for key, phases in spans.items():
        columns = "".join(f" {_pair(phases.get(phase)):>17}" for phase in PHASES)
        lines.append(f"{key.workload:<16} {key.call:<8} {key.size:>5} {len(phases['total']):>5}{columns}")
    for kind, found in record["verdict_latency_us"].items():
        lines.append(f"verdict latency, {kind}: p50 {found['p50']:.0f} us, p99 {found['p99']:.0f} us, n {found['n']:.0f}")
    lines += _sentences(summary_lines(spans))
    return "\n".join(lines)


def _pair(values: Floats | None) -> str:
    if values is None:
        return "-"
    p50, p99 = np.quantile(values, (0.5, 0.99))
    return f"{p50:.2f} / {p99:.2f}"


def _sentences(lines: Iterable[tuple[str, ...]]) -> list[str]:
    return [f"{name}: {value} us" for name, value, unit, *_ in lines if unit == "us"]
