"""The data path: one invocation from the client's request to the function's answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator

from aiohttp import web
from multidict import CIMultiDict

from kalium import __version__
from kalium.engine import upstream
from kalium.engine.backend import Backend, Function
from kalium.engine.deployment import NAMESPACE, Refused
from kalium.engine.limits import BODY_BYTES_MAX, INVOCATION_SECONDS_MAX, RETRY_AFTER_SECONDS
from kalium.engine.log import LogLine
from kalium.engine.slots import Busy, NoInstance

PREFIX = "/function/"
SERVED_BY = f"kalium-engine/{__version__}"

# RFC 9110, 7.6.1: fields that concern one connection, and are not passed on.
HOP_BY_HOP = frozenset(
    "connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding upgrade".split()  # noqa: SIM905
)
FRAMING = frozenset({"content-length", "expect", "host"})  # written anew
CALLBACK_FIELD = "X-Callback-Url"
TOKEN_FIELD = "X-Kalium-Token"  # of a request; the guard of the function judges it
CALLBACK_TOKEN_FIELD = "X-Kalium-Callback-Token"  # what the callback has to carry as its own; only this gateway sees it
# A callback is this gateway's to make and nobody else's to read.
OURS_UP = frozenset({"x-call-id", "x-start-time", "x-forwarded-for", "x-forwarded-host", "x-callback-url", "x-kalium-callback-token"})
OURS_DOWN = frozenset({"x-start-time", "x-served-by"})


class ExchangeFailed(Exception):
    """There is no answer of an instance: the status and the text that the client gets instead, and the detail for our log."""

    def __init__(self, status: int, text: str, detail: str, *, is_early: bool = False, is_busy: bool = False) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.detail = detail
        self.is_early = is_early  # no instance was held: nobody has seen the request
        self.is_busy = is_busy


def split_target(target: str, prefix: str) -> tuple[str, str]:
    """The function's name in `PREFIX NAME[.openfaas-fn][/PATH][?QUERY]`, and what it is asked for. Nothing is unescaped."""
    rest = target[len(prefix) :]
    end = min((index for index in (rest.find("/"), rest.find("?")) if index >= 0), default=len(rest))
    name, tail = rest[:end], rest[end:]
    return name.removesuffix("." + NAMESPACE), tail if tail.startswith("/") else "/" + tail


def end_to_end(fields: Iterable[tuple[str, str]], without: frozenset[str]) -> Iterator[tuple[str, str]]:
    """The fields that are passed on: neither `without`, nor of one connection, nor named by Connection."""
    fields = list(fields)
    dropped = set(HOP_BY_HOP | without)
    for name, value in fields:
        if name.lower() == "connection":
            dropped.update(token.strip().lower() for token in value.split(","))
    return ((name, value) for name, value in fields if name.lower() not in dropped)


async def read_body(request: web.BaseRequest, bytes_max: int) -> bytes:
    """The request's whole body. Raises Refused beyond `bytes_max`."""
    if (request.content_length or 0) > bytes_max:
        raise Refused(413, f"the body has more than {bytes_max} bytes")
    if not request.body_exists:
        return b""
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > bytes_max:
            raise Refused(413, f"the body has more than {bytes_max} bytes")
    return bytes(body)


Seize = Callable[[], Awaitable[None]]


class Proxy:
    """Passes requests on to free instances, and their answers back."""

    def __init__(self, backend: Backend, log: LogLine) -> None:
        self._backend = backend
        self._log = log

    async def invoke(self, request: web.BaseRequest) -> web.Response:
        """Answer `/function/...`. Raises Refused."""
        start = str(time.time_ns())
        name, target = split_target(request.raw_path, PREFIX)
        function = self._backend.get(name)
        if CALLBACK_FIELD in request.headers:
            raise Refused(400, f"{CALLBACK_FIELD} is for asynchronous calls: use /async-function/{name}")
        body = await read_body(request, BODY_BYTES_MAX)
        own = [("X-Start-Time", start), ("X-Served-By", SERVED_BY)]
        call = request.headers.get("X-Call-Id")
        if not call:
            call = str(uuid.uuid4())
            own.append(("X-Call-Id", call))
        function.invocations += 1
        sent = upstream.Request(request.method, target, passed_on(request, call, start), body)
        try:
            answer, seconds = await self.exchange(function, sent)
        except ExchangeFailed as failed:
            if failed.status >= 502 and not failed.is_early:
                self._log("invocation_failed", function=name, call=call[:64], status=failed.status, detail=failed.detail)
            retry = [("Retry-After", str(RETRY_AFTER_SECONDS))] if failed.is_busy else []
            return web.Response(status=failed.status, text=failed.text, headers=CIMultiDict([*own, *retry]))
        if answer.field("x-duration-seconds") is None:  # a watchdog's own is the better one
            own.append(("X-Duration-Seconds", f"{seconds:.6f}"))
        return _passed_back(request.method, answer, own)

    async def exchange(self, function: Function, request: upstream.Request, seize: Seize | None = None) -> tuple[upstream.Answer, float]:
        """An instance's whole answer and how long it took. A request that a function may have seen is never sent again.

        A guard that answers `retired` has not let it in, so it goes to another instance then; once, or a program that says so
        itself would have its request for ever. `seize` is awaited once an instance is held and before it sees anything.
        Raises ExchangeFailed.
        """
        name = function.deployment.name
        try:
            answer, seconds, was_let_in = await self._exchange(function, request, seize)
            if not was_let_in:
                answer, seconds, _ = await self._exchange(function, request, None)
        except NoInstance as error:
            raise ExchangeFailed(503, f"No endpoints available for: {name}.", "there is no ready instance", is_early=True) from error
        except Busy as error:
            raise ExchangeFailed(503, f"{name} is busy: {error}", str(error), is_early=True, is_busy=True) from error
        except upstream.UpstreamTimeout as error:
            raise ExchangeFailed(504, f"{name} did not answer: {error}", str(error)) from error
        except upstream.UpstreamError as error:
            raise ExchangeFailed(502, f"{name} did not answer: {error}", str(error)) from error
        return answer, seconds

    async def _exchange(self, function: Function, request: upstream.Request, seize: Seize | None) -> tuple[upstream.Answer, float, bool]:
        """An instance's answer, how long it took, and whether the instance's guard let the request in."""
        instance = await function.slots.take()
        try:
            if seize is not None:
                await seize()
            begin = time.perf_counter()
            answer = await upstream.exchange(instance.host(), self._backend.port, request, instance.breaker, seconds_max=INVOCATION_SECONDS_MAX)
            seconds = time.perf_counter() - begin
            is_retired = instance.retires(answer)
            if is_retired:
                function.slots.suspend(instance)  # requests wait for the one that takes its place
            return answer, seconds, not is_retired
        except upstream.UpstreamError:
            # It gets no further request before it answers its health path again.
            (function.slots.withdraw if instance.has_ended else function.slots.suspend)(instance)
            instance.alarm.set()
            raise
        finally:
            function.slots.give_back(instance)


def passed_on(request: web.BaseRequest, call: str, start: str) -> list[tuple[str, str]]:
    """The fields that a function gets of a client's request."""
    headers = request.headers
    return [
        *end_to_end(headers.items(), OURS_UP | FRAMING),
        ("X-Call-Id", call),
        ("X-Start-Time", start),
        ("X-Forwarded-For", headers.get("X-Forwarded-For") or request.remote or ""),
        ("X-Forwarded-Host", headers.get("X-Forwarded-Host") or request.host),
    ]


def _passed_back(method: str, answer: upstream.Answer, own: list[tuple[str, str]]) -> web.Response:
    """The function's answer with our fields in place of its own of the same names."""
    dropped = OURS_DOWN | {name.lower() for name, _ in own} | (frozenset() if method == "HEAD" else {"content-length"})
    fields = CIMultiDict([*end_to_end(answer.fields, dropped), *own])
    return web.Response(status=answer.status, body=answer.body, headers=fields)
