"""What a cluster is made of, built from Go modules: no registry of packages has it as files.

    PYTHONPATH=tests python -m cluster.builds

Builds the programs of `programs/` and packs the images (images.py), and writes `artifacts.json`, which says what each file is and has its
digest. All is kept below the cache under the digest of what it is made from; `cluster/artifacts` there leads to the newest, which is what
`inventory/testbed` installs. Cold about 10 minutes on 2 cores, of which the Go module proxy takes some; warm nothing is built.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from throwaway.host import HostError
from throwaway.roots import run

from . import images
from .state import artifacts, caches

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "programs"
BUILD_S_MAX = 3600.0
MANIFEST = "artifacts.json"
# Kubernetes takes its version from the linker. A commit and a date would make the same sources another file.
VERSIONED = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")


@dataclass(frozen=True)
class Module:
    """One Go module of `programs/`: the module whose version it is known by, and its packages with the names of their files."""

    folder: str
    upstream: str
    packages: Mapping[str, str]

    def version(self) -> str:
        """The version of `upstream` in its go.mod, with its v; empty where it is ours alone."""
        found = re.search(rf"{re.escape(self.upstream)} (v\S+)", (PROGRAMS / self.folder / "go.mod").read_text(encoding="utf-8"))
        return found.group(1) if found else ""


KUBERNETES = Module("kubernetes", "k8s.io/kubernetes", {f"./{name}": name for name in ("kubeadm", "kubectl", "kubelet", "server")})
MODULES = (
    KUBERNETES,
    Module("etcd", "go.etcd.io/etcd/server/v3", {".": "etcd"}),
    Module("coredns", "github.com/coredns/coredns", {".": "coredns"}),
    Module("flannel", "github.com/flannel-io/flannel", {".": "flanneld"}),
    Module("small", "", {".": "small"}),
)


def go() -> str:
    """The Go program that the runtime is built with, or one as new. Raises HostError when there is none."""
    minimum = re.search(r"^go (\S+)$", (ROOT / "runtime/go.mod").read_text(encoding="utf-8"), re.MULTILINE)
    assert minimum is not None
    asked = [sys.executable, str(ROOT / "roles/kalium_toolchain/files/find_go.py"), minimum.group(1)]
    found = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60).stdout.strip()
    if not found:
        raise HostError("go", "cannot build a cluster's programs", f"there is no Go {minimum.group(1)} or newer", "make site, which installs one")
    return found


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        whole = hashlib.sha256()
        while block := file.read(1 << 20):
            whole.update(block)
    return whole.hexdigest()


def linker_flags(version: str) -> str:
    """Without symbols; with the version, where it is Kubernetes'."""
    flags = ["-s", "-w"]
    if version:
        major, minor, _ = version.removeprefix("v").split(".", 2)
        values = {"gitVersion": version, "gitMajor": major, "gitMinor": minor, "gitTreeState": "clean", "gitCommit": "0" * 40}
        values["buildDate"] = "1970-01-01T00:00:00Z"
        flags += [f"-X {package}.{name}={value}" for package in VERSIONED for name, value in values.items()]
    return " ".join(flags)


def compile_module(module: Module, target: Path) -> None:
    """Build each package of a module into the folder `target`. Raises HostError with what the compiler said."""
    flags = linker_flags(module.version() if module is KUBERNETES else "")
    # The collector at work is what makes the compiler slow here; the largest package then takes about 2 GiB.
    environment = {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "-trimpath", "GOTOOLCHAIN": "local", "GOWORK": "off", "GOGC": "400"}
    for package, name in module.packages.items():
        command = [go(), "build", "-ldflags", flags, "-o", str(target / name), package]
        built = subprocess.run(
            command, cwd=PROGRAMS / module.folder, env=environment, capture_output=True, text=True, check=False, timeout=BUILD_S_MAX
        )
        if built.returncode:
            found = " / ".join(built.stderr.strip().splitlines()[-8:])
            raise HostError("build", f"cannot build {name}", found, "mend what it says; a module that was not served is asked for again")


def sources() -> str:
    """The digest of everything that what is built depends on."""
    whole = hashlib.sha256()
    files = (path for path in PROGRAMS.rglob("*") if path.is_file())
    for path in sorted([*files, Path(__file__), Path(images.__file__)]):
        whole.update(f"{path.name} {digest(path)}\n".encode())
    for words in (run(go(), "version"), *images.packages().values(), *images.references().values()):
        whole.update(f"{words}\n".encode())
    return whole.hexdigest()[:24]


def built() -> Path:
    """The folder with the programs, the images and their manifest, made when it is not there. Raises HostError."""
    place = caches() / "cluster" / "builds" / sources()
    if not (place / MANIFEST).exists():
        growing = place.with_suffix(".growing")
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir(parents=True)
        for module in MODULES:
            began = time.monotonic()
            print(f"building {module.folder} {module.version()}".rstrip(), end="", flush=True)
            compile_module(module, growing)
            print(f", {time.monotonic() - began:.0f} s", flush=True)
        images.pack(growing, run(str(growing / "kubeadm"), "config", "images", "list", "--kubernetes-version", KUBERNETES.version()).split())
        write_manifest(growing)
        shutil.rmtree(place, ignore_errors=True)
        growing.rename(place)
        for other in place.parent.iterdir():
            if other != place:
                shutil.rmtree(other)
    link = artifacts()
    if not link.is_symlink() or link.resolve() != place.resolve():
        link.unlink(missing_ok=True)
        link.symlink_to(place)
    return place


def write_manifest(place: Path) -> None:
    """Write artifacts.json: the version of Kubernetes, the digest of each file by its name, and what each was built from."""
    made_from = {name: f"{module.upstream} {module.version()}".strip() or "ours" for module in MODULES for name in module.packages.values()}
    files = sorted(path for path in place.iterdir() if path.name != MANIFEST)
    manifest = {
        "kubernetes": KUBERNETES.version().removeprefix("v"),
        "digests": {path.name: digest(path) for path in files},
        "made_from": made_from,
    }
    (place / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    """Exit 0 with the folder printed, 3 with the reason."""
    try:
        print(built())
    except HostError as error:
        print(error, file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
