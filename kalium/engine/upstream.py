"""One HTTP/1.1 request on a connection of its own, and the whole answer.

Each request has a fresh connection: none can be stale, so none is ever sent twice, and an instance that serves one
connection at a time is never blocked by ours. Measured with uvloop, that costs as much as a kept connection of a general client.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from kalium.engine.deadline import within
from kalium.engine.limits import BODY_BYTES_MAX, CONNECT_SECONDS_MAX, HEAD_BYTES_MAX, HEAD_FIELDS_MAX

STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?: [^\r\n]*)?")
FIELD_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?")
LINE_BYTES_MAX = 8 << 10
BODILESS = frozenset({204, 304})


class UpstreamError(Exception):
    """There is no whole answer: the instance refused, closed, or said what is not HTTP."""


class UpstreamTimeout(UpstreamError):
    """The deadline passed before the answer was whole."""


@dataclass(frozen=True)
class Request:
    """A request; `fields` are sent as they are, and hold neither Host nor what frames the body."""

    method: str
    target: str
    fields: Sequence[tuple[str, str]]
    body: bytes

    def encode(self, host: str) -> bytes:
        """The bytes of the request. Names and values were checked by the server that received them, or are ours."""
        lines = [f"{self.method} {self.target} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in self.fields)]
        if self.body or self.method not in ("GET", "HEAD", "DELETE", "OPTIONS", "TRACE"):
            lines.append(f"Content-Length: {len(self.body)}")
        lines.append("Connection: close\r\n\r\n")
        return "\r\n".join(lines).encode("utf-8", "surrogateescape") + self.body


@dataclass(frozen=True)
class Answer:
    """A whole answer; the body is without its transfer coding."""

    status: int
    fields: tuple[tuple[str, str], ...]
    body: bytes

    def field(self, name: str) -> str | None:
        """The first value of a field, by its lower-case name."""
        return next((value for key, value in self.fields if key.lower() == name), None)


class Parser:
    """Takes an answer's bytes as they come. Strict: what two readers could read differently is an error, never a guess."""

    def __init__(self, method: str) -> None:
        self._method = method
        self._buffer = bytearray()
        self._body = bytearray()
        self._head: tuple[int, tuple[tuple[str, str], ...]] | None = None
        self._left: int | None = None  # bytes of the body or of the chunk still to come; None: until the connection ends
        self._is_chunked = False
        self._in_trailer = False
        self.answer: Answer | None = None

    def feed(self, data: bytes) -> None:
        """Take some bytes; `answer` is set when it is whole. Raises UpstreamError."""
        if self.answer is not None:
            return  # what follows a whole answer is nobody's
        self._buffer += data
        while self._head is None:
            if not self._take_head():
                return
        if self.answer is None:
            if self._is_chunked:
                self._take_chunks()
            else:
                self._take_body()

    def end(self) -> None:
        """The connection has ended. Raises UpstreamError when the answer is not whole."""
        if self.answer is not None:
            return
        if self._head is None:
            raise UpstreamError(
                "it closed the connection without an answer" if not self._buffer else "it closed the connection within the answer's head"
            )
        if self._is_chunked or self._left is not None:
            raise UpstreamError("it closed the connection within the answer's body")
        self._finish()

    def _take_head(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0 or end > HEAD_BYTES_MAX:
            if len(self._buffer) > HEAD_BYTES_MAX:
                raise UpstreamError(f"the head of its answer has more than {HEAD_BYTES_MAX} bytes")
            return False
        lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        first = STATUS_LINE.fullmatch(lines[0])
        if first is None:
            raise UpstreamError(f"its answer begins with {lines[0][:80]!r}, which is not HTTP/1.1")
        if len(lines) > HEAD_FIELDS_MAX:
            raise UpstreamError(f"the head of its answer has more than {HEAD_FIELDS_MAX} fields")
        status = int(first[2])
        if status < 200:  # an interim answer: the final one follows
            if status == 101:
                raise UpstreamError("it changed the protocol unasked")
            return bool(self._buffer)
        fields = tuple(_field(line) for line in lines[1:])
        self._head = status, fields
        self._frame(status, fields)
        return True

    def _frame(self, status: int, fields: Sequence[tuple[str, str]]) -> None:
        lengths = {value for name, value in fields if name.lower() == "content-length"}
        codings = [value.lower() for name, value in fields if name.lower() == "transfer-encoding"]
        if codings and (codings != ["chunked"] or lengths):
            raise UpstreamError("the length of its answer can be read in two ways")
        if len(lengths) > 1 or any(not length.isascii() or not length.isdigit() or len(length) > 15 for length in lengths):
            raise UpstreamError(f"the Content-Length of its answer is {', '.join(sorted(lengths))[:80]!r}")
        if self._method == "HEAD" or status in BODILESS:
            self._finish()
        elif codings:
            self._is_chunked, self._left = True, 0
        elif lengths:
            self._left = int(lengths.pop())
            self._bound(self._left)

    def _bound(self, size: int) -> None:
        if size > BODY_BYTES_MAX:
            raise UpstreamError(f"its answer has more than {BODY_BYTES_MAX} bytes")

    def _take_body(self) -> None:
        self._bound(len(self._buffer))
        if self._left is not None and len(self._buffer) >= self._left:
            self._body = self._buffer[: self._left]
            self._finish()

    def _take_chunks(self) -> None:
        while self.answer is None:
            if self._in_trailer:
                line = self._line()
                if line is None:
                    return
                if not line:
                    self._finish()
                continue
            assert self._left is not None, "a chunk has a length"
            if self._left:  # with the line end behind the chunk
                taken = self._buffer[: self._left]
                del self._buffer[: self._left]
                self._left -= len(taken)
                self._body += taken
                if self._left:
                    return
                if self._body[-2:] != b"\r\n":
                    raise UpstreamError("a chunk of its answer does not end where it says")
                del self._body[-2:]
            line = self._line()
            if line is None:
                return
            size = CHUNK_SIZE.fullmatch(line)
            if size is None:
                raise UpstreamError(f"a chunk of its answer begins with {line[:80]!r}")
            length = int(size[1], 16)
            self._bound(len(self._body) + length)
            self._in_trailer = length == 0
            self._left = length + 2 if length else 0

    def _line(self) -> bytes | None:
        end = self._buffer.find(b"\r\n")
        if end < 0 or end > LINE_BYTES_MAX:
            if len(self._buffer) > LINE_BYTES_MAX:
                raise UpstreamError(f"a line between the chunks of its answer has more than {LINE_BYTES_MAX} bytes")
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def _finish(self) -> None:
        assert self._head is not None, "the head comes first"
        if not self._is_chunked and self._left is None and self._method != "HEAD" and self._head[0] not in BODILESS:
            self._body = self._buffer
        self.answer = Answer(*self._head, bytes(self._body))


def _field(line: bytes) -> tuple[str, str]:
    name, colon, value = line.partition(b":")
    value = value.strip(b" \t")
    if not colon or not FIELD_NAME.fullmatch(name) or b"\r" in value or b"\n" in value or b"\0" in value:
        raise UpstreamError(f"the head of its answer holds {line[:80]!r}")
    return name.decode("ascii"), value.decode("utf-8", "surrogateescape")


class _Exchange(asyncio.Protocol):
    """Writes the request when the connection is there, and keeps what comes back."""

    def __init__(self, request: bytes, parser: Parser) -> None:
        self._request = request
        self._parser = parser
        self._transport: asyncio.Transport | None = None
        self.done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is one without saying so
        if self.done.done():  # too late: the breaker or the deadline was faster
            self._transport.abort()
        else:
            self._transport.write(self._request)

    def abandon(self) -> None:
        """End the connection, if there is one or will be: the answer is whole, or of no use."""
        if not self.done.done():
            self.done.cancel()
        elif not self.done.cancelled():
            self.done.exception()  # it may be that nobody waits for it any more
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed(data)
        except UpstreamError as error:
            self.fail(error)
        else:
            self._check()

    def eof_received(self) -> bool:
        self._end()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if exc is not None:
            self.fail(UpstreamError(f"the connection broke: {exc}"))
        else:
            self._end()

    def _end(self) -> None:
        if self.done.done():
            return
        try:
            self._parser.end()
        except UpstreamError as error:
            self.fail(error)
        else:
            self._check()

    def _check(self) -> None:
        if self._parser.answer is not None and not self.done.done():
            self.done.set_result(self._parser.answer)

    def fail(self, error: UpstreamError) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Breaker:
    """Ends exchanges with a peer that is known to be gone, now and from now on."""

    def __init__(self) -> None:
        self._reason = ""
        self._exchanges: set[_Exchange] = set()

    def trip(self, reason: str) -> None:
        self._reason = reason
        for exchange in self._exchanges:
            exchange.fail(UpstreamError(reason))

    def enter(self, exchange: _Exchange) -> None:
        self._exchanges.add(exchange)
        if self._reason:
            exchange.fail(UpstreamError(self._reason))

    def leave(self, exchange: _Exchange) -> None:
        self._exchanges.remove(exchange)


async def exchange(host: str, port: int, request: Request, breaker: Breaker, *, seconds_max: float) -> Answer:
    """Send `request` and return the whole answer. Raises UpstreamTimeout at the deadline, UpstreamError otherwise."""
    loop = asyncio.get_running_loop()
    protocol = _Exchange(request.encode(f"{host}:{port}"), Parser(request.method))
    deadline = loop.call_later(seconds_max, protocol.fail, UpstreamTimeout(f"no whole answer within {seconds_max:.0f} s"))
    breaker.enter(protocol)
    try:
        await within(min(CONNECT_SECONDS_MAX, seconds_max), loop.create_connection(lambda: protocol, host, port))
        return await protocol.done
    except asyncio.TimeoutError as error:
        raise UpstreamError("no connection to it within the time") from error
    except OSError as error:
        raise UpstreamError(f"no connection to it: {error.strerror or error}") from error
    finally:
        deadline.cancel()
        breaker.leave(protocol)
        protocol.abandon()
