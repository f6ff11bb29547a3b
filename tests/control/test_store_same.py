"""Both stores give the same answers to the same questions, whatever these are, and at whichever of two controllers they are asked."""

from __future__ import annotations

import itertools
import random
import secrets
from dataclasses import replace
from typing import Any

import pytest
from controller_samples import EDGES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from control.redis_server import RedisServer
from control.store import PatientCalls, Stores
from kalium.controller.calls import Evicted, MemoryCalls
from kalium.controller.limits import LIMITS, Limits
from kalium.controller.registry import NS_PER_MS, Instance, Registry
from kalium.policy.automaton import AppGraph, CompiledPolicy, Label, LabelKey
from kalium.policy.compile import compile_policy
from kalium.protocol.frames import Answer, InstanceInvoke

POLICY = CompiledPolicy.parse(compile_policy(EDGES.encode(), "edges"))
FUNCTIONS = tuple(POLICY.functions)
KEYS = sorted({label.key for graph in POLICY.app_cfg.values() for label in graph.labels if not label.barrier})
# So small that tables get full, and invocations over, within a script.
SMALL = replace(LIMITS, invocations_per_call=6, tokens_per_call=4, invocations_per_instance=4, calls=5, invocations=12, tokens=10)
CLOCK_MS = (100, 100, 100, 100, 1_000, 1_000, 29_900, 31_000, 95_000, 601_000)
NODE = "node0"


class Pair:
    """A store in memory and one in Redis, the latter at two controllers. What is asked of one is asked of the other."""

    def __init__(self, stores: Stores, limits: Limits = LIMITS, policy: CompiledPolicy = POLICY) -> None:
        registry = Registry(limits=limits)
        registry.install(policy, b"signed edges", now_ns=0)
        self.now_ms = 0
        self.memory = MemoryCalls(held=registry.held, mint=lambda: secrets.token_hex(16), limits=limits)
        prefix = stores.prefix()
        self.redis: list[PatientCalls] = [stores.calls(registry, prefix=prefix, limits=limits, name=name) for name in ("one", "two")]
        self.mine: dict[str, tuple[Instance, list[Instance], int]] = {}
        self.of_redis: dict[str, str] = {"": ""}  # id of memory -> id of Redis
        for function in FUNCTIONS:
            for number in range(2):
                self.adopt(f"{function}-{number}", number)

    @property
    def now_ns(self) -> int:
        return self.now_ms * NS_PER_MS

    def adopt(self, name: str, at: int) -> None:
        """Let an instance speak at controller `at`; at the other one, too, where it spoke before."""
        function = name.rpartition("-")[0]
        made = self.mine.get(name) or (self.instance(name, function), [self.instance(name, function) for _ in self.redis], at)
        memory, redis, _ = made
        self.memory.adopt(memory, now_ns=self.now_ns)
        for controller in (1 - at, at):
            assert self.redis[controller].adopt(redis[controller], now_ns=self.now_ns).allowed
            self.redis[controller].settle()
        self.mine[name] = memory, redis, at

    @staticmethod
    def instance(name: str, function: str) -> Instance:
        return Instance(name, "edges", function, NODE)

    def both(self, name: str, operation: str, at: int, memory: tuple[Any, ...], redis: tuple[Any, ...]) -> Answer:
        """Ask both, the second at controller `at`; returns the answer of memory."""
        who, others, _ = self.mine[name]
        said: Answer = getattr(self.memory, operation)(who, *memory, now_ns=self.now_ns)
        heard: Answer = getattr(self.redis[at], operation)(others[at], *redis, now_ns=self.now_ns)
        for field in ("call", "invocation", "token", "callback"):
            here, there = getattr(said, field), getattr(heard, field)
            assert self.of_redis.setdefault(here, there) == there, (field, said, heard)
        assert (said.allowed, said.reason, tuple(said.expected), said.detail, said.hold) == (
            heard.allowed, heard.reason, tuple(heard.expected), heard.detail, heard.hold,
        ), (operation, memory)  # fmt: skip
        return said

    def there(self, word: str) -> str:
        return self.of_redis.get(word, word)

    def same_evictions(self, here: list[Evicted], there: list[Evicted]) -> None:
        translated = {(self.there(each.call), self.there(each.invocation), each.function, each.instance, each.why) for each in here}
        assert translated == {(each.call, each.invocation, each.function, each.instance, each.why) for each in there}

    def expire(self, at: int) -> None:
        here: list[Evicted] = []
        while True:
            here += self.memory.expire(now_ns=self.now_ns)
            if not self.memory.has_due(now_ns=self.now_ns):
                break
        there = self.redis[at].expire(now_ns=self.now_ns)
        while self.redis[at].has_due(now_ns=self.now_ns):
            there += self.redis[at].expire(now_ns=self.now_ns)
        self.same_evictions(here, there)
        assert self.memory.counts() == self.redis[at].counts() == self.redis[1 - at].counts()

    def forget(self, name: str, at: int) -> None:
        """The instance is gone at every controller; what it was doing is told once, by who adopted it last."""
        memory, redis, last = self.mine[name]
        here = self.memory.forget(memory, "unregistered", now_ns=self.now_ns)
        assert self.redis[1 - last].forget(redis[1 - last], "unregistered", now_ns=self.now_ns) == []
        self.same_evictions(here, self.redis[last].forget(redis[last], "unregistered", now_ns=self.now_ns))
        del self.mine[name]
        self.adopt(name, at)


Script = list[tuple[int, int, int, int]]


def play(pair: Pair, script: Script) -> None:  # noqa: PLR0912 - a branch for each action
    """Do what the script says, with what there is to do it with."""
    steps = (f"{number:016x}" for number in itertools.count(1))
    live: list[tuple[str, Answer]] = []  # instance, grant; those that are over stay in the list
    tokens: list[tuple[str, str]] = []  # callee, token
    asked: tuple[Any, ...] | None = None
    grant = Answer(False, "")
    for action, which, how, at in script:
        if action <= 1:
            name = f"{FUNCTIONS[which % len(FUNCTIONS)]}-{how % 2}"
            asked = (name, "begin", (1, next(steps)), (1, None))
        elif action <= 3 and tokens:
            callee, token = tokens[-1 - which % min(4, len(tokens))]
            function = callee if how else FUNCTIONS[which % len(FUNCTIONS)]
            asked = (f"{function}-{which % 2}", "join", (1, token, next(steps)), (1, pair.there(token), None))
        elif action <= 7 and live:
            name, grant = live[-1 - which % min(4, len(live))]
            function = name.rpartition("-")[0]
            own = [label.key for label in POLICY.app_cfg[function].labels if not label.barrier]
            key = own[how % len(own)] if own and which % 5 else KEYS[how % len(KEYS)]
            here = InstanceInvoke(
                next(steps), grant.call, grant.invocation, key.callee, 1, name, "edges", function,
                asynchronous=key.asynchronous, callback=key.callback, retry=action == 7,
            )  # fmt: skip
            there = replace_ids(here, pair)
            asked = (name, "invoke", (here,), (there,))
        elif action <= 9 and live:
            name, grant = live[-1 - which % min(4, len(live))]
            outcome = ("answered", "answered", "answered", "closed", "timeout")[how % 5]
            asked = (name, "finish", (grant.call, grant.invocation, outcome), (pair.there(grant.call), pair.there(grant.invocation), outcome))
        elif action == 10:
            pair.now_ms += CLOCK_MS[how % len(CLOCK_MS)]
            if which % 2:
                pair.expire(at)
            continue
        elif action == 11:
            pair.forget(f"{FUNCTIONS[which % len(FUNCTIONS)]}-{how % 2}", at)
            continue
        if asked is None:
            continue
        name, operation, memory, redis = asked  # where nothing else can be done, the last question is asked again
        if operation in ("begin", "join"):
            redis = (*redis[:-1], memory[-1])
        answer = pair.both(name, operation, at, memory, redis)
        if operation in ("begin", "join") and answer.allowed:
            live.append((name, answer))
        is_over = answer.reason == "unknown_call" or (operation == "finish" and answer.allowed)
        if is_over and how % 3 and (name, grant) in live:
            live.remove((name, grant))
        if operation == "invoke" and answer.allowed:
            said: InstanceInvoke = memory[0]
            tokens.append((said.callee, answer.token))
            if answer.callback:
                tokens.append((said.callback, answer.callback))


def replace_ids(said: InstanceInvoke, pair: Pair) -> InstanceInvoke:
    return InstanceInvoke(
        said.step, pair.there(said.call), pair.there(said.invocation), said.callee, said.version, said.instance, said.app, said.function,
        asynchronous=said.asynchronous, callback=said.callback, retry=said.retry,
    )  # fmt: skip


def assert_nothing_is_left(pair: Pair, stores: Stores) -> None:
    pair.now_ms += 10_000_000
    pair.expire(0)
    assert pair.memory.counts() == (0, 0)
    prefix = pair.redis[0].link.prefix
    kinds = {key[len(prefix) :].split("}:")[-1].split(":")[0] for key in stores.server.ask("KEYS", prefix + "*").splitlines()}
    assert kinds <= {"cfg", "instance", "starts", "ended", "server"}, kinds


numbers = st.integers(0, 30)
scripts = st.lists(st.tuples(st.integers(0, 12), numbers, numbers, st.integers(0, 1)), max_size=80)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=scripts)
@pytest.mark.parametrize("limits", [LIMITS, SMALL], ids=["roomy", "small"])
def test_memory_and_redis_answer_the_same(redis_server: RedisServer, limits: Limits, script: Script) -> None:
    stores = Stores(redis_server)
    try:
        pair = Pair(stores, limits)
        play(pair, script)
        assert_nothing_is_left(pair, stores)
    finally:
        stores.close()


@pytest.mark.parametrize("seed", range(4))
def test_long_walks_are_the_same(stores: Stores, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - it only has to be the same each time
    pair = Pair(stores)

    play(pair, [(chance.randrange(13), chance.randrange(31), chance.randrange(31), chance.randrange(2)) for _ in range(1500)])

    assert_nothing_is_left(pair, stores)


# Labels of one key that differ, as no compiler of ours makes them; and the barriers of two groups.
LABELS = tuple(sorted({Label(LabelKey(callee), retries, join) for callee in ("leaf", "other") for retries in (0, 1) for join in (0, 1, 2)}, key=str))
LABELS += (Label(barrier=1), Label(barrier=2))
graphs = st.sets(st.tuples(st.integers(0, 3), st.integers(0, len(LABELS) - 1), st.integers(0, 3)), max_size=14)
walks = st.lists(st.tuples(st.sampled_from(["leaf", "other"]), st.booleans(), st.integers(0, 3)), max_size=12)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edges=graphs, start=st.sets(st.integers(0, 3), min_size=1), walk=walks)
def test_any_graph_is_stepped_the_same(
    redis_server: RedisServer, edges: set[tuple[int, int, int]], start: set[int], walk: list[tuple[str, bool, int]]
) -> None:
    stores = Stores(redis_server)
    try:
        graph = AppGraph(4, frozenset(start), LABELS, tuple(sorted(edges)))
        pair = Pair(stores, policy=replace(POLICY, app_cfg={**POLICY.app_cfg, "fan": graph}))
        steps = (f"{number:016x}" for number in itertools.count(1))
        fan = pair.both("fan-0", "begin", 0, (1, "f" * 16), (1, "f" * 16))
        for callee, is_retry, what in walk:
            said = InstanceInvoke(next(steps), fan.call, fan.invocation, callee, 1, "fan-0", "edges", "fan", retry=is_retry)
            answer = pair.both("fan-0", "invoke", what % 2, (said,), (replace_ids(said, pair),))
            if answer.allowed and what:
                step = next(steps)
                begun = pair.both(f"{callee}-0", "join", 0, (1, answer.token, step), (1, pair.there(answer.token), step))
                if what > 1:
                    outcome = ("answered", "closed")[what % 2]
                    mine, theirs = (begun.call, begun.invocation, outcome), (pair.there(begun.call), pair.there(begun.invocation), outcome)
                    pair.both(f"{callee}-0", "finish", 1, mine, theirs)
    finally:
        stores.close()
