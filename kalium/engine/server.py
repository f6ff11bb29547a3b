"""`kalium engine serve` and `kalium engine network`: puts the parts together, listens, and ends cleanly."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

from kalium.engine.api import Admin, Data
from kalium.engine.backend import Backend, Observe
from kalium.engine.calls import Calls
from kalium.engine.config import Config, Listener, PodmanConfig
from kalium.engine.kubernetes.backend import KubernetesBackend
from kalium.engine.log import LogLine
from kalium.engine.podman.backend import PodmanBackend
from kalium.engine.podman.command import Programs
from kalium.engine.podman.host import Watch
from kalium.engine.podman.network import Network
from kalium.engine.proxy import Proxy
from kalium.engine.state import State
from kalium.errors import EXIT_USAGE, KaliumError

BACKLOG = 1024
FINISH_SECONDS_MAX = 5.0  # requests under way when the engine is told to stop

MakeBackend = Callable[[Config, State, LogLine, Observe], Backend]


def make_backend(config: Config, state: State, log: LogLine, observe: Observe) -> Backend:
    """The back-end that the configuration names."""
    if isinstance(config.backend, PodmanConfig):
        return PodmanBackend(config, config.backend, state, log, observe, Programs(), Watch())
    return KubernetesBackend(config, config.backend, log, observe)


def network_of(config: Config) -> Network:
    """The network that `kalium engine network` makes and removes. Raises KaliumError where the back-end has none of ours."""
    if not isinstance(config.backend, PodmanConfig):
        raise KaliumError(
            "engine.network", "cannot set up a bridge", "functions run on Kubernetes, which has its own network", "leave this step out", EXIT_USAGE
        )
    return Network(Programs().run, config.backend.bridge)


def listen(listener: Listener, name: str) -> socket.socket:
    """A socket that is bound and does not accept yet. Raises KaliumError engine.listen."""
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((listener.host, listener.port))
        bound.listen(BACKLOG)  # also tells whether another socket listens there
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        what = f"cannot listen on {listener.host}:{listener.port} for the {name} side of the gateway"
        if error.errno == errno.EADDRINUSE:
            next_step = f"see who has it with `ss -ltnp`, or move ours with the variable kalium_engine_{name}_port"
        else:
            next_step = f"correct {name}.host in the configuration"
        raise KaliumError("engine.listen", what, error.strerror or str(error), next_step) from error
    return bound


class Engine:
    """A running gateway. `serve` lasts until it is told to stop, or until a mistake of ours shows."""

    def __init__(self, config: Config, log: LogLine, make: MakeBackend = make_backend) -> None:
        self._config = config
        self._log = log
        self._stopped = asyncio.Event()
        self._mistake: BaseException | None = None
        self._state = State(config.state_dir)
        self.backend = make(config, self._state, log, self._observe)
        self._proxy = Proxy(self.backend, log)
        self.calls = Calls(self._state, self.backend, self._proxy, log, self._observe)

    def _observe(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._mistake = self._mistake or task.exception()
            self._stopped.set()

    def stop(self) -> None:
        """Have `serve` end."""
        self._stopped.set()

    async def serve(self) -> None:
        """Listen until a signal or `stop`; leave nothing running. Raises KaliumError when it cannot begin."""
        config = self._config
        password = config.password()
        self._state.open()
        try:
            await self.backend.prepare()
            with listen(config.admin, "admin") as admin_socket, listen(config.data, "data") as data_socket:
                await self._serve_on(admin_socket, data_socket, password)
        finally:
            self._state.close()
        self._log("stopped")
        if self._mistake is not None:
            raise self._mistake

    async def _serve_on(self, admin_socket: socket.socket, data_socket: socket.socket, password: str) -> None:
        config = self._config
        admin = Admin(proxy=self._proxy, calls=self.calls, backend=self.backend, user=config.user, password=password, log=self._log)
        data = Data(self._proxy, self.calls, self.backend, self._log)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            await self.backend.begin()
            self.calls.begin()
            servers = [web.Server(handler, access_log=None, auto_decompress=False) for handler in (admin, data)]
            sockets = (admin_socket, data_socket)
            listeners = [await loop.create_server(server, sock=bound, backlog=BACKLOG) for server, bound in zip(servers, sockets, strict=True)]
            names = [":".join(map(str, bound.getsockname())) for bound in sockets]
            self._log("listening", address=names[0], data_address=names[1], functions=len(self.backend.all()))
            await self._stopped.wait()
            self._log("stopping")
            for listener in listeners:
                listener.close()
            await asyncio.gather(self.calls.stop(), *(server.shutdown(FINISH_SECONDS_MAX) for server in servers))
        finally:
            await self.calls.stop()
            await self.backend.stop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


def open_log(path: Path) -> int:
    """A descriptor that appends to `path`. Raises KaliumError engine.log."""
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise KaliumError("engine.log", f"cannot write the log {path}", error.strerror or str(error), "correct `log` in the configuration") from error
