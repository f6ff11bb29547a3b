"""The configuration of the mail sink: one JSON object, read strictly."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalium.errors import KaliumError

CONFIG_BYTES_MAX = 64 * 1024
NEXT = 'write {"listen": {"host": "10.137.0.1", "port": 2525}, "maildir": FOLDER}; with "tls": {"certificate": PEM, "key": PEM} it offers STARTTLS'


@dataclass(frozen=True)
class Config:
    """What the mail sink is told. With a certificate it offers STARTTLS, and does not insist on it."""

    host: str
    port: int
    maildir: Path
    certificate: Path | None
    key: Path | None


def load(path: Path) -> Config:
    """Read a configuration. Raises KaliumError mailsink.config for anything but a whole and valid one."""
    try:
        with path.open("rb") as file:
            document: Any = json.loads(file.read(CONFIG_BYTES_MAX))
    except OSError as error:
        raise _refused(path, error.strerror or str(error), "name the file with --config") from error
    except ValueError as error:
        raise _refused(path, f"it is not JSON: {error}") from error
    if not isinstance(document, dict) or not {"listen", "maildir"} <= set(document) <= {"listen", "maildir", "tls"}:
        raise _refused(path, "its keys are not listen, maildir and perhaps tls")
    listen, tls = document["listen"], document.get("tls") or {}
    if not isinstance(listen, dict) or set(listen) != {"host", "port"}:
        raise _refused(path, "listen does not have the keys host and port")
    if not isinstance(listen["host"], str) or not listen["host"] or type(listen["port"]) is not int or not 0 <= listen["port"] <= 65535:
        raise _refused(path, "listen.host is no text, or listen.port no number from 0 to 65535")
    if not isinstance(tls, dict) or set(tls) not in (set(), {"certificate", "key"}):
        raise _refused(path, "tls does not have the keys certificate and key")
    for name, value in {"maildir": document["maildir"], **tls}.items():
        if not isinstance(value, str) or not Path(value).is_absolute():
            raise _refused(path, f"{name} is no absolute path")
    certificate, key = (Path(tls[name]) if tls else None for name in ("certificate", "key"))
    return Config(listen["host"], listen["port"], Path(document["maildir"]), certificate, key)


def _refused(path: Path, found: str, next_step: str = NEXT) -> KaliumError:
    return KaliumError("mailsink.config", f"cannot read the configuration {path}", found, next_step)
