"""Logs of the site's services are followed line by line, and only what was written since counts."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from experiments_world import NOWHERE, local_site

from experiments import housekeeping
from experiments.database import Resetter
from experiments.errors import ExperimentError, RunRefused
from experiments.hostfiles import read_bytes
from experiments.paths import RunPaths
from experiments.site import Database
from experiments.tails import LogTail
from experiments.verdicts import Verdict, VerdictLog

SITE = local_site()


def append(log: Path, text: str) -> None:
    with log.open("a", encoding="utf-8") as file:
        file.write(text)


def test_only_whole_lines_written_since_are_read_and_each_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    append(log, "old\n")
    tail = LogTail(log)

    append(log, "one\ntwo\nthr")
    first = tail.new_lines()
    append(log, "ee\n")

    assert (first, tail.new_lines(), tail.new_lines()) == ([b"one", b"two"], [b"three"], [])


def test_a_log_that_does_not_exist_yet_is_followed_from_its_first_line(tmp_path: Path) -> None:
    tail = LogTail(tmp_path / "log")

    before = tail.new_lines()
    append(tmp_path / "log", "one\n")

    assert (before, tail.new_lines()) == ([], [b"one"])


def test_a_log_that_was_cut_is_an_error_and_not_an_empty_answer(tmp_path: Path) -> None:
    log = tmp_path / "log"
    append(log, "one\ntwo\n")
    tail = LogTail(log)
    log.write_text("x\n", encoding="utf-8")

    with pytest.raises(ExperimentError, match="became shorter"):
        tail.new_lines()


def test_a_file_that_is_absent_is_named() -> None:
    with pytest.raises(ExperimentError, match="read /nonexistent"):
        read_bytes(NOWHERE)


def test_verdicts_are_read_and_other_events_left_out(tmp_path: Path) -> None:
    log = VerdictLog(replace(SITE, verdicts=tmp_path / "verdicts.jsonl"))
    append(tmp_path / "verdicts.jsonl", '{"event": "started"}\n' + json.dumps({"event": "verdict", "app": "a", "allowed": True}) + "\n")

    assert [verdict.app for verdict in log.settled()] == ["a"]


def test_a_line_that_is_not_json_is_not_skipped(tmp_path: Path) -> None:
    log = VerdictLog(replace(SITE, verdicts=tmp_path / "verdicts.jsonl"))
    append(tmp_path / "verdicts.jsonl", "{broken\n")

    with pytest.raises(RunRefused, match="broken"):
        log.new()


@pytest.mark.parametrize(
    ("record", "denied"),
    [
        ({"allowed": True}, False),
        ({"allowed": True, "would_deny": False}, False),
        ({"allowed": True, "would_deny": True}, True),
        ({"allowed": False}, True),
        ({}, True),
    ],
)
def test_a_verdict_that_does_not_say_allowed_is_a_denial(record: dict[str, bool], denied: bool) -> None:
    assert Verdict(dict(record)).denied is denied


def test_a_verdict_tells_reason_expectation_and_policy_line() -> None:
    record = {
        "function": "f",
        "kind": "mysql",
        "message": "mysql begin",
        "peer": "database",
        "reason": "out_of_order",
        "expected": ["https GET"],
        "line": 31,
    }

    assert Verdict(dict(record)).sentence() == "f: mysql 'mysql begin' to database: out_of_order (expected: https GET, policy line 31)"


def test_every_run_is_listed_once_and_latest_is_no_run(tmp_path: Path) -> None:
    for stamp in ("20260102T000000Z", "20260101T000000Z"):
        run = RunPaths(tmp_path / "results" / "e1" / stamp)
        run.folder.mkdir(parents=True)
        run.run.write_text("{}", encoding="utf-8")
    (tmp_path / "results" / "e1" / "latest").symlink_to("20260101T000000Z")

    found = housekeeping.runs(replace(SITE, checkout=tmp_path))

    assert [run.stamp for run in found] == ["20260101T000000Z", "20260102T000000Z"]


def test_a_dead_database_is_named_with_its_address_and_the_next_step(tmp_path: Path) -> None:
    reset = tmp_path / "reset.sql"
    reset.write_text("SELECT 1;", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # closed below, so that nobody listens there
    site = replace(SITE, database=Database("127.0.0.1", port, "helloRetail", "abc", "xyz", reset))

    with pytest.raises(ExperimentError) as caught:
        Resetter(site).reset()

    assert caught.value.code == "database.failed"
    assert f"helloRetail at 127.0.0.1:{port}" in caught.value.for_humans()
    assert "\nnext: " in caught.value.for_humans()
