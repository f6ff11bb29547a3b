"""`kalium pki`: the site's CA, its certificates, and the keys that sign policies and audit logs. Every verb may be repeated."""

from __future__ import annotations

import argparse
import json
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from kalium.errors import EXIT_DONE, EXIT_NO, KaliumError
from kalium.pki import files
from kalium.pki.authority import DAYS, Role
from kalium.pki.files import CaStep, Outcome

EXAMPLES = """\
examples:
  kalium pki init --dir /etc/kalium/pki
  kalium pki issue --dir /etc/kalium/pki --role controller --name controller --san DNS:controller --san IP:127.0.0.1
  kalium pki issue --dir /etc/kalium/pki --role agent --name agent-node1 --identity node1 --days 30
  kalium pki operator-key --dir /etc/kalium/operator
  kalium pki operator-key --dir /etc/kalium/operator --print-raw
  kalium pki audit-key --dir /etc/kalium/audit --name agent
  kalium pki renew --dir /etc/kalium/pki
  kalium pki change-ca --dir /etc/kalium/pki --step begin
  kalium pki show --dir /etc/kalium/pki

The first word of what a verb prints is `changed` or `unchanged`.
"""


def register(subparsers: Any) -> None:
    """Add the noun `pki` and its verbs."""
    noun = subparsers.add_parser(
        "pki", help="make certificates and keys", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = noun.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Any, purpose: str) -> Any:
        parser = verbs.add_parser(name, help=purpose, description=purpose)
        parser.add_argument("--dir", type=Path, required=True, metavar="DIRECTORY", help="where the files are")
        parser.set_defaults(run=run)
        return parser

    def dry_run(parser: Any) -> None:
        parser.add_argument("--dry-run", action="store_true", help="say what would change, and write nothing")

    dry_run(verb("init", run_init, "make the CA; renew it under its own key when less than 30 days remain"))

    parser = verb("issue", run_issue, "issue a certificate; renew it when less than 30 days, or less than a third, of it remain")
    parser.add_argument("--role", required=True, type=Role, choices=tuple(Role), metavar="|".join(Role), help="what its owner is to the others")
    parser.add_argument("--name", required=True, help="the common name, and the name of the two files")
    parser.add_argument("--identity", default="", metavar="NAME", help="the node of an agent, the name of a controller or client; default: --name")
    parser.add_argument("--san", action="append", default=[], metavar="DNS:NAME|IP:ADDRESS", help="an alternative name; repeat it; default: DNS:NAME")
    parser.add_argument("--days", type=int, help=f"validity; default: {', '.join(f'{days} for role {role.value}' for role, days in DAYS.items())}")
    dry_run(parser)

    parser = verb("renew", run_renew, "renew the CA and every pair that it issued here, where it is time; exit 1 when one of them is not ours")
    parser.add_argument("--every", type=_seconds, metavar="SECONDS", help="do it again and again, and go on after an error")
    dry_run(parser)

    parser = verb("change-ca", run_change_ca, "change to another CA in three steps, between which every host gets ca.crt and its pairs")
    parser.add_argument(
        "--step",
        required=True,
        type=CaStep,
        choices=tuple(CaStep),
        metavar="|".join(CaStep),
        help="trust both, issue by the new one, drop the old one",
    )
    dry_run(parser)

    parser = verb("operator-key", run_operator_key, "make the key that signs policies; one that is there is never replaced")
    parser.add_argument("--print-raw", action="store_true", help="make nothing; print the base64 of the raw public key")
    dry_run(parser)

    parser = verb("audit-key", run_audit_key, "make a key that signs an audit log; one that is there is never replaced")
    parser.add_argument("--name", required=True, help="the name of the two files")
    dry_run(parser)

    parser = verb("show", run_show, "list the certificates; exit 1 when one of them cannot be used")
    parser.add_argument("--output", choices=("text", "json"), default="text", help="text for people, json for programs")


def run_init(arguments: argparse.Namespace) -> int:
    """Make or renew the CA."""
    return _report(files.init(arguments.dir, now=_now(), dry_run=arguments.dry_run))


def run_issue(arguments: argparse.Namespace) -> int:
    """Issue or renew a certificate."""
    outcome = files.issue(
        arguments.dir,
        arguments.name,
        tuple(arguments.san),
        role=arguments.role,
        identity=arguments.identity,
        days=DAYS[arguments.role] if arguments.days is None else arguments.days,
        now=_now(),
        dry_run=arguments.dry_run,
    )
    return _report(outcome)


def run_renew(arguments: argparse.Namespace) -> int:
    """Renew what is due, once or for ever."""
    while True:
        try:
            done = files.renew(arguments.dir, now=_now(), dry_run=arguments.dry_run)
        except KaliumError as error:
            if arguments.every is None:
                raise
            print(error.for_humans(), file=sys.stderr, flush=True)
        else:
            for each in done:
                if arguments.every is None or each.why or each.fault:
                    print(f"fault {each.path}: {each.fault}" if each.fault else _said(each), flush=True)
            if arguments.every is None:
                return EXIT_NO if any(each.fault for each in done) else EXIT_DONE
        time.sleep(arguments.every)


def run_change_ca(arguments: argparse.Namespace) -> int:
    """Take one step of a change of the CA."""
    return _report(files.change_ca(arguments.dir, arguments.step, now=_now(), dry_run=arguments.dry_run))


def run_operator_key(arguments: argparse.Namespace) -> int:
    """Make the operator's key, or print its public half."""
    if arguments.print_raw:
        print(files.operator_raw(arguments.dir))
        return EXIT_DONE
    return _report(files.operator_key(arguments.dir, dry_run=arguments.dry_run))


def run_audit_key(arguments: argparse.Namespace) -> int:
    """Make a key that signs an audit log."""
    return _report(files.audit_key(arguments.dir, arguments.name, dry_run=arguments.dry_run))


def run_show(arguments: argparse.Namespace) -> int:
    """List the certificates."""
    shown = files.show(arguments.dir, now=_now())
    if arguments.output == "json":
        print(json.dumps([{**vars(each), "not_after": each.not_after.isoformat()} for each in shown]))
    else:
        for each in shown:
            names = f" ({', '.join(each.names)})" if each.names else ""
            role = f", {each.role}{f' {each.identity}' if each.identity else ''}" if each.role else ""
            print(f"{each.file}: {each.subject}{role}{names}, until {each.not_after:%Y-%m-%d %H:%M} UTC{': ' + each.fault if each.fault else ''}")
    return EXIT_NO if any(each.fault for each in shown) else EXIT_DONE


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _seconds(text: str) -> int:
    seconds = int(text)
    if seconds < 1:
        raise ValueError(text)
    return seconds


def _said(outcome: Outcome) -> str:
    return f"changed {outcome.path}: {outcome.why}" if outcome.why else f"unchanged {outcome.path}"


def _report(outcome: Outcome) -> int:
    print(_said(outcome))
    return EXIT_DONE
