#!/usr/bin/env python3
"""Remove what the list of record.py says, and nothing else: `remove.py LIST OPT ETC`; ends with `changed` or `unchanged`.

Services first, then functions, network, accounts, packages and paths; the list goes last, so that a removal that was interrupted
can be repeated. A package that something else needs by now stays, and so does podman's storage when it holds what is not ours:
each is said on a line of its own.

Runs as root under the host's own Python, from 3.6 on, with nothing but the standard library.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time

STOP_SECONDS_MAX = 120.0
POLL_SECONDS = 0.1
# Folders that podman makes itself when it first runs: its images, the lock of its networks and their addresses.
PODMANS = {"/var/lib/containers", "/etc/cni", "/var/lib/cni"}
NAMESPACE = re.compile(r"kal-[0-9a-f]{8}")  # as kalium/engine/network.py names an instance's


def run(command):
    """Exit status and standard output; errors go to ours."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, universal_newlines=True, env=dict(os.environ, LC_ALL="C"))
    return done.returncode, done.stdout


def fail(attempted, found):
    sys.exit("error[reset.failed]: cannot %s: %s\nnext: mend that and run the reset again; it goes on where it stopped" % (attempted, found))


def must(command):
    status, text = run(command)
    if status != 0:
        fail("run " + " ".join(command), text.strip() or "exit status %d" % status)
    return text


def stop_supervisor(opt, etc):
    control = [os.path.join(opt, "venv/bin/supervisorctl"), "-c", os.path.join(etc, "supervisord.conf")]
    if not os.path.exists(control[0]) or not os.path.exists(control[2]):
        return
    status, text = run([*control, "pid"])
    if status != 0 or not text.strip().isdigit():
        return
    run([*control, "shutdown"])
    deadline = time.monotonic() + STOP_SECONDS_MAX
    while os.path.exists("/proc/" + text.strip()):
        if time.monotonic() > deadline:
            fail("stop the services", "the supervisor (process %s) is still there after %d s" % (text.strip(), STOP_SECONDS_MAX))
        time.sleep(POLL_SECONDS)
    print("stopped the supervisor and its services")


def stop_units(paths):
    units = [os.path.basename(path) for path in paths if path.startswith("/etc/systemd/system/") and os.path.exists(path)]
    for unit in units:
        must(["systemctl", "disable", "--now", unit])
        print("stopped " + unit)


def remove_functions():
    """Instances and images of ours; whether podman then holds nothing."""
    if shutil.which("podman") is None:
        return True
    for line in must(["podman", "ps", "--all", "--format", "{{.ID}} {{.Image}}"]).splitlines():
        container, _, image = line.partition(" ")
        if image.startswith("localhost/kalium/"):
            must(["podman", "rm", "--force", container])
    for line in must(["podman", "images", "--format", "{{.Repository}}:{{.Tag}}"]).splitlines():
        if line.startswith("localhost/kalium/"):
            must(["podman", "rmi", "--force", line])
            print("removed image " + line)
    return not must(["podman", "ps", "--all", "--quiet"]).strip() and not must(["podman", "images", "--quiet"]).strip()


def remove_network(bridges):
    for path in sorted(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else []:
        if NAMESPACE.fullmatch(path):
            must(["ip", "netns", "delete", path])
    for bridge in bridges:
        if os.path.exists("/sys/class/net/" + bridge):
            must(["ip", "link", "delete", bridge])
            print("removed bridge " + bridge)


def remove_users(users):
    for user in users:
        if run(["id", user])[0] == 0:
            must(["userdel", user])
            print("removed account " + user)


def goes_with(packages):
    """Every package that purging `packages` would remove."""
    text = must(["apt-get", "--simulate", "purge", *packages])
    return {line.split()[1] for line in text.splitlines() if line.startswith(("Remv ", "Purg "))}


def remove_packages(packages):
    _, text = run(["dpkg-query", "--show", "--showformat", "${db:Status-Status} ${Package}\\n", *packages])
    there = [line.split()[1] for line in text.splitlines() if line.startswith(("installed ", "config-files "))]
    ours, gone = set(packages), there
    if not goes_with(there) <= ours:  # one of them is needed: each is asked for, which takes apt a good half second
        gone = [package for package in there if goes_with([package]) <= ours]
        for package in there:
            if package not in gone:
                print("left package %s: something else needs it by now" % package)
    if gone:
        must(["apt-get", "--quiet=2", "--yes", "purge", *gone])
        print("removed packages " + " ".join(gone))


def remove_paths(paths, keep, last):
    """Inner paths first, and what holds the list `last`."""
    for path in sorted(paths, key=lambda path: (not last.startswith(path + "/"), len(path)), reverse=True):
        if path in keep or not os.path.lexists(path):
            continue
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.remove(path)
        print("removed " + path)


def main(path, opt, etc):
    try:
        with open(path) as file:
            record = json.load(file)
    except FileNotFoundError:
        print("nothing of ours is installed here")
        print("unchanged")
        return
    stop_supervisor(opt, etc)
    stop_units(record["paths"])
    keep = set() if remove_functions() else PODMANS & set(record["paths"])
    if keep:
        print("left %s: podman holds containers or images that are not ours" % " and ".join(sorted(keep)))
    remove_network(record["bridges"])
    remove_users(record["users"])
    if record["packages"]:
        remove_packages(record["packages"])
    remove_paths(record["paths"], keep, path)
    if os.path.exists(path):
        os.remove(path)
    if os.path.isdir("/run/systemd/system"):
        run(["systemctl", "daemon-reload"])
    print("changed")


if __name__ == "__main__":
    main(*sys.argv[1:])
