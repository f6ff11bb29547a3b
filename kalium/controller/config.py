"""The controller's configuration: one JSON object, read strictly, because a key that is misspelt would be a default in force."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalium.errors import KaliumError

CONFIG_BYTES_MAX = 64 * 1024


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files: the CA of the site, and this side's certificate and key."""

    ca: Path
    cert: Path
    key: Path


@dataclass(frozen=True)
class Config:
    """What `kalium controller serve` and `status` are told. Relative paths are meant from the configuration's directory."""

    file: Path
    host: str
    port: int
    tls: TlsFiles
    operator_key: Path  # the operator's public key, PEM
    policies_dir: Path


def load(path: Path) -> Config:
    """Read a configuration. Raises KaliumError controller.config for anything but a whole and valid one."""
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise _refused(path, error.strerror or str(error), "name the file by --config; `site.yml` writes /etc/kalium/controller.json") from error
    if len(text) > CONFIG_BYTES_MAX:
        raise _refused(path, f"more than {CONFIG_BYTES_MAX} bytes", "name the controller's configuration by --config")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refused(path, f"not JSON: {error}", "write one JSON object, as docs/reference/cli.md shows") from error
    top = _object(path, document, "", ("listen", "tls", "operator_key", "policies_dir"))
    listen = _object(path, top["listen"], "listen", ("host", "port"))
    tls = _object(path, top["tls"], "tls", ("ca", "cert", "key"))
    port = listen["port"]
    if type(port) is not int or not 0 <= port <= 65535:
        raise _refused(path, "listen.port is not a whole number from 0 to 65535", "give a port; 0 lets the system choose one")

    def located(value: Any, name: str) -> Path:
        return path.parent / _text(path, value, name)

    return Config(
        file=path,
        host=_text(path, listen["host"], "listen.host"),
        port=port,
        tls=TlsFiles(located(tls["ca"], "tls.ca"), located(tls["cert"], "tls.cert"), located(tls["key"], "tls.key")),
        operator_key=located(top["operator_key"], "operator_key"),
        policies_dir=located(top["policies_dir"], "policies_dir"),
    )


def _object(path: Path, value: Any, name: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """`value` as an object with just these keys."""
    where = name or "the configuration"
    if not isinstance(value, dict):
        raise _refused(path, f"{where} is not an object", f"give it the keys {', '.join(keys)}")
    for key in keys:
        if key not in value:
            raise _refused(path, f"{where} has no key {key}", f"give it the keys {', '.join(keys)}")
    for key in value:
        if key not in keys:
            raise _refused(path, f"{where} has an unknown key {key}", f"the keys are {', '.join(keys)}")
    return value


def _text(path: Path, value: Any, name: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise _refused(path, f"{name} is not a text", "write it in quotes")
    return value


def _refused(path: Path, found: str, next_step: str) -> KaliumError:
    return KaliumError("controller.config", f"cannot read the configuration {path}", found, next_step)
