"""Running other programs, and writing files whole."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from kalium.errors import EXIT_ENVIRONMENT, KaliumError

SAID_CHARACTERS_MAX = 1500  # of a failed program's output, its end


def as_root() -> list[str]:
    """What a command that changes its root is preceded by. An ordinary user is root in a user namespace of the command's own."""
    return [] if os.geteuid() == 0 else ["unshare", "--map-root-user"]


def run(
    command: Sequence[str], *, code: str, attempted: str, next_step: str, seconds_max: float = 600, environment: Mapping[str, str] | None = None,
    folder: Path | None = None,
) -> str:  # fmt: skip
    """Run `command` and return its standard output. Raises KaliumError with the end of what it said when it fails."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=seconds_max, check=False, cwd=folder, stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C.UTF-8", **(environment or {})},
        )  # fmt: skip
    except FileNotFoundError as error:
        raise KaliumError(code, attempted, f"there is no program {command[0]}", f"install {command[0]} with `make site`", EXIT_ENVIRONMENT) from error
    except subprocess.TimeoutExpired as error:
        raise KaliumError(code, attempted, f"{command[0]} did not end within {seconds_max:.0f} s", next_step, EXIT_ENVIRONMENT) from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-SAID_CHARACTERS_MAX:] or "it said nothing"
        raise KaliumError(code, attempted, f"{command[0]} ended with {done.returncode}: {said}", next_step, EXIT_ENVIRONMENT)
    return done.stdout


def write_whole(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Make `path` hold `data`, and never a part of it."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
