"""Live calls: where each stands in its app CFG, which tokens are pending, what was answered last.

`Calls` is what a store of them does; `MemoryCalls` is the one of a single controller. Answers come at once or later (Deferred).
Pure: time comes in as `now_ns` of one monotonic clock, ids and tokens come from `mint`. A step costs the same at the end of a
long call as at its beginning, and every table has a bound (`limits`). An app cursor belongs to (app, call, invocation). A denial
moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from kalium.controller.deadlines import Deadlines
from kalium.controller.limits import LIMITS, Limits
from kalium.controller.registry import NS_PER_MS, Instance, denied, full
from kalium.policy.automaton import CompiledPolicy, LabelKey, States
from kalium.policy.message import Reason
from kalium.protocol.frames import Answer, InstanceInvoke

Result = TypeVar("Result")
Remembered = TypeVar("Remembered")
Held = Callable[[str, int, int], "CompiledPolicy | None"]  # held(app, version, now_ns): the policy, if steps may be taken by it


@dataclass(frozen=True)
class Evicted:
    """An invocation that nobody ended. `why` is "timeout", "agent_gone" or "unregistered"."""

    app: str
    function: str
    call: str
    invocation: str
    instance: str
    why: str


class Deferred(Generic[Result]):
    """A result that is not there yet. Resolved once, by the store; taken once, by who waits for it."""

    __slots__ = ("_callback", "_is_resolved", "_result")

    def __init__(self) -> None:
        self._callback: Callable[[Result], None] | None = None
        self._is_resolved = False
        self._result: Result

    def resolve(self, result: Result) -> None:
        """Here it is."""
        assert not self._is_resolved, "resolved twice"
        self._is_resolved = True
        self._result = result
        if self._callback is not None:
            self._callback(result)

    def then(self, callback: Callable[[Result], None]) -> None:
        """Give the result to `callback`: now if it is there, otherwise when it comes."""
        assert self._callback is None, "taken twice"
        self._callback = callback
        if self._is_resolved:
            callback(self._result)


class Calls(Protocol):
    """A store of live calls. A step that the store itself cannot answer is answered `controller_unavailable`."""

    kind: str  # for the status: memory or redis

    def controllers(self) -> Sequence[str]:
        """The names of the controllers that share the store, as far as it knows."""

    def fault(self) -> str:
        """Why no step can be taken now, "" when it can: what /readyz says of the store."""

    def adopt(self, who: Instance, *, now_ns: int) -> None:
        """The instance speaks through this controller from now on; what it had begun through another one goes on here."""

    def begin(self, who: Instance, version: int, step: str, *, now_ns: int) -> Answer | Deferred[Answer]:
        """A START without a token: a new call of the instance's function, judged by `version`."""

    def join(self, who: Instance, version: int, token: str, step: str, *, now_ns: int) -> Answer | Deferred[Answer]:
        """A START with a token: an invocation in the call that the token belongs to."""

    def invoke(self, who: Instance, said: InstanceInvoke, *, now_ns: int) -> Answer | Deferred[Answer]:
        """May the invocation call `said.callee` now? Granted: its cursor has moved, and the answer holds the callee's token."""

    def finish(self, who: Instance, call: str, invocation: str, outcome: str, *, now_ns: int) -> Answer | Deferred[Answer]:
        """The invocation is over, by END or FINISH. Denied: this instance has no such invocation."""

    def forget(self, who: Instance, why: str, *, now_ns: int) -> list[Evicted] | Deferred[list[Evicted]]:
        """The instance is gone from this controller, and what it was doing ends unless another controller has adopted it."""

    def expire(self, *, now_ns: int) -> list[Evicted]:
        """Remove what is over, a bounded portion; see `has_due`. Nothing waits for this to be denied."""

    def has_due(self, *, now_ns: int) -> bool:
        """Whether `expire` has left something over."""

    def counts(self) -> tuple[int, int]:
        """Live calls and live invocations."""


class _Call:
    """One request's way through an app, under the version that it began with."""

    __slots__ = ("app", "id", "invocations", "policy", "tokens")

    def __init__(self, app: str, call_id: str, policy: CompiledPolicy) -> None:
        self.app = app
        self.id = call_id
        self.policy = policy
        self.invocations: dict[str, _Invocation] = {}
        self.tokens = 0  # pending ones


class _Invocation:
    """One execution of a function inside a call, and where it stands in the app CFG."""

    __slots__ = ("call", "function", "id", "record", "states", "steps")

    def __init__(self, call: _Call, invocation_id: str, record: _Record, states: States) -> None:
        self.call = call
        self.id = invocation_id
        self.function = record.function
        self.record = record
        self.states = states
        self.steps: dict[str, tuple[str, Answer]] | None = None  # step -> (callee, answer); most invocations never ask


class _Token:
    """The right to start `callee` once, within a call."""

    __slots__ = ("call", "callee", "text")

    def __init__(self, text: str, call: _Call, callee: str) -> None:
        self.text = text
        self.call = call
        self.callee = callee


class _Record:
    """What an instance has begun. `owner` is its registration at the controller that adopted it last."""

    __slots__ = ("function", "id", "invocations", "owner", "starts")

    def __init__(self, owner: Instance) -> None:
        self.id = owner.id
        self.function = owner.function
        self.owner = owner
        self.invocations: dict[_Invocation, None] = {}
        self.starts: dict[str, tuple[tuple[str, int], Answer]] = {}  # step -> ((token, version), answer)


_UNKNOWN_CALL = denied(Reason.UNKNOWN_CALL, "no such invocation of this instance is live")
_NO_TOKEN = denied(Reason.BAD_TOKEN, "the token is not pending for this function")
_STEP_REUSED = denied(Reason.MALFORMED, "the step id has been used for another question")
_FINISHED = Answer(True, Reason.ALLOWED.value)


class MemoryCalls:
    """The calls of one controller, in its own memory. Not shared between threads."""

    kind = "memory"

    def __init__(self, *, held: Held, mint: Callable[[], str], limits: Limits = LIMITS) -> None:
        """`mint` gives 32 fresh hexadecimal digits, 128 random bits, at each call."""
        self._held = held
        self._mint = mint
        self._limits = limits
        self._records: dict[tuple[str, str, str, str], _Record] = {}
        self._calls: dict[tuple[str, str], _Call] = {}
        self._tokens: dict[str, _Token] = {}
        self._invocations = 0
        self._token_deadlines: Deadlines[_Token] = Deadlines(limits.token_ms * NS_PER_MS)
        # One queue for each lifetime, which is a function's invocation timeout and the grace. Policies have few of them.
        self._invocation_deadlines: dict[int, Deadlines[_Invocation]] = {}

    def controllers(self) -> Sequence[str]:
        """Nobody shares a process's memory."""
        return ()

    def fault(self) -> str:
        """Memory is always there."""
        return ""

    def adopt(self, who: Instance, *, now_ns: int) -> None:  # noqa: ARG002 - nothing here depends on when
        """As Calls.adopt."""
        key = (who.node, who.id, who.app, who.function)
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = _Record(who)
        record.owner = who
        who.calls = record

    def begin(self, who: Instance, version: int, step: str, *, now_ns: int) -> Answer:
        """As Calls.begin."""
        return self._start(who, version, "", step, now_ns)

    def join(self, who: Instance, version: int, token: str, step: str, *, now_ns: int) -> Answer:
        """As Calls.join."""
        return self._start(who, version, token, step, now_ns)

    def _start(self, who: Instance, version: int, token: str, step: str, now_ns: int) -> Answer:
        record: _Record = who.calls
        question = (token, version)
        remembered = record.starts.get(step)
        if remembered is not None:
            return remembered[1] if remembered[0] == question else _STEP_REUSED
        if len(record.invocations) >= self._limits.invocations_per_instance:
            return full("live invocations of one instance", self._limits.invocations_per_instance)
        answer = self._start_in_call(who, version, token, now_ns) if token else self._start_call(who, version, now_ns)
        if answer.reason != Reason.OVERLOADED.value:  # a full table is no decision: asked again it may have room
            _remember(record.starts, step, (question, answer), self._limits.starts_per_instance)
        return answer

    def _start_call(self, who: Instance, version: int, now_ns: int) -> Answer:
        policy = self._held(who.app, version, now_ns)
        if policy is None:
            return _mismatch(who.app, version)
        if who.function not in policy.functions:
            return denied(Reason.UNKNOWN_FUNCTION, f"version {version} of {who.app} has no function {who.function}")
        if who.function not in policy.entries:
            return denied(Reason.NOT_AN_ENTRY, f"{who.function} starts only with the token of a granted invoke")
        if len(self._calls) >= self._limits.calls:
            return full("live calls", self._limits.calls)
        call = _Call(who.app, self._mint(), policy)
        assert (call.app, call.id) not in self._calls, "mint has repeated itself"
        self._calls[call.app, call.id] = call
        return self._begin(call, who.calls, now_ns)

    def _start_in_call(self, who: Instance, version: int, text: str, now_ns: int) -> Answer:
        token = self._tokens.get(text)
        if token is None or token.callee != who.function or token.call.app != who.app or self._token_deadlines.is_due(token, now_ns=now_ns):
            return _NO_TOKEN
        call = token.call
        if not self._is_held(call, version, now_ns):
            return _mismatch(who.app, version)
        if len(call.invocations) >= self._limits.invocations_per_call:
            return full("invocations of one call", self._limits.invocations_per_call)
        answer = self._begin(call, who.calls, now_ns)
        self._remove_token(token)
        return answer

    def _is_held(self, call: _Call, version: int, now_ns: int) -> bool:
        """Whether steps may be taken in `call` by a guard that has `version`."""
        if self._held(call.app, call.policy.version, now_ns) is None:
            return False
        return version == call.policy.version or self._held(call.app, version, now_ns) is not None

    def _begin(self, call: _Call, record: _Record, now_ns: int) -> Answer:
        """Add an invocation of the instance's function to the call."""
        invocation = _Invocation(call, self._mint(), record, call.policy.start(record.function))
        assert invocation.id not in call.invocations, "mint has repeated itself"
        call.invocations[invocation.id] = invocation
        record.invocations[invocation] = None
        self._invocations += 1
        self._deadlines_of(invocation).add(invocation, now_ns=now_ns)
        return Answer(True, Reason.ALLOWED.value, call.id, invocation.id)

    def invoke(self, who: Instance, said: InstanceInvoke, *, now_ns: int) -> Answer:
        """As Calls.invoke."""
        invocation = self._live_invocation(who, said.call, said.invocation)
        if invocation is None or self._deadlines_of(invocation).is_due(invocation, now_ns=now_ns):
            return _UNKNOWN_CALL
        remembered = invocation.steps.get(said.step) if invocation.steps is not None else None
        if remembered is not None:
            return remembered[1] if remembered[0] == said.callee else _STEP_REUSED
        call = invocation.call
        if not self._is_held(call, said.version, now_ns):
            return _mismatch(said.app, said.version)
        if call.tokens >= self._limits.tokens_per_call:
            return full("pending tokens of one call", self._limits.tokens_per_call)
        key = LabelKey(said.callee, said.asynchronous, said.callback)
        states, _ = call.policy.step(invocation.function, invocation.states, key)
        if states:
            invocation.states = states
            answer = Answer(True, Reason.ALLOWED.value, call.id, invocation.id, self._new_token(call, said.callee, now_ns))
        else:
            expected = tuple(call.policy.expected(invocation.function, invocation.states))
            answer = denied(Reason.EDGE_NOT_ALLOWED, f"{invocation.function} may not invoke {said.callee} now", expected)
        if invocation.steps is None:
            invocation.steps = {}
        _remember(invocation.steps, said.step, (said.callee, answer), self._limits.steps_per_invocation)
        return answer

    def finish(self, who: Instance, call: str, invocation: str, outcome: str, *, now_ns: int) -> Answer:  # noqa: ARG002
        """As Calls.finish."""
        found = self._live_invocation(who, call, invocation)
        if found is None:
            return _UNKNOWN_CALL
        self._remove_invocation(found)
        return _FINISHED

    def _live_invocation(self, who: Instance, call_id: str, invocation_id: str) -> _Invocation | None:
        call = self._calls.get((who.app, call_id))
        invocation = call.invocations.get(invocation_id) if call is not None else None
        return invocation if invocation is not None and invocation.record is who.calls else None

    def forget(self, who: Instance, why: str, *, now_ns: int) -> list[Evicted]:  # noqa: ARG002
        """As Calls.forget."""
        record: _Record = who.calls
        if record.owner is not who:
            return []  # another controller has it now
        del self._records[who.node, who.id, who.app, who.function]
        return [self._evict(invocation, why) for invocation in list(record.invocations)]

    def expire(self, *, now_ns: int, evictions_max: int = 1000) -> list[Evicted]:
        """As Calls.expire; at most `evictions_max` of each kind."""
        evicted: list[Evicted] = []
        for _ in range(evictions_max):
            if (token := self._token_deadlines.next_due(now_ns=now_ns)) is None:
                break
            self._remove_token(token)
        for lifetime_ms, deadlines in list(self._invocation_deadlines.items()):
            while len(evicted) < evictions_max and (invocation := deadlines.next_due(now_ns=now_ns)) is not None:
                evicted.append(self._evict(invocation, "timeout"))
            if not deadlines:
                del self._invocation_deadlines[lifetime_ms]
        return evicted

    def has_due(self, *, now_ns: int) -> bool:
        """As Calls.has_due."""
        queues: list[Deadlines[Any]] = [self._token_deadlines, *self._invocation_deadlines.values()]
        return any(queue.next_due(now_ns=now_ns) is not None for queue in queues)

    def counts(self) -> tuple[int, int]:
        """As Calls.counts."""
        return len(self._calls), self._invocations

    def _deadlines_of(self, invocation: _Invocation) -> Deadlines[_Invocation]:
        timeout_ms = invocation.call.policy.functions[invocation.function].invocation_timeout_ms
        deadlines = self._invocation_deadlines.get(timeout_ms)
        if deadlines is None:
            deadlines = self._invocation_deadlines[timeout_ms] = Deadlines((timeout_ms + self._limits.invocation_grace_ms) * NS_PER_MS)
        return deadlines

    def _evict(self, invocation: _Invocation, why: str) -> Evicted:
        self._remove_invocation(invocation)
        return Evicted(invocation.call.app, invocation.function, invocation.call.id, invocation.id, invocation.record.id, why)

    def _remove_invocation(self, invocation: _Invocation) -> None:
        del invocation.call.invocations[invocation.id]
        del invocation.record.invocations[invocation]
        self._invocations -= 1
        self._deadlines_of(invocation).discard(invocation)
        self._end_if_idle(invocation.call)

    def _new_token(self, call: _Call, callee: str, now_ns: int) -> str:
        token = _Token(self._mint(), call, callee)
        assert token.text not in self._tokens, "mint has repeated itself"
        self._tokens[token.text] = token
        self._token_deadlines.add(token, now_ns=now_ns)
        call.tokens += 1
        return token.text

    def _remove_token(self, token: _Token) -> None:
        del self._tokens[token.text]
        self._token_deadlines.discard(token)
        token.call.tokens -= 1
        self._end_if_idle(token.call)

    def _end_if_idle(self, call: _Call) -> None:
        """A call ends when nothing of it lives and nothing of it may still begin."""
        if not call.invocations and not call.tokens:
            del self._calls[call.app, call.id]


def _mismatch(app: str, version: int) -> Answer:
    return denied(Reason.POLICY_MISMATCH, f"version {version} of {app}, or the one that the call began with, is not held any more or not yet")


def _remember(memory: dict[str, Remembered], step: str, answer: Remembered, steps_max: int) -> None:
    """Keep the answer of a step, and forget the oldest one at the bound: a guard repeats only its latest question."""
    memory[step] = answer
    if len(memory) > steps_max:
        del memory[next(iter(memory))]
