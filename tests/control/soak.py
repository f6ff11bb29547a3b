"""The soak: many calls at a time through two agents, two controllers and Redis, while parts of them die, hang, lie and are cut off.

    python -m control.soak [--minutes 10] [--calls 10000] [--rate 2000] [--seed 1]       (with tests/ on PYTHONPATH; `make soak`)

`kalium-load soak` goes the policy's ways and leaves them, and knows what every answer has to be; this program injects faults on a
schedule that the seed fixes, watches memory, and in the end looks for every verdict that was told in the agents' logs. Exit 1 when
anything was wrong, and when a kind of fault was injected fewer than ten times.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import signal
import socket
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from guard.record import recorded, write_table

from kalium.controller.limits import LIMITS
from kalium.pki.authority import Role
from kalium.policy.compile import compile_policy

from .processes import Plane, built
from .redis_server import DURABLE, RedisServer

POLICY = """\
schema: kalium/v1
app: soak
version: 1
mode: enforce
peers:
  gateway: {host: gateway, port: 8080, protocol: http, role: gateway}
entries: [front]
functions:
  front:
    invocation_timeout_ms: 3600000
    messages:
      - {invoke: a}
      - choice: [{invoke: b}, {invoke: c}]
      - optional: {invoke: d}
      - parallel: [{invoke: e}, {invoke: f}]
        join: answered
      - {invoke: g, async: true, callback: h}
      - {repeat: {invoke: i}, at_most: 3}
      - {invoke: j, retries: 1}
  b: {invocation_timeout_ms: 3600000, messages: [{invoke: n}]}
  a: {messages: []}
  c: {messages: []}
  d: {messages: []}
  e: {messages: []}
  f: {messages: []}
  g: {messages: []}
  h: {messages: []}
  i: {messages: []}
  j: {messages: []}
  n: {messages: []}
"""
OTHER = """\
schema: kalium/v1
app: soak-other
version: 1
mode: enforce
peers:
  gateway: {host: gateway, port: 8080, protocol: http, role: gateway}
entries: [front]
functions:
  front: {messages: [{invoke: a}]}
  a: {messages: []}
"""
KINDS = (
    "controller_killed", "controller_drained", "controller_hangs", "store_killed", "agent_killed", "network_cut", "bad_frames", "half_open",
)  # fmt: skip
RESTARTS = ("controller_killed", "controller_drained", "agent_killed")  # the kinds after which a process's memory begins anew
RESTARTS_UNTIL = 0.6  # of the time: whoever lives then lives to the end, so that a slope of its memory says something
TIMES_MIN = 10  # of each kind of fault
LOGGED_S_MAX = 5.0  # until an agent has written what it was told; it waits 20 ms for more
HANG_S = 2.0
UNACKNOWLEDGED_MS = 1000  # a verdict that was told so shortly before its agent was killed may be lost with it
NODES = ("node0", "node1")


class Site:
    """Two controllers that share a Redis, and two agents, each with a cable of its own to each controller."""

    def __init__(self, where: Plane, redis: RedisServer) -> None:
        self.plane = where
        self.redis = redis
        self.controllers = [where.controller(f"controller-{number}", {"kind": "redis", "url": redis.url}) for number in range(2)]
        self.cables = {node: [where.proxy(controller.port) for controller in self.controllers] for node in NODES}
        self.agents = [where.agent(node, [cable.address for cable in self.cables[node]]) for node in NODES]


class Faults:
    """What can happen to a site. Each method is one kind, and leaves the site whole again."""

    def __init__(self, site: Site, randomness: random.Random) -> None:
        self.site = site
        self.random = randomness
        self.killed_ms: dict[str, list[int]] = {node: [] for node in NODES}

    def kinds(self) -> dict[str, Callable[[], None]]:
        """By name."""
        return {kind: getattr(self, kind) for kind in KINDS}

    def controller_killed(self) -> None:
        """kill -9, and a new one at the same address."""
        controller = self.random.choice(self.site.controllers)
        controller.kill()
        controller.start()

    def controller_drained(self) -> None:
        """SIGTERM: it says goodbye."""
        controller = self.random.choice(self.site.controllers)
        assert controller.end() == 0, controller.said()[-2000:]
        controller.start()

    def controller_hangs(self) -> None:
        """It keeps its connections and says nothing."""
        controller = self.random.choice(self.site.controllers)
        controller.send(signal.SIGSTOP)
        time.sleep(HANG_S)
        controller.send(signal.SIGCONT)

    def store_killed(self) -> None:
        """kill -9 of Redis."""
        self.site.redis.kill()
        self.site.redis.start()

    def agent_killed(self) -> None:
        """kill -9 of an agent: its sandboxes' connections are over."""
        agent = self.random.choice(self.site.agents)
        agent.kill()
        self.killed_ms[agent.node].append(time.time_ns() // 1_000_000)
        agent.start()

    def network_cut(self) -> None:
        """Packets between one agent and the controllers vanish: no end of a connection is seen."""
        cables = self.site.cables[self.random.choice(NODES)]
        for cable in cables:
            cable.cut()
        time.sleep(HANG_S)
        for cable in cables:
            cable.heal()

    def bad_frames(self) -> None:
        """A peer with a good certificate that sends rubbish, frames that are too long, and frames out of turn."""
        port, folder = self.random.choice(self.site.controllers).port, self.site.plane.folder
        context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
        context.load_cert_chain(folder / "stranger.crt", folder / "stranger.key")
        context.check_hostname = False
        for rubbish in (self.random.randbytes(500), b"KL\x01\x09\0\0\0\0\xff\xff\xff\xff", b"KL\x02", b"KL\x01\x03\0\0\0\x01\0\0\0\x01\x80"):
            with socket.create_connection(("127.0.0.1", port), timeout=10) as plain, context.wrap_socket(plain) as connection:
                connection.sendall(rubbish)
                connection.settimeout(10)
                assert connection.recv(1) == b"", "the controller goes on with a peer that breaks the protocol"

    def half_open(self) -> None:
        """A hundred connections that never finish their handshake."""
        port = self.random.choice(self.site.controllers).port
        held = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(100)]
        time.sleep(HANG_S)
        for connection in held:
            connection.close()


def schedule(kinds: list[str], seconds: float, seed: int) -> list[tuple[float, str]]:
    """When which fault: each kind TIMES_MIN times and one more, at moments that the seed fixes; no RESTARTS in the last part."""
    randomness = random.Random(seed)  # noqa: S311 - a schedule, no secret
    margin = min(20.0, seconds / 10)
    names = kinds * (TIMES_MIN + 1)
    return sorted((randomness.uniform(margin, seconds * RESTARTS_UNTIL if name in RESTARTS else seconds - margin), name) for name in names)


def missing_verdicts(site: Site, denials: Path, faults: Faults) -> list[str]:
    """Verdicts that were told and are in no log, but for those that an agent took with it when it was killed."""
    logged = {
        agent.node: {json.loads(line).get("message") for line in (agent.folder / "verdicts.jsonl").open(encoding="utf-8")} for agent in site.agents
    }
    lost = []
    with denials.open(encoding="utf-8", newline="") as file:
        for node, message, told in csv.reader(file, delimiter="\t"):
            is_excused = any(0 <= killed - int(told) <= UNACKNOWLEDGED_MS for killed in faults.killed_ms[node])
            if message not in logged[node] and not is_excused:
                lost.append(f"{node}: {message}")
    return lost


def slope(samples: list[tuple[float, int]]) -> float:
    """KiB a minute, by least squares over the second half of a life: the first is when tables fill."""
    half = samples[len(samples) // 2 :]
    if len(half) < 3:
        return 0.0
    return statistics.linear_regression([at / 60 for at, _ in half], [kib for _, kib in half]).slope


class Watch:
    """Resident memory of processes that nobody has restarted since the last sample."""

    def __init__(self, site: Site) -> None:
        self.parts = {**{each.name: each for each in site.controllers}, **{each.node: each for each in site.agents}}
        self.samples: dict[tuple[str, int], list[tuple[float, int]]] = {}

    def look(self, at: float) -> None:
        """Take a sample of each."""
        for name, process in self.parts.items():
            self.samples.setdefault((name, process.pid), []).append((at, process.resident_kib()))

    def slopes(self) -> dict[str, float]:
        """The steepest of each part, over the process that lived longest."""
        longest: dict[str, list[tuple[float, int]]] = {}
        for (name, _), samples in self.samples.items():
            longest[name] = max(longest.get(name, []), samples, key=len)
        return {name: slope(samples) for name, samples in longest.items()}


def play(where: Plane, redis: RedisServer, arguments: argparse.Namespace) -> tuple[dict[str, Any], Counter[str], dict[str, float], list[str]]:
    """Everything between the start and the end of the load: its sum, the faults, slopes of memory, and what was wrong."""
    where.issue("stranger", Role.CLIENT)
    site = Site(where, redis)
    faults = Faults(site, random.Random(arguments.seed))  # noqa: S311 - as the schedule
    kinds = faults.kinds()
    seconds = arguments.minutes * 60
    plan = schedule(sorted(kinds), seconds, arguments.seed)
    denials = where.folder / "denials.tsv"
    options = {
        "soak-calls": arguments.calls, "rate": arguments.rate, "seconds": seconds, "seed": arguments.seed, "denials": denials,
        "token-life": f"{LIMITS.token_ms}ms",
    }  # fmt: skip
    command = [str(built("kalium-load")), "soak", *(f"-{name}={value}" for name, value in options.items())]
    load = subprocess.Popen([*command, *(str(agent.folder) for agent in site.agents)], stdout=subprocess.PIPE, text=True)
    where.at_end(load.kill)
    lines: list[dict[str, Any]] = []

    def follow() -> None:
        assert load.stdout is not None
        lines.extend(map(json.loads, load.stdout))

    reader = threading.Thread(target=follow, daemon=True)
    reader.start()
    began, injected, wrong, watch = time.monotonic(), Counter[str](), [], Watch(site)
    for due, kind in [*plan, (seconds, "")]:
        while (left := began + due - time.monotonic()) > 0 and load.poll() is None:
            time.sleep(min(left, 5.0))
            watch.look(time.monotonic() - began)
        if not kind or load.poll() is not None:
            break
        kinds[kind]()
        injected[kind] += 1
        last = lines[-1] if lines else {}
        print(f"{time.monotonic() - began:7.1f} s  {kind:<20} steps {last.get('Steps', 0):>9,}  calls {last.get('Calls', 0):>7,}", flush=True)
    try:
        load.wait(300)
    except subprocess.TimeoutExpired:
        load.kill()
        wrong.append("the load did not end")
    reader.join(10)
    if load.returncode != 0 or not lines:
        wrong.append(f"the load ended with {load.returncode}")
    total = lines[-1] if lines else {}
    deadline = time.monotonic() + LOGGED_S_MAX
    while (lost := missing_verdicts(site, denials, faults)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if total.get("Replaced", 0) > (most := injected["agent_killed"] * total.get("Instances", 0)):
        wrong.append(f"{total['Replaced']} instances have lost their agent, of {most} whose agent was killed")
    total["LostVerdicts"] = len(lost) + total.get("LostAnswers", 0)
    wrong += [f"a verdict is in no log: {each}" for each in lost[:10]] + (total.get("First") or [])
    return total, injected, watch.slopes(), wrong


def main() -> None:
    """Play, record, and say what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="default: 10")
    parser.add_argument("--calls", type=int, default=10_000, help="under way at a time; default: 10000")
    parser.add_argument("--rate", type=float, default=2000.0, help="questions a second; default: 2000")
    parser.add_argument("--seed", type=int, default=1, help="of calls and faults; default: 1")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    parameters = {"minutes": arguments.minutes, "calls": arguments.calls, "rate": arguments.rate}
    profile = "full" if arguments.minutes >= 10 else "quick"
    policies = [compile_policy(text.encode(), "a policy of the soak") for text in (POLICY, OTHER)]
    with (
        Plane(*policies) as where,
        RedisServer(where.folder / "redis", *DURABLE) as redis,
        recorded("soak", profile=profile, seed=arguments.seed, parameters=parameters) as run,
    ):
        total, injected, slopes, wrong = play(where, redis, arguments)
        (run.folder / "observations.json").write_text(
            json.dumps({"load": total, "faults": injected, "wrong": wrong}, indent=1) + "\n", encoding="utf-8"
        )
        rows: list[dict[str, Any]] = [
            {"name": "calls", "value": total.get("Calls", 0), "unit": ""},
            {"name": "steps", "value": total.get("Steps", 0), "unit": ""},
            {"name": "denials_expected", "value": total.get("DenialsExpected", 0), "unit": ""},
            {"name": "denials_seen", "value": total.get("DenialsSeen", 0), "unit": ""},
            {"name": "repeats", "value": total.get("Repeats", 0), "unit": ""},
            {"name": "unavailable", "value": total.get("Unavailable", 0), "unit": ""},
            {"name": "abandoned", "value": total.get("Abandoned", 0), "unit": ""},
            {"name": "late", "value": total.get("Late", 0), "unit": ""},
            {"name": "replaced", "value": total.get("Replaced", 0), "unit": ""},
            {"name": "cross_talk", "value": total.get("CrossTalk", 0), "unit": ""},
            {"name": "lost_verdicts", "value": total.get("LostVerdicts", 0), "unit": ""},
            {"name": "false_allows", "value": total.get("FalseAllows", 0), "unit": ""},
            {"name": "unexpected", "value": total.get("Unexpected", 0), "unit": ""},
            {"name": "faults", "value": sum(injected.values()), "unit": ""},
            *({"name": f"faults_{kind}", "value": count, "unit": ""} for kind, count in sorted(injected.items())),
            {"name": "rss_slope_kib_per_min", "value": f"{max(slopes.values(), default=0):.1f}", "unit": "KiB/min"},
            *({"name": f"rss_slope_kib_per_min_{name}", "value": f"{found:.1f}", "unit": "KiB/min"} for name, found in sorted(slopes.items())),
        ]
        write_table(run.summary, rows)
    print(*(f"{row['name']:<36}{row['value']:>14} {row['unit']}" for row in rows), sep="\n")
    few = [kind for kind in KINDS if injected[kind] < TIMES_MIN]
    bad = [row["name"] for row in rows if row["name"] in ("cross_talk", "lost_verdicts", "false_allows", "unexpected") and row["value"]]
    for sentence in (*wrong, *(f"{kind} was injected {injected[kind]} times, fewer than {TIMES_MIN}" for kind in few)):
        print(f"wrong: {sentence}")
    if bad or few or wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
