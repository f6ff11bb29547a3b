"""Invocations from sandbox to sandbox, with a real controller and the test in the gateway's place: tokens, callbacks, retries, joins, fail modes."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from .lab import UNTIL_TOLD, Answer, Lab, Sandbox, exchange, until
from .world import GATEWAY, Receiver, http_answer

POLICY = """\
schema: kalium/v1
app: {app}
version: 1
mode: enforce
on_unavailable: {{app_edge: {fail}, deadline_ms: {deadline_ms}}}
peers:
  gateway: {{host: gateway.test, port: 8080, protocol: http, role: gateway}}
entries: [caller, entry]
functions:
  caller:
    messages:
      - choice:
          - {{invoke: callee}}
          - {{invoke: callee, async: true, callback: result}}
          - {{invoke: flaky, retries: 1}}
          - [{{invoke: joined, join: answered}}, {{invoke: callee}}]
  entry: {{messages: []}}
  callee: {{messages: []}}
  result: {{messages: []}}
  flaky: {{messages: []}}
  joined: {{messages: []}}
"""
# What the program writes is what `fields` says, to the byte.
INVOKE = """
import socket
s = socket.create_connection(("10.199.0.1", 8080), 30)
s.sendall((f"POST {path} HTTP/1.1\\r\\nHost: gateway.test:8080\\r\\nContent-Length: 2\\r\\n" + said + "\\r\\n{}").encode())
result = s.recv(1000).decode()
s.close()
"""
FORGED = "0123456789abcdef" * 2
FIELDS = "result = [[name.lower(), value] for name, value in fields]"
TOKEN = re.compile(rb"\r\nX-Kalium-Token: ([0-9a-f]{32})\r\n")
CALLBACK_TOKEN = re.compile(rb"\r\nX-Kalium-Callback-Token: ([0-9a-f]{32})\r\n")


def laboratory(fail: str, deadline_ms: int) -> Lab:
    return Lab({app: POLICY.format(app=app, fail=fail, deadline_ms=deadline_ms) for app in ("lab", "other")}, {"gateway.test": GATEWAY})


class Gateway(Receiver):
    """Answers every request, but for the `lost` next ones, whose connections it ends without a byte."""

    def __init__(self, lab: Lab) -> None:
        self.lost = 0
        super().__init__(lab.world, GATEWAY, 8080, answer=self._say)

    def _say(self, kept: bytes) -> bytes:
        said = http_answer(kept)
        if said and self.lost:
            self.lost -= 1
            raise ConnectionError
        return said


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[Lab, Gateway]]:
    with laboratory("deny", 60_000) as lab, contextlib.closing(Gateway(lab)) as gateway:
        yield lab, gateway


@pytest.fixture
def lab(site: tuple[Lab, Gateway]) -> Lab:
    return site[0]


@pytest.fixture
def gateway(site: tuple[Lab, Gateway]) -> Gateway:
    site[1].clear()
    return site[1]


def invoke(sandbox: Sandbox, path: str, said: str = "") -> dict[str, Any]:
    return sandbox.python(INVOKE, path=path, said=said)


def said_token(received: bytes, pattern: re.Pattern[bytes] = TOKEN) -> str:
    """The one token that left."""
    found = pattern.findall(received)
    assert len(found) == 1, received
    return str(found[0].decode())


def ask(sandbox: Sandbox, token: str, code: str = FIELDS) -> Answer:
    return sandbox.request({"python": code}, headers={"X-Kalium-Token": token})


def reason(answer: Answer) -> str:
    return f"{answer.status} {json.loads(answer.body)['error']}"


def test_a_token_is_the_guards_own_and_starts_one_function_once(lab: Lab, gateway: Gateway) -> None:
    forged = "".join(f"{name}: {FORGED}\r\n" for name in ("X-Kalium-Token", "x-kalium-token", "X-KALIUM-TOKEN", "X-Kalium-Callback-Token"))
    with (
        lab.sandbox("lab", "caller") as caller,
        lab.sandbox("lab", "callee") as callee,
        lab.sandbox("lab", "entry") as entry,
        lab.sandbox("other", "callee") as strange,
    ):
        assert "200 OK" in invoke(caller, "/function/callee", forged)["result"]
        token = said_token(gateway.received)
        assert FORGED.encode() not in gateway.received

        altered = ("1" if token[0] == "0" else "0") + token[1:]
        body = b'{"python": "result = 1"}'
        head = f"POST / HTTP/1.1\r\nHost: f\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
        for other, said in ((callee, altered), (callee, token.upper() + " "), (entry, token), (strange, token)):
            assert reason(ask(other, said)) == "403 bad_token"
        for fields in (
            f"X-Kalium-Token: {token}\r\nx-kalium-token: {token}\r\n",
            f"X-Kalium-Token: {token}, {token}\r\n",
            f"X-KALIUM-TOKEN:\r\nX-Kalium-Token: {token}\r\n",
        ):
            assert reason(exchange(lab.world, callee.address, f"{head}{fields}\r\n".encode() + body, 10)) == "403 bad_token"
        for fields in (
            f"X-Any: a\r\n X-Kalium-Token: {token}\r\n",
            f"X_Kalium_Token: {token}\r\n",
            f"X-Kalium-Token : {token}\r\n",
        ):
            assert reason(exchange(lab.world, callee.address, f"{head}{fields}\r\n".encode() + body, 10)) == "403 malformed"
        assert reason(exchange(lab.world, callee.address, f"{head}\r\n".replace("/ ", f"/?X-Kalium-Token={token} ", 1).encode() + body, 10)) == (
            "403 not_an_entry"
        )
        assert exchange(lab.world, callee.address, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 10).status == 403

        # None of that has spent it.
        answer = ask(callee, token)
        assert answer.status == 200, answer
        assert not [name for name, value in answer.job["result"] if "kalium" in name or token in value]
        assert reason(ask(callee, token)) == "403 bad_token"
        assert {f"{record['kind']} {record['reason']}" for record in callee.verdicts() if record["allowed"]} == {"start allowed"}


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/function/callee?x-kalium-token=" + FORGED, ""),
        ("/function/callee/" + FORGED, ""),
        ("/function/callee.other", ""),
        ("/function//callee", ""),
        ("/function/%63allee", ""),
        ("/system/functions", ""),
        ("/function/callee", "X-Callback-Url: http://10.199.0.2/\r\n"),
        ("/async-function/callee", "x-callback-url: http://gateway.test:8080/function/entry\r\n"),
        ("/function/callee", f"X_Kalium_Token: {FORGED}\r\n"),
        ("/function/callee", f"X-Any: a\r\n X-Kalium-Token: {FORGED}\r\n"),
        ("/function/callee", "Connection: X-Kalium-Token\r\n"),
    ],
)
def test_nothing_else_reaches_the_gateway(lab: Lab, gateway: Gateway, path: str, said: str) -> None:
    with lab.sandbox("lab", "caller") as caller:
        assert invoke(caller, path, said).get("error") == "PermissionError"
    assert gateway.received == b""


def test_a_callback_is_the_policys_and_has_a_token_of_its_own(lab: Lab, gateway: Gateway) -> None:
    with lab.sandbox("lab", "caller") as caller, lab.sandbox("lab", "callee") as callee, lab.sandbox("lab", "result") as result:
        assert "200 OK" in invoke(caller, "/async-function/callee")["result"]
        token, callback = said_token(gateway.received), said_token(gateway.received, CALLBACK_TOKEN)
        assert gateway.received.count(b"\r\nX-Callback-Url: http://gateway.test:8080/function/result\r\n") == 1

        assert reason(ask(callee, callback)) == "403 bad_token"
        assert ask(callee, token).status == 200
        assert reason(ask(result, token)) == "403 bad_token"
        assert ask(result, callback).status == 200
        assert reason(ask(result, callback)) == "403 bad_token"


def test_a_retry_has_a_new_token_and_takes_the_old_one_back(lab: Lab, gateway: Gateway) -> None:
    gateway.lost = 1
    with lab.sandbox("lab", "caller") as caller, lab.sandbox("lab", "flaky") as flaky:
        twice = INVOKE.replace("s.close()", "s.close()\nassert result == ''") + INVOKE
        assert "200 OK" in caller.python(twice, path="/function/flaky", said="")["result"]
        old, new = (token.decode() for token in TOKEN.findall(gateway.received))
        assert old != new
        assert [record["judging"] for record in caller.verdicts() if record["kind"] == "invoke"] == ["", "retry"]

        assert reason(ask(flaky, old)) == "403 bad_token"
        assert ask(flaky, new).status == 200


@pytest.fixture(params=["deny", "allow", "last_known"])
def failing(request: pytest.FixtureRequest) -> Iterator[tuple[str, Lab]]:
    with laboratory(request.param, 2000) as lab:
        yield request.param, lab


def test_when_the_controller_is_gone_the_fail_mode_decides(failing: tuple[str, Lab]) -> None:
    fail, lab = failing
    with (
        contextlib.closing(Gateway(lab)) as gateway,
        lab.sandbox("lab", "caller") as caller,
        lab.sandbox("lab", "joined") as callee,
        lab.sandbox("lab", "entry") as entry,
    ):
        invoke(caller, "/function/joined")
        job: dict[str, Answer] = {}
        working = threading.Thread(target=lambda: job.update(answer=ask(callee, said_token(gateway.received), UNTIL_TOLD)))
        working.start()
        until(lambda: any(record["function"] == "joined" and record["kind"] == "start" for record in lab.verdicts()), "the start")
        lab.stop("controller")
        callee.go_on()
        working.join(60)

        # The end of an answer that a join waits for.
        assert bool(job["answer"].body) == (fail != "deny"), job
        verdict = callee.verdicts()[-1]
        assert (verdict["kind"], verdict["fail_mode"], verdict["allowed"]) == ("incoming", fail, fail != "deny")

        gateway.clear()
        answers = {name: sandbox.request({"python": FIELDS}) for name, sandbox in {"entry": entry, "callee": callee}.items()}
        if fail == "deny":
            assert {name: reason(answer) for name, answer in answers.items()} == dict.fromkeys(answers, "503 controller_unavailable")
            return
        assert {name: answer.status for name, answer in answers.items()} == {"entry": 200, "callee": 200}
        assert "200 OK" in invoke(caller, "/function/callee", f"X-Kalium-Token: {FORGED}\r\n")["result"]
        assert b"kalium" not in gateway.received.lower()
        assert {record["fail_mode"] for record in caller.verdicts()[-2:]} == {fail}
        # The function's own CFG holds all the same.
        assert invoke(caller, "/function/entry").get("error") == "PermissionError"
