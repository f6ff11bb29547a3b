"""A host as who uses it sees it: reached over SSH with a key made for it, and a known_hosts that has its one key before it exists."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

SSH_S_MAX = 60.0
COMMAND_S_MAX = 60.0
AS_ROOT = ("sudo", "-n")  # for who is not root yet; never a prompt, because a test owns the terminal


class HostError(Exception):
    """A throw-away host cannot be had: what was attempted, what was found and the next step, in the product's two-line form."""

    def __init__(self, code: str, attempted: str, found: str, next_step: str) -> None:
        super().__init__(f"error[nspawn.{code}]: {attempted}: {found}\nnext: {next_step}")


@dataclass(frozen=True)
class Host:
    """A host that answers over SSH. `known_hosts` holds its one key, made by the test before the host was started."""

    name: str
    address: str
    user: str
    key: Path
    known_hosts: Path
    root_half_pid: int

    def ssh_options(self) -> list[str]:
        """Options of `ssh` and of Ansible's connection: this key, this known_hosts and nothing of the person who runs the test."""
        return [
            *("-F", "none"),
            *("-o", "StrictHostKeyChecking=yes"),
            *("-o", f"UserKnownHostsFile={self.known_hosts}"),
            *("-o", "GlobalKnownHostsFile=/dev/null"),
            *("-o", "IdentitiesOnly=yes"),
            *("-o", "IdentityAgent=none"),
            *("-o", "BatchMode=yes"),
        ]

    def inventory_variables(self) -> dict[str, str]:
        """How Ansible reaches the host."""
        return {
            "ansible_host": self.address,
            "ansible_user": self.user,
            "ansible_ssh_private_key_file": str(self.key),
            "ansible_ssh_common_args": " ".join(self.ssh_options()),
        }

    def ssh(self, *command: str) -> list[str]:
        """The command line that runs a shell command line on the host as the ordinary user; without words, a shell."""
        words = ("--", *command) if command else ()
        return ["ssh", *self.ssh_options(), "-o", "ConnectTimeout=5", "-i", str(self.key), f"{self.user}@{self.address}", *words]

    def run(self, *command: str, timeout_s: float = COMMAND_S_MAX) -> subprocess.CompletedProcess[str]:
        """Run a shell command line on the host as the ordinary user; the words are joined as ssh joins them."""
        return subprocess.run(self.ssh(*command), capture_output=True, text=True, check=False, timeout=timeout_s)

    def reboot(self) -> None:
        """Restart the host and wait until its init says that everything has been started. Raises HostError at the deadline."""
        boot_id = "/proc/sys/kernel/random/boot_id"
        before = self.run("cat", boot_id).stdout
        self.run("sudo systemctl reboot")
        deadline = time.monotonic() + SSH_S_MAX
        while (now := self.run("cat", boot_id)).returncode != 0 or now.stdout == before:
            if time.monotonic() > deadline:
                raise HostError("reboot", f"cannot restart host {self.name}", now.stderr.strip() or "it still runs", "see its console log")
            time.sleep(0.1)
        self.run("systemctl is-system-running --wait")


def make_key(path: Path) -> str:
    """Make an Ed25519 key pair at `path` and `path`.pub; the result is the public key's type and data."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True, timeout=COMMAND_S_MAX)
    return path.with_suffix(".pub").read_text(encoding="utf-8").strip()


def make_keys(folder: Path, addresses: Mapping[str, str]) -> None:
    """Make in `folder` the key `login`, `authorized_keys`, a host key `NAME/host_key` for each name, and their `known_hosts`."""
    (folder / "authorized_keys").write_text(make_key(folder / "login") + "\n", encoding="utf-8")
    lines = []
    for name, address in addresses.items():
        (folder / name).mkdir(mode=0o700)
        lines.append(f"{address} {make_key(folder / name / 'host_key')}\n")
    (folder / "known_hosts").write_text("".join(lines), encoding="utf-8")


def require_programs(packages: Mapping[str, str]) -> None:
    """Raise HostError with the packages of every missing program in one list. `packages` has each program's package."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = sorted({package for program, package in packages.items() if not shutil.which(program, path=path)})
    if missing:
        raise HostError(
            "programs", "cannot start a test host", "packages are missing: " + " ".join(missing), f"sudo apt-get install {' '.join(missing)}"
        )


def as_root(cache: Path, words: Iterable[str]) -> list[str]:
    """The command as root, in a mount namespace of its own, with the cache and the programs that this process has."""
    command = ["unshare", "--mount", "--propagation", "private", *words]
    path = f"PATH={os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    settings = [f"KALIUM_CACHE={cache}", path, f"PYTHONPATH={Path(__file__).resolve().parents[1]}", "PYTHONDONTWRITEBYTECODE=1"]
    return [*(AS_ROOT if os.geteuid() else ()), "env", *settings, *command]


def tail(path: Path, lines: int = 5) -> str:
    """The last lines of a log as one line."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return " / ".join(text.strip().splitlines()[-lines:]) or f"nothing in {path.name}"
