"""Sessions as scripts: both real cores, joined by a wire that cuts the bytes where it likes."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from kalium.protocol import limits
from kalium.protocol.codec import encode
from kalium.protocol.frames import (
    AgentHello,
    Answer,
    ControllerWelcome,
    Frame,
    Hello,
    InstanceEnd,
    InstanceFinish,
    InstanceInvoke,
    InstanceStart,
    Lease,
    Mode,
    Ping,
    Policy,
    Pong,
    Register,
    Report,
    Start,
    Status,
    StatusAnswer,
    StatusReport,
    Unregister,
)
from kalium.protocol.session import (
    AGENT_TRANSITIONS,
    ANSWERS,
    CONTROLLER_TRANSITIONS,
    NS_PER_MS,
    AgentSession,
    CloseReason,
    ControllerSession,
    Event,
    LocalError,
    SessionState,
)

ORIGIN = ("c1", "shop", "front")
START = InstanceStart("0" * 16, "", "", 1, *ORIGIN)
INVOKE = InstanceInvoke("1" * 16, "call", "invocation", "back", 1, *ORIGIN)
END = InstanceEnd("call", "invocation", "answered", *ORIGIN)
REGISTER = Register(*ORIGIN, "image")
REPORT = StatusReport({"shop": 1}, 1, 0, 0)
GRANTED = Answer(True, "allowed", "call", "invocation")
RUN = "00f1e2d3c4b5a697"
WELCOME = ControllerWelcome(True, lease_ms=60_000, policies={"shop": b"signed"})


class Link:
    """An agent and a controller joined by a wire of pieces of `piece` bytes. `now_ns` is everybody's clock."""

    def __init__(self, *, piece: int = 1 << 20) -> None:
        self.now_ns = 0
        self.agent = ControllerSession()
        self.controller = AgentSession(now_ns=0)
        self._piece = piece

    def to_controller(self) -> list[Event]:
        """Carry what the agent wrote and return what the controller makes of it."""
        for piece in self._pieces(self.agent.data_to_send()):
            self.controller.receive_data(piece, now_ns=self.now_ns)
        return self.controller.events()

    def to_agent(self) -> list[Event]:
        """Carry what the controller wrote and return what the agent makes of it."""
        for piece in self._pieces(self.controller.data_to_send()):
            self.agent.receive_data(piece, now_ns=self.now_ns)
        return self.agent.events()

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        for begin, end in pairwise([*range(0, len(data), self._piece), len(data)]):
            yield data[begin:end]


def welcomed(*, piece: int = 1 << 20) -> Link:
    """A link whose agent has been welcomed."""
    link = Link(piece=piece)
    hello = link.agent.ask(AgentHello("node0", RUN))
    assert link.to_controller() == [Event(hello, AgentHello("node0", RUN))]
    link.controller.answer(hello, WELCOME)
    assert link.to_agent() == [Event(hello, WELCOME)]
    return link


@pytest.mark.parametrize("piece", [1, 2, 13, 1 << 20])
def test_a_conversation_is_the_same_in_any_pieces(piece: int) -> None:
    link = welcomed(piece=piece)

    register, start, invoke = link.agent.ask(REGISTER), link.agent.ask(START), link.agent.ask(INVOKE)
    link.agent.tell(END)
    link.agent.tell(Unregister("c1"))
    assert link.to_controller() == [Event(register, REGISTER), Event(start, START), Event(invoke, INVOKE), Event(0, END), Event(0, Unregister("c1"))]

    denied = Answer(False, "edge_not_allowed", expected=("back",))
    link.controller.answer(invoke, denied)
    link.controller.push(Lease(60_000))
    link.controller.answer(register, Answer(True, "allowed"))
    link.controller.push(Policy("shop", b"newer"))
    link.controller.answer(start, GRANTED)
    assert link.to_agent() == [
        Event(invoke, denied),
        Event(0, Lease(60_000)),
        Event(register, Answer(True, "allowed")),
        Event(0, Policy("shop", b"newer")),
        Event(start, GRANTED),
    ]
    assert (link.agent.state, link.controller.state) == (SessionState.SERVING, SessionState.SERVING)


def test_anybody_with_a_certificate_may_ask_for_the_status_without_a_hello() -> None:
    link = Link()

    status = link.agent.ask(Status())
    assert link.to_controller() == [Event(status, Status())]
    link.controller.answer(status, StatusAnswer(REPORT))

    assert link.to_agent() == [Event(status, StatusAnswer(REPORT))]
    assert link.controller.state is SessionState.NEW


def test_an_agent_need_not_wait_for_its_welcome() -> None:
    """A reconnecting agent registers its instances in the same write as its hello."""
    link = Link()
    hello, register = link.agent.ask(AgentHello("node0", RUN)), link.agent.ask(REGISTER)

    assert link.to_controller() == [Event(hello, AgentHello("node0", RUN)), Event(register, REGISTER)]


def test_a_welcome_that_says_no_ends_both_sides_and_is_still_delivered() -> None:
    link = Link()
    hello = link.agent.ask(AgentHello("node0", RUN))
    link.to_controller()

    link.controller.answer(hello, ControllerWelcome(False, "too_many_agents"))

    assert link.to_agent() == []
    assert (link.controller.close_reason, link.agent.close_reason) == ("refused", "refused")
    assert link.agent.close_detail == "too_many_agents"


def test_an_agent_of_another_protocol_is_told_so() -> None:
    link = Link()
    link.agent.ask(AgentHello("node0", RUN, protos=(1, 3)))

    assert link.to_controller() == []
    link.to_agent()

    assert (link.agent.close_reason, link.agent.close_detail) == ("refused", "unsupported_protocol")


EVERY_QUESTION_OR_MESSAGE: list[tuple[int, Frame]] = [
    (1, Hello("c1", "shop", "front")),
    (1, Start("0" * 16, "", "", 1)),
    (1, START),
    (1, INVOKE),
    (0, END),
    (1, GRANTED),
    (0, Lease(1)),
    (0, Policy("shop", b"")),
    (1, AgentHello("node0", RUN)),
    (1, WELCOME),
    (1, REGISTER),
    (0, Unregister("c1")),
    (1, Status()),
    (1, StatusAnswer(REPORT)),
    (1, InstanceFinish("call", "invocation", "answered", *ORIGIN)),
    (0, Mode("enforce", 1)),
    (1, Ping()),
    (1, Pong()),
    (0, Report(0, "")),
]


@pytest.mark.parametrize(("frame_id", "frame"), EVERY_QUESTION_OR_MESSAGE, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("state", [SessionState.NEW, SessionState.SERVING])
def test_a_controller_takes_what_its_table_lists_and_closes_on_the_rest(state: SessionState, frame_id: int, frame: Frame) -> None:
    """An agent cannot register before it has said who it is, say it twice, or speak as a guard or a controller."""
    session = AgentSession(now_ns=0) if state is SessionState.NEW else welcomed().controller

    session.receive_data(encode(frame_id, frame), now_ns=0)

    after = CONTROLLER_TRANSITIONS[state].get(type(frame))
    if after is None:
        assert (session.events(), session.close_reason) == ([], "unexpected_frame")
    else:
        assert (session.events(), session.state, session.close_reason) == ([Event(frame_id, frame)], after, None)


@pytest.mark.parametrize("frame", [GRANTED, Lease(1), AgentHello("node0", RUN), REGISTER, Status()], ids=lambda frame: type(frame).__name__)
def test_an_agent_takes_nothing_from_a_controller_that_has_not_welcomed_it(frame: Frame) -> None:
    session = ControllerSession()
    session.ask(AgentHello("node0", RUN))

    session.receive_data(encode(0 if type(frame) is Lease else 1, frame), now_ns=0)

    assert (session.events(), session.close_reason) == ([], "unexpected_frame")


def test_the_tables_and_the_answers_fit_together() -> None:
    """Every question that a controller takes has an answer that an agent takes, and a closed session takes nothing."""
    questions = {frame for taken in CONTROLLER_TRANSITIONS.values() for frame in taken}
    answers = {frame for taken in AGENT_TRANSITIONS.values() for frame in taken}

    assert questions - {Unregister, InstanceEnd, Report} == set(ANSWERS)
    assert answers - {Lease, Policy} == set(ANSWERS.values())
    assert CONTROLLER_TRANSITIONS[SessionState.CLOSED] == AGENT_TRANSITIONS[SessionState.CLOSED] == {}


def test_what_stood_before_a_broken_frame_is_handed_out() -> None:
    """An END in front of garbage still counts: otherwise a bad agent keeps its invocations alive."""
    session = welcomed().controller

    session.receive_data(encode(0, END) + b"KLx", now_ns=0)

    assert session.events() == [Event(0, END)]
    assert (session.state, session.close_reason) == (SessionState.CLOSED, "bad_version")


def test_a_closed_session_listens_and_speaks_no_more() -> None:
    session = welcomed().controller
    session.receive_data(b"KM", now_ns=0)

    session.receive_data(encode(0, END), now_ns=0)

    assert session.events() == []
    with pytest.raises(LocalError):
        session.push(Lease(1))


def test_the_first_reason_of_a_close_stays() -> None:
    session = welcomed().controller

    session.close(CloseReason.REPLACED)
    session.receive_end()
    session.close(CloseReason.LOST)

    assert session.close_reason == "replaced"


@pytest.mark.parametrize(("data", "reason"), [(b"", "end_of_stream"), (encode(0, END)[:-1], "truncated")])
def test_the_end_of_a_stream_is_clean_only_between_frames(data: bytes, reason: str) -> None:
    session = welcomed().controller
    session.receive_data(data, now_ns=0)

    session.receive_end()

    assert session.close_reason == reason


def test_two_open_questions_cannot_share_an_id() -> None:
    """The agent could not tell which of them was answered."""
    session = welcomed().controller

    session.receive_data(encode(5, START) + encode(5, INVOKE), now_ns=0)

    assert (session.events(), session.close_reason) == ([Event(5, START)], "id_in_use")


def test_an_id_may_be_used_again_after_its_answer() -> None:
    session = welcomed().controller
    session.receive_data(encode(5, START), now_ns=0)
    session.answer(5, GRANTED)

    session.receive_data(encode(5, INVOKE), now_ns=0)

    assert session.close_reason is None


def test_more_open_questions_than_the_bound_close_the_connection() -> None:
    session = welcomed().controller

    session.receive_data(b"".join(encode(frame_id, Ping()) for frame_id in range(1, limits.QUESTIONS_MAX + 2)), now_ns=0)

    assert (len(session.events()), session.close_reason) == (limits.QUESTIONS_MAX, "too_many_questions")


@pytest.mark.parametrize(
    ("frame_id", "frame"), [(9, GRANTED), (1, GRANTED), (2, StatusAnswer(REPORT))], ids=["never_asked", "answered_before", "another_kind"]
)
def test_an_agent_closes_on_an_answer_to_nothing(frame_id: int, frame: Frame) -> None:
    link = welcomed()
    assert link.agent.ask(REGISTER) == 2

    link.agent.receive_data(encode(frame_id, frame), now_ns=0)

    assert (link.agent.events(), link.agent.close_reason) == ([], "unknown_id")


@pytest.mark.parametrize(("after_ms", "reason"), [(limits.HELLO_TIMEOUT_MS - 1, None), (limits.HELLO_TIMEOUT_MS, "hello_timeout")])
def test_who_does_not_say_hello_in_time_is_closed(after_ms: int, reason: str | None) -> None:
    session = AgentSession(now_ns=7)
    assert session.deadline_ns() == 7 + limits.HELLO_TIMEOUT_MS * NS_PER_MS

    session.expire(now_ns=7 + after_ms * NS_PER_MS)

    assert session.close_reason == reason


def test_a_hello_that_comes_too_late_is_not_taken() -> None:
    """Even when the shell's timer is late: the bytes themselves carry the time."""
    session = AgentSession(now_ns=0)

    session.receive_data(encode(1, AgentHello("node0", RUN)), now_ns=limits.HELLO_TIMEOUT_MS * NS_PER_MS)

    assert (session.events(), session.close_reason) == ([], "hello_timeout")


def test_a_welcomed_agent_may_stay_silent_for_ever() -> None:
    session = welcomed().controller

    session.expire(now_ns=10**18)

    assert (session.deadline_ns(), session.close_reason) == (None, None)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda link: link.controller.answer(99, GRANTED),
        lambda link: link.controller.answer(link.agent.ask(Status()), GRANTED),
        lambda link: AgentSession(now_ns=0).push(Lease(1)),
        lambda link: link.agent.ask(END),
        lambda link: [link.agent.ask(Status()) for _ in range(limits.QUESTIONS_MAX + 1)],
    ],
    ids=["nobody_asked", "not_received_yet", "before_the_welcome", "no_question", "too_many_open"],
)
def test_a_mistake_of_ours_is_raised_and_not_sent(mistake: Callable[[Link], object]) -> None:
    with pytest.raises(LocalError):
        mistake(welcomed())
