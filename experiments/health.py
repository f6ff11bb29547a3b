"""What is wrong with a site, host by host: asked when a task fails, and by `fab status`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments import machine
from experiments.cluster import ClusterView
from experiments.errors import ExperimentError
from experiments.machine import Machine
from experiments.site import Host, Site

MEBIBYTE = 1 << 20
FREE_BYTES_MIN = 64 * MEBIBYTE  # below which logs, images and containers fail in ways of their own
FOLDERS = ("/var/log", "/var/lib", "/tmp")  # noqa: S108 - asked how full they are
ASK_SECONDS_MAX = 20.0
# Room of the folders that fill up; then the units that are ours or the cluster's, with their state.
ASK = """
for folder in "$@"; do df -Pk -- "$folder" 2>/dev/null | tail -n 1 | { read -r device blocks used free rest && echo "free $folder $free"; }; done
if command -v systemctl >/dev/null && [ -d /run/systemd/system ]; then
  systemctl list-units --all --plain --no-legend 'kalium-*.service' kubelet.service containerd.service 2>/dev/null |
    while read -r unit load active rest; do
      # What runs once and ends, as a renewal does, is no service that is down.
      [ "$load" = loaded ] && echo "unit $unit $active $(systemctl show --property Type --value "$unit")"
    done
fi
true
"""


@dataclass(frozen=True)
class Finding:
    """One thing that is not as it has to be: where, what, and the next step."""

    host: str
    what: str
    next_step: str

    def __str__(self) -> str:
        return f"{self.host}: {self.what}"


@dataclass(frozen=True)
class HostState:
    """What a host says of itself: free bytes by folder, and the state of each unit."""

    free: dict[str, int]
    units: dict[str, str]


def ask(one: Machine) -> HostState:
    """The state of a host, in one round trip."""
    lines = [line.split() for line in one.checked(["sh", "-c", ASK, "sh", *FOLDERS], seconds_max=ASK_SECONDS_MAX, again=True).decode().splitlines()]
    return HostState(
        free={line[1]: int(line[2]) * 1024 for line in lines if line[0] == "free"},
        units={line[1]: line[2] for line in lines if line[0] == "unit" and (line[2] == "failed" or line[3:] != ["oneshot"])},
    )


def of_host(host: Host, state: HostState | ExperimentError) -> list[Finding]:
    """What is wrong with one host."""
    if isinstance(state, ExperimentError):
        return [Finding(host.name, state.found, state.next_step)]
    found = [
        Finding(host.name, f"{folder} has {free // MEBIBYTE} MiB left", f"make room in {folder} on {host.name}")
        for folder, free in state.free.items()
        if free < FREE_BYTES_MIN
    ]
    found += [
        Finding(host.name, f"{unit} is {active}", f"see `journalctl -u {unit}` on {host.name}, then `systemctl restart {unit}`")
        for unit, active in state.units.items()
        if active not in ("active", "activating", "reloading")
    ]
    return found


def of_cluster(site: Site) -> list[Finding]:
    """What the API server says of nodes and pods."""
    view = ClusterView.of(site)
    if view is None:
        return []
    try:
        nodes, pods = view.nodes(), view.pods()
    except ExperimentError as error:
        return [Finding(site.control.name, error.found, error.next_step)]
    found = [
        Finding(node.name, f"node {node.name}: {trouble}", f"see `journalctl -u kubelet -u containerd` on {node.name}")
        for node in nodes
        for trouble in node.troubles
    ]
    found += [
        Finding(
            pod.node or site.control.name,
            f"pod {pod.name} of {pod.function}: {pod.trouble}",
            f"`kubectl -n {view.namespace} describe pod {pod.name}` on {site.control.name}",
        )
        for pod in pods
        if not pod.is_ready and not pod.is_ending
    ]
    return found


def findings(site: Site) -> list[Finding]:
    """Everything that is wrong with the site's hosts, nodes and pods; empty when all is well. It never raises."""
    return of_states(site, machine.attempt(site.hosts.values(), ask))


def of_states(site: Site, states: Sequence[tuple[Host, HostState | ExperimentError]]) -> list[Finding]:
    """`findings`, from what the hosts just said of themselves."""
    found = [finding for host, state in states for finding in of_host(host, state)]
    if any(host == site.control and isinstance(state, ExperimentError) for host, state in states):
        return found  # the API server is asked through that host
    return found + of_cluster(site)


def told(found: Sequence[Finding]) -> str:
    """Findings as one clause of a sentence; the first three."""
    more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
    return "; ".join(map(str, found[:3])) + more
