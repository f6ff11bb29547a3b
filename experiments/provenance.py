"""What run.json says about where numbers come from: commit, pins, hosts, kernel, site, platform."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from experiments.errors import ExperimentError
from experiments.paths import RESULTS_SCHEMA, utc_now
from experiments.site import Site, files_of_site

JUDGING = "tls=opened"  # what the guard sees of HTTPS: every message, opened with the key that the client logs
GIT_SECONDS_MAX = 20


def _git(checkout: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-c", f"safe.directory={checkout}", *arguments], cwd=checkout, capture_output=True, text=True, timeout=GIT_SECONDS_MAX, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise ExperimentError("provenance.git", f"ask git for the commit of {checkout}", str(error), "run the task in a git checkout") from error
    return done.stdout.strip()


def pins(checkout: Path, inventory: str) -> dict[str, str]:
    """SHA-256 of each file that fixes a version, by path relative to the checkout."""
    files = {path for path in files_of_site(checkout, inventory) if path.parts[0] == "roles"}
    files |= {path.relative_to(checkout) for path in (checkout / "requirements").glob("*.txt")}
    files |= {path.relative_to(checkout) for path in (checkout / "runtime").glob("go.*")}
    return {path.as_posix(): hashlib.sha256((checkout / path).read_bytes()).hexdigest() for path in sorted(files)}


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def opening_record(site: Site, *, experiment: str, profile: str, seed: int, parameters: dict[str, Any], gateway: dict[str, Any]) -> dict[str, Any]:
    """run.json as it stands when a run begins; the runner adds `end` and `complete` (or `error`)."""
    return {
        "schema": RESULTS_SCHEMA,
        "experiment": experiment,
        "commit": _git(site.checkout, "rev-parse", "HEAD"),
        "changed_files": _git(site.checkout, "status", "--porcelain").splitlines(),
        "pins": pins(site.checkout, site.inventory.rstrip("/")),
        "hosts": {"operator": platform.node(), "client": str(site.client), "processor": _processor(), "cpus": os.cpu_count()},
        "kernel": platform.release(),
        "site": site.name,
        "site_sha256": site.site_sha256,
        "site_commit": site.commit,
        "platform": {"engine": site.engine, "gvisor": "systrap", "gateway": gateway},
        "tls": "opened, judged message by message, and sealed again",
        "judging": JUDGING,
        "profile": profile,
        "seed": seed,
        "parameters": parameters,
        "start": utc_now(),
        "complete": False,
    }
