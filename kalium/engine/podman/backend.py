"""The back-end of one machine: functions in containers of podman, kept alive by this process, which leaves none behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime, timezone
from functools import partial

from kalium.engine.agent import Agent
from kalium.engine.backend import Backend, Function, LogLineOf, LogQuery, Observe, Turns
from kalium.engine.config import Config, PodmanConfig
from kalium.engine.deployment import Deployment, Refused
from kalium.engine.follow import Source, lines_of
from kalium.engine.instance import Health
from kalium.engine.limits import FUNCTIONS_MAX, REPLICAS_MAX
from kalium.engine.log import LogLine
from kalium.engine.podman.command import Programs, require_program
from kalium.engine.podman.containers import Podman, Surroundings
from kalium.engine.podman.functions import PodmanFunction, usage
from kalium.engine.podman.host import Host, Sandbox, Watch
from kalium.engine.podman.network import AddressPool, Network
from kalium.engine.podman.store import Store
from kalium.engine.state import State
from kalium.errors import KaliumError


def require_runtimes(config: PodmanConfig) -> None:
    """Raise KaliumError engine.runtime for a runtime that cannot be executed."""
    for name, runtime in config.runtimes.items():
        if not runtime.path.is_file() or not os.access(runtime.path, os.X_OK):
            raise KaliumError(
                "engine.runtime",
                f"cannot use the runtime {name}",
                f"{runtime.path} is no program",
                "`site.yml` builds the runtimes; or correct runtimes",
            )


class PodmanBackend(Backend):
    """Functions of podman."""

    orchestration = "podman"
    keeps: frozenset[str] = frozenset()

    def __init__(self, config: Config, podman: PodmanConfig, state: State, log: LogLine, observe: Observe, programs: Programs, watch: Watch) -> None:
        self.port = config.function_port
        self.runtimes = podman.runtimes
        self._config = podman
        self._programs = programs
        self._log = log
        self._observe = observe
        self._table: dict[str, PodmanFunction] = {}
        self._turns = Turns()
        self._is_stopping = False
        self.store = Store(state)
        self.network = Network(programs.run, podman.bridge)
        around = Surroundings(engine=podman.bridge.name, nameserver=str(podman.bridge.address), hosts=config.hosts, pid_files=self.store.pid_files)
        self._podman = Podman(programs, podman.command, around)
        self.host = Host(
            network=self.network,
            podman=self._podman,
            agent=Agent(podman.agent),
            pool=AddressPool(podman.bridge),
            log=log,
            health=Health(config.function_port, config.health_path),
            read_secrets=self.store.secrets_of,
            watch=watch,
        )

    async def prepare(self) -> None:
        """Make the network, on whose address the gateway listens. Raises KaliumError."""
        require_runtimes(self._config)
        hint = "install podman (3.4 or newer), or correct `podman` in the configuration"
        await require_program(self._programs.run, [*self._config.command, "--version"], hint)
        self.store.open()
        await self.network.up()

    async def begin(self) -> None:
        """Remove what an engine that was killed left, and begin with what was deployed then; images are looked up again."""
        await self.host.remove_leftovers()
        for found in self.store.load(self.runtimes):
            if len(found) == 2:
                path, reason = found
                self._log("function_unreadable", path=str(path), detail=reason)
                continue
            _, deployment, replicas, created = found
            function = self._new(deployment, created)
            function.renew(deployment, "", replicas, None)
            self._log("function_deployed", function=deployment.name, image=deployment.image, runtime=deployment.runtime, replicas=replicas)

    async def stop(self) -> None:
        """Return when no instance is left and no change is under way. What is deployed stays so, for the next engine."""
        self._is_stopping = True
        await self._turns.all_over()  # a change that was cut off undoes what it did before it lets go
        await asyncio.gather(*(function.stop() for function in self._table.values()))

    # Functions

    def _new(self, deployment: Deployment, created: str) -> PodmanFunction:
        function = self._table[deployment.name] = PodmanFunction(self.host, self._config.runtimes, self._log, self._observe, deployment, created)
        return function

    def find(self, name: str) -> PodmanFunction | None:
        """The function of that name."""
        return self._table.get(name)

    def all(self) -> list[Function]:
        """Every function, by name."""
        return [self._table[name] for name in sorted(self._table)]

    def check(self) -> None:
        """Nothing but this process changes anything, so what is known is so."""

    async def deploy(self, deployment: Deployment, *, must_exist: bool) -> None:
        """Deploy or update. When this returns, an instance has its container and its identity, and is being started.

        Raises Refused, with everything as it was before.
        """
        name = deployment.name
        async with self._turns.of(name):
            if self._is_stopping:
                raise Refused(503, "the gateway is stopping")
            if must_exist:
                self.get(name)
            function = self.find(name)
            if function is None and len(self._table) >= FUNCTIONS_MAX:
                raise Refused(400, f"there are {FUNCTIONS_MAX} functions already")
            image = await self.host.image_of(deployment)
            first = Sandbox(deployment, image, self._config.runtimes[deployment.runtime])
            await self.host.prepare(first)
            created = function.created if function else datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
            try:
                self.store.save(deployment, replicas=deployment.replicas, created=created)
            except OSError as error:
                await self.host.remove(first)
                raise Refused(500, f"cannot save the deployment: {error}") from error
            event = "function_updated" if function else "function_deployed"
            function = function or self._new(deployment, created)
            function.renew(deployment, image, deployment.replicas, first)
            self._log(event, function=name, image=deployment.image, runtime=deployment.runtime, app=deployment.app, replicas=deployment.replicas)

    def _deployed(self, name: str) -> PodmanFunction:
        self.get(name)
        return self._table[name]

    async def scale(self, name: str, replicas: int) -> None:
        """Have so many replicas of a function; return when those too many are gone. Raises Refused."""
        if not 0 <= replicas <= REPLICAS_MAX:
            raise Refused(400, f"replicas is {replicas}: this gateway has 0 to {REPLICAS_MAX}")
        async with self._turns.of(name):
            function = self._deployed(name)
            self.store.save(function.deployment, replicas=replicas, created=function.created)
            await function.scale(replicas)
            self._log("function_scaled", function=name, replicas=replicas)

    async def remove(self, name: str) -> None:
        """Remove a function; return when its instances are gone. Raises Refused."""
        async with self._turns.of(name):
            function = self._deployed(name)
            self.store.forget(name)
            await function.stop()
            del self._table[name]
            self._log("function_removed", function=name)

    async def usage(self, function: Function) -> dict[str, float] | None:
        """What the sandboxes of a function use."""
        return usage(function.ready())

    def logs(self, function: Function, query: LogQuery) -> AsyncGenerator[LogLineOf | None, None]:
        """What its ready instances printed; with `follow` also those that become ready."""

        def sources() -> dict[str, Source]:
            wanted = [sandbox for sandbox in function.ready() if query.instance in ("", sandbox.name)]
            return {sandbox.name: partial(self._lines, sandbox, query) for sandbox in wanted if isinstance(sandbox, Sandbox)}

        return lines_of(sources, follow=query.follow)

    async def _lines(self, sandbox: Sandbox, query: LogQuery) -> AsyncGenerator[LogLineOf, None]:
        if query.follow:
            async with aclosing(self._podman.follow(sandbox.container, tail=query.tail, since=query.since)) as lines:
                async for line in lines:
                    yield _line(sandbox, line)
            return
        for line in await self._podman.logs(sandbox.container, tail=query.tail, since=query.since):
            yield _line(sandbox, line)

    # Secrets

    async def secrets(self) -> list[str]:
        """The names of all secrets."""
        return self.store.secrets()

    async def put_secret(self, name: str, value: bytes, *, is_new: bool) -> None:
        """Keep a secret."""
        self.store.put_secret(name, value, is_new=is_new)

    async def forget_secret(self, name: str) -> None:
        """Remove a secret."""
        self.store.forget_secret(name)


def _line(sandbox: Sandbox, line: str) -> LogLineOf:
    timestamp, _, text = line.partition(" ")
    return LogLineOf(sandbox.name, timestamp, text)
