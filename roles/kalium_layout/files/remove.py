#!/usr/bin/env python3
"""Remove what the list of record.py says, and nothing else: `remove.py LIST OPT ETC`; ends with `changed` or `unchanged`.

Services first, then functions, network, accounts, packages and paths, then what was changed is put back; the list goes last, so that
a removal that was interrupted can be repeated. A package that something else needs by now stays, and so does podman's storage when it
holds what is not ours: each is said on a line of its own.

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
BLOCK = re.compile(r"^# BEGIN kalium\n.*?^# END kalium\n", re.MULTILINE | re.DOTALL)  # as the blockinfile tasks mark it
NAMESPACE = re.compile(r"kal-[0-9a-f]{8}")  # as kalium/engine/podman/network.py names an instance's


def run(command):
    """Exit status and standard output; errors go to ours. 127: there is no such program."""
    if shutil.which(command[0]) is None:
        return 127, ""
    # sudo stays where root has no password, unless it is told that root gets in otherwise: as before it was installed, it does.
    environment = dict(os.environ, LC_ALL="C", SUDO_FORCE_REMOVE="yes")
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, universal_newlines=True, env=environment)
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


def stop_units(paths, kept):
    """Units of ours, and those of others that did not run, or did not start by themselves, before us."""
    for path in paths:
        if path.startswith("/etc/systemd/system/") and os.path.isfile(path):
            must(["systemctl", "disable", "--now", os.path.basename(path)])
            print("stopped " + os.path.basename(path))
    for unit, before in sorted(kept.items()):
        # The name of a unit that is not there is an error of no interest: its package may be gone already.
        if not before["active"]:
            run(["systemctl", "stop", unit])
        if not before["enabled"]:
            run(["systemctl", "--quiet", "disable", unit])


def start_units(kept):
    for unit, before in sorted(kept.items()):
        if before["enabled"]:
            run(["systemctl", "--quiet", "enable", unit])
        if before["active"] and run(["systemctl", "restart", unit])[0] == 0:
            print("started " + unit + " as it was before")


def forget_images():
    """Images of ours in a containerd that was here before us. One that is ours has stopped by now, and its folder goes whole."""
    control = ["ctr", "--connect-timeout", "2s", "--namespace", "k8s.io", "images"]
    status, text = run([*control, "ls", "--quiet", "name~=^localhost/kalium/"])
    if status == 0 and text.split():
        must([*control, "rm", *text.split()])
        print("removed %d images from containerd" % len(text.split()))


def remove_functions():
    """Instances and images of ours; whether podman then holds nothing."""
    forget_images()
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


def empty(folders):
    """Folders that were there and empty: they stay, and are empty again."""
    for folder in folders:
        inside = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        remove_paths([os.path.join(folder, name) for name in inside], set(), folder)


def restore_files(files):
    for path, saved in sorted(files.items()):
        if saved is not None and os.path.lexists(saved):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            shutil.move(saved, path)
            print("put back " + path)
        elif saved is None and os.path.lexists(path):
            os.remove(path)
            print("removed " + path)


def remove_blocks(paths):
    for path in paths:
        with open(path) as file:
            text = file.read()
        without = BLOCK.sub("", text)
        if without != text:
            # In place: the file may be a mount of its own, and keeps its owner and mode.
            with open(path, "w") as file:
                file.write(without)
            print("removed our lines from " + path)


def restore_kernel(sysctls, modules, swaps):
    """Settings, modules and swap of the running kernel. What it does not let go of ends with the next start of the host."""
    for name, value in sorted(sysctls.items()):
        try:
            with open("/proc/sys/" + name.replace(".", "/"), "r+") as file:
                if value is not None and file.read().strip() != value:
                    file.seek(0)
                    file.write(value)
        except OSError as error:
            print("left %s as it is: %s" % (name, error.strerror))
    for module in reversed(modules):
        if os.path.exists("/sys/module/" + module) and run(["modprobe", "--remove", module])[0] != 0:
            print("left module %s: something uses it by now" % module)
    for swap in swaps:
        if run(["swapon", swap])[0] == 0:
            print("swaps to %s again" % swap)


def main(path, opt, etc):
    try:
        with open(path) as file:
            record = json.load(file)
    except FileNotFoundError:
        print("nothing of ours is installed here")
        print("unchanged")
        return
    stop_supervisor(opt, etc)
    kept = {kind: record.get(kind, {}) for kind in ("files", "units", "sysctls")}
    # A unit of ours was nothing before us, whatever it was when somebody asked how it runs.
    kept["units"] = {unit: before for unit, before in kept["units"].items() if "/etc/systemd/system/" + unit not in record["paths"]}
    stop_units(record["paths"], kept["units"])
    keep = set() if remove_functions() else PODMANS & set(record["paths"])
    if keep:
        print("left %s: podman holds containers or images that are not ours" % " and ".join(sorted(keep)))
    remove_network(record["bridges"])
    restore_kernel(kept["sysctls"], record.get("modules", []), record.get("swaps", []))
    # Before the packages: a configuration of theirs that was put back goes with them.
    restore_files(kept["files"])
    remove_blocks(record.get("blocks", []))
    remove_users(record["users"])
    if record["packages"]:
        remove_packages(record["packages"])
    empty(record.get("contents", []))
    if os.path.isdir("/run/systemd/system"):
        run(["systemctl", "daemon-reload"])
        start_units(kept["units"])
    remove_paths(record["paths"], keep, path)
    if os.path.exists(path):
        os.remove(path)
    if os.path.isdir("/run/systemd/system"):
        run(["systemctl", "daemon-reload"])
    print("changed")


if __name__ == "__main__":
    main(*sys.argv[1:])
