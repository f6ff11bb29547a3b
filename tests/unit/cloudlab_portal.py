"""What CloudLab's portal does with a profile: `cloudlab_portal.py PROFILE` runs it against the real geni-lib; the request goes to standard output.

The parameters are the JSON object in the file that GENILIB_PORTAL_PARAMS_PATH names, as in the portal. geni-lib 0.9.9.4, the newest
release, still holds four print statements and one text file opened for bytes; both are mended while it is loaded.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import io
import re
import runpy
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

PRINT_STATEMENT = re.compile(r"(?m)^(\s*)print (.+)$")


class Mended(importlib.machinery.SourceFileLoader):
    """Loads a module of geni-lib as the Python 3 that it nearly is."""

    def get_data(self, path: str) -> bytes:
        data = super().get_data(path)
        return PRINT_STATEMENT.sub(r"\1print(\2)", data.decode()).encode() if path.endswith(".py") else data

    def path_stats(self, path: str) -> dict[str, float]:
        raise OSError("never from a cache, and never into one: " + path)


class Finder(importlib.abc.MetaPathFinder):
    """Finds geni.portal where it is installed, for `Mended` to load."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == "geni.portal" else None
        return importlib.util.spec_from_loader(name, Mended(name, spec.origin)) if spec and spec.origin else None


class Output(io.TextIOWrapper):
    """Standard output that takes the bytes of a request too."""

    def write(self, text: Any) -> int:
        return super().write(text if isinstance(text, str) else bytes(text).decode())


if __name__ == "__main__":
    sys.meta_path.insert(0, Finder())
    sys.stdout = Output(sys.stdout.buffer)
    runpy.run_path(sys.argv[1], run_name="__main__")
