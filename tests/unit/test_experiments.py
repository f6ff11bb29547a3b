"""E1's rules hold without a site: statistics, samples, seals, figures, and what makes a run refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from experiments import analysis, client, figures, samples, statistics
from experiments.client import Sample, Series
from experiments.errors import ExperimentError, RunRefused, errors_for_humans
from experiments.paths import RESULTS_SCHEMA, RunPaths
from experiments.samples import SampleFile
from experiments.site import GROUPS, PINS, Host, load_site, site_sha256

PARAMETERS = {"blocks": 3, "warm_requests": 2, "direct_requests": 1}
ENTRIES = ("microbenchmark", "product-photos-success")
FACTORS = {"stock": 1.0, "stock-b": 1.0, "kalium-audit": 1.1, "kalium-enforce": 1.25}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "schema": RESULTS_SCHEMA,
        "complete": True,
        "parameters": PARAMETERS,
        "profile": "quick",
        "seed": 7,
        "judging": "tls=connection",
        "site_sha256": "a" * 64,
        "commit": "c" * 40,
        **changes,
    }


def write_samples(run: RunPaths, *, factors: Mapping[str, float] = FACTORS, status: int = 200) -> None:
    """Samples whose ratios to stock are exactly `factors`, in every block."""
    with SampleFile(run.samples) as file:
        for block in range(PARAMETERS["blocks"]):
            for system, factor in factors.items():
                for entry in ENTRIES:
                    for via, count in (("gateway", 1 + PARAMETERS["warm_requests"]), ("direct", PARAMETERS["direct_requests"])):
                        seconds = [(0.010 + 0.004 * block + 0.001 * seq) * factor for seq in range(count)]
                        file.write(
                            system,
                            block,
                            [
                                Sample(
                                    entry, via, seq, status, value, not (via == "gateway" and seq == 0), f"{block}-{system}-{entry}-{via}-{seq}", ""
                                )
                                for seq, value in enumerate(seconds)
                            ],
                        )


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    """A complete, sealed run with known ratios."""
    paths = RunPaths.create("e1", results=tmp_path)
    write_samples(paths)
    paths.write_record(record())
    paths.seal()
    return paths


# Statistics


def test_the_ratio_of_means_and_of_medians_is_that_of_the_pooled_samples() -> None:
    """Known values: stock 1, 2, 3, 4; the system 2, 4, 6, 9."""
    groups = {
        ("e", "stock", 0): [1.0, 2.0], ("e", "stock", 1): [3.0, 4.0],
        ("e", "kalium-enforce", 0): [2.0, 4.0], ("e", "kalium-enforce", 1): [6.0, 9.0],
    }  # fmt: skip

    row = statistics.analyse(groups, ["e"], ["stock", "kalium-enforce"], seed=1).rows[1]

    assert (row.n, row.blocks, row.mean_s, row.median_s) == (4, 2, 5.25, 5.0)
    assert row.ratio_mean.value == pytest.approx(5.25 / 2.5)
    assert row.ratio_median.value == pytest.approx(5.0 / 2.5)


def test_the_interval_spans_what_resampled_blocks_can_give() -> None:
    """With two blocks of ratio 2 and 3 the extremes are replicates that drew one block twice."""
    groups = {("e", "stock", 0): [1.0], ("e", "stock", 1): [1.0], ("e", "x", 0): [2.0], ("e", "x", 1): [3.0]}

    ratio = statistics.analyse(groups, ["e"], ["stock", "x"], seed=1).rows[1].ratio_mean

    assert (ratio.value, ratio.low, ratio.high) == (2.5, 2.0, 3.0)


def test_what_slows_a_whole_block_down_cancels_in_the_interval() -> None:
    """Blocks are drawn in pairs: a slow block is slow for both, and the ratio knows no spread."""
    groups = {("e", "stock", block): [0.01 * (1 + block)] for block in range(5)} | {("e", "x", block): [0.015 * (1 + block)] for block in range(5)}

    ratio = statistics.analyse(groups, ["e"], ["stock", "x"], seed=3).rows[1].ratio_mean

    assert [ratio.low, ratio.high] == pytest.approx([1.5, 1.5])


def test_the_same_seed_gives_the_same_interval_and_stock_is_one() -> None:
    groups = {("e", system, block): [1.0 + 0.1 * block * len(system), 2.0] for system in ("stock", "other") for block in range(4)}

    first = statistics.analyse(groups, ["e"], ["stock", "other"], seed=5)
    second = statistics.analyse(groups, ["e"], ["stock", "other"], seed=5)

    assert first == second
    assert first.rows[0].ratio_mean == statistics.Interval(1.0, 1.0, 1.0)


def test_the_aggregate_is_the_geometric_mean_of_the_entries_ratios() -> None:
    groups = {("a", "stock", 0): [1.0], ("b", "stock", 0): [1.0], ("a", "kalium-enforce", 0): [2.0], ("b", "kalium-enforce", 0): [8.0]}

    found = statistics.analyse(groups, ["a", "b"], ["stock", "kalium-enforce"], seed=1)

    assert found.geomean["kalium-enforce"].value == pytest.approx(4.0)
    assert found.maximum["kalium-enforce"].value == pytest.approx(8.0)


def test_a_block_without_samples_is_not_silently_left_out() -> None:
    groups = {("e", "stock", 0): [1.0], ("e", "stock", 1): [1.0], ("e", "x", 0): [1.0]}

    with pytest.raises(ValueError, match="e/x/block 1"):
        statistics.analyse(groups, ["e"], ["stock", "x"], seed=1)


# Summaries


def test_summaries_have_the_columns_and_names_that_programs_read(run: RunPaths) -> None:
    analysis.derive(run)

    summary = run.summary.read_text(encoding="utf-8").splitlines()
    aggregate = dict(line.split(",")[:2] for line in run.aggregate.read_text(encoding="utf-8").splitlines()[1:])
    assert summary[0] == (
        "entry,system,n,blocks,median_s,mean_s,p95_s,ratio_mean,ratio_mean_low,ratio_mean_high,ratio_median,ratio_median_low,ratio_median_high"
    )
    assert len(summary) == 1 + len(ENTRIES) * len(FACTORS)
    assert summary[4].startswith("microbenchmark,kalium-enforce,6,3,") and ",1.2500,1.2500,1.2500," in summary[4]
    assert aggregate == {
        "entries": "2",
        "systems": "4",
        "stock_b_geomean": "1.0000",
        "kalium_audit_geomean": "1.1000",
        "kalium_enforce_geomean": "1.2500",
        "kalium_enforce_max": "1.2500",
        "gateway_added_median": "0.001500",
        "stock_b_direct_geomean": "1.0000",
        "kalium_audit_direct_geomean": "1.1000",
        "kalium_enforce_direct_geomean": "1.2500",
    }


def test_cold_and_direct_samples_stay_apart_from_warm_ones(run: RunPaths) -> None:
    warm, cold, direct = (
        analysis.analysis_of(run, via=via, warm=is_warm) for via, is_warm in (("gateway", True), ("gateway", False), ("direct", True))
    )

    assert warm is not None and cold is not None and direct is not None
    assert [found.rows[0].n for found in (warm, cold, direct)] == [6, 3, 3]


def test_derived_files_are_the_same_bytes_when_written_again(run: RunPaths) -> None:
    analysis.derive(run)
    first = run.summary.read_bytes() + run.aggregate.read_bytes()

    analysis.derive(run)

    assert run.summary.read_bytes() + run.aggregate.read_bytes() == first


# Figures


def test_the_figure_is_the_same_bytes_when_drawn_again(run: RunPaths) -> None:
    first = [path.read_bytes() for path in figures.draw(run)]

    second = [path.read_bytes() for path in figures.draw(run)]

    assert [len(data) > 1000 for data in first] == [True, True, True]
    assert second == first


def test_no_published_bar_stands_beside_an_https_entry_while_tls_is_judged_per_connection() -> None:
    assert not figures.comparable("microbenchmark", "tls=connection")
    assert figures.comparable("product-photos-success", "tls=connection")


def test_the_published_values_are_those_of_the_figure() -> None:
    """17 entries; their geometric mean is the one recomputed from the published data."""
    values = figures.published()

    assert len(values) == 17
    assert round(math.exp(sum(map(math.log, values.values())) / 17), 3) == 1.147


def test_drawing_a_sealed_run_does_not_break_its_seal(run: RunPaths) -> None:
    analysis.derive(run)
    figures.draw(run)

    assert run.read_sealed()["complete"] is True


# Runs that are refused


@pytest.mark.parametrize("change", ["edit", "remove", "add"])
def test_a_run_that_changed_after_sealing_is_refused(run: RunPaths, change: str) -> None:
    if change == "edit":
        run.samples.write_text(run.samples.read_text(encoding="utf-8").replace("0.010", "0.009", 1), encoding="utf-8")
    elif change == "remove":
        run.samples.unlink()
    else:
        (run.folder / "more.csv").write_text("x\n", encoding="utf-8")

    with pytest.raises(RunRefused, match=r"more\.csv" if change == "add" else r"samples\.csv"):
        run.read_sealed()


def test_a_run_of_another_schema_is_refused(tmp_path: Path) -> None:
    run = RunPaths.create("e1", results=tmp_path)
    write_samples(run)
    run.write_record(record(schema="kalium-results/v0"))
    run.seal()

    with pytest.raises(RunRefused, match="kalium-results/v0"):
        figures.draw(run)


def test_a_run_without_a_seal_is_refused(tmp_path: Path) -> None:
    run = RunPaths.create("e1", results=tmp_path)
    write_samples(run)
    run.write_record(record())

    with pytest.raises(RunRefused, match="did not complete"):
        run.read_sealed()


def test_a_run_that_says_it_is_incomplete_is_refused_even_when_sealed(tmp_path: Path) -> None:
    run = RunPaths.create("e1", results=tmp_path)
    run.write_record(record(complete=False))
    run.seal()

    with pytest.raises(RunRefused, match="complete: false"):
        run.read_sealed()


def test_a_sealed_run_is_never_written_again(run: RunPaths) -> None:
    with pytest.raises(AssertionError):
        run.write_record(record(seed=8))


def test_a_sample_that_is_not_2xx_refuses_the_run(tmp_path: Path) -> None:
    run = RunPaths.create("e1", results=tmp_path)
    write_samples(run, status=500)

    with pytest.raises(RunRefused, match="status 500"):
        samples.read(run.samples)


def test_a_lost_sample_refuses_the_run(run: RunPaths) -> None:
    lines = run.samples.read_text(encoding="utf-8").splitlines(keepends=True)
    lost = run.folder / "lost.csv"
    lost.write_text("".join(lines[:-2] + lines[-1:]), encoding="utf-8")

    with pytest.raises(RunRefused, match="2 samples, not 3"):
        samples.require_complete(samples.read(lost), PARAMETERS, lost)


def test_samples_with_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "samples.csv"
    path.write_text("entry,seconds\na,1\n", encoding="utf-8")

    with pytest.raises(RunRefused, match="its columns are"):
        samples.read(path)


def test_latest_is_the_newest_run_of_the_highest_profile_on_this_site(tmp_path: Path) -> None:
    for stamp, changes in {
        "20260101T000000Z": {"profile": "full"},
        "20260102T000000Z": {"profile": "full"},
        "20260103T000000Z": {"profile": "quick"},
        "20260104T000000Z": {"profile": "full", "site_sha256": "b" * 64},
    }.items():
        other = RunPaths(tmp_path / "e1" / stamp)
        other.folder.mkdir(parents=True)
        other.write_record(record(**changes))
        other.seal()
    (tmp_path / "e1" / "20260105T000000Z").mkdir()

    chosen = RunPaths(tmp_path / "e1" / "20260103T000000Z").point_latest("a" * 64)

    assert chosen.stamp == "20260102T000000Z"
    assert RunPaths.find("e1", None, results=tmp_path).stamp == "20260102T000000Z"


def test_asking_for_a_run_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match="no complete run yet") as caught:
        RunPaths.find("e1", None, results=tmp_path)

    assert "fab run-e1" in caught.value.next_step


# The load generator's output


def test_a_sample_that_did_not_arrive_is_noticed() -> None:
    line = json.dumps(
        {"type": "sample", "entry": "e", "via": "gateway", "seq": 0, "status": 200, "seconds": 0.1, "warm": False, "call_id": "c", "problem": ""}
    )

    with pytest.raises(RunRefused, match="1 samples arrived"):
        client.parse(f'{line}\n{{"type": "end", "samples": 2}}\n', 2, "send 2 requests")
    with pytest.raises(RunRefused, match="no end line"):
        client.parse(f"{line}\n", 1, "send 1 request")
    assert len(client.parse(f'{line}\n{{"type": "end", "samples": 1}}\n', 1, "send 1 request")) == 1


def test_output_that_is_no_sample_is_refused() -> None:
    with pytest.raises(RunRefused, match="is no sample"):
        client.parse("Traceback (most recent call last):\n", 1, "send 1 request")


def test_a_host_that_cannot_be_reached_is_told_with_its_name(tmp_path: Path) -> None:
    host = Host(name="client", connection="ssh", address="127.0.0.1", port=1, key_file=str(tmp_path / "none"))
    series = Series("e", "gateway", "http://127.0.0.1:1/", {}, [], 1, True, "c")

    with pytest.raises(ExperimentError, match=r"127\.0\.0\.1:1"):
        client.generate(host, [series], seconds_max=1.0)


# The site


def make_checkout(root: Path, **changes: Any) -> Path:
    """A checkout with an inventory, pins and the site record that belongs to them."""
    (root / "inventory" / "local").mkdir(parents=True)
    (root / "inventory" / "local" / "hosts.yml").write_text("all: {}\n", encoding="utf-8")
    (root / PINS / "defaults").mkdir(parents=True)
    (root / PINS / "defaults" / "main.yml").write_text("---\n", encoding="utf-8")
    (root / ".kalium").mkdir()
    site = {
        "schema": "kalium-site/v2", "site": "local", "engine": "podman", "inventory": "inventory/local", "gateway": "http://127.0.0.1:31112",
        "basic_auth_user": "admin", "basic_auth_password_file": "/x", "images_url": "https://images.kalium.test:4443/image.jpg",
        "images_file": "/x", "verdicts": "/x", "timings": "/x", "imageserver_log": "/x", "log_folder": "/x", "controller_port": 5000,
        "service_manager": "supervisor", "interfaces": ["kalium0"], "attacker": "localhost", "attacker_address": "10.137.0.1",
        "database": {"address": "10.137.0.1", "port": 3306, "schema": "helloRetail", "user": "abc", "password": "xyz", "reset": "/x"},
        "hosts": {"localhost": {"connection": "local"}}, "groups": {key: ["localhost"] for key in GROUPS}, "commit": "c" * 40,
        "site_sha256": site_sha256(root, "inventory/local"), **changes,
    }  # fmt: skip
    (root / ".kalium" / "site.json").write_text(json.dumps(site), encoding="utf-8")
    return root


def test_the_site_set_up_last_is_used(tmp_path: Path) -> None:
    site = load_site(checkout=make_checkout(tmp_path))

    assert (site.name, site.client.connection, site.database.port) == ("local", "local", 3306)


@pytest.mark.parametrize(
    ("prepare", "code"),
    [
        (lambda root: (root / ".kalium" / "site.json").unlink(), "site.absent"),
        (lambda root: (root / ".kalium" / "site.json").write_text("{", encoding="utf-8"), "site.unreadable"),
        (lambda root: (root / "inventory" / "local" / "hosts.yml").write_text("all: {changed: 1}\n", encoding="utf-8"), "site.changed"),
        (lambda root: (root / PINS / "defaults" / "main.yml").write_text("--- {}\n", encoding="utf-8"), "site.changed"),
        (lambda root: (root / "inventory" / "local" / "more.yml").write_text("{}\n", encoding="utf-8"), "site.changed"),
    ],
)
def test_a_site_that_is_absent_broken_or_changed_is_refused(tmp_path: Path, prepare: Any, code: str) -> None:
    prepare(make_checkout(tmp_path))

    with pytest.raises(ExperimentError) as caught:
        load_site(checkout=tmp_path)

    assert caught.value.code == code
    assert "site.yml" in caught.value.next_step or "make site" in caught.value.next_step


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"schema": "kalium-site/v1"}, "site.schema"),
        ({"gateway": None}, "site.field"),
        ({"hosts": {}}, "site.group"),
        ({"hosts": {"localhost": {"connection": "carrier pigeon"}}}, "site.host"),
        ({"attacker": "nobody"}, "site.attacker"),
        ({"groups": {}}, "site.group"),
        ({"engine": "kubernetes"}, "site.field"),
    ],
)
def test_a_record_that_this_checkout_cannot_read_is_refused(tmp_path: Path, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(ExperimentError) as caught:
        load_site(checkout=make_checkout(tmp_path, **changes))

    assert caught.value.code == code


def test_an_inventory_that_is_not_there_or_not_set_up_is_refused(tmp_path: Path) -> None:
    make_checkout(tmp_path)
    (tmp_path / "inventory" / "cloudlab").mkdir()

    for inventory, code in (("inventory/none", "site.inventory"), ("inventory/cloudlab", "site.other")):
        with pytest.raises(ExperimentError) as caught:
            load_site(inventory, checkout=tmp_path)
        assert (caught.value.code, caught.value.exit_code) == (code, 2)


def test_an_error_is_two_lines_for_a_person_and_an_exit_code_for_a_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, errors_for_humans():
        raise RunRefused("e1.denial", "measure kalium-enforce", "1 message was denied", "check the policy")

    assert caught.value.code == 1
    assert capsys.readouterr().err == "error[e1.denial]: measure kalium-enforce: 1 message was denied\nnext: check the policy\n"
