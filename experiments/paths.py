"""Where a run lives on disk, and what makes it trustworthy: it is written once, sealed, and read only when the seal holds."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from experiments.errors import EXIT_USAGE, ExperimentError, RunRefused

RESULTS_SCHEMA = "kalium-results/v1"
STAMP = "%Y%m%dT%H%M%SZ"
PROFILES = ("quick", "full")  # lowest first
CREATE_ATTEMPTS_MAX = 5
# Functions of the sealed files, rewritten by `fab plot`, byte-identically, and so outside the seal; and what says how far a run is.
DERIVED = frozenset(
    {"progress.json", "SHA256SUMS", "summary.csv", "summary-cold.csv", "summary-direct.csv", "aggregate.csv", "phases.csv", "cases.csv"}
)
DERIVED_FOLDER = "figures"
# Logs of the site's hosts, fetched whenever somebody asks; each fetch has a manifest of its own with digests.
COLLECTED_FOLDER = "collected"


def utc_now() -> str:
    """The time as run.json writes it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class RunPaths:
    """The files of one run. No other module spells a path below `results/`."""

    folder: Path

    @classmethod
    def create(cls, experiment: str, *, results: Path) -> RunPaths:
        """A new, empty folder `results/<experiment>/<UTC stamp>/`; two runs never share one."""
        for _ in range(CREATE_ATTEMPTS_MAX):
            folder = results / experiment / datetime.now(timezone.utc).strftime(STAMP)
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                time.sleep(1.0)  # the stamp's resolution: the next name differs
                continue
            return cls(folder)
        raise ExperimentError(
            "run.folder", f"create a folder for a run in {results / experiment}", "every name tried was taken", "wait for the other run to end"
        )

    @classmethod
    def find(cls, experiment: str, run: str | None, *, results: Path) -> RunPaths:
        """The run named `run` (a stamp or a folder), or the one that `latest` points to."""
        folder = results / experiment / "latest" if run is None else results / experiment / run
        if run is not None and not folder.is_dir():
            folder = Path(run)
        if not (folder / "run.json").is_file():
            found = "there is no complete run yet" if run is None else f"{folder} holds no run.json"
            raise ExperimentError(
                "run.absent",
                f"read a run of {experiment}",
                found,
                f"run `fab run-{experiment}` first, or name a run with --run",
                exit_code=EXIT_USAGE,
            )
        return cls(folder.resolve())

    @property
    def experiment(self) -> str:
        return self.folder.parent.name

    @property
    def stamp(self) -> str:
        return self.folder.name

    @property
    def run(self) -> Path:
        return self.folder / "run.json"

    @property
    def samples(self) -> Path:
        return self.folder / "samples.csv"

    @property
    def summary(self) -> Path:
        return self.folder / "summary.csv"

    @property
    def summary_cold(self) -> Path:
        return self.folder / "summary-cold.csv"

    @property
    def summary_direct(self) -> Path:
        return self.folder / "summary-direct.csv"

    @property
    def aggregate(self) -> Path:
        return self.folder / "aggregate.csv"

    @property
    def phases(self) -> Path:
        return self.folder / "phases.csv"

    @property
    def denials(self) -> Path:
        return self.folder / "denials.jsonl"

    @property
    def observations(self) -> Path:
        return self.folder / "observations.json"

    @property
    def cases(self) -> Path:
        return self.folder / "cases.csv"

    @property
    def receiver_log(self) -> Path:
        return self.folder / "receiver.jsonl"

    @property
    def capture(self) -> Path:
        return self.folder / "capture.pcap"

    def capture_at(self, host: str, interface: str) -> Path:
        """The capture on one interface of one host, of a site that has several."""
        return self.folder / f"capture-{host}-{interface}.pcap"

    @property
    def progress(self) -> Path:
        return self.folder / "progress.json"

    @property
    def block(self) -> Path:
        return self.folder / "block.csv"

    def interrupted(self, number: int) -> Path:
        """Samples of the block that the `number`th interruption, from 1, left unfinished."""
        return self.folder / f"interrupted-{number}.csv"

    @property
    def collected(self) -> Path:
        return self.folder / COLLECTED_FOLDER

    @property
    def seal_file(self) -> Path:
        return self.folder / "SHA256SUMS"

    def figure(self, suffix: str) -> Path:
        """The figure as `png`, `svg` or `pdf`."""
        return self.folder / DERIVED_FOLDER / f"{self.experiment}.{suffix}"

    def write_record(self, record: Mapping[str, Any]) -> None:
        """Write run.json; it says `complete: false` until the run is sealed."""
        assert not self.seal_file.exists(), "a sealed run is never written again"
        write_whole(self.run, json.dumps(record, indent=1, sort_keys=True) + "\n")

    def sealed_files(self) -> list[Path]:
        """Every file under the seal, sorted by path."""
        every = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(
            path for path in every if path.name not in DERIVED and path.relative_to(self.folder).parts[0] not in (DERIVED_FOLDER, COLLECTED_FOLDER)
        )

    def seal(self) -> None:
        """Fix the run's files: their digests go to SHA256SUMS, in the format that `sha256sum --check` reads."""
        assert not self.seal_file.exists(), "a run is sealed once"
        lines = [f"{_digest(path)}  {path.relative_to(self.folder).as_posix()}\n" for path in self.sealed_files()]
        write_whole(self.seal_file, "".join(lines))

    def read_sealed(self) -> dict[str, Any]:
        """run.json of a complete run whose files are exactly those that were sealed; anything else is refused."""
        attempted = f"read run {self.experiment}/{self.stamp}"
        again = f"run `fab run-{self.experiment}` again; a run is never repaired"
        if not self.seal_file.is_file():
            raise RunRefused("run.incomplete", attempted, "it has no SHA256SUMS: it did not complete", again)
        lines = self.seal_file.read_text(encoding="utf-8").splitlines()
        expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        actual = {path.relative_to(self.folder).as_posix(): _digest(path) for path in self.sealed_files()}
        changed = sorted(name for name in expected.keys() | actual.keys() if expected.get(name) != actual.get(name))
        if changed:
            raise RunRefused("run.changed", attempted, f"changed, added or removed after sealing: {', '.join(changed)}", again)
        record = json.loads(self.run.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("schema") != RESULTS_SCHEMA:
            found = record.get("schema") if isinstance(record, dict) else None
            raise RunRefused(
                "run.schema", attempted, f"its schema is {found!r}, this checkout reads {RESULTS_SCHEMA!r}",
                "check out the commit named in its run.json, or run the experiment again",
            )  # fmt: skip
        if record.get("complete") is not True:
            raise RunRefused("run.incomplete", attempted, "run.json says complete: false", again)
        return record

    def point_latest(self, site_sha256: str) -> RunPaths:
        """Set `latest` to the newest complete run of the highest profile on this site, and return that run."""
        candidates = []
        for other in self.folder.parent.iterdir():
            if other.is_symlink() or not (other / "SHA256SUMS").is_file():
                continue
            record = json.loads((other / "run.json").read_text(encoding="utf-8"))
            if record.get("complete") is True and record.get("schema") == RESULTS_SCHEMA and record.get("site_sha256") == site_sha256:
                candidates.append((PROFILES.index(record["profile"]), other.name))
        chosen = max(candidates)[1]
        link = self.folder.parent / "latest"
        temporary = self.folder.parent / f".latest.{os.getpid()}"
        temporary.symlink_to(chosen)
        temporary.replace(link)
        return RunPaths(self.folder.parent / chosen)


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there as a whole or, whatever happens meanwhile, as it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
