#!/usr/bin/env python3
"""Add to the list of what was installed on this host: `record.py LIST KIND:NAME ...`; prints `changed` or `unchanged`.

An item that exists already and is not in the list was here before us: it is never added, so a reset leaves it. The list
is written before the item is made, so an installation that is interrupted can still be removed. `packages:A,B` stands for
everything that installing A and B would bring; it is refused when that would remove a package.

Runs under the host's own Python, from 3.6 on, with nothing but the standard library.
"""

import grp
import json
import os
import pwd
import subprocess
import sys
import tempfile

SCHEMA = "kalium-installed/v1"
KINDS = ("packages", "users", "bridges", "paths")


def fail(code, attempted, found, next_step):
    sys.exit("error[%s]: %s: %s\nnext: %s" % (code, attempted, found, next_step))


def load(path):
    try:
        with open(path) as file:
            record = json.load(file)
    except FileNotFoundError:
        return {"schema": SCHEMA, **{kind: [] for kind in KINDS}}
    except ValueError as error:
        fail(
            "installed.unreadable", "cannot read " + path, str(error), "restore the file from a backup: without it a reset does not know what is ours"
        )
    if record.get("schema") != SCHEMA:
        fail("installed.schema", "cannot read " + path, "schema is %r" % record.get("schema"), "reset with the version of Kalium that wrote it")
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


def exists(kind, name):
    if kind == "paths":
        return os.path.lexists(name)
    if kind == "users":
        try:
            pwd.getpwnam(name)
        except KeyError:
            try:
                grp.getgrnam(name)
            except KeyError:
                return False
        return True
    return os.path.exists("/sys/class/net/" + name)


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
        elif kind + "s" in KINDS and name:
            if name not in record[kind + "s"] and not exists(kind + "s", name):
                record[kind + "s"].append(name)
        else:
            fail("installed.kind", "cannot record %r" % item, "its kind is unknown", "use packages:, user:, bridge: or path:")
    if json.dumps(record, sort_keys=True) == before:
        print("unchanged")
    else:
        save(path, record)
        print("changed")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
