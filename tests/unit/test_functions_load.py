"""The load function of E2: what it sends leaves by the system call that was asked for, whole, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from functions_world import ImageWorld, load, running, served, write_files

PICTURE = b"x" * 100_000


class Callee(BaseHTTPRequestHandler):
    """A gateway that answers every invoke; its server keeps the requests."""

    protocol_version = "HTTP/1.1"
    closes = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        head = len(f"{self.requestline}\r\n") + sum(len(f"{name}: {value}\r\n") for name, value in self.headers.items()) + 2
        self.server.heads.append((self.path, head, body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Length", "2")
        if self.closes:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


class World:
    """A served load function, an image server and a gateway."""

    def __init__(self, load_url: str, images: ImageWorld, gateway: ThreadingHTTPServer, handler: Any) -> None:
        self.load_url, self.images, self.gateway, self.handler = load_url, images, gateway, handler

    def call(self, **changes: Any) -> tuple[int, dict[str, Any]]:
        invoke = changes.get("workload") == "invoke"
        url = f"http://127.0.0.1:{self.gateway.server_address[1]}/function/e2-callee" if invoke else self.images.url
        body = {"workload": "https-get", "call": "write", "count": 3, "bytes": 1024, "url": url, **changes}
        request = urllib.request.Request(self.load_url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    watchdog, handler = load(write_files("e2-load", tmp_path))
    images, gateway = ImageWorld(tmp_path, PICTURE), ThreadingHTTPServer(("127.0.0.1", 0), Callee)
    gateway.heads = []  # type: ignore[attr-defined]
    with running(images), running(gateway), contextlib.ExitStack() as stack:
        yield World(stack.enter_context(served(watchdog, handler.handle)), images, gateway, handler)


@pytest.fixture
def sends(world: World, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each call was made by the load function."""
    made: Counter[str] = Counter()

    def counted(name: str, call: Any) -> Any:
        def count(connection: socket.socket, data: bytes) -> int:
            made[name] += 1
            return int(call(connection, data))

        return count

    monkeypatch.setattr(world.handler, "SENDS", {name: counted(name, call) for name, call in world.handler.SENDS.items()})
    return made


@pytest.mark.parametrize("call", ["write", "sendto", "sendmsg"])
def test_requests_under_tls_leave_by_the_chosen_call_on_one_connection(world: World, sends: Counter[str], call: str) -> None:
    status, answer = world.call(call=call, count=5)

    assert (status, answer["sent"], answer["connections"], answer["answer_bytes"]) == (200, 5, 1, 5 * len(PICTURE))
    assert answer["tls"] == "TLSv1.3"
    assert world.images.paths == ["/image.jpg"] * 5
    assert set(sends) == {call} and 5 + 2 <= sends[call] <= 5 + 3  # the handshake's flights, and each request once


def test_each_call_is_the_system_call_of_its_name(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    write = os.write

    def noted(descriptor: int, data: bytes) -> int:
        seen.append("write")
        return write(descriptor, data)

    monkeypatch.setattr(world.handler.os, "write", noted)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert world.handler.SENDS["write"](ours, b"abc") == 3
        assert world.handler.SENDS["sendto"](ours, b"de") == 2
        assert world.handler.SENDS["sendmsg"](ours, b"f") == 1
        assert theirs.recv(10) == b"abcdef"
    assert seen == ["write"]


@pytest.mark.parametrize("call", ["write", "sendto", "sendmsg"])
def test_an_invoke_has_a_head_of_the_asked_size_and_is_one_send(world: World, sends: Counter[str], call: str) -> None:
    status, answer = world.call(workload="invoke", call=call, count=4, bytes=700)

    assert (status, answer["sent"], answer["connections"], answer["tls"]) == (200, 4, 1, "")
    assert world.gateway.heads == [("/function/e2-callee", 700, b"{}")] * 4  # type: ignore[attr-defined]
    assert sends == {call: 4}


def test_a_gateway_that_closes_gets_a_connection_for_each_request(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Callee, "closes", True)

    assert world.call(workload="invoke")[1]["connections"] == 3


def test_fresh_connections_are_opened_when_asked_for(world: World) -> None:
    assert world.call(fresh=True)[1]["connections"] == 3
    assert world.images.connections == 3


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"call": "sendfile"}, "no `call`"),
        ({"workload": "mail"}, "no `call`"),
        ({"count": 0}, "`count` is no number from 1 to 256"),
        ({"count": 257}, "`count` is no number from 1 to 256"),
        ({"bytes": True}, "`bytes` is no number"),
        ({"bytes": 20}, "too small"),
    ],
)
def test_an_input_that_says_too_little_or_too_much_is_refused(world: World, changes: dict[str, Any], found: str) -> None:
    status, answer = world.call(**changes)

    assert status == 400 and found in answer["error"]


def test_a_wrong_answer_and_a_dead_server_are_failures(world: World) -> None:
    assert world.call(url=world.images.url.replace("image.jpg", "none"))[0] == 502

    status, answer = world.call(url="https://127.0.0.1:1/image.jpg")

    assert status == 502 and "request 1 of 3" in answer["error"]
