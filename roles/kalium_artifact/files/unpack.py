#!/usr/bin/env python3
"""Install members of an archive: `unpack.py look|unpack ARCHIVE STAMP SHA256 FOLDER MODE MEMBER ...`.

`look` prints `present` when FOLDER holds the members as they came out of the archive of that digest, else `absent`; the archive itself
need not be there. `unpack` refuses an archive of another digest, writes each member under its last name at once, and then the stamp.

Runs under the host's own Python, from 3.6 on, with nothing but the standard library.
"""

import hashlib
import json
import os
import sys
import tarfile
import tempfile

BLOCK_BYTES = 1 << 20


def fail(attempted, found, next_step):
    sys.exit("error[artifact.archive]: cannot %s: %s\nnext: %s" % (attempted, found, next_step))


def digest(file):
    whole = hashlib.sha256()
    for block in iter(lambda: file.read(BLOCK_BYTES), b""):
        whole.update(block)
    return whole.hexdigest()


def digest_of(path):
    """None: there is no such file."""
    try:
        with open(path, "rb") as file:
            return digest(file)
    except OSError:
        return None


def is_present(stamp, sha256, folder, members):
    try:
        with open(stamp) as file:
            known = json.load(file)
    except (OSError, ValueError):
        return False
    paths = [os.path.join(folder, os.path.basename(member)) for member in members]
    return known["sha256"] == sha256 and all(path in known["files"] and digest_of(path) == known["files"][path] for path in paths)


def replace(path, mode, blocks):
    """Write `path` at once, so that a program which runs keeps the old file."""
    descriptor, temporary = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".unpack-")
    with os.fdopen(descriptor, "wb") as file:
        for block in blocks:
            file.write(block)
    os.chmod(temporary, mode)
    os.replace(temporary, path)


def unpack(archive, stamp, sha256, folder, mode, members):
    found = digest(archive)
    if found != sha256:
        fail("unpack " + stamp, "the archive has the sha256 %s, not %s" % (found, sha256), "run the same command again; it is fetched anew")
    archive.seek(0)
    os.makedirs(folder, mode=0o755, exist_ok=True)
    files = {}
    with tarfile.open(fileobj=archive) as tar:
        entries = {os.path.normpath(entry.name): entry for entry in tar if entry.isfile()}
        for member in members:
            entry = entries.get(os.path.normpath(member))
            if entry is None:
                fail("unpack " + stamp, "the archive has no file %s" % member, "check the names of members against the pinned version")
            source, path = tar.extractfile(entry), os.path.join(folder, os.path.basename(member))
            replace(path, mode, iter(lambda source=source: source.read(BLOCK_BYTES), b""))
            files[path] = digest_of(path)
    replace(stamp, 0o644, [json.dumps({"sha256": sha256, "files": files}, indent=1, sort_keys=True).encode()])


def main(verb, archive, stamp, sha256, folder, mode, *members):
    if verb == "look":
        print("present" if is_present(stamp, sha256, folder, members) else "absent")
    else:
        with open(archive, "rb") as file:
            unpack(file, stamp, sha256, folder, int(mode, 8), members)


if __name__ == "__main__":
    main(*sys.argv[1:])
