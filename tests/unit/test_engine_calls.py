"""Asynchronous calls: accepted at once, made at most once, also over the gateway's end, and their results posted to a function of the same app."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from engine_world import APP, GUARDED, Machine, World, echo, http_answer, play, until, world

from kalium.engine import calls as calls_module
from kalium.engine.calls import BEGUN, CALLBACK, Call
from kalium.engine.limits import BODY_BYTES_MAX, CALLS_AT_ONCE_OF_FUNCTION

CALLBACK_URL = "http://gateway:8080/function/listener"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses are short; what happens between them is the same."""
    monkeypatch.setattr("kalium.engine.calls.CALL_WAIT_PAUSE_SECONDS", 0.002)
    monkeypatch.setattr("kalium.engine.podman.functions.RESTART_PAUSE_SECONDS", (0.0007, 0.0028))


def fields_of(head: str) -> list[tuple[str, str]]:
    return [(name.lower(), value) for name, _, value in (line.partition(": ") for line in head.strip().split("\r\n")[1:])]


class Heard:
    """What the functions saw, by the path that they were asked for."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, list[tuple[str, str]], str]] = []
        self.answer: Callable[[str, str], Awaitable[bytes]] = echo

    async def __call__(self, head: str, body: str) -> bytes:
        self.requests.append((head.partition("\r\n")[0], fields_of(head), body))
        return await self.answer(head, body)

    def callbacks(self) -> list[dict[str, str]]:
        return [{**dict(fields), "": body} for _, fields, body in self.requests if any(name == "x-function-name" for name, _ in fields)]

    def calls(self) -> list[tuple[str, list[tuple[str, str]], str]]:
        return [request for request in self.requests if not any(name == "x-function-name" for name, _ in request[1])]


def files(site: World) -> list[str]:
    return sorted(path.name for path in (site.config.state_dir / "calls").iterdir())


def with_functions(tmp_path: Path, story: Callable[[World, Heard], Awaitable[None]]) -> None:
    """Play a story with the functions `echo` and `listener`."""

    async def played() -> None:
        heard, machine = Heard(), Machine()
        machine.answering = heard
        async with world(tmp_path, machine) as site:
            for name in ("echo", "listener"):
                await site.deploy(name)
                await site.ready(name)
            await story(site, heard)

    play(played())


async def call(site: World, name: str = "echo", tail: str = "", body: bytes = b"hi", **fields: str) -> tuple[int, str, dict[str, str]]:
    return await site.call("POST", f"/async-function/{name}{tail}", body, headers={key.replace("_", "-"): value for key, value in fields.items()})


def test_a_call_is_accepted_and_made_with_what_it_had(tmp_path: Path) -> None:
    async def story(site: World, heard: Heard) -> None:
        token = "ab" * 16
        status, text, headers = await call(site, tail=".openfaas-fn/a%2Fb?c=d", X_Kalium_Token=token, X_Other="o", Connection="X-Hop", X_Hop="1")

        assert (status, text) == (202, "")
        await until(lambda: heard.requests, "the call")
        ((line, fields, body),) = heard.requests
        assert (line, body) == ("POST /a%2Fb?c=d HTTP/1.1", "hi")
        found = dict(fields)
        assert (found["x-kalium-token"], found["x-other"], found["x-call-id"]) == (token, "o", headers["x-call-id"])
        assert "x-hop" not in found
        begun = [int(value) for name, value in fields if name == "x-start-time"]
        assert len(begun) == 2, "when it was accepted, and when it was made"
        assert int(headers["x-start-time"]) == begun[0] < begun[1]
        await until(lambda: not files(site), "the end of its file")
        assert (await site.describe())["invocationCount"] == 1

    with_functions(tmp_path, story)


def test_a_client_with_an_id_of_its_own_keeps_it(tmp_path: Path) -> None:
    async def story(site: World, heard: Heard) -> None:
        _, _, headers = await call(site, X_Call_Id="mine")

        await until(lambda: heard.requests, "the call")
        assert headers["x-call-id"] == dict(heard.requests[0][1])["x-call-id"] == "mine"

    with_functions(tmp_path, story)


def test_the_result_is_posted_to_the_callback_and_nothing_else_of_the_function(tmp_path: Path) -> None:
    async def story(site: World, heard: Heard) -> None:
        async def answer(head: str, body: str) -> bytes:
            sneaky = ("X-Kalium-Token: stolen", "X-Call-Id: other", "X-Function-Status: 200", "Content-Type: text/x-mine", "X-Forwarded-For: 1.1.1.1")
            return http_answer(418, b"result", *sneaky)

        heard.answer = answer
        _, _, headers = await call(site, X_Callback_Url=CALLBACK_URL, X_Kalium_Token="t")

        await until(heard.callbacks, "the callback")
        (called,) = heard.callbacks()
        assert called[""] == "result"
        assert {name: called[name] for name in ("x-call-id", "x-function-name", "x-function-status", "content-type")} == {
            "x-call-id": headers["x-call-id"],
            "x-function-name": "echo",
            "x-function-status": "418",
            "content-type": "text/x-mine",
        }
        assert float(called["x-duration-seconds"]) > 0
        assert "x-kalium-token" not in called, "it is the caller's for the function, and not for the callback"
        assert called["x-forwarded-for"] == "127.0.0.1"
        assert "x-callback-url" not in dict(heard.calls()[0][1])

    with_functions(tmp_path, story)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://gateway:8080/function/",
        "http://gateway/function/listener",
        "https://gateway:8080/function/listener",
        "HTTP://gateway:8080/function/listener",
        "http://Gateway:8080/function/listener",
        "http://127.0.0.1:8080/function/listener",
        "http://gateway:8080/function/listener/path",
        "http://gateway:8080/function/listener?query",
        "http://gateway:8080/function/listener.openfaas-fn",
        "http://gateway:8080/function/../system/functions",
        "http://gateway:8080/async-function/listener",
        "http://gateway:8080//function/listener",
        "http://gateway:8080/function/%6cistener",
        "http://gateway:8080@evil.test/function/listener",
        "http://gateway:8080/function/listener#",
        " http://gateway:8080/function/listener,http://gateway:8080/function/listener",
        "http://gateway:8080/function/absent",
        "http://evil.test/function/listener",
    ],
)
def test_everything_but_the_one_spelling_of_a_callback_is_refused(tmp_path: Path, url: str) -> None:
    async def story(site: World, heard: Heard) -> None:
        assert (await call(site, X_Callback_Url=url))[0] == 400
        assert (files(site), heard.requests) == ([], [])

    with_functions(tmp_path, story)


def test_two_callbacks_are_none(tmp_path: Path) -> None:
    async def story(site: World, heard: Heard) -> None:
        reader, writer = await asyncio.open_connection(*site.listening["address"].split(":"))
        writer.write(f"POST /async-function/echo HTTP/1.1\r\nHost: x\r\n{f'X-Callback-Url: {CALLBACK_URL}' + chr(13) + chr(10)}".encode() * 1)
        writer.write(f"X-Callback-Url: {CALLBACK_URL}\r\nContent-Length: 0\r\n\r\n".encode())
        assert (await reader.readline()).split()[1] == b"400"
        writer.close()

    with_functions(tmp_path, story)


def test_a_callback_stays_within_the_app(tmp_path: Path) -> None:
    """Also when the function under that name is another's by the time the result is there."""

    async def story(site: World, heard: Heard) -> None:
        for name, app in (("mine", "shop"), ("other", "bank")):
            await site.deploy(name, labels=GUARDED, annotations={**APP, "kalium.io/app": app})
            await site.ready(name)
        assert (await call(site, "mine", X_Callback_Url="http://gateway:8080/function/other"))[0] == 400
        assert (await call(site, "mine", X_Callback_Url=CALLBACK_URL))[0] == 400, "a function without an app is not of this one"
        assert (await call(site, "echo", X_Callback_Url="http://gateway:8080/function/mine"))[0] == 400
        assert (await call(site, "mine", X_Callback_Url="http://gateway:8080/function/mine"))[0] == 202
        await until(heard.callbacks, "a callback within the app")

        gate = asyncio.Event()

        async def answer(head: str, body: str) -> bytes:
            await gate.wait()
            return http_answer(200, b"")

        heard.answer = answer
        assert (await call(site, "mine", X_Callback_Url="http://gateway:8080/function/mine"))[0] == 202
        await until(lambda: len(heard.calls()) == 2, "the call")
        await site.deploy("mine", labels=GUARDED, annotations={**APP, "kalium.io/app": "bank"})
        await site.ready("mine")
        gate.set()
        await until(lambda: site.events("callback_failed"), "the refusal")
        assert "of another app" in site.events("callback_failed")[0]["detail"]
        assert len(heard.callbacks()) == 1

    with_functions(tmp_path, story)


def test_a_call_is_for_the_app_that_had_the_function_when_it_was_accepted(tmp_path: Path) -> None:
    """It may wait for an instance, and find another app's under the name; neither that one nor its answer is the client's."""

    async def story(site: World, heard: Heard) -> None:
        await site.deploy("mine", labels=GUARDED, annotations=APP)
        await site.ready("mine")
        gate = asyncio.Event()

        async def answer(head: str, body: str) -> bytes:
            await gate.wait()
            return http_answer(200, b"")

        heard.answer = answer
        assert (await call(site, "mine", body=b"first"))[0] == 202
        await until(heard.calls, "the call")
        assert (await call(site, "mine", body=b"second"))[0] == 202
        await site.deploy("mine", labels=GUARDED, annotations={**APP, "kalium.io/app": "bank"})
        await site.ready("mine")
        gate.set()
        await until(lambda: site.events("call_failed"), "the refusal")
        assert "of another app" in site.events("call_failed")[0]["detail"]
        await until(lambda: not files(site), "the end of both")
        assert [body for _, _, body in heard.calls()] == ["first"]

    with_functions(tmp_path, story)


def test_what_a_client_would_have_been_told_is_the_result(tmp_path: Path) -> None:
    async def story(site: World, heard: Heard) -> None:
        async def answer(head: str, body: str) -> bytes:
            return http_answer(200, b"") if "x-function-name" in head.lower() else b""

        heard.answer = answer
        await call(site, X_Callback_Url=CALLBACK_URL)

        await until(heard.callbacks, "the callback")
        (called,) = heard.callbacks()
        assert (called["x-function-status"], "did not answer" in called[""]) == ("502", True)
        assert site.events("call_failed")[0]["status"] == 502
        assert len(heard.calls()) == 1, "a request that a function may have seen is not sent again"

    with_functions(tmp_path, story)


def test_the_callback_carries_the_token_that_the_callers_guard_got_for_it(tmp_path: Path) -> None:
    """Nobody else sees it: neither the function that is called nor, when the gateway starts again, anybody new."""

    async def story(site: World, heard: Heard) -> None:
        status, _, _ = await call(site, X_Callback_Url=CALLBACK_URL, X_Kalium_Token="a" * 32, X_Kalium_Callback_Token="b" * 32)

        assert status == 202
        await until(heard.callbacks, "the callback")
        (called,), ((_, fields, _),) = heard.callbacks(), heard.calls()
        assert called["x-kalium-token"] == "b" * 32
        assert dict(fields)["x-kalium-token"] == "a" * 32
        assert not any("callback-token" in name or value == "b" * 32 for name, value in fields)
        assert "x-kalium-callback-token" not in called

    with_functions(tmp_path, story)


@pytest.mark.parametrize(
    "fields", [{}, {"X_Callback_Url": CALLBACK_URL, "X_Kalium_Callback_Token": "x" * 513}], ids=["without_a_callback", "too_long"]
)
def test_a_callbacks_token_that_cannot_be_one_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    async def story(site: World, heard: Heard) -> None:
        assert (await call(site, **{"X_Kalium_Callback_Token": "b" * 32, **fields}))[0] == 400
        assert (files(site), heard.requests) == ([], [])

    with_functions(tmp_path, story)


def test_two_tokens_of_a_callback_are_none(tmp_path: Path) -> None:
    async def story(site: World, heard: Heard) -> None:
        reader, writer = await asyncio.open_connection(*site.listening["address"].split(":"))
        writer.write(f"POST /async-function/echo HTTP/1.1\r\nHost: x\r\nX-Callback-Url: {CALLBACK_URL}\r\n".encode())
        writer.write(b"X-Kalium-Callback-Token: a\r\nx-kalium-callback-token: b\r\nContent-Length: 0\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"400"
        writer.close()

    with_functions(tmp_path, story)


def test_a_callback_that_cannot_be_delivered_is_logged(tmp_path: Path) -> None:
    async def story(site: World, heard: Heard) -> None:
        async def answer(head: str, body: str) -> bytes:
            return http_answer(403 if "x-function-name" in head.lower() else 200, b"")

        heard.answer = answer
        await call(site, X_Callback_Url=CALLBACK_URL, X_Call_Id="mine")

        await until(lambda: site.events("callback_failed"), "the log")
        line = site.events("callback_failed")[0]
        assert (line["function"], line["call"], line["status"]) == ("listener", "mine", 403)

    with_functions(tmp_path, story)


def test_only_posts_to_functions_that_are_there_are_accepted(tmp_path: Path) -> None:
    async def story(site: World, heard: Heard) -> None:
        assert (await site.call("GET", "/async-function/echo"))[0] == 405
        assert (await call(site, "absent"))[0] == 404
        assert (await call(site, "echo", tail="", body=bytes(BODY_BYTES_MAX + 1)))[0] == 413
        assert (await site.call("POST", "/async-function/echo", b"x", side="data_address"))[0] == 202
        assert (await site.invoke(headers={"X-Callback-Url": CALLBACK_URL}))[0] == 400, "a synchronous call has its answer"

    with_functions(tmp_path, story)


def test_the_queue_is_bounded_in_calls_and_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "CALLS_MAX", 3)
    monkeypatch.setattr(calls_module, "CALLS_BYTES_MAX", 100)

    async def story(site: World, heard: Heard) -> None:
        gate = asyncio.Event()

        async def answer(head: str, body: str) -> bytes:
            await gate.wait()
            return http_answer(200, b"")

        heard.answer = answer
        assert [(await call(site, body=b"x" * 40))[0] for _ in range(3)] == [202, 202, 503]
        assert [(await call(site))[0] for _ in range(2)] == [202, 503]
        status, text, headers = await call(site)
        assert (status, headers["retry-after"], "wait already" in text) == (503, "1", True)
        gate.set()
        await until(lambda: not files(site), "their end")
        assert (await call(site, body=b"x" * 40))[0] == 202, "what is over makes room"
        await until(lambda: not files(site), "its end")
        assert site.engine.calls._count == site.engine.calls._bytes == 0

    with_functions(tmp_path, story)


def test_a_slow_function_holds_up_its_own_calls_alone(tmp_path: Path) -> None:
    async def story(site: World, heard: Heard) -> None:
        gate = asyncio.Event()

        async def answer(head: str, body: str) -> bytes:
            if body == "slow":
                await gate.wait()
            return http_answer(200, b"")

        heard.answer = answer
        for _ in range(2 * CALLS_AT_ONCE_OF_FUNCTION):
            await call(site, body=b"slow")
        await call(site, "listener", body=b"quick")

        await until(lambda: any(body == "quick" for _, _, body in heard.requests), "the other function's call")
        gate.set()
        await until(lambda: not files(site), "the end of all")
        assert len([body for _, _, body in heard.requests if body == "slow"]) == 2 * CALLS_AT_ONCE_OF_FUNCTION

    with_functions(tmp_path, story)


def test_a_call_waits_for_an_instance_that_is_being_made(tmp_path: Path) -> None:
    async def story(site: World, heard: Heard) -> None:
        await site.call("POST", "/system/scale-function/echo", {"replicas": 0})
        assert (await call(site))[0] == 202
        await asyncio.sleep(0.05)
        assert (heard.requests, len(files(site))) == ([], 1), "nobody has begun it"

        await site.call("POST", "/system/scale-function/echo", {"replicas": 1})

        await until(lambda: heard.requests, "the call")

    with_functions(tmp_path, story)


def test_a_function_that_gets_no_instance_in_time_is_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "CALL_WAIT_SECONDS_MAX", 0.02)

    async def story(site: World, heard: Heard) -> None:
        await site.call("POST", "/system/scale-function/echo", {"replicas": 0})
        await call(site, X_Callback_Url=CALLBACK_URL)

        await until(heard.callbacks, "the callback")
        assert heard.callbacks()[0]["x-function-status"] == "503"

    with_functions(tmp_path, story)


def test_accepted_calls_survive_the_gateway_and_are_made_in_their_order(tmp_path: Path) -> None:
    async def story() -> None:
        machine, heard = Machine(), Heard()
        machine.answering = heard
        async with world(tmp_path, machine) as site:
            await site.deploy()
            await site.ready()
            await site.call("POST", "/system/scale-function/echo", {"replicas": 0})
            for number in range(5):
                assert (await call(site, body=str(number).encode(), X_Call_Id=f"c{number}", X_Kalium_Token="t"))[0] == 202
            await site.call("POST", "/system/scale-function/echo", {"replicas": 0})
        assert heard.requests == []
        record = json.loads((tmp_path / "state" / "functions" / "echo.json").read_text())
        (tmp_path / "state" / "functions" / "echo.json").write_text(json.dumps({**record, "replicas": 1}))

        async with world(tmp_path, machine) as site:
            await until(lambda: len(heard.requests) == 5, "the calls")
            assert [dict(fields)["x-call-id"] for _, fields, _ in heard.requests] == [f"c{number}" for number in range(5)]
            assert {dict(fields)["x-kalium-token"] for _, fields, _ in heard.requests} == {"t"}
            await until(lambda: not files(site), "their end")

    play(story())


def test_what_was_begun_when_the_gateway_was_killed_is_not_made_again(tmp_path: Path) -> None:
    async def story() -> None:
        machine, heard = Machine(), Heard()
        machine.answering = heard
        async with world(tmp_path, machine) as site:
            await site.deploy()
        folder = tmp_path / "state" / "calls"
        for number, suffix in ((7, BEGUN), (8, ""), (9, BEGUN)):
            made = Call(number=number, id=f"c{number}", function="echo", app="", callback="", callback_token="", target="/", fields=[], body=b"b")
            (folder / f"{number:016x}{suffix}").write_bytes(made.encode())
        (folder / ".half").write_bytes(b"")
        (folder / "what").write_bytes(b"junk")
        (folder / f"{10:016x}").write_bytes(b'{"id": "x"}\n')

        async with world(tmp_path, machine) as site:
            await until(lambda: heard.requests, "the call that nobody had begun")
            await until(lambda: len(files(site)) == 2, "its end")
            assert [body for _, _, body in heard.requests] == ["b"]
            assert site.events("call_lost")[0]["detail"].startswith("2 calls had been begun")
            assert len(site.events("call_unreadable")) == 2, "they stay for whoever wants to know"
            assert (await call(site))[0] == 202

    play(story())


def test_what_was_begun_is_finished_before_the_gateway_ends(tmp_path: Path) -> None:
    async def story() -> None:
        machine, heard, gate = Machine(), Heard(), asyncio.Event()

        async def answer(head: str, body: str) -> bytes:
            await gate.wait()
            return http_answer(200, b"done")

        heard.answer, machine.answering = answer, heard
        async with world(tmp_path, machine) as site:
            for name in ("echo", "listener"):
                await site.deploy(name)
                await site.ready(name)
            await call(site, X_Callback_Url=CALLBACK_URL)
            await until(lambda: heard.requests, "the call")
            site.engine.stop()
            await until(lambda: site.events("stopping"), "the end to begin")
            gate.set()
        assert [called[""] for called in heard.callbacks()] == ["done"]
        assert list((tmp_path / "state" / "calls").iterdir()) == []

    play(story())


def test_a_call_that_does_not_end_in_time_is_lost_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls_module, "CALLS_DRAIN_SECONDS_MAX", 0.02)

    async def story() -> None:
        machine, heard = Machine(), Heard()

        async def answer(head: str, body: str) -> bytes:
            await asyncio.sleep(3600)
            return b""

        heard.answer, machine.answering = answer, heard
        async with world(tmp_path, machine) as site:
            await site.deploy()
            await site.ready()
            await call(site, X_Call_Id="begun")
            await until(lambda: heard.requests, "the call")
            for _ in range(3):
                await call(site, X_Call_Id="waits")
        assert [line["call"] for line in site.events("call_lost")] == ["begun"]
        assert len(list((tmp_path / "state" / "calls").iterdir())) == 3, "what no instance was held for is for the next gateway"

    play(story())


def test_a_call_that_cannot_be_written_down_is_not_accepted(tmp_path: Path) -> None:
    async def story(site: World, heard: Heard) -> None:
        (site.config.state_dir / "calls").rmdir()

        assert (await call(site))[0] == 500

        assert site.engine.calls._count == site.engine.calls._bytes == 0
        assert heard.requests == []

    with_functions(tmp_path, story)


def test_a_call_whose_beginning_cannot_be_written_down_is_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(site: World, heard: Heard) -> None:
        def full(journal: Any, call: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("kalium.engine.calls.Journal.begin", full)
        await call(site, X_Callback_Url=CALLBACK_URL)

        await until(heard.callbacks, "the callback")
        assert (heard.callbacks()[0]["x-function-status"], heard.calls()) == ("500", [])
        assert (await site.invoke())[0] == 200, "the instance is free again"

    with_functions(tmp_path, story)


def test_the_spelling_is_that_of_a_function() -> None:
    match = CALLBACK.fullmatch("http://gateway:8080/function/product-photos-1-assign")
    assert match is not None
    assert match[1] == "product-photos-1-assign"
    assert not CALLBACK.fullmatch("http://gateway:8080/function/" + "a" * 64)
