"""E1: end-to-end latency of each benchmark entry under every system, in interleaved blocks of fresh deployments."""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from experiments import analysis, client, figures
from experiments.database import Resetter
from experiments.entries import ENTRIES, FUNCTIONS, Entry, Stack, sample_input
from experiments.errors import EXIT_USAGE, ExperimentError, RunRefused
from experiments.gateway import Gateway
from experiments.paths import PROFILES, RunPaths, utc_now
from experiments.provenance import opening_record
from experiments.samples import SampleFile
from experiments.site import Site, require_local_engine
from experiments.systems import E1_SYSTEMS, System
from experiments.verdicts import Verdict, VerdictLog


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
    """One run. `execute` leaves a sealed run with its summary and figure, or an incomplete one and an error that says why."""

    def __init__(self, parameters: E1Parameters, site: Site, *, results: Path | None = None) -> None:
        require_local_engine(site, "run E1")
        self.parameters = parameters
        self.site = site
        self.gateway = Gateway.of(site)
        self.stack = Stack(site)
        self.resetter = Resetter(site)
        self.inputs = {entry.name: sample_input(site, entry.function) for entry in ENTRIES}
        self.results = results or site.checkout / "results"
        self.begin = time.monotonic()
        self.judged: Counter[str] = Counter()
        self.deploy_s: dict[str, list[float]] = {system.name: [] for system in E1_SYSTEMS}

    def execute(self) -> FinishedRun:
        """Measure everything, seal the run and draw it. Raises RunRefused when one sample or verdict is not as it must be."""
        parameters = self.parameters
        present = self.gateway.functions()
        if any(name in present for name in FUNCTIONS):
            raise ExperimentError(
                "e1.occupied", f"deploy {', '.join(FUNCTIONS)}", f"the gateway already has {', '.join(present)}",
                "remove what an earlier task left behind with `fab clean`",
            )  # fmt: skip
        record = opening_record(
            self.site, experiment="e1", profile=parameters.profile, seed=parameters.seed, parameters=asdict(parameters),
            gateway=self.gateway.information(),
        )  # fmt: skip
        run = RunPaths.create("e1", results=self.results)
        run.write_record(record)
        order = random.Random(parameters.seed)  # noqa: S311 - the order of a run is to be repeatable, not secret
        try:
            with SampleFile(run.samples) as file:
                for block in range(parameters.blocks):
                    systems, entries = list(E1_SYSTEMS), list(ENTRIES)
                    order.shuffle(systems)
                    order.shuffle(entries)  # the same order for every system of the block, so that blocks stay paired
                    for system in systems:
                        file.write(system.name, block, self.measure(block, system, entries, run))
        except BaseException as error:
            run.write_record({**record, "end": utc_now(), "error": str(error) or type(error).__name__})
            print(f"the run stays incomplete in {run.folder}", flush=True)
            raise
        finally:
            self.gateway.remove_all(FUNCTIONS)
        self.resetter.reset()
        run.write_record({**record, "end": utc_now(), "complete": True, "judged_messages": dict(self.judged), "deploy_s": self.deploy_s})
        run.seal()
        analysis.derive(run)
        figures.draw(run)
        run.point_latest(self.site.site_sha256)
        return FinishedRun(run)

    def measure(self, block: int, system: System, entries: Sequence[Entry], run: RunPaths) -> list[client.Sample]:
        """One system in one block: reset, deploy, cold and warm requests of every entry, verdicts, removal."""
        log = VerdictLog(self.site)
        self.resetter.reset()
        seconds = self.gateway.deploy_all([self.stack.function(name, system) for name in FUNCTIONS])
        self.deploy_s[system.name].append(round(seconds, 3))
        samples = client.generate(self.site.client, self.plan(block, system, entries, run.stamp), seconds_max=self.parameters.request_seconds_max)
        verdicts = log.settled()
        self.refuse_if_wrong(block, system, samples, verdicts, run)
        self.gateway.remove_all(FUNCTIONS)
        if system.is_guarded:
            self.judged[system.name] += len(verdicts)
        print(
            f"[{time.monotonic() - self.begin:5.0f} s] block {block + 1}/{self.parameters.blocks} {system.name:<15} {len(samples)} requests,"
            f" deployed in {seconds:.1f} s{f', {len(verdicts)} verdicts, no denial' if system.is_guarded else ''}",
            flush=True,
        )
        return samples

    def plan(self, block: int, system: System, entries: Sequence[Entry], stamp: str) -> list[client.Series]:
        """The requests of one system in one block: through the gateway, then directly where the engine tells the address."""
        series = []
        for entry in entries:
            prefix = f"e1-{stamp}-{block}-{system.name}-{entry.name}"
            targets = [("gateway", f"{self.gateway.url}/function/{entry.function}{entry.path}", 1 + self.parameters.warm_requests)]
            address = self.gateway.instance_address(entry.function)
            if address is not None:
                targets.append(("direct", f"http://{address}{entry.path or '/'}", self.parameters.direct_requests))
            series += [
                client.Series(
                    entry=entry.name,
                    via=via,
                    url=url,
                    body=self.inputs[entry.name],
                    expect=entry.expect,
                    requests=requests,
                    first_is_cold=via == "gateway",
                    call_prefix=f"{prefix}-{via}",
                )
                for via, url, requests in targets
            ]
        return series

    def refuse_if_wrong(self, block: int, system: System, samples: Sequence[client.Sample], verdicts: Sequence[Verdict], run: RunPaths) -> None:
        """Refuse the run when an answer is wrong, when a message was denied, or when the guard that should judge did not."""
        denials = [verdict for verdict in verdicts if verdict.denied]
        if denials:
            run.denials.write_text("".join(json.dumps(verdict.record, sort_keys=True) + "\n" for verdict in denials), encoding="utf-8")
        attempted = f"measure {system.name} in block {block + 1}"
        what = f"verdict: {denials[0].sentence()}" if denials else "no message was denied; see the function's log with `podman logs`"
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
