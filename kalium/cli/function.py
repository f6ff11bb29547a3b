"""`kalium function`: build images of functions and pack them, deploy them, see what runs, invoke, remove."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from kalium.builder.cli import add_build, add_export
from kalium.cli.files import read_file
from kalium.engine.client import Client
from kalium.engine.deployment import APP_ANNOTATION, RUNTIME_DEFAULT, RUNTIME_LABEL
from kalium.errors import EXIT_DONE, EXIT_ENVIRONMENT, EXIT_NO, EXIT_USAGE, KaliumError

GATEWAY = "http://127.0.0.1:31112"
GATEWAY_VARIABLE = "OPENFAAS_URL"  # as faas-cli has it
USER = "admin"
PASSWORD_FILE = Path("/etc/kalium/engine.password")
IMAGES = Path("/var/lib/kalium/images/images.json")
FILE_BYTES_MAX = 16 << 20
READY_SECONDS_MAX = 120.0

EXAMPLES = """\
examples:
  kalium function build --stack functions/stack.yml
  kalium function export
  kalium function deploy -f functions/stack.yml --only product-photos-4-success
  kalium function list
  kalium function invoke product-photos-4-success --data @functions/product-photos-4-success/sample.json
  kalium function remove product-photos-4-success
"""


def register(subparsers: Any) -> None:
    """Add the noun `function` and its verbs."""
    noun = subparsers.add_parser(
        "function",
        help="build, deploy and invoke functions",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = noun.add_subparsers(metavar="VERB", required=True)
    add_build(verbs)
    add_export(verbs)

    def verb(name: str, run: Callable[[argparse.Namespace], int], purpose: str) -> Any:
        parser = verbs.add_parser(name, help=purpose, description=purpose[0].upper() + purpose[1:] + ".")
        parser.set_defaults(run=run)
        gateway = os.environ.get(GATEWAY_VARIABLE, GATEWAY)
        parser.add_argument("--gateway", default=gateway, metavar="URL", help=f"default: {GATEWAY_VARIABLE} in the environment, or {GATEWAY}")
        if name != "invoke":
            parser.add_argument("--user", default=USER, help="default: %(default)s")
            parser.add_argument("--password-file", type=Path, default=PASSWORD_FILE, metavar="FILE", help="default: %(default)s")
        return parser

    parser = verb("deploy", run_deploy, "deploy the functions of a stack file and wait until an instance of each answers")
    parser.add_argument("-f", "--file", type=Path, required=True, metavar="STACK", help="an OpenFaaS stack file")
    parser.add_argument("--only", metavar="NAME", help="this function alone")
    parser.add_argument(
        "--images",
        type=Path,
        default=IMAGES,
        metavar="FILE",
        help="the images that were built, by the names in the stack file (default: %(default)s)",
    )
    parser.add_argument("--no-wait", action="store_true", help="return when the gateway has accepted everything")
    parser.add_argument("--dry-run", action="store_true", help="print what would be asked for, change nothing")

    for name, run, purpose in (
        ("list", run_list, "list the deployed functions"),
        ("describe", run_describe, "show one function, where its instances are, and why there are none"),
    ):
        parser = verb(name, run, purpose)
        if name == "describe":
            parser.add_argument("name", metavar="NAME")
        parser.add_argument("--output", choices=("text", "json"), default="text", help="text for people, json for programs")

    parser = verb("invoke", run_invoke, "invoke a function and print its answer; exit 1 when its status is 400 or more")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--data", default="", metavar="TEXT|@FILE", help="the request's body; @- is standard input")
    parser.add_argument("--path", default="", help="what follows the function's name, for example /photos?size=2")
    parser.add_argument("--method", default="POST")
    parser.add_argument("--header", action="append", default=[], metavar="NAME:VALUE", help="may be repeated; the content type is JSON by default")

    parser = verb("remove", run_remove, "remove a function; its instances are gone when the command returns")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--dry-run", action="store_true", help="say what would be removed, change nothing")


def client_of(arguments: argparse.Namespace) -> Client:
    """The gateway that the options name. Its password is read when it is needed."""

    def password() -> str:
        return read_file(arguments.password_file, FILE_BYTES_MAX).decode("utf-8", "replace").strip()

    return Client(arguments.gateway, getattr(arguments, "user", USER), password)


def run_deploy(arguments: argparse.Namespace) -> int:
    """Deploy every function of the stack file, then wait for each."""
    bodies = deployments(arguments.file, arguments.only, arguments.images)
    if arguments.dry_run:
        print(json.dumps(bodies, indent=2))
        return EXIT_DONE
    client = client_of(arguments)
    for body in bodies:
        was_there = client.deploy(body)
        print(f"{'updated' if was_there else 'deployed'} {body['service']} ({body['image']})", flush=True)
    if not arguments.no_wait:
        for body in bodies:
            client.wait_ready(body["service"], READY_SECONDS_MAX)
            print(f"ready {body['service']}", flush=True)
    return EXIT_DONE


def deployments(stack: Path, only: str | None, images: Path) -> list[dict[str, Any]]:
    """A stack file's functions as deployment requests, in its order. Raises KaliumError function.stack."""

    def wrong(found: str, next_step: str = "functions/stack.yml is an example") -> KaliumError:
        return KaliumError("function.stack", f"cannot deploy the functions of {stack}", found, next_step, EXIT_USAGE)

    try:
        document = yaml.safe_load(read_file(stack, FILE_BYTES_MAX))
    except yaml.YAMLError as error:
        raise wrong(f"it is no YAML: {' '.join(str(error).split())}", "correct it") from error
    functions = document.get("functions") if isinstance(document, dict) else None
    if not isinstance(functions, dict) or not functions or not all(isinstance(entry, dict) for entry in functions.values()):
        raise wrong("it has no `functions` with an entry each")
    if only is not None and only not in functions:
        raise wrong(f"it has no function {only}, only {', '.join(map(str, functions))}", "name one of these with --only")
    built = _built(images)
    bodies = []
    for name, entry in functions.items():
        if only not in (None, name):
            continue
        image = str(entry.get("image") or name)
        try:
            texts = {key: _texts(entry.get(key)) for key in ("environment", "labels", "annotations")}
        except (TypeError, AttributeError) as error:
            raise wrong(f"{name}: environment, labels and annotations map names to texts", "correct the entry") from error
        bodies.append(
            {
                "service": str(name),
                "image": str(built[image]["image"]) if image in built else image,
                "envProcess": str(entry.get("fprocess") or ""),
                "envVars": texts["environment"],
                "labels": texts["labels"],
                "annotations": texts["annotations"],
                "secrets": list(entry.get("secrets") or []),
                "limits": dict(entry.get("limits") or {}),
                "constraints": list(entry.get("constraints") or []),
                "readOnlyRootFilesystem": bool(entry.get("readonly_root_filesystem")),
            }
        )
    return bodies


def _texts(entry: Mapping[str, Any] | None) -> dict[str, str]:
    """Values as a stack file may have them: numbers and booleans are written without quotes."""
    return {str(key): {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value) for key, value in (entry or {}).items()}


def _built(images: Path) -> Mapping[str, Any]:
    """What `kalium function build` lists; nothing when it was never run here: then images are called as the stack file does."""
    if not images.exists():
        return {}
    try:
        listed: Mapping[str, Any] = json.loads(read_file(images, FILE_BYTES_MAX))
    except ValueError as error:
        raise KaliumError(
            "function.images", f"cannot read {images}", f"not JSON: {error}", "`kalium function build` writes it", EXIT_ENVIRONMENT
        ) from error
    return listed


def run_list(arguments: argparse.Namespace) -> int:
    """Print a line for each function."""
    functions = client_of(arguments).list()
    if arguments.output == "json":
        print(json.dumps(functions))
        return EXIT_DONE
    rows = [("NAME", "READY", "INVOCATIONS", "RUNTIME", "APP", "IMAGE")]
    for function in functions:
        labels, annotations = function.get("labels") or {}, function.get("annotations") or {}
        ready = f"{function.get('availableReplicas', 0)}/{function.get('replicas', 0)}"
        runtime, app = labels.get(RUNTIME_LABEL, RUNTIME_DEFAULT), annotations.get(APP_ANNOTATION, "-")
        rows.append((function["name"], ready, f"{function.get('invocationCount', 0):.0f}", runtime, app, function["image"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return EXIT_DONE


def run_describe(arguments: argparse.Namespace) -> int:
    """Print what the gateway knows of a function; values of its environment are not repeated on a screen."""
    status = client_of(arguments).describe(arguments.name)
    if arguments.output == "json":
        print(json.dumps(status))
        return EXIT_DONE
    used = status.pop("usage", None) or {}
    lines = {
        "name": status["name"],
        "image": status["image"],
        "ready": f"{status.get('availableReplicas', 0)} of {status.get('replicas', 0)}",
        "invocations": f"{status.get('invocationCount', 0):.0f}",
        "created": status.get("createdAt", ""),
        "environment": ", ".join(sorted(status.get("envVars") or {})),
        "secrets": ", ".join(status.get("secrets") or []),
        **{f"label {key}": value for key, value in sorted((status.get("labels") or {}).items())},
        **{f"annotation {key}": value for key, value in sorted((status.get("annotations") or {}).items())},
        "memory": f"{used.get('totalMemoryBytes', 0) / (1 << 20):.1f} MiB",
        "processor": f"{used.get('cpu', 0) / 1000:.3f} since its start",
    }
    for key, value in lines.items():
        if value:
            print(f"{key + ':':<30} {value}")
    return EXIT_DONE


def run_invoke(arguments: argparse.Namespace) -> int:
    """Print the answer's body as it is."""
    headers = {"Content-Type": "application/json"}
    for header in arguments.header:
        name, colon, value = header.partition(":")
        if not colon or not name.strip():
            raise KaliumError("function.header", f"cannot send the header {header!r}", "it has no colon", "write it as NAME:VALUE", EXIT_USAGE)
        headers[name.strip()] = value.strip()
    if arguments.path and not arguments.path.startswith(("/", "?")):
        raise KaliumError(
            "function.path", f"cannot invoke the path {arguments.path!r}", "it does not begin with /", "write it as /photos", EXIT_USAGE
        )
    answer = client_of(arguments).invoke(arguments.name, arguments.path, arguments.method, data_of(arguments.data), headers)
    sys.stdout.buffer.write(answer.body)
    if answer.body and not answer.body.endswith(b"\n") and sys.stdout.isatty():
        print(flush=True)
    if answer.status >= 400:
        sys.stdout.flush()
        raise KaliumError(
            "function.answer",
            f"cannot have {arguments.name} do its work",
            f"it answered {answer.status}",
            "`kalium policy explain --denied` shows what was refused inside, /var/log/kalium/engine.log what failed on the way",
            EXIT_NO,
        )
    return EXIT_DONE


def data_of(text: str) -> bytes:
    """A request's body as --data gives it."""
    if text == "@-":
        return sys.stdin.buffer.read()
    return read_file(Path(text[1:]), FILE_BYTES_MAX) if text.startswith("@") else text.encode("utf-8", "surrogateescape")


def run_remove(arguments: argparse.Namespace) -> int:
    """Remove a function."""
    client = client_of(arguments)
    if arguments.dry_run:
        status = client.describe(arguments.name)
        print(f"would remove {arguments.name} and its {status.get('replicas', 0)} instances")
        return EXIT_DONE
    client.remove(arguments.name)
    print(f"removed {arguments.name}")
    return EXIT_DONE
