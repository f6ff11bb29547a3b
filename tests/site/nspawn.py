"""One throw-away host for the roles.

The test's half, `host_running`, makes the keys, starts this file again as root and asks SSH until the host answers. The root half, `main`,
owns everything that needs privileges. It lives in a mount namespace of its own and ends when its standard input does, so the host goes away
with the test however the test ends: processes by their parent-death signal, mounts and network with the namespaces that hold them.

The host reaches package registries as this machine does, through a user-mode network stack: no forwarding, address translation or firewall
rule is set up on the machine. It reaches nothing on the machine's loopback.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from throwaway.host import SSH_S_MAX, Host, HostError, as_root, make_keys, require_programs, tail
from throwaway.machine import ENDED_S_MAX, PROGRAMS, UPLINK_NAMES, kept_running, machine, namespace, package_caches, require_unrouted, uplink
from throwaway.roots import CACHE, ROOT_MADE_S_MAX, USER, copy_of_root, personalise, require_memory, run

NAME = "kalium-site-host"
HOST_ADDRESS, TEST_ADDRESS, PREFIX = "10.138.0.2", "10.138.0.1", 24
SUBNET = "10.138.0.0/24"
TEST_LINK = "kalium-test0"

TURN_S_MAX = 1800.0  # another run on this machine is waited for: one host at a time keeps a small machine usable for others
ROOT_GIB_MAX = 16
MEMORY_GIB_MIN = 3.0  # of which a host with all roles holds about a half


# The test's half ----------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def host_running(folder: Path) -> Iterator[Host]:
    """Start a host, yield it when SSH answers, end it afterwards.

    `folder` is the caller's, empty and private; keys, the console log and the log of the root half are left there for the caller to show.
    Raises HostError when the host cannot be started or does not answer in time.
    """
    require_programs(PROGRAMS)
    make_keys(folder, {NAME: HOST_ADDRESS})
    with (folder / "root-half.log").open("wb") as log:
        root_half = subprocess.Popen(
            as_root(CACHE.parent, [sys.executable, str(Path(__file__).resolve()), str(folder)]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert root_half.stdin is not None and root_half.stdout is not None
    try:
        ready, _, _ = select.select([root_half.stdout], [], [], TURN_S_MAX + ROOT_MADE_S_MAX)
        said = root_half.stdout.readline().split() if ready else []
        if said[:1] != [b"started"]:
            raise HostError("start", f"cannot start host {NAME}", tail(folder / "root-half.log"), f"see the logs in {folder}")
        host = Host(NAME, HOST_ADDRESS, USER, folder / "login", folder / "known_hosts", int(said[1]))
        _await_ssh(host, root_half, folder)
        yield host
    finally:
        root_half.stdin.close()
        root_half.stdout.close()
        ended: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):  # None says it below
            ended = root_half.wait(timeout=2 * ENDED_S_MAX)
    if ended != 0:
        raise HostError("end", f"cannot end host {NAME}", f"exit {ended}: {tail(folder / 'root-half.log')}", f"see the logs in {folder}")


def _await_ssh(host: Host, root_half: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + SSH_S_MAX
    while (answer := host.run("true")).returncode != 0:
        if root_half.poll() is not None or time.monotonic() > deadline:
            found = f"{answer.stderr.strip()}; its console ends: {tail(folder / NAME / 'console.log')}"
            raise HostError("ssh", f"cannot log in to {host.address}", found, f"see the logs in {folder}")
        time.sleep(0.1)


# The root half ------------------------------------------------------------------------------------------------------------------------------


def stopped(wait_s: float = 0.0) -> bool:
    """Whether the test's half has closed our standard input; waits for it up to `wait_s`."""
    readable, _, _ = select.select([sys.stdin], [], [], wait_s)
    return bool(readable)


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Hold the only turn to run a host on this machine."""
    with (CACHE / "turn").open("w", encoding="utf-8") as lock:
        deadline = time.monotonic() + TURN_S_MAX
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if stopped(0.5):
                    raise SystemExit(0) from None
                if time.monotonic() > deadline:
                    found = f"another run has held {lock.name} for {TURN_S_MAX:.0f} s"
                    raise HostError("turn", "cannot start a test host", found, "wait for the other run to end, then repeat") from None
        yield


@contextlib.contextmanager
def network(place: Path) -> Iterator[Path]:
    """A network namespace with a link to the test and a way to the registries; yields the file that holds it."""
    require_unrouted(SUBNET)
    path = place / "netns"
    with namespace(path) as inside:
        run("ip", "link", "add", TEST_LINK, "type", "veth", "peer", "name", "host0", "netns", str(path))
        try:
            run("ip", "address", "add", f"{TEST_ADDRESS}/{PREFIX}", "dev", TEST_LINK)
            run("ip", "link", "set", TEST_LINK, "up")
            inside("ip", "address", "add", f"{HOST_ADDRESS}/{PREFIX}", "dev", "host0")
            inside("ip", "link", "set", "host0", "up")
            with uplink(path):
                yield path
        finally:
            run("ip", "link", "delete", TEST_LINK)


def serve(folder: Path) -> None:
    """Run a host until the test's half closes our standard input. Raises HostError; leaves the console log in `folder`."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with turn():
        require_memory(MEMORY_GIB_MIN)
        place = CACHE / "running"
        place.mkdir(exist_ok=True)
        # Copied into memory: many times faster than a disk, and gone with this process's mount namespace. An overlay would be faster still,
        # but what runs on the host makes overlays of its own, and those do not nest. The size is a bound, and what pre-flight sees as free.
        run("mount", "-t", "tmpfs", "-o", f"size={ROOT_GIB_MAX}g,mode=0755", NAME, str(place))
        try:
            root = place / "root"
            copy_of_root(root)
            personalise(root, folder, NAME, {NAME: HOST_ADDRESS}, UPLINK_NAMES)
            with network(place) as path:
                print("started", os.getpid(), flush=True)
                boot = partial(machine, NAME, root, path, folder / NAME, package_caches(CACHE / "apt"))
                with kept_running({NAME: boot}) as look:
                    while not stopped(0.1):
                        look()
        finally:
            run("umount", str(place))


def main() -> int:
    """`nspawn.py FOLDER`, as root in a mount namespace of its own; exit 0 when the test's half ended it, 3 when the host could not be had."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    # A Ctrl-C is for the test's half, which then closes our input. A session of our own is no way: sudo remembers its answer for one session.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        serve(Path(sys.argv[1]))
    except HostError as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
