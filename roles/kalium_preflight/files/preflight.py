#!/usr/bin/env python3
"""Look at this host and print every reason why the site cannot be set up here, as JSON; change nothing.

`preflight.py SPECIFICATION`, where SPECIFICATION is the JSON object of roles/kalium_preflight/tasks/host.yml. The output is
{"problems": [{"code", "attempted", "found", "next"}], "notes": [text], "facts": {...}}, and the exit status is 0 unless the script itself
failed. "facts" is what the report needs to judge the host together with others: its Python and its addresses.

Runs under the host's own Python, from 3.6 on, with nothing but the standard library.
"""

import glob
import ipaddress
import json
import os
import platform
import re
import shutil
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
        self.facts = {}

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


# Kernels that kubeadm accepts, by the Kubernetes it is of (kubernetes/system-validators): from which version on, which kernels, in words.
KUBERNETES_KERNELS = (
    ((1, 34), lambda kernel: kernel in ((5, 4), (5, 10), (5, 15)) or kernel >= (6, 0), "5.4, 5.10, 5.15, or 6.0 and newer"),
    ((1, 32), lambda kernel: kernel >= (4, 19), "4.19 and newer"),
    ((0, 0), lambda kernel: kernel >= (3, 10), "3.10 and newer"),
)
KUBERNETES_REFUSES_CGROUP_V1 = (1, 35)
# Revisions of gVisor that do not run on old kernels: from which day on, until which, and the least kernel for them.
GVISOR_KERNELS = ((20260818, 99999999, (5, 6)), (20240415, 20240721, (5, 0)))


def check_versions(spec, report, release=platform.release, cgroups="/sys/fs/cgroup"):
    """Whether the pinned Kubernetes and gVisor run on this kernel: each of them would say so much later, and less clearly."""
    node = spec.get("node")
    if not node:
        return
    kernel, kubernetes = tuple(numbers(release())), tuple(numbers(node["kubernetes"]))
    _, accepts, words = next(row for row in KUBERNETES_KERNELS if kubernetes >= row[0])
    if not accepts(kernel):
        report.problem(
            "kubernetes_kernel", "run Kubernetes %s on kernel %s" % (node["kubernetes"], release()), "its kubeadm accepts " + words,
            "boot a kernel that it accepts (on Ubuntu the HWE kernel), or pin Kubernetes 1.31 in roles/kalium_versions",
        )  # fmt: skip
    if kubernetes >= KUBERNETES_REFUSES_CGROUP_V1 and not os.path.exists(os.path.join(cgroups, "cgroup.controllers")):
        report.problem(
            "cgroup", "run Kubernetes %s with control groups of version 1" % node["kubernetes"], "from 1.35 on the kubelet refuses them",
            "boot with `systemd.unified_cgroup_hierarchy=1`, or pin an older Kubernetes in roles/kalium_versions",
        )  # fmt: skip
    for first, last, least in GVISOR_KERNELS:
        if first <= int(node["gvisor"]) <= last and kernel < least:
            report.problem(
                "gvisor_kernel", "run gVisor of %s on kernel %s" % (node["gvisor"], release()), "that revision needs %d.%d or newer" % least,
                "boot a newer kernel, or choose another revision in runtime/go.mod",
            )  # fmt: skip


def check_cpus(spec, report, count=os.cpu_count):
    if "cpus" in spec and (count() or 1) < int(spec["cpus"]):
        report.problem("cpu", "run on %d CPU" % (count() or 1), "%d are needed" % int(spec["cpus"]), "use a machine with more of them")


def os_release(path="/etc/os-release"):
    with open(path) as file:
        pairs = [line.rstrip("\n").partition("=") for line in file if "=" in line]
    return {key: value.strip("\"'") for key, _, value in pairs}


def check_distribution(spec, report, read=os_release, python=sys.version_info):
    report.facts["python"] = list(python[:2])
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
            "use a newer release of the distribution, or kalium_python_source: standalone",
        )
    if list(python[:2]) < numbers(spec["ansible_python"]):
        report.problem(
            "ansible_python", "manage a host with Python %d.%d by ansible-core %s" % (python[0], python[1], spec["ansible"]),
            "its modules need Python %s there" % spec["ansible_python"],
            "make .venv with Python 3.10, 3.11 or 3.12, for which ansible-core 2.16 is locked: `make setup PYTHON=/usr/bin/python3.12`",
        )  # fmt: skip


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
        if wanted.get("cluster") and report.facts.get("cluster") == "ours":
            continue  # its holder is the cluster that stands
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
                    "stop it, or move ours: `-e %s=%d`" % (wanted["variable"], port + 1) if "variable" in wanted else "stop it, or use another host",
                )  # fmt: skip
                break


def own_addresses(ask=None):
    """IPv4 and IPv6 addresses of this host that others could use, as text."""
    code, text = (ask or run)(["ip", "-oneline", "address", "show", "scope", "global"])
    words = [line.split() for line in text.splitlines()] if code == 0 else []
    return sorted({line[3].partition("/")[0] for line in words if len(line) > 3 and line[2] in ("inet", "inet6")})


def check_address(spec, report, addresses=own_addresses):
    """The address by which others are told to reach this host has to be its own."""
    report.facts["addresses"] = addresses()
    wanted = spec.get("address")
    if wanted and report.facts["addresses"] and wanted not in report.facts["addresses"]:
        report.problem(
            "address", "be reached at " + wanted, "this host has " + ", ".join(report.facts["addresses"]),
            "set its kalium_layout_address to the one on the site's network",
        )  # fmt: skip


# What says that a cluster, or its container runtime, was set up here: patterns of paths.
CLUSTER = (
    "/etc/kubernetes/*.conf", "/etc/kubernetes/manifests/*", "/etc/kubernetes/pki/ca.crt", "/var/lib/etcd/member", "/var/lib/kubelet/config.yaml",
    "/etc/cni/net.d/*.conf*", "/etc/systemd/system/kubelet.service*", "/lib/systemd/system/kubelet.service",
    "/usr/bin/kubeadm", "/usr/bin/kubelet", "/usr/local/bin/kubeadm", "/usr/local/bin/kubelet", "/usr/local/bin/k3s", "/snap/bin/microk8s",
)  # fmt: skip
RUNTIME = (
    "/usr/bin/dockerd", "/usr/bin/containerd", "/usr/local/bin/containerd", "/etc/containerd/config.toml", "/etc/systemd/system/containerd.service",
    "/usr/bin/crio", "/usr/local/bin/crio",
)  # fmt: skip
PODMANS = "/87-podman-bridge.conflist"  # comes with the package and sorts behind flannel's, so it is never taken
DISTRIBUTION_S = ("/usr/bin/containerd", "/etc/containerd/config.toml")  # wanted where kalium_containerd_source is `distribution`


def installed_here(path):
    """What roles/kalium_layout recorded as installed, or None when there is no such list; raises ValueError when it cannot be read."""
    try:
        with open(path) as file:
            record = json.load(file)
    except FileNotFoundError:
        return None
    if not isinstance(record, dict) or not str(record.get("schema", "")).startswith("kalium-installed/"):
        raise ValueError("it is not a list of what we installed")
    return record


def package_of(path, ask=None):
    code, text = (ask or run)(["dpkg-query", "--search", path])
    return text.partition(":")[0].strip() if code == 0 else ""


def is_recorded(path, record, owner):
    """Whether the path, a folder above it, or the package that it belongs to is in the list."""
    ours = {name for kind in ("paths", "contents", "files") for name in record.get(kind, [])}
    return any(path == name or path.startswith(name.rstrip("/") + "/") for name in ours) or owner(path) in record.get("packages", [])


def check_foreign_cluster(spec, report, root="/", owner=package_of):
    """A cluster of somebody else is neither taken over nor overwritten; half of ours is gone on with."""
    node = spec.get("node")
    if not node:
        return
    try:
        record = installed_here(spec["installed"])
    except ValueError as error:
        report.problem(
            "installed", "read " + spec["installed"], str(error), "use a fresh host, or restore it from a backup: it says what a reset may remove",
        )  # fmt: skip
        return
    tolerated = DISTRIBUTION_S if node["containerd"] == "distribution" else ()
    found = sorted({path for pattern in CLUSTER + RUNTIME for path in glob.glob(root.rstrip("/") + pattern)})
    found = ["/" + os.path.relpath(path, root) for path in found if not path.endswith(PODMANS)]
    foreign = [path for path in found if path not in tolerated and not (record and is_recorded(path, record, owner))]
    report.facts["cluster"] = "foreign" if foreign else "ours" if found and record else "none"
    if foreign:
        more = " and %d more" % (len(foreign) - 6) if len(foreign) > 6 else ""
        report.problem(
            "cluster_here", "make this host a node of the cluster",
            "a container runtime or a cluster is here that is not ours: %s%s" % (", ".join(foreign[:6]), more),
            "use a fresh host (on CloudLab: Reload Nodes). If nobody needs it: `sudo kubeadm reset --force` where there is a kubeadm, "
            "`sudo apt-get purge` the packages of these files (`dpkg --search FILE` names them), and remove what is left of the list",
        )  # fmt: skip


def check_swap(spec, report, swaps="/proc/swaps"):
    if spec.get("node", {}).get("swap") == "off":
        with open(swaps) as file:
            used = [line.split()[0] for line in file.readlines()[1:]]
        if used:
            report.notes.append("swap is turned off while the cluster stands, because the kubelet asks for it: " + ", ".join(used))


def check_networks(spec, report, routes="/proc/net/route"):
    """The networks that the cluster makes for pods and services must not hide one that this host has a way into."""
    wanted = [(variable, ipaddress.ip_network(network)) for variable, network in sorted(spec.get("networks", {}).items())]
    with open(routes) as file:
        lines = [line.split() for line in file.readlines()[1:]]
    for columns in lines:
        destination, mask = (socket.ntohl(int(columns[index], 16)) for index in (1, 7))
        theirs = ipaddress.ip_network((destination, bin(mask).count("1")))
        for variable, network in wanted:
            # A default route leads everywhere, and flannel and the CNI plugins make theirs inside the network itself.
            if mask and theirs.overlaps(network) and not columns[0].startswith(("flannel.", "cni", "veth")):
                report.problem(
                    "network", "use %s for the cluster" % network, "interface %s has a route to %s" % (columns[0], theirs),
                    "choose another one with the variable " + variable,
                )  # fmt: skip


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
    """Exit status and standard output; 127 and nothing when there is no such program."""
    if shutil.which(command[0]) is None:
        return 127, ""
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
    release = read()
    name = "%s %s" % (release.get("ID", "").capitalize(), release.get("VERSION_ID", ""))
    for package, served in sorted(spec.get("indispensable", {}).items()):
        if package in spec["packages"] and spec["package_names"].get(name, {}).get(package) == []:
            report.problem(
                "packages", "serve %s on %s" % (served, name), "no package of it there is new enough for the site",
                "put a host of a newer release into its group of the inventory",
            )  # fmt: skip
    packages = packages_here(spec, release)
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


# In this order: what the ports are judged by comes before them.
CHECKS = (
    check_machine, check_versions, check_cpus, check_distribution, check_space, check_address, check_foreign_cluster, check_swap, check_ports,
    check_networks, check_network, check_packages,
)  # fmt: skip


def main(specification):
    spec, report = json.loads(specification), Report()
    for check in CHECKS:
        check(spec, report)
    print(json.dumps({"problems": report.problems, "notes": report.notes, "facts": report.facts}))


if __name__ == "__main__":
    main(sys.argv[1])
