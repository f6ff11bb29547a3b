"""The configuration of the image server: one JSON object, read strictly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalium.errors import KaliumError

CONFIG_BYTES_MAX = 64 * 1024
KEYS = {"listen", "certificate", "key", "root", "access_log"}
NEXT = 'write {"listen": {"host": "10.137.0.1", "port": 4443}, "certificate": PEM, "key": PEM, "root": FOLDER, "access_log": FILE}'


@dataclass(frozen=True)
class Config:
    """What the image server is told. `certificate` is a PEM chain, `key` its private key; files under `root` are served."""

    host: str
    port: int
    certificate: Path
    key: Path
    root: Path
    access_log: Path


def load(path: Path) -> Config:
    """Read a configuration. Raises KaliumError imageserver.config for anything but a whole and valid one."""
    try:
        with path.open("rb") as file:
            document: Any = json.loads(file.read(CONFIG_BYTES_MAX))
    except OSError as error:
        raise _refused(path, error.strerror or str(error), "name the file with --config") from error
    except ValueError as error:
        raise _refused(path, f"it is not JSON: {error}", NEXT) from error
    if not isinstance(document, dict) or set(document) != KEYS:
        raise _refused(path, f"its keys are not {', '.join(sorted(KEYS))}", NEXT)
    listen = document["listen"]
    if not isinstance(listen, dict) or set(listen) != {"host", "port"}:
        raise _refused(path, "listen does not have the keys host and port", NEXT)
    host, port = listen["host"], listen["port"]
    if not isinstance(host, str) or not host or type(port) is not int or not 0 <= port <= 65535:
        raise _refused(path, "listen.host is no text, or listen.port no number from 0 to 65535", NEXT)
    paths = {}
    for key in sorted(KEYS - {"listen"}):
        if not isinstance(document[key], str) or not Path(document[key]).is_absolute():
            raise _refused(path, f"{key} is no absolute path", NEXT)
        paths[key] = Path(document[key])
    return Config(host=host, port=port, **paths)


def _refused(path: Path, found: str, next_step: str) -> KaliumError:
    return KaliumError("imageserver.config", f"cannot read the configuration {path}", found, next_step)
