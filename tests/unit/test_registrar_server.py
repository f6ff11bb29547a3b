"""The registrar's process between a real API server's protocol (over TLS) and a real agent's socket: faults of both, and its end."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from registrar_world import UID, FakeAgent, FakeApi, config_in, pod, serving, uids

from kalium.cli.main import main
from kalium.errors import EXIT_ENVIRONMENT, EXIT_NO, KaliumError
from kalium.registrar import limits, server
from kalium.registrar.check import ask, require_ready
from kalium.registrar.config import load
from kalium.registrar.log import Log
from kalium.registrar.server import Registrar

PATIENCE_SECONDS = 30.0


class World:
    """A node: its agent, the API server, and the registrar between them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.api = FakeApi()
        self.agent = FakeAgent(folder / "register.sock")
        self.log = io.StringIO()
        self.stop = asyncio.Event()

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.log.getvalue().splitlines()) if line["event"] == name]

    @property
    def registered(self) -> set[str]:
        return set(self.agent.instances)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Poll a condition, which a test that passes sees hold soon."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            assert time.monotonic() < deadline, self.log.getvalue()
            await asyncio.sleep(0.005)


@asynccontextmanager
async def registrar(world: World, *, with_agent: bool = True) -> AsyncIterator[None]:
    if with_agent:
        await world.agent.start()
    async with serving(world.api, world.folder) as kubeconfig:
        run = asyncio.create_task(Registrar(config_in(world.folder, kubeconfig), Log(world.log)).run(world.stop))
        try:
            yield
        finally:
            world.stop.set()
            await run


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for seconds here."""
    monkeypatch.setattr(server, "AGENT_POLL_SECONDS", 0.05)


def play(folder: Path, script: Callable[[World], Awaitable[None]], **options: Any) -> World:
    """Run a script against a registrar."""

    async def run() -> World:
        world = World(folder)
        async with registrar(world, **options):
            await script(world)
        return world

    return asyncio.run(run())


def test_pods_are_registered_as_they_come_and_unregistered_as_they_go(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.api.put(pod(1))
        await world.until(lambda: world.registered == uids(1))
        await world.until(lambda: world.api.watches == 1)
        world.api.put(pod(2))
        world.api.put(pod(3, nodeName="node2"))
        world.api.put(pod(4, hostNetwork=True))
        await world.until(lambda: world.registered == uids(1, 2))
        world.api.remove(UID.format(1))
        await world.until(lambda: world.registered == uids(2))

    world = play(tmp_path, script)

    assert world.agent.instances[UID.format(2)] == ("shop", "pay", "docker.io/library/pay:1")
    assert set(world.api.paths) == {"/api/v1/namespaces/openfaas-fn/pods"}
    assert {query["fieldSelector"] for query in world.api.queries} == {"spec.nodeName=node1"}
    assert [(line["reason"], line["pod"], line["level"]) for line in world.events("pod_refused")] == [("namespaces", "pay-4", "error")]
    assert len(world.events("pod_registered")) == 2


def test_a_watch_goes_on_where_the_last_one_ended_also_behind_a_bookmark(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        await world.until(lambda: world.api.watches == 1)
        world.api.put(pod(1))
        world.api.say({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "5000"}}})
        world.api.say(None)
        await world.until(lambda: [query.get("resourceVersion") for query in world.api.queries] == [None, "1000", "5000"])

    play(tmp_path, script)


@pytest.mark.parametrize("how", ["an event", "a status"])
def test_a_version_that_is_gone_leads_to_a_new_list(tmp_path: Path, how: str) -> None:
    async def script(world: World) -> None:
        world.api.pods = {UID.format(number): pod(number) for number in (1, 2)}
        await world.until(lambda: world.registered == uids(1, 2) and world.api.watches == 1)
        world.api.remove(UID.format(1), silently=True)  # what nobody will be told of
        if how == "a status":
            world.api.say({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "1000"}}})
            world.api.faults.append(lambda _: web.json_response({"kind": "Status", "code": 410}, status=410))
            world.api.say(None)
        else:
            world.api.say({"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}})
        await world.until(lambda: world.registered == uids(2))

    world = play(tmp_path, script)

    assert len(world.events("pods_listed")) == 2
    assert world.events("api_lost") == []


FAULTS: Mapping[str, Callable[[web.Request], web.StreamResponse]] = {
    "an error": lambda _: web.json_response({"kind": "Status", "message": "etcd is away"}, status=500),
    "no right": lambda _: web.json_response({"kind": "Status", "message": "forbidden"}, status=403),
    "no JSON": lambda _: web.Response(text="<html>"),
    "no list": lambda _: web.json_response({"kind": "PodList"}),
    "an array": lambda _: web.json_response([]),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_an_api_server_with_a_fault_is_asked_again(tmp_path: Path, fault: Callable[[web.Request], web.StreamResponse]) -> None:
    async def script(world: World) -> None:
        await world.until(lambda: world.registered == uids(1))

    async def run() -> World:
        world = World(tmp_path)
        world.api.faults = [fault, fault]
        world.api.put(pod(1))
        async with registrar(world):
            await script(world)
        return world

    world = asyncio.run(run())

    assert len(world.events("api_lost")) == 2


@pytest.mark.parametrize(
    "line",
    [
        b"{\n", b"[]\n", b'{"type":"ADDED"}\n', b'{"type":"OTHER","object":{"metadata":{"resourceVersion":"1"}}}\n',
        b'{"type":"ERROR","object":{"code":500}}\n', b'{"type":"ADDED","object":{"metadata":{}}}\n',
    ],
)  # fmt: skip
def test_a_watch_that_says_what_none_says_is_begun_again(tmp_path: Path, line: bytes) -> None:
    async def script(world: World) -> None:
        world.api.put(pod(1))
        await world.until(lambda: world.registered == uids(1) and world.api.watches == 1)
        world.api.say(line)
        await world.until(lambda: len(world.events("api_lost")) == 1)
        world.api.put(pod(2))
        await world.until(lambda: world.registered == uids(1, 2))

    play(tmp_path, script)


def test_an_agent_that_was_restarted_gets_everything_again(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.api.pods = {UID.format(number): pod(number) for number in (1, 2)}
        await world.until(lambda: world.registered == uids(1, 2))
        await world.agent.stop()
        await world.until(lambda: len(world.events("agent_lost")) == 1)
        await world.agent.start()
        await world.until(lambda: world.registered == uids(1, 2))

    world = play(tmp_path, script)

    assert len(world.events("agent_back")) == 2


def test_an_agent_that_lost_its_registrations_without_being_missed_gets_them_again(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.api.put(pod(1))
        await world.until(lambda: world.registered == uids(1))
        world.agent.instances.clear()
        await world.until(lambda: world.registered == uids(1))

    world = play(tmp_path, script)

    assert len(world.events("pod_registered")) == 2


def test_registrations_of_pods_that_are_not_there_are_taken_back(tmp_path: Path) -> None:
    """Also one of a pod on another node, whoever made it."""

    async def script(world: World) -> None:
        world.api.put(pod(9, nodeName="node2"))
        await world.until(lambda: world.api.watches == 1)
        for number in (8, 9):
            world.agent.instances[UID.format(number)] = ("shop", "pay", "i")
        await world.until(lambda: world.registered == set())

    play(tmp_path, script)


def test_an_agent_that_cannot_ask_its_controller_is_asked_again(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.agent.refuse[UID.format(1)] = "controller_unavailable"
        world.api.put(pod(1))
        await world.until(lambda: world.agent.count("register") >= 2)
        world.agent.refuse.clear()
        await world.until(lambda: world.registered == uids(1))

    play(tmp_path, script)


def test_what_the_agent_refuses_is_said_and_keeps_nobody_else_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalium.registrar.ledger.REFUSED_RETRY_SECONDS", 0.2)

    async def script(world: World) -> None:
        world.agent.refuse[UID.format(1)] = "unknown_app"
        world.api.pods = {UID.format(number): pod(number) for number in (1, 2)}
        await world.until(lambda: world.registered == uids(2) and world.agent.count("register") >= 3)
        assert (await asyncio.to_thread(ask, config_in(world.folder)))["not_taken"] == 1
        world.agent.refuse.clear()
        await world.until(lambda: world.registered == uids(1, 2))

    world = play(tmp_path, script)

    assert [line["code"] for line in world.events("registration_refused")] == ["unknown_app"]


def test_its_status_says_whether_it_follows_and_has_an_agent(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        config = config_in(world.folder)
        await world.until(lambda: bool(world.events("pods_listed")) and bool(world.events("agent_lost")))
        status = await asyncio.to_thread(ask, config)
        assert status == {"following": True, "agent": False, "registered": 0, "pods": 0, "refused": 0, "not_taken": 0}
        with pytest.raises(KaliumError) as no_agent:
            require_ready(status)
        assert (no_agent.value.code, no_agent.value.exit_code) == ("registrar.no_agent", EXIT_NO)
        await world.agent.start()
        await world.until(lambda: bool(world.events("agent_back")))
        world.api.put(pod(1))
        await world.until(lambda: world.registered == uids(1))
        status = await asyncio.to_thread(ask, config)
        assert (status["registered"], status["pods"]) == (1, 1)
        require_ready(status)
        assert stat.S_IMODE(config.status.stat().st_mode) == 0o600

    play(tmp_path, script, with_agent=False)


def test_a_registrar_without_an_api_server_is_not_well(tmp_path: Path) -> None:
    async def run() -> World:
        world = World(tmp_path)
        await world.agent.start()
        task = asyncio.create_task(Registrar(config_in(tmp_path), Log(world.log)).run(world.stop))
        await world.until(lambda: len(world.events("api_lost")) >= 2 and bool(world.events("agent_back")))
        status = await asyncio.to_thread(ask, config_in(tmp_path))
        with pytest.raises(KaliumError) as not_following:
            require_ready(status)
        assert not_following.value.code == "registrar.no_following"
        world.stop.set()
        await task
        return world

    world = asyncio.run(run())

    assert "registrar.conf" in world.events("api_lost")[0]["detail"]


def test_registrations_outlive_a_clean_end_and_the_socket_does_not(tmp_path: Path) -> None:
    async def script(world: World) -> None:
        world.api.put(pod(1))
        await world.until(lambda: world.registered == uids(1))

    world = play(tmp_path, script)

    assert world.registered == uids(1)
    assert world.agent.count("unregister") == 0
    assert not config_in(tmp_path).status.exists()
    assert [bool(world.events(name)) for name in ("listening", "stopping", "stopped")] == [True, True, True]


def written(folder: Path, **changes: Any) -> Path:
    document: dict[str, Any] = {
        "node": "node1", "namespace": "openfaas-fn", "runtime_class": "kalium", "kubeconfig": str(folder / "registrar.conf"),
        "agent": str(folder / "register.sock"), "status": str(folder / "status.sock"),
    } | changes  # fmt: skip
    path = folder / "registrar.json"
    path.write_text(json.dumps({name: value for name, value in document.items() if value is not None}))
    return path


def test_the_configuration_is_read(tmp_path: Path) -> None:
    assert load(written(tmp_path)) == config_in(tmp_path)


@pytest.mark.parametrize("changes", [{"node": ""}, {"node": 1}, {"agent": "register.sock"}, {"kubeconfig": None}, {"other": "x"}])
def test_a_configuration_that_is_not_meant_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(KaliumError) as refused:
        load(written(tmp_path, **changes))

    assert refused.value.code == "registrar.config"


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "registrar.json"
    if text is not None:
        path.write_text(text)

    with pytest.raises(KaliumError) as refused:
        load(path)

    assert refused.value.code == "registrar.config"


def test_status_without_a_registrar_is_an_error_of_the_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["registrar", "status", "--config", str(written(tmp_path))]) == EXIT_ENVIRONMENT
    assert "error[registrar.unreachable]" in capsys.readouterr().err


def test_the_program_serves_until_sigterm_over_the_socket_of_a_killed_one(tmp_path: Path) -> None:
    path = written(tmp_path)
    command = [sys.executable, "-m", "kalium.cli.main", "registrar", "serve", "--config", str(path)]
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 0)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONUNBUFFERED": "1"}) as process:
            assert process.stdout is not None
            assert b'"listening"' in process.stdout.readline()
            process.send_signal(number)
            process.stdout.read()
            assert process.wait(PATIENCE_SECONDS) == code
        assert (tmp_path / "status.sock").exists() is (number == signal.SIGKILL)


def test_the_bounds_hold_together() -> None:
    """A watch that the API server ends in time is never taken for a silent one."""
    assert limits.WATCH_SILENCE_SECONDS_MAX > limits.WATCH_SECONDS > limits.WATCH_SECONDS_LEAST
