"""A connection to Redis or Valkey that comes back by itself: commands in pipelines, one write for all of a turn of the loop.

hiredis reads and writes the protocol; what is here is when to send, what a loss means, and whether what the server holds may be
used at all (`_fence`). A command is answered exactly once: by its reply, or by `Away`.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import random
import re
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis
import msgspec

from kalium.controller.config import Store, TlsFiles
from kalium.controller.log import LogLine

Argument = str | int | float | bytes
INFLIGHT_MAX = 16384  # commands without a reply; beyond it a command is refused at once
STALL_S = 1.0  # without a reply while one is waited for: the server hangs, or the network is cut
CONNECT_S = 2.0
BACKOFF_S = (0.05, 1.0)  # the first wait before another try, and the longest
REPLY_BYTES_MAX = 64 * 1024 * 1024

# Replies by which the server says that it is not there for us now. Whatever else goes wrong is our own fault or damaged data.
_AWAY = frozenset(
    {"LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "MISCONF", "NOREPLICAS", "TRYAGAIN", "MOVED", "ASK", "NOAUTH", "NOPERM", "WRONGPASS", "BUSY"}
)
_IN_SCRIPT = re.compile(r"@user_script: ?\d+: -([A-Z]+) ")  # how Redis 6 says which error a script met
_NO_PROMOTION = b"0" * 40


class Away(Exception):
    """No reply: there is no connection, or it was lost before the reply. What became of the command is unknown."""


class Refused(Exception):
    """The server replied that it did not do it; `is_full`: because it has no memory left."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        within = _IN_SCRIPT.search(text)
        code = within.group(1) if within is not None else text.partition(" ")[0]
        self.is_full = code == "OOM"
        self.is_away = code in _AWAY
        self.is_other_server = code in ("READONLY", "MASTERDOWN", "LOADING", "NOAUTH")  # not the one that was greeted


Reply = Any  # what the server said, or an Away or Refused
Then = Callable[[Reply], None]


class Script:
    """The one script of the store, which does each step atomically."""

    def __init__(self) -> None:
        self.text = importlib.resources.files("kalium.controller").joinpath("redis_calls.lua").read_bytes()
        self.sha = b""


class _Wire(asyncio.Protocol):
    """One connection. Replies come in the order of the commands."""

    def __init__(self, replied: Callable[[], None]) -> None:
        self.transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.waiting: deque[Then] = deque()
        self.heard_s = 0.0
        self._replied = replied
        self._reader = hiredis.Reader(replyError=Refused)
        self._loop = asyncio.get_running_loop()
        self._out: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self, command: Sequence[Argument], then: Then) -> None:
        """Queue a command for the write at the end of this turn of the loop."""
        if self.lost.done():  # and nobody has noticed yet: what waits now would wait for ever
            then(Away(self.lost.result()))
            return
        if not self.waiting:
            self.heard_s = self._loop.time()
        self.waiting.append(then)
        if not self._out:
            self._loop.call_soon(self._write)
        self._out.append(hiredis.pack_command(tuple(command)))  # type: ignore[arg-type]  # its stub has the tuple of one word

    def _write(self) -> None:
        out, self._out = self._out, []
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(b"".join(out))

    def data_received(self, data: bytes) -> None:
        self.heard_s = self._loop.time()
        reader = self._reader
        reader.feed(data)
        try:
            while self.waiting:
                reply = reader.gets()
                if reply is False:
                    break
                self.waiting.popleft()(reply)
        except hiredis.ProtocolError as error:
            self.cut(f"no answer of Redis: {error}")
        if reader.len() > REPLY_BYTES_MAX or (not self.waiting and reader.has_data()):
            self.cut("replies that nobody had asked for")
        self._replied()

    def connection_lost(self, exc: Exception | None) -> None:
        self.cut(str(exc) if exc is not None else "it closed the connection")

    def cut(self, why: str) -> None:
        """The connection is over, and so is what waits for a reply."""
        if self.lost.done():
            return
        self.lost.set_result(why)
        if self.transport is not None:
            self.transport.abort()
        while self.waiting:
            self.waiting.popleft()(Away(why))
        self._replied()

    def is_stalled(self) -> bool:
        return bool(self.waiting) and self._loop.time() - self.heard_s > STALL_S


class Link:
    """The store's server. `run` keeps a connection as well as it can; `send` is refused while there is none."""

    def __init__(self, store: Store, files: TlsFiles, *, log: LogLine) -> None:
        self.script = Script()
        self.replied: Callable[[], None] = lambda: None  # called behind each portion of replies
        self.joined: Callable[[], None] = lambda: None  # called when a connection is ready
        self.connected = asyncio.Event()
        self._store = store
        self._files = files
        self._log = log
        self._wire: _Wire | None = None
        self._is_away_said = False
        self.prefix = store.prefix
        self.site = f"{store.prefix}{{site}}:"  # keys of the site as a whole

    @property
    def is_up(self) -> bool:
        """Whether steps can be taken now."""
        return self._wire is not None

    def run_script(self, base: str, operation: str, arguments: bytes, then: Then) -> None:
        """Run `operation` of the script on the keys that begin with `base`."""
        wire = self._wire
        if wire is None:
            then(Away("the store is away"))
        elif len(wire.waiting) >= INFLIGHT_MAX:
            then(Refused(f"OOM {INFLIGHT_MAX} commands wait for a reply"))
        else:

            def judge(reply: Reply) -> None:
                if isinstance(reply, Refused) and str(reply).startswith("NOSCRIPT") and self._wire is wire:
                    # Somebody has flushed its scripts. What the script would have done was not done.
                    wire.send(("SCRIPT", "LOAD", self.script.text), lambda _: None)
                    wire.send(command, then)
                    return
                then(reply)
                if isinstance(reply, Refused) and reply.is_other_server:
                    wire.cut(str(reply))

            command = ("EVALSHA", self.script.sha, 1, base, operation, arguments)
            wire.send(command, judge)

    def send(self, command: Sequence[Argument], then: Then) -> None:
        """Send a command of Redis's own."""
        if self._wire is None:
            then(Away("the store is away"))
        else:
            self._wire.send(command, then)

    async def run(self) -> None:
        """For ever: connect, serve until the connection is lost, wait a little, longer each time."""
        wait_s = BACKOFF_S[0]
        try:
            while True:
                try:
                    wire, detail = await self._open()
                except (OSError, ssl.SSLError, Away, Refused, ValueError) as error:
                    why = str(error) or type(error).__name__
                else:
                    self._log("store_connected", address=self._store.url, detail=detail)
                    self._is_away_said = False
                    self._wire = wire
                    self.connected.set()
                    wait_s = BACKOFF_S[0]
                    self.joined()
                    try:
                        why = await self._watch(wire)
                    finally:
                        self._wire = None
                        self.connected.clear()
                        wire.cut("the controller stops")
                if not self._is_away_said:
                    self._log("store_lost", address=self._store.url, detail=why)
                    self._is_away_said = True
                await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311 - two controllers should not come at once
                wait_s = min(2 * wait_s, BACKOFF_S[1])
        finally:
            self._wire = None

    @staticmethod
    async def _watch(wire: _Wire) -> str:
        """Wait until the connection is lost, or give it up; returns why."""
        while not wire.lost.done():
            # Not wait_for: before Python 3.12 one that is cancelled just when its future is done is not cancelled.
            await asyncio.wait([wire.lost], timeout=STALL_S / 4)
            if wire.is_stalled():
                wire.cut(f"no reply within {STALL_S:.0f} s")
        return wire.lost.result()

    async def _open(self) -> tuple[_Wire, str]:
        """A connection that is ready, within CONNECT_S, and a word on what the server held."""
        opening = asyncio.ensure_future(self._connect_and_greet())
        try:
            await asyncio.wait([opening], timeout=CONNECT_S)
            if not opening.done():
                raise Away(f"no answer within {CONNECT_S:.0f} s")
            return opening.result()
        finally:
            opening.cancel()

    async def _connect_and_greet(self) -> tuple[_Wire, str]:
        wire = await self._connect()
        try:
            return wire, await self._greet(wire)
        except BaseException as error:
            wire.cut(str(error))
            raise

    async def _connect(self) -> _Wire:
        loop = asyncio.get_running_loop()
        parts = urlsplit(self._store.url)

        def made() -> _Wire:
            return _Wire(self.replied)

        if parts.scheme == "unix":
            return (await loop.create_unix_connection(made, parts.path))[1]
        context = None
        if parts.scheme == "rediss":
            context = ssl.create_default_context(cafile=self._store.ca)
            context.load_cert_chain(self._files.cert, self._files.key)  # for a server that wants to see one
        assert parts.hostname is not None  # the configuration was checked
        return (await loop.create_connection(made, parts.hostname, parts.port or 6379, ssl=context))[1]

    async def _greet(self, wire: _Wire) -> str:
        """Prove who we are, load the script, and fence. Returns a word on what the server held."""
        parts = urlsplit(self._store.url)
        if self._store.password_file is not None:
            password = self._store.password_file.read_text(encoding="utf-8").strip()
            await _ask(wire, "AUTH", *([unquote(parts.username)] if parts.username else []), password)
        database = parse_qs(parts.query).get("db", ["0"])[0] if parts.scheme == "unix" else parts.path.strip("/") or "0"
        if database != "0":
            await _ask(wire, "SELECT", database)
        self.script.sha = await _ask(wire, "SCRIPT", "LOAD", self.script.text)
        return await self._fence(wire)

    async def _fence(self, wire: _Wire) -> str:
        """Let nobody go on from a past: calls that a restarted server has read from its disk are dropped, unless it had to have
        each answered step on the disk. A cursor that has gone back would grant an edge twice, and a used token would be good again.
        """
        server = _fields(await _ask(wire, "INFO", "server"))
        replication = _fields(await _ask(wire, "INFO", "replication"))
        if replication.get(b"role") != b"master":
            raise Refused(f"READONLY it is a {replication.get(b'role', b'?').decode()}")
        try:
            settings = [await _ask(wire, "CONFIG", "GET", name) for name in ("appendonly", "appendfsync")]
        except Refused:
            settings = []  # it may not be asked: then nothing is known of its disk
        is_kept = (
            settings == [[b"appendonly", b"yes"], [b"appendfsync", b"always"]] and replication.get(b"master_replid2", _NO_PROMOTION) == _NO_PROMOTION
        )
        run = server[b"run_id"].decode()
        found = await _ask(wire, "EVALSHA", self.script.sha, 1, self.site, "fence", msgspec.msgpack.encode((run, self.prefix, is_kept)))
        return str(msgspec.msgpack.decode(found))


async def _ask(wire: _Wire, *command: Argument) -> Any:
    """Send a command before the connection is ready for others, and wait for its reply."""
    answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def take(reply: Reply) -> None:
        if not answer.done():
            answer.set_result(reply)

    wire.send(command, take)
    reply = await answer
    if isinstance(reply, Exception):
        raise reply
    return reply


def _fields(info: bytes) -> dict[bytes, bytes]:
    """What INFO says, by name."""
    return dict(line.split(b":", 1) for line in info.splitlines() if b":" in line)
