"""What keeps a function running on podman: replaces instances that end, rolls from one deployment to the next, scales, removes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path

from kalium.engine.backend import Function, Observe
from kalium.engine.config import Runtime
from kalium.engine.deployment import Deployment, Refused
from kalium.engine.instance import Instance, NotReady
from kalium.engine.limits import DRAIN_SECONDS_MAX, ERROR_CHARACTERS_MAX, RESTART_PAUSE_SECONDS, STEADY_SECONDS
from kalium.engine.log import LogLine
from kalium.engine.podman.host import Host, Sandbox


class Replica:
    """Keeps one instance of a deployment alive until it is stopped."""

    def __init__(self, function: PodmanFunction, deployment: Deployment, image: str, runtime: Runtime) -> None:
        self._function = function
        self._deployment = deployment
        self._image = image  # "" when it is looked up anew for each instance
        self._runtime = runtime
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = False
        self.instance: Sandbox | None = None

    def start(self, first: Sandbox | None = None) -> None:
        """Begin, with an instance that is prepared already or by preparing one."""
        assert self._task is None, "a replica is started once"
        self._task = asyncio.get_running_loop().create_task(self._keep(first))
        self._task.add_done_callback(self._function.observe)

    async def stop(self, drain_seconds: float = 0.0) -> None:
        """Return when its instance is gone. A request in it gets `drain_seconds` to end. Stopping twice is stopping at once."""
        assert self._task is not None, "it was started"
        if self.instance is not None:
            self._function.slots.withdraw(self.instance)
            await self._function.slots.drained(self.instance, drain_seconds)
        if not self._is_stopping:  # a second cancellation would end the removal and not the replica
            self._is_stopping = True
            self._task.cancel()
        await asyncio.wait([self._task])

    async def _keep(self, instance: Sandbox | None) -> None:
        try:
            await self._replace_for_ever(instance)
        finally:
            self._function.slots.expect_no_more(self)

    async def _replace_for_ever(self, instance: Sandbox | None) -> None:
        function, host, log = self._function, self._function.host, self._function.log
        pause = RESTART_PAUSE_SECONDS[0]
        while True:
            begin = ready = time.monotonic()
            is_ready = is_retired = False
            try:
                if instance is None:
                    image = self._image or await host.image_of(self._deployment)
                    instance = Sandbox(self._deployment, image, self._runtime)
                    await host.prepare(instance)
                self.instance = instance
                await host.start(instance)
                await host.until_ready(instance)
                is_ready, ready = True, time.monotonic()
                log(
                    "instance_ready", function=self._deployment.name, instance=instance.id, container=instance.container[:12],
                    runtime=self._deployment.runtime, app=self._deployment.app, address=instance.host(), seconds=round(ready - begin, 3),
                )  # fmt: skip
                await self._attend(instance)
            except (Refused, NotReady) as error:
                function.reason = str(error)[:ERROR_CHARACTERS_MAX]
                is_retired = is_ready and instance is not None and instance.is_retired
                event = "instance_retired" if is_retired else "instance_ended" if is_ready else "instance_failed"
                log(event, function=self._deployment.name, instance=instance.id if instance else "", detail=function.reason)
                if is_retired and instance is not None:
                    # Not a failure: requests wait for the next one, and those in this one go on.
                    function.slots.expect(self)
                    function.slots.withdraw(instance)
                    await function.slots.drained(instance, DRAIN_SECONDS_MAX)
                else:
                    function.slots.expect_no_more(self)
            finally:
                if instance is not None:
                    function.slots.withdraw(instance)
                    await asyncio.shield(host.remove(instance))
                self.instance = instance = None
            if is_retired or (is_ready and time.monotonic() - ready > STEADY_SECONDS):
                pause = RESTART_PAUSE_SECONDS[0]
            if is_retired:
                continue
            await asyncio.sleep(pause)
            pause = min(pause * 2, RESTART_PAUSE_SECONDS[1])

    async def _attend(self, instance: Sandbox) -> None:
        """Offer a ready instance to requests for as long as it works. Raises NotReady."""
        function = self._function
        while True:
            function.slots.add(instance)
            function.slots.expect_no_more(self)
            function.is_ready(self)
            await instance.alarm.wait()
            function.slots.suspend(instance)
            if not instance.has_ended and not instance.is_retired:
                function.log("instance_suspected", function=self._deployment.name, instance=instance.id)
            await function.host.until_ready(instance)


class PodmanFunction(Function):
    """A deployed function: its current replicas, and those of the deployment before while nothing new is ready."""

    def __init__(self, host: Host, runtimes: Mapping[str, Runtime], log: LogLine, observe: Observe, deployment: Deployment, created: str) -> None:
        super().__init__(deployment, created, host.health.port)
        self.host = host
        self.log = log
        self.observe = observe
        self.reason = ""
        self._runtimes = runtimes
        self._image = ""
        self._replicas: list[Replica] = []
        self._outgoing: list[Replica] = []
        self._retiring: dict[asyncio.Task[None], Replica] = {}

    @property
    def wanted(self) -> int:
        """How many replicas there should be."""
        return len(self._replicas)

    def renew(self, deployment: Deployment, image: str, replicas: int, first: Sandbox | None) -> None:
        """Begin with `replicas` of a new deployment. Ready instances of the one before take requests until one of these does."""
        old = [*self._outgoing, *self._replicas]
        self.deployment, self._image = deployment, image
        self.reason = ""
        self._outgoing = [replica for replica in old if replica.instance in self.slots.ready()]
        for replica in old:
            if replica not in self._outgoing:
                self._retire(replica, 0.0)
        self._replicas = [self._replica() for _ in range(replicas)]
        for index, replica in enumerate(self._replicas):
            replica.start(first if index == 0 else None)

    def _replica(self) -> Replica:
        return Replica(self, self.deployment, self._image, self._runtimes[self.deployment.runtime])

    def _retire(self, replica: Replica, drain_seconds: float) -> None:
        if replica.instance is not None:
            self.slots.withdraw(replica.instance)
        task = asyncio.get_running_loop().create_task(replica.stop(drain_seconds))
        self._retiring[task] = replica
        task.add_done_callback(self._retiring.pop)
        task.add_done_callback(self.observe)

    def is_ready(self, replica: Replica) -> None:
        """A replica has an instance that takes requests: what was kept of the deployment before may go."""
        if replica not in self._replicas:
            return
        self.reason = ""
        outgoing, self._outgoing = self._outgoing, []
        for old in outgoing:
            self._retire(old, DRAIN_SECONDS_MAX)

    async def scale(self, replicas: int) -> None:
        """Have `replicas`; return when those too many are gone. New ones are not ready yet."""
        gone, self._replicas = self._replicas[replicas:], self._replicas[:replicas]
        while len(self._replicas) < replicas:
            replica = self._replica()
            self._replicas.append(replica)
            replica.start()
        if not replicas:
            self.reason = "it is scaled to 0 replicas"
            gone, self._outgoing = gone + self._outgoing, []
        await asyncio.gather(*(replica.stop(DRAIN_SECONDS_MAX) for replica in gone))

    async def stop(self) -> None:
        """Return when no instance is left, also none of earlier deployments. Requests in them are cut off."""
        replicas, self._replicas, self._outgoing = [*self._replicas, *self._outgoing, *self._retiring.values()], [], []
        await asyncio.gather(*(replica.stop() for replica in replicas))
        if self._retiring:
            await asyncio.wait(list(self._retiring))

    def why_not(self) -> str:
        """Why it has no ready instance; "" while nothing has gone wrong."""
        return self.reason


def usage(instances: list[Instance]) -> dict[str, float]:
    """What sandboxes use: memory that is resident now, and processor time since their start as thousandths of a processor."""
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
    cpu = memory = 0.0
    for instance in instances:
        assert isinstance(instance, Sandbox), "podman's functions have podman's instances"
        try:
            numbers = Path(f"/proc/{instance.pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        user, system, started, resident = int(numbers[11]), int(numbers[12]), int(numbers[19]), int(numbers[21])
        cpu += 1000 * (user + system) / ticks / max(uptime - started / ticks, 0.01)
        memory += resident * page
    return {"cpu": round(cpu, 3), "totalMemoryBytes": memory}
