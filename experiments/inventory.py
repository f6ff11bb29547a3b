"""Writes the inventory folder of a CloudLab experiment from its manifest.

Each file begins with a line that holds the SHA-256 of what follows, so that a file that somebody edited is known by itself: it is not
written again unless that is asked for.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

from experiments.errors import EXIT_USAGE, ExperimentError
from experiments.manifest import Manifest, Node, read
from experiments.site import CHECKOUT

MARK = "# Written by `fab inventory`; sha256 of what follows: "
TEMPLATE = Path("inventory/cloudlab/group_vars/all.yml")
FOLDER_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
SHIPPED = ("local", "cloudlab", "sample", "testbed")  # the checkout's own, which no manifest may replace


@dataclass(frozen=True)
class Written:
    """What became of the folder: `files` by whether it was written, replaced or left as it was; `hosts` in order."""

    folder: Path
    files: dict[Path, str]
    hosts: tuple[str, ...]

    def text(self) -> str:
        """For the person who typed the command: what was done, and what to type next."""
        lines = [f"{path}: {what}" for path, what in self.files.items()]
        return "\n".join(
            [
                *lines,
                "next: put the machines' host keys into known_hosts once you have compared them (docs/howto/cloudlab.md says how):",
                f"      ssh-keyscan -t ed25519 {' '.join(self.hosts)} >> ~/.ssh/known_hosts",
                f"      ansible-playbook site.yml -i {self.folder}",
            ]
        )


def _host(node: Node, user: str, port: int, address: object) -> str:
    values = {"ansible_host": node.virtual, "ansible_user": user, "ansible_port": port, "kalium_layout_address": address}
    given = ", ".join(f"{key}: {value}" for key, value in values.items() if (key, value) != ("ansible_port", 22))
    return f"    {node.name}: {{{given}}} # {node.physical}{', ' + node.hardware if node.hardware else ''}\n"


def _group(name: str, nodes: tuple[Node, ...]) -> str:
    return f"    {name}:\n      hosts: {{{', '.join(f'{node.name}: {{}}' for node in nodes)}}}\n"


def hosts_file(manifest: Manifest, user: str | None) -> str:
    """The text of hosts.yml: each machine with its names and addresses, and the groups as in inventory/cloudlab."""
    logins = manifest.logins(user)
    machines = [_host(node, logins[node.number].user, logins[node.number].port, node.lan.ip if node.lan else node.public) for node in manifest.nodes]
    control, controller = (manifest.control_plane,), (manifest.controller,)
    groups = {
        "kube_control": control,
        "function_nodes": manifest.workers,
        "controller": controller,
        "store": controller,
        "images": controller,
        "database": control,
        "client": control,
    }
    return (
        f"---\n# Experiment {manifest.experiment}. Why each machine has its part is said in inventory/cloudlab/hosts.yml.\n"
        "all:\n  hosts:\n    build-host: {ansible_connection: local}\n"
        + "".join(machines)
        + "  children:\n    build:\n      hosts: {build-host: {}}\n"
        + "".join(_group(name, nodes) for name, nodes in groups.items())
    )


def sealed(text: str) -> str:
    """The text under a line with its digest."""
    return f"{MARK}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def is_ours(content: str) -> bool:
    """Whether the file is as it was written: its first line holds the digest of the rest."""
    first, _, rest = content.partition("\n")
    return first.startswith(MARK) and sealed(rest) == content


def _current(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ExperimentError("inventory.file", f"cannot write {path}", error.strerror or str(error), "choose another folder with --out") from error


def _replace(path: Path, content: str) -> None:
    """Write the file at once: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(content)
    Path(temporary).chmod(0o644)
    Path(temporary).replace(path)


def _folder(out: str | None, manifest: Manifest, checkout: Path) -> Path:
    folder = Path(out or f"inventory/{manifest.experiment}")
    if not FOLDER_NAME.fullmatch(folder.name) or (folder.parent == Path("inventory") and folder.name in SHIPPED):
        raise ExperimentError(
            "inventory.name",
            f"cannot write the inventory {folder}",
            f"the folder is one of the checkout's own ({', '.join(SHIPPED)}), or its name is not lower-case letters, digits, - and _",
            "choose another one, for example `--out inventory/mine`",
            exit_code=EXIT_USAGE,
        )
    return folder if folder.is_absolute() else checkout / folder


def write(manifest_file: str, user: str | None, out: str | None, *, force: bool, checkout: Path = CHECKOUT) -> Written:
    """Read the manifest and write the folder `out` (default inventory/EXPERIMENT, relative to the checkout).

    A file that is as it would be written is left alone. Raises ExperimentError, before anything is written, for a manifest that cannot be
    used and for a file that was edited, unless `force`.
    """
    manifest = read(Path(manifest_file).expanduser())
    folder = _folder(out, manifest, checkout)
    texts = {
        folder / "hosts.yml": sealed(hosts_file(manifest, user)),
        folder / "group_vars" / "all.yml": sealed((checkout / TEMPLATE).read_text(encoding="utf-8")),
    }
    current = {path: _current(path) for path in texts}
    edited = [path for path, content in current.items() if content is not None and content != texts[path] and not is_ours(content)]
    if edited and not force:
        raise ExperimentError(
            "inventory.edited",
            f"cannot write {', '.join(map(str, edited))}",
            "it was edited, or is somebody else's",
            "choose another folder with --out, or say --force to lose what is in it",
            exit_code=EXIT_USAGE,
        )
    files = {}
    for path, text in texts.items():
        files[path] = "unchanged" if current[path] == text else "written" if current[path] is None else "replaced"
        if files[path] != "unchanged":
            _replace(path, text)
    shown = folder.relative_to(checkout) if folder.is_relative_to(checkout) else folder
    return Written(shown, {shown / path.relative_to(folder): what for path, what in files.items()}, tuple(node.virtual for node in manifest.nodes))
