"""The basic test of a site: one function under stock gVisor, then under Kalium, each deployed, invoked and removed."""

from __future__ import annotations

import json

from experiments.cluster import ClusterView
from experiments.entries import ENTRIES, SUCCESS, Stack, sample_input
from experiments.errors import ExperimentError, RunRefused
from experiments.gateway import Gateway
from experiments.interruption import explaining
from experiments.loadgen import problem_with
from experiments.site import Site
from experiments.systems import KALIUM_ENFORCE, STOCK
from experiments.verdicts import VerdictLog

ANSWER_SECONDS_MAX = 30.0


def check(site: Site) -> str:
    """Deploy product-photos-4-success under each system and expect its answer; a line for each.

    It is the entry without database and image, so what fails here is the way from the gateway into the sandbox.
    """
    gateway, stack, cluster = Gateway.of(site), Stack(site), ClusterView.of(site)
    if SUCCESS in gateway.functions():
        raise ExperimentError("check.occupied", f"deploy {SUCCESS}", "the gateway already has it", "remove it with `fab clean`")
    entry = next(entry for entry in ENTRIES if entry.function == SUCCESS)
    lines = []
    for system in (STOCK, KALIUM_ENFORCE):
        log = VerdictLog(site)
        try:
            with explaining(site):
                seconds = gateway.deploy_all([stack.function(SUCCESS, system)])
                pod = cluster.placed([SUCCESS], system)[SUCCESS] if cluster else None
                answer = gateway.invoke(SUCCESS, sample_input(site, SUCCESS), call_id=f"check-{system.name}", seconds_max=ANSWER_SECONDS_MAX)
            problem = problem_with(answer.status, answer.body, json.loads(json.dumps(entry.expect)))
            verdicts = log.until(bool) if system.is_guarded else []
        finally:
            gateway.remove(SUCCESS)
            if cluster:
                cluster.wait_gone([SUCCESS])
        if problem:
            raise RunRefused(
                "check.answer", f"invoke {SUCCESS} under {system.name}", problem, "see the gateway's and the agent's log in /var/log/kalium"
            )
        if system.is_guarded and not any(verdict.app == system.app for verdict in verdicts):
            raise RunRefused(
                "check.unjudged", f"invoke {SUCCESS} under {system.name}", "it answered, but the agent logged no verdict of it",
                "the function runs without a judging guard: see the agent's log in /var/log/kalium",
            )  # fmt: skip
        judged = f", {len(verdicts)} verdict(s)" if system.is_guarded else ""
        where = f" on node {pod.node} with RuntimeClass {pod.runtime_class}" if pod else ""
        lines.append(f"ok  {system.name:<15} deployed in {seconds:.1f} s{where}, answered {answer.status}{judged}")
    return "\n".join(lines)
