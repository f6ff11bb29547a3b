"""The site that `site.yml` set up last, as it wrote it to `.kalium/site.json`; the one place that reads that file."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.errors import EXIT_USAGE, ExperimentError

SCHEMA = "kalium-site/v2"
CHECKOUT = Path(__file__).resolve().parents[1]
PINS = Path("roles/kalium_versions")
GROUPS = ("build", "kube_control", "function_nodes", "controller", "images", "database", "client")


@dataclass(frozen=True)
class Database:
    """The application's database; `reset` is the SQL file that puts every table back to its first state."""

    address: str
    port: int
    schema: str
    user: str
    password: str
    reset: Path


@dataclass(frozen=True)
class Host:
    """A machine of the site; `connection` is `local` or `ssh`, the rest of the fields only matter for ssh."""

    name: str
    connection: str
    address: str = ""
    port: int = 22
    user: str = ""
    key_file: str = ""
    known_hosts: str = ""
    lan: str = ""  # its address for the other hosts of the site, where that is not `address`

    @property
    def is_local(self) -> bool:
        return self.connection == "local"

    def __str__(self) -> str:
        if self.is_local:
            return self.name
        where = f"{self.user + '@' if self.user else ''}{self.address or self.name}:{self.port}"
        return where if self.name in (self.address, "") else f"{self.name} ({where})"


@dataclass(frozen=True)
class Cluster:
    """What a site on Kubernetes has beside its hosts; `classes` says which RuntimeClass the label kalium.io/runtime stands for."""

    kubeconfig: Path
    namespace: str
    classes: Mapping[str, str]
    function_port: int


@dataclass(frozen=True)
class Site:
    """What the tasks need to know of a site. Secrets are named by path, and read when they are used."""

    name: str
    engine: str
    inventory: str
    gateway: str
    basic_auth_user: str
    basic_auth_password_file: Path
    images_url: str
    images_file: Path
    database: Database
    verdicts: Path
    timings: Path
    imageserver_log: Path
    log_folder: Path
    controller_port: int
    service_manager: str
    interfaces: Sequence[str]  # on a host that runs functions: where what leaves a sandbox can be captured
    attacker: str  # name of the host on which the attack suite's server listens
    attacker_address: str  # and where functions reach it
    hosts: Mapping[str, Host]
    groups: Mapping[str, Sequence[str]]
    cluster: Cluster | None
    site_sha256: str
    commit: str
    checkout: Path

    def members(self, group: str) -> list[Host]:
        """The hosts of a group of the inventory, in its order."""
        return [self.hosts[name] for name in self.groups[group]]

    @property
    def client(self) -> Host:
        """Where load comes from."""
        return self.members("client")[0]

    @property
    def control(self) -> Host:
        """Where the gateway runs, and on a cluster its API server."""
        return self.members("kube_control")[0]

    @property
    def nodes(self) -> list[Host]:
        """Where functions run, each with an agent that writes its own logs."""
        return self.members("function_nodes")

    def describe(self) -> str:
        """One line for the head of each task's output."""
        return (
            f"site {self.name} ({self.inventory}, engine {self.engine}, gateway {self.gateway}, client {self.client}, "
            f"set up at commit {self.commit[:12]}, {self.site_sha256[:12]})"
        )


def files_of_site(checkout: Path, inventory: str) -> Iterator[Path]:
    """What a site is made from, relative to the checkout: the inventory's files and the pins, sorted."""
    roots = (Path(inventory), PINS)
    for relative in sorted(path.relative_to(checkout) for root in roots for path in (checkout / root).rglob("*") if path.is_file()):
        if "__pycache__" not in relative.parts:
            yield relative


def site_sha256(checkout: Path, inventory: str) -> str:
    """One hash over path and content of every file of `files_of_site`: it changes when the site has to be set up again."""
    whole = hashlib.sha256()
    for relative in files_of_site(checkout, inventory):
        content = hashlib.sha256((checkout / relative).read_bytes()).hexdigest()
        whole.update(f"{relative.as_posix()}\0{content}\n".encode())
    return whole.hexdigest()


def _field(record: Mapping[str, Any], name: str, kind: type, where: Path) -> Any:
    value = record.get(name)
    if not isinstance(value, kind):
        raise ExperimentError(
            "site.field",
            f"read {where}",
            f"field {name!r} is {'absent' if value is None else f'{value!r}, not {kind.__name__}'}",
            "set the site up again with `make site`; it writes this file",
        )
    return value


def _hosts(record: Mapping[str, Any], where: Path) -> tuple[dict[str, Host], dict[str, tuple[str, ...]]]:
    """Hosts by name, and the names in each group; every group that the tasks ask for has a host."""
    hosts = {}
    for name, fields in _field(record, "hosts", dict, where).items():
        if not isinstance(fields, dict) or fields.get("connection") not in ("local", "ssh"):
            raise ExperimentError(
                "site.host",
                f"read {where}",
                f"host {name} is {fields!r}",
                "give it ansible_connection `local` or `ssh` in the inventory, then `make site`",
            )
        hosts[str(name)] = Host(name=str(name), **{key: value for key, value in fields.items() if key in Host.__dataclass_fields__})
    groups = {str(group): tuple(map(str, names)) for group, names in _field(record, "groups", dict, where).items()}
    for group in GROUPS:
        if not groups.get(group) or any(name not in hosts for name in groups[group]):
            raise ExperimentError(
                "site.group", f"read {where}", f"group {group} names {', '.join(groups.get(group, ())) or 'no host'}",
                f"give the group `{group}` of the inventory a host, then `make site`",
            )  # fmt: skip
    return hosts, groups


def _cluster(record: Mapping[str, Any], where: Path) -> Cluster | None:
    if record.get("engine") != "kubernetes":
        return None
    fields = _field(record, "cluster", dict, where)
    return Cluster(
        kubeconfig=Path(_field(fields, "kubeconfig", str, where)),
        namespace=_field(fields, "namespace", str, where),
        classes=_field(fields, "classes", dict, where),
        function_port=_field(fields, "function_port", int, where),
    )


def _parse(record: Mapping[str, Any], where: Path, checkout: Path) -> Site:
    text = {
        name: _field(record, name, str, where)
        for name in (
            "site", "engine", "inventory", "gateway", "basic_auth_user", "basic_auth_password_file", "images_url", "images_file",
            "verdicts", "timings", "imageserver_log", "log_folder", "service_manager", "attacker", "attacker_address", "site_sha256", "commit",
        )
    }  # fmt: skip
    hosts, groups = _hosts(record, where)
    if text["attacker"] not in hosts:
        raise ExperimentError(
            "site.attacker", f"read {where}", f"attacker is {text['attacker']!r}, which is no host of the site",
            "name a host of the inventory by kalium_site_attacker, then `make site`",
        )  # fmt: skip
    database = _field(record, "database", dict, where)
    return Site(
        name=text["site"],
        engine=text["engine"],
        inventory=text["inventory"],
        gateway=text["gateway"].rstrip("/"),
        basic_auth_user=text["basic_auth_user"],
        basic_auth_password_file=Path(text["basic_auth_password_file"]),
        images_url=text["images_url"],
        images_file=Path(text["images_file"]),
        database=Database(
            address=_field(database, "address", str, where),
            port=_field(database, "port", int, where),
            schema=_field(database, "schema", str, where),
            user=_field(database, "user", str, where),
            password=_field(database, "password", str, where),
            reset=Path(_field(database, "reset", str, where)),
        ),
        verdicts=Path(text["verdicts"]),
        timings=Path(text["timings"]),
        imageserver_log=Path(text["imageserver_log"]),
        log_folder=Path(text["log_folder"]),
        controller_port=_field(record, "controller_port", int, where),
        service_manager=text["service_manager"],
        interfaces=tuple(map(str, _field(record, "interfaces", list, where))),
        attacker=text["attacker"],
        attacker_address=text["attacker_address"],
        hosts=hosts,
        groups=groups,
        cluster=_cluster(record, where),
        site_sha256=text["site_sha256"],
        commit=text["commit"],
        checkout=checkout,
    )


def load_site(inventory: str | None = None, *, checkout: Path = CHECKOUT) -> Site:
    """The site to work on: the one set up last or, with `inventory`, the one set up from that folder.

    Raises ExperimentError when there is none, when its record has another schema, and when inventory or pins changed
    after it was set up: a number must not be reported for a site that is not the one described in the checkout.
    """
    where = checkout / ".kalium" / "site.json"
    wanted = None if inventory is None else inventory.rstrip("/").removeprefix("./")
    if wanted is not None and not (checkout / wanted).is_dir():
        raise ExperimentError(
            "site.inventory", f"use inventory {wanted}", "there is no such folder in the checkout",
            "name one of the folders under inventory/, for example --inventory inventory/local", exit_code=EXIT_USAGE,
        )  # fmt: skip
    how = f"ansible-playbook site.yml -i {wanted or 'inventory/local'}"
    if not where.is_file():
        raise ExperimentError(
            "site.absent", f"find the site in {where.relative_to(checkout)}", "no site was set up from this checkout", f"run `{how}`"
        )
    try:
        record = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExperimentError("site.unreadable", f"read {where}", str(error), f"run `{how}`; it writes this file") from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else type(record).__name__
        raise ExperimentError("site.schema", f"read {where}", f"schema is {found!r}, this checkout reads {SCHEMA!r}", f"run `{how}`")
    site = _parse(record, where, checkout)
    if wanted is not None and site.inventory.rstrip("/") != wanted:
        raise ExperimentError(
            "site.other", f"use inventory {wanted}", f"the site set up last is {site.inventory}", f"run `{how}` first", exit_code=EXIT_USAGE
        )
    now = site_sha256(checkout, site.inventory.rstrip("/"))
    if now != site.site_sha256:
        raise ExperimentError(
            "site.changed", f"use the site set up from {site.inventory}",
            f"inventory or pins changed since ({site.site_sha256[:12]} then, {now[:12]} now)",
            f"run `ansible-playbook site.yml -i {site.inventory}` so that the machines are what the checkout says",
        )  # fmt: skip
    return site


def announced(inventory: str | None = None) -> Site:
    """`load_site`, printed first: what follows on the screen belongs to this site."""
    site = load_site(inventory)
    print(site.describe(), flush=True)
    return site


if __name__ == "__main__":  # `python -m experiments.site inventory/local` prints the hash that site.yml writes
    print(site_sha256(CHECKOUT, sys.argv[1].rstrip("/")))
