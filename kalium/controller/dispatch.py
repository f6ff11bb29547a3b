"""Joins the sessions of agents with the state: every event gets its answer, every change its push. Does no I/O.

A shell calls one of the methods for whatever has happened, and then takes from `outgoing` what there is to write and whom
to close.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kalium.controller.audit import AuditLog, NoAudit
from kalium.controller.log import LogLine
from kalium.controller.state import AgentKey, Evicted, State
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.message import Reason
from kalium.protocol.frames import (
    AgentHello,
    Answer,
    ControllerWelcome,
    Frame,
    InstanceEnd,
    InstanceInvoke,
    InstanceStart,
    Lease,
    Policy,
    Register,
    Status,
    StatusAnswer,
    Unregister,
)
from kalium.protocol.limits import APPS_BYTES_MAX, LEASE_MS
from kalium.protocol.session import AgentSession, CloseReason, SessionState, negotiated

# Not `controller_unavailable`: no fail mode may let a step pass that could not be put on record.
_UNWRITABLE = Answer(False, Reason.OVERLOADED.value, detail="the controller's audit log cannot be written")
_QUIET = (CloseReason.END_OF_STREAM.value, CloseReason.LOST.value)


@dataclass(frozen=True)
class Outgoing:
    """What a connection has to write; `is_last`: and then to close."""

    key: AgentKey
    data: bytes
    is_last: bool


@dataclass
class _Peer:
    """One connection: its session, and who is at the other end."""

    session: AgentSession
    subject: str
    address: str
    node: str = ""


class Dispatcher:
    """The controller without its sockets. `now_ns` is of the clock that State uses."""

    def __init__(self, state: State, *, log: LogLine, audit: AuditLog | None = None) -> None:
        self._state = state
        self._log = log
        self._audit: AuditLog = NoAudit() if audit is None else audit
        self._peers: dict[AgentKey, _Peer] = {}
        self._touched: dict[AgentKey, None] = {}
        self._handlers: Mapping[type[Frame], Callable[[AgentKey, _Peer, int, Any, int], None]] = {
            AgentHello: self._hello,
            Register: self._register,
            Unregister: self._unregister,
            InstanceStart: self._start,
            InstanceInvoke: self._invoke,
            InstanceEnd: self._end,
            Status: self._status,
        }

    def connected(self, key: AgentKey, *, subject: str, address: str, now_ns: int) -> None:
        """A peer has proven that it is `subject`."""
        self._peers[key] = _Peer(AgentSession(now_ns=now_ns), subject, address)

    def received(self, key: AgentKey, data: bytes, *, now_ns: int) -> None:
        """Bytes of a peer. What a peer says whose connection we are closing is not heard."""
        peer = self._peers.get(key)
        if peer is not None:
            peer.session.receive_data(data, now_ns=now_ns)
            self._work(key, peer, now_ns)

    def received_end(self, key: AgentKey, *, now_ns: int) -> None:
        """The peer will send no more."""
        peer = self._peers.get(key)
        if peer is not None:
            peer.session.receive_end()
            self._work(key, peer, now_ns)

    def close(self, key: AgentKey, reason: CloseReason, detail: str = "") -> None:
        """Our side ends the connection, or has found it broken; `outgoing` says when it may be closed."""
        peer = self._peers.get(key)
        if peer is not None:
            peer.session.close(reason, detail)
            self._touched[key] = None

    def disconnected(self, key: AgentKey, *, now_ns: int) -> None:
        """The connection is no more, whether or not that was our doing."""
        peer = self._peers.get(key)
        if peer is not None:
            peer.session.close(CloseReason.LOST)
            self._forget(key, peer, now_ns)

    def _forget(self, key: AgentKey, peer: _Peer, now_ns: int) -> None:
        del self._peers[key]
        self._touched.pop(key, None)
        self._state.agent_gone(key, now_ns=now_ns)
        if not peer.node and peer.session.close_reason in _QUIET:
            return  # a client that asked for the status, as readiness checks do all the time
        self._log(
            "connection_closed",
            reason=peer.session.close_reason,
            detail=peer.session.close_detail,
            node=peer.node,
            subject=peer.subject,
            peer=peer.address,
        )

    def install(self, policy: CompiledPolicy, envelope: bytes, *, now_ns: int) -> bool:
        """Take a verified policy and push it to every agent. As State.install, which raises KaliumError for an old version."""
        is_new = self._state.install(policy, envelope, now_ns=now_ns)
        if is_new:
            self._push(Policy(policy.app, envelope))
        return is_new

    def renew_leases(self) -> None:
        """Let every agent decide for another LEASE_MS."""
        self._push(Lease(LEASE_MS))

    def expire(self, *, now_ns: int) -> bool:
        """Remove what is over. True: there is more, come again at once."""
        for key, peer in self._peers.items():
            peer.session.expire(now_ns=now_ns)
            if peer.session.close_reason is not None:
                self._touched[key] = None
        self._log_evicted(self._state.expire(now_ns=now_ns))
        return self._state.has_due(now_ns=now_ns)

    def outgoing(self, *, now_ns: int) -> Iterator[Outgoing]:
        """What is to be written since the last call. A connection that `is_last` names is closed by the shell behind the data.

        For the state such a connection is over at once: how long the peer takes to close its side is not waited for.
        """
        touched, self._touched = self._touched, {}
        for key in touched:
            peer = self._peers.get(key)
            if peer is None:
                continue  # it broke while another one was written to
            data, is_last = peer.session.data_to_send(), peer.session.close_reason is not None
            if is_last:
                self._forget(key, peer, now_ns)
            if data or is_last:
                yield Outgoing(key, data, is_last)

    def _work(self, key: AgentKey, peer: _Peer, now_ns: int) -> None:
        self._touched[key] = None
        for event in peer.session.events():
            if event.id and peer.session.close_reason is not None:
                continue  # what stood behind has closed the session: nobody would hear the answer, so no step is taken
            handler = self._handlers[type(event.frame)]
            handler(key, peer, event.id, event.frame, now_ns)

    def _push(self, frame: Lease | Policy) -> None:
        for key, peer in self._peers.items():
            if peer.session.state is SessionState.SERVING:
                peer.session.push(frame)
                self._touched[key] = None

    def _hello(self, key: AgentKey, peer: _Peer, frame_id: int, said: AgentHello, now_ns: int) -> None:
        peer.node = said.node
        try:
            replaced = self._state.agent_hello(key, subject=peer.subject, node=said.node, now_ns=now_ns)
        except OverflowError as error:
            self._log("connection_refused", reason="too_many_agents", detail=str(error), node=said.node, peer=peer.address)
            peer.session.answer(frame_id, ControllerWelcome(False, "too_many_agents"))
            return
        if replaced is not None:
            self.close(replaced, CloseReason.REPLACED, "the same node has connected again")
        policies, later = self._policies_that_fit()
        peer.session.answer(frame_id, ControllerWelcome(True, proto=negotiated(said.protos), lease_ms=LEASE_MS, policies=policies))
        for app, envelope in later.items():
            peer.session.push(Policy(app, envelope))
        self._log("agent_connected", node=said.node, subject=peer.subject, peer=peer.address)

    def _policies_that_fit(self) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """The policies that go into a welcome, and those that have to follow it."""
        fitting: dict[str, bytes] = {}
        later: dict[str, bytes] = {}
        room = APPS_BYTES_MAX
        for app, published in self._state.newest().items():
            room -= len(app.encode()) + len(published.envelope) + 16  # the heads of two msgpack values
            (fitting if room >= 0 else later)[app] = published.envelope
        return fitting, later

    def _register(self, key: AgentKey, peer: _Peer, frame_id: int, said: Register, _now_ns: int) -> None:
        answer = self._state.register(key, said)
        if not answer.allowed:
            self._log_denied(answer, question="register", instance=said.instance, app=said.app, function=said.function, node=peer.node)
        peer.session.answer(frame_id, answer)

    def _unregister(self, key: AgentKey, _peer: _Peer, _frame_id: int, said: Unregister, _now_ns: int) -> None:
        self._log_evicted(self._state.unregister(key, said.instance))

    def _start(self, key: AgentKey, peer: _Peer, frame_id: int, said: InstanceStart, now_ns: int) -> None:
        answer = self._state.start(key, said, now_ns=now_ns) if self._audit.healthy else _UNWRITABLE
        if not answer.allowed:
            self._log_denied(
                answer, question="start", instance=said.instance, app=said.app, function=said.function, label=said.label, version=said.version
            )
        peer.session.answer(frame_id, answer)

    def _invoke(self, key: AgentKey, peer: _Peer, frame_id: int, said: InstanceInvoke, now_ns: int) -> None:
        answer = self._state.invoke(key, said, now_ns=now_ns) if self._audit.healthy else _UNWRITABLE
        if not answer.allowed:
            self._log_denied(
                answer,
                question="invoke",
                instance=said.instance,
                app=said.app,
                function=said.function,
                callee=said.callee,
                call=said.call,
                invocation=said.invocation,
                version=said.version,
            )
        peer.session.answer(frame_id, answer)

    def _end(self, key: AgentKey, _peer: _Peer, _frame_id: int, said: InstanceEnd, _now_ns: int) -> None:
        self._state.end(key, said)  # an END for what was evicted before is no news

    def _status(self, _key: AgentKey, peer: _Peer, frame_id: int, _said: Status, _now_ns: int) -> None:
        peer.session.answer(frame_id, StatusAnswer(self._state.status()))

    def _log_denied(self, answer: Answer, **fields: object) -> None:
        self._log("step_denied", reason=answer.reason, detail=answer.detail, **fields)

    def _log_evicted(self, evicted: list[Evicted]) -> None:
        for each in evicted:
            self._log(
                "invocation_evicted",
                reason=each.why,
                app=each.app,
                function=each.function,
                call=each.call,
                invocation=each.invocation,
                instance=each.instance,
            )
