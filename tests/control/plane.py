"""A control plane of real processes without sandboxes: controllers, agents, a store, in one folder and on ports of the system's choice.

What guards would do is done by `kalium-load` or by a test that speaks the guards' protocol.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kalium.policy.compile import compile_policy
from kalium.policy.envelope import private_key, sign

from .redis_server import LOSSY, RedisServer

ROOT = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("KALIUM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kalium") / "control"
READY_S = 20.0


def until(claim: Callable[[], Any], what: str, seconds: float = READY_S) -> Any:
    """Poll `claim` until it is true and return its value; fail with `what` at the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        value = claim()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain for {what}"
        time.sleep(0.01)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def go() -> str:
    """The Go command that builds the runtime. Fails the test when there is none."""
    minimum = next(line.split()[1] for line in (ROOT / "runtime/go.mod").read_text(encoding="utf-8").splitlines() if line.startswith("go "))
    found = subprocess.run(
        [sys.executable, str(ROOT / "roles/kalium_toolchain/files/find_go.py"), minimum], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, f"no Go {minimum}: {found.stderr}"
    return found.stdout.strip()


def built(command: str) -> Path:
    """The binary of runtime/cmd/`command`, as the tree is now. Go's own cache makes the second time quick."""
    CACHE.mkdir(parents=True, exist_ok=True)
    binary = CACHE / command
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
    subprocess.run([go(), "build", "-trimpath", "-o", str(binary), f"./cmd/{command}"], cwd=ROOT / "runtime", env=environment, check=True)
    return binary


@dataclass
class Running:
    """A process of a plane, and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End it in order."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.returncode

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_kib(self) -> int:
        """Resident memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("VmRSS:")))

    def said(self) -> str:
        """Its output so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")


@dataclass
class Plane:
    """The folder of a control plane and what runs in it."""

    folder: Path
    running: dict[str, Running] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    server: RedisServer | None = None

    def __post_init__(self) -> None:
        self.pki = self.folder / "pki"
        self.policies = self.folder / "policies"
        self.policies.mkdir(parents=True)
        self.kalium("pki", "init", "--dir", self.pki)
        self.kalium("pki", "operator-key", "--dir", self.folder / "operator")

    def kalium(self, *arguments: object) -> str:
        """Run the `kalium` of this tree."""
        command = [sys.executable, "-m", "kalium.cli.main", *map(str, arguments)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def issue(self, role: str, name: str) -> Path:
        """A certificate and its key, without their endings."""
        self.kalium("pki", "issue", "--dir", self.pki, "--role", role, "--name", name, "--san", f"DNS:{name}", "--san", "IP:127.0.0.1")
        return self.pki / name

    def publish(self, source: str) -> None:
        """Sign a policy and put it where the controllers look."""
        compiled = compile_policy(source.encode(), "a test's policy")
        key = private_key((self.folder / "operator/operator.key").read_bytes(), "operator.key")
        document = json.loads(compiled)
        path = self.policies / f"{document['app']}.signed.json"
        path.with_suffix(".new").write_bytes(sign(compiled, key))
        path.with_suffix(".new").rename(path)

    def start(self, name: str, command: list[str], *, environment: Mapping[str, str] | None = None, netns: str = "") -> Running:
        """Start a process; its output is in `name`.log."""
        log = self.folder / f"{name}.log"
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*(["ip", "netns", "exec", netns] if netns else []), *command],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **(environment or {})},
            )  # fmt: skip
        self.running[name] = Running(name, process, log)
        return self.running[name]

    def controller(self, name: str = "controller", *, store: Mapping[str, str] | None = None, host: str = "127.0.0.1", netns: str = "") -> Running:
        """A controller that serves. Started again it has its port and name again."""
        pair = self.issue("controller", name)
        port = self.ports.setdefault(name, free_port())
        self.ports.setdefault(f"{name} metrics", free_port())
        self.kalium("pki", "audit-key", "--dir", self.folder / "audit", "--name", name)
        document = {
            "name": name,
            "listen": {"host": host, "port": port},
            "tls": {"ca": str(self.pki / "ca.crt"), "cert": f"{pair}.crt", "key": f"{pair}.key"},
            "operator_key": str(self.folder / "operator/operator.pub"),
            "policies_dir": str(self.policies),
            "store": dict(store or {"kind": "memory"}),
            "audit": {"log": str(self.folder / f"{name}.audit"), "key": str(self.folder / f"audit/{name}.key"), "fsync": "interval", "max_mib": 64},
            "metrics": {"host": host, "port": self.ports[f"{name} metrics"]},
        }
        config = self.folder / f"{name}.json"
        config.write_text(json.dumps(document), encoding="utf-8")
        command = [sys.executable, "-m", "kalium.cli.main", "controller"]
        made = self.start(name, [*command, "serve", "--config", str(config)], netns=netns)

        def serves() -> bool:
            assert made.process.poll() is None, made.said()
            asked = subprocess.run([*command, "status", "--config", str(config)], cwd=ROOT, capture_output=True, check=False)
            return asked.returncode == 0

        if not netns:
            until(serves, f"{name} to serve: {made.log}")
        return made

    def agent(self, node: str, controllers: list[tuple[str, str]], *, incoming: int = 8080, netns: str = "") -> Running:
        """An agent of `node`; `controllers` are addresses and the names of their certificates."""
        pair = self.issue("agent", node)
        home = self.folder / node
        home.mkdir(exist_ok=True)
        self.kalium("pki", "audit-key", "--dir", self.folder / "audit", "--name", node)
        document = {
            "node": node,
            "guard_socket": str(home / "guard.sock"),
            "register_socket": str(home / "register.sock"),
            "controllers": [{"address": address, "name": name} for address, name in controllers],
            "tls": {"ca": str(self.pki / "ca.crt"), "cert": f"{pair}.crt", "key": f"{pair}.key"},
            "operator_key": str(self.folder / "operator/operator.pub"),
            "state_dir": str(home),
            "verdict_log": str(home / "verdicts.jsonl"),
            "timing_log": str(home / "timings.jsonl"),
            "audit": {"log": str(home / "audit.jsonl"), "key": str(self.folder / f"audit/{node}.key"), "fsync": "interval", "max_mib": 64},
            "names": {"gateway": ["127.0.0.1"]},
            "incoming": {"port": incoming, "sources": ["127.0.0.1/32"], "health_path": "/_/health"},
            "lease_ms": 60_000,
        }
        config = home / "agent.json"
        config.write_text(json.dumps(document), encoding="utf-8")
        binary = str(built("kalium-agent"))
        made = self.start(node, [binary, "--config", str(config)], netns=netns)

        def connected() -> bool:
            assert made.process.poll() is None, made.said()
            return subprocess.run([binary, "status", "--config", str(config)], capture_output=True, check=False).returncode == 0

        until(connected, f"the agent of {node}: {made.log}")
        return made

    def register(self, node: str, instance: str, app: str, function: str) -> dict[str, Any]:
        """What an engine says before it starts an instance, and the agent's answer."""
        line = {"op": "register", "container": instance, "app": app, "function": function, "image": "test"}
        with socket.socket(socket.AF_UNIX) as asked:
            asked.settimeout(READY_S)
            asked.connect(str(self.folder / node / "register.sock"))
            asked.sendall(json.dumps(line).encode() + b"\n")
            answer: dict[str, Any] = json.loads(asked.makefile("rb").readline())
        return answer

    def redis(self, *options: str) -> RedisServer:
        """A store of its own on a unix socket; started again it has what it kept."""
        if self.server is None:
            self.server = RedisServer(self.folder / "redis", *(options or LOSSY))
        self.server.start()
        return self.server

    @property
    def store(self) -> dict[str, str]:
        """The configuration of a controller that uses `redis`."""
        assert self.server is not None
        return {"kind": "redis", "url": self.server.url}

    def stop(self) -> None:
        """End everything, in the reverse order of its start."""
        for running in reversed(self.running.values()):
            running.stop()
        if self.server is not None:
            self.server.kill()


@contextmanager
def plane(folder: Path) -> Iterator[Plane]:
    """A control plane whose processes end with the `with`."""
    made = Plane(folder)
    try:
        yield made
    finally:
        made.stop()
