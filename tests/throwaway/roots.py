"""The root file system of a throw-away host: a bare one of this machine's distribution, made once, and a copy's own name and keys."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from .host import COMMAND_S_MAX, HostError

# What a provider's image has at least: an init system, a way in, the distribution's Python and sudo. Everything else is the roles' to install.
PACKAGES = ("systemd", "systemd-sysv", "dbus", "openssh-server", "python3", "sudo", "iproute2", "ca-certificates", "logrotate")
USER = "siteadmin"
ROOT_MADE_S_MAX = 900.0
# Where a host finds what other hosts downloaded before.
APT_ARCHIVES, PIP_CACHE = "var/cache/apt/archives", "root/.cache/pip"


def cache() -> Path:
    """Where root keeps the root file system and packages: the project's cache, but never below a folder that is a user's own."""
    chosen = Path(os.environ.get("KALIUM_CACHE", "/var/cache/kalium"))
    existing = next(folder for folder in (chosen, *chosen.parents) if folder.is_dir())
    return (chosen if existing.stat().st_uid == 0 else Path("/var/cache/kalium")) / "nspawn"


CACHE = cache()


def run(*command: str, timeout_s: float = COMMAND_S_MAX, stdin: str | None = None) -> str:
    """Run a command that has to succeed and return its output; HostError carries what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s, input=stdin)
    if done.returncode != 0:
        said = " / ".join((done.stderr or done.stdout).strip().splitlines()[-5:])
        raise HostError("command", f"cannot run {' '.join(command)[:200]}", f"exit {done.returncode}: {said}", "see the message above")
    return done.stdout


def require_memory(gib: float) -> None:
    """Raise HostError when the machine cannot spare `gib` of memory."""
    line = next(line for line in Path("/proc/meminfo").read_text(encoding="utf-8").splitlines() if line.startswith("MemAvailable:"))
    available = int(line.split()[1]) / 1024**2
    if available < gib:
        found = f"{available:.1f} GiB of memory are available, {gib} GiB are needed"
        raise HostError("memory", "cannot start a test host", found, "end something else, or use a larger machine")


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


def copy_of_root(target: Path) -> None:
    """Copy the root file system that hosts begin as to `target`. It is made when what goes into it changed."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "bases.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run("cp", "--archive", str(_base()), str(target), timeout_s=ROOT_MADE_S_MAX)


def _base() -> Path:
    """What hosts are copies of: made once for what goes into it, under a name that is the digest of it."""
    _, codename = release_of_this_machine()
    sources, trusted, settings = sources_of_this_machine(), trusted_here(), settings_of_package_tools()
    parts = [inspect.getsource(_base), USER, *PACKAGES, sources, json.dumps(settings), *(f"{k} {v!r}" for k, v in trusted.items())]
    made = CACHE / "bases" / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
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


def personalise(root: Path, folder: Path, name: str, addresses: Mapping[str, str], name_server: str) -> None:
    """Give a copy its name, its keys (of `folder`, as make_keys left them) and its name server. `addresses` has all hosts, itself too."""
    (root / "etc/hostname").write_text(name + "\n", encoding="utf-8")
    hosts = "".join(f"{address} {host}\n" for host, address in addresses.items())
    (root / "etc/hosts").write_text(f"127.0.0.1 localhost\n{hosts}", encoding="utf-8")
    (root / "etc/machine-id").write_text("", encoding="utf-8")
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/resolv.conf").write_text(f"nameserver {name_server}\n", encoding="utf-8")
    host_key = root / "etc/ssh/ssh_host_ed25519_key"
    host_key.write_bytes((folder / name / "host_key").read_bytes())
    host_key.chmod(0o600)
    entry = next(line for line in (root / "etc/passwd").read_text(encoding="utf-8").splitlines() if line.startswith(USER + ":"))
    uid, gid = (int(number) for number in entry.split(":")[2:4])
    ssh = root / "home" / USER / ".ssh"
    ssh.mkdir(mode=0o700)
    keys = ssh / "authorized_keys"
    keys.write_bytes((folder / "authorized_keys").read_bytes())
    for path in (ssh, keys):
        os.chown(path, uid, gid)
