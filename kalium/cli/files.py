"""Reading and writing files for commands, with errors that name the file and the next step."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from kalium.errors import EXIT_ENVIRONMENT, KaliumError


def read_file(path: Path, bytes_max: int) -> bytes:
    """The bytes of `path`, or one more than `bytes_max` of a larger file, so that whoever has the bound can say so."""
    try:
        with path.open("rb") as file:
            return file.read(bytes_max + 1)
    except OSError as error:
        raise KaliumError(
            "cli.file", f"cannot read {path}", error.strerror or str(error), "check the file's name and your rights", EXIT_ENVIRONMENT
        ) from error


def write_atomically(path: Path, data: bytes, *, mode: int = 0o644) -> bool:
    """Make `path` hold `data`, never a part of it, whatever happens meanwhile. Returns False when it already did."""
    try:
        if path.is_file() and path.read_bytes() == data:
            return False
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(mode)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise KaliumError(
            "cli.file",
            f"cannot write {path}",
            error.strerror or str(error),
            "check that the folder is there and that you may write to it",
            EXIT_ENVIRONMENT,
        ) from error
    return True
