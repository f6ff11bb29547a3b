"""The controller's HTTP listener for people and programs that watch it: /metrics, /healthz and /readyz.

Plain HTTP on an address of its own, 127.0.0.1 as the site sets it up. One request a connection, with a deadline and a
bound on connections, and the text of /metrics is made at most once in CACHE_S: whoever asks too often takes no time from
the steps.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from prometheus_client import CONTENT_TYPE_LATEST

from kalium.controller.config import Listen
from kalium.errors import KaliumError

HEAD_BYTES_MAX = 8 * 1024  # what common servers take; a scrape's head has a few hundred bytes
CONNECTIONS_MAX = 16  # at once; one more is closed unread
DEADLINE_S = 5.0  # for the request and its answer together
CACHE_S = 0.5
TEXT, JSON = "text/plain; charset=utf-8", "application/json"
REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}

Faults = Callable[[], Mapping[str, str]]  # by what was checked: what is wrong, "" when nothing is


class Monitor:
    """Answers the three paths. `faults` is what /readyz looks at."""

    def __init__(self, metrics: Callable[[], bytes], faults: Faults, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._faults = faults
        self._clock = clock
        self._open = 0
        self._cached: tuple[float, bytes] | None = None
        self._server: asyncio.Server | None = None

    async def start(self, where: Listen) -> str:
        """Listen, and return host:port. Raises KaliumError controller.listen."""
        try:
            self._server = await asyncio.start_server(self._serve, where.host, where.port, limit=HEAD_BYTES_MAX)
        except OSError as error:
            raise KaliumError(
                "controller.listen", f"cannot listen on {where.host}:{where.port} for metrics", error.strerror or str(error), "change `metrics`"
            ) from error
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    def close(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.close()

    def answer(self, method: str, path: str) -> tuple[int, str, bytes]:
        """Status, type and body."""
        if method not in ("GET", "HEAD"):
            return 405, TEXT, b"only GET and HEAD\n"
        if path == "/metrics":
            return 200, CONTENT_TYPE_LATEST, self._text()
        if path == "/healthz":  # that it is answered says that the loop turns
            return 200, TEXT, b"ok\n"
        if path == "/readyz":
            return self._readiness()
        return 404, TEXT, b"/metrics, /healthz or /readyz\n"

    def _text(self) -> bytes:
        now = self._clock()
        if self._cached is None or now - self._cached[0] >= CACHE_S:
            self._cached = now, self._metrics()
        return self._cached[1]

    def _readiness(self) -> tuple[int, str, bytes]:
        found = self._faults()
        is_ready = not any(found.values())
        document = {"ready": is_ready, "checks": {name: wrong or "ok" for name, wrong in found.items()}}
        return 200 if is_ready else 503, JSON, json.dumps(document).encode() + b"\n"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._open >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        self._open += 1
        try:
            # A peer that goes away, sends too slowly or does not read is not worth a line of the log.
            with suppress(OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
                await asyncio.wait_for(self._exchange(reader, writer), DEADLINE_S)
        finally:
            self._open -= 1
            writer.transport.abort()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        method, (status, kind, body) = "GET", (431, TEXT, b"the head is too long\n")
        with suppress(asyncio.LimitOverrunError):
            head = await reader.readuntil(b"\r\n\r\n")
            words = head.partition(b"\r\n")[0].decode("latin-1").split(" ")
            method = words[0]
            is_http = len(words) == 3 and words[2] in ("HTTP/1.0", "HTTP/1.1")
            status, kind, body = self.answer(method, words[1].partition("?")[0]) if is_http else (400, TEXT, b"no request of HTTP/1.1\n")
        lines = [f"HTTP/1.1 {status} {REASONS[status]}", f"Content-Type: {kind}", f"Content-Length: {len(body)}", "Connection: close"]
        if status == 405:
            lines.append("Allow: GET, HEAD")
        writer.write("\r\n".join([*lines, "", ""]).encode() + (b"" if method == "HEAD" else body))
        await writer.drain()
        writer.write_eof()
        # Closing with something unread would reset the connection, and the peer might lose the answer.
        while await reader.read(HEAD_BYTES_MAX):
            pass
