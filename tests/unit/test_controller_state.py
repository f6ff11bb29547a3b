"""The controller's rules, each with what breaks it. The clock is a number and the tokens are counted."""

import itertools
import json
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from controller_samples import RUN, Node, at_once, compiled, policy, site, state_of
from hypothesis import given
from hypothesis import strategies as st

from kalium.controller import calls as calls_module
from kalium.controller.calls import Evicted, MemoryCalls
from kalium.controller.deadlines import Buckets
from kalium.controller.limits import LIMITS, STARTS_PER_INFLIGHT
from kalium.controller.mint import Mint
from kalium.controller.registry import NS_PER_MS, DuplicateAgent
from kalium.errors import KaliumError
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.envelope import canonical
from kalium.protocol.frames import Answer, Register


def granted(answer: Answer) -> Answer:
    assert answer.allowed, answer
    assert answer.reason == "allowed"
    return answer


def denied(answer: Answer, reason: str) -> Answer:
    assert (answer.allowed, answer.reason, answer.token, answer.call, answer.invocation) == (False, reason, "", "", "")
    return answer


def test_a_call_goes_its_way_and_leaves_nothing() -> None:
    node = site()

    front = granted(node.start("front"))
    stock = granted(node.start("stock", granted(node.invoke(front, "front", "stock")).token))
    assert stock.call == front.call
    assert stock.invocation != front.invocation
    assert node.end(stock, "stock")
    pay = granted(node.start("pay", granted(node.invoke(front, "front", "pay")).token))
    mail = granted(node.start("mail", granted(node.invoke(pay, "pay", "mail")).token))
    assert node.counts() == (1, 3)
    assert node.end(mail, "mail")
    assert node.end(pay, "pay")
    assert node.end(front, "front")

    assert node.counts() == (0, 0)


def test_a_call_goes_on_past_a_function_whose_guard_is_off() -> None:
    """That guard asks nothing: its invocation is none here, its token stays unspent, and what it invokes begins a call of its own."""
    document = json.loads(compiled(entries="front, lists, mail"))
    for function in ("stock", "pay"):
        document["functions"][function]["mode"] = "off"
    state = state_of()
    state.registry.install(CompiledPolicy.parse(canonical(document)), b"signed 1", now_ns=0)
    node = Node(state)
    for function in ("front", "pay", "mail"):
        assert node.register(function).allowed

    front = granted(node.start("front"))
    granted(node.invoke(front, "front", "stock"))
    granted(node.invoke(front, "front", "pay"))
    mail = granted(node.start("mail"))
    assert mail.call != front.call
    assert node.end(mail, "mail")
    assert node.end(front, "front")

    assert node.counts() == (1, 0), "tokens are pending"
    node.now_ms = LIMITS.token_ms
    state.expire(now_ns=node.now_ns)
    assert node.counts() == (0, 0)


# Starts


def test_an_entry_starts_a_call_of_its_own_each_time() -> None:
    node = site()

    first, second = granted(node.start("front")), granted(node.start("front"))

    assert first.call != second.call
    assert node.counts() == (2, 2)


def test_what_is_no_entry_needs_a_token() -> None:
    node = site()

    denied(node.start("stock"), "not_an_entry")

    assert node.counts() == (0, 0)


@pytest.mark.parametrize("function", ["front", "stock"])
def test_a_token_that_nobody_issued_is_worse_than_none_at_entries_too(function: str) -> None:
    denied(site().start(function, "f" * 32), "bad_token")


def test_a_token_starts_its_callee_and_nothing_else_and_a_refusal_does_not_spend_it() -> None:
    node = site()
    token = granted(node.invoke(granted(node.start("front")), "front", "stock")).token

    denied(node.start("mail", token), "bad_token")
    denied(node.start("front", token), "bad_token")

    granted(node.start("stock", token))


@pytest.mark.parametrize(
    "altered",
    [
        lambda token: token.upper(),
        lambda token: " " + token,
        lambda token: token[0] + "_" + token[1:],
        lambda token: "+" + token,
        lambda token: "0" + token,
        lambda token: "0x" + token,
        lambda token: token[:-1],
        lambda token: token[:-1] + ("0" if token[-1] != "0" else "1"),
    ],
    ids=["upper_case", "space", "underscore", "sign", "zero", "prefix", "short", "digit"],
)
def test_a_token_has_one_spelling(altered: Callable[[str], str]) -> None:
    """What a number's reader forgives is another token here, and none."""
    tokens = itertools.count(0xABCDEF << 100)
    node = site(mint=lambda: f"{next(tokens):032x}")
    token = granted(node.invoke(granted(node.start("front")), "front", "stock")).token

    denied(node.start("stock", altered(token)), "bad_token")

    granted(node.start("stock", token))


def test_a_token_is_spent_by_the_start_that_it_granted() -> None:
    node = site()
    token = granted(node.invoke(granted(node.start("front")), "front", "stock")).token
    granted(node.start("stock", token))

    denied(node.start("stock", token), "bad_token")


def test_a_token_of_another_app_is_no_token_here() -> None:
    """Both apps have a function of the same name, and only one of them was invoked."""
    node = site()
    node.state.registry.install(policy(app="other"), b"signed other", now_ns=0)
    other = Node(node.state, "connection-2", "node1", app="other")
    granted(other.register("stock", "stock-of-other"))
    token = granted(node.invoke(granted(node.start("front")), "front", "stock")).token

    denied(other.start("stock", token, instance="stock-of-other"), "bad_token")

    granted(node.start("stock", token))


@pytest.mark.parametrize(("after_ms", "reason"), [(LIMITS.token_ms - 1, "allowed"), (LIMITS.token_ms, "bad_token")])
def test_a_token_expires_by_the_controllers_clock(after_ms: int, reason: str) -> None:
    """To the millisecond, whether or not anybody has swept."""
    node = site()
    token = granted(node.invoke(granted(node.start("front")), "front", "stock")).token

    node.now_ms += after_ms

    assert node.start("stock", token).reason == reason


def test_a_call_lives_while_a_token_of_it_is_pending_and_no_longer() -> None:
    node = site()
    front = granted(node.start("front"))
    granted(node.invoke(front, "front", "stock"))
    node.end(front, "front")
    assert node.counts() == (1, 0)

    node.state.expire(now_ns=LIMITS.token_ms * NS_PER_MS)

    assert node.counts() == (0, 0)


def test_a_start_asked_again_is_the_same_start() -> None:
    """The answer may have been lost on its way: a second invocation would never end."""
    node = site()
    token = granted(node.invoke(granted(node.start("front")), "front", "stock")).token

    first = granted(node.start("stock", token, step="a" * 16))

    assert node.start("stock", token, step="a" * 16) == first
    assert node.counts() == (1, 2)


def test_a_denied_start_asked_again_is_the_same_denial() -> None:
    node = site()

    assert node.start("stock", step="a" * 16) == node.start("stock", step="a" * 16)


def test_a_step_id_cannot_be_used_for_another_question() -> None:
    node = site()
    front = granted(node.start("front", step="a" * 16))
    granted(node.invoke(front, "front", "stock", step="b" * 16))

    for token in ("f" * 32, "0" * 32, "no token"):
        denied(node.start("front", token, step="a" * 16), "malformed")
    denied(node.invoke(front, "front", "pay", step="b" * 16), "malformed")


def test_a_step_id_belongs_to_its_instance() -> None:
    """Guards choose them alone: two may choose the same."""
    node = site()
    granted(node.register("front", "front-2"))

    first, second = granted(node.start("front", step="a" * 16)), granted(node.start("front", instance="front-2", step="a" * 16))

    assert first.call != second.call


# Invokes


def test_a_skipped_step_is_denied_with_what_was_expected_and_the_cursor_stays() -> None:
    node = site()
    front = granted(node.start("front"))

    answer = denied(node.invoke(front, "front", "pay"), "edge_not_allowed")

    assert [text.split(" @line")[0] for text in answer.expected] == ["invoke stock"]
    granted(node.invoke(front, "front", "stock"))


def test_a_repeated_step_is_denied() -> None:
    node = site()
    front = granted(node.start("front"))
    granted(node.invoke(front, "front", "stock"))

    answer = denied(node.invoke(front, "front", "stock"), "edge_not_allowed")

    assert [text.split(" @line")[0] for text in answer.expected] == ["invoke pay"]


@pytest.mark.parametrize("callee", ["front", "mail", "lists", "nobody", ""])
def test_what_the_policy_does_not_list_here_is_denied(callee: str) -> None:
    node = site()

    denied(node.invoke(granted(node.start("front")), "front", callee), "edge_not_allowed")


def test_an_invoke_asked_again_returns_its_token_and_moves_nothing() -> None:
    node = site()
    front = granted(node.start("front"))
    first = granted(node.invoke(front, "front", "stock", step="a" * 16))

    assert node.invoke(front, "front", "stock", step="a" * 16) == first
    granted(node.start("stock", first.token))
    assert node.invoke(front, "front", "stock", step="a" * 16) == first, "the token was spent meanwhile"

    granted(node.invoke(front, "front", "pay"))


def test_a_denied_invoke_asked_again_is_the_same_denial() -> None:
    node = site()
    front = granted(node.start("front"))

    first = denied(node.invoke(front, "front", "pay", step="a" * 16), "edge_not_allowed")

    assert node.invoke(front, "front", "pay", step="a" * 16) == first
    denied(node.invoke(front, "front", "stock", step="a" * 16), "malformed")


def test_two_calls_that_overlap_never_share_a_cursor() -> None:
    node = site()
    granted(node.register("front", "front-2"))
    first, second = granted(node.start("front")), granted(node.start("front", instance="front-2"))

    granted(node.invoke(first, "front", "stock"))
    denied(node.invoke(second, "front", "pay", instance="front-2"), "edge_not_allowed")
    granted(node.invoke(second, "front", "stock", instance="front-2"))
    granted(node.invoke(first, "front", "pay"))
    granted(node.invoke(second, "front", "pay", instance="front-2"))


def test_two_invocations_of_one_function_in_one_call_have_a_cursor_each() -> None:
    node = site()
    lists = granted(node.start("lists"))
    tokens = [granted(node.invoke(lists, "lists", "stock")).token for _ in range(2)]
    granted(node.register("stock", "stock-2"))

    first, second = granted(node.start("stock", tokens[0])), granted(node.start("stock", tokens[1], instance="stock-2"))

    assert first.call == second.call == lists.call
    assert first.invocation != second.invocation


def test_an_invocation_belongs_to_the_instance_that_started_it() -> None:
    """Ids that leak from one sandbox are of no use in another, not even of the same function."""
    node = site()
    granted(node.register("front", "front-2"))
    front = granted(node.start("front"))

    denied(node.invoke(front, "front", "stock", instance="front-2"), "unknown_call")
    assert not node.end(front, "front", instance="front-2")

    granted(node.invoke(front, "front", "stock"))


def test_ids_that_nobody_issued_are_unknown() -> None:
    node = site()
    front = granted(node.start("front"))

    denied(node.invoke(msgspec.structs.replace(front, call="f" * 32), "front", "stock"), "unknown_call")
    denied(node.invoke(msgspec.structs.replace(front, invocation="f" * 32), "front", "stock"), "unknown_call")
    denied(node.invoke(msgspec.structs.replace(front, invocation="x" * 32), "front", "stock"), "unknown_call")
    denied(node.invoke(msgspec.structs.replace(front, call="", invocation=""), "front", "stock"), "unknown_call")


def test_ids_of_another_process_are_unknown() -> None:
    """A controller that has started anew counts from the beginning again; what it said before must not be taken for what it says now."""
    node = site()
    front = granted(node.start("front"))
    before = msgspec.structs.replace(front, call="e" * 12 + front.call[12:], invocation="e" * 12 + front.invocation[12:])

    denied(node.invoke(before, "front", "stock"), "unknown_call")


def test_an_end_that_comes_twice_does_not_end_another_invocation() -> None:
    node = site()
    lists = granted(node.start("lists"))
    tokens = [granted(node.invoke(lists, "lists", "stock")).token for _ in range(8)]
    began = [granted(node.start("stock", token)) for token in tokens[:3]]
    for each in (began[2], began[0]):
        assert node.end(each, "stock")
    began += [granted(node.start("stock", token)) for token in tokens[3:6]]

    assert len({each.invocation for each in began}) == len(began)
    assert not node.end(began[0], "stock")
    assert node.counts() == (1, 5)


def test_the_places_of_a_call_are_used_again() -> None:
    """A long call must not grow."""
    node = site()
    lists = granted(node.start("lists"))
    tokens = [granted(node.invoke(lists, "lists", "stock")).token for _ in range(8)]
    began = [granted(node.start("stock", token)) for token in tokens[:3]]
    for each in (began[2], began[0]):
        assert node.end(each, "stock")
    for token in tokens[3:6]:
        granted(node.start("stock", token))

    calls = node.state.calls
    assert isinstance(calls, MemoryCalls)
    (call,) = calls._calls.values()
    assert (len(call.rows), call.live) == (5, 5)


def test_a_place_is_used_as_often_as_its_number_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more would be an invocation of another call."""
    monkeypatch.setattr(calls_module, "_REUSED_MAX", 2)
    node = site()
    lists = granted(node.start("lists"))
    tokens = [granted(node.invoke(lists, "lists", "stock")).token for _ in range(4)]
    for token in tokens[:3]:
        node.end(granted(node.start("stock", token)), "stock")

    denied(node.start("stock", tokens[3]), "overloaded")


def test_nothing_follows_the_end_of_an_invocation() -> None:
    node = site()
    front = granted(node.start("front"))
    assert node.end(front, "front")

    denied(node.invoke(front, "front", "stock"), "unknown_call")
    assert not node.end(front, "front")


def test_the_callees_of_a_call_that_has_ended_may_not_start() -> None:
    """A token that expired with its call is as unknown as one that was never issued."""
    node = site()
    front = granted(node.start("front"))
    token = granted(node.invoke(front, "front", "stock")).token
    node.end(front, "front")
    node.now_ms = LIMITS.token_ms
    node.state.expire(now_ns=node.now_ns)

    denied(node.start("stock", token), "bad_token")


# Registrations


def test_an_instance_that_nobody_registered_may_do_nothing() -> None:
    node = site(functions="")

    denied(node.start("front"), "unregistered")
    denied(node.invoke(Answer(True, "allowed", "1", "2"), "front", "stock"), "unregistered")
    assert not node.end(Answer(True, "allowed", "1", "2"), "front")


def test_another_agent_may_not_speak_for_an_instance() -> None:
    node = site()
    front = granted(node.start("front"))
    stranger = Node(node.state, "connection-2", "node1")

    denied(stranger.start("front"), "unregistered")
    denied(stranger.invoke(front, "front", "stock"), "unregistered")
    denied(stranger.register("front"), "unregistered")
    assert not stranger.end(front, "front")
    assert stranger.unregister("front") == []

    granted(node.invoke(front, "front", "stock"))


def test_an_instance_cannot_become_another_function() -> None:
    node = site()

    denied(node.start("lists", instance="front"), "unregistered")
    denied(node.register("lists", "front"), "unregistered")


def test_registering_again_changes_nothing() -> None:
    node = site()
    front = granted(node.start("front"))

    granted(node.register("front"))

    granted(node.invoke(front, "front", "stock"))


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (Register("c", "shop", "nobody", "image"), "unknown_function"),
        (Register("c", "nowhere", "front", "image"), "unknown_function"),
        (Register("", "shop", "front", "image"), "malformed"),
    ],
)
def test_what_no_policy_knows_is_not_registered(said: Register, reason: str) -> None:
    node = site()

    denied(at_once(node.state.register(node.key, said, now_ns=0)), reason)


def test_an_instance_that_is_gone_takes_its_invocations_with_it() -> None:
    node = site()
    front = granted(node.start("front"))

    evicted = node.unregister("front")

    assert evicted == [Evicted("shop", "front", front.call, front.invocation, "front", "unregistered")]
    assert node.counts() == (0, 0)
    denied(node.start("front"), "unregistered")


def test_an_agent_that_comes_back_registers_again_and_its_calls_go_on() -> None:
    """A broken connection is not a broken call: the sandboxes have gone on."""
    node = site()
    front = granted(node.start("front"))
    node.state.registry.agent_gone(node.key, now_ns=node.now_ns)
    denied(node.invoke(front, "front", "stock"), "unregistered")
    node.now_ms = LIMITS.agent_gone_ms - 1

    back = Node(node.state, "connection-2", "node0")
    granted(back.register("front"))
    back.now_ms = node.now_ms

    granted(back.invoke(front, "front", "stock"))
    back.now_ms = LIMITS.agent_gone_ms
    assert back.expire() == []


def test_an_agent_that_comes_back_before_its_old_connection_is_dead_replaces_it() -> None:
    node = site()
    front = granted(node.start("front"))

    assert node.state.registry.agent_hello("connection-2", node="node0", run=RUN, now_ns=0) == "connection-1"

    denied(node.invoke(front, "front", "stock"), "unregistered")
    node.key = "connection-2"
    granted(node.register("front"))
    granted(node.invoke(front, "front", "stock"))
    assert node.state.status().agents == 1


def test_the_end_of_a_replaced_connection_does_not_touch_the_new_one() -> None:
    node = site()
    node.state.registry.agent_hello("connection-2", node="node0", run=RUN, now_ns=0)

    node.state.registry.agent_gone("connection-1", now_ns=0)

    assert node.state.status().agents == 1


def test_another_run_of_an_agent_does_not_replace_one_that_is_alive() -> None:
    """A stolen key, or a second daemon by mistake: the one that was here first goes on, and the other is told."""
    node = site()
    node.now_ms = LIMITS.duplicate_heard_ms
    node.state.registry.heard(node.key, now_ns=1)

    with pytest.raises(DuplicateAgent):
        node.state.registry.agent_hello("connection-2", node="node0", run="f" * 16, now_ns=node.now_ns)

    granted(node.start("front"))


def test_another_run_of_an_agent_replaces_one_that_was_not_heard_for_a_while() -> None:
    node = site()
    node.state.registry.heard(node.key, now_ns=1)

    now_ns = LIMITS.duplicate_heard_ms * NS_PER_MS + 1
    assert node.state.registry.agent_hello("connection-2", node="node0", run="f" * 16, now_ns=now_ns) == node.key

    denied(node.start("front"), "unregistered")


def test_an_agent_that_stays_away_loses_its_instances_after_the_bound() -> None:
    node = site()
    front = granted(node.start("front"))
    node.state.registry.agent_gone(node.key, now_ns=0)
    node.now_ms = LIMITS.agent_gone_ms - 1
    assert node.expire() == []

    node.now_ms += 1
    evicted = node.expire()

    assert evicted == [Evicted("shop", "front", front.call, front.invocation, "front", "agent_gone")]
    assert node.counts() == (0, 0)
    granted(Node(node.state, "connection-2", "node1").register("front"))


# Time


def test_an_invocation_whose_end_was_lost_is_evicted_after_its_timeout() -> None:
    """60 s is the timeout that the policy's functions have when it says nothing."""
    node = site()
    front = granted(node.start("front"))
    lifetime_ms = 60_000 + LIMITS.invocation_grace_ms
    node.now_ms = lifetime_ms - 1
    assert node.expire() == []
    granted(node.invoke(front, "front", "stock"))

    node.now_ms = lifetime_ms
    denied(node.invoke(front, "front", "pay"), "unknown_call")  # before anybody has swept
    evicted = node.expire()

    assert [(each.invocation, each.why) for each in evicted] == [(front.invocation, "timeout")]


def test_many_evictions_come_in_portions() -> None:
    """The loop that sweeps has other work: what is left over comes with the next call."""
    node = site()
    for number in range(5):
        granted(node.register("front", f"front-{number}"))
        granted(node.start("front", instance=f"front-{number}"))

    calls = node.state.calls
    assert isinstance(calls, MemoryCalls)
    portions = [(len(calls.expire(now_ns=10**12, evictions_max=2)), calls.has_due(now_ns=10**12)) for _ in range(4)]

    assert portions == [(2, True), (2, True), (1, False), (0, False)]


# Policies


def test_versions_only_grow() -> None:
    state = state_of()
    assert state.registry.install(policy(2), b"signed 2", now_ns=0)

    with pytest.raises(KaliumError, match="versions only grow"):
        state.registry.install(policy(1), b"signed 1", now_ns=0)
    with pytest.raises(KaliumError, match="versions only grow"):
        state.registry.install(policy(2), b"signed 2 with other words", now_ns=0)
    assert not state.registry.install(policy(2), b"signed 2", now_ns=0)

    assert state.registry.newest()["shop"].envelope == b"signed 2"
    assert state.status().policies == {"shop": 2}


def test_a_call_keeps_the_version_that_it_began_with() -> None:
    """In version 2 front is no entry any more. The call that began under 1 goes on, whichever version its guards have by now."""
    node = site()
    front = granted(node.start("front"))

    node.state.registry.install(policy(2, entries="lists"), b"signed 2", now_ns=0)

    granted(node.start("stock", granted(node.invoke(front, "front", "stock")).token, version=2))
    granted(node.invoke(front, "front", "pay", version=2))
    denied(node.start("front", version=2), "not_an_entry")


@pytest.mark.parametrize(("after_ms", "reason"), [(LIMITS.drain_ms - 1, "allowed"), (LIMITS.drain_ms, "policy_mismatch")])
@pytest.mark.parametrize("is_swept", [False, True])
def test_an_old_version_drains_and_is_then_denied(after_ms: int, reason: str, *, is_swept: bool) -> None:
    node = site()
    front = granted(node.start("front"))
    node.state.registry.install(policy(2), b"signed 2", now_ns=0)
    node.now_ms = after_ms
    if is_swept:
        node.state.expire(now_ns=node.now_ns)

    assert node.invoke(front, "front", "stock").reason == reason
    assert node.start("front").reason == reason
    granted(node.start("front", version=2))


def test_a_token_of_a_drained_version_starts_nothing() -> None:
    node = site()
    front = granted(node.start("front"))
    node.now_ms = LIMITS.drain_ms - 1
    node.state.registry.install(policy(2), b"signed 2", now_ns=0)
    token = granted(node.invoke(front, "front", "stock")).token
    node.now_ms += 1
    node.state.expire(now_ns=node.now_ns)

    denied(node.start("stock", token, version=2), "policy_mismatch")


@pytest.mark.parametrize("version", [2, 99])
def test_a_version_that_the_controller_does_not_hold_is_a_mismatch(version: int) -> None:
    """A guard that got a policy before the controller waits until the controller has it too."""
    node = site()
    front = granted(node.start("front"))

    denied(node.start("front", version=version), "policy_mismatch")
    denied(node.invoke(front, "front", "stock", version=version), "policy_mismatch")


def test_a_function_that_the_guards_version_lacks_does_not_start() -> None:
    """It was registered when there was one; its sandbox is still there."""
    node = site()
    node.state.registry.install(policy(2, entries="front"), b"signed 2", now_ns=0)

    denied(node.start("lists", version=2), "unknown_function")

    granted(node.start("lists", version=1))


def test_a_policy_of_100_000_states_is_refused_and_changes_nothing() -> None:
    node = site()
    document = json.loads(compiled(2))
    document["app_cfg"]["front"]["states"] = document["functions"]["front"]["states"] = 100_000

    with pytest.raises(KaliumError, match="cannot load a policy"):
        CompiledPolicy.parse(canonical(document))

    assert node.state.status().policies == {"shop": 1}
    granted(node.start("front"))


# Bounds: each is denied with what the guard knows how to handle, and moves nothing


def test_a_full_table_of_calls_denies_and_has_room_again_after_an_end() -> None:
    node = site(replace(LIMITS, calls=2))
    first = granted(node.start("front"))
    granted(node.start("lists"))

    refused = denied(node.start("front", step="a" * 16), "overloaded")
    assert "2 live calls" in refused.detail
    node.end(first, "front")

    granted(node.start("front", step="a" * 16))  # the same step: being full was no decision


def test_a_call_has_a_bound_of_invocations_and_the_token_is_not_spent() -> None:
    node = site(replace(LIMITS, invocations_per_call=2))
    lists = granted(node.start("lists"))
    first, second = (granted(node.invoke(lists, "lists", "stock")).token for _ in range(2))
    stock = granted(node.start("stock", first))

    denied(node.start("stock", second), "overloaded")
    node.end(stock, "stock")

    granted(node.start("stock", second))


def test_a_call_has_a_bound_of_pending_tokens_and_the_cursor_stays() -> None:
    node = site(replace(LIMITS, tokens_per_call=2))
    lists = granted(node.start("lists"))
    tokens = [granted(node.invoke(lists, "lists", "stock")).token for _ in range(2)]

    denied(node.invoke(lists, "lists", "stock", step="a" * 16), "overloaded")
    granted(node.start("stock", tokens[0]))

    granted(node.invoke(lists, "lists", "stock", step="a" * 16))


def test_an_instance_has_a_bound_of_pending_tokens_whatever_its_calls() -> None:
    """Else one that loops over calls, and whose tokens nobody takes, fills the table of the site."""
    node = site(replace(LIMITS, tokens_per_instance=2))
    calls = [granted(node.start("lists")) for _ in range(3)]
    tokens = [granted(node.invoke(each, "lists", "stock")).token for each in calls[:2]]
    front = granted(node.start("front"))

    refused = denied(node.invoke(calls[2], "lists", "stock", step="a" * 16), "overloaded")
    assert "2 pending tokens of one instance" in refused.detail
    granted(node.invoke(front, "front", "stock"))  # another instance's
    for each in calls[:2]:
        node.end(each, "lists")
    denied(node.invoke(calls[2], "lists", "stock", step="a" * 16), "overloaded")  # its tokens are pending all the same

    granted(node.start("stock", tokens[0]))
    granted(node.invoke(calls[2], "lists", "stock", step="a" * 16))
    denied(node.invoke(calls[2], "lists", "stock"), "overloaded")

    node.now_ms = LIMITS.token_ms
    node.expire()
    for _ in range(2):
        granted(node.invoke(calls[2], "lists", "stock"))
    denied(node.invoke(calls[2], "lists", "stock"), "overloaded")


def test_an_instance_has_a_bound_of_invocations() -> None:
    node = site(replace(LIMITS, invocations_per_instance=2))
    granted(node.start("front"))
    granted(node.start("front"))

    denied(node.start("front"), "overloaded")

    granted(node.start("lists"))


def test_an_agent_has_a_bound_of_instances() -> None:
    node = site(replace(LIMITS, instances_per_agent=2), functions="front stock")

    denied(node.register("pay"), "overloaded")
    granted(node.register("stock"))
    node.unregister("stock")

    granted(node.register("pay"))


def test_an_agent_that_reconnects_gets_no_room_by_that() -> None:
    """Else one with a node's key fills the controller's memory, by instances that it never registers again."""
    node = site(replace(LIMITS, instances_per_agent=2), functions="front stock")
    registry = node.state.registry
    registry.agent_gone(node.key, now_ns=0)
    again = Node(node.state, key="connection-2")

    denied(again.register("pay"), "overloaded")
    assert again.register("front").allowed

    again.now_ms = LIMITS.agent_gone_ms
    again.expire()
    assert again.register("pay").allowed


def test_agents_have_a_bound_and_one_that_comes_back_is_not_one_more() -> None:
    node = site(replace(LIMITS, agents=1))

    with pytest.raises(OverflowError):
        node.state.registry.agent_hello("connection-2", node="node1", run=RUN, now_ns=0)
    assert node.state.registry.agent_hello("connection-3", node="node0", run=RUN, now_ns=0) == "connection-1"


@pytest.mark.parametrize(("starts_per_instance", "remembered"), [(LIMITS.starts_per_instance, STARTS_PER_INFLIGHT), (1, 1)])
def test_the_memory_of_starts_has_a_bound_and_forgets_the_oldest(starts_per_instance: int, remembered: int) -> None:
    node = site(replace(LIMITS, starts_per_instance=starts_per_instance))  # and `lists` has one invocation in flight
    answers = [granted(node.start("lists", step=f"{number:016x}")) for number in range(remembered + 1)]

    for number in range(1, remembered + 1):
        assert node.start("lists", step=f"{number:016x}") == answers[number]
    assert node.start("lists", step="0" * 16).call != answers[0].call  # a new step, judged as one


@pytest.mark.parametrize("bound", ["invocations", "tokens"])
def test_all_calls_together_have_a_bound_of_invocations_and_of_tokens(bound: str) -> None:
    node = site(replace(LIMITS, **{bound: 1, "calls": 1}))
    front = granted(node.start("front"))
    token = granted(node.invoke(front, "front", "stock")).token

    if bound == "tokens":
        denied(node.invoke(front, "front", "pay"), "overloaded")
        granted(node.start("stock", token))
        granted(node.invoke(front, "front", "pay"))
    else:
        denied(node.start("stock", token), "overloaded")
        node.end(front, "front")
        granted(node.start("stock", token))


def test_an_app_has_a_bound_of_versions_and_drops_the_oldest() -> None:
    node = site(replace(LIMITS, versions_per_app=2))
    front = granted(node.start("front"))

    node.state.registry.install(policy(2), b"signed 2", now_ns=0)
    granted(node.invoke(front, "front", "stock"))
    node.state.registry.install(policy(3), b"signed 3", now_ns=0)

    denied(node.invoke(front, "front", "pay"), "policy_mismatch")
    granted(node.start("front", version=2))


# Where ids and tokens come from


def test_no_digit_is_given_twice() -> None:
    """Randomness is drawn in pieces; what is given is the pieces, cut."""
    drawn: list[bytes] = []

    def draw(size: int) -> bytes:
        drawn.append(bytes((len(drawn) + at) % 256 for at in range(size)))
        return drawn[-1]

    mint = Mint(draw=draw)
    given_out = [mint() for _ in range(600)]

    assert {len(each) for each in given_out} == {32}
    assert "".join(given_out) == b"".join(drawn).hex()[: 600 * 32]
    assert len({Mint()() for _ in range(100)}) == 100


def test_deadlines_that_many_share_come_in_their_order() -> None:
    buckets: Buckets[str] = Buckets()
    for item, deadline_ns in (("c", 30), ("a", 10), ("b", 10), ("d", 30), ("e", 20)):
        buckets.add(item, deadline_ns)
    buckets.discard("e", 20)
    buckets.discard("d", 30)

    assert not buckets.has_due(now_ns=9)
    assert {buckets.next_due(now_ns=25), buckets.next_due(now_ns=25)} == {"a", "b"}
    assert not buckets.has_due(now_ns=29)
    assert (buckets.next_due(now_ns=29), buckets.next_due(now_ns=30), buckets.next_due(now_ns=99)) == (None, "c", None)


# Everything at once


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.integers(0, 3)), max_size=60))
def test_whatever_happens_nothing_is_left_when_everything_is_over(script: list[tuple[int, int, int]]) -> None:
    """Starts, invokes, ends, repeats, a lost connection and the clock in any order: the tables agree and empty themselves."""
    node = site()
    functions = ("front", "stock", "pay", "mail", "lists")
    started: list[tuple[str, Answer]] = []
    tokens: list[tuple[str, str]] = []
    for action, which, how in script:
        if action <= 2:
            answer = node.start(functions[which % 5])
            started += [(functions[which % 5], answer)] if answer.allowed else []
        elif action <= 5 and started:
            function, invocation = started[which % len(started)]
            callee = functions[1 + how]
            answer = node.invoke(invocation, function, callee)
            tokens += [(callee, answer.token)] if answer.allowed else []
        elif action == 6 and tokens:
            callee, token = tokens[which % len(tokens)]
            answer = node.start(callee, token)
            started += [(callee, answer)] if answer.allowed else []
        elif action == 7 and started:
            node.end(started[which % len(started)][1], started[which % len(started)][0])
        elif action == 8:
            node.now_ms += (1, 1_000, 31_000, 91_000)[how]
            node.state.expire(now_ns=node.now_ns)
        elif action == 9:
            node.state.registry.agent_gone(node.key, now_ns=node.now_ns)
            node.state.registry.agent_hello(node.key, node="node0", run=RUN, now_ns=node.now_ns)
            for function in functions:
                granted(node.register(function))
    calls, invocations = node.counts()
    assert calls <= invocations + len(tokens)

    node.state.expire(now_ns=node.now_ns + 200_000 * NS_PER_MS)

    assert node.counts() == (0, 0)
    memory = node.state.calls
    assert isinstance(memory, MemoryCalls)
    assert (memory._calls, memory._tokens, memory._late) == ({}, {}, {})
    assert not any(record.live for record in memory._records.values())
