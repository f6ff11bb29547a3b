"""One connection between an agent and a controller, both ends, as cores that do no I/O.

Bytes go in by `receive_data`, frames come out of `events`, and what has to be written comes out of `data_to_send`. Time
comes in as `now_ns`, of any monotonic clock. A shell feeds, collects, writes and closes, and decides nothing:

    session.receive_data(data, now_ns=clock())
    for event in session.events(): ...          # and answer by session.answer(event.id, frame)
    transport.write(session.data_to_send())
    if session.close_reason is not None: transport.close()
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Mapping, Sequence

import msgspec

from kalium.protocol.codec import FrameReader, ProtocolError, encode
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
from kalium.protocol.limits import HELLO_TIMEOUT_MS, ID_MAX, PROTOCOLS, PROTOCOLS_MAX, QUESTIONS_MAX

NS_PER_MS = 1_000_000


class SessionState(enum.Enum):
    """Where a connection stands; drawn in docs/reference/protocol.md from the two tables below."""

    NEW = "new"
    SERVING = "serving"
    CLOSED = "closed"


class CloseReason(str, enum.Enum):
    """Why a session ended, beyond the codes of kalium.protocol.codec.ERROR_CODES. A closed set: it is a log field."""

    END_OF_STREAM = "end_of_stream"  # the peer closed between two frames
    UNEXPECTED_FRAME = "unexpected_frame"  # a frame that has no entry in the table here
    HELLO_TIMEOUT = "hello_timeout"
    REFUSED = "refused"  # the welcome said no
    WRONG_IDENTITY = "wrong_identity"  # its certificate is not that of an agent of the node that it names
    REPLACED = "replaced"  # the same node has connected again
    UNKNOWN_ID = "unknown_id"  # an answer to nothing that was asked
    ID_IN_USE = "id_in_use"  # a second question with the id of an open one
    TOO_MANY_QUESTIONS = "too_many_questions"
    SLOW_READER = "slow_reader"  # the peer does not read what is written to it
    EXPIRED = "certificate_expired"  # the peer's, while the connection was open
    DISTRUSTED = "ca_distrusted"  # the peer's certificate is of a CA that is not ours any more
    SHUTDOWN = "shutdown"
    LOST = "lost"  # the connection broke


# What an agent may send and where that leads. A frame without an entry is the peer's error, never ours to guess.
# An agent need not wait for its welcome: what it sends right behind the hello is dropped if the welcome says no.
CONTROLLER_TRANSITIONS: Mapping[SessionState, Mapping[type[Frame], SessionState]] = {
    SessionState.NEW: {
        AgentHello: SessionState.SERVING,
        Status: SessionState.NEW,
    },
    SessionState.SERVING: {
        Register: SessionState.SERVING,
        Unregister: SessionState.SERVING,
        InstanceStart: SessionState.SERVING,
        InstanceInvoke: SessionState.SERVING,
        InstanceEnd: SessionState.SERVING,
        InstanceFinish: SessionState.SERVING,
        Ping: SessionState.SERVING,
        Report: SessionState.SERVING,
        Status: SessionState.SERVING,
    },
    SessionState.CLOSED: {},
}

# The same for what a controller may send.
AGENT_TRANSITIONS: Mapping[SessionState, Mapping[type[Frame], SessionState]] = {
    SessionState.NEW: {
        ControllerWelcome: SessionState.SERVING,
        StatusAnswer: SessionState.NEW,
    },
    SessionState.SERVING: {
        Answer: SessionState.SERVING,
        Policy: SessionState.SERVING,
        Lease: SessionState.SERVING,
        Pong: SessionState.SERVING,
        StatusAnswer: SessionState.SERVING,
    },
    SessionState.CLOSED: {},
}

# Which frame answers which question.
ANSWERS: Mapping[type[Frame], type[Frame]] = {
    AgentHello: ControllerWelcome,
    Register: Answer,
    InstanceStart: Answer,
    InstanceInvoke: Answer,
    InstanceFinish: Answer,
    Ping: Pong,
    Status: StatusAnswer,
}


class Event(msgspec.Struct, frozen=True, gc=False):
    """A frame that its session's table allows here. `id` is 0 when nobody waits for an answer to it."""

    id: int
    frame: Frame


def negotiated(theirs: Sequence[int]) -> int:
    """The highest version of the messages that both sides speak; 0 when there is none."""
    return max(set(theirs[:PROTOCOLS_MAX]) & set(PROTOCOLS), default=0)


class LocalError(Exception):
    """Our own side misused a session: answered what nobody asked, or spoke out of turn."""


class _Session(abc.ABC):
    """What both ends share: cutting frames, the table, the open questions, what waits to be written, the end."""

    _transitions: Mapping[SessionState, Mapping[type[Frame], SessionState]]

    def __init__(self) -> None:
        self.state = SessionState.NEW
        self.close_reason: str | None = None  # set once, together with CLOSED
        self.close_detail = ""
        self._reader = FrameReader()
        self._events: list[Event] = []
        self._out: list[bytes] = []
        self._open: dict[int, type[Frame]] = {}  # questions that have no answer yet, by id

    def receive_data(self, data: bytes, *, now_ns: int) -> None:
        """Feed bytes of the peer, in any split. Afterwards call `events` and `data_to_send`, and look at `close_reason`.

        Raises nothing for a bad peer: the session moves to CLOSED and `close_reason` says which rule it broke. What came
        before the broken frame is still handed out.
        """
        self.expire(now_ns=now_ns)
        if self.state is SessionState.CLOSED:
            return  # bytes that were under way when we closed
        self._reader.feed(data)
        take, taken = self._transitions[self.state], self._events
        try:
            for frame_id, frame in self._reader.frames():
                after = take.get(type(frame))
                if after is None:
                    self.close(CloseReason.UNEXPECTED_FRAME, f"{type(frame).__name__} in state {self.state.value}")
                elif not frame_id or self._accept(frame_id, frame):
                    if after is not self.state:
                        self.state, take = after, self._transitions[after]
                    taken.append(Event(frame_id, frame))
                if self.close_reason is not None:
                    break
        except ProtocolError as error:
            self.close(error.code, str(error))

    def receive_end(self) -> None:
        """The peer has said its last byte."""
        try:
            self._reader.end()
        except ProtocolError as error:
            self.close(error.code, str(error))
        else:
            self.close(CloseReason.END_OF_STREAM)

    def events(self) -> list[Event]:
        """What the peer has said since the last call, in order; each is handed out once."""
        events, self._events = self._events, []
        return events

    def data_to_send(self) -> bytes:
        """Whole frames that were not written yet, in order. The shell writes them, and only then closes a CLOSED session."""
        data = b"".join(self._out)
        self._out.clear()
        return data

    def close(self, reason: str, detail: str = "") -> None:
        """End the session for a reason of CloseReason or ERROR_CODES. The first reason stays."""
        if self.state is not SessionState.CLOSED:
            self.state = SessionState.CLOSED
            self.close_reason = reason.value if isinstance(reason, CloseReason) else reason
            self.close_detail = detail
            self._open.clear()

    def deadline_ns(self) -> int | None:
        """When the shell has to call `expire`, if ever."""
        return None

    def expire(self, *, now_ns: int) -> None:  # noqa: B027 - a session whose deadline_ns is None has nothing to close
        """Close what has waited too long."""

    @abc.abstractmethod
    def _accept(self, frame_id: int, frame: Frame) -> bool:
        """Whether a question or an answer that the table allows becomes an event; otherwise the session is closed, or has answered it."""

    def _send(self, frame_id: int, frame: Frame) -> None:
        if self.state is SessionState.CLOSED:
            raise self._closed(frame)
        self._out.append(encode(frame_id, frame))

    def _closed(self, frame: Frame) -> LocalError:
        return LocalError(f"{type(frame).__name__} on a session that is closed: {self.close_reason}")


class AgentSession(_Session):
    """The controller's side of one agent's connection."""

    _transitions = CONTROLLER_TRANSITIONS

    def __init__(self, *, now_ns: int) -> None:
        super().__init__()
        self._hello_deadline_ns = now_ns + HELLO_TIMEOUT_MS * NS_PER_MS

    def answer(self, frame_id: int, frame: Frame) -> None:
        """Answer the open question `frame_id`. A welcome that is not ok closes the session behind it.

        Raises:
            LocalError: no such question is open, or it has another kind of answer.
        """
        question = self._open.pop(frame_id, None)
        if question is None or ANSWERS[question] is not type(frame):
            raise LocalError(f"{type(frame).__name__} for id {frame_id}, where {question and question.__name__} is open")
        if self.state is SessionState.CLOSED:
            raise self._closed(frame)
        self._out.append(encode(frame_id, frame))
        if type(frame) is ControllerWelcome and not frame.ok:
            self.close(CloseReason.REFUSED, frame.reason)

    def push(self, frame: Lease | Policy) -> None:
        """Tell a welcomed agent what it did not ask for. Raises LocalError in another state than SERVING."""
        if self.state is not SessionState.SERVING:
            raise LocalError(f"{type(frame).__name__} in state {self.state.value}")
        self._send(0, frame)

    def deadline_ns(self) -> int | None:
        return self._hello_deadline_ns if self.state is SessionState.NEW else None

    def expire(self, *, now_ns: int) -> None:
        if self.state is SessionState.NEW and now_ns >= self._hello_deadline_ns:
            self.close(CloseReason.HELLO_TIMEOUT, f"no AGENT_HELLO within {HELLO_TIMEOUT_MS} ms")

    def _accept(self, frame_id: int, frame: Frame) -> bool:
        if frame_id in self._open:
            self.close(CloseReason.ID_IN_USE, f"{type(frame).__name__} with the id of an open question")
            return False
        if len(self._open) >= QUESTIONS_MAX:
            self.close(CloseReason.TOO_MANY_QUESTIONS, f"more than {QUESTIONS_MAX} are open")
            return False
        if type(frame) is Status and Status in self._open.values():
            # Its answer is some ten thousand times as long: all at once they would fill the memory, and hold up everybody else.
            self.close(CloseReason.TOO_MANY_QUESTIONS, "more than one STATUS is open")
            return False
        self._open[frame_id] = type(frame)
        if type(frame) is AgentHello and not negotiated(frame.protos):
            self.answer(frame_id, ControllerWelcome(False, "unsupported_protocol"))
            return False
        return True


class ControllerSession(_Session):
    """The agent's side of its connection: what tests and `kalium controller status` speak with. The agent proper is in Go."""

    _transitions = AGENT_TRANSITIONS

    def __init__(self) -> None:
        super().__init__()
        self._last_id = 0

    def ask(self, question: Frame) -> int:
        """Send a question and return its id, with which the event of its answer comes. A hello has to be the first."""
        if type(question) not in ANSWERS:
            raise LocalError(f"{type(question).__name__} has no answer: tell it")
        if len(self._open) >= QUESTIONS_MAX:
            raise LocalError(f"{QUESTIONS_MAX} questions are open")
        self._last_id = self._last_id % ID_MAX + 1
        self._send(self._last_id, question)
        self._open[self._last_id] = type(question)
        return self._last_id

    def tell(self, message: Unregister | InstanceEnd | Report) -> None:
        """Send what has no answer."""
        self._send(0, message)

    def _accept(self, frame_id: int, frame: Frame) -> bool:
        question = self._open.pop(frame_id, None)
        if question is None or ANSWERS[question] is not type(frame):
            self.close(CloseReason.UNKNOWN_ID, f"{type(frame).__name__} for an id with another question or none")
            return False
        if type(frame) is ControllerWelcome and not frame.ok:
            self.close(CloseReason.REFUSED, frame.reason)
            return False
        return True
