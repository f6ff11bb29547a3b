"""A small application for the controller's tests: its policy in several versions, and a state whose tokens can be told apart."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

from kalium.controller.calls import Deferred, Evicted, MemoryCalls
from kalium.controller.limits import LIMITS, Limits
from kalium.controller.registry import NS_PER_MS, Registry
from kalium.controller.state import State
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.compile import compile_policy
from kalium.protocol.frames import Answer, InstanceEnd, InstanceFinish, InstanceInvoke, InstanceStart, Register

POLICY = """
schema: kalium/v1
app: {app}
version: {version}
mode: enforce
on_unavailable: {{app_edge: deny, deadline_ms: 250}}
peers:
  gateway: {{host: gateway, port: 8080, protocol: http, role: gateway}}
entries: [{entries}]
functions:
  front:
    messages:
      - {{invoke: stock}}
      - {{invoke: pay}}
  stock:
    messages: []
  pay:
    messages:
      - {{invoke: mail}}
  mail:
    messages: []
"""
LISTS = """
  lists:
    messages:
      - repeat: [ {invoke: stock} ]
        at_least: 0
        at_most: 8
"""

EDGES = """
schema: kalium/v1
app: edges
version: 1
mode: enforce
peers:
  gateway: {host: gateway, port: 8080, protocol: http, role: gateway}
entries: [fan, single, later, again, single-again, later-again]
functions:
  fan:
    messages:
      - parallel:
          - {repeat: {invoke: leaf}, at_most: 3}
          - {invoke: other}
        join: answered
      - {invoke: last}
  single: {messages: [{invoke: leaf, join: answered}, {invoke: last}]}
  later: {messages: [{invoke: job, async: true, callback: done}, {invoke: last}]}
  again: {messages: [{invoke: leaf, retries: 2}, {invoke: last}]}
  single-again: {messages: [{invoke: leaf, retries: 1, join: answered}, {invoke: last}]}
  later-again: {messages: [{invoke: job, async: true, callback: done, retries: 1}]}
  leaf: {messages: []}
  other: {messages: []}
  last: {messages: []}
  job: {messages: [{invoke: leaf}]}
  done: {messages: [{invoke: last}]}
"""


@cache
def compiled(version: int = 1, app: str = "shop", entries: str = "front, lists") -> bytes:
    """A policy of `app`: front asks the stock and then pays; lists, there if it is an entry, asks the stock up to 8 times."""
    text = POLICY.format(app=app, version=version, entries=entries) + (LISTS if "lists" in entries else "")
    return compile_policy(text.encode(), "samples")


def policy(version: int = 1, app: str = "shop", entries: str = "front, lists") -> CompiledPolicy:
    return CompiledPolicy.parse(compiled(version, app, entries))


def counting_mint() -> Callable[[], str]:
    """Ids in the order of their making: 1, 2, 3, each in 32 digits."""
    numbers = itertools.count(1)
    return lambda: f"{next(numbers):032x}"


RUN = "00f1e2d3c4b5a697"


def state_of(registry: Registry | None = None, *, limits: Limits = LIMITS, mint: Callable[[], str] | None = None, name: str = "controller") -> State:
    """A controller's state with calls in memory."""
    registry = registry or Registry(limits=limits)
    return State(registry, MemoryCalls(held=registry.held, mint=mint or counting_mint(), limits=limits), name=name)


def at_once(answer: Answer | Deferred[Answer]) -> Answer:
    """An answer that has not to be waited for: memory always has one."""
    assert isinstance(answer, Answer)
    return answer


class Node:
    """An agent with its instances, played by a test against a State. `now_ms` is everybody's clock."""

    def __init__(self, state: State, key: str = "connection-1", node: str = "node0", *, version: int = 1, app: str = "shop") -> None:
        self.state = state
        self.key = key
        self.version = version
        self.app = app
        self.now_ms = 0
        self._steps = itertools.count(1)
        state.registry.agent_hello(key, node=node, run=RUN, now_ns=0)

    @property
    def now_ns(self) -> int:
        return self.now_ms * NS_PER_MS

    def step(self) -> str:
        """A step id that was not used yet."""
        return f"{next(self._steps):016x}"

    def register(self, function: str, instance: str = "") -> Answer:
        return at_once(self.state.register(self.key, Register(instance or function, self.app, function, "image"), now_ns=self.now_ns))

    def unregister(self, instance: str) -> list[Evicted]:
        evicted: list[Evicted] = []
        self.state.on_evicted = evicted.append
        self.state.unregister(self.key, instance, now_ns=self.now_ns)
        return evicted

    def start(self, function: str, token: str = "", *, instance: str = "", step: str = "", version: int = 0) -> Answer:
        said = InstanceStart(step or self.step(), token, "label", version or self.version, instance or function, self.app, function)
        return at_once(self.state.start(self.key, said, now_ns=self.now_ns))

    def invoke(
        self, granted: Answer, function: str, callee: str, *, instance: str = "", step: str = "", version: int = 0,
        asynchronous: bool = False, callback: str = "", retry: bool = False,
    ) -> Answer:  # fmt: skip
        said = InstanceInvoke(
            step or self.step(), granted.call, granted.invocation, callee, version or self.version, instance or function, self.app, function,
            asynchronous=asynchronous, callback=callback, retry=retry,
        )  # fmt: skip
        return at_once(self.state.invoke(self.key, said, now_ns=self.now_ns))

    def end(self, granted: Answer, function: str, *, outcome: str = "answered", instance: str = "") -> bool:
        said = InstanceEnd(granted.call, granted.invocation, outcome, instance or function, self.app, function)
        return at_once(self.state.finish(self.key, said, now_ns=self.now_ns)).allowed

    def finish(self, granted: Answer, function: str, *, outcome: str = "answered", instance: str = "") -> Answer:
        said = InstanceFinish(granted.call, granted.invocation, outcome, instance or function, self.app, function)
        return at_once(self.state.finish(self.key, said, now_ns=self.now_ns))

    def expire(self) -> list[Evicted]:
        """What is over now and was evicted."""
        evicted: list[Evicted] = []
        self.state.on_evicted = evicted.append
        while self.state.expire(now_ns=self.now_ns):
            pass
        return evicted

    def counts(self) -> tuple[int, int]:
        """Live calls and live invocations."""
        report = self.state.status()
        return report.calls, report.invocations


def site(limits: Limits | None = None, functions: str = "front stock pay mail lists", mint: Callable[[], str] | None = None) -> Node:
    """A state with the policy loaded and one agent whose instances are named after their functions."""
    state = state_of(limits=limits or LIMITS, mint=mint)
    state.registry.install(policy(), b"signed 1", now_ns=0)
    node = Node(state)
    for function in functions.split():
        assert node.register(function).allowed
    return node


def edges(limits: Limits = LIMITS) -> Node:
    """A state with the policy EDGES and one agent whose instances are named after their functions."""
    state = state_of(limits=limits)
    policy = CompiledPolicy.parse(compile_policy(EDGES.encode(), "edges"))
    state.registry.install(policy, b"signed edges", now_ns=0)
    node = Node(state, app="edges")
    for function in policy.functions:
        assert node.register(function).allowed
    return node
