#!/usr/bin/env python3
"""Count tests. `report.py go FILE` reads `go test -json` from standard input, prints what a person wants of it and keeps the counts;
`report.py sum FOLDER STATUS` adds up what is in FOLDER and ends with `N passed, N failed`, as every runner's last line does.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree  # noqa: ICN001  # the name the library's own pages use

COUNTED = {"pass": "passed", "fail": "failed", "skip": "skipped"}


def go(target: Path) -> int:
    """Print each package's result and the output of what failed; the exit status says whether all passed."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    output: dict[tuple[str, str], list[str]] = defaultdict(list)
    failed = False
    for line in sys.stdin:
        try:
            event = json.loads(line)
        except ValueError:  # what the compiler says stands between the events
            print(line, end="")
            continue
        key = (event.get("Package") or event.get("ImportPath", ""), event.get("Test", ""))
        action = event["Action"]
        if action in ("output", "build-output"):
            output[key].append(event["Output"])
        elif action in COUNTED and key[1]:
            counts[COUNTED[action]] += 1
            lines = output.pop(key, [])
            if action != "pass":
                print("".join(lines), end="")
        elif action in ("pass", "fail"):  # a package that is skipped has no tests
            print(f"{action:<5} {key[0]} ({event.get('Elapsed', 0):.1f} s)", flush=True)
        if action in ("fail", "build-fail"):
            failed = True
            if not key[1]:
                print("".join(output.pop(key, [])), end="", flush=True)
                counts["failed"] += action == "build-fail"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(counts), encoding="utf-8")
    return 1 if failed or not counts["passed"] else 0


def of_pytest(path: Path) -> dict[str, int]:
    """Counts of a junit file of pytest."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):  # noqa: S314  # pytest wrote it a moment ago
        tests, failures, errors, skipped = (int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped"))
        counts["passed"] += tests - failures - errors - skipped
        counts["failed"] += failures + errors
        counts["skipped"] += skipped
    return counts


def total(folder: Path, status: int) -> int:
    """Print one line a suite, then the sum. A run that failed outside of a test counts as one that failed."""
    whole = {"passed": 0, "failed": 0, "skipped": 0}
    for path in sorted(folder.glob("*")):
        counts = of_pytest(path) if path.suffix == ".xml" else json.loads(path.read_text(encoding="utf-8"))
        print(f"{path.stem:<14} {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped")
        for name, number in counts.items():
            whole[name] += number
    if status and not whole["failed"]:
        whole["failed"] = 1
    skipped = f", {whole['skipped']} skipped" if whole["skipped"] else ""
    print(f"{whole['passed']} passed, {whole['failed']} failed{skipped}")
    return status or (1 if whole["failed"] or not whole["passed"] else 0)


if __name__ == "__main__":
    if sys.argv[1] == "go":
        sys.exit(go(Path(sys.argv[2])))
    sys.exit(total(Path(sys.argv[2]), int(sys.argv[3])))
