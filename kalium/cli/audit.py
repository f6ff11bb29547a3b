"""`kalium audit`: verify an audit log of an agent or of a controller, and show its entries."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kalium.audit import files
from kalium.audit.chain import EVENTS
from kalium.audit.keys import public_key
from kalium.audit.verify import Report, Verification
from kalium.errors import EXIT_DONE, EXIT_NO

EXAMPLES = """\
examples:
  kalium audit verify /var/log/kalium/agent/audit.jsonl* --key node0.pub
  kalium audit verify /var/log/kalium/agent/audit.jsonl* --key node0.pub --anchors controller-audit.jsonl* --anchors-key controller.pub
  kalium audit show /var/log/kalium/agent/audit.jsonl --event verdict --last 5

Files of one log may be named in any order.
"""


def register(subparsers: Any) -> None:
    """Add the noun `audit` and its verbs."""
    noun = subparsers.add_parser(
        "audit", help="verify audit logs", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = noun.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Any, purpose: str) -> Any:
        parser = verbs.add_parser(name, help=purpose, description=purpose)
        parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="the current file of one log, and those that were full before it")
        parser.add_argument("--output", choices=("text", "json"), default="text", help="text for people, json for programs")
        parser.set_defaults(run=run)
        return parser

    parser = verb("verify", run_verify, "find what was edited, cut, re-ordered, repeated or forged; exit 1 when anything was")
    parser.add_argument("--key", type=Path, required=True, metavar="PUB", help="the writer's public key, Ed25519 in PEM")
    parser.add_argument(
        "--anchors", action="extend", nargs="+", type=Path, default=[], metavar="LOG",
        help="audit logs of the controllers, which know how far an agent's log had come",
    )  # fmt: skip
    parser.add_argument("--anchors-key", type=Path, metavar="PUB", help="the controllers' public key: verify their logs, too")

    parser = verb("show", run_show, "show entries; nothing is verified")
    parser.add_argument("--event", action="append", default=[], choices=sorted(EVENTS), help="of this event only; may be repeated")
    parser.add_argument("--last", type=int, default=0, metavar="N", help="the last N that fit; default: all")


def run_verify(arguments: argparse.Namespace) -> int:
    """Verify a log, and those that anchor it."""
    key = public_key(arguments.key)
    anchors_key = public_key(arguments.anchors_key) if arguments.anchors_key else None
    paths = files.in_order(arguments.files)
    anchors = None
    if arguments.anchors:
        anchors = files.Anchors(arguments.anchors, files.name_in(files.first_line(paths[0]), "name"), anchors_key)
    report = Verification(key, anchors=anchors).run(files.sources(paths))
    reports = [report, *(anchors.reports if anchors else ())]
    if arguments.output == "json":
        print(json.dumps({**_for_programs(report), "controllers": [_for_programs(each) for each in reports[1:]]}, indent=2, sort_keys=True))
    else:
        print("\n".join(line for each in reports for line in _for_people(each)))
    return EXIT_DONE if all(each.is_good for each in reports) else EXIT_NO


def _for_programs(report: Report) -> dict[str, Any]:
    return {"good": report.is_good, **dataclasses.asdict(report)}


def _for_people(report: Report) -> Iterator[str]:
    verdict = "good" if report.is_good else f"NOT GOOD, {len(report.findings) + report.findings_beyond} findings"
    yield f"{report.writer or 'log'} {report.name}: {verdict}".replace(" :", ":")
    yield (
        f"  entries {report.first_seq} to {report.last_seq} of log {report.log} in {len(report.files)} files, {report.bytes} bytes,"
        f" {report.starts} starts, {report.heads} heads, {report.anchors} anchors that agree"
    )
    if report.signed_seq:
        yield f"  signed up to entry {report.signed_seq}, {_moment(report.signed_ms)}"
    if report.clock_back:
        yield f"  the clock went back {report.clock_back} times; the order of the lines is the order of what happened"
    for each in report.findings:
        yield f"finding[{each.code}]: {each.file}:{each.line}{f', entry {each.seq}' if each.seq else ''}: {each.text}"
    if report.findings_beyond:
        yield f"and {report.findings_beyond} more"
    for text in report.unknown:
        yield f"not known: {text}"


def run_show(arguments: argparse.Namespace) -> int:
    """Print entries. Exit 1 when none fits."""
    fitting = (entry for entry in files.entries(files.in_order(arguments.files)) if not arguments.event or entry.get("event") in arguments.event)
    chosen = collections.deque(fitting, maxlen=arguments.last) if arguments.last > 0 else fitting
    code = EXIT_NO
    for entry in chosen:
        print(json.dumps(entry) if arguments.output == "json" else _entry(entry))
        code = EXIT_DONE
    return code


def _entry(entry: Mapping[str, Any]) -> str:
    rest = " ".join(f"{key}={_value(value)}" for key, value in entry.items() if key not in ("seq", "time_ms", "event") and value not in ("", [], {}))
    return f"{entry['seq']:>8} {_moment(entry['time_ms'])} {entry['event']:<10} {rest}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) and value.isascii() and value.isprintable() and " " not in value else json.dumps(value)


def _moment(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
