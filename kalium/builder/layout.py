"""An OCI image layout on disk: blobs by digest, and an index of the images that are wanted now.

Source: the OCI Image Format Specification 1.0, "Image Layout", "Image Manifest" and "Image Configuration".
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kalium.builder.tools import write_whole

LAYER = "application/vnd.oci.image.layer.v1.tar"
CONFIG = "application/vnd.oci.image.config.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
REFERENCE = "org.opencontainers.image.ref.name"
CONTAINERD_NAME = "io.containerd.image.name"  # the same name for containerd, which may shorten the other
CREATED = "1970-01-01T00:00:00Z"  # when something was built is not part of what it is


@dataclass(frozen=True)
class Blob:
    """A blob of the layout: SHA-256 in hex, and bytes. Layers are not compressed, so that this is their diff id too."""

    digest: str
    size: int

    def descriptor(self, media_type: str) -> dict[str, Any]:
        return {"mediaType": media_type, "digest": f"sha256:{self.digest}", "size": self.size}


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and without spaces: equal values are equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


class Layout:
    """The layout in `folder`, which is made when it is not there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._blobs = folder / "blobs" / "sha256"
        self._index = folder / "index.json"
        self._blobs.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "oci-layout", canonical({"imageLayoutVersion": "1.0.0"}))

    def has(self, blob: Blob) -> bool:
        path = self._blobs / blob.digest
        return path.is_file() and path.stat().st_size == blob.size

    def add_layer(self, write: Callable[[BinaryIO], tuple[str, int]]) -> Blob:
        """Keep the layer that `write` writes."""
        with tempfile.NamedTemporaryFile(dir=self._blobs, prefix=".layer-", delete=False) as file:
            temporary = Path(file.name)
            try:
                blob = Blob(*write(file))  # type: ignore[arg-type]  # a named temporary file is a binary file
                file.flush()
                temporary.chmod(0o644)
                temporary.replace(self._blobs / blob.digest)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        return blob

    def _add(self, document: Mapping[str, Any]) -> Blob:
        data = canonical(document)
        blob = Blob(hashlib.sha256(data).hexdigest(), len(data))
        write_whole(self._blobs / blob.digest, data)
        return blob

    def add_image(self, reference: str, *, architecture: str, config: Mapping[str, Any], layers: Sequence[Blob]) -> None:
        """Add an image and list it in the index under `reference`, in the place of one of that name."""
        image = self._add(
            {
                "architecture": architecture, "os": "linux", "created": CREATED, "config": dict(config),
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.digest}" for layer in layers]},
            }
        )  # fmt: skip
        manifest = self._add(
            {
                "schemaVersion": 2, "mediaType": MANIFEST, "config": image.descriptor(CONFIG),
                "layers": [layer.descriptor(LAYER) for layer in layers],
            }
        )  # fmt: skip
        entries = [entry for entry in self._entries() if entry["annotations"][REFERENCE] != reference]
        entries.append({**manifest.descriptor(MANIFEST), "annotations": {REFERENCE: reference, CONTAINERD_NAME: reference}})
        self._write_index(entries)

    def references(self) -> set[str]:
        """The images that the index lists."""
        return {str(entry["annotations"][REFERENCE]) for entry in self._entries()}

    def index(self) -> bytes:
        """index.json."""
        return self._index.read_bytes()

    def keep_only(self, references: Iterable[str], layers: Iterable[Blob]) -> None:
        """Forget images that are not in `references`, and blobs that neither they nor `layers` name."""
        wanted = set(references)
        entries = [entry for entry in self._entries() if entry["annotations"][REFERENCE] in wanted]
        self._write_index(entries)
        blobs = {layer.digest for layer in layers}
        for entry in entries:
            digest = entry["digest"].removeprefix("sha256:")
            manifest = json.loads((self._blobs / digest).read_bytes())
            blobs |= {digest} | {part["digest"].removeprefix("sha256:") for part in (manifest["config"], *manifest["layers"])}
        for path in self._blobs.iterdir():
            if path.name not in blobs:
                path.unlink()

    def _entries(self) -> list[dict[str, Any]]:
        if not self._index.is_file():
            return []
        entries: list[dict[str, Any]] = json.loads(self._index.read_bytes())["manifests"]
        return entries

    def _write_index(self, entries: Iterable[Mapping[str, Any]]) -> None:
        manifests = sorted(entries, key=lambda entry: str(entry["annotations"][REFERENCE]))
        write_whole(self._index, canonical({"schemaVersion": 2, "manifests": manifests}))
