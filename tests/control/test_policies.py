"""Policies and names that two controllers share: real processes, each with a directory of its own."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from controller_samples import compiled

from control.processes import Controller, Plane, until
from control.redis_server import RedisServer
from kalium.protocol.limits import ENVELOPE_BYTES_MAX

IN_FORCE_S = 2.0


class Pair:
    """Two controllers on one Redis, an agent at the second."""

    def __init__(self, plane: Plane, redis: RedisServer) -> None:
        self.plane = plane
        self.redis = redis
        store = {"kind": "redis", "url": redis.url}
        self.one, self.two = (plane.controller(name, store) for name in ("one", "two"))
        self.agent = plane.agent("node0", [self.two.address])

    @staticmethod
    def version(controller: Controller) -> int:
        return controller.status().policies["shop"]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with RedisServer(tmp_path / "redis") as redis, Plane(compiled()) as plane:
        yield Pair(plane, redis)


def test_a_policy_that_one_controller_has_is_in_force_at_all_within_two_seconds(pair: Pair) -> None:
    pair.plane.publish(pair.one, compiled(2))

    # When each of them said so: whoever asks for a status waits for the answer, too.
    one_ms, two_ms = (
        until(lambda: [line["time_ms"] for line in controller.events("policy_loaded") if line["version"] == 2], controller.name)[0]  # noqa: B023
        for controller in (pair.one, pair.two)
    )
    took_s = (two_ms - one_ms) / 1000
    assert (pair.version(pair.one), pair.version(pair.two)) == (2, 2)
    until(lambda: pair.agent.ask({"op": "status"})["policies"] == {"shop": 2}, "the agent")

    print(f"a policy of one controller was in force at the other after {took_s:.2f} s")
    assert took_s < IN_FORCE_S


def test_an_older_policy_does_not_come_back_with_a_controller_that_has_it(pair: Pair) -> None:
    pair.plane.publish(pair.one, compiled(3))
    until(lambda: pair.version(pair.two) == 3, "the second controller")

    pair.two.kill()
    pair.two.start()  # its directory has version 1

    assert pair.version(pair.two) == 3
    pair.plane.publish(pair.two, compiled(2))
    until(lambda: [line for line in pair.two.events("policy_refused") if line["reason"] == "policy.version"], "the refusal in the log")
    assert (pair.version(pair.one), pair.version(pair.two)) == (3, 3)


@pytest.mark.parametrize(
    "junk", ["", "{}", "no JSON at all", "\xff", "x" * (ENVELOPE_BYTES_MAX + 1)], ids=["empty", "object", "text", "bytes", "long"]
)
def test_what_somebody_else_writes_as_a_policy_is_refused_once_and_replaced(pair: Pair, junk: str) -> None:
    """Whoever writes to the store cannot sign, and cannot keep good policies out by a version that nothing comes after."""
    pair.redis.ask("HSET", "kalium:{site}:policies", "shop", "2147483647")
    pair.redis.ask("HSET", "kalium:{site}:envelopes", "shop", junk)
    until(lambda: pair.one.events("policy_refused") or pair.two.events("policy_refused"), "the refusal in the log of who came first")

    until(lambda: pair.redis.ask("HGET", "kalium:{site}:policies", "shop") == "1", "the good one in its place")
    pair.plane.publish(pair.one, compiled(2))

    until(lambda: pair.version(pair.two) == 2, "the next one at the second controller")
    for controller in (pair.one, pair.two):
        assert len(controller.events("policy_refused")) <= 1


def test_a_signed_policy_of_another_app_is_not_taken_for_this_one(pair: Pair) -> None:
    other = (pair.one.policies / "shop.signed.json").read_text()
    pair.redis.ask("HSET", "kalium:{site}:policies", "bank", "7")
    pair.redis.ask("HSET", "kalium:{site}:envelopes", "bank", other)

    line = until(lambda: pair.one.events("policy_refused"), "the refusal in the log")[0]

    assert line["reason"] == "controller.shared_policy"
    assert set(pair.one.status().policies) == {"shop"}


def test_controllers_know_of_each_other_and_of_who_is_gone(pair: Pair) -> None:
    until(lambda: list(pair.one.status().controllers) == ["one", "two"], "both at the first")
    assert pair.one.status().store == "redis"

    pair.two.kill()

    until(lambda: list(pair.one.status().controllers) == ["one"], "the first alone", 6)


def test_a_controller_starts_without_its_store_and_serves_when_it_is_there(pair: Pair) -> None:
    pair.redis.kill()
    pair.two.kill()
    begun = time.monotonic()
    pair.two.start()

    assert time.monotonic() - begun < 8
    assert json.loads((pair.two.policies / "shop.signed.json").read_text())
    assert pair.version(pair.two) == 1
    pair.redis.start()
    until(lambda: len(pair.two.events("store_connected")) >= 2, "the store")
