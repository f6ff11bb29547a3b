"""A run that stopped and goes on: which blocks it has, and what happened to it.

`progress.json` stands in the folder of a run from its first moment until it is sealed or refused. Samples of a block are kept apart
until the block is whole, and only then move into samples.csv; what an interrupted block left is kept under another name, sealed
with the run, and counted by nothing. Whoever goes on with a run proves first that its samples are those it stopped with.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments.errors import EXIT_USAGE, ExperimentError, RunRefused
from experiments.paths import RunPaths, utc_now, write_whole

# What a run may not change in the middle: the sources, the pins, the site, and what was asked for.
SAME = ("commit", "changed_files", "pins", "site", "site_sha256", "site_commit", "profile", "seed", "parameters")
# What may have changed while nobody measured; a difference is written down.
TOLD = ("hosts", "kernel", "platform")


@dataclass
class Progress:
    """How far a run is. `blocks` are whole; `kept` is what run.json says of them."""

    blocks: int = 0
    samples_bytes: int = 0
    samples_sha256: str = hashlib.sha256().hexdigest()
    kept: dict[str, Any] = field(default_factory=dict)
    interruptions: list[dict[str, Any]] = field(default_factory=list)

    def save(self, run: RunPaths) -> None:
        """Write it; it is on disk as a whole, or the older one still is."""
        write_whole(run.progress, json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")

    def end(self, run: RunPaths) -> None:
        """The run is over, sealed or refused: nobody goes on with it."""
        run.progress.unlink(missing_ok=True)

    def take_block(self, run: RunPaths, kept: Mapping[str, Any]) -> None:
        """Move the samples of a whole block into samples.csv. Interrupted at any point, the block is there whole or not at all."""
        block = run.block.read_bytes().partition(b"\n")[2]  # behind its header
        with run.samples.open("r+b") as file:
            file.truncate(self.samples_bytes)
            file.seek(self.samples_bytes)
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
        self.blocks += 1
        self.samples_bytes += len(block)
        self.samples_sha256 = hashlib.sha256(run.samples.read_bytes()).hexdigest()
        self.kept = dict(kept)
        self.save(run)
        run.block.unlink()


def begin(run: RunPaths, header: str) -> Progress:
    """The progress of a new run, whose samples.csv has its header."""
    write_whole(run.samples, header)
    progress = Progress(samples_bytes=len(header.encode("utf-8")), samples_sha256=hashlib.sha256(header.encode("utf-8")).hexdigest())
    progress.save(run)
    return progress


def _refuse(run: RunPaths, found: str, next_step: str = "begin a new run") -> RunRefused:
    return RunRefused("run.resume", f"go on with run {run.experiment}/{run.stamp}", found, next_step)


def find(experiment: str, stamp: str, *, results: Path) -> tuple[RunPaths, dict[str, Any]]:
    """The interrupted run of that stamp and its run.json. Raises ExperimentError when there is none to go on with."""
    run = RunPaths(results / experiment / stamp.rstrip("/").rpartition("/")[2])
    if not run.run.is_file():
        raise ExperimentError(
            "run.absent", f"go on with run {experiment}/{run.stamp}", f"{run.folder} holds no run.json",
            "name a run that `fab status` lists as interrupted", exit_code=EXIT_USAGE,
        )  # fmt: skip
    record = json.loads(run.run.read_text(encoding="utf-8"))
    if run.seal_file.exists():
        raise _refuse(run, "it is complete and sealed")
    if not run.progress.is_file():
        raise _refuse(run, f"it was refused: {record.get('error', 'it has no progress.json')}", f"find the cause, then `fab run-{experiment}`")
    return run, record


def resume(run: RunPaths, before: Mapping[str, Any], now: Mapping[str, Any]) -> Progress:
    """The progress of an interrupted run, with this interruption added.

    `before` is its run.json, `now` what a run that began now would have in its own. Raises RunRefused when they differ in what
    may not change, and when samples.csv is not what the run left.
    """
    now = json.loads(json.dumps(now))  # as it would stand in run.json
    for name in SAME:
        if before.get(name) != now[name]:
            raise _refuse(
                run, f"{name} was {_short(before.get(name))} when it began and is {_short(now[name])} now", "go back to it, or begin a new run"
            )
    progress = Progress(**json.loads(run.progress.read_text(encoding="utf-8")))
    samples = run.samples.read_bytes()
    if len(samples) < progress.samples_bytes or hashlib.sha256(samples[: progress.samples_bytes]).hexdigest() != progress.samples_sha256:
        raise _refuse(run, "its samples.csv is not what it was when the run stopped")
    interruption = {
        "block": progress.blocks,
        "stopped": before.get("end"),
        "error": before.get("error", "it ended without a word"),
        "resumed": utc_now(),
        "changed": {name: [before.get(name), now[name]] for name in TOLD if before.get(name) != now[name]},
    }
    if run.block.is_file():
        left = run.interrupted(len(progress.interruptions) + 1)
        run.block.rename(left)
        interruption["samples"] = left.name
    progress.interruptions.append(interruption)
    progress.save(run)
    with run.samples.open("r+b") as file:
        file.truncate(progress.samples_bytes)
    return progress


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else f"{text[:77]}..."


@contextlib.contextmanager
def alone(run: RunPaths) -> Iterator[None]:
    """Nobody else writes this run meanwhile. Raises ExperimentError when somebody does."""
    folder = os.open(run.folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(folder)
        raise ExperimentError("run.busy", f"write run {run.experiment}/{run.stamp}", "another process is writing it", "wait for it to end") from error
    try:
        yield
    finally:
        os.close(folder)
