"""The tasks of the experiments: `fab --list`, `fab --help TASK`. Each states its parameters and makes one call."""

from __future__ import annotations

from fabric import Connection, task

from experiments import collect as collecting
from experiments import housekeeping
from experiments.attacks.runner import AttackParameters, Attacks
from experiments.check import check as check_site
from experiments.e1 import E1, E1Parameters
from experiments.e2 import E2, E2Parameters
from experiments.errors import errors_for_humans
from experiments.inventory import write as write_inventory
from experiments.plot import plot as plot_runs
from experiments.site import announced

INVENTORY = {"inventory": "folder under inventory/ of the site to use (default: the one that site.yml set up last)"}


@task(help=INVENTORY)
def check(context: Connection, inventory: str | None = None) -> None:
    """Basic test: deploy one function under stock gVisor and under Kalium, invoke it, expect the answer."""
    with errors_for_humans():
        print(check_site(announced(inventory)))


@task(
    help={
        **INVENTORY,
        "profile": "quick (minutes) or full (for numbers worth citing)",
        "resume": "stamp of an interrupted run: measure the blocks that it does not have, by its own profile and seed",
    }
)
def run_e1(context: Connection, inventory: str | None = None, profile: str = "quick", resume: str | None = None) -> None:
    """E1: end-to-end latency of each benchmark entry, for every system under comparison."""
    with errors_for_humans():
        site = announced(inventory)
        run = E1(E1Parameters.of_profile(profile), site).execute() if resume is None else E1.resumed(resume, site)
        print(run.summary_text())


@task(help={**INVENTORY, "profile": "quick (a minute) or full (more blocks, sizes and cells)"})
def run_e2(context: Connection, inventory: str | None = None, profile: str = "quick") -> None:
    """E2: what the parts of judging one message take, by the system call that sent it."""
    with errors_for_humans():
        print(E2(E2Parameters.of_profile(profile), announced(inventory)).execute().summary_text())


@task(help=INVENTORY)
def run_attacks(context: Connection, inventory: str | None = None) -> None:
    """The attack suite: an exploited function under stock gVisor and under Kalium; what counts is what receivers saw."""
    with errors_for_humans():
        print(Attacks(AttackParameters(), announced(inventory)).execute().text())


@task(help={**INVENTORY, "run": "folder, stamp or EXPERIMENT/STAMP of the run to draw (default: the newest of the highest profile of each)"})
def plot(context: Connection, inventory: str | None = None, run: str | None = None) -> None:
    """Draw the figures of E1 and E2 from complete runs: PNG, SVG and PDF, the same bytes each time."""
    with errors_for_humans():
        print(plot_runs(announced(inventory), run))


@task(
    help={
        **INVENTORY,
        "run": "EXPERIMENT/STAMP to which the logs belong (default: a folder of their own)",
        "mib": "of each file, the last so many MiB",
    }
)
def collect(context: Connection, inventory: str | None = None, run: str | None = None, mib: int = collecting.FILE_MIB_DEFAULT) -> None:
    """Fetch logs, verdicts, timings, journals and the cluster's account of all hosts, in parallel, with a manifest."""
    with errors_for_humans():
        print(collecting.collect(announced(inventory), run, mib=mib))


@task(help=INVENTORY)
def status(context: Connection, inventory: str | None = None) -> None:
    """Show the site: hosts, services, nodes and agents, the deployed functions, and the runs in results/."""
    with errors_for_humans():
        print(housekeeping.status(announced(inventory)))


@task(help=INVENTORY)
def clean(context: Connection, inventory: str | None = None) -> None:
    """Remove the benchmark's functions from the gateway, and runs that came to nothing; those that can go on stay."""
    with errors_for_humans():
        print(housekeeping.clean(announced(inventory)))


@task(
    help={
        "from_manifest": "file with the manifest of a CloudLab experiment (tab Manifest, or `geni-get manifest`)",
        "user": "your CloudLab login (default: the only one that the manifest has)",
        "out": "folder to write (default: inventory/EXPERIMENT)",
        "force": "replace files that were edited",
    }
)
def inventory(context: Connection, from_manifest: str, user: str | None = None, out: str | None = None, force: bool = False) -> None:
    """Write the inventory of a CloudLab experiment from its manifest, and say what to type next."""
    with errors_for_humans():
        print(write_inventory(from_manifest, user, out, force=force).text())
