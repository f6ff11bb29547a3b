"""What roles run under a host's own Python is Python 3.6, as Ubuntu 18.04 has it: its syntax, and a standard library of that age."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDEST = (3, 6)
PROGRAMS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("roles/*/files/**/*.py"))

NEWER_MODULES = {"contextvars", "dataclasses", "graphlib", "importlib.metadata", "importlib.resources", "tomllib", "zoneinfo"}
NEWER_NAMES = {
    "annotations",  # of __future__
    "cache", "cached_property", "clock_gettime_ns", "fromisoformat", "get_running_loop", "is_relative_to", "isascii", "monotonic_ns", "nullcontext",
    "perf_counter_ns", "posix_spawn", "prod", "removeprefix", "removesuffix", "time_ns", "to_thread", "with_stem",
}  # fmt: skip
NEWER_KEYWORDS = {"capture_output", "dirs_exist_ok", "missing_ok", "pipesize", "process_group", "strict", "umask"}
NEWER_CALLS = {("asyncio", "run"), ("shlex", "join"), ("math", "dist"), ("math", "comb"), ("os", "pidfd_open")}


def newer_than_the_oldest(tree: ast.AST) -> Iterator[str]:
    """What a program uses that a Python of `OLDEST` does not have, as far as its text says so."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in NEWER_MODULES)
        elif isinstance(node, ast.ImportFrom):
            yield from (name for name in (node.module or "", *(alias.name for alias in node.names)) if name in NEWER_MODULES | NEWER_NAMES)
        elif isinstance(node, ast.Attribute):
            if node.attr in NEWER_NAMES or (isinstance(node.value, ast.Name) and (node.value.id, node.attr) in NEWER_CALLS):
                yield node.attr
        elif isinstance(node, ast.Call):
            keywords = {keyword.arg for keyword in node.keywords}
            yield from sorted(str(name) for name in keywords & NEWER_KEYWORDS)
            if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) and node.func.value.id == "subprocess":
                yield from sorted(str(name) for name in keywords & {"text"})


def test_the_programs_are_found() -> None:
    assert {Path(path).name for path in PROGRAMS} >= {"record.py", "remove.py", "service.py", "preflight.py", "install.py", "target.py"}


@pytest.mark.parametrize("path", PROGRAMS)
def test_a_program_of_hosts_runs_under_their_oldest_python(path: str) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=path, feature_version=OLDEST)

    assert list(newer_than_the_oldest(tree)) == []


@pytest.mark.parametrize(
    "text",
    [
        "if (n := 3): pass",
        "def f(a, /): pass",
        "from __future__ import annotations",
        "import dataclasses",
        "import subprocess; subprocess.run([], capture_output=True)",
        "import subprocess; subprocess.run([], text=True)",
        "'a'.removeprefix('b')",
        "import shlex; shlex.join([])",
    ],
)
def test_what_is_newer_is_noticed(text: str) -> None:
    try:
        tree = ast.parse(text, feature_version=OLDEST)
    except SyntaxError:
        return

    assert list(newer_than_the_oldest(tree)) != []
