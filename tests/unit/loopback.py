"""Services that run in a thread of the test, on loopback."""

from __future__ import annotations

import abc
import asyncio
import io
import json
import socket
import threading
from contextlib import AbstractAsyncContextManager
from typing import Any


class InThread(abc.ABC):
    """Runs what `service` returns, an asynchronous context manager that gives (host, port), while a `with` lasts.

    `port` is known inside of it; `log` is for what the service says, in JSON lines.
    """

    def __init__(self) -> None:
        self.log = io.StringIO()
        self.port = 0
        self._ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    @abc.abstractmethod
    def service(self) -> AbstractAsyncContextManager[tuple[str, int]]:
        """The service, which serves while it is entered."""

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with self.service() as (_, self.port):
            self._ready.set()
            await self._stop.wait()

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(30), "the service has begun"

    def stop(self) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(20)
        assert not self._thread.is_alive(), "the service has ended"

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of `log` with this event."""
        return [line for line in map(json.loads, self.log.getvalue().splitlines()) if line["event"] == name]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
