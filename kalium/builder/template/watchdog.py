"""A small HTTP server in front of one handler: what OpenFaaS calls a watchdog, in the function's own process.

`handle(event)` of handler.py gets each request except probes of the health path. What it returns becomes the answer: text
and bytes as they are, anything else as JSON. Nothing here depends on anything outside the standard library.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

HEALTH_PATH = "/_/health"
PORT = 8080
BODY_BYTES_MAX = 1 << 20
CONNECTIONS_MAX = 64  # each has a thread; further ones are closed at once
IDLE_SECONDS_MAX = 300.0  # longer than a gateway keeps an idle connection, so that it is the gateway that closes it
DRAIN_SECONDS_MAX = 10.0


class Event(NamedTuple):
    """One request. `body` is the parsed JSON where it is JSON, else text, else bytes; None where there is none."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Message[str, str]  # read like a mapping; names in any case
    body: Any


class Failure(Exception):
    """Raised by a handler to answer `status` with `text`; any other exception is answered by 500."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


Handler = Callable[[Event], object]


def body_of(payload: bytes, content_type: str) -> Any:
    """The body as a handler sees it. Raises Failure where it is announced as JSON and is none."""
    if not payload:
        return None
    media_type = content_type.partition(";")[0].strip().lower()
    if not media_type.startswith("text/"):
        # Clients often forget the header, so JSON is recognised without it.
        try:
            return json.loads(payload)
        except ValueError as error:
            if media_type == "application/json":
                raise Failure(400, f"the body is no JSON: {error}") from error
    try:
        return payload.decode()
    except UnicodeDecodeError:
        return payload


def payload_of(result: object) -> tuple[str, bytes]:
    """Content type and bytes of a handler's result."""
    if isinstance(result, bytes):
        return "application/octet-stream", result
    if isinstance(result, str):
        return "text/plain; charset=utf-8", result.encode()
    return "application/json", json.dumps(result, ensure_ascii=False, separators=(",", ":")).encode()


class Server(ThreadingHTTPServer):
    """Listens for requests of one handler. `serve` returns when the process is told to stop and open requests are answered."""

    daemon_threads = True  # idle connections must not keep the process alive; requests are waited for by `drain`
    request_queue_size = 128
    timeout = 0

    def __init__(self, handler: Handler, address: tuple[str, int]) -> None:
        self.handler = handler
        self.is_stopping = False
        self._connections = threading.BoundedSemaphore(CONNECTIONS_MAX)
        self._requests = 0
        self._settled = threading.Condition()
        super().__init__(address, _Connection)

    def server_bind(self) -> None:
        """Bind without asking a name server for this host's name, as the base class does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a new connection in its own thread, or close it when there are too many."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Count the connection out when it has ended."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of this program; anything else is shown whole."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def begin(self) -> None:
        """Count a request in."""
        with self._settled:
            self._requests += 1

    def end(self) -> None:
        """Count a request out."""
        with self._settled:
            self._requests -= 1
            self._settled.notify_all()

    def drain(self, seconds_max: float) -> bool:
        """Wait until every request has its answer; False when some have none in time."""
        with self._settled:
            return self._settled.wait_for(lambda: self._requests == 0, seconds_max)

    def serve(self, stop: int) -> bool:
        """Accept connections until descriptor `stop` has a byte; then as `drain`."""
        poll = select.poll()
        poll.register(stop, select.POLLIN)
        poll.register(self.fileno(), select.POLLIN)
        while stop not in (ready := [descriptor for descriptor, _ in poll.poll()]):
            assert ready, "poll without a timeout returns something"
            self.handle_request()
        self.is_stopping = True
        self.server_close()
        return self.drain(DRAIN_SECONDS_MAX)


class _Connection(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    default_request_version = "HTTP/1.0"  # of an unreadable request: the answer has a head all the same
    server_version = "watchdog"
    error_content_type = "application/json"
    error_message_format = '{"error":"HTTP %(code)d"}'
    disable_nagle_algorithm = True
    wbufsize = -1  # head and body of an answer leave in one piece
    timeout = IDLE_SECONDS_MAX

    def answer(self) -> None:
        """Read one request and answer it."""
        self.server.begin()
        try:
            self._answer()
            self.wfile.flush()
        finally:
            self.server.end()

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815  the base class finds them by these names

    def _answer(self) -> None:
        begin = time.monotonic()
        try:
            payload = self._payload()
            if self.command == "GET" and self.path == HEALTH_PATH:
                status, content_type, answer = 200, *payload_of("OK")
            else:
                parts = urlsplit(self.path)
                body = body_of(payload, self.headers.get("Content-Type", ""))
                event = Event(self.command, parts.path, parse_qs(parts.query, keep_blank_values=True), self.headers, body)
                status, content_type, answer = 200, *payload_of(self.server.handler(event))
        except Failure as failure:
            status, content_type, answer = failure.status, *payload_of({"error": str(failure)})
        except Exception as error:  # noqa: BLE001  a handler's error is the answer to its request and ends nothing else
            traceback.print_exc()
            status, content_type, answer = 500, *payload_of({"error": f"{type(error).__name__}: {error}"})
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(answer)))
        self.send_header("X-Duration-Seconds", f"{time.monotonic() - begin:.6f}")
        if self.server.is_stopping or self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(answer)

    def _payload(self) -> bytes:
        text = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not (text.isascii() and text.isdigit()):
            self.close_connection = True  # where the body ends is not known
            raise Failure(411, "the body's length is not given")
        if int(text) > BODY_BYTES_MAX:
            self.close_connection = True  # the body stays unread
            raise Failure(413, f"the body has {text} bytes, at most {BODY_BYTES_MAX} are taken")
        payload = self.rfile.read(int(text))
        if len(payload) < int(text):
            self.close_connection = True
            raise Failure(400, "the body ends early")
        return payload

    def version_string(self) -> str:
        """Name the program only."""
        return self.server_version

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the base class names it so
        """Say nothing per request: what an experiment measures is not the console."""


def run(handler: Handler) -> int:
    """Serve `handler` on $PORT (default 8080) until SIGTERM or SIGINT. Returns 0, or 1 when requests stayed unanswered."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # the byte in the pipe says it; the first process has no default action
    server = Server(handler, ("0.0.0.0", int(os.environ.get("PORT", PORT))))  # noqa: S104  a sandbox has one address
    return 0 if server.serve(told) else 1
