"""Hosts are asked by the same calls wherever they are; what fails says on which host, and logs of several hosts become one."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from experiments_world import HERE, FakeRemote, cluster_site, fake_remotes

from experiments import machine, verdicts
from experiments.errors import ExperimentError
from experiments.machine import LocalMachine, Stream
from experiments.site import Site
from experiments.tails import LogTail, LogTails
from experiments.verdicts import VerdictLog


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeRemote]:
    return fake_remotes(monkeypatch, "control", "node1", "node2")


@pytest.fixture
def site(fakes: dict[str, FakeRemote], tmp_path: Path) -> Site:
    """Two nodes, whose logs are files of their own here."""
    for name in ("node1", "node2"):
        (tmp_path / name).mkdir()
        fakes[name].read_from = lambda path, offset, name=name: LocalMachine(HERE).read_from(tmp_path / name / path.name, offset)  # type: ignore[method-assign,misc]
    return cluster_site(tmp_path)


def write(folder: Path, *lines: dict[str, object]) -> None:
    with (folder / "verdicts.jsonl").open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps({"event": "verdict", **line}) + "\n" for line in lines))


def test_the_logs_of_all_nodes_are_one_log_by_time(site: Site, tmp_path: Path) -> None:
    write(tmp_path / "node1", {"message": "before", "time_ms": 1})
    log = VerdictLog(site)
    write(tmp_path / "node2", {"message": "b", "time_ms": 20}, {"message": "b2", "time_ms": 20})
    write(tmp_path / "node1", {"message": "a", "time_ms": 10}, {"message": "c", "time_ms": 30})

    assert [verdict.message for verdict in log.settled()] == ["a", "b", "b2", "c"]
    assert log.new() == []


def test_a_log_is_not_quiet_while_one_node_still_writes(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = VerdictLog(site)
    clock, writes = 0.0, {0: "node1", 200: "node2", 400: "node1"}  # by the millisecond

    def sleep(seconds: float) -> None:
        nonlocal clock
        clock += seconds
        for at_ms in [at_ms for at_ms in writes if at_ms <= 1000 * clock]:
            name = writes.pop(at_ms)
            write(tmp_path / name, {"message": name, "time_ms": at_ms})

    monkeypatch.setattr(verdicts, "time", SimpleNamespace(monotonic=lambda: clock, sleep=sleep))
    monkeypatch.setattr(verdicts, "QUIET_SECONDS", 0.25)

    assert [verdict.message for verdict in log.settled()] == ["node1", "node2", "node1"]


def test_a_log_that_was_cut_on_a_host_names_the_host(fakes: dict[str, FakeRemote], tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("a\nb\n", encoding="utf-8")
    tail = LogTail(log, fakes["node1"].host)
    log.write_text("", encoding="utf-8")

    with pytest.raises(ExperimentError, match=r"follow .*log on host node1 \(operator@node1\.example:22\)"):
        tail.new_lines()


def test_a_host_that_fails_is_named_and_the_others_are_asked_all_the_same(fakes: dict[str, FakeRemote]) -> None:
    fakes["node1"].fault = lambda what: True
    hosts = [fake.host for fake in fakes.values()]

    outcomes = machine.attempt(hosts, lambda one: one.checked(["echo", one.host.name]))

    assert [(host.name, outcome if isinstance(outcome, bytes) else outcome.found) for host, outcome in outcomes] == [
        ("control", b"control\n"), ("node1", "the link is down"), ("node2", b"node2\n"),
    ]  # fmt: skip
    with pytest.raises(ExperimentError, match="host node1"):
        machine.each(hosts, lambda one: one.checked(["true"]))


def test_a_node_that_is_lost_before_or_while_logs_are_followed_is_an_error(fakes: dict[str, FakeRemote], tmp_path: Path) -> None:
    site = cluster_site(tmp_path)
    tails = LogTails(site.verdicts, site.nodes)
    fakes["node2"].fault = lambda what: True

    for action in (tails.new_records, lambda: VerdictLog(site)):
        with pytest.raises(ExperimentError, match="node2"):
            action()


def test_a_command_that_fails_says_what_it_said() -> None:
    with pytest.raises(ExperimentError, match="run `sh -c 'echo no >&2; exit 3'` on host localhost: no"):
        LocalMachine(HERE).checked(["sh", "-c", "echo no >&2; exit 3"])
    with pytest.raises(ExperimentError, match="timed out"):
        LocalMachine(HERE).run(["sleep", "5"], seconds_max=0.05)


def test_a_program_runs_while_the_with_lasts_and_its_output_is_here(tmp_path: Path) -> None:
    program = ["sh", "-c", "trap 'echo last; exit' TERM; echo first; echo ready >&2; while :; do sleep 0.05; done"]

    with machine.streaming(LocalMachine(HERE), program, tmp_path / "output", ready=b"ready", what="run it"):
        pass

    assert (tmp_path / "output").read_text(encoding="utf-8") == "first\nlast\n"


class Patient(LocalMachine):
    """Hands a program over when it has said something, however long its start takes here."""

    def stream(self, *words: Any, **more: Any) -> Stream:
        stream, ends = super().stream(*words, **more), time.monotonic() + 20
        while not stream.said():
            assert time.monotonic() < ends, "it says nothing"
            time.sleep(0.005)
        return stream


def test_a_program_that_is_never_ready_is_named_with_its_last_words(tmp_path: Path) -> None:
    with (
        pytest.raises(ExperimentError, match="run it on host localhost: no such device"),
        machine.streaming(Patient(HERE), ["sh", "-c", "echo no such device >&2"], tmp_path / "output", ready=b"x", what="run it", seconds_max=0.2),
    ):
        pytest.fail("it is not ready")


def test_a_host_is_asked_through_one_connection(fakes: dict[str, FakeRemote]) -> None:
    assert machine.of(fakes["node1"].host) is fakes["node1"]
    assert machine.of(HERE) is machine.of(replace(HERE))
