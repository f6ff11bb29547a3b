"""Entry point of `kalium`: finds the noun, imports its module alone, and turns errors into two lines and an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from kalium import __version__
from kalium.errors import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_INTERRUPTED, EXIT_USAGE, KaliumError

EXIT_BROKEN_PIPE = 141  # as a shell reports SIGPIPE

# Each noun has the module kalium.cli.<noun>. `status` and `explain` are whole commands: they are about the site, not about a part of it.
NOUNS = {
    "status": "what is in force on the site",
    "explain": "why a verdict came out as it did",
    "policy": "write, check, compile and sign policies",
    "controller": "serve the controller, ask it for its status",
    "pki": "make the certificates and keys of a site",
    "audit": "verify and show audit logs",
    "engine": "serve the OpenFaaS API and run functions on this machine",
    "registrar": "register a cluster node's pods with its agent",
    "imageserver": "serve the benchmark's image over HTTPS",
    "mailsink": "receive the benchmark's mail",
    "function": "build, deploy and invoke functions",
}

EXAMPLES = """\
examples:
  kalium policy lint policies/hello-retail.yml
  kalium policy sign policies/hello-retail.yml --key /etc/kalium/operator/operator.key -o hello-retail.signed.json
  kalium function invoke product-photos-4-success --data @functions/product-photos-4-success/sample.json
  kalium status
  kalium explain 00c0ffee00000005

`kalium NOUN --help` lists a noun's verbs, `kalium NOUN VERB --help` a verb's options.
exit codes: 0 done, 1 the answer is no, 2 wrong usage, 3 the environment failed
"""


def parser_for(noun: str | None) -> argparse.ArgumentParser:
    """The parser of `kalium` that knows the verbs of `noun` alone; None: of no noun, which is enough for --help."""
    nouns = "\n".join(f"  {name:<12} {purpose}" for name, purpose in NOUNS.items())
    parser = argparse.ArgumentParser(
        prog="kalium",
        usage="kalium NOUN VERB [options]",
        description="Kalium: policies for what serverless functions send.",
        epilog=f"nouns:\n{nouns}\n\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kalium {__version__}")
    if noun is not None:
        subparsers = parser.add_subparsers(prog="kalium", metavar="NOUN", required=True, help=argparse.SUPPRESS)
        module_of(noun).register(subparsers)
    return parser


def module_of(noun: str) -> Any:
    """The module of `noun`. Raises KaliumError when this installation lacks it or something that it needs."""
    return imported(f"kalium.cli.{noun}", noun)


def imported(name: str, command: str) -> Any:
    """The module `name`, which `command` needs. Raises KaliumError when this installation lacks it or something that it needs."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise KaliumError(
            "cli.incomplete", f"cannot run `kalium {command}`", f"Python module {error.name} is not installed for {sys.executable}",
            "use the `kalium` of the site, /opt/kalium/venv/bin/kalium, or install the package again", EXIT_ENVIRONMENT,
        ) from error  # fmt: skip


def run(argv: Sequence[str]) -> int:
    """Run one command and return its exit code; errors for people are raised."""
    noun = next((argument for argument in argv if not argument.startswith("-")), None)
    if noun is not None and noun not in NOUNS:
        raise KaliumError("cli.usage", f"cannot run `kalium {noun}`", "there is no such noun", f"use one of {', '.join(NOUNS)}", EXIT_USAGE)
    parser = parser_for(noun)
    arguments = parser.parse_args(argv)
    if noun is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    command: Callable[[argparse.Namespace], int | None] = arguments.run
    return command(arguments) or EXIT_DONE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return the exit code. Raises SystemExit for --help and usage."""
    try:
        code = run(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()
        return code
    except KaliumError as error:
        print(error.for_humans(), file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("error[cli.interrupted]: cannot finish the command: interrupted\nnext: run it again", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader, as in `kalium policy show | head`, has what it wanted; Python must not complain at its own exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


if __name__ == "__main__":
    sys.exit(main())
