"""`kalium engine`: serve the OpenFaaS API in front of functions, and set the network of those on this machine up."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from kalium.engine.config import load
from kalium.engine.log import Log
from kalium.engine.server import Engine, network_of, open_log
from kalium.errors import EXIT_DONE

CONFIG = Path("/etc/kalium/engine.json")
EXAMPLES = """\
examples:
  kalium engine serve --config /etc/kalium/engine.json
  kalium engine network up --config /etc/kalium/engine.json

docs/reference/gateway.md has the configuration, the API and what happens at the limits.
"""


def register(subparsers: Any) -> None:
    """Add the noun `engine` and its verbs."""
    noun = subparsers.add_parser(
        "engine", help="serve the OpenFaaS API", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = noun.add_subparsers(metavar="VERB", required=True)
    serve = verbs.add_parser(
        "serve",
        help="serve until SIGTERM",
        description="Serve until SIGTERM. No instance of podman is left running then; those of Kubernetes are its own.",
    )
    serve.set_defaults(run=run_serve)
    network = verbs.add_parser("network", help="set the instances' network up or down", description="Prints `changed` or `unchanged`.")
    network.add_argument("state", choices=("up", "down"))
    network.set_defaults(run=run_network)
    for parser in (serve, network):
        parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help=f"default: {CONFIG}")


def run_serve(arguments: argparse.Namespace) -> int:
    """Serve until a signal says stop."""
    config = load(arguments.config)
    run: Callable[..., None] = asyncio.run
    with suppress(ModuleNotFoundError):  # without it the same program is slower
        run = importlib.import_module("uvloop").run
    stream = sys.stdout if config.log is None else os.fdopen(open_log(config.log), "a", encoding="utf-8")

    async def serve() -> None:
        await Engine(config, Log(stream)).serve()

    run(serve())
    return EXIT_DONE


def run_network(arguments: argparse.Namespace) -> int:
    """Make or remove the bridge."""
    network = network_of(load(arguments.config))
    has_changed = asyncio.run(network.up() if arguments.state == "up" else network.down())
    print("changed" if has_changed else "unchanged")
    return EXIT_DONE
