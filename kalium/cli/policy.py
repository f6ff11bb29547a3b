"""`kalium policy`: lint, test, compile, sign, verify and show policies, put them in force, and explain the verdicts they led to."""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kalium.cli.files import read_file, write_atomically
from kalium.cli.main import imported
from kalium.errors import EXIT_DONE, EXIT_NO, EXIT_USAGE, KaliumError
from kalium.policy import envelope, examples, render
from kalium.policy.automaton import CompiledPolicy, decode
from kalium.policy.compile import compile_policy, first_error
from kalium.policy.envelope import SIGNED_FORMAT
from kalium.policy.limits import ENVELOPE_BYTES_MAX, VERSION_MAX
from kalium.policy.lint import lint, lint_compiled
from kalium.policy.message import Reason
from kalium.policy.schema import published
from kalium.policy.source import Finding, Severity

KEY_BYTES_MAX = 64 * 1024
CONTROLLER = Path("/etc/kalium/controller.json")
VERDICTS = Path("/var/log/kalium/verdicts.jsonl")
POLL_SECONDS = 0.1

EXAMPLES = """\
examples:
  kalium policy lint policies/*.yml
  kalium policy test policies/hello-retail.yml policies/hello-retail.examples.yml
  kalium policy sign policies/hello-retail.yml --key operator.key --out hello-retail.signed.json
  kalium policy verify hello-retail.signed.json --key operator.pub
  kalium policy apply hello-retail.signed.json
  kalium policy history hello-retail
  kalium policy rollback hello-retail --to 3 --key operator.key
  kalium policy show policies/hello-retail.yml --function product-photos-3-receive --format dot | dot -Tsvg -o receive.svg
  kalium policy explain --denied --last 5
"""


def register(subparsers: Any) -> None:
    """Add the noun `policy` and its verbs."""
    noun = subparsers.add_parser(
        "policy",
        help="write, check, compile and sign policies",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = noun.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Callable[[argparse.Namespace], int], purpose: str, *, has_output: bool = False) -> Any:
        parser = verbs.add_parser(name, help=purpose, description=purpose)
        parser.set_defaults(run=run)
        if has_output:
            parser.add_argument("--output", choices=("text", "json"), default="text", help="text for people, json for programs")
        return parser

    parser = verb("lint", run_lint, "report what is wrong, unused or wider than it looks; exit 1 when anything is an error", has_output=True)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="policies in YAML or compiled")

    parser = verb("test", run_test, "play a policy's examples; exit 1 when one fails", has_output=True)
    parser.add_argument("file", type=Path, metavar="POLICY", help="a policy in YAML, compiled or signed")
    parser.add_argument("examples", type=Path, metavar="EXAMPLES", help="the examples in YAML")

    parser = verb("compile", run_compile, "compile YAML to the form that guards and controllers execute")
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("-o", "--out", type=Path, help="where to write it (default: standard output)")
    parser.add_argument("--dry-run", action="store_true", help="compile, write nothing")

    parser = verb("sign", run_sign, "compile a policy, if it is YAML, and sign it with the operator's private key")
    parser.add_argument("file", type=Path, metavar="FILE", help="a policy in YAML or compiled")
    parser.add_argument("--key", type=Path, required=True, help="the operator's private key, Ed25519 in PEM")
    parser.add_argument("-o", "--out", type=Path, required=True, help="where to write the signed policy; replaced at once, never in part")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, write nothing")

    parser = verb("verify", run_verify, "check a signed policy; exit 1 when the signature or the policy does not hold", has_output=True)
    parser.add_argument("file", type=Path, metavar="SIGNED")
    parser.add_argument("--key", type=Path, required=True, help="the operator's public key, Ed25519 in PEM")

    parser = verb("show", run_show, "show a policy as states and messages; signatures are not checked", has_output=True)
    parser.add_argument("file", type=Path, metavar="FILE", help="a policy in YAML, compiled or signed")
    parser.add_argument("--function", action="append", default=[], metavar="NAME", help="this function only; may be repeated")
    parser.add_argument("--format", choices=("table", "dot"), default="table", help="a table, or a graph for Graphviz")

    _register_applying(verb)

    verb("schema", run_schema, "print the JSON Schema of policies, for editors")

    parser = verb("explain", run_explain, "show verdicts: what was sent, why it was allowed or denied; exit 1 when none is found", has_output=True)
    parser.add_argument("--log", type=Path, default=VERDICTS, help="the agent's verdict log (default: %(default)s)")
    parser.add_argument("--app", help="of this application only")
    parser.add_argument("--function", help="of this function only")
    parser.add_argument("--denied", action="store_true", help="denials only, and what audit would have denied")
    parser.add_argument("--last", type=_count, default=20, metavar="N", help="the last N that fit (default: %(default)s)")
    parser.add_argument("--wait", type=_count, default=0, metavar="SECONDS", help="wait so long for one that fits: the agent writes a moment later")


def _register_applying(verb: Callable[..., Any]) -> None:
    """The verbs of kalium.cli.apply. They need what the controller needs, which the others do without."""

    def applying(name: str, run: str, purpose: str, *, waits: bool = True) -> Any:
        def command(arguments: argparse.Namespace) -> int:
            return int(getattr(imported("kalium.cli.apply", f"policy {name}"), run)(arguments))

        parser = verb(name, command, purpose, has_output=True)
        parser.add_argument("--config", type=Path, default=CONTROLLER, metavar="FILE", help="the controller's configuration (default: %(default)s)")
        if waits:
            parser.add_argument("--wait", type=_count, default=10, metavar="SECONDS", help="for the controller to take it (default: %(default)s)")
            parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
        return parser

    parser = applying("apply", "run_apply", "put a signed policy in force, and wait until the controller has it; exit 1 when it is refused")
    parser.add_argument("file", type=Path, metavar="SIGNED", help="a signed policy")

    purpose = "list the versions of an app's policy that were in force; exit 1 when there is none"
    parser = applying("history", "run_history", purpose, waits=False)
    parser.add_argument("app", metavar="APP")

    parser = applying("rollback", "run_rollback", "put an old policy in force again: its text under a new version")
    parser.add_argument("app", metavar="APP")
    parser.add_argument("--to", type=_version, required=True, metavar="VERSION", help="one that `kalium policy history` lists")
    parser.add_argument("--key", type=Path, required=True, help="the operator's private key, Ed25519 in PEM")


def _count(text: str, most: int = 100_000) -> int:
    number = int(text)
    if not 1 <= number <= most:
        raise argparse.ArgumentTypeError(f"is not a number from 1 to {most}")
    return number


def _version(text: str) -> int:
    return _count(text, VERSION_MAX)


def is_yaml(data: bytes) -> bool:
    """Whether `data` is a policy's source. A file that begins with a brace is a compiled or a signed one."""
    return not data.lstrip(b" \r\n").startswith(b"{")


def compiled_from(data: bytes, path: Path) -> bytes:
    """The compiled form of a policy in any of its three forms; `path` names it in errors. Signatures are not checked."""
    if is_yaml(data):
        return compile_policy(data, str(path))
    document = decode(data)
    if isinstance(document, dict) and document.get("format") == SIGNED_FORMAT:
        data = envelope.read(data).compiled
    CompiledPolicy.parse(data)
    return data


def _compiled_of(path: Path) -> bytes:
    return compiled_from(read_file(path, ENVELOPE_BYTES_MAX), path)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, sort_keys=True))


def run_lint(arguments: argparse.Namespace) -> int:
    """Print the findings of every file, then a line for each file."""
    found = {path: _lint(path) for path in arguments.files}
    if arguments.output == "json":
        _print_json([_finding_for_programs(path, finding) for path, findings in found.items() for finding in findings])
    else:
        for path, findings in found.items():
            for finding in findings:
                print(_finding_for_people(path, finding))
            counts = collections.Counter(finding.severity for finding in findings)
            print(f"{path}: {', '.join(f'{counts[severity]} {severity.name.lower()}s' for severity in reversed(Severity))}")
    has_error = any(finding.severity is Severity.ERROR for findings in found.values() for finding in findings)
    return EXIT_NO if has_error else EXIT_DONE


def _lint(path: Path) -> list[Finding]:
    data = read_file(path, ENVELOPE_BYTES_MAX)
    return lint(data) if is_yaml(data) else lint_compiled(CompiledPolicy.parse(compiled_from(data, path)))


def _finding_for_people(path: Path, finding: Finding) -> str:
    attempted = f"cannot compile {path}" if finding.severity is Severity.ERROR else str(path)
    where = f"line {finding.line}: " if finding.line else ""
    return f"{finding.severity.name.lower()}[{finding.code}]: {attempted}: {where}{finding.found}\nnext: {finding.next_step}"


def _finding_for_programs(path: Path, finding: Finding) -> dict[str, Any]:
    return {
        "file": str(path), "line": finding.line, "severity": finding.severity.name.lower(), "code": finding.code, "found": finding.found,
        "next": finding.next_step,
    }  # fmt: skip


def run_test(arguments: argparse.Namespace) -> int:
    """Play the examples; print each failure as an error."""
    policy = CompiledPolicy.parse(_compiled_of(arguments.file))
    count, findings = examples.run(read_file(arguments.examples, ENVELOPE_BYTES_MAX), policy)
    if arguments.output == "json":
        _print_json({"examples": count, "failures": [_finding_for_programs(arguments.examples, finding) for finding in findings]})
    else:
        for finding in findings:
            print(finding.error(f"cannot play {arguments.examples} under {arguments.file}").for_humans())
        print(f"{arguments.examples}: {count} examples, {len(findings)} failures")
    return EXIT_NO if findings else EXIT_DONE


def run_compile(arguments: argparse.Namespace) -> int:
    """Write the compiled form."""
    compiled = _compiled_of(arguments.file)
    if arguments.dry_run:
        print(f"{arguments.file}: compiles to {len(compiled)} bytes; nothing is written")
    elif arguments.out is None:
        sys.stdout.buffer.write(compiled)
    else:
        _report(arguments.out, write_atomically(arguments.out, compiled), f"{len(compiled)} bytes")
    return EXIT_DONE


def _report(path: Path, is_changed: bool, what: str) -> None:
    print(f"{path}: {'written' if is_changed else 'unchanged'}, {what}")


def run_sign(arguments: argparse.Namespace) -> int:
    """Compile, sign and write; refuse a version that every guard would refuse after the one that is there."""
    data = read_file(arguments.file, ENVELOPE_BYTES_MAX)
    errors = [finding for finding in lint(data) if finding.severity is Severity.ERROR] if is_yaml(data) else []
    if errors:
        raise first_error(errors, str(arguments.file))
    compiled = compiled_from(data, arguments.file)
    policy = CompiledPolicy.parse(compiled)
    key = envelope.private_key(read_file(arguments.key, KEY_BYTES_MAX), str(arguments.key))
    _refuse_going_back(arguments.out, policy, compiled)
    signed = envelope.sign(compiled, key)
    what = f"app {policy.app}, version {policy.version}, mode {policy.mode.value}, key {envelope.key_id(key.public_key())}"
    if arguments.dry_run:
        print(f"{arguments.out}: would be written, {what}")
    else:
        _report(arguments.out, write_atomically(arguments.out, signed), what)
    return EXIT_DONE


def _refuse_going_back(path: Path, policy: CompiledPolicy, compiled: bytes) -> None:
    """Raise when `path` holds another policy of this app with the same or a higher version."""
    if not path.is_file():
        return
    try:
        there = envelope.read(read_file(path, ENVELOPE_BYTES_MAX)).compiled
        before = CompiledPolicy.parse(there)
    except KaliumError:
        return  # a damaged file is replaced: that is the way to repair it
    if before.app == policy.app and before.version >= policy.version and there != compiled:
        raise KaliumError(
            "policy.version", f"cannot sign version {policy.version} of {policy.app}",
            f"{path} already holds version {before.version} with another text, and versions only grow",
            f"write `version: {before.version + 1}` into the policy; going back is the old text under a new version", EXIT_NO,
        )  # fmt: skip


def run_verify(arguments: argparse.Namespace) -> int:
    """Print what the envelope holds, if the signature does."""
    key = envelope.public_key(read_file(arguments.key, KEY_BYTES_MAX), str(arguments.key))
    policy = envelope.verify(read_file(arguments.file, ENVELOPE_BYTES_MAX), key)
    if arguments.output == "json":
        _print_json({"app": policy.app, "version": policy.version, "mode": policy.mode.value, "key_id": envelope.key_id(key)})
    else:
        what = f"app {policy.app}, version {policy.version}, mode {policy.mode.value}, {len(policy.functions)} functions"
        print(f"{arguments.file}: signed by key {envelope.key_id(key)}: {what}")
    return EXIT_DONE


def run_show(arguments: argparse.Namespace) -> int:
    """Print the policy's states and messages."""
    compiled = _compiled_of(arguments.file)
    policy = CompiledPolicy.parse(compiled)
    for name in arguments.function:
        if name not in policy.functions:
            raise KaliumError(
                "policy.unknown_function", f"cannot show function {name} of {arguments.file}", "the policy has no such function",
                f"use one of {', '.join(policy.functions)}", EXIT_USAGE,
            )  # fmt: skip
    functions = list(dict.fromkeys(arguments.function)) or sorted(policy.functions)
    if arguments.output == "json":
        document = json.loads(compiled)
        for part in ("functions", "app_cfg"):
            document[part] = {name: document[part][name] for name in functions}
        _print_json(document)
    else:
        sys.stdout.write((render.dot if arguments.format == "dot" else render.text)(policy, functions))
    return EXIT_DONE


def run_schema(_: argparse.Namespace) -> int:
    """Print the JSON Schema."""
    sys.stdout.write(published())
    return EXIT_DONE


def run_explain(arguments: argparse.Namespace) -> int:
    """Print the last verdicts that fit."""
    deadline = time.monotonic() + arguments.wait
    while not (fitting := _fitting(arguments)) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    if arguments.output == "json":
        _print_json(list(fitting))
    else:
        for record in fitting:
            print("\n".join(explanation(record)))
        if not fitting:
            print(f"no verdict in {arguments.log} fits", file=sys.stderr)
    return EXIT_DONE if fitting else EXIT_NO


def _fitting(arguments: argparse.Namespace) -> collections.deque[dict[str, Any]]:
    return collections.deque((record for record in _verdicts(arguments.log) if _fits(record, arguments)), maxlen=arguments.last)


def _verdicts(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    return  # the agent is writing it
                yield _verdict(line, path, number)
    except OSError as error:
        raise KaliumError(
            "cli.file", f"cannot read verdicts from {path}", error.strerror or str(error), "the agent writes it as root; name another file with --log"
        ) from error


def _verdict(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise KaliumError(
            "policy.verdict", f"cannot read verdicts from {path}", f"line {number} is not JSON: {error}", "move the damaged file away"
        ) from error
    return record if isinstance(record, dict) else {}


def _fits(record: dict[str, Any], arguments: argparse.Namespace) -> bool:
    return (
        record.get("event") == "verdict"
        and arguments.app in (None, record.get("app"))
        and arguments.function in (None, record.get("function"))
        and not (arguments.denied and record.get("allowed") and not record.get("would_deny"))
    )


def explanation(record: dict[str, Any]) -> Sequence[str]:
    """A verdict as one to five lines: when and what, why, what the policy would have accepted, its fail mode, its id."""
    moment = datetime.fromtimestamp(float(record.get("time_ms", 0)) / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    outcome = "would deny" if record.get("would_deny") else "allowed" if record.get("allowed") else "denied"
    message, peer = str(record.get("message")), record.get("peer")
    to = f" to {peer}" if peer and peer not in message.split(" ") else ""
    lines = [f"{moment} {record.get('app')}/{record.get('function')} {outcome}: {message}{to}"]
    line = record.get("line")
    fail_mode = record.get("fail_mode")
    marks = [f"    fail mode: {fail_mode}, because no controller answered"] if fail_mode else []
    marks += [f"    id: {record['id']}"] if record.get("id") and (outcome != "allowed" or fail_mode) else []
    if outcome == "allowed":
        return [*lines, *([f"    by line {line} of policy version {record.get('policy_version')}"] if line else []), *marks]
    elsewhere = f"; line {line} of the policy allows it at another place" if line else ""
    lines.append(f"    why: {record.get('reason')}{elsewhere}")
    expected = "; ".join(str(entry) for entry in record.get("expected") or [])
    if expected or record.get("reason") in (Reason.OUT_OF_ORDER.value, Reason.NOT_IN_POLICY.value):
        lines.append(f"    expected: {expected or 'no further message'}")
    return [*lines, *marks]
