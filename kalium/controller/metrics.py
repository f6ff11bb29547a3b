"""How Prometheus reads what the controller has counted: names, help and labels come into being when somebody scrapes.

Labels come from closed sets: reasons and questions from enumerations, apps and functions from loaded policies. Whatever is
in none of them is counted under OTHER.
"""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from kalium import __version__
from kalium.controller.counts import BATCH_SECONDS, Counts
from kalium.policy.automaton import Mode
from kalium.policy.message import Reason
from kalium.protocol.codec import ERROR_CODES
from kalium.protocol.frames import StatusReport
from kalium.protocol.session import CloseReason

PREFIX = "kalium_controller_"
OTHER = "other"
REASONS = tuple(reason.value for reason in Reason)
UNANSWERED = Reason.CONTROLLER_UNAVAILABLE.value  # from a controller it means that its store did not answer
EVICTIONS = ("timeout", "agent_gone", "unregistered")
REFUSALS = (
    "accept", "not_admitted", "tls", "lost", "no_role", "too_many_connections", "too_many_agents", "unsupported_protocol", "wrong_identity",
    "duplicate_agent", "too_many_handshakes",
)  # fmt: skip
CLOSES = tuple(dict.fromkeys([*ERROR_CODES, *(reason.value for reason in CloseReason)]))
MODES = tuple(mode.value for mode in Mode)


class Exporter(Collector):
    """Reads counts, and asks for what is there now, whenever somebody scrapes."""

    def __init__(
        self,
        counts: Counts,
        *,
        status: Callable[[], StatusReport],
        not_after: Callable[[], float],
        faults: Callable[[], Mapping[str, str]],
        audit_entries: Callable[[], int],
        waiting: Callable[[], int],
    ) -> None:
        """`status` is what STATUS is answered with; `not_after` the end of the certificate in force, seconds since 1970.

        `faults` is what /readyz looks at: by the name of a check, what is wrong, and "" when nothing is.
        """
        self._counts = counts
        self._status = status
        self._not_after = not_after
        self._faults = faults
        self._audit_entries = audit_entries
        self._waiting = waiting
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client asks for it."""
        counts = self._counts
        steps = CounterMetricFamily(PREFIX + "steps", "Answers to questions of agents.", labels=["question", "reason"])
        for question, answers in counts.steps.items():
            for reason, count in closed(answers, REASONS):
                steps.add_metric([question, reason], count)
        yield steps
        buckets = zip([*map(str, BATCH_SECONDS), "+Inf"], accumulate(counts.batches), strict=True)
        yield HistogramMetricFamily(
            PREFIX + "batch_seconds", "What one read of a connection took, its answers included; steps that wait for a store are not in it.",
            buckets=[(bound, float(count)) for bound, count in buckets], sum_value=counts.batch_ns / 1e9,
        )  # fmt: skip
        yield by_label("evictions", "Invocations that nobody ended.", "reason", counts.evicted, EVICTIONS)
        yield by_label("connections_refused", "Connections that did not come about.", "reason", counts.refused, REFUSALS)
        yield by_label("connections_closed", "Connections of agents that ended.", "reason", counts.closed, CLOSES)
        for name, documentation, value in (
            ("policies_refused", "Files of policies that were not taken.", counts.policies_refused),
            ("leases", "Leases granted to agents.", counts.leases),
            ("store_round_trips", "Steps that a shared store was asked about.", counts.store_round_trips),
            ("store_errors", "Steps that the store did not answer.", sum(answers[UNANSWERED] for answers in counts.steps.values())),
            ("audit_entries", "Entries of the audit log.", self._audit_entries()),
            ("audit_failures", "Times that the audit log could not be written.", counts.audit_failures),
        ):
            yield CounterMetricFamily(PREFIX + name, documentation, value=value)
        yield from self._now()

    def _now(self) -> Iterator[Metric]:
        """Gauges: what is there now."""
        report = self._status()
        for name, documentation, value in (
            ("agents", "Agents that are connected.", report.agents),
            ("calls", "Live calls.", report.calls),
            ("invocations", "Live invocations.", report.invocations),
            ("store_waiting", "Steps that wait for the shared store.", self._waiting()),
            ("start_time_seconds", "When this controller started, since 1970.", report.started_ms / 1000),
            ("certificate_not_after_seconds", "When the certificate in force ends, since 1970.", self._not_after()),
            ("controllers", "Controllers that share the store, this one included.", max(1, len(report.controllers))),
        ):
            yield GaugeMetricFamily(PREFIX + name, documentation, value=value)
        faults = GaugeMetricFamily(PREFIX + "fault", "Whether the check of /readyz fails.", labels=["check"])
        for check, found in self._faults().items():
            faults.add_metric([check], 1 if found else 0)
        yield faults
        versions = GaugeMetricFamily(PREFIX + "policy_version", "Version of each app's newest policy.", labels=["app"])
        for app, version in sorted(report.policies.items()):
            versions.add_metric([app], version)
        yield versions
        instances = GaugeMetricFamily(
            PREFIX + "instances", "Instances by the mode that the policy asks for and the one in force.", labels=["app", "function", "asked", "mode"]
        )
        for labels, count in sorted(instances_of(report).items()):
            instances.add_metric(list(labels), count)
        yield instances
        yield InfoMetricFamily(
            PREFIX + "build", "What runs.", value={"version": __version__, "python": platform.python_version(), "store": report.store}
        )


def instances_of(report: StatusReport) -> Mapping[tuple[str, str, str, str], int]:
    """How many instances there are by (app, function, asked, mode). What no policy names is OTHER: an agent could say anything."""
    table: defaultdict[tuple[str, str, str, str], int] = defaultdict(int)
    for app, function, asked, mode, count in zip(report.app, report.function, report.asked, report.mode, report.count, strict=True):
        is_known = app in report.policies and asked != ""
        table[app if is_known else OTHER, function if is_known else OTHER, asked or OTHER, mode if mode in MODES else "none"] += count
    return table


def closed(counts: Mapping[str, int], labels: Iterable[str]) -> Iterator[tuple[str, int]]:
    """`counts` for each of `labels`, with 0 where nothing was counted, and the sum of the rest as OTHER."""
    known = tuple(labels)
    yield from ((label, counts.get(label, 0)) for label in known)
    yield OTHER, sum(count for label, count in counts.items() if label not in known)


def by_label(name: str, documentation: str, label: str, counts: Mapping[str, int], values: Iterable[str]) -> Metric:
    """A counter with one label."""
    metric = CounterMetricFamily(PREFIX + name, documentation, labels=[label])
    for value, count in closed(counts, values):
        metric.add_metric([value], count)
    return metric
