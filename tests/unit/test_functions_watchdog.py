"""The server in front of a handler: requests, limits, errors, and an end that loses no answer."""

from __future__ import annotations

import http.client
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from functions_world import served
from loopback import free_port

from kalium.builder.stack import TEMPLATE

watchdog = importlib.import_module("kalium.builder.template.watchdog")
READY_SECONDS_MAX = 30.0


def handle(event: Any) -> object:
    """Does what the path says."""
    if event.path == "/broken":
        raise ValueError("nobody expected this")
    if event.path == "/refused":
        raise watchdog.Failure(418, "not this one")
    answers: dict[str, Any] = {"/text": "grüße", "/bytes": b"\x00\xff", "/none": None, "/unwritable": object()}
    if event.path in answers:
        return answers[event.path]
    return {"method": event.method, "path": event.path, "query": event.query, "body": event.body, "label": event.headers.get("x-label")}


@pytest.fixture
def client() -> Iterator[http.client.HTTPConnection]:
    with served(watchdog, handle) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=READY_SECONDS_MAX)
        yield connection
        connection.close()


def ask(client: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str, bytes]:
    client.request(method, path, body=body, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = client.getresponse()
    return answer.status, answer.headers["Content-Type"], answer.read()


def test_health_is_answered_without_the_handler(client: http.client.HTTPConnection) -> None:
    assert ask(client, "GET", "/_/health") == (200, "text/plain; charset=utf-8", b"OK")


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_the_handler_sees_the_request(method: str, client: http.client.HTTPConnection) -> None:
    status, content_type, body = ask(client, method, "/a/b?x=1&x=2&y=", b'{"k":[1]}', Content_Type="application/json", X_Label="L")

    assert (status, content_type) == (200, "application/json")
    assert json.loads(body) == {"method": method, "path": "/a/b", "query": {"x": ["1", "2"], "y": [""]}, "body": {"k": [1]}, "label": "L"}


@pytest.mark.parametrize(
    ("content_type", "payload", "seen"),
    [
        ("application/json", b"[1]", [1]),
        ("application/x-www-form-urlencoded", b'{"a":1}', {"a": 1}),
        ("application/x-www-form-urlencoded", b"a=1", "a=1"),
        ("text/plain", b'{"a":1}', '{"a":1}'),
        ("", b"", None),
        ("application/octet-stream", "ü".encode(), "ü"),
    ],
)
def test_a_body_is_json_where_it_is_json(content_type: str, payload: bytes, seen: Any, client: http.client.HTTPConnection) -> None:
    _, _, body = ask(client, "POST", "/", payload, Content_Type=content_type)

    assert json.loads(body)["body"] == seen


def test_bytes_that_are_no_text_reach_the_handler_as_bytes() -> None:
    assert watchdog.body_of(b"\xff\xfe", "image/jpeg") == b"\xff\xfe"


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/text", (200, "text/plain; charset=utf-8", "grüße".encode())),
        ("/bytes", (200, "application/octet-stream", b"\x00\xff")),
        ("/none", (200, "application/json", b"null")),
        ("/refused", (418, "application/json", b'{"error":"not this one"}')),
        ("/broken", (500, "application/json", b'{"error":"ValueError: nobody expected this"}')),
        ("/unwritable", (500, "application/json", b'{"error":"TypeError: Object of type object is not JSON serializable"}')),
    ],
)
def test_what_a_handler_returns_or_raises_is_the_answer(path: str, answer: Any, client: http.client.HTTPConnection) -> None:
    assert ask(client, "POST", path) == answer
    assert ask(client, "GET", "/_/health")[0] == 200, "the same connection goes on"


def test_announced_json_that_is_none_is_the_clients_error(client: http.client.HTTPConnection) -> None:
    status, _, body = ask(client, "POST", "/", b"{", Content_Type="application/json; charset=utf-8")

    assert status == 400
    assert b"no JSON" in body


def test_a_connection_is_used_again(client: http.client.HTTPConnection) -> None:
    ask(client, "POST", "/", b"1")
    first = client.sock

    ask(client, "POST", "/", b"2")

    assert client.sock is first


def raw(url: str, request: bytes) -> bytes:
    """Everything that the server answers to these bytes until it closes."""
    with socket.create_connection((urlsplit(url).hostname, urlsplit(url).port or 0), timeout=READY_SECONDS_MAX) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1048577\r\n\r\n", b"413"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", b"411"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"411"),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n", b"411"),
        (b"POST / HTTP/1.1 \xff x\r\n\r\n", b"400"),
        (b"BREW / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", b"501"),
    ],
)
def test_a_request_whose_end_is_unknown_is_refused_and_the_connection_closed(request_: bytes, status: bytes) -> None:
    with served(watchdog, handle) as url:
        answer = raw(url, request_)

        assert answer.split(b" ")[1] == status
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]


def test_connections_beyond_the_bound_are_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "CONNECTIONS_MAX", 2)
    with served(watchdog, handle) as url:
        held = [http.client.HTTPConnection(urlsplit(url).netloc, timeout=READY_SECONDS_MAX) for _ in range(2)]
        for connection in held:
            assert ask(connection, "GET", "/_/health")[0] == 200

        refused = http.client.HTTPConnection(urlsplit(url).netloc, timeout=READY_SECONDS_MAX)
        with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
            ask(refused, "GET", "/_/health")

        held.pop().close()
        deadline = time.monotonic() + READY_SECONDS_MAX
        while True:
            try:
                status = ask(refused, "GET", "/_/health")[0]
                break
            except (http.client.RemoteDisconnected, ConnectionError):
                assert time.monotonic() < deadline, "a closed connection's place is free again"
                refused.close()
        assert status == 200
        for connection in (*held, refused):
            connection.close()


HANDLER = """
import pathlib, time
def handle(event):
    pathlib.Path(event.body).touch()
    time.sleep(0.5)
    return "done"
"""


def test_a_function_that_is_told_to_stop_answers_what_it_has_begun(tmp_path: Path) -> None:
    """SIGTERM during a request: its answer comes whole, idle connections do not delay the end, the exit status is 0."""
    for path in TEMPLATE.glob("*.py"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "handler.py").write_text(HANDLER)
    port = free_port()
    process = subprocess.Popen([sys.executable, str(tmp_path)], env={**os.environ, "PORT": str(port)})
    try:
        idle = http.client.HTTPConnection("127.0.0.1", port, timeout=READY_SECONDS_MAX)
        deadline = time.monotonic() + READY_SECONDS_MAX
        while True:
            try:
                assert ask(idle, "GET", "/_/health")[0] == 200
                break
            except ConnectionError:
                assert time.monotonic() < deadline, "the function listens"
                idle.close()
                time.sleep(0.02)
        answers: list[Any] = []
        busy = http.client.HTTPConnection("127.0.0.1", port, timeout=READY_SECONDS_MAX)
        begun = tmp_path / "begun"
        thread = threading.Thread(target=lambda: answers.append(ask(busy, "POST", "/", str(begun).encode(), Content_Type="text/plain")))
        thread.start()
        while not begun.exists():
            assert time.monotonic() < deadline, "the request has reached the handler"
            time.sleep(0.01)

        process.send_signal(signal.SIGTERM)

        assert process.wait(READY_SECONDS_MAX) == 0
        thread.join(READY_SECONDS_MAX)
        assert answers == [(200, "text/plain; charset=utf-8", b"done")]
        with pytest.raises(ConnectionError):
            ask(http.client.HTTPConnection("127.0.0.1", port, timeout=5), "GET", "/_/health")
    finally:
        process.kill()
        process.wait()
