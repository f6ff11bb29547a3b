"""Runs of the guard's suites and benchmarks in results/: sealed like an experiment's, on no site but a lab's."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments.paths import RESULTS_SCHEMA, RunPaths, utc_now
from experiments.provenance import JUDGING

from .lab import ROOT

SITE = "lab"


def _git(*arguments: str) -> str:
    command = ["git", "-c", f"safe.directory={ROOT}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def recorded(experiment: str, *, profile: str, seed: int, parameters: Mapping[str, Any]) -> Iterator[RunPaths]:
    """A run in results/`experiment`/<stamp>/, sealed when the `with` ends without an exception."""
    run = RunPaths.create(experiment, results=ROOT / "results")
    record = {
        "schema": RESULTS_SCHEMA,
        "experiment": experiment,
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": _git("status", "--porcelain").splitlines(),
        "hosts": {"operator": platform.node(), "cpus": os.cpu_count()},
        "kernel": platform.release(),
        "site": SITE,
        "site_sha256": SITE,
        "platform": {"engine": "lab", "gvisor": "systrap"},
        "judging": JUDGING,
        "profile": profile,
        "seed": seed,
        "parameters": dict(parameters),
        "start": utc_now(),
        "complete": False,
    }
    run.write_record(record)
    try:
        yield run
        run.write_record({**record, "end": utc_now(), "complete": True})
        run.seal()
        run.point_latest(SITE)
    finally:
        _give_back(run.folder)


def _give_back(folder: Path) -> None:
    """What root wrote into the checkout belongs to the checkout's owner."""
    owner = ROOT.stat()
    above = [parent for parent in folder.parents if ROOT in parent.parents]
    for path in (*above, folder, *folder.rglob("*"), folder.parent / "latest"):
        if path.is_symlink() or path.exists():
            os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows as CSV; the first row's keys are the columns."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_summary(run: RunPaths, figures: Mapping[str, tuple[float, str]]) -> None:
    """summary.csv: name, value, unit."""
    write_table(run.summary, [{"name": name, "value": f"{value:g}", "unit": unit} for name, (value, unit) in figures.items()])
