"""The image builder's parts: what is built, layers that are the same bytes each time, keys, the layout, and packages without scripts."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kalium.builder import base as base_module
from kalium.builder import build as build_module
from kalium.builder import export as export_module
from kalium.builder.base import Base, distribution, is_kept, merged, unpack, workspace
from kalium.builder.build import Builder, Outcome, image_of, packages_key, target_key
from kalium.builder.export import export
from kalium.builder.layer import write_layer
from kalium.builder.layout import Blob, Layout
from kalium.builder.stack import Target, read_stack
from kalium.builder.store import Kept, Podman
from kalium.cli.main import main
from kalium.errors import KaliumError

HANDLER = "def handle(event):\n    return event.body\n"


def stack_in(folder: Path, text: str = "functions:\n  hello: {lang: python3, handler: ./hello}\n", handler: str = HANDLER) -> Path:
    (folder / "hello").mkdir()
    (folder / "hello" / "handler.py").write_text(handler)
    (folder / "stack.yml").write_text(text)
    return folder / "stack.yml"


# --- what is built -----------------------------------------------------------------------------------------------------------


def test_an_image_holds_the_server_what_is_common_and_the_functions_own_files(tmp_path: Path) -> None:
    stack = stack_in(tmp_path)
    for name in ("hello/data/x.json", "hello/sample.json", "hello/requirements.txt", "hello/.secret", "hello/__pycache__/x.pyc", "common/shared.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    (target,) = read_stack(stack)

    assert sorted(target.files) == ["__main__.py", "data/x.json", "handler.py", "shared.py", "watchdog.py"]
    assert target.files["data/x.json"] == b"hello/data/x.json"
    assert target.requirements == tmp_path / "hello" / "requirements.txt"


def test_requirements_of_the_stack_are_for_functions_without_their_own(tmp_path: Path) -> None:
    stack = stack_in(tmp_path)
    assert read_stack(stack)[0].requirements is None

    (tmp_path / "requirements.txt").write_text("")

    assert read_stack(stack)[0].requirements == tmp_path / "requirements.txt"


def test_variants_are_built_beside_functions_and_one_can_be_named(tmp_path: Path) -> None:
    text = "functions:\n  hello: {lang: python3, handler: ./hello}\nx-variants:\n  attack/hello: {lang: python3, handler: ./hello}\n"
    stack = stack_in(tmp_path, text)

    assert [target.name for target in read_stack(stack)] == ["attack/hello", "hello"]
    assert [target.name for target in read_stack(stack, "attack/hello")] == ["attack/hello"]


@pytest.mark.parametrize(
    ("text", "handler", "found"),
    [
        ("functions: [", HANDLER, "no YAML"),
        ("[]", HANDLER, "no `functions`"),
        ("functions: [hello]", HANDLER, "no mapping"),
        ("functions: {Hello: {lang: python3, handler: ./hello}}", HANDLER, "no name of a function"),
        ("functions: {hello: {lang: go, handler: ./hello}}", HANDLER, "needs `lang: python3`"),
        ("functions: {hello: {lang: python3}}", HANDLER, "needs `lang: python3` and `handler"),
        ("functions: {hello: {lang: python3, handler: ./other}}", HANDLER, "no folder with a handler.py"),
        ("functions: {hello: {lang: python3, handler: ../hello}}", HANDLER, "no folder with a handler.py"),
        ("functions: {hello: {lang: python3, handler: ./hello}}", "def handle(event:", "no Python"),
        ("functions: {hello: {lang: python3, handler: ./hello}}", "def other(event): ...", "no function handle"),
        ("functions: {hello: {lang: python3, handler: ./hello}}", "\0", "no Python"),
    ],
)
def test_what_cannot_be_built_is_said_before_anything_is(text: str, handler: str, found: str, tmp_path: Path) -> None:
    with pytest.raises(KaliumError, match=found) as error:
        read_stack(stack_in(tmp_path, text, handler))

    assert (error.value.code, error.value.exit_code) == ("builder.stack", 2)


def test_a_name_that_the_stack_has_not_is_refused_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(KaliumError, match="only hello"):
        read_stack(stack_in(tmp_path), "hallo")


def test_a_file_may_not_replace_a_part_of_the_server(tmp_path: Path) -> None:
    stack = stack_in(tmp_path)
    (tmp_path / "hello" / "watchdog.py").write_text("")

    with pytest.raises(KaliumError, match=r"watchdog\.py of hello is also in"):
        read_stack(stack)


def test_a_link_is_what_it_leads_to_and_leads_nowhere_else(tmp_path: Path) -> None:
    stack = stack_in(tmp_path)
    (tmp_path / "shared.py").write_text("shared")
    (tmp_path / "hello" / "linked.py").symlink_to("../shared.py")
    assert read_stack(stack)[0].files["linked.py"] == b"shared"

    (tmp_path / "hello" / "stranger").symlink_to("/etc/hostname")

    with pytest.raises(KaliumError, match="leads out of"):
        read_stack(stack)


# --- layers ------------------------------------------------------------------------------------------------------------------


def fill(root: Path, names: list[str]) -> Path:
    root.mkdir()
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    (root / "run").write_text("#!")
    (root / "run").chmod(0o700)
    (root / "link").symlink_to("a/b")
    return root


def test_a_layer_is_a_function_of_names_contents_and_modes(tmp_path: Path) -> None:
    """Order of creation, times and owners leave no trace."""
    one = fill(tmp_path / "one", ["z", "a/b", "a/c"])
    other = fill(tmp_path / "other", ["a/c", "z", "a/b"])
    for path in other.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
        if os.geteuid() == 0:
            os.chown(path, 7, 7, follow_symlinks=False)
    (other / "z").chmod(0o600)

    outputs = [io.BytesIO(), io.BytesIO()]
    results = [write_layer(root, output, prefix="f/g") for root, output in zip((one, other), outputs, strict=True)]

    assert outputs[0].getvalue() == outputs[1].getvalue()
    assert results[0] == results[1] == (hashlib.sha256(outputs[0].getvalue()).hexdigest(), len(outputs[0].getvalue()))
    with tarfile.open(fileobj=io.BytesIO(outputs[0].getvalue())) as tar:
        entries = {entry.name: entry for entry in tar}
        assert list(entries) == ["f", "f/g", "f/g/a", "f/g/a/b", "f/g/a/c", "f/g/link", "f/g/run", "f/g/z"]
        assert {(entry.uid, entry.gid, entry.mtime, entry.uname) for entry in entries.values()} == {(0, 0, 0, "")}
        assert [entries[name].mode for name in ("f/g/a", "f/g/run", "f/g/z")] == [0o755, 0o755, 0o644]
        assert entries["f/g/link"].linkname == "a/b"


def test_a_change_of_contents_or_of_the_executable_bit_is_another_layer(tmp_path: Path) -> None:
    def digest(root: Path) -> str:
        return write_layer(root, io.BytesIO())[0]

    root = fill(tmp_path / "root", ["a"])
    first = digest(root)
    (root / "a").write_text("b")
    second = digest(root)
    (root / "a").chmod(0o755)

    assert len({first, second, digest(root)}) == 3


def test_a_folder_that_is_left_out_is_left_out_whole(tmp_path: Path) -> None:
    root = fill(tmp_path / "root", ["bin/x", "lib/bin/y"])
    output = io.BytesIO()

    write_layer(root, output, keep=lambda name: name != "bin")

    with tarfile.open(fileobj=io.BytesIO(output.getvalue())) as tar:
        assert tar.getnames() == ["lib", "lib/bin", "lib/bin/y", "link", "run"]


# --- packages ----------------------------------------------------------------------------------------------------------------


def package(folder: Path, files: Mapping[str, str]) -> Path:
    """A Debian package with these files, and a maintainer script that must not run."""
    root = folder / "package"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "usr/bin/python3").symlink_to("python3.99")
    (root / "usr/bin/python3.99").chmod(0o4755)
    (root / "DEBIAN").mkdir()
    (root / "DEBIAN/control").write_text("Package: p\nVersion: 1\nArchitecture: all\nMaintainer: m <m@example.org>\nDescription: d\n")
    (root / "DEBIAN/preinst").write_text(f"#!/bin/sh\ntouch {folder}/ran\n")
    (root / "DEBIAN/preinst").chmod(0o755)
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", str(root), str(folder / "p.deb")], check=True, capture_output=True)
    return folder / "p.deb"


def test_what_a_function_needs_is_taken_out_of_a_package_and_nothing_runs(tmp_path: Path) -> None:
    wanted = ["usr/bin/python3.99", "lib/x86_64-linux-gnu/libc.so.6", "usr/lib/python3.99/os.py", "usr/share/doc/p/copyright"]
    unwanted = ["usr/bin/perl", "usr/lib/python3.99/tkinter/x.py", "etc/cron.d/x", "usr/share/doc/p/changelog"]
    archive = package(tmp_path, {name: name for name in (*wanted, *unwanted)})
    root = tmp_path / "root"

    unpack(archive, root)

    assert sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir()) == [
        "usr/bin/python3",
        "usr/bin/python3.99",
        "usr/lib/python3.99/os.py",
        "usr/lib/x86_64-linux-gnu/libc.so.6",
        "usr/share/doc/p/copyright",
    ]
    assert (root / "usr/bin/python3").readlink() == Path("python3.99")
    assert (root / "usr/bin/python3.99").stat().st_mode & 0o7777 == 0o755
    assert not (tmp_path / "ran").exists()


def test_a_damaged_package_is_an_error_with_a_next_step(tmp_path: Path) -> None:
    archive = tmp_path / "p.deb"
    archive.write_bytes(b"!<arch>\ndebian-binary   0           0     0     100644  4         `\n9.9\n")

    with pytest.raises(KaliumError, match=r"cannot read p\.deb: dpkg-deb") as error:
        unpack(archive, tmp_path / "root")

    assert error.value.code == "builder.package"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("lib/x/y", "usr/lib/x/y"),
        ("bin/sh", "usr/bin/sh"),
        ("lib64/ld.so", "usr/lib64/ld.so"),
        ("usr/lib/x", "usr/lib/x"),
        ("library/x", "library/x"),
    ],
)
def test_old_and_new_places_of_a_packages_files_are_one(name: str, place: str) -> None:
    assert merged(name) == place


def test_no_program_but_python_is_in_a_base() -> None:
    assert is_kept("usr/bin/python3.13")
    strangers = ("usr/bin/sh", "usr/sbin/x", "usr/bin/python3-config", "usr/bin/openssl", "etc/shadow", "var/lib/dpkg/status")
    assert not any(is_kept(name) for name in strangers)


def test_the_distribution_is_what_the_system_says(tmp_path: Path) -> None:
    (tmp_path / "os-release").write_text('NAME="Ubuntu"\nVERSION_ID="24.04"\nID=ubuntu\n')

    assert distribution(tmp_path / "os-release") == "ubuntu 24.04"


def test_a_workspace_is_gone_afterwards_whatever_happened(tmp_path: Path) -> None:
    def fail_in(folder: Path) -> None:
        (folder / "x").write_text("x")
        raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"), workspace(tmp_path) as folder:
        fail_in(folder)

    assert list(tmp_path.iterdir()) == []


# --- keys --------------------------------------------------------------------------------------------------------------------


def test_an_images_key_changes_with_all_it_is_made_from_and_nothing_else(tmp_path: Path) -> None:
    wheels, same, others = (tmp_path / name for name in ("wheels.txt", "same.txt", "others.txt"))
    wheels.write_text("a==1")
    same.write_text("a==1")
    others.write_text("a==2")
    target = Target("hello", {"handler.py": b"1", "x": b"2"}, wheels)

    key = target_key(target, "base")

    assert key == target_key(Target("renamed", {"x": b"2", "handler.py": b"1"}, same), "base")
    changed = [
        target_key(target, "other base"),
        target_key(replace(target, requirements=others), "base"),
        target_key(replace(target, requirements=None), "base"),
        target_key(replace(target, files={"handler.py": b"2", "x": b"1"}), "base"),
        target_key(replace(target, files={"handler.py": b"12"}), "base"),
    ]
    assert len({key, *changed}) == 6
    assert packages_key("base", wheels) == packages_key("base", same) != packages_key("base", others)


def test_an_images_name_is_one_that_podman_takes() -> None:
    assert image_of("attack/hello", "a" * 64) == "localhost/kalium/attack-hello:" + "a" * 20


# --- the layout --------------------------------------------------------------------------------------------------------------


def add_layer(layout: Layout, contents: bytes) -> Blob:
    def write(file: Any) -> tuple[str, int]:
        file.write(contents)
        return hashlib.sha256(contents).hexdigest(), len(contents)

    return layout.add_layer(write)


def blobs(layout: Layout) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (layout.folder / "blobs" / "sha256").iterdir()}


def test_a_layout_is_one_by_the_specification(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layer = add_layer(layout, b"layer")

    layout.add_image("localhost/kalium/x:1", architecture="amd64", config={"User": "1"}, layers=[layer])

    assert json.loads((tmp_path / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    (entry,) = json.loads((tmp_path / "index.json").read_text())["manifests"]
    names = ("org.opencontainers.image.ref.name", "io.containerd.image.name")
    assert entry["annotations"] == dict.fromkeys(names, "localhost/kalium/x:1")
    assert all(hashlib.sha256(contents).hexdigest() == name for name, contents in blobs(layout).items())
    manifest = json.loads(blobs(layout)[entry["digest"].removeprefix("sha256:")])
    assert [part["digest"] for part in manifest["layers"]] == [f"sha256:{layer.digest}"]
    image = json.loads(blobs(layout)[manifest["config"]["digest"].removeprefix("sha256:")])
    assert image["rootfs"] == {"type": "layers", "diff_ids": [f"sha256:{layer.digest}"]}
    assert (image["config"], image["architecture"], image["created"]) == ({"User": "1"}, "amd64", "1970-01-01T00:00:00Z")


def test_adding_an_image_again_changes_no_byte(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    layer = add_layer(layout, b"layer")
    for _ in range(2):
        layout.add_image("x:1", architecture="amd64", config={}, layers=[layer])
        index, before = (tmp_path / "index.json").read_bytes(), blobs(layout)

    assert len(json.loads(index)["manifests"]) == 1
    assert len(before) == 3


def test_what_no_image_names_is_forgotten(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    shared, old, new = (add_layer(layout, name) for name in (b"shared", b"old", b"new"))
    layout.add_image("x:1", architecture="amd64", config={}, layers=[shared, old])
    layout.add_image("x:2", architecture="amd64", config={}, layers=[shared, new])

    layout.keep_only(["x:2"], [])

    assert layout.references() == {"x:2"}
    assert layout.has(shared)
    assert layout.has(new)
    assert not layout.has(old)
    assert len(blobs(layout)) == 4


def test_a_layer_that_failed_leaves_nothing(tmp_path: Path) -> None:
    layout = Layout(tmp_path)

    def write(file: Any) -> tuple[str, int]:
        file.write(b"half")
        raise OSError("full disk")

    with pytest.raises(OSError, match="full disk"):
        layout.add_layer(write)

    assert blobs(layout) == {}


# --- building ----------------------------------------------------------------------------------------------------------------


class FakePodman(Podman):
    """Keeps names only."""

    def __init__(self) -> None:
        super().__init__(["false"])
        self.names: set[str] = {"localhost/somebody/else:1"}
        self.taken: list[str] = []
        self.in_use: set[str] = set()

    def images(self) -> set[str]:
        return set(self.names)

    def take(self, layout: Layout, reference: str) -> None:
        assert reference in layout.references(), "podman is told of what is there"
        self.names.add(reference)
        self.taken.append(reference)

    def remove(self, reference: str) -> bool:
        if reference in self.in_use:
            return False
        self.names.remove(reference)
        return True


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    """A builder whose base is a few bytes: the real one is built by `make site`, and the end-to-end tests run what it made."""
    output = tmp_path / "output"
    output.mkdir()
    made = Builder(output, FakePodman())
    layer = add_layer(made.layout, b"base")
    root = output / "base"
    root.mkdir()
    base = Base(base_module.base_key(), "3.11", "2.36", {}, layer, root)
    monkeypatch.setattr(build_module, "ensure_base", lambda *_, **__: (base, False))
    monkeypatch.setattr(build_module, "compile_python", lambda *_, **__: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return made


def podman_of(builder: Builder) -> FakePodman:
    assert isinstance(builder.store, FakePodman)
    return builder.store


def sources(tmp_path: Path) -> Path:
    (tmp_path / "sources").mkdir()
    return stack_in(tmp_path / "sources", "functions:\n  hello: {lang: python3, handler: ./hello}\n  world: {lang: python3, handler: ./hello}\n")


def test_a_second_build_changes_nothing(builder: Builder, tmp_path: Path) -> None:
    stack = sources(tmp_path)
    first = list(builder.build(stack))
    written = (builder.output / "images.json").stat().st_mtime_ns

    second = list(builder.build(stack))

    assert [str(outcome).split()[:2] for outcome in first] == [["changed", "hello"], ["changed", "world"]]
    assert second == [replace(outcome, is_changed=False) for outcome in first]
    assert (builder.output / "images.json").stat().st_mtime_ns == written
    assert json.loads((builder.output / "images.json").read_text()) == {outcome.name: {"image": outcome.image} for outcome in first}
    assert len(podman_of(builder).taken) == 2


def test_a_changed_function_replaces_its_image_and_only_its(builder: Builder, tmp_path: Path) -> None:
    stack = sources(tmp_path)
    first = {outcome.name: outcome.image for outcome in builder.build(stack)}
    (stack.parent / "world").mkdir()
    (stack.parent / "world" / "handler.py").write_text("from handler2 import handle\n")
    stack.write_text("functions:\n  world: {lang: python3, handler: ./world}\n")

    (outcome,) = builder.build(stack)

    assert outcome.is_changed
    assert json.loads((builder.output / "images.json").read_text()) == {"hello": {"image": first["hello"]}, "world": {"image": outcome.image}}
    assert podman_of(builder).names == {"localhost/somebody/else:1", first["hello"], outcome.image}


def test_an_image_that_runs_stays_until_a_later_build(builder: Builder, tmp_path: Path) -> None:
    stack = sources(tmp_path)
    old = {outcome.name: outcome.image for outcome in builder.build(stack)}["hello"]
    podman_of(builder).in_use.add(old)
    (stack.parent / "hello" / "handler.py").write_text(HANDLER + "#\n")
    new = {outcome.name: outcome.image for outcome in builder.build(stack)}["hello"]
    assert {old, new} <= podman_of(builder).names

    podman_of(builder).in_use.clear()
    list(builder.build(stack))

    assert old not in podman_of(builder).names
    assert new in podman_of(builder).names


def test_an_image_that_podman_lost_is_given_again(builder: Builder, tmp_path: Path) -> None:
    stack = sources(tmp_path)
    first = list(builder.build(stack))
    podman_of(builder).names.clear()

    second = list(builder.build(stack))

    assert [outcome.image for outcome in second] == [outcome.image for outcome in first]
    assert all(outcome.is_changed for outcome in second)


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(builder: Builder, tmp_path: Path) -> None:
    stack = sources(tmp_path)
    before = sorted(str(path) for path in builder.output.rglob("*"))

    planned = list(builder.plan(stack, only="hello"))

    assert planned == [Outcome("hello", "(after the base is made)", True)]
    assert sorted(str(path) for path in builder.output.rglob("*")) == before
    assert podman_of(builder).taken == []


def test_two_builds_at_once_are_refused(builder: Builder, tmp_path: Path) -> None:
    stack = sources(tmp_path)
    building = builder.build(stack)
    next(building)

    with pytest.raises(KaliumError, match="another build is at work"):
        next(builder.build(stack))

    assert len(list(building)) == 1


def test_images_for_other_machines_are_kept_without_podman_and_without_root(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    stack = sources(tmp_path)
    keeping = Builder(builder.output, Kept(builder.layout))

    first = list(keeping.build(stack))
    again = list(keeping.build(stack))
    (tmp_path / "sources" / "hello" / "handler.py").write_text(HANDLER + "# new\n")
    later = list(keeping.build(stack))

    assert [outcome.is_changed for outcome in first + again + later] == [True, True, False, False, True, True]
    assert keeping.layout.references() == {outcome.image for outcome in later}, "what is not wanted any more is gone"


# --- export ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(builder: Builder, tmp_path: Path) -> Path:
    """The folder of a builder that has built."""
    list(Builder(builder.output, Kept(builder.layout)).build(sources(tmp_path)))
    return builder.output


def test_an_archive_is_a_layout_with_every_image_and_its_name_is_of_its_contents(exported: Path) -> None:
    archive, is_changed = export(exported)

    assert is_changed
    with tarfile.open(archive) as tar:
        members = {entry.name: entry for entry in tar if entry.isfile()}
        index = json.loads(extracted(tar, "index.json"))
        assert extracted(tar, "oci-layout") == b'{"imageLayoutVersion":"1.0.0"}'
        assert all(hashlib.sha256(extracted(tar, name)).hexdigest() == Path(name).name for name in members if name.startswith("blobs/"))
    listed = {entry["image"] for entry in json.loads((exported / "images.json").read_text()).values()}
    assert {entry["annotations"]["io.containerd.image.name"] for entry in index["manifests"]} == listed
    assert {entry["digest"].replace(":", "/") for entry in index["manifests"]} <= {name.removeprefix("blobs/") for name in members}


def extracted(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None
    return file.read()


def test_exporting_again_changes_nothing_and_the_same_images_are_the_same_bytes(exported: Path) -> None:
    archive, _ = export(exported)
    before = archive.read_bytes()

    assert export(exported) == (archive, False)
    archive.unlink()
    assert export(exported) == (archive, True)
    assert archive.read_bytes() == before


def test_an_export_of_other_images_replaces_the_archive(exported: Path, tmp_path: Path) -> None:
    first, _ = export(exported)
    (tmp_path / "sources" / "hello" / "handler.py").write_text(HANDLER + "# new\n")
    list(Builder(exported, Kept(Layout(exported / "oci"))).build(tmp_path / "sources" / "stack.yml"))

    rehearsed = export(exported, is_rehearsal=True)
    assert first.is_file(), "a rehearsal changes nothing"
    second = export(exported)

    assert rehearsed == second == (second[0], True)
    assert [path.name for path in exported.glob("functions-*")] == [second[0].name]


def test_nothing_is_exported_before_it_is_built_or_when_a_part_is_lost(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(KaliumError, match=r"images\.json names none") as error:
        export(tmp_path)
    assert "kalium function build" in error.value.next_step

    Layout(exported / "oci").keep_only([], [])
    with pytest.raises(KaliumError, match="is not there"):
        export(exported)
    assert not list(exported.glob("functions-*"))


def test_an_export_that_fails_leaves_nothing(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("full disk")

    monkeypatch.setattr(export_module, "write_layer", full_disk)

    with pytest.raises(OSError, match="full disk"):
        export(exported)
    assert not [path for path in exported.iterdir() if "functions-" in path.name]


def test_the_command_says_where_the_archive_is(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["function", "export", "--output", str(exported)]

    assert main([*words, "--dry-run"]) == main(words) == main(words) == 0

    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [word for word, _ in said] == ["changed", "changed", "unchanged"]
    assert {Path(path).parent for _, path in said} == {exported}


def test_exporting_nothing_is_an_error_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["function", "export", "--output", str(tmp_path)]) == 3
    assert capsys.readouterr().err.startswith("error[builder.export]: cannot export function images: ")


# --- what goes wrong ---------------------------------------------------------------------------------------------------------


def test_building_without_being_root_is_refused_with_the_next_step(builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    with pytest.raises(KaliumError, match="not root") as error:
        next(builder.build(sources(tmp_path)))

    assert "sudo" in error.value.next_step


def test_a_program_that_fails_is_shown_with_what_it_said() -> None:
    podman = Podman(["sh", "-c", "echo no storage >&2; exit 125"])

    with pytest.raises(KaliumError, match="sh ended with 125: no storage") as error:
        podman.images()

    assert error.value.code == "builder.podman"


def test_a_program_that_is_missing_is_named() -> None:
    with pytest.raises(KaliumError, match="there is no program podman-of-nobody"):
        Podman(["podman-of-nobody"]).images()
