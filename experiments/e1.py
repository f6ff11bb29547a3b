"""E1: end-to-end latency of each benchmark entry under every system, in interleaved blocks of fresh deployments."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments import analysis, client, figures, interruption, progress
from experiments.cluster import ClusterView, Pod
from experiments.database import Resetter
from experiments.entries import ENTRIES, FUNCTIONS, Entry, Stack, sample_input
from experiments.errors import EXIT_USAGE, ExperimentError, RunRefused
from experiments.gateway import Gateway
from experiments.paths import PROFILES, RunPaths, utc_now
from experiments.progress import Progress
from experiments.provenance import opening_record
from experiments.samples import HEADER, SampleFile
from experiments.site import Host, Site
from experiments.systems import E1_SYSTEMS, System
from experiments.verdicts import Verdict, VerdictLog

DIRECT_FROM_CONTROL = "addresses of pods are reached from hosts of the cluster alone: direct requests come from this one, others from the client"


@dataclass(frozen=True)
class E1Parameters:
    """What a run of E1 does. Counts are requests or blocks; times are in seconds."""

    profile: str = "quick"
    blocks: int = 3  # fresh deployments of all systems, in random order
    warm_requests: int = 12  # per entry, system and block, after the one cold request
    direct_requests: int = 3  # of the same entry straight to its instance, past the gateway
    seed: int = 2023
    request_seconds_max: float = 30.0

    @classmethod
    def of_profile(cls, profile: str) -> E1Parameters:
        """`quick` fits the two-command reproduction; `full` has as many samples as intervals worth citing need."""
        if profile == "quick":
            return cls()
        if profile == "full":
            return cls(profile="full", blocks=10, warm_requests=20, direct_requests=5)
        raise ExperimentError(
            "e1.profile",
            f"use profile {profile!r}",
            f"the profiles are {', '.join(PROFILES)}",
            "name one of them with --profile",
            exit_code=EXIT_USAGE,
        )


@dataclass(frozen=True)
class FinishedRun:
    """A sealed run of E1."""

    paths: RunPaths

    def summary_text(self) -> str:
        """The table for the screen, and where the files are."""
        return f"{analysis.table(self.paths)}\nsummary, aggregate and figures: {self.paths.folder}"


class E1:
    """One run. `execute` leaves a sealed run with its summary and figure, an interrupted one to go on with, or a refused one; an error says why."""

    def __init__(self, parameters: E1Parameters, site: Site, *, results: Path | None = None) -> None:
        self.parameters = parameters
        self.site = site
        self.gateway = Gateway.of(site)
        self.cluster = ClusterView.of(site)
        self.stack = Stack(site)
        self.resetter = Resetter(site)
        self.inputs = {entry.name: sample_input(site, entry.function) for entry in ENTRIES}
        self.results = results or site.checkout / "results"
        self.begin = time.monotonic()
        self.judged: Counter[str] = Counter()
        self.deploy_s: dict[str, list[float]] = {system.name: [] for system in E1_SYSTEMS}

    @classmethod
    def resumed(cls, stamp: str, site: Site, *, results: Path | None = None) -> FinishedRun:
        """Go on with the interrupted run of that stamp: the blocks that are missing, by its own parameters, seed and order."""
        where = results or site.checkout / "results"
        run, before = progress.find("e1", stamp, results=where)
        e1 = cls(E1Parameters(**before["parameters"]), site, results=where)
        with progress.alone(run):
            record = e1.opening_record()
            state = progress.resume(run, before, record)
            e1.judged.update(state.kept.get("judged_messages", {}))
            e1.deploy_s |= state.kept.get("deploy_s", {})
            print(f"run e1/{run.stamp} goes on with block {state.blocks + 1}/{e1.parameters.blocks}", flush=True)
            # What the interruption left behind was deployed by this run.
            e1.remove()
            return e1.measure_all(run, {**record, "start": before["start"], "interruptions": state.interruptions}, state)

    def opening_record(self) -> dict[str, Any]:
        """run.json of a run that begins now."""
        record = opening_record(
            self.site, experiment="e1", profile=self.parameters.profile, seed=self.parameters.seed, parameters=asdict(self.parameters),
            gateway=self.gateway.information(),
        )  # fmt: skip
        return record if self.cluster is None else {**record, "direct": {"from": self.site.control.name, "why": DIRECT_FROM_CONTROL}}

    def execute(self) -> FinishedRun:
        """Measure everything, seal the run and draw it. Raises RunRefused when one sample or verdict is not as it must be."""
        present = self.gateway.functions()
        if any(name in present for name in FUNCTIONS):
            raise ExperimentError(
                "e1.occupied", f"deploy {', '.join(FUNCTIONS)}", f"the gateway already has {', '.join(present)}",
                "remove what an earlier task left behind with `fab clean`",
            )  # fmt: skip
        record = self.opening_record()
        run = RunPaths.create("e1", results=self.results)
        with progress.alone(run):
            run.write_record(record)
            return self.measure_all(run, record, progress.begin(run, HEADER))

    def measure_all(self, run: RunPaths, record: Mapping[str, Any], state: Progress) -> FinishedRun:
        """Every block that `state` does not have yet, then the seal."""
        order = random.Random(self.parameters.seed)  # noqa: S311 - the order of a run is to be repeatable, not secret
        with interruption.told(run, record, state, self.site, leave=self.remove):
            for block in range(self.parameters.blocks):
                systems, entries = list(E1_SYSTEMS), list(ENTRIES)
                order.shuffle(systems)
                order.shuffle(entries)  # the same order for every system of the block, so that blocks stay paired
                if block < state.blocks:
                    continue
                with SampleFile(run.block) as file:
                    for system in systems:
                        self.measure(block, system, entries, run, file)
                state.take_block(run, {"judged_messages": dict(self.judged), "deploy_s": self.deploy_s})
            self.resetter.reset()
            run.write_record({**record, "end": utc_now(), "complete": True, **state.kept})
            run.seal()
        state.end(run)
        analysis.derive(run)
        figures.draw(run)
        run.point_latest(self.site.site_sha256)
        return FinishedRun(run)

    def remove(self) -> None:
        """No function of the benchmark is left, and on a cluster no pod of one."""
        self.gateway.remove_all(FUNCTIONS)
        if self.cluster is not None:
            self.cluster.wait_gone(FUNCTIONS)

    def measure(self, block: int, system: System, entries: Sequence[Entry], run: RunPaths, file: SampleFile) -> None:
        """One system in one block: reset, deploy, cold and warm requests of every entry, verdicts, removal."""
        log = VerdictLog(self.site)
        self.resetter.reset()
        seconds = self.gateway.deploy_all([self.stack.function(name, system) for name in FUNCTIONS])
        placed = self.cluster.placed(FUNCTIONS, system) if self.cluster else {}
        samples = []
        for host, series in self.plan(block, system, entries, run.stamp, placed):
            taken = client.generate(host, series, seconds_max=self.parameters.request_seconds_max)
            file.write(system.name, block, taken)
            samples += taken
            if taken[-1].problem:
                break
        verdicts = log.settled()
        self.refuse_if_wrong(block, system, samples, verdicts, run)
        self.remove()
        self.deploy_s[system.name].append(round(seconds, 3))
        if system.is_guarded:
            self.judged[system.name] += len(verdicts)
        print(
            f"[{time.monotonic() - self.begin:5.0f} s] block {block + 1}/{self.parameters.blocks} {system.name:<15} {len(samples)} requests,"
            f" deployed in {seconds:.1f} s{f', {len(verdicts)} verdicts, no denial' if system.is_guarded else ''}",
            flush=True,
        )

    def plan(
        self, block: int, system: System, entries: Sequence[Entry], stamp: str, placed: Mapping[str, Pod]
    ) -> list[tuple[Host, list[client.Series]]]:
        """The requests of one system in one block, by the host that sends them, in order.

        Through the gateway they come from the client host. Straight to the instance they come from there too where the engine tells an
        address that it reaches; addresses of pods are reached from the cluster's own hosts alone, so there the control plane's host sends.
        """
        through, direct, mixed = [], [], []
        for entry in entries:
            prefix = f"e1-{stamp}-{block}-{system.name}-{entry.name}"

            def series(via: str, url: str, requests: int, entry: Entry = entry, prefix: str = prefix) -> client.Series:
                return client.Series(
                    entry=entry.name, via=via, url=url, body=self.inputs[entry.name], expect=entry.expect, requests=requests,
                    first_is_cold=via == "gateway", call_prefix=f"{prefix}-{via}",
                )  # fmt: skip

            through.append(series("gateway", f"{self.gateway.url}/function/{entry.function}{entry.path}", 1 + self.parameters.warm_requests))
            mixed.append(through[-1])
            if self.site.cluster is not None:
                address: str | None = f"{placed[entry.function].address}:{self.site.cluster.function_port}"
            else:
                address = self.gateway.instance_address(entry.function)
            if address is not None:
                direct.append(series("direct", f"http://{address}{entry.path or '/'}", self.parameters.direct_requests))
                mixed.append(direct[-1])
        return [(self.site.client, mixed)] if self.site.cluster is None else [(self.site.client, through), (self.site.control, direct)]

    def refuse_if_wrong(self, block: int, system: System, samples: Sequence[client.Sample], verdicts: Sequence[Verdict], run: RunPaths) -> None:
        """Refuse the run when an answer is wrong, when a message was denied, or when the guard that should judge did not."""
        denials = [verdict for verdict in verdicts if verdict.denied]
        if denials:
            run.denials.write_text("".join(json.dumps(verdict.record, sort_keys=True) + "\n" for verdict in denials), encoding="utf-8")
        attempted = f"measure {system.name} in block {block + 1}"
        what = f"verdict: {denials[0].sentence()}" if denials else "no message was denied; see the function's log"
        wrong = next((sample for sample in samples if sample.problem), None)
        if wrong is not None:
            raise RunRefused(
                "e1.wrong_answer", attempted, f"request {wrong.seq} of {wrong.entry} via {wrong.via} ({wrong.call_id}): {wrong.problem}; {what}",
                "the whole run is refused; find the cause, then run `fab run-e1` again",
            )  # fmt: skip
        if denials:
            raise RunRefused(
                "e1.denial", attempted, f"{len(denials)} messages of the benchmark were denied, the first: {denials[0].sentence()}",
                "the policy and the functions disagree: `kalium policy lint policies/hello-retail.yml`, then run `fab run-e1` again",
            )  # fmt: skip
        if system.is_guarded and sum(verdict.app == system.app and verdict.mode == system.mode for verdict in verdicts) < len(samples):
            raise RunRefused(
                "e1.unjudged", attempted, f"{len(samples)} requests were answered, but the agent logged {len(verdicts)} verdicts of {system.app}",
                "the functions ran without a judging guard: see the agent's log, then run `fab run-e1` again",
            )  # fmt: skip
