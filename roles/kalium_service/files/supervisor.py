#!/usr/bin/env python3
"""Start our supervisord, or start it again after its installation or its configuration changed: `supervisor.py BIN CONF STAMP`.

It runs with an identifier that names the content of its configuration and of the stamp of its Python environment; one that runs
under another identifier is shut down, with its programs, and started anew. Prints `changed` or `unchanged`.
"""

import hashlib
import os
import subprocess
import sys
import time

START_SECONDS_MAX = 30.0
STOP_SECONDS_MAX = 120.0
POLL_SECONDS = 0.1
# Services must not inherit what the shell of whoever runs Ansible happens to hold.
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}


def ask(binaries, conf, *words):
    done = subprocess.run(
        [os.path.join(binaries, "supervisorctl"), "-c", conf, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        universal_newlines=True, timeout=STOP_SECONDS_MAX,
    )  # fmt: skip
    return done.returncode, done.stdout.strip()


def running(binaries, conf):
    """Process id of the supervisor that answers, or None."""
    status, text = ask(binaries, conf, "pid")
    return int(text) if status == 0 and text.isdigit() and int(text) > 0 else None


def until(claim, seconds, what):
    deadline = time.monotonic() + seconds
    while not claim():
        if time.monotonic() > deadline:
            sys.exit(
                "error[service.supervisor]: cannot %s: not done after %d s\nnext: see supervisord.log beside the services' logs" % (what, seconds)
            )
        time.sleep(POLL_SECONDS)


def main(binaries, conf, stamp):
    whole = hashlib.sha256()
    for path in (conf, stamp):
        with open(path, "rb") as file:
            whole.update(hashlib.sha256(file.read()).digest())
    identifier = "kalium-" + whole.hexdigest()[:16]
    pid = running(binaries, conf)
    if pid is not None:
        with open("/proc/%d/cmdline" % pid, "rb") as file:
            if identifier.encode() in file.read().split(b"\0"):
                print("unchanged")
                return
        ask(binaries, conf, "shutdown")
        until(lambda: not os.path.exists("/proc/%d" % pid), STOP_SECONDS_MAX, "stop the supervisor")
    done = subprocess.run(
        [os.path.join(binaries, "supervisord"), "-c", conf, "--identifier", identifier], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, universal_newlines=True, cwd="/", timeout=START_SECONDS_MAX, env=ENVIRONMENT,
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(
            "error[service.supervisor]: cannot start the supervisor: %s\nnext: mend what it says, then run the same command again"
            % done.stdout.strip()
        )
    until(lambda: running(binaries, conf) is not None, START_SECONDS_MAX, "start the supervisor")
    print("changed")


if __name__ == "__main__":
    main(*sys.argv[1:])
