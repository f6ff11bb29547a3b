"""`fab collect`: logs, verdicts, timings, journals and the cluster's own account, from every host at the same time, into one folder.

What is fetched is bounded, is on disk as it comes, and is listed with its size and SHA-256 in `manifest.json`, which is written
last. A host that fails keeps nobody from the rest: it is named there, and the task's exit code says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from experiments import machine
from experiments.errors import EXIT_NO, EXIT_USAGE, ExperimentError
from experiments.machine import Machine
from experiments.paths import STAMP, RunPaths, utc_now, write_whole
from experiments.site import Site

SCHEMA = "kalium-collected/v1"
MEBIBYTE = 1 << 20
FILE_MIB_DEFAULT = 16
FILE_SECONDS_MAX = 300.0
JOURNAL_UNITS = ("kalium-*", "kubelet", "containerd", "k3s*")
# Sizes and names of the files in a folder, the links and folders in it left out.
LIST_FILES = 'find "$1" -maxdepth 2 -type f -printf "%s %P\\n" 2>/dev/null || true'
# The last $1 bytes of what a command prints are the newest. The exit status is the command's, which a pipe would hide.
LAST_OF = """
limit="$1"; shift; exec 4>&1
status=$({ { "$@" 3>&- 4>&-; echo "$?" >&3; } | tail -c "$limit" >&4 3>&-; } 3>&1)
exit "$status"
"""
ABOUT = "uname -a; cat /etc/os-release; uptime; df -Ph; free -m; ip -o addr; timedatectl 2>/dev/null || date --utc"


@dataclass(frozen=True)
class Source:
    """One thing to fetch from a host: a command, the file it becomes, and its whole size where that is known before."""

    name: str
    command: Sequence[str]
    size: int | None = None


@dataclass
class Fetched:
    """What came from one host."""

    host: str
    files: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


def digest(path: Path) -> str:
    """SHA-256 of a file, which need not fit into memory."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(MEBIBYTE):
            whole.update(block)
    return whole.hexdigest()


def sources(one: Machine, site: Site, limit: int, since: str) -> list[Source]:
    """What there is on a host: the files of the log folder, the journal where systemd keeps one, the cluster's account where it is asked."""
    listing = one.checked(["sh", "-c", LIST_FILES, "sh", str(site.log_folder)], root=True, again=True).decode("utf-8", "replace")
    found = [Source("host.txt", ["sh", "-c", ABOUT])]
    for line in sorted(listing.splitlines(), key=lambda line: line.partition(" ")[2]):
        size, _, name = line.partition(" ")
        found.append(Source(f"log/{name}", ["tail", "-c", str(limit), "--", str(site.log_folder / name)], int(size)))
    if site.service_manager == "systemd" and not one.host.is_local:
        units = [word for unit in JOURNAL_UNITS for word in ("--unit", unit)]
        journal = ["journalctl", "--no-pager", "--output", "short-iso-precise", *units, *(["--since", since] if since else [])]
        found.append(Source("journal.log", ["sh", "-c", LAST_OF, "sh", str(limit), *journal]))
    if site.cluster is not None and one.host == site.control:
        kubectl = ["kubectl", "--kubeconfig", str(site.cluster.kubeconfig), "--request-timeout", "60s"]
        found += [
            Source("cluster/pods.txt", [*kubectl, "get", "pods", "-A", "-o", "wide"]),
            Source("cluster/pods.json", ["sh", "-c", LAST_OF, "sh", str(limit), *kubectl, "get", "pods", "-A", "-o", "json"]),
            Source("cluster/nodes.txt", [*kubectl, "get", "nodes", "-o", "wide"]),
            Source("cluster/nodes.json", ["sh", "-c", LAST_OF, "sh", str(limit), *kubectl, "get", "nodes", "-o", "json"]),
            Source("cluster/events.txt", ["sh", "-c", LAST_OF, "sh", str(limit), *kubectl, "get", "events", "-A", "--sort-by", ".lastTimestamp"]),
            Source("cluster/runtimeclasses.txt", [*kubectl, "get", "runtimeclasses"]),
        ]
    return found


def fetch(one: Machine, site: Site, folder: Path, limit: int, since: str, begin: float) -> Fetched:
    """Everything of one host, until something fails; what came before that stays."""
    result = Fetched(one.host.name)
    try:
        for source in sources(one, site, limit, since):
            where = folder / one.host.name / source.name
            where.parent.mkdir(parents=True, exist_ok=True)
            with where.open("xb") as file:
                done = one.copy(source.command, file, root=True, seconds_max=FILE_SECONDS_MAX)
            entry: dict[str, Any] = {
                "file": where.relative_to(folder).as_posix(), "host": one.host.name, "bytes": where.stat().st_size, "sha256": digest(where),
                "cut": where.stat().st_size == limit != source.size,  # how long a journal is nobody knows before
            }  # fmt: skip
            if done.status != 0:
                entry["error"] = done.complaint()
            result.files.append(entry)
    except ExperimentError as error:
        result.error = f"{error.attempted}: {error.found}"
    except OSError as error:
        result.error = f"write {error.filename or folder}: {error.strerror or error}"
    total = sum(entry["bytes"] for entry in result.files)
    state = f"failed: {result.error}" if result.error else "complete"
    print(f"[{time.monotonic() - begin:5.0f} s] {one.host.name:<12} {len(result.files):>3} files, {total / MEBIBYTE:.1f} MiB, {state}", flush=True)
    return result


def where_for(run: str | None, site: Site) -> tuple[Path, str]:
    """The folder to fill, which is new, and since when the journal is wanted: from the run's start on, or all of it."""
    stamp = datetime.now(timezone.utc).strftime(STAMP)
    results = site.checkout / "results"
    if run is None:
        return results / "collect" / stamp / "collected", ""
    parts = run.rstrip("/").split("/")
    named = results / "/".join(parts[-2:])
    if not re.fullmatch(r"[a-z0-9-]+/[0-9TZ]+|[a-z0-9-]+/latest", "/".join(parts[-2:])) or not (named / "run.json").is_file():
        raise ExperimentError(
            "run.absent", f"collect for run {run}", f"{named} holds no run.json", "name it as EXPERIMENT/STAMP, as `fab status` lists it",
            exit_code=EXIT_USAGE,
        )  # fmt: skip
    paths = RunPaths(named.resolve())
    start = datetime.fromisoformat(json.loads(paths.run.read_text(encoding="utf-8"))["start"])
    return paths.collected / stamp, start.astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """What is written here stands in this `with`: a disk that is full is told with a next step."""
    try:
        yield
    except OSError as error:
        raise ExperimentError(
            "results.write",
            f"write {error.filename or 'the manifest'}",
            error.strerror or str(error),
            "make room on this machine, then collect again",
        ) from error


def collect(site: Site, run: str | None, *, mib: int = FILE_MIB_DEFAULT) -> str:
    """Fetch everything; the result says where it is. Raises ExperimentError after writing the manifest when something is missing."""
    if not 1 <= mib <= 4096:
        raise ExperimentError(
            "collect.limit", f"take {mib} MiB of each file", "it is no size", "give --mib a number from 1 to 4096", exit_code=EXIT_USAGE
        )
    folder, since = where_for(run, site)
    with _room():
        folder.mkdir(parents=True)
    begin, start = time.monotonic(), utc_now()
    outcomes = machine.attempt(site.hosts.values(), lambda one: fetch(one, site, folder, mib * MEBIBYTE, since, begin))
    fetched = [outcome for _, outcome in outcomes if isinstance(outcome, Fetched)]
    files = [entry for one in fetched for entry in one.files]
    failed = {one.host: one.error for one in fetched if one.error}
    manifest = {
        "schema": SCHEMA, "site": site.name, "site_sha256": site.site_sha256, "run": run, "start": start, "end": utc_now(),
        "limit_bytes": mib * MEBIBYTE, "files": files, "failed": failed,
    }  # fmt: skip
    with _room():
        write_whole(folder / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    if failed:
        raise ExperimentError(
            "collect.partial", f"collect from {len(site.hosts)} hosts into {folder}",
            "; ".join(f"{host}: {error}" for host, error in failed.items()), "the rest is there; see to these hosts, then collect again",
            exit_code=EXIT_NO,
        )  # fmt: skip
    cut = [entry["file"] for entry in files if entry["cut"]]
    lines = [f"{len(files)} files, {sum(entry['bytes'] for entry in files) / MEBIBYTE:.1f} MiB of {len(fetched)} host(s): {folder}"]
    lines += [f"cut to their last {mib} MiB: {', '.join(cut)} (--mib takes more)"] if cut else []
    lines += [f"{entry['file']}: {entry['error']}" for entry in files if "error" in entry]
    return "\n".join(lines)
