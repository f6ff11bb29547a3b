"""A run that stops, for whatever reason and wherever, is either refused or goes on with the blocks that it does not have, and says so."""

from __future__ import annotations

import csv
import errno
import json
import platform
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from experiments_world import serving, site_around
from test_experiments_e1 import RIGHT, FakeSite

from experiments import analysis, client, database, e1, figures, health, housekeeping, progress, provenance, verdicts
from experiments.e1 import E1, E1Parameters
from experiments.entries import ENTRIES, FUNCTIONS
from experiments.errors import ExperimentError, RunRefused
from experiments.gateway import Gateway
from experiments.health import Finding
from experiments.paths import RunPaths
from experiments.samples import SampleFile
from experiments.site import Site
from experiments.systems import KALIUM_ENFORCE, STOCK
from experiments.tails import LogTails

PARAMETERS = E1Parameters(blocks=3, warm_requests=1, direct_requests=1, request_seconds_max=10.0)
BLOCK_ROWS = 2 * 2 * (1 + 1 + 1)  # systems, entries, requests
assert RIGHT  # what the functions of the fake answer


class Faults:
    """Counts what an experiment asks of its site, and fails the `at`th question, or every one from there on, as a lost host would."""

    def __init__(self) -> None:
        self.count = 0
        self.at: int | None = None
        self.for_good = False
        self.asked: list[str] = []
        self._lock = threading.Lock()

    def point(self, what: str) -> None:
        with self._lock:  # functions are deployed by several threads
            self.count += 1
            number = self.count
            self.asked.append(what)
        if self.at is not None and (number == self.at or (self.for_good and number > self.at)):
            raise ExperimentError("host.lost", f"{what} on host node1", "the link is down", "see that node1 runs")

    def around(self, target: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        original = getattr(target, name)

        def asked(*words: Any, **more: Any) -> Any:
            self.point(name)
            return original(*words, **more)

        monkeypatch.setattr(target, name, asked)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    found = Faults()
    monkeypatch.setattr(database.Resetter, "reset", lambda self: found.point("reset"))
    for target, name in ((Gateway, "_call"), (LogTails, "new_records"), (client, "generate")):
        found.around(target, name, monkeypatch)
    return found


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A healthy site with two systems and two entries; nothing is drawn."""
    for name in FUNCTIONS:
        (tmp_path / "functions" / name).mkdir(parents=True)
        (tmp_path / "functions" / name / "sample.json").write_text("{}", encoding="utf-8")
    for module in (e1, analysis):
        monkeypatch.setattr(module, "ENTRIES", ENTRIES[:2], raising=False)
    monkeypatch.setattr(e1, "E1_SYSTEMS", (STOCK, KALIUM_ENFORCE))
    monkeypatch.setattr(analysis, "derive", lambda run: None)
    monkeypatch.setattr(figures, "draw", lambda run: [])
    # The fake writes its verdicts before it answers: each log is read once, so that a run asks the same number of questions each time.
    monkeypatch.setattr(verdicts, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(health, "findings", lambda site: [])
    gateway = FakeSite(tmp_path)
    with serving(gateway):
        yield site_around(gateway, monkeypatch, stack="functions: {}\n", images={name: f"localhost/kalium/{name}:1" for name in FUNCTIONS})


def only_run(site: Site) -> RunPaths:
    (where,) = (site.checkout / "results" / "e1").glob("2*/run.json")
    return RunPaths(where.parent)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def interrupt(site: Site, faults: Faults, at: int, *, for_good: bool = False) -> ExperimentError:
    """A run that is interrupted at that question to the site."""
    faults.count, faults.at, faults.for_good = 0, at, for_good
    with pytest.raises(ExperimentError) as caught:
        E1(PARAMETERS, site).execute()
    faults.at = None
    return caught.value


def in_block(site: Site, faults: Faults, block: int) -> int:
    """The number of a request of the load in the middle of that block, from 0, so that functions are there: found by a run that nothing disturbs."""
    E1(PARAMETERS, site).execute()
    loads = [number for number, what in enumerate(faults.asked, start=1) if what == "generate"]
    for path in (site.checkout / "results" / "e1").iterdir():
        if not path.is_symlink():
            shutil.rmtree(path)
    return loads[int(len(loads) * (block + 0.5) / PARAMETERS.blocks)]


def test_a_run_that_fails_at_any_point_goes_on_and_ends_as_one_that_did_not(site: Site, faults: Faults) -> None:
    """Every question to the site fails once, in turns of a step; the samples are those of a run that nothing disturbed."""
    whole = E1(PARAMETERS, site).execute().paths
    planned = [(row["entry"], row["system"], row["block"], row["via"], row["seq"]) for row in rows(whole.samples)]
    asked, first = faults.count, 5  # before the run's folder there is nothing to go on with
    whole.folder.rename(site.checkout / "whole")

    for at in range(first, asked + 1, 17):
        error = interrupt(site, faults, at)
        run = only_run(site)
        assert f"fab run-e1 --resume {run.stamp}" in error.next_step, (at, error.next_step)
        assert not run.seal_file.exists() and json.loads(run.run.read_text(encoding="utf-8"))["complete"] is False
        blocks = json.loads(run.progress.read_text(encoding="utf-8"))["blocks"]
        assert len(rows(run.samples)) == blocks * BLOCK_ROWS

        finished = E1.resumed(run.stamp, site)

        record = finished.paths.read_sealed()
        assert [(row["entry"], row["system"], row["block"], row["via"], row["seq"]) for row in rows(finished.paths.samples)] == planned
        assert [(entry["block"], "the link is down" in entry["error"]) for entry in record["interruptions"]] == [(blocks, True)]
        assert {len(seconds) for seconds in record["deploy_s"].values()} == {PARAMETERS.blocks}
        assert not run.progress.exists() and not run.block.exists()
        run.folder.rename(site.checkout / f"done-{at}")


def test_a_host_that_stays_lost_hides_no_error_and_the_run_goes_on_when_it_is_back(site: Site, faults: Faults) -> None:
    """Even removing the functions fails; the first error is told, and whoever goes on removes what is left."""
    error = interrupt(site, faults, in_block(site, faults, 1), for_good=True)

    assert "on host node1" in error.for_humans() and "see that node1 runs; then `fab run-e1 --resume" in error.for_humans()
    faults.for_good = False
    assert Gateway.of(site).functions() != []
    assert E1.resumed(only_run(site).stamp, site).paths.read_sealed()["complete"] is True
    assert Gateway.of(site).functions() == []


def test_what_an_interrupted_block_left_is_kept_sealed_and_counted_by_nothing(site: Site, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(site, faults, in_block(site, faults, 1))
    left = rows(only_run(site).block)

    run = E1.resumed(only_run(site).stamp, site).paths

    (entry,) = run.read_sealed()["interruptions"]
    assert entry["samples"] == "interrupted-1.csv" and rows(run.folder / entry["samples"]) == left
    assert len(rows(run.samples)) == PARAMETERS.blocks * BLOCK_ROWS
    assert "interrupted-1.csv" in run.seal_file.read_text(encoding="utf-8")


def test_a_run_may_be_interrupted_twice_and_in_the_same_block(site: Site, faults: Faults) -> None:
    at = in_block(site, faults, 1)
    interrupt(site, faults, at)
    faults.count, faults.at = 0, at // 3
    with pytest.raises(ExperimentError, match="the link is down"):
        E1.resumed(only_run(site).stamp, site)
    faults.at = None

    record = E1.resumed(only_run(site).stamp, site).paths.read_sealed()

    assert [entry["block"] for entry in record["interruptions"]] == [1, 1]


def test_systems_and_entries_come_in_the_order_that_the_seed_gives(site: Site, faults: Faults) -> None:
    whole = E1(PARAMETERS, site).execute().paths
    order = [(row["block"], row["system"], row["entry"]) for row in rows(whole.samples)]
    whole.folder.rename(site.checkout / "whole")
    interrupt(site, faults, faults.count // 2)

    run = E1.resumed(only_run(site).stamp, site).paths

    assert [(row["block"], row["system"], row["entry"]) for row in rows(run.samples)] == order


# Refused, and interrupted


def wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeSite, "wrong_status", "-1-kalium-enforce-")


def test_a_wrong_answer_of_a_healthy_site_refuses_the_run_for_good(site: Site, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_answer(monkeypatch)
    with pytest.raises(RunRefused) as caught:
        E1(PARAMETERS, site).execute()

    assert caught.value.code == "e1.wrong_answer" and "--resume" not in caught.value.for_humans()
    with pytest.raises(RunRefused, match="it was refused"):
        E1.resumed(only_run(site).stamp, site)


def test_a_wrong_answer_while_a_node_is_lost_interrupts_the_run_and_names_it(site: Site, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_answer(monkeypatch)
    monkeypatch.setattr(health, "findings", lambda site: [Finding("node2", "node node2: Ready is Unknown", "start node2")])
    with pytest.raises(ExperimentError) as caught:
        E1(PARAMETERS, site).execute()

    error = caught.value
    assert not isinstance(error, RunRefused)
    assert "node2: node node2: Ready is Unknown" in error.found and "start node2; then `fab run-e1 --resume" in error.next_step
    assert any(row["status"] == "500" for row in rows(only_run(site).block))  # the wrong answer itself is kept
    monkeypatch.setattr(FakeSite, "wrong_status", "no call")
    record = E1.resumed(only_run(site).stamp, site).paths.read_sealed()
    assert record["interruptions"][0]["samples"] == "interrupted-1.csv"


def test_a_denial_is_never_taken_for_an_interruption(site: Site, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeSite, "denied", "-1-kalium-enforce-")
    monkeypatch.setattr(health, "findings", lambda site: [Finding("node2", "it is slow", "wait")])

    with pytest.raises(RunRefused, match="denied"):
        E1(PARAMETERS, site).execute()
    assert not only_run(site).progress.exists()


def test_a_full_disk_here_is_told_as_one_and_the_run_goes_on_when_there_is_room(site: Site, faults: Faults, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be written any more, run.json neither."""
    full = OSError(errno.ENOSPC, "No space left on device", "samples.csv")

    def no_room(*words: Any) -> None:
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(SampleFile, "write", no_room)
        patch.setattr(RunPaths, "write_record", lambda self, record: no_room() if "error" in record else original(self, record))
        with pytest.raises(ExperimentError) as caught:
            E1(PARAMETERS, site).execute()

    assert caught.value.code == "results.full" and "make room on this machine; then `fab run-e1 --resume" in caught.value.next_step
    record = E1.resumed(only_run(site).stamp, site).paths.read_sealed()
    assert record["interruptions"][0]["error"] == "it ended without a word"


original = RunPaths.write_record


def test_ctrl_c_leaves_a_run_that_goes_on(site: Site, faults: Faults, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*words: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(client, "generate", stopped)
        with pytest.raises(KeyboardInterrupt):
            E1(PARAMETERS, site).execute()

    assert f"fab run-e1 --resume {only_run(site).stamp}" in capsys.readouterr().out
    E1.resumed(only_run(site).stamp, site)


@pytest.mark.parametrize("cut", ["between the samples and the progress", "in the middle of the samples"])
def test_a_block_is_whole_or_absent_wherever_it_was_cut(site: Site, faults: Faults, monkeypatch: pytest.MonkeyPatch, cut: str) -> None:
    """The process dies while a whole block moves into samples.csv."""
    interrupt(site, faults, in_block(site, faults, 1))
    run = only_run(site)
    with run.samples.open("a", encoding="utf-8") as file:
        file.write(run.block.read_text(encoding="utf-8")[80:] if cut.startswith("between") else "microbenchmark,stock,1,0,2")

    finished = E1.resumed(run.stamp, site).paths

    assert len(rows(finished.samples)) == PARAMETERS.blocks * BLOCK_ROWS


# What may not be gone on with


def change_samples(run: RunPaths) -> None:
    run.samples.write_text(run.samples.read_text(encoding="utf-8").replace(",200,0.0", ",200,0.1", 1), encoding="utf-8")


def change_parameters(run: RunPaths) -> None:
    record = json.loads(run.run.read_text(encoding="utf-8"))
    run.run.write_text(json.dumps({**record, "seed": 1}), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "found"),
    [(change_samples, "not what it was"), (change_parameters, "seed was 1"), (lambda run: run.samples.write_text(""), "not what it was")],
)
def test_a_run_that_was_touched_is_refused(site: Site, faults: Faults, change: Callable[[RunPaths], None], found: str) -> None:
    interrupt(site, faults, in_block(site, faults, 1))
    change(only_run(site))

    with pytest.raises(RunRefused, match=found):
        E1.resumed(only_run(site).stamp, site)


def test_a_run_goes_on_with_another_kernel_and_says_so_but_not_with_other_sources(
    site: Site, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(site, faults, in_block(site, faults, 1))
    monkeypatch.setattr(platform, "release", lambda: "9.9")
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "_git", lambda checkout, *arguments: "d" * 40)
        with pytest.raises(RunRefused, match=r'commit was "c+" when it began and is "d+" now'):
            E1.resumed(only_run(site).stamp, site)

    record = E1.resumed(only_run(site).stamp, site).paths.read_sealed()

    changed: Mapping[str, Any] = record["interruptions"][0]["changed"]
    assert changed["kernel"][1] == "9.9"


def test_a_sealed_run_and_one_that_is_not_there_are_not_gone_on_with(site: Site, faults: Faults) -> None:
    run = E1(PARAMETERS, site).execute().paths

    with pytest.raises(RunRefused, match="complete and sealed"):
        E1.resumed(run.stamp, site)
    with pytest.raises(ExperimentError, match=r"holds no run\.json"):
        E1.resumed("20000101T000000Z", site)


def test_two_processes_do_not_write_one_run(site: Site, faults: Faults) -> None:
    interrupt(site, faults, in_block(site, faults, 1))
    run = only_run(site)

    with progress.alone(run), pytest.raises(ExperimentError, match="another process is writing it"):
        E1.resumed(run.stamp, site)
    E1.resumed(run.stamp, site)


def test_cleaning_keeps_a_run_that_can_go_on(site: Site, faults: Faults) -> None:
    interrupt(site, faults, in_block(site, faults, 1))

    assert f"kept runs that can go on: e1/{only_run(site).stamp}" in housekeeping.clean(site)
    assert only_run(site).folder.is_dir()
