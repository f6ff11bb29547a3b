"""E2 without a site: a whole run against a gateway of this test, what refuses it, and summaries and figure of known samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from experiments_world import FakeGateway, only_run_in, serving, site_around

from experiments import e2_analysis, e2_figure, e2_samples, plot
from experiments.e2 import E2, FULL_CELLS, QUICK_CELLS, E2Parameters
from experiments.e2_samples import Cell, E2SampleFile
from experiments.entries import E2_FUNCTIONS, E2_LOAD, E2_LOAD_OFF
from experiments.errors import ExperimentError, RunRefused
from experiments.paths import RESULTS_SCHEMA, RunPaths
from experiments.timings import PHASES, Timing, TimingLog

KIB = 1024
PARAMETERS = E2Parameters(blocks=2, messages=6, batch=3, invocation_seconds_max=10.0)
# Nanoseconds of the first message; each further one takes one more of each phase that occurs.
SPANS = {
    "https": {"record": 200, "open": 1500, "event": 2600, "local": 400, "controller": -1, "total": 9000, "reseal": 1300},
    "invoke": {"record": -1, "open": -1, "event": 3000, "local": 500, "controller": 90_000, "total": 99_000, "reseal": -1},
    "off": {"record": -1, "open": -1, "event": -1, "local": -1, "controller": -1, "total": 60, "reseal": -1},
}

Change = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


class FakeSite(FakeGateway):
    """A gateway whose load function answers rightly; `timings` and `verdicts` change the lines of each invocation."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.answer: dict[str, Any] = {}
        self.timings: Change = lambda lines: lines
        self.verdicts: Change = lambda lines: lines

    def invoked(self, name: str, body: dict[str, Any], call: str) -> tuple[int, Any]:
        self.asked.append((name, body))
        kind = "off" if name == E2_LOAD_OFF else "invoke" if body["workload"] == "invoke" else "https"
        invocation = "" if kind == "off" else f"{len(self.asked):032x}"
        size = body["bytes"] + (22 if kind == "off" else 0)
        lines = [
            {
                "event": "timing", "function": name, "invocation": invocation, "kind": kind, "bytes": size,
                **{f"{phase}_ns": span + (seq if span >= 0 else 0) for phase, span in SPANS[kind].items()},
            }
            for seq in range(body["count"])
        ]  # fmt: skip
        if kind == "off":
            lines.insert(0, {**lines[0], "bytes": 517, "total_ns": 10**9})  # its handshake is no message
        verdict = {
            "event": "verdict",
            "app": "e2",
            "function": name,
            "mode": "enforce",
            "kind": kind,
            "allowed": True,
            "latency_us": 7,
            "reason": "allowed",
        }
        self.log("timings", self.timings(lines))
        self.log("verdicts", self.verdicts([verdict] * body["count"] if kind != "off" else []))
        connections = body["count"] if body["fresh"] else 1
        tls = "" if kind == "invoke" else "TLSv1.3"
        return 200, {"sent": body["count"], "connections": connections, "answer_bytes": 9, "tls": tls, **self.answer}


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeSite]:
    gateway = FakeSite(tmp_path)
    with serving(gateway):
        yield gateway


@pytest.fixture
def e2(fake: FakeSite, monkeypatch: pytest.MonkeyPatch) -> E2:
    monkeypatch.setattr("experiments.e2.SAMPLES_SECONDS_MAX", 0.2)
    monkeypatch.setattr("experiments.verdicts.QUIET_SECONDS", 0.02)
    images = {name: f"localhost/{name}:1" for name in (E2_LOAD, "e2-callee")}
    return E2(PARAMETERS, site_around(fake, monkeypatch, stack="functions: {e2-load: {environment: {A: 1}}}\n", images=images))


def test_a_run_measures_every_cell_in_every_block_and_is_sealed(e2: E2, fake: FakeSite, capsys: pytest.CaptureFixture[str]) -> None:
    finished = e2.execute()

    record = finished.paths.read_sealed()
    lines = finished.paths.samples.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 2 * 6 * len(QUICK_CELLS)
    assert record["tls_versions"] == ["TLSv1.3"]
    assert record["verdict_latency_us"]["https"] == {"n": 2 * 6 * 3, "p50": 7.0, "p99": 7.0}
    assert fake.deployed == {}
    ever = {body["service"]: body for body in fake.ever}
    assert sorted(ever) == sorted(E2_FUNCTIONS)
    assert all(body["annotations"] == {"kalium.io/app": "e2", "kalium.io/timers": "on"} for body in ever.values())
    assert ever[E2_LOAD_OFF]["image"] == ever[E2_LOAD]["image"] == "localhost/e2-load:1"
    assert ever[E2_LOAD_OFF]["envVars"] == {"A": "1"}
    assert (e2.results / "e2" / "latest").resolve() == finished.paths.folder
    text = finished.summary_text()
    assert "verdict latency, invoke: p50 7 us, p99 7 us" in text and "total_local_p50_us: 9.00" in text
    assert "block 2/2 36 messages in 12 invocations" in capsys.readouterr().out


def test_the_order_of_the_invocations_is_random_and_repeatable(e2: E2, fake: FakeSite) -> None:
    e2.execute()
    first = [(name, body["call"], body["workload"]) for name, body in fake.asked]
    fake.asked.clear()
    e2.execute()

    assert first == [(name, body["call"], body["workload"]) for name, body in fake.asked]
    assert first[: len(first) // 2] != first[len(first) // 2 :]
    assert sorted(first[: len(first) // 2]) == sorted(first[len(first) // 2 :])


def test_a_connection_for_each_request_has_to_be_one(e2: E2, fake: FakeSite) -> None:
    fresh = Cell("https-get-fresh", "write", KIB)
    e2.parameters = replace(PARAMETERS, cells=(fresh,))
    e2.execute()
    fake.answer = {"connections": 1}

    with pytest.raises(RunRefused, match="'connections': 1"):
        e2.execute()


def lose_one(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return lines[:-1]


def say_that_one_is_lost(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"event": "timings_lost", "function": E2_LOAD, "dropped": 4}, *lines]


def of_two_invocations(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*lines[:-1], {**lines[-1], "invocation": "another"}]


def of_the_connection_only(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**lines[0], "bytes": 517}]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lose_one, "2 samples of 1 invocation"),
        (say_that_one_is_lost, "4 samples of e2-load found no room"),
        (of_two_invocations, "3 samples of 2 invocation"),
        (of_the_connection_only, "0 samples of 0 invocation"),
    ],
)
def test_a_sample_that_is_missing_or_not_of_the_invocation_refuses_the_run(e2: E2, fake: FakeSite, change: Change, found: str) -> None:
    fake.timings = change

    with pytest.raises(RunRefused, match=found):
        e2.execute()

    assert only_run_in(e2.results / "e2")["complete"] is False
    assert fake.deployed == {}


def test_a_wrong_answer_refuses_the_run(e2: E2, fake: FakeSite) -> None:
    fake.answer = {"sent": 2}

    with pytest.raises(RunRefused, match="'sent': 2"):
        e2.execute()


def test_a_denial_refuses_the_run_and_is_kept(e2: E2, fake: FakeSite) -> None:
    fake.verdicts = lambda lines: [{**line, "allowed": False, "reason": "out_of_order"} for line in lines]

    with pytest.raises(RunRefused, match="out_of_order"):
        e2.execute()

    (kept,) = (e2.results / "e2").glob("2*/denials.jsonl")
    assert "out_of_order" in kept.read_text(encoding="utf-8")


def test_messages_without_verdicts_refuse_the_run(e2: E2, fake: FakeSite) -> None:
    fake.verdicts = lambda _: []

    with pytest.raises(RunRefused, match="logged 0 verdicts"):
        e2.execute()


def test_functions_that_are_already_there_are_not_touched(e2: E2, fake: FakeSite) -> None:
    fake.deployed["e2-callee"] = {}

    with pytest.raises(ExperimentError, match="already has e2-callee"):
        e2.execute()

    assert "e2-callee" in fake.deployed


@pytest.mark.parametrize("profile", ["quick", "full"])
def test_every_cell_of_a_profile_has_a_thousand_messages(profile: str) -> None:
    parameters = E2Parameters.of_profile(profile)

    assert parameters.blocks * parameters.messages >= 1000 and parameters.batch <= 256
    assert len(set(parameters.cells)) == len(parameters.cells)
    calls = {(cell.workload, cell.call) for cell in parameters.cells}
    assert calls >= {("https-get", "write"), ("https-get", "sendto"), ("https-get", "sendmsg"), ("invoke", "write"), ("invoke", "sendmsg")}


def test_an_unknown_profile_is_a_usage_error() -> None:
    with pytest.raises(ExperimentError) as caught:
        E2Parameters.of_profile("fast")

    assert caught.value.exit_code == 2


# Summaries and figure


def timing(cell: Cell, number: int) -> Timing:
    spans = {phase: None if span < 0 else span + 10 * number for phase, span in SPANS[cell.kind].items()}
    return Timing(cell.function, f"{number:032x}", cell.kind, cell.size, spans)


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """A complete, sealed run of every cell, with known spans."""
    paths = RunPaths.create("e2", results=tmp_path)
    with E2SampleFile(paths.samples) as file:
        for block in range(2):
            for cell in FULL_CELLS:
                file.write(cell, block, 0, [timing(cell, 50 * block + number) for number in range(50)])
    cells = [{"workload": cell.workload, "call": cell.call, "size": cell.size} for cell in FULL_CELLS]
    paths.write_record(
        {
            "schema": RESULTS_SCHEMA, "complete": True, "profile": "full", "site_sha256": "a" * 64, "tls_versions": ["TLSv1.3"],
            "verdict_latency_us": {}, "parameters": {"cells": cells, "blocks": 2, "messages": 50},
        }
    )  # fmt: skip
    paths.seal()
    return paths


def rows(path: Path) -> list[dict[str, str]]:
    header, *lines = (line.split(",") for line in path.read_text(encoding="utf-8").splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_the_summary_has_the_names_that_programs_read(run: RunPaths) -> None:
    e2_analysis.derive(run)

    summary = {row["name"]: row for row in rows(run.summary)}
    assert list(summary) == [
        "phases", "samples", "total_local_p50_us", "total_local_p99_us", "total_controller_p50_us", "total_controller_p99_us", "total_max_us",
        "off_max_us",
    ]  # fmt: skip
    assert run.summary.read_text(encoding="utf-8").startswith("name,value,unit,low,high,n\n")
    assert (summary["phases"]["value"], summary["samples"]["value"]) == ("7", str(100 * len(FULL_CELLS)))
    # Spans rise by 10 ns from 9000 and 99,000: the median is between the 50th and the 51st.
    assert float(summary["total_local_p50_us"]["value"]) == pytest.approx(9.495)
    assert float(summary["total_controller_p50_us"]["value"]) == pytest.approx(99.495)
    assert float(summary["total_max_us"]["value"]) == pytest.approx(99.99)
    assert float(summary["off_max_us"]["value"]) == pytest.approx(1.05)
    assert summary["total_local_p50_us"]["n"] == "100"
    assert float(summary["total_local_p50_us"]["low"]) < 9.495 < float(summary["total_local_p50_us"]["high"])


def test_a_phase_that_cannot_occur_is_empty_and_never_0(run: RunPaths) -> None:
    e2_analysis.derive(run)

    found = {(row["workload"], row["call"], row["bytes"], row["phase"]): row for row in rows(run.phases)}
    assert len(found) == len(FULL_CELLS) * len(PHASES)
    numbers = ("n", "p50_us", "p99_us", "mean_us", "min_us", "max_us")
    for (workload, _, _, phase), row in found.items():
        kind = {"invoke": "invoke", "https-get-off": "off"}.get(workload, "https")
        empty = SPANS[kind][phase] < 0
        assert all((row[name] == "") == empty for name in numbers), row
    assert found["https-get", "write", "1024", "record"] == {
        "workload": "https-get", "call": "write", "protocol": "https", "bytes": "1024", "phase": "record", "n": "100", "p50_us": "0.695",
        "p99_us": "1.180", "mean_us": "0.695", "min_us": "0.200", "max_us": "1.190",
    }  # fmt: skip


def test_the_bounds_of_a_quantile_are_samples() -> None:
    values = np.arange(1.0, 1001.0)

    found = e2_analysis.quantile(values, 0.99)

    assert (found.n, found.low, found.high) == (1000, 984.0, 998.0)
    assert e2_analysis.quantile(np.array([3.0]), 0.99) == e2_analysis.Quantile(3.0, 3.0, 3.0, 1)


def test_samples_that_were_not_planned_or_are_missing_are_refused(tmp_path: Path) -> None:
    cell = Cell("https-get", "write", KIB)
    path = tmp_path / "samples.csv"
    with E2SampleFile(path) as file:
        file.write(cell, 0, 0, [timing(cell, 0)])
    planned = {"workload": "https-get", "call": "write", "size": KIB}

    assert len(e2_samples.read(path, {"cells": [planned], "blocks": 1, "messages": 1})) == 1
    with pytest.raises(RunRefused, match="has 1 samples, not 2"):
        e2_samples.read(path, {"cells": [planned], "blocks": 1, "messages": 2})
    with pytest.raises(RunRefused, match="did not plan"):
        e2_samples.read(path, {"cells": [], "blocks": 1, "messages": 1})


def test_the_figure_has_the_same_bytes_again(run: RunPaths) -> None:
    first = {path.name: path.read_bytes() for path in e2_figure.draw(run)}
    second = {path.name: path.read_bytes() for path in e2_figure.draw(run)}

    assert sorted(first) == ["e2.pdf", "e2.png", "e2.svg"]
    assert first == second


def test_what_is_published_is_drawn_as_its_words_say() -> None:
    low, high, words = e2_figure.published()["total"]

    assert (low, high) == (1e3, 1e4) and "a few milliseconds" in words


def test_plot_draws_every_experiment_that_has_a_run(run: RunPaths, tmp_path: Path) -> None:
    run.point_latest("a" * 64)

    assert [each.experiment for each in plot.chosen(None, tmp_path)] == ["e2"]
    for name in (run.stamp, f"e2/{run.stamp}", str(run.folder)):
        assert [each.folder for each in plot.chosen(name, tmp_path)] == [run.folder]
    with pytest.raises(ExperimentError, match="no complete run yet"):
        plot.chosen(None, tmp_path / "empty")


def test_the_timing_log_gives_what_came_since(tmp_path: Path, e2: E2) -> None:
    line = {
        "event": "timing",
        "function": "f",
        "invocation": "i",
        "kind": "https",
        "bytes": 9,
        **{f"{phase}_ns": -1 for phase in PHASES},
        "total_ns": 0,
    }
    e2.site.timings.write_text(json.dumps(line) + "\n", encoding="utf-8")
    log = TimingLog(e2.site)
    with e2.site.timings.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, "bytes": 10}) + "\n")

    (found,) = log.new()

    assert (found.size, found.spans_ns["total"], found.spans_ns["open"]) == (10, 0, None)
    assert log.until(bool, seconds_max=0.02) == []
