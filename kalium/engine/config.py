"""The engine's configuration: one JSON object, read strictly, because a misspelt key would be a default in force."""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kalium.errors import KaliumError

CONFIG_BYTES_MAX = 64 << 10
PASSWORD_BYTES_MAX = 4096
INTERFACE_CHARACTERS_MAX = 15
HOST_NAME = re.compile(r"[A-Za-z0-9](?:[-A-Za-z0-9.]{0,251}[A-Za-z0-9])?")
FLAG = re.compile(r"[a-z0-9][-a-z0-9]*(?:=[^\s]*)?")

KEYS = "backend admin data user password_file hosts state_dir function_port health_path"
KEYS_OF = {"podman": "bridge runtimes podman agent", "kubernetes": "kubernetes"}  # of each back-end, beside those

_Kind = TypeVar("_Kind")


@dataclass(frozen=True)
class Listener:
    """Where one of the two listeners listens; port 0 lets the system choose."""

    host: str
    port: int


@dataclass(frozen=True)
class Bridge:
    """The network of the instances: the host's own address, and the first and last address that an instance may get."""

    name: str
    address: ipaddress.IPv4Address
    prefix: int
    first: ipaddress.IPv4Address
    last: ipaddress.IPv4Address


@dataclass(frozen=True)
class Runtime:
    """An OCI runtime. Under a guarded one an instance belongs to an app and is registered with the agent."""

    path: Path
    flags: tuple[str, ...]
    guarded: bool


@dataclass(frozen=True)
class RuntimeClass:
    """A RuntimeClass of Kubernetes, under the name that a function's label has for it."""

    name: str
    guarded: bool


@dataclass(frozen=True)
class PodmanConfig:
    """What a gateway on podman is told beside what every one is."""

    bridge: Bridge
    runtimes: Mapping[str, Runtime]
    command: tuple[str, ...]
    agent: Path


@dataclass(frozen=True)
class KubernetesConfig:
    """What a gateway on Kubernetes is told beside what every one is."""

    kubeconfig: Path
    runtimes: Mapping[str, RuntimeClass]
    node_selector: Mapping[str, str]  # labels of the nodes that functions may be on, beside a function's own constraints


@dataclass(frozen=True)
class Config:
    """What `kalium engine` is told. Relative paths are meant from the configuration's directory."""

    admin: Listener
    data: Listener
    user: str
    password_file: Path
    hosts: Mapping[str, str]
    backend: PodmanConfig | KubernetesConfig
    state_dir: Path
    function_port: int
    health_path: str
    log: Path | None  # None: standard output

    def password(self) -> str:
        """The administrator's password, read now."""
        try:
            with self.password_file.open("rb") as file:
                text = file.read(PASSWORD_BYTES_MAX + 1)
            password = text.decode("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise KaliumError(
                "engine.password", f"cannot read the gateway's password from {self.password_file}", str(error), "`site.yml` writes this file"
            ) from error
        if not password or len(text) > PASSWORD_BYTES_MAX:
            raise KaliumError(
                "engine.password",
                f"cannot read the gateway's password from {self.password_file}",
                f"it holds {len(text)} bytes",
                f"write a password of at most {PASSWORD_BYTES_MAX} bytes into it",
            )
        return password


class _Reader:
    """Takes typed values out of the document and says where one is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def refuse(self, found: str, next_step: str = "docs/reference/gateway.md shows a whole configuration") -> KaliumError:
        return KaliumError("engine.config", f"cannot read the configuration {self.path}", found, next_step)

    def keys(self, value: Any, where: str, required: str, optional: str = "") -> dict[str, Any]:
        """`value` as an object with the named keys and no others."""
        known, needed = {*required.split(), *optional.split()}, set(required.split())
        if not isinstance(value, dict):
            raise self.refuse(f"{where} is not an object")
        if wrong := sorted(needed - set(value)):
            raise self.refuse(f"{where} lacks {', '.join(wrong)}")
        if wrong := sorted(set(value) - known):
            raise self.refuse(f"{where} has the unknown key {', '.join(wrong)}", f"its keys are {', '.join(sorted(known))}")
        return value

    def take(self, record: Mapping[str, Any], name: str, kind: type[_Kind], where: str = "") -> _Kind:
        value: Any = record[name]
        is_bad_text = kind is str and (not value or "\0" in str(value))
        if type(value) is not kind or is_bad_text:
            raise self.refuse(f"{where}{name} is {value!r}, and not a {kind.__name__}")
        return value

    def port(self, record: Mapping[str, Any], name: str, where: str = "", least: int = 0) -> int:
        port = self.take(record, name, int, where)
        if not least <= port <= 65535:
            raise self.refuse(f"{where}{name} is {port}", f"give a port from {least} to 65535")
        return port

    def address(self, text: str, where: str) -> ipaddress.IPv4Address:
        try:
            return ipaddress.IPv4Address(text)
        except ValueError as error:
            raise self.refuse(f"{where} is {text!r}, and not an IPv4 address") from error


def load(path: Path) -> Config:
    """Read a configuration. Raises KaliumError engine.config for anything but a whole and valid one."""
    reader = _Reader(path)
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise reader.refuse(error.strerror or str(error), "name the file by --config; `site.yml` writes /etc/kalium/engine.json") from error
    if len(text) > CONFIG_BYTES_MAX:
        raise reader.refuse(f"it has more than {CONFIG_BYTES_MAX} bytes")
    try:
        document = json.loads(text)
    except ValueError as error:
        raise reader.refuse(f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise reader.refuse("the configuration is not an object")
    backend = str(document.get("backend"))
    if backend not in KEYS_OF:
        raise reader.refuse(f"backend is {backend[:200]!r}", f"write one of {', '.join(KEYS_OF)}")
    top = reader.keys(document, "the configuration", f"{KEYS} {KEYS_OF[backend]}", "log")
    hosts = reader.take(top, "hosts", dict)
    health_path = reader.take(top, "health_path", str)
    if not health_path.startswith("/") or not health_path.isprintable() or " " in health_path:
        raise reader.refuse(f"health_path is {health_path!r}, and not the path of a URL")
    base = path.parent.resolve()
    user = reader.take(top, "user", str)
    if ":" in user:
        raise reader.refuse("user holds a colon, which ends a user's name in basic authentication")
    return Config(
        admin=_listener(reader, top["admin"], "admin"),
        data=_listener(reader, top["data"], "data"),
        user=user,
        password_file=base / reader.take(top, "password_file", str),
        hosts={_host(reader, name): str(reader.address(reader.take(hosts, name, str, "hosts."), f"hosts.{name}")) for name in hosts},
        backend=_podman(reader, top, base) if backend == "podman" else _kubernetes(reader, top, base),
        state_dir=base / reader.take(top, "state_dir", str),
        function_port=reader.port(top, "function_port", least=1),
        health_path=health_path,
        log=base / reader.take(top, "log", str) if top.get("log") is not None else None,
    )


def _podman(reader: _Reader, top: Mapping[str, Any], base: Path) -> PodmanConfig:
    runtimes = reader.take(top, "runtimes", dict)
    podman = reader.take(top, "podman", list)
    if not podman or not all(isinstance(word, str) and word for word in podman):
        raise reader.refuse("podman is not a list of words", 'write "podman": ["podman"]')
    return PodmanConfig(
        bridge=_bridge(reader, top["bridge"]),
        runtimes={name: _runtime(reader, runtimes[name], name) for name in runtimes},
        command=tuple(podman),
        agent=base / reader.take(top, "agent", str),
    )


def _kubernetes(reader: _Reader, top: Mapping[str, Any], base: Path) -> KubernetesConfig:
    record = reader.keys(top["kubernetes"], "kubernetes", "kubeconfig classes", "node_selector")
    classes = reader.take(record, "classes", dict, "kubernetes.")
    selector = reader.take(record, "node_selector", dict, "kubernetes.") if "node_selector" in record else {}
    if not all(isinstance(value, str) for value in selector.values()):
        raise reader.refuse("kubernetes.node_selector is no object of texts", 'write the labels of nodes as {"LABEL": "VALUE"}')
    return KubernetesConfig(
        kubeconfig=base / reader.take(record, "kubeconfig", str, "kubernetes."),
        runtimes={name: _runtime_class(reader, classes[name], name) for name in classes},
        node_selector=selector,
    )


def _runtime_class(reader: _Reader, value: Any, name: str) -> RuntimeClass:
    where = f"kubernetes.classes.{name}"
    _check_runtime_name(reader, name)
    record = reader.keys(value, where, "class guarded")
    return RuntimeClass(reader.take(record, "class", str, f"{where}."), reader.take(record, "guarded", bool, f"{where}."))


def _listener(reader: _Reader, value: Any, name: str) -> Listener:
    record = reader.keys(value, name, "host port")
    host = str(reader.address(reader.take(record, "host", str, f"{name}."), f"{name}.host"))
    return Listener(host, reader.port(record, "port", f"{name}."))


def _host(reader: _Reader, name: str) -> str:
    if not HOST_NAME.fullmatch(name):
        raise reader.refuse(f"hosts holds {name!r}, which is no host's name")
    return name


def _bridge(reader: _Reader, value: Any) -> Bridge:
    record = reader.keys(value, "bridge", "name address prefix first last")
    name = reader.take(record, "name", str, "bridge.")
    if len(name) > INTERFACE_CHARACTERS_MAX or not re.fullmatch(r"[A-Za-z0-9][-A-Za-z0-9_.]*", name):
        raise reader.refuse(f"bridge.name is {name!r}", f"give a name of at most {INTERFACE_CHARACTERS_MAX} letters and digits")
    prefix = reader.take(record, "prefix", int, "bridge.")
    if not 8 <= prefix <= 30:
        raise reader.refuse(f"bridge.prefix is {prefix}", "give one from 8 to 30")
    address, first, last = (reader.address(reader.take(record, key, str, "bridge."), f"bridge.{key}") for key in ("address", "first", "last"))
    network = ipaddress.IPv4Network((address, prefix), strict=False)
    usable = network.network_address < first <= last < network.broadcast_address
    if not usable or first <= address <= last:
        raise reader.refuse(
            f"bridge.first to bridge.last, {first} to {last}, is no range of {network} beside {address}", "give a range inside the bridge's network"
        )
    return Bridge(name, address, prefix, first, last)


def _runtime(reader: _Reader, value: Any, name: str) -> Runtime:
    where = f"runtimes.{name}."
    _check_runtime_name(reader, name)
    record = reader.keys(value, f"runtimes.{name}", "path flags guarded")
    flags = reader.take(record, "flags", list, where)
    for flag in flags:
        if not isinstance(flag, str) or not FLAG.fullmatch(flag):
            raise reader.refuse(f"{where}flags holds {flag!r}", 'write flags without hyphens in front, as "network=sandbox"')
    path = Path(reader.take(record, "path", str, where))
    if not path.is_absolute():
        raise reader.refuse(f"{where}path is {path}, and not absolute")
    return Runtime(path, tuple(flags), reader.take(record, "guarded", bool, where))


def _check_runtime_name(reader: _Reader, name: str) -> None:
    if not re.fullmatch(r"[a-z0-9][-a-z0-9]*", name):
        raise reader.refuse(f"runtimes holds {name!r}", "name runtimes by lower-case letters, digits and hyphens")
