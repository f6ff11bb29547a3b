"""Building: base, wheels and files become layers, layers an image, and podman is told where it is, or nobody until it is exported."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalium.builder.base import USER_ID, Base, architecture, base_key, compile_python, ensure_base, workspace
from kalium.builder.layer import write_layer
from kalium.builder.layout import Blob, Layout, canonical
from kalium.builder.stack import Target, read_stack
from kalium.builder.store import REPOSITORY, Store
from kalium.builder.tools import run, write_whole
from kalium.builder.wheels import fitting
from kalium.errors import EXIT_ENVIRONMENT, KaliumError

TAG_CHARACTERS = 20
FUNCTION_FOLDER = "function"
PACKAGES_FOLDER = "packages"
RECORDS = "layers.json"  # of each layer of wheels: from what it was made
IMAGES = "images.json"
CONFIG: Mapping[str, Any] = {
    "User": f"{USER_ID}:{USER_ID}",
    "Env": ["PATH=/usr/bin", "LANG=C.UTF-8", f"PYTHONPATH=/{PACKAGES_FOLDER}", "PYTHONDONTWRITEBYTECODE=1"],
    "Entrypoint": ["python3", f"/{FUNCTION_FOLDER}"],
    "WorkingDir": f"/{FUNCTION_FOLDER}",
    "ExposedPorts": {"8080/tcp": {}},
}


@dataclass(frozen=True)
class Outcome:
    """What became of one target."""

    name: str
    image: str
    is_changed: bool

    def __str__(self) -> str:
        return f"{'changed' if self.is_changed else 'unchanged'} {self.name} {self.image}"


def image_of(name: str, key: str) -> str:
    """The image's full name: the content's key is its tag."""
    return f"{REPOSITORY}/{name.replace('/', '-')}:{key[:TAG_CHARACTERS]}"


def packages_key(base: str, requirements: Path) -> str:
    """What a layer of wheels depends on."""
    return hashlib.sha256(canonical([base, hashlib.sha256(requirements.read_bytes()).hexdigest(), _recipe()])).hexdigest()


def target_key(target: Target, base: str) -> str:
    """What an image depends on: base, locked wheels, files and configuration."""
    files = {name: hashlib.sha256(contents).hexdigest() for name, contents in target.files.items()}
    wheels = packages_key(base, target.requirements) if target.requirements else ""
    return hashlib.sha256(canonical([base, wheels, files, CONFIG, _recipe()])).hexdigest()


def _recipe() -> str:
    """How images are made is part of what they are made from."""
    return hashlib.sha256(
        b"".join(Path(__file__).with_name(name).read_bytes() for name in ("build.py", "layer.py", "layout.py", "wheels.py"))
    ).hexdigest()


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Only one builder works in `output` at a time; a second one is told so."""
    with (output / ".lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise KaliumError(
                "builder.busy", f"cannot build into {output}", "another build is at work there", "wait until it has ended", EXIT_ENVIRONMENT
            ) from error
        yield


def images_of(output: Path) -> dict[str, Any]:
    """What images.json says; nothing before the first build."""
    path = output / IMAGES
    listed: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    return listed


def layout_of(output: Path) -> Layout:
    """The image layout in a builder's folder."""
    return Layout(output / "oci")


class Builder:
    """Builds into `output`: images.json for readers, an OCI layout, and the base that all images share."""

    def __init__(self, output: Path, store: Store) -> None:
        self.output = output
        self.store = store
        self.layout = layout_of(output)

    def build(self, stack: Path, *, only: str | None = None, refresh: bool = False) -> Iterator[Outcome]:
        """Build the targets of `stack`; an outcome follows each as soon as its image is there. Others in images.json stay."""
        if self.store.needs_root and os.geteuid() != 0:
            next_step = "run it with sudo: it works for root's podman; or keep the images for an export with --no-podman"
            raise KaliumError("builder.root", "cannot build function images", "this is not root", next_step, EXIT_ENVIRONMENT)
        targets = read_stack(stack, only)
        with locked(self.output):
            base, _ = ensure_base(self.output, self.layout, refresh=refresh)
            present = self.store.images()
            for target in targets:
                image = image_of(target.name, target_key(target, base.layer.digest))
                is_changed = image not in present
                if is_changed:
                    self._make(target, image, base)
                    self.store.take(self.layout, image)
                self._list(target.name, image)
                yield Outcome(target.name, image, is_changed)
            self._clean(base)

    def plan(self, stack: Path, *, only: str | None = None) -> Iterator[Outcome]:
        """What `build` would say, without changing anything. Without a base the names of images are not known yet."""
        record = self.output / "base.json"
        known = json.loads(record.read_bytes()) if record.is_file() else {}
        is_current = known.get("key") == base_key()
        present = self.store.images() if is_current else set()
        for target in read_stack(stack, only):
            image = image_of(target.name, target_key(target, known["layer"]["digest"])) if is_current else "(after the base is made)"
            yield Outcome(target.name, image, image not in present)

    def images(self) -> dict[str, Any]:
        return images_of(self.output)

    def _list(self, name: str, image: str) -> None:
        images = self.images()
        if images.get(name) != {"image": image}:
            images[name] = {"image": image}
            write_whole(self.output / IMAGES, json.dumps(images, indent=1, sort_keys=True).encode() + b"\n")

    def _make(self, target: Target, image: str, base: Base) -> None:
        layers = [base.layer]
        if target.requirements is not None:
            layers.append(self._wheels(target.requirements, base))
        with workspace(base.root) as folder:
            for name, contents in target.files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(contents)
            compile_python(base.root, folder.name, appears_as=FUNCTION_FOLDER)
            layers.append(self.layout.add_layer(lambda file: write_layer(folder, file, prefix=FUNCTION_FOLDER)))
        self.layout.add_image(image, architecture=architecture(), config=CONFIG, layers=layers)

    def _wheels(self, requirements: Path, base: Base) -> Blob:
        """The layer of locked wheels, made when it is not there."""
        key = packages_key(base.layer.digest, requirements)
        records = self._records()
        if key in records and self.layout.has(records[key]):
            return records[key]
        with workspace(base.root) as folder:
            _install(requirements, folder, base)
            compile_python(base.root, folder.name, appears_as=PACKAGES_FOLDER)
            layer = self.layout.add_layer(lambda file: write_layer(folder, file, prefix=PACKAGES_FOLDER, keep=_is_of_the_package))
        self._write_records({**records, key: layer})
        return layer

    def _records(self) -> dict[str, Blob]:
        path = self.output / RECORDS
        return {key: Blob(**value) for key, value in json.loads(path.read_bytes()).items()} if path.is_file() else {}

    def _write_records(self, records: Mapping[str, Blob]) -> None:
        write_whole(self.output / RECORDS, canonical({key: {"digest": blob.digest, "size": blob.size} for key, blob in records.items()}))

    def _clean(self, base: Base) -> None:
        """Forget what images.json does not name any more; an image that a container uses stays until a later build."""
        listed = {entry["image"] for entry in self.images().values()}
        present = self.store.images()
        used = {image for image in self.layout.references() - listed if image in present and not self.store.remove(image)}
        self.layout.keep_only(listed | used, [base.layer])
        self._write_records({key: blob for key, blob in self._records().items() if self.layout.has(blob)})


def _is_of_the_package(name: str) -> bool:
    """Programs name the Python that installs them, and RECORD holds their hashes: neither is the same wherever it is built."""
    return name != "bin" and not name.endswith(".dist-info/RECORD")


def _install(requirements: Path, folder: Path, base: Base) -> None:
    """Unpack the locked wheels into `folder`: those for the base's Python and C library, whatever runs this program."""
    run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--target", str(folder), "--no-compile",
            "--no-deps", "--require-hashes", *fitting(base.python, base.glibc, os.uname().machine), "--requirement", str(requirements),
        ],
        code="builder.wheels",
        attempted=f"cannot install {requirements} for Python {base.python}",
        next_step="lock it with hashes, dependencies included: `uv pip compile --generate-hashes`; and see that a package index answers",
    )  # fmt: skip
