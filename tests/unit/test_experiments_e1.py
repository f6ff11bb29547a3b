"""A whole run of E1 against a gateway of this test: what is sealed, and what refuses the run."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from experiments import database, provenance
from experiments.e1 import E1, E1Parameters
from experiments.entries import ENTRIES, FUNCTIONS
from experiments.errors import ExperimentError, RunRefused
from experiments.site import PINS, Database, Host, Site

PARAMETERS = E1Parameters(blocks=2, warm_requests=2, direct_requests=1, request_seconds_max=10.0)
RIGHT = {
    "From": "200494", "photographer": {"id": "200494", "status": "complete"}, "image": "storedPhotosTable/1", "success": "true",
    "outcome": "photo taken", "assignmentComplete": "true",
}  # fmt: skip


class FakeSite(ThreadingHTTPServer):
    """A gateway whose functions answer rightly and are judged, until `spoil` says otherwise of a request's call id."""

    def __init__(self, verdicts: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.verdicts = verdicts
        self.deployed: dict[str, dict[str, Any]] = {}
        self.order: list[str] = []
        self.wrong_status: str = "no call"
        self.wrong_body: str = "no call"
        self.denied: str = "no call"
        self.unjudged = False


class Handler(BaseHTTPRequestHandler):
    """Administration and invocation."""

    server: FakeSite

    def reply(self, status: int, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

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
        self.server.deployed.pop(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["functionName"], None)
        self.reply(202, {})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/system/functions":
            self.server.deployed[body["service"]] = body
            self.server.order.append(body["annotations"].get("kalium.io/app", "stock"))
            self.reply(202, {})
            return
        call = self.headers["X-Call-Id"]
        app = next(iter(self.server.deployed.values()))["annotations"].get("kalium.io/app", "")
        if app and not self.server.unjudged:
            denied = self.server.denied in call
            line = {
                "event": "verdict", "app": app, "function": "f", "mode": "audit" if app.endswith("audit") else "enforce", "allowed": not denied,
                "would_deny": False, "reason": "out_of_order" if denied else "allowed", "kind": "mysql", "message": "mysql begin", "peer": "database",
                "expected": ["mysql select @line 12"], "line": 12, "call": call,
            }  # fmt: skip
            with self.server.verdicts.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.reply(500 if self.server.wrong_status in call else 200, {} if self.server.wrong_body in call else RIGHT)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeSite]:
    with FakeSite(tmp_path / "verdicts.jsonl") as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def e1(fake: FakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> E1:
    """E1 on a checkout and a site of this test; the database is not asked, its resets are counted by nobody."""
    for name in FUNCTIONS:
        (tmp_path / "functions" / name).mkdir(parents=True)
        (tmp_path / "functions" / name / "sample.json").write_text('{"MediaUrl0": "https://example.test/x"}', encoding="utf-8")
    (tmp_path / "functions" / "stack.yml").write_text("functions:\n  product-photos-master:\n    environment: {A: 1}\n", encoding="utf-8")
    (tmp_path / "images.json").write_text(json.dumps({name: {"image": f"localhost/kalium/{name}:1"} for name in FUNCTIONS}), encoding="utf-8")
    for name in ("password", "reset.sql"):
        (tmp_path / name).write_text("secret\n", encoding="utf-8")
    (tmp_path / PINS).mkdir(parents=True)
    monkeypatch.setattr(database.Resetter, "reset", lambda self: None)
    monkeypatch.setattr(provenance, "_git", lambda checkout, *arguments: "c" * 40)
    site = Site(
        name="local", engine="podman", inventory="inventory/local", gateway=f"http://127.0.0.1:{fake.server_address[1]}", basic_auth_user="admin",
        basic_auth_password_file=tmp_path / "password", images_url="https://images.kalium.test:4443/image.jpg", images_file=tmp_path / "images.json",
        database=Database("127.0.0.1", 1, "helloRetail", "abc", "xyz", tmp_path / "reset.sql"),
        verdicts=fake.verdicts, timings=tmp_path / "timings.jsonl",
        imageserver_log=tmp_path / "images.jsonl", bridge="lo", bridge_address="127.0.0.1", client=Host("localhost", "local"),
        site_sha256="a" * 64, commit="c" * 40, checkout=tmp_path,
    )  # fmt: skip
    return E1(PARAMETERS, site)


def only_run(e1: E1) -> dict[str, Any]:
    (where,) = (e1.results / "e1").glob("2*/run.json")
    assert not (where.parent / "SHA256SUMS").exists()
    record: dict[str, Any] = json.loads(where.read_text(encoding="utf-8"))
    return record


def test_a_run_measures_every_entry_under_every_system_and_is_sealed(e1: E1, fake: FakeSite, capsys: pytest.CaptureFixture[str]) -> None:
    finished = e1.execute()

    record = finished.paths.read_sealed()
    lines = finished.paths.samples.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 2 * 4 * len(ENTRIES) * (1 + 2 + 1)
    assert record["judging"] == "tls=connection" and record["parameters"]["blocks"] == 2
    assert set(record["judged_messages"]) == {"kalium-audit", "kalium-enforce"}
    assert sorted(set(fake.order)) == ["hello-retail", "hello-retail-audit", "stock"]
    assert fake.deployed == {}
    assert (e1.results / "e1" / "latest").resolve() == finished.paths.folder
    assert finished.paths.figure("png").stat().st_size > 1000
    assert "geometric mean of ratios, kalium-enforce" in finished.summary_text()
    assert "block 2/2" in capsys.readouterr().out


def test_the_image_of_this_site_is_asked_for(e1: E1) -> None:
    assert {body["MediaUrl0"] for body in e1.inputs.values()} == {"https://images.kalium.test:4443/image.jpg"}


@pytest.mark.parametrize(("field", "found"), [("wrong_status", "status 500"), ("wrong_body", "outcome is None")])
def test_one_wrong_answer_refuses_the_run_and_names_the_sample(e1: E1, fake: FakeSite, field: str, found: str) -> None:
    setattr(fake, field, "1-kalium-audit-product-photos-report-gateway-2")

    with pytest.raises(RunRefused, match=f"request 2 of product-photos-report via gateway .*{found}"):
        e1.execute()

    record = only_run(e1)
    assert record["complete"] is False and found in record["error"]
    assert fake.deployed == {}


def test_one_denial_refuses_the_run_and_shows_the_verdict(e1: E1, fake: FakeSite) -> None:
    fake.denied = "0-kalium-enforce-microbenchmark-gateway-1"

    with pytest.raises(RunRefused, match=r"mysql 'mysql begin' to database: out_of_order .*policy line 12"):
        e1.execute()

    assert only_run(e1)["complete"] is False


def test_a_guarded_system_without_verdicts_refuses_the_run(e1: E1, fake: FakeSite) -> None:
    fake.unjudged = True

    with pytest.raises(RunRefused, match="logged 0 verdicts"):
        e1.execute()


def test_functions_that_are_already_there_are_not_touched(e1: E1, fake: FakeSite) -> None:
    fake.deployed["product-photos-master"] = {"annotations": {}}

    with pytest.raises(ExperimentError, match="already has"):
        e1.execute()

    assert "product-photos-master" in fake.deployed
    assert not (e1.results / "e1").exists()


def test_an_unknown_profile_is_a_usage_error() -> None:
    with pytest.raises(ExperimentError) as caught:
        E1Parameters.of_profile("fast")

    assert caught.value.exit_code == 2
