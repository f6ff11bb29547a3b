"""The controller as a process, with real TLS on loopback: who gets in, what survives, and how it ends.

Everything runs with uvloop and with asyncio's own loop where the shell could behave differently.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, cast

import pytest
from controller_samples import compiled
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import NameOID

from kalium.cli.main import main
from kalium.controller import server, tls
from kalium.controller.calls import Deferred
from kalium.controller.client import status
from kalium.controller.config import TlsFiles, load
from kalium.controller.dispatch import STATUS_KEPT_NS
from kalium.controller.server import INCOMING_BYTES, KEPT_BYTES_MAX, TURN_BYTES, BusyPoll, Connection, Controller, Door
from kalium.errors import KaliumError
from kalium.pki import authority, files
from kalium.pki.authority import Role
from kalium.pki.files import CaStep
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.envelope import sign
from kalium.protocol.frames import (
    AgentHello,
    Answer,
    ControllerWelcome,
    Frame,
    InstanceEnd,
    InstanceInvoke,
    InstanceStart,
    Lease,
    Ping,
    Policy,
    Register,
    Report,
    Status,
    StatusAnswer,
)
from kalium.protocol.limits import WRITE_BUFFER_BYTES_MAX
from kalium.protocol.session import ControllerSession, Event

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 20.0
RUN = "00f1e2d3c4b5a697"
FRONT = ("c-front", "shop", "front")
STOCK = ("c-stock", "shop", "stock")


def until(claim: Callable[[], Any], what: str) -> Any:
    """Poll `claim` until it is true and return its value; fail with `what` at the deadline."""
    deadline = time.monotonic() + WAIT_S
    while not (value := claim()):
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s in vain for {what}"
        time.sleep(0.02)
    return value


class Site:
    """A directory with a PKI, an operator's key, a policy and a configuration, and the controller process that serves it."""

    def __init__(self, path: Path, loop: str) -> None:
        self.path = path
        self.now = datetime.now(timezone.utc)
        self.config = path / "controller.json"
        self.log = path / "controller.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        if loop == "asyncio":
            (path / "without").mkdir()
            (path / "without" / "uvloop.py").write_text("raise ModuleNotFoundError('uvloop')\n")
            self._environment["PYTHONPATH"] = f"{path / 'without'}:{ROOT}"
        (path / "policies").mkdir()
        files.init(path, now=self.now)
        self.issue("controller", role=Role.CONTROLLER)
        self.issue("node0")
        self.issue("node1")
        files.operator_key(path)
        key = load_pem_private_key((path / "operator.key").read_bytes(), None)
        assert isinstance(key, Ed25519PrivateKey)
        self._operator = key
        self.publish(1)
        with socket.create_server(("127.0.0.1", 0)) as listener:  # a port that is free, and stays so on loopback
            self.port = listener.getsockname()[1]
        self.configure()

    def issue(
        self, name: str, *, role: Role = Role.AGENT, identity: str = "", days: int = 7, now: datetime | None = None, directory: Path | None = None
    ) -> None:
        """Issue the certificate `name` in the site's PKI or another one."""
        sans = ("DNS:controller", "IP:127.0.0.1")
        files.issue(directory or self.path, name, sans, role=role, identity=identity, days=days, now=now or self.now)

    def configure(self, **changed: Any) -> None:
        document = {
            "listen": {"host": "127.0.0.1", "port": self.port},
            "tls": {"ca": "ca.crt", "cert": "controller.crt", "key": "controller.key"},
            "operator_key": "operator.pub",
            "policies_dir": "policies",
            **changed,
        }
        self.config.write_text(json.dumps(document))

    def publish(self, version: int) -> bytes:
        """Put a version of the policy where the controller finds it, whole at once."""
        envelope = sign(compiled(version), self._operator)
        part = self.path / "policies" / ".part"
        part.write_bytes(envelope)
        part.replace(self.path / "policies" / "shop.signed.json")
        return envelope

    def start(self) -> None:
        """Start the controller and wait until it answers as a readiness check would see it."""
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "kalium.cli.main", "controller", "serve", "--config", str(self.config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment, cwd=self.path)
        until(lambda: main(["controller", "status", "--config", str(self.config)]) == 0, "the controller to answer")

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        status = self.process.wait(timeout=WAIT_S)
        self.process = None
        return status

    def events(self, name: str) -> list[dict[str, Any]]:
        """The lines of one event, of those that are whole."""
        lines = self.log.read_bytes().rpartition(b"\n")[0].splitlines() if self.log.exists() else []
        return [line for line in map(json.loads, lines) if line["event"] == name]

    def context(self, name: str = "node0", directory: Path | None = None) -> ssl.SSLContext:
        """What a client with the certificate `name` of `directory` would use; "" for none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(self.path / "ca.crt")
        if name:
            context.load_cert_chain((directory or self.path) / f"{name}.crt", (directory or self.path) / f"{name}.key")
        return context


@pytest.fixture(params=["uvloop", "asyncio"])
def any_loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    """A site, not started. A process that a test leaves behind is stopped."""
    loop = request.getfixturevalue("any_loop") if "any_loop" in request.fixturenames else "uvloop"
    made = Site(tmp_path, loop)
    yield made
    if made.process is not None:
        made.stop(signal.SIGKILL)


class Agent:
    """An agent with a blocking socket. Whatever does not come within WAIT_S fails the test."""

    def __init__(self, site: Site, context: ssl.SSLContext | None = None) -> None:
        self.session = ControllerSession()
        plain = socket.create_connection(("127.0.0.1", site.port), timeout=WAIT_S)
        self.connection = (context or site.context()).wrap_socket(plain, server_hostname="127.0.0.1")
        self.pushed: list[Frame] = []

    def hello(self, node: str = "node0") -> ControllerWelcome:
        return cast(ControllerWelcome, self.ask(AgentHello(node, RUN)))

    def ask(self, question: Frame) -> Frame:
        """Send a question and return its answer; what comes in between is in `pushed`."""
        asked = self.session.ask(question)
        self.connection.sendall(self.session.data_to_send())
        while True:
            for event in self._read():
                if event.id == asked:
                    return event.frame
                self.pushed.append(event.frame)

    def tell(self, frame: InstanceEnd | Report) -> None:
        self.session.tell(frame)
        self.connection.sendall(self.session.data_to_send())

    def wait_for(self, frame: Frame) -> None:
        """Read until `frame` has been pushed."""
        while frame not in self.pushed:
            self.pushed += [event.frame for event in self._read()]

    def wait_for_close(self) -> str:
        """Read until the controller closes, and return the reason as it looks from here."""
        deadline = time.monotonic() + WAIT_S
        while self.session.close_reason is None:
            assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s in vain for the end of the connection"
            self._receive()
        return self.session.close_reason

    def start(self, origin: tuple[str, str, str], token: str = "", step: str = "0" * 16) -> Answer:
        return cast(Answer, self.ask(InstanceStart(step, token, "label", 1, *origin)))

    def invoke(self, granted: Answer, callee: str, step: str = "1" * 16) -> Answer:
        return cast(Answer, self.ask(InstanceInvoke(step, granted.call, granted.invocation, callee, 1, *FRONT)))

    def close(self) -> None:
        self.connection.close()

    def _read(self) -> list[Event]:
        self._receive()
        if self.session.close_reason is not None:
            raise ConnectionError(self.session.close_reason)
        return self.session.events()

    def _receive(self) -> None:
        data = self.connection.recv(65536)
        if data:
            self.session.receive_data(data, now_ns=0)
        else:
            self.session.receive_end()


def test_a_call_goes_its_way_over_tls(site: Site, any_loop: str) -> None:
    site.start()
    agent = Agent(site)

    welcome = agent.hello()
    assert (welcome.ok, dict(welcome.policies)) == (True, {"shop": (site.path / "policies" / "shop.signed.json").read_bytes()})
    assert agent.connection.version() == "TLSv1.3"
    for origin in (FRONT, STOCK):
        assert agent.ask(Register(*origin, "image")) == Answer(True, "allowed")
    front = agent.start(FRONT)
    stock = agent.start(STOCK, agent.invoke(front, "stock").token)
    refused = agent.invoke(front, "stock", step="2" * 16)

    assert (front.allowed, stock.allowed, stock.call) == (True, True, front.call)
    assert len({front.call, front.invocation, stock.invocation}) == 3
    assert (refused.allowed, refused.reason) == (False, "edge_not_allowed")
    agent.tell(InstanceEnd(stock.call, stock.invocation, "answered", *STOCK))
    agent.tell(InstanceEnd(front.call, front.invocation, "answered", *FRONT))
    until(lambda: cast(StatusAnswer, agent.ask(Status())).status.agents == 1, "a status that is newer than the readiness check's")
    report = cast(StatusAnswer, agent.ask(Status())).status
    assert (report.agents, report.calls, report.invocations) == (1, 0, 0)
    agent.close()
    until(lambda: site.events("connection_closed"), "the line of the closed connection")


def test_no_step_is_taken_while_the_audit_log_cannot_be_written_and_then_again(site: Site) -> None:
    """The file may grow no further, as on a full disk: nothing else of the controller is harmed, and nothing is lost."""
    files.audit_key(site.path, "audit")
    site.configure(audit={"log": "audit.jsonl", "key": "audit.key", "fsync": "always", "max_mib": 1})
    log = site.path / "audit.jsonl"
    site.start()
    assert site.process is not None
    agent = Agent(site)
    agent.hello()
    for origin in (FRONT, STOCK):
        agent.ask(Register(*origin, "image"))
    front = agent.start(FRONT)
    for number in range(100):
        assert agent.invoke(front, "nobody", step=f"{number:016x}").reason == "edge_not_allowed"
    until(lambda: log.read_bytes().count(b'"event":"step"') == 100, "the denials in the audit log")
    agent.tell(Report(1, "ab" * 32))
    until(lambda: b'"event":"anchor","node":"node0","audit_seq":1' in log.read_bytes(), "the anchor")
    # Of itself it writes no more then: what finds no room is the entry below.
    until(lambda: b'"event":"head"' in log.read_bytes().splitlines()[-1], "the head behind it")

    unlimited = resource.prlimit(site.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(site.process.pid, resource.RLIMIT_FSIZE, (log.stat().st_size, unlimited[1]))
    agent.invoke(front, "nobody", step="a" * 16)
    until(lambda: site.events("audit_failed"), "the failure in the log")
    refused = agent.start(FRONT, step="b" * 16)
    resource.prlimit(site.process.pid, resource.RLIMIT_FSIZE, unlimited)
    until(lambda: site.events("audit_well"), "the recovery in the log")
    allowed = agent.invoke(front, "stock", step="c" * 16)

    assert (refused.allowed, refused.reason, allowed.allowed) == (False, "overloaded", True)
    assert site.stop() == 0
    assert main(["audit", "verify", str(log), "--key", str(site.path / "audit.pub")]) == 0
    entries = [json.loads(line)["entry"] for line in log.read_bytes().splitlines()]
    assert [entry["event"] for entry in entries].count("step") == 101
    (outage,) = [entry for entry in entries if entry["event"] == "outage"]
    assert (outage["lost"], outage["refused"], outage["error"]) == (0, 1, "File too large")
    assert entries[-1]["event"] == "head"


# Who gets in


def test_a_peer_without_a_certificate_gets_nothing(site: Site, any_loop: str) -> None:
    site.start()

    with pytest.raises((ssl.SSLError, ConnectionError)):
        Agent(site, site.context("")).hello()

    line = until(lambda: site.events("connection_refused"), "the refusal in the log")[0]
    assert (line["reason"], line["detail"]) == ("tls", "peer_did_not_return_a_certificate")
    assert site.events("agent_connected") == []


def test_a_certificate_of_another_ca_gets_nothing(site: Site, any_loop: str) -> None:
    """Everything about it is right but who signed it."""
    other = site.path / "other"
    files.init(other, now=site.now)
    site.issue("node0", directory=other)
    site.start()

    with pytest.raises((ssl.SSLError, ConnectionError)):
        Agent(site, site.context("node0", other)).hello()

    line = until(lambda: site.events("connection_refused"), "the refusal in the log")[0]
    assert line["detail"].startswith("certificate_verify_failed: ")
    assert site.events("agent_connected") == []


def test_an_expired_certificate_gets_nothing(site: Site) -> None:
    site.issue("late", identity="node0", days=1, now=site.now - timedelta(days=2))
    site.start()

    with pytest.raises((ssl.SSLError, ConnectionError)):
        Agent(site, site.context("late")).hello()

    assert until(lambda: site.events("connection_refused"), "the refusal in the log")[0]["detail"].endswith("certificate has expired")


def test_an_older_tls_is_refused(site: Site) -> None:
    site.start()
    context = site.context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2

    with pytest.raises((ssl.SSLError, ConnectionError)):
        Agent(site, context).hello()

    assert until(lambda: site.events("connection_refused"), "the refusal in the log")[0]["detail"] == "unsupported_protocol"


def test_a_browser_that_strays_here_is_refused_and_the_controller_goes_on(site: Site, any_loop: str) -> None:
    site.start()
    with socket.create_connection(("127.0.0.1", site.port), timeout=WAIT_S) as stray:
        stray.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while stray.recv(1000):
            pass

    assert until(lambda: site.events("connection_refused"), "the refusal in the log")[0]["detail"] == "http_request"
    assert Agent(site).hello().ok


def test_a_peer_that_breaks_the_protocol_is_closed_with_the_reason_in_the_log(site: Site, any_loop: str) -> None:
    site.start()
    agent = Agent(site)
    agent.hello()

    agent.connection.sendall(b"GET / HTTP/1.1\r\n\r\n")

    assert agent.wait_for_close() == "end_of_stream"
    assert until(lambda: site.events("connection_closed"), "the line of the closed connection")[0]["reason"] == "bad_magic"
    assert Agent(site).hello().ok


def refused(site: Site, context: ssl.SSLContext) -> dict[str, Any]:
    """Say hello by `context`, which the controller must not answer, and return the one line that says why."""
    with pytest.raises((ssl.SSLError, ConnectionError)):
        Agent(site, context).hello()
    lines = until(lambda: site.events("connection_refused"), "the refusal in the log")
    assert len(lines) == 1
    assert site.events("agent_connected") == []
    return cast(dict[str, Any], lines[0])


def test_a_certificate_that_only_serves_gets_nothing(site: Site, any_loop: str) -> None:
    """Pebble's, for example, whose key is on another host and in another account's hands."""
    site.issue("pebble", role=Role.SERVER)
    site.start()

    line = refused(site, site.context("pebble"))

    assert (line["reason"], line["detail"]) == ("tls", "certificate_verify_failed: unsuitable certificate purpose")


def test_a_certificate_of_our_ca_without_a_role_gets_nothing(site: Site, any_loop: str) -> None:
    """A site of an earlier version has issued such ones, for a year."""
    ca = authority.read((site.path / "ca.crt").read_bytes(), (site.path / "ca.key").read_bytes())
    assert ca is not None
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "agent")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(ca.certificate.subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(site.now - timedelta(days=1))
        .not_valid_after(site.now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("agent")]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key()), critical=False)
        .sign(ca.key, hashes.SHA256())
    )
    old = authority.Identity(certificate, key)
    (site.path / "old.crt").write_bytes(old.certificate_pem())
    (site.path / "old.key").write_bytes(old.key_pem())
    site.start()

    line = refused(site, site.context("old"))

    assert (line["reason"], line["detail"]) == ("no_role", "the certificate of agent has no role")
    assert Agent(site).hello().ok


@pytest.mark.parametrize(("name", "role"), [("node1", Role.AGENT), ("node0", Role.CLIENT), ("node0", Role.CONTROLLER)])
def test_a_hello_needs_the_role_of_an_agent_and_the_name_of_its_node(site: Site, any_loop: str, name: str, role: Role) -> None:
    """A key that was stolen from one node, or from a client, is no other node's. Each of them may ask for the status."""
    site.issue("thief", role=role, identity=name)
    site.start()
    thief = Agent(site, site.context("thief"))
    assert cast(StatusAnswer, thief.ask(Status())).status.agents == 0

    with pytest.raises((ssl.SSLError, ConnectionError)):
        thief.hello("node0")

    line = until(lambda: site.events("connection_closed"), "the line of the closed connection")[0]
    assert line["reason"] == "wrong_identity"
    assert site.events("agent_connected") == []


@pytest.mark.parametrize(("role", "bound"), [(Role.AGENT, server.CONNECTIONS_OF_AGENT_MAX), (Role.CLIENT, server.CONNECTIONS_OF_OTHERS_MAX)])
def test_a_stolen_certificate_takes_no_agents_place(site: Site, role: Role, bound: int) -> None:
    site.issue("thief", role=role, identity="node7")
    site.start()
    thieves = [Agent(site, site.context("thief")) for _ in range(bound)]
    for thief in thieves:
        thief.ask(Status())

    beyond = Agent(site, site.context("thief"))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        beyond.ask(Status())
    until(lambda: [line for line in site.events("connection_refused") if line["reason"] == "too_many_connections"], "the line of the refusal")
    assert Agent(site).hello().ok

    thieves[0].close()
    until(lambda: answers(Agent(site, site.context("thief"))), "room for another one")


def answers(agent: Agent) -> bool:
    """Whether the controller takes this connection."""
    try:
        agent.ask(Status())
    except (ssl.SSLError, ConnectionError):
        return False
    return True


def test_a_certificate_that_ends_while_its_connection_is_open_ends_the_connection(site: Site, any_loop: str) -> None:
    site.start()
    lasting = Agent(site, site.context("node1"))
    assert lasting.hello("node1").ok
    # Behind the start, which may take as long as the certificate holds.
    site.issue("brief", identity="node0", days=1, now=datetime.now(timezone.utc) - timedelta(days=1) + timedelta(seconds=5))
    brief = Agent(site, site.context("brief"))
    assert brief.hello().ok

    assert brief.wait_for_close() == "end_of_stream"

    line = until(lambda: site.events("connection_closed"), "the line of the closed connection")[0]
    assert (line["reason"], line["node"]) == ("certificate_expired", "node0")
    assert cast(StatusAnswer, lasting.ask(Status())).status.agents == 1
    assert refused_again(site, "brief").endswith("certificate has expired")
    assert Agent(site).hello().ok  # with the certificate that has been issued meanwhile


def refused_again(site: Site, name: str) -> str:
    """What the log says of one more hello by the certificate `name`."""
    before = len(site.events("connection_refused"))
    with pytest.raises((ssl.SSLError, ConnectionError)):
        Agent(site, site.context(name)).hello()
    return str(until(lambda: site.events("connection_refused")[before:], "the refusal in the log")[0]["detail"])


def test_no_session_is_resumed(site: Site, any_loop: str) -> None:
    """A resumed one is not verified, so it would outlive its certificate."""
    site.start()
    agent = Agent(site)
    assert agent.hello().ok  # a ticket would have come before the answer

    assert agent.connection.session is None or not agent.connection.session.has_ticket


# What survives


def test_a_killed_controller_forgets_its_calls_and_serves_again(site: Site, any_loop: str) -> None:
    """The cursors were in its memory. What is in flight is denied, and what begins anew works; nothing has to be deployed."""
    site.start()
    agent = Agent(site)
    agent.hello()
    agent.ask(Register(*FRONT, "image"))
    front = agent.start(FRONT)
    assert site.stop(signal.SIGKILL) == -signal.SIGKILL
    with pytest.raises((ssl.SSLError, ConnectionError)):
        agent.invoke(front, "stock")

    site.start()
    back = Agent(site)
    assert back.hello().ok
    assert back.start(FRONT).reason == "unregistered"
    assert back.ask(Register(*FRONT, "image")) == Answer(True, "allowed")

    assert back.invoke(front, "stock").reason == "unknown_call"
    assert back.start(FRONT, step="5" * 16).allowed


def test_a_broken_connection_is_not_a_broken_call(site: Site) -> None:
    site.start()
    agent = Agent(site)
    agent.hello()
    agent.ask(Register(*FRONT, "image"))
    front = agent.start(FRONT)
    agent.close()

    back = Agent(site)
    back.hello()
    back.ask(Register(*FRONT, "image"))

    assert back.invoke(front, "stock").allowed


def test_a_new_policy_is_pushed_and_a_damaged_one_changes_nothing(site: Site, any_loop: str) -> None:
    site.start()
    agent = Agent(site)
    agent.hello()
    agent.ask(Register(*FRONT, "image"))
    file = site.path / "policies" / "shop.signed.json"

    second = site.publish(2)
    agent.wait_for(Policy("shop", second))
    file.write_bytes(second.replace(b'"signature":"', b'"signature":"AAAA'))
    until(lambda: site.events("policy_refused"), "the refusal in the log")

    assert agent.start(FRONT).allowed  # under version 1, which drains
    assert dict(Agent(site, site.context("node1")).hello("node1").policies) == {"shop": second}
    assert [(line["file"], line["reason"]) for line in site.events("policy_refused")] == [("shop.signed.json", "policy.signature")]


def test_a_damaged_policy_does_not_keep_the_controller_from_starting_with_the_others(site: Site) -> None:
    (site.path / "policies" / "bad.signed.json").write_bytes(b"?")

    site.start()

    assert [line["file"] for line in site.events("policy_loaded")] == ["shop.signed.json"]
    assert [(line["file"], line["reason"]) for line in site.events("policy_refused")] == [("bad.signed.json", "policy.malformed")]


def test_an_old_policy_is_refused(site: Site) -> None:
    site.publish(2)
    site.start()

    site.publish(1)

    line = until(lambda: site.events("policy_refused"), "the refusal in the log")[0]
    assert (line["reason"], line["level"]) == ("policy.version", "error")
    agent = Agent(site)
    assert cast(StatusAnswer, agent.ask(Status())).status.policies == {"shop": 2}


def test_a_renewed_certificate_is_taken_without_a_restart(site: Site, any_loop: str) -> None:
    site.start()
    agent = Agent(site)
    assert agent.hello().ok
    before = agent.connection.getpeercert(binary_form=True)
    (site.path / "controller.crt").unlink()

    site.issue("controller", role=Role.CONTROLLER)
    until(lambda: site.events("certificate_loaded"), "the new certificate")

    assert Agent(site).connection.getpeercert(binary_form=True) != before
    assert agent.ask(Register(*FRONT, "image")) == Answer(True, "allowed")


def reload(site: Site, change: Callable[[], object]) -> None:
    """Change files of the PKI, and wait until the controller has taken them."""
    before = len(site.events("certificate_loaded"))
    change()
    until(lambda: site.events("certificate_loaded")[before:], "the new files to be taken")


def test_a_ca_that_is_renewed_under_its_key_disturbs_nobody(site: Site) -> None:
    site.start()
    agent, old = Agent(site), site.context()
    assert agent.hello().ok
    before = (site.path / "ca.crt").read_bytes()

    reload(site, lambda: files.init(site.path, now=site.now + timedelta(days=3640)) and files.init(site.path, now=site.now))

    assert (site.path / "ca.crt").read_bytes() != before
    assert cast(StatusAnswer, agent.ask(Status())).status.agents == 1
    assert Agent(site, old).hello().ok


def test_a_change_of_the_ca_loses_nobody_who_follows_and_ends_who_does_not(site: Site, any_loop: str) -> None:
    site.start()
    follower = Agent(site)
    assert follower.hello().ok

    reload(site, lambda: files.change_ca(site.path, CaStep.BEGIN, now=site.now))
    bundle = site.context("node1")  # who has got the file of both, and still its old pair
    files.change_ca(site.path, CaStep.SWITCH, now=site.now)
    reload(site, lambda: site.issue("controller", role=Role.CONTROLLER))
    stranger = Agent(site, bundle)
    assert stranger.hello("node1").ok
    site.issue("node0")
    followed = Agent(site)
    assert followed.hello().ok
    until(lambda: [line for line in site.events("connection_closed") if line["reason"] == "replaced"], "the old connection's end")
    for suffix in ("crt", "key"):  # nobody issues it anew, but finish asks for all of the folder
        (site.path / f"node1.{suffix}").rename(site.path / f"late.{suffix}.kept")
    reload(site, lambda: files.change_ca(site.path, CaStep.FINISH, now=site.now))

    assert stranger.wait_for_close() == "end_of_stream"
    line = until(lambda: [line for line in site.events("connection_closed") if line["reason"] == "ca_distrusted"], "the end of the old CA's peer")
    assert [each["node"] for each in line] == ["node1"]
    assert cast(StatusAnswer, followed.ask(Status())).status.agents == 1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        Agent(site, bundle).hello("node1")
    assert until(lambda: site.events("connection_refused"), "the refusal in the log")[-1]["detail"].startswith("certificate_verify_failed")


def test_a_damaged_certificate_is_not_taken(site: Site) -> None:
    site.start()

    (site.path / "controller.key").write_bytes(b"?")

    assert until(lambda: site.events("certificate_refused"), "the refusal in the log")[0]["code"] == "controller.tls"
    assert Agent(site).hello().ok


# How it ends


def test_a_controller_that_is_told_to_stop_says_goodbye(site: Site, any_loop: str) -> None:
    site.start()
    agent = Agent(site)
    agent.hello()

    assert site.process is not None
    site.process.send_signal(signal.SIGTERM)

    assert agent.wait_for_close() == "end_of_stream"
    assert site.process.wait(timeout=WAIT_S) == 0
    site.process = None
    assert [line["event"] for line in map(json.loads, site.log.read_bytes().splitlines())][-2:] == ["connection_closed", "stopped"]
    assert site.events("connection_closed")[0]["reason"] == "shutdown"


def test_no_token_and_no_key_is_ever_in_the_log(site: Site) -> None:
    site.start()
    agent = Agent(site)
    agent.hello()
    for origin in (FRONT, STOCK):
        agent.ask(Register(*origin, "image"))
    token = agent.invoke(agent.start(FRONT), "stock").token
    agent.start(FRONT, token, step="3" * 16)
    agent.start(STOCK, token, step="4" * 16)
    site.stop()

    text = site.log.read_text()

    assert "bad_token" in text
    assert token not in text
    assert "PRIVATE" not in text
    assert all(set(line) >= {"time_ms", "level", "event"} for line in map(json.loads, text.splitlines()))


# Errors for a person: two lines on standard error, the exit code, and nothing left running


@pytest.mark.parametrize(
    ("change", "first"),
    [
        (lambda site, busy: site.configure(listen={"host": "127.0.0.1", "port": busy}), "error[controller.listen]: cannot listen on"),
        (lambda site, busy: site.configure(listen={"host": "192.0.2.1", "port": 5000}), "error[controller.listen]: cannot listen on 192.0.2.1:5000"),
        (lambda site, busy: site.configure(policies_dir="nowhere"), "error[controller.policies]: cannot read the policies in"),
        (lambda site, busy: site.configure(operator_key="nowhere"), "error[controller.operator_key]: cannot read the operator's key"),
        (lambda site, busy: site.configure(operator_key="ca.crt"), "error[policy.key]: cannot read the operator's key"),
        (lambda site, busy: (site.path / "controller.key").unlink(), "error[controller.tls]: cannot use"),
        (lambda site, busy: site.config.unlink(), "error[controller.config]: cannot read the configuration"),
        (lambda site, busy: site.configure(name="other"), "error[controller.tls]: cannot use"),
        (lambda site, busy: site.configure(tls={"ca": "ca.crt", "cert": "node0.crt", "key": "node0.key"}), "error[controller.tls]: cannot use"),
        (
            lambda site, busy: site.issue("controller", role=Role.CONTROLLER, days=1, now=site.now - timedelta(days=2)),
            "error[controller.tls]: cannot use",
        ),
    ],
    ids=[
        "busy_port",
        "foreign_address",
        "no_policies",
        "no_operator_key",
        "wrong_operator_key",
        "no_key",
        "no_configuration",
        "other_name",
        "other_role",
        "expired",
    ],
)
def test_what_keeps_the_controller_from_starting_is_told(
    site: Site, capfd: pytest.CaptureFixture[str], change: Callable[[Site, int], object], first: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        change(site, other.getsockname()[1])

        code = main(["controller", "serve", "--config", str(site.config)])

    out, err = capfd.readouterr()
    assert code == 3
    assert out == ""
    assert err.splitlines()[0].startswith(first)
    assert err.splitlines()[1].startswith("next: ")
    assert len(err.splitlines()) == 2


def test_the_status_is_told_to_people_and_programs(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    site.start()
    capsys.readouterr()

    assert main(["controller", "status", "--config", str(site.config)]) == 0
    assert capsys.readouterr().out.splitlines() == ["policies     shop 1", "agents       0", "calls        0", "invocations  0"]
    assert main(["controller", "status", "--config", str(site.config), "--output", "json"]) == 0

    told = json.loads(capsys.readouterr().out)
    assert (told["policies"], told["agents"], told["calls"], told["invocations"]) == ({"shop": 1}, 0, 0, 0)
    assert (told["controller"], told["controllers"], told["store"]) == ("controller", ["controller"], "memory")
    assert abs(told["started_ms"] - time.time() * 1000) < WAIT_S * 1000


def test_a_sandbox_that_does_not_enforce_what_is_asked_is_seen_by_the_whole_sites_status(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """By its own word, which comes with its agent's report."""
    site.start()
    agent = Agent(site)
    agent.hello()
    for mode, code in (("enforce", 0), ("none", 1)):
        agent.tell(Report(1, "", ("shop",), ("front",), (mode,), (1,), (2,), {"shop out_of_order": 3}))
        agent.ask(Ping())  # behind the report
        time.sleep(STATUS_KEPT_NS / 1e9)  # so long a status may be the one before it
        capsys.readouterr()

        assert main(["status", "--config", str(site.config), "--output", "json"]) == code

        told = json.loads(capsys.readouterr().out)
        assert [(row["node"], row["asked"], row["mode"], row["count"]) for row in told["instances"]] == [("node0", "enforce", mode, 2)]
        assert told["denied"] == [{"app": "shop", "reason": "out_of_order", "count": 3}]
        assert told["apps"] == [{"app": "shop", "version": 1, "mode": "enforce"}]


def test_the_status_of_a_controller_that_is_away_is_an_error(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["controller", "status", "--config", str(site.config)]) == 3

    assert capsys.readouterr().err.startswith("error[controller.away]: cannot ask the controller at 127.0.0.1:")


def test_the_status_of_a_controller_with_another_ca_is_an_error(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """The configuration was changed, and the process was not restarted."""
    site.start()
    other = site.path / "other"
    files.init(other, now=site.now)
    site.issue("controller", role=Role.CONTROLLER, directory=other)
    site.configure(tls={"ca": "other/ca.crt", "cert": "other/controller.crt", "key": "other/controller.key"})
    capsys.readouterr()

    assert main(["controller", "status", "--config", str(site.config)]) == 3

    assert "its certificate does not hold" in capsys.readouterr().err


def test_the_status_of_another_controller_is_an_error(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """The address in the configuration is that of another host of the site: the one that cannot listen there is not ready."""
    site.start()
    site.configure(name="controller-node1")
    capsys.readouterr()

    assert main(["controller", "status", "--config", str(site.config)]) == 3

    assert "it is the controller controller, not controller-node1" in capsys.readouterr().err


@pytest.mark.parametrize("role", [Role.CLIENT, Role.AGENT, Role.CONTROLLER, Role.SERVER])
def test_the_status_is_told_to_every_role(site: Site, capsys: pytest.CaptureFixture[str], role: Role) -> None:
    """But not to who only serves, which is told before anybody is asked."""
    site.issue("asker", role=role)
    site.start()
    capsys.readouterr()
    site.configure(tls={"ca": "ca.crt", "cert": "asker.crt", "key": "asker.key"})

    code = main(["controller", "status", "--config", str(site.config)])

    printed = capsys.readouterr()
    assert (code, "its role is none" in printed.err) == ((3, True) if role is Role.SERVER else (0, False))


def test_the_status_is_not_taken_from_who_is_no_controller(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever has a server's key on the controller's host, and the port while the controller is away."""
    site.issue("pebble", role=Role.SERVER)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(site.path / "pebble.crt", site.path / "pebble.key")
    with socket.create_server(("127.0.0.1", site.port)) as listener:

        def pose() -> None:
            with listener.accept()[0] as plain, suppress(OSError), context.wrap_socket(plain, server_side=True) as connection:
                connection.recv(1)

        posing = threading.Thread(target=pose)
        posing.start()
        code = main(["controller", "status", "--config", str(site.config)])
        posing.join(WAIT_S)

    assert code == 3
    assert "its certificate has the role none" in capsys.readouterr().err


def test_a_port_that_answers_nothing_is_an_error_in_time(site: Site) -> None:
    """Something else has the port and says nothing: the deadline is the client's own."""
    with socket.create_server(("127.0.0.1", site.port)), pytest.raises(KaliumError, match="cannot ask the controller"):
        status(load(site.config), timeout_s=0.2)


# The shell's own bounds, without a process


class Transport:
    """Stands in for a transport: keeps what is written, and closes when told."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.written = b""
        self.high = 0
        self.ended = ""
        self.is_paused = False
        connection.connection_made(cast(asyncio.BaseTransport, self))

    def get_extra_info(self, name: str) -> Any:
        if name != "peercert":
            return None
        return {"subjectAltName": (("DNS", "node0"), ("URI", "kalium://agent/node0")), "notAfter": "Jan  1 00:00:00 2100 GMT"}

    def set_write_buffer_limits(self, high: int) -> None:
        self.high = high

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def write(self, data: bytes) -> None:
        assert not self.ended
        self.written += data

    def deliver(self, data: bytes) -> None:
        """As a loop hands bytes over: it writes them where the protocol says, and tells it how many there are."""
        self.connection.get_buffer(len(data))[: len(data)] = data
        self.connection.buffer_updated(len(data))

    def close(self) -> None:
        self.ended = self.ended or "closed"

    def abort(self) -> None:
        self.ended = "aborted"
        self.connection.connection_lost(None)


@dataclasses.dataclass
class Shell:
    """A controller in this process with one agent that has said hello."""

    controller: Controller
    transport: Transport
    lines: list[dict[str, Any]]

    @classmethod
    def with_agent(cls) -> Shell:
        lines: list[dict[str, Any]] = []
        controller = Controller(log=lambda event, **fields: lines.append({"event": event, **fields}))
        transport = Transport(Connection(controller, "127.0.0.1:1"))
        session = ControllerSession()
        session.ask(AgentHello("node0", RUN))
        transport.deliver(session.data_to_send())
        return cls(controller, transport, lines)


def test_a_peer_that_does_not_read_is_dropped() -> None:
    """The transport calls pause_writing at its high mark, which is the bound of the wire."""

    async def story() -> Shell:
        shell = Shell.with_agent()
        shell.transport.connection.pause_writing()
        return shell

    shell = asyncio.run(story())

    assert (shell.transport.high, shell.transport.ended) == (WRITE_BUFFER_BYTES_MAX, "aborted")
    assert [line["reason"] for line in shell.lines if line["event"] == "connection_closed"] == ["slow_reader"]
    assert [line["subject"] for line in shell.lines if line["event"] == "agent_connected"] == ["node0"]


def pipelined(count: int, label: str = "label") -> tuple[ControllerSession, bytes]:
    """An agent that has asked `count` questions behind its hello, and their bytes."""
    agent = ControllerSession()
    agent.ask(AgentHello("node0", RUN))
    agent.data_to_send()
    for number in range(count):
        agent.ask(InstanceStart(f"{number:016x}", "", label, 1, *FRONT))
    return agent, agent.data_to_send()


def heard_answers(shell: Shell, agent: ControllerSession) -> int:
    """How many have come since the last call."""
    agent.receive_data(shell.transport.written, now_ns=0)
    shell.transport.written = b""
    return sum(isinstance(event.frame, Answer) for event in agent.events())


def test_a_peer_that_asks_without_end_gets_its_answers_in_turns() -> None:
    """Between two of them the loop serves the others; a lone question is answered in the turn in which it came."""
    count = 2_000

    async def story() -> None:
        shell = Shell.with_agent()
        agent, questions = pipelined(count)
        size = len(questions) // count
        assert len(questions) > 2 * TURN_BYTES
        shell.transport.deliver(questions)
        turns = [heard_answers(shell, agent)]
        while sum(turns) < count:
            await asyncio.sleep(0)
            turns.append(heard_answers(shell, agent))
        assert max(turns) <= TURN_BYTES // size + 1
        assert len(turns) == -(-len(questions) // TURN_BYTES)

        await asyncio.sleep(0)
        agent.ask(InstanceStart("f" * 16, "", "label", 1, *FRONT))
        shell.transport.deliver(agent.data_to_send())
        assert heard_answers(shell, agent) == 1

    asyncio.run(asyncio.wait_for(story(), WAIT_S))


def test_what_one_connection_keeps_is_not_what_another_one_reads() -> None:
    """All read into one buffer: half a frame, and what waits for its turn, must not stay there."""
    count = 2_000

    async def story() -> None:
        shell = Shell.with_agent()
        agent, questions = pipelined(count)
        other = Transport(Connection(shell.controller, "127.0.0.1:2")).connection

        def read(connection: Connection, data: bytes) -> None:
            buffer = connection.get_buffer(len(data))
            buffer[: len(data)] = data
            connection.buffer_updated(len(data))

        half = len(questions) // count // 2
        read(shell.transport.connection, questions[:half])
        read(other, b"KL\x01")
        read(shell.transport.connection, questions[half:])
        read(other, bytes(INCOMING_BYTES + 1))
        for _ in range(len(questions) // TURN_BYTES + 2):
            await asyncio.sleep(0)

        assert heard_answers(shell, agent) == count
        assert [line["reason"] for line in shell.lines if line["event"] == "connection_closed"] == ["unknown_type"]

    asyncio.run(asyncio.wait_for(story(), WAIT_S))


def test_what_comes_while_some_waits_is_worked_on_behind_it_and_not_without_bound() -> None:
    count, step = 4_000, 500_000

    async def story() -> None:
        shell = Shell.with_agent()
        agent, questions = pipelined(count, "l" * 500)
        assert len(questions) > KEPT_BYTES_MAX + TURN_BYTES
        paused = []
        for at in range(0, len(questions), step):
            shell.transport.deliver(questions[at : at + step])
            paused.append(shell.transport.is_paused)
        assert paused == [at + step > KEPT_BYTES_MAX + TURN_BYTES for at in range(0, len(questions), step)]
        got = heard_answers(shell, agent)
        while got < count:
            assert shell.transport.is_paused
            await asyncio.sleep(0)
            got += heard_answers(shell, agent)
        await asyncio.sleep(0)
        assert not shell.transport.is_paused

    asyncio.run(asyncio.wait_for(story(), WAIT_S))


@pytest.mark.parametrize("is_clean", [True, False])
def test_what_a_peer_told_before_it_went_counts_and_its_questions_do_not(monkeypatch: pytest.MonkeyPatch, is_clean: bool) -> None:
    """Else an instance would keep invocations that have ended; and steps would be taken whose answer nobody hears."""

    async def story() -> None:
        shell = Shell.with_agent()
        agent, questions = pipelined(2_000)
        agent.tell(Report(7, "ab" * 32))
        reports: list[int] = []
        monkeypatch.setattr(shell.controller.registry, "report", lambda _key, said: reports.append(said.audit_seq))
        shell.transport.deliver(questions + agent.data_to_send())
        taken = sum(shell.controller._counts.steps["start"].values())
        if is_clean:
            shell.transport.connection.eof_received()
        shell.transport.connection.connection_lost(None if is_clean else ConnectionResetError("reset"))
        assert reports == [7]
        assert 0 < taken == sum(shell.controller._counts.steps["start"].values()) < 2_000
        assert shell.lines[-1]["reason"] == ("end_of_stream" if is_clean else "lost")

    asyncio.run(asyncio.wait_for(story(), WAIT_S))


def test_questions_that_wait_when_the_controller_stops_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CLOSE_S", 0.01)
    monkeypatch.setattr(server, "DRAIN_S", 0.05)

    async def story() -> None:
        shell = Shell.with_agent()
        agent, questions = pipelined(2_000)
        shell.controller._dispatcher.waiting = 1  # the store owes an answer, so there are turns before the end
        shell.transport.deliver(questions)
        first = heard_answers(shell, agent)
        await shell.controller.close_all()
        assert (first > 0, heard_answers(shell, agent), shell.lines[-1]["reason"]) == (True, 0, "shutdown")

    asyncio.run(asyncio.wait_for(story(), WAIT_S))


def test_leases_are_renewed_while_an_agent_is_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LEASE_EVERY_MS", 1)

    async def story() -> list[Frame]:
        shell = Shell.with_agent()
        renewing = asyncio.create_task(shell.controller.renew_leases())
        agent = ControllerSession()
        agent.ask(AgentHello("node0", RUN))
        heard: list[Frame] = []
        while len(heard) < 3:
            await asyncio.sleep(0.001)
            agent.receive_data(shell.transport.written, now_ns=0)
            shell.transport.written = b""
            heard += [event.frame for event in agent.events()]
        renewing.cancel()
        return heard

    heard = asyncio.run(asyncio.wait_for(story(), WAIT_S))

    assert isinstance(heard[0], ControllerWelcome)
    assert heard[1:3] == [Lease(60_000), Lease(60_000)]


def test_connections_that_do_not_end_are_cut_when_the_controller_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CLOSE_S", 0.01)

    async def story() -> Shell:
        shell = Shell.with_agent()
        await shell.controller.close_all()
        return shell

    shell = asyncio.run(asyncio.wait_for(story(), WAIT_S))

    assert (shell.transport.ended, shell.lines[-1]["reason"]) == ("aborted", "shutdown")


@pytest.mark.parametrize("is_answered", [True, False])
def test_a_controller_that_stops_answers_first_what_the_store_still_owes(monkeypatch: pytest.MonkeyPatch, is_answered: bool) -> None:
    """And no longer than DRAIN_S: the agent asks the next controller again."""
    monkeypatch.setattr(server, "CLOSE_S", 0.01)
    monkeypatch.setattr(server, "DRAIN_S", 0.2)
    owed: Deferred[Answer] = Deferred()

    async def story() -> tuple[Shell, list[Frame]]:
        shell = Shell.with_agent()
        monkeypatch.setattr(shell.controller._state, "start", lambda *_, **__: owed)
        agent = ControllerSession()
        agent.ask(AgentHello("node0", RUN))
        agent.data_to_send()
        agent.ask(InstanceStart("0" * 16, "", "label", 1, *FRONT))
        shell.transport.deliver(agent.data_to_send())
        closing = asyncio.create_task(shell.controller.close_all())
        await asyncio.sleep(0.02)
        assert (shell.transport.is_paused, shell.transport.ended) == (True, "")  # nothing more is taken, nothing is cut yet
        assert (shell.controller._dispatcher.waiting, shell.controller._counts.store_round_trips) == (1, 1)
        if is_answered:
            owed.resolve(Answer(True, "allowed", "c", "i"))
        await closing
        agent.receive_data(shell.transport.written, now_ns=0)
        return shell, [event.frame for event in agent.events()]

    shell, heard = asyncio.run(asyncio.wait_for(story(), WAIT_S))

    assert [frame for frame in heard if isinstance(frame, Answer)] == ([Answer(True, "allowed", "c", "i")] if is_answered else [])
    assert (shell.transport.is_paused, shell.lines[-1]["reason"]) == (False, "shutdown")


def asked(url: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_running_controller_tells_what_it_has_counted(site: Site, any_loop: str) -> None:
    site.configure(metrics={"host": "127.0.0.1", "port": 0})
    site.start()
    address = f"http://{site.events('metrics_listening')[0]['address']}"
    agent = Agent(site)
    agent.hello()
    agent.ask(Register(*FRONT, "image"))
    agent.invoke(agent.start(FRONT), "mail")

    status, text = asked(f"{address}/metrics")

    assert status == 200
    assert 'kalium_controller_steps_total{question="register",reason="allowed"} 1.0' in text
    assert 'kalium_controller_steps_total{question="start",reason="allowed"} 1.0' in text
    assert 'kalium_controller_steps_total{question="invoke",reason="edge_not_allowed"} 1.0' in text
    assert 'kalium_controller_policy_version{app="shop"} 1.0' in text
    assert "kalium_controller_agents 1.0" in text
    [ends] = [float(line.split()[1]) for line in text.splitlines() if line.startswith("kalium_controller_certificate_not_after_seconds ")]
    assert abs(ends - tls.not_after_s(load(site.config).tls)) < 1
    assert asked(f"{address}/healthz") == (200, "ok\n")
    status, body = asked(f"{address}/readyz")
    assert (status, set(json.loads(body)["checks"])) == (200, {"policies", "store", "audit", "certificate", "draining"})


def test_a_controller_without_policies_lives_and_is_not_ready(site: Site) -> None:
    (site.path / "policies" / "shop.signed.json").unlink()
    site.configure(metrics={"host": "127.0.0.1", "port": 0})
    site.start()
    address = f"http://{site.events('metrics_listening')[0]['address']}"

    status, body = asked(f"{address}/readyz")

    assert (status, json.loads(body)["checks"]["policies"], json.loads(body)["ready"]) == (503, "no policy is loaded", False)
    assert asked(f"{address}/healthz")[0] == 200


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda shell, door: setattr(door, "not_after_s", time.time() - 1), "certificate"),
        (lambda shell, door: setattr(shell.controller._state.calls, "fault", lambda: "away"), "store"),
        (lambda shell, door: setattr(shell.controller._dispatcher._audit, "healthy", False), "audit"),
    ],
)
def test_a_controller_that_cannot_take_steps_says_why(change: Callable[[Shell, Door], None], check: str) -> None:
    async def story() -> dict[str, str]:
        shell = Shell.with_agent()
        shell.controller._state.registry.install(CompiledPolicy.parse(compiled(1)), b"signed", now_ns=0)
        door = Door(cast(socket.socket, None), cast(ssl.SSLContext, None), shell.controller, log=lambda *_: None)
        door.not_after_s = time.time() + 60
        monitor = shell.controller.monitor(door, lambda: False)
        assert not any(monitor._faults().values())
        change(shell, door)
        return dict(monitor._faults())

    found = asyncio.run(story())

    assert [name for name, fault in found.items() if fault] == [check]


async def knock(site: Site, context: ssl.SSLContext | None, source: str = "127.0.0.1") -> bytes:
    """Connect to the site's port from `source`, without TLS for None, and return the first byte of the controller; b"" when it closes."""
    session = ControllerSession()
    session.ask(Status())
    try:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", site.port, ssl=context, server_hostname="127.0.0.1" if context else None, local_addr=(source, 0)
        )
        if context is not None:
            writer.write(session.data_to_send())
        first = await reader.read(1)
        writer.close()
    except OSError:  # and ssl.SSLError, which is one
        return b""
    return first


def with_a_door(site: Site, story: Callable[[Door], Coroutine[Any, Any, None]]) -> list[dict[str, Any]]:
    """Run `story` in this process beside a door on the site's port, and return the lines of the log."""
    lines: list[dict[str, Any]] = []

    def log(event: str, **fields: Any) -> None:
        lines.append({"event": event, **fields})

    async def play() -> None:
        config = load(site.config)
        with server.listen(config) as listener:
            door = Door(listener, tls.server_context(config.tls), Controller(log=log), log=log)
            accepting = asyncio.create_task(door.accept())
            await story(door)
            accepting.cancel()
            await asyncio.gather(accepting, return_exceptions=True)

    asyncio.run(asyncio.wait_for(play(), WAIT_S))
    return lines


def test_peers_that_never_shake_hands_make_room_for_newer_ones_and_end_in_time(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HANDSHAKES_MAX", 2)
    monkeypatch.setattr(server, "HANDSHAKE_S", WAIT_S)

    async def story(door: Door) -> None:
        silent = [asyncio.create_task(knock(site, None)) for _ in range(2)]
        await asyncio.to_thread(until, lambda: door._open == 2, "the silent ones to be accepted")
        assert await knock(site, site.context()) == b"K"
        ended, others = await asyncio.wait(silent, return_when=asyncio.FIRST_COMPLETED)
        assert ([task.result() for task in ended], len(others)) == ([b""], 1)

        monkeypatch.setattr(server, "HANDSHAKE_S", 0.2)  # of the next one, which takes nobody's place
        assert await knock(site, None) == b""
        (other,) = others
        assert not other.done()
        other.cancel()

    lines = with_a_door(site, story)

    assert [line["reason"] for line in lines] == ["too_many_handshakes", "lost"]


def test_who_never_shakes_hands_takes_no_place_of_another_address(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many come from one host, and however slow a handshake from another one is: that one is not ended for them."""
    monkeypatch.setattr(server, "HANDSHAKES_MAX", 4)

    async def story(door: Door) -> None:
        slow = await asyncio.open_connection("127.0.0.1", site.port, local_addr=("127.0.0.3", 0))
        await asyncio.to_thread(until, lambda: door._open == 1, "the slow one to be accepted")
        silent = [asyncio.create_task(knock(site, None, "127.0.0.2")) for _ in range(20)]
        await asyncio.to_thread(until, lambda: sum(task.done() for task in silent) == 17, "the silent ones to displace each other")
        assert list(door._handshakes) == ["127.0.0.3", "127.0.0.2"]
        assert await knock(site, site.context(), "127.0.0.2") == b"K"
        slow[1].close()
        for task in silent:
            task.cancel()

    lines = with_a_door(site, story)

    assert {line["peer"].split(":")[0] for line in lines if line["reason"] == "too_many_handshakes"} == {"127.0.0.2"}


def test_strangers_do_not_fill_the_log(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "STRANGERS_BURST", 3)
    monkeypatch.setattr(server, "STRANGERS_PER_S", 0.001)  # the test's own time earns no line

    async def story(door: Door) -> None:
        refused, refuse = 0, door._refuse

        def counted(reason: str, detail: str, address: str) -> None:
            nonlocal refused
            refuse(reason, detail, address)
            refused += 1

        monkeypatch.setattr(door, "_refuse", counted)

        async def stranger(number: int) -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", site.port)
            writer.write(b"no hello of TLS at all")
            await asyncio.to_thread(until, lambda: refused == number, "its refusal")
            writer.close()

        for number in range(1, 11):
            await stranger(number)
        door._lines_s -= 1000
        await stranger(11)

    lines = with_a_door(site, story)

    assert [line["reason"] for line in lines] == ["tls"] * 4
    assert lines[-1]["detail"].endswith("; 7 more before it")


def test_one_connection_too_many_is_closed_and_the_next_one_after_an_end_is_not(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 1)

    async def story(door: Door) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", site.port, ssl=site.context(), server_hostname="127.0.0.1")
        session = ControllerSession()
        session.ask(Status())
        writer.write(session.data_to_send())
        assert await reader.read(1) == b"K"
        assert await knock(site, None) == b""
        writer.close()
        while await knock(site, site.context()) != b"K":
            pass  # until the end of the first one has been seen

    lines = with_a_door(site, story)

    assert (lines[0]["event"], lines[0]["reason"], lines[0]["detail"]) == ("connection_refused", "not_admitted", "1 connections are open")


def test_files_are_taken_when_they_have_not_changed_for_a_sweep(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Key and certificate are written one after the other, and between the two they do not fit: no reason to alarm anybody."""
    seen = iter("AABCCCC")
    taken_after: list[int] = []
    lines: list[str] = []

    def stamps(_files: TlsFiles) -> str:
        looks.append(next(seen, ""))
        if not looks[-1]:
            raise KeyboardInterrupt  # nothing more is to be seen
        return looks[-1]

    def take(*_: object, **__: object) -> ssl.SSLContext:
        taken_after.append(len(looks))
        return context

    looks: list[str] = []
    context = tls.server_context(load(site.config).tls)
    monkeypatch.setattr(server, "SWEEP_S", 0)
    monkeypatch.setattr(tls, "stamps", stamps)
    monkeypatch.setattr(tls, "server_context", take)
    controller = Controller(log=lambda event, **_: lines.append(event))
    door = Door(socket.socket(), context, controller, log=lambda *_, **__: None)

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(server._follow_certificate(load(site.config), door, controller, lambda event, **_: lines.append(event)))

    assert (taken_after, lines) == ([5], ["certificate_loaded"])


def test_one_coroutine_that_fails_ends_all_and_is_raised() -> None:
    ended: list[str] = []

    async def lasting() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("lasting")

    async def failing() -> None:
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        asyncio.run(server.run_together(lasting(), failing(), until=asyncio.Event()))

    assert ended == ["lasting"]


def turns_of_a_busy_loop(monkeypatch: pytest.MonkeyPatch, for_us: int, work_at_us: tuple[int, ...]) -> list[float | None]:
    """How long a loop, of which each turn takes 10 us, would sleep in its turns: 0 where it polls, None where it waits for a socket."""
    timeouts: list[float | None] = []

    async def story() -> None:
        loop, now_us = asyncio.get_running_loop(), 0
        busy, over = BusyPoll(for_us, lambda: now_us * 1000), asyncio.Event()
        selector = loop._selector  # type: ignore[attr-defined]  # of asyncio's own loop
        select = selector.select

        def looked(timeout: float | None = None) -> Any:
            nonlocal now_us
            timeouts.append(timeout)
            now_us += 10
            if now_us in work_at_us:
                loop.call_soon(lambda: busy.prolong(now_us * 1000))
            elif timeout is None:
                loop.call_soon(over.set)
            return select(0)

        monkeypatch.setattr(selector, "select", looked)
        busy.prolong(0)
        await over.wait()

    asyncio.run(story())
    return timeouts[: timeouts.index(None) + 1]


def test_a_busy_loop_looks_at_its_sockets_until_it_had_no_work_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert turns_of_a_busy_loop(monkeypatch, 100, ()) == [0] * 10 + [None]


def test_work_prolongs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert turns_of_a_busy_loop(monkeypatch, 100, (50,)) == [0] * 15 + [None]


def test_without_it_the_loop_sleeps_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert turns_of_a_busy_loop(monkeypatch, 0, ()) == [None]


def test_a_controller_that_polls_serves_and_ends(site: Site, any_loop: str) -> None:
    site.configure(busy_poll_us=100_000)
    site.start()
    agent = Agent(site)

    assert agent.hello().ok
    assert agent.ask(Register(*FRONT, "image")) == Answer(True, "allowed")
    assert agent.start(FRONT).allowed
    assert site.stop() == 0
