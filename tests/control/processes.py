"""Controllers, agents and what stands between them, as real processes in a directory of their own."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from kalium.controller.client import status
from kalium.controller.config import load
from kalium.errors import KaliumError
from kalium.pki import files
from kalium.pki.authority import Role
from kalium.policy.envelope import sign
from kalium.protocol.frames import StatusReport

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 20.0
NAMES = ("DNS:localhost", "IP:127.0.0.1")


def until(claim: Callable[[], Any], what: str, seconds: float = WAIT_S) -> Any:
    """Poll `claim` until it is true and return its value; fail with `what` at the deadline."""
    deadline = time.monotonic() + seconds
    while not (value := claim()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s in vain for {what}"
        time.sleep(0.01)
    return value


class Stopwatch:
    """How long something takes to whom these processes and this one work, without what they wait for a processor that others have."""

    def __init__(self, *pids: int) -> None:
        self._pids = (os.getpid(), *pids)
        self._begun_s, self._waited_s = time.monotonic(), self._waited()

    def seconds(self) -> float:
        """Since it was made."""
        took_s = time.monotonic() - self._begun_s
        return max(0.0, took_s - (self._waited() - self._waited_s))

    def _waited(self) -> float:
        """Of all threads there are; proc(5) has it in nanoseconds."""
        tasks = [task for pid in self._pids for task in Path(f"/proc/{pid}/task").iterdir()]
        waited_ns = 0
        for task in tasks:
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended waits no more
                waited_ns += int((task / "schedstat").read_text(encoding="ascii").split()[1])
        return waited_ns / 1e9


def free_port() -> int:
    """A port that is free, and stays so on loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@cache
def built(name: str) -> Path:
    """The program runtime/cmd/`name` of this checkout. Go's own cache makes it a matter of seconds."""
    version = next(line.split()[1] for line in (ROOT / "runtime" / "go.mod").read_text(encoding="utf-8").splitlines() if line.startswith("go "))
    finder = [sys.executable, str(ROOT / "roles/kalium_toolchain/files/find_go.py"), version]
    go = subprocess.run(finder, capture_output=True, text=True, check=True).stdout.strip()
    folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
    command = [go, "build", "-trimpath", "-o", str(folder / name), f"./cmd/{name}"]
    done = subprocess.run(command, cwd=ROOT / "runtime", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / name


class Process:
    """A program with a log, that can be killed and started again."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, command: Sequence[str], **environment: str) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **environment}, cwd=self.log.parent)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        """As a crash: nothing is said any more."""
        self.end(signal.SIGKILL)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit status. One that has ended already is left alone."""
        if self.process is None:
            return 0
        self.process.send_signal(number)
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
        result = self.process.wait(timeout=WAIT_S)
        self.process = None
        return result

    def said(self) -> str:
        """The log, as it is."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_kib(self) -> int:
        """Resident memory."""
        text = Path(f"/proc/{self.pid}/status").read_text(encoding="ascii")
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS:")))

    def lines(self) -> list[dict[str, Any]]:
        """The log, of what is whole and JSON."""
        found = []
        for line in self.log.read_bytes().rpartition(b"\n")[0].splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines() if name in (line.get("event"), line.get("msg"))]


class Controller(Process):
    """`kalium controller serve`."""

    def __init__(self, plane: Plane, name: str, store: dict[str, Any], **more: object) -> None:
        super().__init__(plane.folder / f"{name}.log")
        self.name = name
        self.port = free_port()
        self.policies = plane.folder / f"{name}.policies"
        self.policies.mkdir()
        self.config = plane.folder / f"{name}.json"
        plane.issue(name, Role.CONTROLLER)
        self._document = {
            "listen": {"host": "127.0.0.1", "port": self.port},
            "tls": {"ca": "ca.crt", "cert": f"{name}.crt", "key": f"{name}.key"},
            "operator_key": "operator.pub",
            "policies_dir": str(self.policies),
            "name": name,
            "store": store,
            "audit": plane.audit(name, f"{name}.audit.jsonl"),
            **more,
        }

    @property
    def address(self) -> tuple[str, str]:
        """Where it is, and the name of its certificate, as an agent is configured with."""
        return f"127.0.0.1:{self.port}", "localhost"

    def start(self) -> Controller:
        self.config.write_text(json.dumps(self._document))
        command = [sys.executable, "-m", "kalium.cli.main", "controller", "serve", "--config", str(self.config)]
        before = len(self.events("listening")) if self.log.exists() else 0
        self.run(command, PYTHONPATH=str(ROOT))
        until(lambda: len(self.events("listening")) > before, f"{self.name}: {self.log.read_text()}")
        return self

    def status(self) -> StatusReport:
        return status(load(self.config))


class Agent(Process):
    """`kalium-agent` of a node. `certificate` is the file that it proves itself with: its node's unless something is wrong."""

    def __init__(self, plane: Plane, node: str, controllers: Sequence[tuple[str, str]], *, folder: str = "", certificate: str = "") -> None:
        self.folder = plane.folder / (folder or node)
        self.folder.mkdir()
        (self.folder / "state").mkdir()
        super().__init__(self.folder / "agent.log")
        self.node = node
        self.plane = plane
        if not certificate:
            plane.issue(node, Role.AGENT)
        self.guard_socket = self.folder / "guard"
        self.register_socket = self.folder / "register"
        self.config = self.folder / "agent.json"
        document = {
            "node": node,
            "guard_socket": str(self.guard_socket),
            "register_socket": str(self.register_socket),
            "controllers": [{"address": address, "name": name} for address, name in controllers],
            "tls": {
                "ca": str(plane.folder / "ca.crt"),
                "cert": str(plane.folder / f"{certificate or node}.crt"),
                "key": str(plane.folder / f"{certificate or node}.key"),
            },
            "operator_key": str(plane.folder / "operator.pub"),
            "state_dir": str(self.folder / "state"),
            "verdict_log": str(self.folder / "verdicts.jsonl"),
            "timing_log": str(self.folder / "timings.jsonl"),
            "audit": plane.audit(node, str(self.folder / "audit.jsonl")),
            "names": {},
            "incoming": {"port": 8080, "sources": ["127.0.0.1/32"], "health_path": "/"},
            "lease_ms": 60000,
        }
        self.config.write_text(json.dumps(document))

    def start(self, *, wait: bool = True) -> Agent:
        self.run([str(built("kalium-agent")), "--config", str(self.config)])
        if wait:
            until(self.is_connected, f"the agent: {self.log.read_text()}")
        return self

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """One line to its register socket, and the answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(WAIT_S)
            connection.connect(str(self.register_socket))
            connection.sendall(json.dumps(question).encode() + b"\n")
            answer: dict[str, Any] = json.loads(connection.makefile().readline())
            return answer

    def is_connected(self) -> bool:
        try:
            answer = self.ask({"op": "status"})
        except OSError:
            return False
        return bool(answer.get("controller")) and bool(answer.get("policies"))

    def controller(self) -> str:
        """The address of the controller that it is connected to; "" for none."""
        return next((str(each["address"]) for each in self.ask({"op": "status"})["controllers"] if each["connected"]), "")

    def register(self, app: str, function: str, container: str = "") -> str:
        """Register an instance as the engine does, and return its id."""
        container = container or secrets.token_hex(32)
        answer = self.ask({"op": "register", "container": container, "app": app, "function": function, "image": "image"})
        assert answer.get("ok"), answer
        return container


class Plane:
    """`with Plane(policies) as plane`: a PKI, an operator, and whatever a test starts; all of it is ended with it."""

    def __init__(self, *policies: bytes) -> None:
        self._policies = policies
        self._stack = ExitStack()
        self.controllers: list[Controller] = []

    def __enter__(self) -> Plane:
        # Sockets have short names: not pytest's folder.
        self.folder = Path(tempfile.mkdtemp(prefix="kalium-control-"))
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        files.init(self.folder, now=datetime.now(timezone.utc))
        files.operator_key(self.folder)
        key = load_pem_private_key((self.folder / "operator.key").read_bytes(), None)
        assert isinstance(key, Ed25519PrivateKey)
        self.operator = key
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def issue(self, name: str, role: Role, identity: str = "") -> None:
        files.issue(self.folder, name, NAMES, role=role, identity=identity, days=7, now=datetime.now(timezone.utc))

    def audit(self, name: str, log: str) -> dict[str, Any]:
        """The configuration of an audit log that is signed by a key of `name`."""
        files.audit_key(self.folder / "audit", name)
        return {"log": str(self.folder / log), "key": str(self.folder / "audit" / f"{name}.key"), "fsync": "interval", "max_mib": 64}

    def process(self, name: str, command: Sequence[str], *, ready: str = "") -> Process:
        """Another program that is started; `ready` is what it says when it can be used."""
        made = Process(self.folder / f"{name}.log")
        self._stack.callback(made.kill)
        made.run(command, PYTHONPATH=f"{ROOT / 'tests'}:{ROOT}")
        until(lambda: ready in made.said(), f"{name}: {ready}")
        return made

    def controller(self, name: str, store: dict[str, Any] | None = None, **more: object) -> Controller:
        """A controller that is started, with `more` keys in its configuration."""
        made = Controller(self, name, store or {"kind": "memory"}, **more)
        self._stack.callback(made.kill)
        for policy in self._policies:
            self.publish(made, policy)
        self.controllers.append(made)
        return made.start()

    def publish(self, controller: Controller, policy: bytes) -> None:
        """Put a policy, signed, where one controller finds it, whole at once."""
        app = json.loads(policy)["app"]
        part = controller.policies / ".part"
        part.write_bytes(sign(policy, self.operator))
        part.replace(controller.policies / f"{app}.signed.json")

    def agent(self, node: str, controllers: Sequence[tuple[str, str]] | None = None, *, wait: bool = True, **options: str) -> Agent:
        """An agent that is started."""
        made = Agent(self, node, controllers or [controller.address for controller in self.controllers], **options)
        self._stack.callback(made.kill)
        return made.start(wait=wait)

    def at_end(self, end: Callable[[], object]) -> None:
        """Call `end` with the plane's end."""
        self._stack.callback(end)

    def proxy(self, port: int) -> Proxy:
        made = Proxy(port)
        self._stack.callback(made.close)
        return made


class Proxy:
    """Stands before a port. `cut` makes it a black hole: nothing comes through, and nobody is told."""

    def __init__(self, target: int) -> None:
        self.port = free_port()
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._open = asyncio.Event()
        self._open.set()
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(WAIT_S)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._open.wait()
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.close()
            return
        await asyncio.gather(self._carry(reader, back), self._carry(there, writer))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                await self._open.wait()
                writer.write(data)
                await writer.drain()
        writer.close()

    def cut(self) -> None:
        self._loop.call_soon_threadsafe(self._open.clear)

    def heal(self) -> None:
        self._loop.call_soon_threadsafe(self._open.set)

    @property
    def address(self) -> tuple[str, str]:
        return f"127.0.0.1:{self.port}", "localhost"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)


def is_answering(controller: Controller) -> bool:
    try:
        controller.status()
    except KaliumError:
        return False
    return True
