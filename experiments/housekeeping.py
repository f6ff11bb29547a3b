"""What is there now, and removing what a task that was interrupted left behind."""

from __future__ import annotations

import json
import shutil

from experiments import health, machine
from experiments.cluster import ClusterView
from experiments.entries import E2_FUNCTIONS, FUNCTIONS
from experiments.errors import ExperimentError
from experiments.gateway import Gateway
from experiments.health import Finding, HostState
from experiments.paths import RunPaths
from experiments.site import Host, Site


def runs(site: Site) -> list[RunPaths]:
    """Every run in `results/`, by experiment and time."""
    return [RunPaths(where.parent) for where in sorted((site.checkout / "results").glob("*/*/run.json")) if not where.parent.is_symlink()]


def state_of(run: RunPaths) -> str:
    """Whether a run is complete, can go on, or came to nothing."""
    if run.seal_file.is_file():
        return "complete"
    return "interrupted, goes on with --resume" if run.progress.is_file() else "incomplete"


def status(site: Site) -> str:
    """Hosts, services, nodes, agents, gateway, functions and runs, one a line. Raises ExperimentError after printing when something is wrong."""
    lines: list[str] = []
    states = machine.attempt(site.hosts.values(), health.ask)
    found = health.of_states(site, states)
    for host, state in states:
        groups = ", ".join(group for group, names in site.groups.items() if host.name in names)
        lines.append(f"host {host} ({groups}): {_host_line(state)}")
    if any(host == site.control and isinstance(state, ExperimentError) for host, state in states):
        lines.append(f"gateway {site.gateway}: not asked, since host {site.control.name} is not reachable")  # nor is the API server
    else:
        told, away = _nodes(site)
        lines += told
        found += away
        try:
            gateway = Gateway.of(site)
            version = (gateway.information().get("version") or {}).get("release", "unknown")
            lines += [f"gateway {gateway.url}: version {version}", f"functions: {', '.join(gateway.functions()) or 'none'}"]
        except ExperimentError as error:
            lines.append(f"gateway {site.gateway}: {error.found}")
            found.append(Finding(site.control.name, error.found, error.next_step))
    for run in runs(site):
        record = json.loads(run.run.read_text(encoding="utf-8"))
        lines.append(f"{run.experiment}/{run.stamp}: {record['profile']}, {state_of(run)}, commit {record['commit'][:12]}")
    if found:
        print("\n".join(lines), flush=True)
        raise ExperimentError("site.unwell", f"find site {site.name} well", health.told(found), found[0].next_step)
    return "\n".join(lines)


def _host_line(state: HostState | ExperimentError) -> str:
    if isinstance(state, ExperimentError):
        return f"not reachable: {state.found}"
    free = min(state.free.values(), default=0) // health.MEBIBYTE
    units = [f"{unit.removesuffix('.service')} {active}" for unit, active in state.units.items()]
    return ", ".join(["reachable", f"at least {free} MiB free", *units])


def _nodes(site: Site) -> tuple[list[str], list[Finding]]:
    """Nodes of the cluster and what the controllers' hosts say of connected agents, and what is wrong with agents.

    Nothing on a site of one machine. What is wrong with nodes is found by `health` already.
    """
    view = ClusterView.of(site)
    if view is None:
        return [], []
    lines = []
    try:
        lines += [f"node {node.name}: {'; '.join(node.troubles) or 'Ready'}" for node in view.nodes()]
    except ExperimentError as error:
        lines.append(f"nodes: {error.found}")
    try:
        connected = connected_agents(site)
    except ExperimentError as error:
        return [*lines, f"agents: {error.found}"], [Finding(site.members("controller")[0].name, error.found, error.next_step)]
    lines += [f"agent of {node.name}: {'connected' if node.name in connected else 'not connected'}" for node in site.nodes]
    away = [
        Finding(node.name, "its agent is not connected to a controller", f"see `kalium-agent status` and the agent's log on {node.name}")
        for node in site.nodes
        if node.name not in connected
    ]
    return lines, away


def connected_agents(site: Site) -> set[str]:
    """Names of the nodes from which a connection to a controller is open, as the controllers' hosts see it."""
    return {name for controller in site.members("controller") for name in _connected_to(site, controller)}


def _connected_to(site: Site, controller: Host) -> set[str]:
    command = ["ss", "-Htn", "state", "established", f"( sport = :{site.controller_port} )"]
    lines = [line.split() for line in machine.of(controller).checked(command, again=True).decode().splitlines()]
    peers = {line[3].rpartition(":")[0].strip("[]").removeprefix("::ffff:") for line in lines if len(line) > 3}
    is_own = not peers.isdisjoint({"127.0.0.1", "::1"})
    return {host.name for host in site.hosts.values() if peers & {host.lan, host.address} or (is_own and host == controller)}


def clean(site: Site) -> str:
    """Remove the benchmark's functions from the gateway and runs that came to nothing; complete runs and those that can go on stay."""
    gateway = Gateway.of(site)
    left = [name for name in gateway.functions() if name in (*FUNCTIONS, *E2_FUNCTIONS)]
    gateway.remove_all(left)
    incomplete = [run for run in runs(site) if state_of(run) == "incomplete"]
    for run in incomplete:
        shutil.rmtree(run.folder)
    kept = [f"{run.experiment}/{run.stamp}" for run in runs(site) if state_of(run).startswith("interrupted")]
    lines = [
        f"removed functions: {', '.join(left) or 'none'}",
        f"removed incomplete runs: {', '.join(str(run.folder) for run in incomplete) or 'none'}",
    ]
    return "\n".join(lines + ([f"kept runs that can go on: {', '.join(kept)}"] if kept else []))
