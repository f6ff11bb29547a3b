"""Whatever comes over the wires that is no frame of the protocol: the peer is closed with a reason, and nobody else is harmed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import resource
import secrets
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
from controller_samples import EDGES

from control.guards import Guard, History
from control.processes import WAIT_S, Agent, Controller, Plane, Stopwatch, until
from control.test_attacks import Rogue, granted
from kalium.pki.authority import Role
from kalium.policy.compile import compile_policy
from kalium.protocol.codec import encode
from kalium.protocol.frames import AgentHello, Answer, ControllerWelcome, Hello, InstanceStart, Invoke, Lease, Ping, Register, Start, Status
from kalium.protocol.limits import FRAME_BYTES_MAX

COMPILED = compile_policy(EDGES.encode(), "edges")
RUN = "0123456789abcdef"
HALF_OPEN = 10_000
START = encode(7, Start("1" * 16, "", "label", 1))
PING = encode(3, Ping())


@pytest.fixture(scope="module")
def site() -> Iterator[tuple[Plane, Controller, Agent]]:
    with Plane(COMPILED) as plane:
        controller = plane.controller("controller")
        plane.issue("rogue", Role.AGENT)
        yield plane, controller, plane.agent("node0")


def prefix(kind: int, size: int, *, number: int = 7, form: int = 1, magic: bytes = b"KL") -> bytes:
    return struct.pack(">2sBBII", magic, form, kind, number, size)


# What is said, and the code by which the controller closes.
BAD = [
    pytest.param(b"GET / HTTP/1.1\r\n", "bad_magic", id="http"),
    pytest.param(prefix(26, 1, form=2) + b"\x80", "bad_version", id="unknown_form"),
    pytest.param(prefix(99, 1) + b"\x80", "unknown_type", id="unknown_type"),
    pytest.param(prefix(26, FRAME_BYTES_MAX + 1), "oversize", id="oversized"),
    pytest.param(prefix(26, 0xFFFFFFFF), "oversize", id="four_gigabytes"),
    pytest.param(prefix(26, 1, number=0) + b"\x80", "bad_id", id="no_id"),
    pytest.param(prefix(26, 1) + b"\xc1", "malformed", id="no_msgpack"),
    pytest.param(prefix(26, 0), "malformed", id="empty"),
    pytest.param(prefix(26, 2) + b"\x80\x80", "malformed", id="two_maps"),
    pytest.param(prefix(26, 3) + b"\x81\xa1x", "malformed", id="half_a_map"),
    pytest.param(prefix(26, 4) + b"\x81\xa1x\x01", "unknown_field", id="unknown_field"),
    pytest.param(prefix(26, 3) + b"\xde\x00\x00", "not_canonical", id="another_spelling"),
    pytest.param(prefix(20, 1) + b"\x80", "missing_field", id="missing_field"),
    pytest.param(PING[:-1] + b"\xc0", "wrong_type", id="wrong_type"),
    pytest.param(encode(7, AgentHello("rogue", RUN)), "unexpected_frame", id="a_second_hello"),
    pytest.param(encode(0, Lease(60_000)), "unexpected_frame", id="a_frame_of_the_other_side"),
    pytest.param(encode(7, Start("1" * 16, "", "", 1)), "unexpected_frame", id="a_guards_frame"),
]


@pytest.mark.parametrize(("data", "code"), BAD)
def test_a_peer_that_breaks_the_protocol_is_closed_by_the_controller(site: tuple[Plane, Controller, Agent], data: bytes, code: str) -> None:
    plane, controller, agent = site
    seen = len(controller.events("connection_closed"))
    rogue = Rogue(plane, "rogue", controller.port)
    welcome = rogue.ask(AgentHello("rogue", RUN))
    assert isinstance(welcome, ControllerWelcome) and welcome.ok

    rogue.connection.sendall(data)

    assert rogue.is_closed()
    line = until(lambda: controller.events("connection_closed")[seen:], "the line in the log")[0]
    assert line["reason"] == code
    assert agent.is_connected()


@pytest.mark.parametrize("size", [1, 11, 12, len(START) - 1])
def test_a_frame_that_is_cut_off_takes_no_step(site: tuple[Plane, Controller, Agent], size: int) -> None:
    plane, controller, _ = site
    seen = len(controller.events("connection_closed"))
    rogue = Rogue(plane, "rogue", controller.port)
    rogue.ask(AgentHello("rogue", RUN))

    rogue.connection.sendall(encode(7, InstanceStart("1" * 16, "", "", 1, "c", "edges", "single"))[:size])
    rogue.connection.unwrap()

    line = until(lambda: controller.events("connection_closed")[seen:], "the line in the log")[0]
    assert line["reason"] in ("truncated", "lost")


def test_a_recorded_connection_that_is_replayed_is_no_connection(site: tuple[Plane, Controller, Agent]) -> None:
    """Inside TLS nobody can; whoever has the key may, and gets what its own hello is worth: the second one replaces the first."""
    plane, controller, agent = site
    said = encode(1, AgentHello("rogue", RUN)) + encode(2, Status())
    first, second = (Rogue(plane, "rogue", controller.port) for _ in range(2))

    first.connection.sendall(said)
    assert first.connection.recv(1)  # it is served
    second.connection.sendall(said)

    assert first.is_closed()
    second.close()
    assert agent.is_connected()


# The agent's own socket: a guard that was taken over says what it likes.


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n",
        prefix(3, 1, form=2) + b"\x80",
        prefix(99, 1) + b"\x80",
        prefix(3, FRAME_BYTES_MAX + 1),
        prefix(3, 1) + b"\xc1",
        START[:-1] + b"\xc0",
        START + START,  # a second question with the id of an open one
        encode(9, Hello("c" * 64, "edges", "leaf")),
        encode(0, Lease(3_600_000)),
        encode(9, Ping()),
    ],
    ids=["http", "unknown_form", "unknown_type", "oversized", "no_msgpack", "wrong_type", "twice", "hello", "lease", "ping"],
)
def test_a_guard_that_breaks_the_protocol_is_closed_by_its_agent(site: tuple[Plane, Controller, Agent], data: bytes) -> None:
    _, controller, agent = site

    async def story() -> None:
        history = History()
        honest, bad = await Guard(agent, "edges", "single", history).connect(), await Guard(agent, "edges", "leaf", history).connect()
        assert bad.welcome.ok

        controller.send(signal.SIGSTOP)  # a question that is asked stays open
        try:
            bad.send_bytes(data)
            await bad.closed()
        finally:
            controller.send(signal.SIGCONT)

        granted(await honest.start())

    asyncio.run(story())
    assert agent.is_connected()


def test_a_guard_that_never_reads_is_dropped_and_others_are_served(site: tuple[Plane, Controller, Agent]) -> None:
    _, controller, agent = site

    async def story() -> list[float]:
        history = History()
        honest = await Guard(agent, "edges", "single", history).connect()
        container = agent.register("edges", "leaf")
        deaf = socket.socket(socket.AF_UNIX)
        deaf.connect(str(agent.guard_socket))
        deaf.sendall(encode(1, Hello(container, "edges", "leaf")))
        deaf.setblocking(False)
        took: list[float] = []
        left = b""  # of what was begun: it says nothing but whole frames
        numbers = itertools.count(2)
        deadline = time.monotonic() + WAIT_S
        while True:
            assert time.monotonic() < deadline, "it is not dropped"
            for number in itertools.islice(numbers, 500 if not left else 0):
                left += encode(number, Invoke(f"{number:016x}", "0" * 32, "0" * 32, "leaf" * 120, 1))
            try:
                left = left[deaf.send(left) :]
            except BlockingIOError:
                pass  # it is not read either for a while
            except (BrokenPipeError, ConnectionResetError):
                break
            watch = Stopwatch(agent.pid, controller.pid)
            grant = granted(await honest.start())
            took.append(watch.seconds())
            honest.end(grant)
        deaf.close()
        # By what waits for it, or on a busy machine, where less comes, by the time of a write.
        why = re.compile(rf"{container}.*(does not read|write .*i/o timeout)")
        until(lambda: why.search(agent.said()), "the reason in the log")
        return took

    took = asyncio.run(story())
    assert max(took) < 0.5
    assert agent.is_connected()


# Many, and slow


class HalfOpen:
    """Connections to a port that say nothing, as many as the system lets there be."""

    def __init__(self, port: int, count: int) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        assert hard > count + 500, f"{hard} descriptors are too few for {count} connections"
        self._limit = (soft, hard)
        self.connections: list[socket.socket] = []
        for number in range(count):
            connection = socket.socket()
            connection.setblocking(False)
            # Of many addresses of loopback, so that no port is needed twice.
            connection.bind((f"127.0.{number // 250 % 250}.{number % 250 + 1}", 0))
            connection.connect_ex(("127.0.0.1", port))
            self.connections.append(connection)

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, self._limit)


async def pace(guard: Guard, controller: Controller, seconds: float) -> list[float]:
    """How long each of many starts took, one after the other."""
    took = []
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        watch = Stopwatch(guard.agent.pid, controller.pid)
        grant = granted(await guard.start())
        took.append(watch.seconds())
        guard.end(grant)
    return sorted(took)


def p99(took: list[float]) -> float:
    return took[len(took) * 99 // 100]


def test_ten_thousand_connections_that_say_nothing_keep_nobody_from_being_served(tmp_path: Path) -> None:
    """Who is connected is served as before, and who is not gets in: the oldest of those that say nothing has to go."""
    with Plane(COMPILED) as plane:
        controller = plane.controller("controller")
        agent = plane.agent("node0")

        async def quiet() -> list[float]:
            return await pace(await Guard(agent, "edges", "single", History()).connect(), controller, 1.5)

        before = asyncio.run(quiet())
        half_open = HalfOpen(controller.port, HALF_OPEN)
        try:
            during = asyncio.run(quiet())
            begun = time.monotonic()
            late = plane.agent("node1")
            joined_s = time.monotonic() - begun
            descriptors = len(list(Path(f"/proc/{controller.pid}/fd").iterdir()))
            assert late.is_connected()
        finally:
            half_open.close()

        print(
            f"half open: {HALF_OPEN}, p99 before {1000 * p99(before):.1f} ms, during {1000 * p99(during):.1f} ms, "
            f"a new agent after {joined_s:.2f} s, descriptors of the controller {descriptors}, lines {len(controller.lines())}"
        )
        assert p99(during) < 0.1
        assert joined_s < 8
        assert descriptors < 1000
        assert len(controller.lines()) < 1000


def test_a_client_that_never_reads_is_dropped_and_costs_nobody_else(site: tuple[Plane, Controller, Agent]) -> None:
    plane, controller, agent = site
    seen = len(controller.events("connection_closed"))
    deaf = Rogue(plane, "rogue", controller.port)
    question = Register("deaf", "edges", "leaf", "image")  # short, with a long answer, and granted however often it is asked
    deaf.ask(AgentHello("rogue", RUN))
    assert cast(Answer, deaf.ask(question)).allowed
    deaf.connection.settimeout(0.5)
    stop = threading.Event()

    questions = b"".join(encode(1000 + number, question) for number in range(2000))  # more than are worked on at a time

    def shout() -> None:
        with contextlib.suppress(OSError):
            while not stop.is_set():
                deaf.connection.sendall(questions)

    shouting = threading.Thread(target=shout)
    shouting.start()

    async def story() -> list[float]:
        return await pace(await Guard(agent, "edges", "single", History()).connect(), controller, 3.0)

    took = asyncio.run(story())
    try:
        ends = until(
            lambda: [line for line in controller.events("connection_closed")[seen:] if line["reason"] != "replaced"], "the end of who does not read"
        )
    finally:
        stop.set()
        shouting.join()
    print(f"beside one that never reads: p99 {1000 * p99(took):.1f} ms of {len(took)} starts")
    assert [line["reason"] for line in ends] == ["slow_reader"]
    assert p99(took) < 0.25


def test_one_that_never_finishes_its_hello_is_closed(site: tuple[Plane, Controller, Agent]) -> None:
    plane, controller, _ = site
    slow = Rogue(plane, "rogue", controller.port)
    slow.connection.sendall(encode(1, AgentHello("rogue", secrets.token_hex(8)))[:20])

    assert slow.is_closed()
    assert until(lambda: [line for line in controller.events("connection_closed") if line["reason"] == "hello_timeout"], "the line in the log")
