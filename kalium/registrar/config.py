"""The registrar's configuration: one JSON object, read strictly, because a misspelt key would be a default in force."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalium.errors import KaliumError
from kalium.registrar.admission import Place

CONFIG_BYTES_MAX = 64 << 10
NAMES = ("node", "namespace", "runtime_class")
PATHS = ("kubeconfig", "agent", "status")
NEXT = "docs/reference/registrar.md shows a whole configuration, and site.yml writes it"


@dataclass(frozen=True)
class Config:
    """What the registrar is told. `agent` is the agent's register socket, `status` its own, which answers who asks how it is."""

    place: Place
    kubeconfig: Path
    agent: Path
    status: Path


def load(path: Path) -> Config:
    """Read a configuration. Raises KaliumError registrar.config for anything but a whole and valid one."""
    try:
        with path.open("rb") as file:
            document: Any = json.loads(file.read(CONFIG_BYTES_MAX))
    except OSError as error:
        raise _refused(path, error.strerror or str(error), "name the file with --config") from error
    except ValueError as error:
        raise _refused(path, f"it is not JSON: {error}") from error
    if not isinstance(document, dict) or set(document) != {*NAMES, *PATHS}:
        raise _refused(path, f"its keys are not {', '.join((*NAMES, *PATHS))}")
    for name in NAMES:
        if not isinstance(document[name], str) or not document[name]:
            raise _refused(path, f"{name} is {document[name]!r}, and not a name")
    for name in PATHS:
        if not isinstance(document[name], str) or not Path(document[name]).is_absolute():
            raise _refused(path, f"{name} is {document[name]!r}, and not an absolute path")
    place = Place(*(document[name] for name in NAMES))
    return Config(place, *(Path(document[name]) for name in PATHS))


def _refused(path: Path, found: str, next_step: str = NEXT) -> KaliumError:
    return KaliumError("registrar.config", f"cannot read the configuration {path}", found, next_step)
