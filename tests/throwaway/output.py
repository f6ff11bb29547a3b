"""What Ansible printed, read as a person reads it."""

from __future__ import annotations

import re

RECAP = re.compile(r"^(?P<host>\S+)\s+: (?P<counts>(?:\w+=\d+\s*)+)$", re.MULTILINE)


def recap(text: str) -> dict[str, dict[str, int]]:
    """The recap's counts by host, such as {"node1": {"ok": 12, "changed": 0, "failed": 0}}; of several recaps the last."""
    return {
        match["host"]: {name: int(number) for name, number in (count.split("=") for count in match["counts"].split())}
        for match in RECAP.finditer(text)
    }


def changed(text: str) -> list[str]:
    """Names of the tasks that changed something, in order; of one that did so on several hosts once for each."""
    task, names = "", []
    for line in text.splitlines():
        if line.startswith(("TASK [", "RUNNING HANDLER [")):
            task = line.split("[", 1)[1].rpartition("]")[0]
        elif line.startswith("changed: ["):
            names.append(task)
    return names
