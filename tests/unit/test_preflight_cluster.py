"""Pre-flight of a cluster: what its programs find in an inventory, on a host, between hosts, and in the name of a certificate."""

from __future__ import annotations

import copy
import importlib.util
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FILES = Path(__file__).resolve().parents[2] / "roles/kalium_preflight/files"


def program(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"preflight_{name}", FILES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


inventory, between, preflight = (program(name) for name in ("inventory", "between", "preflight"))


# The inventory


def host(address: str = "", connection: str = "ssh", **fields: Any) -> dict[str, Any]:
    return {"connection": connection, "reach": address or "here", "port": 22, "user": "", "engine": "kubernetes", "address": address, **fields}


SITE: dict[str, Any] = {
    "inventories": "inventory",
    "service_manager": "systemd",
    "gateway_backend": "kalium",
    "networks": {"kalium_kubernetes_pod_network": "10.217.0.0/16", "kalium_kubernetes_service_network": "10.96.0.0/12"},
    "certificate": {"issuer": "letsencrypt", "name": "images.site.cloudlab.us", "port": 80},
    "groups": {
        "build": ["here"], "kube_control": ["control"], "function_nodes": ["w0", "w1"], "controller": ["guard"], "images": ["guard"],
        "database": ["control"], "client": ["control"],
    },
    "hosts": {
        "here": host(connection="local"), "control": host("10.10.1.5"), "w0": host("10.10.1.1"), "w1": host("10.10.1.2"),
        "guard": host("128.105.1.2"),
    },
}  # fmt: skip


def judged(change: Callable[[dict[str, Any]], None]) -> list[tuple[str, str]]:
    """Code and text of each problem of the site after `change`."""
    site = copy.deepcopy(SITE)
    change(site)
    return [(problem["code"], f"{problem['attempted']}: {problem['found']}\n{problem['next']}") for problem in inventory.judge(site)]


def test_a_right_inventory_has_no_problem() -> None:
    assert judged(lambda site: None) == []


def give(group: str, *hosts: str) -> Callable[[dict[str, Any]], None]:
    return lambda site: site["groups"].update({group: list(hosts)})


def set_host(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda site: site["hosts"][name].update(fields)


def certify(**fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda site: site["certificate"].update(fields)


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (give("function_nodes", "w0", "control"), "group", "run functions on control"),
        (give("function_nodes"), "group", "it has no host"),
        (give("kube_control", "control", "guard"), "group", "exactly one host"),
        (give("client"), "group", "the group client"),
        (give("controller", "here"), "group", "build on here"),
        (set_host("w0", connection="local"), "group", "its connection is local"),
        (set_host("w0", engine="podman"), "engine", "podman"),
        (set_host("w1", address=""), "address", "is missing"),
        (set_host("w1", address="node1"), "address", "'node1'"),
        (set_host("w1", address="127.0.0.1"), "address", "leads nowhere"),
        (set_host("w1", address="10.217.3.4"), "address", "kalium_kubernetes_pod_network"),
        (set_host("w1", address="10.100.3.4"), "address", "kalium_kubernetes_service_network"),
        (set_host("w1", address="10.10.1.1"), "duplicate", "both have the address 10.10.1.1"),
        (set_host("w1", reach="10.10.1.1"), "duplicate", "w0 and w1"),
        (lambda site: site.update(service_manager="supervisor"), "service_manager", "supervisor"),
        (lambda site: site.update(gateway_backend="both"), "gateway_backend", "both"),
        (certify(name="images"), "name", "no public host name"),
        (certify(name="images.kalium.test"), "name", "no public host name"),
        (certify(name="images.lan"), "name", "no public host name"),
        (certify(name="128.105.1.2"), "name", "no public host name"),
        (certify(issuer="letsencrypt-staging", name="images_1.site.cloudlab.us"), "name", "no public host name"),
        (certify(port=5002), "challenge_port", "port 80 only"),
    ],
)
def test_each_mistake_in_an_inventory_is_named(change: Callable[[dict[str, Any]], None], code: str, said: str) -> None:
    problems = judged(change)

    assert [found for found, _ in problems] == [f"preflight.{code}"], problems
    assert said in problems[0][1]


def test_a_node_is_called_as_kubernetes_takes_it() -> None:
    def rename(site: dict[str, Any]) -> None:
        site["hosts"] = {{"w1": "Worker_1"}.get(name, name): of for name, of in site["hosts"].items()}
        site["groups"]["function_nodes"] = ["w0", "Worker_1"]

    assert [code for code, _ in judged(rename)] == ["preflight.node_name"]


def test_a_site_with_a_certificate_of_its_own_needs_no_public_name() -> None:
    assert judged(certify(issuer="pebble", name="images.kalium.test", port=5002)) == []


def test_an_inventory_that_nobody_filled_in_is_one_problem_whatever_else_it_lacks() -> None:
    def untouched(site: dict[str, Any]) -> None:
        for name in ("control", "w0", "w1"):
            site["hosts"][name].update(reach=f"{name}.EXAMPLE.EXAMPLE-PG0.wisc.cloudlab.us", address="")
        site["hosts"]["guard"]["reach"] = "second.example"

    problems = judged(untouched)

    assert [code for code, _ in problems] == ["preflight.example"]
    assert "control, w0, w1, guard" in problems[0][1]


# A host


def found_by(check: Any, spec: dict[str, Any], **stand_ins: Any) -> Any:
    report = preflight.Report()
    check(spec, report, **stand_ins)
    return report


@pytest.mark.parametrize(
    ("kubernetes", "kernel", "version_2", "codes"),
    [
        ("1.31.14", "4.15.0-213-generic", False, []),  # Ubuntu 18.04: what the pin is for
        ("1.31.14", "3.9.0", False, ["kubernetes_kernel"]),
        ("1.32.13", "4.15.0-213-generic", False, ["kubernetes_kernel"]),
        ("1.33.13", "4.19.0", False, []),
        ("1.33.13", "6.18.44", False, []),
        ("1.34.11", "5.10.0-28-amd64", True, []),
        ("1.34.11", "5.11.0", True, ["kubernetes_kernel"]),
        ("1.34.11", "6.8.0-45-generic", True, []),
        ("1.35.8", "6.8.0-45-generic", True, []),
        ("1.35.8", "6.8.0-45-generic", False, ["cgroup"]),
        ("1.35.8", "4.15.0", False, ["kubernetes_kernel", "cgroup"]),
    ],
)
def test_kubernetes_is_judged_by_kernel_and_control_groups(tmp_path: Path, kubernetes: str, kernel: str, version_2: bool, codes: list[str]) -> None:
    if version_2:
        (tmp_path / "cgroup.controllers").touch()
    spec = {"node": {"kubernetes": kubernetes, "gvisor": "20251006"}}

    report = found_by(preflight.check_versions, spec, release=lambda: kernel, cgroups=str(tmp_path))

    assert [problem["code"] for problem in report.problems] == [f"preflight.{code}" for code in codes]


@pytest.mark.parametrize(
    ("day", "kernel", "fits"),
    [
        ("20260224", "4.15.0", True), ("20260817", "4.15.0", True), ("20260818", "4.15.0", False), ("20260818", "5.6.0", True),
        ("20240414", "4.15.0", True), ("20240415", "4.15.0", False), ("20240715", "4.19.0", False), ("20240722", "4.15.0", True),
    ],
)  # fmt: skip
def test_gvisor_is_judged_by_kernel(day: str, kernel: str, fits: bool) -> None:
    report = found_by(preflight.check_versions, {"node": {"kubernetes": "1.31.14", "gvisor": day}}, release=lambda: kernel)

    assert ([problem["code"] for problem in report.problems] == []) is fits


def test_a_host_that_is_no_node_is_not_asked_about_kubernetes() -> None:
    assert found_by(preflight.check_versions, {"node": {}}, release=lambda: "2.6.32").problems == []


def test_too_few_cpus_are_told() -> None:
    assert [p["code"] for p in found_by(preflight.check_cpus, {"cpus": 2}, count=lambda: 1).problems] == ["preflight.cpu"]
    assert found_by(preflight.check_cpus, {"cpus": 2}, count=lambda: 2).problems == []


def test_the_address_that_others_are_told_has_to_be_the_hosts_own() -> None:
    def addresses() -> list[str]:
        return ["10.10.1.5", "128.105.1.2"]

    assert found_by(preflight.check_address, {"address": "10.10.1.5"}, addresses=addresses).problems == []
    wrong = found_by(preflight.check_address, {"address": "10.10.1.6"}, addresses=addresses)
    assert [problem["code"] for problem in wrong.problems] == ["preflight.address"]
    assert "10.10.1.5, 128.105.1.2" in wrong.problems[0]["found"]


def test_addresses_are_read_from_the_program_of_the_distribution() -> None:
    text = "2: eth0    inet 10.10.1.5/24 brd 10.10.1.255 scope global eth0\\  valid_lft forever\n2: eth0    inet6 2001:db8::1/64 scope global\n"

    assert preflight.own_addresses(ask=lambda command: (0, text)) == ["10.10.1.5", "2001:db8::1"]
    assert preflight.own_addresses(ask=lambda command: (127, "")) == []


@pytest.fixture
def root(tmp_path: Path) -> Callable[..., Path]:
    """`root("etc/kubernetes/admin.conf", ...)` makes a root folder with these files."""

    def make(*paths: str) -> Path:
        for path in paths:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text("")
        return tmp_path

    return make


def installed(folder: Path, **kinds: Any) -> str:
    path = folder / "installed.json"
    path.write_text(json.dumps({"schema": "kalium-installed/v1", **kinds}))
    return str(path)


def node_spec(folder: Path, containerd: str = "release", **kinds: Any) -> dict[str, Any]:
    return {"installed": installed(folder, **kinds) if kinds else str(folder / "none"), "node": {"containerd": containerd}}


@pytest.mark.parametrize(
    "left",
    [
        "etc/kubernetes/admin.conf",
        "var/lib/kubelet/config.yaml",
        "etc/cni/net.d/05-cilium.conflist",
        "usr/bin/dockerd",
        "usr/local/bin/k3s",
        "usr/bin/kubeadm",
    ],
)
def test_a_cluster_of_somebody_else_is_refused_with_how_to_clean(root: Callable[..., Path], tmp_path: Path, left: str) -> None:
    report = found_by(preflight.check_foreign_cluster, node_spec(tmp_path), root=str(root(left)), owner=lambda path: "")

    assert [problem["code"] for problem in report.problems] == ["preflight.cluster_here"]
    assert f"/{left}" in report.problems[0]["found"]
    assert "kubeadm reset" in report.problems[0]["next"]
    assert report.facts["cluster"] == "foreign"


def test_half_an_attempt_of_our_own_is_gone_on_with(root: Callable[..., Path], tmp_path: Path) -> None:
    """Recorded by path, by the folder above it, or by its package."""
    here = root("etc/kubernetes/admin.conf", "usr/local/bin/kubelet", "usr/bin/containerd")
    spec = node_spec(tmp_path, paths=["/etc/kubernetes", "/usr/local/bin/kubelet"], packages=["containerd"])

    report = found_by(preflight.check_foreign_cluster, spec, root=str(here), owner=lambda path: {"/usr/bin/containerd": "containerd"}.get(path, ""))

    assert report.problems == []
    assert report.facts["cluster"] == "ours"


def test_what_is_not_recorded_is_foreign_beside_what_is(root: Callable[..., Path], tmp_path: Path) -> None:
    here = root("etc/kubernetes/admin.conf", "usr/bin/dockerd")

    report = found_by(preflight.check_foreign_cluster, node_spec(tmp_path, paths=["/etc/kubernetes"]), root=str(here), owner=lambda path: "docker-ce")

    assert "/usr/bin/dockerd" in report.problems[0]["found"]
    assert "admin.conf" not in report.problems[0]["found"]


def test_the_distributions_containerd_may_be_there_where_it_is_wanted(root: Callable[..., Path], tmp_path: Path) -> None:
    here = root("usr/bin/containerd", "etc/containerd/config.toml")

    for source, count in (("distribution", 0), ("release", 1)):
        report = found_by(preflight.check_foreign_cluster, node_spec(tmp_path, source), root=str(here), owner=lambda path: "containerd")
        assert len(report.problems) == count


def test_a_bare_host_has_no_cluster(tmp_path: Path) -> None:
    report = found_by(preflight.check_foreign_cluster, node_spec(tmp_path), root=str(tmp_path))

    assert (report.problems, report.facts["cluster"]) == ([], "none")


def test_a_list_of_what_is_ours_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none").write_text('["not", "ours"]')

    report = found_by(preflight.check_foreign_cluster, node_spec(tmp_path), root=str(tmp_path))

    assert [problem["code"] for problem in report.problems] == ["preflight.installed"]


def test_swap_that_is_turned_off_is_worth_a_note(tmp_path: Path) -> None:
    swaps = tmp_path / "swaps"
    swaps.write_text("Filename\tType\tSize\tUsed\tPriority\n/dev/sda3 partition 3145728 0 -2\n")

    assert "/dev/sda3" in found_by(preflight.check_swap, {"node": {"swap": "off"}}, swaps=str(swaps)).notes[0]
    assert found_by(preflight.check_swap, {"node": {"swap": "keep"}}, swaps=str(swaps)).notes == []
    assert found_by(preflight.check_swap, {"node": {}}, swaps=str(swaps)).notes == []


def route(interface: str, network: str, mask: str) -> str:
    def hexadecimal(address: str) -> str:
        return f"{int.from_bytes(socket.inet_aton(address), sys.byteorder):08X}"

    return f"{interface}\t{hexadecimal(network)}\t00000000\t0001\t0\t0\t0\t{hexadecimal(mask)}\t0\t0\t0\n"


@pytest.mark.parametrize(
    ("line", "count"),
    [
        (route("eth0", "0.0.0.0", "0.0.0.0"), 0),
        (route("eth0", "10.10.1.0", "255.255.255.0"), 0),
        (route("eth0", "10.217.4.0", "255.255.255.0"), 1),
        (route("eth0", "10.0.0.0", "255.0.0.0"), 2),
        (route("tun0", "10.96.0.0", "255.240.0.0"), 1),
        (route("flannel.1", "10.217.1.0", "255.255.255.0"), 0),
        (route("cni0", "10.217.0.0", "255.255.255.0"), 0),
    ],
)
def test_a_network_of_the_cluster_hides_none_that_the_host_has_a_way_into(tmp_path: Path, line: str, count: int) -> None:
    routes = tmp_path / "route"
    routes.write_text("Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n" + line)

    report = found_by(preflight.check_networks, {"networks": SITE["networks"]}, routes=str(routes))

    assert [problem["code"] for problem in report.problems] == ["preflight.network"] * count


def test_ports_of_a_cluster_that_stands_are_held_by_it(tmp_path: Path) -> None:
    """The second run of a site must not take its own API server for a stranger."""
    with socket.create_server(("127.0.0.1", 0)) as api:
        wanted = {"address": "127.0.0.1", "port": api.getsockname()[1], "for": "the Kubernetes API", "cluster": True}
        for standing, count in (("none", 1), ("ours", 0)):
            report = preflight.Report()
            report.facts["cluster"] = standing
            preflight.check_ports({"ports": [wanted], "own": ["/etc/kalium/"]}, report)
            assert len(report.problems) == count
            assert "-e " not in "".join(problem["next"] for problem in report.problems)


def test_a_python_that_this_ansible_cannot_use_is_told_with_the_way_out() -> None:
    spec = {"distributions": {"Ubuntu": ["18.04"]}, "needs_python": False, "ansible": "2.21.5", "ansible_python": "3.9"}
    identity = {"ID": "ubuntu", "VERSION_ID": "18.04"}

    report = found_by(preflight.check_distribution, spec, read=lambda: identity, python=(3, 6))

    assert [problem["code"] for problem in report.problems] == ["preflight.ansible_python"]
    assert "make setup PYTHON=" in report.problems[0]["next"]
    assert found_by(preflight.check_distribution, {**spec, "ansible_python": "3.6"}, read=lambda: identity, python=(3, 6)).problems == []


# Between hosts


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_hosts(*paths: dict[str, Any], me: str = "worker", **control: Any) -> dict[str, Any]:
    """A specification in which `worker` has to reach `control` on this machine's loopback."""
    named = [{"from": "function_nodes", "to": "kube_control", "for": "a service", **path} for path in paths]
    groups = {"function_nodes": ["worker"], "kube_control": ["control"], "outside": ["outside"]}
    return {
        "me": me,
        "address": "127.0.0.1",
        "seconds": 60,
        "groups": groups,
        "paths": named,
        "hosts": {"control": {"address": "127.0.0.1", **control}},
    }


def ask(verb: str, argument: object) -> Any:
    words = argument if isinstance(argument, str) else json.dumps(argument)
    done = subprocess.run([sys.executable, FILES / "between.py", verb, words], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if done.stdout else None


Listen = Callable[..., dict[str, Any]]


@pytest.fixture
def listen() -> Iterator[Listen]:
    """`listen(spec)` on another host, so to say; what listens is stopped when the test ends."""
    running: list[int] = []

    def start(spec: dict[str, Any]) -> dict[str, Any]:
        report: dict[str, Any] = ask("listen", spec)
        running.append(report["pid"])
        return report

    yield start
    for pid in running:
        if pid:
            ask("stop", str(pid))


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def until(holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    return holds()


def test_ports_that_are_open_between_hosts_are_no_problem(listen: Listen) -> None:
    paths = {"port": free_port()}, {"port": free_port(socket.SOCK_DGRAM), "protocol": "udp"}
    listening = listen(two_hosts(*paths, me="control"))

    found = ask("probe", two_hosts(*paths, ports=listening["ports"]))

    assert listening["ports"] == {f"tcp/{paths[0]['port']}": "listening", f"udp/{paths[1]['port']}": "listening"}
    assert found == {"problems": [], "notes": []}


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_a_closed_port_is_told_with_both_ends_and_what_it_is_for(protocol: str) -> None:
    """As a firewall between them would do; who listens said that it does."""
    port = free_port(socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)

    found = ask("probe", two_hosts({"port": port, "protocol": protocol, "for": "flannel"}, ports={f"{protocol}/{port}": "listening"}))

    assert [problem["code"] for problem in found["problems"]] == ["preflight.closed"]
    assert found["problems"][0]["attempted"] == f"reach control at 127.0.0.1:{port}/{protocol} for flannel"
    assert found["problems"][0]["found"]
    assert f"{port}/{protocol}" in found["problems"][0]["next"]


def test_an_active_firewall_that_the_site_opens_is_a_note(listen: Listen) -> None:
    port = free_port()

    found = ask("probe", two_hosts({"port": port}, ports={f"tcp/{port}": "listening"}, firewall="ufw"))

    assert found["problems"] == []
    assert "ufw" in found["notes"][0]


def test_an_address_that_leads_to_another_host_is_told(listen: Listen) -> None:
    path = {"port": free_port()}
    spec = two_hosts(path, me="control")
    spec["me"], spec["groups"]["kube_control"] = "stranger", ["stranger"]
    listen(spec)

    found = ask("probe", two_hosts(path, ports={f"tcp/{path['port']}": "listening"}))

    assert [problem["code"] for problem in found["problems"]] == ["preflight.address"]
    assert "stranger" in found["problems"][0]["found"]


def test_a_port_that_a_service_has_already_only_has_to_accept(listen: Listen) -> None:
    """The second run: what answers there is the service, and it greets nobody."""
    with socket.create_server(("127.0.0.1", 0)) as service:
        path = {"port": service.getsockname()[1]}
        listening = listen(two_hosts(path, me="control"))

        found = ask("probe", two_hosts(path, ports=listening["ports"]))

    assert listening == {"pid": 0, "ports": {f"tcp/{path['port']}": "held"}}
    assert found["problems"] == []


def test_what_nobody_listens_for_is_not_judged() -> None:
    assert ask("probe", two_hosts({"port": free_port()}, ports={}))["problems"] == []
    assert ask("probe", {**two_hosts({"port": free_port()}), "hosts": {}})["problems"] == []


def test_a_listener_is_ended_by_its_number_and_nothing_else_is(listen: Listen) -> None:
    path = {"port": free_port()}
    listening = listen(two_hosts(path, me="control"))
    with subprocess.Popen(["sleep", "30"]) as other:
        ask("stop", str(other.pid))
        still_runs = other.poll() is None
        other.kill()

    ask("stop", str(listening["pid"]))

    assert still_runs
    assert until(lambda: is_free(path["port"]))


def test_a_listener_ends_by_itself_when_nobody_comes_back(listen: Listen) -> None:
    path = {"port": free_port()}

    listen({**two_hosts(path, me="control"), "seconds": 0.2})

    assert until(lambda: is_free(path["port"]))


def test_a_host_listens_only_for_what_leads_to_its_groups(listen: Listen) -> None:
    assert listen(two_hosts({"port": free_port()}, me="worker")) == {"pid": 0, "ports": {}}


# The name of a certificate

OWN = ["10.10.1.9", "128.105.1.2"]


@pytest.mark.parametrize(
    ("leads_to", "public", "said"),
    [
        (["128.105.1.2"], "", None),
        (["10.10.1.9"], "", "nobody outside can reach"),
        (["127.0.1.1"], "", "nobody outside can reach"),
        (["128.105.1.2", "fd00::1"], "", "fd00::1"),
        (["128.105.1.3"], "", "it leads to 128.105.1.3"),
        (["198.41.0.4"], "198.41.0.4", None),
        (["128.105.1.2"], "198.41.0.4", "it leads to 128.105.1.2"),
    ],
)
def test_the_name_leads_to_the_host_by_public_addresses(leads_to: list[str], public: str, said: str | None) -> None:
    spec = {"name": "node5.trial.kalium-pg0.wisc.cloudlab.us", "host": "node5", "public": public, "addresses": OWN}

    problems = between.judge_name(spec, lookup=lambda name: leads_to)

    assert [problem["code"] for problem in problems] == ([] if said is None else ["preflight.name"])
    assert said is None or said in problems[0]["found"]


def test_a_name_that_nobody_knows_is_told() -> None:
    def unknown(name: str) -> list[str]:
        raise OSError(-2, "Name or service not known")

    problems = between.judge_name({"name": "x.cloudlab.us", "host": "node5", "public": "", "addresses": OWN}, lookup=unknown)

    assert [problem["code"] for problem in problems] == ["preflight.name"]
    assert "Name or service not known" in problems[0]["found"]
