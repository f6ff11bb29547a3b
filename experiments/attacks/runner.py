"""Runs every case under stock gVisor and under Kalium, asks the receivers, and says what was blocked."""

from __future__ import annotations

import csv
import json
import secrets
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import database
from experiments.attacks import capture as wire
from experiments.attacks import (
    collude,
    exfiltrate_row,
    invoke_early,
    invoke_invent,
    invoke_skip,
    invoke_twice,
    repeat_write,
    token_replay,
    wrong_moment,
)
from experiments.attacks.case import HOLES, MARKER_BYTES, RECEIVER_PORT, Case, Received
from experiments.attacks.scene import Scene
from experiments.database import Resetter
from experiments.entries import ENTRIES, MASTER, MASTER_PATH, MICROBENCH, RECEIVE, REPORT, SUCCESS, Stack, sample_input
from experiments.errors import ExperimentError, RunRefused
from experiments.gateway import Function, Gateway
from experiments.interruption import told
from experiments.loadgen import problem_with
from experiments.paths import RunPaths, utc_now
from experiments.provenance import opening_record
from experiments.site import Site
from experiments.systems import KALIUM_STRICT, STOCK, System
from experiments.tails import LogTail
from experiments.verdicts import Verdict, VerdictLog

CASES: Sequence[Case] = (
    exfiltrate_row.CASE, wrong_moment.CASE, repeat_write.CASE, invoke_twice.CASE, invoke_early.CASE, invoke_skip.CASE, invoke_invent.CASE,
    collude.CASE, token_replay.CASE,
)  # fmt: skip
FUNCTIONS = (MASTER, RECEIVE, SUCCESS, REPORT, MICROBENCH)
# Exploited on one node, while all that they attack is on another: their accomplice (success) too.
ATTACKERS = (MASTER, RECEIVE)
SYSTEMS = (STOCK, KALIUM_STRICT)
FUNCTION_PORT = 8080  # of the gateway inside, and of every instance
POLL_SECONDS = 0.1
SUMMARY_COLUMNS = ("case", "class", "system", "expected", "verdict", "marker", "stock_delivered", "received_bytes", "evidence")
AGGREGATE_COLUMNS = ("name", "value", "unit")
CASE_COLUMNS = ("case", "system", "claim", "outcome", "receiver_bytes", "receiver", "wire_bytes", "wire", "denial", "policy_line", "answer", "benign")


@dataclass(frozen=True)
class AttackParameters:
    """What a run of the suite does; times are in seconds."""

    request_seconds_max: float = 70.0  # more than the 60 s after which the policy ends an invocation
    evidence_seconds: float = 1.5  # how long a receiver is asked again before "nothing arrived" is written down


@dataclass(frozen=True)
class Observation:
    """One case under one system, as it was when it had run; all of it is in observations.json."""

    case: str
    system: str
    marker: str
    status: int
    answer: str
    receiver_bytes: int
    receiver: str
    denial: Mapping[str, Any] | None
    other_denials: int
    benign_problem: str


class Logs:
    """Evidence from the receivers' own logs, from the moment this is made."""

    def __init__(self, site: Site, run: RunPaths) -> None:
        self._site = site
        self._receiver = LogTail(run.receiver_log)
        self._images = LogTail(site.imageserver_log, site.members("images")[0])
        self._lines: dict[str, list[dict[str, Any]]] = {"receiver": [], "images": []}

    def _read(self, name: str, tail: LogTail) -> list[dict[str, Any]]:
        self._lines[name] += [json.loads(line) for line in tail.new_lines()]
        return self._lines[name]

    def receiver(self, marker: str) -> Received:
        """Bytes of the connections that brought the marker to the attacker's server."""
        marked = [line for line in self._read("receiver", self._receiver) if marker in line["data"]]
        return Received(sum(int(line["bytes"]) for line in marked), "the attacker's server's log")

    def imageserver(self, marker: str) -> Received:
        """Bytes of the paths with the marker that the image server read after its decryption."""
        marked = [line for line in self._read("images", self._images) if marker in str(line.get("path", ""))]
        return Received(sum(len(str(line["path"])) for line in marked), "the image server's access log")

    def database(self, marker: str) -> Received:
        """Bytes of the rows with the marker that the database holds."""
        return Received(database.stored_bytes_with(self._site, marker), "rows of storedPhotosTable")


@dataclass(frozen=True)
class FinishedRun:
    """A sealed run of the suite."""

    paths: RunPaths

    def text(self) -> str:
        """The table for the screen. Raises RunRefused after printing it when a case is not blocked, or benign work broke."""
        lines = table(self.paths)
        failed = failures(self.paths)
        if failed:
            print(lines, flush=True)
            raise RunRefused(
                "attacks.failed",
                f"block every case of run attacks/{self.paths.stamp}",
                "; ".join(failed),
                f"see {self.paths.cases} and observations.json beside it",
            )
        return lines


class Attacks:
    """One run of the suite. `execute` leaves a sealed run, whatever the outcome of its cases."""

    def __init__(self, parameters: AttackParameters, site: Site, *, results: Path | None = None) -> None:
        self.parameters = parameters
        self.site = site
        self.gateway = Gateway.of(site)
        self.stack = Stack(site)
        self.resetter = Resetter(site)
        self.results = results or site.checkout / "results"
        self.input = sample_input(site, MASTER)
        self.expect = json.loads(json.dumps(next(entry.expect for entry in ENTRIES if entry.function == MASTER)))

    def execute(self) -> FinishedRun:
        """Run every case under every system. Raises RunRefused when benign work fails under stock: nothing could be concluded."""
        present = [name for name in self.gateway.functions() if name in FUNCTIONS]
        if present:
            raise ExperimentError(
                "attacks.occupied", f"deploy {', '.join(FUNCTIONS)}", f"the gateway already has {', '.join(present)}", "remove them with `fab clean`"
            )
        record = opening_record(
            self.site, experiment="attacks", profile="full", seed=0, parameters=asdict(self.parameters), gateway=self.gateway.information()
        )
        run = RunPaths.create("attacks", results=self.results)
        run.write_record(record)
        observations: list[Observation] = []
        with told(run, record, None, self.site, leave=lambda: self.gateway.remove_all(FUNCTIONS)):
            with Scene(self.site, run, ATTACKERS) as scene:
                for system in SYSTEMS:
                    observations += self.run_system(system, run, scene)
            self.resetter.reset()
        run.observations.write_text(json.dumps([asdict(entry) for entry in observations], indent=1, sort_keys=True) + "\n", encoding="utf-8")
        ports = {RECEIVER_PORT, FUNCTION_PORT, self.site.database.port, urllib.parse.urlsplit(self.site.images_url).port or 443}
        if self.site.cluster is not None:  # its captures hold what the gateway answers to the outside, too
            ports |= {urllib.parse.urlsplit(self.site.gateway).port or 80}
        run.write_record({**record, "end": utc_now(), "complete": True, "service_ports": sorted(ports), **scene.record()})
        run.seal()
        derive(run)
        run.point_latest(self.site.site_sha256)
        return FinishedRun(run)

    def functions(self, system: System, scene: Scene) -> list[Function]:
        """The application with its vulnerable functions, as it is deployed for `system`."""
        return [scene.place(self.stack.function(name, system, image_key=f"attack/{name}" if name in HOLES else "")) for name in FUNCTIONS]

    def run_system(self, system: System, run: RunPaths, scene: Scene) -> list[Observation]:
        """Every case under one system, each followed by a benign request."""
        self.resetter.reset()
        print(f"{system.name}: deploying the application with the vulnerable functions", flush=True)
        self.gateway.deploy_all(self.functions(system, scene))
        scene.deployed(system, FUNCTIONS)
        problem = self.benign(system, "before")
        if problem:
            raise RunRefused(
                "attacks.benign",
                f"send a benign request under {system.name} before the attacks",
                problem,
                "the suite concludes nothing until `fab check` passes",
            )
        logs = Logs(self.site, run)
        observations = []
        for case in CASES:
            observation = self.run_case(case, system, logs)
            observations.append(observation)
            seen = f"{observation.receiver_bytes} bytes in {observation.receiver}" if case.at_receiver else "judged by the capture"
            denied = "" if observation.denial is None else f"; denied: {Verdict(dict(observation.denial)).sentence()}"
            print(f"{system.name}: {case.name}: {seen}{denied}; benign: {observation.benign_problem or 'works'}", flush=True)
        self.gateway.remove_all(FUNCTIONS)
        scene.removed(FUNCTIONS)
        return observations

    def benign(self, system: System, moment: str) -> str:
        """What is wrong with the answer to a benign request; empty when nothing is."""
        answer = self.gateway.invoke(
            MASTER, self.input, path=MASTER_PATH, call_id=f"benign-{system.name}-{moment}", seconds_max=self.parameters.request_seconds_max
        )
        return problem_with(answer.status, answer.body, self.expect)

    def run_case(self, case: Case, system: System, logs: Logs) -> Observation:
        """One exploit: send it, ask the receiver until it answers or the evidence time is over, read the verdicts."""
        marker = secrets.token_hex(MARKER_BYTES)
        verdict_log = VerdictLog(self.site)
        body = {**self.input, **case.fields(marker, self.site)}
        answer = self.gateway.invoke(
            MASTER, body, path=MASTER_PATH, call_id=f"attack-{system.name}-{case.name}", seconds_max=self.parameters.request_seconds_max
        )
        received = self.ask(case.at_receiver, logs, marker)
        verdicts = [verdict for verdict in verdict_log.settled() if verdict.app == system.app and verdict.function == case.attacker]
        denial = case.denial(verdicts) if system.is_guarded else None
        benign_problem = self.benign(system, f"after-{case.name}")
        return Observation(
            case=case.name,
            system=system.name,
            marker=marker,
            status=answer.status,
            answer=answer.excerpt(),
            receiver_bytes=received.bytes,
            receiver=received.where,
            denial=None if denial is None else denial.record,
            other_denials=sum(verdict.denied for verdict in verdicts) - (denial is not None),
            benign_problem=benign_problem,
        )

    def ask(self, question: Callable[[Logs, str], Received] | None, logs: Logs, marker: str) -> Received:
        """What the receiver saw; "nothing" is believed only after the evidence time."""
        deadline = time.monotonic() + self.parameters.evidence_seconds
        while True:
            received = Received(0, "no log of its own") if question is None else question(logs, marker)
            if received.bytes or time.monotonic() > deadline:
                return received
            time.sleep(POLL_SECONDS)


@dataclass(frozen=True)
class Judged:
    """A case under Kalium beside the same case under stock."""

    case: Case
    stock: Observation
    enforced: Observation
    stock_wire: tuple[int, str]
    enforced_wire: tuple[int, str]

    @property
    def received(self) -> int:
        """Bytes of marked messages that any receiver or the wire saw under Kalium."""
        return max(self.enforced.receiver_bytes, self.enforced_wire[0])

    @property
    def stock_delivered(self) -> bool:
        """The attack works: under stock its own receiver, or the callee by the capture, saw the marker."""
        return (self.stock.receiver_bytes if self.case.at_receiver else self.stock_wire[0]) > 0

    @property
    def outcome(self) -> str:
        """missed: the marker got out; blocked: it did not, under stock it did, and the guard denied it; else invalid."""
        if self.received:
            return "missed"
        return "blocked" if self.stock_delivered and self.enforced.denial is not None else "invalid"

    @property
    def why_invalid(self) -> str:
        if not self.stock_delivered:
            return "stock gVisor did not deliver the marker either"
        return "nothing arrived, but no verdict denies the hostile message: the exploit may have failed by itself"


def wire_evidence(data: bytes, marker: str, service_ports: Sequence[int]) -> tuple[int, str]:
    """Marked bytes on the bridge and the flows that carried them; answers of services are not messages of the function."""
    flows = [(flow, count) for flow, count in wire.search(data, marker) if flow.source_port not in service_ports]
    other = wire.search_other(data, marker)
    text = "; ".join([f"{flow}: {count} bytes" for flow, count in flows] + ([f"{other} bytes outside TCP"] if other else []))
    return sum(count for _, count in flows) + other, text or "none"


def evidence_of(captures: Mapping[str, bytes], marker: str, service_ports: Sequence[int]) -> tuple[int, str]:
    """The wire's evidence from every place of capture: the most that one of them saw, since each may see the same packet, and who saw what."""
    seen = {where: wire_evidence(data, marker, service_ports) for where, data in captures.items()}
    if list(seen) == [""]:
        return seen[""]
    text = "; ".join(f"{where}: {flows}" for where, (count, flows) in seen.items() if count)
    return max(count for count, _ in seen.values()), text or f"none at {', '.join(seen)}"


def captures_of(run: RunPaths, record: Mapping[str, Any]) -> dict[str, bytes]:
    """What each capture of a run holds, by where it was taken; a run on one machine has one, without a name."""
    named = record.get("captures")
    if named is None:
        return {"": run.capture.read_bytes()}
    return {f"{entry['host']}/{entry['interface']}": (run.folder / entry["file"]).read_bytes() for entry in named}


def judge(run: RunPaths) -> list[Judged]:
    """Every case of a sealed run, judged from its observations and its capture alone."""
    record = run.read_sealed()
    captures = captures_of(run, record)
    observations = {(entry["case"], entry["system"]): Observation(**entry) for entry in json.loads(run.observations.read_text(encoding="utf-8"))}
    judged = []
    for case in CASES:
        stock, enforced = observations[case.name, STOCK.name], observations[case.name, KALIUM_STRICT.name]
        judged.append(Judged(case, stock, enforced, *(evidence_of(captures, entry.marker, record["service_ports"]) for entry in (stock, enforced))))
    return judged


def _write(path: Path, columns: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    frame = pd.DataFrame.from_records([tuple(line) for line in lines], columns=list(columns))
    frame.to_csv(path, index=False, lineterminator="\n", encoding="utf-8", quoting=csv.QUOTE_MINIMAL)


def derive(run: RunPaths) -> None:
    """Write summary.csv, cases.csv and aggregate.csv of a sealed run."""
    judged = judge(run)
    _write(run.summary, SUMMARY_COLUMNS, (_summary_line(entry) for entry in judged))
    _write(
        run.cases,
        CASE_COLUMNS,
        (
            (
                entry.case.name, observation.system, entry.case.claim, outcome, observation.receiver_bytes, observation.receiver, seen[0], seen[1],
                Verdict(dict(observation.denial)).sentence() if observation.denial else "",
                (observation.denial or {}).get("line") or "", observation.answer, observation.benign_problem or "works",
            )
            for entry in judged
            for observation, seen, outcome in (
                (entry.stock, entry.stock_wire, "delivered" if entry.stock_delivered else "not delivered"),
                (entry.enforced, entry.enforced_wire, entry.outcome),
            )
        ),
    )  # fmt: skip
    counts = {
        "cases": len(judged),
        "invalid": sum(entry.outcome == "invalid" for entry in judged),
        "kalium_enforce_missed_within_scope": sum(entry.outcome == "missed" for entry in judged),
        "benign_broken": sum(bool(entry.enforced.benign_problem) for entry in judged),
    }
    _write(run.aggregate, AGGREGATE_COLUMNS, ((name, value, "count") for name, value in counts.items()))


def _summary_line(entry: Judged) -> tuple[Any, ...]:
    denial = Verdict(dict(entry.enforced.denial)).sentence() if entry.enforced.denial else "no verdict"
    evidence = (
        f"receiver: {entry.enforced.receiver_bytes} bytes in {entry.enforced.receiver}; wire: {entry.enforced_wire[1]}; guard: {denial}; "
        f"stock: {entry.stock.receiver_bytes} bytes in {entry.stock.receiver}, wire: {entry.stock_wire[1]}"
    )
    return (
        entry.case.name, entry.case.category, KALIUM_STRICT.name, "blocked", entry.outcome, entry.enforced.marker,
        str(entry.stock_delivered).lower(), entry.received, evidence,
    )  # fmt: skip


def failures(run: RunPaths) -> list[str]:
    """A sentence for each case that is not blocked and each benign request that broke under Kalium."""
    found = []
    for entry in judge(run):
        if entry.outcome != "blocked":
            found.append(f"{entry.case.name} is {entry.outcome}" + (f" ({entry.why_invalid})" if entry.outcome == "invalid" else ""))
        if entry.enforced.benign_problem:
            found.append(f"the benign request after {entry.case.name} failed: {entry.enforced.benign_problem}")
    return found


def table(run: RunPaths) -> str:
    """The suite's outcome for the screen: the same numbers as in summary.csv and cases.csv."""
    lines = [
        f"run attacks/{run.stamp}: what receivers saw of each marker",
        f"{'case':<16} {'stock':>16} {'kalium':>10}  {'outcome':<8} benign  denied by",
    ]
    for entry in judge(run):
        stock = max(entry.stock.receiver_bytes, entry.stock_wire[0])
        denial = Verdict(dict(entry.enforced.denial)) if entry.enforced.denial else None
        reason = (
            "no verdict" if denial is None else f"{denial.reason}: {denial.kind} {denial.message!r}, policy line {denial.record.get('line') or '-'}"
        )
        lines.append(
            f"{entry.case.name:<16} {f'{stock} bytes':>16} {f'{entry.received} bytes':>10}  {entry.outcome:<8}"
            f" {'broken' if entry.enforced.benign_problem else 'works ':<6}  {reason}"
        )
    return "\n".join([*lines, *_places(run), f"summary, cases and capture: {run.folder}"])


def _places(run: RunPaths) -> list[str]:
    """Where a run on a cluster played."""
    record = run.read_sealed()
    if "placement" not in record:
        return []
    placement, points = record["placement"], [f"{entry['host']}/{entry['interface']}" for entry in record["captures"]]
    same = ", the only node" if placement["exploited"] == placement["targets"] else ""
    return [
        f"{' and '.join(ATTACKERS)} ran on node {placement['exploited']}, the functions that they attack on node {placement['targets']}{same}",
        f"the attacker's server ran on host {record['attacker']['host']}; captured at {', '.join(points)}",
    ]
