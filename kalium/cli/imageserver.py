"""`kalium imageserver`: serve the benchmark's image over HTTPS, ask the server, and draw the image."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from kalium.cli.files import write_atomically
from kalium.errors import EXIT_DONE
from kalium.imageserver.config import load

CONFIG = Path("/etc/kalium/imageserver.json")
EXAMPLES = """\
examples:
  kalium imageserver draw /var/lib/kalium/www/image.jpg
  kalium imageserver serve --config /etc/kalium/imageserver.json
  kalium imageserver check

The configuration is one JSON object:
  {"listen": {"host": "10.137.0.1", "port": 4443}, "certificate": "/…/fullchain.pem", "key": "/…/privkey.pem",
   "root": "/var/lib/kalium/www", "access_log": "/var/log/kalium/imageserver-access.jsonl"}
"""


def register(subparsers: Any) -> None:
    """Add the noun `imageserver` and its verbs."""
    noun = subparsers.add_parser(
        "imageserver",
        help="serve the benchmark's image over HTTPS",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = noun.add_subparsers(metavar="VERB", required=True)
    for name, run, purpose in (
        ("serve", run_serve, "serve until SIGTERM; a renewed certificate is taken up without a restart"),
        ("check", run_check, "ask the running server over TLS; exit 1 when it serves something else, 3 when it does not answer"),
    ):
        parser = verbs.add_parser(name, help=purpose, description=purpose)
        parser.add_argument("--config", type=Path, default=CONFIG, metavar="FILE", help=f"default: {CONFIG}")
        parser.set_defaults(run=run)
        if name == "check":
            parser.add_argument("--path", default="/image.jpg", help="what to ask for (default: %(default)s)")
    purpose = "draw the image, 122,620 bytes of JPEG; says changed or unchanged"
    parser = verbs.add_parser("draw", help=purpose, description=purpose)
    parser.add_argument("out", type=Path, metavar="OUT", help="where to write it; replaced at once, never in part")
    parser.set_defaults(run=run_draw)


def run_serve(arguments: argparse.Namespace) -> int:
    """Serve until a signal says stop."""
    from kalium.imageserver.server import serve  # noqa: PLC0415  `check` and `draw` need no HTTP server

    asyncio.run(serve(load(arguments.config)))
    return EXIT_DONE


def run_check(arguments: argparse.Namespace) -> int:
    """Ask, and print what was found."""
    from kalium.imageserver.check import check  # noqa: PLC0415  see run_serve

    print(check(load(arguments.config), arguments.path))
    return EXIT_DONE


def run_draw(arguments: argparse.Namespace) -> int:
    """Draw, and write what is new."""
    from kalium.imageserver.picture import image  # noqa: PLC0415  a server has no use for Pillow

    print(f"{'changed' if write_atomically(arguments.out, image()) else 'unchanged'} {arguments.out}")
    return EXIT_DONE
