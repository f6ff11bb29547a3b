"""A whole run of E1 against a gateway of this test: what is sealed, and what refuses the run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from experiments_world import FakeGateway, only_run_in, serving, site_around

from experiments import database
from experiments.e1 import E1, E1Parameters
from experiments.entries import ENTRIES, FUNCTIONS
from experiments.errors import ExperimentError, RunRefused

PARAMETERS = E1Parameters(blocks=2, warm_requests=2, direct_requests=1, request_seconds_max=10.0)
RIGHT = {
    "From": "200494", "photographer": {"id": "200494", "status": "complete"}, "image": "storedPhotosTable/1", "success": "true",
    "outcome": "photo taken", "assignmentComplete": "true",
}  # fmt: skip


class FakeSite(FakeGateway):
    """A gateway whose functions answer rightly and are judged, until it is said otherwise of a request's call id."""

    wrong_status = "no call"
    wrong_body = "no call"
    denied = "no call"
    unjudged = False

    def invoked(self, name: str, body: dict[str, Any], call: str) -> tuple[int, Any]:
        app = next(iter(self.deployed.values()))["annotations"].get("kalium.io/app", "")
        if app and not self.unjudged:
            denied = self.denied in call
            line = {
                "event": "verdict", "app": app, "function": "f", "mode": "audit" if app.endswith("audit") else "enforce", "allowed": not denied,
                "would_deny": False, "reason": "out_of_order" if denied else "allowed", "kind": "mysql", "message": "mysql begin", "peer": "database",
                "expected": ["mysql select @line 12"], "line": 12, "call": call,
            }  # fmt: skip
            self.log("verdicts", [line])
        return 500 if self.wrong_status in call else 200, {} if self.wrong_body in call else RIGHT


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeSite]:
    gateway = FakeSite(tmp_path)
    with serving(gateway):
        yield gateway


@pytest.fixture
def e1(fake: FakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> E1:
    """E1 on a checkout and a site of this test; the database is not asked, its resets are counted by nobody."""
    for name in FUNCTIONS:
        (tmp_path / "functions" / name).mkdir(parents=True)
        (tmp_path / "functions" / name / "sample.json").write_text('{"MediaUrl0": "https://example.test/x"}', encoding="utf-8")
    monkeypatch.setattr(database.Resetter, "reset", lambda self: None)
    stack = "functions:\n  product-photos-master:\n    environment: {A: 1}\n"
    return E1(PARAMETERS, site_around(fake, monkeypatch, stack=stack, images={name: f"localhost/kalium/{name}:1" for name in FUNCTIONS}))


def test_a_run_measures_every_entry_under_every_system_and_is_sealed(e1: E1, fake: FakeSite, capsys: pytest.CaptureFixture[str]) -> None:
    finished = e1.execute()

    record = finished.paths.read_sealed()
    lines = finished.paths.samples.read_text(encoding="utf-8").splitlines()
    assert len(lines) == 1 + 2 * 4 * len(ENTRIES) * (1 + 2 + 1)
    assert record["judging"] == "tls=opened" and record["parameters"]["blocks"] == 2
    assert set(record["judged_messages"]) == {"kalium-audit", "kalium-enforce"}
    assert sorted({body["annotations"].get("kalium.io/app", "stock") for body in fake.ever}) == ["hello-retail", "hello-retail-audit", "stock"]
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

    record = only_run_in(e1.results / "e1")
    assert record["complete"] is False and found in record["error"]
    assert fake.deployed == {}


def test_one_denial_refuses_the_run_and_shows_the_verdict(e1: E1, fake: FakeSite) -> None:
    fake.denied = "0-kalium-enforce-microbenchmark-gateway-1"

    with pytest.raises(RunRefused, match=r"mysql 'mysql begin' to database: out_of_order .*policy line 12"):
        e1.execute()

    assert only_run_in(e1.results / "e1")["complete"] is False


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
