"""Live calls: where each stands in its app CFG, which tokens are pending, what was answered last.

`Calls` is what a store of them does; `MemoryCalls` is the one of a single controller. Answers come at once or later (Deferred).
Pure: time comes in as `now_ns` of one monotonic clock, ids and tokens come from `mint`. A step costs the same at the end of a
long call as at its beginning, and every table has a bound (`limits`). An app cursor belongs to (app, call, invocation). A denial
moves nothing.

A million calls have to fit, so what there is one of for each branch is kept small: msgspec.Struct without a garbage collector's
head, ids as numbers, deadlines and labels shared. docs/reference/protocol.md says what the rules are and what they cost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import msgspec

from kalium.controller.deadlines import Buckets
from kalium.controller.limits import INVOCATIONS_PER_CALL_MAX, LIMITS, STARTS_PER_INFLIGHT, Limits
from kalium.controller.registry import NS_PER_MS, REGISTERED, Instance, denied, full
from kalium.policy.automaton import CompiledPolicy, Label, States
from kalium.policy.message import Reason
from kalium.protocol.frames import Answer, InstanceInvoke
from kalium.protocol.limits import CALL_HEX

Result = TypeVar("Result")
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

    on_agent_lost: Callable[[str], None]  # called with a node: another run of its agent is heard by another controller
    on_instance_lost: Callable[[Instance], None]  # called with an instance that was adopted: its id is another node's

    def agent_here(self, node: str, run: str, connection: int = 0) -> None:
        """The agent of `node` speaks through this controller from now on, over the `connection`-th connection of its `run`."""

    def agent_gone(self, node: str) -> None:
        """It does not any more."""

    def adopt(self, who: Instance, *, now_ns: int) -> Answer | Deferred[Answer]:
        """The instance speaks through this controller from now on; what it had begun through another one goes on here. Denied:
        the id is that of another node, or of another function, at any controller.
        """

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


TICK_NS = 100 * NS_PER_MS  # deadlines are cut to it, so that what begins in one tick shares them
FINISHED = Answer(True, Reason.ALLOWED.value)
_OVERLOADED = Reason.OVERLOADED.value
_UNKNOWN_CALL = denied(Reason.UNKNOWN_CALL, "no such invocation of this instance is live")
_NO_TOKEN = denied(Reason.BAD_TOKEN, "the token is not pending for this function")
_TOO_EARLY = denied(Reason.BAD_TOKEN, "the invocation whose result this would take is not over")
_STEP_REUSED = denied(Reason.MALFORMED, "the step id has been used for another question")
_NO_TEXT, _NO_KEY = -1, -2  # in the place of a token's number: there is no token, and one that cannot be
_NUMBER_BITS = 32  # of an invocation within its call: 8 for its place, the others count
_NUMBER_MASK = (1 << _NUMBER_BITS) - 1
_PLACE_MASK = INVOCATIONS_PER_CALL_MAX - 1
_REUSED_MAX = (1 << (_NUMBER_BITS - 8)) - 2
_VACANT_BITS = 9
_VACANT_MASK = (1 << _VACANT_BITS) - 1
_EPOCH_HEX = 12
_KEY_HEX = 12
_ENDING = "f" * 8  # of the id of a call; no invocation has this number
_PREFIX_HEX = _EPOCH_HEX + _KEY_HEX
_NUMBERS = tuple(f"{number:08x}" for number in range(INVOCATIONS_PER_CALL_MAX))  # of most invocations
assert _PLACE_MASK == 0xFF  # a place is the low byte of an invocation's number
assert INVOCATIONS_PER_CALL_MAX <= _VACANT_MASK
assert _PREFIX_HEX + len(_ENDING) == CALL_HEX == _PREFIX_HEX + _NUMBER_BITS // 4

# An invocation as an INVOKE names it: callee, by the queue or not, callback. What a LabelKey is equal to.
Key = tuple[str, bool, str]


class _Call(msgspec.Struct, gc=False, eq=False):
    """One request's way through an app, under the version that it began with."""

    key: int  # its id is made of it
    policy: CompiledPolicy
    rows: list[_Invocation | int]  # by place; a place that is free names the next free one + 1, the last one 0
    live: int = 0  # invocations
    tokens: int = 0  # pending ones
    # The first free place + 1 in the low bits, 0 for none, and above them how often a place was used again, as its invocation has
    # another number then. One field, because six of them fit into the allocator's 64 bytes.
    vacant: int = 0


class _Invocation(msgspec.Struct, gc=False, eq=False):
    """One execution of a function inside a call, and where it stands in the app CFG."""

    call: _Call
    number: int
    record: _Record
    states: States
    due_ns: int
    place: int  # in the record's list
    edge: _Edge | None  # by which it was started, when that matters
    asked: _Asked | None = None  # most invocations never ask


class _Asked(msgspec.Struct, gc=False, eq=False):
    """What an invocation asked last, and what it waits for. `grant` is the last one, whatever was denied since, `token` its token."""

    step: int
    grant: _Grant | None
    token: int
    refusal: _Refusal | None = None
    open: dict[int, int] | None = None  # group -> granted edges of it that are not answered


class _Refusal(msgspec.Struct, gc=False, eq=False):
    """A denial that is remembered with its question."""

    key: Key
    answer: Answer


class _Edge(msgspec.Struct, gc=False, eq=False):
    """A granted edge that has a future: it belongs to a join, has a callback or may be taken again."""

    label: Label
    caller: _Invocation
    token: int = 0  # issued last
    callback: int = 0  # the callback's, 0 for none
    retries: int = 0  # that were used
    live: int = 0  # invocations that it has started
    newest: _Invocation | None = None  # the one that counts
    is_answered: bool = False
    is_called_back: bool = False


class _Callback(msgspec.Struct, gc=False, eq=False):
    """The right to call back what an edge's invocation has come to."""

    edge: _Edge


class _Grant(msgspec.Struct, gc=False, eq=False):
    """What a token is good for, within which call, until when. Tokens for the same that were issued in one tick share it."""

    call: _Call
    what: Label | _Edge | _Callback
    due_ns: int
    record: _Record  # of who asked for it


# What is remembered of a START by its step: token, version, and the answer: a denial, or what the ids were made of, and `hold`.
_Started = tuple[int, int, "Answer | int", int, bool]


class _Record:
    """What an instance has begun. `owner` is its registration at the controller that adopted it last.

    What its function's invocations begin with is looked up once for each policy, as most begin under the same.
    """

    __slots__ = ("due_ns", "ended", "function", "is_entry", "lifetime_ns", "live", "owner", "policy", "start", "starts", "starts_max", "tokens")

    def __init__(self, owner: Instance, starts_max: int) -> None:
        self.function = owner.function
        self.owner = owner
        self.live: list[_Invocation] = []
        self.tokens = 0  # pending ones that its invokes were granted
        self.due_ns = 0  # when to look at it, never later than the first of `live` is due; 0 for never
        self.starts: dict[str, _Started] = {}
        self.starts_max = starts_max
        self.ended: dict[str, str] = {}  # invocation -> outcome, of those whose end somebody waits for
        self.policy: CompiledPolicy | None = None
        self.start: States = frozenset()
        self.lifetime_ns = 0
        self.is_entry = False

    def begin_under(self, policy: CompiledPolicy, grace_ns: int, starts_max: int) -> None:
        """Look up what begins an invocation under `policy`, which has the function."""
        function = policy.functions[self.function]
        self.policy = policy
        self.start = policy.app_cfg[self.function].start
        self.lifetime_ns = function.invocation_timeout_ms * NS_PER_MS + grace_ns
        self.is_entry = self.function in policy.entries
        self.starts_max = min(STARTS_PER_INFLIGHT * function.max_inflight, starts_max)


class MemoryCalls:
    """The calls of one controller, in its own memory. Not shared between threads."""

    kind = "memory"

    def __init__(self, *, held: Held, mint: Callable[[], str], limits: Limits = LIMITS) -> None:
        """`mint` gives 32 fresh hexadecimal digits, 128 random bits, at each call."""
        self._held = held
        self._mint = mint
        self._limits = limits
        self._grace_ns = limits.invocation_grace_ms * NS_PER_MS
        self._token_ns = limits.token_ms * NS_PER_MS
        self._late_ns = limits.token_late_ms * NS_PER_MS
        self.on_agent_lost: Callable[[str], None] = lambda _node: None
        self.on_instance_lost: Callable[[Instance], None] = lambda _instance: None
        self._epoch = mint()[-_EPOCH_HEX:]  # of the ids: those of another process are none here
        self._begun = 0  # calls
        self._invocations = 0  # live ones
        self._records: dict[tuple[str, str, str, str], _Record] = {}
        self._calls: dict[int, _Call] = {}
        # All tokens of one table have the same lifetime, so the order of a table is that of its deadlines.
        self._tokens: dict[int, _Grant] = {}
        self._late: dict[int, _Grant] = {}  # of asynchronous edges and callbacks
        self._overdue: Buckets[_Record] = Buckets()  # an instance is looked at when the first of its invocations is due
        self._tick = -1
        self._dues: dict[int, int] = {}  # lifetime -> deadline, of what begins in this tick

    def controllers(self) -> Sequence[str]:
        """Nobody shares a process's memory."""
        return ()

    def fault(self) -> str:
        """Memory is always there."""
        return ""

    def agent_here(self, node: str, run: str, connection: int = 0) -> None:
        """As Calls.agent_here: nobody shares a process's memory."""

    def agent_gone(self, node: str) -> None:
        """As Calls.agent_gone."""

    def adopt(self, who: Instance, *, now_ns: int) -> Answer:  # noqa: ARG002 - nothing here depends on when
        """As Calls.adopt."""
        key = (who.node, who.id, who.app, who.function)
        record = self._records.get(key)
        if record is None:
            record = self._records[key] = _Record(who, self._limits.starts_per_instance)
        record.owner = who
        who.calls = record
        return REGISTERED

    # Starts

    def begin(self, who: Instance, version: int, step: str, *, now_ns: int) -> Answer:
        """As Calls.begin."""
        record: _Record = who.calls
        starts = record.starts
        remembered = starts.get(step)
        if remembered is not None:
            return self._started(remembered) if remembered[0] == _NO_TEXT and remembered[1] == version else _STEP_REUSED
        policy = self._held(who.app, version, now_ns)
        answer: Answer | None = None
        if policy is None or record.policy is not policy or not record.is_entry:
            answer = self._fault_of_entry(who, record, policy, version)
        if answer is None:
            assert policy is not None
            limits = self._limits
            if len(record.live) >= limits.invocations_per_instance:
                return full("live invocations of one instance", limits.invocations_per_instance)
            if len(self._calls) >= limits.calls:
                return full("live calls", limits.calls)
            if self._invocations >= limits.invocations:
                return full("live invocations", limits.invocations)
            self._begun = key = self._begun + 1
            call = self._calls[key] = _Call(key, policy, [0])  # a list that begins with one place does not grow to four
            self._begin(call, record, None, 0, 0, now_ns)
            started: _Started = (_NO_TEXT, version, key, 0, False)
            answer = self._started(started)
        else:
            started = (_NO_TEXT, version, answer, 0, False)
        starts[step] = started
        if len(starts) > record.starts_max:
            del starts[next(iter(starts))]  # a guard repeats only its latest questions
        return answer

    def _started(self, started: _Started) -> Answer:
        """The answer to a START."""
        _, _, call, number, hold = started
        if type(call) is not int:
            assert type(call) is Answer
            return call
        prefix = f"{self._epoch}{call:012x}"
        suffix = _NUMBERS[number] if number < INVOCATIONS_PER_CALL_MAX else f"{number:08x}"
        return Answer(True, "allowed", prefix + _ENDING, prefix + suffix, hold=hold)

    def _fault_of_entry(self, who: Instance, record: _Record, policy: CompiledPolicy | None, version: int) -> Answer | None:
        """Why `who` cannot begin a call under `policy`."""
        if policy is None:
            return _mismatch(who.app, version)
        if record.policy is not policy:
            if who.function not in policy.functions:
                return denied(Reason.UNKNOWN_FUNCTION, f"version {version} of {who.app} has no function {who.function}")
            record.begin_under(policy, self._grace_ns, self._limits.starts_per_instance)
        return None if record.is_entry else denied(Reason.NOT_AN_ENTRY, f"{who.function} starts only with the token of a granted invoke")

    def join(self, who: Instance, version: int, token: str, step: str, *, now_ns: int) -> Answer:
        """As Calls.join."""
        record: _Record = who.calls
        starts = record.starts
        key = _key_of(token)
        remembered = starts.get(step)
        if remembered is not None:
            return self._started(remembered) if remembered[0] == key and remembered[1] == version else _STEP_REUSED
        started = self._join(who, record, version, key, now_ns)
        if type(started) is Answer:
            if started.reason == _OVERLOADED:  # a full table is no decision: asked again it may have room
                return started
            started = (key, version, started, 0, False)
        assert type(started) is tuple
        starts[step] = started
        if len(starts) > record.starts_max:
            del starts[next(iter(starts))]
        return self._started(started)

    def _join(self, who: Instance, record: _Record, version: int, key: int, now_ns: int) -> Answer | _Started:  # noqa: PLR0911, PLR0912 - rule by rule
        """What a START with the token `key` has come to; a denial is an Answer."""
        grant = self._tokens.get(key) or self._late.get(key)
        if grant is None or now_ns >= grant.due_ns:
            return _NO_TOKEN
        call, what = grant.call, grant.what
        edge: _Edge | None = None
        if type(what) is Label:
            callee = what.key.callee
        elif type(what) is _Edge:
            edge, callee = what, what.label.key.callee
        else:
            assert type(what) is _Callback
            callee = what.edge.label.key.callback
        if callee != who.function or call.policy.app != who.app:
            return _NO_TOKEN
        if type(what) is _Callback and what.edge.live:
            return _TOO_EARLY
        if not self._is_held(call, version, now_ns):
            return _mismatch(who.app, version)
        limits = self._limits
        if len(record.live) >= limits.invocations_per_instance:
            return full("live invocations of one instance", limits.invocations_per_instance)
        if call.live >= limits.invocations_per_call or call.vacant >> _VACANT_BITS >= _REUSED_MAX:
            return full("invocations of one call", limits.invocations_per_call)
        if self._invocations >= limits.invocations:
            return full("live invocations", limits.invocations)
        vacant = call.vacant
        place = (vacant & _VACANT_MASK) - 1
        if place < 0:
            place = number = len(call.rows)  # small numbers are shared
            call.rows.append(0)
        else:
            following = call.rows[place]
            assert type(following) is int
            reused = (vacant >> _VACANT_BITS) + 1
            call.vacant = reused << _VACANT_BITS | following
            number = reused << 8 | place
        self._begin(call, record, edge, place, number, now_ns)
        if type(what) is _Callback:
            what.edge.is_called_back = True
            self._remove_token(what.edge.token)  # a start that has not come yet would be behind its own result
        self._remove_token(key)
        return key, version, call.key, number, edge is not None and (edge.label.join > 0 or edge.label.key.callback != "")

    def _is_held(self, call: _Call, version: int, now_ns: int) -> bool:
        """Whether steps may be taken in `call` by a guard that has `version`."""
        policy = call.policy
        app, own = policy.app, policy.version
        if self._held(app, own, now_ns) is not policy:
            return False
        return version == own or self._held(app, version, now_ns) is not None

    def _begin(self, call: _Call, record: _Record, edge: _Edge | None, place: int, number: int, now_ns: int) -> None:
        """Add an invocation of the record's function to the call, at a place that is free."""
        if record.policy is not call.policy:
            record.begin_under(call.policy, self._grace_ns, self._limits.starts_per_instance)
        due_ns = self._due_ns(record.lifetime_ns, now_ns)
        invocation = _Invocation(call, number, record, record.start, due_ns, len(record.live), edge)
        call.rows[place] = invocation
        call.live += 1
        self._invocations += 1
        record.live.append(invocation)
        if not 0 < record.due_ns <= due_ns:
            self._look_at(record, due_ns)
        if edge is not None:
            edge.live += 1
            edge.newest = invocation

    # Invokes

    def invoke(self, who: Instance, said: InstanceInvoke, *, now_ns: int) -> Answer:  # noqa: PLR0911 - one return for each rule
        """As Calls.invoke."""
        invocation = self._find(who, said.call, said.invocation)
        if invocation is None or now_ns >= invocation.due_ns:
            return _UNKNOWN_CALL
        key = (said.callee, said.asynchronous, said.callback)
        step = int(said.step, 16)
        asked = invocation.asked
        if asked is not None and asked.step == step:
            return self._again(said, asked, key)
        call = invocation.call
        policy, version = call.policy, said.version
        if version != policy.version and self._held(policy.app, version, now_ns) is None:
            return _mismatch(said.app, version)
        if self._held(policy.app, policy.version, now_ns) is not policy:
            return _mismatch(said.app, version)
        if call.tokens >= self._limits.tokens_per_call:  # a callback's may be one more
            return full("pending tokens of one call", self._limits.tokens_per_call)
        if invocation.record.tokens >= self._limits.tokens_per_instance:
            return full("pending tokens of one instance", self._limits.tokens_per_instance)
        if len(self._tokens) + len(self._late) >= self._limits.tokens:
            return full("pending tokens", self._limits.tokens)
        if said.retry:
            edge = asked.grant.what if asked is not None and asked.grant is not None else None
            if type(edge) is not _Edge or edge.label.key != key or edge.retries >= edge.label.retries or edge.is_called_back:
                return self._refuse(invocation, step, key, f"{who.function} may not invoke {said.callee} once more", ())
            assert asked is not None
            self._take_again(asked, edge)
            return self._grant(said, invocation, step, edge, now_ns)
        graph = policy.app_cfg[who.function]
        opened: Collection[int] = (asked.open or ()) if asked is not None else ()
        states, index = graph.step(invocation.states, key, opened)  # type: ignore[arg-type]  # a LabelKey is such a tuple
        if index < 0:
            expected = tuple(policy.expected(who.function, invocation.states, opened))
            return self._refuse(invocation, step, key, f"{who.function} may not invoke {said.callee} now", expected)
        invocation.states = states
        label = graph.labels[index]
        if label.join or label.retries or said.callback:
            return self._grant(said, invocation, step, _Edge(label, invocation), now_ns)
        return self._grant(said, invocation, step, label, now_ns)

    def _again(self, said: InstanceInvoke, asked: _Asked, key: Key) -> Answer:
        """The answer that the last step of an invocation had."""
        refusal, grant = asked.refusal, asked.grant
        if refusal is not None:
            return refusal.answer if refusal.key == key else _STEP_REUSED
        assert grant is not None
        if _label_of(grant.what).key != key:
            return _STEP_REUSED
        callback = grant.what.callback if type(grant.what) is _Edge else 0
        return Answer(True, "allowed", said.call, said.invocation, _text_of(asked.token), callback=_text_of(callback) if callback else "")

    def _refuse(self, invocation: _Invocation, step: int, key: Key, detail: str, expected: tuple[str, ...]) -> Answer:
        answer = denied(Reason.EDGE_NOT_ALLOWED, detail, expected)
        asked = invocation.asked
        if asked is None:
            asked = invocation.asked = _Asked(step, None, 0)
        asked.step = step
        asked.refusal = _Refusal(key, answer)
        return answer

    def _take_again(self, asked: _Asked, edge: _Edge) -> None:
        """Revoke what the edge's last grant has issued, and let no invocation of before count for its join any more."""
        self._remove_token(edge.token)
        self._remove_token(edge.callback)
        edge.retries += 1
        edge.newest = None
        if edge.is_answered:
            edge.is_answered = False
            assert asked.open is not None
            asked.open[edge.label.join] = asked.open.get(edge.label.join, 0) + 1

    def _grant(self, said: InstanceInvoke, invocation: _Invocation, step: int, what: Label | _Edge, now_ns: int) -> Answer:
        """Issue the token of an edge, and that of its callback."""
        call, asked = invocation.call, invocation.asked
        is_late = said.asynchronous
        due_ns = self._due_ns(self._late_ns if is_late else self._token_ns, now_ns)
        text = self._mint()
        token = int(text, 16)
        if asked is None:
            grant = _Grant(call, what, due_ns, invocation.record)
            asked = invocation.asked = _Asked(step, grant, token)
        else:
            last = asked.grant
            if last is not None and last.what is what and last.due_ns == due_ns:
                grant = last
            else:
                grant = asked.grant = _Grant(call, what, due_ns, invocation.record)
            asked.step = step
            asked.token = token
            asked.refusal = None
        (self._late if is_late else self._tokens)[token] = grant
        call.tokens += 1
        invocation.record.tokens += 1
        if type(what) is _Edge:
            return Answer(True, "allowed", said.call, said.invocation, text, callback=self._follow(what, call, asked, now_ns))
        return Answer(True, "allowed", said.call, said.invocation, text)

    def _follow(self, edge: _Edge, call: _Call, asked: _Asked, now_ns: int) -> str:
        """Keep what has a future after the grant of an edge, and return the token of its callback, "" when it has none."""
        group = edge.label.join
        if group and not edge.token:
            asked.open = asked.open or {}
            asked.open[group] = asked.open.get(group, 0) + 1
        edge.token = asked.token
        if not edge.label.key.callback:
            return ""
        text = self._mint()
        edge.callback = int(text, 16)
        self._late[edge.callback] = _Grant(call, _Callback(edge), self._due_ns(self._late_ns, now_ns), edge.caller.record)
        call.tokens += 1
        edge.caller.record.tokens += 1
        return text

    def _find(self, who: Instance, call_id: str, invocation_id: str) -> _Invocation | None:
        """The live invocation of this instance that goes by these ids."""
        prefix = call_id[:_PREFIX_HEX]
        if prefix + _ENDING != call_id or not (invocation_id.startswith(prefix) and prefix.startswith(self._epoch)):
            return None
        try:
            number = int(invocation_id[_EPOCH_HEX:], 16)
        except ValueError:
            return None
        call = self._calls.get(number >> _NUMBER_BITS)
        if call is None:
            return None
        place, rows = number & _PLACE_MASK, call.rows
        found = rows[place] if place < len(rows) else 0
        if type(found) is _Invocation and found.record is who.calls and found.number == number & _NUMBER_MASK:
            return found
        return None

    # Ends

    def finish(self, who: Instance, call: str, invocation: str, outcome: str, *, now_ns: int) -> Answer:
        """As Calls.finish. A FINISH asked again has the answer that it had."""
        found = self._find(who, call, invocation)
        if found is None or now_ns >= found.due_ns:
            record: _Record = who.calls
            return FINISHED if record.ended.get(invocation) == outcome else _UNKNOWN_CALL
        if found.edge is not None:
            ended = found.record.ended
            ended[invocation] = outcome
            if len(ended) > self._limits.starts_per_instance:
                del ended[next(iter(ended))]
            if outcome == "answered":
                self._answered(found, found.edge)
        self._remove(found)
        return FINISHED

    def _answered(self, invocation: _Invocation, edge: _Edge) -> None:
        """Count the answer for the join that waits for it, unless the edge was taken again since."""
        group, asked = edge.label.join, edge.caller.asked
        if group and edge.newest is invocation and asked is not None and asked.open is not None:
            edge.is_answered = True
            asked.open[group] -= 1
            if not asked.open[group]:
                del asked.open[group]

    def forget(self, who: Instance, why: str, *, now_ns: int) -> list[Evicted]:  # noqa: ARG002
        """As Calls.forget."""
        record: _Record = who.calls
        if record.owner is not who:
            return []  # another controller has it now
        del self._records[who.node, who.id, who.app, who.function]
        self._look_at(record, 0)
        return [self._evict(invocation, why) for invocation in list(record.live)]

    def expire(self, *, now_ns: int, evictions_max: int = 1000) -> list[Evicted]:
        """As Calls.expire; at most about `evictions_max` of each kind."""
        for table in (self._tokens, self._late):
            for key in self._expired(table, now_ns, 4 * evictions_max):
                self._remove_token(key)
        evicted: list[Evicted] = []
        for _ in range(evictions_max):
            if len(evicted) >= evictions_max or (record := self._overdue.next_due(now_ns=now_ns)) is None:
                break
            evicted += [self._evict(invocation, "timeout") for invocation in list(record.live) if now_ns >= invocation.due_ns]
            record.due_ns = 0
            if record.live:
                self._look_at(record, min(invocation.due_ns for invocation in record.live))
        return evicted

    def _look_at(self, record: _Record, due_ns: int) -> None:
        """Have a record looked at then and not before; 0: never."""
        if record.due_ns:
            self._overdue.discard(record, record.due_ns)
        record.due_ns = due_ns
        if due_ns:
            self._overdue.add(record, due_ns)

    def has_due(self, *, now_ns: int) -> bool:
        """As Calls.has_due."""
        return self._overdue.has_due(now_ns=now_ns) or any(self._expired(table, now_ns, 1) for table in (self._tokens, self._late))

    def _expired(self, table: dict[int, _Grant], now_ns: int, count_max: int) -> list[int]:
        """The first tokens of a table whose time is over.

        To find the first key of a dict is linear in those deleted before it, but never more than its size, as it drops them when
        it has no room: some milliseconds for a million tokens, for each portion. It saves every token a node of a queue.
        """
        found: list[int] = []
        for key, grant in table.items():
            if now_ns < grant.due_ns or len(found) >= count_max:
                break
            found.append(key)
        return found

    def counts(self) -> tuple[int, int]:
        """As Calls.counts."""
        return len(self._calls), self._invocations

    def _due_ns(self, lifetime_ns: int, now_ns: int) -> int:
        """When what begins now and lives for so long is over: at most a tick early, and one number for all of a tick."""
        tick = now_ns // TICK_NS
        if tick != self._tick:
            self._tick = tick
            self._dues.clear()
        due_ns = self._dues.get(lifetime_ns)
        if due_ns is None:
            due_ns = self._dues[lifetime_ns] = tick * TICK_NS + lifetime_ns
        return due_ns

    def _evict(self, invocation: _Invocation, why: str) -> Evicted:
        self._remove(invocation)
        call, owner = invocation.call, invocation.record.owner
        prefix = f"{self._epoch}{call.key:012x}"
        return Evicted(call.policy.app, owner.function, prefix + _ENDING, f"{prefix}{invocation.number:08x}", owner.id, why)

    def _remove(self, invocation: _Invocation) -> None:
        call, live = invocation.call, invocation.record.live
        self._invocations -= 1
        last = live.pop()
        if last is not invocation:  # the last one moves into the gap
            live[invocation.place] = last
            last.place = invocation.place
        # What holds each other is let go here, because no garbage collector looks at it.
        if invocation.asked is not None:
            invocation.asked = None
        edge = invocation.edge
        if edge is not None:
            edge.live -= 1
            if edge.newest is invocation:
                edge.newest = None
        if call.live == 1 and not call.tokens:
            del self._calls[call.key]
            call.rows.clear()
        else:
            place = invocation.number & _PLACE_MASK
            vacant = call.vacant
            call.rows[place] = vacant & _VACANT_MASK
            call.vacant = vacant & ~_VACANT_MASK | place + 1
            call.live -= 1

    def _remove_token(self, key: int) -> None:
        """Forget a token, if it is pending."""
        grant = self._tokens.pop(key, None) or self._late.pop(key, None)
        if grant is not None:
            call = grant.call
            call.tokens -= 1
            grant.record.tokens -= 1
            if not call.live and not call.tokens:
                del self._calls[call.key]


def _label_of(what: Label | _Edge | _Callback) -> Label:
    """The line of the policy that a token is for."""
    if type(what) is Label:
        return what
    edge = what.edge if type(what) is _Callback else what
    assert type(edge) is _Edge
    return edge.label


def _key_of(text: str) -> int:
    """The number that a token is in its one spelling; _NO_KEY for any other text."""
    try:
        key = int(text, 16)
    except ValueError:
        return _NO_KEY
    return key if _text_of(key) == text else _NO_KEY


def _text_of(token: int) -> str:
    return f"{token:032x}"


def _mismatch(app: str, version: int) -> Answer:
    return denied(Reason.POLICY_MISMATCH, f"version {version} of {app}, or the one that the call began with, is not held any more or not yet")
