"""The registrar's process: follows the pods, keeps the agent's registrations equal to them, and says how it is."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Any, Protocol

from kalium.engine.agent import Agent, AgentUnavailable, RegistrationRefused
from kalium.engine.deadline import within
from kalium.errors import KaliumError
from kalium.registrar.admission import Refusal
from kalium.registrar.backoff import Backoff
from kalium.registrar.config import Config
from kalium.registrar.ledger import Ledger, Register, Step
from kalium.registrar.limits import AGENT_BACKOFF_SECONDS_MAX, AGENT_POLL_SECONDS, API_BACKOFF_SECONDS_MAX, WATCH_SECONDS_LEAST
from kalium.registrar.log import LogLine
from kalium.registrar.pods import ApiUnavailable, Change, VersionGone, connect


class Watched(Protocol):
    """What is asked of the API server: kalium.registrar.pods.Pods."""

    async def list(self) -> tuple[list[Mapping[str, Any]], str]:
        """All pods, and the version since which to watch."""

    def watch(self, version: str) -> AsyncIterator[Change]:
        """What changes after it."""


Connect = Callable[[], AbstractAsyncContextManager[Watched]]


class Registrar:
    """Two loops over one ledger: one takes in what the API server says, the other says it to the agent."""

    def __init__(self, config: Config, log: LogLine, *, pods: Connect | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._log = log
        self._pods: Connect = pods or (lambda: connect(config.kubeconfig, config.place))
        self._clock = clock
        self._agent = Agent(config.agent)
        self._ledger = Ledger(config.place)
        self._news = asyncio.Event()  # the ledger has changed
        self._version = ""  # up to which changes were taken in; "": list first
        self._is_following = False
        self._has_agent: bool | None = None  # None: not asked yet
        self._registered = 0

    async def serve(self) -> None:
        """Serve until SIGTERM or SIGINT. Registrations stay: the guards of running pods must not lose theirs to a restart."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await self.run(stop)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises KaliumError when the status socket cannot be made."""
        server = await _listen(self._config.status, self._answer)
        self._log("listening", node=self._config.place.node)
        loops = [asyncio.create_task(loop) for loop in (self._follow(), self._reconcile())]
        stopped = asyncio.create_task(stop.wait())
        try:
            done, _ = await asyncio.wait([*loops, stopped], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # a loop never ends by itself: what it raises is our mistake
            self._log("stopping")
        finally:
            for task in (*loops, stopped):
                task.cancel()
            await asyncio.gather(*loops, stopped, return_exceptions=True)
            server.close()
            self._config.status.unlink(missing_ok=True)
        self._log("stopped")

    async def _follow(self) -> None:
        """Keep the ledger equal to the API server's pods, whatever happens to the connection."""
        backoff = Backoff(API_BACKOFF_SECONDS_MAX)
        while True:
            try:
                async with self._pods() as pods:
                    while self._version or await self._list(pods):
                        await self._watch(pods)
                        backoff.reset()
            except VersionGone:
                self._version = ""  # as after a long time without a connection: no fault of anybody's
                await asyncio.sleep(backoff.wait())
            except ApiUnavailable as error:
                self._is_following = False
                seconds = backoff.wait()
                self._log("api_lost", detail=str(error), seconds=round(seconds, 1))
                await asyncio.sleep(seconds)

    async def _list(self, pods: Watched) -> str:
        found, self._version = await pods.list()
        self._is_following = True
        self._tell(self._ledger.listed(found))
        self._log("pods_listed", pods=self._ledger.counts["pods"])
        return self._version

    async def _watch(self, pods: Watched) -> None:
        """Follow one watch to its end."""
        began, is_silent = self._clock(), True
        async for change in pods.watch(self._version):
            self._version, is_silent = change.version, False
            self._take(change)
        if is_silent and self._clock() - began < WATCH_SECONDS_LEAST:
            raise ApiUnavailable("its watches end at once")
        self._is_following = True

    def _take(self, change: Change) -> None:
        self._is_following = True
        if change.pod is not None:
            self._tell(self._ledger.changed(change.pod, is_deleted=change.is_deleted))

    def _tell(self, refusals: list[Refusal]) -> None:
        for refusal in refusals:
            self._log("pod_refused", container=refusal.container, pod=refusal.pod, reason=refusal.reason, detail=refusal.detail)
        self._news.set()

    async def _reconcile(self) -> None:
        """Keep the agent's registrations equal to the ledger. An agent that was restarted has none, and gets all again."""
        backoff = Backoff(AGENT_BACKOFF_SECONDS_MAX)
        while True:
            self._news.clear()
            try:
                known = await self._agent.registered()
                self._registered = len(known)
                if not self._has_agent:
                    self._has_agent = True
                    self._log("agent_back", pods=len(known))
                for step in self._ledger.due(known, self._clock()):
                    await self._do(step)
            except AgentUnavailable as error:
                if self._has_agent is not False:
                    self._log("agent_lost", detail=str(error))
                self._has_agent = False
                await asyncio.sleep(backoff.wait())
                continue
            backoff.reset()
            with suppress(asyncio.TimeoutError):
                await within(self._ledger.wait(self._clock(), AGENT_POLL_SECONDS), self._news.wait())

    async def _do(self, step: Step) -> None:
        if not isinstance(step, Register):
            await self._agent.unregister(step.container)
            self._log("pod_unregistered", container=step.container)
            return
        pod = step.registration
        who = {"container": pod.container, "pod": pod.pod, "app": pod.app, "function": pod.function}
        try:
            await self._agent.register(pod.container, pod.app, pod.function, pod.image)
        except RegistrationRefused as error:
            if self._ledger.not_taken(pod.container, error.code, self._clock()):
                self._log("registration_refused", code=error.code, detail=str(error), **who)
            return
        self._ledger.taken(pod.container)
        self._registered += 1
        self._log("pod_registered", image=pod.image, **who)

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Say how it is, to whoever connects: the socket is root's."""
        status = {"following": self._is_following, "agent": self._has_agent is True, "registered": self._registered, **self._ledger.counts}
        with suppress(OSError):
            writer.write(json.dumps(status).encode("ascii") + b"\n")
            await writer.drain()
        writer.close()


async def _listen(path: Path, answer: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any]) -> asyncio.AbstractServer:
    """A socket for root alone. Raises KaliumError."""
    try:
        return await asyncio.start_unix_server(answer, sock=_bound(path))
    except OSError as error:
        raise KaliumError(
            "registrar.socket", f"cannot listen on {path}", error.strerror or str(error), "create the socket's folder, or stop the other registrar"
        ) from error


def _bound(path: Path) -> socket.socket:
    """A socket in the place of the one that a killed registrar left."""
    if path.is_socket():
        path.unlink()
    bound = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)
    try:
        bound.bind(str(path))
    except OSError:
        bound.close()
        raise
    finally:
        os.umask(before)
    return bound
