"""A gateway, a site and a checkout for whole runs of experiments that reach nothing outside the test."""

from __future__ import annotations

import abc
import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from experiments import provenance
from experiments.site import PINS, Database, Host, Site


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
    return Site(
        name="local", engine="podman", inventory="inventory/local", gateway=f"http://127.0.0.1:{gateway.server_address[1]}", basic_auth_user="admin",
        basic_auth_password_file=folder / "password", images_url="https://images.kalium.test:4443/image.jpg", images_file=folder / "images.json",
        database=Database("127.0.0.1", 1, "helloRetail", "abc", "xyz", folder / "reset.sql"), verdicts=folder / "verdicts.jsonl",
        timings=folder / "timings.jsonl", imageserver_log=folder / "images.jsonl", bridge="lo", bridge_address="127.0.0.1",
        client=Host("localhost", "local"), site_sha256="a" * 64, commit="c" * 40, checkout=folder,
    )  # fmt: skip


def only_run_in(folder: Path) -> dict[str, Any]:
    """run.json of the one run of an experiment, which did not complete."""
    (where,) = folder.glob("2*/run.json")
    assert not (where.parent / "SHA256SUMS").exists()
    record: dict[str, Any] = json.loads(where.read_text(encoding="utf-8"))
    return record
