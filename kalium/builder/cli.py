"""`kalium function build` and `kalium function export`."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from kalium.builder.build import Builder, layout_of
from kalium.builder.export import export
from kalium.builder.store import Kept, Podman
from kalium.errors import EXIT_DONE, EXIT_ENVIRONMENT, KaliumError

OUTPUT = Path("/var/lib/kalium/images")


def add_build(subparsers: Any) -> None:
    """Add the verb `build` to the verbs of `kalium function`."""
    parser = subparsers.add_parser(
        "build",
        help="make the images of a stack file's functions",
        description="Make the images of a stack file's functions and list them in images.json; what did not change is not made again. Works as root,"
        " except with --no-podman.",
    )
    parser.add_argument("--stack", type=Path, required=True, help="an OpenFaaS stack file with `lang: python3` functions")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of images.json and of what is kept between builds (default: %(default)s)")
    parser.add_argument("--only", metavar="NAME", help="this function alone")
    parser.add_argument("--refresh-base", action="store_true", help="take newer packages of the distribution; otherwise a base is kept as it is")
    parser.add_argument("--podman", default="podman", help="how podman is called (default: %(default)s)")
    parser.add_argument(
        "--no-podman", action="store_true", help="give the images to nobody here; `kalium function export` packs them for other machines"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be made, make nothing")
    parser.set_defaults(run=run_build)


def add_export(subparsers: Any) -> None:
    """Add the verb `export`."""
    parser = subparsers.add_parser(
        "export",
        help="pack the images that were built, for other machines",
        description="Pack the images that were built into one archive, which `ctr -n k8s.io images import` of containerd takes, beside images.json."
        " Its name changes with its contents; what did not change is not packed again.",
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the folder that was built into (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be packed, change nothing")
    parser.set_defaults(run=run_export)


def run_build(arguments: argparse.Namespace) -> int:
    """Build and print a line for each image: changed or unchanged, the function, the image."""
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        attempted = f"cannot build into {arguments.output}"
        raise KaliumError("builder.output", attempted, str(error), "name another folder with --output", EXIT_ENVIRONMENT) from error
    output = arguments.output.resolve()
    builder = Builder(output, Kept(layout_of(output)) if arguments.no_podman else Podman(shlex.split(arguments.podman)))
    if arguments.dry_run:
        for outcome in builder.plan(arguments.stack, only=arguments.only):
            print(outcome)
        return EXIT_DONE
    for outcome in builder.build(arguments.stack, only=arguments.only, refresh=arguments.refresh_base):
        print(outcome, flush=True)
    return EXIT_DONE


def run_export(arguments: argparse.Namespace) -> int:
    """Print whether the archive was made now, and where it is."""
    archive, is_changed = export(arguments.output.resolve(), is_rehearsal=arguments.dry_run)
    print(f"{'changed' if is_changed else 'unchanged'} {archive}")
    return EXIT_DONE
