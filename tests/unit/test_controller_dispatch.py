"""The controller without its sockets: real sessions of agents on one side, the real state on the other, and the log between."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from controller_samples import counting_mint, policy, state_of
from hypothesis import given
from hypothesis import strategies as st

from kalium.controller.audit import NoAudit
from kalium.controller.calls import Deferred, Evicted, MemoryCalls
from kalium.controller.dispatch import Dispatcher
from kalium.controller.identity import NOBODY, PeerIdentity, Role
from kalium.controller.limits import LIMITS, Limits
from kalium.controller.registry import NS_PER_MS, Instance, Registry
from kalium.controller.state import State
from kalium.protocol import limits
from kalium.protocol.codec import encode
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
from kalium.protocol.session import CloseReason, ControllerSession

RUN = "00f1e2d3c4b5a697"
FRONT = ("c-front", "shop", "front")
STOCK = ("c-stock", "shop", "stock")


class Site:
    """A dispatcher with its log, and agents joined to it by wires that lose nothing."""

    def __init__(self, *, limits: Limits = LIMITS, state: State | None = None) -> None:
        self.now_ms = 0
        self.state = state or state_of(limits=limits)
        self.lines: list[dict[str, Any]] = []
        self.audit = NoAudit()
        self.dispatcher = Dispatcher(self.state, log=lambda event, **fields: self.lines.append({"event": event, **fields}), audit=self.audit)
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

    def __init__(self, site: Site, key: str, *, node: str = "node0", role: Role = Role.AGENT, run: str = RUN, hello: bool = True) -> None:
        self.site = site
        self.key = key
        self.session = ControllerSession()
        self.heard: list[Frame] = []
        self.is_connected = True
        site.agents[key] = self
        site.dispatcher.connected(key, identity=PeerIdentity(role, node), address=f"{key}:1", now_ns=site.now_ns)
        if hello:
            self.ask(AgentHello(node, run))

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

    assert agent.heard == [
        ControllerWelcome(True, proto=2, controller="controller", lease_ms=limits.LEASE_MS, policies={"other": b"signed other", "shop": b"signed 1"})
    ]
    assert site.events("agent_connected") == [{"event": "agent_connected", "node": "node0", "subject": "node0", "peer": "a:1"}]


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
    front, other = agent.start(FRONT), agent.start(FRONT, step="1" * 16)

    site.audit.healthy = False
    refused = (agent.start(FRONT, step="2" * 16), agent.invoke(front, "stock", step="3" * 16))
    ended = agent.ask(InstanceFinish(other.call, other.invocation, "answered", *FRONT))
    site.audit.healthy = True
    later = agent.invoke(front, "stock", step="4" * 16)

    assert [(answer.allowed, answer.reason) for answer in refused] == [(False, "overloaded")] * 2
    assert ended == Answer(True, "allowed")  # an end is a fact and no decision
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


def test_the_name_of_an_agent_that_connects_again_is_not_given_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that was told that the agent is gone would let another run of it, a stolen key, have the name."""
    site = Site()
    told: list[tuple[str, ...]] = []
    monkeypatch.setattr(site.state.calls, "agent_here", lambda node, run, _connection: told.append(("here", node, run)))
    monkeypatch.setattr(site.state.calls, "agent_gone", lambda node: told.append(("gone", node)))

    old, new = Agent(site, "a"), Agent(site, "b")
    old.disconnect()
    assert told == [("here", "node0", RUN)] * 2

    new.disconnect()
    assert told[2:] == [("gone", "node0")]


@pytest.mark.parametrize("role", [Role.CONTROLLER, Role.CLIENT, Role.NONE])
def test_who_is_no_agent_cannot_speak_as_one(role: Role) -> None:
    site = Site()

    client = Agent(site, "a", role=role)

    assert not client.is_connected
    assert site.events("connection_refused")[0]["reason"] == site.events("connection_closed")[0]["reason"] == "wrong_identity"
    report = Agent(site, "b", role=role, hello=False).ask(Status())
    assert isinstance(report, StatusAnswer)
    assert report.status.agents == 0


def test_an_agent_cannot_speak_for_another_node() -> None:
    """The certificate of a machine that was taken over is of no use against the others."""
    site = Site()
    stolen = Agent(site, "a", node="node1", hello=False)

    stolen.ask(AgentHello("node0", RUN), Register(*FRONT, "image"))

    assert not stolen.is_connected
    assert (stolen.heard, site.events("connection_refused")[0]["node"]) == ([], "node0")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("kalium://agent/node0", PeerIdentity(Role.AGENT, "node0")),
        ("kalium://controller/a", PeerIdentity(Role.CONTROLLER, "a")),
        ("kalium://client/a", PeerIdentity(Role.CLIENT, "a")),
        ("kalium://server/a", NOBODY),
        ("kalium:///a", NOBODY),
        ("kalium://agent/", NOBODY),
        ("kalium://agent/a/b", NOBODY),
        ("kalium://AGENT/a", NOBODY),
        ("spiffe://agent/a", NOBODY),
        ("agent/a", NOBODY),
    ],
)
def test_a_certificate_names_its_role_in_one_spelling(uri: str, expected: PeerIdentity) -> None:
    assert PeerIdentity.parse(uri) == expected


def test_a_nameless_certificate_is_of_no_node() -> None:
    site = Site()

    assert not Agent(site, "a", node="").is_connected


def test_another_run_is_refused_while_the_first_is_heard_and_replaces_it_afterwards() -> None:
    site = Site()
    first = Agent(site, "a")
    site.now_ms = 2_999
    first.ask(Ping())
    site.now_ms += LIMITS.duplicate_heard_ms - 1

    early = Agent(site, "b", run="f" * 16)
    assert (early.session.close_reason, early.session.close_detail) == ("refused", "duplicate_agent")
    assert site.events("connection_refused")[0]["reason"] == "duplicate_agent"
    assert first.is_connected
    site.now_ms += 1
    late = Agent(site, "c", run="f" * 16)

    assert (first.is_connected, late.is_connected) == (False, True)


def test_a_ping_is_answered_in_the_same_turn() -> None:
    assert Agent(Site(), "a").ask(Ping()) == Pong()


def test_a_finish_is_answered_and_one_for_nothing_is_denied() -> None:
    site = Site()
    agent = Agent(site, "a")
    agent.ask(Register(*FRONT, "image"))
    front = agent.start(FRONT)
    finish = InstanceFinish(front.call, front.invocation, "answered", *FRONT)

    assert agent.ask(finish) == Answer(True, "allowed")
    again = agent.ask(finish)

    assert isinstance(again, Answer)
    assert (again.allowed, again.reason) == (False, "unknown_call")
    assert [line["question"] for line in site.events("step_denied")] == ["finish"]


def test_the_status_puts_the_agents_reports_together() -> None:
    site = Site()
    first, second = Agent(site, "a", node="node0"), Agent(site, "b", node="node1")
    first.session.tell(Report(1, "h", denied={"shop bad_token": 9}))
    first.session.tell(
        Report(1, "h", ("shop", "shop"), ("front", "gone"), ("audit", "enforce"), (1, 1), (2, 1), {"shop bad_token": 1}, {}, {"shop deny": 4})
    )
    second.session.tell(Report(1, "h", ("shop",), ("front",), ("enforce",), (1,), (3,), {"shop bad_token": 2, "shop reentrant": -5}))
    first.send()
    second.send()

    answer = Agent(site, "c", hello=False).ask(Status())

    assert isinstance(answer, StatusAnswer)
    told = answer.status
    assert list(zip(told.node, told.function, told.mode, told.asked, told.version, told.count, strict=True)) == [
        ("node0", "front", "audit", "enforce", 1, 2),
        ("node0", "gone", "enforce", "", 1, 1),
        ("node1", "front", "enforce", "enforce", 1, 3),
    ]
    assert (told.denied, told.fail_modes) == ({"shop bad_token": 3, "shop reentrant": 0}, {"shop deny": 4})


def test_whatever_agents_report_the_status_fits_a_frame() -> None:
    """Several agents that fill their frames with names nobody else has."""
    site = Site()
    for node in range(4):
        agent = Agent(site, f"agent-{node}", node=f"node{node}")
        names = tuple(f"{number}-{node}-".ljust(60, "x") for number in range(3000))
        counts = {f"{name} {node}": limits.INT_MAX for name in sorted(names)}
        agent.session.tell(Report(1, "h", names, names, ("m",) * 3000, (1,) * 3000, (limits.INT_MAX,) * 3000, counts))
        agent.send()

    answer = Agent(site, "c", hello=False).ask(Status())

    assert isinstance(answer, StatusAnswer)
    assert set(answer.status.node) == {"*"}
    assert 1000 < len(answer.status.node) < limits.ITEMS_MAX
    assert 1000 < len(answer.status.denied) < limits.ITEMS_MAX


class SlowCalls(MemoryCalls):
    """A store whose answers come when the test says so."""

    def __init__(self, registry: Registry) -> None:
        super().__init__(held=registry.held, mint=counting_mint())
        self.waiting: list[Callable[[], None]] = []

    def begin(self, who: Instance, version: int, step: str, *, now_ns: int) -> Deferred[Answer]:  # type: ignore[override]
        later: Deferred[Answer] = Deferred()
        self.waiting.append(lambda: later.resolve(MemoryCalls.begin(self, who, version, step, now_ns=now_ns)))
        return later

    def forget(self, who: Instance, why: str, *, now_ns: int) -> Deferred[list[Evicted]]:  # type: ignore[override]
        later: Deferred[list[Evicted]] = Deferred()
        self.waiting.append(lambda: later.resolve(MemoryCalls.forget(self, who, why, now_ns=now_ns)))
        return later


def slow_site() -> tuple[Site, SlowCalls]:
    registry = Registry()
    calls = SlowCalls(registry)
    return Site(state=State(registry, calls)), calls


def test_an_answer_that_the_store_has_later_is_sent_then() -> None:
    site, calls = slow_site()
    agent = Agent(site, "a")
    agent.ask(Register(*FRONT, "image"))
    agent.ask(InstanceStart("0" * 16, "", "", 1, *FRONT), Ping())
    assert agent.heard[-1] == Pong()

    calls.waiting.pop()()
    site.carry()

    answer = agent.heard[-1]
    assert isinstance(answer, Answer)
    assert answer.allowed


def test_an_answer_for_who_is_gone_reaches_nobody() -> None:
    site, calls = slow_site()
    agent = Agent(site, "a")
    agent.ask(Register(*FRONT, "image"))
    agent.ask(InstanceStart("0" * 16, "", "", 1, *FRONT))
    agent.disconnect()
    back = Agent(site, "b")

    calls.waiting.pop()()
    site.carry()

    assert isinstance(back.heard[-1], ControllerWelcome)


def test_evictions_that_the_store_knows_later_are_counted_then() -> None:
    site, calls = slow_site()
    agent = Agent(site, "a")
    agent.ask(Register(*FRONT, "image"))
    agent.ask(InstanceStart("0" * 16, "", "", 1, *FRONT))
    calls.waiting.pop()()
    agent.session.tell(Unregister(FRONT[0]))
    agent.send()
    assert site.events("invocation_evicted") == []

    calls.waiting.pop()()

    assert len(site.events("invocation_evicted")) == 1
    answer = agent.ask(Status())
    assert isinstance(answer, StatusAnswer)
    assert answer.status.evicted == {"unregistered": 1}


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


def test_who_was_not_welcomed_tells_nothing() -> None:
    """An agent need not wait for its welcome, so what it tells can stand behind a hello that is refused."""
    site = Site()
    report = encode(
        0, Report(app=(), function=(), mode=(), version=(), count=(), denied={}, would_deny={}, fail_modes={}, audit_seq=0, audit_hash="")
    )
    thief = Agent(site, "b", node="node9", hello=False)
    thief.session.ask(AgentHello("node8", RUN))

    thief.send(report + encode(0, Unregister("c-front")))

    assert not thief.is_connected
    assert site.state.registry.agents == {}


def test_the_status_is_asked_for_one_at_a_time_and_made_once_for_many() -> None:
    """It is some ten thousand times as long as its question, and takes tens of milliseconds on a large site."""
    site = Site()
    made: list[int] = []
    report = site.state.status()
    site.state.status = lambda: made.append(1) or report  # type: ignore[method-assign, func-returns-value]
    clients = [Agent(site, f"c{number}", role=Role.CLIENT, hello=False) for number in range(10)]
    for at, client in enumerate(clients):
        site.now_ms = at + 1
        assert client.ask(Status()) == StatusAnswer(report)
    assert len(made) == 1
    site.now_ms = 1000
    clients[0].ask(Status())
    assert len(made) == 2

    clients[1].session.ask(Status())
    clients[1].ask(Status())

    assert clients[1].session.close_reason is None  # ours was told nothing
    assert not clients[1].is_connected
    assert len(made) == 2


# Whatever peers send

HOT: list[tuple[int, Frame]] = [
    (1, AgentHello("node0", RUN)),
    (2, Register(*FRONT, "image")),
    (3, InstanceStart("0" * 16, "", "", 1, *FRONT)),
    (4, InstanceInvoke("1" * 16, "f" * 32, "f" * 32, "stock", 1, *FRONT)),
    (0, InstanceEnd("f" * 32, "f" * 32, "answered", *FRONT)),
    (5, InstanceFinish("f" * 32, "f" * 32, "answered", *FRONT)),
    (6, Ping()),
    (0, Report(1, "h", ("shop",), ("front",), ("audit",), (1,), (2,))),
    (7, Status()),
    (0, Unregister(FRONT[0])),
    (8, Answer(True, "allowed")),
    (0, Lease(1)),
]
BROKEN = [b"GET / HTTP/1.1\r\n", b"KL\x02", b"KL\x01\x63", b"KL\x01\x03\0\0\0\1\xff\xff\xff\xff", b"KL\x01\x03\0\0\0\1\0\0\0\1\xc1"]


@given(
    st.lists(st.sampled_from([encode(*each) for each in HOT]) | st.sampled_from(BROKEN) | st.binary(max_size=40), max_size=12),
    st.lists(st.integers(0, 3000), max_size=6),
    st.sampled_from([Role.AGENT, Role.CLIENT, Role.NONE]),
)
def test_whatever_bytes_a_peer_sends_only_its_own_session_ends(said: list[bytes], cuts: list[int], role: Role) -> None:
    """Frames out of turn, frames again, junk: an agent beside it goes on as if nothing were, and nothing is raised."""
    site = Site()
    good = Agent(site, "good", node="node1")
    good.ask(Register(*STOCK, "image"))
    good.ask(Register("c-front-1", "shop", "front", "image"))
    front = good.start(("c-front-1", "shop", "front"))
    site.dispatcher.connected("bad", identity=PeerIdentity(role, "node0"), address="bad:1", now_ns=0)
    stream = b"".join(said)
    edges = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]

    for begin, end in pairwise(edges):
        site.dispatcher.received("bad", stream[begin:end], now_ns=0)
        for outgoing in site.dispatcher.outgoing(now_ns=0):
            assert outgoing.key == "bad"
    site.dispatcher.received_end("bad", now_ns=0)
    assert all(outgoing.key == "bad" for outgoing in site.dispatcher.outgoing(now_ns=0))

    said_invoke = InstanceInvoke("2" * 16, front.call, front.invocation, "stock", 1, "c-front-1", "shop", "front")
    answer = good.ask(said_invoke)
    assert isinstance(answer, Answer)
    assert answer.allowed
    assert good.start(STOCK, answer.token, step="3" * 16).allowed
    assert site.dispatcher._peers.keys() == {"good"}


@pytest.mark.parametrize("state", ["new", "serving", "closed"])
@pytest.mark.parametrize("junk", BROKEN)
def test_a_broken_frame_ends_the_session_in_every_state_and_no_other(state: str, junk: bytes) -> None:
    site = Site()
    bad, good = Agent(site, "bad", hello=state != "new"), Agent(site, "good", node="node1")
    if state == "closed":
        bad.send(b"garbage")

    if state == "closed":
        site.dispatcher.received("bad", junk, now_ns=0)
        assert list(site.dispatcher.outgoing(now_ns=0)) == []
    else:
        bad.send(junk)

    assert (bad.is_connected, good.is_connected) == (False, True)
    assert good.ask(Ping()) == Pong()


# The clock


@pytest.mark.parametrize("leap_ms", [0, 86_400_000 * 400])
def test_a_clock_that_stands_still_or_leaps_allows_nothing_that_must_not_be(leap_ms: int) -> None:
    """It is monotonic, but a machine may sleep for a year. What was live before is over, and life goes on."""
    site = Site()
    agent = Agent(site, "a")
    agent.ask(Register(*FRONT, "image"), Register(*STOCK, "image"))
    front = agent.start(FRONT)
    token = agent.invoke(front, "stock").token

    site.now_ms += leap_ms
    skipped = agent.invoke(front, "stock", step="2" * 16)
    stock = agent.start(STOCK, token, step="3" * 16)

    assert not skipped.allowed
    assert stock.allowed == (leap_ms == 0)
    assert not site.dispatcher.expire(now_ns=site.now_ns)
    assert agent.start(FRONT, step="4" * 16).allowed
    assert not agent.start(STOCK, token, step="5" * 16).allowed
