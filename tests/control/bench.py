"""The controller's benchmark: what a step and an app edge cost, beside echo servers over the same hops, in turns in one run.

    python -m control.bench [--quick] [--rounds 5]        (with tests/ on PYTHONPATH; `make bench-controller`)

Servers stand side by side: (a) the controller over mutual TLS, (b) its dispatcher without TLS, (c) an echo with the same framing,
in the same language and on the same loop, over TLS and without, (d) the controller with Redis as its store. Edges go as two guards'
frames through a real agent to (a), and through another one to a controller that keeps its processor between two questions
(`busy_poll_us`, off by default); their floor goes through a relay in Go that decodes nothing to (c), which sleeps. A step is one answered question
(START or INVOKE); the ENDs between them are work that is not counted. results/bench/controller holds the figures and every turn.

What is served has a core of its own, and the load, the agent and the relay have another, as on two machines. Left to itself the
scheduler puts the two ends of a lone question on one core in some turns, which halves them, and on two in others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard.record import recorded, write_summary, write_table

from kalium.pki.authority import Role
from kalium.policy.compile import compile_policy

from .processes import ROOT, Agent, Controller, Plane, Process, built, free_port
from .redis_server import LOSSY, RedisServer

POLICY = """\
schema: kalium/v1
app: bench
version: 1
mode: enforce
peers:
  gateway: {host: gateway, port: 8080, protocol: http, role: gateway}
entries: [front, wide]
functions:
  front:
    messages:
      - {repeat: {repeat: {invoke: leaf}, at_least: 250, at_most: 250}, at_least: 4, at_most: 4}
  wide:
    messages:
      - parallel: [WIDE]
  leaf: {messages: []}
""".replace("[WIDE]", "[" + ", ".join(["{parallel: [" + ", ".join(["{invoke: leaf}"] * 14) + "]}"] * 10) + "]")
CORES = sorted(os.sched_getaffinity(0))
SERVED, ASKING = {CORES[-1]}, {CORES[0]}
PIPELINED = 2048  # lanes
LANES = (1, 16, 256, PIPELINED)
BUSY_POLL_US = 300  # longer than an edge takes


@dataclass(frozen=True)
class Side:
    """A server that is measured."""

    name: str
    port: int
    process: Process
    tls: bool
    floor: bool = False


class Bench:
    """The servers of one run, and the turns that were taken."""

    def __init__(self, where: Plane, redis: RedisServer) -> None:
        self.plane = where
        self.load = str(built("kalium-load"))
        self.turns: list[dict[str, Any]] = []
        where.issue("load", Role.AGENT)
        os.sched_setaffinity(0, SERVED)  # what is started inherits it
        self.sides = {side.name: side for side in self._sides(redis)}
        os.sched_setaffinity(0, ASKING)

    def _sides(self, redis: RedisServer) -> Iterator[Side]:
        ours = self.plane.controller("controller")
        yield Side("mtls", ours.port, ours, True)
        yield self._floor("plain", "plain", ours)
        yield self._floor("echo-tls", "echo", ours, "--ca", "ca.crt", "--cert", "controller.crt", "--key", "controller.key")
        yield self._floor("echo", "echo", ours)
        second = self.plane.controller("second", {"kind": "redis", "url": redis.url})
        yield Side("redis", second.port, second, True)
        polling = self.plane.controller("polling", busy_poll_us=BUSY_POLL_US)
        yield Side("polling", polling.port, polling, True)

    def _floor(self, name: str, what: str, ours: Controller, *tls: str) -> Side:
        port = free_port()
        command = [sys.executable, "-m", "control.floor", what, str(port), *tls]
        if what == "plain":
            command += ["--policies", str(ours.policies), "--key-file", "operator.pub"]
        return Side(name, port, self.plane.process(name, command, ready="listening"), bool(tls), floor=what == "echo")

    def tls(self) -> list[str]:
        """What makes kalium-load prove itself."""
        folder = self.plane.folder
        return ["-ca", f"{folder / 'ca.crt'}", "-cert", f"{folder / 'load.crt'}", "-key", f"{folder / 'load.key'}", "-name", "localhost"]

    def steps(self, side: Side, case: str, **options: Any) -> dict[str, Any]:
        """One turn over one connection to `side`."""
        command = ["controller", "-address", f"127.0.0.1:{side.port}", *(self.tls() if side.tls else []), *(["-floor"] if side.floor else [])]
        return self._turn(case, side.name, side.process, command, options)

    def edges(self, socket: Path, served: Process, name: str, case: str, **options: Any) -> dict[str, Any]:
        """One turn of two guards."""
        return self._turn(case, name, served, ["edges", "-socket", str(socket), *(["-floor"] if name == "relay" else [])], options)

    def _turn(self, case: str, name: str, served: Process, command: list[str], options: Mapping[str, Any]) -> dict[str, Any]:
        words = [f"-{option.replace('_', '-')}={str(value).lower() if value is True else value}" for option, value in options.items()]
        before = served.cpu_seconds()
        done = subprocess.run([self.load, *command, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{case} of {name}: {done.stderr}\n{served.said()[-2000:]}"
        result = json.loads(done.stdout)
        cpu_us = (served.cpu_seconds() - before) / max(1, result["Steps"]) * 1e6
        turn = {
            "case": case,
            "side": name,
            "per_s": result["Steps"] / result["Seconds"],
            "frames_per_s": result["Frames"] / result["Seconds"],
            "cpu_us": cpu_us,
            **result,
        }
        self.turns.append(turn)
        step = result["Step"]
        spread = f"p50 {step['P50']:8.1f}  p99 {step['P99']:8.1f} us"
        print(f"{case:<12}{name:<10}{turn['per_s']:>10,.0f} steps/s  {spread}  cpu {cpu_us:6.2f} us", flush=True)
        return turn

    def of(self, case: str, side: str, key: str, inner: str = "") -> list[float]:
        """A figure of every turn of a case."""
        return [turn[key][inner] if inner else turn[key] for turn in self.turns if (turn["case"], turn["side"]) == (case, side)]

    def median(self, case: str, side: str, key: str, inner: str = "") -> float:
        """Over the turns."""
        return statistics.median(self.of(case, side, key, inner))


def agent_of(bench: Bench, node: str, side: str) -> Agent:
    """An agent in front of a controller, with a front and a leaf registered."""
    controller = bench.sides[side].process
    assert isinstance(controller, Controller)
    agent = bench.plane.agent(node, [controller.address])
    for function in ("front", "leaf"):
        agent.register("bench", function, f"load-{function}")
    return agent


def relay_of(bench: Bench) -> Process:
    """The relay in front of the echo."""
    where = bench.plane
    command = [bench.load, "relay", "-socket", "relay", "-address", f"127.0.0.1:{bench.sides['echo-tls'].port}", *bench.tls()]
    return where.process("relay", command, ready="listening")


def measure(bench: Bench, *, rounds: int, seconds: float) -> None:
    """Every case of every side, in turns."""
    sides = bench.sides
    agent, polling, relay = agent_of(bench, "node0", "mtls"), agent_of(bench, "node1", "polling"), relay_of(bench)
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", flush=True)
        for lanes in LANES:
            for name in ("mtls", "plain", "echo-tls", "echo", "redis"):
                bench.steps(sides[name], f"lanes-{lanes}", lanes=lanes, seconds=seconds, warm_up=lanes)
        for _ in range(3):  # latency is what noise reaches: more and shorter turns
            bench.edges(agent.guard_socket, agent, "agent", "edges", seconds=seconds / 2, warm_up=20)
            bench.edges(bench.plane.folder / "relay", relay, "relay", "edges", seconds=seconds / 2, warm_up=20)
            bench.edges(polling.guard_socket, polling, "polling", "edges", seconds=seconds / 2, warm_up=20)
        bench.steps(sides["mtls"], "path-1000", edges=1000, seconds=3 * seconds, warm_up=1)
        bench.steps(sides["mtls"], "wide-140", front="wide", edges=140, keep_open=True, seconds=seconds, warm_up=1)


def memory(bench: Bench, counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Bytes a live call, by how many there are and how many branches each has open."""
    rows = []
    for calls in counts:
        for branches in (1, 8):
            command = [sys.executable, "-m", "control.memory", str(calls), str(branches)]
            files = [str(bench.plane.controllers[0].policies), str(bench.plane.folder / "operator.pub")]
            environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}"}
            done = subprocess.run([*command, *files], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            found = json.loads(done.stdout)["bytes_per_call"]
            rows.append({"calls": calls, "branches": branches, "bytes_per_call": f"{found:.0f}"})
            print(f"memory      {calls:>9,} calls of {branches} branches: {found:7.0f} bytes each", flush=True)
    return rows


def figures(bench: Bench, held: list[dict[str, Any]]) -> dict[str, tuple[float, str]]:
    """What summary.csv holds; results-schema names them."""
    of = bench.median

    def over_floor(side: str, which: str) -> float:
        """Of pairs of turns that stand beside each other, so that a slow stretch of the machine is in both."""
        pairs = zip(bench.of("edges", side, "Step", which), bench.of("edges", "relay", "Step", which), strict=True)
        return statistics.median(ours - floor for ours, floor in pairs)

    def window(case: str, name: str) -> float:
        found: float = statistics.median(turn["Invoke"][name]["P50"] for turn in bench.turns if turn["case"] == case)
        return found

    eight = {row["calls"]: float(row["bytes_per_call"]) for row in held if row["branches"] == 8}
    return {
        "step_p50_us": (of("lanes-1", "mtls", "Step", "P50"), "us"),
        "step_p99_us": (of("lanes-1", "mtls", "Step", "P99"), "us"),
        "step_p999_us": (of("lanes-1", "mtls", "Step", "P999"), "us"),
        "edge_p50_us": (of("edges", "agent", "Step", "P50"), "us"),
        "edge_p99_us": (of("edges", "agent", "Step", "P99"), "us"),
        "edge_over_floor_p50_us": (over_floor("agent", "P50"), "us"),
        "edge_over_floor_p99_us": (over_floor("agent", "P99"), "us"),
        "edge_busy_poll_p50_us": (of("edges", "polling", "Step", "P50"), "us"),
        "edge_busy_poll_p99_us": (of("edges", "polling", "Step", "P99"), "us"),
        "edge_busy_poll_over_floor_p50_us": (over_floor("polling", "P50"), "us"),
        "edge_busy_poll_over_floor_p99_us": (over_floor("polling", "P99"), "us"),
        "steps_per_s_pipelined": (of(f"lanes-{PIPELINED}", "mtls", "per_s"), "1/s"),
        "steps_per_s_256": (of("lanes-256", "mtls", "per_s"), "1/s"),
        "steps_per_s_16": (of("lanes-16", "mtls", "per_s"), "1/s"),
        "steps_per_s_1": (of("lanes-1", "mtls", "per_s"), "1/s"),
        "frames_per_s_pipelined": (of(f"lanes-{PIPELINED}", "mtls", "frames_per_s"), "1/s"),
        "floor_echo_p50_us": (of("lanes-1", "echo-tls", "Step", "P50"), "us"),
        "floor_echo_per_s": (of(f"lanes-{PIPELINED}", "echo-tls", "per_s"), "1/s"),
        "floor_echo_plain_per_s": (of(f"lanes-{PIPELINED}", "echo", "per_s"), "1/s"),
        "plain_steps_per_s_pipelined": (of(f"lanes-{PIPELINED}", "plain", "per_s"), "1/s"),
        "redis_steps_per_s_pipelined": (of(f"lanes-{PIPELINED}", "redis", "per_s"), "1/s"),
        "redis_step_p50_us": (of("lanes-1", "redis", "Step", "P50"), "us"),
        "cpu_us_per_step": (of(f"lanes-{PIPELINED}", "mtls", "cpu_us"), "us"),
        "bytes_per_live_call": (eight[max(eight)], "bytes"),
        **{f"bytes_per_live_call_{calls}": (size, "bytes") for calls, size in eight.items()},
        **{f"step{name}_p50_us": (window("path-1000", name), "us") for name in ("1", "10", "100", "1000")},
        "step1000_over_step1": (window("path-1000", "1000") / window("path-1000", "1"), ""),
        "join140_over_step1": (window("wide-140", "100") / window("wide-140", "1"), ""),
    }


def main() -> None:
    """Measure, and record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round of short turns, and no population of a million: shows that it runs")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each case; default: 5")
    arguments = parser.parse_args()
    rounds, seconds = (1, 0.5) if arguments.quick else (arguments.rounds, 2.0)
    counts = (10_000,) if arguments.quick else (10_000, 100_000, 1_000_000)
    parameters = {"rounds": rounds, "seconds": seconds, "lanes": LANES, "calls": counts, "cores": len(SERVED | ASKING)}
    profile = "quick" if arguments.quick else "full"
    with Plane(compile_policy(POLICY.encode(), "the benchmark's policy")) as where, RedisServer(where.folder / "redis", *LOSSY) as redis:
        bench = Bench(where, redis)
        with recorded("bench/controller", profile=profile, seed=0, parameters=parameters) as run:
            measure(bench, rounds=rounds, seconds=seconds)
            held = memory(bench, counts)
            (run.folder / "turns.json").write_text(json.dumps(bench.turns, indent=1) + "\n", encoding="utf-8")
            write_table(run.folder / "memory.csv", held)
            found = figures(bench, held)
            write_summary(run, found)
        print(*(f"{name:<32}{value:>14.6g} {unit}" for name, (value, unit) in found.items()), sep="\n")
        print(f"written to {run.folder.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
