"""What is there now, and removing what a task that was interrupted left behind."""

from __future__ import annotations

import json
import shutil

from experiments.entries import E2_FUNCTIONS, FUNCTIONS
from experiments.gateway import Gateway
from experiments.paths import RunPaths
from experiments.site import Site


def runs(site: Site) -> list[RunPaths]:
    """Every run in `results/`, by experiment and time."""
    return [RunPaths(where.parent) for where in sorted((site.checkout / "results").glob("*/*/run.json")) if not where.parent.is_symlink()]


def status(site: Site) -> str:
    """Gateway, deployed functions and runs, one a line."""
    gateway = Gateway.of(site)
    version = (gateway.information().get("version") or {}).get("release", "unknown")
    lines = [f"gateway {gateway.url}: version {version}", f"functions: {', '.join(gateway.functions()) or 'none'}"]
    for run in runs(site):
        record = json.loads(run.run.read_text(encoding="utf-8"))
        state = "complete" if run.seal_file.is_file() else "incomplete"
        lines.append(f"{run.experiment}/{run.stamp}: {record['profile']}, {state}, commit {record['commit'][:12]}")
    return "\n".join(lines)


def clean(site: Site) -> str:
    """Remove the benchmark's functions from the gateway and runs that did not complete; complete runs stay."""
    gateway = Gateway.of(site)
    left = [name for name in gateway.functions() if name in (*FUNCTIONS, *E2_FUNCTIONS)]
    gateway.remove_all(left)
    incomplete = [run for run in runs(site) if not run.seal_file.is_file()]
    for run in incomplete:
        shutil.rmtree(run.folder)
    return f"removed functions: {', '.join(left) or 'none'}\nremoved incomplete runs: {', '.join(str(run.folder) for run in incomplete) or 'none'}"
