"""What run.json says about where numbers come from: commit, pins, hosts, kernel, site, platform."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from experiments import machine
from experiments.errors import ExperimentError
from experiments.machine import Machine
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


# Of a node: kernel, processors, their name, memory in KiB; one a line.
ASK_NODE = "uname -r; nproc; sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1; sed -n 's/^MemTotal: *\\([0-9]*\\).*/\\1/p' /proc/meminfo"


def _node(one: Machine) -> dict[str, Any]:
    kernel, cpus, *processor, memory = one.checked(["sh", "-c", ASK_NODE], again=True).decode("utf-8", "replace").splitlines()
    return {"name": one.host.name, "kernel": kernel, "cpus": int(cpus), "processor": " ".join(processor), "memory_kib": int(memory)}


def _hosts(site: Site) -> tuple[dict[str, Any], str]:
    """`hosts` and `kernel` of run.json. Where functions run on other machines than this one, those are what the numbers come from."""
    hosts = {"operator": platform.node(), "client": str(site.client), "processor": _processor(), "cpus": os.cpu_count()}
    if site.cluster is None:
        return hosts, platform.release()
    others = machine.each(machine.distinct([*site.nodes, site.client, site.control]), _node)
    nodes = [entry for entry in others if entry["name"] in site.groups["function_nodes"]]
    return {**hosts, "nodes": others}, ", ".join(sorted({entry["kernel"] for entry in nodes}))


def opening_record(site: Site, *, experiment: str, profile: str, seed: int, parameters: dict[str, Any], gateway: dict[str, Any]) -> dict[str, Any]:
    """run.json as it stands when a run begins; the runner adds `end` and `complete` (or `error`)."""
    hosts, kernel = _hosts(site)
    return {
        "schema": RESULTS_SCHEMA,
        "experiment": experiment,
        "commit": _git(site.checkout, "rev-parse", "HEAD"),
        "changed_files": _git(site.checkout, "status", "--porcelain").splitlines(),
        "pins": pins(site.checkout, site.inventory.rstrip("/")),
        "hosts": hosts,
        "kernel": kernel,
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
