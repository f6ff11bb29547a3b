"""A lab: agent, controller, policies and sandboxes on this machine, without a site. Root and `ip` are needed, nothing else.

Everything is real but the gateway, whose part the test plays: the runtimes, `kalium-agent`, `kalium controller` over mTLS, signed
policies. A sandbox's root is this machine's own, read-only, so every program that is installed here can be tried inside.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from .world import GATEWAY, World, sh

ROOT = Path(__file__).resolve().parents[2]
INSIDE = Path(__file__).with_name("inside.py")
PYTHON = "/usr/bin/python3"
PORT = 8080
READY_S_MAX = 30.0
QUIET_S = 0.1
# Code for inside.py that goes on when the test says so, by a file that both see: no request and no message of the program's.
UNTIL_TOLD = """
import time
end = time.monotonic() + 60
while "# go on" not in open("/etc/hosts").read():
    assert time.monotonic() < end, "nobody has said that it may go on"
    time.sleep(0.05)
result = 1
"""
APP_ANNOTATION, FUNCTION_ANNOTATION = "kalium.io/app", "kalium.io/function"


def until(claim: Callable[[], Any], what: str, seconds: float = READY_S_MAX) -> Any:
    """Poll `claim` until it is true and return its value. Raises TimeoutError at the deadline."""
    deadline = time.monotonic() + seconds
    while not (value := claim()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.02)
    return value


def wants_the_processor(ancestor: int) -> bool:
    """Whether a thread of a process that `ancestor` started, or one of those did, runs or waits for its turn to."""
    parents: dict[int, list[int]] = {}
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and (words := stat_of(process)):
            parents.setdefault(int(words[1]), []).append(int(process.name))
    found = list(parents.get(ancestor, []))
    for pid in found:  # which grows
        found += parents.get(pid, [])
    return any(stat_of(task)[:1] == ["R"] for pid in found for task in tasks_of(pid))


def stat_of(process: Path) -> list[str]:
    """State, parent and what follows, of a process or a thread; nothing when it has ended."""
    try:
        return (process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def tasks_of(pid: int) -> list[Path]:
    """Its threads; none when it has ended."""
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return []


def go_program() -> str:
    """The Go that is new enough for runtime/, as the Makefile finds it."""
    version = next(line.split()[1] for line in (ROOT / "runtime" / "go.mod").read_text(encoding="utf-8").splitlines() if line.startswith("go "))
    return sh("python3", str(ROOT / "roles/kalium_toolchain/files/find_go.py"), version).strip()


def build(folder: Path) -> Path:
    """The three programs of runtime/, built from this checkout. The build cache makes it a matter of seconds."""
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
    command = [go_program(), "build", "-trimpath", "-ldflags", "-s -w", "-o", f"{folder}/", "./cmd/..."]
    done = subprocess.run(command, cwd=ROOT / "runtime", env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"go build: {done.stderr}")
    return folder


@dataclass(frozen=True)
class Answer:
    """What a sandbox answered to one request; `status` is 0 when the connection ended without an answer."""

    status: int
    body: bytes

    @property
    def job(self) -> dict[str, Any]:
        """The job's outcome. Raises AssertionError when the request itself was refused."""
        assert self.status == 200, f"status {self.status}: {self.body[:500]!r}"
        outcome: dict[str, Any] = json.loads(self.body)
        return outcome


@dataclass
class Sandbox:
    """One running sandbox."""

    lab: Lab
    id: str
    app: str
    function: str
    runtime: str
    address: str
    process: subprocess.Popen[bytes]
    folder: Path
    seen: int = 0  # verdicts of it that were read
    started_s: float = 0  # until it answered

    def request(self, job: Mapping[str, Any], *, headers: Mapping[str, str] | None = None, seconds: float = 120) -> Answer:
        """One request of an invocation, as the gateway would send it."""
        body = json.dumps(dict(job)).encode()
        fields = {
            "Host": "function",
            "X-Call-Id": secrets.token_hex(8),
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Connection": "close",
            **(headers or {}),
        }
        head = "POST / HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"
        return exchange(self.lab.world, self.address, head.encode() + body, seconds)

    def python(self, code: str, **names: Any) -> dict[str, Any]:
        """Run code in the program; `names` are its variables."""
        return self.request({"python": "".join(f"{name} = {value!r}\n" for name, value in names.items()) + code}).job

    def program(self, *argv: str, env: Mapping[str, str | None] | None = None, stdin: str = "", seconds: float = 60) -> dict[str, Any]:
        """Run a program inside of one invocation."""
        return self.request({"argv": list(argv), "env": dict(env or {}), "stdin": stdin, "seconds": seconds}, seconds=seconds + 10).job

    def healthy(self) -> bool:
        try:
            return exchange(self.lab.world, self.address, b"GET / HTTP/1.1\r\nHost: function\r\nConnection: close\r\n\r\n", 5).status == 200
        except OSError:
            return False

    def verdicts(self) -> list[dict[str, Any]]:
        """The verdicts of this sandbox since the last call, once the agent, which writes them 20 ms later, has nothing more to write."""
        self.lab.settled("verdicts.jsonl")
        mine = [record for record in self.lab.verdicts() if record.get("instance") == self.id]
        new, self.seen = mine[self.seen :], len(mine)
        return new

    def denials(self) -> list[str]:
        """`kind reason` of each new verdict that denies, or would in audit."""
        return [f"{record['kind']} {record['reason']}" for record in self.verdicts() if not record["allowed"] or record["would_deny"]]

    def name_peers(self) -> None:
        """Put the lab's names into the sandbox's hosts file: in mode off, as under stock gVisor, nobody answers names."""
        with (self.folder / "hosts").open("a", encoding="utf-8") as hosts:
            hosts.writelines(f"{address} {host}\n" for host, address in self.lab.names.items())

    def go_on(self) -> None:
        """Let UNTIL_TOLD go on."""
        with (self.folder / "hosts").open("a", encoding="utf-8") as hosts:
            hosts.write("# go on\n")

    def close(self) -> None:
        subprocess.run([str(self.lab.bin / self.runtime), f"--root={self.lab.state}", "kill", self.id, "KILL"], capture_output=True, check=False)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        subprocess.run([str(self.lab.bin / self.runtime), f"--root={self.lab.state}", "delete", "--force", self.id], capture_output=True, check=False)
        if self.runtime == "runsc-kalium":
            with contextlib.suppress(OSError):  # a test may have ended the agent
                self.lab.register({"op": "unregister", "container": self.id})
        sh("ip", "netns", "del", self.id)


def exchange(world: World, address: str, request: bytes, seconds: float) -> Answer:
    """Send a request from the world's side and read the answer to its end."""
    with world.connect(address, PORT, 10) as connection:
        connection.settimeout(seconds)
        received = b""
        try:
            connection.sendall(request)
            while data := connection.recv(65536):
                received += data
        except ConnectionError:
            pass  # what came before the reset counts
    head, _, body = received.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return Answer(int(words[1]) if len(words) > 1 else 0, body)


@dataclass
class Lab:
    """`with Lab({app: policy text}) as lab`: `names` are the hosts that the agent answers, address by name."""

    policies: Mapping[str, str]
    names: Mapping[str, str]
    bin: Path = Path()  # where the programs are; built when it is empty
    folder: Path = Path()
    world: World = field(init=False)
    _stack: contextlib.ExitStack = field(init=False, repr=False)
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict, repr=False)

    def __enter__(self) -> Lab:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            # Not in /tmp, which a sandbox has for itself: programs in it read certificates here.
            self.folder = Path(tempfile.mkdtemp(prefix="kalium-lab-", dir="/var/tmp"))
            stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            if self.bin == Path():
                (self.folder / "bin").mkdir()
                self.bin = build(self.folder / "bin")
            self.state = self.folder / "state"
            self.world = World(f"kalium-lab-{os.getpid()}-{secrets.token_hex(2)}")
            self.world.up()
            stack.callback(self.world.down)
            self._keys()
            (self.folder / "policies").mkdir()
            for app, text in self.policies.items():
                self.sign(app, text)
            port = self._controller(stack)
            self._agent(stack, port)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def kalium(self, *arguments: str) -> str:
        """The product's own command line, from this checkout."""
        done = subprocess.run([sys.executable, "-m", "kalium.cli.main", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"kalium {' '.join(arguments)}: {done.stderr}")
        return done.stdout

    def _keys(self) -> None:
        pki = str(self.folder / "pki")
        self.kalium("pki", "init", "--dir", pki)
        self.kalium("pki", "issue", "--dir", pki, "--role", "controller", "--name", "controller", "--san", "DNS:controller")
        self.kalium("pki", "issue", "--dir", pki, "--role", "agent", "--name", "agent", "--identity", "lab", "--san", "DNS:lab")
        self.kalium("pki", "operator-key", "--dir", pki)
        raw = self.kalium("pki", "operator-key", "--dir", pki, "--print-raw").strip()
        assert len(base64.b64decode(raw)) == 32
        sink = {"name": "kalium", "config": {"endpoint": str(self.folder / "guard.sock"), "operator_key": raw}}
        session = {"name": "Default", "points": [{"name": "container/start"}], "sinks": [sink]}
        self._write("pod-init.json", {"trace_session": session})

    def _write(self, name: str, document: Any) -> Path:
        path = self.folder / name
        path.write_text(json.dumps(document), encoding="utf-8")
        return path

    def sign(self, app: str, text: str) -> None:
        """Put a policy in force, or a newer version of it."""
        source = self.folder / f"{app}.yml"
        source.write_text(text, encoding="utf-8")
        key, out = self.folder / "pki" / "operator.key", self.folder / "policies" / f"{app}.signed.json"
        self.kalium("policy", "sign", str(source), "--key", str(key), "-o", str(out))

    def _controller(self, stack: contextlib.ExitStack) -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        pki = self.folder / "pki"
        config = self._write(
            "controller.json",
            {
                "listen": {"host": "127.0.0.1", "port": port},
                "tls": {"ca": str(pki / "ca.crt"), "cert": str(pki / "controller.crt"), "key": str(pki / "controller.key")},
                "operator_key": str(pki / "operator.pub"),
                "policies_dir": str(self.folder / "policies"),
            },
        )
        self._daemon(stack, "controller", [sys.executable, "-m", "kalium.cli.main", "controller", "serve", "--config", str(config)])
        until(lambda: "listening" in (self.folder / "controller.log").read_text(), "the controller")
        return port

    def _agent(self, stack: contextlib.ExitStack, port: int) -> None:
        pki = self.folder / "pki"
        config = self._write(
            "agent.json",
            {
                "node": "lab",
                "guard_socket": str(self.folder / "guard.sock"),
                "register_socket": str(self.folder / "register.sock"),
                "controllers": [{"address": f"127.0.0.1:{port}", "name": "controller"}],
                "tls": {"ca": str(pki / "ca.crt"), "cert": str(pki / "agent.crt"), "key": str(pki / "agent.key")},
                "operator_key": str(pki / "operator.pub"),
                "state_dir": str(self.folder / "agent"),
                "verdict_log": str(self.folder / "verdicts.jsonl"),
                "timing_log": str(self.folder / "timings.jsonl"),
                "names": {name: [address] for name, address in self.names.items()},
                "incoming": {"port": PORT, "sources": [f"{GATEWAY}/32"], "health_path": "/"},
                "lease_ms": 60000,
                "tls_roots": str(pki / "ca.crt"),
            },
        )
        (self.folder / "agent").mkdir()
        self._daemon(stack, "agent", [str(self.bin / "kalium-agent"), "--config", str(config)])
        try:
            until(lambda: self._status().get("controller") and len(self._status()["policies"]) == len(self.policies), "the agent and its policies")
        except TimeoutError as error:
            said = "".join((self.folder / name).read_text(errors="replace")[-1500:] for name in ("agent.log", "controller.log"))
            raise RuntimeError(f"{error}: {said}") from error

    def _daemon(self, stack: contextlib.ExitStack, name: str, command: list[str]) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

        self._daemons[name] = process
        stack.callback(self.stop, name)

    def stop(self, name: str) -> None:
        """End `agent` or `controller`."""
        process = self._daemons[name]
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def register(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """One line to the agent's register socket, and its answer."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(10)
            connection.connect(str(self.folder / "register.sock"))
            connection.sendall(json.dumps(dict(line)).encode() + b"\n")
            answer: dict[str, Any] = json.loads(connection.makefile("rb").readline())
            return answer

    def _status(self) -> dict[str, Any]:
        try:
            return self.register({"op": "status"})
        except OSError:
            return {}

    def version(self, app: str) -> int:
        """Of the policy that the agent holds."""
        return int(self._status().get("policies", {}).get(app, 0))

    def settled(self, name: str) -> None:
        """Wait until a log of the agent has not grown for a while in which nobody wanted to do anything: on a busy machine those who have
        something to say may have to wait for their turn. Raises TimeoutError when it grows on and on.
        """
        path = self.folder / name
        seen, since = -1, time.monotonic()

        def quiet() -> bool:
            nonlocal seen, since
            size = path.stat().st_size if path.exists() else 0
            if size != seen or wants_the_processor(os.getpid()):
                seen, since = size, time.monotonic()
            return time.monotonic() - since >= QUIET_S

        until(quiet, f"the end of {name}")

    def verdicts(self) -> list[dict[str, Any]]:
        path = self.folder / "verdicts.jsonl"
        return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []

    @contextlib.contextmanager
    def sandbox(
        self,
        app: str,
        function: str,
        *,
        runtime: str = "runsc-kalium",
        env: Mapping[str, str] | None = None,
        annotations: Mapping[str, str] | None = None,
        argv: tuple[str, ...] = (),
    ) -> Iterator[Sandbox]:
        """A sandbox that runs `argv` (default: inside.py), ready for requests."""
        name = f"kl{os.getpid()}-{secrets.token_hex(4)}"
        address = self.world.attach(name)
        bundle = self.folder / name
        bundle.mkdir()
        self._bundle(bundle, name, app if runtime == "runsc-kalium" else "", function, env or {}, annotations or {}, argv or (PYTHON, str(INSIDE)))
        if runtime == "runsc-kalium":
            answer = self.register({"op": "register", "container": name, "app": app, "function": function, "image": "lab"})
            assert answer.get("ok"), answer
        flags = [f"--root={self.state}", "--ignore-cgroups", "--network=sandbox", "--platform=systrap", "--overlay2=root:memory"]
        if runtime == "runsc-kalium":
            flags.append(f"--pod-init-config={self.folder / 'pod-init.json'}")
        began = time.monotonic()
        with (bundle / "log").open("wb") as log:
            process = subprocess.Popen(
                [str(self.bin / runtime), *flags, "run", f"--bundle={bundle}", name], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        sandbox = Sandbox(self, name, app, function, runtime, address, process, bundle)
        if runtime == "runsc-stock":
            sandbox.name_peers()
        try:

            def ready() -> bool:
                if process.poll() is not None:
                    raise RuntimeError(f"the sandbox ended: {(bundle / 'log').read_text(errors='replace')[-2000:]}")
                return sandbox.healthy()

            until(ready, f"sandbox {name}")
            sandbox.started_s = time.monotonic() - began
            yield sandbox
        finally:
            sandbox.close()

    def _bundle(
        self, bundle: Path, name: str, app: str, function: str, env: Mapping[str, str], annotations: Mapping[str, str], argv: tuple[str, ...]
    ) -> None:
        (bundle / "resolv.conf").write_text(f"nameserver {GATEWAY}\n", encoding="utf-8")
        (bundle / "hosts").write_text("127.0.0.1 localhost\n", encoding="utf-8")
        environment = {"PATH": os.environ["PATH"], "HOME": "/tmp", "LANG": "C.UTF-8", **env}  # inside the sandbox
        document = {
            "ociVersion": "1.0.0",
            "annotations": {**({APP_ANNOTATION: app, FUNCTION_ANNOTATION: function} if app else {}), **annotations},
            "process": {
                "args": list(argv),
                "cwd": "/",
                "env": [f"{key}={value}" for key, value in environment.items()],
                "user": {"uid": 0, "gid": 0},
                "capabilities": {kind: ["CAP_NET_BIND_SERVICE", "CAP_SETUID", "CAP_SETGID"] for kind in ("bounding", "effective", "permitted")},
            },
            "root": {"path": "/", "readonly": True},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/etc/resolv.conf", "type": "bind", "source": str(bundle / "resolv.conf"), "options": ["bind", "ro"]},
                {"destination": "/etc/hosts", "type": "bind", "source": str(bundle / "hosts"), "options": ["bind", "ro"]},
            ],
            "linux": {
                "namespaces": [
                    {"type": "pid"},
                    {"type": "mount"},
                    {"type": "ipc"},
                    {"type": "uts"},
                    {"type": "network", "path": f"/run/netns/{name}"},
                ],
            },
        }
        (bundle / "config.json").write_text(json.dumps(document), encoding="utf-8")
