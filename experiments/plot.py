"""`fab plot`: summaries and figures of sealed runs, written again from their samples."""

from __future__ import annotations

from pathlib import Path

from experiments import analysis, e2_analysis, e2_figure, figures
from experiments.errors import EXIT_USAGE, ExperimentError
from experiments.paths import RunPaths
from experiments.site import Site

STEPS = {"e1": (analysis.derive, figures.draw), "e2": (e2_analysis.derive, e2_figure.draw)}


def chosen(run: str | None, results: Path) -> list[RunPaths]:
    """The runs that `run` means: a folder, `EXPERIMENT/STAMP` or a stamp; without it the `latest` of each experiment that has one."""
    if run is None:
        there = [experiment for experiment in STEPS if (results / experiment / "latest").exists()]
        return [RunPaths.find(experiment, None, results=results) for experiment in there or ["e1"]]
    named = [RunPaths.find(experiment, run, results=results) for experiment in STEPS if "/" not in run and (results / experiment / run).is_dir()]
    if named:
        return named
    folder = results / run if (results / run).is_dir() else Path(run)
    found = RunPaths.find(folder.resolve().parent.name, str(folder), results=results)
    if found.experiment not in STEPS:
        raise ExperimentError(
            "plot.experiment",
            f"draw {found.folder}",
            f"it is no run of {', '.join(STEPS)}",
            "name a run of one of them with --run",
            exit_code=EXIT_USAGE,
        )
    return [found]


def plot(site: Site, run: str | None) -> str:
    """Rewrite summaries and figures of the chosen runs and say which they were."""
    lines = []
    for paths in chosen(run, site.checkout / "results"):
        derive, draw = STEPS[paths.experiment]
        derive(paths)
        lines += [f"run {paths.experiment}/{paths.stamp}", *(str(path) for path in draw(paths))]
    return "\n".join(lines)
