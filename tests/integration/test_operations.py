"""What an operator does to a running site: a new policy and the way back, what is in force, and why a message was denied."""

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from .actors import OPERATOR_KEY, Apps, answered, deployed_all, in_force, kalium, status_of
from .conftest import Gateway, Lines, supervisorctl, until

APP, ASKS, FIRST, SECOND = "operated", "operated-asks", "operated-first", "operated-second"
POLICY = """\
entries: [{asks}]
functions:
  {asks}: {{messages: [{messages}]}}
  {first}: {{messages: []}}
  {second}: {{messages: []}}
"""
FETCH = "{https: GET, peer: images, path: /image.jpg}"
BOTH = f"{{invoke: {FIRST}}}, {FETCH}, {{invoke: {SECOND}}}"
ONE = f"{{invoke: {FIRST}}}, {FETCH}"
ASK_BOTH = f"answer = [post({FIRST!r}, {{}})[0], image(), post({SECOND!r}, {{}})[0]]"


def policy(messages: str) -> str:
    return POLICY.format(asks=ASKS, first=FIRST, second=SECOND, messages=messages)


@contextmanager
def in_flight(gateway: Gateway, verdicts: Lines) -> Iterator[list[Any]]:
    """A call that has taken its first step and waits for the image server while the `with` lasts. What it answers then is in the list."""
    said: list[Any] = []
    call = threading.Thread(target=lambda: said.append(answered(gateway, ASKS, ASK_BOTH)))
    server = int(supervisorctl("pid", "kalium-imageserver"))
    os.kill(server, signal.SIGSTOP)
    try:
        call.start()
        verdicts.until(lambda line: line["message"] == f"invoke {FIRST}", "the first step of the call")
        yield said
    finally:
        os.kill(server, signal.SIGCONT)
        call.join(60)


@pytest.fixture(scope="module", autouse=True)
def version(gateway: Gateway, actor: str, apps: Apps) -> Iterator[int]:
    """The app, and its first version."""
    first = apps.apply(APP, policy(BOTH))
    with deployed_all(gateway, dict.fromkeys((ASKS, FIRST, SECOND), APP)):
        yield first


def test_a_new_policy_is_in_force_in_running_sandboxes_while_a_call_goes_on_under_its_own(
    gateway: Gateway, apps: Apps, version: int, verdicts: Lines
) -> None:
    """The call in flight has a step that the new version denies to those that come later; the way back is a new version."""
    in_force(APP, version, 3)

    with in_flight(gateway, verdicts) as said:
        second = apps.apply(APP, policy(ONE))
        others = {(FIRST, second, "enforce"), (SECOND, second, "enforce")}
        until(lambda: {(row["function"], row["version"], row["mode"]) for row in status_of(APP)[1]} >= others, "the new version elsewhere")
        assert not said, "the call is in flight"

    assert said == [[200, 200, 200]]
    verdicts.until(lambda line: line["message"] == f"invoke {SECOND}" and line["allowed"] and line["policy_version"] == version, "its second step")
    in_force(APP, second, 3)
    assert answered(gateway, ASKS, ASK_BOTH) == [200, 200, "PermissionError"]
    kalium("policy", "rollback", APP, "--to", str(version), "--key", OPERATOR_KEY)
    in_force(APP, second + 1, 3)
    assert answered(gateway, ASKS, ASK_BOTH) == [200, 200, 200]
    listed = [line for line in kalium("policy", "history", APP).splitlines() if line.startswith("*")]
    assert len(listed) == 1 and str(second + 1) in listed[0]


def test_a_denial_is_counted_and_explained(gateway: Gateway, apps: Apps, verdicts: Lines) -> None:
    """By the id in its line: what was sent, why not, and where in the order the function stood."""
    apps.apply(APP, policy(BOTH))
    before = denials()
    assert answered(gateway, ASKS, f"answer = post({SECOND!r}, {{}})")[0] == "PermissionError"
    denial = verdicts.until(lambda line: line["function"] == ASKS and not line["allowed"], "the denial")

    explained = kalium("explain", denial["id"])

    for words in (f"invoke {SECOND}", "out_of_order", f"start {ASKS}", "here it stood"):
        assert words in explained, explained
    assert json.loads(kalium("explain", denial["id"], "--output", "json"))["verdict"]["id"] == denial["id"]
    kalium("explain", "f" * 16, status=1)
    until(lambda: denials() == before + 1, "the count")


def denials() -> int:
    """How many messages of the app were denied for their order, by the status; its exit code says that what is asked for is in force."""
    return sum(row["count"] for row in status_of(APP)[0]["denied"] if (row["app"], row["reason"]) == (APP, "out_of_order"))


def test_the_status_fails_while_what_enforces_by_its_policy_does_not_yet(gateway: Gateway, apps: Apps, verdicts: Lines) -> None:
    """A call that began in audit is judged by it to its end, and the sandbox itself says so: until then enforce is not in force."""
    audit = apps.apply(APP, policy(BOTH).replace("{messages: [{invoke", "{mode: audit, messages: [{invoke"))
    until(lambda: (audit, "audit") in {(row["version"], row["mode"]) for row in status_of(APP)[1]}, "audit in force")

    with in_flight(gateway, verdicts):
        enforced = apps.apply(APP, policy(BOTH))
        until(lambda: not status_of(APP)[0]["ok"], "a row that is not in force")
        shown = status_of(APP)[1]

    assert [(row["function"], row["asked"], row["mode"]) for row in shown if not row["in_force"]] == [(ASKS, "enforce", "audit")]
    in_force(APP, enforced, 3)
