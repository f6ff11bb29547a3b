"""One instance on this machine: made and removed step by step, so that a failure at any step leaves nothing behind."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from kalium.engine import upstream
from kalium.engine.agent import Agent, AgentUnavailable, RegistrationRefused
from kalium.engine.command import CommandFailed
from kalium.engine.config import Runtime
from kalium.engine.deadline import within
from kalium.engine.deployment import Deployment, Refused
from kalium.engine.limits import (
    LOG_LINES_TOLD,
    PROBE_PAUSE_SECONDS,
    PROBE_SECONDS_MAX,
    READY_SECONDS_MAX,
    REMOVE_ATTEMPTS_MAX,
    REMOVE_PAUSE_SECONDS,
    RETIRED_BYTES_MAX,
)
from kalium.engine.log import LogLine
from kalium.engine.network import AddressPool, Network, PoolExhausted
from kalium.engine.podman import ImageAbsent, Podman
from kalium.errors import KaliumError

RETIRED = "retired"  # the guard's reason (docs/reference/policy.md) for a request that it does not let in any more


class NotReady(Exception):
    """The instance ended or is retired, or did not answer its health path with 200 in time; the end of its own output says why."""


@dataclass(eq=False)
class Instance:
    """A sandbox of a function. `has_*` and `container` say which steps were done, and so what has to be undone."""

    deployment: Deployment
    image: str
    runtime: Runtime
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    address: ipaddress.IPv4Address | None = None
    has_namespace: bool = False
    has_container: bool = False
    container: str = ""
    is_registered: bool = False
    pid: int = 0  # of the sandbox; 0 before it was started
    has_ended: bool = False  # the sandbox's process is gone
    is_retired: bool = False  # its guard lets no more requests in
    alarm: asyncio.Event = field(default_factory=asyncio.Event)  # it has ended or is retired, or a request to it failed
    breaker: upstream.Breaker = field(default_factory=upstream.Breaker)

    @property
    def name(self) -> str:
        """The container's name."""
        return f"kal-{self.deployment.name}-{self.id}"

    def end(self, reason: str) -> None:
        """Take note that it is gone, and with it the answer to a request that is still in it: a dead sandbox closes nothing."""
        self.has_ended = True
        self.alarm.set()
        self.breaker.trip(reason)

    def retires(self, answer: upstream.Answer) -> bool:
        """Whether `answer` is that of a guard that lets no more requests in; then it has not let this one in either.

        Where no guard is, a program's own words are the program's.
        """
        if not self.runtime.guarded or answer.status != 503 or len(answer.body) > RETIRED_BYTES_MAX:
            return False
        try:
            said = json.loads(answer.body)
        except ValueError:
            return False
        if not isinstance(said, dict) or said.get("error") != RETIRED:
            return False
        self.is_retired = True
        self.alarm.set()
        return True

    def host(self) -> str:
        """The address that requests go to."""
        assert self.address is not None, "an instance that takes requests has an address"
        return str(self.address)


class Watch:
    """Calls back when a process has ended, from the kernel's own notice; no process is polled or waited for."""

    def __init__(self) -> None:
        self._handles: dict[Instance, int] = {}

    def start(self, instance: Instance, pid_file: Path) -> None:
        """Call `instance.end` when its sandbox's process ends; at once when it already has."""
        try:
            instance.pid = int(pid_file.read_text(encoding="ascii"))
            handle = os.pidfd_open(instance.pid)
        except (OSError, ValueError):  # no such process any more, or podman had nothing to write down
            instance.end("its process ended")
            return
        if instance.container not in _command_line(instance.pid):  # the number belongs to another process by now
            os.close(handle)
            instance.end("its process ended")
            return
        self._handles[instance] = handle
        asyncio.get_running_loop().add_reader(handle, self._ended, instance)

    def stop(self, instance: Instance) -> None:
        """Watch no longer. Stopping twice is stopping once."""
        handle = self._handles.pop(instance, None)
        if handle is not None:
            asyncio.get_running_loop().remove_reader(handle)
            os.close(handle)

    def _ended(self, instance: Instance) -> None:
        self.stop(instance)
        instance.end("its process ended")


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


class Host:
    """Makes instances: `prepare`, then `start`, then `until_ready`; and removes them, however far they came."""

    def __init__(
        self,
        *,
        network: Network,
        podman: Podman,
        agent: Agent,
        pool: AddressPool,
        log: LogLine,
        function_port: int,
        health_path: str,
        read_secrets: Callable[[Deployment], Mapping[str, bytes]],
        watch: Watch | None = None,
    ) -> None:
        self.network = network
        self.podman = podman
        self.agent = agent
        self.pool = pool
        self.function_port = function_port
        self._log = log
        self._health_path = health_path
        self._read_secrets = read_secrets
        self._watch = watch or Watch()

    async def image_of(self, deployment: Deployment) -> str:
        """The id of the image that a deployment names. Raises Refused when it is not on this machine."""
        try:
            return await self.podman.image_id(deployment.image)
        except ImageAbsent as error:
            raise Refused(400, f"image {deployment.image} is not on this machine, and this gateway fetches none: build or load it first") from error
        except CommandFailed as error:
            raise Refused(500, f"cannot look for image {deployment.image}: {error}") from error

    async def prepare(self, instance: Instance) -> None:
        """Give the instance an address, a namespace, a container and an identity. Raises Refused, with nothing left behind."""
        deployment = instance.deployment
        try:
            await self._prepare(instance)
        except RegistrationRefused as error:
            await self.remove(instance)
            raise Refused(400, f"the agent refuses {deployment.name} of app {deployment.app}: {error}") from error
        except AgentUnavailable as error:
            await self.remove(instance)
            raise Refused(503, f"cannot register an instance of {deployment.name} with the agent: {error}") from error
        except PoolExhausted as error:
            raise Refused(503, f"cannot make an instance of {deployment.name}: {error.found}") from error
        except (CommandFailed, OSError) as error:
            await self.remove(instance)
            raise Refused(500, f"cannot make an instance of {deployment.name}: {error}") from error
        except BaseException:
            await asyncio.shield(self.remove(instance))
            raise

    async def _prepare(self, instance: Instance) -> None:
        deployment = instance.deployment
        given = self._read_secrets(deployment)
        instance.address = self.pool.take()
        instance.has_namespace = True  # also when the step fails halfway
        await self.network.attach(instance.id, instance.address)
        instance.has_container = True
        instance.container = await self.podman.create(instance.id, deployment, instance.image, instance.runtime, instance.name)
        if given:
            await self.podman.put_secrets(instance.container, given)
        if instance.runtime.guarded:
            instance.is_registered = True
            await self.agent.register(instance.container, deployment.app, deployment.name, instance.image)

    async def start(self, instance: Instance) -> None:
        """Start the container and watch its process. Raises NotReady; what was made stays, for `remove`.

        A start that has begun is waited for, also when its instance is not wanted any more: a podman that is killed halfway leaves a
        sandbox that runs and that it has no record of, so that `remove` would not find it.
        """
        starting = asyncio.ensure_future(self.podman.start(instance.container, instance.runtime))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.wait({starting})
            raise
        except CommandFailed as error:
            raise NotReady(f"podman cannot start it: {error.found}") from error
        self._watch.start(instance, self.podman.pid_file(instance.id))

    async def until_ready(self, instance: Instance) -> None:
        """Return when the health path answers 200. Raises NotReady at the deadline, or at once when the process ends or its guard retires it."""
        deadline = time.monotonic() + READY_SECONDS_MAX
        pause, pause_max = PROBE_PAUSE_SECONDS
        while True:
            instance.alarm.clear()
            found = "nothing" if instance.has_ended or instance.is_retired else await self._probe_or_alarm(instance)
            if instance.has_ended:
                raise NotReady(await self.told(instance, "its process ended"))
            if instance.is_retired:
                raise NotReady("its guard lets no more requests in")
            if found == "200":
                return
            if time.monotonic() > deadline:
                raise NotReady(await self.told(instance, f"{self._health_path} answered {found} after {READY_SECONDS_MAX:.0f} s"))
            with suppress(asyncio.TimeoutError):
                await within(pause, instance.alarm.wait())
            pause = min(pause * 1.5, pause_max)

    async def _probe_or_alarm(self, instance: Instance) -> str:
        """What the probe found; cut short by an alarm, because nothing answers from where a sandbox was."""
        tasks = asyncio.ensure_future(self._probe(instance)), asyncio.ensure_future(instance.alarm.wait())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return tasks[0].result() if tasks[0].done() else "nothing"
        finally:
            for task in tasks:
                task.cancel()

    async def _probe(self, instance: Instance) -> str:
        """One body-less GET of the health path: the status as text, or why there is none."""
        request = upstream.Request("GET", self._health_path, (), b"")
        try:
            answer = await upstream.exchange(instance.host(), self.function_port, request, instance.breaker, seconds_max=PROBE_SECONDS_MAX)
        except upstream.UpstreamError as error:
            return f"nothing ({error})"
        instance.retires(answer)
        return str(answer.status)

    async def told(self, instance: Instance, found: str) -> str:
        """`found`, and the last that the function itself printed."""
        try:
            lines = await self.podman.logs(instance.container, tail=LOG_LINES_TOLD)
        except CommandFailed as error:
            return f"{found}; its output cannot be read: {error}"
        said = " | ".join(line.partition(" ")[2] for line in lines)
        return f"{found}; its output ends with: {said}" if said else f"{found}; it printed nothing"

    async def remove(self, instance: Instance) -> None:
        """Undo every step that was done, and give the address back when nothing uses it any more.

        A step that fails is tried again. What still cannot be removed is logged as an error, and its address is kept back:
        the next engine removes it at its start.
        """
        self._watch.stop(instance)
        instance.end("its instance was removed")
        for attempt in range(REMOVE_ATTEMPTS_MAX):
            if attempt:
                await asyncio.sleep(REMOVE_PAUSE_SECONDS)
            try:
                await self._remove(instance)
                return
            except (CommandFailed, OSError) as error:
                found = error
        self._log("instance_left", function=instance.deployment.name, instance=instance.id, detail=str(found))

    async def _remove(self, instance: Instance) -> None:
        if instance.has_container:
            await self.podman.remove(instance.name)
            instance.has_container = False
        if instance.is_registered:
            try:
                await self.agent.unregister(instance.container)
            except AgentUnavailable as error:  # an agent that restarts forgets what does not run; the id is never used again
                self._log("unregister_failed", function=instance.deployment.name, instance=instance.id, detail=str(error))
            instance.is_registered = False
        if instance.has_namespace:
            await self.network.detach(instance.id)
            instance.has_namespace = False
        self.podman.pid_file(instance.id).unlink(missing_ok=True)
        if instance.address is not None:
            self.pool.give_back(instance.address)
            instance.address = None

    async def remove_leftovers(self) -> None:
        """Remove what an engine that did not end by itself left on this bridge. Raises KaliumError engine.leftovers."""
        try:
            containers = await self.podman.leftovers()
            instances = sorted({*containers, *await self.network.instances()})
            await asyncio.gather(*(self._remove_leftover(instance, containers.get(instance, "")) for instance in instances))
        except CommandFailed as error:
            raise KaliumError(
                "engine.leftovers",
                "cannot remove what an earlier engine left",
                str(error),
                "see `podman ps --all` and `ip netns`, then start it again",
            ) from error

    async def _remove_leftover(self, instance: str, container: str) -> None:
        if container:
            await self.podman.remove(container)
            with suppress(AgentUnavailable):  # as in `_remove`, and the agent may not be up yet
                await self.agent.unregister(container)
        await self.network.detach(instance)
        self.podman.pid_file(instance).unlink(missing_ok=True)
        self._log("leftover_removed", instance=instance, container=container)
