"""Where the attack suite plays: functions are where they were placed, every place where a message may pass is captured, and nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType

import pytest
from experiments_world import HERE, FakeRemote, cluster_site, fake_remotes, items, local_site, pod

from experiments import machine
from experiments.attacks import scene
from experiments.attacks.scene import Point, Scene, not_ours, points, uplink
from experiments.errors import ExperimentError, RunRefused
from experiments.gateway import Function
from experiments.paths import RunPaths
from experiments.site import CHECKOUT, Site
from experiments.systems import KALIUM_STRICT, STOCK

EXPLOITED, TARGET = "receive", "report"
SSH = b"192.0.2.1 50000 10.0.0.2 22\n"


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeRemote]:
    """Three hosts, each with its address on eth0; a pod of each function is where it has to be."""
    found = fake_remotes(monkeypatch, "control", "node1", "node2")
    for fake in found.values():
        fake.answers = {"ip -o -4": f"2: eth0    inet {fake.host.lan}/24 brd 10.0.0.255 scope global eth0\n".encode(), "printenv": SSH}
    found["control"].answers["get pods"] = items(pod(EXPLOITED, "node1", "gvisor"), pod(TARGET, "node2", "gvisor"))
    return found


@pytest.fixture
def site(fakes: dict[str, FakeRemote], tmp_path: Path) -> Site:
    return cluster_site(tmp_path)


class Open:
    """Whatever is open while a `with` lasts, by its name, in order of opening; and what was opened before."""

    def __init__(self) -> None:
        self.now: list[str] = []
        self.ever: list[str] = []

    def __call__(self, *words: object) -> _Opened:
        return _Opened(self, " ".join(map(str, words)))


class _Opened:
    def __init__(self, every: Open, name: str) -> None:
        self._every, self._name = every, name

    def __enter__(self) -> None:
        self._every.now.append(self._name)
        self._every.ever.append(self._name)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._every.now.remove(self._name)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Open:
    """The attacker's server and the captures, as names alone."""
    found = Open()
    monkeypatch.setattr(scene, "receiver", lambda site, log: found("receiver", log.name))
    monkeypatch.setattr(scene, "capture", lambda point, file: found("capture", point, file.name))
    monkeypatch.setattr(scene, "Capture", lambda interface, file: found("capture", interface, file.name))
    return found


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    return RunPaths.create("attacks", results=tmp_path / "results")


# Placement


def test_exploited_functions_are_placed_on_one_node_and_their_targets_on_another(site: Site, run: RunPaths) -> None:
    play = Scene(site, run, (EXPLOITED, "master"))

    placed = {name: play.place(Function(name, "image", labels={"a": "b"})) for name in (EXPLOITED, "master", TARGET)}

    nodes = [placed[name].constraints for name in (EXPLOITED, "master", TARGET)]
    assert nodes == [(f"kubernetes.io/hostname={node}",) for node in ("node1", "node1", "node2")]
    assert placed[TARGET].labels == {"a": "b"}


def test_the_targets_stay_on_the_second_node_whatever_nodes_there_are(site: Site, run: RunPaths) -> None:
    three = replace(site, groups={**site.groups, "function_nodes": ("node1", "node2", "control")})
    one = replace(site, groups={**site.groups, "function_nodes": ("node2",)})

    assert [Scene(which, run, {EXPLOITED}).target_node.name for which in (three, one)] == ["node2", "node2"]
    assert Scene(one, run, {EXPLOITED}).attacker_node.name == "node2"


@pytest.mark.parametrize(
    ("name", "node", "found"), [(EXPLOITED, "node2", "run receive on node node1: it runs on node2"), (TARGET, "node1", "run report on node node2")]
)
def test_a_function_on_another_node_than_it_was_placed_on_is_refused_before_anything_is_captured(
    site: Site, run: RunPaths, fakes: dict[str, FakeRemote], opened: Open, name: str, node: str, found: str
) -> None:
    nodes = {EXPLOITED: "node1", TARGET: "node2", name: node}
    fakes["control"].answers["get pods"] = items(*(pod(function, where, "gvisor") for function, where in nodes.items()))

    with pytest.raises(ExperimentError, match=found) as caught, Scene(site, run, {EXPLOITED}) as play:
        play.deployed(STOCK, (EXPLOITED, TARGET))

    assert caught.value.code == "attacks.placement" and opened.ever == ["receiver receiver.jsonl"] and opened.now == []


def test_a_function_under_another_runtime_than_the_systems_is_refused(site: Site, run: RunPaths, opened: Open) -> None:
    with pytest.raises(RunRefused, match="RuntimeClass gvisor"), Scene(site, run, {EXPLOITED}) as play:
        play.deployed(KALIUM_STRICT, (EXPLOITED, TARGET))


# Places of capture


def test_packets_are_captured_at_both_nodes_pods_at_the_uplinks_and_wherever_messages_arrive(site: Site) -> None:
    found = points(site, site.hosts["node1"], site.hosts["node2"])

    assert list(map(str, found)) == ["node1/cni0", "node1/flannel.1", "node2/cni0", "node1/eth0", "control/eth0"]


def test_each_place_is_captured_once_also_on_a_single_node(site: Site) -> None:
    only = site.hosts["node1"]

    assert list(map(str, points(site, only, only))) == ["node1/cni0", "node1/flannel.1", "node1/eth0", "control/eth0"]


@pytest.mark.parametrize("group", ["images", "database", "kube_control"])
def test_a_service_that_receives_on_a_host_of_its_own_is_captured_there(site: Site, fakes: dict[str, FakeRemote], group: str) -> None:
    """Also on node2, whose pods' side is captured already: what its services receive does not pass there."""
    apart = replace(site, groups={**site.groups, group: ("node2",)}, attacker="node1")

    found = points(apart, site.hosts["node1"], site.hosts["node2"])

    assert Point(site.hosts["node2"], "eth0") in found and len(found) == len(set(found))


def test_the_attackers_host_is_captured(site: Site) -> None:
    apart = replace(site, attacker="node2")

    assert Point(site.hosts["node2"], "eth0") in points(apart, site.hosts["node1"], site.hosts["node2"])


def test_the_uplink_is_the_interface_that_has_the_hosts_address(site: Site, fakes: dict[str, FakeRemote]) -> None:
    one = fakes["node1"]

    assert uplink(one) == "eth0" and one.asked == [f"ip -o -4 addr show to {one.host.lan}"]


def test_an_address_that_no_interface_has_is_an_error_of_the_inventory(site: Site, fakes: dict[str, FakeRemote]) -> None:
    fakes["node1"].answers["ip -o -4"] = b"\n"

    with pytest.raises(ExperimentError, match=rf"interface of {fakes['node1'].host.lan} on host node1 .*no interface has that address") as caught:
        points(site, site.hosts["node1"], site.hosts["node2"])
    assert "kalium_layout_address" in caught.value.next_step


def test_our_own_connection_is_left_out_of_a_capture_and_nothing_else(fakes: dict[str, FakeRemote]) -> None:
    """Both addresses, sshd's port and each direction with its own side of the port: a pod's SSH to that host stays in."""
    words = " ".join(not_ours(fakes["node1"]))

    assert words == ("not ((src host 192.0.2.1 and dst host 10.0.0.2 and dst port 22) or (src host 10.0.0.2 and src port 22 and dst host 192.0.2.1))")
    assert not_ours(FakeRemote(HERE)) == []


# One run's places


def test_captures_begin_with_the_first_system_and_last_until_the_end(site: Site, run: RunPaths, fakes: dict[str, FakeRemote], opened: Open) -> None:
    with Scene(site, run, {EXPLOITED}) as play:
        assert opened.now == ["receiver receiver.jsonl"]
        play.deployed(STOCK, (EXPLOITED, TARGET))
        first = list(opened.now)
        fakes["control"].answers["get pods"] = items(pod(EXPLOITED, "node1", "kalium"), pod(TARGET, "node2", "kalium"))
        play.deployed(KALIUM_STRICT, (EXPLOITED, TARGET))
        assert opened.now == first
        record = play.record()

    assert first[1:] == [f"capture {point} capture-{point.host.name}-{point.interface}.pcap" for point in play.points] and len(first) == 6
    assert opened.now == []
    nodes = {EXPLOITED: "node1", TARGET: "node2"}
    assert record["placement"] == {"exploited": "node1", "targets": "node2", "seen": {"stock": nodes, "kalium-enforce": nodes}}
    assert [(entry["host"], entry["interface"]) for entry in record["captures"]] == [(point.host.name, point.interface) for point in play.points]
    assert record["attacker"] == {"host": "control", "address": "10.0.0.1"}


def test_a_scene_waits_until_the_pods_of_a_system_are_gone(
    site: Site, run: RunPaths, fakes: dict[str, FakeRemote], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.cluster.GONE_SECONDS_MAX", 0.0)
    monkeypatch.setattr("experiments.cluster.POLL_SECONDS", 0.001)

    with pytest.raises(ExperimentError, match="wait until pod report-1 on node node2 is gone"):
        Scene(site, run, {EXPLOITED}).removed((TARGET,))
    fakes["control"].answers["get pods"] = items()
    Scene(site, run, {EXPLOITED}).removed((TARGET,))


def test_one_machine_is_a_scene_of_its_own(run: RunPaths, tmp_path: Path, opened: Open) -> None:
    """Its one interface is captured from the start, functions are placed nowhere, and run.json says nothing of places."""
    function = Function(EXPLOITED, "image")

    with Scene(local_site(tmp_path), run, {EXPLOITED}) as play:
        assert play.place(function) is function
        play.deployed(STOCK, (EXPLOITED,))
        play.removed((EXPLOITED,))
        assert opened.now == ["receiver receiver.jsonl", "capture kalium0 capture.pcap"] and play.record() == {}
    assert opened.now == []


def test_a_scene_that_cannot_be_opened_leaves_no_server_behind(run: RunPaths, tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(interface: str, file: Path) -> None:
        raise ExperimentError("capture.failed", "capture", "no such device", "install tcpdump")

    monkeypatch.setattr(scene, "Capture", fails)

    with pytest.raises(ExperimentError, match="no such device"), Scene(local_site(tmp_path), run, {EXPLOITED}):
        pytest.fail("it is not open")
    assert opened.ever == ["receiver receiver.jsonl"] and opened.now == []


# The capture itself, and the attacker's server


def tcpdump(monkeypatch: pytest.MonkeyPatch, last_words: str) -> None:
    """A tcpdump that prints its arguments, and its last words when it is ended."""
    script = f"trap 'echo {last_words} >&2; exit 0' TERM; echo \"$@\"; echo listening on >&2; while :; do sleep 0.01; done"
    monkeypatch.setattr(scene, "TCPDUMP", ("sh", "-c", script, "tcpdump"))
    monkeypatch.setattr(scene, "FLUSH_SECONDS", 0.0)


def test_a_capture_of_a_remote_interface_is_a_file_here_without_our_own_connection(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tcpdump(monkeypatch, "0 packets dropped by kernel")

    with scene.capture(Point(site.hosts["node1"], "eth0"), tmp_path / "eth0.pcap"):
        pass

    assert (tmp_path / "eth0.pcap").read_text(encoding="utf-8").startswith("-i eth0 not ((src host 192.0.2.1 and")


@pytest.mark.parametrize(("last_words", "found"), [("3 packets dropped by kernel", "3 packets were lost"), ("killed", "did not say how it ended")])
def test_a_capture_that_lost_packets_refuses_the_run_and_names_its_place(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last_words: str, found: str
) -> None:
    tcpdump(monkeypatch, last_words)

    with pytest.raises(RunRefused, match=f"capture on node1/eth0: .*{found}"), scene.capture(Point(site.hosts["node1"], "eth0"), tmp_path / "file"):
        pass


def test_a_failure_during_a_capture_is_told_and_not_that_the_capture_ended(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tcpdump(monkeypatch, "9 packets dropped by kernel")

    with pytest.raises(KeyError), scene.capture(Point(site.hosts["node1"], "eth0"), tmp_path / "file"):
        raise KeyError


@contextlib.contextmanager
def free_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    monkeypatch.setattr(scene, "RECEIVER_PORT", port)
    yield port


def send(port: int) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=30.0) as connection:
        connection.sendall(b"the loot")
        connection.shutdown(socket.SHUT_WR)
        return connection.recv(100)


Where = Callable[[Site], Site]
LOCAL: Where = lambda site: replace(site, hosts={**site.hosts, "localhost": HERE}, attacker="localhost", checkout=CHECKOUT)  # noqa: E731
REMOTE: Where = lambda site: site  # noqa: E731


@pytest.mark.parametrize("where", [LOCAL, REMOTE], ids=["local", "remote"])
def test_the_attackers_server_answers_and_its_log_is_here(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Where) -> None:
    log = tmp_path / "receiver.jsonl"
    with free_port(monkeypatch) as port, scene.receiver(where(replace(site, attacker_address="127.0.0.1")), log):
        assert send(port).startswith(b"HTTP/1.1 200")

    (line,) = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    assert line["data"] == "the loot"
    with pytest.raises(OSError, match="refused"):
        send(port)


def test_the_attackers_server_runs_on_its_host(site: Site, tmp_path: Path, fakes: dict[str, FakeRemote], monkeypatch: pytest.MonkeyPatch) -> None:
    there = replace(site, attacker="node2", attacker_address="127.0.0.1")

    with free_port(monkeypatch), scene.receiver(there, tmp_path / "log"):
        pass

    assert any("python3 -I -c" in what for what in fakes["node2"].asked) and not fakes["control"].asked


@pytest.mark.parametrize("where", [LOCAL, REMOTE], ids=["local", "remote"])
def test_a_server_that_cannot_listen_is_an_error_that_names_the_address(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: Where
) -> None:
    original = machine.streaming
    monkeypatch.setattr(machine, "streaming", lambda *words, **more: original(*words, **more, seconds_max=0.5))

    with (
        free_port(monkeypatch) as port,
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(ExperimentError, match=rf"(?s)listen on 127\.0\.0\.1:{port}.*(in use|not ready)"),
        scene.receiver(where(replace(site, attacker_address="127.0.0.1")), tmp_path / "log"),
    ):
        pytest.fail("it does not listen")
