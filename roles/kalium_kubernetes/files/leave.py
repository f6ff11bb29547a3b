#!/usr/bin/env python3
"""Take this host out of its cluster: `leave.py STAMP LIST KUBEADM SOCKET`; ends with `changed` or `unchanged`.

Pods end, and what only they needed goes: containers, mounts, interfaces, name spaces, rules and control groups. Only a cluster of this site is left:
its folder is in LIST. Programs, folders and units stay for the next attempt, or for remove.py.

Runs as root under the host's own Python, from 3.6 on, with nothing but the standard library.
"""

import glob
import json
import os
import re
import shutil
import subprocess
import sys

OURS = "/etc/kubernetes"
EMPTIED = ["/etc/kubernetes", "/var/lib/kubelet", "/var/lib/etcd", "/var/lib/cni"]
# The plugin before the package whose folder it is in: dpkg leaves folders that are not empty.
REMOVED = ["/etc/cni/net.d/10-flannel.conflist", "/run/flannel", "/usr/lib/cni/flannel", "/opt/cni/bin/flannel"]
INTERFACES = ["flannel.1", "cni0"]
CHAINS = re.compile(r"(^:|-[AIgj] )(KUBE|FLANNEL|CNI-HOSTPORT)-")
COMMAND_SECONDS_MAX = 300


def run(command, text=None):
    """Exit status and merged output; 127 when there is no such program, 124 when it did not end."""
    if shutil.which(command[0]) is None:
        return 127, ""
    try:
        done = subprocess.run(
            command, input=text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, timeout=COMMAND_SECONDS_MAX,
            env=dict(os.environ, LC_ALL="C"),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, "no end after %d s" % COMMAND_SECONDS_MAX
    return done.returncode, done.stdout


def end_pods(kubeadm, socket):
    run(["systemctl", "stop", "kubelet.service"])
    if os.path.exists(kubeadm):
        run(["systemctl", "start", "containerd.service"])
        status, text = run([kubeadm, "reset", "--force", "--cri-socket", "unix://" + socket])
        if status != 0:
            print("kubeadm reset ended with %d: %s" % (status, " ".join(text.split()[-40:])))


def end_containers(socket):
    """What is left when kubeadm could not end all: an attempt that was broken off has no kubeadm yet, or no pods that it knows of."""
    ctr = ["ctr", "--address", socket, "--namespace", "k8s.io"]
    status, text = run([*ctr, "tasks", "list", "--quiet"])
    for task in text.split() if status == 0 else []:
        run([*ctr, "tasks", "delete", "--force", task])
    status, text = run([*ctr, "containers", "list", "--quiet"])
    for container in text.split() if status == 0 else []:
        run([*ctr, "containers", "delete", container])


def unmount_below(folder):
    """What is mounted inside `folder`, the inner mounts first; not what is mounted on it."""
    with open("/proc/self/mountinfo") as file:
        points = [line.split()[4].encode().decode("unicode_escape") for line in file]
    for point in sorted((point for point in points if point.startswith(folder + "/")), key=len, reverse=True):
        if run(["umount", point])[0] != 0:
            run(["umount", "--lazy", point])


def empty(folder):
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        path = os.path.join(folder, name)
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)


def remove_network():
    for interface in INTERFACES:
        if os.path.exists("/sys/class/net/" + interface):
            run(["ip", "link", "delete", interface])
    for name in os.listdir("/run/netns") if os.path.isdir("/run/netns") else []:
        if name.startswith("cni-"):
            run(["ip", "netns", "delete", name])


def remove_rules():
    """Chains of kube-proxy, the kubelet and flannel, and the rules that lead to them, in whichever tables of iptables they are."""
    for family in ("iptables", "ip6tables"):
        for kind in ("", "-legacy", "-nft"):
            status, text = run([family + kind + "-save"])
            lines = [line for line in text.splitlines() if not line.startswith("#")]
            kept = [line for line in lines if not CHAINS.search(line)]
            if status == 0 and len(kept) < len(lines):
                run([family + kind + "-restore"], "\n".join(kept) + "\n")


def remove_cgroups():
    for top in glob.glob("/sys/fs/cgroup/kubepods*") + glob.glob("/sys/fs/cgroup/*/kubepods*"):
        run(["systemctl", "stop", "kubepods.slice"])
        for folder, _, _ in os.walk(top, topdown=False):
            try:
                os.rmdir(folder)
            except OSError:  # a process is in it still, and it goes with that one's end
                pass


def main(stamp, installed, kubeadm, socket):
    try:
        with open(installed) as file:
            record = json.load(file)
    except FileNotFoundError:
        record = {}
    if OURS not in record.get("paths", []) + record.get("contents", []):
        print("unchanged")
        return
    # First: from here on the host is in no cluster that is whole.
    if os.path.exists(stamp):
        os.remove(stamp)
    end_pods(kubeadm, socket)
    end_containers(socket)
    unmount_below("/run/containerd")
    remove_network()
    remove_rules()
    for folder in EMPTIED:
        unmount_below(folder)
        empty(folder)
    for path in REMOVED:
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.exists(path):
            os.remove(path)
    remove_cgroups()
    print("changed")


if __name__ == "__main__":
    main(*sys.argv[1:])
