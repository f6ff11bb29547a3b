"""Three throw-away hosts, node0 to node2, that stay until they are ended.

    PYTHONPATH=tests python -m cluster.hosts up                 start them; a testbed that runs already is left alone
    PYTHONPATH=tests python -m cluster.hosts ssh node1          a shell there, or one command: ssh node1 sudo ctr -n k8s.io containers ls
    PYTHONPATH=tests python -m cluster.hosts status
    PYTHONPATH=tests python -m cluster.hosts down               end them and remove every trace

`inventory/testbed` reaches them: ansible-playbook site.yml -i inventory/testbed.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from throwaway.host import AS_ROOT, COMMAND_S_MAX, SSH_S_MAX, Host, HostError, as_root, make_keys, require_programs, tail
from throwaway.machine import PROGRAMS
from throwaway.roots import CACHE, ROOT_MADE_S_MAX, USER

from .keeper import READY
from .state import ADDRESSES, LOCK, folder

DOWN_S_MAX = 180.0


def hosts() -> dict[str, Host]:
    """The hosts by name, whether they run or not."""
    state = folder()
    pid = keeper_pid() or 0
    return {name: Host(name, address, USER, state / "login", state / "known_hosts", pid) for name, address in ADDRESSES.items()}


def keeper_pid() -> int | None:
    """The process that holds the hosts; None when none does."""
    ready = folder() / READY
    if not ready.exists() or not held():
        return None
    return int(ready.read_text(encoding="utf-8"))


def held() -> bool:
    """Whether somebody's testbed runs on this machine."""
    if not LOCK.exists():
        return False
    with LOCK.open(encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def up() -> dict[str, Host]:
    """Start the hosts and wait until each answers; the result is those that run. Raises HostError when they cannot be had."""
    require_programs({**PROGRAMS, "nft": "nftables"})
    state = folder()
    if keeper_pid() is not None:
        return hosts()
    if held():
        raise HostError("held", "cannot start test hosts", f"another testbed holds {LOCK}", "end it, as who started it")
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True, mode=0o700)
    make_keys(state, ADDRESSES)
    with (state / "keeper.log").open("wb") as log:
        keeper = subprocess.Popen(
            as_root(CACHE.parent, [sys.executable, "-m", "cluster.keeper", str(state)]),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    _await(keeper, state / READY)
    running = hosts()
    for host in running.values():
        _await_ssh(host, keeper)
    return running


def _await(keeper: subprocess.Popen[bytes], ready: Path) -> None:
    deadline = time.monotonic() + ROOT_MADE_S_MAX
    while not ready.exists():
        if keeper.poll() is not None or time.monotonic() > deadline:
            raise HostError("start", "cannot start test hosts", tail(ready.parent / "keeper.log"), f"see the logs in {ready.parent}")
        time.sleep(0.1)


def _await_ssh(host: Host, keeper: subprocess.Popen[bytes]) -> None:
    """Wait until the host has started everything. Raises HostError with the units that failed."""
    deadline = time.monotonic() + SSH_S_MAX
    while (answer := host.run("systemctl is-system-running --wait; systemctl list-units --failed --plain --no-legend")).returncode != 0:
        if keeper.poll() is not None or time.monotonic() > deadline:
            found = f"{answer.stderr.strip()}; its console ends: {tail(folder() / host.name / 'console.log')}"
            raise HostError("ssh", f"cannot log in to {host.name}", found, f"see the logs in {folder()}")
        time.sleep(0.2)
    if answer.stdout != "running\n":
        next_step = f"python -m cluster.hosts ssh {host.name} sudo journalctl --boot"
        raise HostError("degraded", f"cannot start all of {host.name}", " ".join(answer.stdout.split()), next_step)


def down() -> None:
    """End the hosts and remove what they left on this machine. Without any, what a killed testbed left. Raises HostError."""
    pid = keeper_pid()
    if pid is not None:
        kill = [*(AS_ROOT if os.geteuid() else ()), "sh", "-c", f"kill -{signal.SIGTERM} {pid}"]
        subprocess.run(kill, check=True, timeout=COMMAND_S_MAX)
        deadline = time.monotonic() + DOWN_S_MAX
        while held():
            if time.monotonic() > deadline:
                raise HostError("down", "cannot end the test hosts", f"process {pid} still runs", f"see {folder()}/keeper.log")
            time.sleep(0.1)
    cleaned = subprocess.run(
        as_root(CACHE.parent, [sys.executable, "-m", "cluster.keeper", "--clean"]),
        capture_output=True,
        text=True,
        check=False,
        timeout=DOWN_S_MAX,
    )
    if cleaned.returncode:
        raise HostError("down", "cannot remove what test hosts left", cleaned.stderr.strip(), f"see {folder()}/keeper.log")
    shutil.rmtree(folder(), ignore_errors=True)


def status() -> str:
    """One line a host."""
    if keeper_pid() is None:
        return f"no hosts; another's testbed holds {LOCK}" if held() else "no hosts"
    lines = []
    for name, host in hosts().items():
        answer = host.run("systemctl is-system-running; uptime --pretty")
        lines.append(f"{name} {host.address} {' '.join(answer.stdout.split()) or answer.stderr.strip()}")
    return "\n".join([*lines, f"state: {folder()}"])


def main() -> int:
    """Exit status 0; 3 with the reason when hosts cannot be had or ended; that of the command for `ssh`."""
    parser = argparse.ArgumentParser(prog="cluster.hosts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="start the hosts")
    commands.add_parser("down", help="end the hosts and remove every trace")
    commands.add_parser("status", help="what runs")
    ssh = commands.add_parser("ssh", help="a shell on a host, or one command")
    ssh.add_argument("name", choices=sorted(ADDRESSES))
    ssh.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    said = parser.parse_args()
    try:
        if said.command == "up":
            up()
            print(status())
        elif said.command == "down":
            down()
        elif said.command == "status":
            print(status())
        else:
            return subprocess.run(hosts()[said.name].ssh(*said.words), check=False).returncode
    except HostError as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        sys.exit(main())
