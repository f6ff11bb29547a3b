"""Asynchronous calls: accepted at once, kept in the state folder, made by workers, their results posted to a callback.

At most once. A call is a file from before its 202 until an instance is held for it; then the file goes, and whatever happens after
that, the call is not made again. A gateway that is killed in between loses the calls that it had begun, and says how many.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from aiohttp import web

from kalium.engine import upstream
from kalium.engine.backend import Backend, Function, Observe
from kalium.engine.deployment import Refused
from kalium.engine.limits import (
    BODY_BYTES_MAX,
    CALL_WAIT_PAUSE_SECONDS,
    CALL_WAIT_SECONDS_MAX,
    CALLS_AT_ONCE,
    CALLS_AT_ONCE_OF_FUNCTION,
    CALLS_BYTES_MAX,
    CALLS_DRAIN_SECONDS_MAX,
    CALLS_MAX,
    RETRY_AFTER_SECONDS,
    TOKEN_BYTES_MAX,
)
from kalium.engine.log import LogLine
from kalium.engine.proxy import (
    CALLBACK_FIELD,
    CALLBACK_TOKEN_FIELD,
    SERVED_BY,
    TOKEN_FIELD,
    ExchangeFailed,
    Proxy,
    Seize,
    end_to_end,
    passed_on,
    read_body,
    split_target,
)
from kalium.engine.state import State, write_whole

ASYNC_PREFIX = "/async-function/"
# The one spelling of a callback: what functions call this gateway.
CALLBACK = re.compile(r"http://gateway:8080/function/([a-z0-9](?:[-a-z0-9]{0,61}[a-z0-9])?)")
BEGUN = ".begun"
PASSED_TO_CALLBACK = ("content-type", "content-encoding")  # of an answer; whatever else it says is its own

HEAD = ("id", "function", "app", "callback", "callback_token", "target")


@dataclass(frozen=True)
class Call:
    """One accepted call."""

    number: int  # in the order of acceptance, also over restarts
    id: str  # X-Call-Id
    function: str
    app: str  # of the function, when the call was accepted
    callback: str  # a function's name, or ""
    callback_token: str  # what the callback carries, or "": of the guard whose function made the call
    target: str
    fields: Sequence[tuple[str, str]]
    body: bytes

    def encode(self) -> bytes:
        """A line of JSON, then the body as it is."""
        head = {name: getattr(self, name) for name in HEAD}
        return json.dumps({**head, "fields": list(self.fields)}).encode("ascii") + b"\n" + self.body

    @staticmethod
    def decode(number: int, data: bytes) -> Call:
        """The opposite of `encode`. Raises ValueError, KeyError or TypeError."""
        line, _, body = data.partition(b"\n")
        head = json.loads(line)
        fields = [(str(name), str(value)) for name, value in head["fields"]]
        return Call(number=number, fields=fields, body=body, **{name: str(head[name]) for name in HEAD})


class Journal:
    """The calls that nobody has begun, one file each."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._folder = state.root / "calls"

    def load(self) -> tuple[list[Call], int, list[tuple[Path, str]]]:
        """What waits, how many calls had been begun when the last gateway ended without a word, and files that are no calls."""
        self._state.folder("calls")
        calls, begun, unreadable = [], 0, []
        for path in sorted(self._folder.iterdir()):
            if path.name.startswith("."):
                path.unlink()  # half written: nobody was told 202
            elif path.suffix == BEGUN:
                path.unlink()
                begun += 1
            else:
                try:
                    calls.append(Call.decode(int(path.name, 16), path.read_bytes()))
                except (OSError, ValueError, KeyError, TypeError) as error:
                    unreadable.append((path, f"{type(error).__name__}: {error}"))
        return calls, begun, unreadable

    def _path(self, call: Call) -> Path:
        return self._folder / f"{call.number:016x}"

    def keep(self, call: Call) -> None:
        """Have the call outlive this process."""
        write_whole(self._path(call), call.encode())
        self._sync()

    def begin(self, call: Call) -> None:
        """Have the next gateway not make this call. Without this having reached the disk nothing may be sent."""
        self._path(call).rename(self._path(call).with_suffix(BEGUN))
        self._sync()

    def forget(self, call: Call) -> None:
        """The call is over, begun or not."""
        for path in (self._path(call), self._path(call).with_suffix(BEGUN)):
            path.unlink(missing_ok=True)

    def _sync(self) -> None:
        handle = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Calls:
    """The queue of asynchronous calls and its workers."""

    def __init__(self, state: State, backend: Backend, proxy: Proxy, log: LogLine, observe: Observe) -> None:
        self._journal = Journal(state)
        self._backend = backend
        self._proxy = proxy
        self._log = log
        self._observe = observe
        self._waiting: dict[int, Call] = {}  # by number, and so oldest first
        self._bytes = 0  # of the bodies of calls that wait or are being written down
        self._count = 0
        self._running: Counter[str] = Counter()  # functions
        self._tasks: set[asyncio.Task[None]] = set()
        self._next = 1
        self._is_stopping = True  # until it has begun

    def begin(self) -> None:
        """Take up what the last gateway left."""
        calls, begun, unreadable = self._journal.load()
        if begun:
            self._log("call_lost", detail=f"{begun} calls had been begun when the last gateway ended, and are not made again")
        for path, reason in unreadable:
            self._log("call_unreadable", path=str(path), detail=reason)
        self._is_stopping = False
        for call in calls:
            self._count += 1
            self._bytes += len(call.body)
            self._next = max(self._next, call.number + 1)
            self._waiting[call.number] = call
        self._dispatch()

    async def stop(self) -> None:
        """Accept and begin nothing more; give what was begun some time to end. What was not begun is for the next gateway."""
        self._is_stopping = True
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=CALLS_DRAIN_SECONDS_MAX)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    # Accepting

    async def accept(self, request: web.BaseRequest) -> web.Response:
        """Answer `/async-function/...`: 202, and the call will be made once. Raises Refused."""
        accepted = str(time.time_ns())
        if request.method != "POST":
            return web.Response(status=405, text=f"{request.method} is not for asynchronous calls", headers={"Allow": "POST"})
        name, target = split_target(request.raw_path, ASYNC_PREFIX)
        function = self._backend.get(name)
        callback = self._callback(function, request.headers.getall(CALLBACK_FIELD, []))
        callback_token = self._callback_token(callback, request.headers.getall(CALLBACK_TOKEN_FIELD, []))
        if self._is_stopping:
            raise Refused(503, "the gateway is stopping")
        size = request.content_length or 0
        if self._count >= CALLS_MAX or self._bytes + size > CALLS_BYTES_MAX:
            return web.Response(status=503, text=f"{self._count} calls wait already", headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
        self._count += 1
        held = 0
        try:
            body = await read_body(request, BODY_BYTES_MAX)
            held = len(body)
            self._bytes += held
            call_id = request.headers.get("X-Call-Id") or str(uuid.uuid4())
            call = Call(
                self._next, call_id, name, function.deployment.app, callback, callback_token, target, passed_on(request, call_id, accepted), body
            )
            self._next += 1
            await asyncio.to_thread(self._journal.keep, call)
        except BaseException:
            self._count -= 1
            self._bytes -= held
            raise
        self._waiting[call.number] = call
        self._dispatch()
        fields = {"X-Call-Id": call_id, "X-Start-Time": accepted, "X-Served-By": SERVED_BY}
        return web.Response(status=202, headers=fields)

    def _callback(self, function: Function, values: Sequence[str]) -> str:
        """The function that gets the result. Raises Refused for everything but the one spelling of a function of the same app."""
        if not values:
            return ""
        match = CALLBACK.fullmatch(values[0]) if len(values) == 1 else None
        if match is None:
            raise Refused(400, f"{CALLBACK_FIELD} has one spelling: http://gateway:8080/function/NAME")
        reason = self._why_no_callback(function.deployment.app, match[1])
        if reason:
            raise Refused(400, reason)
        return match[1]

    @staticmethod
    def _callback_token(callback: str, values: Sequence[str]) -> str:
        """What the callback has to carry. Raises Refused for two of them, and for one without a callback."""
        if not values:
            return ""
        if len(values) > 1 or not callback or not 0 < len(values[0]) <= TOKEN_BYTES_MAX:
            raise Refused(400, f"{CALLBACK_TOKEN_FIELD} is one token for one callback")
        return values[0]

    def _why_no_callback(self, app: str, name: str) -> str:
        """Functions without an app are of one app in this."""
        callback = self._backend.find(name)
        if callback is None:
            return f"there is no function {name} to call back"
        if callback.deployment.app != app:
            return f"{name} is of another app than what it would be called back for"
        return ""

    # Making

    def _dispatch(self) -> None:
        """Begin the oldest calls there is room for; a function that is slow holds up its own alone."""
        if self._is_stopping:
            return
        for call in list(self._waiting.values()):
            if sum(self._running.values()) >= CALLS_AT_ONCE:
                return
            if self._running[call.function] < CALLS_AT_ONCE_OF_FUNCTION:
                del self._waiting[call.number]
                self._running[call.function] += 1
                task = asyncio.get_running_loop().create_task(self._make(call))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                task.add_done_callback(self._observe)

    async def _make(self, call: Call) -> None:
        making = _Making(call, self._journal)
        try:
            outcome = await self._outcome(making)
            if call.callback:
                await self._call_back(call, outcome)
            self._journal.forget(call)
        except _Stopped:
            pass  # nobody has seen it: the next gateway makes it
        except asyncio.CancelledError:
            if making.has_begun:
                self._log("call_lost", function=call.function, call=call.id[:64], detail="the gateway was stopped before its result was delivered")
                self._journal.forget(call)
            raise
        finally:
            self._running[call.function] -= 1
            if not self._running[call.function]:
                del self._running[call.function]
            self._count -= 1
            self._bytes -= len(call.body)
        self._dispatch()

    async def _outcome(self, making: _Making) -> _Outcome:
        """What the function answered, or what a client would have been told. Raises _Stopped when it was not begun."""
        call = making.call

        def request() -> upstream.Request:
            # As OpenFaaS does it: when the call was accepted, and when it is made.
            return upstream.Request("POST", call.target, [*call.fields, ("X-Start-Time", str(time.time_ns()))], call.body)

        try:
            answer, seconds = await self._patiently(call, call.function, request, making.seize)
        except (Refused, ExchangeFailed) as failed:
            self._log("call_failed", function=call.function, call=call.id[:64], status=failed.status, detail=failed.text)
            return _Outcome(failed.status, (("Content-Type", "text/plain; charset=utf-8"),), failed.text.encode("utf-8"), 0.0)
        except OSError as error:
            reason = f"the gateway cannot write down that it begins the call: {error}"
            self._log("call_failed", function=call.function, call=call.id[:64], status=500, detail=reason)
            return _Outcome(500, (("Content-Type", "text/plain; charset=utf-8"),), reason.encode("utf-8"), 0.0)
        kept = tuple((name, value) for name, value in end_to_end(answer.fields, frozenset()) if name.lower() in PASSED_TO_CALLBACK)
        return _Outcome(answer.status, kept, answer.body, seconds)

    async def _patiently(self, call: Call, name: str, request: Callable[[], upstream.Request], seize: Seize | None) -> tuple[upstream.Answer, float]:
        """An exchange with a function that may have no instance yet, as after a restart. Raises Refused, ExchangeFailed or _Stopped."""
        deadline = time.monotonic() + CALL_WAIT_SECONDS_MAX
        is_counted = False
        while True:
            try:
                function = self._backend.get(name)
                function.invocations += not is_counted
                is_counted = True
                return await self._proxy.exchange(function, request(), partial(_begin, call, function, seize))
            except (Refused, ExchangeFailed) as failed:
                is_early = failed.status == 503 and (isinstance(failed, Refused) or failed.is_early)
                if not is_early or time.monotonic() > deadline:
                    raise
            if self._is_stopping and seize is not None:
                raise _Stopped
            await asyncio.sleep(CALL_WAIT_PAUSE_SECONDS)

    async def _call_back(self, call: Call, outcome: _Outcome) -> None:
        """Post a result. It carries nothing of the function's but what it is a result of, and of the caller's guard the token."""

        def request() -> upstream.Request:
            fields = [
                *outcome.fields,
                ("X-Call-Id", call.id),
                ("X-Start-Time", str(time.time_ns())),
                ("X-Forwarded-For", "127.0.0.1"),
                ("X-Forwarded-Host", "gateway:8080"),
                ("X-Function-Name", call.function),
                ("X-Function-Status", str(outcome.status)),
                ("X-Duration-Seconds", f"{outcome.seconds:.6f}"),
            ]
            if call.callback_token:
                fields.append((TOKEN_FIELD, call.callback_token))
            return upstream.Request("POST", "/", fields, outcome.body)

        reason, status = self._why_no_callback(call.app, call.callback), 0
        if not reason:
            try:
                answer, _ = await self._patiently(call, call.callback, request, None)
                status = answer.status
                reason = f"it answered {status}" if status >= 400 else ""
            except (Refused, ExchangeFailed) as failed:
                reason, status = failed.text, failed.status
        if reason:
            self._log("callback_failed", function=call.callback, call=call.id[:64], status=status, detail=reason)


async def _begin(call: Call, function: Function, seize: Seize | None) -> None:
    """An instance is held. Whoever waited for it may find another app's under the name. Raises Refused."""
    if function.deployment.app != call.app:
        raise Refused(409, f"{function.deployment.name} is of another app by now than when the call was accepted")
    if seize is not None:
        await seize()


class _Stopped(Exception):
    """The gateway ends, and nobody has seen the call."""


class _Making:
    """Whether a call has been begun."""

    def __init__(self, call: Call, journal: Journal) -> None:
        self.call = call
        self.has_begun = False
        self._journal = journal

    async def seize(self) -> None:
        """An instance is held for it: from here on it is not made again."""
        await asyncio.to_thread(self._journal.begin, self.call)
        self.has_begun = True


@dataclass(frozen=True)
class _Outcome:
    """What the callback is told."""

    status: int
    fields: Sequence[tuple[str, str]]
    body: bytes
    seconds: float
