"""The timers in real sandboxes: E2's load function under its own policy, every cell of the quick profile, with every sample there.

KALIUM_TIMERS_MESSAGES makes it as many messages a cell, a multiple of 50; `pytest -s` shows the table.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from experiments import e2_analysis
from experiments.e2 import CALLEE_URL, QUICK_CELLS
from experiments.e2_samples import Cell, E2SampleFile
from experiments.timings import PHASES, Timing
from kalium.builder.stack import read_stack

from .lab import PYTHON, ROOT, Lab, Sandbox, until
from .servers import Server

MESSAGES = int(os.environ.get("KALIUM_TIMERS_MESSAGES", "20"))
BATCH = min(MESSAGES, 50)  # nobody takes up the tokens of the invokes here, and the controller keeps 64 of a call
NAMES = {"images.kalium.test": "10.199.0.2", "gateway": "10.199.0.3"}
IMAGE_URL = "https://images.kalium.test:4443/image.jpg"
# The function as its image has it, but for the probe, which the lab sends to another path.
MAIN = """
import sys
sys.path.insert(0, sys.argv[1])
import handler, watchdog
watchdog.HEALTH_PATH = "/"
sys.exit(watchdog.run(handler.handle))
"""


class Images(Server):
    """The project's image server at 10.199.0.2:4443, with a picture of the benchmark's size."""

    def __init__(self, lab: Lab, address: str, name: str) -> None:
        super().__init__(lab, "images")
        certificate, key = self.certificate(name)
        (self.folder / "root").mkdir()
        (self.folder / "root" / "image.jpg").write_bytes(bytes(122_620))
        config = {
            "listen": {"host": address, "port": 4443}, "certificate": certificate, "key": key, "root": str(self.folder / "root"),
            "access_log": str(self.folder / "access.jsonl"),
        }  # fmt: skip
        (self.folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        self.start(sys.executable, "-m", "kalium.cli.main", "imageserver", "serve", "--config", str(self.folder / "config.json"))
        until(lambda: "listening" in self.said(), "the image server")


class Gateway(BaseHTTPRequestHandler):
    """Answers every invoke."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def gateway(lab: Lab, address: str) -> Iterator[None]:
    """A gateway in the lab's world."""
    listener = lab.world.listen(address, 8080)
    with ThreadingHTTPServer((address, 8080), Gateway, bind_and_activate=False) as server:
        server.socket.close()
        server.socket = listener
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    policy = (ROOT / "policies" / "e2.yml").read_text(encoding="utf-8")
    with Lab({"e2": policy}, NAMES) as made, ExitStack() as stack:
        made.world.address(2)
        made.world.address(3)
        stack.enter_context(Images(made, NAMES["images.kalium.test"], "images.kalium.test"))
        stack.enter_context(gateway(made, NAMES["gateway"]))
        yield made


@pytest.fixture(scope="module")
def place(lab: Lab) -> Path:
    """The function's files."""
    folder = lab.folder / "e2-load"
    (target,) = read_stack(ROOT / "functions" / "stack.yml", "e2-load")
    for path, contents in target.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(contents)
    return folder


def sandbox(lab: Lab, stack: ExitStack, function: str, place: Path, annotations: Mapping[str, str]) -> Sandbox:
    return stack.enter_context(lab.sandbox("e2", function, argv=(PYTHON, "-c", MAIN, str(place)), annotations=annotations))


def timings(lab: Lab) -> list[Timing]:
    path = lab.folder / "timings.jsonl"
    records = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    assert [record for record in records if record["event"] != "timing"] == []
    return [Timing.of(record) for record in records]


def load(box: Sandbox, cell: Cell, count: int) -> dict[str, Any]:
    is_invoke = cell.workload == "invoke"
    job = {
        "workload": "invoke" if is_invoke else "https-get", "call": cell.call, "count": count, "bytes": cell.size,
        "url": CALLEE_URL if is_invoke else IMAGE_URL,
    }  # fmt: skip
    answer = box.request(job)
    assert answer.status == 200, (answer.body, box.denials())
    document: dict[str, Any] = json.loads(answer.body)
    return document


def test_every_message_of_every_cell_has_its_sample(lab: Lab, place: Path, tmp_path: Path) -> None:
    with ExitStack() as stack, E2SampleFile(tmp_path / "samples.csv") as file:
        boxes = {name: sandbox(lab, stack, name, place, {"kalium.io/timers": "on"}) for name in ("e2-load", "e2-load-off")}
        boxes["e2-load-off"].name_peers()
        for _ in range(MESSAGES // BATCH):
            for cell in QUICK_CELLS:
                before = len(timings(lab))
                document = load(boxes[cell.function], cell, BATCH)
                assert (document["sent"], document["connections"]) == (BATCH, 1)
                until(lambda cell=cell, before=before: sum(map(cell.holds, timings(lab)[before:])) >= BATCH, f"the samples of {cell}")  # type: ignore[misc]
                found = [timing for timing in timings(lab)[before:] if cell.holds(timing)]
                assert len(found) == BATCH and len({timing.invocation for timing in found}) == 1
                file.write(cell, 0, 0, found)
        assert boxes["e2-load"].denials() == []
    spans = e2_analysis.spans_of(pd.read_csv(tmp_path / "samples.csv"))
    occurring = {
        "https-get": set(PHASES) - {"controller"},
        "invoke": {"event", "local", "controller", "total"},
        "https-get-off": {"total"},
    }
    assert {key.workload: set(phases) for key, phases in spans.items()} == occurring
    for line in e2_analysis.phase_lines(spans):
        print(",".join(line))


def test_without_the_annotation_nothing_is_measured(lab: Lab, place: Path) -> None:
    before = len(timings(lab))
    with ExitStack() as stack:
        box = sandbox(lab, stack, "e2-load", place, {})
        load(box, replace(QUICK_CELLS[0], call="sendmsg"), 3)
        assert len(box.verdicts()) > 3

    assert len(timings(lab)) == before
