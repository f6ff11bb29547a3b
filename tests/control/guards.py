"""Guards played by a test over an agent's own socket, the history of what they saw, and the judge of that history.

A guard here is as honest or as compromised as its test wants: it asks whatever it is told to. What counts is what the agent's
answers let it do, so the judge looks at granted steps alone, and knows the policy only.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from control.processes import WAIT_S, Agent
from kalium.policy.automaton import NOWHERE, CompiledPolicy, LabelKey, States
from kalium.protocol.codec import FrameReader, encode
from kalium.protocol.frames import Answer, End, Finish, Frame, Hello, Invoke, Lease, Names, Policy, Start, Welcome

ANSWER_S = 3.0  # that a guard here waits: longer than a real one may, so that what comes late is seen
AGAIN_S = 0.02  # between two questions of one step


@dataclass
class Asked:
    """One question and what came of it; `answer` is None when nothing did."""

    guard: Guard
    question: Start | Invoke | Finish | End
    asked_s: float
    answer: Answer | None = None
    answered_s: float = 0.0

    @property
    def is_granted(self) -> bool:
        return self.answer is not None and self.answer.allowed


@dataclass
class History:
    """Every question of every guard, in the order of asking."""

    asked: list[Asked] = field(default_factory=list)

    def answered_after(self, moment_s: float, guards: Sequence[Guard] = ()) -> list[Asked]:
        """What was granted after a moment, to some guards or to all, in the order of the answers."""
        found = [each for each in self.asked if each.is_granted and each.answered_s > moment_s and (not guards or each.guard in guards)]
        return sorted(found, key=lambda each: each.answered_s)


class Guard:
    """One connection on an agent's guard socket."""

    def __init__(self, agent: Agent, app: str, function: str, history: History, container: str = "") -> None:
        self.agent = agent
        self.app = app
        self.function = function
        self.container = container or agent.register(app, function)
        self.history = history
        self.welcome = Welcome(False)
        self.version = 1
        self._ids = itertools.count(1)
        self._open: dict[int, asyncio.Future[Frame | None]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reading: asyncio.Task[None] | None = None

    async def connect(self, hello: Hello | None = None) -> Guard:
        """Say who it is, which a test may make up, and take the welcome."""
        reader, self._writer = await asyncio.open_unix_connection(str(self.agent.guard_socket))
        self._reading = asyncio.ensure_future(self._read(reader))
        answer = await self._ask(hello or Hello(self.container, self.app, self.function))
        if isinstance(answer, Welcome):
            self.welcome = answer
        return self

    @property
    def is_connected(self) -> bool:
        return self._reading is not None and not self._reading.done()

    async def closed(self) -> None:
        """Wait until the agent has ended the connection; TimeoutError when it does not."""
        assert self._reading is not None
        await asyncio.wait_for(asyncio.shield(self._reading), WAIT_S)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    async def start(self, token: str = "", step: str = "") -> Answer | None:
        return await self._record(Start(step or secrets.token_hex(8), token, "label", self.version))

    async def invoke(
        self, grant: Answer, callee: str, step: str = "", *, asynchronous: bool = False, callback: str = "", retry: bool = False
    ) -> Answer | None:
        question = Invoke(
            step or secrets.token_hex(8), grant.call, grant.invocation, callee, self.version,
            asynchronous=asynchronous, callback=callback, retry=retry,
        )  # fmt: skip
        return await self._record(question)

    async def finish(self, grant: Answer, outcome: str = "answered") -> Answer | None:
        return await self._record(Finish(grant.call, grant.invocation, outcome))

    def end(self, grant: Answer, outcome: str = "answered") -> None:
        """Nobody waits for it."""
        question = End(grant.call, grant.invocation, outcome)
        self.history.asked.append(Asked(self, question, time.monotonic()))
        self._send(0, question)

    async def _record(self, question: Start | Invoke | Finish) -> Answer | None:
        asked = Asked(self, question, time.monotonic())
        self.history.asked.append(asked)
        answer = await self._ask(question)
        asked.answered_s = time.monotonic()
        asked.answer = answer if isinstance(answer, Answer) else None
        return asked.answer

    async def _ask(self, question: Frame) -> Frame | None:
        number = next(self._ids)
        answer: asyncio.Future[Frame | None] = asyncio.get_running_loop().create_future()
        self._open[number] = answer
        if not self._send(number, question):
            return None
        try:
            return await asyncio.wait_for(answer, ANSWER_S)
        except asyncio.TimeoutError:
            return None

    def _send(self, number: int, frame: Frame) -> bool:
        if self._writer is None or not self.is_connected:
            return False
        self._writer.write(encode(number, frame))
        return True

    def send_bytes(self, data: bytes) -> None:
        assert self._writer is not None
        self._writer.write(data)

    async def _read(self, reader: asyncio.StreamReader) -> None:
        frames = FrameReader()
        try:
            while data := await reader.read(65536):
                frames.feed(data)
                while (found := frames.next_frame()) is not None:
                    number, frame = found
                    if isinstance(frame, (Policy, Lease, Names)):
                        continue
                    waiting = self._open.pop(number, None)
                    if waiting is not None and not waiting.done():
                        waiting.set_result(frame)
        except OSError:
            pass
        finally:
            for waiting in self._open.values():
                if not waiting.done():
                    waiting.set_result(None)
            self._open.clear()


def is_decided(answer: Answer | None) -> bool:
    """Whether somebody has decided: an answer that no fail mode replaces."""
    return answer is not None and answer.reason not in ("controller_unavailable", "overloaded")


# The judge


@dataclass
class _Edge:
    """A granted edge: to whom its tokens lead, and which join waits for it."""

    caller: str
    key: LabelKey
    group: int
    tokens: dict[str, str] = field(default_factory=dict)  # token -> callee


@dataclass
class _Walk:
    """Where an invocation can be, by what its guard was told."""

    guard: Guard
    function: str
    states: States
    call: str
    edge: _Edge | None
    open: dict[int, int] = field(default_factory=dict)


def faults(history: History, policies: dict[str, CompiledPolicy], *, may_forget: bool = False) -> list[str]:
    """What was granted and the policies forbid; and, unless answers may be forgotten, those that changed. Knows nothing of how anybody
    decided.

    An end counts for a join from when it was said, so a grant is a fault only when nothing could have permitted it.
    """
    found: list[str] = []
    answers: dict[tuple[str, str], Answer] = {}
    spent: dict[str, str] = {}  # token -> step
    tokens: dict[str, _Edge] = {}
    callbacks: dict[str, _Edge] = {}
    walks: dict[tuple[str, str], _Walk] = {}
    seen: set[tuple[str, str]] = set()
    # Grants in the order in which they were heard, ends in that of being said.
    events = sorted(history.asked, key=lambda each: each.asked_s if isinstance(each.question, (End, Finish)) else each.answered_s)
    for each in events:
        question, answer, guard = each.question, each.answer, each.guard
        policy = policies[guard.app]
        if isinstance(question, (End, Finish)):
            walk = walks.pop((question.call, question.invocation), None)
            if walk is not None and walk.guard.container != guard.container:
                walks[question.call, question.invocation] = walk  # somebody else's word
            elif walk is not None and walk.edge is not None and walk.edge.group and question.outcome == "answered":
                _close(walks, walk)
            continue
        if answer is None:
            continue
        name = (guard.container, question.step)
        if is_decided(answer):
            before = answers.setdefault(name, answer)
            if answer_without(before) != answer_without(answer) and answer.reason != "malformed" and not may_forget:
                found.append(f"step {question.step} of {guard.function} was answered {before}, and then {answer}")
        if not answer.allowed or name in seen:
            continue
        seen.add(name)
        if isinstance(question, Start):
            found += _start(guard, question, answer, policy, spent, tokens, callbacks, walks)
        else:
            found += _invoke(guard, question, answer, policy, tokens, callbacks, walks)
    return found


def answer_without(answer: Answer) -> Answer:
    """The answer without what is for people."""
    return Answer(answer.allowed, answer.reason, answer.call, answer.invocation, answer.token, (), "", answer.callback, answer.hold)


def _start(
    guard: Guard,
    question: Start,
    answer: Answer,
    policy: CompiledPolicy,
    spent: dict[str, str],
    tokens: dict[str, _Edge],
    callbacks: dict[str, _Edge],
    walks: dict[tuple[str, str], _Walk],
) -> list[str]:
    found = []
    edge = None
    if not question.token:
        if guard.function not in policy.entries:
            found.append(f"{guard.function}, which is no entry, began without a token")
    else:
        edge = tokens.get(question.token) or callbacks.get(question.token)
        if edge is None:
            found.append(f"{guard.function} began with a token that nobody was given")
        elif edge.tokens[question.token] != guard.function:
            found.append(f"{guard.function} began with a token for {edge.tokens[question.token]}")
        if question.token in spent:
            found.append(f"{guard.function} began with a token that was spent")
        spent[question.token] = question.step
        if question.token in callbacks:
            edge = None
    walks[answer.call, answer.invocation] = _Walk(guard, guard.function, policy.start(guard.function), answer.call, edge)
    return found


def _invoke(
    guard: Guard,
    question: Invoke,
    answer: Answer,
    policy: CompiledPolicy,
    tokens: dict[str, _Edge],
    callbacks: dict[str, _Edge],
    walks: dict[tuple[str, str], _Walk],
) -> list[str]:
    walk = walks.get((question.call, question.invocation))
    if walk is None:
        return [f"{guard.function} invoked {question.callee} in an invocation that is none"]
    if walk.guard.container != guard.container:
        return [f"{guard.function} invoked {question.callee} in an invocation of {walk.guard.container}"]
    key = LabelKey(question.callee, question.asynchronous, question.callback)
    if question.retry:
        previous = next((edge for edge in reversed(list(tokens.values())) if edge.caller == question.invocation), None)
        if previous is None or previous.key != key:
            return [f"{guard.function} invoked {question.callee} once more, which it had not done last"]
        edge = previous
    else:
        states, index = policy.step(walk.function, walk.states, key, tuple(walk.open))
        if states == NOWHERE:
            return [f"{guard.function} invoked {key.text()} at {sorted(walk.states)} with {walk.open} open"]
        walk.states = states
        label = policy.app_cfg[walk.function].labels[index]
        edge = _Edge(question.invocation, key, label.join)
        if label.join:
            walk.open[label.join] = walk.open.get(label.join, 0) + 1
    edge.tokens[answer.token] = question.callee
    tokens[answer.token] = edge
    if answer.callback:
        edge.tokens[answer.callback] = question.callback
        callbacks[answer.callback] = edge
    return []


def _close(walks: dict[tuple[str, str], _Walk], ended: _Walk) -> None:
    assert ended.edge is not None
    waiting = walks.get((ended.call, ended.edge.caller))
    if waiting is not None and waiting.open.get(ended.edge.group):
        waiting.open[ended.edge.group] -= 1
        if not waiting.open[ended.edge.group]:
            del waiting.open[ended.edge.group]


def reasons(history: History) -> dict[str, int]:
    """How many answers there were of each reason; "" for none."""
    found: dict[str, int] = defaultdict(int)
    for each in history.asked:
        if not isinstance(each.question, End):
            found[each.answer.reason if each.answer is not None else ""] += 1
    return dict(found)


def same(first: Answer, second: Answer | None) -> bool:
    """Whether two answers say the same to a program."""
    return second is not None and answer_without(first) == answer_without(second)
