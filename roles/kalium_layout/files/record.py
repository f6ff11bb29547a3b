#!/usr/bin/env python3
"""Add to the list of what was installed on this host: `record.py LIST KIND:NAME ...`; prints `changed` or `unchanged`.

An item that exists already and is not in the list was here before us: it is never added, so a reset leaves it. The list
is written before the item is made, so an installation that is interrupted can still be removed. `packages:A,B` stands for
everything that installing A and B would bring; it is refused when that would remove a package.

What is about to be changed rather than made is kept as it is now, so a reset can put it back: `file:` keeps a copy, `unit:` whether it
runs and is enabled, `sysctl:` its value. `contents:` is a folder that is there and empty, `block:` a file that gets lines between the
markers `# BEGIN kalium` and `# END kalium`, `module:` a module of the kernel, `swap:` a device or file that memory is swapped to.

Runs under the host's own Python, from 3.6 on, with nothing but the standard library.
"""

import grp
import hashlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile

SCHEMA = "kalium-installed/v1"
KINDS = ("packages", "users", "bridges", "paths", "contents", "blocks", "modules", "swaps")
KEPT = ("files", "units", "sysctls")  # {name: what it was}
MARKER = "# BEGIN kalium\n"


def fail(code, attempted, found, next_step):
    sys.exit("error[%s]: %s: %s\nnext: %s" % (code, attempted, found, next_step))


def load(path):
    try:
        with open(path) as file:
            record = json.load(file)
    except FileNotFoundError:
        record = {"schema": SCHEMA}
    except ValueError as error:
        fail(
            "installed.unreadable", "cannot read " + path, str(error), "restore the file from a backup: without it a reset does not know what is ours"
        )
    if record.get("schema") != SCHEMA:
        fail("installed.schema", "cannot read " + path, "schema is %r" % record.get("schema"), "reset with the version of Kalium that wrote it")
    # A list of a site that an earlier version of this file began lacks the kinds that came later.
    for kind in KINDS:
        record.setdefault(kind, [])
    for kind in KEPT:
        record.setdefault(kind, {})
    return record


def save(path, record):
    """Replace the list at once: a reader sees the old one or the new one."""
    folder = os.path.dirname(path)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".installed-")
    with os.fdopen(descriptor, "w") as file:
        json.dump(record, file, indent=1, sort_keys=True)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def packages_brought_by(names):
    """Every package that `apt-get install NAMES` would newly install."""
    simulate = ["apt-get", "--simulate", "--quiet", "--no-install-recommends", "install", *names]
    done = subprocess.run(simulate, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, env=dict(os.environ, LC_ALL="C"))
    if done.returncode != 0:
        fail(
            "packages.unavailable",
            "cannot install " + " ".join(names),
            done.stderr.strip() or "apt-get says no",
            "check the machine's package sources",
        )
    lines = [line.split() for line in done.stdout.splitlines()]
    removed = [words[1] for words in lines if words[:1] == ["Remv"]]
    if removed:
        fail(
            "packages.conflict", "cannot install " + " ".join(names), "that would remove " + ", ".join(removed),
            "remove those yourself if you can do without them, or use another machine",
        )  # fmt: skip
    # A package that is only upgraded shows its old version in brackets: it was here before.
    return [words[1] for words in lines if words[:1] == ["Inst"] and not words[2].startswith("[")]


def is_known(look_up, name):
    try:
        look_up(name)
    except KeyError:
        return False
    return True


def is_marked(path):
    with open(path) as file:
        return MARKER in file


# Whether NAME was here before us, so that a reset must leave it.
EXISTS = {
    "paths": os.path.lexists,
    "contents": lambda name: not os.path.isdir(name) or bool(os.listdir(name)),
    "users": lambda name: is_known(pwd.getpwnam, name) or is_known(grp.getgrnam, name),
    "bridges": lambda name: os.path.exists("/sys/class/net/" + name),
    "blocks": is_marked,
    "modules": lambda name: os.path.exists("/sys/module/" + name),
    "swaps": lambda _: False,
}


def says(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True)
    return done.stdout.strip()


def keep(kind, name, folder):
    """What `name` is now, in a form that remove.py puts back; None: it is not there, and a reset removes it."""
    if kind == "units":
        return {"active": says(["systemctl", "is-active", name]) == "active", "enabled": says(["systemctl", "is-enabled", name]) == "enabled"}
    if kind == "sysctls":
        try:
            with open("/proc/sys/" + name.replace(".", "/")) as file:
                return file.read().strip()
        except OSError:
            return None
    if not os.path.lexists(name):
        return None
    saved = os.path.join(folder, "saved", hashlib.sha256(name.encode()).hexdigest()[:16])
    os.makedirs(os.path.dirname(saved), mode=0o700, exist_ok=True)
    if os.path.islink(name):
        os.symlink(os.readlink(name), saved)
    else:
        shutil.copy2(name, saved)
        stat = os.stat(name)
        os.chown(saved, stat.st_uid, stat.st_gid)
    return saved


def main(path, items):
    record = load(path)
    before = json.dumps(record, sort_keys=True)
    folder = os.path.dirname(path)
    if not os.path.lexists(folder):
        record["paths"].append(folder)  # the list itself makes it, whoever records first
    for item in items:
        kind, _, name = item.partition(":")
        if kind == "packages":
            found = [package for package in packages_brought_by(name.split(",")) if package not in record["packages"]]
            record["packages"] += found
        elif kind + "s" in KEPT and name:
            if name not in record[kind + "s"]:
                record[kind + "s"][name] = keep(kind + "s", name, folder)
        elif kind == "contents":
            if name not in record["contents"] + record["paths"] and not EXISTS["contents"](name):
                record["contents"].append(name)
        elif kind + "s" in KINDS and name:
            if name not in record[kind + "s"] and not EXISTS[kind + "s"](name):
                record[kind + "s"].append(name)
        else:
            fail("installed.kind", "cannot record %r" % item, "its kind is unknown", "see the top of record.py for the kinds")
    if json.dumps(record, sort_keys=True) == before:
        print("unchanged")
    else:
        save(path, record)
        print("changed")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
