#!/usr/bin/env python3
"""Give settings of the running kernel their values: `settings.py {NAME: VALUE}` as JSON; prints `changed` or `unchanged`.

A setting that has its value is not written, so that one which this host may not write (in a container) is accepted when it is right.

Runs under the host's own Python, from 3.6 on, with nothing but the standard library.
"""

import json
import sys


def main(settings, root="/proc/sys/"):
    changed = False
    for name, value in sorted(json.loads(settings).items()):
        try:
            with open(root + name.replace(".", "/")) as file:
                found = file.read().strip()
            if found != str(value):
                with open(root + name.replace(".", "/"), "w") as file:
                    file.write(str(value))
                changed = True
        except OSError as error:
            sys.exit(
                "error[node.setting]: cannot set %s to %s: %s\nnext: set it yourself on the host, or on the machine whose container the host is"
                % (name, value, error.strerror)
            )
    print("changed" if changed else "unchanged")


if __name__ == "__main__":
    main(sys.argv[1])
