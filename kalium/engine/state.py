"""The gateway's state folder: what outlives it on this host. Two gateways cannot have the same one open."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path
from typing import IO

from kalium.errors import KaliumError


def write_whole(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, for its owner alone, and never a part of it."""
    handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class State:
    """A folder with a lock."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock: IO[str] | None = None

    def folder(self, name: str) -> Path:
        """A folder in it, made when it is not there. Raises KaliumError engine.state."""
        path = self.root / name
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        return path

    def open(self) -> None:
        """Hold the folder until `close` or the end of this process. Raises KaliumError engine.state or engine.running."""
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = (self.root / "lock").open("w", encoding="ascii")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise KaliumError(
                "engine.running", f"cannot use {self.root}", "an engine is running with it", "stop that one first, or give this one another state_dir"
            ) from error
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> KaliumError:
        return KaliumError("engine.state", f"cannot use {self.root}", str(error), "give the engine's account this folder; `site.yml` makes it")

    def close(self) -> None:
        """Let another engine have it. Closing what is not open is no error."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
