"""A layer: a tar that is a function of names, contents and modes alone."""

from __future__ import annotations

import hashlib
import io
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

WRITABLE_BY_ALL = {"tmp": 0o1777}


class _Hashing(io.RawIOBase):
    """Writes through to `file`, and knows length and digest of what passed."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)


def _no_filter(_: str) -> bool:
    return True


def write_layer(root: Path, output: BinaryIO, *, prefix: str = "", keep: Callable[[str], bool] = _no_filter) -> tuple[str, int]:
    """Write everything under `root` (not `root` itself) as a tar to `output`; returns its SHA-256 in hex and its size.

    Names get `prefix` in front, whose folders are in the tar too. Entries are sorted, owned by root and dated 1970; files are
    readable by everybody and executable when their owner may execute them. `keep` is asked for each name under `root`; when it
    refuses a folder nothing below it is kept.
    """
    through = _Hashing(output)
    with tarfile.open(fileobj=through, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        parts = Path(prefix).parts
        for count in range(1, len(parts) + 1):
            tar.addfile(_folder("/".join(parts[:count])))
        _add(tar, root, "", prefix, keep)
    return through.digest.hexdigest(), through.size


def _folder(name: str) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type = tarfile.DIRTYPE
    entry.mode = WRITABLE_BY_ALL.get(name, 0o755)
    return entry


def _add(tar: tarfile.TarFile, folder: Path, name: str, prefix: str, keep: Callable[[str], bool]) -> None:
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        inner = f"{name}/{path.name}" if name else path.name
        if not keep(inner):
            continue
        full = f"{prefix}/{inner}" if prefix else inner
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            entry = tarfile.TarInfo(full)
            entry.type, entry.linkname = tarfile.SYMTYPE, str(path.readlink())
            tar.addfile(entry)
        elif stat.S_ISDIR(mode):
            tar.addfile(_folder(full))
            _add(tar, path, inner, prefix, keep)
        else:
            assert stat.S_ISREG(mode), f"{path} is neither file, folder nor link; nothing here makes others"
            contents = path.read_bytes()
            entry = tarfile.TarInfo(full)
            entry.size, entry.mode = len(contents), 0o755 if mode & stat.S_IXUSR else 0o644
            tar.addfile(entry, io.BytesIO(contents))
