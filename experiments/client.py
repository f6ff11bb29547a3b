"""Starts the load generator where load has to come from: on the `client` host of the site, over SSH or as a process.

Latency measured from the operator's desk would be the latency of the operator's network, so the program is copied to the
client host and runs there with that host's python3; only its plan and its samples travel.
"""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import paramiko
from fabric import Connection
from invoke.exceptions import CommandTimedOut

from experiments.errors import ExperimentError, RunRefused
from experiments.site import Host

PROGRAM = Path(__file__).with_name("loadgen.py")
CONNECT_SECONDS_MAX = 15
START_SECONDS_MAX = 20.0  # until the program is copied and runs, added to what its requests may take


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


def connect(host: Host) -> Connection:
    """A connection to `host` that accepts only a host key it already knows; it opens on first use."""
    arguments: dict[str, Any] = {"banner_timeout": CONNECT_SECONDS_MAX, "auth_timeout": CONNECT_SECONDS_MAX}
    if host.key_file:
        arguments |= {"key_filename": str(Path(host.key_file).expanduser()), "look_for_keys": False, "allow_agent": False}
    connection = Connection(
        host.address or host.name, user=host.user or None, port=host.port, connect_timeout=CONNECT_SECONDS_MAX, connect_kwargs=arguments
    )
    # Fabric itself accepts any unknown key; a client host that changed its key must stop the run instead.
    connection.client.set_missing_host_key_policy(paramiko.RejectPolicy())
    if host.known_hosts:
        connection.client.load_host_keys(str(Path(host.known_hosts).expanduser()))
    else:
        connection.client.load_system_host_keys()
    return connection


def _run_there(host: Host, plan: str, seconds_max: float) -> str:
    with connect(host) as connection:
        # A fresh folder of our own: a name that others can guess in /tmp would be theirs to replace.
        made = connection.run("mktemp -d", hide=True, warn=True, in_stream=False, timeout=CONNECT_SECONDS_MAX)
        if made.exited != 0:
            raise OSError(f"mktemp -d: exit status {made.exited}: {made.stderr.strip()}")
        folder = shlex.quote(made.stdout.strip())
        try:
            connection.put(io.BytesIO(PROGRAM.read_bytes()), f"{made.stdout.strip()}/{PROGRAM.name}")
            done = connection.run(
                f"python3 -I {folder}/{PROGRAM.name}", in_stream=io.StringIO(plan), hide=True, warn=True, timeout=int(seconds_max), encoding="utf-8"
            )
        finally:
            connection.run(f"rm -rf -- {folder}", hide=True, warn=True, in_stream=False, timeout=CONNECT_SECONDS_MAX)
    if done.exited != 0:
        raise OSError(f"exit status {done.exited}: {done.stderr.strip()[-500:]}")
    return str(done.stdout)


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
        output = _run_here(plan, whole) if host.connection == "local" else _run_there(host, plan, whole)
    except (subprocess.TimeoutExpired, CommandTimedOut) as error:
        raise ExperimentError(
            "client.timeout", attempted, f"not done after {whole:.0f} s", "see the gateway's log for requests without answer"
        ) from error
    except (OSError, EOFError, paramiko.SSHException) as error:
        raise ExperimentError(
            "client.failed", attempted, f"{type(error).__name__}: {error}",
            f"check that `ssh {host}` works without a question and that python3 is there" if host.connection == "ssh" else "see the message above",
        ) from error  # fmt: skip
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
