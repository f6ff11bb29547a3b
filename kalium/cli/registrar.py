"""`kalium registrar`: register the pods of a cluster's node with its agent."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from kalium.errors import EXIT_DONE
from kalium.registrar.check import ask, require_ready
from kalium.registrar.config import load
from kalium.registrar.log import Log

CONFIG = Path("/etc/kalium/registrar.json")
EXAMPLES = """\
examples:
  kalium registrar serve --config /etc/kalium/registrar.json
  kalium registrar status --output json

docs/reference/registrar.md has the configuration, which pods are registered, and what happens at the limits.
"""


def register(subparsers: Any) -> None:
    """Add the noun `registrar` and its verbs."""
    noun = subparsers.add_parser(
        "registrar", help="register a node's pods", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = noun.add_subparsers(metavar="VERB", required=True)
    serve = verbs.add_parser("serve", help="serve until SIGTERM", description="Serve until SIGTERM; registrations stay. The log is JSON Lines.")
    serve.set_defaults(run=run_serve)
    purpose = "ask the running one; exit 1 when it does not follow the pods or has no agent, 3 when it does not answer"
    status = verbs.add_parser("status", help=purpose, description=purpose)
    status.add_argument("--output", choices=("text", "json"), default="text", help="default: text")
    status.set_defaults(run=run_status)
    for parser in (serve, status):
        parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help=f"default: {CONFIG}")


def run_serve(arguments: argparse.Namespace) -> int:
    """Serve until a signal says stop."""
    from kalium.registrar.server import Registrar  # noqa: PLC0415  `status` needs no client of Kubernetes

    config = load(arguments.config)

    async def serve() -> None:
        await Registrar(config, Log(sys.stdout)).serve()

    asyncio.run(serve())
    return EXIT_DONE


def run_status(arguments: argparse.Namespace) -> int:
    """Ask, print, and say no when it is not well."""
    status = ask(load(arguments.config))
    print(json.dumps(status) if arguments.output == "json" else "\n".join(f"{name}: {value}" for name, value in status.items()))
    require_ready(status)
    return EXIT_DONE
