"""A throw-away host for the roles: a systemd-nspawn container with its own init, network and SSH server.

The test's half, `host_running`, makes the keys, starts this file again as root and asks SSH until the host answers. The root half, `main`,
owns everything that needs privileges. It lives in a mount namespace of its own and ends when its standard input does, so the host goes away
with the test however the test ends: processes by their parent-death signal, mounts and network with the namespaces that hold them.

The host reaches package registries as this machine does, through a user-mode network stack: no forwarding, address translation or firewall
rule is set up on the machine. It reaches nothing on the machine's loopback.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import pwd
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# What a provider's image has at least: an init system, a way in, the distribution's Python and sudo. Everything else is the roles' to install.
PACKAGES = ("systemd", "dbus", "openssh-server", "python3", "sudo", "iproute2", "ca-certificates")
NAME = "kalium-site-host"
USER = "siteadmin"
HOST_ADDRESS, TEST_ADDRESS, PREFIX = "10.138.0.2", "10.138.0.1", 24
SUBNET = "10.138.0.0/24"
TEST_LINK = "kalium-test0"
# The addresses that slirp4netns gives by itself; the second is its own name server, which asks the machine's.
UPLINK, UPLINK_NAMES = "uplink0", "10.0.2.3"

ROOT_MADE_S_MAX = 900.0
TURN_S_MAX = 1800.0  # another run on this machine is waited for: one host at a time keeps a small machine usable for others
SSH_S_MAX = 60.0
ENDED_S_MAX = 30.0
REBOOTED = 133  # nspawn's exit status when the host asked for a restart and nspawn may not make one itself
COMMAND_S_MAX = 60.0
ROOT_GIB_MAX = 16
MEMORY_GIB_MIN = 3.0  # of which a host with all roles holds about a half


def cache() -> Path:
    """Where root keeps the root file system and packages: the project's cache, but never below a folder that is a user's own."""
    chosen = Path(os.environ.get("KALIUM_CACHE", "/var/cache/kalium"))
    existing = next(folder for folder in (chosen, *chosen.parents) if folder.is_dir())
    return (chosen if existing.stat().st_uid == 0 else Path("/var/cache/kalium")) / "nspawn"


CACHE = cache()
AS_ROOT = ("sudo", "-n")  # for who is not root yet; never a prompt, because pytest owns the terminal
PROGRAMS = {
    "systemd-nspawn": "systemd-container",
    "mmdebstrap": "mmdebstrap",
    "slirp4netns": "slirp4netns",
    "setpriv": "util-linux",
    "ssh-keygen": "openssh-client",
    "ip": "iproute2",
}


class HostError(Exception):
    """The throw-away host cannot be had: what was attempted, what was found and the next step, in the product's two-line form."""

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

    def run(self, *command: str, timeout_s: float = COMMAND_S_MAX) -> subprocess.CompletedProcess[str]:
        """Run a shell command line on the host as the ordinary user; the words are joined as ssh joins them."""
        ssh = ["ssh", *self.ssh_options(), "-o", "ConnectTimeout=5", "-i", str(self.key), f"{self.user}@{self.address}", "--", *command]
        return subprocess.run(ssh, capture_output=True, text=True, check=False, timeout=timeout_s)

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


# The test's half ----------------------------------------------------------------------------------------------------------------------------


def make_key(path: Path) -> str:
    """Make an Ed25519 key pair at `path` and `path`.pub; the result is the public key's type and data."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True, timeout=COMMAND_S_MAX)
    return path.with_suffix(".pub").read_text(encoding="utf-8").strip()


def require_programs() -> None:
    """Raise HostError with the packages of every missing program in one list."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    missing = sorted({package for program, package in PROGRAMS.items() if not shutil.which(program, path=path)})
    if missing:
        raise HostError(
            "programs", "cannot start a test host", "packages are missing: " + " ".join(missing), f"sudo apt-get install {' '.join(missing)}"
        )


@contextlib.contextmanager
def host_running(folder: Path) -> Iterator[Host]:
    """Start a host, yield it when SSH answers, end it afterwards.

    `folder` is the caller's, empty and private; keys, the console log and the log of the root half are left there for the caller to show.
    Raises HostError when the host cannot be started or does not answer in time.
    """
    require_programs()
    login, host_key = make_key(folder / "login"), make_key(folder / "host_key")
    known_hosts = folder / "known_hosts"
    known_hosts.write_text(f"{HOST_ADDRESS} {host_key}\n", encoding="utf-8")
    (folder / "authorized_keys").write_text(login + "\n", encoding="utf-8")
    command = ["unshare", "--mount", "--propagation", "private", sys.executable, str(Path(__file__).resolve()), str(folder)]
    if os.geteuid() != 0:
        command = [*AS_ROOT, f"KALIUM_CACHE={CACHE.parent}", f"PATH={os.environ.get('PATH', '')}:/usr/sbin:/sbin", *command]
    with (folder / "root-half.log").open("wb") as log:
        root_half = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    assert root_half.stdin is not None and root_half.stdout is not None
    try:
        ready, _, _ = select.select([root_half.stdout], [], [], TURN_S_MAX + ROOT_MADE_S_MAX)
        said = root_half.stdout.readline().split() if ready else []
        if said[:1] != [b"started"]:
            raise HostError("start", f"cannot start host {NAME}", _tail(folder / "root-half.log"), f"see the logs in {folder}")
        host = Host(NAME, HOST_ADDRESS, USER, folder / "login", known_hosts, int(said[1]))
        _await_ssh(host, root_half, folder)
        yield host
    finally:
        root_half.stdin.close()
        root_half.stdout.close()
        ended: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):  # None says it below
            ended = root_half.wait(timeout=2 * ENDED_S_MAX)
    if ended != 0:
        raise HostError("end", f"cannot end host {NAME}", f"exit {ended}: {_tail(folder / 'root-half.log')}", f"see the logs in {folder}")


def _await_ssh(host: Host, root_half: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + SSH_S_MAX
    while (answer := host.run("true")).returncode != 0:
        if root_half.poll() is not None or time.monotonic() > deadline:
            found = f"{answer.stderr.strip()}; its console ends: {_tail(folder / 'console.log')}"
            raise HostError("ssh", f"cannot log in to {host.address}", found, f"see the logs in {folder}")
        time.sleep(0.1)


def _tail(path: Path, lines: int = 5) -> str:
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return " / ".join(text.strip().splitlines()[-lines:]) or f"nothing in {path.name}"


# The root half ------------------------------------------------------------------------------------------------------------------------------


def run(*command: str, timeout_s: float = COMMAND_S_MAX, stdin: str | None = None) -> str:
    """Run a command that has to succeed and return its output; HostError carries what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s, input=stdin)
    if done.returncode != 0:
        said = " / ".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise HostError("command", f"cannot run {' '.join(command)[:200]}", f"exit {done.returncode}: {said}", "see the message above")
    return done.stdout


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


def release_of_this_machine() -> tuple[str, str]:
    """(identity, code name) of the machine's distribution, such as ("debian", "bookworm")."""
    lines = Path("/etc/os-release").read_text(encoding="utf-8").splitlines()
    values = {name: value.strip('"') for name, _, value in (line.partition("=") for line in lines)}
    return values["ID"], values["VERSION_CODENAME"]


def sources_of_this_machine() -> str:
    """The machine's own package sources that belong to its distribution, one `deb` line each; other parties' repositories stay out."""
    identity, _ = release_of_this_machine()
    asked = ("apt-get", "indextargets", "--format", "$(ORIGIN) deb $(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages")
    own = [line.partition(" ")[2] for line in run(*asked).splitlines() if line.lower().startswith(identity + " ")]
    if not own:
        raise HostError("sources", "cannot make a root file system", f"apt knows no package list of {identity}", "sudo apt-get update")
    return "".join(line + "\n" for line in dict.fromkeys(own))


def trusted_here() -> dict[str, bytes]:
    """Certificate authorities that the machine's administrator added, by file name: the host trusts the same ones."""
    return {path.name: path.read_bytes() for path in sorted(Path("/usr/local/share/ca-certificates").glob("*.crt"))}


def settings_of_package_tools() -> dict[str, str]:
    """Files that make the host's apt and pip reach the registries as this machine's do, by path relative to the root."""
    proxies = [line for line in run("apt-config", "dump").splitlines() if "::Proxy " in line]
    kept = ("cert", "index-url", "extra-index-url", "trusted-host", "proxy", "default-timeout", "timeout")
    pip = []
    for line in run(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        key = name.rpartition(".")[2]
        if key in kept:
            pip.append(f"{key} = {value.strip()[1:-1]}")
    return {
        "etc/apt/apt.conf.d/90-test-host": "".join(line + "\n" for line in ['APT::Keep-Downloaded-Packages "true";', *proxies]),
        "etc/pip.conf": "[global]\n" + "".join(line + "\n" for line in dict.fromkeys(pip)),
        # Nothing on this host has to survive a power cut, and a shared disk is slow at being asked.
        "etc/dpkg/dpkg.cfg.d/90-test-host": "force-unsafe-io\n",
    }


def require_memory() -> None:
    """Raise HostError when the machine cannot spare what the host's files take."""
    line = next(line for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines() if line.startswith("MemAvailable:"))
    available = int(line.split()[1]) / 1024**2
    if available < MEMORY_GIB_MIN:
        found = f"{available:.1f} GiB of memory are available, {MEMORY_GIB_MIN} GiB are needed"
        raise HostError("memory", "cannot start a test host", found, "end something else, or use a larger machine")


def root_made() -> Path:
    """The root file system that hosts are copies of: made once for what goes into it, under a name that is the digest of it."""
    _, codename = release_of_this_machine()
    sources, trusted, settings = sources_of_this_machine(), trusted_here(), settings_of_package_tools()
    parts = [inspect.getsource(root_made), USER, *PACKAGES, sources, json.dumps(settings), *(f"{k} {v!r}" for k, v in trusted.items())]
    made = CACHE / "roots" / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    if made.is_dir():
        return made
    print(f"making a {codename} root file system, about half a minute", file=sys.stderr, flush=True)
    shutil.rmtree(made.parent, ignore_errors=True)  # what an interrupted run or an earlier version left
    growing = made.with_suffix(".growing")
    growing.parent.mkdir(parents=True)
    run(
        *("mmdebstrap", "--variant=minbase", "--include=" + ",".join(PACKAGES), codename, str(growing), "-"),
        stdin=sources,
        timeout_s=ROOT_MADE_S_MAX,
    )
    for name, certificate in trusted.items():
        (growing / "usr/local/share/ca-certificates" / name).write_bytes(certificate)
    run("chroot", str(growing), "update-ca-certificates")
    for name, text in settings.items():
        (growing / name).write_text(text, encoding="utf-8")
    run("chroot", str(growing), "useradd", "--create-home", "--shell", "/bin/bash", USER)
    (growing / "etc/sudoers.d" / USER).write_text(f"{USER} ALL=(ALL) NOPASSWD: ALL\n", encoding="utf-8")
    for key in (growing / "etc/ssh").glob("ssh_host_*"):
        key.unlink()  # the one host key is the test's
    # The distribution's own timed upgrades would hold the package lock at a moment of their choosing.
    run("systemctl", "--root", str(growing), "mask", "apt-daily.timer", "apt-daily-upgrade.timer")
    growing.rename(made)
    return made


def personalise(root: Path, folder: Path) -> None:
    """Give a copy its name, its keys and its name server."""
    (root / "etc/hostname").write_text(NAME + "\n", encoding="utf-8")
    (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n{HOST_ADDRESS} {NAME}\n", encoding="utf-8")
    (root / "etc/machine-id").write_text("", encoding="utf-8")
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/resolv.conf").write_text(f"nameserver {UPLINK_NAMES}\n", encoding="utf-8")
    host_key = root / "etc/ssh/ssh_host_ed25519_key"
    host_key.write_bytes((folder / "host_key").read_bytes())
    host_key.chmod(0o600)
    entry = next(line for line in (root / "etc/passwd").read_text(encoding="utf-8").splitlines() if line.startswith(USER + ":"))
    uid, gid = (int(number) for number in entry.split(":")[2:4])
    ssh = root / "home" / USER / ".ssh"
    ssh.mkdir(mode=0o700)
    keys = ssh / "authorized_keys"
    keys.write_bytes((folder / "authorized_keys").read_bytes())
    for path in (ssh, keys):
        os.chown(path, uid, gid)


def own_cgroups() -> dict[Path, Mapping[str, str]]:
    """One control group of each version 1 hierarchy for the host, with the values a `cpuset` group needs before it takes a process.

    systemd-nspawn makes the group it is started in the root of the host's tree. Where systemd runs the machine it is started in a scope of
    systemd's instead, and the result is empty.
    """
    if Path("/run/systemd/system").is_dir():
        return {}
    groups: dict[Path, Mapping[str, str]] = {}
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        base = Path("/sys/fs/cgroup") / controllers.removeprefix("name=") / path.strip("/")
        if controllers and base.is_dir():
            names = ("cpuset.cpus", "cpuset.mems") if controllers == "cpuset" else ()
            groups[base / NAME] = {name: (base / name).read_text(encoding="utf-8") for name in names}
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
def network(place: Path) -> Iterator[Path]:
    """A network namespace with a link to the test and a way to the registries; yields the file that holds it."""
    if taken := run("ip", "route", "show", "root", SUBNET):
        raise HostError("subnet", f"cannot use {SUBNET} for the test host", f"this machine routes {taken.strip()}", "remove that route")
    namespace = place / "netns"
    namespace.touch()
    run("unshare", f"--net={namespace}", "true")

    def inside(*command: str) -> None:
        run("nsenter", f"--net={namespace}", *command)

    run("ip", "link", "add", TEST_LINK, "type", "veth", "peer", "name", "host0", "netns", str(namespace))
    try:
        run("ip", "address", "add", f"{TEST_ADDRESS}/{PREFIX}", "dev", TEST_LINK)
        run("ip", "link", "set", TEST_LINK, "up")
        inside("ip", "link", "set", "lo", "up")
        inside("ip", "address", "add", f"{HOST_ADDRESS}/{PREFIX}", "dev", "host0")
        inside("ip", "link", "set", "host0", "up")
        read_end, write_end = os.pipe()
        slirp = subprocess.Popen(
            ending_with_us(
                *("slirp4netns", "--configure", "--mtu=65520", "--disable-host-loopback", f"--ready-fd={write_end}"),
                *("--netns-type=path", str(namespace), UPLINK),
            ),
            pass_fds=[write_end],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            start_new_session=True,
        )
        os.close(write_end)
        with os.fdopen(read_end, "rb") as ready:
            if not ready.read(1):
                raise HostError("uplink", "cannot give the test host a way to the registries", "slirp4netns ended", "see its message above")
        try:
            yield namespace
        finally:
            slirp.kill()
            slirp.wait(timeout=ENDED_S_MAX)
    finally:
        run("ip", "link", "delete", TEST_LINK)
        run("umount", str(namespace))


@contextlib.contextmanager
def machine(root: Path, namespace: Path, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Boot the copy at `root`; yields the systemd-nspawn process."""
    groups = own_cgroups()
    remove_cgroups(groups)
    for group, values in groups.items():
        group.mkdir()
        for name, value in values.items():
            (group / name).write_text(value, encoding="utf-8")
    caches = {"apt": "/var/cache/apt/archives", "pip": "/root/.cache/pip"}
    for name in caches:
        (CACHE / name).mkdir(exist_ok=True)
    (CACHE / "apt" / "partial").mkdir(exist_ok=True)
    nspawn = (
        *("systemd-nspawn", "--quiet", "--boot", f"--directory={root}", f"--machine={NAME}", f"--hostname={NAME}"),
        *(f"--network-namespace-path={namespace}", "--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=pipe"),
        # Roles set up bridges and run sandboxes on a host; a real one would not be filtered.
        *("--capability=all", "--system-call-filter=@known", "--register=no", "--keep-unit"),
        *(f"--bind={CACHE / name}:{path}" for name, path in caches.items()),
    )
    # nspawn cannot ask for a scope of its own: it would name itself by its number in the namespace below, which systemd does not know.
    scope = () if groups else ("systemd-run", "--scope", "--quiet", "--collect", f"--slice={NAME}.slice", "--property=Delegate=yes")
    joining = 'for group in $GROUPS_TO_JOIN; do echo $$ >"$group/cgroup.procs" || exit 1; done; exec "$@"'
    with (folder / "console.log").open("ab") as console:
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
        # Nothing on this host is worth an orderly shutdown. nspawn ends after all in its namespace, and `unshare`, whose child it is, after it.
        child = Path(f"/proc/{booted.pid}/task/{booted.pid}/children")
        inner = child.read_text(encoding="ascii").split() if booted.poll() is None else []
        for pid in [int(pid) for pid in inner] or [booted.pid]:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.kill(pid, signal.SIGKILL)
        booted.wait(timeout=ENDED_S_MAX)
        remove_cgroups(groups)


def boot(root: Path, namespace: Path, folder: Path) -> bool:
    """Run the host until the test's half ends it (False) or it asks to be started again (True)."""
    with machine(root, namespace, folder) as booted:
        owner = pwd.getpwuid(folder.stat().st_uid)  # the console is for the person who runs the test
        os.chown(folder / "console.log", owner.pw_uid, owner.pw_gid)
        while not stopped(0.1):
            if booted.poll() == REBOOTED:
                return True
            if booted.returncode is not None:
                raise HostError("ended", f"host {NAME} ended by itself", f"exit {booted.returncode}", f"see {folder}/console.log")
    return False


def serve(folder: Path) -> None:
    """Run a host until the test's half closes our standard input. Raises HostError; leaves the console log in `folder`."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with turn():
        require_memory()
        made, place = root_made(), CACHE / "running"
        place.mkdir(exist_ok=True)
        # Copied into memory: many times faster than a disk, and gone with this process's mount namespace. An overlay would be faster still,
        # but what runs on the host makes overlays of its own, and those do not nest. The size is a bound, and what pre-flight sees as free.
        run("mount", "-t", "tmpfs", "-o", f"size={ROOT_GIB_MAX}g,mode=0755", NAME, str(place))
        try:
            root = place / "root"
            run("cp", "--archive", str(made), str(root))
            personalise(root, folder)
            with network(place) as namespace:
                print("started", os.getpid(), flush=True)
                while boot(root, namespace, folder):
                    pass
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
