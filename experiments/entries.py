"""The benchmark entries: which function each calls, with what input, and what a right answer says.

Inputs are the functions' own `functions/<name>/sample.json`; only the address of the image is the site's. Images and the
environment come from what the site built (`images.json`) and from `functions/stack.yml`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from experiments import machine
from experiments.errors import ExperimentError
from experiments.gateway import Function
from experiments.site import Site
from experiments.systems import System

Expectation = tuple[Sequence[str | int], Any]


@dataclass(frozen=True)
class Entry:
    """One bar group of the figure. `opens_https` marks those whose work includes an HTTPS request."""

    name: str
    function: str
    path: str
    opens_https: bool
    expect: Sequence[Expectation]


MICROBENCH = "product-photos-1-microbench"
RECEIVE = "product-photos-3-receive"
SUCCESS = "product-photos-4-success"
REPORT = "product-photos-6-report"
MASTER = "product-photos-master"
MASTER_PATH = "/photos"

E2_LOAD = "e2-load"
E2_LOAD_OFF = "e2-load-off"  # the same image under a name whose mode is off
E2_CALLEE = "e2-callee"
E2_FUNCTIONS = (E2_LOAD, E2_LOAD_OFF, E2_CALLEE)

# In the order of the published figure.
ENTRIES = (
    Entry("microbenchmark", MICROBENCH, "", True, ((("From",), "200494"),)),
    Entry(
        "product-photos-receive", RECEIVE, "", True,
        ((("photographer", "id"), "200494"), (("image",), "storedPhotosTable/1"), (("success",), "true")),
    ),
    Entry("product-master-photos", MASTER, MASTER_PATH, True, ((("outcome",), "photo taken"), (("assignmentComplete",), "true"))),
    Entry("product-photos-success", SUCCESS, "", False, ((("assignmentComplete",), "true"), (("photographer", "status"), "complete"))),
    Entry("product-photos-report", REPORT, "", False, ((("outcome",), "photo taken"),)),
)  # fmt: skip
FUNCTIONS = (MICROBENCH, RECEIVE, SUCCESS, REPORT, MASTER)


def sample_input(site: Site, function: str) -> dict[str, Any]:
    """The function's sample input, asking for this site's image."""
    where = site.checkout / "functions" / function / "sample.json"
    try:
        body = json.loads(where.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ExperimentError("entries.input", f"read {where}", str(error), "restore the file from git") from error
    assert isinstance(body, dict), f"{where} is an object"
    return body | ({"MediaUrl0": site.images_url} if "MediaUrl0" in body else {})


class Stack:
    """What functions/stack.yml and the site's list of built images say about deploying each function."""

    def __init__(self, site: Site) -> None:
        self._where = site.checkout / "functions" / "stack.yml"
        try:
            document = yaml.safe_load(self._where.read_text(encoding="utf-8"))
            self._functions: Mapping[str, Any] = document["functions"]
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise ExperimentError("entries.stack", f"read {self._where}", f"{type(error).__name__}: {error}", "restore the file from git") from error
        self._images_file: Path = site.images_file
        self._images: Mapping[str, Any] = json.loads(machine.of(site.members("build")[0]).read_bytes(site.images_file))

    def function(self, name: str, system: System, *, image_key: str = "") -> Function:
        """Function `name` as it is deployed for `system`; `image_key` names another image than its own."""
        key = image_key or name
        if key not in self._images:
            raise ExperimentError(
                "entries.image", f"find the image of {key} in {self._images_file}", f"it lists {', '.join(sorted(self._images))}",
                "build the images again with `make site`",
            )  # fmt: skip
        description = self._functions.get(name) or self._functions.get(image_key) or {}
        return Function(
            name=name,
            image=str(self._images[key]["image"]),
            labels={**(description.get("labels") or {}), **system.labels},
            annotations={**(description.get("annotations") or {}), **system.annotations},
            environment={key: str(value) for key, value in (description.get("environment") or {}).items()},
        )
