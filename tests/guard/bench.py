"""The guard's benchmark: what judging adds, against the same runtime in mode off, side by side in one run.

    python -m guard.bench [--quick]        (with tests/ on PYTHONPATH; `make bench-guard`)

Latencies are round trips of one program in two sandboxes, in turns; CPU is that of all processes of a sandbox; what cryptography cannot
do without comes from the Go benchmarks of the same run. results/bench/guard holds the figures, the raw samples and this machine's floor.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from .interpreters import GATING, pythons, with_clients
from .lab import INSIDE, ROOT, Lab, Sandbox, go_program, until
from .record import recorded, write_summary, write_table
from .servers import MYSQL_PORT, PROGRAMS, MariaDB, Server

MODES = ("off", "enforce")
NAMES = {"web.test": "10.199.0.2", "tls.test": "10.199.0.3", "database.test": "10.199.0.4"}
TARGETS = {
    "http": (NAMES["web.test"], 8000, "web.test"),
    "https": (NAMES["tls.test"], 4443, "tls.test"),
    "mysql": (NAMES["database.test"], MYSQL_PORT, "database.test"),
}
KIB, MIB = 1 << 10, 1 << 20
# Bytes of a message -> samples in one turn. A statement of 256 KiB is mostly MariaDB's own work, and there is none of 8 MiB.
SIZES = {128: 200, KIB: 200, 16 * KIB: 100, 256 * KIB: 20, 8 * MIB: 2}
POLICY = """\
schema: kalium/v1
app: {mode}
version: 1
mode: {mode}
on_unavailable: {{app_edge: deny, deadline_ms: 10000}}
peers:
  web: {{host: web.test, port: 8000, protocol: http}}
  tls: {{host: tls.test, port: 4443, protocol: https}}
  database: {{host: database.test, port: 3306, protocol: mysql, schema: helloRetail}}
entries: [load]
functions:
  load:
    max_body: 16777216
    messages:
      - repeat:
          choice:
            - {{http: GET, peer: web, path: /load}}
            - {{http: POST, peer: web, path: /load}}
            - {{https: GET, peer: tls, path: /load}}
            - {{https: POST, peer: tls, path: /load}}
            - {{mysql: select, peer: database, read: [photos]}}
        at_most: 256
"""
GO_BENCHMARKS = (
    ("./internal/wire/tlsopen", "^(BenchmarkOpenSeal|BenchmarkAEADFloor)$/^TLS13-AES256$/^16384$"),
    ("./internal/guard", "^(BenchmarkJudge|BenchmarkRequest)$"),
)


class Sink(Server):
    """The server that swallows bodies."""

    def __init__(self, lab: Lab, protocol: str) -> None:
        super().__init__(lab, f"sink-{protocol}")
        address, port, name = TARGETS[protocol]
        files = self.certificate(name) if protocol == "https" else ()
        self.start("/usr/bin/python3", str(PROGRAMS / "sink_server.py"), address, str(port), *files)
        until(lambda: "listening" in self.said(), "the sink")


def processes(root: int) -> Iterator[int]:
    """`root` and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has ended
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    waiting = [root]
    while waiting:
        one = waiting.pop()
        yield one
        waiting += parents.get(one, [])


def cpu_seconds(sandbox: Sandbox) -> float:
    """User and system time of all processes of a sandbox, those that ended included."""
    ticks = 0
    for one in processes(sandbox.process.pid):
        try:
            fields = (Path("/proc") / str(one) / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += sum(int(field) for field in fields[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def resident_mib(sandbox: Sandbox) -> float:
    """Resident memory of the Sentry: the process among the sandbox's that holds most."""
    sizes = []
    for one in processes(sandbox.process.pid):
        if "boot" in (Path("/proc") / str(one) / "cmdline").read_bytes().decode(errors="replace").split("\0"):
            text = (Path("/proc") / str(one) / "smaps_rollup").read_text()
            found = re.search(r"^Rss:\s+(\d+) kB", text, re.MULTILINE)
            sizes.append(int(found.group(1)) / 1024 if found else 0)
    return max(sizes)


class Bench:
    """Two sandboxes and their servers."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self.lab = lab
        for address in NAMES.values():
            lab.world.address(int(address.rsplit(".", 1)[1]))
        for protocol in ("http", "https"):
            stack.enter_context(Sink(lab, protocol))
        stack.enter_context(MariaDB(lab, NAMES["database.test"], "database.test"))
        self.python = str(with_clients(next(version for version in (*GATING, *pythons()) if version in pythons())))
        self.environment = {"SSL_CERT_FILE": str(lab.folder / "pki" / "ca.crt")}
        self.sandboxes = {mode: stack.enter_context(self.sandbox(mode, {"kalium.io/timers": "on"} if mode == "enforce" else {})) for mode in MODES}

    def sandbox(self, app: str, annotations: dict[str, str], *, runtime: str = "runsc-kalium") -> Any:
        return self.lab.sandbox(app, "load", runtime=runtime, env=self.environment, annotations=annotations, argv=(self.python, str(INSIDE)))

    def turn(self, mode: str, protocol: str, size: int, count: int) -> dict[str, Any]:
        address, port, name = TARGETS[protocol]
        call = f"load.run({protocol!r}, ({address!r}, {port}), {name!r}, {size}, {count})"
        code = f"import sys\nsys.path[:1] = [{str(PROGRAMS)!r}]\nimport load\nresult = {call}\n"
        sandbox = self.sandboxes[mode]
        before = cpu_seconds(sandbox)
        job = sandbox.request({"python": code}).job
        if "error" in job:
            raise RuntimeError(f"{mode} {protocol} {size}: {job['error']}: {job['text']}; {sandbox.denials()}")
        return {**job["result"], "cpu_s": cpu_seconds(sandbox) - before, "mode": mode, "protocol": protocol, "bytes": size}

    def turns(self, rounds: int, report: Callable[[str], None]) -> list[dict[str, Any]]:
        """All sizes of all protocols; in each round both modes, the first of them in turns."""
        found = []
        for protocol in TARGETS:
            for size, count in SIZES.items():
                if protocol == "mysql" and size > 256 * KIB:
                    continue
                for mode in MODES:
                    self.turn(mode, protocol, size, min(count, 10))  # not counted: first connections, first pages
                for number in range(rounds):
                    found += [self.turn(mode, protocol, size, count) for mode in (MODES if number % 2 else reversed(MODES))]
                report(f"{protocol} {size} bytes")
        return found

    def starts(self, rounds: int) -> dict[str, dict[str, list[float]]]:
        """Seconds until a fresh sandbox answers, and its memory after one request, for stock and guarded in turns."""
        found: dict[str, dict[str, list[float]]] = {"runsc-stock": {"s": [], "mib": []}, "runsc-kalium": {"s": [], "mib": []}}
        for _ in range(rounds):
            for runtime, figures in found.items():
                with self.sandbox("enforce", {}, runtime=runtime) as sandbox:
                    figures["s"].append(sandbox.started_s)
                    sandbox.request({"python": "result = 1"})
                    figures["mib"].append(resident_mib(sandbox))
        return found

    def decisions(self) -> list[dict[str, Any]]:
        """The guard's own timers of clear HTTP requests of 1 KiB."""
        self.lab.settled("timings.jsonl")
        lines = [json.loads(line) for line in (self.lab.folder / "timings.jsonl").read_text(encoding="utf-8").splitlines()]
        return [line for line in lines if line["kind"] == "http" and line["bytes"] == KIB]


def go_output(*arguments: str) -> str:
    """What the Go of runtime/ prints."""
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-trimpath", "GOTOOLCHAIN": "local"}
    done = subprocess.run([go_program(), *arguments], cwd=ROOT / "runtime", env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"go {' '.join(arguments)}: {done.stdout}{done.stderr}")
    return done.stdout


def go_figures(rounds: int) -> dict[str, dict[str, list[float]]]:
    """ns/op and allocs/op of the Go benchmarks, `rounds` times in turns."""
    found: dict[str, dict[str, list[float]]] = {}
    for package, pattern in GO_BENCHMARKS:
        said = go_output("test", "-run", "^$", "-bench", pattern, "-benchmem", f"-count={rounds}", "-cpu", "1", package)
        for line in said.splitlines():
            if line.startswith("Benchmark"):
                words = line.split()
                entry = found.setdefault(words[0], {"ns": [], "allocs": []})
                entry["ns"].append(float(words[words.index("ns/op") - 1]))
                entry["allocs"].append(float(words[words.index("allocs/op") - 1]))
    return found


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def latency_table(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a protocol and size: both modes and what is between them."""
    rows = []
    for protocol in TARGETS:
        for size in SIZES:
            times = {
                mode: [us for turn in turns if (turn["protocol"], turn["bytes"], turn["mode"]) == (protocol, size, mode) for us in turn["us"]]
                for mode in MODES
            }
            if not times["off"]:
                continue
            cpu = {mode: cpu_per_mib(turns, protocol, size, mode) for mode in MODES}
            row: dict[str, Any] = {"protocol": protocol, "bytes": size, "n": len(times["enforce"])}
            for mode in MODES:
                row |= {
                    f"{mode}_p50_us": round(quantile(times[mode], 0.5), 1),
                    f"{mode}_p99_us": round(quantile(times[mode], 0.99), 1),
                    f"{mode}_cpu_ms_per_mib": round(cpu[mode] * 1000, 3),
                }
            row |= {
                "added_p50_us": round(row["enforce_p50_us"] - row["off_p50_us"], 1),
                "added_p99_us": round(row["enforce_p99_us"] - row["off_p99_us"], 1),
            }
            rows.append(row)
    return rows


def cpu_per_mib(turns: list[dict[str, Any]], protocol: str, size: int, mode: str) -> float:
    mine = [turn for turn in turns if (turn["protocol"], turn["bytes"], turn["mode"]) == (protocol, size, mode)]
    return float(sum(turn["cpu_s"] for turn in mine) / (sum(len(turn["us"]) for turn in mine) * size / MIB))


def figures(
    turns: list[dict[str, Any]], starts: dict[str, Any], go: dict[str, Any], decisions: list[dict[str, Any]], unclassified: int
) -> dict[str, tuple[float, str]]:
    """What summary.csv holds."""
    reseal = statistics.median(go["BenchmarkOpenSeal/TLS13-AES256/16384"]["ns"])
    floor = statistics.median(go["BenchmarkAEADFloor/TLS13-AES256/16384"]["ns"])
    big = 8 * MIB
    times = {
        mode: statistics.median(us for turn in turns if (turn["protocol"], turn["bytes"], turn["mode"]) == ("http", big, mode) for us in turn["us"])
        for mode in MODES
    }
    floor_cpu = floor / 1e9 * 64  # records of 16 KiB in a MiB
    tls_cpu = {mode: cpu_per_mib(turns, "https", big, mode) for mode in MODES}
    extra = {name: statistics.median(starts["runsc-kalium"][name]) - statistics.median(starts["runsc-stock"][name]) for name in ("s", "mib")}
    total = [line["total_ns"] / 1000 for line in decisions]
    allocations = [value for name, entry in go.items() if name.startswith(("BenchmarkJudge", "BenchmarkRequest")) for value in entry["allocs"]]
    return {
        "local_http1_1KiB_p50_us": (quantile(total, 0.5), "us"),
        "local_http1_1KiB_p99_us": (quantile(total, 0.99), "us"),
        "reseal_16KiB_us": (reseal / 1000, "us"),
        "reseal_over_floor": (reseal / floor, "ratio"),
        "upload_8MiB_ratio": (times["off"] / times["enforce"], "ratio"),
        "upload_tls_cpu_over_floor": (tls_cpu["enforce"] / (tls_cpu["off"] + floor_cpu), "ratio"),
        "memory_extra_mib": (extra["mib"], "MiB"),
        "cold_start_extra_ms": (extra["s"] * 1000, "ms"),
        "allocs_per_message": (max(allocations), "allocations"),
        "unclassified_syscalls": (unclassified, "calls"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the guard adds; results go to results/bench/guard.")
    parser.add_argument("--quick", action="store_true", help="fewer rounds: minutes, for a look and not for citing")
    rounds = 3 if parser.parse_args().quick else 10
    parameters = {"rounds": rounds, "sizes": SIZES, "modes": MODES}
    with (
        recorded("bench/guard", profile="quick" if rounds == 3 else "full", seed=0, parameters=parameters) as run,
        Lab({mode: POLICY.format(mode=mode) for mode in MODES}, NAMES) as lab,
        ExitStack() as stack,
    ):
        print("building the programs and starting the servers", flush=True)
        bench = Bench(lab, stack)
        turns = bench.turns(rounds, lambda line: print(line, flush=True))
        decisions = bench.decisions()
        print("starting sandboxes", flush=True)
        starts = bench.starts(rounds * 2)
        print("Go benchmarks", flush=True)
        go = go_figures(rounds + 2)
        unclassified = int(go_output("run", "./internal/mediation/document", "-unclassified"))
        run.observations.write_text(
            json.dumps({"turns": turns, "starts": starts, "go": go, "decisions": decisions, "unclassified": unclassified}), encoding="utf-8"
        )
        write_table(run.folder / "latency.csv", latency_table(turns))
        summary = figures(turns, starts, go, decisions, unclassified)
        write_summary(run, summary)
    for row in latency_table(turns):
        print(" ".join(f"{key}={value}" for key, value in row.items()))
    for name, (value, unit) in summary.items():
        print(f"{name:28} {value:10.3f} {unit}")
    print(f"written to {run.folder}")


if __name__ == "__main__":
    main()
