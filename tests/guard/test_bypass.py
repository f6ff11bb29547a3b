"""No way out delivers what the policy refuses: the bypass suite, whose table goes to results/bypass."""

from __future__ import annotations

from typing import Any

import pytest

from .bypass import NAMES, POLICY, cases, figures, judge, observe, store
from .lab import Lab
from .record import recorded, write_summary, write_table

CASES = list(cases())


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    with (
        recorded("bypass", profile="full", seed=0, parameters={"cases": [case.name for case in CASES]}) as run,
        Lab({mode: POLICY.format(mode=mode) for mode in ("audit", "enforce")}, NAMES) as lab,
    ):
        rows = observe(lab, CASES, report=print)
        store(run, rows)
        judged = judge(rows)
        write_table(run.cases, judged)
        write_summary(run, figures(judged))
    return judged


def test_there_are_enough_cases_and_stock_delivers_most(table: list[dict[str, Any]]) -> None:
    enforced = [row for row in table if row["mode"] == "enforce"]
    assert len(enforced) >= 100
    assert sum(row["stock_delivered"] == "true" for row in enforced) >= 100


@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_nothing_leaves(table: list[dict[str, Any]], case: str) -> None:
    mine = [row for row in table if row["case"] == case]
    assert [row["mode"] for row in mine] == ["stock", "audit", "enforce"]
    assert [row for row in mine if row["wrong"]] == []
