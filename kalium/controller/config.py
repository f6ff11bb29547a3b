"""The controller's configuration: one JSON object, read strictly, because a key that is misspelt would be a default in force."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kalium.errors import KaliumError

CONFIG_BYTES_MAX = 64 * 1024
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
PREFIX = re.compile(r"[A-Za-z0-9._:-]{1,64}")  # no braces: they choose the slot of a Redis cluster
FSYNC = ("always", "interval", "never")
AUDIT_MIB_MAX = 1024 * 1024
BUSY_POLL_US_MAX = 100_000


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files: the CA of the site, and this side's certificate and key."""

    ca: Path
    cert: Path
    key: Path


@dataclass(frozen=True)
class Store:
    """Where the calls are kept: in this process, or in a Redis that all controllers of a site share.

    `url` is redis://, rediss:// or unix://, without a password: that is in `password_file`, which not everybody reads. `ca` verifies
    a rediss:// server; None stands for what the system trusts.
    """

    kind: str = "memory"
    url: str = ""
    prefix: str = "kalium:"
    ca: Path | None = None
    password_file: Path | None = None


@dataclass(frozen=True)
class AuditFiles:
    """The audit log, the private key that signs its heads, when it is forced to the disk, and how large a file of it grows."""

    log: Path
    key: Path
    fsync: str = "interval"
    max_mib: int = 64


@dataclass(frozen=True)
class Listen:
    """An address to listen on."""

    host: str
    port: int


@dataclass(frozen=True)
class Config:
    """What `kalium controller serve` and `status` are told. Relative paths are meant from the configuration's directory."""

    file: Path
    host: str
    port: int
    tls: TlsFiles
    operator_key: Path  # the operator's public key, PEM
    policies_dir: Path
    name: str = "controller"  # as in its certificate
    store: Store = Store()
    audit: AuditFiles | None = None
    metrics: Listen | None = None
    busy_poll_us: int = 0  # after each turn of work the processor is kept for so long


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
    top = _object(path, document, "", ("listen", "tls", "operator_key", "policies_dir"), ("name", "store", "audit", "metrics", "busy_poll_us"))
    listen = _listen(path, top["listen"], "listen")
    tls = _object(path, top["tls"], "tls", ("ca", "cert", "key"))
    name = _text(path, top.get("name", Config.name), "name")
    if NAME.fullmatch(name) is None:
        raise _refused(path, "name is not one of letters, digits, dots and dashes", "give the name that the controller's certificate has")
    busy_poll_us = top.get("busy_poll_us", Config.busy_poll_us)
    if type(busy_poll_us) is not int or not 0 <= busy_poll_us <= BUSY_POLL_US_MAX:
        raise _refused(path, f"busy_poll_us is not a whole number from 0 to {BUSY_POLL_US_MAX}", "say for how many microseconds; 0 turns it off")
    return Config(
        file=path,
        host=listen.host,
        port=listen.port,
        tls=TlsFiles(_located(path, tls["ca"], "tls.ca"), _located(path, tls["cert"], "tls.cert"), _located(path, tls["key"], "tls.key")),
        operator_key=_located(path, top["operator_key"], "operator_key"),
        policies_dir=_located(path, top["policies_dir"], "policies_dir"),
        name=name,
        store=_store(path, top["store"]) if "store" in top else Store(),
        audit=_audit(path, top["audit"]) if "audit" in top else None,
        metrics=_listen(path, top["metrics"], "metrics") if "metrics" in top else None,
        busy_poll_us=busy_poll_us,
    )


def _listen(path: Path, value: Any, name: str) -> Listen:
    fields = _object(path, value, name, ("host", "port"))
    port = fields["port"]
    if type(port) is not int or not 0 <= port <= 65535:
        raise _refused(path, f"{name}.port is not a whole number from 0 to 65535", "give a port; 0 lets the system choose one")
    return Listen(_text(path, fields["host"], f"{name}.host"), port)


def _store(path: Path, value: Any) -> Store:
    kind = value.get("kind") if isinstance(value, dict) else None
    if kind == "memory":
        _object(path, value, "store", ("kind",))
        return Store()
    fields = _object(path, value, "store", ("kind", "url"), ("prefix", "ca", "password_file"))
    if kind != "redis":
        raise _refused(path, "store.kind is neither memory nor redis", "memory serves one controller, redis two or more")
    url = _text(path, fields["url"], "store.url")
    fault = _fault_of_url(url)
    if fault:
        raise _refused(path, f"store.url {fault}", "write redis://[USER@]HOST[:PORT][/DB], rediss://... or unix://[USER@]/PATH[?db=DB]")
    prefix = _text(path, fields.get("prefix", Store.prefix), "store.prefix")
    if PREFIX.fullmatch(prefix) is None:
        raise _refused(path, "store.prefix is not 1 to 64 letters, digits, dots, dashes and colons", "write one such as kalium:")
    if "ca" in fields and not url.startswith("rediss://"):
        raise _refused(path, "store.ca is given, and store.url has no TLS", "write rediss:// or leave it out")
    return Store(
        "redis", url, prefix,
        _located(path, fields["ca"], "store.ca") if "ca" in fields else None,
        _located(path, fields["password_file"], "store.password_file") if "password_file" in fields else None,
    )  # fmt: skip


def _fault_of_url(url: str) -> str:
    """Why `url` cannot name a Redis; "" when it can."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises for one that is no number
    except ValueError as error:
        return f"cannot be read: {error}"
    if parts.password is not None:
        return "holds a password, which belongs in store.password_file"
    if parts.fragment:
        return "has a fragment"
    if parts.scheme == "unix":
        is_whole = parts.hostname is None and parts.path.startswith("/") and re.fullmatch(r"(db=\d{1,3})?", parts.query)
        return "" if is_whole else "is no path of a socket"
    if parts.scheme not in ("redis", "rediss"):
        return "is none of redis://, rediss:// and unix://"
    return (
        "" if parts.hostname and not parts.query and re.fullmatch(r"/?|/\d{1,3}", parts.path) else "names no host, or more than a host and a database"
    )


def _audit(path: Path, value: Any) -> AuditFiles:
    fields = _object(path, value, "audit", ("log", "key"), ("fsync", "max_mib"))
    fsync, max_mib = fields.get("fsync", AuditFiles.fsync), fields.get("max_mib", AuditFiles.max_mib)
    if fsync not in FSYNC:
        raise _refused(path, f"audit.fsync is not one of {', '.join(FSYNC)}", "always loses nothing to a power cut, interval at most a second")
    if type(max_mib) is not int or not 1 <= max_mib <= AUDIT_MIB_MAX:
        raise _refused(path, f"audit.max_mib is not a whole number from 1 to {AUDIT_MIB_MAX}", "say at how many MiB a new file begins")
    return AuditFiles(_located(path, fields["log"], "audit.log"), _located(path, fields["key"], "audit.key"), fsync, max_mib)


def _object(path: Path, value: Any, name: str, keys: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """`value` as an object with just these keys, of which the `optional` ones may be away."""
    where = name or "the configuration"
    if not isinstance(value, dict):
        raise _refused(path, f"{where} is not an object", f"give it the keys {', '.join(keys)}")
    for key in keys:
        if key not in value:
            raise _refused(path, f"{where} has no key {key}", f"give it the keys {', '.join(keys)}")
    for key in value:
        if key not in keys and key not in optional:
            raise _refused(path, f"{where} has an unknown key {key}", f"the keys are {', '.join(keys + optional)}")
    return value


def _located(path: Path, value: Any, name: str) -> Path:
    return path.parent / _text(path, value, name)


def _text(path: Path, value: Any, name: str) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise _refused(path, f"{name} is not a text", "write it in quotes")
    return value


def _refused(path: Path, found: str, next_step: str) -> KaliumError:
    return KaliumError("controller.config", f"cannot read the configuration {path}", found, next_step)
