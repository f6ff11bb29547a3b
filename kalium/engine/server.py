"""`kalium engine serve` and `kalium engine network`: puts the parts together, listens, and ends cleanly."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
from pathlib import Path

from aiohttp import web

from kalium.engine.agent import Agent
from kalium.engine.api import Admin, Data
from kalium.engine.command import Run, require_program, run_program
from kalium.engine.config import Bridge, Config, Listener
from kalium.engine.functions import Functions
from kalium.engine.host import Host, Watch
from kalium.engine.log import LogLine
from kalium.engine.network import AddressPool, Network
from kalium.engine.podman import Podman, Surroundings
from kalium.engine.proxy import Proxy
from kalium.engine.store import Store
from kalium.errors import KaliumError

BACKLOG = 1024
FINISH_SECONDS_MAX = 5.0  # requests under way when the engine is told to stop


async def network_up(bridge: Bridge, run: Run = run_program) -> bool:
    """Make the bridge. Returns whether anything changed. Raises KaliumError."""
    return await Network(run, bridge).up()


async def network_down(bridge: Bridge, run: Run = run_program) -> bool:
    """Remove the bridge. Returns whether there was one. Raises KaliumError."""
    return await Network(run, bridge).down()


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


def require_runtimes(config: Config) -> None:
    """Raise KaliumError engine.runtime for a runtime that cannot be executed."""
    for name, runtime in config.runtimes.items():
        if not runtime.path.is_file() or not os.access(runtime.path, os.X_OK):
            raise KaliumError(
                "engine.runtime",
                f"cannot use the runtime {name}",
                f"{runtime.path} is no program",
                "`site.yml` builds the runtimes; or correct runtimes",
            )


class Engine:
    """A running gateway. `serve` lasts until it is told to stop, or until a mistake of ours shows."""

    def __init__(self, config: Config, log: LogLine, run: Run = run_program, watch: Watch | None = None) -> None:
        self._config = config
        self._log = log
        self._run = run
        self._stopped = asyncio.Event()
        self._mistake: BaseException | None = None
        bridge = config.bridge
        self._store = Store(config.state_dir)
        self._network = Network(run, bridge)
        around = Surroundings(engine=bridge.name, nameserver=str(bridge.address), hosts=config.hosts, pid_files=self._store.pid_files)
        self._podman = Podman(run, config.podman, around)
        self._host = Host(
            network=self._network,
            podman=self._podman,
            agent=Agent(config.agent),
            pool=AddressPool(bridge),
            log=log,
            function_port=config.function_port,
            health_path=config.health_path,
            read_secrets=self._store.secrets_of,
            watch=watch,
        )
        self._functions = Functions(self._host, self._store, config.runtimes, log, self._observe)

    def _observe(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._mistake = self._mistake or task.exception()
            self._stopped.set()

    def stop(self) -> None:
        """Have `serve` end."""
        self._stopped.set()

    async def serve(self) -> None:
        """Listen until a signal or `stop`; leave no instance behind. Raises KaliumError when it cannot begin."""
        config = self._config
        password = config.password()
        require_runtimes(config)
        await require_program(self._run, [*config.podman, "--version"], "install podman (3.4 or newer), or correct `podman` in the configuration")
        self._store.open()
        try:
            await self._network.up()
            with listen(config.admin, "admin") as admin_socket, listen(config.data, "data") as data_socket:
                await self._serve_on(admin_socket, data_socket, password)
        finally:
            self._store.close()
        self._log("stopped")
        if self._mistake is not None:
            raise self._mistake

    async def _serve_on(self, admin_socket: socket.socket, data_socket: socket.socket, password: str) -> None:
        config = self._config
        await self._host.remove_leftovers()
        proxy = Proxy(self._functions, self._log)
        admin = Admin(
            proxy=proxy,
            functions=self._functions,
            store=self._store,
            podman=self._podman,
            runtimes=dict(config.runtimes),
            user=config.user,
            password=password,
            log=self._log,
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        try:
            self._functions.restore()
            servers = [web.Server(handler, access_log=None, auto_decompress=False) for handler in (admin, Data(proxy, self._log))]
            sockets = (admin_socket, data_socket)
            listeners = [await loop.create_server(server, sock=bound, backlog=BACKLOG) for server, bound in zip(servers, sockets, strict=True)]
            names = [":".join(map(str, bound.getsockname())) for bound in sockets]
            self._log("listening", address=names[0], data_address=names[1], functions=len(self._functions.all()))
            await self._stopped.wait()
            self._log("stopping")
            for listener in listeners:
                listener.close()
            await asyncio.gather(*(server.shutdown(FINISH_SECONDS_MAX) for server in servers))
        finally:
            await self._functions.stop()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


def open_log(path: Path) -> int:
    """A descriptor that appends to `path`. Raises KaliumError engine.log."""
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise KaliumError("engine.log", f"cannot write the log {path}", error.strerror or str(error), "correct `log` in the configuration") from error
