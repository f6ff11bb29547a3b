"""One instance on this machine: made and removed step by step, so that a failure at any step leaves nothing behind."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from kalium.engine.agent import Agent, AgentUnavailable, RegistrationRefused
from kalium.engine.config import Runtime
from kalium.engine.deployment import Deployment, Refused
from kalium.engine.instance import Health, Instance, NotReady
from kalium.engine.limits import LOG_LINES_TOLD, REMOVE_ATTEMPTS_MAX, REMOVE_PAUSE_SECONDS
from kalium.engine.log import LogLine
from kalium.engine.podman.command import CommandFailed
from kalium.engine.podman.containers import ImageAbsent, Podman
from kalium.engine.podman.network import AddressPool, Network, PoolExhausted
from kalium.errors import KaliumError


class Sandbox(Instance):
    """An instance that podman runs. `has_*` and `container` say which steps were done, and so what has to be undone."""

    def __init__(self, deployment: Deployment, image: str, runtime: Runtime) -> None:
        super().__init__(deployment, secrets.token_hex(4), is_guarded=runtime.guarded)
        self.image = image
        self.runtime = runtime
        self.address: ipaddress.IPv4Address | None = None
        self.has_namespace = False
        self.has_container = False
        self.container = ""
        self.is_registered = False
        self.pid = 0  # of the sandbox; 0 before it was started

    @property
    def name(self) -> str:
        """The container's name."""
        return f"kal-{self.deployment.name}-{self.id}"

    def host(self) -> str:
        """The address that requests go to."""
        assert self.address is not None, "an instance that takes requests has an address"
        return str(self.address)


class Watch:
    """Calls back when a process has ended, from the kernel's own notice; no process is polled or waited for."""

    def __init__(self) -> None:
        self._handles: dict[Sandbox, int] = {}

    def start(self, instance: Sandbox, pid_file: Path) -> None:
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

    def stop(self, instance: Sandbox) -> None:
        """Watch no longer. Stopping twice is stopping once."""
        handle = self._handles.pop(instance, None)
        if handle is not None:
            asyncio.get_running_loop().remove_reader(handle)
            os.close(handle)

    def _ended(self, instance: Sandbox) -> None:
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
        health: Health,
        read_secrets: Callable[[Deployment], Mapping[str, bytes]],
        watch: Watch | None = None,
    ) -> None:
        self.network = network
        self.podman = podman
        self.agent = agent
        self.pool = pool
        self.health = health
        self._log = log
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

    async def prepare(self, instance: Sandbox) -> None:
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

    async def _prepare(self, instance: Sandbox) -> None:
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

    async def start(self, instance: Sandbox) -> None:
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

    async def until_ready(self, instance: Sandbox) -> None:
        """As `Health.until_ready`; NotReady also has the end of what the function itself printed."""
        try:
            await self.health.until_ready(instance)
        except NotReady as error:
            if instance.is_retired and not instance.has_ended:
                raise
            raise NotReady(await self.told(instance, str(error))) from error

    async def told(self, instance: Sandbox, found: str) -> str:
        """`found`, and the last that the function itself printed."""
        try:
            lines = await self.podman.logs(instance.container, tail=LOG_LINES_TOLD)
        except CommandFailed as error:
            return f"{found}; its output cannot be read: {error}"
        said = " | ".join(line.partition(" ")[2] for line in lines)
        return f"{found}; its output ends with: {said}" if said else f"{found}; it printed nothing"

    async def remove(self, instance: Sandbox) -> None:
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

    async def _remove(self, instance: Sandbox) -> None:
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
