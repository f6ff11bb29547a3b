"""What controllers share beside calls, and what becomes of steps when the store is away, has forgotten, or has gone back in time."""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from controller_samples import policy
from hypothesis import given
from hypothesis import strategies as st

from control.redis_server import DURABLE, FORGETFUL, LOSSY, RedisServer
from control.store import WAIT_S, PatientCalls, Stores
from kalium.controller import redis_calls
from kalium.controller.limits import LIMITS
from kalium.controller.redis_calls import KEEP_MS
from kalium.controller.redis_link import Refused
from kalium.controller.registry import Instance, Registry
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.compile import compile_policy
from kalium.protocol.frames import Answer, InstanceInvoke

FRONT = ("front-1", "shop", "front")


class Two:
    """Two controllers of one site, with an instance `front` that speaks at both."""

    def __init__(self, stores: Stores) -> None:
        self.registry = Registry()
        self.registry.install(policy(), b"signed 1", now_ns=0)
        prefix = stores.prefix()
        self.one = stores.calls(self.registry, prefix=prefix, name="one")
        self.two = stores.calls(self.registry, prefix=prefix, name="two")
        self.at_one, self.at_two = (Instance(*FRONT, "node0") for _ in range(2))

    def adopt(self) -> None:
        assert self.one.adopt(self.at_one, now_ns=0).allowed
        self.one.settle()
        assert self.two.adopt(self.at_two, now_ns=0).allowed
        self.two.settle()

    def invoke(self, calls: PatientCalls, who: Instance, grant: Answer, callee: str, step: str) -> Answer:
        return calls.invoke(who, InstanceInvoke(step, grant.call, grant.invocation, callee, 1, *FRONT), now_ns=0)


@pytest.fixture
def two(stores: Stores) -> Two:
    return Two(stores)


# Instances and agents


def test_an_instance_is_one_nodes_whichever_controller_is_told(two: Two) -> None:
    two.adopt()

    for calls in (two.one, two.two):
        answer = calls.adopt(Instance(*FRONT, "node1"), now_ns=0)
        assert (answer.allowed, answer.reason) == (False, "unregistered")
    answer = two.two.adopt(Instance("front-1", "shop", "stock", "node0"), now_ns=0)
    assert (answer.allowed, answer.reason) == (False, "unregistered")


def test_an_instance_that_was_refused_takes_no_step(two: Two) -> None:
    two.adopt()
    stranger = Instance(*FRONT, "node1")
    two.two.adopt(stranger, now_ns=0)

    assert two.two.begin(stranger, 1, "a" * 16, now_ns=0).reason == "unregistered"


def test_an_id_is_free_again_when_its_instance_is_gone_everywhere(two: Two) -> None:
    two.adopt()
    assert two.one.forget(two.at_one, "unregistered", now_ns=0) == []
    two.two.settle()
    assert not two.one.adopt(Instance(*FRONT, "node1"), now_ns=0).allowed

    two.two.forget(two.at_two, "unregistered", now_ns=0)
    two.two.settle()

    assert two.one.adopt(Instance(*FRONT, "node1"), now_ns=0).allowed


def test_another_run_of_an_agent_is_lost_while_the_first_is_heard(two: Two) -> None:
    lost: list[str] = []
    two.one.agent_here("node0", "a" * 16)
    two.one.settle()
    two.two.on_agent_lost = lost.append

    two.two.agent_here("node0", "b" * 16)
    two.two.settle()

    assert lost == ["node0"]


def test_an_instance_of_another_run_of_its_agent_is_not_registered(two: Two) -> None:
    """Whoever has stolen a key may name the instances of its node, and gets no step of theirs."""
    two.one.agent_here("node0", "a" * 16)
    assert two.one.adopt(two.at_one, now_ns=0).allowed
    two.two.agent_here("node0", "b" * 16)

    answer = two.two.adopt(two.at_two, now_ns=0)

    assert (answer.allowed, answer.reason) == (False, "unregistered")


def test_a_refused_registration_does_not_silence_who_was_there_first(two: Two) -> None:
    two.one.agent_here("node0", "a" * 16)
    assert two.one.adopt(two.at_one, now_ns=0).allowed
    start = two.one.begin(two.at_one, 1, "a" * 16, now_ns=0)
    two.two.agent_here("node0", "b" * 16)

    assert not two.two.adopt(two.at_two, now_ns=0).allowed
    two.two.settle()

    assert two.invoke(two.one, two.at_one, start, "stock", "b" * 16).allowed


def test_the_same_run_of_an_agent_may_come_to_another_controller(two: Two) -> None:
    lost: list[str] = []
    two.one.on_agent_lost = two.two.on_agent_lost = lost.append
    two.one.agent_here("node0", "a" * 16)
    two.one.settle()

    two.two.agent_here("node0", "a" * 16)
    two.one.calls.beat(["node0"])
    two.two.calls.beat(["node0"])
    two.one.settle()
    two.two.settle()

    assert lost == []


def test_a_question_that_arrives_late_is_no_question(two: Two) -> None:
    """A controller that hung reads what an agent asked before it went to another one. Nothing moves, whatever it believes to speak for."""
    run = "a" * 16
    two.one.agent_here("node0", run, 1)
    two.one.adopt(two.at_one, now_ns=0)
    begun = two.one.begin(two.at_one, 1, "1" * 16, now_ns=0)
    two.two.agent_here("node0", run, 2)
    two.two.adopt(two.at_two, now_ns=0)
    granted = two.invoke(two.two, two.at_two, begun, "stock", "2" * 16)
    assert granted.allowed

    for _ in range(2):  # also once it has taken up the instance again, by a registration that is as late
        late = [two.invoke(two.one, two.at_one, begun, "stock", "3" * 16), two.one.begin(two.at_one, 1, "4" * 16, now_ns=0)]
        assert {answer.reason for answer in late} == {"controller_unavailable"}
        two.one.adopt(two.at_one, now_ns=0)

    assert two.invoke(two.two, two.at_two, begun, "stock", "2" * 16) == granted
    two.two.settle()
    assert two.two.counts() == (1, 1)


def test_an_agent_that_has_left_may_be_started_anew(two: Two) -> None:
    lost: list[str] = []
    two.two.on_agent_lost = lost.append
    two.one.agent_here("node0", "a" * 16)
    two.one.agent_gone("node0")
    two.one.settle()

    two.two.agent_here("node0", "b" * 16)
    two.two.settle()

    assert lost == []


def test_controllers_that_beat_are_listed_and_others_are_not(two: Two) -> None:
    two.one.calls.beat([])
    two.one.settle()
    two.two.calls.beat([])
    two.two.settle()
    assert two.two.controllers() == ("one", "two")

    two.two._now_ms += 3_001
    two.two.calls.beat([])
    two.two.settle()

    assert two.two.controllers() == ("two",)


# Steps at both


def test_a_step_that_was_answered_by_one_has_the_same_answer_at_the_other(two: Two) -> None:
    two.adopt()
    start = two.one.begin(two.at_one, 1, "a" * 16, now_ns=0)
    invoke = two.invoke(two.one, two.at_one, start, "stock", "b" * 16)
    assert start.allowed and invoke.allowed

    assert two.two.begin(two.at_two, 1, "a" * 16, now_ns=0) == start
    assert two.invoke(two.two, two.at_two, start, "stock", "b" * 16) == invoke
    assert two.invoke(two.two, two.at_two, start, "stock", "c" * 16).reason == "edge_not_allowed"


def test_starts_are_remembered_for_who_takes_over_whatever_may_be_in_flight(two: Two) -> None:
    """An agent that fails over asks again what its guards have given up: what had been granted there can only be ended so."""
    two.adopt()
    steps = [f"{number:016x}" for number in range(LIMITS.starts_per_instance + 1)]
    answers = [two.one.begin(two.at_one, 1, step, now_ns=0) for step in steps]

    assert [two.two.begin(two.at_two, 1, step, now_ns=0) for step in steps[1:]] == answers[1:]
    assert two.two.begin(two.at_two, 1, steps[0], now_ns=0).call != answers[0].call  # forgotten: a new step, judged as one


def test_a_controller_with_another_text_of_the_same_version_takes_no_step_in_a_call(stores: Stores, two: Two) -> None:
    """Its states are numbered otherwise; the version alone would not tell."""
    two.adopt()
    start = two.one.begin(two.at_one, 1, "a" * 16, now_ns=0)
    other = Registry()
    other.install(policy(1, entries="front"), b"signed otherwise", now_ns=0)
    three = stores.calls(other, prefix=two.one.link.prefix, name="three")
    who = Instance(*FRONT, "node0")
    assert three.adopt(who, now_ns=0).allowed

    assert two.invoke(three, who, start, "stock", "b" * 16).reason == "policy_mismatch"


def test_steps_that_come_with_a_registration_wait_for_it(two: Two) -> None:
    """An agent that fails over registers its instances and asks at once, without waiting for the answers."""
    calls = two.one.calls
    answers: list[Answer] = []
    adopted = calls.adopt(two.at_one, now_ns=0)
    begun = calls.begin(two.at_one, 1, "a" * 16, now_ns=0)
    assert not isinstance(adopted, Answer) and not isinstance(begun, Answer)
    adopted.then(answers.append)
    begun.then(answers.append)

    deadline = time.monotonic() + WAIT_S
    while len(answers) < 2 and time.monotonic() < deadline:  # the step is sent when the claim's answer has been read
        two.one.settle()

    assert [answer.allowed for answer in answers] == [True, True]


def test_an_instance_that_goes_while_it_is_taken_up_is_gone(stores: Stores, two: Two) -> None:
    """Its registration, its step and its end are on their way to the store together."""
    calls = two.one.calls
    answers: list[Answer] = []
    for asked in (calls.adopt(two.at_one, now_ns=0), calls.begin(two.at_one, 1, "a" * 16, now_ns=0)):
        assert not isinstance(asked, Answer)
        asked.then(answers.append)
    calls.forget(two.at_one, "unregistered", now_ns=0)

    deadline = time.monotonic() + WAIT_S
    while len(answers) < 2 and time.monotonic() < deadline:
        two.one.settle()
    two.one.settle()

    assert [answer.reason for answer in answers] == ["unregistered", "unregistered"]
    assert two.one.counts() == (0, 0)
    assert not stores.server.ask("KEYS", f"{two.one.link.prefix}*app/shop*:instance:*")


def test_an_instance_that_comes_back_at_once_keeps_its_id(two: Two) -> None:
    """A container that is started again: the end of its last run is answered behind the registration of the next one."""
    two.adopt()
    two.two.forget(two.at_two, "unregistered", now_ns=0)
    two.two.settle()
    assert two.one.adopt(two.at_one, now_ns=0).allowed
    two.one.calls.forget(two.at_one, "unregistered", now_ns=0)

    assert two.one.adopt(Instance(*FRONT, "node0"), now_ns=0).allowed
    two.one.settle()

    assert two.two.adopt(Instance(*FRONT, "node1"), now_ns=0).reason == "unregistered"


# The server


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[..., tuple[RedisServer, Two]]]:
    """Two controllers on a Redis that a test may harm."""
    made: list[tuple[RedisServer, Stores]] = []

    def make(*options: str) -> tuple[RedisServer, Two]:
        server = RedisServer(tmp_path / f"redis{len(made)}", *options)
        server.start()
        stores = Stores(server)
        made.append((server, stores))
        return server, Two(stores)

    yield make
    for server, stores in made:
        stores.close()
        server.kill()


def joined(calls: PatientCalls) -> None:
    """Wait until the store is connected."""
    calls.loop.run_until_complete(calls.link.connected.wait())


def test_a_step_without_a_store_is_unavailable_and_the_next_one_after_its_return_is_not(own: Callable[..., tuple[RedisServer, Two]]) -> None:
    server, two = own(*FORGETFUL)
    two.adopt()
    server.kill()
    assert two.one.begin(two.at_one, 1, "a" * 16, now_ns=0).reason == "controller_unavailable"
    assert two.one.fault() == "the store is away"

    server.start()
    joined(two.one)

    assert two.one.begin(two.at_one, 1, "b" * 16, now_ns=0).allowed
    assert two.one.fault() == ""


def test_an_instance_that_was_registered_without_a_store_takes_steps_when_it_is_there(own: Callable[..., tuple[RedisServer, Two]]) -> None:
    server, two = own(*FORGETFUL)
    server.kill()
    assert two.one.adopt(two.at_one, now_ns=0).reason == "controller_unavailable"
    assert two.one.begin(two.at_one, 1, "a" * 16, now_ns=0).reason == "controller_unavailable"

    server.start()
    joined(two.one)
    two.one.settle()

    assert two.one.begin(two.at_one, 1, "b" * 16, now_ns=0).allowed


def test_a_store_that_hangs_is_given_up_within_its_time(own: Callable[..., tuple[RedisServer, Two]]) -> None:
    server, two = own(*FORGETFUL)
    two.adopt()
    server.signal(signal.SIGSTOP)
    begun = two.one.loop.time()

    answer = two.one.begin(two.at_one, 1, "a" * 16, now_ns=0)

    assert answer.reason == "controller_unavailable"
    assert two.one.loop.time() - begun < 2
    server.signal(signal.SIGCONT)


def test_a_step_in_the_turn_after_the_store_is_lost_is_answered(own: Callable[..., tuple[RedisServer, Two]]) -> None:
    """Whoever is told that there is no answer may ask again at once, before anybody has noticed."""
    server, two = own(*FORGETFUL)
    two.adopt()
    server.signal(signal.SIGSTOP)
    answers: list[Answer] = []

    def ask(step: str) -> None:
        begun = two.one.calls.begin(two.at_one, 1, step, now_ns=0)
        assert not isinstance(begun, Answer)
        begun.then(heard)

    def heard(answer: Answer) -> None:
        answers.append(answer)
        if len(answers) == 1:
            two.one.loop.call_soon(ask, "b" * 16)

    ask("a" * 16)
    server.kill()

    deadline = time.monotonic() + WAIT_S
    while len(answers) < 2 and time.monotonic() < deadline:
        two.one.loop.run_until_complete(asyncio.sleep(0.01))

    assert [answer.reason for answer in answers] == ["controller_unavailable"] * 2


def test_a_store_that_has_each_step_on_its_disk_keeps_calls_over_a_crash(own: Callable[..., tuple[RedisServer, Two]]) -> None:
    server, two = own(*DURABLE)
    two.adopt()
    start = two.one.begin(two.at_one, 1, "a" * 16, now_ns=0)
    invoke = two.invoke(two.one, two.at_one, start, "stock", "b" * 16)

    server.kill()
    server.start()
    two.one.settle() if two.one.link.is_up else joined(two.one)
    joined(two.one)

    assert two.invoke(two.one, two.at_one, start, "stock", "b" * 16) == invoke
    assert two.invoke(two.one, two.at_one, start, "pay", "c" * 16).allowed


@pytest.mark.parametrize("options", [LOSSY, FORGETFUL], ids=["everysec", "memory"])
def test_a_store_that_may_have_lost_steps_loses_the_calls_with_them(own: Callable[..., tuple[RedisServer, Two]], options: tuple[str, ...]) -> None:
    """What was read back could be the state of a second ago: there a spent token is good and a taken edge is open."""
    server, two = own(*options)
    two.adopt()
    start = two.one.begin(two.at_one, 1, "a" * 16, now_ns=0)
    invoke = two.invoke(two.one, two.at_one, start, "stock", "b" * 16)

    server.kill()
    server.start()
    lost = two.one.begin(two.at_one, 1, "d" * 16, now_ns=0)
    assert lost.reason in ("controller_unavailable", "allowed")
    joined(two.one)

    assert two.invoke(two.one, two.at_one, start, "stock", "b" * 16).reason == "unknown_call"
    stock = Instance("stock-1", "shop", "stock", "node0")
    assert two.one.adopt(stock, now_ns=0).allowed
    assert two.one.join(stock, 1, invoke.token, "c" * 16, now_ns=0).reason == "bad_token"


def test_a_replica_is_no_store(own: Callable[..., tuple[RedisServer, Two]], tmp_path: Path) -> None:
    server, two = own(*FORGETFUL)
    two.adopt()
    server.ask("REPLICAOF", "127.0.0.1", "1")

    assert two.one.begin(two.at_one, 1, "a" * 16, now_ns=0).reason == "controller_unavailable"


def test_a_store_without_memory_is_no_reason_for_a_fail_mode(own: Callable[..., tuple[RedisServer, Two]]) -> None:
    server, two = own(*FORGETFUL)
    two.adopt()
    start = two.one.begin(two.at_one, 1, "a" * 16, now_ns=0)
    server.ask("CONFIG", "SET", "maxmemory", "1")

    assert two.one.begin(two.at_one, 1, "b" * 16, now_ns=0).reason == "overloaded"
    assert two.invoke(two.one, two.at_one, start, "stock", "c" * 16).reason == "overloaded"

    assert two.one.finish(two.at_one, start.call, start.invocation, "answered", now_ns=0).allowed  # what frees memory is done
    server.ask("CONFIG", "SET", "maxmemory", "0")
    assert two.one.counts() == (0, 0)


def test_a_store_that_is_joined_again_and_has_no_memory_is_no_reason_for_a_fail_mode_either(own: Callable[..., tuple[RedisServer, Two]]) -> None:
    """It cannot take up the claims of the instances again, and what becomes of their steps is the same."""
    server, two = own(*FORGETFUL)
    two.adopt()
    server.ask("CONFIG", "SET", "maxmemory", "1")
    two.one.link.connected.clear()
    server.ask("CLIENT", "KILL", "TYPE", "normal")
    joined(two.one)
    two.one.settle()

    assert two.one.begin(two.at_one, 1, "a" * 16, now_ns=0).reason == "overloaded"
    assert two.one.adopt(Instance("front-2", "shop", "front", "node0"), now_ns=0).reason == "overloaded"

    server.ask("CONFIG", "SET", "maxmemory", "0")
    two.one.calls.renew_claims()
    two.one.settle()
    assert two.one.begin(two.at_one, 1, "a" * 16, now_ns=0).allowed


def test_a_store_that_was_started_without_memory_is_there(own: Callable[..., tuple[RedisServer, Two]]) -> None:
    """As one that has read back from its disk all that it has room for: it is full, and not away."""
    server, two = own("--maxmemory", "1")

    assert two.one.fault() == ""
    assert two.one.adopt(two.at_one, now_ns=0).reason == "overloaded"
    assert two.one.begin(two.at_one, 1, "a" * 16, now_ns=0).reason == "overloaded"
    assert server.ask("DBSIZE") == "1"  # whose run it is


def test_flushed_scripts_are_loaded_again(own: Callable[..., tuple[RedisServer, Two]]) -> None:
    server, two = own(*FORGETFUL)
    two.adopt()
    server.ask("SCRIPT", "FLUSH")

    assert two.one.begin(two.at_one, 1, "a" * 16, now_ns=0).allowed


def test_a_graph_that_was_lost_is_put_there_again(own: Callable[..., tuple[RedisServer, Two]]) -> None:
    server, two = own(*FORGETFUL)
    two.adopt()
    start = two.one.begin(two.at_one, 1, "a" * 16, now_ns=0)
    for key in server.ask("KEYS", "*:cfg:*").splitlines():
        server.ask("DEL", key)

    assert two.invoke(two.one, two.at_one, start, "stock", "b" * 16).allowed


def test_versions_that_share_a_graph_are_both_stepped_by(stores: Stores) -> None:
    """Most new versions change what a function sends and not whom it invokes."""
    registry = Registry()
    registry.install(policy(), b"signed 1", now_ns=0)
    registry.install(policy(2), b"signed 2", now_ns=0)
    calls = stores.calls(registry)
    who = Instance(*FRONT, "node0")
    assert calls.adopt(who, now_ns=0).allowed

    for version in (2, 1):
        assert calls.begin(who, version, f"{version:016x}", now_ns=0).allowed


def test_apps_that_share_a_graph_have_it_each(stores: Stores) -> None:
    registry = Registry()
    for app in ("shop", "bank"):
        registry.install(policy(app=app), b"signed 1", now_ns=0)
    calls = stores.calls(registry)
    answers: list[Answer] = []
    fronts = [Instance("front-" + app, app, "front", "node0") for app in ("shop", "bank")]
    for who in fronts:
        assert calls.adopt(who, now_ns=0).allowed
    for who in fronts:
        begun = calls.calls.begin(who, 1, "a" * 16, now_ns=0)
        assert not isinstance(begun, Answer)
        begun.then(answers.append)  # the other one asks before this one is answered

    deadline = time.monotonic() + WAIT_S
    while len(answers) < 2 and time.monotonic() < deadline:
        calls.settle()

    assert [answer.reason for answer in answers] == ["allowed", "allowed"]


def test_a_graph_of_which_a_portion_was_refused_is_not_used(stores: Stores, two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server without memory may take one portion and refuse another: what is there then lacks edges, or their joins."""
    monkeypatch.setattr(redis_calls, "CFG_FIELDS_MAX", 3)
    two.adopt()
    send, portions = two.one.link.send, 0

    def broken(command: Sequence[Any], then: Callable[[Any], None]) -> None:
        nonlocal portions
        portions += command[0] == "HSET"
        is_second = command[0] == "HSET" and portions == 2
        send(command[:-1] if is_second else command, then)  # a field without its value

    monkeypatch.setattr(two.one.link, "send", broken)
    assert two.one.begin(two.at_one, 1, "a" * 16, now_ns=0).reason == "overloaded"
    assert portions > 2
    assert not stores.server.ask("KEYS", f"{two.one.link.prefix}*:cfg:*")

    start = two.one.begin(two.at_one, 1, "a" * 16, now_ns=0)
    assert two.invoke(two.one, two.at_one, start, "stock", "b" * 16).allowed
    assert not stores.server.ask("KEYS", f"{two.one.link.prefix}*:part:*")


LOOP = """
schema: kalium/v1
app: loop
version: 1
mode: enforce
peers:
  gateway: {host: gateway, port: 8080, protocol: http, role: gateway}
entries: [turn]
functions:
  turn:
    messages:
      - {invoke: turn}
      - {invoke: leaf, retries: 1, join: answered}
      - {invoke: job, async: true, callback: done}
  leaf: {messages: []}
  job: {messages: []}
  done: {messages: []}
"""


@pytest.mark.parametrize("outcome", ["answered", "closed"])
@pytest.mark.parametrize("is_caller_first", [False, True])
def test_a_call_that_goes_on_keeps_nothing_of_what_is_over(stores: Stores, outcome: str, *, is_caller_first: bool) -> None:
    """Functions that invoke each other in a circle may do so for ever; a call of theirs must not grow."""
    registry = Registry()
    registry.install(CompiledPolicy.parse(compile_policy(LOOP.encode(), "loop")), b"signed 1", now_ns=0)
    calls = stores.calls(registry)
    who = {function: Instance(function, "loop", function, "node0") for function in ("turn", "leaf", "job", "done")}
    for instance in who.values():
        assert calls.adopt(instance, now_ns=0).allowed
    steps = (f"{number:016x}" for number in itertools.count(1))

    def granted(answer: Answer) -> Answer:
        assert answer.allowed, answer
        return answer

    def start(function: str, token: str) -> Answer:
        return granted(calls.join(who[function], 1, token, next(steps), now_ns=0))

    def invoke(grant: Answer, callee: str, *, callback: str = "", is_retry: bool = False) -> Answer:
        said = InstanceInvoke(
            next(steps), grant.call, grant.invocation, callee, 1, "turn", "loop", "turn",
            asynchronous=bool(callback), callback=callback, retry=is_retry,
        )  # fmt: skip
        return granted(calls.invoke(who["turn"], said, now_ns=0))

    def finish(function: str, grant: Answer) -> None:
        granted(calls.finish(who[function], grant.call, grant.invocation, outcome, now_ns=0))

    turn = granted(calls.begin(who["turn"], 1, next(steps), now_ns=0))
    sizes = []
    for _ in range(6):
        following = start("turn", invoke(turn, "turn").token)
        invoke(turn, "leaf")
        leaf = start("leaf", invoke(turn, "leaf", is_retry=True).token)
        if outcome == "answered":
            finish("leaf", leaf)
            late = invoke(turn, "job", callback="done")
            job = start("job", late.token)
            if is_caller_first:
                finish("turn", turn)
            finish("job", job)
            finish("done", start("done", late.callback))
        else:
            if is_caller_first:
                finish("turn", turn)
            finish("leaf", leaf)
        if not is_caller_first:
            finish("turn", turn)
        turn = following
        sizes.append(int(stores.server.ask("HLEN", f"{calls.link.prefix}{{app/loop}}:call:{turn.call}")))

    assert sizes == sizes[:1] * 6


def test_every_key_has_an_end(own: Callable[..., tuple[RedisServer, Two]]) -> None:
    """Where nobody sweeps any more, Redis removes what is left."""
    server, two = own(*FORGETFUL)
    two.one.agent_here("node0", "a" * 16)
    two.adopt()
    start = two.one.begin(two.at_one, 1, "a" * 16, now_ns=0)
    two.invoke(two.one, two.at_one, start, "stock", "b" * 16)
    two.one.calls.beat(["node0"])
    two.one.counts()

    endless = {key for key in server.ask("KEYS", "*").splitlines() if int(server.ask("PTTL", key)) < 0}
    longest = max(int(server.ask("PTTL", key)) for key in server.ask("KEYS", "*").splitlines())

    assert {key.rpartition(":")[2] for key in endless} == {"server"}
    assert longest <= KEEP_MS


@given(st.binary(max_size=200))
def test_whatever_stands_in_a_call_grants_nothing(redis_server: RedisServer, junk: bytes) -> None:
    """Who writes to the store decides what it says; but bytes of an accident are an error, and no fail mode's reason."""
    stores = Stores(redis_server)
    try:
        two = Two(stores)
        two.adopt()
        start = two.one.begin(two.at_one, 1, "a" * 16, now_ns=0)
        replies: list[object] = []
        key = f"{two.one.link.prefix}{{app/shop}}:call:{start.call}"
        two.one.link.send(("HSET", key, f"i:{start.invocation}", junk), replies.append)
        answer = two.invoke(two.one, two.at_one, start, "stock", "b" * 16)
        assert not answer.allowed
        assert answer.reason in ("overloaded", "unknown_call")
    finally:
        stores.close()


# Policies


def test_a_policy_that_is_newer_is_given_and_an_older_one_is_not(two: Two) -> None:
    said: list[tuple[dict[str, bytes], list[str]]] = []

    def ask(calls: PatientCalls, held: dict[str, int]) -> tuple[dict[str, bytes], list[str]]:
        calls.calls.ask_policies(held, lambda newer, lacking: said.append((newer, lacking)))
        calls.settle()
        return said[-1]

    assert ask(two.one, {"shop": 2}) == ({}, ["shop"])
    two.one.calls.offer_policy(policy(2), b"second")
    two.one.settle()
    two.two.calls.offer_policy(policy(1), b"first")
    two.two.settle()

    assert ask(two.two, {"shop": 1}) == ({"shop": b"second"}, [])
    assert ask(two.two, {}) == ({"shop": b"second"}, [])
    assert ask(two.one, {"shop": 2}) == ({}, [])


def test_what_redis_refuses_is_told_apart() -> None:
    of_redis_6 = "ERR Error running script (call to f_6a7d): @user_script:9: @user_script: 9: -OOM command not allowed"
    errors = ("OOM command", of_redis_6, "LOADING x", "READONLY x", "ERR user_script:1: attempt to index a nil value")
    assert [(Refused(text).is_full, Refused(text).is_away) for text in errors] == [
        (True, False), (True, False), (False, True), (False, True), (False, False),
    ]  # fmt: skip
