"""`kalium controller`: serve the controller, and ask a running one for its status."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import importlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kalium.controller import client, server
from kalium.controller.config import load
from kalium.controller.log import Log
from kalium.errors import EXIT_DONE
from kalium.protocol.frames import StatusReport

CONFIG = Path("/etc/kalium/controller.json")
EXAMPLES = """\
examples:
  kalium controller serve --config /etc/kalium/controller.json
  kalium controller status --output json

The configuration is one JSON object:
  {"listen": {"host": "127.0.0.1", "port": 5000},
   "tls": {"ca": "pki/ca.crt", "cert": "pki/controller.crt", "key": "pki/controller.key"},
   "operator_key": "operator/operator.pub", "policies_dir": "policies"}
Relative paths are meant from its own directory.
"""


def register(subparsers: Any) -> None:
    """Add the noun `controller` and its verbs."""
    noun = subparsers.add_parser(
        "controller", help="serve the controller", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = noun.add_subparsers(metavar="VERB", required=True)
    for name, run, purpose in (
        ("serve", run_serve, "serve until SIGTERM; the log is JSON Lines on standard output"),
        ("status", run_status, "what the running controller holds; exit 3 when it does not answer"),
    ):
        parser = verbs.add_parser(name, help=purpose, description=purpose)
        parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help=f"default: {CONFIG}")
        parser.set_defaults(run=run)
        if name == "status":
            parser.add_argument("--output", choices=("text", "json"), default="text", help="text for people, json for programs")


def run_serve(arguments: argparse.Namespace) -> int:
    """Serve until a signal says stop."""
    run: Callable[..., None] = asyncio.run
    with suppress(ModuleNotFoundError):  # without it the same program is slower
        run = importlib.import_module("uvloop").run
    run(server.serve(load(arguments.config), log=Log(sys.stdout)))
    return EXIT_DONE


def run_status(arguments: argparse.Namespace) -> int:
    """Print the status of a running controller."""
    report = client.status(load(arguments.config))
    print(json.dumps(dataclasses.asdict(report)) if arguments.output == "json" else text_of(report))
    return EXIT_DONE


def text_of(report: StatusReport) -> str:
    """A status for people."""
    policies = ", ".join(f"{app} {version}" for app, version in sorted(report.policies.items())) or "none"
    counts = (("policies", policies), ("agents", report.agents), ("calls", report.calls), ("invocations", report.invocations))
    return "\n".join(f"{name:<12} {value}" for name, value in counts)
