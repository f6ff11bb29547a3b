"""Where the attack suite plays: on which nodes the functions run, where the attacker's server listens, where packets are captured.

On a site of one machine all of it is that machine. On a cluster the exploited functions run on one node and the functions that they
attack on another; packets are captured on the pods' side and on the uplinks of the exploited functions' node, on the pods' side of
their targets' node, and on the hosts whose services receive.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from experiments import machine
from experiments.attacks.capture import FLUSH_SECONDS, TCPDUMP, Capture, require_nothing_dropped
from experiments.attacks.case import RECEIVER_PORT
from experiments.cluster import ClusterView
from experiments.errors import ExperimentError
from experiments.gateway import Function
from experiments.machine import Machine
from experiments.paths import RunPaths
from experiments.site import Host, Site
from experiments.systems import System

RECEIVER_PROGRAM = Path(__file__).with_name("receiver.py")
RECEIVER_START_SECONDS_MAX = 10.0


@dataclass(frozen=True)
class Point:
    """Where packets are captured."""

    host: Host
    interface: str

    def __str__(self) -> str:
        return f"{self.host.name}/{self.interface}"


class Scene:
    """One run's places. `open` once the functions of the first system are there, since an interface of pods is made by the first of them."""

    def __init__(self, site: Site, run: RunPaths, exploited: Collection[str]) -> None:
        self._site = site
        self._run = run
        self._exploited = exploited
        self._view = ClusterView.of(site)
        self.attacker_node = site.nodes[0]
        self.target_node = site.nodes[-1] if len(site.nodes) == 1 else site.nodes[1]
        self._seen: dict[str, dict[str, str]] = {}
        self.points: list[Point] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Scene:
        with contextlib.ExitStack() as stack:  # until all of it is there: no server stays behind a capture that does not start
            stack.enter_context(receiver(self._site, self._run.receiver_log))
            if self._view is None:
                (interface,) = self._site.interfaces
                stack.enter_context(Capture(interface, self._run.capture))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, trace)

    def _node_of(self, name: str) -> Host:
        return self.attacker_node if name in self._exploited else self.target_node

    def place(self, function: Function) -> Function:
        """`function` with the node on which it has to run, where there is more than one."""
        if self._view is None:
            return function
        return replace(function, constraints=(f"kubernetes.io/hostname={self._node_of(function.name).name}",))

    def deployed(self, system: System, functions: Sequence[str]) -> None:
        """The functions of `system` are there: see that each runs where it was placed, and capture from now on."""
        if self._view is None:
            return
        pods = self._view.placed(functions, system)
        self._seen[system.name] = {name: pod.node for name, pod in pods.items()}
        for name, pod in pods.items():
            wanted = self._node_of(name)
            if pod.node != wanted.name:
                raise ExperimentError(
                    "attacks.placement", f"run {name} on node {wanted.name}", f"it runs on {pod.node}", "see that the gateway passes on `constraints`"
                )
        if not self.points:
            self.points = points(self._site, self.attacker_node, self.target_node)
            for point in self.points:
                self._stack.enter_context(capture(point, self._run.capture_at(point.host.name, point.interface)))

    def removed(self, functions: Sequence[str]) -> None:
        """Return when no pod of `functions` is left."""
        if self._view is not None:
            self._view.wait_gone(functions)

    def record(self) -> Mapping[str, Any]:
        """What run.json says of it; nothing on a site of one machine."""
        if self._view is None:
            return {}
        return {
            "placement": {"exploited": self.attacker_node.name, "targets": self.target_node.name, "seen": self._seen},
            "captures": [
                {"file": self._run.capture_at(point.host.name, point.interface).name, "host": point.host.name, "interface": point.interface}
                for point in self.points
            ],
            "attacker": {"host": self._site.attacker, "address": self._site.attacker_address},
        }


def points(site: Site, attacker: Host, target: Host) -> list[Point]:
    """Every place of capture of a cluster, each once."""
    found = [Point(attacker, interface) for interface in site.interfaces] + [Point(target, site.interfaces[0])]
    receiving = [site.hosts[site.attacker], site.control, site.members("images")[0], site.members("database")[0]]
    found += [Point(host, uplink(machine.of(host))) for host in machine.distinct([attacker, *receiving]) if host.lan]
    return list(dict.fromkeys(found))


def uplink(one: Machine) -> str:
    """The interface that has the host's address on the site's network."""
    lines = one.checked(["ip", "-o", "-4", "addr", "show", "to", one.host.lan], root=True, again=True).decode().split("\n")
    names = [line.split()[1] for line in lines if len(line.split()) > 1]
    if not names:
        raise ExperimentError(
            "attacks.uplink", f"find the interface of {one.host.lan} on host {one.host}", "no interface has that address",
            "correct kalium_layout_address of the host in the inventory, then set the site up again",
        )  # fmt: skip
    return names[0]


def not_ours(one: Machine) -> list[str]:
    """tcpdump's words that leave out our own SSH to a host: the capture that travels through it would capture itself.

    Exactly the connections between the operator's address and the address and port of sshd there; nothing of a pod has these, since a
    masqueraded port is never below 1024.
    """
    if one.host.is_local:
        return []
    said = one.checked(["printenv", "SSH_CONNECTION"], again=True).decode().split()
    operator, _, here, port = said
    to_here = f"(src host {operator} and dst host {here} and dst port {port})"
    return ["not", f"({to_here} or (src host {here} and src port {port} and dst host {operator}))"]


@contextlib.contextmanager
def capture(point: Point, file: Path) -> Iterator[None]:
    """tcpdump at `point` while the `with` lasts, its packets in `file` here. Raises RunRefused at its end when packets were lost."""
    one = machine.of(point.host)
    command = [*TCPDUMP, "-i", point.interface, *not_ours(one)]
    with machine.streaming(one, command, file, ready=b"listening on", what=f"capture on {point.interface}", root=True) as stream:
        yield
        time.sleep(FLUSH_SECONDS)
    require_nothing_dropped(stream.said(), str(point))


@contextlib.contextmanager
def receiver(site: Site, log: Path) -> Iterator[None]:
    """The attacker's server, while the `with` lasts, its log here."""
    host = site.hosts[site.attacker]
    if not host.is_local:
        command = ["python3", "-I", "-c", RECEIVER_PROGRAM.read_text(encoding="utf-8"), site.attacker_address, str(RECEIVER_PORT), "-"]
        with machine.streaming(machine.of(host), command, log, ready=b"listening", what=f"listen on {site.attacker_address}:{RECEIVER_PORT}"):
            yield
        return
    words = [sys.executable, "-m", "experiments.attacks.receiver", site.attacker_address, str(RECEIVER_PORT), str(log)]
    process = subprocess.Popen(words, cwd=site.checkout, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        if process.stdout.readline() != "listening\n":
            raise ExperimentError(
                "attacks.receiver", f"listen on {site.attacker_address}:{RECEIVER_PORT}", process.stderr.read().strip()[-300:] or "it ended at once",
                f"free the port (`ss -ltnp` shows who has it) and see that an interface here has {site.attacker_address}",
            )  # fmt: skip
        yield
    finally:
        process.terminate()
        process.wait(RECEIVER_START_SECONDS_MAX)
