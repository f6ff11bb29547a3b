#!/usr/bin/env python3
"""A kubeconfig for one of the site's own parts: `kubeconfig.py KUBEADM CONFIGURATION FILE USER ORGANIZATION DAYS RENEW_DAYS`.

FILE is made anew when it is missing, was made for somebody else, by another CA or from another configuration, or ends within RENEW_DAYS.
Prints `changed` or `unchanged`. What it was made from is in FILE.json, so the certificate need not be parsed.

Runs as root on the control plane under the host's own Python, from 3.6 on, with nothing but the standard library.
"""

import hashlib
import json
import os
import subprocess
import sys
import time

CA = "/etc/kubernetes/pki/ca.crt"
DAY_SECONDS = 86400


def digest_of(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def holds(path, wanted, until):
    try:
        with open(path + ".json") as file:
            known = json.load(file)
    except (OSError, ValueError):
        return False
    return os.path.exists(path) and known["ends"] >= until and all(known.get(key) == value for key, value in wanted.items())


def write(path, text):
    descriptor = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    os.replace(path + ".new", path)


def main(kubeadm, configuration, path, user, organization, days, renew_days):
    wanted = {"user": user, "organization": organization, "ca": digest_of(CA)}
    now = time.time()
    if holds(path, wanted, now + int(renew_days) * DAY_SECONDS):
        print("unchanged")
        return
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    command = [kubeadm, "kubeconfig", "user", "--config", configuration, "--client-name", user, "--org", organization]
    command += ["--validity-period", "%dh" % (int(days) * 24)]
    made = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    if made.returncode != 0:
        sys.exit(
            "error[kubernetes.kubeconfig]: cannot make a kubeconfig for %s: %s\nnext: mend what it says, then run the same command again"
            % (user, made.stderr.strip())
        )
    write(path, made.stdout)
    write(path + ".json", json.dumps(dict(wanted, ends=now + int(days) * DAY_SECONDS)))
    print("changed")


if __name__ == "__main__":
    main(*sys.argv[1:])
