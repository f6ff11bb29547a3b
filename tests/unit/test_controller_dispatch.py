"""The controller without its sockets: real sessions of agents on one side, the real state on the other, and the log between."""

from dataclasses import replace
from typing import Any

from controller_samples import counting_mint, policy

from kalium.controller.audit import NoAudit
from kalium.controller.dispatch import Dispatcher
from kalium.controller.limits import LIMITS
from kalium.controller.state import NS_PER_MS, State
from kalium.protocol import limits
from kalium.protocol.codec import encode
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
from kalium.protocol.session import CloseReason, ControllerSession

RUN = "00f1e2d3c4b5a697"
FRONT = ("c-front", "shop", "front")
STOCK = ("c-stock", "shop", "stock")


class Site:
    """A dispatcher with its log, and agents joined to it by wires that lose nothing."""

    def __init__(self, *, limits: Any = LIMITS) -> None:
        self.now_ms = 0
        self.lines: list[dict[str, Any]] = []
        self.audit = NoAudit()
        self.dispatcher = Dispatcher(
            State(mint=counting_mint(), limits=limits),
            log=lambda event, **fields: self.lines.append({"event": event, **fields}),
            audit=self.audit,
        )
        self.dispatcher.install(policy(), b"signed 1", now_ns=0)
        self.agents: dict[str, Agent] = {}

    @property
    def now_ns(self) -> int:
        return self.now_ms * NS_PER_MS

    def carry(self) -> None:
        """Bring what the dispatcher wrote to its agents, and close what it closes."""
        for outgoing in self.dispatcher.outgoing(now_ns=self.now_ns):
            agent = self.agents[str(outgoing.key)]
            assert agent.is_connected
            agent.session.receive_data(outgoing.data, now_ns=self.now_ns)
            agent.heard += [event.frame for event in agent.session.events()]
            agent.is_connected = not outgoing.is_last

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of one event."""
        return [line for line in self.lines if line["event"] == name]


class Agent:
    """An agent at the other end of a wire; `heard` is what the controller has told it."""

    def __init__(self, site: Site, key: str, *, node: str = "node0", subject: str = "agent", hello: bool = True) -> None:
        self.site = site
        self.key = key
        self.session = ControllerSession()
        self.heard: list[Frame] = []
        self.is_connected = True
        site.agents[key] = self
        site.dispatcher.connected(key, subject=subject, address=f"{key}:1", now_ns=site.now_ns)
        if hello:
            self.ask(AgentHello(node, RUN))

    def ask(self, *questions: Frame) -> Frame | None:
        """Send questions in one write, and return the last thing heard."""
        for question in questions:
            self.session.ask(question)
        return self.send()

    def send(self, extra: bytes = b"") -> Frame | None:
        self.site.dispatcher.received(self.key, self.session.data_to_send() + extra, now_ns=self.site.now_ns)
        self.site.carry()
        return self.heard[-1] if self.heard else None

    def disconnect(self) -> None:
        self.is_connected = False
        self.site.dispatcher.disconnected(self.key, now_ns=self.site.now_ns)

    def start(self, origin: tuple[str, str, str], token: str = "", step: str = "0" * 16) -> Answer:
        answer = self.ask(InstanceStart(step, token, "label-7", 1, *origin))
        assert isinstance(answer, Answer)
        return answer

    def invoke(self, granted: Answer, callee: str, step: str = "1" * 16) -> Answer:
        answer = self.ask(InstanceInvoke(step, granted.call, granted.invocation, callee, 1, *FRONT))
        assert isinstance(answer, Answer)
        return answer


def test_an_agent_is_welcomed_with_every_policy_and_a_lease() -> None:
    site = Site()
    site.dispatcher.install(policy(app="other"), b"signed other", now_ns=0)

    agent = Agent(site, "a")

    assert agent.heard == [ControllerWelcome(True, proto=2, lease_ms=limits.LEASE_MS, policies={"other": b"signed other", "shop": b"signed 1"})]
    assert site.events("agent_connected") == [{"event": "agent_connected", "node": "node0", "subject": "agent", "peer": "a:1"}]


def test_policies_that_do_not_fit_the_welcome_follow_it() -> None:
    """Three of the largest do not fit one frame; an agent still gets them all."""
    site = Site()
    large = b"x" * limits.ENVELOPE_BYTES_MAX
    for app in ("large-1", "large-2"):
        site.dispatcher.install(policy(app=app), large, now_ns=0)

    agent = Agent(site, "a")

    welcome, *later = agent.heard
    assert isinstance(welcome, ControllerWelcome)
    assert later == [Policy("large-1", large), Policy("large-2", large)]
    assert dict(welcome.policies) == {"shop": b"signed 1"}


def test_the_largest_policy_alone_fits_a_frame() -> None:
    site = Site()
    large = b"x" * limits.ENVELOPE_BYTES_MAX

    site.dispatcher.install(policy(app="a" * 60), large, now_ns=0)

    agent = Agent(site, "a")
    assert agent.heard[-1] == Policy("a" * 60, large)


def test_a_call_crosses_two_agents() -> None:
    site = Site()
    first, second = Agent(site, "a", node="node0"), Agent(site, "b", node="node1")
    assert first.ask(Register(*FRONT, "image")) == Answer(True, "allowed")
    assert second.ask(Register(*STOCK, "image")) == Answer(True, "allowed")

    front = first.start(FRONT)
    token = first.invoke(front, "stock").token
    stock = second.start(STOCK, token)
    second.session.tell(InstanceEnd(stock.call, stock.invocation, "answered", *STOCK))
    first.session.tell(InstanceEnd(front.call, front.invocation, "answered", *FRONT))
    second.send()
    first.send()

    report = second.ask(Status())
    assert isinstance(report, StatusAnswer)
    assert stock.call == front.call
    assert (report.status.agents, report.status.calls, report.status.invocations) == (2, 0, 0)
    assert site.events("step_denied") == []


def test_a_denial_is_logged_with_what_a_person_needs_and_never_a_token() -> None:
    site = Site()
    agent = Agent(site, "a")
    agent.ask(Register(*FRONT, "image"))
    front = agent.start(FRONT)
    token = agent.invoke(front, "stock").token

    agent.invoke(front, "stock", step="2" * 16)
    agent.start(FRONT, token, step="3" * 16)
    agent.ask(Register("c", "shop", "nobody", "image"))

    invoke, start, register = site.events("step_denied")
    assert (invoke["question"], invoke["reason"], invoke["callee"], invoke["call"]) == ("invoke", "edge_not_allowed", "stock", front.call)
    assert (start["question"], start["reason"], start["label"], start["instance"]) == ("start", "bad_token", "label-7", "c-front")
    assert (register["question"], register["reason"], register["function"]) == ("register", "unknown_function", "nobody")
    assert token
    assert token not in str(site.lines)


def test_no_step_is_taken_while_nothing_can_be_put_on_record() -> None:
    """The reason is one that no fail mode forgives, and the call goes on where it stood."""
    site = Site()
    agent = Agent(site, "a")
    agent.ask(Register(*FRONT, "image"))
    front = agent.start(FRONT)

    site.audit.healthy = False
    refused = (agent.start(FRONT, step="2" * 16), agent.invoke(front, "stock", step="3" * 16))
    site.audit.healthy = True
    later = agent.invoke(front, "stock", step="4" * 16)

    assert [(answer.allowed, answer.reason) for answer in refused] == [(False, "overloaded")] * 2
    assert later.allowed


def test_a_new_policy_goes_to_every_agent_and_an_old_one_to_none() -> None:
    site = Site()
    agents = [Agent(site, "a", node="node0"), Agent(site, "b", node="node1"), Agent(site, "status", hello=False)]

    assert site.dispatcher.install(policy(2), b"signed 2", now_ns=0)
    assert not site.dispatcher.install(policy(2), b"signed 2", now_ns=0)
    site.carry()

    assert [agent.heard[1:] for agent in agents[:2]] == [[Policy("shop", b"signed 2")]] * 2
    assert agents[2].heard == []


def test_leases_go_to_welcomed_agents_alone() -> None:
    site = Site()
    agent, stranger = Agent(site, "a"), Agent(site, "b", hello=False)

    site.dispatcher.renew_leases()
    site.carry()

    assert agent.heard[-1] == Lease(limits.LEASE_MS)
    assert stranger.heard == []


def test_an_agent_that_connects_again_replaces_its_old_connection() -> None:
    site = Site()
    old = Agent(site, "a")
    old.ask(Register(*FRONT, "image"))
    front = old.start(FRONT)

    new = Agent(site, "b")

    assert not old.is_connected
    assert [(line["reason"], line["node"]) for line in site.events("connection_closed")] == [("replaced", "node0")]
    assert new.ask(Register(*FRONT, "image")) == Answer(True, "allowed")
    assert new.invoke(front, "stock").allowed


def test_one_agent_too_many_is_told_so_and_what_it_sent_behind_its_hello_is_not_done() -> None:
    site = Site(limits=replace(LIMITS, agents=1))
    Agent(site, "a", node="node0")
    late = Agent(site, "b", node="node1", hello=False)

    late.ask(AgentHello("node1", RUN), Register(*FRONT, "image"))

    assert (late.session.close_reason, late.session.close_detail) == ("refused", "too_many_agents")
    assert not late.is_connected
    assert site.events("connection_refused")[0]["reason"] == "too_many_agents"


def test_a_question_in_front_of_garbage_takes_no_step_and_an_end_does() -> None:
    """Nobody would hear the answer of the question; the end is no less true."""
    site = Site()
    agent = Agent(site, "a")
    agent.ask(Register(*FRONT, "image"))
    front = agent.start(FRONT)
    agent.session.ask(InstanceStart("5" * 16, "", "", 1, *FRONT))
    agent.session.tell(InstanceEnd(front.call, front.invocation, "closed", *FRONT))

    agent.send(b"garbage")

    assert not agent.is_connected
    assert site.events("connection_closed")[0]["reason"] == "bad_magic"
    report = Agent(site, "b", hello=False).ask(Status())
    assert isinstance(report, StatusAnswer)
    assert (report.status.calls, report.status.invocations) == (0, 0)


def test_an_agent_that_speaks_out_of_turn_is_closed_with_the_reason_in_the_log() -> None:
    site = Site()
    agent = Agent(site, "a", hello=False)

    agent.send(encode(1, Register(*FRONT, "image")))

    assert [(line["reason"], line["detail"]) for line in site.events("connection_closed")] == [("unexpected_frame", "Register in state new")]


def test_who_says_nothing_is_closed_after_the_bound() -> None:
    site = Site()
    silent = Agent(site, "a", hello=False)
    site.now_ms = limits.HELLO_TIMEOUT_MS

    site.dispatcher.expire(now_ns=site.now_ns)
    site.carry()

    assert not silent.is_connected
    assert site.events("connection_closed")[0]["reason"] == "hello_timeout"


def test_a_client_that_asked_for_the_status_and_went_leaves_no_line() -> None:
    """A readiness check asks all the time."""
    site = Site()
    client = Agent(site, "a", hello=False)
    client.ask(Status())

    site.dispatcher.received_end("a", now_ns=0)
    site.carry()

    assert not client.is_connected
    assert site.lines == []


def test_invocations_that_nobody_ended_are_in_the_log() -> None:
    site = Site()
    agent = Agent(site, "a")
    agent.ask(Register(*FRONT, "image"), Register(*STOCK, "image"))
    agent.start(FRONT)
    agent.session.tell(Unregister(FRONT[0]))
    agent.send()
    agent.ask(Register(*FRONT, "image"))
    agent.start(FRONT)
    agent.disconnect()
    site.now_ms = LIMITS.agent_gone_ms

    assert not site.dispatcher.expire(now_ns=site.now_ns)

    assert [(line["reason"], line["instance"]) for line in site.events("invocation_evicted")] == [
        ("unregistered", "c-front"),
        ("agent_gone", "c-front"),
    ]


def test_our_own_close_reaches_the_peer_behind_what_waits() -> None:
    site = Site()
    agent = Agent(site, "a")
    site.dispatcher.renew_leases()

    site.dispatcher.close("a", CloseReason.SHUTDOWN)
    site.carry()

    assert agent.heard[-1] == Lease(limits.LEASE_MS)
    assert site.events("connection_closed")[0]["reason"] == "shutdown"
