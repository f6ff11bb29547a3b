"""The data path: what a function gets, what its client gets back, who waits, and what happens when there is no answer."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine_world import APP, GUARDED, PORT, STORY_S, World, echo, http_answer, play, until, world
from hypothesis import given
from hypothesis import strategies as st

from kalium.engine.instance import Instance
from kalium.engine.limits import BODY_BYTES_MAX
from kalium.engine.proxy import split_target
from kalium.engine.slots import Busy, NoInstance, Slots

RETIRED = http_answer(503, b'{"error":"retired","detail":"another instance has to serve it"}', "Content-Type: application/json")


def with_function(tmp_path: Path, story: Callable[[World], Awaitable[None]]) -> None:
    """Play a story with the function `echo` ready."""

    async def played() -> None:
        async with world(tmp_path) as site:
            await site.deploy()
            await site.ready()
            await story(site)

    play(played())


def seen(text: str) -> tuple[str, dict[str, str], str]:
    """Request line, fields and body that the function saw."""
    said = json.loads(text)
    lines = said["head"].strip().split("\r\n")
    return lines[0], {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}, said["body"]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("/function/echo", ("echo", "/")),
        ("/function/echo/", ("echo", "/")),
        ("/function/echo.openfaas-fn", ("echo", "/")),
        ("/function/echo.openfaas-fn/a/b?c=d", ("echo", "/a/b?c=d")),
        ("/function/echo?c=/d", ("echo", "/?c=/d")),
        ("/function/echo/a%2Fb/../%00?%26", ("echo", "/a%2Fb/../%00?%26")),
        ("/function/echo.other/a", ("echo.other", "/a")),
        ("/function/", ("", "/")),
        ("/function//echo", ("", "/echo")),
    ],
)
def test_a_target_is_split_and_not_unescaped(target: str, expected: tuple[str, str]) -> None:
    assert split_target(target, "/function/") == expected


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_method_path_query_and_body_arrive_as_they_were_sent(tmp_path: Path, method: str) -> None:
    async def story(site: World) -> None:
        status, text, _ = await site.call(method, "/function/echo.openfaas-fn/a%2Fb/../c?d=%20e", b"body" if method in ("POST", "PUT") else None)

        line, _, body = seen(text)
        assert (status, line, body) == (200, f"{method} /a%2Fb/../c?d=%20e HTTP/1.1", "body" if method in ("POST", "PUT") else "")

    with_function(tmp_path, story)


def test_a_head_is_answered_with_the_length_and_without_the_body(tmp_path: Path) -> None:
    async def story(site: World) -> None:
        async def head(head: str, body: str) -> bytes:
            return http_answer(200, b"")[:-4].replace(b"Content-Length: 0", b"Content-Length: 1234") + b"\r\n\r\n"

        site.machine.answering = head

        status, text, headers = await site.call("HEAD", "/function/echo")

        assert (status, text, headers["content-length"]) == (200, "", "1234")

    with_function(tmp_path, story)


def test_a_call_without_an_id_gets_one_and_learns_it(tmp_path: Path) -> None:
    async def story(site: World) -> None:
        before = time.time_ns()
        _, text, headers = await site.invoke()

        _, fields, _ = seen(text)
        assert fields["x-call-id"] == headers["x-call-id"]
        assert len(headers["x-call-id"]) == 36
        assert before <= int(headers["x-start-time"]) == int(fields["x-start-time"]) <= time.time_ns()
        assert float(headers["x-duration-seconds"]) > 0
        assert headers["x-served-by"].startswith("kalium-engine/")

    with_function(tmp_path, story)


def test_a_client_with_an_id_of_its_own_is_not_told_it_again(tmp_path: Path) -> None:
    async def story(site: World) -> None:
        _, text, headers = await site.invoke(headers={"X-Call-Id": "mine"})

        assert seen(text)[1]["x-call-id"] == "mine"
        assert "x-call-id" not in headers

    with_function(tmp_path, story)


def test_fields_of_one_connection_stay_on_it_and_the_others_pass(tmp_path: Path) -> None:
    async def story(site: World) -> None:
        token = "ab" * 16
        sent = {
            "Connection": "X-Hop, keep-alive",
            "X-Hop": "1",
            "TE": "trailers",
            "Proxy-Authorization": "p",
            "Upgrade": "h2c",
            "X-Kalium-Token": token,
            "Authorization": "Bearer function's own",
            "Accept-Encoding": "br",
            "X-Start-Time": "1",
            "X-Forwarded-For": "192.0.2.7",
        }

        _, text, _ = await site.invoke(headers=sent)

        _, fields, _ = seen(text)
        assert not {"x-hop", "te", "proxy-authorization", "upgrade", "keep-alive"} & set(fields)
        assert (fields["connection"], fields["host"]) == ("close", f"127.66.0.10:{PORT}")
        assert (fields["x-kalium-token"], fields["authorization"], fields["accept-encoding"]) == (token, "Bearer function's own", "br")
        assert fields["x-start-time"] != "1", "when a request came is the gateway's to say"
        assert fields["x-forwarded-for"] == "192.0.2.7"
        assert fields["x-forwarded-host"] == site.listening["address"]

    with_function(tmp_path, story)


def test_a_compressed_body_passes_as_it_is(tmp_path: Path) -> None:
    async def story(site: World) -> None:
        _, text, _ = await site.invoke(body=b"not really gzip", headers={"Content-Encoding": "gzip"})

        _, fields, body = seen(text)
        assert (fields["content-encoding"], body) == ("gzip", "not really gzip")

    with_function(tmp_path, story)


def test_the_functions_answer_passes_with_its_status_and_fields(tmp_path: Path) -> None:
    async def story(site: World) -> None:
        async def answer(head: str, body: str) -> bytes:
            fields = (
                "Set-Cookie: a=1",
                "Set-Cookie: b=2",
                "X-Duration-Seconds: 0.5",
                "X-Start-Time: 0",
                "Connection: X-Own",
                "X-Own: 1",
                "Server: own",
            )
            return http_answer(418, b"\x00\xff", *fields, "Content-Type: image/jpeg")

        site.machine.answering = answer

        async with site.session.post(f"http://{site.listening['address']}/function/echo", headers={"X-Call-Id": "x"}) as reply:
            assert (reply.status, await reply.read(), reply.content_type) == (418, b"\x00\xff", "image/jpeg")
            assert reply.headers.getall("Set-Cookie") == ["a=1", "b=2"]
            assert (reply.headers["X-Duration-Seconds"], reply.headers["Server"]) == ("0.5", "own")
            assert reply.headers.getall("X-Start-Time") != ["0"]
            assert "X-Own" not in reply.headers

    with_function(tmp_path, story)


def test_a_guards_refusal_passes_as_it_is(tmp_path: Path) -> None:
    async def story(site: World) -> None:
        async def refuse(head: str, body: str) -> bytes:
            return http_answer(403, b'{"error":"not_an_entry"}', "Content-Type: application/json", "Connection: close")

        site.machine.answering = refuse

        assert (await site.invoke())[:2] == (403, '{"error":"not_an_entry"}')
        assert not site.events("instance_suspected")

    with_function(tmp_path, story)


@pytest.mark.parametrize("name", ["absent", "echo.other", "", "ECHO", "echo%2e", "..%2fsystem"])
def test_what_is_not_deployed_is_not_found(tmp_path: Path, name: str) -> None:
    async def story(site: World) -> None:
        assert (await site.invoke(name))[0] == 404

    with_function(tmp_path, story)


def test_a_body_that_is_too_long_is_refused_before_the_function_sees_it(tmp_path: Path) -> None:
    async def story(site: World) -> None:
        async def endless() -> Any:
            for _ in range(BODY_BYTES_MAX // (1 << 20) + 1):
                yield b" " * (1 << 20)

        assert (await site.invoke(body=b" " * (BODY_BYTES_MAX + 1)))[0] == 413
        async with site.session.post(f"http://{site.listening['address']}/function/echo", data=endless()) as reply:
            assert reply.status == 413
        assert site.machine.requests == []

    with_function(tmp_path, story)


def test_a_client_that_waits_for_100_is_told_to_go_on(tmp_path: Path) -> None:
    """curl does so with long bodies."""

    async def story(site: World) -> None:
        host, _, port = site.listening["address"].partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /function/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"hi")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()
        assert "expect" not in site.machine.requests[0].lower()

    with_function(tmp_path, story)


# An instance that takes no more


GUARDED_FUNCTION: dict[str, Any] = {"labels": GUARDED, "annotations": APP}


def retiring(site: World, times: int, answer: bytes = RETIRED) -> Callable[[str, str], Awaitable[bytes]]:
    """The guard's answer to so many requests, and then the function's."""
    left = [times]

    async def answering(head: str, body: str) -> bytes:
        left[0] -= 1
        return answer if left[0] >= 0 else await echo(head, body)

    return answering


def with_guarded(tmp_path: Path, story: Callable[[World], Awaitable[None]], **fields: Any) -> None:
    """Play a story with the guarded function `echo` ready."""

    async def played() -> None:
        async with world(tmp_path) as site:
            await site.deploy(**{**GUARDED_FUNCTION, **fields})
            await site.ready()
            await story(site)

    play(played())


def test_a_retired_instance_is_replaced_and_its_request_is_served_by_the_next(tmp_path: Path) -> None:
    """There is one instance, so the request waits for the one that takes its place, as do those behind it."""

    async def story(site: World) -> None:
        site.machine.answering = retiring(site, 1)
        first = (await site.describe())["annotations"]["kalium.io/address"]

        answers = await asyncio.gather(*(site.invoke(body=f"{number}".encode()) for number in range(5)))

        assert [(status, seen(text)[2]) for status, text, _ in answers] == [(200, f"{number}") for number in range(5)]
        assert len(site.machine.requests) == 6
        assert site.machine.made == 2
        assert len(site.events("instance_retired")) == 1
        assert not site.events("instance_suspected")
        after = await site.ready()
        assert after["annotations"]["kalium.io/address"] != first
        assert after["invocationCount"] == 5
        assert len(site.agent.registered) == 1

    with_guarded(tmp_path, story)


def test_a_request_is_sent_again_once(tmp_path: Path) -> None:
    """A hijacked function may say that it is retired; it gets the request one more time and not for ever."""

    async def story(site: World) -> None:
        site.machine.answering = retiring(site, 2)

        status, text, _ = await site.invoke()

        assert (status, json.loads(text)["error"]) == (503, "retired")
        assert len(site.machine.requests) == 2
        await until(lambda: len(site.events("instance_retired")) == 2, "both to be replaced")
        assert (await site.invoke())[0] == 200

    with_guarded(tmp_path, story)


def test_instances_that_serve_one_request_each_are_replaced_without_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalium.engine.podman.functions.RESTART_PAUSE_SECONDS", (600.0, 600.0))

    async def story(site: World) -> None:
        served: set[str] = set()

        async def once(head: str, body: str) -> bytes:
            address = next(line for line in head.split("\r\n") if line.startswith("Host: "))
            if address in served:
                return RETIRED
            served.add(address)
            return await echo(head, body)

        site.machine.answering = once
        for _ in range(6):
            assert (await site.invoke())[0] == 200
        assert len(site.events("instance_retired")) == 5

    with_guarded(tmp_path, story)


@pytest.mark.parametrize(
    "answer",
    [
        http_answer(503, b'{"error":"reentrant"}'),
        http_answer(503, b'{"error":"retired"'),
        http_answer(503, b'["retired"]'),
        http_answer(503, b"retired"),
        http_answer(500, b'{"error":"retired"}'),
        http_answer(503, b'{"error":"retired"}' + b" " * 4096),
    ],
)
def test_other_answers_are_the_functions_own(tmp_path: Path, answer: bytes) -> None:
    async def story(site: World) -> None:
        site.machine.answering = retiring(site, 1, answer)

        assert (await site.invoke())[0] in (500, 503)
        assert len(site.machine.requests) == 1
        assert not site.events("instance_retired")

    with_guarded(tmp_path, story)


def test_an_instance_without_a_guard_is_not_believed(tmp_path: Path) -> None:
    async def story(site: World) -> None:
        site.machine.answering = retiring(site, 1)

        assert (await site.invoke())[0] == 503
        assert len(site.machine.requests) == site.machine.made == 1

    with_function(tmp_path, story)


def test_who_says_retired_when_asked_for_its_health_is_replaced_at_once(tmp_path: Path) -> None:
    """A request that failed makes the gateway ask; it does not wait a minute for a 200 that will not come."""

    async def story(site: World) -> None:
        async def broken(head: str, body: str) -> bytes:
            site.machine.health = RETIRED
            return b""

        site.machine.answering = broken
        assert (await site.invoke())[0] == 502
        await until(lambda: site.events("instance_retired"), "its end")
        site.machine.health, site.machine.answering = b"", echo

        assert (await site.invoke())[0] == 200

    with_guarded(tmp_path, story)


def test_a_replacement_that_does_not_start_leaves_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalium.engine.podman.functions.RESTART_PAUSE_SECONDS", (0.05, 0.05))

    async def story(site: World) -> None:
        site.machine.answering = retiring(site, 1)
        site.machine.fails = lambda command: "as the test says" if " create " in command else None

        status, text, _ = await site.invoke()

        assert (status, text) == (503, "No endpoints available for: echo.")
        site.machine.fails = lambda command: None
        await site.ready()

    with_guarded(tmp_path, story)


def test_an_instance_gets_as_many_requests_as_its_function_says_and_they_end_before_it_is_replaced(tmp_path: Path) -> None:
    async def story(site: World) -> None:
        inside, gate = [0], asyncio.Event()

        async def slow(head: str, body: str) -> bytes:
            if body == "out":
                return RETIRED
            inside[0] += 1
            await gate.wait()
            return await echo(head, body)

        site.machine.answering = slow
        running = [asyncio.ensure_future(site.invoke()) for _ in range(3)]
        await until(lambda: inside[0] == 3, "three requests in one instance")
        out = asyncio.ensure_future(site.invoke(body=b"out"))
        await until(lambda: site.events("instance_retired"), "the fourth to be refused")
        assert site.machine.made == 1
        site.machine.answering = echo
        gate.set()

        assert [(await each)[0] for each in (*running, out)] == [200] * 4
        assert site.machine.made == 2

    with_guarded(tmp_path, story, annotations={**APP, "kalium.io/max-inflight": "4"})


# No answer


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (b"", "closed the connection without an answer"),
        (b"SMTP ready\r\n\r\n", "not HTTP/1.1"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort", "within the answer's body"),
    ],
)
def test_an_answer_that_is_none_is_502_and_the_instance_is_asked_for_its_health(tmp_path: Path, answer: bytes, told: str) -> None:
    async def story(site: World) -> None:
        async def broken(head: str, body: str) -> bytes:
            return answer

        site.machine.answering = broken
        status, text, headers = await site.invoke()
        site.machine.answering = echo

        assert (status, told in text, "x-call-id" in headers) == (502, True, True), text
        assert (await site.invoke())[0] == 200, "it works, so it goes on serving"
        assert len(site.machine.requests) == 2, "a request that a function may have seen is not sent again"
        assert (len(site.events("instance_suspected")), len(site.events("instance_ended"))) == (1, 0)
        assert site.events("invocation_failed")[0]["status"] == 502

    with_function(tmp_path, story)


def test_no_answer_in_time_is_504_and_others_wait_until_the_function_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalium.engine.proxy.INVOCATION_SECONDS_MAX", 0.05)

    async def story(site: World) -> None:
        async def silent(head: str, body: str) -> bytes:
            await asyncio.sleep(0.1)
            return b""

        site.machine.answering, site.machine.is_healthy = silent, False
        status, text, _ = await site.invoke()
        assert (status, "no whole answer within" in text) == (504, True), text
        site.machine.answering = echo
        monkeypatch.setattr("kalium.engine.proxy.INVOCATION_SECONDS_MAX", STORY_S)  # the next one is answered, however long that takes here
        waiting = asyncio.ensure_future(site.invoke())
        await until(lambda: site.events("instance_suspected"), "the suspicion")
        assert not waiting.done()

        site.machine.is_healthy = True

        assert (await waiting)[0] == 200

    with_function(tmp_path, story)


def test_an_instance_that_does_not_get_well_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalium.engine.instance.READY_SECONDS_MAX", 0.05)
    monkeypatch.setattr("kalium.engine.podman.functions.RESTART_PAUSE_SECONDS", (0.01, 0.01))

    async def story(site: World) -> None:
        async def broken(head: str, body: str) -> bytes:
            return b""

        first = (await site.describe())["annotations"]["kalium.io/address"]
        site.machine.answering, site.machine.is_healthy = broken, False
        assert (await site.invoke())[0] == 502
        await until(lambda: site.events("instance_ended"), "its end")
        site.machine.answering, site.machine.is_healthy = echo, True

        assert (await site.ready())["annotations"]["kalium.io/address"] != first

    with_function(tmp_path, story)


# One at a time


def test_an_instance_has_one_request_at_a_time_and_the_others_come_in_their_order(tmp_path: Path) -> None:
    async def story(site: World) -> None:
        now = most = 0
        order: list[str] = []

        async def one(head: str, body: str) -> bytes:
            nonlocal now, most
            now += 1
            most = max(most, now)
            order.append(body)
            await asyncio.sleep(0.002)
            now -= 1
            return http_answer(200, body.encode())

        site.machine.answering = one
        asked = []
        for number in range(10):
            asked.append(asyncio.ensure_future(site.invoke(body=str(number).encode())))
            await until(lambda: len(site.backend.get("echo").slots._waiting) + len(order) > number, "the request at the gateway")  # noqa: B023

        answers = await asyncio.gather(*asked)

        assert [answer[1] for answer in answers] == order == [str(number) for number in range(10)]
        assert most == 1

    with_function(tmp_path, story)


def test_replicas_share_the_requests(tmp_path: Path) -> None:
    async def story(site: World) -> None:
        meeting = asyncio.Event()
        inside = 0

        async def meet(head: str, body: str) -> bytes:
            nonlocal inside
            inside += 1
            if inside == 2:
                meeting.set()
            await meeting.wait()
            return http_answer(200, b"")

        await site.call("POST", "/system/scale-function/echo", {"replicas": 2})
        await site.ready(replicas=2)
        site.machine.answering = meet

        assert [answer[0] for answer in await asyncio.gather(site.invoke(), site.invoke())] == [200, 200]

    with_function(tmp_path, story)


def test_a_full_queue_refuses_with_a_hint_when_to_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalium.engine.slots.QUEUE_REQUESTS_MAX", 2)

    async def story(site: World) -> None:
        ended = asyncio.Event()

        async def slow(head: str, body: str) -> bytes:
            await ended.wait()
            return http_answer(200, b"")

        site.machine.answering = slow
        asked = [asyncio.ensure_future(site.invoke()) for _ in range(3)]
        await until(lambda: len(site.backend.get("echo").slots._waiting) == 2, "a full queue")

        status, text, headers = await site.invoke()
        ended.set()

        assert (status, headers["retry-after"], "2 requests wait already" in text) == (503, "1", True), text
        assert [answer[0] for answer in await asyncio.gather(*asked)] == [200, 200, 200]

    with_function(tmp_path, story)


def instance(room: int = 1) -> Instance:
    return Instance(SimpleNamespace(max_inflight=room), "", is_guarded=False)  # type: ignore[arg-type]


def test_the_wait_in_the_queue_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalium.engine.slots.QUEUE_SECONDS_MAX", 0.01)

    async def story() -> None:
        slots = Slots()
        slots.add(instance())
        taken = await slots.take()
        with pytest.raises(Busy, match="no instance was free"):
            await slots.take()
        slots.give_back(taken)
        assert await slots.take() is taken

    play(story())


def test_who_waits_for_an_instance_that_goes_is_told_at_once() -> None:
    async def story() -> None:
        slots = Slots()
        slots.add(instance())
        taken = await slots.take()
        waiting = asyncio.ensure_future(slots.take())
        await asyncio.sleep(0)

        slots.suspend(taken)
        slots.give_back(taken)
        await asyncio.sleep(0)
        assert not waiting.done(), "it may come back"
        slots.withdraw(taken)

        with pytest.raises(NoInstance):
            await waiting
        with pytest.raises(NoInstance):
            await slots.take()

    play(story())


def test_who_waits_for_an_instance_that_is_expected_waits_on() -> None:
    async def story() -> None:
        slots = Slots()
        slots.add(first := instance())
        slots.expect("its replica")
        slots.withdraw(first)
        waiting = asyncio.ensure_future(slots.take())
        await asyncio.sleep(0)
        assert not waiting.done()

        slots.add(second := instance())
        slots.expect_no_more("its replica")
        assert await waiting is second

        slots.expect("its replica")
        slots.withdraw(second)
        slots.give_back(second)
        waiting = asyncio.ensure_future(slots.take())
        await asyncio.sleep(0)
        slots.expect_no_more("its replica")
        with pytest.raises(NoInstance):
            await waiting

    play(story())


def test_a_request_goes_to_the_instance_with_the_fewest() -> None:
    async def story() -> None:
        slots = Slots()
        slots.add(wide := instance(3))
        slots.add(narrow := instance(1))

        taken = [await slots.take() for _ in range(4)]

        assert taken == [wide, narrow, wide, wide]
        slots.withdraw(wide)
        for _ in range(2):
            slots.give_back(wide)
            assert not await slots.drained(wide, 0.001)
        slots.give_back(wide)
        assert await slots.drained(wide, 0.001)
        assert slots.ready() == [narrow]

    play(story())


@given(st.integers(1, 3), st.lists(st.sampled_from(["add", "take", "take", "give", "suspend", "withdraw", "cancel", "again", "expect"]), max_size=60))
def test_no_instance_is_lost_and_none_is_given_too_often(room: int, events: list[str]) -> None:
    """Whatever happens in whatever order: an instance has room or has not, is away or gone, and nobody waits while one has room."""

    async def story() -> None:
        slots = Slots()
        held: list[Instance] = []
        away: list[Instance] = []
        known: list[Instance] = []
        asking: list[asyncio.Task[Instance]] = []
        for event in events:
            if event == "add":
                known.append(instance(room))
                slots.add(known[-1])
            elif event == "expect":
                (slots.expect_no_more if slots._expected else slots.expect)("somebody")
            elif event == "take":
                asking.append(asyncio.ensure_future(slots.take()))
            elif event == "give" and held:
                slots.give_back(held.pop(0))
            elif event in ("suspend", "withdraw") and known:
                gone = known.pop(0)
                (slots.suspend if event == "suspend" else slots.withdraw)(gone)
                away += [gone] * (event == "suspend")
            elif event == "again" and away:
                known.append(away.pop(0))
                slots.add(known[-1])
            elif event == "cancel" and asking:
                asking.pop().cancel()
            for _ in range(3):
                await asyncio.sleep(0)
            for task in [task for task in asking if task.done()]:
                asking.remove(task)
                if not task.cancelled() and task.exception() is None:
                    held.append(task.result())
            assert slots._busy == Counter(held)
            assert max(slots._busy.values(), default=0) <= room
            assert not (slots._free and slots._waiting)
            assert set(slots.ready()) == set(known)
            assert len(slots._waiting) == len(asking)
            assert not asking or known or away or slots._expected
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)

    play(story())
