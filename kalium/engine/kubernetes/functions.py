"""One function on Kubernetes: which of its pods get requests, and which are replaced."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from kalium.engine.backend import Function
from kalium.engine.config import RuntimeClass
from kalium.engine.instance import Health, Instance, NotReady
from kalium.engine.kubernetes.objects import Found, Pod, lineage
from kalium.engine.limits import (
    DRAIN_SECONDS_MAX,
    ERROR_CHARACTERS_MAX,
    PATIENCE_SECONDS,
    READY_SECONDS_MAX,
    RESTART_PAUSE_SECONDS,
    STEADY_SECONDS,
)
from kalium.engine.log import LogLine


class Offer(enum.Enum):
    """What requests may do with an instance."""

    NONE = "not wait for it"
    TAKEN = "go to it"
    SUSPENDED = "wait for it"


class PodInstance(Instance):
    """A pod of a function: one sandbox, and one run of the container in it."""

    def __init__(self, function: ClusterFunction, pod: Pod) -> None:
        super().__init__(function.deployment, pod.uid, is_guarded=function.has_guard(pod))
        self.pod = pod
        self.offer = Offer.NONE
        self.first_seen = time.monotonic()
        self.ready_since: float | None = None  # once it has been ready, our own question for its health counts
        self.is_suspected = False
        self.keeper: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        """The pod's name."""
        return self.pod.name

    def host(self) -> str:
        """The pod's address."""
        assert self.pod.address, "an instance that takes requests has an address"
        return self.pod.address


class Hands:
    """What a function has others do for it."""

    def __init__(
        self,
        *,
        health: Health,
        log: LogLine,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        delete_pod: Callable[[Pod], Awaitable[None]],
        last_words: Callable[[Pod], Awaitable[str]],
        warning_of: Callable[[str], str],
    ) -> None:
        self.health = health
        self.log = log
        self.spawn = spawn  # begins what is ended with the gateway
        self.delete_pod = delete_pod  # returns when it is deleted or gone; tries for as long as it takes
        self.last_words = last_words  # the end of what a pod's container printed, or ""
        self.warning_of = warning_of  # what Kubernetes warns of an object by its uid, or ""


class ClusterFunction(Function):
    """A Deployment and its pods. It is told what the API server has, and says which pods get requests."""

    def __init__(self, found: Found, hands: Hands, runtimes: Mapping[str, RuntimeClass]) -> None:
        super().__init__(found.deployment, found.created, hands.health.port)
        self.found = found
        self._runtimes = runtimes
        self.pods: dict[str, PodInstance] = {}
        self.changed = asyncio.Event()  # set by every change; whoever waits clears it
        self._hands = hands
        self._reason = ""
        self._pause = RESTART_PAUSE_SECONDS[0]
        self._expected: dict[PodInstance, asyncio.TimerHandle] = {}
        self._is_closed = False

    @property
    def wanted(self) -> int:
        """How many replicas there should be."""
        return self.found.replicas

    def ready(self) -> list[Instance]:
        """The pods of the last revision that take requests, by name."""
        current = [instance for instance in self.slots.ready() if isinstance(instance, PodInstance) and self._is_current(instance)]
        return sorted(current, key=lambda instance: instance.name)

    def why_not(self) -> str:
        """Why it has no ready pod, in the words of Kubernetes; "" while nothing has gone wrong."""
        if not self.wanted:
            return "it is scaled to 0 replicas"
        return (self.trouble() or self._reason)[:ERROR_CHARACTERS_MAX]

    def trouble(self, *, known: str = "") -> str:
        """What keeps pods of the last revision from starting, now; but for a refusal that was `known` before."""
        if self.found.refusal not in ("", known):
            return self.found.refusal
        for instance in self._current():
            pod = instance.pod
            is_patient = time.monotonic() - instance.first_seen < PATIENCE_SECONDS
            told = pod.image_trouble or pod.start_trouble or self._hands.warning_of(pod.uid) or ("" if is_patient else pod.unscheduled)
            if told and not pod.is_running and not pod.is_ending:
                return f"{pod.name}: {told}"
        return ""

    def image_trouble(self, *, known: str) -> str:
        """Why the image of the last revision is not there, or its pods are refused: what the client has to correct.

        A refusal that was `known` before is that of the revision before, until its ReplicaSet is scaled down.
        """
        refusal = "" if self.found.refusal == known else self.found.refusal
        return refusal or next((instance.pod.image_trouble for instance in self._current() if instance.pod.image_trouble), "")

    def has_started(self) -> bool:
        """Whether a process of the last revision runs or has run."""
        return any(instance.pod.is_running or instance.pod.ended for instance in self._current())

    def has_guard(self, pod: Pod) -> bool:
        """Whether a pod's sandbox has a guard."""
        return any(runtime.guarded and runtime.name == pod.runtime_class for runtime in self._runtimes.values())

    def _may_serve(self, pod: Pod) -> bool:
        """A function with a guard is served by no pod without one, nor by one whose guard keeps to another's policy: labels can be anybody's,
        and pods of an earlier revision may have had none."""
        runtime = self._runtimes[self.deployment.runtime]
        return not runtime.guarded or (self.has_guard(pod) and pod.identity == (self.deployment.app, self.deployment.name))

    def _is_current(self, instance: PodInstance) -> bool:
        return instance.pod.revision == self.found.revision

    def _current(self) -> list[PodInstance]:
        return [instance for instance in self.pods.values() if self._is_current(instance)]

    # What the API server has

    def update(self, found: Found) -> None:
        """The Deployment is as `found` says."""
        if found.revision != self.found.revision:
            self._reason, self._pause = "", RESTART_PAUSE_SECONDS[0]
        self.found, self.deployment = found, found.deployment
        for instance in self._current():
            instance.deployment = self.deployment  # one may have been seen before its deployment was
        self._decide()

    def see(self, pod: Pod) -> None:
        """A pod is as `pod` says. One of another Deployment of the name is none of ours."""
        if lineage(pod.revision) != lineage(self.found.revision):
            return
        instance = self.pods.get(pod.uid)
        if instance is None:
            instance = self.pods[pod.uid] = PodInstance(self, pod)
        was_ready, instance.pod = instance.pod.is_ready, pod
        if pod.ended and not instance.has_ended:
            self._end(instance, pod.ended)
        elif was_ready and not pod.is_ready and instance.offer is Offer.TAKEN and not pod.is_ending:
            instance.is_suspected = True  # by the kubelet; we ask it ourselves
            instance.alarm.set()
        self._decide()

    def lose(self, uid: str) -> None:
        """A pod is gone."""
        instance = self.pods.pop(uid, None)
        if instance is not None:
            self._withdraw(instance)
            instance.end("its pod was deleted")
            self._decide()

    def close(self) -> list[PodInstance]:
        """It is removed: nothing gets requests any more. Returns its pods; `end` is theirs when they are gone."""
        self._is_closed = True
        for instance in list(self._expected):
            self._expect_no_more(instance)
        pods = list(self.pods.values())
        for instance in pods:
            self._withdraw(instance)
            if instance.keeper is not None:
                instance.keeper.cancel()
        self.pods.clear()
        self.changed.set()
        return pods

    # Who gets requests

    def _decide(self) -> None:
        """Bring every pod's offer to what it should be: those of the last revision before others, which serve while none of it does."""
        wanted = {instance: self._offer_of(instance) for instance in self.pods.values()}
        has_current = any(offer is Offer.TAKEN and self._is_current(instance) for instance, offer in wanted.items())
        for instance, offer in wanted.items():
            if not self.wanted or (has_current and not self._is_current(instance)):
                offer = Offer.NONE  # noqa: PLW2901 -- of an outgoing one
            self._bring(instance, offer)
        if has_current:
            self._reason = ""
            for instance in list(self._expected):
                self._expect_no_more(instance)
        self.changed.set()

    def _offer_of(self, instance: PodInstance) -> Offer:
        pod = instance.pod
        if instance.has_ended or instance.is_retired or pod.is_ending or not pod.address or self._is_closed:
            return Offer.NONE
        if not self._may_serve(pod):
            return Offer.NONE
        if instance.ready_since is None and not pod.is_ready:
            return Offer.NONE
        return Offer.SUSPENDED if instance.is_suspected else Offer.TAKEN

    def _bring(self, instance: PodInstance, offer: Offer) -> None:
        if offer is Offer.NONE:
            self._withdraw(instance)
        elif offer is Offer.SUSPENDED:
            self.slots.suspend(instance)
        elif instance.offer is not Offer.TAKEN:
            if instance.ready_since is None:
                instance.ready_since = time.monotonic()
                seconds = round(instance.ready_since - instance.first_seen, 3)
                self._hands.log(
                    "instance_ready", function=self.deployment.name, instance=instance.name, runtime=self.deployment.runtime,
                    app=self.deployment.app, address=instance.host(), node=instance.pod.node, seconds=seconds,
                )  # fmt: skip
            self.slots.add(instance)
            if instance.keeper is None:
                instance.keeper = self._hands.spawn(self._keep(instance))
        instance.offer = offer

    def _withdraw(self, instance: PodInstance) -> None:
        if instance.offer is not Offer.NONE:
            self.slots.withdraw(instance)
            instance.offer = Offer.NONE

    # What is replaced

    async def _keep(self, instance: PodInstance) -> None:
        """Attend to an instance that takes requests until it is not to be used any more."""
        while True:
            await instance.alarm.wait()
            if not instance.has_ended and not instance.is_retired:
                instance.is_suspected = True
                self._decide()
                self._hands.log("instance_suspected", function=self.deployment.name, instance=instance.name)
                try:
                    await self._hands.health.until_ready(instance)
                except NotReady as error:
                    self._reason = str(error)
                else:
                    instance.is_suspected, instance.offer = False, Offer.SUSPENDED
                    self._decide()
                    continue
            if instance.is_retired:
                await self._retire(instance)
            elif not instance.has_ended:
                self._hands.log("instance_ended", function=self.deployment.name, instance=instance.name, detail=self._reason)
                instance.end(self._reason)
                self._decide()
                await self._hands.delete_pod(instance.pod)
            return

    async def _retire(self, instance: PodInstance) -> None:
        """Not a failure: requests wait for the next one, and those in this one go on."""
        self._reason = "its guard lets no more requests in"
        self._hands.log("instance_retired", function=self.deployment.name, instance=instance.name, detail=self._reason)
        self.slots.expect(instance)
        self._expected[instance] = asyncio.get_running_loop().call_later(READY_SECONDS_MAX, self._expect_no_more, instance)
        self._withdraw_now(instance)
        self._decide()
        await self.slots.drained(instance, DRAIN_SECONDS_MAX)
        await self._hands.delete_pod(instance.pod)

    def _withdraw_now(self, instance: PodInstance) -> None:
        """Also when only the proxy has suspended it."""
        self.slots.withdraw(instance)
        instance.offer = Offer.NONE

    def _expect_no_more(self, instance: PodInstance) -> None:
        timer = self._expected.pop(instance, None)
        if timer is not None:
            timer.cancel()
            self.slots.expect_no_more(instance)

    def _end(self, instance: PodInstance, reason: str) -> None:
        """The process of a pod is gone: what it has is lost, and another is made after a pause that grows from one to the next."""
        was_ready = instance.ready_since is not None
        if instance.ready_since is not None and time.monotonic() - instance.ready_since > STEADY_SECONDS:
            self._pause = RESTART_PAUSE_SECONDS[0]
        pause, self._pause = self._pause, min(self._pause * 2, RESTART_PAUSE_SECONDS[1])
        instance.end(reason)
        if self._is_current(instance):
            self._reason = reason
        self._hands.spawn(self._replace(instance, reason, "instance_ended" if was_ready else "instance_failed", pause))

    async def _replace(self, instance: PodInstance, reason: str, event: str, pause: float) -> None:
        said = await self._hands.last_words(instance.pod)
        told = f"{reason}; its output ends with: {said}" if said else f"{reason}; it printed nothing"
        self._hands.log(event, function=self.deployment.name, instance=instance.name, detail=told[:ERROR_CHARACTERS_MAX])
        if self._reason == reason:
            self._reason = told
        await asyncio.sleep(pause)
        if not instance.pod.is_ending:
            await self._hands.delete_pod(instance.pod)
