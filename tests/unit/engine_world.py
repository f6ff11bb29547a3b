"""A machine for the engine that is not one: `ip` and `podman` as far as the engine uses them, with every interface, namespace and
container in a dictionary. A started container is a small HTTP server on its own loopback address, so requests are real."""

from __future__ import annotations

import asyncio
import base64
import ipaddress
import json
import os
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
from yarl import URL

from kalium.engine.backend import Observe
from kalium.engine.config import Bridge, Config, Listener, PodmanConfig, Runtime
from kalium.engine.log import LogLine
from kalium.engine.podman.backend import PodmanBackend
from kalium.engine.podman.command import CommandFailed, Done, Programs
from kalium.engine.podman.host import Sandbox, Watch
from kalium.engine.server import Engine, MakeBackend
from kalium.engine.state import State

STORY_S = 60.0
WAIT_S = 20.0
BRIDGE = "kaltest0"
PORT = 20_000 + os.getpid() % 10_000  # two runs on one machine do not meet
IMAGE_ID = "sha256:" + "5" * 64
APP = {"kalium.io/app": "shop"}
GUARDED = {"kalium.io/runtime": "kalium"}
Answering = Callable[[str, str], Awaitable[bytes]]  # (head, body) -> a whole HTTP answer

_Result = TypeVar("_Result")


def play(story: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a story to its end, on a clock that ends it when it hangs."""
    return asyncio.run(asyncio.wait_for(story, STORY_S))


async def until(claim: Callable[[], object], what: str) -> None:
    """Let everything else go on until `claim` is true."""
    deadline = time.monotonic() + WAIT_S
    while not claim():
        assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s in vain for {what}"
        await asyncio.sleep(0.001)


def http_answer(status: int, body: bytes, *fields: str) -> bytes:
    """A whole answer with a length."""
    return "\r\n".join([f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *fields, "", ""]).encode() + body


async def echo(head: str, body: str) -> bytes:
    """What a test's function does by itself: 200 for the health path, otherwise what it saw."""
    return http_answer(200, json.dumps({"head": head, "body": body}).encode(), "Content-Type: application/json")


@dataclass
class Container:
    """One container of the fake podman."""

    id: str
    name: str
    words: list[str]
    server: asyncio.AbstractServer | None = None
    files: bytes = b""

    def value(self, option: str) -> str:
        return self.words[self.words.index(option) + 1]

    def values(self, option: str) -> list[str]:
        return [self.words[index + 1] for index, word in enumerate(self.words[:-1]) if word == option]

    @property
    def labels(self) -> dict[str, str]:
        return dict(label.split("=", 1) for label in self.values("--label"))


@dataclass
class Machine:
    """The fake. `fails(command)` is asked before each command and may say why it fails; `commands` are all that ran."""

    images: set[str] = field(default_factory=lambda: {"shop/echo:1", "shop/echo:2"})
    links: dict[str, dict[str, Any]] = field(default_factory=dict)
    namespaces: dict[str, str] = field(default_factory=dict)  # name -> address of its eth0, "" before it has one
    containers: dict[str, Container] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    fails: Callable[[str], str | None] = lambda command: None
    answering: Answering = echo
    is_healthy: bool = True
    health: bytes = b""  # the whole answer to a question for it; "" as is_healthy says
    requests: list[str] = field(default_factory=list)
    logs: bytes = b"2026-01-01T00:00:00Z hello from the function\n"
    printed: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)  # lines for whoever follows
    following: int = 0
    made: int = 0  # containers, ever
    now: int = 0  # commands that run at this moment, and the most that ever did
    most: int = 0

    def backend(self, watch: Watch) -> MakeBackend:
        """What makes the back-end of an engine on this machine."""

        def make(config: Config, state: State, log: LogLine, observe: Observe) -> PodmanBackend:
            assert isinstance(config.backend, PodmanConfig)
            return PodmanBackend(config, config.backend, state, log, observe, Programs(self.run, self.stream), watch)

        return make

    async def stream(self, argv: Sequence[str]) -> AsyncGenerator[bytes, None]:
        """`kalium.engine.podman.command.Stream`: what was printed, and then what a test puts into `printed`."""
        self.commands.append(" ".join(argv))
        self.following += 1
        try:
            for line in self.logs.splitlines():
                yield line
            while True:
                yield await self.printed.get()
        finally:
            self.following -= 1

    def is_clean(self) -> bool:
        """Nothing is left but the bridge."""
        return not self.namespaces and not self.containers and set(self.links) <= {BRIDGE}

    async def run(self, argv: Sequence[str], *, seconds_max: float, stdin: bytes = b"") -> Done:
        """`kalium.engine.podman.command.Run`."""
        command = " ".join(argv) + (f" <<{stdin.decode()}" if stdin and argv[0] == "ip" else "")
        self.commands.append(command)
        is_podman = argv[0] == "podman"
        self.now += is_podman
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0)
            reason = self.fails(command)
            if reason == "cannot be run":
                raise CommandFailed(argv, reason)
            if reason is not None:
                return Done(1, b"", f"Error: {reason}\n".encode())
            return await (self._podman(list(argv[1:]), stdin) if is_podman else self._ip(list(argv[1:]), stdin.decode()))
        finally:
            self.now -= is_podman

    # ip

    async def _ip(self, words: list[str], batch: str) -> Done:
        if "-batch" in words:
            for line in batch.splitlines():
                done = await self._ip([*words[: words.index("-batch")], *line.split()], "")
                if done.code:
                    return done
            return Done(0)
        if words[:3] == ["-json", "-details", "address"]:
            return Done(0, json.dumps([{"ifname": name, **link} for name, link in self.links.items()]).encode())
        if words[:5] == ["-json", "link", "show", "master", BRIDGE]:
            return Done(0, json.dumps([{"ifname": name} for name, link in self.links.items() if link.get("master") == BRIDGE]).encode())
        text = " ".join(words)
        for pattern, act in (
            (rf"link add {BRIDGE} address \S+ type bridge", self._add_bridge),
            (rf"address add (\S+) dev {BRIDGE}", self._address_bridge),
            (rf"link set {BRIDGE} up", lambda: self.links[BRIDGE]["flags"].append("UP")),
            (rf"link delete {BRIDGE} type bridge", lambda: self.links.pop(BRIDGE)),
            (rf"link add (\S+) up master {BRIDGE} type veth peer name (\S+) address \S+", self._add_pair),
            (r"netns add (\S+)", lambda name: self.namespaces.update({name: ""})),
            (r"link set (\S+) netns (\S+) name eth0", self._move),
            (r"-n (\S+) address add (\S+)/24 dev eth0", lambda name, address: self.namespaces.update({name: address})),
            (r"-n (\S+) link set (?:eth0|lo) (?:up|addrgenmode none)", lambda name: self.namespaces[name]),
            (r"netns delete (\S+)", self._delete_namespace),
            (r"link delete (kv\S+)", self._delete_pair),
        ):
            if match := re.fullmatch(pattern, text):
                act(*match.groups())
                return Done(0)
        if text == "netns list":
            return Done(0, "".join(f"{name} (id: 1)\n" for name in self.namespaces).encode())
        raise AssertionError(f"the engine ran ip {text}")

    def _add_bridge(self) -> None:
        self.links[BRIDGE] = {"linkinfo": {"info_kind": "bridge"}, "addr_info": [], "flags": []}

    def _address_bridge(self, address: str) -> None:
        local, _, prefix = address.partition("/")
        self.links[BRIDGE]["addr_info"].append({"family": "inet", "local": local, "prefixlen": int(prefix)})

    def _add_pair(self, near: str, far: str) -> None:
        assert BRIDGE in self.links
        self.links[near] = {"master": BRIDGE, "peer": far}
        self.links[far] = {"peer": near}

    def _move(self, far: str, namespace: str) -> None:
        assert namespace in self.namespaces
        self.links[self.links.pop(far)["peer"]]["namespace"] = namespace

    def _delete_pair(self, near: str) -> None:
        self.links.pop(str(self.links.pop(near)["peer"]), None)

    def _delete_namespace(self, name: str) -> None:
        del self.namespaces[name]
        for near in [near for near, link in self.links.items() if link.get("namespace") == name]:
            del self.links[near]

    # podman

    async def _podman(self, words: list[str], stdin: bytes) -> Done:
        if words == ["--version"]:
            return Done(0, b"podman version 4.3.1\n")
        verb = next(index for index, word in enumerate(words) if word in ("image", "create", "cp", "start", "logs", "rm", "ps"))
        return await getattr(self, f"_podman_{words[verb]}")(words[verb + 1 :], stdin)  # type: ignore[no-any-return]

    def _find(self, name: str) -> Container | None:
        return next((container for container in self.containers.values() if name in (container.id, container.name)), None)

    async def _podman_image(self, words: list[str], stdin: bytes) -> Done:
        return Done(0, IMAGE_ID.encode() + b"\n") if words[-1] in self.images else Done(125, b"", f"Error: {words[-1]}: image not known\n".encode())

    async def _podman_create(self, words: list[str], stdin: bytes) -> Done:
        self.made += 1
        container = Container(f"{self.made:064x}", words[words.index("--name") + 1], words)
        namespace = container.value("--network").rpartition("/")[2]
        assert self.namespaces.get(namespace), f"{container.name} joins {namespace}, which has no address"
        assert words[-1] == IMAGE_ID
        self.containers[container.id] = container
        return Done(0, container.id.encode() + b"\n")

    async def _podman_cp(self, words: list[str], stdin: bytes) -> Done:
        container = self._find(words[-1].partition(":")[0])
        assert container is not None
        container.files = stdin
        return Done(0)

    async def _podman_start(self, words: list[str], stdin: bytes) -> Done:
        container = self._find(words[-1])
        assert container is not None
        address = self.namespaces[container.value("--network").rpartition("/")[2]]

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = re.search(r"(?i)^content-length: (\d+)", head, re.MULTILINE)
                body = (await reader.readexactly(int(length[1]))).decode("latin-1") if length else ""
                if head.startswith("GET /_/health "):
                    answer = self.health or http_answer(200 if self.is_healthy else 500, b"")
                else:
                    self.requests.append(head.partition("\r\n")[0])
                    answer = await self.answering(head, body)
                writer.write(answer)
                await writer.drain()
            writer.close()

        container.server = await asyncio.start_server(serve, address, PORT)
        return Done(0, container.id.encode())

    async def _podman_logs(self, words: list[str], stdin: bytes) -> Done:
        return Done(0, self.logs)

    async def _podman_rm(self, words: list[str], stdin: bytes) -> Done:
        container = self._find(words[-1])
        if container is not None:
            if container.server is not None:
                container.server.close()
            del self.containers[container.id]
        return Done(0)

    async def _podman_ps(self, words: list[str], stdin: bytes) -> Done:
        entries = [{"Id": container.id, "Labels": container.labels} for container in self.containers.values()]
        return Done(0, json.dumps(entries).encode())


class FakeWatch(Watch):
    """Ends of sandboxes come from the test."""

    def start(self, instance: Sandbox, pid_file: Path) -> None:
        self._handles[instance] = 0

    def stop(self, instance: Sandbox) -> None:
        self._handles.pop(instance, None)

    def kill(self, name: str) -> None:
        """The process of an instance of function `name` is gone, without a word on its connections."""
        instance = next(instance for instance in self._handles if instance.deployment.name == name)
        self._ended(instance)


class FakeAgent:
    """The agent's registration socket. `refusal` is the error code that it answers; None: it registers."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.registered: dict[str, tuple[str, str, str]] = {}
        self.refusal: str | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            question = json.loads(line)
            answer: dict[str, Any] = {"ok": True}
            if question["op"] == "unregister":
                self.registered.pop(question["container"], None)
            elif self.refusal is not None:
                answer = {"ok": False, "error": self.refusal, "detail": "as the test says"}
            else:
                self.registered[question["container"]] = (question["app"], question["function"], question["image"])
            writer.write(json.dumps(answer).encode() + b"\n")
        writer.close()


def config(folder: Path) -> Config:
    """A configuration whose instances have loopback addresses."""
    (folder / "password").write_text("right\n", encoding="utf-8")
    runtime = folder / "runsc"
    runtime.write_text("", encoding="utf-8")
    runtime.chmod(0o755)
    first = ipaddress.IPv4Address("127.66.0.10")
    return Config(
        admin=Listener("127.0.0.1", 0),
        data=Listener("127.0.0.1", 0),
        user="admin",
        password_file=folder / "password",
        hosts={"gateway": "127.66.0.1", "database": "127.66.0.1"},
        backend=PodmanConfig(
            bridge=Bridge(BRIDGE, ipaddress.IPv4Address("127.66.0.1"), 24, first, first + 9),
            runtimes={
                "stock": Runtime(runtime, ("network=sandbox",), guarded=False),
                "kalium": Runtime(runtime, ("network=sandbox", "x=y"), guarded=True),
            },
            command=("podman",),
            agent=folder / "agent.sock",
        ),
        state_dir=folder / "state",
        function_port=PORT,
        health_path="/_/health",
        log=None,
    )


@dataclass
class World:
    """A running engine, its machine, its agent, its log, and a client of its API."""

    machine: Machine
    agent: FakeAgent
    watch: FakeWatch
    engine: Engine
    config: Config
    session: aiohttp.ClientSession
    log: list[dict[str, Any]]

    @property
    def listening(self) -> dict[str, Any]:
        return next(line for line in self.log if line["event"] == "listening")

    @property
    def backend(self) -> PodmanBackend:
        """The engine's back-end, with all that a test may look into."""
        assert isinstance(self.engine.backend, PodmanBackend)
        return self.engine.backend

    @property
    def agent_socket(self) -> Path:
        assert isinstance(self.config.backend, PodmanConfig)
        return self.config.backend.agent

    def events(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.log if line["event"] == event]

    async def call(
        self, method: str, path: str, body: Any = None, *, auth: str = "admin:right", side: str = "address", headers: dict[str, str] | None = None
    ) -> tuple[int, str, dict[str, str]]:
        """One request to the admin side, or with `side="data_address"` to the functions' side."""
        sent = dict(headers or {})
        if auth and path.startswith("/system"):
            sent["Authorization"] = "Basic " + base64.b64encode(auth.encode()).decode()
        data = body if isinstance(body, (bytes, str)) or body is None else json.dumps(body)
        url = f"http://{self.listening[side]}{path}"
        async with self.session.request(method, URL(url, encoded=True), data=data, headers=sent) as answer:
            return answer.status, (await answer.read()).decode("utf-8", "replace"), {key.lower(): value for key, value in answer.headers.items()}

    async def deploy(self, name: str = "echo", *, method: str = "POST", **fields: Any) -> tuple[int, str]:
        status, text, _ = await self.call(method, "/system/functions", {"service": name, "image": "shop/echo:1", **fields})
        return status, text

    async def describe(self, name: str = "echo") -> dict[str, Any]:
        status, text, _ = await self.call("GET", f"/system/function/{name}")
        assert status == 200, text
        described: dict[str, Any] = json.loads(text)
        return described

    async def ready(self, name: str = "echo", replicas: int = 1) -> dict[str, Any]:
        """Poll as a client does, until so many replicas are available."""
        deadline = time.monotonic() + WAIT_S
        while (described := await self.describe(name))["availableReplicas"] != replicas:
            assert time.monotonic() < deadline, f"waited {WAIT_S:.0f} s in vain for {replicas} replicas of {name}: {described}"
            await asyncio.sleep(0.002)
        return described

    async def invoke(self, name: str = "echo", tail: str = "", body: Any = b"hi", **options: Any) -> tuple[int, str, dict[str, str]]:
        return await self.call("POST", f"/function/{name}{tail}", body, **options)


@asynccontextmanager
async def world(folder: Path, machine: Machine | None = None) -> AsyncIterator[World]:
    """An engine that serves while the block lasts. At its end nothing may be left on the machine, at the agent or in the engine."""
    machine, made, log = machine or Machine(), config(folder), []
    assert isinstance(made.backend, PodmanConfig)
    agent, watch = FakeAgent(made.backend.agent), FakeWatch()
    door = await asyncio.start_unix_server(agent.serve, str(made.backend.agent))
    engine = Engine(made, lambda event, **fields: log.append({"event": event, **fields}), machine.backend(watch))
    serving = asyncio.ensure_future(engine.serve())
    try:
        await until(lambda: serving.done() or any(line["event"] == "listening" for line in log), "the engine to listen")
        if serving.done():
            await serving
        async with aiohttp.ClientSession() as session:
            yield World(machine, agent, watch, engine, made, session, log)
    finally:
        engine.stop()
        (failed,) = await asyncio.gather(serving, return_exceptions=True)
        door.close()
        if failed is not None:
            raise failed  # a mistake of the engine's comes before what a story thought of it
    assert machine.is_clean(), machine
    assert agent.registered == {}
    assert not watch._handles
    assert isinstance(engine.backend, PodmanBackend)
    assert not engine.backend.host.pool.taken, "every address is free again"
