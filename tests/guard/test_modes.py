"""Modes of one running sandbox, switched by signed policies without a restart; and what goes on when the agent is gone."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from .lab import UNTIL_TOLD, Lab, Sandbox, until
from .world import Receiver, http_answer

POLICY = """\
schema: kalium/v1
app: lab
version: {version}
mode: {mode}
on_unavailable: {{app_edge: deny, deadline_ms: 60000}}
peers:
  web: {{host: web.test, port: 80, protocol: http}}
entries: [caller]
functions:
  caller:
    mode: {function}
    messages:
      - {{http: GET, peer: web, path: /allowed}}
"""
REQUEST = """
import socket
s = socket.create_connection(("10.199.0.2", 80), 30)
s.sendall(f"GET /{path} HTTP/1.1\\r\\nHost: web.test\\r\\n\\r\\n".encode())
result = s.recv(100).decode()
s.close()
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab({"lab": POLICY.format(version=1, mode="enforce", function="enforce")}, {"web.test": "10.199.0.2"}) as lab:
        yield lab


def put_in_force(sandbox: Sandbox, version: int, mode: str, function: str) -> None:
    """Sign a version, and ask the sandbox until its own verdicts say that it judges by it; in mode off it says nothing."""
    sandbox.lab.sign("lab", POLICY.format(version=version, mode=mode, function=function))

    def judged_by_it() -> bool:
        sandbox.python("result = 1")
        versions = [record["policy_version"] for record in sandbox.verdicts()]
        return version in versions or (function == "off" and versions == [])

    until(judged_by_it, f"version {version} in the sandbox")


def passes(sandbox: Sandbox, web: Receiver, path: str) -> bool:
    """Whether a request arrives; the program's own view of it has to agree."""
    web.clear()
    job = sandbox.python(REQUEST, path=path)
    arrived = f"GET /{path} ".encode() in web.received
    assert arrived == ("200 OK" in str(job.get("result"))), (job, web.received)
    return arrived


def test_modes_change_while_the_sandbox_runs(lab: Lab) -> None:
    web = Receiver(lab.world, lab.world.address(2), 80, answer=http_answer)
    with lab.sandbox("lab", "caller") as sandbox:
        process = sandbox.process.pid
        assert passes(sandbox, web, "allowed")
        assert not passes(sandbox, web, "refused")

        put_in_force(sandbox, 2, "enforce", "audit")  # of the function alone
        sandbox.verdicts()
        assert passes(sandbox, web, "refused")
        assert sandbox.denials() == ["http not_in_policy"]

        put_in_force(sandbox, 3, "enforce", "off")
        sandbox.verdicts()
        assert passes(sandbox, web, "refused")
        assert sandbox.verdicts() == []

        put_in_force(sandbox, 4, "learn", "learn")
        assert passes(sandbox, web, "refused")

        put_in_force(sandbox, 5, "learn", "enforce")
        assert not passes(sandbox, web, "refused")
        assert passes(sandbox, web, "allowed")
        assert sandbox.process.pid == process
        assert sandbox.process.poll() is None
    web.close()


def test_a_policy_that_is_older_or_damaged_changes_nothing(lab: Lab) -> None:
    web = Receiver(lab.world, lab.world.address(2), 80, answer=http_answer)
    with lab.sandbox("lab", "caller") as sandbox:
        put_in_force(sandbox, 2, "enforce", "enforce")
        signed = lab.folder / "policies" / "lab.signed.json"
        good = signed.read_text(encoding="utf-8")
        signed.write_text(re.sub(r'"signature":"....', '"signature":"AAAA', good), encoding="utf-8")
        until(lambda: "refused" in (lab.folder / "controller.log").read_text(), "a refusal")
        assert not passes(sandbox, web, "refused")
        assert passes(sandbox, web, "allowed")
        assert lab.version("lab") == 2
    web.close()


def test_without_an_agent_local_decisions_go_on_and_the_instance_asks_to_be_replaced(lab: Lab) -> None:
    web = Receiver(lab.world, lab.world.address(2), 80, answer=http_answer)
    with lab.sandbox("lab", "caller") as sandbox:
        # The agent dies inside of the invocation: its messages are judged by the policy in the sandbox.
        code = UNTIL_TOLD + REQUEST
        job: dict[str, Any] = {}

        def ask() -> None:
            job.update(sandbox.python(code, path="allowed"))

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: any(record["kind"] == "start" for record in lab.verdicts()), "the start")
        lab.stop("agent")
        sandbox.go_on()
        thread.join(60)
        assert "200 OK" in str(job.get("result")), job
        assert b"GET /allowed " in web.received

        answer = sandbox.request({"python": "result = 1"})
        assert answer.status == 503
        assert json.loads(answer.body)["error"] == "retired"
        assert not sandbox.healthy()
    web.close()
