"""Where the testbed is: names and addresses of its hosts, the folder of its keys and logs, its locks."""

from __future__ import annotations

import os
from pathlib import Path

from throwaway.roots import CACHE

SUBNET, PREFIX = "10.139.0.0/24", 24
# This machine, whose end of the network it is, and where the hosts' default route leads.
MACHINE_ADDRESS, ROUTER_ADDRESS = "10.139.0.1", "10.139.0.254"
MACHINE_LINK = "kalium-test1"
ADDRESSES = {"node0": "10.139.0.10", "node1": "10.139.0.11", "node2": "10.139.0.12"}

# Root's: what hosts are while they run, and the lock of the process that holds them.
RUNNING = CACHE / "cluster"
LOCK = CACHE / "cluster.lock"


def caches() -> Path:
    """The user's cache of the project, as the Makefile and roles/kalium_layout take it."""
    return Path(os.environ.get("KALIUM_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kalium")


def folder() -> Path:
    """The state folder: `login` and `known_hosts` for SSH, `NAME/console.log` of each host, `keeper.log`."""
    return caches() / "cluster" / "state"


def artifacts() -> Path:
    """What `builds.py` made last: programs, images and artifacts.json."""
    return caches() / "cluster" / "artifacts"
