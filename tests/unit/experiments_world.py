"""A gateway, a site and a checkout for whole runs of experiments that reach nothing outside the test."""

from __future__ import annotations

import abc
import contextlib
import json
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO, Any

import pytest

from experiments import machine, provenance
from experiments.errors import ExperimentError
from experiments.machine import Done, LocalMachine, Stream
from experiments.site import GROUPS, PINS, Cluster, Database, Host, Site

HERE = Host("localhost", "local")
NOWHERE = Path("/nonexistent")


def local_site(folder: Path = NOWHERE) -> Site:
    """A site of one machine whose logs and checkout are in `folder`."""
    return Site(
        name="local", engine="podman", inventory="inventory/local", gateway="http://127.0.0.1:1", basic_auth_user="admin",
        basic_auth_password_file=NOWHERE, images_url="https://images.kalium.test:4443/image.jpg", images_file=NOWHERE,
        database=Database("10.137.0.1", 3306, "helloRetail", "abc", "xyz", NOWHERE), verdicts=folder / "verdicts.jsonl",
        timings=folder / "timings.jsonl", imageserver_log=folder / "images.jsonl", log_folder=folder, controller_port=5000,
        service_manager="supervisor", interfaces=("kalium0",), attacker="localhost", attacker_address="10.137.0.1", hosts={"localhost": HERE},
        groups=dict.fromkeys(GROUPS, ("localhost",)), cluster=None, site_sha256="a" * 64, commit="c" * 40, checkout=folder,
    )  # fmt: skip


class FakeGateway(ThreadingHTTPServer, abc.ABC):
    """Administers as the gateway does. Its site's files are in `folder`; what an invocation answers is the subclass's."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.deployed: dict[str, dict[str, Any]] = {}
        self.ever: list[dict[str, Any]] = []

    @abc.abstractmethod
    def invoked(self, name: str, body: dict[str, Any], call: str) -> tuple[int, Any]:
        """Status and document of the answer."""

    def log(self, name: str, lines: list[dict[str, Any]]) -> None:
        """Append lines to a log of the site."""
        with (self.folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))


class _Handler(BaseHTTPRequestHandler):
    server: FakeGateway

    def reply(self, status: int, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> Any:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        if self.path == "/system/info":
            self.reply(200, {"version": {"release": "fake"}})
        elif self.path == "/system/functions":
            self.reply(200, [{"name": name} for name in self.server.deployed])
        elif name in self.server.deployed:
            host, port = self.server.server_address[:2]
            self.reply(200, {"name": name, "availableReplicas": 1, "annotations": {"kalium.io/address": f"{host!s}:{port}"}})
        else:
            self.reply(404, {})

    def do_DELETE(self) -> None:
        self.server.deployed.pop(self.body()["functionName"], None)
        self.reply(202, {})

    def do_POST(self) -> None:
        body = self.body()
        if self.path == "/system/functions":
            self.server.deployed[body["service"]] = body
            self.server.ever.append(body)
            self.reply(202, {})
        else:
            self.reply(*self.server.invoked(self.path.rpartition("/")[2], body, self.headers.get("X-Call-Id", "")))

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextlib.contextmanager
def serving(gateway: FakeGateway) -> Iterator[None]:
    """Serve while the `with` lasts."""
    with gateway:
        thread = threading.Thread(target=gateway.serve_forever, args=(0.01,))
        thread.start()
        yield
        gateway.shutdown()
        thread.join()


def site_around(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, *, stack: str, images: Mapping[str, str]) -> Site:
    """A site whose gateway this is, on a checkout with this stack file and these built images."""
    folder = gateway.folder
    (folder / "functions").mkdir(exist_ok=True)
    (folder / "functions" / "stack.yml").write_text(stack, encoding="utf-8")
    (folder / "images.json").write_text(json.dumps({name: {"image": image} for name, image in images.items()}), encoding="utf-8")
    for name in ("password", "reset.sql"):
        (folder / name).write_text("secret\n", encoding="utf-8")
    (folder / PINS).mkdir(parents=True)
    monkeypatch.setattr(provenance, "_git", lambda checkout, *arguments: "c" * 40)
    return replace(
        local_site(folder), gateway=f"http://127.0.0.1:{gateway.server_address[1]}", basic_auth_password_file=folder / "password",
        images_file=folder / "images.json", database=Database("127.0.0.1", 1, "helloRetail", "abc", "xyz", folder / "reset.sql"),
        interfaces=("lo",), attacker_address="127.0.0.1",
    )  # fmt: skip


def only_run_in(folder: Path) -> dict[str, Any]:
    """run.json of the one run of an experiment, which did not complete."""
    (where,) = folder.glob("2*/run.json")
    assert not (where.parent / "SHA256SUMS").exists()
    record: dict[str, Any] = json.loads(where.read_text(encoding="utf-8"))
    return record


class FakeRemote(LocalMachine):
    """A host as if it were remote: what it is asked runs here, as whoever runs the test, and `fault` may fail any of it by what it is."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self.asked: list[str] = []
        self.answers: dict[str, bytes | Done] = {}  # by a part of the command: what it prints, or how it ends, instead of being run
        self.fault: Callable[[str], bool] = lambda what: False

    def _point(self, what: str) -> None:
        self.asked.append(what)
        if self.fault(what):
            raise ExperimentError("host.lost", f"{what[:60]} on host {self.host}", "the link is down", f"see that {self.host.name} runs")

    def run(self, command: Sequence[str], *, root: bool = False, stdin: bytes = b"", seconds_max: float = 30.0, again: bool = False) -> Done:
        line = shlex.join(command)
        self._point(line)
        answer = next((answer for part, answer in self.answers.items() if part in line), None)
        if answer is None:
            return super().run(command, stdin=stdin, seconds_max=seconds_max)
        return answer if isinstance(answer, Done) else Done(0, answer, b"")

    def copy(self, command: Sequence[str], output: IO[bytes], *, root: bool = False, seconds_max: float) -> Done:
        done = self.run(command, seconds_max=seconds_max)
        output.write(done.out)
        return Done(done.status, b"", done.err)

    def stream(self, command: Sequence[str], output: Path, *, root: bool = False) -> Stream:
        self._point(shlex.join(command))
        return super().stream(command, output)

    def read_bytes(self, path: Path) -> bytes:
        self._point(f"read {path}")
        return path.read_bytes()

    def read_from(self, path: Path, offset: int) -> tuple[int, bytes]:
        self._point(f"follow {path}")
        return super().read_from(path, offset)


def remote(name: str) -> Host:
    """A remote host of that name, never reached by it."""
    return Host(name, "ssh", f"{name}.example", user="operator", lan=f"10.0.0.{sum(name.encode()) % 250}")


def fake_remotes(monkeypatch: pytest.MonkeyPatch, *names: str) -> dict[str, FakeRemote]:
    """Hosts of these names that the experiments reach as FakeRemotes."""
    fakes = {name: FakeRemote(remote(name)) for name in names}
    monkeypatch.setattr(machine, "_machines", {fake.host: fake for fake in fakes.values()})
    return fakes


def cluster_site(folder: Path) -> Site:
    """A site on Kubernetes: a control plane with everything else on it, and two nodes."""
    names = ("control", "node1", "node2")
    groups = dict.fromkeys(GROUPS, ("control",)) | {"function_nodes": ("node1", "node2")}
    return replace(
        local_site(folder), engine="kubernetes", service_manager="systemd", interfaces=("cni0", "flannel.1"), attacker="control",
        attacker_address="10.0.0.1", hosts={name: remote(name) for name in names}, groups=groups,
        cluster=Cluster(Path("/etc/kubernetes/admin.conf"), "openfaas-fn", {"stock": "gvisor", "kalium": "kalium"}, 8080),
    )  # fmt: skip


def pod(function: str, node: str, runtime_class: str, *, ready: bool = True, waiting: str = "", ending: bool = False) -> dict[str, Any]:
    """A pod as kubectl tells it."""
    return {
        "metadata": {"name": f"{function}-1", "labels": {"faas_function": function}} | ({"deletionTimestamp": "now"} if ending else {}),
        "spec": {"nodeName": node, "runtimeClassName": runtime_class},
        "status": {
            "phase": "Running" if ready else "Pending", "podIP": "10.217.1.7",
            "conditions": [{"type": "Ready", "status": "True" if ready else "False", "reason": "ContainersNotReady"}],
            "containerStatuses": [{"state": {"waiting": {"reason": waiting, "message": "no such image"}} if waiting else {"running": {}}}],
        },
    }  # fmt: skip


def node(name: str, *, ready: str = "True", full: str = "False", cordoned: bool = False) -> dict[str, Any]:
    """A node as kubectl tells it."""
    conditions = [
        {"type": "DiskPressure", "status": full, "reason": "R", "message": "m"},
        {"type": "Ready", "status": ready, "reason": "R", "message": "m"},
    ]
    return {"metadata": {"name": name}, "spec": {"unschedulable": True} if cordoned else {}, "status": {"conditions": conditions}}


def items(*records: dict[str, Any]) -> bytes:
    """What kubectl prints of them."""
    return json.dumps({"items": records}).encode()
