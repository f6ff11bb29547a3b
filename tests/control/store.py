"""RedisCalls for tests that know only MemoryCalls: every answer is waited for, and the clock is the test's."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from control.redis_server import RedisServer
from kalium.controller.calls import Deferred, Evicted
from kalium.controller.config import Store, TlsFiles
from kalium.controller.limits import LIMITS, Limits
from kalium.controller.redis_calls import RedisCalls
from kalium.controller.redis_link import Link
from kalium.controller.registry import NS_PER_MS, Instance, Registry
from kalium.controller.state import State
from kalium.protocol.frames import Answer, InstanceInvoke

Result = TypeVar("Result")
NO_FILES = TlsFiles(Path(), Path(), Path())
EPOCH_MS = 1_000_000_000_000  # a time of 0 would mean the server's own
WAIT_S = 10.0
_NUMBERS = itertools.count(1)  # of prefixes, so that no test sees the keys of another


class PatientCalls:
    """RedisCalls on a loop of its own, which runs while an answer is waited for and not otherwise."""

    kind = "redis"

    def __init__(self, server: RedisServer, registry: Registry, *, prefix: str, limits: Limits = LIMITS, name: str = "controller") -> None:
        self._now_ms = 0
        self.loop = asyncio.new_event_loop()
        self.events: list[str] = []
        self.link = self.loop.run_until_complete(self._connect(server, prefix))
        self.calls = RedisCalls(
            self.link,
            name=name,
            versions=registry.versions,
            mint=lambda: secrets.token_hex(16),
            limits=limits,
            clock_ms=lambda: EPOCH_MS + self._now_ms,
        )
        self.on_agent_lost: Callable[[str], None] = lambda _node: None
        self.on_instance_lost: Callable[[Instance], None] = lambda _instance: None

        def agent_lost(node: str) -> None:
            self.on_agent_lost(node)  # whatever it is by then

        def instance_lost(instance: Instance) -> None:
            self.on_instance_lost(instance)

        self.calls.on_agent_lost, self.calls.on_instance_lost = agent_lost, instance_lost

    async def _connect(self, server: RedisServer, prefix: str) -> Link:
        link = Link(Store("redis", server.url, prefix), NO_FILES, log=lambda event, **_: self.events.append(event))
        self._running = asyncio.ensure_future(link.run())
        await asyncio.wait_for(link.connected.wait(), WAIT_S)
        return link

    def close(self) -> None:
        self._running.cancel()
        self.loop.run_until_complete(asyncio.gather(self._running, return_exceptions=True))
        self.loop.close()

    def controllers(self) -> Sequence[str]:
        return self.calls.controllers()

    def agent_here(self, node: str, run: str, connection: int = 0) -> None:
        self.calls.agent_here(node, run, connection)

    def agent_gone(self, node: str) -> None:
        self.calls.agent_gone(node)

    def adopt(self, who: Instance, *, now_ns: int) -> Answer:
        return self._now(self.calls.adopt(who, now_ns=self._at(now_ns)))

    def begin(self, who: Instance, version: int, step: str, *, now_ns: int) -> Answer:
        return self._now(self.calls.begin(who, version, step, now_ns=self._at(now_ns)))

    def join(self, who: Instance, version: int, token: str, step: str, *, now_ns: int) -> Answer:
        return self._now(self.calls.join(who, version, token, step, now_ns=self._at(now_ns)))

    def invoke(self, who: Instance, said: InstanceInvoke, *, now_ns: int) -> Answer:
        return self._now(self.calls.invoke(who, said, now_ns=self._at(now_ns)))

    def finish(self, who: Instance, call: str, invocation: str, outcome: str, *, now_ns: int) -> Answer:
        return self._now(self.calls.finish(who, call, invocation, outcome, now_ns=self._at(now_ns)))

    def forget(self, who: Instance, why: str, *, now_ns: int) -> list[Evicted]:
        return self._now(self.calls.forget(who, why, now_ns=self._at(now_ns)))

    def expire(self, *, now_ns: int) -> list[Evicted]:
        self._at(now_ns)
        evicted = self.calls.expire(now_ns=now_ns)
        self.settle()
        return evicted + self.calls.take_evicted()

    def has_due(self, *, now_ns: int) -> bool:
        return self.calls.has_due(now_ns=now_ns)

    def counts(self) -> tuple[int, int]:
        """Of now, and not of the last sweep."""
        self.calls.expire(now_ns=self._now_ms * NS_PER_MS)
        self.settle()
        return self.calls.counts()

    def fault(self) -> str:
        return self.calls.fault()

    def settle(self) -> None:
        """Wait until the server has answered all that it was asked."""
        answered = self.loop.create_future()
        self.link.send(("PING",), lambda _: answered.set_result(None))
        self.loop.run_until_complete(asyncio.wait_for(answered, WAIT_S))

    def _at(self, now_ns: int) -> int:
        self._now_ms = now_ns // NS_PER_MS
        return now_ns

    def _now(self, result: Result | Deferred[Result]) -> Result:
        if not isinstance(result, Deferred):
            return result
        answered: asyncio.Future[Result] = self.loop.create_future()
        result.then(answered.set_result)
        return self.loop.run_until_complete(asyncio.wait_for(answered, WAIT_S))


class Stores:
    """Makes states whose calls are in one server; each store is new to it unless `prefix` says otherwise."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server
        self.made: list[PatientCalls] = []

    def prefix(self) -> str:
        return f"t{next(_NUMBERS)}:"

    def calls(self, registry: Registry, *, prefix: str = "", limits: Limits = LIMITS, name: str = "controller") -> PatientCalls:
        self.made.append(PatientCalls(self.server, registry, prefix=prefix or self.prefix(), limits=limits, name=name))
        return self.made[-1]

    def state_of(
        self, registry: Registry | None = None, *, limits: Limits = LIMITS, mint: Callable[[], str] | None = None, name: str = "controller"
    ) -> State:
        """As controller_samples.state_of; ids are the store's own, whatever `mint`."""
        registry = registry or Registry(limits=limits)
        return State(registry, self.calls(registry, limits=limits, name=name), name=name)

    def close(self) -> None:
        for calls in self.made:
            calls.close()
        self.made.clear()
