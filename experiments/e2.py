"""E2: what the parts of judging one message take, measured inside the guard, by the system call that sent the message."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from experiments import e2_analysis, e2_figure, interruption
from experiments.cluster import ClusterView
from experiments.e2_samples import Cell, E2SampleFile
from experiments.entries import E2_CALLEE, E2_FUNCTIONS, E2_LOAD, E2_LOAD_OFF, Stack
from experiments.errors import EXIT_USAGE, ExperimentError, RunRefused
from experiments.gateway import Gateway
from experiments.paths import PROFILES, RunPaths, utc_now
from experiments.provenance import opening_record
from experiments.site import Site
from experiments.systems import E2_ENFORCE, E2_OFF
from experiments.timings import Timing, TimingLog
from experiments.verdicts import Verdict, VerdictLog

KIB = 1024
CALLEE_URL = f"http://gateway:8080/function/{E2_CALLEE}"
SAMPLES_SECONDS_MAX = 5.0  # from an invocation's answer to its last sample; guards tell theirs every 20 ms
AGAIN = "the whole run is refused; find the cause, then run `fab run-e2` again"
QUICK_CELLS = (
    Cell("https-get", "write", KIB), Cell("https-get", "sendto", KIB), Cell("https-get", "sendmsg", KIB),
    Cell("invoke", "write", KIB), Cell("invoke", "sendmsg", KIB), Cell("https-get-off", "write", KIB),
)  # fmt: skip
FULL_CELLS = (
    *QUICK_CELLS, Cell("invoke", "sendto", KIB), Cell("https-get-fresh", "write", KIB),
    *(Cell(workload, call, 8 * KIB) for workload in ("https-get", "invoke") for call in ("write", "sendto", "sendmsg")),
)  # fmt: skip


@dataclass(frozen=True)
class E2Parameters:
    """What a run of E2 does. Counts are messages or blocks; times are in seconds."""

    profile: str = "quick"
    cells: Sequence[Cell] = QUICK_CELLS
    blocks: int = 2  # fresh deployments
    messages: int = 500  # of each cell in each block
    batch: int = 250  # of one invocation; the policy allows 256
    seed: int = 2023
    invocation_seconds_max: float = 60.0

    def __post_init__(self) -> None:
        assert self.messages % self.batch == 0, "a block is whole invocations"

    @classmethod
    def of_profile(cls, profile: str) -> E2Parameters:
        """Both have at least 1,000 messages in each cell; `full` has more blocks, sizes and cells."""
        if profile == "quick":
            return cls()
        if profile == "full":
            return cls(profile="full", cells=FULL_CELLS, blocks=5)
        raise ExperimentError(
            "e2.profile", f"use profile {profile!r}", f"the profiles are {', '.join(PROFILES)}", "name one of them with --profile",
            exit_code=EXIT_USAGE,
        )  # fmt: skip


@dataclass(frozen=True)
class FinishedE2:
    """A sealed run of E2."""

    paths: RunPaths

    def summary_text(self) -> str:
        """The table for the screen, and where the files are."""
        return f"{e2_analysis.table(self.paths)}\nsummary, phases and figures: {self.paths.folder}"


@dataclass
class _Seen:
    """What the run keeps beside its samples."""

    latencies_us: dict[str, list[int]] = field(default_factory=dict)
    tls: set[str] = field(default_factory=set)

    def record(self) -> dict[str, Any]:
        """The fields of run.json."""
        return {
            "tls_versions": sorted(self.tls),
            "verdict_latency_us": {kind: e2_analysis.latency(values) for kind, values in sorted(self.latencies_us.items())},
        }


class E2:
    """One run. `execute` leaves a sealed run with its summary and figure, or an incomplete one and an error that says why."""

    def __init__(self, parameters: E2Parameters, site: Site, *, results: Path | None = None) -> None:
        self.parameters = parameters
        self.site = site
        self.gateway = Gateway.of(site)
        self.cluster = ClusterView.of(site)
        stack = Stack(site)
        self.functions = [
            stack.function(E2_LOAD, E2_ENFORCE),
            stack.function(E2_LOAD_OFF, E2_OFF, image_key=E2_LOAD),
            stack.function(E2_CALLEE, E2_ENFORCE),
        ]
        self.results = results or site.checkout / "results"
        self.begin = time.monotonic()
        self.seen = _Seen()

    def execute(self) -> FinishedE2:
        """Measure everything, seal the run and draw it. Raises RunRefused when one answer, verdict or sample is not as it must be."""
        parameters = self.parameters
        present = [name for name in E2_FUNCTIONS if name in self.gateway.functions()]
        if present:
            raise ExperimentError(
                "e2.occupied", f"deploy {', '.join(E2_FUNCTIONS)}", f"the gateway already has {', '.join(present)}",
                "remove what an earlier task left behind with `fab clean`",
            )  # fmt: skip
        record = opening_record(
            self.site, experiment="e2", profile=parameters.profile, seed=parameters.seed, parameters=asdict(parameters),
            gateway=self.gateway.information(),
        )  # fmt: skip
        run = RunPaths.create("e2", results=self.results)
        run.write_record(record)
        order = random.Random(parameters.seed)  # noqa: S311 - the order of a run is to be repeatable, not secret
        with interruption.told(run, record, None, self.site, leave=self.remove), E2SampleFile(run.samples) as file:
            for block in range(parameters.blocks):
                self.block(block, order, file, run)
        run.write_record({**record, **self.seen.record(), "end": utc_now(), "complete": True})
        run.seal()
        e2_analysis.derive(run)
        e2_figure.draw(run)
        run.point_latest(self.site.site_sha256)
        return FinishedE2(run)

    def remove(self) -> None:
        """No function of E2 is left, and on a cluster no pod of one."""
        self.gateway.remove_all(E2_FUNCTIONS)
        if self.cluster is not None:
            self.cluster.wait_gone(E2_FUNCTIONS)

    def block(self, block: int, order: random.Random, file: E2SampleFile, run: RunPaths) -> None:
        """A fresh deployment, and in random order every invocation of every cell."""
        parameters = self.parameters
        verdicts = VerdictLog(self.site)
        seconds = self.gateway.deploy_all(self.functions)
        if self.cluster is not None:
            self.cluster.placed(E2_FUNCTIONS, E2_ENFORCE)
        log = TimingLog(self.site)
        batches = [cell for cell in parameters.cells for _ in range(parameters.messages // parameters.batch)]
        order.shuffle(batches)
        sent: dict[Cell, int] = {}
        for cell in batches:
            timings = self.invoke(cell, log)
            file.write(cell, block, sent.get(cell, 0), timings)
            sent[cell] = sent.get(cell, 0) + len(timings)
        self.take(verdicts.settled(), sent, run)
        self.remove()
        print(
            f"[{time.monotonic() - self.begin:5.0f} s] block {block + 1}/{parameters.blocks} {sum(sent.values())} messages in {len(batches)}"
            f" invocations, deployed in {seconds:.1f} s, no denial, no sample lost",
            flush=True,
        )

    def invoke(self, cell: Cell, log: TimingLog) -> list[Timing]:
        """One invocation of the load, and the samples of its messages, all of them. Raises RunRefused otherwise."""
        count = self.parameters.batch
        attempted = f"send {count} messages of {cell}"
        body = {
            "workload": "invoke" if cell.workload == "invoke" else "https-get", "call": cell.call, "count": count, "bytes": cell.size,
            "url": CALLEE_URL if cell.workload == "invoke" else self.site.images_url, "fresh": cell.is_fresh,
        }  # fmt: skip
        answer = self.gateway.invoke(cell.function, body, seconds_max=self.parameters.invocation_seconds_max)
        problem = self.problem_with(cell, answer.status, answer.body)
        if problem:
            raise RunRefused("e2.wrong_answer", attempted, problem, f"see `kalium policy explain --app e2 --denied --last 1`; {AGAIN}")

        def of_cell(timings: Sequence[Timing]) -> Iterator[Timing]:
            return (timing for timing in timings if cell.holds(timing))

        gathered = log.until(lambda timings: sum(1 for _ in of_cell(timings)) >= count, seconds_max=SAMPLES_SECONDS_MAX)
        samples = list(of_cell(gathered))
        invocations = {timing.invocation for timing in samples}
        if len(samples) != count or len(invocations) != 1:
            raise RunRefused(
                "e2.samples", attempted, f"{len(samples)} samples of {len(invocations)} invocation(s) arrived in {self.site.timings}",
                f"see the agent's log for `timings.failed`, and that the guard opens TLS; {AGAIN}",
            )  # fmt: skip
        return samples

    def problem_with(self, cell: Cell, status: int, body: bytes) -> str:
        """Why this answer must not be counted; empty when it is what the load answers."""
        count = self.parameters.batch
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if status != 200 or not isinstance(answer, dict):
            return f"status {status}: {body[:300]!r}"
        self.seen.tls |= {answer["tls"]} if answer.get("tls") else set()
        if answer.get("sent") != count or (answer.get("connections") == count) < cell.is_fresh or not answer.get("answer_bytes"):
            return f"the load answered {answer}"
        return ""

    def take(self, verdicts: Sequence[Verdict], sent: Mapping[Cell, int], run: RunPaths) -> None:
        """Refuse the run when a message was denied or not judged; keep the latencies of the verdicts."""
        denials = [verdict for verdict in verdicts if verdict.denied]
        if denials:
            run.denials.write_text("".join(json.dumps(verdict.record, sort_keys=True) + "\n" for verdict in denials), encoding="utf-8")
            raise RunRefused("e2.denial", "judge the load of E2", f"{len(denials)} denials, the first: {denials[0].sentence()}", AGAIN)
        for kind in ("https", "invoke"):
            planned = sum(count for cell, count in sent.items() if cell.kind == kind)
            judged = sum(verdict.function == E2_LOAD and verdict.kind == kind and verdict.mode == "enforce" for verdict in verdicts)
            if judged < planned:
                raise RunRefused(
                    "e2.unjudged", f"judge {planned} messages of kind {kind}", f"the agent logged {judged} verdicts of them in mode enforce", AGAIN
                )
        for verdict in verdicts:
            if verdict.app == E2_ENFORCE.app:
                self.seen.latencies_us.setdefault(verdict.kind, []).append(verdict.latency_us)
