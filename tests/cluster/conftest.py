"""What the whole test of a cluster shares: three hosts, the commands a person types, and where each one's output is kept."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from throwaway import output
from throwaway.host import Host

from cluster import builds
from cluster import hosts as testbed
from cluster.state import caches

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = "inventory/testbed"
TWO_CONTROLLERS = ".kalium/two-controllers"  # the same folder with one line of hosts.yml changed
COMMAND_S_MAX = 2400.0
BEGAN = time.monotonic()
STEPS: list[tuple[float, str]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """--keep: for who wants to look at the hosts afterwards."""
    parser.addoption("--keep", action="store_true", help="leave the hosts and their site standing: nothing is reset or ended")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --keep the steps that end things are left out, and said to be."""
    if not config.getoption("--keep"):
        return
    kept = [item for item in items if item.get_closest_marker("ending") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker."""
    config.addinivalue_line("markers", "ending: ends the site or the hosts; left out with --keep")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Each step of the site with the seconds that it took; of its preparation too, where that is worth a line."""
    terminalreporter.section("steps of the site")
    for report in (one for outcome in ("passed", "failed", "error") for one in terminalreporter.getreports(outcome)):
        if "test_site.py" in report.nodeid and (report.when == "call" or report.duration > 1):
            name = report.nodeid.rpartition("::")[2] + {"setup": ", prepared", "teardown": ", cleared"}.get(report.when, "")
            STEPS.append((report.start, f"{report.duration:6.0f} s  {'' if report.passed else 'FAILED '}{name}"))
    for _, line in sorted(STEPS):
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"{time.monotonic() - BEGAN:6.0f} s  in all; what each command printed is in {caches() / 'cluster' / 'logs'}")


@dataclass(frozen=True)
class Said:
    """What a command came to: exit status and all it printed."""

    status: int
    text: str
    seconds: float

    def end(self, lines: int = 40) -> str:
        """The last lines, for a failed assertion."""
        return "\n".join(self.text.splitlines()[-lines:])

    def recap(self) -> dict[str, dict[str, int]]:
        """Ansible's recap by host."""
        return output.recap(self.text)

    def changed(self) -> list[str]:
        """Names of the tasks that changed something."""
        return output.changed(self.text)


class Operator:
    """Types commands in the checkout, as README and how-tos have them. The output of each goes to a file, whose path a failure names."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.inventory = INVENTORY
        self._count = 0
        programs = Path(sys.executable).parent
        self._environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            "PATH": f"{programs}:{os.environ.get('PATH', '')}",
            "ANSIBLE_NOCOLOR": "1",
            "LC_ALL": "C.UTF-8",
            "COLUMNS": "200",
        }

    def run(self, *words: str, seconds_max: float = COMMAND_S_MAX) -> Said:
        """One command, whatever its result."""
        self._count += 1
        name = re.sub(r"[^a-z0-9]+", "-", " ".join(words[:3]).lower()).strip("-")
        log = self.logs / f"{self._count:02d}-{name}.log"
        began = time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                words,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
                timeout=seconds_max,
            )
        return Said(done.returncode, log.read_text(encoding="utf-8", errors="replace"), time.monotonic() - began)

    def must(self, *words: str, seconds_max: float = COMMAND_S_MAX) -> Said:
        """One command that has to succeed."""
        said = self.run(*words, seconds_max=seconds_max)
        assert said.status == 0, f"`{' '.join(words)}` ended with {said.status} (output: {self.logs}):\n{said.end()}"
        return said

    def play(self, playbook: str, *options: str) -> Said:
        """`ansible-playbook PLAYBOOK -i INVENTORY`, which has to succeed."""
        return self.must("ansible-playbook", playbook, "-i", self.inventory, *options)

    def adds_a_controller(self) -> None:
        """A second host in the group `controller`, as a person writes it; every later playbook is run with it."""
        folder = ROOT / TWO_CONTROLLERS
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(ROOT / INVENTORY, folder)
        before = (folder / "hosts.yml").read_text(encoding="utf-8")
        one, two = (f"    controller:\n      hosts: {{{hosts}}}\n" for hosts in ("node0: {}", "node0: {}, node1: {}"))
        assert before.count(one) == 1, before
        (folder / "hosts.yml").write_text(before.replace(one, two), encoding="utf-8")
        self.inventory = TWO_CONTROLLERS


@pytest.fixture(scope="session")
def operator() -> Operator:
    logs = caches() / "cluster" / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    for old in logs.glob("*.log"):
        old.unlink()
    return Operator(logs)


@pytest.fixture(scope="session")
def hosts(request: pytest.FixtureRequest, operator: Operator) -> Iterator[dict[str, Host]]:
    """node0 to node2, running, with what is to be installed on them built. Hosts that ran before are taken as they are.

    After a failure what the hosts know of it is fetched first (`fab collect`).
    """
    builds.built()
    yield testbed.up()
    if request.session.testsfailed and (ROOT / ".kalium/site.json").exists():
        print(operator.run("fab", "collect").end(8))
    if not request.config.getoption("--keep"):
        testbed.down()


def sh(host: Host, command: str, seconds_max: float = 120.0) -> str:
    """What a shell command line says on a host, as root; it has to succeed."""
    done = host.run("sudo", "sh", "-c", shlex.quote(command), timeout_s=seconds_max)
    assert done.returncode == 0, f"{host.name}: {command}: {done.stderr.strip() or done.stdout.strip()}"
    return done.stdout


def kubectl(host: Host, words: str) -> str:
    """What kubectl says on the control plane."""
    return sh(host, f"kubectl --kubeconfig /etc/kubernetes/admin.conf {words}")
