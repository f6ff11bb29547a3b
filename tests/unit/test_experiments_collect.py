"""`fab collect` brings what every host has, lists it with sizes and digests, and says what is missing."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from experiments_world import HERE, FakeRemote, cluster_site, fake_remotes

from experiments import collect as collecting
from experiments import machine
from experiments.collect import LAST_OF, MEBIBYTE, collect
from experiments.errors import EXIT_NO, EXIT_USAGE, ExperimentError
from experiments.machine import Done, LocalMachine
from experiments.paths import RESULTS_SCHEMA, RunPaths
from experiments.site import Site

CLUSTER_FILES = {f"cluster/{name}" for name in ("pods.txt", "pods.json", "nodes.txt", "nodes.json", "events.txt", "runtimeclasses.txt")}
FULL = OSError(errno.ENOSPC, "No space left on device", "somewhere")


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeRemote]:
    """Three hosts that answer at once; their log folder is one here."""
    found = fake_remotes(monkeypatch, "control", "node1", "node2")
    for fake in found.values():
        fake.answers = {"uname": b"Linux\n", "kubectl": b"{}\n", "journalctl": b"a line\n"}
    return found


@pytest.fixture
def site(fakes: dict[str, FakeRemote], tmp_path: Path) -> Site:
    log = tmp_path / "log"
    (log / "functions").mkdir(parents=True)
    (log / "verdicts.jsonl").write_text("{}\n", encoding="utf-8")
    (log / "functions" / "master.log").write_text("started\n", encoding="utf-8")
    return replace(cluster_site(tmp_path), log_folder=log)


def collected(site: Site) -> Path:
    (folder,) = (site.checkout / "results" / "collect").glob("*/collected")
    return folder


def manifest(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    return record


def names(folder: Path, host: str) -> set[str]:
    return {path.relative_to(folder / host).as_posix() for path in (folder / host).rglob("*") if path.is_file()}


def failed(site: Site, run: str | None = None, **more: Any) -> ExperimentError:
    with pytest.raises(ExperimentError) as caught:
        collect(site, run, **more)
    return caught.value


def journals(fakes: dict[str, FakeRemote]) -> dict[str, str]:
    """The command for the journal, by host that was asked for it."""
    return {name: what for name, fake in fakes.items() for what in fake.asked if "journalctl" in what}


def test_what_hosts_have_is_here_and_listed_with_size_and_sha256(site: Site) -> None:
    said = collect(site, None)

    folder = collected(site)
    of_each = {"host.txt", "journal.log", "log/verdicts.jsonl", "log/functions/master.log"}
    assert {host: names(folder, host) for host in site.hosts} == {"control": of_each | CLUSTER_FILES, "node1": of_each, "node2": of_each}
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    listed = {entry["file"]: (entry["host"], entry["bytes"], entry["sha256"], entry["cut"]) for entry in manifest(folder)["files"]}
    assert listed == {
        path.relative_to(folder).as_posix(): (
            path.relative_to(folder).parts[0], path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest(), False,
        )
        for path in files
    }  # fmt: skip
    assert (folder / "node2" / "log" / "functions" / "master.log").read_text(encoding="utf-8") == "started\n"
    assert said == f"18 files, 0.0 MiB of 3 host(s): {folder}" and manifest(folder)["failed"] == {}


def test_all_hosts_are_asked_at_the_same_time(site: Site, fakes: dict[str, FakeRemote]) -> None:
    together = threading.Barrier(len(fakes))
    for fake in fakes.values():
        fake.fault = lambda what: "printf" in what and together.wait(5.0) < 0

    collect(site, None)


def test_a_long_file_is_cut_to_its_newest_bytes_and_told(site: Site, fakes: dict[str, FakeRemote]) -> None:
    log, limit = site.log_folder, MEBIBYTE
    (log / "long.log").write_bytes(b"old" + b"n" * limit)
    (log / "whole.log").write_bytes(b"w" * limit)
    fakes["node1"].answers["journalctl"] = b"j" * limit  # LAST_OF leaves no more of it

    said = collect(site, None, mib=1)

    folder = collected(site)
    assert (folder / "node1" / "log" / "long.log").read_bytes() == b"n" * limit
    cut = {entry["file"] for entry in manifest(folder)["files"] if entry["cut"]}
    assert cut == {"node1/journal.log", *(f"{host}/log/long.log" for host in site.hosts)}
    assert "cut to their last 1 MiB: control/log/long.log, node1/log/long.log, node1/journal.log" in said


def test_a_lost_host_is_named_and_the_others_are_complete(site: Site, fakes: dict[str, FakeRemote]) -> None:
    fakes["node1"].fault = lambda what: "journalctl" in what

    error = failed(site)

    folder = collected(site)
    assert error.exit_code == EXIT_NO and "node1: " in error.found and "the link is down" in error.found and "node2" not in error.found
    assert list(manifest(folder)["failed"]) == ["node1"]
    listed = {entry["file"] for entry in manifest(folder)["files"]}
    assert {"node1/log/verdicts.jsonl", "node2/journal.log", "control/cluster/runtimeclasses.txt"} <= listed
    assert "node1/journal.log" not in listed


def test_a_host_that_cannot_be_reached_at_all_has_no_files(site: Site, fakes: dict[str, FakeRemote]) -> None:
    fakes["node2"].fault = lambda what: True

    assert "node2: " in failed(site).found
    assert {entry["host"] for entry in manifest(collected(site))["files"]} == {"control", "node1"}


def test_a_command_that_fails_on_its_host_is_told_beside_its_file(site: Site, fakes: dict[str, FakeRemote]) -> None:
    fakes["control"].answers["kubectl"] = Done(1, b"", b"connection refused\n")

    said = collect(site, None)

    assert "control/cluster/pods.txt: connection refused" in said and "control/cluster/events.txt: connection refused" in said


def test_the_newest_bytes_of_a_command_do_not_hide_that_it_failed() -> None:
    done = LocalMachine(HERE).run(["sh", "-c", LAST_OF, "sh", "4", "sh", "-c", "echo 123456; echo no >&2; exit 7"])

    assert done == Done(7, b"456\n", b"no\n")
    assert LocalMachine(HERE).run(["sh", "-c", LAST_OF, "sh", "4", "echo", "a b", "c"]) == Done(0, b"b c\n", b"")


def test_a_full_disk_here_is_told_as_one_and_not_as_a_fault_of_a_host(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*words: Any, **more: Any) -> Done:
        raise FULL

    monkeypatch.setattr(FakeRemote, "copy", full)

    error = failed(site)

    assert "write somewhere: No space left on device" in error.found and error.exit_code == EXIT_NO
    assert set(manifest(collected(site))["failed"]) == set(site.hosts)


@pytest.mark.parametrize("where", ["write_whole", "mkdir"])
def test_a_disk_too_full_for_the_folder_or_the_manifest_is_an_error_with_a_next_step(site: Site, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    def full(*words: Any, **more: Any) -> None:
        raise FULL

    monkeypatch.setattr(Path if where == "mkdir" else collecting, where, full)

    error = failed(site)

    assert error.code == "results.write" and "No space left on device" in error.found and "make room" in error.next_step


def test_the_host_on_which_the_task_runs_is_collected_from_too_but_for_its_journal(site: Site, fakes: dict[str, FakeRemote]) -> None:
    machine._machines[HERE] = fakes["build"] = FakeRemote(HERE)
    fakes["build"].answers = {"uname": b"Linux\n"}

    collect(replace(site, hosts={**site.hosts, "localhost": HERE}), None)

    assert names(collected(site), "localhost") == {"host.txt", "log/verdicts.jsonl", "log/functions/master.log"}
    assert set(journals(fakes)) == {"control", "node1", "node2"}


def test_a_site_without_systemd_is_asked_for_no_journal_and_one_without_a_cluster_for_no_pods(site: Site, fakes: dict[str, FakeRemote]) -> None:
    collect(replace(site, service_manager="supervisor", cluster=None), None)

    assert journals(fakes) == {} and not any("kubectl" in what for what in fakes["control"].asked)


def test_the_journal_of_our_units_and_the_clusters_is_asked_for(site: Site, fakes: dict[str, FakeRemote]) -> None:
    collect(site, None)

    told = journals(fakes)["node1"]
    assert all(f"--unit {unit}" in told.replace("'", "") for unit in ("kalium-*", "kubelet", "containerd", "k3s*")) and "--since" not in told


def run_of(site: Site, **record: Any) -> RunPaths:
    run = RunPaths.create("e1", results=site.checkout / "results")
    run.write_record({"schema": RESULTS_SCHEMA, "complete": True, **record})
    return run


def test_what_belongs_to_a_run_is_beside_it_since_its_start_and_outside_its_seal(site: Site, fakes: dict[str, FakeRemote]) -> None:
    run = run_of(site, start="2026-01-02T03:04:05+01:00")
    run.seal()

    collect(site, f"results/e1/{run.stamp}/")

    (folder,) = run.collected.iterdir()
    assert manifest(folder)["run"] == f"results/e1/{run.stamp}/" and names(folder, "node1")
    assert all("--since '2026-01-02 02:04:05 UTC'" in told for told in journals(fakes).values()) and len(journals(fakes)) == 3
    assert run.read_sealed()["complete"] is True


@pytest.mark.parametrize("run", ["e1/20000101T000000Z", "e1", "../e1", "e1/no such run"])
def test_a_run_that_is_not_there_is_refused_before_any_host_is_asked(site: Site, fakes: dict[str, FakeRemote], run: str) -> None:
    error = failed(site, run)

    assert (error.code, error.exit_code) == ("run.absent", EXIT_USAGE)
    assert not any(fake.asked for fake in fakes.values()) and not (site.checkout / "results").exists()


@pytest.mark.parametrize("mib", [0, 4097, -1])
def test_a_limit_that_is_no_size_is_refused(site: Site, mib: int) -> None:
    error = failed(site, mib=mib)

    assert (error.code, error.exit_code) == ("collect.limit", EXIT_USAGE)
    assert not (site.checkout / "results").exists()


@pytest.mark.parametrize("mib", [1, 4096])
def test_the_limit_holds_for_every_file(site: Site, fakes: dict[str, FakeRemote], mib: int) -> None:
    collect(site, None, mib=mib)

    commands: list[Callable[[str], bool]] = [lambda what: "tail -c" in what, lambda what: "journalctl" in what, lambda what: "get events" in what]
    asked = [what for what in fakes["control"].asked if any(is_one(what) for is_one in commands)]
    assert len(asked) >= 4 and all(f" {mib * MEBIBYTE} " in what for what in asked)
    assert manifest(collected(site))["limit_bytes"] == mib * MEBIBYTE
