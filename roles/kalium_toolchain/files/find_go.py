#!/usr/bin/env python3
"""Print the first Go that is at least MINIMUM: `find_go.py MINIMUM`; exit status 1 and no output if there is none.

PATH's own comes first, then the places where distributions and people put one, then the one of roles/kalium_toolchain.
"""

import os
import re
import shutil
import subprocess
import sys

ASK_SECONDS_MAX = 20
ELSEWHERE = ["/usr/local/go/bin/go", "/usr/lib/go-1.27/bin/go", "/usr/lib/go-1.26/bin/go", "/usr/lib/go/bin/go"]
OURS = "/opt/kalium/toolchain/go/bin/go"


def version_of(program):
    """The version that `program` says, as numbers; None when it does not run. It must not fetch another toolchain to answer."""
    try:
        done = subprocess.run(
            [program, "env", "GOVERSION"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, universal_newlines=True,
            timeout=ASK_SECONDS_MAX, env=dict(os.environ, GOTOOLCHAIN="local"), cwd="/",
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"go(\d+)\.(\d+)(?:\.(\d+))?", done.stdout)
    return tuple(int(part or 0) for part in found.groups()) if found and done.returncode == 0 else None


def main(minimum):
    least = tuple(int(part) for part in ([*minimum.split("."), "0"])[:3])
    for program in filter(None, [shutil.which("go"), *ELSEWHERE, OURS]):
        version = version_of(program)
        if version is not None and version >= least:
            print(program)
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
