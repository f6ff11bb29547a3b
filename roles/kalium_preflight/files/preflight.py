#!/usr/bin/env python3
"""Look at this host and print every reason why the site cannot be set up here, as JSON; change nothing.

`preflight.py SPECIFICATION`, where SPECIFICATION is the JSON object of roles/kalium_preflight/tasks/host.yml. The output is
{"problems": [{"code", "attempted", "found", "next"}], "notes": [text]}, and the exit status is 0 unless the script itself failed.

Runs under the host's own Python, from 3.6 on, with nothing but the standard library.
"""

import json
import os
import platform
import re
import socket
import struct
import subprocess
import sys

GIB = 1024**3
LISTEN = "0A"  # TCP_LISTEN in the fourth column of /proc/net/tcp
COMMAND_SECONDS_MAX = 60


class Report:
    """What was found so far."""

    def __init__(self):
        self.problems = []
        self.notes = []

    def problem(self, code, attempted, found, next_step):
        self.problems.append({"code": "preflight." + code, "attempted": attempted, "found": found, "next": next_step})


def numbers(version):
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


def check_machine(spec, report, release=platform.release, machine=platform.machine):
    if numbers(release()) < numbers(spec["kernel_minimum"]):
        report.problem(
            "kernel",
            "run gVisor on kernel " + release(),
            "it needs Linux %s or newer" % spec["kernel_minimum"],
            "boot a newer kernel of the distribution",
        )
    if machine() != "x86_64":
        report.problem("architecture", "build for " + machine(), "only x86_64 is supported", "use an x86-64 machine")


def os_release(path="/etc/os-release"):
    with open(path) as file:
        pairs = [line.rstrip("\n").partition("=") for line in file if "=" in line]
    return {key: value.strip("\"'") for key, _, value in pairs}


def check_distribution(spec, report, read=os_release, python=sys.version_info):
    found = read()
    name, version = found.get("ID", "unknown").capitalize(), found.get("VERSION_ID", "unknown")
    known = spec["distributions"]
    if version not in known.get(name, []):
        offered = ", ".join("%s %s" % (distribution, " ".join(versions)) for distribution, versions in sorted(known.items()))
        report.problem("distribution", "set up %s %s" % (name, version), "the packages of %s are known" % offered, "use one of these")
    if spec["needs_python"] and list(python[:2]) < numbers(spec["python_minimum"]):
        report.problem(
            "python",
            "run the services on Python %d.%d" % tuple(python[:2]),
            "they need Python %s" % spec["python_minimum"],
            "use a newer release of the distribution",
        )


def check_space(spec, report, statvfs=os.statvfs, meminfo="/proc/meminfo"):
    # A site that stands already has most of it on disk.
    needed = float(spec["disk_gib_again" if os.path.exists(spec["installed"]) else "disk_gib"])
    for wanted in spec["disk_paths"]:
        path = wanted
        while not os.path.isdir(path):
            path = os.path.dirname(path)
        stat = statvfs(path)
        free = stat.f_bavail * stat.f_frsize / GIB
        if free < needed:
            report.problem(
                "disk",
                "install below " + path,
                "%.1f GiB are free, %g GiB are needed" % (free, needed),
                "free some space there, or mount a larger disk",
            )
            break
    with open(meminfo) as file:
        total = next(int(line.split()[1]) * 1024 / GIB for line in file if line.startswith("MemTotal:"))
    if total < float(spec["memory_gib"]):
        report.problem(
            "memory", "run on %.1f GiB of memory" % total, "%g GiB are needed" % float(spec["memory_gib"]), "use a machine with more memory"
        )


def sockets(protocol, proc="/proc"):
    """Listening addresses of `protocol`: (address as 4 or 16 bytes, port, inode)."""
    for name in (protocol, protocol + "6"):
        path = os.path.join(proc, "net", name)
        if not os.path.exists(path):
            continue
        with open(path) as file:
            next(file)
            for line in file:
                columns = line.split()
                if protocol == "tcp" and columns[3] != LISTEN:
                    continue
                address, port = columns[1].split(":")
                words = [int(address[i : i + 8], 16) for i in range(0, len(address), 8)]
                yield b"".join(struct.pack("=I", word) for word in words), int(port, 16), columns[9]


def holder(inode, proc="/proc"):
    """Process id that has the socket `inode` open, if we may see it."""
    wanted = "socket:[%s]" % inode
    for pid in filter(str.isdigit, os.listdir(proc)):
        folder = os.path.join(proc, pid, "fd")
        try:
            if any(os.readlink(os.path.join(folder, name)) == wanted for name in os.listdir(folder)):
                return int(pid)
        except OSError:  # it ended, or belongs to somebody else
            continue
    return None


def command_line(pid, proc="/proc"):
    try:
        with open(os.path.join(proc, str(pid), "cmdline"), "rb") as file:
            return file.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    except OSError:
        return ""


def is_marked(pid, proc="/proc"):
    """Whether kalium_service started it: what it runs for is in its environment, which is root's to read."""
    try:
        with open(os.path.join(proc, str(pid), "environ"), "rb") as file:
            return any(pair.startswith(b"KALIUM_REVISION=") for pair in file.read().split(b"\0"))
    except OSError:
        return False


def parent(pid, proc="/proc"):
    try:
        with open(os.path.join(proc, str(pid), "stat")) as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def is_ours(pid, own, proc="/proc"):
    """Whether the process or one that started it is a service of a site that stands already: it is marked, or names one of our folders."""
    while pid > 1:
        if is_marked(pid, proc) or any(folder in command_line(pid, proc) for folder in own):
            return True
        pid = parent(pid, proc)
    return False


def check_ports(spec, report, proc="/proc", is_root=None):
    is_root = os.geteuid() == 0 if is_root is None else is_root
    listening = {protocol: list(sockets(protocol, proc)) for protocol in ("tcp", "udp")}
    for wanted in spec["ports"]:
        ours, number = socket.inet_aton(wanted["address"]), int(wanted["port"])
        for protocol in wanted.get("protocols", ["tcp"]):
            for address, port, inode in listening[protocol]:
                clash = not any(address) or address == ours or address[-4:] == ours or not any(ours)
                if port != number or not clash:
                    continue
                pid = holder(inode, proc)
                if pid is not None and is_ours(pid, spec["own"], proc):
                    continue
                if pid is None and not is_root:
                    report.notes.append("whether busy ports are our own services' cannot be seen without root")
                    continue
                who = "a process of another user" if pid is None else "process %d (%s)" % (pid, command_line(pid, proc)[:80] or "?")
                report.problem(
                    "port", "listen on %s:%d/%s for %s" % (wanted["address"], port, protocol, wanted["for"]), "%s has it" % who,
                    "stop it, or move ours: `-e %s=%d`" % (wanted["variable"], port + 1),
                )  # fmt: skip
                break


def check_network(spec, report, routes="/proc/net/route"):
    """The bridge's network must not be somebody else's: what is there stays reachable."""
    bridge = spec.get("bridge")
    if not bridge:
        return
    width = (1 << 32) - 1
    mask = width << (32 - int(bridge["prefix"])) & width
    ours = struct.unpack("!I", socket.inet_aton(bridge["address"]))[0] & mask
    with open(routes) as file:
        next(file)
        for line in file:
            columns = line.split()
            destination, theirs = (socket.ntohl(int(columns[index], 16)) for index in (1, 7))
            if theirs and columns[0] != bridge["name"] and ours & theirs & mask == destination & theirs & mask:
                report.problem(
                    "network", "make the bridge %s with %s/%s" % (bridge["name"], bridge["address"], bridge["prefix"]),
                    "interface %s has a route into that network" % columns[0], "choose another one with the variables kalium_engine_bridge_*",
                )  # fmt: skip
                return


def run(command):
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        timeout=COMMAND_SECONDS_MAX,
        env=dict(os.environ, LC_ALL="C"),
    )
    return done.returncode, done.stdout


def packages_here(spec, release):
    """The packages that this host needs, as its distribution calls them."""
    names = spec["package_names"].get("%s %s" % (release.get("ID", "").capitalize(), release.get("VERSION_ID", "")), {})
    return [here for package in spec["packages"] for here in names.get(package, [package])]


def check_packages(spec, report, ask=run, read=os_release):
    """Installing ours must not remove what is there. Without package lists this is asked again when they are there."""
    packages = packages_here(spec, read())
    code, text = ask(["apt-get", "--simulate", "--quiet", "--no-install-recommends", "install", *packages])
    if code != 0:
        report.notes.append("the package lists do not know all of our packages yet: they are read anew, and a conflict is found then")
        return
    removed = [line.split()[1] for line in text.splitlines() if line.startswith("Remv ")]
    if removed:
        report.problem(
            "packages", "install " + " ".join(packages), "that would remove " + ", ".join(removed),
            "remove those yourself if you can do without them, or use another machine",
        )  # fmt: skip


def main(specification):
    spec, report = json.loads(specification), Report()
    for check in (check_machine, check_distribution, check_space, check_ports, check_network, check_packages):
        check(spec, report)
    print(json.dumps({"problems": report.problems, "notes": report.notes}))


if __name__ == "__main__":
    main(sys.argv[1])
