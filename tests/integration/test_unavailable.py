"""When controller or agent are gone: what the policy declares happens, it is on record, and all of it heals by itself."""

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from .actors import Apps, act, answered, deployed_all, invocations, status_of
from .conftest import Gateway, Lines, Reply, supervisorctl, until

MODES = ("deny", "allow", "last_known")
POLICY = """\
entries: [{asks}]
functions:
  {asks}: {{messages: [{{https: GET, peer: images, path: /image.jpg}}, {{invoke: {answers}}}]}}
  {answers}: {{messages: []}}
  {idle}: {{messages: []}}
"""
FORWARD = "answer = [image(), post({answers!r}, {{'do': 'answer = 1'}})[0], post({answers!r}, {{}})[0]]"


def named(mode: str) -> dict[str, str]:
    """The functions of an app: one invokes the other, and nobody the third."""
    return {role: f"away-{mode.replace('_', '-')}-{role}" for role in ("asks", "answers", "idle")}


def app_of(mode: str) -> str:
    return f"away-{mode.replace('_', '-')}"


def forward(gateway: Gateway, mode: str) -> Reply:
    """One image, one invocation that the policy has, and the same again, which it has not."""
    return act(gateway, named(mode)["asks"], FORWARD.format(**named(mode)))


@pytest.fixture(scope="module", autouse=True)
def _deployed(gateway: Gateway, actor: str, apps: Apps) -> Iterator[None]:
    """An app for each fail mode."""
    for mode in MODES:
        apps.apply(app_of(mode), POLICY.format(**named(mode)), app_edge=mode, deadline_ms=1000)
    with deployed_all(gateway, {name: app_of(mode) for mode in MODES for name in named(mode).values()}):
        yield


@contextmanager
def stopped(program: str) -> Iterator[None]:
    """`program` of the site is stopped while the `with` lasts."""
    assert "stopped" in supervisorctl("stop", program)
    try:
        yield
    finally:
        assert "started" in supervisorctl("start", program)


@contextmanager
def paused(program: str) -> Iterator[Callable[[], None]]:
    """`program` of the site does nothing, until the `with` ends or the value is called."""
    pid = pid_of(program)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield lambda: os.kill(pid, signal.SIGCONT)
    finally:
        os.kill(pid, signal.SIGCONT)


def pid_of(program: str) -> int:
    """The process of a program that runs; 0 while it does not."""
    word = supervisorctl("pid", program).strip()
    return int(word) if word.isdigit() else 0


@pytest.fixture(scope="module")
def without_controller(gateway: Gateway, site: dict[str, Any], _deployed: None) -> tuple[dict[str, dict[str, Reply]], Lines]:
    """What each app answered while no controller ran: its entry, the function that it invokes, and the one that nobody does."""
    replies: dict[str, dict[str, Reply]] = {}
    for mode in MODES:
        assert forward(gateway, mode).status == 200
    with stopped("kalium-controller"):
        verdicts = Lines(Path(site["verdicts"]))
        for mode in MODES:
            names = named(mode)
            replies[mode] = {"asks": forward(gateway, mode), **{role: gateway.invoke(names[role], {}) for role in ("answers", "idle")}}
    return replies, verdicts


def test_deny_refuses_and_says_so(without_controller: tuple[dict[str, dict[str, Reply]], Lines]) -> None:
    """503, which a client may try again; also for functions that would be refused anyhow: nobody could say."""
    replies, verdicts = without_controller

    assert [(reply.status, json.loads(reply.body)["error"]) for reply in replies["deny"].values()] == [(503, "controller_unavailable")] * 3
    assert {line["fail_mode"] for line in edges(verdicts, "deny", 3)} == {"deny"}


def test_allow_goes_on_within_the_functions_own_order(without_controller: tuple[dict[str, dict[str, Reply]], Lines]) -> None:
    """Starts and invocations pass without a controller; what the function's own CFG does not have here is denied all the same."""
    replies, verdicts = without_controller

    assert json.loads(replies["allow"]["asks"].body) == [200, 200, "PermissionError"]
    assert [replies["allow"][role].status for role in ("answers", "idle")] == [200, 200]
    made = edges(verdicts, "allow", 6)
    assert [(line["allowed"], line["fail_mode"]) for line in made if line["reason"] != "out_of_order"] == [(True, "allow")] * 5
    assert [line["fail_mode"] for line in made if line["reason"] == "out_of_order"] == [""], "no fail mode has decided that"


def test_last_known_starts_only_what_the_policy_has_somebody_invoke(without_controller: tuple[dict[str, dict[str, Reply]], Lines]) -> None:
    replies, verdicts = without_controller

    assert json.loads(replies["last_known"]["asks"].body) == [200, 200, "PermissionError"]
    assert [replies["last_known"][role].status for role in ("answers", "idle")] == [200, 403]
    assert {line["fail_mode"] for line in edges(verdicts, "last_known", 6) if line["reason"] != "out_of_order"} == {"last_known"}


def test_with_the_controller_back_everything_is_enforced_again(
    gateway: Gateway, without_controller: tuple[dict[str, dict[str, Reply]], Lines]
) -> None:
    """By the same instances; the status has counted what was decided without it."""
    for mode in MODES:
        until(partial(refused, gateway, named(mode)["answers"]), f"{mode}: a stranger's start to be refused")
        assert json.loads(forward(gateway, mode).body) == [200, 200, "PermissionError"]

    def counted() -> bool:
        counts = {(row["app"], row["fail_mode"]): row["count"] for row in status_of("")[0]["fail_modes"]}
        return all(counts.get((app_of(mode), mode), 0) >= 3 for mode in MODES)

    until(counted, "the counts of fail modes")


def refused(gateway: Gateway, function: str) -> bool:
    """Whether a stranger may not start it, by the word of a controller."""
    return gateway.invoke(function, {}).status == 403


def edges(verdicts: Lines, mode: str, count: int) -> list[dict[str, Any]]:
    """The app edges of an app; the agent writes them a moment later."""

    def lines() -> list[dict[str, Any]]:
        return [line for line in verdicts.read() if line["app"] == app_of(mode) and line["kind"] in ("start", "invoke")]

    until(lambda: len(lines()) >= count, f"{count} verdicts of {app_of(mode)}")
    return lines()[:count]


# The agent


def instances(function: str) -> set[str]:
    """The containers of a function."""
    named = f"name=^kal-{function}-[0-9a-f]{{8}}$"
    command = ["podman", "ps", "--filter", named, "--format", "{{.Names}}"]
    listed = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    return set(listed.stdout.split())


def in_another_thread(work: Callable[[], Reply]) -> Callable[[], Reply]:
    """Begin `work`; what is returned waits for its value."""
    found: list[Reply] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()

    def wait() -> Reply:
        thread.join(60)
        assert found, "it has an answer"
        return found[0]

    return wait


def test_a_killed_agents_instances_are_replaced_by_the_gateway(gateway: Gateway, apps: Apps, image_requests: Lines) -> None:
    """The next request is answered, by an instance of the new agent's; nothing is deployed. The old one took no request any more."""
    names = named("deny")
    before = instances(names["asks"])
    agent = pid_of("kalium-agent")

    os.kill(agent, signal.SIGKILL)
    until(lambda: pid_of("kalium-agent") not in (0, agent), "another agent")
    reply = forward(gateway, "deny")

    assert (reply.status, json.loads(reply.body)) == (200, [200, 200, "PermissionError"]), reply
    assert not before & instances(names["asks"])
    assert len(image_requests.read()) == 1


def test_while_there_is_no_agent_nothing_begins_and_no_edge_is_taken(gateway: Gateway, verdicts: Lines, image_requests: Lines) -> None:
    """What runs goes on by local decisions, and its app edges are denied; a new request is refused. With an agent all of it works again."""
    names = named("deny")
    until(lambda: forward(gateway, "deny").status == 200, "the function")
    verdicts.until(lambda line: line["function"] == names["asks"] and line["reason"] == "out_of_order", "the last verdict on that")
    before, seen = invocations(gateway, names["answers"]), len(image_requests.read())
    verdicts = Lines(verdicts.path)

    # It has begun while there is an agent, and has its image, and goes on, when there is none.
    with paused("kalium-imageserver") as go_on:
        wait = in_another_thread(lambda: act(gateway, names["asks"], f"answer = [image(), post({names['answers']!r}, {{}})[0]]"))
        verdicts.until(lambda line: (line["function"], line["kind"], line["allowed"]) == (names["asks"], "start", True), "the start")
        with stopped("kalium-agent"):
            go_on()
            running = wait()
            refused = forward(gateway, "deny")

    assert json.loads(running.body) == [200, "PermissionError"]
    assert (refused.status, len(image_requests.read()) - seen) == (503, 1), refused
    assert invocations(gateway, names["answers"]) == before
    until(lambda: forward(gateway, "deny").status == 200, "the function, with a new instance")


def test_with_allow_an_instance_serves_until_its_lease_ends_without_an_agent(gateway: Gateway) -> None:
    """Nobody can log what it does then: docs/topics/limits.md says so."""
    names = named("allow")
    until(lambda: forward(gateway, "allow").status == 200, "the function")
    before = instances(names["asks"])

    with stopped("kalium-agent"):
        said = answered(gateway, names["asks"], FORWARD.format(**names))

    assert said == [200, 200, "PermissionError"]
    assert instances(names["asks"]) == before
