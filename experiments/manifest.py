"""A CloudLab manifest, as the portal's tab Manifest or `geni-get manifest` gives it: which machines there are and how to reach them.

A manifest comes from outside and ends in an inventory, where text can be a template that runs. So the XML may declare nothing (no document
type, no entities), its size, depth and count are bounded, and every value has to be what it claims to be: a host name, an address, a login.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv4Interface
from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from experiments.errors import EXIT_USAGE, ExperimentError

RSPEC = "{http://www.geni.net/resources/rspec/3}"
EMULAB = "{http://www.protogeni.net/resources/rspec/ext/emulab/1}"

FILE_BYTES_MAX = 4 * 1024 * 1024  # one of six machines has 20 KiB
DEPTH_MAX = 32
ELEMENTS_MAX = 50_000
NODES_MAX = 256

NODE_NAME = re.compile(r"node(0|[1-9][0-9]{0,2})")
LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
HOST_NAME_MAX = 253
USER = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,31}")


def refusal(where: Path, found: str, next_step: str, code: str = "manifest.content") -> ExperimentError:
    """The one shape of what can be wrong with a manifest."""
    return ExperimentError(code, f"cannot read the manifest {where}", found, next_step, exit_code=EXIT_USAGE)


AGAIN = "save the tab Manifest of the experiment again, or the output of `geni-get manifest` on one of its nodes"
PROFILE = "instantiate the profile.py of this checkout, or write an inventory from inventory/sample"


@dataclass(frozen=True)
class Login:
    """One way into a machine, for one member of the project."""

    hostname: str
    port: int
    user: str


@dataclass(frozen=True)
class Node:
    """A machine: its place in the profile, its virtual and physical names, its addresses, and who may log in.

    `lan` is None for a machine outside the experiment's LAN; `public` is None when the manifest does not say it.
    """

    number: int
    virtual: str
    physical: str
    hardware: str
    public: IPv4Address | None
    lan: IPv4Interface | None
    logins: tuple[Login, ...]

    @property
    def name(self) -> str:
        return f"node{self.number}"


@dataclass(frozen=True)
class Manifest:
    """The machines in the order of their numbers, none missing; the last is the controller, the one before it the control plane."""

    where: Path
    nodes: tuple[Node, ...]

    @property
    def experiment(self) -> str:
        """The experiment's name: the second part of a virtual name, such as node0.EXPERIMENT.PROJECT-PG0.wisc.cloudlab.us."""
        return self.nodes[0].virtual.split(".")[1].lower()

    @property
    def workers(self) -> tuple[Node, ...]:
        return self.nodes[:-2]

    @property
    def control_plane(self) -> Node:
        return self.nodes[-2]

    @property
    def controller(self) -> Node:
        return self.nodes[-1]

    def logins(self, user: str | None) -> dict[int, Login]:
        """How `user` reaches each machine, by number; without one, whoever alone may reach them all. Raises ExperimentError."""
        everywhere = set.intersection(*({login.user for login in node.logins} for node in self.nodes))
        offered = ", ".join(sorted(everywhere)) or "nobody"
        if user is not None and user not in everywhere:
            raise refusal(self.where, f"{user} has no login on every machine; who has: {offered}", "name one of these with --user", "manifest.user")
        if user is None and len(everywhere) != 1:
            raise refusal(self.where, f"who has a login on every machine: {offered}", "name yours with --user", "manifest.user")
        chosen = user or everywhere.pop()
        return {node.number: next(login for login in node.logins if login.user == chosen) for node in self.nodes}


def _tree(content: bytes, where: Path) -> Element:
    """The document's root. Raises ExperimentError for anything but plain elements within the bounds."""
    builder, parser = TreeBuilder(), expat.ParserCreate(namespace_separator="}")
    depth = count = 0

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, count
        depth, count = depth + 1, count + 1
        if depth > DEPTH_MAX or count > ELEMENTS_MAX:
            raise refusal(where, f"it has more than {ELEMENTS_MAX} elements, or elements in more than {DEPTH_MAX} others", AGAIN)
        builder.start("{" + tag if "}" in tag else tag, attributes)

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        builder.end(tag)

    def declares(*_: object) -> None:
        raise refusal(where, "it declares a document type, which no manifest does and which could make it read other files", AGAIN)

    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = declares
    try:
        parser.Parse(content, True)
        return builder.close()
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise refusal(where, f"it is not XML: {error}", AGAIN) from error


def _read(where: Path) -> Element:
    try:
        with where.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise refusal(where, error.strerror or str(error), "name the file that you saved", "manifest.file") from error
    if len(content) > FILE_BYTES_MAX:
        raise refusal(where, f"it is longer than {FILE_BYTES_MAX} bytes", AGAIN)
    root = _tree(content, where)
    if root.tag != f"{RSPEC}rspec":
        raise refusal(where, f"its root is {root.tag[:80]!r}, not an rspec of version 3", AGAIN)
    if root.get("type") != "manifest":
        raise refusal(where, f"it is a {root.get('type', 'nameless')[:20]!r}, not a manifest", AGAIN)
    return root


def is_host_name(text: str) -> bool:
    """Whether it is letters, digits and hyphens between dots, at least two parts of them."""
    parts = text.split(".")
    return len(text) <= HOST_NAME_MAX and len(parts) > 1 and all(LABEL.fullmatch(part) for part in parts)


class _NodeReader:
    """Reads one node element; every value that is not what it claims to be is refused by the node's name."""

    def __init__(self, element: Element, where: Path) -> None:
        self.element, self.where = element, where
        self.name = element.get("client_id", "")
        if not NODE_NAME.fullmatch(self.name):
            raise self.wrong(f"a machine is called {self.name[:60]!r}, not node0, node1 and so on", PROFILE)

    def wrong(self, found: str, next_step: str = AGAIN) -> ExperimentError:
        return refusal(self.where, found, next_step)

    def host_name(self, element: Element, attribute: str) -> str:
        text = element.get(attribute, "")
        if not is_host_name(text):
            raise self.wrong(f"{self.name} has {attribute} {text[:60]!r}, which is no host name")
        return text

    def login(self, element: Element) -> Login:
        user, port = element.get("username", ""), element.get("port", "22")
        if not USER.fullmatch(user):
            raise self.wrong(f"{self.name} has the login {user[:60]!r}, which is no user name")
        if not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 65536):
            raise self.wrong(f"{self.name} has the port {port[:20]!r}")
        return Login(self.host_name(element, "hostname"), int(port), user)

    def address(self, text: str) -> IPv4Address:
        try:
            return IPv4Address(text)
        except AddressValueError as error:
            raise self.wrong(f"{self.name} has the address {text[:60]!r}, which is no IPv4 address") from error

    def interfaces(self) -> Iterator[tuple[str, IPv4Interface]]:
        """Each interface that has an IPv4 address, by the name under which a link refers to it."""
        for interface in self.element.iterfind(f"{RSPEC}interface"):
            for ip in interface.iterfind(f"{RSPEC}ip"):
                if ip.get("type", "ipv4") == "ipv4":
                    address, mask = self.address(ip.get("address", "")), ip.get("netmask", "")
                    try:
                        yield interface.get("client_id", ""), IPv4Interface(f"{address}/{mask}")
                    except ValueError as error:
                        raise self.wrong(f"{self.name} has the netmask {mask[:60]!r}") from error

    def node(self, on_lan: set[str]) -> Node:
        host = self.element.find(f"{RSPEC}host")
        if host is None:
            raise self.wrong(f"{self.name} has no name yet", "wait until the experiment is ready, and save its manifest then")
        logins = tuple(self.login(element) for element in self.element.iterfind(f"{RSPEC}services/{RSPEC}login"))
        if not logins:
            raise self.wrong(f"{self.name} has no login", "wait until the experiment is ready, and save its manifest then")
        virtual = self.host_name(host, "name")
        if not virtual.startswith(self.name + "."):
            raise self.wrong(f"{self.name} answers to {virtual}, which is not the name of its place in the experiment")
        vnode = self.element.find(f"{EMULAB}vnode")
        hardware = "" if vnode is None else vnode.get("hardware_type", "")
        if hardware and not LABEL.fullmatch(hardware):
            raise self.wrong(f"{self.name} has the hardware type {hardware[:60]!r}")
        return Node(
            number=int(self.name[4:]),
            virtual=virtual,
            physical=logins[0].hostname,
            hardware=hardware,
            public=self.address(host.get("ipv4", "")) if host.get("ipv4") else None,
            lan=next((interface for name, interface in self.interfaces() if name in on_lan), None),
            logins=logins,
        )


def _lan(root: Element, where: Path) -> set[str]:
    """The interfaces of the experiment's LAN."""
    links = list(root.iterfind(f"{RSPEC}link"))
    if len(links) != 1:
        raise refusal(where, f"it has {len(links)} links, where the profile has one LAN", PROFILE)
    return {reference.get("client_id", "") for reference in links[0].iterfind(f"{RSPEC}interface_ref")}


def _refuse_twice(values: Iterable[object], what: str, where: Path) -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise refusal(where, f"two machines have the {what} {value}", AGAIN)
        seen.add(value)


def read(where: Path) -> Manifest:
    """Read and judge the manifest in the file `where`. Raises ExperimentError with what is wrong first."""
    root = _read(where)
    elements = list(root.iterfind(f"{RSPEC}node"))[: NODES_MAX + 1]
    if len(elements) > NODES_MAX:
        raise refusal(where, f"it has more than {NODES_MAX} machines", PROFILE)
    on_lan = _lan(root, where) if elements else set()
    nodes = sorted((_NodeReader(element, where).node(on_lan) for element in elements), key=lambda node: node.number)
    _refuse_twice((node.name for node in nodes), "name", where)
    _refuse_twice((node.virtual for node in nodes), "name", where)
    _refuse_twice((node.public for node in nodes if node.public), "address", where)
    _refuse_twice((node.lan.ip for node in nodes if node.lan), "address", where)
    names = ", ".join(node.name for node in nodes) or "no machine"
    if len(nodes) < 3 or [node.number for node in nodes] != list(range(len(nodes))):
        raise refusal(where, f"it has {names}; a site has workers, a control plane and a controller, numbered from node0 on", PROFILE)
    outside = [node.name for node in nodes[:-1] if node.lan is None]
    if outside:
        raise refusal(where, f"{', '.join(outside)} have no address on the LAN", PROFILE)
    networks = {str(node.lan.network) for node in nodes if node.lan}
    if len(networks) > 1:
        raise refusal(where, f"the LAN's addresses are of several networks: {', '.join(sorted(networks))}", PROFILE)
    if nodes[-1].lan is None and nodes[-1].public is None:
        raise refusal(where, f"{nodes[-1].name} has no address at all", AGAIN)
    return Manifest(where, tuple(nodes))
