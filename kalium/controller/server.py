"""The asyncio shell of the controller: sockets, TLS, clocks, signals. It carries bytes and decides nothing.

A connection is one `asyncio.Protocol`, not a task: an answer is written in the same turn of the loop in which its question
has arrived, unless its peer has sent more than TURN_BYTES before it. Files are read in threads. Everything else that runs is
a coroutine of `serve`, and the end of one is the end of all.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import signal
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, cast

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from kalium.controller import tls
from kalium.controller.audit import Audit, open_audit
from kalium.controller.calls import MemoryCalls
from kalium.controller.config import Config
from kalium.controller.counts import Counts
from kalium.controller.dispatch import Dispatcher
from kalium.controller.identity import Role
from kalium.controller.limits import LIMITS
from kalium.controller.log import LogLine
from kalium.controller.metrics import Exporter
from kalium.controller.mint import Mint
from kalium.controller.monitor import Monitor
from kalium.controller.redis_calls import RedisCalls
from kalium.controller.redis_link import Link
from kalium.controller.registry import Registry
from kalium.controller.sharing import Sharing
from kalium.controller.state import State
from kalium.controller.store import Found, PolicyDirectory
from kalium.errors import KaliumError
from kalium.policy.envelope import public_key
from kalium.protocol.limits import LEASE_EVERY_MS, WRITE_BUFFER_BYTES_MAX
from kalium.protocol.session import CloseReason

HANDSHAKE_S = 5.0
HANDSHAKES_MAX = 256  # at once; one more takes the place of the oldest of the address that has most
STRANGERS_BURST, STRANGERS_PER_S = 100, 10  # lines of the log about peers that have shown no certificate
CONNECTIONS_MAX = LIMITS.agents + 64  # agents, and clients that ask for the status; beyond it a connection is closed at once
CONNECTIONS_OF_AGENT_MAX = 8  # of one name: those that it has replaced, and what is done with its key
CONNECTIONS_OF_OTHERS_MAX = 32  # of everybody who is no agent, so that a client's certificate takes no agent's place
BACKLOG = 256
INCOMING_BYTES = 262_144  # what uvloop reads at a time
TURN_BYTES = 65_536  # of one connection that are worked on in a turn of the loop: some hundred questions
KEPT_BYTES_MAX = 2_097_152  # of one connection that wait for their turns, more than honest agents have open; beyond it nothing is read
SWEEP_S = 1.0  # between two looks at deadlines, at the policies and at the certificate
DRAIN_S, DRAIN_EVERY_S = 1.0, 0.005  # for what the store still owes at the end, and how often that is looked at
CLOSE_S = 2.0  # for the last bytes of a connection that is closed; then it is cut
KEEPALIVE = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))  # a dead node is noticed within 60 s
UNACKNOWLEDGED_MS = 60_000


class Connection(asyncio.BufferedProtocol):
    """One peer whose certificate has been verified. What one says whom the controller does not take is not heard.

    Buffered, because a loop that makes the bytes itself makes them as long as they might be: a quarter of a MiB, mapped and unmapped
    for each question.
    """

    def __init__(self, controller: Controller, address: str) -> None:
        self._controller = controller
        self.address = address
        self.peer = tls.peer_of(None)
        self.transport: asyncio.Transport | None = None
        self._is_taken = False
        self._kept = b""  # what waits for the next turn
        self._next: asyncio.Handle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The handshake is done."""
        self.transport = transport = cast(asyncio.Transport, transport)  # uvloop's is one without inheriting from it
        transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES_MAX)
        self.peer = tls.peer_of(transport.get_extra_info("peercert"))
        self._is_taken = self._controller.connected(self)
        if not self._is_taken:
            transport.abort()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the loop writes what it calls `buffer_updated` for at once."""
        return self._controller.incoming(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes were written there, in any split. All beyond TURN_BYTES waits, so that the others have their turns in between."""
        if not self._is_taken:
            return
        data = bytes(self._controller.incoming()[:nbytes])
        if self._next is not None:
            self._keep(data)
            return
        if len(data) > TURN_BYTES:
            self._next = asyncio.get_running_loop().call_soon(self._go_on)
            self._keep(data[TURN_BYTES:])
        self._controller.received(self, data[:TURN_BYTES])

    def _keep(self, data: bytes) -> None:
        """Reading goes on up to the bound: uvloop throws away what it has not handed over when the peer closes a connection that is paused."""
        self._kept += data
        if len(self._kept) > KEPT_BYTES_MAX:
            assert self.transport is not None
            self.transport.pause_reading()

    def _go_on(self) -> None:
        """The next turn. The last one does nothing: what comes in it would be worked on in the same turn as what waited."""
        if not self._kept:
            assert self.transport is not None
            self._next = None
            self.transport.resume_reading()
            return
        self._next = asyncio.get_running_loop().call_soon(self._go_on)
        data, self._kept = self._kept[:TURN_BYTES], self._kept[TURN_BYTES:]
        self._controller.received(self, data)

    def _drop_kept(self) -> bytes:
        """No more turns; returns what waited for one."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        kept, self._kept = self._kept, b""
        return kept

    def _hear_kept(self) -> None:
        """The peer is gone: all that waited, at once. Whoever sends much and goes, again and again, costs the others no turns by that."""
        kept = self._drop_kept()
        if kept:
            self._controller.received_last(self, kept)

    def stop_reading(self) -> None:
        """Take no more questions, nor those that wait for their turn."""
        self._drop_kept()
        if self.transport is not None:
            self.transport.pause_reading()

    def eof_received(self) -> None:
        """The peer has closed its side. Returning None lets asyncio close ours behind what is still to be written."""
        if self._is_taken:
            self._hear_kept()
            self._controller.received_end(self)

    def pause_writing(self) -> None:
        """More than WRITE_BUFFER_BYTES_MAX waits: the peer does not read, and its answers would come too late anyway."""
        if self._is_taken:
            self._controller.overflowed(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is no more."""
        if self._is_taken:
            self._hear_kept()
            self._controller.disconnected(self, exc)

    def certificate(self) -> x509.Certificate:
        """The peer's, whole."""
        assert self.transport is not None
        return x509.load_der_x509_certificate(self.transport.get_extra_info("ssl_object").getpeercert(binary_form=True))


class BusyPoll:
    """Keeps the loop from sleeping for `for_us` after each turn of work, so that a question which comes meanwhile wakes nobody.

    To be woken takes a processor longer than a step does. The price is processor time; other work of the loop goes on.
    """

    def __init__(self, for_us: int, clock_ns: Callable[[], int]) -> None:
        self._for_ns = for_us * 1000
        self._clock_ns = clock_ns
        self._until_ns = 0
        self._is_polling = False

    def prolong(self, now_ns: int) -> None:
        """There was work until now."""
        self._until_ns = now_ns + self._for_ns
        if self._for_ns and not self._is_polling:
            self._is_polling = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """A loop that has something to call looks at its sockets without waiting for them."""
        self._is_polling = self._clock_ns() < self._until_ns
        if self._is_polling:
            asyncio.get_running_loop().call_soon(self._turn)


class Controller:
    """The dispatcher with a clock and its connections."""

    def __init__(
        self,
        *,
        log: LogLine,
        name: str = "controller",
        counts: Counts | None = None,
        audit: Audit | None = None,
        link: Link | None = None,
        busy_poll_us: int = 0,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._audit = audit
        self._counts = Counts() if counts is None else counts
        self._log = log
        self._clock_ns = clock_ns
        self._wall_s = wall_s
        self._busy_poll = BusyPoll(busy_poll_us, clock_ns)
        self.registry = Registry()
        self.calls = self._calls(link, name)
        self._state = State(self.registry, self.calls, name=name, started_ms=time.time_ns() // 1_000_000)
        self._dispatcher = Dispatcher(self._state, log=log, audit=audit, counts=self._counts)
        self._connections: dict[Connection, None] = {}
        self._of_peer: Counter[str] = Counter()  # connections, by agent; "" for everybody else
        self._incoming = memoryview(bytearray(INCOMING_BYTES))
        self._all_gone = asyncio.Event()
        self._all_gone.set()

    def _calls(self, link: Link | None, name: str) -> MemoryCalls | RedisCalls:
        if link is None:
            return MemoryCalls(held=self.registry.held, mint=Mint())
        link.replied = self._flush
        return RedisCalls(link, name=name, versions=self.registry.versions, mint=Mint())

    def incoming(self, size: int = 0) -> memoryview:
        """A buffer of `size` bytes or more, the same for all connections. A view, of which loops take parts without copying them."""
        if size > len(self._incoming):
            self._incoming = memoryview(bytearray(size))
        return self._incoming

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    def connected(self, connection: Connection) -> bool:
        """As Dispatcher.connected, for a peer whose certificate says what it is to us. False: it is refused."""
        peer = connection.peer
        if peer.identity.role is Role.NONE:
            self._log("connection_refused", reason="no_role", detail=f"the certificate of {peer.subject} has no role", peer=connection.address)
            return False
        whose = _whose(connection)
        bound = CONNECTIONS_OF_AGENT_MAX if whose else CONNECTIONS_OF_OTHERS_MAX
        if self._of_peer[whose] >= bound:
            detail = f"{bound} connections of {f'the agent {whose}' if whose else 'clients and controllers'} are open"
            self._log("connection_refused", reason="too_many_connections", detail=detail, peer=connection.address)
            return False
        self._of_peer[whose] += 1
        self._connections[connection] = None
        self._all_gone.clear()
        self._dispatcher.connected(connection, identity=peer.identity, address=connection.address, now_ns=self._clock_ns())
        return True

    def received(self, connection: Connection, data: bytes) -> None:
        """Work, and write what came of it, to whomever."""
        began_ns = self._clock_ns()
        self._dispatcher.received(connection, data, now_ns=began_ns)
        self._flush()
        ended_ns = self._clock_ns()
        self._counts.batch(ended_ns - began_ns)
        self._busy_poll.prolong(ended_ns)

    def received_last(self, connection: Connection, data: bytes) -> None:
        """As Dispatcher.received_last."""
        self._dispatcher.received_last(connection, data, now_ns=self._clock_ns())

    def received_end(self, connection: Connection) -> None:
        """As Dispatcher.received_end."""
        self._dispatcher.received_end(connection, now_ns=self._clock_ns())
        self._flush()

    def overflowed(self, connection: Connection) -> None:
        """Drop a connection, and what waits for it, at once."""
        self._dispatcher.close(connection, CloseReason.SLOW_READER, f"more than {WRITE_BUFFER_BYTES_MAX} bytes wait to be read")
        if connection.transport is not None:
            connection.transport.abort()

    def disconnected(self, connection: Connection, error: Exception | None) -> None:
        """As Dispatcher.disconnected."""
        if error is not None:
            self._dispatcher.close(connection, CloseReason.LOST, str(error))
        self._dispatcher.disconnected(connection, now_ns=self._clock_ns())
        del self._connections[connection]
        whose = _whose(connection)
        self._of_peer[whose] -= 1
        if not self._of_peer[whose]:
            del self._of_peer[whose]
        if not self._connections:
            self._all_gone.set()

    def take(self, found: Found) -> None:
        """Install what the policy directory has found, or say why not."""
        refusal = found.refusal
        if found.policy is not None:
            try:
                if self._dispatcher.install(found.policy, found.envelope, now_ns=self._clock_ns()):
                    sha256 = hashlib.sha256(found.envelope).hexdigest()
                    self._log("policy_loaded", app=found.policy.app, version=found.policy.version, file=found.file, sha256=sha256)
            except KaliumError as error:
                refusal = error
        if refusal is not None:
            self._log("policy_refused", file=found.file, reason=refusal.code, detail=refusal.found)
        self._flush()

    async def renew_leases(self) -> None:
        """Every LEASE_EVERY_MS, for ever."""
        while True:
            await asyncio.sleep(LEASE_EVERY_MS / 1000)
            self._dispatcher.renew_leases()
            self._counts.leases += len(self._state.registry.agents)
            self._flush()

    async def sweep(self) -> None:
        """Look for what is over every SWEEP_S, for ever. A large portion is followed by the next after a turn of the loop."""
        while True:
            has_more = self._dispatcher.expire(now_ns=self._clock_ns())
            self._close_expired()
            if self._audit is not None:
                self._audit.sweep()
            self._flush()
            await asyncio.sleep(0 if has_more else SWEEP_S)

    def monitor(self, door: Door, is_stopping: Callable[[], bool]) -> Monitor:
        """What tells people and programs about this controller, not listening yet."""

        def faults() -> dict[str, str]:
            has_ended = time.time() >= door.not_after_s
            return {
                **self._dispatcher.faults(),
                "certificate": "it has expired" if has_ended else "",
                "draining": "the controller stops" if is_stopping() else "",
            }

        exporter = Exporter(
            self._counts,
            status=self._state.status,
            not_after=lambda: door.not_after_s,
            faults=faults,
            audit_entries=lambda: self._audit.entries if self._audit is not None else 0,
            waiting=lambda: self._dispatcher.waiting,
        )
        return Monitor(exporter.text, faults)

    def _close_expired(self) -> None:
        """A certificate is good for a connection as long as it is for a handshake; who has a new one dials again."""
        now_s = self._wall_s()
        for connection in self._connections:
            if now_s >= connection.peer.expires_s:
                self._dispatcher.close(connection, CloseReason.EXPIRED, f"the certificate of {connection.peer.subject} has expired")

    def trust_only(self, authorities: Sequence[x509.Certificate]) -> None:
        """Close the connections of peers whose CA is not trusted any more."""
        for connection in self._connections:
            if not tls.is_issued_by(connection.certificate(), authorities):
                self._dispatcher.close(connection, CloseReason.DISTRUSTED, f"the CA of {connection.peer.subject} is not trusted any more")
        self._flush()

    async def close_all(self) -> None:
        """Take no more questions, wait for the store's answers, DRAIN_S at most, and close every connection behind them.

        Agents fail over and ask there what was not answered here. Waits until they are gone, CLOSE_S at most.
        """
        for connection in self._connections:
            connection.stop_reading()
        for _ in range(int(DRAIN_S / DRAIN_EVERY_S)):
            if not self._dispatcher.waiting:
                break
            await asyncio.sleep(DRAIN_EVERY_S)
        for connection in self._connections:
            self._dispatcher.close(connection, CloseReason.SHUTDOWN)
            if connection.transport is not None:
                connection.transport.resume_reading()  # what nobody reads would cut the connection short, and the answers with it
        self._flush()
        await self._all_gone.wait()

    def _flush(self) -> None:
        for outgoing in self._dispatcher.outgoing(now_ns=self._clock_ns()):
            connection = outgoing.key
            assert isinstance(connection, Connection)
            assert connection.transport is not None
            if outgoing.data:
                connection.transport.write(outgoing.data)
            if outgoing.is_last:
                connection.transport.close()
                # TLS waits for the peer to say goodbye too, which a bad one does not do; the loops differ in how long.
                asyncio.get_running_loop().call_later(CLOSE_S, connection.transport.abort)


def _whose(connection: Connection) -> str:
    """Whose share of the connections it takes: that of an agent, or "" for the one of all others."""
    identity = connection.peer.identity
    return identity.name if identity.role is Role.AGENT else ""


def listen(config: Config) -> socket.socket:
    """The listening socket. Raises KaliumError controller.listen for an address that cannot be had."""
    where = f"{config.host}:{config.port}"
    try:
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        listener = socket.create_server((config.host, config.port), family=family, backlog=BACKLOG)
    except OSError as error:
        is_busy = error.errno == errno.EADDRINUSE
        raise KaliumError(
            "controller.listen", f"cannot listen on {where}", "the port is in use" if is_busy else error.strerror or str(error),
            f"stop the other program, or change listen.port in {config.file}" if is_busy else f"change listen in {config.file}",
        ) from error  # fmt: skip
    listener.setblocking(False)
    return listener


class Door:
    """Lets peers in: accepts, makes the handshake, and says in the log who was refused. Its context may be exchanged."""

    def __init__(self, listener: socket.socket, context: ssl.SSLContext, controller: Controller, *, log: LogLine) -> None:
        self.context = context
        self.not_after_s = 0.0  # when the certificate in `context` ends, since 1970
        self._listener = listener
        self._controller = controller
        self._log = log
        self._handshakes: dict[str, dict[asyncio.Task[None], str]] = {}  # by source address: each with its port, the oldest first
        self._open = 0  # of them
        self._lines = float(STRANGERS_BURST)  # of the log, that may be written at once
        self._lines_s = 0.0  # when that was so
        self._unsaid = 0

    async def accept(self) -> None:
        """For ever. Handshakes run beside it, HANDSHAKES_MAX at most, and are cancelled with it."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    peer, address = await loop.sock_accept(self._listener)
                except OSError as error:
                    # Out of descriptors, or a peer that was gone before it was accepted: the listener itself is sound.
                    self._refuse("accept", str(error), "")
                    await asyncio.sleep(0.1)
                    continue
                if self._open >= HANDSHAKES_MAX:
                    self._displace()
                host, where = address[0], f"{address[0]}:{address[1]}"
                task = asyncio.create_task(self._admit(peer, where))
                self._handshakes.setdefault(host, {})[task] = where
                self._open += 1
                task.add_done_callback(partial(self._admitted, host))
                await asyncio.sleep(0)  # an accept that need not wait gives nobody else a turn
        finally:
            tasks = [task for of_host in self._handshakes.values() for task in of_host]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _displace(self) -> None:
        """End the oldest handshake of the address that has most: who says nothing keeps neither its own host out nor others."""
        host = max(self._handshakes, key=lambda host: len(self._handshakes[host]))
        task, where = next(iter(self._handshakes[host].items()))
        self._admitted(host, task)
        self._refuse("too_many_handshakes", "it had shown no certificate, and newer ones came", where)
        task.cancel()

    def _admitted(self, host: str, task: asyncio.Task[None]) -> None:
        of_host = self._handshakes.get(host, {})
        if of_host.pop(task, None) is not None:
            self._open -= 1
            if not of_host:
                del self._handshakes[host]

    async def _admit(self, peer: socket.socket, address: str) -> None:
        try:
            if self._controller.connections >= CONNECTIONS_MAX:
                raise ConnectionRefusedError(f"{CONNECTIONS_MAX} connections are open")
            configure(peer)
        except OSError as error:
            peer.close()
            self._refuse("not_admitted", str(error), address)
        else:
            await self._shake_hands(peer, address)

    async def _shake_hands(self, peer: socket.socket, address: str) -> None:
        """Make a Connection of `peer`, or close it and say why."""
        loop = asyncio.get_running_loop()
        context, connection = self.context, Connection(self._controller, address)
        try:
            await loop.connect_accepted_socket(lambda: connection, peer, ssl=context, ssl_handshake_timeout=HANDSHAKE_S)
        except ssl.SSLError as error:
            self._refuse("tls", reason_of(error), address)
        except OSError as error:
            self._refuse("lost", str(error) or type(error).__name__, address)
        else:
            if context is not self.context and connection.transport is not None:
                connection.transport.abort()  # it was verified by a CA that may just have been dropped: let it try again

    def _refuse(self, reason: str, detail: str, address: str) -> None:
        """Say in the log that a stranger was refused. One who needs no certificate for it must not fill the disk with lines."""
        now_s = asyncio.get_running_loop().time()
        self._lines = min(float(STRANGERS_BURST), self._lines + (now_s - self._lines_s) * STRANGERS_PER_S)
        self._lines_s = now_s
        if self._lines < 1:
            self._unsaid += 1
            return
        self._lines -= 1
        unsaid, self._unsaid = self._unsaid, 0
        self._log("connection_refused", reason=reason, detail=f"{detail}; {unsaid} more before it" if unsaid else detail, peer=address)


def configure(peer: socket.socket) -> None:
    """Let small frames leave at once, and a dead peer be noticed."""
    peer.setblocking(False)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        peer.setsockopt(socket.IPPROTO_TCP, option, value)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)


def reason_of(error: ssl.SSLError) -> str:
    """What a failed handshake says: OpenSSL's reason, and for a certificate that does not verify, why."""
    reason = (error.reason or str(error)).lower()
    return f"{reason}: {error.verify_message}" if isinstance(error, ssl.SSLCertVerificationError) else reason


async def serve(config: Config, *, log: LogLine, ready: Callable[[int], None] = lambda _port: None) -> None:
    """Serve until SIGTERM or SIGINT. `ready` gets the port, once connections are accepted and policies are loaded.

    Raises KaliumError for what keeps the controller from starting: the port, a certificate, the operator's key, the directory.
    """
    context = tls.server_context(config.tls, name=config.name)
    key = operator_key(config)
    counts = Counts()
    log = counts.logging(log)
    audit = None
    if config.audit is not None:
        audit = open_audit(config.audit, config.name, log=log, loop=asyncio.get_running_loop())
        log = audit.logging(log)
    try:
        link = Link(config.store, config.tls, log=log) if config.store.kind == "redis" else None
        controller = Controller(log=log, name=config.name, counts=counts, audit=audit, link=link, busy_poll_us=config.busy_poll_us)
        sharing = None
        if link is not None:
            assert isinstance(controller.calls, RedisCalls)
            sharing = Sharing(link, controller.calls, controller.registry, key, take=controller.take)
        linked = asyncio.create_task(_forever() if link is None else link.run())
        try:
            await _serve(config, context, key, controller, sharing, linked, log=log, ready=ready)
        finally:
            linked.cancel()
            await asyncio.gather(linked, return_exceptions=True)
    finally:
        if audit is not None and (lost := await asyncio.to_thread(audit.close)):
            log("audit_failed", file=str(config.audit and config.audit.log), detail=f"{lost} bytes of entries are lost")


async def _serve(
    config: Config,
    context: ssl.SSLContext,
    key: Ed25519PublicKey,
    controller: Controller,
    sharing: Sharing | None,
    linked: asyncio.Task[None],
    *,
    log: LogLine,
    ready: Callable[[int], None],
) -> None:
    """As serve. `linked` keeps the connection to the store, beyond the last answer of this controller."""
    directory = PolicyDirectory(config.policies_dir, key, clock_ns=time.time_ns)
    with listen(config) as listener:
        for found in await asyncio.to_thread(directory.changes):
            controller.take(found)
        if sharing is not None:
            await sharing.catch_up()
        door = Door(listener, context, controller, log=log)
        door.not_after_s = tls.not_after_s(config.tls)
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        host, port = listener.getsockname()[:2]
        monitor = controller.monitor(door, stop.is_set)
        if config.metrics is not None:
            log("metrics_listening", address=await monitor.start(config.metrics))
        if config.audit is None:
            log("audit_off", file=str(config.file))
        log("listening", address=f"{host}:{port}")
        ready(port)
        await run_together(
            door.accept(),
            controller.renew_leases(),
            controller.sweep(),
            _follow_policies(directory, controller, log),
            _follow_certificate(config, door, controller, log),
            _forever() if sharing is None else sharing.run(),
            _ended(linked),
            until=stop,
        )
    log("stopping", agents=controller.connections)
    await controller.close_all()
    monitor.close()
    log("stopped")


def operator_key(config: Config) -> Ed25519PublicKey:
    """The operator's public key. Raises KaliumError for a file that is not one."""
    try:
        pem = config.operator_key.read_bytes()
    except OSError as error:
        raise KaliumError(
            "controller.operator_key", f"cannot read the operator's key {config.operator_key}", error.strerror or str(error),
            "make it by `kalium pki operator-key`, and name operator.pub in the configuration",
        ) from error  # fmt: skip
    return public_key(pem, str(config.operator_key))


async def run_together(*coroutines: Coroutine[Any, Any, None], until: asyncio.Event) -> None:
    """Run all until one ends or `until` is set; then cancel the rest, and raise what one of them raised.

    asyncio.TaskGroup does this from Python 3.11 on, and the oldest one here is 3.10.
    """
    stopper = asyncio.create_task(_wait(until))
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        await asyncio.wait([stopper, *tasks], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (stopper, *tasks):
            task.cancel()
        results = await asyncio.gather(stopper, *tasks, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, asyncio.CancelledError):
            raise result


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


async def _ended(task: asyncio.Task[None]) -> None:
    """Wait for a task, and raise what it raised; being cancelled does not cancel it."""
    await asyncio.shield(task)


async def _forever() -> None:
    await asyncio.Event().wait()


async def _follow_policies(directory: PolicyDirectory, controller: Controller, log: LogLine) -> None:
    """Look for new policies every SWEEP_S. A directory that cannot be read is said once, until it can be again."""
    is_readable = True
    while True:
        await asyncio.sleep(SWEEP_S)
        try:
            changes = await asyncio.to_thread(directory.changes)
        except KaliumError as error:
            if is_readable:
                log("policies_unreadable", code=error.code, detail=error.found)
            is_readable = False
            continue
        is_readable = True
        for found in changes:
            controller.take(found)


async def _follow_certificate(config: Config, door: Door, controller: Controller, log: LogLine) -> None:
    """Take a renewed certificate for the connections to come; those that are open keep theirs. A bad one is said once.

    Key, certificate and CA are written one after the other, so they are read when they have not changed for a sweep. Peers of a CA
    that has gone from the file are closed.
    """
    taken = before = await asyncio.to_thread(tls.stamps, config.tls)
    while True:
        await asyncio.sleep(SWEEP_S)
        now = await asyncio.to_thread(tls.stamps, config.tls)
        is_settled, before = now == before, now
        if now == taken or not is_settled:
            continue
        taken = now
        try:
            door.context = await asyncio.to_thread(partial(tls.server_context, config.tls, name=config.name))
            door.not_after_s = tls.not_after_s(config.tls)
            controller.trust_only(await asyncio.to_thread(tls.authorities, config.tls))
        except KaliumError as error:
            log("certificate_refused", code=error.code, detail=str(error))
        else:
            log("certificate_loaded", file=str(config.tls.cert))
