"""The base of every image: Python, TLS and certificate authorities from the distribution's own packages.

apt chooses the packages for an empty system and checks their signatures; their files are taken out without running a
maintainer script, and what a function has no use for is left behind.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import platform
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from kalium.builder.layer import write_layer
from kalium.builder.layout import Blob, Layout, canonical
from kalium.builder.tools import as_root, run, write_whole
from kalium.errors import EXIT_ENVIRONMENT, KaliumError

# libstdc++6 is what wheels with compiled code expect of every system.
PACKAGES = ("python3", "ca-certificates", "libstdc++6")
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
MERGED = ("bin", "lib", "lib64", "sbin")  # links to the folders of these names in usr
USER_ID = 10001
AGAIN = "run it again; packages are downloaded anew"
WITHOUT_ROOT = "run it as root if this machine lets nobody else make a user namespace; otherwise report this with the output"
REPORT = "report this with the output and the distribution's name"
SYSTEM_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/bin:/bin"
AUTHORITIES = "etc/ssl/certs/ca-certificates.crt"

# What is taken out of the packages. `*` stands for any characters, slashes too.
KEEP = (
    "usr/bin/python3*", "usr/lib/python3*", "usr/lib/*-linux-gnu/*", "usr/lib64/*", "usr/lib/ssl/*", "usr/lib/locale/*",
    "etc/python3*", "etc/ssl/openssl.cnf", "etc/mime.types", "usr/share/ca-certificates/*", "usr/share/zoneinfo/*", "usr/share/doc/*/copyright",
)  # fmt: skip
# What is left behind all the same: other programs' parts, and parts of Python that need a screen, a compiler or a network to install from.
LEAVE = (
    "usr/lib/*-linux-gnu/gconv/*", "usr/lib/*-linux-gnu/perl*", "usr/lib/*-linux-gnu/audit/*", "usr/lib/*-linux-gnu/krb5/*",
    "usr/lib/python3*/config-*", "usr/lib/python3*/ensurepip/*", "usr/lib/python3*/idlelib/*", "usr/lib/python3*/lib2to3/*",
    "usr/lib/python3*/pydoc_data/*", "usr/lib/python3*/test/*", "usr/lib/python3*/tkinter/*", "usr/lib/python3*/turtle*",
    "usr/lib/python3*/__pycache__/*", "usr/lib/python3/dist-packages/*", "usr/bin/*config", "usr/share/zoneinfo/right/*",
    "usr/share/zoneinfo/posix/*",
)  # fmt: skip


@dataclass(frozen=True)
class Base:
    """A base that is there. `python` is like "3.11", `glibc` like "2.36", `packages` maps each package to its version."""

    key: str
    python: str
    glibc: str
    packages: Mapping[str, str]
    layer: Blob
    root: Path


def architecture() -> str:
    """This machine's architecture, as images name it."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        found, next_step = f"machine type {machine}", f"use one of {', '.join(ARCHITECTURES)}"
        raise KaliumError("builder.architecture", "cannot build function images", found, next_step, EXIT_ENVIRONMENT)
    return ARCHITECTURES[machine]


def distribution(release: Path = Path("/etc/os-release")) -> str:
    """Like "debian 12", from the file that says so."""
    fields = dict(line.split("=", 1) for line in release.read_text(encoding="utf-8").splitlines() if "=" in line)
    return " ".join(fields.get(name, "").strip('"') for name in ("ID", "VERSION_ID"))


def base_key() -> str:
    """What a base depends on: the distribution, the architecture, and how it is made. New versions of packages are taken on demand only."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return hashlib.sha256(canonical([distribution(), architecture(), recipe])).hexdigest()


def ensure_base(output: Path, layout: Layout, *, refresh: bool) -> tuple[Base, bool]:
    """The base in `output`, made when it is not there or `refresh` asks for newer packages; and whether it was made."""
    key = base_key()
    record, root = output / "base.json", output / "base"
    if not refresh and record.is_file() and root.is_dir():
        known = json.loads(record.read_bytes())
        base = Base(**{**known, "layer": Blob(**known["layer"]), "root": root})
        if base.key == key and layout.has(base.layer):
            return base, False
    with workspace(output) as folder:
        fresh = folder / "root"
        packages = _make_root(fresh, folder)
        python, glibc = _versions(fresh)
        compile_python(fresh, f"usr/lib/python{python}")
        layer = layout.add_layer(lambda file: write_layer(fresh, file))
        base = Base(key, python, glibc, packages, layer, root)
        record.unlink(missing_ok=True)  # until it is written again, there is no base
        if root.exists():
            shutil.rmtree(root)
        fresh.rename(root)
        known = {name: value for name, value in asdict(base).items() if name != "root"}
        write_whole(record, json.dumps(known, indent=1, sort_keys=True).encode() + b"\n")
    return base, True


@contextmanager
def workspace(output: Path) -> Iterator[Path]:
    """A folder under `output` that is gone afterwards. apt's own user can write where it makes a folder in it."""
    folder = Path(tempfile.mkdtemp(prefix=".work-", dir=output))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _make_root(root: Path, folder: Path) -> dict[str, str]:
    """Fill `root`; returns package versions."""
    archives = download(PACKAGES, folder)
    root.mkdir()
    for name in MERGED:
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    packages = {}
    for archive in archives:
        fields = run(
            ["dpkg-deb", "--show", "--showformat=${Package} ${Version}", str(archive)],
            code="builder.package", attempted=f"cannot read {archive.name}", next_step=AGAIN,
        )  # fmt: skip
        name, version = fields.split()
        packages[name] = version
        unpack(archive, root)
    _settle(root)
    return packages


def download(packages: Iterable[str], folder: Path) -> list[Path]:
    """Download `packages` and what they depend on, as for a system that has none; apt checks signatures. Returns the archives, sorted."""
    archives = folder / "archives"
    archives.mkdir()
    status = folder / "status"
    status.touch()
    options = {
        "Dir::State::status": status, "Dir::Cache::archives": f"{archives}/", "Dir::Cache::pkgcache": "", "Dir::Cache::srcpkgcache": "",
        # The system's own package state is not touched, so its lock need not be waited for.
        "Debug::NoLocking": "true",
    }  # fmt: skip
    run(
        [
            "apt-get", "--quiet", "--yes", "--no-install-recommends", "--download-only", *(f"-o{name}={value}" for name, value in options.items()),
            "install", *packages,
        ],
        code="builder.download",
        attempted=f"cannot download {', '.join(packages)} from the distribution",
        next_step="run `apt-get update`, see that a package mirror answers, and try again",
        environment={"DEBIAN_FRONTEND": "noninteractive"},
    )  # fmt: skip
    found = sorted(archives.glob("*.deb"))
    assert found, "apt-get succeeded, so it has downloaded the packages"
    return found


def merged(name: str) -> str:
    """Where `name` of a package lies when bin, lib, lib64 and sbin are links into usr."""
    return f"usr/{name}" if name.split("/", 1)[0] in MERGED else name


def is_kept(name: str) -> bool:
    """Whether a file of a package is taken out, by its place in the root."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in KEEP) and not any(fnmatch.fnmatchcase(name, pattern) for pattern in LEAVE)


def unpack(archive: Path, root: Path) -> None:
    """Take what is kept of a package's files out into `root`."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(archive)], stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        unreadable = ""
        with process:
            try:
                with tarfile.open(fileobj=process.stdout, mode="r|") as tar:
                    for entry in tar:
                        _take_out(tar, entry, root)
            except tarfile.TarError as error:
                unreadable = str(error)
            while process.stdout.read(65536):
                pass  # padding behind the tar's end: the program must not die of a closed pipe
        if process.returncode != 0 or unreadable:
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace").strip() or unreadable
            raise KaliumError("builder.package", f"cannot read {archive.name}", said, AGAIN, EXIT_ENVIRONMENT)


def _take_out(tar: tarfile.TarFile, entry: tarfile.TarInfo, root: Path) -> None:
    name = merged(str(PurePosixPath(entry.name.removeprefix("./"))))
    assert ".." not in PurePosixPath(name).parts, f"a package holds {entry.name}"
    if entry.isdir() or not is_kept(name):
        return
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if entry.issym():
        path.symlink_to(entry.linkname)
    elif entry.islnk():
        path.hardlink_to(root / merged(entry.linkname.removeprefix("./")))
    elif entry.isfile():
        contents = tar.extractfile(entry)
        assert contents is not None, "it is a file"
        with path.open("xb") as file:
            shutil.copyfileobj(contents, file)
        path.chmod(0o755 if entry.mode & stat.S_IXUSR else 0o644)


def _settle(root: Path) -> None:
    """Do what maintainer scripts and an installer would: authorities in one file, accounts, name look-ups, the linker's cache."""
    certificates = sorted((root / "usr/share/ca-certificates").rglob("*.crt"))
    assert certificates, "ca-certificates holds certificates"
    texts = {
        AUTHORITIES: b"".join(path.read_bytes().rstrip(b"\n") + b"\n" for path in certificates),
        "etc/passwd": f"root:x:0:0:root:/:/usr/sbin/nologin\nfunction:x:{USER_ID}:{USER_ID}::/function:/usr/sbin/nologin\n".encode(),
        "etc/group": f"root:x:0:\nfunction:x:{USER_ID}:\n".encode(),
        "etc/nsswitch.conf": b"passwd: files\ngroup: files\nhosts: files dns\n",
        "etc/ld.so.conf": b"".join(b"/%s\n" % os.fsencode(path.relative_to(root)) for path in sorted(root.glob("usr/lib/*-linux-gnu"))),
    }
    for name, contents in texts.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
    for name in ("tmp", "function", "packages", "proc", "sys", "dev", "run"):
        (root / name).mkdir()
    run(
        [*as_root(), "ldconfig", "-r", str(root)],
        code="builder.base", attempted="cannot make the linker's cache of the base", next_step=WITHOUT_ROOT, environment={"PATH": SYSTEM_PATH},
    )  # fmt: skip
    shutil.rmtree(root / "var", ignore_errors=True)  # ldconfig's notes for itself


def in_root(root: Path, command: Iterable[str], *, code: str, attempted: str, next_step: str) -> str:
    """Run a program of the base. It is of this machine's distribution and architecture, so a change of root is all it needs."""
    # A fixed seed for hashes: before Python 3.11 the order of a set in a compiled file depends on it. The rest is not for this program.
    environment = {"PYTHONHASHSEED": "0", "PYTHONPATH": "", "PYTHONHOME": "", "LD_PRELOAD": "", "LD_LIBRARY_PATH": ""}
    return run(
        [*as_root(), "chroot", str(root), *command], code=code, attempted=attempted, next_step=next_step,
        environment={**environment, "PATH": SYSTEM_PATH},
    )  # fmt: skip


def _versions(root: Path) -> tuple[str, str]:
    program = "import os, sys; print('%d.%d' % sys.version_info[:2], os.confstr('CS_GNU_LIBC_VERSION').split()[1])"
    said = in_root(
        root, ["/usr/bin/python3", "-s", "-B", "-c", program],
        code="builder.base", attempted="cannot run the base's Python", next_step=REPORT,
    )  # fmt: skip
    python, glibc = said.split()
    return python, glibc


def compile_python(root: Path, folder: str, *, appears_as: str = "") -> None:
    """Compile every module under `folder` of `root` with the base's own Python; tracebacks show the files as in `appears_as`.

    The compiled file holds the hash of its source and no time, and is not checked against it when it is loaded.
    """
    shown = ["-s", f"/{folder}", "-p", f"/{appears_as}"] if appears_as else []
    in_root(
        root, ["/usr/bin/python3", "-s", "-B", "-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash", *shown, f"/{folder}"],
        code="builder.compile", attempted=f"cannot compile the modules of /{appears_as or folder}", next_step="correct the file that is named above",
    )  # fmt: skip
