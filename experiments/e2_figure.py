"""The figure of E2: a histogram of each phase by system call, with what was published beside it. A function of a sealed run alone."""

from __future__ import annotations

import csv
import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from experiments.e2_analysis import HEADLINE_BYTES, OFF, Key, Spans, of_run
from experiments.figures import STYLE, save
from experiments.paths import RunPaths
from experiments.timings import PHASES

REFERENCE = Path(__file__).resolve().parents[1] / "results" / "reference" / "e2.csv"
TITLES = {
    "record": "(i) TLS record parsing", "open": "(ii) key look-up and opening", "event": "(iii) event construction",
    "local": "(iv) local graph look-up", "controller": "(v) controller query", "total": "(vi) total added", "reseal": "(vii) re-seal",
}  # fmt: skip
COLOURS = {"write": "#1f5f99", "sendto": "#7fb2d9", "sendmsg": "#c0602f"}
DASHES = {"https-get": "-", "invoke": "--"}
LOW_US, HIGH_US, BINS = 0.02, 20_000.0, 72  # beyond the ends samples are counted in the last bin


def published() -> dict[str, tuple[float, float, str]]:
    """What is published of a phase: the bounds in microseconds that its words mean, and the words."""
    with REFERENCE.open(encoding="utf-8", newline="") as file:
        return {row["phase"]: (float(row["low_us"]), float(row["high_us"]), row["words"]) for row in csv.DictReader(file)}


def shown(key: Key) -> bool:
    """Whether the figure draws this cell: the paper's two columns and sendto, at the size that the summary names."""
    return key.workload in DASHES and key.size == HEADLINE_BYTES


def compose(spans: Spans, *, stamp: str, profile: str, blocks: int) -> Figure:
    """The figure, not yet written."""
    edges = np.geomspace(LOW_US, HIGH_US, BINS + 1)
    said = published()
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(2, 4, figsize=(10.2, 4.9), sharex=True)
        panels: dict[str, Any] = dict(zip(PHASES, grid.flat, strict=False))
        for phase, axes in panels.items():
            for key, phases in spans.items():
                if shown(key) and phase in phases:
                    clipped = np.clip(phases[phase], LOW_US, HIGH_US * (1 - 1e-9))
                    weights = np.full(len(clipped), 100 / len(clipped))
                    axes.hist(
                        clipped, bins=edges, weights=weights, histtype="step", color=COLOURS[key.call], linestyle=DASHES[key.workload], linewidth=1.0
                    )
                    axes.axvline(float(np.median(phases[phase])), color=COLOURS[key.call], linestyle=DASHES[key.workload], linewidth=0.5, alpha=0.6)
            if phase in said:
                low, high, words = said[phase]
                axes.axvspan(low, high, color="#e0a84a", alpha=0.35, linewidth=0)
                axes.set_ylim(top=1.4 * axes.get_ylim()[1])  # room for the words
                told = textwrap.fill(f"published 2023: {words}", 32)
                axes.text(0.99, 0.98, told, transform=axes.transAxes, ha="right", va="top", fontsize=6)
            if not axes.patches and phase not in said:
                axes.text(0.5, 0.5, "does not occur in this run", transform=axes.transAxes, ha="center", fontsize=6)
            axes.set_xscale("log")
            axes.set_xlim(LOW_US, HIGH_US)
            axes.set_title(TITLES[phase], fontsize=8)
            axes.tick_params(labelbottom=True)
        for axes in grid[:, 0]:
            axes.set_ylabel("messages, % a bin")
        for axes in grid[1, :]:
            axes.set_xlabel("microseconds")
        _legend(grid[1, 3], spans)
        note = (
            f"Run e2/{stamp} ({profile}, {blocks} blocks), heads of {HEADLINE_BYTES} bytes; measured inside the guard, without the send itself;"
            " thin lines: medians. Publicly, no values of the single phases are known."
        )
        figure.text(0.01, 0.01, note, fontsize=6, va="bottom")
        figure.subplots_adjust(left=0.06, right=0.99, top=0.94, bottom=0.14, wspace=0.25, hspace=0.42)
    return figure


def _legend(axes: Any, spans: Spans) -> None:
    """What the lines mean, with p50 and p99 of the totals."""
    axes.axis("off")
    for key, phases in spans.items():
        if shown(key) or key.workload == OFF:
            p50, p99 = np.quantile(phases["total"], (0.5, 0.99))
            style = {"color": COLOURS[key.call], "linestyle": DASHES[key.workload]} if shown(key) else {"color": "none"}
            axes.plot([], [], linewidth=1.0, label=f"{key.workload}, {key.call}: {p50:.1f} / {p99:.1f} us", **style)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="center", frameon=False, fontsize=6, title="total, p50 / p99", title_fontsize=7)


def draw(run: RunPaths) -> list[Path]:
    """Write the figure of a sealed run as PNG, SVG and PDF; repeated, the bytes are the same."""
    record = run.read_sealed()
    figure = compose(of_run(run), stamp=run.stamp, profile=str(record["profile"]), blocks=int(record["parameters"]["blocks"]))
    return save(figure, run)
