"""Fixtures of the site tests: Ansible run as a user runs it, with the checkout's own configuration. Nothing here skips."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from throwaway import output

ROOT = Path(__file__).resolve().parents[2]
PLAY_S_MAX = 900.0


@dataclass(frozen=True)
class Outcome:
    """What one run of Ansible came to: exit status, everything it printed, and the recap's counts by host."""

    status: int
    text: str

    def counts(self, host: str) -> dict[str, int]:
        """The recap of `host`; empty when it was never reached."""
        return output.recap(self.text).get(host, {})

    def changed_tasks(self) -> list[str]:
        """Names of the tasks that changed something, in order."""
        return output.changed(self.text)

    def end(self, lines: int = 60) -> str:
        """The last lines, for the message of a failed assertion."""
        return "\n".join(self.text.splitlines()[-lines:])


class Ansible:
    """Runs the checkout's Ansible from the checkout's root. Connections that it keeps open are closed by `close`."""

    def __init__(self, sockets: Path) -> None:
        self._sockets = sockets
        self._programs = Path(sys.executable).parent
        self._environment = {
            **os.environ,
            "PATH": f"{self._programs}:{os.environ.get('PATH', '')}",
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_SSH_CONTROL_PATH_DIR": str(sockets),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_FORCE_COLOR": "0",
            "LC_ALL": "C.UTF-8",
        }

    def play(self, playbook: Path | str, inventory: Path | str, *options: str) -> Outcome:
        """`ansible-playbook PLAYBOOK -i INVENTORY OPTIONS`, whatever its result."""
        return self._run("ansible-playbook", str(playbook), "-i", str(inventory), *options)

    def module(self, inventory: Path | str, name: str, arguments: str, *options: str) -> Outcome:
        """One module on every host of the inventory, as root."""
        return self._run("ansible", "all", "-i", str(inventory), "--become", "-m", name, "-a", arguments, *options)

    def _run(self, program: str, *arguments: str) -> Outcome:
        done = subprocess.run(
            [str(self._programs / program), *arguments],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=PLAY_S_MAX,
        )
        return Outcome(done.returncode, done.stdout)

    def close(self) -> None:
        """End the kept SSH connections, so that none outlives its host or is used past a changed host key."""
        for socket in self._sockets.iterdir():
            subprocess.run(["ssh", "-F", "none", "-o", f"ControlPath={socket}", "-O", "exit", "any"], check=False, capture_output=True, timeout=10)


@pytest.fixture(scope="module")
def ansible() -> Iterator[Ansible]:
    """Ansible with connection sockets of its own; their folder is short, because a socket's path has 107 bytes at most."""
    with tempfile.TemporaryDirectory(prefix="kst-") as sockets:
        runner = Ansible(Path(sockets))
        yield runner
        runner.close()


@pytest.fixture
def private_folder() -> Iterator[Path]:
    """A folder that only this user may enter, as SSH asks of the place of a private key."""
    with tempfile.TemporaryDirectory(prefix="kalium-site-") as folder:
        yield Path(folder)
