"""One archive of the images, for machines that have no podman of ours: the image layout as a tar.

`ctr images import` of containerd 1.6 and later takes it, and so do podman and skopeo. The archive's name is a hash of what is in it.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from kalium.builder.build import IMAGES, images_of, layout_of, locked
from kalium.builder.layer import write_layer
from kalium.errors import EXIT_ENVIRONMENT, KaliumError

PREFIX = "functions-"
KEY_CHARACTERS = 20


def export(output: Path, *, is_rehearsal: bool = False) -> tuple[Path, bool]:
    """The archive of `output`'s images, beside them, and whether it had to be made; archives of earlier images go. Raises KaliumError.

    A rehearsal says the same and changes nothing.
    """
    listed = {str(entry["image"]) for entry in images_of(output).values()}
    if not listed:
        raise _nothing(f"{output / IMAGES} names none", "build them first: `kalium function build --no-podman`")
    with locked(output):
        layout = layout_of(output)
        missing = sorted(listed - layout.references())
        if missing:
            raise _nothing(f"{', '.join(missing)} is not there", "build again, which makes what is missing")
        # The index names everything else by digest, so its own hash is that of the whole.
        archive = output / f"{PREFIX}{hashlib.sha256(layout.index()).hexdigest()[:KEY_CHARACTERS]}.tar"
        is_changed = not archive.is_file()
        if not is_rehearsal:
            if is_changed:
                _write(layout.folder, archive)
            for other in output.glob(f"{PREFIX}*.tar"):
                if other != archive:
                    other.unlink()
    return archive, is_changed


def _nothing(found: str, next_step: str) -> KaliumError:
    return KaliumError("builder.export", "cannot export function images", found, next_step, EXIT_ENVIRONMENT)


def _write(folder: Path, archive: Path) -> None:
    """Make `archive` whole or not at all; the same images give the same bytes."""
    with tempfile.NamedTemporaryFile(dir=archive.parent, prefix=f".{archive.name}.", delete=False) as file:
        growing = Path(file.name)
        try:
            write_layer(folder, file)  # type: ignore[arg-type]  # a named temporary file is a binary file
            file.flush()
            growing.chmod(0o644)
            growing.replace(archive)
        except BaseException:
            growing.unlink(missing_ok=True)
            raise
