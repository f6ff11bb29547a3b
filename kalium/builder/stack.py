"""What is to be built: the functions and variants of an OpenFaaS stack file, and the files of each."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kalium.errors import EXIT_USAGE, KaliumError

LANGUAGE = "python3"
VARIANTS = "x-variants"  # images that no function of the stack has: deployed in another function's place
NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?(?:/[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?)?")
COMMON = "common"
REQUIREMENTS = "requirements.txt"
NOT_SHIPPED = {REQUIREMENTS, "requirements.in", "sample.json", "README.md"}
FILES_MAX = 10_000
FILES_BYTES_MAX = 64 << 20
STACK_BYTES_MAX = 1 << 20
TEMPLATE = Path(__file__).parent / "template"


@dataclass(frozen=True)
class Target:
    """One image to build. `files` maps the path under /function to the contents; `requirements` is None without any."""

    name: str
    files: Mapping[str, bytes]
    requirements: Path | None


def _wrong(found: str, where: Path, next_step: str) -> KaliumError:
    return KaliumError("builder.stack", f"cannot build the functions of {where}", found, next_step, EXIT_USAGE)


def read_stack(stack: Path, only: str | None = None) -> list[Target]:
    """The targets of a stack file, sorted by name; `only` names one of them. Raises KaliumError for what cannot be built."""
    try:
        text = stack.read_bytes()
        document: Any = yaml.safe_load(text) if len(text) <= STACK_BYTES_MAX else None
    except OSError as error:
        raise _wrong(error.strerror or str(error), stack, "name a stack file with --stack") from error
    except yaml.YAMLError as error:
        raise _wrong(f"it is no YAML: {error}", stack, "correct it") from error
    found: dict[str, Any] = {}
    for key in ("functions", VARIANTS):
        entries = document.get(key) if isinstance(document, dict) else None
        if entries is not None and not isinstance(entries, dict):
            raise _wrong(f"`{key}` is no mapping", stack, "write one entry a function under it")
        found.update(entries or {})
    if not found:
        raise _wrong("it has no `functions`", stack, "see functions/stack.yml for an example")
    if only is not None and only not in found:
        raise _wrong(f"it has no function {only}, only {', '.join(sorted(found))}", stack, "name one of these with --only")
    return [_target(name, found[name], stack) for name in sorted(found) if only in (None, name)]


def _target(name: Any, description: Any, stack: Path) -> Target:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise _wrong(f"{name!r} is no name of a function", stack, "use lower-case letters, digits and hyphens, at most 63")
    if not isinstance(description, dict) or description.get("lang") != LANGUAGE or not isinstance(description.get("handler"), str):
        raise _wrong(f"{name} needs `lang: {LANGUAGE}` and `handler: ./FOLDER`", stack, "only Python functions are built; write both keys")
    root = stack.parent.resolve()
    folder = (root / description["handler"]).resolve()
    if not folder.is_relative_to(root) or not (folder / "handler.py").is_file():
        raise _wrong(f"handler {description['handler']!r} of {name} is no folder with a handler.py beside the stack file", stack, "correct the path")
    _check_handler(folder / "handler.py", name, stack)
    files: dict[str, bytes] = {}
    for source in (TEMPLATE, root / COMMON, folder):
        for path, contents in _files_under(source, root, stack):
            if path in files:
                raise _wrong(f"{path} of {name} is also in {COMMON}/ or a part of the server", stack, f"rename {folder / path}")
            files[path] = contents
    requirements = next((path for path in (folder / REQUIREMENTS, root / REQUIREMENTS) if path.is_file()), None)
    return Target(name, files, requirements)


def _check_handler(path: Path, name: str, stack: Path) -> None:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        raise _wrong(f"handler.py of {name} is no Python: {error}", stack, f"correct {path}") from error
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    imported = {alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    if "handle" not in defined | imported:
        raise _wrong(f"handler.py of {name} has no function handle(event)", stack, f"define it in {path}")


def _files_under(folder: Path, root: Path, stack: Path) -> list[tuple[str, bytes]]:
    """Path and contents of each file to ship, sorted; links count as what they lead to, and lead nowhere else than under `root`."""
    if not folder.is_dir():
        return []
    found: list[tuple[str, bytes]] = []
    size = 0
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(".") or part == "__pycache__" for part in relative.parts) or str(relative) in NOT_SHIPPED or path.is_dir():
            continue
        if not path.resolve().is_relative_to(root) and folder != TEMPLATE:
            raise _wrong(f"{path} leads out of {root}", stack, "copy the file there instead of linking it")
        contents = path.read_bytes()
        size += len(contents)
        if size > FILES_BYTES_MAX or len(found) == FILES_MAX:
            raise _wrong(f"{folder} holds more than {FILES_MAX} files or {FILES_BYTES_MAX >> 20} MiB", stack, "keep data out of a function's folder")
        found.append((str(relative), contents))
    return found
