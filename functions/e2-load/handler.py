"""A load: one request over and over, its bytes handed to the kernel by the system call that the input names.

Python's own clients choose the call themselves, so requests are written by hand here, and TLS is done in memory (`ssl.MemoryBIO`): what it
has sealed is sent by `os.write`, by `socket.send` (sendto(2) on Linux) or by `socket.sendmsg`, the bytes of the handshake too.
"""

from __future__ import annotations

import os
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any
from urllib.parse import SplitResult, urlsplit

from watchdog import Event, Failure

COUNT_MAX = 256  # messages of one invocation, by the policy
HEAD_BYTES_MAX = 16 * 1024
SECONDS_MAX = 30
READ_BYTES = 64 * 1024
BODY = b"{}"  # of an invoke

SENDS: dict[str, Callable[[socket.socket, bytes], int]] = {
    "write": lambda connection, data: os.write(connection.fileno(), data),
    "sendto": lambda connection, data: connection.send(data),
    "sendmsg": lambda connection, data: connection.sendmsg([data]),
}

# Loading the machine's authorities takes longer than a request, so the settings are made once. As in the benchmark, nobody
# looks at the certificate.
SETTINGS = ssl.create_default_context()
SETTINGS.check_hostname = False
SETTINGS.verify_mode = ssl.CERT_NONE


class Clear:
    """A connection without TLS. Its descriptor blocks, because `os.write` knows no timeout of Python's; the kernel keeps the time."""

    tls = ""

    def __init__(self, parts: SplitResult, call: str) -> None:
        self._socket = socket.create_connection((parts.hostname or "", parts.port or 80), timeout=SECONDS_MAX)
        self._socket.settimeout(None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._socket.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", SECONDS_MAX, 0))
        self._send = SENDS[call]

    def send(self, data: bytes) -> None:
        """Send all of `data` by one system call: what a second one costs would belong to no message."""
        sent = self._send(self._socket, data)
        if sent != len(data):
            raise Failure(502, f"{sent} of {len(data)} bytes were sent")

    def receive(self) -> bytes:
        """Some bytes; none at the end."""
        return self._socket.recv(READ_BYTES)

    def close(self) -> None:
        """Give the descriptor back."""
        self._socket.close()


class Sealed(Clear):
    """A connection under TLS."""

    def __init__(self, parts: SplitResult, call: str) -> None:
        super().__init__(parts, call)
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._session = SETTINGS.wrap_bio(self._incoming, self._outgoing, server_hostname=parts.hostname)
        self._step(self._session.do_handshake)
        self.tls = self._session.version() or ""

    def send(self, data: bytes) -> None:
        """Seal `data` into one record and send that."""
        self._session.write(data)
        self._flush()

    def receive(self) -> bytes:
        """Some bytes of plaintext; none at the end."""
        data: bytes = self._step(lambda: self._session.read(READ_BYTES))
        return data

    def _flush(self) -> None:
        if self._outgoing.pending:
            super().send(self._outgoing.read())

    def _step(self, step: Callable[[], Any]) -> Any:
        """What `step` of TLS returns, once it has all the bytes that it asks for."""
        while True:
            try:
                done = step()
            except ssl.SSLWantReadError:
                self._flush()
                self._incoming.write(super().receive() or self._end())
            else:
                self._flush()
                return done

    @staticmethod
    def _end() -> bytes:
        raise Failure(502, "the server ended the connection")


class Answers:
    """The answers on one connection, which state their lengths."""

    def __init__(self, connection: Clear) -> None:
        self._connection = connection
        self._held = b""

    def next(self) -> tuple[int, bool]:
        """The length of the next answer's body, and whether the connection ends behind it. Raises Failure unless it is a 200."""
        while b"\r\n\r\n" not in self._held:
            self._read()
        head, _, self._held = self._held.partition(b"\r\n\r\n")
        status_line, *lines = head.decode("latin-1").split("\r\n")
        if status_line.split(" ")[1:2] != ["200"]:
            raise Failure(502, f"the answer is {status_line!r}")
        fields = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(fields["content-length"])
        missing = length - len(self._held)
        while missing > 0:
            self._held = b""
            self._read()
            missing -= len(self._held)
        self._held = self._held[len(self._held) + missing :]
        return length, fields.get("connection", "").lower() == "close"

    def _read(self) -> None:
        data = self._connection.receive()
        if not data:
            raise Failure(502, "the connection ended before the answer")
        self._held += data


def request(method: str, parts: SplitResult, size: int, body: bytes) -> bytes:
    """A request whose head has exactly `size` bytes."""
    length = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    begin = f"{method} {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{length}X-Filling: "
    filling = size - len(begin) - len("\r\n\r\n")
    if filling < 1:
        raise Failure(400, f"a head of {size} bytes is too small")
    return f"{begin}{'x' * filling}\r\n\r\n".encode("ascii") + body


def number(body: dict[str, Any], name: str, most: int) -> int:
    """The number `name` of the input, from 1 to `most`."""
    value = body.get(name)
    if type(value) is not int or not 1 <= value <= most:
        raise Failure(400, f"`{name}` is no number from 1 to {most}")
    return value


def handle(event: Event) -> Any:
    """Send `count` equal requests with heads of `bytes` by `call`, on one connection, or each on its own where `fresh` is true.

    `workload` is `https-get` (GET of `url`) or `invoke` (POST to `url` in clear). The answer counts requests, connections and the bytes of
    the answers; a request that fails makes it 502.
    """
    body = event.body
    if not isinstance(body, dict) or body.get("call") not in SENDS or body.get("workload") not in ("https-get", "invoke"):
        raise Failure(400, "the body has no `call` (write, sendto, sendmsg) or no `workload` (https-get, invoke)")
    parts = urlsplit(str(body.get("url")))
    count, size = number(body, "count", COUNT_MAX), number(body, "bytes", HEAD_BYTES_MAX)
    is_get = body["workload"] == "https-get"
    message = request("GET" if is_get else "POST", parts, size, b"" if is_get else BODY)
    done: dict[str, Any] = {"sent": 0, "connections": 0, "answer_bytes": 0, "tls": ""}
    connection: Clear | None = None
    try:
        for _ in range(count):
            if connection is None:
                connection = (Sealed if is_get else Clear)(parts, body["call"])
                answers = Answers(connection)
                done["connections"] += 1
                done["tls"] = connection.tls
            connection.send(message)
            length, ends = answers.next()
            done["sent"] += 1
            done["answer_bytes"] += length
            if ends or body.get("fresh"):
                connection.close()
                connection = None
    except OSError as error:
        raise Failure(502, f"request {done['sent'] + 1} of {count}: {type(error).__name__}: {error}") from error
    finally:
        if connection is not None:
            connection.close()
    return done
