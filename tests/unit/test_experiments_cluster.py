"""What a cluster, its hosts and its agents say of themselves: nothing is measured under a wrong name, and what is wrong is named with its place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from experiments_world import HERE, FakeGateway, FakeRemote, cluster_site, fake_remotes, items, local_site, node, pod, serving

from experiments import cluster, health, housekeeping, interruption
from experiments.cluster import ClusterView
from experiments.entries import E2_FUNCTIONS, FUNCTIONS
from experiments.errors import ExperimentError, RunRefused
from experiments.health import Finding
from experiments.housekeeping import connected_agents
from experiments.machine import Done, LocalMachine
from experiments.paths import RESULTS_SCHEMA, RunPaths
from experiments.site import Host, Site
from experiments.systems import KALIUM_ENFORCE, STOCK

WELL = b"free /var/log 1000000\nfree /tmp 65536\nunit kubelet.service active notify\nunit kalium-renew.service inactive oneshot\n"
NOBODY = b""


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeRemote]:
    """A cluster that is well, without a function on it."""
    found = fake_remotes(monkeypatch, "control", "node1", "node2")
    for fake in found.values():
        fake.answers = {"df -Pk": WELL}
    found["control"].answers |= {"get nodes": items(node("node1"), node("node2")), "get pods": items(), "ss -Htn": NOBODY}
    return found


@pytest.fixture
def site(fakes: dict[str, FakeRemote], tmp_path: Path) -> Site:
    return cluster_site(tmp_path)


@pytest.fixture
def view(site: Site) -> ClusterView:
    found = ClusterView.of(site)
    assert found is not None
    return found


Say = Callable[..., None]


@pytest.fixture
def pods_are(fakes: dict[str, FakeRemote]) -> Say:
    """What the API server says of pods from now on."""

    def say(*records: dict[str, Any]) -> None:
        fakes["control"].answers["get pods"] = items(*records)

    return say


# The view


def test_the_ready_pod_of_each_function_is_where_the_cluster_says(view: ClusterView, pods_are: Say) -> None:
    pods_are(pod("a", "node1", "kalium"), pod("b", "node2", "kalium"), pod("other", "node1", "gvisor"))

    placed = view.placed(["a", "b"], KALIUM_ENFORCE)

    assert {name: (one.node, one.address) for name, one in placed.items()} == {"a": ("node1", "10.217.1.7"), "b": ("node2", "10.217.1.7")}


@pytest.mark.parametrize(
    ("records", "found"),
    [
        ([pod("a", "node1", "gvisor")], "pod a-1 has RuntimeClass gvisor"),
        ([pod("a", "node1", "")], "pod a-1 has RuntimeClass none"),
        ([pod("a", "node1", "kalium", ready=False)], "it has no ready pod"),
        ([pod("a", "node1", "kalium", ending=True)], "it has no ready pod"),
        ([pod("b", "node1", "kalium")], "it has no ready pod"),
        ([pod("a", "node1", "gvisor"), pod("a", "node2", "kalium")], "pod a-1 has RuntimeClass gvisor"),
        ([pod("a", "node1", "kalium"), pod("a", "node2", "gvisor")], "pod a-1 has RuntimeClass gvisor"),
    ],
)
def test_a_function_under_another_runtime_or_without_a_ready_pod_is_refused(
    view: ClusterView, pods_are: Say, records: list[dict[str, Any]], found: str
) -> None:
    """Also when but one of several ready pods is of the other kind: the gateway sends requests to each."""
    pods_are(*records)

    with pytest.raises(RunRefused, match=f"run a under kalium-enforce, RuntimeClass kalium: {found}"):
        view.placed(["a"], KALIUM_ENFORCE)


def test_a_pod_that_ends_stands_in_no_ones_way(view: ClusterView, pods_are: Say) -> None:
    """What is left of the system that was measured before is no answer to where a function runs now."""
    pods_are(pod("a", "node1", "kalium"), pod("a", "node2", "gvisor", ending=True))

    assert view.placed(["a"], KALIUM_ENFORCE)["a"].node == "node1"


def test_the_label_of_the_runtime_stands_for_a_class_of_this_cluster(view: ClusterView, pods_are: Say) -> None:
    pods_are(pod("a", "node1", "gvisor"))

    assert list(view.placed(["a"], STOCK)) == ["a"]


def test_waiting_ends_when_no_pod_is_left_and_pods_of_others_do_not_count(
    view: ClusterView, fakes: dict[str, FakeRemote], pods_are: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.0)
    pods_are(pod("a", "node1", "kalium", ending=True), pod("other", "node1", "kalium"))
    left = iter([None, None, lambda: pods_are(pod("other", "node1", "kalium"))])

    def after_two(what: str) -> bool:
        change = next(left)
        if change is not None:
            change()
        return False

    fakes["control"].fault = after_two

    view.wait_gone(["a", "b"])

    assert len(fakes["control"].asked) == 3


def test_a_pod_that_does_not_end_is_named_with_its_node(view: ClusterView, pods_are: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "GONE_SECONDS_MAX", 0.02)
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.005)
    pods_are(pod("a", "node2", "kalium", ready=False, waiting="ContainerCreating", ending=True))

    with pytest.raises(ExperimentError, match=r"pod a-1 on node node2 is gone: it is still there .*ContainerCreating: no such image") as caught:
        view.wait_gone(["a"])
    assert caught.value.next_step.endswith("on node2")


def test_an_api_server_that_does_not_answer_is_named_by_its_host(view: ClusterView, fakes: dict[str, FakeRemote]) -> None:
    fakes["control"].answers["get pods"] = Done(1, b"", b"The connection to the server was refused\n")

    with pytest.raises(
        ExperimentError, match=r"ask the API server on host control \(operator@.*\) for get pods -n: The connection to the server was refused"
    ) as caught:
        view.pods()
    assert caught.value.code == "cluster.kubectl" and "on control" in caught.value.next_step


def test_the_api_server_is_asked_with_the_sites_kubeconfig_and_namespace(view: ClusterView, fakes: dict[str, FakeRemote]) -> None:
    view.pods()

    assert fakes["control"].asked == ["kubectl --kubeconfig /etc/kubernetes/admin.conf --request-timeout 30s get pods -n openfaas-fn -o json"]
    assert not fakes["node1"].asked and not fakes["node2"].asked


def test_a_site_of_one_machine_has_no_view() -> None:
    assert ClusterView.of(local_site()) is None


@pytest.mark.parametrize(
    ("status", "trouble"),
    [
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no"}}}]}, "ImagePullBackOff: no"),
        ({"containerStatuses": [{"state": {"terminated": {"reason": "OOMKilled"}}}]}, "OOMKilled"),
        ({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/2"}]}, "Unschedulable: 0/2"),
        ({"conditions": [{"type": "Ready", "status": "False", "reason": "ContainersNotReady"}]}, "ContainersNotReady"),
        ({"phase": "Failed", "reason": "Evicted"}, "Evicted"),
        ({"phase": "Pending"}, "Pending"),
        (None, "no status yet"),
    ],
)
def test_the_most_telling_of_a_pods_troubles_is_told(view: ClusterView, pods_are: Say, status: Mapping[str, Any] | None, trouble: str) -> None:
    pods_are({"metadata": {"name": "a-1"}, "spec": {}, "status": status})

    (one,) = view.pods()

    assert (one.trouble, one.is_ready, one.function, one.node, one.address) == (trouble, False, "", "", "")


# Health


def findings(site: Site) -> list[tuple[str, str]]:
    return [(finding.host, finding.what) for finding in health.findings(site)]


def test_a_site_that_is_well_has_no_findings(site: Site, pods_are: Say) -> None:
    """A unit that ran once and ended is not down, and 64 MiB are enough."""
    pods_are(pod("a", "node1", "kalium"), pod("b", "node2", "kalium", ready=False, ending=True))

    assert findings(site) == []


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("unit kalium-agent.service inactive notify", "kalium-agent.service is inactive"),
        ("unit kubelet.service failed notify", "kubelet.service is failed"),
        ("unit kalium-renew.service failed oneshot", "kalium-renew.service is failed"),
        ("free /var/lib 65535", "/var/lib has 63 MiB left"),
    ],
)
def test_a_unit_that_is_down_and_a_folder_without_room_are_found_on_their_host(
    site: Site, fakes: dict[str, FakeRemote], line: str, what: str
) -> None:
    fakes["node2"].answers["df -Pk"] = WELL + line.encode() + b"\n"

    assert findings(site) == [("node2", what)]


@pytest.mark.parametrize("state", ["activating", "reloading"])
def test_a_unit_on_its_way_is_not_down(site: Site, fakes: dict[str, FakeRemote], state: str) -> None:
    fakes["node2"].answers["df -Pk"] = f"unit kubelet.service {state} notify\n".encode()

    assert findings(site) == []


def test_a_host_tells_the_room_of_the_folders_that_fill_up() -> None:
    """The script itself, on this machine; an absent folder is left out."""
    state = health.ask(LocalMachine(HERE))

    assert set(state.free) == set(health.FOLDERS) and all(free > 0 for free in state.free.values())
    script = LocalMachine(HERE).checked(["sh", "-c", health.ASK, "sh", "/nonexistent", "/"]).decode().split()
    disk = os.statvfs("/")
    assert script[:2] == ["free", "/"]
    assert int(script[2]) * 1024 == pytest.approx(disk.f_bavail * disk.f_frsize, abs=0.05 * disk.f_blocks * disk.f_frsize)


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (node("node2", ready="Unknown"), "node node2: Ready is Unknown (R: m)"),
        (node("node2", full="True"), "node node2: DiskPressure is True (R: m)"),
        (node("node2", cordoned=True), "node node2: it takes no pods (cordoned)"),
    ],
)
def test_a_node_whose_conditions_are_not_as_they_should_be_is_found(
    site: Site, fakes: dict[str, FakeRemote], record: dict[str, Any], what: str
) -> None:
    fakes["control"].answers["get nodes"] = items(node("node1"), record)

    assert findings(site) == [("node2", what)]


def test_a_pod_with_trouble_is_found_on_its_node_or_where_the_api_server_is(site: Site, pods_are: Say) -> None:
    pods_are(pod("a", "node1", "kalium", ready=False, waiting="ErrImagePull"), pod("b", "", "kalium", ready=False))

    assert findings(site) == [("node1", "pod a-1 of a: ErrImagePull: no such image"), ("control", "pod b-1 of b: ContainersNotReady")]


def test_a_node_that_cannot_be_reached_is_found_and_the_api_server_is_asked_all_the_same(site: Site, fakes: dict[str, FakeRemote]) -> None:
    fakes["node1"].fault = lambda what: True
    fakes["control"].answers["get nodes"] = items(node("node1", ready="Unknown"), node("node2"))

    assert findings(site) == [("node1", "the link is down"), ("node1", "node node1: Ready is Unknown (R: m)")]


def test_no_api_server_is_asked_through_a_host_that_cannot_be_reached(site: Site, fakes: dict[str, FakeRemote]) -> None:
    fakes["control"].fault = lambda what: True

    assert findings(site) == [("control", "the link is down")]
    assert len(fakes["control"].asked) == 1


def test_an_api_server_that_does_not_answer_is_a_finding_and_no_error(site: Site, fakes: dict[str, FakeRemote]) -> None:
    fakes["control"].answers["get nodes"] = Done(1, b"", b"refused")

    assert findings(site) == [("control", "refused")]


def test_the_first_three_findings_are_told_and_the_rest_counted() -> None:
    found = [Finding(f"h{number}", "down", "start it") for number in range(5)]

    assert health.told(found) == "h0: down; h1: down; h2: down (and 2 more)"
    assert health.told(found[:3]) == "h0: down; h1: down; h2: down"


# What stands behind an error


def test_an_error_of_a_site_that_is_unwell_names_the_host_and_one_of_a_site_that_is_well_stays(site: Site, fakes: dict[str, FakeRemote]) -> None:
    error = ExperimentError("gateway.refused", "deploy a", "status 500", "see the gateway's log")
    denied = RunRefused("e1.denied", "measure a", "it was denied", "see the policy")
    with pytest.raises(ExperimentError) as caught, interruption.explaining(site):
        raise error
    assert caught.value is error

    fakes["node1"].fault = lambda what: True

    with pytest.raises(ExperimentError, match=r"deploy a: node1: the link is down \(status 500\)") as caught, interruption.explaining(site):
        raise error
    assert caught.value.code == "site.unwell" and caught.value.next_step == "see that node1 runs" and caught.value.__cause__ is error
    assert not isinstance(caught.value, RunRefused)
    assert interruption.explained(denied, site) is denied


# Connected agents, status and clean


class Listing(FakeGateway):
    """A gateway that is asked what it has, and invoked by nobody."""

    def invoked(self, name: str, body: dict[str, Any], call: str) -> tuple[int, Any]:
        raise AssertionError(name)


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Listing]:
    found = Listing(tmp_path)
    with serving(found):
        yield found


@pytest.fixture
def whole(site: Site, gateway: Listing) -> Site:
    """The site, with a gateway that answers through its control host."""
    password = gateway.folder / "password"
    password.write_text("secret\n", encoding="utf-8")
    return replace(site, gateway=f"http://127.0.0.1:{gateway.server_address[1]}", basic_auth_password_file=password)


def connections(*peers: str) -> bytes:
    """What ss prints of established connections to the controller."""
    return "".join(f"0      0         10.0.0.1:5000 {peer}\n" for peer in peers).encode()


@pytest.mark.parametrize(
    ("peers", "connected"),
    [
        (["{node1}:41000", "{node2}:41001"], {"node1", "node2"}),
        (["[::ffff:{node1}]:41000"], {"node1"}),
        (["10.9.9.9:41000", "{node2}:5000"], {"node2"}),
        (["127.0.0.1:41000"], {"control"}),
        (["[::1]:41000"], {"control"}),
        (["[::ffff:127.0.0.1]:41000"], {"control"}),
        ([], set()),
    ],
)
def test_an_agent_is_connected_when_the_controllers_host_has_a_connection_from_there(
    site: Site, fakes: dict[str, FakeRemote], peers: list[str], connected: set[str]
) -> None:
    lan = {name: host.lan for name, host in site.hosts.items()}
    fakes["control"].answers["ss -Htn"] = connections(*(peer.format(**lan) for peer in peers))

    assert connected_agents(site) == connected
    assert "sport = :5000" in fakes["control"].asked[-1]


def test_an_agent_is_known_by_the_address_of_its_host_too(site: Site, fakes: dict[str, FakeRemote]) -> None:
    outside = Host("node3", "ssh", "192.0.2.7")
    fakes["control"].answers["ss -Htn"] = connections("192.0.2.7:1")

    assert connected_agents(replace(site, hosts={**site.hosts, "node3": outside})) == {"node3"}


def test_status_tells_hosts_nodes_agents_gateway_functions_and_runs(whole: Site, gateway: Listing, fakes: dict[str, FakeRemote]) -> None:
    gateway.deployed["hello"] = {}
    fakes["control"].answers["ss -Htn"] = connections(f"{whole.hosts['node1'].lan}:1", f"{whole.hosts['node2'].lan}:1")
    run = RunPaths.create("e1", results=whole.checkout / "results")
    run.write_record({"schema": RESULTS_SCHEMA, "profile": "quick", "commit": "c" * 40})

    lines = housekeeping.status(whole).splitlines()

    assert lines[1:] == [
        "host node1 (operator@node1.example:22) (function_nodes): reachable, at least 64 MiB free, kubelet active",
        "host node2 (operator@node2.example:22) (function_nodes): reachable, at least 64 MiB free, kubelet active",
        "node node1: Ready", "node node2: Ready", "agent of node1: connected", "agent of node2: connected",
        f"gateway {whole.gateway}: version fake", "functions: hello", f"e1/{run.stamp}: quick, incomplete, commit cccccccccccc",
    ]  # fmt: skip
    assert lines[0].startswith("host control (operator@control.example:22) (build, kube_control, controller,")


def test_an_agent_that_is_not_connected_makes_status_an_error(whole: Site, fakes: dict[str, FakeRemote], capsys: pytest.CaptureFixture[str]) -> None:
    """What runs on its node is denied once the lease has ended, and a script that only looks at the exit code has to hear of it."""
    fakes["control"].answers["ss -Htn"] = connections(f"{whole.hosts['node1'].lan}:1")

    with pytest.raises(ExperimentError, match="find site local well: node2: its agent is not connected to a controller") as caught:
        housekeeping.status(whole)

    said = capsys.readouterr().out
    assert "agent of node1: connected\nagent of node2: not connected\n" in said
    assert "kalium-agent status" in caught.value.next_step and "functions: none" in said


def test_a_controllers_host_that_cannot_list_its_connections_makes_status_an_error(whole: Site, fakes: dict[str, FakeRemote]) -> None:
    fakes["control"].fault = lambda what: "ss -Htn" in what

    with pytest.raises(ExperimentError, match="control: the link is down"):
        housekeeping.status(whole)


def test_an_agent_may_be_connected_to_any_controller(site: Site, fakes: dict[str, FakeRemote]) -> None:
    """After a fail-over it is another one than the first."""
    two = replace(site, groups={**site.groups, "controller": ("control", "node1")})
    fakes["control"].answers["ss -Htn"] = b""
    fakes["node1"].answers["ss -Htn"] = connections(f"{site.hosts['node2'].lan}:1", "127.0.0.1:2")

    assert connected_agents(two) == {"node1", "node2"}


def test_status_of_a_site_that_is_unwell_is_printed_and_then_an_error(
    whole: Site, fakes: dict[str, FakeRemote], capsys: pytest.CaptureFixture[str]
) -> None:
    fakes["node2"].fault = lambda what: True
    fakes["control"].answers["get nodes"] = items(node("node1"), node("node2", ready="Unknown"))

    with pytest.raises(ExperimentError, match="find site local well: node2: the link is down; node2: node node2: Ready is Unknown") as caught:
        housekeeping.status(whole)

    said = capsys.readouterr().out
    assert caught.value.next_step == "see that node2 runs"
    assert "(function_nodes): not reachable: the link is down" in said and "node node2: Ready is Unknown (R: m)" in said
    assert "functions: none" in said


def test_status_asks_nothing_more_through_a_control_host_that_cannot_be_reached(
    whole: Site, fakes: dict[str, FakeRemote], capsys: pytest.CaptureFixture[str]
) -> None:
    """One finding, not one for each question that cannot be asked; a lost host is waited for once."""
    fakes["control"].fault = lambda what: True

    with pytest.raises(ExperimentError) as caught:
        housekeeping.status(whole)

    assert caught.value.found == "control: the link is down" and len(fakes["control"].asked) == 1
    assert "host node2 (operator@node2.example:22) (function_nodes): reachable" in capsys.readouterr().out


def test_cleaning_a_cluster_removes_our_functions_and_runs_that_came_to_nothing(whole: Site, gateway: Listing) -> None:
    """The gateway is asked through its host, as everywhere; functions of others, complete runs and logs that were collected stay."""
    ours = (FUNCTIONS[0], E2_FUNCTIONS[0])
    gateway.deployed |= {name: {} for name in (*ours, "someone-elses")}
    results = whole.checkout / "results"
    complete, nothing = (RunPaths(results / "attacks" / stamp) for stamp in ("20260101T000000Z", "20260102T000000Z"))
    for run in (complete, nothing):
        run.folder.mkdir(parents=True)
        run.write_record({"schema": RESULTS_SCHEMA, "complete": run is complete})
    complete.seal()
    (results / "collect" / "20260101T000000Z" / "collected").mkdir(parents=True)

    said = housekeeping.clean(whole)

    assert list(gateway.deployed) == ["someone-elses"]
    assert f"removed functions: {', '.join(sorted(ours))}\n" in said and f"removed incomplete runs: {nothing.folder}" in said
    assert complete.folder.is_dir() and not nothing.folder.exists() and (results / "collect" / "20260101T000000Z").is_dir()
    assert json.loads(complete.run.read_text(encoding="utf-8"))["complete"] is True
