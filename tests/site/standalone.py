"""An archive that looks like a standalone build of CPython, made from the distribution's own: what roles/kalium_python unpacks and runs."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from pathlib import Path

PYTHON = "/usr/bin/python3"
LEFT_OUT = shutil.ignore_patterns("__pycache__", "test", "idlelib", "lib2to3", "pydoc_data", "config-*", "sitecustomize.py")


def make_standalone(name: str, folder: Path) -> str:
    """Write `folder`/`name`: an interpreter with its library that is at home wherever it is unpacked; returns its sha256."""
    program = Path(PYTHON).resolve()
    root = folder / "standalone" / "python"
    library = Path(
        subprocess.run([PYTHON, "-c", "import os; print(os.path.dirname(os.__file__))"], capture_output=True, text=True, check=True).stdout.strip()
    )
    shutil.copytree(library, root / "lib" / library.name, ignore=LEFT_OUT)
    (root / "bin").mkdir()
    shutil.copy2(program, root / "bin" / program.name)
    (root / "bin" / "python3").symlink_to(program.name)
    # The distribution forbids pip in its own place, not in a copy of it.
    (root / "lib" / library.name / "EXTERNALLY-MANAGED").unlink(missing_ok=True)
    with tarfile.open(folder / name, "w:gz", compresslevel=1) as tar:
        tar.add(root, "python")
    shutil.rmtree(root.parent)
    return hashlib.sha256((folder / name).read_bytes()).hexdigest()
