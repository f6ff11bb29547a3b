"""A compromised function, alone or with another one through another agent and another controller; stolen keys and tokens; forged words.

The attacker writes whatever frames it likes on the guard socket of its sandbox, or with the key of a node. What counts is what
the guard of an honest callee was allowed, at the far end.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import cast

import pytest
from controller_samples import EDGES, compiled

from control.guards import Guard, History, faults
from control.processes import WAIT_S, Agent, Plane, until
from control.redis_server import RedisServer
from kalium.pki.authority import Role
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.compile import compile_policy
from kalium.protocol.codec import encode
from kalium.protocol.frames import (
    AgentHello,
    Answer,
    ControllerWelcome,
    Frame,
    Hello,
    InstanceEnd,
    InstanceInvoke,
    InstanceStart,
    Register,
    Status,
)
from kalium.protocol.session import ControllerSession

COMPILED = compile_policy(EDGES.encode(), "edges")
POLICIES = {"edges": CompiledPolicy.parse(COMPILED), "shop": CompiledPolicy.parse(compiled())}
RUN = "0123456789abcdef"


class Scene:
    """Two controllers on one Redis. Node 0 is connected to the first, node 1 to the second: an attack over both crosses everything."""

    def __init__(self, plane: Plane, redis: RedisServer) -> None:
        self.plane = plane
        store = {"kind": "redis", "url": redis.url}
        self.one, self.two = (plane.controller(name, store) for name in ("one", "two"))
        self.near = plane.agent("node0", [self.one.address])
        self.far = plane.agent("node1", [self.two.address])
        self.history = History()

    async def guard(self, agent: Agent, function: str, app: str = "edges", container: str = "") -> Guard:
        guard = await Guard(agent, app, function, self.history, container).connect()
        assert guard.welcome.ok, guard.welcome
        return guard

    def play(self, story: Callable[[], Awaitable[None]]) -> None:
        """Run the story and judge what was granted in it."""

        async def run() -> None:
            await story()

        asyncio.run(run())
        assert faults(self.history, POLICIES) == []


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """One scene for all attacks that leave nothing behind."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as redis, Plane(COMPILED, compiled()) as plane:
        yield Scene(plane, redis)


@pytest.fixture
def scene(shared: Scene) -> Scene:
    shared.history = History()
    return shared


def granted(answer: Answer | None) -> Answer:
    assert answer is not None and answer.allowed, answer
    return answer


def refused(answer: Answer | None, reason: str) -> None:
    assert answer is not None
    assert (answer.allowed, answer.reason, answer.token, answer.call, answer.invocation) == (False, reason, "", "", "")


# Steps


def test_a_skipped_step_gives_no_token_and_the_honest_callee_does_not_start(scene: Scene) -> None:
    async def story() -> None:
        caller, last = await scene.guard(scene.near, "single"), await scene.guard(scene.far, "last")
        grant = granted(await caller.start())

        refused(await caller.invoke(grant, "last"), "edge_not_allowed")  # leaf, and its answer, come first
        refused(await last.start(), "not_an_entry")
        refused(await last.start(secrets.token_hex(16)), "bad_token")

    scene.play(story)


def test_a_repeated_step_starts_nobody_twice(scene: Scene) -> None:
    async def story() -> None:
        caller, leaf = await scene.guard(scene.near, "single"), await scene.guard(scene.far, "leaf")
        grant = granted(await caller.start())
        token = granted(await caller.invoke(grant, "leaf")).token

        refused(await caller.invoke(grant, "leaf"), "edge_not_allowed")
        granted(await leaf.start(token))
        refused(await leaf.start(token), "bad_token")

    scene.play(story)


def test_steps_in_another_order_are_refused(scene: Scene) -> None:
    async def story() -> None:
        caller, stock = await scene.guard(scene.near, "front", "shop"), await scene.guard(scene.far, "stock", "shop")
        pay = await scene.guard(scene.far, "pay", "shop")
        grant = granted(await caller.start())

        refused(await caller.invoke(grant, "pay"), "edge_not_allowed")
        granted(await stock.start(granted(await caller.invoke(grant, "stock")).token))
        granted(await pay.start(granted(await caller.invoke(grant, "pay")).token))
        refused(await caller.invoke(grant, "stock"), "edge_not_allowed")

    scene.play(story)


@pytest.mark.parametrize("callee", ["done", "single", "no-such-function", "", "leaf ", "LEAF", "front"])
def test_an_invented_invocation_is_refused(scene: Scene, callee: str) -> None:
    async def story() -> None:
        caller = await scene.guard(scene.near, "again")
        grant = granted(await caller.start())

        refused(await caller.invoke(grant, callee), "edge_not_allowed")
        refused(await caller.invoke(grant, "leaf", asynchronous=True), "edge_not_allowed")
        refused(await caller.invoke(grant, "leaf", asynchronous=True, callback="done"), "edge_not_allowed")
        granted(await caller.invoke(grant, "leaf"))

    scene.play(story)


def test_a_step_that_is_no_retry_is_not_taken_as_one(scene: Scene) -> None:
    async def story() -> None:
        caller = await scene.guard(scene.near, "single")
        grant = granted(await caller.start())
        refused(await caller.invoke(grant, "leaf", retry=True), "edge_not_allowed")
        granted(await caller.invoke(grant, "leaf"))
        refused(await caller.invoke(grant, "leaf", retry=True), "edge_not_allowed")  # it declares none

    scene.play(story)


# Together


def test_two_compromised_functions_gain_no_step_by_telling_each_other_everything(scene: Scene) -> None:
    """The caller on node 0 and its callee on node 1, through two controllers: what one has is worth nothing in the hands of the other."""

    async def story() -> None:
        caller, callee = await scene.guard(scene.near, "single"), await scene.guard(scene.far, "leaf")
        honest_last, honest_leaf = await scene.guard(scene.far, "last"), await scene.guard(scene.near, "leaf")
        grant = granted(await caller.start())
        token = granted(await caller.invoke(grant, "leaf")).token
        begun = granted(await callee.start(token))

        # The callee takes the caller's place, and the caller the callee's.
        for callee_of in ("last", "leaf", "job"):
            refused(await callee.invoke(grant, callee_of), "unknown_call")
            refused(await caller.invoke(begun, callee_of), "unknown_call")
        # A part of one, a part of the other.
        mixed = Answer(True, "allowed", grant.call, begun.invocation)
        refused(await caller.invoke(mixed, "last"), "unknown_call")
        # The caller says that its callee has answered, and goes on.
        caller.end(begun)
        refused(await caller.finish(begun), "unknown_call")
        refused(await caller.invoke(grant, "last"), "edge_not_allowed")
        # The spent token goes round.
        for guard in (honest_leaf, honest_last, caller, callee):
            answer = await guard.start(token)
            assert answer is not None
            refused(answer, "bad_token")

        granted(await callee.finish(begun))  # that is its own to say
        granted(await honest_last.start(granted(await caller.invoke(grant, "last")).token))

    scene.play(story)


def test_a_callback_does_not_come_before_its_result_whoever_presents_it(scene: Scene) -> None:
    async def story() -> None:
        caller, job = await scene.guard(scene.near, "later"), await scene.guard(scene.far, "job")
        done = await scene.guard(scene.near, "done")
        grant = granted(await caller.start())
        invoked = granted(await caller.invoke(grant, "job", asynchronous=True, callback="done"))
        begun = granted(await job.start(invoked.token))

        refused(await done.start(invoked.callback), "bad_token")
        refused(await job.start(invoked.callback), "bad_token")
        granted(await job.finish(begun))
        granted(await done.start(invoked.callback))
        refused(await done.start(invoked.callback), "bad_token")

    scene.play(story)


# Tokens


def test_a_token_is_good_for_its_callee_in_one_spelling_and_one_app(scene: Scene) -> None:
    async def story() -> None:
        caller, leaf = await scene.guard(scene.near, "single"), await scene.guard(scene.far, "leaf")
        other, stock = await scene.guard(scene.far, "other"), await scene.guard(scene.far, "stock", "shop")
        grant = granted(await caller.start())
        token = granted(await caller.invoke(grant, "leaf")).token
        altered = token[:-1] + ("0" if token[-1] != "0" else "1")

        for guard in (other, stock, caller):
            refused(await guard.start(token), "bad_token")
        for text in (altered, token.upper() if token.upper() != token else altered, token + "0", token[:-1], " " + token, token + "\0", "0x" + token):
            refused(await leaf.start(text), "bad_token")

        granted(await leaf.start(token))  # and none of that has spent it

    scene.play(story)


def test_a_token_that_was_taken_back_is_stale(scene: Scene) -> None:
    async def story() -> None:
        caller, leaf = await scene.guard(scene.near, "again"), await scene.guard(scene.far, "leaf")
        grant = granted(await caller.start())
        first = granted(await caller.invoke(grant, "leaf")).token
        second = granted(await caller.invoke(grant, "leaf", retry=True)).token

        refused(await leaf.start(first), "bad_token")
        granted(await leaf.start(second))

    scene.play(story)


def test_a_refused_entry_token_is_not_forgiven_at_an_entry(scene: Scene) -> None:
    async def story() -> None:
        entry = await scene.guard(scene.near, "single")

        refused(await entry.start(secrets.token_hex(16)), "bad_token")

    scene.play(story)


# Registrations and identities


def test_a_hello_that_differs_from_the_registration_is_refused(scene: Scene) -> None:
    async def story() -> None:
        container = scene.near.register("edges", "leaf")
        for hello in (
            Hello(secrets.token_hex(32), "edges", "leaf"),
            Hello(container, "edges", "single"),
            Hello(container, "shop", "leaf"),
            Hello(container, "shop", "front"),
        ):
            forged = await Guard(scene.near, hello.app, hello.function, scene.history, hello.container).connect(hello)
            assert (forged.welcome.ok, forged.welcome.reason) == (False, "unregistered")
            assert await forged.start() is None

        assert (await scene.guard(scene.near, "leaf", container=container)).is_connected

    scene.play(story)


def test_a_guard_that_says_who_it_is_in_a_step_is_closed(scene: Scene) -> None:
    async def story() -> None:
        honest, forger = await scene.guard(scene.near, "single"), await scene.guard(scene.near, "leaf")
        grant = granted(await honest.start())

        forger.send_bytes(encode(7, InstanceStart("1" * 16, "", "", 1, honest.container, "edges", "single")))
        forger.send_bytes(encode(8, InstanceInvoke("2" * 16, grant.call, grant.invocation, "leaf", 1, honest.container, "edges", "single")))
        await forger.closed()

        granted(await honest.invoke(grant, "leaf"))  # nobody has moved its cursor

    scene.play(story)


def test_a_second_instance_of_the_same_id_on_another_node_is_refused(scene: Scene) -> None:
    async def story() -> None:
        honest = await scene.guard(scene.near, "single")
        grant = granted(await honest.start())

        answer = scene.far.ask({"op": "register", "container": honest.container, "app": "edges", "function": "single", "image": "image"})
        assert (answer["ok"], answer["error"]) == (False, "unregistered")

        granted(await honest.invoke(grant, "leaf"))

    scene.play(story)


class Rogue:
    """Whoever has a certificate of the site and speaks with a controller without an agent."""

    def __init__(self, plane: Plane, certificate: str, port: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(plane.folder / "ca.crt")
        context.load_cert_chain(plane.folder / f"{certificate}.crt", plane.folder / f"{certificate}.key")
        self.session = ControllerSession()
        self.connection = context.wrap_socket(socket.create_connection(("127.0.0.1", port), timeout=WAIT_S), server_hostname="127.0.0.1")

    def ask(self, question: Frame) -> Frame | None:
        """The answer; None when the controller closes the connection instead."""
        asked = self.session.ask(question)
        try:
            self.connection.sendall(self.session.data_to_send())
            while self.session.close_reason is None:
                data = self.connection.recv(65536)
                if not data:
                    return None
                self.session.receive_data(data, now_ns=0)
                for event in self.session.events():
                    if event.id == asked:
                        return event.frame
        except (OSError, ssl.SSLError):
            pass
        return None

    def tell(self, frame: InstanceEnd) -> None:
        self.session.tell(frame)
        self.connection.sendall(self.session.data_to_send())

    def is_closed(self) -> bool:
        """Whether the controller ends the connection within WAIT_S."""
        try:
            while data := self.connection.recv(65536):
                self.session.receive_data(data, now_ns=0)
        except (OSError, ssl.SSLError) as error:
            return not isinstance(error, TimeoutError)
        return True

    def close(self) -> None:
        self.connection.close()


def test_a_node_does_not_speak_for_the_instances_of_another(scene: Scene) -> None:
    """With the whole key of node 2, and all that node 0's guards know."""
    scene.plane.issue("node2", Role.AGENT)

    async def story() -> None:
        honest = await scene.guard(scene.near, "single")
        grant = granted(await honest.start())
        token = granted(await honest.invoke(grant, "leaf")).token
        origin = (honest.container, "edges", "single")
        for port in (scene.one.port, scene.two.port):
            rogue = Rogue(scene.plane, "node2", port)
            assert cast(ControllerWelcome, rogue.ask(AgentHello("node2", RUN))).ok
            assert cast(Answer, rogue.ask(Register(*origin, "image"))).reason == "unregistered"
            assert cast(Answer, rogue.ask(InstanceStart("1" * 16, "", "", 1, *origin))).reason == "unregistered"
            assert cast(Answer, rogue.ask(InstanceInvoke("2" * 16, grant.call, grant.invocation, "last", 1, *origin))).reason == "unregistered"
            rogue.tell(InstanceEnd(grant.call, grant.invocation, "answered", *origin))
            # Its own leaf, with the token of the honest caller's, is another matter: the token is for any leaf of the app.
            assert cast(Answer, rogue.ask(InstanceStart("3" * 16, token, "", 1, "no-instance", "edges", "leaf"))).reason == "unregistered"
            rogue.close()

        leaf = await scene.guard(scene.far, "leaf")
        granted(await leaf.start(token))

    scene.play(story)


@pytest.mark.parametrize("node", ["node0", "node1", "", "node2 "])
def test_a_certificate_is_good_for_its_own_node(scene: Scene, node: str) -> None:
    scene.plane.issue("node2", Role.AGENT)
    rogue = Rogue(scene.plane, "node2", scene.one.port)

    assert rogue.ask(AgentHello(node, RUN)) is None
    assert until(lambda: [line for line in scene.one.events("connection_refused") if line["reason"] == "wrong_identity"], "the refusal in the log")


@pytest.mark.parametrize("role", [Role.CLIENT, Role.CONTROLLER])
def test_another_role_registers_nothing(scene: Scene, role: Role) -> None:
    name = f"role-{role.value}"
    scene.plane.issue(name, role, identity="node0")
    rogue = Rogue(scene.plane, name, scene.one.port)

    assert rogue.ask(Status()) is not None
    assert rogue.ask(AgentHello("node0", RUN)) is None


@pytest.mark.parametrize("where", ["same", "other"])
def test_a_stolen_agents_key_gets_nobodys_steps_and_the_honest_agent_goes_on(scene: Scene, where: str) -> None:
    """A second agent with the certificate of node 0, at the same controller or at the other one, while the first is alive."""
    controller = scene.one if where == "same" else scene.two

    async def story() -> None:
        honest = await scene.guard(scene.near, "single")
        grant = granted(await honest.start())
        origin = (honest.container, "edges", "single")
        rogue = Rogue(scene.plane, "node0", controller.port)
        welcome = rogue.ask(AgentHello("node0", RUN))
        if isinstance(welcome, ControllerWelcome) and welcome.ok:  # by a controller that does not hear the other one
            for frame in (
                Register(*origin, "image"),
                InstanceStart("1" * 16, "", "", 1, *origin),
                InstanceInvoke("2" * 16, grant.call, grant.invocation, "leaf", 1, *origin),
            ):
                answer = rogue.ask(frame)
                assert answer is None or (isinstance(answer, Answer) and not answer.allowed), answer
        assert rogue.is_closed()
        assert until(lambda: [line for line in controller.events("connection_refused") if line["reason"] == "duplicate_agent"], "the line in the log")

        granted(await honest.invoke(grant, "leaf"))
        granted(await honest.start())

    scene.play(story)


def test_an_agent_with_a_stolen_key_serves_no_guard(scene: Scene) -> None:
    """The real program, with everything that was on the node but its life."""
    thief = scene.plane.agent("node0", [scene.one.address, scene.two.address], folder="thief", certificate="node0", wait=False)

    def asks_in_vain() -> bool:
        """Whether it has been told of the first one again and again; until then it has registered nothing."""
        try:
            answer = thief.ask({"op": "register", "container": "f" * 64, "app": "edges", "function": "single", "image": "image"})
        except (FileNotFoundError, ConnectionRefusedError):  # it does not listen yet
            return False
        assert not answer["ok"], answer
        time.sleep(0.1)
        return thief.said().count("duplicate") > 3

    until(asks_in_vain, "the controllers to refuse it")
    thief.kill()

    async def story() -> None:
        granted(await (await scene.guard(scene.near, "single")).start())

    scene.play(story)
