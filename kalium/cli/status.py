"""`kalium status`: what is in force on the site, by the word of its controller. Exit 1 when something is asked and not in force."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kalium.audit.chain import parse
from kalium.audit.verify import anchors_of
from kalium.cli.controller import CONFIG
from kalium.controller import client
from kalium.controller.config import Config, load
from kalium.controller.server import operator_key
from kalium.errors import EXIT_DONE, EXIT_NO, KaliumError
from kalium.policy.automaton import Mode
from kalium.policy.envelope import verify
from kalium.policy.limits import ENVELOPE_BYTES_MAX
from kalium.policy.message import printable
from kalium.protocol.frames import StatusReport

TEXT_MAX = 120
AUDIT_TAIL_BYTES = 1024 * 1024  # of the audit log: what is older is the business of `kalium audit verify`
UNKNOWN = "?"
EXAMPLES = """\
examples:
  kalium status
  kalium status --output json | jq '.instances[] | select(.in_force | not)'

It asks the controller that the configuration starts, so it runs where that controller runs.
"""


def register(subparsers: Any) -> None:
    """Add the command `status`."""
    parser = subparsers.add_parser(
        "status",
        help="what is in force on the site",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help=f"the controller's configuration (default: {CONFIG})")
    parser.add_argument("--output", choices=("text", "json"), default="text", help="text for people, json for programs")


def run(arguments: argparse.Namespace) -> int:
    """Ask, and print."""
    config = load(arguments.config)
    document = document_of(client.status(config), modes_asked(config), audit_heads(config))
    print(json.dumps(document, indent=2) if arguments.output == "json" else "\n".join(text_of(document, now_ms=int(time.time() * 1000))))
    return EXIT_DONE if document["ok"] else EXIT_NO


def modes_asked(config: Config) -> dict[tuple[str, int], str]:
    """The mode of each (app, version) in the directory of policies. What cannot be read or verified is left out: the controller says why."""
    found = {}
    try:
        key = operator_key(config)
        for path in sorted(config.policies_dir.glob("*.signed.json")):
            with path.open("rb") as file:
                policy = verify(file.read(ENVELOPE_BYTES_MAX + 1), key)
            found[policy.app, policy.version] = policy.mode.value
    except (KaliumError, OSError):
        return found
    return found


def audit_heads(config: Config) -> dict[str, Any] | None:
    """The last entry of the controller's audit log, and the last of each node that is on record there; None without a log.

    As it stands at the end of the file: what holds is for `kalium audit verify` to say.
    """
    if config.audit is None:
        return None
    try:
        with config.audit.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - AUDIT_TAIL_BYTES))
            lines = [line for raw in file.read(AUDIT_TAIL_BYTES).splitlines(keepends=True) if (line := parse(raw)) is not None]
    except OSError as error:
        return {"fault": error.strerror or str(error), "seq": 0, "hash": "", "nodes": []}
    nodes = {anchor.node: anchor.place for anchor in anchors_of(lines, lambda: "")}
    return {
        "fault": "" if lines else "no entry yet",
        "seq": lines[-1].seq if lines else 0,
        "hash": lines[-1].hash if lines else "",
        "nodes": [{"node": node, "seq": place.seq, "hash": place.hash} for node, place in sorted(nodes.items())],
    }


def document_of(report: StatusReport, modes: Mapping[tuple[str, int], str], audit: dict[str, Any] | None) -> dict[str, Any]:
    """The report for programs. `ok` is false when an instance is asked to enforce and does not."""
    columns = zip(report.node, report.app, report.function, report.asked, report.mode, report.version, report.count, strict=True)
    instances = [
        {
            "node": node, "app": app, "function": function, "asked": asked, "mode": mode, "version": version, "count": count,
            "in_force": not (asked == Mode.ENFORCE.value and mode != asked and count > 0),
        }
        for node, app, function, asked, mode, version, count in columns
    ]  # fmt: skip
    return {
        "ok": all(row["in_force"] for row in instances),
        "controller": report.controller,
        "controllers": list(report.controllers),
        "store": report.store,
        "started_ms": report.started_ms,
        "agents": report.agents,
        "calls": report.calls,
        "invocations": report.invocations,
        "apps": [
            {"app": app, "version": version, "mode": modes.get((app, version), UNKNOWN)} for app, version in sorted(report.policies.items())
        ],
        "instances": sorted(instances, key=lambda row: (row["in_force"], row["app"], row["function"], row["node"], row["version"], row["mode"])),
        "denied": counts(report.denied, "reason"),
        "would_deny": counts(report.would_deny, "reason"),
        "fail_modes": counts(report.fail_modes, "fail_mode"),
        "evicted": [{"reason": reason, "count": count} for reason, count in sorted(report.evicted.items())],
        "audit": audit,
    }  # fmt: skip


def counts(table: Mapping[str, int], second: str) -> list[dict[str, Any]]:
    """The counts of a report, whose keys are an app and a reason or fail mode with a space between."""
    rows = [(*key.rpartition(" ")[::2], count) for key, count in table.items()]
    return [{"app": app, second: value, "count": count} for app, value, count in sorted(rows)]


def text_of(document: Mapping[str, Any], *, now_ms: int) -> Iterator[str]:
    """The report for people."""
    others = [name for name in document["controllers"] if name != document["controller"]]
    started = datetime.fromtimestamp(document["started_ms"] / 1000, timezone.utc)
    name = printable(document["controller"] or UNKNOWN, TEXT_MAX)
    yield f"controller   {name}, up {duration(now_ms - document['started_ms'])} since {started:%Y-%m-%d %H:%M:%S} UTC"
    yield f"store        {document['store'] or UNKNOWN}"
    yield f"others       {', '.join(printable(other, TEXT_MAX) for other in others) or 'none'}"
    yield f"agents       {document['agents']}"
    yield f"live         {document['calls']} calls, {document['invocations']} invocations"
    yield f"audit        {audit_text(document['audit'])}"
    yield from table("APP VERSION ASKED", [(row["app"], row["version"], row["mode"]) for row in document["apps"]], "no policy is loaded")
    yield from table(
        "FUNCTION NODE VERSION INSTANCES ASKED EFFECTIVE",
        [
            (
                f"{row['app']}/{row['function']}", row["node"], row["version"], row["count"], row["asked"] or "-",
                row["mode"] + ("" if row["in_force"] else "  <-- NOT IN FORCE"),
            )
            for row in document["instances"]
        ],
        "no instance is running",
    )  # fmt: skip
    yield from table("DENIED REASON COUNT", [(row["app"], row["reason"], row["count"]) for row in document["denied"]], "")
    yield from table("WOULD-DENY REASON COUNT", [(row["app"], row["reason"], row["count"]) for row in document["would_deny"]], "")
    yield from table("WITHOUT-CONTROLLER FAIL-MODE COUNT", [(row["app"], row["fail_mode"], row["count"]) for row in document["fail_modes"]], "")
    yield from table("EVICTED COUNT", [(row["reason"], row["count"]) for row in document["evicted"]], "")


def audit_text(audit: Mapping[str, Any] | None) -> str:
    """Where the audit logs stand, in one line."""
    if audit is None:
        return "there is no audit log"
    nodes = ", ".join(f"{printable(row['node'], TEXT_MAX)} {row['seq']} {row['hash'][:12]}" for row in audit["nodes"])
    own = audit["fault"] or f"entry {audit['seq']} {audit['hash'][:12]}"
    return f"{own}; on record of nodes: {nodes or 'none'}"


def table(header: str, rows: Sequence[Sequence[object]], otherwise: str) -> Iterator[str]:
    """Rows under a header, in columns; `otherwise` when there are none, and nothing at all when that is empty too."""
    if not rows and not otherwise:
        return
    yield ""
    if not rows:
        yield otherwise
        return
    cells = [header.split(" "), *([printable(str(cell), TEXT_MAX) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    yield from ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells)


def duration(ms: int) -> str:
    """A time for people: its two largest units."""
    seconds = max(0, ms) // 1000
    parts = [(seconds // 86400, "d"), (seconds // 3600 % 24, "h"), (seconds // 60 % 60, "min"), (seconds % 60, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{value} {unit}" for value, unit in parts[:2])
