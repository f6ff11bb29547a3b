"""Ratios to stock with paired bootstrap intervals over blocks: pure functions of samples, seeded, no files and no clock.

The unit of replication is the block (fresh deployments of all systems), so whole blocks are drawn again, the same ones
for every entry and system of a replicate: what a block did to all systems alike cancels in the ratio.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

BASELINE = "stock"
REPLICATES = 4000
INTERVAL_PERCENT = (2.5, 97.5)
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value between the bounds that the bootstrap gave it."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One entry under one system: times in seconds, ratios to the baseline."""

    entry: str
    system: str
    n: int
    blocks: int
    median_s: float
    mean_s: float
    p95_s: float
    ratio_mean: Interval
    ratio_median: Interval


@dataclass(frozen=True)
class Analysis:
    """Rows in the order of entries and systems given, and the geometric means of `ratio_mean` over entries by system."""

    rows: Sequence[Row]
    geomean: Mapping[str, Interval]
    maximum: Mapping[str, Interval]


# (entry, system, block) -> seconds of its samples
Samples = Mapping[tuple[str, str, int], Sequence[float]]


def draw_blocks(blocks: int, seed: int) -> npt.NDArray[np.int64]:
    """Which blocks each replicate consists of: REPLICATES rows of `blocks` indexes; the same for the same seed."""
    return np.random.default_rng(seed).integers(0, blocks, size=(REPLICATES, blocks), dtype=np.int64)


def _means(groups: Sequence[Floats], draws: npt.NDArray[np.int64]) -> Floats:
    sums = np.array([group.sum() for group in groups])
    counts = np.array([group.size for group in groups])
    return np.asarray(sums[draws].sum(axis=1) / counts[draws].sum(axis=1), dtype=np.float64)


def _medians(groups: Sequence[Floats], draws: npt.NDArray[np.int64]) -> Floats:
    known: dict[tuple[int, ...], float] = {}  # few blocks give few distinct replicates
    medians = np.empty(len(draws))
    for index, draw in enumerate(np.sort(draws, axis=1)):
        key = tuple(int(block) for block in draw)
        if key not in known:
            known[key] = float(np.median(np.concatenate([groups[block] for block in key])))
        medians[index] = known[key]
    return medians


def _interval(value: float, replicates: Floats) -> Interval:
    low, high = np.percentile(replicates, INTERVAL_PERCENT)
    return Interval(value, float(low), float(high))


def analyse(samples: Samples, entries: Iterable[str], systems: Iterable[str], *, seed: int) -> Analysis:
    """Summarise `samples`: each of `entries` x `systems` must have samples in the same blocks, numbered from 0.

    Raises ValueError when a block of an entry and system has none: a ratio over other blocks would not be paired.
    """
    entries, systems = list(entries), list(systems)
    blocks = 1 + max(block for _, _, block in samples)
    missing = [
        f"{entry}/{system}/block {block}"
        for entry in entries
        for system in systems
        for block in range(blocks)
        if not samples.get((entry, system, block))
    ]
    if missing:
        raise ValueError(f"no samples for {', '.join(missing[:5])}{' and more' if len(missing) > 5 else ''}")
    draws = draw_blocks(blocks, seed)

    rows: list[Row] = []
    ratios: dict[str, list[Floats]] = {system: [] for system in systems}
    for entry in entries:
        groups = {system: [np.asarray(samples[entry, system, block], dtype=np.float64) for block in range(blocks)] for system in systems}
        pooled = {system: np.concatenate(groups[system]) for system in systems}
        base_means, base_medians = _means(groups[BASELINE], draws), _medians(groups[BASELINE], draws)
        for system in systems:
            values = pooled[system]
            replicate_ratios = _means(groups[system], draws) / base_means
            ratios[system].append(replicate_ratios)
            rows.append(
                Row(
                    entry=entry,
                    system=system,
                    n=int(values.size),
                    blocks=blocks,
                    median_s=float(np.median(values)),
                    mean_s=float(values.mean()),
                    p95_s=float(np.percentile(values, 95)),
                    ratio_mean=_interval(float(values.mean() / pooled[BASELINE].mean()), replicate_ratios),
                    ratio_median=_interval(float(np.median(values) / np.median(pooled[BASELINE])), _medians(groups[system], draws) / base_medians),
                )
            )
    point = {system: np.array([row.ratio_mean.value for row in rows if row.system == system]) for system in systems}
    return Analysis(
        rows=rows,
        geomean={
            system: _interval(float(np.exp(np.log(point[system]).mean())), np.exp(np.log(np.array(ratios[system])).mean(axis=0)))
            for system in systems
        },
        maximum={system: _interval(float(point[system].max()), np.array(ratios[system]).max(axis=0)) for system in systems},
    )
