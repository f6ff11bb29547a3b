#!/usr/bin/env python3
"""Bring a virtual environment to what a lock file and a wheel say: `install.py VENV REQUIREMENTS ARCHIVE WHEEL`; prints `changed` or `unchanged`.

ARCHIVE holds the wheels that REQUIREMENTS names; each is compared with its hash there, and no package server is asked. The environment
is one of the interpreter that runs this.
Two stamps in the environment hold what was installed: `.requirements`, whose change makes the environment anew, and
`.package`, whose change installs the wheel again. A stamp is written after its step, so an interrupted run is repeated.
Services watch the same two files (kalium_service_inputs) and are restarted when they change.

Runs on hosts, also under Python 3.6, with nothing but the standard library.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile

PIP = ["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", "--no-index"]


def digest(*parts):
    return hashlib.sha256(b"\0".join(parts)).hexdigest() + "\n"


def content(path):
    with open(path, "rb") as file:
        return file.read()


def stamp(path):
    try:
        return content(path).decode()
    except FileNotFoundError:
        return ""


def write(path, text):
    with open(path + ".new", "w") as file:
        file.write(text)
    os.replace(path + ".new", path)


def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
    if done.returncode != 0:
        tail = "\n".join(done.stdout.strip().splitlines()[-5:])
        sys.exit(
            "error[python.install]: cannot run %s: %s\nnext: remove the archive of wheels on the machine that builds, then run the same command again"
            % (" ".join(command), tail)
        )


def unpack(archive, folder):
    """Write the archive's files into `folder`; it has no folders of its own."""
    with tarfile.open(archive) as tar:
        for entry in tar:
            if not entry.isfile() or os.path.basename(entry.name) != entry.name:
                sys.exit(
                    "error[python.archive]: cannot unpack %s: it holds %s\nnext: remove it, then run the same command again" % (archive, entry.name)
                )
            with tar.extractfile(entry) as source, open(os.path.join(folder, entry.name), "wb") as target:
                shutil.copyfileobj(source, target)


def main(venv, requirements, archive, wheel):
    python, changed = os.path.join(venv, "bin", "python"), False
    interpreter = "%s %s" % (os.path.realpath(sys.executable), sys.version)
    wanted, installed = digest(content(requirements), interpreter.encode()), os.path.join(venv, ".requirements")
    package, here = digest(content(wheel)), os.path.join(venv, ".package")
    if stamp(installed) != wanted:
        run([sys.executable, "-m", "venv", "--clear", venv])
        with tempfile.TemporaryDirectory() as wheels:
            unpack(archive, wheels)
            run([python, *PIP, "--find-links", wheels, "--require-hashes", "--only-binary", ":all:", "-r", requirements])
        write(installed, wanted)
        changed = True
    if stamp(here) != package:
        run([python, *PIP, "--no-deps", "--force-reinstall", wheel])
        write(here, package)
        changed = True
    print("changed" if changed else "unchanged")


if __name__ == "__main__":
    main(*sys.argv[1:])
