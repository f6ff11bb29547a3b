"""`kalium mailsink`: receive the benchmark's mail, and ask whether it is received."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from kalium.errors import EXIT_DONE
from kalium.mailsink.check import check
from kalium.mailsink.config import load

CONFIG = Path("/etc/kalium/mailsink.json")
EXAMPLES = """\
examples:
  kalium mailsink serve --config /etc/kalium/mailsink.json
  kalium mailsink check

The configuration is one JSON object; "tls" may be left out:
  {"listen": {"host": "10.137.0.1", "port": 2525}, "maildir": "/var/lib/kalium/mail",
   "tls": {"certificate": "/…/fullchain.pem", "key": "/…/privkey.pem"}}
"""


def register(subparsers: Any) -> None:
    """Add the noun `mailsink` and its verbs."""
    noun = subparsers.add_parser(
        "mailsink",
        help="receive the benchmark's mail",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = noun.add_subparsers(metavar="VERB", required=True)
    for name, run, purpose in (
        ("serve", run_serve, "serve until SIGTERM; the log is JSON Lines on standard output"),
        ("check", run_check, "ask the running sink, without sending mail; exit 1 when it refuses, 3 when it does not answer"),
    ):
        parser = verbs.add_parser(name, help=purpose, description=purpose)
        parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help=f"default: {CONFIG}")
        parser.set_defaults(run=run)


def run_serve(arguments: argparse.Namespace) -> int:
    """Serve until a signal says stop."""
    from kalium.mailsink.server import serve  # noqa: PLC0415  `check` needs no SMTP server

    asyncio.run(serve(load(arguments.config)))
    return EXIT_DONE


def run_check(arguments: argparse.Namespace) -> int:
    """Ask, and print what was found."""
    print(check(load(arguments.config)))
    return EXIT_DONE
