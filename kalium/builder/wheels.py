"""Wheels for another Python than the one that runs this: which fit it, and those of a lock in one archive.

`python -m kalium.builder.wheels LOCK FOLDER TARGET GLIBC` is how roles/kalium_python fetches what a host installs; it prints the archive.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from kalium.builder.layout import canonical
from kalium.builder.tools import run
from kalium.errors import EXIT_DONE, EXIT_ENVIRONMENT, KaliumError

MANYLINUX_BEFORE_2_17 = ("2014", "2010", "1")  # names from when manylinux was not called by the C library's version
GLIBC_MINOR_LEAST = 5  # 2.5 is what manylinux1 stands for
ATTEMPTED = "cannot fetch the services' wheels"


def fitting(python: str, glibc: str, machine: str) -> list[str]:
    """pip's options for wheels that fit CPython `python` ("3.12") on `machine` and ask for no newer C library than `glibc` ("2.27")."""
    generations = [*(f"_2_{number}" for number in range(int(glibc.split(".")[1]), GLIBC_MINOR_LEAST - 1, -1)), *MANYLINUX_BEFORE_2_17]
    tag = "cp" + python.replace(".", "")
    return [
        "--only-binary", ":all:", "--implementation", "cp", "--python-version", python,
        *(word for abi in (tag, "abi3", "none") for word in ("--abi", abi)),
        *(word for generation in generations for word in ("--platform", f"manylinux{generation}_{machine}")),
    ]  # fmt: skip


def chosen(lock: str, target: Mapping[str, str]) -> str:
    """The lock without what its markers exclude on `target`, one package a line. pip would judge them by the Python that runs it.

    `target` is what roles/kalium_python/files/target.py says of a host.
    """
    from packaging.requirements import Requirement  # noqa: PLC0415  # Ansible's own dependency, which hosts do not have

    environment = {
        "implementation_name": target["implementation"],
        "implementation_version": target["version"],
        "os_name": "posix",
        "platform_machine": target["machine"],
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": target["version"],
        "python_version": series(target),
        "sys_platform": "linux",
    }
    kept = []
    for entry in re.split(r"(?m)^(?=[A-Za-z0-9])", re.sub(r"(?m)^\s*#.*\n", "", lock)):
        lines = [line.strip() for line in entry.replace("\\\n", "\n").splitlines() if line.strip()]
        if not lines:
            continue
        requirement = Requirement(lines[0])
        if requirement.marker is None or requirement.marker.evaluate(environment):
            requirement.marker = None
            kept.append(" ".join([str(requirement), *lines[1:]]) + "\n")
    return "".join(kept)


def series(target: Mapping[str, str]) -> str:
    """Like "3.12"."""
    return ".".join(target["version"].split(".")[:2])


def archive(lock: Path, folder: Path, target: Mapping[str, str], glibc: str) -> Path:
    """The archive of the lock's wheels in `folder`, fetched when it is not there. Raises KaliumError.

    Its name is a hash of what is wanted, so what is there is taken as it is: whoever installs from it compares each wheel with the lock
    again. Whoever asks for the same at once shares one download.
    """
    if target["implementation"] != "cpython" or not re.fullmatch(r"2\.[0-9]+", glibc):
        found = f"the host has {target['implementation']} and C library {glibc or 'unknown'}"
        raise KaliumError("builder.target", ATTEMPTED, found, "use a host with CPython and glibc", EXIT_ENVIRONMENT)
    requirements, options = chosen(lock.read_text(encoding="utf-8"), target), fitting(series(target), glibc, target["machine"])
    made = folder / f"services-{hashlib.sha256(canonical([requirements, options])).hexdigest()[:24]}.tar"
    folder.mkdir(parents=True, exist_ok=True)
    with made.with_suffix(".lock").open("wb") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        if not made.is_file():
            with tempfile.TemporaryDirectory(dir=folder, prefix=".wheels-") as work:
                _download(requirements, options, Path(work))
                _pack(Path(work), made)
    return made


def _download(requirements: str, options: Sequence[str], folder: Path) -> None:
    """Fill `folder` with wheels; pip compares each with its hash."""
    listed = folder / "requirements.txt"
    listed.write_text(requirements, encoding="utf-8")
    run(
        [
            sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--require-hashes",
            *options, "--dest", str(folder), "--requirement", str(listed),
        ],
        code="builder.wheels", attempted=ATTEMPTED, next_step="if a package server did not answer, run the same command again",
    )  # fmt: skip
    listed.unlink()


def _pack(folder: Path, made: Path) -> None:
    """Make `made` of the files in `folder`: the same bytes for the same wheels, and never a part of them."""
    growing = made.with_suffix(".growing")
    with tarfile.open(growing, "w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(folder.iterdir()):
            entry = tarfile.TarInfo(path.name)
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(entry, file)
    growing.replace(made)


def main(lock: str, folder: str, target: str, glibc: str) -> int:
    """Print the archive's path; exit status as of every command of ours."""
    try:
        print(archive(Path(lock), Path(folder), json.loads(target), glibc))
    except KaliumError as error:
        print(error.for_humans(), file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
