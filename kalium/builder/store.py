"""Who takes the images that were built: podman of this machine, or nobody yet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from kalium.builder.layout import Layout
from kalium.builder.tools import run
from kalium.errors import KaliumError

# A full name for every engine: podman, containerd and kubelet take what has a host in front as it is, and none asks a registry for this one.
REPOSITORY = "localhost/kalium"


class Store(Protocol):
    """What the builder asks of whoever keeps images."""

    needs_root: bool

    def images(self) -> set[str]:
        """Names of the images that are there, others' too."""

    def take(self, layout: Layout, reference: str) -> None:
        """Have the layout's image of that name."""

    def remove(self, reference: str) -> bool:
        """Let an image go; False when something runs it."""


class Kept:
    """Images for other machines: they stay in the layout, from which they are exported."""

    needs_root = False

    def __init__(self, layout: Layout) -> None:
        self._layout = layout

    def images(self) -> set[str]:
        return self._layout.references()

    def take(self, layout: Layout, reference: str) -> None:
        assert reference in layout.references()

    def remove(self, reference: str) -> bool:
        return reference in self._layout.references()


class Podman:
    """podman's store of images, through its command line."""

    needs_root = True

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)

    def _run(self, *words: str, attempted: str) -> str:
        return run([*self._command, *words], code="builder.podman", attempted=attempted, next_step="see that podman works: `podman info`")

    def _listed(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = json.loads(self._run("images", "--format", "json", attempted="cannot list the images") or "[]")
        return listed

    def images(self) -> set[str]:
        """Names of all images."""
        return {name for image in self._listed() for name in image.get("Names") or ()}

    def take(self, layout: Layout, reference: str) -> None:
        """Copy an image out of the layout; layers that podman has are not copied again."""
        attempted = f"cannot give {reference} to podman"
        identity = self._run("pull", "--quiet", f"oci:{layout.folder}:{reference}", attempted=attempted).split()[-1]
        self._run("tag", identity, reference, attempted=attempted)
        # Most versions of podman name what they take from a layout after its folder. Nobody asked for that name.
        names = {name for image in self._listed() if image["Id"] == identity for name in image.get("Names") or ()}
        assert reference in names, f"podman calls {identity} {names}"
        strangers = sorted(name for name in names if not name.startswith(f"{REPOSITORY}/"))
        if strangers:
            self._run("untag", identity, *strangers, attempted=attempted)

    def remove(self, reference: str) -> bool:
        """Remove an image; False when a container uses it."""
        try:
            self._run("rmi", reference, attempted=f"cannot remove {reference}")
        except KaliumError as error:
            if "in use" in error.found:
                return False
            raise
        return True
