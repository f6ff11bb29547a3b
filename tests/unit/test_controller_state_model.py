"""The cursor store against a plain model of it: whatever happens in whatever order, both say the same.

The model knows each function's language as a list of words and remembers everything that ever happened. It is slow, needs no
automaton, no tables that forget and no second look to be believed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
from controller_samples import RUN, counting_mint
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kalium.controller.calls import Evicted, MemoryCalls
from kalium.controller.limits import LIMITS
from kalium.controller.registry import NS_PER_MS, Registry
from kalium.controller.state import State
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.compile import compile_policy
from kalium.protocol.frames import Answer, InstanceEnd, InstanceFinish, InstanceInvoke, InstanceStart, Register

POLICY = """
schema: kalium/v1
app: model
version: 1
mode: enforce
peers:
  gateway: {host: gateway, port: 8080, protocol: http, role: gateway}
entries: [sequence, branch, optional, loop, fan, later, again, nested]
functions:
  sequence: {messages: [{invoke: leaf}, {invoke: last}]}
  branch: {messages: [{choice: [[{invoke: leaf}, {invoke: last}], [{invoke: last}, {invoke: last}]]}]}
  optional: {messages: [{optional: {invoke: leaf}}, {invoke: last}]}
  loop: {messages: [{repeat: {invoke: leaf}, at_most: 2}, {invoke: last}]}
  fan:
    messages:
      - parallel: [{invoke: leaf, retries: 1}, {invoke: last}]
        join: answered
      - {invoke: done}
  later: {messages: [{invoke: job, async: true, callback: done, retries: 1}, {invoke: last}]}
  again: {messages: [{invoke: leaf, retries: 2, join: answered}, {invoke: last}]}
  nested: {messages: [{invoke: sequence, join: answered}, {invoke: fan}]}
  leaf: {messages: []}
  last: {messages: []}
  job: {messages: [{invoke: leaf}]}
  done: {messages: [{invoke: last}]}
"""

Way = tuple[str, bool, str]
LEAF, LAST, DONE = (("leaf", False, ""), ("last", False, ""), ("done", False, ""))
JOB: Way = ("job", True, "done")
WAIT = None  # here all of the function's joined edges have to be answered
# Every order of invocations that a function may take part of from the beginning.
WORDS: dict[str, list[list[Way | None]]] = {
    "sequence": [[LEAF, LAST]],
    "branch": [[LEAF, LAST], [LAST, LAST]],
    "optional": [[LEAF, LAST], [LAST]],
    "loop": [[LAST], [LEAF, LAST], [LEAF, LEAF, LAST]],
    "fan": [[LEAF, LAST, WAIT, DONE], [LAST, LEAF, WAIT, DONE]],
    "later": [[JOB, LAST]],
    "again": [[LEAF, WAIT, LAST]],
    "nested": [[("sequence", False, ""), WAIT, ("fan", False, "")]],
    "leaf": [[]],
    "last": [[]],
    "job": [[LEAF]],
    "done": [[LAST]],
}
JOINED = {("fan", "leaf"), ("fan", "last"), ("again", "leaf"), ("nested", "sequence")}
RETRIES = {("fan", "leaf"): 1, ("later", "job"): 1, ("again", "leaf"): 2}
FUNCTIONS = sorted(WORDS)
ENTRIES = ["nested", "later", "fan", "again", "sequence", "branch", "optional", "loop"]
WAYS: list[Way] = [*((callee, False, "") for callee in FUNCTIONS), JOB, ("job", True, ""), ("done", True, "done")]
TIMEOUT_MS = 60_000 + LIMITS.invocation_grace_ms


@dataclass(eq=False)
class Token:
    """A right to start `function`; `edge` is the one that it was granted with."""

    text: str
    function: str
    edge: Edge
    until_ms: int
    is_callback: bool
    is_pending: bool = True


@dataclass(eq=False)
class Edge:
    """A granted edge."""

    way: Way
    caller: Invocation
    retries: int
    token: Token | None = None
    callback: Token | None = None
    began: list[Invocation] = field(default_factory=list)
    newest: Invocation | None = None
    is_called_back: bool = False

    @property
    def is_answered(self) -> bool:
        return self.newest is not None and self.newest.outcome == "answered"


@dataclass(eq=False)
class Invocation:
    """One execution; `outcome` is "" while it lives."""

    id: str
    call: str
    function: str
    instance: str
    until_ms: int
    edge: Edge | None
    granted: list[Edge] = field(default_factory=list)
    last: tuple[InstanceInvoke, Answer] | None = None
    outcome: str = ""


def last_of(data: st.DataObject, items: list[Any]) -> Any:
    """One of the last few, for most of the others are history."""
    return items[-1 - data.draw(st.integers(0, min(len(items) - 1, 6)))]


class Store(RuleBasedStateMachine):
    """Two controllers that share one store, and a node whose agent is at one of them."""

    @initialize()
    def begin(self) -> None:
        policy = CompiledPolicy.parse(compile_policy(POLICY.encode(), "model"))
        first, second = Registry(), Registry()
        self.calls = MemoryCalls(held=first.held, mint=counting_mint())
        self.evicted: list[Evicted] = []
        self.states = [State(registry, self.calls) for registry in (first, second)]
        for state in self.states:
            state.registry.install(policy, b"signed", now_ns=0)
            state.on_evicted = self.evicted.append
        self.now_ms = 0
        self.at = 0  # the controller that the agent is connected to
        self.steps = itertools.count(1)
        self.invocations: list[Invocation] = []
        self.tokens: list[Token] = []
        self.starts: dict[str, tuple[InstanceStart, Answer]] = {}  # by instance: the last one
        self.states[0].registry.agent_hello("agent", node="node0", run=RUN, now_ns=0)
        for function in FUNCTIONS:
            for number in range(2):
                self._register(f"{function}-{number}")

    # Each rule does one of several things, so that what takes a call further happens most often.

    @rule(data=st.data(), what=st.lists(st.sampled_from(["start", "go on", "go on", "begin", "begin", "answer", "retry"]), min_size=1, max_size=6))
    def go(self, data: st.DataObject, what: list[str]) -> None:
        moves = {
            "start": self.start,
            "go on": self.go_on,
            "begin": self.start_a_callee,
            "answer": self.answer,
            "retry": self.take_the_last_edge_again,
        }
        for each in what:
            moves[each](data)

    @rule(data=st.data(), what=st.sampled_from(["start", "invoke", "end", "speak", "repeat start", "repeat invoke"]))
    def go_astray(self, data: st.DataObject, what: str) -> None:
        if what == "start" and self.tokens:
            self.start_with_a_token(data)
        elif what == "repeat start" and self.starts:
            self.repeat_a_start(data)
        elif what == "invoke" and self.invocations:
            self.invoke(data)
        elif what == "end" and self.invocations:
            self.end(data)
        elif what == "speak" and self.invocations:
            self.speak_for_another(data)
        elif what == "repeat invoke" and self.invocations:
            self.repeat_an_invoke(data)

    @rule(data=st.data(), what=st.sampled_from(["time", "time", "time", "replace", "move"]))
    def disturb(self, data: st.DataObject, what: str) -> None:
        {"time": self.let_time_pass, "replace": self.replace_an_instance, "move": self.move_to_the_other_controller}[what](data)

    # What a guard may say

    def start(self, data: st.DataObject) -> None:
        function, number = data.draw(st.sampled_from([*ENTRIES, "leaf"])), data.draw(st.integers(0, 1))
        answer = self._start(f"{function}-{number}", "")
        if function not in ENTRIES:
            assert (answer.allowed, answer.reason) == (False, "not_an_entry")
        else:
            self._began(answer, f"{function}-{number}", None)

    def start_a_callee(self, data: st.DataObject) -> None:
        pending = [token for token in self.tokens if token.is_pending]
        if pending:
            token = last_of(data, pending)
            self._start_with(token, token.function, data.draw(st.integers(0, 1)))

    def start_with_a_token(self, data: st.DataObject) -> None:
        """Of another function, or one that was spent, revoked or has expired."""
        token = last_of(data, self.tokens)
        self._start_with(token, data.draw(st.sampled_from([token.function, *FUNCTIONS])), data.draw(st.integers(0, 1)))

    def _start_with(self, token: Token, function: str, number: int) -> None:
        answer = self._start(f"{function}-{number}", token.text)
        edge = token.edge
        is_early = token.is_callback and any(not each.outcome for each in edge.began)
        if not token.is_pending or token.function != function or self.now_ms >= token.until_ms or is_early:
            assert (answer.allowed, answer.reason) == (False, "bad_token")
            return
        token.is_pending = False
        if token.is_callback:
            edge.is_called_back = True
            assert edge.token is not None
            edge.token.is_pending = False
        self._began(answer, f"{function}-{number}", None if token.is_callback else edge)
        assert answer.hold == (not token.is_callback and ((edge.caller.function, edge.way[0]) in JOINED or edge.way[2] != ""))
        assert answer.call == edge.caller.call, "an invocation joined another call"

    def go_on(self, data: st.DataObject) -> None:
        ready = [(each, way) for each in self._live() for way in WAYS if self._allows(each, way)]
        if ready:
            self._invoke(*last_of(data, ready), retry=False)

    def invoke(self, data: st.DataObject) -> None:
        """Whatever it is, and of an invocation that is over too."""
        self._invoke(last_of(data, self.invocations), data.draw(st.sampled_from(WAYS)), retry=data.draw(st.booleans()))

    def take_the_last_edge_again(self, data: st.DataObject) -> None:
        callers = [each for each in self._live() if each.granted]
        if callers:
            invocation = last_of(data, callers)
            self._invoke(invocation, invocation.granted[-1].way, retry=data.draw(st.sampled_from([True, True, False])))

    def _invoke(self, invocation: Invocation, way: Way, *, retry: bool) -> None:
        said = InstanceInvoke(
            self._step(), invocation.call, invocation.id, way[0], 1, invocation.instance, "model", invocation.function,
            asynchronous=way[1], callback=way[2], retry=retry,
        )  # fmt: skip
        answer = self._ask(said)
        if invocation.outcome or self.now_ms >= invocation.until_ms:
            assert (answer.allowed, answer.reason) == (False, "unknown_call")
            return
        invocation.last = (said, answer)
        if retry:
            edge = invocation.granted[-1] if invocation.granted else None
            if edge is None or edge.way != way or not edge.retries or edge.is_called_back:
                assert (answer.allowed, answer.reason) == (False, "edge_not_allowed")
                return
            edge.retries -= 1
            edge.newest = None
            for token in (edge.token, edge.callback):
                if token is not None:
                    token.is_pending = False
        else:
            if not self._allows(invocation, way):
                assert (answer.allowed, answer.reason) == (False, "edge_not_allowed")
                return
            edge = Edge(way, invocation, RETRIES.get((invocation.function, way[0]), 0))
            invocation.granted.append(edge)
        assert (answer.allowed, answer.call, answer.invocation) == (True, invocation.call, invocation.id)
        lifetime_ms = LIMITS.token_late_ms if way[1] else LIMITS.token_ms
        edge.token = self._issued(answer.token, way[0], edge, lifetime_ms, is_callback=False)
        edge.callback = self._issued(answer.callback, way[2], edge, LIMITS.token_late_ms, is_callback=True) if way[2] else None
        assert bool(answer.callback) == bool(way[2])

    def answer(self, data: st.DataObject) -> None:
        if self._live():
            self._end(last_of(data, self._live()), "answered", data.draw(st.booleans()))

    def end(self, data: st.DataObject) -> None:
        outcome = data.draw(st.sampled_from(["closed", "timeout", "answered"]))
        self._end(last_of(data, self.invocations), outcome, data.draw(st.booleans()))

    def _end(self, invocation: Invocation, outcome: str, is_finish: bool) -> None:
        cls = InstanceFinish if is_finish else InstanceEnd
        said = cls(invocation.call, invocation.id, outcome, invocation.instance, "model", invocation.function)
        answer = self._asked(self.states[self.at].finish("agent", said, now_ns=self.now_ns))
        is_repeat = invocation.edge is not None and invocation.outcome == outcome
        if self.now_ms >= invocation.until_ms or invocation.outcome:
            # One that somebody waited for says the same again, if it was not so long ago that it is forgotten.
            assert not answer.allowed or is_repeat
        else:
            assert answer.allowed
            invocation.outcome = outcome

    def speak_for_another(self, data: st.DataObject) -> None:
        """Ids that have leaked from one instance are of no use in another."""
        invocation = last_of(data, self.invocations)
        function = data.draw(st.sampled_from([invocation.function, *FUNCTIONS]))
        instance = f"{function}-{data.draw(st.integers(0, 1))}"
        if instance == invocation.instance:
            return
        said = InstanceInvoke(self._step(), invocation.call, invocation.id, "leaf", 1, instance, "model", function)
        assert self._ask(said).reason == "unknown_call"
        end = InstanceEnd(invocation.call, invocation.id, "answered", instance, "model", function)
        assert not self._asked(self.states[self.at].finish("agent", end, now_ns=self.now_ns)).allowed

    def repeat_a_start(self, data: st.DataObject) -> None:
        said, answer = self.starts[data.draw(st.sampled_from(sorted(self.starts)))]
        assert self._asked(self.states[self.at].start("agent", said, now_ns=self.now_ns)) == answer

    def repeat_an_invoke(self, data: st.DataObject) -> None:
        invocation = last_of(data, self.invocations)
        if invocation.last is not None and not invocation.outcome and self.now_ms < invocation.until_ms:
            assert self._ask(invocation.last[0]) == invocation.last[1]

    # What else happens

    def let_time_pass(self, data: st.DataObject) -> None:
        self.now_ms += data.draw(st.sampled_from([100, 100, 100, 5_000, 29_900, 30_000, 90_000, 600_000, 400 * 86_400_000]))
        if data.draw(st.booleans()):
            self._sweep()

    def replace_an_instance(self, data: st.DataObject) -> None:
        instance = f"{data.draw(st.sampled_from(FUNCTIONS))}-{data.draw(st.integers(0, 1))}"
        self.states[self.at].unregister("agent", instance, now_ns=self.now_ns)
        for invocation in self._live(instance):
            invocation.outcome = "gone"
        assert {each.instance for each in self.evicted} <= {instance}
        self.evicted.clear()
        self.starts.pop(instance, None)
        self._register(instance)

    def move_to_the_other_controller(self, _data: st.DataObject) -> None:
        """The agent has lost one and found the other: every instance is registered there, and its invocations go on."""
        self.states[self.at].registry.agent_gone("agent", now_ns=self.now_ns)
        self.at = 1 - self.at
        self.states[self.at].registry.agent_hello("agent", node="node0", run=RUN, now_ns=self.now_ns)
        for function in FUNCTIONS:
            for number in range(2):
                self._register(f"{function}-{number}")

    @invariant()
    def no_two_share_an_id(self) -> None:
        if hasattr(self, "invocations"):
            ids = [each.id for each in self.invocations] + [token.text for token in self.tokens]
            assert len(set(ids)) == len(ids)

    def teardown(self) -> None:
        """What is alive is what the model says; and when all time is over nothing is left."""
        if not hasattr(self, "invocations"):
            return
        self._sweep()
        live = [each for each in self.invocations if not each.outcome]
        calls = {each.call for each in live} | {token.edge.caller.call for token in self.tokens if token.is_pending and self.now_ms < token.until_ms}
        assert self.calls.counts() == (len(calls), len(live))
        self.now_ms += 10 * 86_400_000
        self._sweep()
        assert self.calls.counts() == (0, 0)
        assert (self.calls._calls, self.calls._tokens, self.calls._late) == ({}, {}, {})

    # The model's own

    @property
    def now_ns(self) -> int:
        return self.now_ms * NS_PER_MS

    def _allows(self, invocation: Invocation, way: Way) -> bool:
        """Whether some word of the function begins with what was granted, then `way`, and nothing waits in between."""
        path: list[Way] = [edge.way for edge in invocation.granted] + [way]
        waiting = any((invocation.function, edge.way[0]) in JOINED and not edge.is_answered for edge in invocation.granted)
        for word in WORDS[invocation.function]:
            spelled: list[Way] = []
            for each in word:
                if len(spelled) == len(path):
                    break
                if each is not WAIT:
                    spelled.append(each)
                elif waiting:
                    break
            if spelled == path:
                return True
        return False

    def _live(self, instance: str = "") -> list[Invocation]:
        return [each for each in self.invocations if not each.outcome and instance in ("", each.instance)]

    def _began(self, answer: Answer, instance: str, edge: Edge | None) -> None:
        assert answer.allowed, answer
        began = Invocation(answer.invocation, answer.call, instance.rpartition("-")[0], instance, self.now_ms + TIMEOUT_MS, edge)
        if edge is None:
            assert answer.call
        else:
            edge.began.append(began)
            edge.newest = began
        self.invocations.append(began)

    def _issued(self, text: str, function: str, edge: Edge, lifetime_ms: int, *, is_callback: bool) -> Token:
        token = Token(text, function, edge, self.now_ms + lifetime_ms, is_callback)
        self.tokens.append(token)
        return token

    def _step(self) -> str:
        return f"{next(self.steps):016x}"

    def _start(self, instance: str, token: str) -> Answer:
        said = InstanceStart(self._step(), token, "", 1, instance, "model", instance.rpartition("-")[0])
        answer = self._asked(self.states[self.at].start("agent", said, now_ns=self.now_ns))
        self.starts[instance] = (said, answer)
        return answer

    def _ask(self, said: InstanceInvoke) -> Answer:
        return self._asked(self.states[self.at].invoke("agent", said, now_ns=self.now_ns))

    def _asked(self, answer: Any) -> Answer:
        assert isinstance(answer, Answer)
        return answer

    def _register(self, instance: str) -> None:
        said = Register(instance, "model", instance.rpartition("-")[0], "image")
        assert self._asked(self.states[self.at].register("agent", said, now_ns=self.now_ns)).allowed

    def _sweep(self) -> None:
        """Both controllers look at what is over. What was evicted is what the model expects, and for no other reason."""
        for state in self.states:
            while state.expire(now_ns=self.now_ns):
                pass
        due = [each for each in self.invocations if not each.outcome and self.now_ms >= each.until_ms]
        assert sorted(each.invocation for each in self.evicted) == sorted(each.id for each in due)
        assert {each.why for each in self.evicted} <= {"timeout"}
        assert {(each.invocation, each.call, each.instance) for each in self.evicted} == {(each.id, each.call, each.instance) for each in due}
        self.evicted.clear()
        for invocation in due:
            invocation.outcome = "evicted"


Store.TestCase.settings = settings(max_examples=120, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TestTheStoreIsItsModel = pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")(Store.TestCase)
