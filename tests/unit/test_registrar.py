"""Which pods a registrar registers, and what it says to an agent for it: the core alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from registrar_world import PLACE, UID, pod, uids

from kalium.registrar.admission import Refusal, Registration, examine
from kalium.registrar.backoff import Backoff
from kalium.registrar.ledger import Ledger, Register, Step
from kalium.registrar.limits import PODS_MAX, REFUSED_RETRY_SECONDS

NOBODY: frozenset[str] = frozenset()


def spoken(steps: Iterable[Step]) -> list[tuple[str, str]]:
    """Steps in short: verb and the pod's number."""
    return [
        (
            "register" if isinstance(step, Register) else "unregister",
            (step.registration.container if isinstance(step, Register) else step.container)[-1],
        )
        for step in steps
    ]


def ledger_with(*pods: dict[str, Any]) -> Ledger:
    ledger = Ledger(PLACE)
    assert ledger.listed(pods) == []
    return ledger


def test_an_admitted_pod_is_registered_by_its_uid() -> None:
    assert examine(pod(7), PLACE) == Registration(UID.format(7), "shop", "pay", "docker.io/library/pay:1", "pay-7")


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("runtime_class", {"runtimeClassName": "gvisor"}),  # the same function without a guard
        ("runtime_class", {"runtimeClassName": None}),
        ("annotations", {"annotations": {"kalium.io/app": "shop"}}),
        ("annotations", {"annotations": {"kalium.io/function": "pay"}}),
        ("annotations", {"annotations": {}}),
        ("annotations", {"annotations": None}),
        ("annotations", {"annotations": {"kalium.io/app": "shop\n", "kalium.io/function": "pay"}}),
        ("annotations", {"annotations": {"kalium.io/app": "shop", "kalium.io/function": "Pay"}}),
        ("annotations", {"annotations": {"kalium.io/app": "shop", "kalium.io/function": 7}}),
        ("gvisor_annotations", {"annotations": {"kalium.io/app": "shop", "kalium.io/function": "pay", "dev.gvisor.flag.network": "host"}}),
        ("containers", {"containers": []}),
        ("containers", {"containers": [{"name": "pay", "image": "i"}, {"name": "proxy", "image": "i"}]}),
        ("containers", {"containers": ["pay"]}),
        ("containers", {"initContainers": [{"name": "init"}]}),
        ("containers", {"ephemeralContainers": [{"name": "pay"}]}),
        ("container_name", {"containers": [{"name": "ship", "image": "i"}]}),
        ("namespaces", {"hostNetwork": True}),
        ("namespaces", {"hostPID": True}),
        ("namespaces", {"hostIPC": True}),
        ("namespaces", {"shareProcessNamespace": True}),
        ("volumes", {"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}),
        ("volumes", {"volumes": [{"name": "s", "secret": {}}, {"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]}),
        ("volumes", {"volumes": [{"name": "v", "nfs": {"server": "s", "path": "/"}}]}),
        ("volumes", {"volumes": [{"name": "v", "csi": {"driver": "d"}}]}),
        ("volumes", {"volumes": ["v"]}),
        ("image", {"containers": [{"name": "pay"}]}),
        ("image", {"containers": [{"name": "pay", "image": "a b"}]}),
        ("image", {"containers": [{"name": "pay", "image": "x" * 513}]}),
        ("uid", {"uid": "0123456789abcdef0123456789abcdef"}),  # of a static pod, which the API server did not admit
        ("uid", {"uid": None}),
    ],
)
def test_a_pod_that_asks_for_a_guard_and_breaks_a_rule_is_refused(reason: str, changes: dict[str, Any]) -> None:
    judged = examine(pod(**changes), PLACE)

    assert isinstance(judged, Refusal)
    assert judged.reason == reason
    assert judged.detail


@pytest.mark.parametrize(
    "changes",
    [
        {"nodeName": "node2"},  # registered there, and nowhere else
        {"nodeName": None},  # not scheduled yet
        {"namespace": "default"},
        {"phase": "Succeeded"},
        {"phase": "Failed"},
        {"annotations": {"other": "x"}, "runtimeClassName": "gvisor"},  # the baseline of experiments
    ],
)
def test_a_pod_that_is_not_this_nodes_to_guard_is_left_alone(changes: dict[str, Any]) -> None:
    assert examine(pod(**changes), PLACE) is None


@pytest.mark.parametrize(
    "document", [{}, {"metadata": []}, {"spec": {"runtimeClassName": "kalium"}}, {"metadata": {"annotations": "x"}, "spec": "y"}]
)
def test_what_is_no_pod_is_no_pod_of_ours(document: dict[str, Any]) -> None:
    assert examine(document, PLACE) is None


def test_the_agent_is_told_what_it_lacks_and_what_is_gone() -> None:
    ledger = ledger_with(pod(1), pod(2))

    steps = ledger.due(frozenset(uids(2, 3)), now=0)

    assert spoken(steps) == [("unregister", "3"), ("register", "1")]
    assert ledger.due(frozenset(uids(1, 2)), now=0) == []


def test_an_agent_that_was_restarted_is_told_everything_again() -> None:
    ledger = ledger_with(pod(1), pod(2))
    ledger.taken(UID.format(1))
    ledger.taken(UID.format(2))

    assert spoken(ledger.due(NOBODY, now=0)) == [("register", "1"), ("register", "2")]


def test_before_the_first_list_nothing_is_said() -> None:
    """A registrar that starts must not unregister pods that it has not seen yet."""
    ledger = Ledger(PLACE)
    ledger.changed(pod(1), is_deleted=False)

    assert ledger.due(frozenset(uids(2)), now=0) == []


def test_a_pod_that_went_while_nobody_watched_is_unregistered_after_the_next_list() -> None:
    ledger = ledger_with(pod(1), pod(2))
    ledger.listed([pod(2)])

    assert spoken(ledger.due(frozenset(uids(1, 2)), now=0)) == [("unregister", "1")]


@pytest.mark.parametrize("gone", [(pod(1), True), (pod(1, phase="Failed"), False)])
def test_a_pod_that_ends_is_unregistered(gone: tuple[dict[str, Any], bool]) -> None:
    ledger = ledger_with(pod(1))
    ledger.changed(gone[0], is_deleted=gone[1])

    assert spoken(ledger.due(frozenset(uids(1)), now=0)) == [("unregister", "1")]


def test_a_pod_that_waits_for_its_end_keeps_its_guard() -> None:
    document = pod(1)
    document["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    ledger = ledger_with(document)

    assert spoken(ledger.due(NOBODY, now=0)) == [("register", "1")]


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("containers", {"ephemeralContainers": [{"name": "debugger"}]}),
        ("changed", {"annotations": {"kalium.io/app": "bank", "kalium.io/function": "pay"}}),
        ("changed", {"containers": [{"name": "pay", "image": "docker.io/library/evil:1"}]}),
        ("container_name", {"annotations": {"kalium.io/app": "shop", "kalium.io/function": "ship"}}),
        ("annotations", {"annotations": {}}),
    ],
)
def test_a_pod_that_is_changed_while_it_runs_loses_its_registration(reason: str, changes: dict[str, Any]) -> None:
    """Its sandbox keeps the identity that it began with; what runs there now may be something else."""
    ledger = ledger_with(pod(1))

    refusals = ledger.changed(pod(1, **changes), is_deleted=False)

    assert [refusal.reason for refusal in refusals] == [reason]
    assert spoken(ledger.due(frozenset(uids(1)), now=0)) == [("unregister", "1")]
    assert ledger.changed(pod(1, **changes), is_deleted=False) == [], "said once"
    assert [refusal.reason for refusal in ledger.listed([pod(1, **changes)])] == [], "also after a list"


def test_a_refused_pod_is_said_again_when_its_reason_changes_and_forgotten_with_it() -> None:
    ledger = Ledger(PLACE)

    assert [refusal.reason for refusal in ledger.listed([pod(1, hostPID=True)])] == ["namespaces"]
    assert ledger.listed([pod(1, hostPID=True)]) == []
    assert [refusal.reason for refusal in ledger.changed(pod(1, runtimeClassName="gvisor"), is_deleted=False)] == ["runtime_class"]
    assert ledger.counts == {"pods": 0, "refused": 1, "not_taken": 0}
    assert ledger.changed(pod(1), is_deleted=True) == []
    assert ledger.counts == {"pods": 0, "refused": 0, "not_taken": 0}


def test_what_the_agent_does_not_take_is_tried_again_later_and_said_once() -> None:
    ledger = ledger_with(pod(1))

    assert ledger.not_taken(UID.format(1), "unknown_app", now=10.0)
    assert ledger.due(NOBODY, now=10.0) == []
    assert ledger.wait(now=11.0, at_most=60.0) == REFUSED_RETRY_SECONDS - 1
    assert spoken(ledger.due(NOBODY, now=10.0 + REFUSED_RETRY_SECONDS)) == [("register", "1")]
    assert not ledger.not_taken(UID.format(1), "unknown_app", now=20.0), "no news"
    assert ledger.not_taken(UID.format(1), "unknown_function", now=30.0)
    ledger.taken(UID.format(1))
    assert ledger.wait(now=31.0, at_most=60.0) == 60.0


def test_the_retry_of_a_pod_goes_with_it() -> None:
    ledger = ledger_with(pod(1))
    ledger.not_taken(UID.format(1), "unknown_app", now=0)
    ledger.changed(pod(1), is_deleted=True)

    assert ledger.counts["not_taken"] == 0


def test_no_more_pods_are_kept_than_an_agent_takes() -> None:
    ledger = ledger_with(*(pod(number) for number in range(PODS_MAX + 5)))

    assert ledger.counts["pods"] == PODS_MAX
    assert len(ledger.due(NOBODY, now=0)) == PODS_MAX


def test_waits_double_up_to_their_bound_and_begin_again() -> None:
    backoff = Backoff(0.5, chance=lambda: 0.0)

    assert [backoff.wait() for _ in range(5)] == [0.1, 0.2, 0.4, 0.5, 0.5]
    backoff.reset()
    assert backoff.wait() == 0.1
    assert Backoff(0.5, chance=lambda: 1.0).wait() == 0.05
