"""Joins the sessions of agents with the state: every event gets its answer, every change its push. Does no I/O.

A shell calls one of the methods for whatever has happened, and then takes from `outgoing` what there is to write and whom
to close.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from kalium.controller.audit import AuditLog, NoAudit
from kalium.controller.calls import Deferred, Evicted
from kalium.controller.counts import Counts
from kalium.controller.identity import PeerIdentity
from kalium.controller.log import LogLine
from kalium.controller.registry import NS_PER_MS, AgentKey, DuplicateAgent
from kalium.controller.state import State
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.message import Reason
from kalium.protocol.frames import (
    AgentHello,
    Answer,
    ControllerWelcome,
    Frame,
    InstanceEnd,
    InstanceFinish,
    InstanceInvoke,
    InstanceStart,
    Lease,
    Ping,
    Policy,
    Pong,
    Register,
    Report,
    Status,
    StatusAnswer,
    Unregister,
)
from kalium.protocol.limits import APPS_BYTES_MAX, LEASE_MS
from kalium.protocol.session import AgentSession, CloseReason, SessionState, negotiated

# Not `controller_unavailable`: no fail mode may let a step pass that could not be put on record.
_UNWRITABLE = Answer(False, Reason.OVERLOADED.value, detail="the controller's audit log cannot be written")
_Step = InstanceStart | InstanceInvoke | InstanceFinish
STATUS_KEPT_NS = 100 * NS_PER_MS  # a large site's takes tens of milliseconds, in which no step is answered
_QUIET = (CloseReason.END_OF_STREAM.value, CloseReason.LOST.value)


class Outgoing(NamedTuple):
    """What a connection has to write; `is_last`: and then to close."""

    key: AgentKey
    data: bytes
    is_last: bool


@dataclass
class _Peer:
    """One connection: its session, and who is at the other end. `node` is "" until the agent has said hello."""

    session: AgentSession
    identity: PeerIdentity
    address: str
    node: str = ""


class Dispatcher:
    """The controller without its sockets. `now_ns` is of the clock that State uses."""

    def __init__(self, state: State, *, log: LogLine, audit: AuditLog | None = None, counts: Counts | None = None) -> None:
        self._state = state
        self._registry = state.registry
        self._log = log
        self._counts = Counts() if counts is None else counts
        self._started, self._invoked, self._finished = (self._counts.steps[question] for question in ("start", "invoke", "finish"))
        self._is_writable = True  # the audit log, as of the last bytes that came
        self.waiting = 0  # questions that the store has not answered yet
        self._audit: AuditLog = NoAudit() if audit is None else audit
        self._peers: dict[AgentKey, _Peer] = {}
        self._status_answer: tuple[int, StatusAnswer] | None = None  # when it was made
        self._touched: dict[AgentKey, None] = {}
        self._handlers: Mapping[type[Frame], Callable[[AgentKey, _Peer, int, Any, int], None]] = {
            AgentHello: self._hello,
            Register: self._register,
            Unregister: self._unregister,
            InstanceStart: self._start,
            InstanceInvoke: self._invoke,
            InstanceEnd: self._end,
            InstanceFinish: self._finish,
            Ping: self._ping,
            Report: self._report,
            Status: self._status,
        }
        state.on_evicted = self._log_evicted
        state.calls.on_agent_lost = self._agent_lost

    def faults(self) -> dict[str, str]:
        """What keeps steps from being taken, by what has to be well for them; "" where all is well."""
        return {
            "policies": "" if self._registry.newest() else "no policy is loaded",
            "store": self._state.calls.fault(),
            "audit": "" if self._audit.healthy else "the audit log cannot be written",
        }

    def connected(self, key: AgentKey, *, identity: PeerIdentity, address: str, now_ns: int) -> None:
        """A peer has proven that it is `identity`."""
        self._peers[key] = _Peer(AgentSession(now_ns=now_ns), identity, address)

    def received(self, key: AgentKey, data: bytes, *, now_ns: int) -> None:
        """Bytes of a peer. What a peer says whose connection we are closing is not heard."""
        peer = self._peers.get(key)
        if peer is not None:
            self._registry.heard(key, now_ns=now_ns)
            peer.session.receive_data(data, now_ns=now_ns)
            self._work(key, peer, now_ns)

    def received_last(self, key: AgentKey, data: bytes, *, now_ns: int) -> None:
        """Bytes of a peer that is gone: what it has told counts, and no step is taken whose answer nobody would hear."""
        peer = self._peers.get(key)
        if peer is not None:
            peer.session.receive_data(data, now_ns=now_ns)
            self._work(key, peer, now_ns, is_heard=False)

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
        if key in self._registry.agents:
            self._state.calls.agent_gone(peer.node)
        self._registry.agent_gone(key, now_ns=now_ns)
        if not peer.node and peer.session.close_reason in _QUIET:
            return  # a client that asked for the status, as readiness checks do all the time
        self._log(
            "connection_closed",
            reason=peer.session.close_reason,
            detail=peer.session.close_detail,
            node=peer.node,
            subject=peer.identity.name,
            peer=peer.address,
        )

    def install(self, policy: CompiledPolicy, envelope: bytes, *, now_ns: int) -> bool:
        """Take a verified policy and push it to every agent. As Registry.install, which raises KaliumError for an old version."""
        is_new = self._registry.install(policy, envelope, now_ns=now_ns)
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
        return self._state.expire(now_ns=now_ns)

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

    def _work(self, key: AgentKey, peer: _Peer, now_ns: int, *, is_heard: bool = True) -> None:
        self._touched[key] = None
        self._is_writable = self._audit.healthy
        session, handlers = peer.session, self._handlers
        for event in session.events():
            frame_id, frame = event.id, event.frame
            if (session.close_reason is not None or not is_heard) and (frame_id or not peer.node):
                continue  # nobody would hear the answer, so no step is taken; and who was not welcomed has nothing to tell
            handlers[type(frame)](key, peer, frame_id, frame, now_ns)

    def _push(self, frame: Lease | Policy) -> None:
        for key, peer in self._peers.items():
            if peer.session.state is SessionState.SERVING:
                peer.session.push(frame)
                self._touched[key] = None

    def _hello(self, key: AgentKey, peer: _Peer, frame_id: int, said: AgentHello, now_ns: int) -> None:
        if not peer.identity.is_agent_of(said.node):
            detail = f"a certificate of {peer.identity.role.value or 'no role'} {peer.identity.name!r} says that it is the agent of {said.node!r}"
            self._log("connection_refused", reason=CloseReason.WRONG_IDENTITY.value, detail=detail, node=said.node, peer=peer.address)
            peer.session.close(CloseReason.WRONG_IDENTITY, detail)
            return
        try:
            replaced = self._registry.agent_hello(key, node=said.node, run=said.run, now_ns=now_ns)
        except DuplicateAgent as error:
            self._log("connection_refused", reason="duplicate_agent", detail=str(error), node=said.node, peer=peer.address)
            peer.session.answer(frame_id, ControllerWelcome(False, "duplicate_agent"))
            return
        except OverflowError as error:
            self._log("connection_refused", reason="too_many_agents", detail=str(error), node=said.node, peer=peer.address)
            peer.session.answer(frame_id, ControllerWelcome(False, "too_many_agents"))
            return
        peer.node = said.node
        self._state.calls.agent_here(said.node, said.run, said.connection)
        if replaced is not None:
            self.close(replaced, CloseReason.REPLACED, "the same node has connected again")
        policies, later = self._policies_that_fit()
        peer.session.answer(
            frame_id,
            ControllerWelcome(True, proto=negotiated(said.protos), controller=self._state.name, lease_ms=LEASE_MS, policies=policies),
        )
        for app, envelope in later.items():
            peer.session.push(Policy(app, envelope))
        self._log("agent_connected", node=said.node, subject=peer.identity.name, peer=peer.address)

    def _agent_lost(self, node: str) -> None:
        """Another run of this agent is heard by another controller, and was there first."""
        key = self._registry.connection_of(node)
        if key is not None:
            peer = self._peers[key]
            self._log(
                "connection_refused", reason="duplicate_agent", detail="another controller hears another run of it", node=node, peer=peer.address
            )
            self.close(key, CloseReason.REFUSED, "duplicate_agent")

    def _policies_that_fit(self) -> tuple[dict[str, bytes], dict[str, bytes]]:
        """The policies that go into a welcome, and those that have to follow it."""
        fitting: dict[str, bytes] = {}
        later: dict[str, bytes] = {}
        room = APPS_BYTES_MAX
        for app, published in self._registry.newest().items():
            room -= len(app.encode()) + len(published.envelope) + 16  # the heads of two msgpack values
            (fitting if room >= 0 else later)[app] = published.envelope
        return fitting, later

    def _register(self, key: AgentKey, peer: _Peer, frame_id: int, said: Register, now_ns: int) -> None:
        self._registered(key, peer, frame_id, said, self._state.register(key, said, now_ns=now_ns))

    def _registered(self, key: AgentKey, peer: _Peer, frame_id: int, said: Register, answer: Answer | Deferred[Answer]) -> None:
        """Answer a REGISTER now, or when the store has."""
        if isinstance(answer, Deferred):
            answer.then(lambda late: self._registered(key, peer, frame_id, said, late))
            return
        self._counts.steps["register"][answer.reason] += 1
        if not answer.allowed:
            self._log_denied(answer, question="register", instance=said.instance, app=said.app, function=said.function, node=peer.node)
        if peer.session.close_reason is None:
            peer.session.answer(frame_id, answer)
            self._touched[key] = None

    def _unregister(self, key: AgentKey, _peer: _Peer, _frame_id: int, said: Unregister, now_ns: int) -> None:
        self._state.unregister(key, said.instance, now_ns=now_ns)

    def _start(self, key: AgentKey, peer: _Peer, frame_id: int, said: InstanceStart, now_ns: int) -> None:
        answer = self._state.start(key, said, now_ns=now_ns) if self._is_writable else _UNWRITABLE
        self._answer(key, peer, frame_id, said, answer, self._started)

    def _invoke(self, key: AgentKey, peer: _Peer, frame_id: int, said: InstanceInvoke, now_ns: int) -> None:
        answer = self._state.invoke(key, said, now_ns=now_ns) if self._is_writable else _UNWRITABLE
        self._answer(key, peer, frame_id, said, answer, self._invoked)

    def _finish(self, key: AgentKey, peer: _Peer, frame_id: int, said: InstanceFinish, now_ns: int) -> None:
        self._answer(key, peer, frame_id, said, self._state.finish(key, said, now_ns=now_ns), self._finished)

    def _end(self, key: AgentKey, _peer: _Peer, _frame_id: int, said: InstanceEnd, now_ns: int) -> None:
        self._state.finish(key, said, now_ns=now_ns)  # an END for what was evicted before is no news

    def _answer(self, key: AgentKey, peer: _Peer, frame_id: int, said: _Step, answer: Answer | Deferred[Answer], counts: dict[str, int]) -> None:
        """Answer now, or when the store has, and count the answer by its reason."""
        if type(answer) is not Answer:
            assert isinstance(answer, Deferred)
            self.waiting += 1
            self._counts.store_round_trips += 1
            answer.then(lambda late: self._answer_late(key, peer, frame_id, said, late, counts))
            return
        counts[answer.reason] += 1
        if not answer.allowed:
            self._log_step_denied(answer, said, peer.node)
        session = peer.session
        if session.close_reason is None:  # whoever asked may be gone by the time that the store answers
            session.answer(frame_id, answer)
            self._touched[key] = None

    def _answer_late(self, key: AgentKey, peer: _Peer, frame_id: int, said: _Step, answer: Answer, counts: dict[str, int]) -> None:
        self.waiting -= 1
        self._answer(key, peer, frame_id, said, answer, counts)

    def _ping(self, _key: AgentKey, peer: _Peer, frame_id: int, _said: Ping, _now_ns: int) -> None:
        peer.session.answer(frame_id, Pong())

    def _report(self, key: AgentKey, peer: _Peer, _frame_id: int, said: Report, _now_ns: int) -> None:
        self._registry.report(key, said)
        self._audit.record("anchor", node=peer.node, audit_seq=said.audit_seq, audit_hash=said.audit_hash)

    def _status(self, _key: AgentKey, peer: _Peer, frame_id: int, _said: Status, now_ns: int) -> None:
        kept = self._status_answer
        if kept is None or not 0 < now_ns - kept[0] < STATUS_KEPT_NS:
            kept = self._status_answer = now_ns, StatusAnswer(self._state.status())
        peer.session.answer(frame_id, kept[1])

    def _log_step_denied(self, answer: Answer, said: _Step, node: str) -> None:
        origin = {"instance": said.instance, "app": said.app, "function": said.function, "node": node}
        if type(said) is InstanceStart:
            self._log_denied(answer, question="start", label=said.label, version=said.version, **origin)
        elif type(said) is InstanceInvoke:
            self._log_denied(
                answer, question="invoke", callee=said.callee, call=said.call, invocation=said.invocation, version=said.version, **origin
            )
        elif type(said) is InstanceFinish:
            self._log_denied(answer, question="finish", call=said.call, invocation=said.invocation, **origin)

    def _log_denied(self, answer: Answer, **fields: object) -> None:
        self._log("step_denied", reason=answer.reason, detail=answer.detail, **fields)

    def _log_evicted(self, each: Evicted) -> None:
        self._log(
            "invocation_evicted",
            reason=each.why,
            app=each.app,
            function=each.function,
            call=each.call,
            invocation=each.invocation,
            instance=each.instance,
        )
