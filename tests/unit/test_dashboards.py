"""The dashboard and the alerts use what controllers and agents export, with labels and values that there are, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from kalium.controller.counts import Counts
from kalium.controller.metrics import Exporter
from kalium.protocol.frames import StatusReport

ROOT = Path(__file__).resolve().parents[2]
ALERTS = ROOT / "dashboards" / "alerts.yml"
DASHBOARD = ROOT / "dashboards" / "kalium.json"
AGENT = ROOT / "tests" / "vectors" / "metrics" / "agent.prom"  # held by TestTheVectorIsWhatTheAgentExports
OPERATE = ROOT / "docs" / "howto" / "operate.md"
METRICS_PAGE = ROOT / "docs" / "reference" / "metrics.md"
CHECKS = {"policies": "", "store": "", "audit": "", "certificate": "", "draining": ""}
# Of Prometheus itself: whether a target answered, by the names of the jobs that operate.md configures.
SCRAPED = {"up": {"job": {"kalium-controller", "kalium-agent"}, "instance": set[str]()}}
OPEN_LABELS = {"app", "function", "instance", "le", "job"}  # whose values are not ours to list
REPORT = StatusReport(
    {"shop": 7}, agents=1, calls=1, invocations=1, controller="c1", controllers=("c1",), store="memory", started_ms=1, node=("n1",), app=("shop",),
    function=("buy",), asked=("enforce",), mode=("enforce",), version=(7,), count=(1,),
)  # fmt: skip

Labels = dict[str, set[str]]


def controller_text() -> str:
    return (
        Exporter(Counts(), status=lambda: REPORT, not_after=lambda: 1.0, faults=lambda: CHECKS, audit_entries=lambda: 0, waiting=lambda: 0)
        .text()
        .decode()
    )


def labels_of(text: str) -> dict[str, Labels]:
    """Each sample's name, its labels, and their values."""
    found: dict[str, Labels] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = found.setdefault(sample.name, defaultdict(set))
            for label, value in sample.labels.items():
                labels[label].add(value)
    return found


def exported() -> dict[str, Labels]:
    found = {**labels_of(controller_text()), **labels_of(AGENT.read_text(encoding="utf-8"))}
    for labels in found.values():
        labels.setdefault("instance", set())  # Prometheus adds both
        labels.setdefault("job", {"kalium-controller", "kalium-agent"})
    return {**found, **SCRAPED}


def alerts() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """(where, PromQL) of everything that is asked of Prometheus."""
    yield from ((rule["alert"], rule["expr"]) for rule in alerts())
    yield from ((panel["title"], target["expr"]) for panel in panels() for target in panel["targets"])


SELECTOR = re.compile(r"(?<![\w$])((?:kalium_|process_)\w+|up(?=\{))(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
BY_NAME = re.compile(r'\{__name__=~"([^"]+)"\}')
GROUPED = re.compile(r"\bby \(([^)]*)\)")


@pytest.mark.parametrize(("where", "expression"), list(expressions()), ids=lambda value: value if " " not in value else None)
def test_what_is_asked_is_exported(where: str, expression: str) -> None:
    """Every metric, every label that it is selected or grouped by, and every value of a label with a closed set."""
    there = exported()
    used = SELECTOR.findall(BY_NAME.sub("", expression)) + [
        (name, "") for pattern in BY_NAME.findall(expression) for name in there if re.fullmatch(pattern, name)
    ]
    assert used, f"{where} asks for nothing of ours"

    for name, matchers in used:
        assert name in there, f"{where}: nobody exports {name}"
        for label, operator, text in MATCHER.findall(matchers):
            assert label in there[name], f"{where}: {name} has no label {label}"
            if label not in OPEN_LABELS:
                values = text.split("|") if operator in ("=~", "!~") else [text]
                assert set(values) <= there[name][label], f"{where}: {label} of {name} is never {set(values) - there[name][label]}"
    grouped = {label.strip() for group in GROUPED.findall(expression) for label in group.split(",")}
    known = {label for name, _ in used for label in there[name]}
    assert grouped <= known, f"{where}: nothing has the label {grouped - known}"


def test_what_an_alert_says_of_a_label_survives_its_expression() -> None:
    for rule in alerts():
        grouped = {label.strip() for group in GROUPED.findall(rule["expr"]) for label in group.split(",")} - {"le"}
        whole = {label for name, _ in SELECTOR.findall(rule["expr"]) for label in exported()[name]}
        said = set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"])))

        assert said <= (grouped or whole), rule["alert"]


def test_the_page_lists_every_metric_with_its_labels_and_no_other() -> None:
    rows = re.findall(r"^\| `(kalium_\w+)` \| (\w+) \| ([^|]*) \|", METRICS_PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    said = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}

    there = {}
    for text in (controller_text(), AGENT.read_text(encoding="utf-8")):
        for family in text_string_to_metric_families(text):
            if family.name.startswith("kalium_"):
                name = family.name + ("_total" if family.type == "counter" else "")
                labels = {label for sample in family.samples for label in sample.labels} - {"le"}
                there[name] = (family.type, labels)
    assert said == there


def test_an_agents_text_is_what_prometheus_reads() -> None:
    """The agent writes the format by hand."""
    families = {family.name: family for family in text_string_to_metric_families(AGENT.read_text(encoding="utf-8"))}

    assert {family.type for family in families.values()} == {"counter", "gauge", "histogram"}
    assert all(family.documentation and family.samples for family in families.values())
    buckets = [sample for sample in families["kalium_agent_question_seconds"].samples if sample.labels.get("question") == "invoke"]
    counts = [sample.value for sample in buckets if sample.name.endswith("_bucket")]
    assert counts == sorted(counts)
    assert counts[-1] == next(sample.value for sample in buckets if sample.name.endswith("_count")) == 2


def test_every_alert_has_a_heading_that_says_what_to_do() -> None:
    headings = re.findall(r"^### (Kalium\w+)$", OPERATE.read_text(encoding="utf-8"), re.MULTILINE)

    assert headings == [rule["alert"] for rule in alerts()]
    assert all(rule["labels"]["severity"] in ("critical", "warning", "info") for rule in alerts())


@pytest.mark.parametrize(
    "what",
    [
        "denials", "fail modes", "no controller", "audit", "certificate", "agents missing", "not effective", "duplicate", "suppressed",
    ],
)  # fmt: skip
def test_what_a_person_has_to_hear_of_has_an_alert(what: str) -> None:
    needed = {
        "denials": 'kalium_agent_verdicts_total{mode="enforce", reason!~"', "fail modes": "kalium_agent_fail_mode_verdicts_total",
        "no controller": "kalium_agent_controller_connected == 0", "audit": 'kalium_controller_fault{check="audit"}',
        "certificate": "kalium_agent_certificate_not_after_seconds - time()", "agents missing": "sum(kalium_controller_agents) <",
        "not effective": 'kalium_controller_instances{asked="enforce", mode!="enforce"}', "duplicate": 'reason="duplicate_agent"',
        "suppressed": "kalium_agent_suppressed_denials_total",
    }  # fmt: skip

    assert any(needed[what] in rule["expr"] for rule in alerts())


def test_panels_have_places_of_their_own() -> None:
    """And ids: Grafana drops the second of two."""
    everything = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    cells = [
        (x, y)
        for panel in everything
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]

    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in everything}) == len(everything)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: the package prometheus)")
@pytest.mark.parametrize(
    "command", [["check", "rules", str(ALERTS)], ["test", "rules", str(ALERTS.with_name("alerts_test.yml"))]], ids=["check", "test"]
)
def test_prometheus_takes_the_rules_and_they_fire_when_they_should(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False, timeout=60)

    assert done.returncode == 0, done.stdout + done.stderr
