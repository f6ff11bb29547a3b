"""The figure of E1: our ratios with their intervals, the published bars beside them. A function of a sealed run alone.

What the figures of all experiments share, style and the way to files, is here too.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # no display is asked for, on any machine

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.analysis import analysis_of
from experiments.paths import RunPaths
from experiments.statistics import Analysis, Row

REFERENCE = Path(__file__).resolve().parents[1] / "results" / "reference" / "figure8.csv"
SUFFIXES = ("png", "svg", "pdf")
# Without these, each format writes the date or a random identifier, and the same run would not give the same bytes.
METADATA: Mapping[str, Mapping[str, str | None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "kalium",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "font.family": "DejaVu Sans",  # comes with matplotlib, so that a machine's fonts do not change the bytes
    "font.size": 8,
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
COLOURS = {"stock-b": "#b8b8b8", "kalium-audit": "#7fb2d9", "kalium-enforce": "#1f5f99", "published": "#e0a84a"}
LABELS = {
    "stock-b": "stock gVisor, second deployment (control)",
    "kalium-audit": "Kalium, audit",
    "kalium-enforce": "Kalium, enforce",
    "published": "Kalium, published 2023",
}
# Entries whose work includes HTTPS. While the guard judges TLS per connection, a published value of a system that opened
# TLS measures something else, so none is drawn for them.
HTTPS_ENTRIES = frozenset({"microbenchmark", "product-photos-receive", "product-master-photos"})
BAR_WIDTH = 0.2


def published() -> dict[str, float]:
    """The published ratio of Kalium by entry."""
    with REFERENCE.open(encoding="utf-8", newline="") as file:
        return {row["entry"]: float(row["kalium"]) for row in csv.DictReader(file)}


def comparable(entry: str, judging: str) -> bool:
    """Whether the published value of `entry` may stand beside a run that judged TLS as `judging` says."""
    return not (judging == "tls=connection" and entry in HTTPS_ENTRIES)


def compose(analysis: Analysis, *, stamp: str, profile: str, judging: str) -> Figure:
    """The figure, not yet written."""
    rows: dict[tuple[str, str], Row] = {(row.entry, row.system): row for row in analysis.rows}
    entries = list(dict.fromkeys(row.entry for row in analysis.rows))
    reference = published()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.2, 3.9))
        for position, series in enumerate(COLOURS):
            heights, centres, spans = [], [], ([], [])  # type: tuple[list[float], list[float], tuple[list[float], list[float]]]
            for index, entry in enumerate(entries):
                if series == "published":
                    if not comparable(entry, judging) or entry not in reference:
                        continue
                    value = low = high = reference[entry]
                elif (entry, series) in rows:
                    ratio = rows[entry, series].ratio_mean
                    value, low, high = ratio.value, ratio.low, ratio.high
                else:
                    continue
                centres.append(index + (position - 1.5) * BAR_WIDTH)
                heights.append(value)
                spans[0].append(max(0.0, value - low))
                spans[1].append(max(0.0, high - value))
            axes.bar(
                centres,
                heights,
                BAR_WIDTH * 0.92,
                color=COLOURS[series],
                label=LABELS[series],
                hatch="//" if series == "published" else None,
                edgecolor="white",
                linewidth=0.4,
                yerr=None if series == "published" else spans,
                error_kw={"elinewidth": 0.9, "capsize": 2.0, "ecolor": "#222222"},
            )
            for centre, height, above in zip(centres, heights, spans[1], strict=True):
                shown = height + (0.0 if series == "published" else above)
                axes.annotate(f"{height:.2f}", (centre, shown), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=6)
        axes.axhline(1.0, color="#222222", linewidth=0.8, linestyle=":")
        marks = {entry: "" if comparable(entry, judging) else " †" for entry in entries}
        axes.set_xticks(range(len(entries)), [entry.replace("product-", "product-\n", 1) + marks[entry] for entry in entries])
        axes.set_ylabel("mean latency relative to stock gVisor")
        axes.set_ylim(bottom=0.0)
        axes.margins(y=0.12)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=2, frameon=False)
        blocks = analysis.rows[0].blocks
        note = f"Run e1/{stamp} ({profile}, {blocks} blocks); bars: ratio of means of warm requests, whiskers: 95 % paired bootstrap over blocks."
        if any(marks.values()):
            note += (
                "\n† uses HTTPS: this run judged TLS per connection (judging: tls=connection), the published system opened it;"
                " the published bar is left out."
            )
        figure.text(0.01, 0.01, note, fontsize=6, va="bottom")
        figure.subplots_adjust(left=0.08, right=0.99, top=0.87, bottom=0.22)
    return figure


def draw(run: RunPaths) -> list[Path]:
    """Write the figure of a sealed run as PNG, SVG and PDF; repeated, the bytes are the same."""
    record = run.read_sealed()
    analysis = analysis_of(run)
    assert analysis is not None, "a complete run has warm samples"
    return save(compose(analysis, stamp=run.stamp, profile=str(record["profile"]), judging=str(record["judging"])), run)


def save(figure: Figure, run: RunPaths) -> list[Path]:
    """Write a run's figure in every format and give its memory back."""
    written = []
    try:
        for suffix in SUFFIXES:
            path = run.figure(suffix)
            path.parent.mkdir(exist_ok=True)
            with plt.rc_context(STYLE):
                figure.savefig(path, format=suffix, metadata=dict(METADATA[suffix]))
            written.append(path)
    finally:
        plt.close(figure)
    return written
