"""Serving: the files under one folder by GET and HEAD over TLS, one log line a request, the certificate looked at every second."""

from __future__ import annotations

import asyncio
import contextlib
import json
import mimetypes
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import unquote

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger

from kalium.errors import KaliumError
from kalium.imageserver.certificate import Certificate
from kalium.imageserver.config import Config

RELOAD_SECONDS = 1.0
HANDSHAKE_SECONDS_MAX = 10.0
STOP_SECONDS_MAX = 5.0
CONNECTIONS_MAX = 2048  # further ones are closed before their handshake
BACKLOG = 1024
FILE_BYTES_MAX = 16 << 20  # an answer is held in memory; larger files are not served

LogLine = Callable[..., None]  # log(event, **fields)


def log_to(stream: TextIO) -> LogLine:
    """A log of JSON lines on `stream`, each flushed: whoever follows it must not wait for a buffer."""

    def log(event: str, **fields: Any) -> None:
        stream.write(json.dumps({"event": event, "time_ms": time.time_ns() // 1_000_000, **fields}, separators=(",", ":")) + "\n")
        stream.flush()

    return log


def file_at(root: Path, raw_path: str) -> Path | None:
    """The file that the request's path means, or None: there is none, or it lies elsewhere than under `root`, by `..` or by a link."""
    path = unquote(raw_path.partition("?")[0])
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        return None
    try:
        file = (root / path.lstrip("/")).resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links, before Python 3.13
        return None
    return file if file.is_file() and file.is_relative_to(root.resolve()) and file.stat().st_size <= FILE_BYTES_MAX else None


class ImageServer:
    """The server of one configuration. `access` gets a line for each request, `log` one for each thing that happens to the server."""

    def __init__(self, config: Config, *, access: LogLine, log: LogLine) -> None:
        self._config = config
        self._access = access
        self._log = log
        self.certificate = Certificate(config.certificate, config.key)
        self._logged: set[int] = set()  # requests that have their line and whose answer is not sent yet
        self._web = web.Server(self._answer, access_log_class=self._unread_logger(), handler_cancellation=False)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        response = self._response(request)
        size = len(response.body) if isinstance(response.body, bytes) and request.method != "HEAD" else 0
        self._log_request(request, response.status, size)
        self._logged.add(id(request))
        return response

    def _response(self, request: web.BaseRequest) -> web.Response:
        if request.method not in ("GET", "HEAD"):
            return web.Response(status=405, text="only GET and HEAD are answered\n", headers={"Allow": "GET, HEAD"})
        file = file_at(self._config.root, request.raw_path)
        if file is None:
            return web.Response(status=404, text="there is no such file\n")
        return web.Response(body=file.read_bytes(), content_type=mimetypes.guess_type(file.name)[0] or "application/octet-stream")

    def _log_request(self, request: web.BaseRequest, status: int, size: int) -> None:
        connection: ssl.SSLObject | None = request.get_extra_info("ssl_object")
        self._access(
            "request",
            peer=request.remote or "",
            method=request.method,
            path=request.raw_path,
            status=status,
            bytes=size,
            tls=connection.version() if connection else "",
        )

    def _unread_logger(self) -> type[AbstractAccessLogger]:
        server = self

        class UnreadLogger(AbstractAccessLogger):
            """What could not be parsed, and so was answered without us, is a line all the same."""

            def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:  # noqa: ARG002
                if id(request) in server._logged:
                    server._logged.remove(id(request))
                else:
                    server._log_request(request, response.status, response.body_length)

        return UnreadLogger

    def _protocol(self) -> asyncio.Protocol:
        if len(self._web.connections) >= CONNECTIONS_MAX:
            self._log("connection_refused", connections=CONNECTIONS_MAX)
            return _Closed()
        return self._web()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[tuple[str, int]]:
        """Serve while the `async with` lasts; its value is the address. Raises KaliumError when it cannot listen there."""
        loop = asyncio.get_running_loop()
        try:
            listener = await loop.create_server(
                self._protocol, self._config.host, self._config.port, ssl=self.certificate.context, ssl_handshake_timeout=HANDSHAKE_SECONDS_MAX,
                backlog=BACKLOG,
            )  # fmt: skip
        except OSError as error:
            attempted = f"cannot listen on {self._config.host}:{self._config.port}"
            raise KaliumError("imageserver.listen", attempted, error.strerror or str(error), "free the port, or give another address") from error
        host, port = listener.sockets[0].getsockname()[:2]
        reloading = asyncio.create_task(self._reload())
        self._log("listening", host=host, port=port, certificate_expires=self.certificate.expires.isoformat())
        try:
            yield host, port
        finally:
            reloading.cancel()
            listener.close()
            await self._web.shutdown(STOP_SECONDS_MAX)
            with contextlib.suppress(asyncio.CancelledError):
                await reloading

    async def _reload(self) -> None:
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            try:
                if self.certificate.reload():
                    self._log("certificate_loaded", certificate_expires=self.certificate.expires.isoformat())
            except KaliumError as error:
                self._log("certificate_refused", detail=f"{error.attempted}: {error.found}", next=error.next_step)


class _Closed(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT; the server's own log goes to standard output."""
    try:
        access_file = config.access_log.open("a", encoding="utf-8")
    except OSError as error:
        attempted = f"cannot write the access log {config.access_log}"
        raise KaliumError("imageserver.log", attempted, error.strerror or str(error), "make its folder, with rights for this account") from error
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    log = log_to(sys.stdout)
    with access_file:
        async with ImageServer(config, access=log_to(access_file), log=log).running():
            await stop.wait()
            log("stopping")
