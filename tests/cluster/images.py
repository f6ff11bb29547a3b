"""The images of a cluster's own pods, as one archive that `ctr images import` reads: our programs, and iptables of the distribution."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from throwaway.host import HostError
from throwaway.roots import run

VERSIONS = Path(__file__).resolve().parents[2] / "roles/kalium_versions/defaults/main.yml"
ARCHIVE = "images.tar"
DOWNLOAD_S_MAX = 300.0
# kube-proxy and flanneld run it. Of its packages and theirs only programs, libraries and tables are of use.
PACKAGE = "iptables"
USED = re.compile(r"^\./(lib|lib64|usr/lib/[a-z0-9_]+-linux-gnu|usr/sbin|sbin|etc)/")
BESIDE_PROGRAMS = re.compile(r"/(gconv|ldscripts)/")
# The distribution makes these links when it configures the package.
IPTABLES = {f"usr/sbin/{family}{suffix}": "xtables-nft-multi" for family in ("iptables", "ip6tables") for suffix in ("", "-save", "-restore")}
SERVERS = ("kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler")
PATHS = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Image:
    """One image: the names it is found by, its layers, and what it runs where its manifest says nothing."""

    references: Sequence[str]
    layers: Sequence[str]
    entrypoint: Sequence[str] = ()


def references() -> dict[str, str]:
    """Images that our roles name, by what they are; those of Kubernetes are kubeadm's to name."""
    pins = yaml.safe_load(VERSIONS.read_text(encoding="utf-8"))
    flannel = pins["kalium_versions_flannel"]
    return {"pause": pins["kalium_versions_pause"]["image"], "flannel": flannel["image"], "plugin": flannel["plugin"]}


def packages() -> dict[str, str]:
    """The distribution's packages that iptables consists of: name -> its file and digest, as apt would fetch it."""
    nothing_installed = ("-o", "Dir::State::status=/dev/null", "-o", "APT::Architectures::=")
    said = run("apt-get", *nothing_installed, "--print-uris", "--yes", "--no-install-recommends", "install", PACKAGE)
    found = {}
    for line in said.splitlines():
        if line.startswith("'"):
            _, file, _, digest = line.split()
            found[file.split("_")[0]] = f"{file} {digest}"
    if PACKAGE not in found:
        raise HostError("packages", "cannot pack the images", f"apt knows no package {PACKAGE}", "sudo apt-get update")
    return found


def files_of_packages(folder: Path) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
    """The files of the packages, which are downloaded to `folder`, in the order of their names."""
    subprocess.run(["apt-get", "--quiet=2", "download", *sorted(packages())], cwd=folder, check=True, capture_output=True, timeout=DOWNLOAD_S_MAX)
    for package in sorted(folder.glob("*.deb")):
        unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(package)], check=True, capture_output=True, timeout=DOWNLOAD_S_MAX)
        with tarfile.open(fileobj=io.BytesIO(unpacked.stdout)) as tar:
            for member in tar.getmembers():
                if USED.match(member.name) and not BESIDE_PROGRAMS.search(member.name):
                    member.name = member.name.removeprefix("./")
                    file = tar.extractfile(member) if member.isreg() else None
                    yield member, file.read() if file else None


def plain(name: str, *, size: int = 0, link: str = "") -> tarfile.TarInfo:
    """A member of an archive that says nothing of who made it, and when."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o755
    if link:
        member.type, member.linkname = tarfile.SYMTYPE, link
    return member


class Layers:
    """Layers of images, each an archive in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.digests: dict[str, str] = {}

    def path(self, name: str) -> Path:
        return self._folder / f"{name}.tar"

    def add(self, name: str, members: Iterable[tuple[tarfile.TarInfo, bytes | Path | None]]) -> None:
        """Write a layer: each member with its bytes, or the file that has them."""
        with tarfile.open(self.path(name), "w") as tar:
            for member, content in members:
                if isinstance(content, Path):
                    member.size = content.stat().st_size
                    with content.open("rb") as file:
                        tar.addfile(member, file)
                else:
                    tar.addfile(member, io.BytesIO(content) if content is not None else None)
        with self.path(name).open("rb") as file:
            whole = hashlib.sha256()
            while block := file.read(1 << 20):
                whole.update(block)
        self.digests[name] = whole.hexdigest()


def make_layers(layers: Layers, place: Path, downloads: Path) -> None:
    """Every layer: programs of `place`, by the paths at which manifests look for them."""
    binaries = "usr/local/bin"
    links = [(plain(f"{binaries}/{name}", link="server"), None) for name in SERVERS]
    layers.add("server", [(plain(f"{binaries}/server"), place / "server"), *links])
    layers.add("etcd", [(plain(f"{binaries}/etcd"), place / "etcd")])
    layers.add("coredns", [(plain("coredns"), place / "coredns")])
    layers.add("flanneld", [(plain("opt/bin/flanneld"), place / "flanneld")])
    layers.add("pause", [(plain("pause"), place / "small")])
    layers.add("copying", [(plain("usr/bin/cp"), place / "small")])
    layers.add("plugin", [(plain("flannel"), place / "small")])
    layers.add("iptables", [*files_of_packages(downloads), *((plain(name, link=link), None) for name, link in IPTABLES.items())])


def images_of(wanted: Sequence[str]) -> list[Image]:
    """The images under the names that kubeadm wants them by (`wanted`) and our roles do. Raises HostError for one that nobody knows."""
    ours = references()
    # What each name is; programs that share a file share an image.
    kinds = {"kube-proxy": "kube-proxy", "coredns": "coredns", "pause": "pause", "etcd": "etcd"}
    kinds |= {name: "server" for name in SERVERS if name not in kinds}
    references_of: dict[str, list[str]] = {kind: [] for kind in kinds.values()}
    for reference in dict.fromkeys([*wanted, ours["pause"]]):
        name = reference.rpartition(":")[0].rpartition("/")[2]
        if name not in kinds:
            raise HostError("images", "cannot pack the images", f"kubeadm wants {reference}, which nothing here is", "add it to tests/cluster")
        references_of[kinds[name]].append(reference)
    return [
        Image(references_of["server"], ("server",)),
        Image(references_of["kube-proxy"], ("iptables", "server")),
        Image(references_of["etcd"], ("etcd",)),
        Image(references_of["coredns"], ("coredns",), ("/coredns",)),
        Image(references_of["pause"], ("pause",), ("/pause",)),
        Image([ours["flannel"]], ("iptables", "copying", "flanneld"), ("/opt/bin/flanneld",)),
        Image([ours["plugin"]], ("copying", "plugin")),
    ]


def configuration(image: Image, digests: Mapping[str, str]) -> bytes:
    """An image's configuration as the archive's form has it."""
    moment = "1970-01-01T00:00:00Z"
    return json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": moment,
            "config": {"Entrypoint": list(image.entrypoint) or None, "Env": [PATHS]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digests[name]}" for name in image.layers]},
            "history": [{"created": moment} for _ in image.layers],
        },
        sort_keys=True,
    ).encode()


def pack(place: Path, wanted: Sequence[str]) -> None:
    """Write ARCHIVE into `place`, which has the programs. A layer of several images is in it once. Raises HostError."""
    with tempfile.TemporaryDirectory(prefix="layers-", dir=place.parent) as name:
        downloads = Path(name) / "packages"
        downloads.mkdir()
        layers = Layers(Path(name))
        make_layers(layers, place, downloads)
        with tarfile.open(place / ARCHIVE, "w") as tar:

            def add(path: str, content: bytes) -> None:
                tar.addfile(plain(path, size=len(content)), io.BytesIO(content))

            for layer, digest in layers.digests.items():
                with layers.path(layer).open("rb") as file:
                    tar.addfile(plain(f"{digest}/layer.tar", size=layers.path(layer).stat().st_size), file)
            manifest = []
            for image in images_of(wanted):
                content = configuration(image, layers.digests)
                path = hashlib.sha256(content).hexdigest() + ".json"
                add(path, content)
                manifest.append(
                    {"Config": path, "RepoTags": list(image.references), "Layers": [f"{layers.digests[one]}/layer.tar" for one in image.layers]}
                )
            add("manifest.json", json.dumps(manifest).encode())
