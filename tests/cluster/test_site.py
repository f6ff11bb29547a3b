"""A whole site on three hosts, from bare ones to bare ones again: each test is a step and stands on those above it (`make cluster-test`).

Denials and failures are read where messages arrive: at the image server's own log, and in captures on other hosts (`fab run-attacks`).
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from throwaway.footprint import footprint
from throwaway.host import Host

from experiments.entries import ENTRIES, MASTER, MASTER_PATH, MICROBENCH, RECEIVE, REPORT, SUCCESS, Stack, sample_input
from experiments.gateway import Answer, Gateway
from experiments.loadgen import problem_with
from experiments.site import Site, load_site
from experiments.systems import KALIUM_ENFORCE, KALIUM_STRICT
from experiments.verdicts import VerdictLog
from kalium.errors import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_NO

from .conftest import INVENTORY, ROOT, TWO_CONTROLLERS, Operator, kubectl, sh
from .hosts import down, keeper_pid
from .state import LOCK, RUNNING

HEALED_S_MAX = 60.0
# A refusal has to come by the policy's deadline (250 ms) and not by a client's; the rest is room for two busy cores.
REFUSED_S_MAX = 5.0
# An agent takes its next controller within a second (docs/topics/stores.md).
FAILOVER_S_MAX = 1.0
CONTROLLERS = ["controller", "controller-node1"]
BEFORE: dict[str, frozenset[str]] = {}


@pytest.fixture(scope="module")
def site(operator: Operator) -> Site:
    """What site.yml wrote at its end."""
    return load_site(INVENTORY)


@pytest.fixture
def pinned(site: Site) -> Iterator[Callable[[str], Answer]]:
    """The entry that fetches an image, enforced on the first worker; `pinned(call)` invokes it, and it is gone afterwards."""
    gateway = Gateway.of(site)
    function = replace(Stack(site).function(MICROBENCH, KALIUM_ENFORCE), constraints=(f"kubernetes.io/hostname={site.nodes[0].name}",))
    gateway.deploy_all([function])
    yield lambda call: gateway.invoke(MICROBENCH, sample_input(site, MICROBENCH), call_id=call)
    gateway.remove(MICROBENCH)


def images_served(hosts: dict[str, Host], site: Site) -> int:
    """How many requests the image server has answered, by its own log."""
    log = shlex.quote(str(site.imageserver_log))
    return int(sh(hosts[site.members("images")[0].name], f"cat {log} 2>/dev/null | wc -l"))


def until(claim: Callable[[], bool], what: str, seconds: float = HEALED_S_MAX) -> float:
    """Ask until the claim holds and return the seconds it took."""
    began = time.monotonic()
    while not claim():
        assert time.monotonic() - began < seconds, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.2)
    return time.monotonic() - began


# The site


def test_the_hosts_are_there(hosts: dict[str, Host]) -> None:
    for host in hosts.values():
        assert sh(host, "hostname").strip() == host.name
        BEFORE[host.name] = footprint(host)
    assert all(len(found) > 1000 for found in BEFORE.values())


def test_the_site_is_set_up(hosts: dict[str, Host], operator: Operator) -> None:
    said = operator.play("site.yml")

    recap = said.recap()
    assert {name: (counts["failed"], counts["unreachable"]) for name, counts in recap.items()} == dict.fromkeys(recap, (0, 0))
    assert set(hosts) <= set(recap)


def test_nodes_are_ready_and_both_runtime_classes_are_there(hosts: dict[str, Host], site: Site) -> None:
    pods = kubectl(hosts["node0"], "get pods --all-namespaces --output wide")
    classes = kubectl(hosts["node0"], "get runtimeclasses")
    print(kubectl(hosts["node0"], "get nodes --output wide"), pods, classes, sep="\n")

    nodes = json.loads(kubectl(hosts["node0"], "get nodes --output json"))["items"]
    ready = {node["metadata"]["name"]: next(one["status"] for one in node["status"]["conditions"] if one["type"] == "Ready") for node in nodes}
    assert ready == dict.fromkeys(hosts, "True")
    assert dict(line.split()[:2] for line in classes.splitlines()[1:]) == {"gvisor": "gvisor", "kalium": "kalium"}
    assert [line for line in pods.splitlines()[1:] if " Running " not in line] == []


def test_openfaas_manifests_were_taken_by_the_api_server(operator: Operator) -> None:
    (log,) = operator.logs.glob("*-ansible-playbook-site-yml-i.log")
    dry = [line for line in log.read_text(encoding="utf-8").splitlines() if re.search(r"server dry run", line)]

    print("\n".join(dry))
    assert len(dry) >= 16


def test_a_pod_of_an_enforced_app_is_refused_under_another_runtime(hosts: dict[str, Host], site: Site) -> None:
    pod: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "around", "namespace": "openfaas-fn", "labels": {"faas_function": MICROBENCH},
            "annotations": {"kalium.io/app": KALIUM_ENFORCE.app, "kalium.io/function": MICROBENCH},
        },
        "spec": {"runtimeClassName": "gvisor", "containers": [{"name": MICROBENCH, "image": "localhost/kalium/none:1"}]},
    }  # fmt: skip
    create = "kubectl --kubeconfig /etc/kubernetes/admin.conf create --filename -"
    done = hosts["node0"].run(f"echo {shlex.quote(json.dumps(pod))} | sudo {create}")

    assert done.returncode != 0 and "ValidatingAdmissionPolicy" in done.stderr, done
    print(done.stderr.strip())


# Fabric on it


def test_fab_check(operator: Operator, site: Site) -> None:
    said = operator.must("fab", "check")

    print(said.text)
    assert re.search(r"ok  stock .* with RuntimeClass gvisor, answered 200", said.text)
    assert re.search(r"ok  kalium-enforce .* with RuntimeClass kalium, answered 200, [1-9]\d* verdict", said.text)


def the_five_entries(hosts: dict[str, Host], site: Site) -> str:
    """Every entry works under enforcement, once; the result is what kubectl says of their pods."""
    gateway, stack = Gateway.of(site), Stack(site)
    names = [entry.function for entry in ENTRIES]
    served = images_served(hosts, site)
    gateway.deploy_all([stack.function(name, KALIUM_ENFORCE) for name in names])
    try:
        problems: dict[str, str] = {}
        for entry in ENTRIES:
            answer = gateway.invoke(entry.function, sample_input(site, entry.function), path=entry.path, call_id=f"entry-{entry.name}")
            problems[entry.name] = problem_with(answer.status, answer.body, json.loads(json.dumps(entry.expect)))
        pods = kubectl(hosts["node0"], "get pods --namespace openfaas-fn --output wide")
    finally:
        gateway.remove_all(names)
    assert problems == dict.fromkeys(problems, "")
    assert images_served(hosts, site) >= served + 3, "three of the entries fetch the image"
    return pods


def test_the_five_entries_work_under_enforcement_on_both_workers(hosts: dict[str, Host], site: Site) -> None:
    pods = the_five_entries(hosts, site)

    print(pods)
    assert all(re.search(rf" {node} ", pods) for node in ("node1", "node2")), "the scheduler used both workers"


def test_the_gateway_answers_as_openfaas_was_recorded_to(operator: Operator, site: Site) -> None:
    """What faas-cli was recorded to send, and asynchronous calls; the whole contract is tests/integration/test_gateway_contract.py."""
    chosen = "recorded or accepted or written_after"
    said = operator.must("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, "tests/integration/test_gateway_contract.py")

    print(said.end(3))
    assert re.search(r"^3 passed", said.text, re.MULTILINE)


def test_experiment_e1_quick(operator: Operator, site: Site) -> None:
    said = operator.must("fab", "run-e1")

    print(said.end(20))
    run = ROOT / "results/e1/latest"
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["complete"] is True and record["site"] == site.name and record["tls"].startswith("opened"), record
    assert set(record["judged_messages"]) == {"kalium-audit", "kalium-enforce"} and all(record["judged_messages"].values())


def test_attacks_across_nodes(operator: Operator, site: Site) -> None:
    said = operator.must("fab", "run-attacks")

    print(said.end(12))
    assert len(re.findall(r" bytes +0 bytes +blocked +works ", said.text)) == 9
    placed = re.search(r"ran on node (\S+), the functions that they attack on node (\S+)$", said.text, re.MULTILINE)
    assert placed and placed[1] != placed[2]


def test_status_and_collect(operator: Operator, site: Site) -> None:
    status = operator.must("fab", "status")
    collected = operator.must("fab", "collect", "--mib", "1")

    print(status.text, collected.end(12), sep="\n")
    for name in ("node0", "node1", "node2"):
        assert f"host {name} (" in status.text and f"node {name}: Ready" in status.text
    assert "agent of node1: connected" in status.text and "agent of node2: connected" in status.text


# Parts that die


def test_a_dead_controller_stops_starts_and_its_return_heals(
    hosts: dict[str, Host], site: Site, pinned: Callable[[str], Answer], operator: Operator
) -> None:
    """Nothing has to be deployed again, and what was refused never reached the image server."""
    controller = hosts[site.members("controller")[0].name]
    assert pinned("before").status == 200
    served = images_served(hosts, site)
    sh(controller, "systemctl stop kalium-controller")
    try:
        began = time.monotonic()
        refused = pinned("without")
        seconds = time.monotonic() - began
    finally:
        sh(controller, "systemctl start kalium-controller")

    print(f"without a controller: {refused.excerpt()} after {seconds:.2f} s")
    assert refused.status == 503 and seconds < REFUSED_S_MAX
    assert images_served(hosts, site) == served
    healed = until(lambda: pinned("after").status == 200, "an answer after the controller's return")
    print(f"healed after {healed:.1f} s")
    assert images_served(hosts, site) == served + 1


def test_a_killed_controller_comes_back_by_itself(hosts: dict[str, Host], site: Site, pinned: Callable[[str], Answer]) -> None:
    controller = hosts[site.members("controller")[0].name]
    assert pinned("before").status == 200

    sh(controller, "systemctl kill --signal KILL kalium-controller")

    print(f"healed after {until(lambda: pinned('after').status == 200, 'an answer after the kill'):.1f} s")


def test_a_killed_agents_instances_are_replaced_without_a_deployment(hosts: dict[str, Host], site: Site, pinned: Callable[[str], Answer]) -> None:
    """A sandbox cannot speak to a new agent (docs/topics/limits.md): it lets no request in, and the gateway makes another."""
    node = hosts[site.nodes[0].name]
    assert pinned("before").status == 200
    served = images_served(hosts, site)
    old = sh(node, "systemctl show --property MainPID --value kalium-agent").strip()

    sh(node, "systemctl kill --signal KILL kalium-agent")

    answers = [pinned("killed")]

    def healthy() -> bool:
        if answers[-1].status != 200:
            answers.append(pinned("killed"))
        return answers[-1].status == 200

    healed = until(healthy, "an answer after the kill")
    print(f"after the kill: {answers[0].excerpt()}; healed after {healed:.1f} s and {len(answers)} requests")
    assert sh(node, "systemctl show --property MainPID --value kalium-agent").strip() != old
    assert {answer.status for answer in answers[:-1]} <= {503}
    assert images_served(hosts, site) == served + 1


# A second controller, and the store that they share


@pytest.fixture(scope="module")
def shared(operator: Operator) -> Site:
    """What site.yml wrote when it had made two controllers of one."""
    return load_site(TWO_CONTROLLERS)


def status_of(host: Host) -> dict[str, Any]:
    """What `kalium status` says there; nothing from a controller that does not answer yet.

    Whether all is in force is `ok`: for a moment an instance that is removed is not, because its guard goes before its registration does.
    """
    done = host.run("sudo /opt/kalium/venv/bin/kalium status --output json")
    assert done.returncode in (EXIT_DONE, EXIT_NO, EXIT_ENVIRONMENT), f"{host.name}: {done.stderr.strip() or done.stdout.strip()}"
    status: dict[str, Any] = json.loads(done.stdout) if done.returncode != EXIT_ENVIRONMENT else {}
    return status


def know_each_other(hosts: dict[str, Host], shared: Site) -> bool:
    """Each controller names both."""
    return all(status_of(hosts[one.name]).get("controllers") == CONTROLLERS for one in shared.members("controller"))


@dataclass(frozen=True)
class Sent:
    """A request and its answer."""

    call: str
    answer: Answer
    ended: float


class Flow:
    """The whole flow, enforced: the master on the first worker, what it invokes on the second, so each call asks both agents, seven times in all."""

    FUNCTIONS = (MASTER, RECEIVE, SUCCESS, REPORT)

    def __init__(self, hosts: dict[str, Host], site: Site) -> None:
        self._hosts, self._site, self._gateway = hosts, site, Gateway.of(site)

    def __enter__(self) -> Flow:
        stack, (first, second) = Stack(self._site), self._site.nodes
        nodes = {name: first if name == MASTER else second for name in self.FUNCTIONS}
        functions = [replace(stack.function(name, KALIUM_STRICT), constraints=(f"kubernetes.io/hostname={nodes[name].name}",)) for name in nodes]
        self._gateway.deploy_all(functions)
        return self

    def __exit__(self, *_: object) -> None:
        self._gateway.remove_all(self.FUNCTIONS)

    def photo(self, call: str) -> Sent:
        """One photo is taken."""
        answer = self._gateway.invoke(MASTER, sample_input(self._site, MASTER), path=MASTER_PATH, call_id=call)
        return Sent(call, answer, time.monotonic())

    def intrusion(self, call: str) -> Sent:
        """A stranger invokes what only the master may. It would fetch the image before all else, as the image server's log would show."""
        answer = self._gateway.invoke(RECEIVE, sample_input(self._site, RECEIVE), call_id=call)
        return Sent(call, answer, time.monotonic())

    def while_(self, name: str, happens: Callable[[], object], *, rounds: int) -> float:
        """Photo and intrusion by turns; `happens` at a third of them. The result is how long no photo was taken, in seconds.

        A photo is taken, or it fails as the policy says that it has to: by a verdict that was made without a controller, and denies.
        No intrusion gets anywhere, whoever is there to decide.
        """
        verdicts, served = VerdictLog(self._site), images_served(self._hosts, self._site)
        photos, intrusions = [self.photo(f"{name}-before")], []
        with ThreadPoolExecutor(1) as pool:
            happening = None
            for number in range(rounds):
                if number == rounds // 3:
                    happening = pool.submit(happens)
                photos.append(self.photo(f"{name}-{number}"))
                intrusions.append(self.intrusion(f"{name}-intrusion-{number}"))
            assert happening is not None
            happening.result()
        taken = [photo for photo in photos if photo.answer.status == 200]
        failed = {photo.call: photo.answer.excerpt() for photo in photos if photo.answer.status != 200}
        between = [after.ended - before.ended for before, after in pairwise(taken)]
        counts = f"{len(taken)} of {len(photos)} photos, {len(intrusions)} intrusions"
        print(f"{name}: {counts}; {median(between):.2f} s between two photos, at most {max(between):.2f} s; failed: {failed}")
        denied = [one for one in verdicts.settled() if one.denied]
        assert {one.call: one.answer.excerpt() for one in intrusions if one.answer.status not in (403, 503)} == {}
        assert sum(one.function == RECEIVE and one.kind == "start" for one in denied) >= len(intrusions)
        # A start that is refused has no call, so they are counted: of the intruder's, and the photos'.
        alone = [one.sentence() for one in denied if one.record["fail_mode"] == "deny"]
        assert len(alone) >= len(failed) + sum(one.answer.status == 503 for one in intrusions), (failed, alone)
        assert (photos[0].answer.status, photos[-1].answer.status) == (200, 200), failed
        assert len(taken) <= images_served(self._hosts, self._site) - served <= len(photos)
        return max(between)


def test_site_yml_makes_two_controllers_of_one(hosts: dict[str, Host], operator: Operator) -> None:
    """With one more host in the group `controller`. Nothing changes but what they need; all else is as on a second run."""
    operator.adds_a_controller()

    said = operator.play("site.yml")

    roles = {task.partition(" : ")[0] for task in said.changed()}
    print(*said.changed(), sep="\n")
    own = {"kalium_packages", "kalium_pki", "kalium_store", "kalium_controller", "kalium_agent"}
    assert own <= roles <= own | {"kalium_layout", "kalium_service", "kalium_site"}
    shared = load_site(TWO_CONTROLLERS)
    until(lambda: know_each_other(hosts, shared), "two controllers that know each other")
    statuses = [status_of(hosts[one.name]) for one in shared.members("controller")]
    assert [status["controller"] for status in statuses] == CONTROLLERS
    assert [status["store"] for status in statuses] == ["redis"] * 2
    assert sum(status["agents"] for status in statuses) == 2, "each agent is connected to one of them"


def test_the_five_entries_work_with_two_controllers(hosts: dict[str, Host], shared: Site) -> None:
    the_five_entries(hosts, shared)


def test_requests_go_on_when_either_controller_dies(hosts: dict[str, Host], shared: Site) -> None:
    """One that agents are connected to is killed, comes back and takes both of them when the other one is stopped."""
    # Which agent has which is drawn when the agent starts.
    first, second = sorted((hosts[one.name] for one in shared.members("controller")), key=lambda host: -int(status_of(host)["agents"]))
    with Flow(hosts, shared) as flow:
        until(lambda: status_of(first)["ok"] and status_of(second)["ok"], "everything to be in force")
        kill = "systemctl kill --signal KILL kalium-controller && systemctl stop kalium-controller"
        killed = flow.while_("killed", lambda: sh(first, kill), rounds=30)
        assert status_of(second)["agents"] == 2
        sh(first, "systemctl start kalium-controller")
        back = until(lambda: know_each_other(hosts, shared), "the first controller's return")
        stopped = flow.while_("stopped", lambda: sh(second, "systemctl stop kalium-controller"), rounds=15)
        assert status_of(first)["agents"] == 2
        sh(second, "systemctl start kalium-controller")
        until(lambda: know_each_other(hosts, shared), "the second controller's return")

    print(f"at most {killed:.2f} s without a photo when one was killed, {stopped:.2f} s when one was stopped; the first was back after {back:.1f} s")
    assert max(killed, stopped) <= FAILOVER_S_MAX


def test_a_dead_store_stops_starts_and_its_return_heals(hosts: dict[str, Host], shared: Site) -> None:
    """Both controllers say that they are not ready, and nothing gets as far as the image server."""
    controllers, store = [hosts[one.name] for one in shared.members("controller")], hosts["node0"]
    ask = "import http.client as h; c = h.HTTPConnection('127.0.0.1', 5001, timeout=5); c.request('GET', '/readyz'); print(c.getresponse().status)"
    ready = f"python3 -c {shlex.quote(ask)}"
    with Flow(hosts, shared) as flow:
        assert flow.photo("stored").answer.status == 200
        served = images_served(hosts, shared)
        sh(store, "systemctl stop kalium-store")
        try:
            began = time.monotonic()
            refused = flow.photo("unstored")
            answers = [sh(controller, ready).strip() for controller in controllers]
        finally:
            sh(store, "systemctl start kalium-store")
        print(f"without the store: {refused.answer.excerpt()} after {refused.ended - began:.2f} s")
        assert refused.answer.status == 503 and refused.ended - began < REFUSED_S_MAX
        assert answers == ["503"] * 2
        assert images_served(hosts, shared) == served
        healed = until(lambda: flow.photo("restored").answer.status == 200, "an answer after the store's return")
        print(f"healed after {healed:.1f} s")
        assert flow.intrusion("intruded").answer.status == 403
        assert images_served(hosts, shared) == served + 1


# Once more, and the end


def test_verify(operator: Operator, site: Site) -> None:
    said = operator.play("playbooks/verify.yml")

    assert said.changed() == []


def test_a_rehearsal_of_a_standing_site_changes_nothing(operator: Operator) -> None:
    said = operator.play("site.yml", "--check", "--diff")

    assert said.changed() == []


def test_a_second_run_changes_nothing(operator: Operator) -> None:
    said = operator.play("site.yml")

    assert said.changed() == []
    assert {name: counts["changed"] for name, counts in said.recap().items()} == dict.fromkeys(said.recap(), 0)


@pytest.mark.ending
def test_reset_leaves_the_hosts_as_they_were(hosts: dict[str, Host], operator: Operator) -> None:
    operator.play("reset.yml")

    for name, host in hosts.items():
        after = footprint(host)
        assert (sorted(after - BEFORE[name])[:20], sorted(BEFORE[name] - after)[:20]) == ([], []), name
    assert not (ROOT / ".kalium/site.json").exists()


@pytest.mark.ending
def test_the_hosts_end_without_a_trace(hosts: dict[str, Host]) -> None:
    down()

    assert keeper_pid() is None
    assert not Path(RUNNING).exists()
    assert LOCK.exists(), "the lock's file stays, and nobody holds it"
    links = Path("/sys/class/net")
    assert not (links / "kalium-test1").exists()
