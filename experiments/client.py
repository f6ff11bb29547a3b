"""Starts the load generator where load has to come from: on the `client` host of the site, over SSH or as a process.

Latency measured from the operator's desk would be the latency of the operator's network, so the program runs on the
client host with that host's python3; only it, its plan and its samples travel.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments import machine
from experiments.errors import ExperimentError, RunRefused
from experiments.site import Host

PROGRAM = Path(__file__).with_name("loadgen.py")
START_SECONDS_MAX = 20.0  # until the program runs, added to what its requests may take


@dataclass(frozen=True)
class Series:
    """Equal requests, sent one after the other; see loadgen.py for the fields."""

    entry: str
    via: str
    url: str
    body: Mapping[str, Any]
    expect: Sequence[tuple[Sequence[str | int], Any]]
    requests: int
    first_is_cold: bool
    call_prefix: str


@dataclass(frozen=True)
class Sample:
    """One request as the load generator saw it; `seconds` until the last byte, `status` 0 when nothing came back."""

    entry: str
    via: str
    seq: int
    status: int
    seconds: float
    warm: bool
    call_id: str
    problem: str


def _run_here(plan: str, seconds_max: float) -> str:
    done = subprocess.run(
        [sys.executable, "-I", str(PROGRAM)], input=plan, capture_output=True, text=True, encoding="utf-8", timeout=seconds_max, check=False
    )
    if done.returncode != 0:
        raise OSError(f"exit status {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _run_there(host: Host, plan: str, seconds_max: float) -> str:
    # The program travels as an argument: nothing of it is written there, so nothing is left behind.
    done = machine.of(host).run(["python3", "-I", "-c", PROGRAM.read_text(encoding="utf-8")], stdin=plan.encode("utf-8"), seconds_max=seconds_max)
    if done.status != 0:
        raise OSError(done.complaint())
    return done.out.decode("utf-8")


def generate(host: Host, series: Sequence[Series], *, seconds_max: float) -> list[Sample]:
    """Send every request of `series` from `host`, in order, and return one sample for each that was sent.

    `seconds_max` bounds each request. The result ends at the first sample with a problem. Raises RunRefused when samples
    that the program took are missing here, and ExperimentError when the host cannot run it.
    """
    plan = json.dumps({"seconds_max": seconds_max, "series": [asdict(entry) for entry in series]})
    planned = sum(entry.requests for entry in series)
    whole = START_SECONDS_MAX + seconds_max * planned
    attempted = f"send {planned} requests from client host {host}"
    try:
        output = _run_here(plan, whole) if host.is_local else _run_there(host, plan, whole)
    except subprocess.TimeoutExpired as error:
        raise ExperimentError(
            "client.timeout", attempted, f"not done after {whole:.0f} s", "see the gateway's log for requests without answer"
        ) from error
    except OSError as error:
        raise ExperimentError(
            "client.failed", attempted, f"{type(error).__name__}: {error}", f"see that python3 works on {host.name}, then run the task again"
        ) from error
    return parse(output, planned, attempted)


def parse(output: str, planned: int, attempted: str) -> list[Sample]:
    """The samples in the load generator's output; each planned request has one, or the last one tells of a problem."""
    samples: list[Sample] = []
    ended = False
    for line in output.splitlines():
        try:
            record = json.loads(line)
            if record["type"] == "end":
                ended = record["samples"] == len(samples)
                continue
            samples.append(Sample(**{name: record[name] for name in Sample.__dataclass_fields__}))
        except (ValueError, KeyError, TypeError) as error:
            raise RunRefused("client.output", attempted, f"a line is no sample: {line[:200]!r}", "run it again; report it if it repeats") from error
    stopped = bool(samples and samples[-1].problem)
    if not stopped and not (ended and len(samples) == planned):
        raise RunRefused(
            "client.lost",
            attempted,
            f"{len(samples)} samples arrived{'' if ended else ' and no end line'}",
            "run it again; a run with lost samples is not used",
        )
    return samples
