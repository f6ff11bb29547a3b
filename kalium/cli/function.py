"""`kalium function`: the images of a stack file's functions."""

from __future__ import annotations

import argparse
from typing import Any

from kalium.builder.cli import add_build

EXAMPLES = """\
examples:
  kalium function build --stack functions/stack.yml
"""


def register(subparsers: Any) -> None:
    """Add the noun `function` and its verbs."""
    noun = subparsers.add_parser(
        "function", help="build functions", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_build(noun.add_subparsers(metavar="VERB", required=True))
