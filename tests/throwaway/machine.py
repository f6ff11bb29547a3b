"""The root half: a host's processes, control groups and way to the registries. What is here ends with the process that began it."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from .host import HostError
from .roots import APT_ARCHIVES, CACHE, PIP_CACHE, run

ENDED_S_MAX = 30.0
REBOOTED = 133  # nspawn's exit status when the host asked for a restart and nspawn may not make one itself
# The addresses that slirp4netns gives by itself; the second is its own name server, which asks the machine's.
UPLINK, UPLINK_NAMES = "uplink0", "10.0.2.3"
PROGRAMS = {
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "slirp4netns": "slirp4netns",
    "setpriv": "util-linux",
    "ssh-keygen": "openssh-client",
    "ip": "iproute2",
}


def own_cgroups(name: str) -> dict[Path, Mapping[str, str]]:
    """One control group of each hierarchy for host `name`, with the values a `cpuset` group needs before it takes a process.

    systemd-nspawn makes the group it is started in the root of the host's tree. Where systemd runs the machine it is started in a scope of
    systemd's instead, and the result is empty.
    """
    if Path("/run/systemd/system").is_dir():
        return {}
    groups: dict[Path, Mapping[str, str]] = {}
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        # The one of version 2 beside them holds no controller, but hosts that shared it would end each other's services.
        base = Path("/sys/fs/cgroup") / (controllers.removeprefix("name=") or "unified") / path.strip("/")
        if base.is_dir():
            names = ("cpuset.cpus", "cpuset.mems") if controllers == "cpuset" else ()
            groups[base / name] = {key: (base / key).read_text(encoding="utf-8") for key in names}
    return groups


def remove_cgroups(groups: Mapping[Path, Mapping[str, str]]) -> None:
    """Remove the host's groups, inner ones first. Their processes are dead or dying: the kernel may need a moment to let go."""
    deadline = time.monotonic() + ENDED_S_MAX
    for group in groups:
        while group.is_dir():
            for path, _, _ in os.walk(group, topdown=False):
                with contextlib.suppress(OSError):  # still busy: the loop asks again until the deadline
                    Path(path).rmdir()
            if group.is_dir():
                if time.monotonic() > deadline:
                    raise HostError("cgroup", f"cannot remove {group}", "it still has processes", f"see {group}/cgroup.procs")
                time.sleep(0.05)


def ending_with_us(*command: str) -> list[str]:
    """The command, killed by the kernel when this process ends."""
    return ["setpriv", "--pdeathsig", "KILL", *command]


@contextlib.contextmanager
def namespace(path: Path) -> Iterator[Callable[..., None]]:
    """A network namespace that the file `path` holds; yields what runs a command in it."""
    path.touch()
    run("unshare", f"--net={path}", "true")

    def inside(*command: str) -> None:
        run("nsenter", f"--net={path}", *command)

    try:
        inside("ip", "link", "set", "lo", "up")
        yield inside
    finally:
        run("umount", str(path))


def require_unrouted(subnet: str) -> None:
    """Raise HostError when this machine already knows a way to the hosts' addresses."""
    if taken := run("ip", "route", "show", "root", subnet):
        raise HostError("subnet", f"cannot use {subnet} for test hosts", f"this machine routes {taken.strip()}", "remove that route")


@contextlib.contextmanager
def uplink(path: Path) -> Iterator[None]:
    """Give the network namespace at `path` a default route to where this machine's own programs get, and nowhere on its loopback."""
    read_end, write_end = os.pipe()
    slirp = subprocess.Popen(
        ending_with_us(
            *("slirp4netns", "--configure", "--mtu=65520", "--disable-host-loopback", f"--ready-fd={write_end}"),
            *("--netns-type=path", str(path), UPLINK),
        ),
        pass_fds=[write_end],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
        start_new_session=True,
    )
    os.close(write_end)
    try:
        with os.fdopen(read_end, "rb") as ready:
            if not ready.read(1):
                raise HostError("uplink", "cannot give the test host a way to the registries", "slirp4netns ended", "see its message above")
        yield
    finally:
        slirp.kill()
        slirp.wait(timeout=ENDED_S_MAX)


def package_caches(archives: Path) -> dict[Path, str]:
    """Folders of the machine that a host keeps downloaded packages in, with their paths there. apt locks its own, so hosts share none."""
    pip = CACHE / "pip"
    for folder in (archives / "partial", pip):
        folder.mkdir(parents=True, exist_ok=True)
    return {archives: f"/{APT_ARCHIVES}", pip: f"/{PIP_CACHE}"}


@contextlib.contextmanager
def machine(
    name: str, root: Path, network: Path, folder: Path, binds: Mapping[Path, str], init: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """Boot the copy at `root` on the network namespace `network`; yields the systemd-nspawn process. Its console goes to `folder`.

    `binds` are folders and devices of this machine with their paths on the host. `init` is a command in place of the host's init; it ends by
    becoming that.
    """
    groups = own_cgroups(name)
    remove_cgroups(groups)
    for group, values in groups.items():
        group.mkdir()
        for key, value in values.items():
            (group / key).write_text(value, encoding="utf-8")
    nspawn = (
        *("systemd-nspawn", "--quiet", f"--directory={root}", f"--machine={name}", f"--hostname={name}"),
        *(f"--network-namespace-path={network}", "--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=pipe"),
        # Roles set up bridges and run sandboxes on a host; a real one would not be filtered.
        *("--capability=all", "--system-call-filter=@known", "--register=no", "--keep-unit"),
        *(f"--bind={path}:{place}" for path, place in binds.items()),
        *(init or ("--boot",)),
    )
    # nspawn cannot ask for a scope of its own: it would name itself by its number in the namespace below, which systemd does not know.
    scope = () if groups else ("systemd-run", "--scope", "--quiet", "--collect", f"--slice={name}.slice", "--property=Delegate=yes")
    joining = 'for group in $GROUPS_TO_JOIN; do echo $$ >"$group/cgroup.procs" || exit 1; done; exec "$@"'
    with (folder / "console.log").open("ab") as console:
        owner = pwd.getpwuid(folder.stat().st_uid)  # the console is for the person who runs the test
        os.fchown(console.fileno(), owner.pw_uid, owner.pw_gid)
        booted = subprocess.Popen(
            # An init outlives a killed nspawn. As the first process of a namespace nspawn takes all others with it.
            ending_with_us("sh", "-c", joining, "sh", *scope, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *nspawn),
            env={**os.environ, "GROUPS_TO_JOIN": " ".join(str(group) for group in groups), "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network"},
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield booted
    finally:
        kill(booted)
        booted.wait(timeout=ENDED_S_MAX)
        remove_cgroups(groups)


def kill(booted: subprocess.Popen[bytes]) -> None:
    """Have a host end: nothing on it is worth an orderly shutdown.

    nspawn ends after all in its namespace, and `unshare`, whose child it is, after it.
    """
    child = Path(f"/proc/{booted.pid}/task/{booted.pid}/children")
    inner = child.read_text(encoding="ascii").split() if booted.poll() is None else []
    for pid in [int(pid) for pid in inner] or [booted.pid]:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def kept_running(boots: Mapping[str, Callable[[], AbstractContextManager[subprocess.Popen[bytes]]]]) -> Iterator[Callable[[], None]]:
    """Boot every host; what is yielded has to be called again and again: it starts a host anew that asked for it.

    It raises HostError when one ended by itself.
    """
    with contextlib.ExitStack() as ends:
        running = {name: ends.enter_context(contextlib.closing(_Running(boot))) for name, boot in boots.items()}
        for host in running.values():
            ends.callback(host.kill)  # before the first is waited for: each takes seconds to let go of what ran on it

        def look() -> None:
            for name, host in running.items():
                status = host.status()
                if status == REBOOTED:
                    host.start()
                elif status is not None:
                    raise HostError("ended", f"host {name} ended by itself", f"exit {status}", "see its console.log")

        yield look


class _Running:
    """One host that may be booted several times."""

    def __init__(self, boot: Callable[[], AbstractContextManager[subprocess.Popen[bytes]]]) -> None:
        self._boot = boot
        self._end = contextlib.ExitStack()
        self.start()

    def start(self) -> None:
        self._end.close()
        self._process = self._end.enter_context(self._boot())

    def status(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        kill(self._process)

    def close(self) -> None:
        self._end.close()
