"""Instances: whatever step fails, and whenever, nothing is left behind; what ends is replaced; what is updated is not interrupted."""

import asyncio
import dataclasses
import ipaddress
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_world import APP, BRIDGE, GUARDED, STORY_S, FakeWatch, Machine, config, echo, http_answer, play, until, world

from kalium.engine.agent import Agent, AgentUnavailable
from kalium.engine.config import Listener
from kalium.engine.limits import REMOVE_ATTEMPTS_MAX
from kalium.engine.podman.command import CommandFailed
from kalium.engine.podman.functions import Replica
from kalium.engine.podman.host import Host
from kalium.engine.podman.network import AddressPool, Network, hardware_address
from kalium.engine.server import Engine
from kalium.errors import KaliumError

WHOLE: dict[str, Any] = {"labels": GUARDED, "annotations": APP}


def failing(pattern: str, times: int = 1_000_000) -> Callable[[str], str | None]:
    """The first `times` commands that `pattern` matches fail."""
    left = [times]

    def fails(command: str) -> str | None:
        if left[0] and re.search(pattern, command):
            left[0] -= 1
            return "as the test says"
        return None

    return fails


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short; what happens between them is the same."""
    monkeypatch.setattr("kalium.engine.podman.functions.RESTART_PAUSE_SECONDS", (0.0007, 0.0028))
    monkeypatch.setattr("kalium.engine.podman.host.REMOVE_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr("kalium.engine.instance.PROBE_PAUSE_SECONDS", (0.001, 0.004))


# Making


@pytest.mark.parametrize(
    "step",
    [
        "link add kv",
        r"ip -n \S+ -batch",
        "podman .* create ",
        "podman .* cp ",
    ],
)
@pytest.mark.parametrize("reason", ["as the test says", "cannot be run"])
def test_a_step_that_fails_is_told_and_undone(tmp_path: Path, step: str, reason: str) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.call("POST", "/system/secrets", {"name": "key", "value": "v"})
            site.machine.fails = lambda command: reason if re.search(step, command) else None

            status, text = await site.deploy(**WHOLE, secrets=["key"])

            assert (status, reason in text) == (500, True), text
            assert site.machine.is_clean()
            assert not site.agent.registered
            assert not site.backend.host.pool.taken
            assert json.loads((await site.call("GET", "/system/functions"))[1]) == []

    play(story())


@pytest.mark.parametrize("line", ["link add kv", "netns add", "link set kp", "address add 127", "link set eth0 up"])
def test_a_namespace_that_is_half_made_is_removed(tmp_path: Path, line: str) -> None:
    """`ip -batch` stops at the line that fails; what the lines before it made is there."""

    async def story() -> None:
        async with world(tmp_path) as site:
            real = site.machine._ip

            async def ip(words: list[str], batch: str) -> Any:
                if "-batch" not in words and line in " ".join(words):
                    raise CommandFailed(["ip"], "as the test says")
                return await real(words, batch)

            site.machine._ip = ip  # type: ignore[method-assign]
            assert (await site.deploy())[0] == 500
            assert site.machine.is_clean()

    play(story())


def test_a_start_that_fails_is_tried_again_with_a_new_instance(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            site.machine.fails = failing(" start ", times=3)
            assert (await site.deploy(**WHOLE))[0] == 202

            await site.ready()

            assert len(site.events("instance_failed")) == 3
            assert {line["detail"] for line in site.events("instance_failed")} == {"podman cannot start it: Error: as the test says"}
            assert len(site.machine.containers) == len(site.agent.registered) == len(site.machine.namespaces) == 1
            assert "kalium.io/reason" not in (await site.describe())["annotations"]

    play(story())


def test_an_instance_that_ends_before_it_is_ready_is_not_waited_for(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            site.machine.is_healthy = False
            await site.deploy()
            await until(lambda: any(container.server for container in site.machine.containers.values()), "a start")
            await until(lambda: site.watch._handles, "its process")

            site.watch.kill("echo")
            site.machine.is_healthy = True

            await site.ready()
            assert "its process ended; its output ends with: hello" in site.events("instance_failed")[0]["detail"]

    play(story())


def test_a_start_that_has_begun_is_waited_for_when_nobody_wants_it_any_more(tmp_path: Path) -> None:
    """Sandboxes without a record were found on a busy host: podman had been killed in the middle of a start."""

    async def story() -> None:
        ended = asyncio.Event()
        released = asyncio.Event()

        class SlowPodman:
            async def start(self, container: str, runtime: Any) -> None:
                await released.wait()
                ended.set()

        host = Host.__new__(Host)
        host.podman = SlowPodman()  # type: ignore[assignment]
        starting = asyncio.ensure_future(host.start(SimpleNamespace(container="c", runtime=None)))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        starting.cancel()
        await asyncio.sleep(0)
        assert not starting.done()

        released.set()

        with pytest.raises(asyncio.CancelledError):
            await starting
        assert ended.is_set()

    play(story())


@pytest.mark.parametrize("steps", range(0, 60, 3))
def test_a_removal_at_any_moment_leaves_nothing(tmp_path: Path, steps: int) -> None:
    """The replica's task is cancelled wherever it is: making, starting, asking, serving, removing."""

    async def story() -> None:
        async with world(tmp_path) as site:
            assert (await site.deploy(**WHOLE))[0] == 202
            for _ in range(steps):
                await asyncio.sleep(0)

            assert (await site.call("DELETE", "/system/functions", {"functionName": "echo"}))[0] == 202

            assert site.machine.is_clean()
            assert not site.agent.registered
            assert not site.backend.host.pool.taken

    play(story())


@pytest.mark.parametrize("steps", range(0, 40, 2))
def test_a_removal_beside_a_death_leaves_nothing(tmp_path: Path, steps: int) -> None:
    """The symptom was a removal that never ended: a cancellation that came together with a result was lost."""

    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            await site.ready()
            site.watch.kill("echo")
            for _ in range(steps):
                await asyncio.sleep(0)

            assert (await site.call("DELETE", "/system/functions", {"functionName": "echo"}))[0] == 202

            assert site.machine.is_clean()

    play(story())


# Removing


def test_a_removal_that_fails_is_tried_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy(**WHOLE)
            await site.ready()
            site.machine.fails = failing(" rm | netns delete", times=REMOVE_ATTEMPTS_MAX - 1)

            assert (await site.call("DELETE", "/system/functions", {"functionName": "echo"}))[0] == 202

            assert site.machine.is_clean()
            assert not site.events("instance_left")

    play(story())


def test_what_cannot_be_removed_is_an_error_and_its_address_is_not_used_again(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            await site.ready()
            site.machine.fails = failing("podman .* rm ")

            assert (await site.call("DELETE", "/system/functions", {"functionName": "echo"}))[0] == 202

            assert "as the test says" in site.events("instance_left")[0]["detail"]
            assert site.backend.host.pool.taken == 1
            (left,) = site.machine.containers
            site.machine.fails = lambda command: None
            await site.backend.host.remove_leftovers()
            assert site.machine.is_clean(), f"the next engine removes {left}"
            site.backend.host.pool._taken.clear()

    play(story())


def test_an_agent_that_is_away_does_not_hold_a_removal_up(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy(**WHOLE)
            await site.ready()
            site.agent_socket.unlink()

            assert (await site.call("DELETE", "/system/functions", {"functionName": "echo"}))[0] == 202

            assert site.events("unregister_failed")
            site.agent.registered.clear()

    play(story())


def test_a_new_engine_removes_what_a_killed_one_left_and_deploys_anew(tmp_path: Path) -> None:
    async def story() -> None:
        machine = Machine()
        async with world(tmp_path, machine) as site:
            await site.deploy(**WHOLE)
            await site.deploy("other", labels={"com.openfaas.scale.min": "2"})
            await site.ready()
            await site.ready("other", replicas=2)
            left = dict(machine.containers), dict(machine.namespaces), dict(machine.links)
            ids = {container.labels["kalium.io/instance"] for container in left[0].values()}
        machine.containers, machine.namespaces, machine.links = left  # as if the first had been killed
        machine.namespaces["kal-00000000"] = ""
        machine.links["kv00000000"] = {"master": BRIDGE, "namespace": "kal-00000000"}
        machine.namespaces["kal-strange1"] = ""
        (tmp_path / "state" / "pids" / "00000000.pid").write_text("1", encoding="ascii")

        async with world(tmp_path, machine) as site:
            assert {line["instance"] for line in site.events("leftover_removed")} == {*ids, "00000000"}
            assert not list((tmp_path / "state" / "pids").iterdir())
            assert not ids & {container.labels["kalium.io/instance"] for container in machine.containers.values()}
            assert machine.namespaces.pop("kal-strange1") == "", "what is not on our bridge is not ours"
            assert (await site.ready())["labels"] == GUARDED
            await site.ready("other", replicas=2)

    play(story())


def test_leftovers_that_cannot_be_removed_stop_the_start(tmp_path: Path) -> None:
    async def story() -> None:
        machine = Machine(fails=failing(" ps "))
        with pytest.raises(KaliumError, match="as the test says") as caught:
            async with world(tmp_path, machine):
                pass
        assert caught.value.code == "engine.leftovers"

    play(story())


def test_a_saved_deployment_that_cannot_be_read_is_told_and_kept(tmp_path: Path) -> None:
    async def story() -> None:
        folder = tmp_path / "state" / "functions"
        folder.mkdir(parents=True)
        (folder / "bad.json").write_text("{", encoding="utf-8")
        (folder / "moved.json").write_text('{"deployment": {"service": "x", "image": "y"}, "replicas": 1, "created": ""}', encoding="utf-8")
        async with world(tmp_path) as site:
            assert [Path(line["path"]).name for line in site.events("function_unreadable")] == ["bad.json", "moved.json"]
            assert (folder / "bad.json").exists()

    play(story())


# Keeping


def test_an_instance_that_dies_is_replaced(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy(**WHOLE)
            first = (await site.ready())["annotations"]["kalium.io/address"]

            site.watch.kill("echo")
            await until(lambda: site.events("instance_ended"), "its end")

            second = (await site.ready())["annotations"]["kalium.io/address"]
            assert first != second, "an address rests before it is used again"
            assert len(site.agent.registered) == 1
            assert (await site.invoke())[0] == 200

    play(story())


def test_an_instance_that_was_steady_begins_with_the_short_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a function that dies once a day would be away for half a minute each time, for ever."""
    monkeypatch.setattr("kalium.engine.podman.functions.RESTART_PAUSE_SECONDS", (0.0007, 10 * STORY_S))
    monkeypatch.setattr("kalium.engine.podman.functions.STEADY_SECONDS", 0.0)

    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            for deaths in range(1, 20):  # with pauses that double, the last would be minutes
                await site.ready()
                site.watch.kill("echo")
                await until(lambda: len(site.events("instance_ended")) == deaths, "its end")  # noqa: B023

    play(story())


def test_pauses_between_failures_grow_to_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        if seconds:
            pauses.append(seconds)
        await real(0)

    monkeypatch.setattr("kalium.engine.podman.functions.asyncio.sleep", sleep)

    async def story() -> None:
        async with world(tmp_path) as site:
            site.machine.fails = failing(" start ", times=5)
            await site.deploy()
            await site.ready()

    play(story())

    assert [pause for pause in pauses if pause in (0.0007, 0.0014, 0.0028)] == [0.0007, 0.0014, 0.0028, 0.0028, 0.0028]


def test_a_request_in_a_sandbox_that_dies_fails_at_once(tmp_path: Path) -> None:
    """A killed sandbox closes no connection: without the kernel's notice the client would wait for the deadline."""

    async def story() -> None:
        never = asyncio.Event()

        async def hang(head: str, body: str) -> bytes:
            await never.wait()
            return b""

        async with world(tmp_path) as site:
            site.machine.answering = hang
            await site.deploy()
            await site.ready()
            asking = asyncio.ensure_future(site.invoke())
            await until(lambda: site.machine.requests, "the request at the function")

            site.watch.kill("echo")

            status, text, _ = await asking
            assert (status, text) == (502, "echo did not answer: its process ended")
            never.set()
            site.machine.answering = echo
            await site.ready()

    play(story())


def test_a_request_in_a_function_that_is_removed_fails_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        never = asyncio.Event()

        async def hang(head: str, body: str) -> bytes:
            await never.wait()
            return b""

        async with world(tmp_path) as site:
            site.machine.answering = hang
            await site.deploy()
            await site.ready()
            asking = asyncio.ensure_future(site.invoke())
            await until(lambda: site.machine.requests, "the request at the function")

            assert (await site.call("DELETE", "/system/functions", {"functionName": "echo"}))[0] == 202

            assert (await asking)[:2] == (502, "echo did not answer: its instance was removed")
            never.set()

    play(story())


# Updating


def test_an_update_serves_until_the_new_instance_is_ready(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            site.machine.images.add("shop/echo:2")
            await site.deploy(envVars={"A": "1"})
            first = (await site.ready())["annotations"]["kalium.io/address"]
            site.machine.is_healthy = False
            assert (await site.deploy(method="PUT", envVars={"A": "2"}))[0] == 202

            described = await site.describe()
            assert (described["availableReplicas"], described["envVars"]) == (0, {"A": "2"}), "only the new deployment counts"
            assert (await site.invoke())[0] == 200, "and the one before still answers"
            site.machine.is_healthy = True

            second = (await site.ready())["annotations"]["kalium.io/address"]
            assert first != second
            await until(lambda: len(site.machine.containers) == 1, "the first to go")
            assert (await site.invoke())[0] == 200
            assert (await site.describe())["invocationCount"] == 2

    play(story())


def test_an_update_lets_a_request_end(tmp_path: Path) -> None:
    async def story() -> None:
        ended = asyncio.Event()

        async def slow(head: str, body: str) -> bytes:
            await ended.wait()
            return http_answer(200, b"slow")

        async with world(tmp_path) as site:
            await site.deploy()
            await site.ready()
            site.machine.answering = slow
            asking = asyncio.ensure_future(site.invoke())
            await until(lambda: site.machine.requests, "the request at the function")

            await site.deploy(method="PUT")
            await site.ready()
            assert len(site.machine.containers) == 2
            ended.set()

            assert (await asking)[:2] == (200, "slow")
            await until(lambda: len(site.machine.containers) == 1, "the first to go")

    play(story())


def test_an_update_that_is_refused_changes_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy(envVars={"A": "1"})
            before = await site.ready()

            assert (await site.deploy(method="PUT", image="shop/absent:1"))[0] == 400
            assert (await site.deploy(method="PUT", **WHOLE, envVars={"A": 1}))[0] == 400
            site.agent.refusal = "unknown_app"
            assert (await site.deploy(method="PUT", **WHOLE))[0] == 400

            assert await site.describe() == before

    play(story())


def test_the_last_of_many_updates_wins(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            for number in range(6):
                assert (await site.deploy(method="PUT", envVars={"A": str(number)}))[0] == 202

            assert (await site.ready())["envVars"] == {"A": "5"}
            await until(lambda: len(site.machine.containers) == 1, "the others to go")
            (container,) = site.machine.containers.values()
            assert container.values("--env") == ["A=5"]

    play(story())


# The engine


def test_a_stop_waits_for_a_deployment_under_way_and_undoes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalium.engine.server.FINISH_SECONDS_MAX", 0.01)

    async def story() -> None:
        async with world(tmp_path) as site:
            slow = asyncio.Event()
            real = site.machine._podman_create

            async def create(words: list[str], stdin: bytes) -> Any:
                done = await real(words, stdin)
                await slow.wait()
                return done

            site.machine._podman_create = create  # type: ignore[method-assign]
            asking = asyncio.ensure_future(site.deploy(**WHOLE))
            await until(lambda: site.machine.containers, "the container")

            site.engine.stop()

            await until(lambda: site.events("stopped"), "the end")
            assert site.machine.is_clean()
            await asyncio.gather(asking, return_exceptions=True)

    play(story())


def test_a_mistake_of_ours_stops_the_engine_and_not_a_replica_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(self: Replica, instance: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Replica, "_attend", broken)

    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            await until(lambda: site.events("stopped"), "the engine to stop")

    with pytest.raises(ZeroDivisionError):
        play(story())


def test_containers_get_what_they_need_and_no_more(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy(**WHOLE, envProcess="python3 h.py", envVars={"A": "1 2"}, readOnlyRootFilesystem=True)
            await site.ready()
            (container,) = site.machine.containers.values()
            (namespace,) = site.machine.namespaces
            create = next(command for command in site.machine.commands if " create " in command)
            start = next(command for command in site.machine.commands if " start " in command)

            assert container.value("--network") == f"ns:/run/netns/{namespace}"
            assert (container.value("--pull"), container.value("--cap-drop"), container.value("--security-opt")) == (
                "never",
                "all",
                "no-new-privileges",
            )
            assert container.values("--add-host") == ["gateway:127.66.0.1", "database:127.66.0.1"]
            assert container.values("--env") == ["fprocess=python3 h.py", "A=1 2"]
            assert "--read-only" in container.words
            assert not {"-v", "--volume", "--mount", "--privileged", "--publish", "--device"} & set(container.words)
            assert container.labels["kalium.io/engine"] == BRIDGE
            for command in (create, start):
                assert re.match(r"podman --cgroup-manager cgroupfs --runtime /\S+ --runtime-flag=network=sandbox --runtime-flag=x=y ", command)

    play(story())


def test_the_bridge_is_made_once_and_not_taken_from_others(tmp_path: Path) -> None:
    async def story() -> None:
        machine = Machine()
        network = Network(machine.run, config(tmp_path).backend.bridge)  # type: ignore[union-attr]

        assert [await network.up(), await network.up()] == [True, False]
        assert [await network.down(), await network.down()] == [True, False]

        machine.links[BRIDGE] = {"linkinfo": {"info_kind": "vlan"}}
        with pytest.raises(KaliumError, match="is no bridge"):
            await network.up()
        machine.links[BRIDGE] = {"linkinfo": {"info_kind": "bridge"}, "addr_info": [{"family": "inet", "local": "192.0.2.1", "prefixlen": 24}]}
        with pytest.raises(KaliumError, match=r"it has the address 192\.0\.2\.1/24"):
            await network.up()
        machine.fails = failing("^ip ")
        with pytest.raises(KaliumError, match="as the test says"):
            await network.up()

    play(story())


def test_a_bridge_with_instances_stays(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            with pytest.raises(KaliumError, match="1 instances are attached"):
                await site.backend.network.down()

    play(story())


def test_an_address_is_in_one_hand_and_rests_longest(tmp_path: Path) -> None:
    pool = AddressPool(config(tmp_path).backend.bridge)  # type: ignore[union-attr]

    first = pool.take()
    pool.give_back(first)
    taken = [pool.take() for _ in range(10)]

    assert len(set(taken)) == 10
    assert taken[-1] == first
    with pytest.raises(KeyError):
        pool.give_back(ipaddress.IPv4Address("127.66.0.9"))


def test_a_hardware_address_belongs_to_its_address() -> None:
    assert hardware_address(ipaddress.IPv4Address("10.137.0.10")) == "02:6b:0a:89:00:0a"


def test_a_silent_agent_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalium.engine.agent.AGENT_SECONDS_MAX", 0.02)

    async def story() -> None:
        async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            writer.close()

        async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"[]\n")
            writer.close()

        for name, serve in (("silent", silent), ("garbage", garbage)):
            server = await asyncio.start_unix_server(serve, str(tmp_path / name))
            with pytest.raises(AgentUnavailable):
                await Agent(tmp_path / name).register("c", "shop", "echo", "sha256:0")
            server.close()

    play(story())


def test_two_engines_do_not_share_a_state(tmp_path: Path) -> None:
    async def story() -> None:
        async with world(tmp_path) as site:
            second = Engine(site.config, lambda *a, **k: None, site.machine.backend(FakeWatch()))
            with pytest.raises(KaliumError) as caught:
                await second.serve()
            assert caught.value.code == "engine.running"

    play(story())


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda site: site.config.password_file.unlink(), "engine.password"),
        (lambda site: site.config.password_file.write_text("\n"), "engine.password"),
        (lambda site: site.config.backend.runtimes["stock"].path.unlink(), "engine.runtime"),
        (lambda site: setattr(site.machine, "fails", lambda command: "cannot be run" if "--version" in command else None), "engine.program"),
        (lambda site: setattr(site.machine, "fails", failing("^ip ")), "engine.network"),
        (lambda site: site.config.state_dir.write_text(""), "engine.state"),
    ],
)
def test_an_engine_that_cannot_begin_says_why_and_what_next(tmp_path: Path, spoil: Callable[[Any], Any], code: str) -> None:
    class Spoilt:
        machine = Machine()
        config = config(tmp_path)

    async def story() -> None:
        spoil(Spoilt)
        with pytest.raises(KaliumError) as caught:
            await Engine(Spoilt.config, lambda *a, **k: None, Spoilt.machine.backend(FakeWatch())).serve()
        lines = caught.value.for_humans().splitlines()
        assert (caught.value.code, len(lines), lines[1][:6]) == (code, 2, "next: ")

    play(story())


def test_a_busy_port_names_the_variable_that_moves_it(tmp_path: Path) -> None:
    async def story() -> None:
        taken = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = taken.sockets[0].getsockname()[1]
        machine = Machine()
        busy = dataclasses.replace(config(tmp_path), data=Listener("127.0.0.1", port))
        with pytest.raises(KaliumError, match="in use") as caught:
            await Engine(busy, lambda *a, **k: None, machine.backend(FakeWatch())).serve()
        assert "kalium_engine_data_port" in caught.value.next_step
        taken.close()

    play(story())
