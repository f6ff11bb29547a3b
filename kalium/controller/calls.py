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
from kalium.controller.limits import INVOCATIONS_PER_CALL_MAX, LIMITS, Limits
from kalium.controller.registry import NS_PER_MS, REGISTERED, Instance, denied, full
from kalium.policy.automaton import CompiledPolicy, Label, States
from kalium.policy.message import Reason
from kalium.protocol.frames import Answer, InstanceInvoke

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
_UNKNOWN_CALL = denied(Reason.UNKNOWN_CALL, "no such invocation of this instance is live")
_NO_TOKEN = denied(Reason.BAD_TOKEN, "the token is not pending for this function")
_TOO_EARLY = denied(Reason.BAD_TOKEN, "the invocation whose result this would take is not over")
_STEP_REUSED = denied(Reason.MALFORMED, "the step id has been used for another question")
_NUMBER_BITS = 32  # of an invocation within its call: 8 for its place, the others count
_PLACE_MASK = INVOCATIONS_PER_CALL_MAX - 1
_REUSED_MAX = (1 << (_NUMBER_BITS - 8)) - 2
_EPOCH_HEX = 12
_KEY_HEX = 12
_ENDING = "f" * 8  # of the id of a call; no invocation has this number
assert _PLACE_MASK == 0xFF  # a place is the low byte of an invocation's number
assert _EPOCH_HEX + _KEY_HEX + len(_ENDING) == 32 == _EPOCH_HEX + _KEY_HEX + _NUMBER_BITS // 4

# An invocation as an INVOKE names it: callee, by the queue or not, callback. What a LabelKey is equal to.
Key = tuple[str, bool, str]


class _Call(msgspec.Struct, gc=False, eq=False):
    """One request's way through an app, under the version that it began with."""

    key: int  # its id is made of it
    policy: CompiledPolicy
    rows: list[_Invocation | int] = []  # by place; a place that is free names the next free one, the last one -1
    live: int = 0  # invocations
    tokens: int = 0  # pending ones
    free: int = -1  # the first free place
    reused: int = 0  # how often a place was used again: its invocation has another number then


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
    refusal: _Refusal | None
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


class _Record:
    """What an instance has begun. `owner` is its registration at the controller that adopted it last."""

    __slots__ = ("due_ns", "ended", "function", "live", "owner", "starts")

    def __init__(self, owner: Instance) -> None:
        self.function = owner.function
        self.owner = owner
        self.live: list[_Invocation] = []
        self.due_ns = 0  # when to look at it, never later than the first of `live` is due; 0 for never
        self.starts: dict[str, tuple[str, int, Answer]] = {}  # step -> token, version, answer
        self.ended: dict[str, str] = {}  # invocation -> outcome, of those whose end somebody waits for


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
            record = self._records[key] = _Record(who)
        record.owner = who
        who.calls = record
        return REGISTERED

    # Starts

    def begin(self, who: Instance, version: int, step: str, *, now_ns: int) -> Answer:
        """As Calls.begin."""
        record: _Record = who.calls
        remembered = record.starts.get(step)
        if remembered is not None:
            return remembered[2] if remembered[0] == "" and remembered[1] == version else _STEP_REUSED
        if len(record.live) >= self._limits.invocations_per_instance:
            return full("live invocations of one instance", self._limits.invocations_per_instance)
        policy = self._held(who.app, version, now_ns)
        if policy is None:
            answer = _mismatch(who.app, version)
        elif who.function not in policy.functions:
            answer = denied(Reason.UNKNOWN_FUNCTION, f"version {version} of {who.app} has no function {who.function}")
        elif who.function not in policy.entries:
            answer = denied(Reason.NOT_AN_ENTRY, f"{who.function} starts only with the token of a granted invoke")
        elif len(self._calls) >= self._limits.calls:
            return full("live calls", self._limits.calls)
        elif self._invocations >= self._limits.invocations:
            return full("live invocations", self._limits.invocations)
        else:
            self._begun += 1
            call = self._calls[self._begun] = _Call(self._begun, policy)
            answer = self._begin(call, record, None, now_ns)
        self._remember_start(record, step, "", version, answer)
        return answer

    def join(self, who: Instance, version: int, token: str, step: str, *, now_ns: int) -> Answer:
        """As Calls.join."""
        record: _Record = who.calls
        remembered = record.starts.get(step)
        if remembered is not None:
            return remembered[2] if remembered[0] == token and remembered[1] == version else _STEP_REUSED
        if len(record.live) >= self._limits.invocations_per_instance:
            return full("live invocations of one instance", self._limits.invocations_per_instance)
        answer = self._join(who, record, version, token, now_ns)
        if answer.reason != Reason.OVERLOADED.value:  # a full table is no decision: asked again it may have room
            self._remember_start(record, step, token, version, answer)
        return answer

    def _join(self, who: Instance, record: _Record, version: int, text: str, now_ns: int) -> Answer:  # noqa: PLR0911 - one for each rule
        key = _key_of(text)
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
        if call.live >= self._limits.invocations_per_call or call.reused >= _REUSED_MAX:
            return full("invocations of one call", self._limits.invocations_per_call)
        if self._invocations >= self._limits.invocations:
            return full("live invocations", self._limits.invocations)
        answer = self._begin(call, record, edge, now_ns)
        if type(what) is _Callback:
            what.edge.is_called_back = True
            self._remove_token(what.edge.token)  # a start that has not come yet would be behind its own result
        self._remove_token(key)
        return answer

    def _is_held(self, call: _Call, version: int, now_ns: int) -> bool:
        """Whether steps may be taken in `call` by a guard that has `version`."""
        policy = call.policy
        if self._held(policy.app, policy.version, now_ns) is not policy:
            return False
        return version == policy.version or self._held(policy.app, version, now_ns) is not None

    def _begin(self, call: _Call, record: _Record, edge: _Edge | None, now_ns: int) -> Answer:
        """Add an invocation of the record's function to the call."""
        policy, function, rows = call.policy, record.function, call.rows
        due_ns = self._due_ns(policy.functions[function].invocation_timeout_ms * NS_PER_MS + self._grace_ns, now_ns)
        place = call.free
        if place >= 0:
            call.reused += 1
            number = call.reused << 8 | place
        else:
            place = number = len(rows)  # small numbers are shared
        invocation = _Invocation(call, number, record, policy.app_cfg[function].start, due_ns, len(record.live), edge)
        if place < len(rows):
            following = rows[place]
            assert type(following) is int
            call.free = following
            rows[place] = invocation
        elif rows:
            rows.append(invocation)
        else:
            call.rows = [invocation]  # a list that begins with one is smaller than one that grew to it
        call.live += 1
        self._invocations += 1
        record.live.append(invocation)
        if not 0 < record.due_ns <= due_ns:
            self._look_at(record, due_ns)
        hold = False
        if edge is not None:
            edge.live += 1
            edge.newest = invocation
            hold = edge.label.join > 0 or edge.label.key.callback != ""
        prefix = f"{self._epoch}{call.key:012x}"
        return Answer(True, "allowed", prefix + _ENDING, f"{prefix}{number:08x}", hold=hold)

    def _remember_start(self, record: _Record, step: str, token: str, version: int, answer: Answer) -> None:
        """Keep the answer, and forget the oldest one at the bound: a guard repeats only its latest questions."""
        starts = record.starts
        starts[step] = (token, version, answer)
        if len(starts) > self._limits.starts_per_instance:
            del starts[next(iter(starts))]

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
            return self._again(invocation, asked, key)
        call = invocation.call
        if not self._is_held(call, said.version, now_ns):
            return _mismatch(said.app, said.version)
        if call.tokens >= self._limits.tokens_per_call:  # a callback's may be one more
            return full("pending tokens of one call", self._limits.tokens_per_call)
        if len(self._tokens) + len(self._late) >= self._limits.tokens:
            return full("pending tokens", self._limits.tokens)
        if asked is None:
            asked = _Asked(step, None, 0, None)
        if said.retry:
            edge = asked.grant.what if asked.grant is not None else None
            if type(edge) is not _Edge or edge.label.key != key or edge.retries >= edge.label.retries or edge.is_called_back:
                return self._refuse(invocation, asked, step, key, f"{who.function} may not invoke {said.callee} once more", ())
            invocation.asked = asked
            self._take_again(asked, edge)
            return self._grant(invocation, asked, step, edge, now_ns)
        graph = call.policy.app_cfg[who.function]
        opened: Collection[int] = asked.open or ()
        states, index = graph.step(invocation.states, key, opened)  # type: ignore[arg-type]  # a LabelKey is such a tuple
        if index < 0:
            expected = tuple(call.policy.expected(who.function, invocation.states, opened))
            return self._refuse(invocation, asked, step, key, f"{who.function} may not invoke {said.callee} now", expected)
        label = graph.labels[index]
        invocation.states = states
        invocation.asked = asked
        if not (label.join or label.retries or label.key.callback):
            return self._grant(invocation, asked, step, label, now_ns)
        if label.join:
            asked.open = asked.open or {}
            asked.open[label.join] = asked.open.get(label.join, 0) + 1
        return self._grant(invocation, asked, step, _Edge(label, invocation), now_ns)

    def _again(self, invocation: _Invocation, asked: _Asked, key: Key) -> Answer:
        """The answer that the last step of an invocation had."""
        refusal, grant = asked.refusal, asked.grant
        if refusal is not None:
            return refusal.answer if refusal.key == key else _STEP_REUSED
        assert grant is not None
        if _label_of(grant.what).key != key:
            return _STEP_REUSED
        return self._granted(invocation, asked.token, grant.what)

    def _refuse(self, invocation: _Invocation, asked: _Asked, step: int, key: Key, detail: str, expected: tuple[str, ...]) -> Answer:
        answer = denied(Reason.EDGE_NOT_ALLOWED, detail, expected)
        invocation.asked = asked
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

    def _grant(self, invocation: _Invocation, asked: _Asked, step: int, what: Label | _Edge, now_ns: int) -> Answer:
        """Issue the token of an edge, and that of its callback."""
        call = invocation.call
        key = _label_of(what).key
        due_ns = self._due_ns(self._late_ns if key.asynchronous else self._token_ns, now_ns)
        grant = asked.grant
        if grant is None or grant.what is not what or grant.due_ns != due_ns:
            grant = asked.grant = _Grant(call, what, due_ns)
        asked.step = step
        asked.refusal = None
        asked.token = self._issue(self._late if key.asynchronous else self._tokens, grant)
        if type(what) is _Edge:
            what.token = asked.token
            if key.callback:
                what.callback = self._issue(self._late, _Grant(call, _Callback(what), self._due_ns(self._late_ns, now_ns)))
        return self._granted(invocation, asked.token, what)

    def _issue(self, table: dict[int, _Grant], grant: _Grant) -> int:
        key = int(self._mint(), 16)
        assert key not in table, "mint has repeated itself"
        table[key] = grant
        grant.call.tokens += 1
        return key

    def _granted(self, invocation: _Invocation, token: int, what: Label | _Edge | _Callback) -> Answer:
        prefix = f"{self._epoch}{invocation.call.key:012x}"
        callback = f"{what.callback:032x}" if type(what) is _Edge and what.callback else ""
        return Answer(True, "allowed", prefix + _ENDING, f"{prefix}{invocation.number:08x}", f"{token:032x}", callback=callback)

    def _find(self, who: Instance, call_id: str, invocation_id: str) -> _Invocation | None:
        """The live invocation of this instance that goes by these ids."""
        prefix = call_id[:-8]
        if call_id[:_EPOCH_HEX] != self._epoch or call_id[-8:] != _ENDING or invocation_id[:-8] != prefix:
            return None
        try:
            number = int(invocation_id[_EPOCH_HEX:], 16)
        except ValueError:
            return None
        call = self._calls.get(number >> _NUMBER_BITS)
        place = number & _PLACE_MASK
        if call is None or place >= len(call.rows):
            return None
        found = call.rows[place]
        if type(found) is not _Invocation or found.record is not who.calls or found.number != number & 0xFFFFFFFF:
            return None
        return found

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
            for key in self._expired(table, now_ns, evictions_max):
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

        To find the first key of a dict is linear in those deleted before it, but never more than its size, as it makes itself
        smaller when it grows: some milliseconds for a million tokens, once a sweep. It saves every token a node of a queue.
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
        call, live, place = invocation.call, invocation.record.live, invocation.number & _PLACE_MASK
        call.rows[place] = call.free
        call.free = place
        call.live -= 1
        self._invocations -= 1
        last = live.pop()
        if last is not invocation:  # the last one moves into the gap
            live[invocation.place] = last
            last.place = invocation.place
        # What holds each other is let go here, because no garbage collector looks at it.
        invocation.asked = None
        edge, invocation.edge = invocation.edge, None
        if edge is not None:
            edge.live -= 1
            if edge.newest is invocation:
                edge.newest = None
        if not call.live and not call.tokens:
            del self._calls[call.key]

    def _remove_token(self, key: int) -> None:
        """Forget a token, if it is pending."""
        grant = self._tokens.pop(key, None) or self._late.pop(key, None)
        if grant is not None:
            call = grant.call
            call.tokens -= 1
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
    """The number that a token is in its one spelling; 0, which is no token's, for any other text."""
    try:
        key = int(text, 16)
    except ValueError:
        return 0
    return key if f"{key:032x}" == text else 0


def _mismatch(app: str, version: int) -> Answer:
    return denied(Reason.POLICY_MISMATCH, f"version {version} of {app}, or the one that the call began with, is not held any more or not yet")
