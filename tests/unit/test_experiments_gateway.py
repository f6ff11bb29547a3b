"""The API client and the basic test, against a gateway of this test that keeps functions in a dictionary."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from experiments.errors import ExperimentError
from experiments.gateway import Function, Gateway

USER, PASSWORD = "admin", "right"


class FakeGateway(ThreadingHTTPServer):
    """Functions become available when they were described `slowness` times."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.functions: dict[str, dict[str, Any]] = {}
        self.described: dict[str, int] = {}
        self.slowness = 2


class Handler(BaseHTTPRequestHandler):
    """The few calls that the client makes."""

    server: FakeGateway

    def reply(self, status: int, document: Any = None) -> None:
        body = b"" if document is None else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def is_allowed(self) -> bool:
        allowed = self.headers["Authorization"] == Gateway("http://x", USER, PASSWORD)._authorization
        if not allowed:
            self.reply(401)
        return allowed

    def do_GET(self) -> None:
        if not self.is_allowed():
            return
        name = self.path.partition("?")[0].rpartition("/")[2]
        if self.path == "/system/functions":
            self.reply(200, [{"name": name} for name in self.server.functions])
        elif name not in self.server.functions:
            self.reply(404)
        else:
            count = self.server.described[name] = self.server.described.get(name, 0) + 1
            annotations = {"kalium.io/address": "10.137.0.10:8080,10.137.0.11:8080"}
            self.reply(200, {"name": name, "availableReplicas": int(count > self.server.slowness), "annotations": annotations})

    def do_POST(self) -> None:
        if self.path.startswith("/function/"):
            self.reply(200, {"path": self.path, "call": self.headers["X-Call-Id"], "body": self.body()})
        elif self.is_allowed():
            deployment = self.body()
            if deployment["image"] == "absent":
                self.reply(400, {"error": "no such image"})
            else:
                self.server.functions[deployment["service"]] = deployment
                self.reply(202)

    def do_DELETE(self) -> None:
        if self.is_allowed():
            self.reply(202 if self.server.functions.pop(self.body()["functionName"], None) else 404)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def fake() -> Iterator[FakeGateway]:
    with FakeGateway() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def gateway(fake: FakeGateway, password: str = PASSWORD) -> Gateway:
    return Gateway(f"http://127.0.0.1:{fake.server_address[1]}", USER, password)


def test_functions_are_deployed_together_and_waited_for(fake: FakeGateway) -> None:
    functions = [
        Function("a", "image-a", {"kalium.io/runtime": "kalium"}, {"kalium.io/app": "app"}, {"DB_HOST": "database"}),
        Function("b", "image-b"),
    ]

    seconds = gateway(fake).deploy_all(functions)

    assert seconds > 0 and gateway(fake).functions() == ["a", "b"]
    assert fake.functions["a"] == {
        "service": "a", "image": "image-a", "labels": {"kalium.io/runtime": "kalium"}, "annotations": {"kalium.io/app": "app"},
        "envVars": {"DB_HOST": "database"},
    }  # fmt: skip
    assert all(count > fake.slowness for count in fake.described.values())


def test_a_function_that_is_never_ready_is_an_error_with_its_name(fake: FakeGateway) -> None:
    fake.slowness = 10**6
    gateway(fake).deploy(Function("slow", "image"))

    with pytest.raises(ExperimentError, match="wait for an instance of slow"):
        gateway(fake).wait_ready("slow", seconds_max=0.3)


def test_removing_what_is_not_there_is_no_error(fake: FakeGateway) -> None:
    gateway(fake).deploy(Function("a", "image"))

    gateway(fake).remove_all(["a", "b"])

    assert gateway(fake).functions() == []


def test_a_refused_deployment_says_what_the_gateway_said(fake: FakeGateway) -> None:
    with pytest.raises(ExperimentError, match="no such image"):
        gateway(fake).deploy(Function("a", "absent"))


def test_a_wrong_password_names_the_next_step(fake: FakeGateway) -> None:
    with pytest.raises(ExperimentError) as caught:
        gateway(fake, "wrong").functions()

    assert "password" in caught.value.next_step


def test_a_gateway_that_is_not_there_is_named() -> None:
    with pytest.raises(ExperimentError, match=r"GET http://127\.0\.0\.1:1/system/functions"):
        Gateway("http://127.0.0.1:1", USER, PASSWORD).functions()


def test_an_invocation_carries_path_body_and_call_and_any_status_is_an_answer(fake: FakeGateway) -> None:
    answer = gateway(fake).invoke("master", {"a": 1}, path="/photos", call_id="call-7")

    assert json.loads(answer.body) == {"path": "/function/master/photos", "call": "call-7", "body": {"a": 1}}


def test_the_address_of_an_instance_is_the_engines_to_tell(fake: FakeGateway) -> None:
    gateway(fake).deploy(Function("a", "image"))

    assert gateway(fake).instance_address("a") == "10.137.0.10:8080"
    assert gateway(fake).instance_address("none") is None
