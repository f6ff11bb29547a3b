"""Edges with a future: joins, asynchronous edges and their callbacks, retries. Each rule with what breaks it."""

from __future__ import annotations

import gc
import secrets
import tracemalloc
from dataclasses import replace

import pytest
from controller_samples import Node, edges, site

from kalium.controller.limits import LIMITS
from kalium.protocol.frames import Answer


def granted(answer: Answer) -> Answer:
    assert answer.allowed, answer
    return answer


def denied(answer: Answer, reason: str) -> Answer:
    assert (answer.allowed, answer.reason, answer.token, answer.callback) == (False, reason, "", "")
    return answer


def expected(answer: Answer) -> list[str]:
    """What a denial says that was expected, without the lines."""
    return [text.split(" @line")[0] for text in denied(answer, "edge_not_allowed").expected]


def later(node: Node, caller: Answer, function: str = "later", *, retry: bool = False) -> Answer:
    """Invoke the job by the queue, with its callback."""
    return node.invoke(caller, function, "job", asynchronous=True, callback="done", retry=retry)


# Joins


def test_behind_a_join_nothing_is_granted_before_the_answer() -> None:
    node = edges()
    single = granted(node.start("single"))
    leaf = granted(node.start("leaf", granted(node.invoke(single, "single", "leaf")).token))
    assert leaf.hold

    assert expected(node.invoke(single, "single", "last")) == ["answer of invoke leaf"]
    assert granted(node.finish(leaf, "leaf"))

    granted(node.invoke(single, "single", "last"))


def test_nobody_waits_for_the_end_of_an_ordinary_invocation() -> None:
    node = edges()
    again = granted(node.start("again"))

    leaf = granted(node.start("leaf", granted(node.invoke(again, "again", "leaf")).token))

    assert not again.hold
    assert not leaf.hold
    granted(node.invoke(again, "again", "last"))


@pytest.mark.parametrize("outcome", ["closed", "timeout"])
def test_a_callee_that_failed_completes_no_join(outcome: str) -> None:
    node = edges()
    single = granted(node.start("single"))
    leaf = granted(node.start("leaf", granted(node.invoke(single, "single", "leaf")).token))

    granted(node.finish(leaf, "leaf", outcome=outcome))

    assert expected(node.invoke(single, "single", "last")) == ["answer of invoke leaf"]


def test_a_callee_that_was_evicted_completes_no_join() -> None:
    node = edges()
    single = granted(node.start("single"))
    leaf = granted(node.start("leaf", granted(node.invoke(single, "single", "leaf")).token))

    assert [each.invocation for each in node.unregister("leaf")] == [leaf.invocation]

    assert expected(node.invoke(single, "single", "last")) == ["answer of invoke leaf"]


def test_an_answer_that_comes_after_the_callees_time_completes_no_join() -> None:
    """Whether or not anybody has swept."""
    node = edges()
    single = granted(node.start("single"))
    leaf = granted(node.start("leaf", granted(node.invoke(single, "single", "leaf")).token))
    node.now_ms = 60_000 + LIMITS.invocation_grace_ms

    denied(node.finish(leaf, "leaf"), "unknown_call")

    assert {each.invocation for each in node.expire()} == {single.invocation, leaf.invocation}


def test_a_callee_that_never_began_completes_no_join() -> None:
    node = edges()
    single = granted(node.start("single"))
    granted(node.invoke(single, "single", "leaf"))
    node.now_ms = LIMITS.token_ms
    assert node.expire() == []

    assert expected(node.invoke(single, "single", "last")) == ["answer of invoke leaf"]


def test_a_join_of_a_fan_out_waits_for_all_that_were_granted_and_for_no_more() -> None:
    node = edges()
    fan = granted(node.start("fan"))
    tokens = [granted(node.invoke(fan, "fan", "leaf")).token for _ in range(2)]
    other = granted(node.start("other", granted(node.invoke(fan, "fan", "other")).token))
    first, second = (granted(node.start("leaf", token)) for token in tokens)
    assert {first.hold, second.hold, other.hold} == {True}

    for invocation, function in ((second, "leaf"), (other, "other")):
        assert "answer of invoke leaf" in expected(node.invoke(fan, "fan", "last"))
        granted(node.finish(invocation, function))
    assert "answer of invoke leaf" in expected(node.invoke(fan, "fan", "last"))
    granted(node.finish(first, "leaf"))

    granted(node.invoke(fan, "fan", "last"))


def test_joins_of_two_invocations_of_one_function_do_not_mix() -> None:
    node = edges()
    one, other = granted(node.start("single")), granted(node.start("single"))
    leaf = granted(node.start("leaf", granted(node.invoke(one, "single", "leaf")).token))
    granted(node.start("leaf", granted(node.invoke(other, "single", "leaf")).token))

    granted(node.finish(leaf, "leaf"))

    granted(node.invoke(one, "single", "last"))
    assert expected(node.invoke(other, "single", "last")) == ["answer of invoke leaf"]


def test_a_finish_asked_again_is_the_same_finish() -> None:
    """Its answer was lost with the connection, and the last byte still waits."""
    node = edges()
    single = granted(node.start("single"))
    leaf = granted(node.start("leaf", granted(node.invoke(single, "single", "leaf")).token))
    first = granted(node.finish(leaf, "leaf"))

    assert node.finish(leaf, "leaf") == first
    denied(node.finish(leaf, "leaf", outcome="closed"), "unknown_call")
    denied(node.finish(single, "leaf"), "unknown_call")


def test_the_end_of_a_caller_leaves_its_callees_alone() -> None:
    node = edges()
    single = granted(node.start("single"))
    leaf = granted(node.start("leaf", granted(node.invoke(single, "single", "leaf")).token))
    node.end(single, "single")

    granted(node.finish(leaf, "leaf"))

    assert node.counts() == (0, 0)


# Asynchronous edges and callbacks


@pytest.mark.parametrize(
    "said",
    [
        {"asynchronous": True},
        {"callback": "done"},
        {"asynchronous": True, "callback": "last"},
        {"asynchronous": False},
    ],
)
def test_an_edge_is_taken_in_the_way_that_the_policy_lists_and_in_no_other(said: dict[str, object]) -> None:
    node = edges()
    caller = granted(node.start("later"))

    assert expected(node.invoke(caller, "later", "job", **said)) == ["invoke job async callback done"]  # type: ignore[arg-type]

    granted(later(node, caller))


@pytest.mark.parametrize(("after_ms", "reason"), [(LIMITS.token_late_ms - 100, "allowed"), (LIMITS.token_late_ms, "bad_token")])
def test_the_tokens_of_the_queue_live_longer(after_ms: int, reason: str) -> None:
    node = edges()
    answer = granted(later(node, granted(node.start("later"))))

    node.now_ms = after_ms
    node.expire()

    assert node.start("done", answer.callback).reason == reason
    assert node.start("job", answer.token).reason == "bad_token"  # expired, or revoked by the callback's start


def test_a_callback_starts_when_its_invocation_is_over() -> None:
    node = edges()
    caller = granted(node.start("later"))
    answer = granted(later(node, caller))
    job = granted(node.start("job", answer.token))
    assert job.hold, "the gateway must not call back before the controller knows that it is over"

    denied(node.start("done", answer.callback), "bad_token")
    granted(node.finish(job, "job"))
    done = granted(node.start("done", answer.callback))

    assert done.call == caller.call
    assert not done.hold
    granted(node.invoke(done, "done", "last"))
    denied(node.start("done", answer.callback), "bad_token")


@pytest.mark.parametrize("outcome", ["closed", "timeout"])
def test_a_callback_tells_of_a_failure_too(outcome: str) -> None:
    node = edges()
    answer = granted(later(node, granted(node.start("later"))))
    job = granted(node.start("job", answer.token))

    granted(node.finish(job, "job", outcome=outcome))

    granted(node.start("done", answer.callback))


def test_a_callback_of_what_never_began_starts_and_then_it_does_not_begin() -> None:
    """The queue could not reach the function, and says so. A start that comes later would be behind its own result."""
    node = edges()
    caller = granted(node.start("later"))
    answer = granted(later(node, caller))
    granted(node.invoke(caller, "later", "last"))
    node.end(caller, "later")

    granted(node.start("done", answer.callback))

    denied(node.start("job", answer.token), "bad_token")


def test_a_callbacks_token_counts_for_the_instance_that_was_granted_it() -> None:
    node = edges(replace(LIMITS, tokens_per_instance=2))
    first, second = (granted(node.start("later")) for _ in range(2))
    callback = granted(later(node, first)).callback

    denied(later(node, second), "overloaded")
    granted(node.start("done", callback))  # which revokes the edge's own

    granted(later(node, second))


@pytest.mark.parametrize(("function", "which"), [("done", "token"), ("job", "callback"), ("last", "callback")])
def test_the_two_tokens_are_not_the_same(function: str, which: str) -> None:
    node = edges()
    answer = granted(later(node, granted(node.start("later"))))

    denied(node.start(function, getattr(answer, which)), "bad_token")


def test_an_invoke_with_a_callback_asked_again_gives_both_tokens_again() -> None:
    node = edges()
    caller = granted(node.start("later"))
    first = granted(node.invoke(caller, "later", "job", asynchronous=True, callback="done", step="a" * 16))

    assert node.invoke(caller, "later", "job", asynchronous=True, callback="done", step="a" * 16) == first
    denied(node.invoke(caller, "later", "job", asynchronous=True, step="a" * 16), "malformed")


# Retries


def test_a_declared_edge_may_be_taken_again_and_the_token_of_before_is_gone() -> None:
    node = edges()
    caller = granted(node.start("again"))
    first = granted(node.invoke(caller, "again", "leaf"))

    second = granted(node.invoke(caller, "again", "leaf", retry=True))

    assert first.token != second.token
    denied(node.start("leaf", first.token), "bad_token")
    granted(node.start("leaf", second.token))


def test_a_retry_does_not_move_the_cursor_and_retries_are_counted() -> None:
    node = edges()
    caller = granted(node.start("again"))
    granted(node.invoke(caller, "again", "leaf"))
    for _ in range(2):
        granted(node.invoke(caller, "again", "leaf", retry=True))

    denied(node.invoke(caller, "again", "leaf", retry=True), "edge_not_allowed")

    granted(node.invoke(caller, "again", "last"))


def test_a_retry_that_was_started_may_run_beside_the_first() -> None:
    """Nobody knows whether the first has begun; that is why the policy has to declare it."""
    node = edges()
    caller = granted(node.start("again"))
    first = granted(node.start("leaf", granted(node.invoke(caller, "again", "leaf")).token))

    second = granted(node.start("leaf", granted(node.invoke(caller, "again", "leaf", retry=True)).token))

    assert first.invocation != second.invocation
    assert node.end(first, "leaf")
    assert node.end(second, "leaf")


def test_what_is_not_declared_is_at_most_once() -> None:
    node = edges()
    single = granted(node.start("single"))
    granted(node.invoke(single, "single", "leaf"))

    denied(node.invoke(single, "single", "leaf", retry=True), "edge_not_allowed")


def test_a_retry_of_what_was_not_granted_last_is_denied() -> None:
    node = edges()
    caller = granted(node.start("again"))
    denied(node.invoke(caller, "again", "leaf", retry=True), "edge_not_allowed")
    granted(node.invoke(caller, "again", "leaf"))
    denied(node.invoke(caller, "again", "other", retry=True), "edge_not_allowed")
    denied(node.invoke(caller, "again", "leaf", asynchronous=True, retry=True), "edge_not_allowed")
    granted(node.invoke(caller, "again", "leaf", retry=True))  # what was denied in between was no grant
    granted(node.invoke(caller, "again", "last"))

    denied(node.invoke(caller, "again", "leaf", retry=True), "edge_not_allowed")


def test_a_failed_callee_of_a_join_may_be_retried_and_then_its_answer_counts() -> None:
    node = edges()
    caller = granted(node.start("single-again"))
    first = granted(node.start("leaf", granted(node.invoke(caller, "single-again", "leaf")).token))
    granted(node.finish(first, "leaf", outcome="closed"))

    second = granted(node.start("leaf", granted(node.invoke(caller, "single-again", "leaf", retry=True)).token))
    assert expected(node.invoke(caller, "single-again", "last")) == ["answer of invoke leaf"]
    granted(node.finish(second, "leaf"))

    granted(node.invoke(caller, "single-again", "last"))


@pytest.mark.parametrize("answered", ["before it", "before it begins", "behind it"])
def test_of_a_retried_join_the_newest_invocation_counts(answered: str) -> None:
    """Wherever the first answers, as seen from the retry."""
    node = edges()
    caller = granted(node.start("single-again"))
    first = granted(node.start("leaf", granted(node.invoke(caller, "single-again", "leaf")).token))
    if answered == "before it":
        granted(node.finish(first, "leaf"))
    token = granted(node.invoke(caller, "single-again", "leaf", retry=True)).token
    if answered == "before it begins":
        granted(node.finish(first, "leaf"))
        assert expected(node.invoke(caller, "single-again", "last")) == ["answer of invoke leaf"]
    second = granted(node.start("leaf", token))
    if answered == "behind it":
        granted(node.finish(first, "leaf"))

    assert expected(node.invoke(caller, "single-again", "last")) == ["answer of invoke leaf"]
    granted(node.finish(second, "leaf"))

    granted(node.invoke(caller, "single-again", "last"))


def test_a_retry_by_the_queue_brings_a_callback_of_its_own() -> None:
    node = edges()
    caller = granted(node.start("later-again"))
    first = granted(later(node, caller, "later-again"))

    second = granted(later(node, caller, "later-again", retry=True))

    assert len({first.token, first.callback, second.token, second.callback}) == 4
    denied(node.start("job", first.token), "bad_token")
    denied(node.start("done", first.callback), "bad_token")
    job = granted(node.start("job", second.token))
    granted(node.finish(job, "job"))
    granted(node.start("done", second.callback))


def test_a_callback_waits_for_every_invocation_of_its_edge() -> None:
    node = edges()
    caller = granted(node.start("later-again"))
    first = granted(node.start("job", granted(later(node, caller, "later-again")).token))
    again = granted(later(node, caller, "later-again", retry=True))
    second = granted(node.start("job", again.token))
    granted(node.finish(second, "job"))

    denied(node.start("done", again.callback), "bad_token")
    granted(node.finish(first, "job"))

    granted(node.start("done", again.callback))


def test_nothing_is_retried_behind_its_own_callback() -> None:
    node = edges()
    caller = granted(node.start("later-again"))
    granted(node.start("done", granted(later(node, caller, "later-again")).callback))

    denied(later(node, caller, "later-again", retry=True), "edge_not_allowed")


# What is left


def walk(node: Node) -> None:
    """A call of every kind, to its end."""
    for function, options in (("single-again", {}), ("later-again", {"asynchronous": True, "callback": "done"})):
        callee = "job" if options else "leaf"
        caller = granted(node.start(function))
        granted(node.invoke(caller, function, callee, **options))  # type: ignore[arg-type]
        answer = granted(node.invoke(caller, function, callee, retry=True, **options))  # type: ignore[arg-type]
        granted(node.finish(granted(node.start(callee, answer.token)), callee))
        if answer.callback:
            node.end(granted(node.start("done", answer.callback)), "done")
        node.end(caller, function)
    gone = granted(node.start("single-again"))
    token = granted(node.invoke(gone, "single-again", "leaf")).token
    granted(node.start("leaf", token))
    assert node.unregister("single-again")
    assert node.unregister("leaf")
    for function in ("single-again", "leaf"):
        granted(node.register(function))


def test_a_call_that_is_over_leaves_no_memory_behind() -> None:
    """What holds each other has to be let go by hand: the garbage collector does not look at it."""
    node = edges()
    grown = []
    tracemalloc.start()
    try:
        for rounds in (200, 300, 300, 300):
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(rounds):
                walk(node)
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
            grown.append((after - before) / rounds)
    finally:
        tracemalloc.stop()

    assert node.counts() == (0, 0)
    assert min(grown[1:]) < 32, "bytes a round: less than any object that it could leave, and a leak would be there each time"


@pytest.mark.parametrize("branches", ["pending", "live"])
def test_a_live_call_with_8_open_branches_takes_at_most_1200_bytes(branches: str) -> None:
    """The first invocation, and 7 tokens or invocations. What an instance takes anyway is there before."""
    node = site(functions="", mint=lambda: secrets.token_hex(16))
    callers = [f"i-{number}" for number in range(40)]
    for instance in callers:
        granted(node.register("lists", instance))
        for number in range(7):
            granted(node.register("stock", f"{instance}-{number}"))

    def open_calls(count: int) -> list[tuple[Answer, str, str]]:
        began = []
        for instance in callers:
            for _ in range(count):
                caller = granted(node.start("lists", instance=instance))
                tokens = [granted(node.invoke(caller, "lists", "stock", instance=instance)).token for _ in range(7)]
                began.append((caller, "lists", instance))
                for number, token in enumerate(tokens if branches == "live" else ()):
                    began.append((granted(node.start("stock", token, instance=f"{instance}-{number}")), "stock", f"{instance}-{number}"))
        return began

    tracemalloc.start()
    try:
        for each, function, instance in open_calls(LIMITS.starts_per_instance):
            node.end(each, function, instance=instance)
        node.now_ms = LIMITS.token_ms
        node.expire()
        assert node.counts() == (0, 0)
        before, _ = tracemalloc.get_traced_memory()
        open_calls(100)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    calls, invocations = node.counts()
    assert (calls, invocations) == (4000, 4000 * (8 if branches == "live" else 1))
    assert (after - before) / calls <= 1.2 * 1024
