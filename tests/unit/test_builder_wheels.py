"""Wheels for another Python: what of a lock they are, which fit, and the archive that hosts install from."""

from __future__ import annotations

import hashlib
import os
import tarfile
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from kalium.builder import wheels as wheels_module
from kalium.builder.base import Base
from kalium.builder.build import _install
from kalium.builder.layout import Blob
from kalium.builder.wheels import archive, chosen, fitting, main
from kalium.errors import KaliumError

UBUNTU_18 = {"implementation": "cpython", "version": "3.12.14", "machine": "x86_64", "glibc": "2.27"}
LOCK = f"""\
# made by uv
atpublic==8.0.1 ; python_full_version < '3.11' \\
    --hash=sha256:{"a" * 64}
    # via aiosmtpd
atpublic==9.0.0 ; python_full_version >= '3.11' \\
    --hash=sha256:{"b" * 64} \\
    --hash=sha256:{"c" * 64}
pywin32==312 ; sys_platform == 'win32' \\
    --hash=sha256:{"d" * 64}
typing-extensions==4.16.0 ; python_full_version < '3.13' \\
    --hash=sha256:{"e" * 64}
"""


def wheel(folder: Path, tag: str, says: str) -> str:
    """A wheel of package `greeting` for `tag`; returns its SHA-256."""
    path = folder / f"greeting-1.0-{tag}.whl"
    info = "greeting-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("greeting.py", f"SAYS = {says!r}\n")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: greeting\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", f"greeting.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place where pip may look."""
    (tmp_path / "shelf").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return tmp_path / "shelf"


@pytest.mark.parametrize(
    ("version", "names"),
    [
        ("3.10.4", ["atpublic==8.0.1", "typing-extensions==4.16.0"]),
        ("3.12.14", ["atpublic==9.0.0", "typing-extensions==4.16.0"]),
        ("3.13.0", ["atpublic==9.0.0"]),
    ],
)
def test_markers_are_judged_by_the_host_not_by_who_fetches(version: str, names: list[str]) -> None:
    lines = chosen(LOCK, {**UBUNTU_18, "version": version}).splitlines()

    assert [line.split()[0] for line in lines] == names
    assert all(" --hash=sha256:" in line and ";" not in line for line in lines)


def test_every_hash_of_a_package_stays() -> None:
    assert chosen(LOCK, UBUNTU_18).splitlines()[0] == f"atpublic==9.0.0 --hash=sha256:{'b' * 64} --hash=sha256:{'c' * 64}"


def test_the_c_library_bounds_what_fits() -> None:
    options = fitting("3.12", "2.27", "x86_64")

    assert "manylinux_2_27_x86_64" in options
    assert "manylinux_2_28_x86_64" not in options
    assert {"manylinux2014_x86_64", "manylinux1_x86_64", "cp312", "abi3", "none"} <= set(options)


def lock_of(shelf: Path, *tags: str) -> Path:
    hashes = [wheel(shelf, tag, tag) for tag in tags]
    lock = shelf.parent / "lock.txt"
    lock.write_text("greeting==1.0 \\\n    " + " \\\n    ".join(f"--hash=sha256:{one}" for one in hashes) + "\n", encoding="utf-8")
    return lock


def test_the_archive_holds_what_fits_the_host_and_is_the_same_bytes_again(shelf: Path, tmp_path: Path) -> None:
    lock = lock_of(shelf, "cp312-cp312-manylinux_2_27_x86_64", "cp312-cp312-manylinux_2_28_x86_64", "py3-none-any")

    made = [archive(lock, tmp_path / name, UBUNTU_18, "2.27") for name in ("one", "other")]

    with tarfile.open(made[0]) as tar:
        assert tar.getnames() == ["greeting-1.0-cp312-cp312-manylinux_2_27_x86_64.whl"]
    assert made[0].name == made[1].name
    assert made[0].read_bytes() == made[1].read_bytes()


def test_what_was_fetched_is_not_fetched_again_until_something_else_is_wanted(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = lock_of(shelf, "py3-none-any")
    first = archive(lock, tmp_path / "cache", UBUNTU_18, "2.27")
    monkeypatch.setattr(wheels_module, "_download", lambda *_: pytest.fail("it is there"))

    assert archive(lock, tmp_path / "cache", UBUNTU_18, "2.27") == first
    with pytest.raises(pytest.fail.Exception):
        archive(lock, tmp_path / "cache", UBUNTU_18, "2.36")


def test_hosts_that_ask_at_once_share_one_download(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, real = lock_of(shelf, "py3-none-any"), wheels_module._download
    fetched: list[str] = []

    def counted(requirements: str, options: Sequence[str], folder: Path) -> None:
        fetched.append(requirements)
        real(requirements, options, folder)

    monkeypatch.setattr(wheels_module, "_download", counted)
    threads = [threading.Thread(target=archive, args=(lock, tmp_path / "cache", UBUNTU_18, "2.27")) for _ in range(3)]

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(fetched) == 1


def test_a_wheel_that_is_not_the_locked_one_is_refused_and_leaves_no_archive(shelf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = lock_of(shelf, "py3-none-any")
    lock.write_text(lock.read_text(encoding="utf-8").replace("sha256:", "sha256:" + "0" * 64)[:110] + "\n", encoding="utf-8")

    status = main(str(lock), str(tmp_path / "cache"), '{"implementation": "cpython", "version": "3.12.1", "machine": "x86_64", "glibc": ""}', "2.27")

    assert status == 3
    assert capsys.readouterr().err.startswith("error[builder.wheels]: cannot fetch the services' wheels: ")
    assert not list((tmp_path / "cache").glob("*.tar"))


@pytest.mark.parametrize(("implementation", "glibc"), [("pypy", "2.36"), ("cpython", "")])
def test_a_host_without_cpython_or_glibc_is_refused(implementation: str, glibc: str, tmp_path: Path) -> None:
    with pytest.raises(KaliumError, match="the host has"):
        archive(tmp_path / "lock", tmp_path, {**UBUNTU_18, "implementation": implementation}, glibc)


def test_hashes_are_those_of_the_wheels(shelf: Path, tmp_path: Path) -> None:
    """The archive's bytes are the shelf's."""
    lock = lock_of(shelf, "py3-none-any")

    with tarfile.open(archive(lock, tmp_path / "cache", UBUNTU_18, "2.27")) as tar:
        member = tar.extractfile("greeting-1.0-py3-none-any.whl")
        assert member is not None
        assert hashlib.sha256(member.read()).hexdigest() in lock.read_text(encoding="utf-8")


# --- into a function's image -----------------------------------------------------------------------------------------------

BASE = Base("key", "3.9", "2.31", {}, Blob("", 0), Path("/nowhere"))  # of no Python that runs these tests


def test_wheels_are_those_for_the_bases_python_and_library(shelf: Path, tmp_path: Path) -> None:
    machine = os.uname().machine
    tags = [f"cp39-cp39-manylinux_2_31_{machine}", f"cp39-cp39-manylinux_2_32_{machine}", f"cp310-cp310-manylinux2014_{machine}", "py3-none-any"]
    hashes = [wheel(shelf, tag, tag) for tag in tags]
    (tmp_path / "requirements.txt").write_text("greeting==1.0 " + " ".join(f"--hash=sha256:{one}" for one in hashes) + "\n")

    _install(tmp_path / "requirements.txt", tmp_path / "installed", BASE)

    assert (tmp_path / "installed" / "greeting.py").read_text() == f"SAYS = {tags[0]!r}\n"
    assert not list((tmp_path / "installed").rglob("*.pyc"))


@pytest.mark.parametrize("line", ["greeting==1.0", "greeting==1.0 --hash=sha256:" + "0" * 64])
def test_a_wheel_that_is_not_the_locked_one_is_refused(line: str, shelf: Path, tmp_path: Path) -> None:
    wheel(shelf, "py3-none-any", "anything")
    (tmp_path / "requirements.txt").write_text(line + "\n")

    with pytest.raises(KaliumError) as error:
        _install(tmp_path / "requirements.txt", tmp_path / "installed", BASE)

    assert error.value.code == "builder.wheels"
    assert "lock it with hashes" in error.value.next_step
