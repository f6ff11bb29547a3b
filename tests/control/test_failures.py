"""What dies under load: controllers, Redis, agents, networks. No step that the policy forbids is granted, and none is lost."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from controller_samples import EDGES

from control.guards import Guard, History, faults, reasons, same
from control.load import Load
from control.processes import Agent, Controller, Plane, free_port, until
from control.redis_server import DURABLE, FORGETFUL, LOSSY, RedisServer
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.compile import compile_policy
from kalium.protocol.frames import Answer

COMPILED = compile_policy(EDGES.encode(), "edges")
POLICY = CompiledPolicy.parse(COMPILED)
ENTRIES = ("fan", "single", "later", "again")
FAIL_OVER_S = 1.0
WIDTH = 24  # calls at once


class Site:
    """Two controllers on one Redis, two agents on one machine, and guards of every function on both nodes."""

    def __init__(self, plane: Plane, redis: RedisServer, *, store_url: str = "") -> None:
        self.plane = plane
        self.redis = redis
        store = {"kind": "redis", "url": store_url or redis.url}
        self.controllers = [plane.controller(name, store) for name in ("one", "two")]
        self.agents: list[Agent] = []
        self.history = History()
        self.guards: dict[str, list[Guard]] = {}
        self.witnesses: list[Witness] = []

    def join(self, routes: Sequence[tuple[str, str]] | None = None) -> None:
        """Start the agents."""
        self.agents = [self.plane.agent(node, routes) for node in ("node0", "node1")]

    async def connect(self, agents: Sequence[Agent] | None = None) -> None:
        for agent in agents or self.agents:
            for function in POLICY.functions:
                guard = await Guard(agent, "edges", function, self.history).connect()
                assert guard.welcome.ok, guard.welcome
                self.guards.setdefault(function, []).append(guard)

    def load(self, seed: int = 1) -> Load:
        return Load(POLICY, self.guards, self.history, ENTRIES, random.Random(seed), attacks=0.1)  # noqa: S311 - the same each time

    def controller_of(self, agent: Agent) -> Controller:
        address = agent.controller()
        return next(each for each in self.controllers if each.address[0] == address)

    def guards_of(self, agent: Agent) -> list[Guard]:
        return [guard for guards in self.guards.values() for guard in guards if guard.agent is agent]

    async def go_on(self) -> None:
        for witness in self.witnesses:
            await witness.go_on()

    def judge(self, *, may_forget: bool = False) -> None:
        assert faults(self.history, {"edges": POLICY}, may_forget=may_forget) == []


@pytest.fixture
def plane() -> Iterator[Plane]:
    with Plane(COMPILED) as made:
        yield made


@pytest.fixture
def redis(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RedisServer]:
    """Whatever options the test names as its parameter."""
    with RedisServer(tmp_path / "redis", *getattr(request, "param", FORGETFUL)) as server:
        yield server


def under_load(site: Site, story: Callable[[Load], Coroutine[Any, Any, None]], *, after_s: float = 1.5, may_forget: bool = False) -> Load:
    """Run calls, and the story in their midst; then judge. Returns the load for what else is to be said of it."""

    async def run() -> Load:
        await site.connect()
        site.witnesses = [await Witness(site, agent, other).begin() for agent in site.agents for other in site.agents]
        load = site.load()
        is_over = False
        working = asyncio.ensure_future(load.run(WIDTH, lambda: is_over))
        try:
            await asyncio.sleep(1.0)
            await story(load)
            await asyncio.sleep(after_s)
        finally:
            is_over = True
            await working
        return load

    load = asyncio.run(run())
    site.judge(may_forget=may_forget)
    assert sum(load.attacked.values()) > 20
    return load


def longest_gap(site: Site, guards: Sequence[Guard], moment_s: float) -> float:
    """How long after a moment the last of these guards' agents was answered again: the first grant at each agent counts."""
    worst = 0.0
    for agent in {guard.agent for guard in guards}:
        first = next(iter(site.history.answered_after(moment_s + 0.02, [guard for guard in guards if guard.agent is agent])), None)
        assert first is not None, "nothing was granted any more"
        worst = max(worst, first.answered_s - moment_s)
    return worst


def record(name: str, **figures: object) -> None:
    """Say what was measured; `-s` shows it."""
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in figures.items()))


class Witness:
    """A call that stands still while something dies: what it was answered has to be answered again, and it has to go on."""

    def __init__(self, site: Site, agent: Agent, other: Agent) -> None:
        self._caller = Guard(agent, "edges", "single", site.history)
        self._callee = Guard(other, "edges", "leaf", site.history)
        self._last = Guard(agent, "edges", "last", site.history)
        self._answers: list[Answer] = []

    async def begin(self) -> Witness:
        for guard in (self._caller, self._callee, self._last):
            await guard.connect()
        start = _granted(await self._caller.start(step="1" * 16))
        invoke = _granted(await self._caller.invoke(start, "leaf", "2" * 16))
        begun = _granted(await self._callee.start(invoke.token, "3" * 16))
        self._answers = [start, invoke, begun]
        return self

    async def again(self) -> list[Answer | None]:
        """The same three questions, and what they are answered now."""
        start, invoke, _ = self._answers
        return [
            await self._caller.start(step="1" * 16),
            await self._caller.invoke(start, "leaf", "2" * 16),
            await self._callee.start(invoke.token, "3" * 16),
        ]

    async def go_on(self) -> None:
        """What was answered is answered again; nothing else is granted; and the call reaches its end."""
        for before, now in zip(self._answers, await self.again(), strict=True):
            assert same(before, now), (before, now)
        start, invoke, begun = self._answers
        for refused in (await self._callee.start(invoke.token), await self._caller.invoke(start, "last"), await self._caller.invoke(start, "leaf")):
            assert refused is not None and refused.reason in ("bad_token", "edge_not_allowed"), refused
        _granted(await self._callee.finish(begun))
        last = _granted(await self._last.start(_granted(await self._caller.invoke(start, "last")).token))
        _granted(await self._last.finish(last))
        _granted(await self._caller.finish(start))


def _granted(answer: Answer | None) -> Answer:
    assert answer is not None and answer.allowed, answer
    return answer


def test_a_killed_controller_is_replaced_within_a_second_and_its_calls_go_on(plane: Plane, redis: RedisServer) -> None:
    site = Site(plane, redis)
    site.join()
    killed_s = 0.0
    moved: list[Guard] = []

    async def story(_: Load) -> None:
        nonlocal killed_s, moved
        victim = site.controller_of(site.agents[0])
        moved = [guard for agent in site.agents if site.controller_of(agent) is victim for guard in site.guards_of(agent)]
        killed_s = time.monotonic()
        victim.kill()
        await asyncio.sleep(1.0)
        await site.go_on()

    load = under_load(site, story)

    assert load.why().keys() == {""}, load.why()  # nobody's call was given up
    assert load.over(killed_s)
    gap = longest_gap(site, moved, killed_s)
    record("controller killed", gap_ms=round(1000 * gap), in_flight=len(load.over(killed_s)), calls=len(load.calls), answers=reasons(site.history))
    assert gap <= FAIL_OVER_S


def test_controllers_that_are_killed_one_after_the_other_lose_nothing(plane: Plane, redis: RedisServer) -> None:
    site = Site(plane, redis)
    site.join()

    async def story(_: Load) -> None:
        for victim in site.controllers:
            victim.kill()
            await asyncio.sleep(0.7)
            await asyncio.to_thread(victim.start)
            await asyncio.sleep(0.5)
        await site.go_on()

    load = under_load(site, story)

    assert load.why().keys() == {""}, load.why()


def test_a_controller_that_hangs_is_replaced_within_a_second(plane: Plane, redis: RedisServer) -> None:
    """SIGSTOP: its connections stay open, and nothing is answered."""
    site = Site(plane, redis)
    site.join()
    stopped_s = 0.0
    moved: list[Guard] = []

    async def story(_: Load) -> None:
        nonlocal stopped_s, moved
        victim = site.controller_of(site.agents[0])
        moved = [guard for agent in site.agents if site.controller_of(agent) is victim for guard in site.guards_of(agent)]
        stopped_s = time.monotonic()
        victim.send(signal.SIGSTOP)
        await asyncio.sleep(1.5)
        victim.send(signal.SIGCONT)  # what it had read before it stopped, it decides now: the same steps were decided elsewhere
        await site.go_on()

    load = under_load(site, story)

    assert load.why().keys() == {""}, load.why()
    gap = longest_gap(site, moved, stopped_s)
    record("controller stopped", gap_ms=round(1000 * gap), in_flight=len(load.over(stopped_s)))
    assert gap <= FAIL_OVER_S


def test_a_cut_between_agents_and_a_controller_is_gone_around_within_a_second(plane: Plane, redis: RedisServer) -> None:
    site = Site(plane, redis)
    proxy = plane.proxy(site.controllers[0].port)
    site.join([proxy.address, site.controllers[1].address])
    until(lambda: any(agent.controller() == proxy.address[0] for agent in site.agents) or _restart(site.agents[0]), "an agent behind the cut")
    cut_s = 0.0
    moved: list[Guard] = []

    async def story(_: Load) -> None:
        nonlocal cut_s, moved
        moved = [guard for agent in site.agents if agent.controller() == proxy.address[0] for guard in site.guards_of(agent)]
        cut_s = time.monotonic()
        proxy.cut()
        await asyncio.sleep(1.5)
        proxy.heal()  # what stood in the cut arrives at the first controller now, from a connection that is no more the agent's
        await site.go_on()

    load = under_load(site, story)

    assert load.why().keys() == {""}, load.why()
    gap = longest_gap(site, moved, cut_s)
    record("network cut", gap_ms=round(1000 * gap), in_flight=len(load.over(cut_s)))
    assert gap <= FAIL_OVER_S


def _restart(agent: Agent) -> bool:
    """An agent chooses its first controller by chance: let it choose again."""
    agent.end()
    agent.start()
    return False


def test_a_cut_between_a_controller_and_redis_is_unavailable_and_heals(plane: Plane, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis", port=free_port()) as redis:
        proxy = plane.proxy(redis.port)
        site = Site(plane, redis, store_url=f"redis://127.0.0.1:{proxy.port}")
        site.join()
        healed_s = 0.0

        async def story(_: Load) -> None:
            nonlocal healed_s
            proxy.cut()
            await asyncio.sleep(2.0)
            proxy.heal()
            healed_s = time.monotonic()
            await asyncio.sleep(1.5)
            await site.go_on()

        load = under_load(site, story)

        assert load.why().keys() == {""}, load.why()
        assert reasons(site.history).get("controller_unavailable", 0) > 0
        gap = longest_gap(site, [guard for guards in site.guards.values() for guard in guards], healed_s)
        record("store cut", healed_ms=round(1000 * gap), answers=reasons(site.history))
        assert gap <= 2 * FAIL_OVER_S


@pytest.mark.parametrize("redis", [DURABLE], indirect=True, ids=["always"])
def test_a_killed_redis_that_has_every_step_on_its_disk_loses_nothing(plane: Plane, redis: RedisServer) -> None:
    site = Site(plane, redis)
    site.join()
    killed_s = back_s = 0.0

    async def story(_: Load) -> None:
        nonlocal killed_s, back_s
        killed_s = time.monotonic()
        redis.kill()
        await asyncio.sleep(0.5)
        await asyncio.to_thread(redis.start)
        back_s = time.monotonic()
        await asyncio.sleep(1.0)
        await site.go_on()

    load = under_load(site, story)

    assert load.why().keys() == {""}, load.why()
    gap = longest_gap(site, [guard for guards in site.guards.values() for guard in guards], back_s)
    record("redis killed, appendfsync always", back_ms=round(1000 * gap), in_flight=len(load.over(killed_s)), calls=len(load.calls))


@pytest.mark.parametrize("redis", [LOSSY, FORGETFUL], indirect=True, ids=["everysec", "memory"])
def test_a_killed_redis_that_may_have_lost_steps_ends_the_calls_in_flight_and_no_others(plane: Plane, redis: RedisServer) -> None:
    site = Site(plane, redis)
    site.join()
    killed_s = back_s = 0.0

    async def story(_: Load) -> None:
        nonlocal killed_s, back_s
        killed_s = time.monotonic()
        redis.kill()
        await asyncio.sleep(0.5)
        await asyncio.to_thread(redis.start)
        await asyncio.sleep(1.2)  # the longest wait before another try to connect, and what it takes
        back_s = time.monotonic()
        for witness in site.witnesses:
            again = await witness.again()
            assert [answer and answer.reason for answer in again[1:]] == ["unknown_call", "bad_token"], again

    load = under_load(site, story, after_s=2.0, may_forget=True)

    lost = [call for call in load.calls if call.why]
    assert lost
    assert {call.why.split(": ")[1] for call in lost} <= {"unknown_call", "bad_token"}, load.why()
    later = [call for call in load.calls if call.began_s > back_s]
    assert later
    assert not any(call.why for call in later)
    record("redis killed", lost=len(lost), in_flight=len(load.over(killed_s)), calls=len(load.calls), answers=reasons(site.history))


def test_a_killed_agent_takes_its_sandboxes_calls_with_it_and_its_successor_serves_at_once(plane: Plane, redis: RedisServer) -> None:
    site = Site(plane, redis)
    site.join()
    killed_s = 0.0
    dead: list[Guard] = []
    fresh: list[Guard] = []

    async def story(_: Load) -> None:
        nonlocal killed_s, dead, fresh
        agent = site.agents[0]
        dead = site.guards_of(agent)
        killed_s = time.monotonic()
        agent.kill()
        for guards in site.guards.values():
            guards[:] = [guard for guard in guards if guard.agent is not agent]
        await asyncio.to_thread(agent.start)
        await site.connect([agent])
        fresh = site.guards_of(agent)

    load = under_load(site, story)

    assert not site.history.answered_after(killed_s + 0.05, dead)  # nobody speaks for the old sandboxes any more
    gap = longest_gap(site, fresh, killed_s)
    lost = [call for call in load.calls if call.why]
    assert all(call.began_s < killed_s + 0.05 for call in lost), load.why()
    record("agent killed", again_ms=round(1000 * gap), lost=len(lost), in_flight=len(load.over(killed_s)), calls=len(load.calls))


def test_one_controller_with_memory_loses_its_calls_and_says_so(plane: Plane) -> None:
    """What the other store is for."""
    controller = plane.controller("alone")
    agent = plane.agent("node0")

    async def run() -> tuple[Answer | None, Answer | None]:
        history = History()
        guard = await Guard(agent, "edges", "single", history).connect()
        grant = await guard.start()
        assert grant is not None and grant.allowed
        controller.kill()
        await asyncio.to_thread(controller.start)
        await asyncio.to_thread(until, agent.is_connected, "the agent")
        return await guard.invoke(grant, "leaf"), await guard.start()

    lost, fresh = asyncio.run(run())

    assert lost is not None and lost.reason == "unknown_call"
    assert fresh is not None and fresh.allowed
