"""The root half of the testbed: a process that holds three hosts and their network until it is told to end, or is killed.

    python -m cluster.keeper FOLDER          as root in a mount namespace of its own; `cluster.hosts up` starts it
    python -m cluster.keeper --clean         removes what a killed one could not

Everything lives in namespaces of this process: when it dies the kernel ends the hosts, their network and their mounts. What then is left are
files and empty control groups, which the next start or `--clean` removes.

The hosts are on one bridge in a network namespace of its own, with this machine at its other end of a link. The namespace is also their
router: it alone translates addresses, towards a user-mode network stack that reaches what this machine's programs reach.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import Popen

from throwaway.host import HostError
from throwaway.machine import (
    UPLINK,
    UPLINK_NAMES,
    kept_running,
    machine,
    namespace,
    own_cgroups,
    package_caches,
    remove_cgroups,
    require_unrouted,
    uplink,
)
from throwaway.roots import CACHE, copy_of_root, personalise, require_memory, run

from .state import ADDRESSES, LOCK, MACHINE_ADDRESS, MACHINE_LINK, PREFIX, ROUTER_ADDRESS, RUNNING, SUBNET

MEMORY_GIB_MIN = 6.0  # a control plane holds about 1.5, each host with its functions less
DISK_GIB_MIN = 12.0
BRIDGE, BRIDGE_END = "lan0", "machine0"
READY = "ready"

# A kubelet writes a kernel flag only when it has another value: it is shown these, so that the setting of the machine below stays what it is.
SHOWN = {"vm.overcommit_memory": 1, "vm.panic_on_oom": 0, "kernel.panic": 10, "kernel.panic_on_oops": 1}
# What systemd-nspawn keeps from a host that a machine has: control groups of its own to write, and mounts that are shared. This is before
# init because units that start while control groups become writable fail now and then.
LIKE_A_MACHINE = """\
set -e
for group in /sys/fs/cgroup/*/; do mount -o remount,bind,rw "$group"; done
mount --make-rshared /
mkdir /run/shown
for setting; do
    file=/run/shown/${setting%%=*}
    echo "${setting#*=}" >"$file"
    mount --bind "$file" "/proc/sys/$(echo "${setting%%=*}" | tr . /)"
done
exec /lib/systemd/systemd
"""
INIT = ("/bin/sh", "-c", LIKE_A_MACHINE, "init", *(f"{name}={value}" for name, value in SHOWN.items()))


def archives_of(name: str) -> Path:
    """Where host `name` keeps the Debian packages it downloads."""
    return RUNNING / name / "apt"


def lend_packages(name: str) -> None:
    """Let a host begin with every package that hosts downloaded before, without a copy."""
    archives = archives_of(name)
    archives.mkdir()
    for package in (CACHE / "apt").glob("*.deb"):
        (archives / package.name).hardlink_to(package)


def keep_packages(name: str) -> None:
    """Keep what a host downloaded for those after it."""
    for package in archives_of(name).glob("*.deb"):
        with contextlib.suppress(FileExistsError):
            (CACHE / "apt" / package.name).hardlink_to(package)


@contextlib.contextmanager
def network(place: Path) -> Iterator[tuple[Path, Callable[..., None]]]:
    """The hosts' network: a bridge that routes, with this machine on it and a way to the registries behind it."""
    require_unrouted(SUBNET)
    path = place / "lan"
    with namespace(path) as inside:
        # Its other end goes with the namespace that holds it.
        run("ip", "link", "add", MACHINE_LINK, "type", "veth", "peer", "name", BRIDGE_END, "netns", str(path))
        run("ip", "address", "add", f"{MACHINE_ADDRESS}/{PREFIX}", "dev", MACHINE_LINK)
        run("ip", "link", "set", MACHINE_LINK, "up")
        try:
            inside("ip", "link", "add", BRIDGE, "type", "bridge", "forward_delay", "0")
            inside("ip", "address", "add", f"{ROUTER_ADDRESS}/{PREFIX}", "dev", BRIDGE)
            inside("ip", "link", "set", BRIDGE_END, "master", BRIDGE)
            for link in (BRIDGE, BRIDGE_END):
                inside("ip", "link", "set", link, "up")
            inside("sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward")
            inside("nft", "add table ip uplink; add chain ip uplink out { type nat hook postrouting priority srcnat; }")
            inside("nft", f"add rule ip uplink out oifname {UPLINK} masquerade")
            with uplink(path):
                yield path, inside
        finally:
            run("ip", "link", "delete", MACHINE_LINK)


@contextlib.contextmanager
def booted(name: str, folder: Path, lan: Path, in_lan: Callable[..., None]) -> Iterator[Popen[bytes]]:
    """One start of a host. Its network namespace is new each time, as a machine's network is."""
    place = RUNNING / name
    path = place / "netns"
    with namespace(path) as inside:
        inside("ip", "link", "add", "host0", "type", "veth", "peer", "name", name, "netns", str(lan))
        in_lan("ip", "link", "set", name, "master", BRIDGE, "up")
        inside("ip", "address", "add", f"{ADDRESSES[name]}/{PREFIX}", "dev", "host0")
        inside("ip", "link", "set", "host0", "up")
        inside("ip", "route", "add", "default", "via", ROUTER_ADDRESS)
        binds = {**package_caches(archives_of(name)), Path("/dev/kmsg"): "/dev/kmsg"}
        try:
            with machine(name, place / "root", path, folder / name, binds, INIT) as process:
                yield process
        finally:
            in_lan("ip", "link", "delete", name)


def clean() -> None:
    """Remove files and control groups of hosts that nobody holds any more."""
    for name in ADDRESSES:
        remove_cgroups(own_cgroups(name))
        if archives_of(name).is_dir():
            keep_packages(name)
    if RUNNING.exists():
        shutil.rmtree(RUNNING)


def prepare(folder: Path) -> None:
    """Make the files of every host."""
    (CACHE / "apt").mkdir(exist_ok=True)
    for name in ADDRESSES:
        place = RUNNING / name
        place.mkdir(parents=True)
        # On this machine's own disk: a kubelet asks what a folder is stored on, and containers' overlays do not nest.
        copy_of_root(place / "root")
        personalise(place / "root", folder, name, ADDRESSES, UPLINK_NAMES)
        # The file system below is this machine's: no host may change how that is mounted.
        (place / "root/etc/systemd/system/systemd-remount-fs.service").symlink_to("/dev/null")
        lend_packages(name)


def require_disk() -> None:
    """Raise HostError when hosts would fill the disk."""
    free = shutil.disk_usage(CACHE).free / 1024**3
    if free < DISK_GIB_MIN:
        raise HostError("disk", "cannot start test hosts", f"{free:.1f} GiB are free in {CACHE}, {DISK_GIB_MIN} GiB are needed", "remove something")


@contextlib.contextmanager
def held() -> Iterator[None]:
    """The only testbed of this machine."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with LOCK.open("a", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            found = f"another testbed holds {LOCK}"
            raise HostError("held", "cannot start test hosts", found, "python -m cluster.hosts down, as who started it") from None
        yield


def serve(folder: Path) -> None:
    """Run the hosts until SIGTERM. `folder` has their keys; its file READY appears when all are starting."""
    with held():
        require_memory(MEMORY_GIB_MIN)
        require_disk()
        clean()
        try:
            prepare(folder)
            with network(RUNNING) as (lan, in_lan):
                boots = {name: partial(booted, name, folder, lan, in_lan) for name in ADDRESSES}
                with kept_running(boots) as look:
                    (folder / READY).write_text(f"{os.getpid()}\n", encoding="utf-8")
                    while True:
                        look()
                        time.sleep(0.2)
        finally:
            clean()


def main() -> int:
    """Exit 0 after SIGTERM, 3 when the hosts could not be had or one of them ended by itself."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # A terminal that goes away or interrupts what started this does not end it.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    try:
        if sys.argv[1] == "--clean":
            with held():
                clean()
        else:
            serve(Path(sys.argv[1]))
    except HostError as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
