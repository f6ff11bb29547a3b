#!/usr/bin/env python3
"""Bring a virtual environment to what a lock file and a wheel say: `install.py VENV REQUIREMENTS WHEEL`; prints `changed` or `unchanged`.

Two stamps in the environment hold what was installed: `.requirements`, whose change makes the environment anew, and
`.package`, whose change installs the wheel again. A stamp is written after its step, so an interrupted run is repeated.
Services watch the same two files (kalium_service_inputs) and are restarted when they change.
"""

import hashlib
import os
import subprocess
import sys

PIP = ["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]


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
            "error[python.install]: cannot run %s: %s\nnext: if a package server did not answer, run the same command again"
            % (" ".join(command), tail)
        )


def main(venv, requirements, wheel):
    python, changed = os.path.join(venv, "bin", "python"), False
    interpreter = "%s %s" % (os.path.realpath(sys.executable), sys.version)
    wanted, installed = digest(content(requirements), interpreter.encode()), os.path.join(venv, ".requirements")
    package, here = digest(content(wheel)), os.path.join(venv, ".package")
    if stamp(installed) != wanted:
        run([sys.executable, "-m", "venv", "--clear", venv])
        run([python, *PIP, "--require-hashes", "--only-binary", ":all:", "-r", requirements])
        write(installed, wanted)
        changed = True
    if stamp(here) != package:
        run([python, *PIP, "--no-deps", "--no-index", "--force-reinstall", wheel])
        write(here, package)
        changed = True
    print("changed" if changed else "unchanged")


if __name__ == "__main__":
    main(*sys.argv[1:])
