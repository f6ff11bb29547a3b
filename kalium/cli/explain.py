"""`kalium explain VERDICT_ID`: one verdict with its policy line, its state, what led there, and a picture."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kalium.cli.files import read_file
from kalium.cli.policy import VERDICTS, compiled_from, is_yaml
from kalium.errors import EXIT_DONE, EXIT_NO, KaliumError
from kalium.policy import picture
from kalium.policy.automaton import CompiledPolicy, MessageAutomaton
from kalium.policy.limits import ENVELOPE_BYTES_MAX
from kalium.policy.message import Reason, printable
from kalium.policy.picture import Scene, Step

POLICIES = Path("/etc/kalium/policies")
ID = re.compile(r"[0-9a-f]{16}")
APP = re.compile(r"[a-z0-9-]{1,63}")
LINE_BYTES_MAX = 64 * 1024  # of a log; a longer line is none of ours
RECORDS_MAX = 2000  # of a call: its last ones
TEXT_MAX = 240
EDGES = ("start", "invoke")
EXAMPLES = """\
examples:
  kalium explain 00c0ffee00000005
  kalium explain 00c0ffee00000005 --log node0.jsonl --log node1.jsonl --policy policies/hello-retail.yml
  kalium explain 00c0ffee00000005 --format dot | dot -Tsvg -o verdict.svg

The id of a verdict stands in its line of the verdict log and of the audit log; --log takes either.
"""

Record = Mapping[str, Any]


def register(subparsers: Any) -> None:
    """Add the command `explain`."""
    parser = subparsers.add_parser(
        "explain",
        help="why a verdict came out as it did",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("id", type=_id, metavar="VERDICT_ID", help="16 hexadecimal digits")
    parser.add_argument(
        "--log", type=Path, action="append", metavar="FILE", help=f"a verdict or audit log; repeat it for those of other nodes (default: {VERDICTS})"
    )
    parser.add_argument(
        "--policy", type=Path, metavar="FILE", help=f"the policy, in YAML, compiled or signed (default: {POLICIES}/APP.signed.json, if it is there)"
    )
    parser.add_argument("--format", choices=("text", "dot"), default="text", help="a drawing for a terminal, or the graph alone for Graphviz")
    parser.add_argument("--output", choices=("text", "json"), default="text", help="text for people, json for programs")


def _id(text: str) -> str:
    if not ID.fullmatch(text):
        raise argparse.ArgumentTypeError("is not 16 hexadecimal digits in lower case")
    return text


@dataclass(frozen=True)
class At:
    """What is at hand of the policy that judged: its automata, and the text of its lines."""

    where: str
    policy: CompiledPolicy
    source: Sequence[str]  # lines of the YAML; empty of a compiled policy

    def line(self, function: str, number: int) -> str:
        """The text of a line, "" for one that is not there."""
        if 0 < number <= len(self.source):
            return self.source[number - 1].strip()
        automaton = self.policy.functions.get(function)
        parts = [automaton, automaton.startup] if automaton is not None else []
        return next((symbol.text for part in parts if part is not None for symbol in part.symbols if symbol.line == number), "")


def run(arguments: argparse.Namespace) -> int:
    """Find the verdict and what belongs to it, and print it."""
    logs = arguments.log or [VERDICTS]
    verdict = next((record for path in logs for record in records(path, arguments.id) if record.get("id") == arguments.id), None)
    if verdict is None:
        print(f"no verdict {arguments.id} in {', '.join(map(str, logs))}; name the logs of its node, also older ones, by --log", file=sys.stderr)
        return EXIT_NO
    earlier = before(verdict, logs)
    held, note = policy_of(verdict, arguments.policy)
    steps = [each for each in earlier if is_of_one_invocation(each, verdict)]
    scene = scene_of(verdict, steps, held)
    if arguments.format == "dot":
        sys.stdout.write(picture.dot(scene))
    elif arguments.output == "json":
        document = {
            "verdict": verdict, "line": held.line(str(verdict.get("function")), number(verdict, "line")) if held else "", "states": scene.states(),
            "invocation": steps, "call": [each for each in earlier if is_edge(each)],
        }  # fmt: skip
        print(json.dumps(document, indent=2, sort_keys=True))
    else:
        drawn = ["", *picture.text(scene)] if scene.states() else []  # a start that is refused has been nowhere
        print("\n".join([*head(verdict, held, note), *drawn, *call_lines(verdict, earlier)]))
    return EXIT_DONE


def records(path: Path, needle: str) -> Iterator[Record]:
    """The verdicts of a log whose line holds `needle`. An entry of an audit log is unwrapped; a line that is cut off is left out."""
    wanted = needle.encode()
    try:
        with path.open("rb") as file:
            for line in file:
                if wanted in line and line.endswith(b"\n") and len(line) <= LINE_BYTES_MAX:
                    yield from _verdicts(line, path)
    except OSError as error:
        raise KaliumError(
            "cli.file", f"cannot read verdicts from {path}", error.strerror or str(error), "the agent writes it as root; name another file by --log"
        ) from error


def _verdicts(line: bytes, path: Path) -> Iterator[Record]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise KaliumError(
            "policy.verdict", f"cannot read verdicts from {path}", f"a line is not JSON: {error}", "move the damaged file away"
        ) from error
    if isinstance(record, dict) and isinstance(record.get("entry"), dict):
        record = record["entry"]
    if isinstance(record, dict) and record.get("event") == "verdict":
        yield record


def before(verdict: Record, logs: Sequence[Path]) -> list[Record]:
    """The verdicts of the same call up to this one, in the order of time; without a call those of the instance."""
    needle = str(verdict.get("call") or verdict.get("instance") or "")
    found: dict[tuple[str, str], Record] = {}
    for path in logs:
        for record in records(path, needle) if needle else ():
            same = all(record.get(key) == verdict.get(key) for key in (("app", "call") if verdict.get("call") else ("instance", "invocation")))
            if same and order(record) < order(verdict):
                found[str(record.get("id")), str(record.get("node"))] = record  # a denial stands in both kinds of log
    return list(deque(sorted(found.values(), key=order), maxlen=RECORDS_MAX))


def order(record: Record) -> tuple[int, str, int]:
    """By time; of one node, whose clock this is, by the number of the line."""
    return number(record, "time_ms"), str(record.get("node")), int(str(record.get("id", ""))[8:] or "0", 16)


def number(record: Record, key: str) -> int:
    """A field that is a whole number; 0 when it is not."""
    value = record.get(key)
    return value if type(value) is int else 0


def is_of_one_invocation(record: Record, verdict: Record) -> bool:
    """Whether both belong to one invocation of one instance."""
    return all(record.get(key) == verdict.get(key) for key in ("instance", "call", "invocation"))


def is_edge(record: Record) -> bool:
    """Whether the verdict is about the call and not only about its function."""
    return record.get("kind") in EDGES


def policy_of(verdict: Record, path: Path | None) -> tuple[At | None, str]:
    """The policy that judged, if it is at hand, and otherwise why it is not."""
    app, version = str(verdict.get("app")), number(verdict, "policy_version")
    if path is None and not APP.fullmatch(app):
        return None, "not at hand: no app has such a name"
    where = path or POLICIES / f"{app}.signed.json"
    if path is None and not where.is_file():
        return None, f"not at hand: {where} is not there; name it by --policy"
    data = read_file(where, ENVELOPE_BYTES_MAX)
    policy = CompiledPolicy.parse(compiled_from(data, where))
    if (policy.app, policy.version) != (app, version):
        return None, f"not at hand: {where} is version {policy.version} of {policy.app}"
    return At(str(where), policy, data.decode("utf-8", "replace").splitlines() if is_yaml(data) else ()), ""


def scene_of(verdict: Record, steps: Sequence[Record], held: At | None) -> Scene:
    """The picture of the verdict's invocation."""
    function = held.policy.functions.get(str(verdict.get("function"))) if held is not None else None
    automaton: MessageAutomaton | None = function
    if function is not None and not verdict.get("invocation"):
        automaton = function.startup
    name = printable(str(verdict.get("function")), TEXT_MAX)
    what = f"invocation of {name}" if verdict.get("invocation") else f"{name}, outside an invocation"
    return Scene(what, [step_of(each) for each in steps], step_of(verdict), automaton)


def step_of(record: Record) -> Step:
    """A verdict as a picture has it. What audit let pass was refused as far as the cursor goes."""
    states = record.get("states")
    return Step(
        message=str(record.get("message")),
        line=number(record, "line"),
        states=tuple(state for state in states if type(state) is int) if isinstance(states, list) else (),
        allowed=record.get("allowed") is True and not record.get("would_deny"),
        reason=printable(str(record.get("reason")), TEXT_MAX),
    )


def head(verdict: Record, held: At | None, note: str) -> Iterator[str]:
    """What was decided, and by what."""

    def said(key: str) -> str:
        return printable(str(verdict.get(key) or "-"), TEXT_MAX)

    outcome = "would have been denied" if verdict.get("would_deny") else "allowed" if verdict.get("allowed") else "denied"
    yield f"verdict {said('id')}: {outcome}, {said('reason')}"
    line = number(verdict, "line")
    rows = [
        ("when", moment(verdict)),
        ("where", f"node {said('node')}, instance {said('instance')[:12]}"),
        ("function", f"{said('app')}/{said('function')}"),
    ]
    rows += [("call", said("call")), ("invocation", said("invocation")), ("mode", said("mode"))]
    rows += [("fail mode", f"{said('fail_mode')}: no controller answered")] if verdict.get("fail_mode") else []
    rows += [("observed", said("message") + (f", peer {said('peer')}" if verdict.get("peer") else ""))]
    expected = [printable(str(each), TEXT_MAX) for each in verdict.get("expected") or ()]
    if outcome != "allowed":
        rows += [("expected", text) for text in expected or otherwise_expected(verdict, held)]
    rows += [("policy", f"version {number(verdict, 'policy_version')}, {held.where if held is not None else note}")]
    if line:
        text = printable(held.line(str(verdict.get("function")), line), TEXT_MAX) if held is not None else ""
        rows += [("line", f"{line}{': ' + text if text else ''}{'' if outcome == 'allowed' else ', which allows it at another place'}")]
    yield from (f"  {name:<11} {value}" for name, value in rows)


def otherwise_expected(verdict: Record, held: At | None) -> list[str]:
    """What could have stood in place of a message where the verdict itself lists nothing."""
    reason = verdict.get("reason")
    if reason == Reason.NOT_AN_ENTRY.value and held is not None:
        return [f"the token of a granted invoke, or an entry: {', '.join(sorted(held.policy.entries)) or 'there is none'}"]
    return ["no further message"] if reason in (Reason.OUT_OF_ORDER.value, Reason.NOT_IN_POLICY.value) else []


def call_lines(verdict: Record, earlier: Sequence[Record]) -> Iterator[str]:
    """The way of the call through its functions: starts and invokes, with the time since the first one."""
    edges = [each for each in earlier if is_edge(each)]
    if not verdict.get("call") or not edges:
        return
    edges += [verdict] if is_edge(verdict) else []
    yield ""
    yield f"call {printable(str(verdict.get('call')), TEXT_MAX)} so far"
    first = number(edges[0], "time_ms")
    for each in edges:
        is_here = is_of_one_invocation(each, verdict)
        outcome = "" if each.get("allowed") and not each.get("would_deny") else f"  refused: {printable(str(each.get('reason')), TEXT_MAX)}"
        fail_mode = f"  fail mode {printable(str(each.get('fail_mode')), TEXT_MAX)}" if each.get("fail_mode") else ""
        what = printable(f"{each.get('node')} {each.get('function')}: {each.get('message')}", TEXT_MAX)
        yield f"  +{number(each, 'time_ms') - first:>6} ms {'*' if is_here else ' '} {what}{outcome}{fail_mode}"


def moment(record: Record) -> str:
    """When it was, to the millisecond, in UTC."""
    return datetime.fromtimestamp(number(record, "time_ms") / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] + " UTC"
