"""From the samples of a sealed run to its summaries; the same run always gives the same bytes."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import samples
from experiments.paths import RunPaths
from experiments.statistics import Analysis, Interval, Row, Samples, analyse

SUMMARY_COLUMNS = (
    "entry", "system", "n", "blocks", "median_s", "mean_s", "p95_s",
    "ratio_mean", "ratio_mean_low", "ratio_mean_high", "ratio_median", "ratio_median_low", "ratio_median_high",
)  # fmt: skip
AGGREGATE_COLUMNS = ("name", "value", "unit", "low", "high")
# The order of results and figures, whatever order a run measured them in.
ENTRY_ORDER = ("microbenchmark", "product-photos-receive", "product-master-photos", "product-photos-success", "product-photos-report")
SYSTEM_ORDER = ("stock", "stock-b", "kalium-audit", "kalium-enforce")


def group(frame: pd.DataFrame, *, via: str, warm: bool) -> Samples:
    """Seconds by entry, system and block, of the samples taken that way."""
    chosen = frame[(frame["via"] == via) & (frame["warm"] == int(warm))]
    groups: dict[tuple[str, str, int], list[float]] = {}
    for entry, system, block, seconds in zip(chosen["entry"], chosen["system"], chosen["block"], chosen["seconds"], strict=True):
        groups.setdefault((str(entry), str(system), int(block)), []).append(float(seconds))
    return groups


def _ordered(names: Iterable[str], order: tuple[str, ...]) -> list[str]:
    return sorted(set(names), key=lambda name: (order.index(name) if name in order else len(order), name))


def analyse_groups(groups: Samples, *, seed: int) -> Analysis:
    """The analysis of one way of measuring."""
    return analyse(groups, _ordered((key[0] for key in groups), ENTRY_ORDER), _ordered((key[1] for key in groups), SYSTEM_ORDER), seed=seed)


def analysis_of(run: RunPaths, *, via: str = "gateway", warm: bool = True) -> Analysis | None:
    """The analysis of a sealed run's samples taken that way; None when it took none."""
    record = run.read_sealed()
    frame = samples.read(run.samples)
    samples.require_complete(frame, record["parameters"], run.samples)
    groups = group(frame, via=via, warm=warm)
    return analyse_groups(groups, seed=int(record["seed"])) if groups else None


def write_csv(path: Path, columns: tuple[str, ...], lines: Iterable[tuple[Any, ...]]) -> None:
    """Write a summary: a header and `lines`."""
    pd.DataFrame.from_records(list(lines), columns=list(columns)).to_csv(path, index=False, lineterminator="\n", encoding="utf-8")


def _bounds(interval: Interval) -> tuple[str, str, str]:
    return f"{interval.value:.4f}", f"{interval.low:.4f}", f"{interval.high:.4f}"


def _line(row: Row) -> tuple[Any, ...]:
    times = (f"{row.median_s:.6f}", f"{row.mean_s:.6f}", f"{row.p95_s:.6f}")
    return (row.entry, row.system, row.n, row.blocks, *times, *_bounds(row.ratio_mean), *_bounds(row.ratio_median))


def aggregate(analysis: Analysis) -> list[tuple[str, str, str, str, str]]:
    """Lines of aggregate.csv: only systems that were measured have one."""
    lines = [
        ("entries", str(len({row.entry for row in analysis.rows})), "count", "", ""),
        ("systems", str(len(analysis.geomean)), "count", "", ""),
    ]
    for system, interval in analysis.geomean.items():
        if system != "stock":
            lines.append((f"{system.replace('-', '_')}_geomean", *_with_unit(interval)))
    if "kalium-enforce" in analysis.maximum:
        lines.append(("kalium_enforce_max", *_with_unit(analysis.maximum["kalium-enforce"])))
    return lines


def gateway_lines(gateway: Analysis, direct: Analysis | None) -> list[tuple[str, str, str, str, str]]:
    """What the gateway adds under stock (median over entries of the difference of medians), and the ratios without it."""
    if direct is None:
        return []
    through = {row.entry: row.median_s for row in gateway.rows if row.system == "stock"}
    past = {row.entry: row.median_s for row in direct.rows if row.system == "stock"}
    added = statistics.median(through[entry] - past[entry] for entry in past)
    lines = [("gateway_added_median", f"{added:.6f}", "s", "", "")]
    for system, interval in direct.geomean.items():
        if system != "stock":
            lines.append((f"{system.replace('-', '_')}_direct_geomean", *_with_unit(interval)))
    return lines


def _with_unit(interval: Interval) -> tuple[str, str, str, str]:
    value, low, high = _bounds(interval)
    return value, "ratio", low, high


def derive(run: RunPaths) -> None:
    """Write summary.csv, summary-cold.csv, summary-direct.csv and aggregate.csv of a sealed run."""
    for path, via, warm in ((run.summary, "gateway", True), (run.summary_cold, "gateway", False), (run.summary_direct, "direct", True)):
        found = analysis_of(run, via=via, warm=warm)
        if found is not None:
            write_csv(path, SUMMARY_COLUMNS, map(_line, found.rows))
    warm_analysis = analysis_of(run)
    assert warm_analysis is not None, "a complete run has warm samples"
    write_csv(run.aggregate, AGGREGATE_COLUMNS, aggregate(warm_analysis) + gateway_lines(warm_analysis, analysis_of(run, via="direct")))


def table(run: RunPaths) -> str:
    """The summary as a table for the screen: the same numbers as in summary.csv and aggregate.csv."""
    warm_analysis = analysis_of(run)
    assert warm_analysis is not None, "a complete run has warm samples"
    lines = [f"run e1/{run.stamp} (warm requests via the gateway; ratio of means to stock, 95 % interval over blocks)"]
    lines.append(f"{'entry':<24} {'system':<15} {'n':>4} {'median ms':>10} {'mean ms':>9} {'p95 ms':>9}   ratio")
    for row in warm_analysis.rows:
        ratio = row.ratio_mean
        lines.append(
            f"{row.entry:<24} {row.system:<15} {row.n:>4} {row.median_s * 1e3:>10.2f} {row.mean_s * 1e3:>9.2f} {row.p95_s * 1e3:>9.2f}"
            f"   {ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
        )
    lines += [
        f"geometric mean of ratios, {system}: {interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"
        for system, interval in warm_analysis.geomean.items()
        if system != "stock"
    ]
    for name, value, unit, low, high in gateway_lines(warm_analysis, analysis_of(run, via="direct")):
        lines.append(f"{name}: {float(value) * 1e3:.2f} ms" if unit == "s" else f"{name}: {value} [{low}, {high}]")
    return "\n".join(lines)
