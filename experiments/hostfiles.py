"""Files of services on this machine that an ordinary user may not read: asked for with `sudo -n`, never with a prompt.

Root runs without sudo, and a file that is readable is read directly, so a site whose operator is in the right group
needs no privilege at all.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from experiments.errors import ExperimentError

SUDO_SECONDS_MAX = 20.0


def as_root(command: list[str]) -> list[str]:
    """`command` as root will run it from here."""
    return command if os.geteuid() == 0 else ["sudo", "-n", *command]


def _run_as_root(what: str, command: list[str]) -> bytes:
    try:
        done = subprocess.run(as_root(command), capture_output=True, timeout=SUDO_SECONDS_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExperimentError(
            "hostfiles.sudo", f"{what} with `{' '.join(command)}`", str(error), "run `sudo -v` first, or the task as root"
        ) from error
    if done.returncode != 0:
        found = done.stderr.decode("utf-8", "replace").strip() or f"exit status {done.returncode}"
        raise ExperimentError(
            "hostfiles.unreadable", what, found, "run `sudo -v` first, or set the site up again with `make site` if the file is gone"
        )
    return done.stdout


def read_bytes(path: Path) -> bytes:
    """The whole of `path`."""
    try:
        return path.read_bytes()
    except PermissionError:
        return _run_as_root(f"read {path}", ["cat", "--", str(path)])
    except OSError as error:
        raise ExperimentError(
            "hostfiles.unreadable", f"read {path}", error.strerror or str(error), "set the site up again with `make site`"
        ) from error


def size(path: Path) -> int:
    """Bytes in `path` now; a log that has no line yet may not exist, and counts as 0."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
    except PermissionError:
        listing = _run_as_root(f"find the size of {path}", ["find", str(path.parent), "-maxdepth", "1", "-name", path.name, "-printf", "%s"])
        return int(listing or b"0")


def read_from(path: Path, offset: int) -> bytes:
    """What stands in `path` after the first `offset` bytes; nothing when it does not exist yet."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read()
    except FileNotFoundError:
        return b""
    except PermissionError:
        if size(path) <= offset:
            return b""
        return _run_as_root(f"read {path}", ["tail", "-c", f"+{offset + 1}", "--", str(path)])
