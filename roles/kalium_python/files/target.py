#!/usr/bin/env python3
"""Say what wheels have to fit, as one JSON object: the interpreter that runs this, and the host's machine type and C library.

Runs on hosts, also under Python 3.6, with nothing but the standard library.
"""

import json
import os
import platform
import sys


def target():
    name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    return {
        "implementation": sys.implementation.name,
        "version": platform.python_version(),
        "machine": platform.machine(),
        "glibc": version if name == "glibc" else "",
    }


if __name__ == "__main__":
    print(json.dumps(target(), sort_keys=True))
