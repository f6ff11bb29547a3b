#!/usr/bin/env python3
"""Images of an archive in containerd: `images.py look|import SOCKET ARCHIVE STAMP SHA256`.

`look` prints `present` when the archive of that digest was imported and containerd still has every image of it, else `absent`: a full disk
makes the kubelet remove images that nothing runs. `import` refuses an archive of another digest, imports it and writes the stamp.

Runs as root under the host's own Python, from 3.6 on, with nothing but the standard library.
"""

import hashlib
import json
import os
import re
import subprocess
import sys

IMPORT_SECONDS_MAX = 900
BLOCK_BYTES = 1 << 20
UNPACKED = re.compile(r"^unpacking (\S+)", re.MULTILINE)


def ctr(socket, *words):
    """Exit status and merged output; 127 when there is no ctr yet."""
    try:
        done = subprocess.run(
            ["ctr", "--address", socket, "--namespace", "k8s.io", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            universal_newlines=True, timeout=IMPORT_SECONDS_MAX,
        )  # fmt: skip
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout


def is_present(socket, stamp, sha256):
    try:
        with open(stamp) as file:
            known = json.load(file)
    except (OSError, ValueError):
        return False
    status, text = ctr(socket, "images", "list", "--quiet")
    return status == 0 and known["sha256"] == sha256 and set(known["images"]) <= set(text.split())


def digest_of(path):
    whole = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(BLOCK_BYTES), b""):
            whole.update(block)
    return whole.hexdigest()


def fail(archive, found, next_step):
    sys.exit("error[containerd.import]: cannot import %s: %s\nnext: %s" % (archive, found, next_step))


def bring(socket, archive, stamp, sha256):
    found = digest_of(archive)
    if found != sha256:
        fail(archive, "it has the sha256 %s, not %s" % (found, sha256), "run the same command again; it is copied anew")
    status, text = ctr(socket, "images", "import", archive)
    images = UNPACKED.findall(text)
    if status != 0 or not images:
        fail(
            archive, text.strip() or "ctr ended with %d and named no image" % status, "mend what it says, for example free some space, and run again"
        )
    with open(stamp + ".new", "w") as file:
        json.dump({"sha256": sha256, "images": sorted(images)}, file, indent=1)
    os.replace(stamp + ".new", stamp)


def main(verb, socket, archive, stamp, sha256):
    if verb == "look":
        print("present" if is_present(socket, stamp, sha256) else "absent")
    else:
        bring(socket, archive, stamp, sha256)


if __name__ == "__main__":
    main(*sys.argv[1:])
