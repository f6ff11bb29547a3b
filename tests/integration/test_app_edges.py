"""The app CFG in real sandboxes: asynchronous edges and their callbacks, joins, and invocations that are made again."""

import json
import secrets
from collections.abc import Iterator
from typing import Any

import pytest

from .actors import Apps, answered, deployed_all, invocations, printed
from .conftest import Gateway, Lines, until
from .test_enforcement import Receiver

ORDER, PACK, PACKED = "edges-order", "edges-pack", "edges-packed"
ALBUM, SCALE, PUBLISH = "edges-album", "edges-scale", "edges-publish"
SHOP, STORE = "edges-shop", "edges-store"
EDGES = {
    "edges-queue": f"""\
        entries: [{ORDER}]
        functions:
          {ORDER}: {{messages: [{{invoke: {PACK}, async: true, callback: {PACKED}}}]}}
          {PACK}: {{messages: []}}
          {PACKED}: {{messages: []}}
        """,
    "edges-join": f"""\
        entries: [{ALBUM}]
        functions:
          {ALBUM}:
            messages:
              - repeat: [{{invoke: {SCALE}, join: answered}}, {{invoke: {PUBLISH}}}]
                at_most: 16
          {SCALE}: {{messages: []}}
          {PUBLISH}: {{messages: []}}
        """,
    "edges-again": f"""\
        entries: [{SHOP}]
        functions:
          {SHOP}: {{messages: [{{invoke: {STORE}, retries: 1}}]}}
          {STORE}: {{messages: []}}
        """,
}
FUNCTIONS = {"edges-queue": (ORDER, PACK, PACKED), "edges-join": (ALBUM, SCALE, PUBLISH), "edges-again": (SHOP, STORE)}


@pytest.fixture(scope="module", autouse=True)
def _deployed(gateway: Gateway, actor: str, apps: Apps) -> Iterator[None]:
    """Every application of this module, once: its tests leave instances that serve."""
    for app, policy in EDGES.items():
        apps.apply(app, policy)
    with deployed_all(gateway, {name: app for app, names in FUNCTIONS.items() for name in names}):
        yield


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    """A server that is in no policy."""
    server = Receiver()
    yield server
    server.close()


def decided(verdicts: Lines, count: int, *functions: str, kinds: tuple[str, ...] = ("invoke",)) -> list[dict[str, Any]]:
    """The verdicts of these kinds on these functions, of which there are `count`; the agent writes them a moment later."""

    def lines() -> list[dict[str, Any]]:
        return [line for line in verdicts.read() if line["function"] in functions and line["kind"] in kinds]

    until(lambda: len(lines()) >= count, f"{count} verdicts on {functions}")
    assert len(lines()) == count, lines()
    return lines()


# Asynchronous edges


def test_an_asynchronous_invocation_and_its_callback_are_made_in_order_by_their_tokens(gateway: Gateway, verdicts: Lines) -> None:
    """Both are no entries: each starts with a token of the call, which nothing but the guards and the gateway has seen."""
    mark = secrets.token_hex(8)
    result = f"answer = {{'packed': {mark!r}, 'saw': [n for n in event.headers if 'kalium' in n.lower()]}}"

    said = answered(gateway, ORDER, f"answer = post({PACK!r}, {{'do': {result!r}}}, path='/async-function/')")

    assert said[0] == 202, said
    until(lambda: printed(gateway, PACKED, mark), "the callback")
    assert printed(gateway, PACKED, '\\"saw\\": []'), "no program sees a token"
    edges = decided(verdicts, 4, ORDER, PACK, PACKED, kinds=("start", "invoke"))
    assert [(line["function"], line["message"], line["allowed"]) for line in edges] == [
        (ORDER, f"start {ORDER}", True), (ORDER, f"invoke {PACK} async callback {PACKED}", True),
        (PACK, f"start {PACK}", True), (PACKED, f"start {PACKED}", True),
    ]  # fmt: skip
    assert len({line["call"] for line in edges}) == 1, edges


def test_an_asynchronous_invocation_is_one_place_of_the_order(gateway: Gateway, verdicts: Lines) -> None:
    """Neither again nor without the queue: what is refused never reaches the gateway."""
    before = invocations(gateway, PACK)

    said = answered(
        gateway, ORDER,
        f"answer = [post({PACK!r}, {{}})[0], post({PACK!r}, {{}}, path='/async-function/')[0], post({PACK!r}, {{}}, path='/async-function/')[0]]",
    )  # fmt: skip

    assert said == ["PermissionError", 202, "PermissionError"]
    assert [line["reason"] for line in decided(verdicts, 3, ORDER)] == ["not_in_policy", "allowed", "out_of_order"]
    decided(verdicts, 1, PACKED, kinds=("start",))
    assert invocations(gateway, PACK) == before + 1


@pytest.mark.parametrize("headers", [{}, {"X-Kalium-Token": "0" * 32}, {"X-Function-Name": PACK, "X-Function-Status": "200"}])
def test_a_callback_function_is_started_by_nobody_without_its_token(gateway: Gateway, headers: dict[str, str]) -> None:
    reply = gateway.request("POST", f"/function/{PACKED}", {"forged": "result"}, headers)

    assert reply.status == 403, reply
    assert json.loads(reply.body)["error"] in ("not_an_entry", "bad_token")


def test_a_client_that_names_the_callback_itself_has_no_token_for_it(gateway: Gateway, verdicts: Lines) -> None:
    """The gateway takes it, as of a function of the same app; the callback's own guard does not."""
    mark = secrets.token_hex(8)
    path = {"X-Callback-Url": f"http://gateway:8080/function/{PACKED}"}

    reply = gateway.request("POST", f"/async-function/{ORDER}", {"do": f"answer = {mark!r}"}, path)

    assert reply.status == 202, reply
    verdicts.until(lambda line: line["function"] == PACKED and line["reason"] == "not_an_entry", "the refused callback")
    assert not printed(gateway, PACKED, mark)


STRANGERS = ("http://10.137.0.1:9998/", f"http://gateway:8080/function/{PACKED}?a=b", "http://gateway:8080/system/functions")


@pytest.mark.parametrize("url", [*STRANGERS, f"http://gateway:8080/function/{PACKED}"])
def test_a_callback_that_the_program_writes_is_refused_by_its_guard(gateway: Gateway, verdicts: Lines, receiver: Receiver, url: str) -> None:
    """Also the one that its policy has: where results go is not the program's to say."""
    before = invocations(gateway, PACK)

    said = answered(gateway, ORDER, f"answer = post({PACK!r}, {{}}, path='/async-function/', headers={{'X-Callback-Url': {url!r}}})")

    assert said == ["PermissionError", ""]
    verdicts.until(lambda line: line["function"] == ORDER and line["reason"] == "gateway_rule", "the refused field")
    assert (invocations(gateway, PACK), receiver.connections) == (before, 0)


@pytest.mark.parametrize("url", [*STRANGERS, f"http://gateway:8080/function/{STORE}"])
def test_a_callback_to_a_stranger_is_refused_by_the_gateway_again(gateway: Gateway, receiver: Receiver, url: str) -> None:
    """Whoever asks, as from a sandbox whose guard would not have looked. STORE is a function of another app."""
    reply = gateway.request("POST", f"/async-function/{ORDER}", {}, {"X-Callback-Url": url})

    assert reply.status == 400, reply
    assert receiver.connections == 0


# Joins


def test_who_has_read_an_awaited_answer_may_always_go_on(gateway: Gateway, verdicts: Lines) -> None:
    """Its last byte comes when the controller knows of it, so sixteen rounds without a pause are all granted."""
    said = answered(gateway, ALBUM, f"answer = [[post({SCALE!r}, {{}})[0], post({PUBLISH!r}, {{}})[0]] for _ in range(16)]")

    assert said == [[200, 200]] * 16
    assert all(line["allowed"] for line in decided(verdicts, 65, *FUNCTIONS["edges-join"], kinds=("invoke", "start")))


@pytest.mark.parametrize(("scale", "status"), [("import time; time.sleep(6)", 200), ("import os; os._exit(3)", 502)], ids=["is working", "died"])
def test_nothing_behind_a_join_begins_while_its_callee_has_not_answered(gateway: Gateway, verdicts: Lines, scale: str, status: int) -> None:
    """The function's own order is kept: it is the controller that knows of the answer. A callee that died has not answered."""
    before = invocations(gateway, PUBLISH)
    if status == 200:
        code = f"""
            import threading, time
            first = threading.Thread(target=lambda: post({SCALE!r}, {{"do": {scale!r}}}))
            first.start()
            time.sleep(2)
            answer = post({PUBLISH!r}, {{}})
            first.join()
            """
    else:
        code = f"""
            first = post({SCALE!r}, {{"do": {scale!r}}})
            answer = post({PUBLISH!r}, {{}})
            assert first[0] == {status}, first
            """

    assert answered(gateway, ALBUM, code) == ["PermissionError", ""]

    assert invocations(gateway, PUBLISH) == before
    made = [(line["message"], line["reason"]) for line in decided(verdicts, 2, ALBUM)]
    assert made == [(f"invoke {SCALE}", "allowed"), (f"invoke {PUBLISH}", "edge_not_allowed")]


# Invocations that are made again


def test_an_invocation_is_made_again_when_its_connection_ended_without_an_answer(gateway: Gateway, verdicts: Lines) -> None:
    """As often as its line says: the second is a retry with a token of its own, the third does not leave."""
    said = answered(
        gateway, SHOP,
        f"answer = [post({STORE!r}, {{'do': 'import time; time.sleep(6)'}}, seconds=3)[0], post({STORE!r}, {{}})[0], post({STORE!r}, {{}})[0]]",
    )  # fmt: skip

    assert said == ["TimeoutError", 200, "PermissionError"]
    assert [(line["allowed"], line["judging"]) for line in decided(verdicts, 3, SHOP)] == [(True, ""), (True, "retry"), (False, "")]
    starts = decided(verdicts, 2, STORE, kinds=("start",))
    assert all(line["allowed"] for line in starts) and len({line["invocation"] for line in starts}) == 2


def test_an_invocation_that_was_answered_is_not_made_again(gateway: Gateway) -> None:
    """Also by the gateway, when the callee's connection ended: whoever says so has answered."""
    before = invocations(gateway, STORE)

    said = answered(gateway, SHOP, f"answer = [post({STORE!r}, {{'do': 'import os; os._exit(3)'}})[0], post({STORE!r}, {{}})[0]]")

    assert said == [502, "PermissionError"]
    assert invocations(gateway, STORE) == before + 1
