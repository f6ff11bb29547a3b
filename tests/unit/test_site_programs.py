"""The programs that roles run on hosts, and those of .ci: what they decide, with files and commands of the test's own."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def program(path: str) -> ModuleType:
    """A program of the checkout as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


preflight: Any = program("roles/kalium_preflight/files/preflight.py")
record: Any = program("roles/kalium_layout/files/record.py")
remove: Any = program("roles/kalium_layout/files/remove.py")
service: Any = program("roles/kalium_service/files/service.py")
install: Any = program("roles/kalium_python/files/install.py")
find_go: Any = program("roles/kalium_toolchain/files/find_go.py")
report: Any = program(".ci/report.py")


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """`command(name, body)` puts a shell script first on PATH; it logs its arguments to NAME.calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(name: str, body: str) -> Path:
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "$@" >>{folder}/{name}.calls\n{body}\n', encoding="utf-8")
        path.chmod(0o755)
        return folder / f"{name}.calls"

    return make


@pytest.fixture
def only_stand_ins(tmp_path: Path, command: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No program of the machine can be reached by its name: what a reset would do to a site that is set up here, it does to nobody."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("podman", "ip", "systemctl", "apt-get", "dpkg-query", "userdel"):
        command(name, "")


# Pre-flight


def found_by(check: Any, spec: dict[str, Any], **stand_ins: Any) -> list[dict[str, str]]:
    judged = preflight.Report()
    check(spec, judged, **stand_ins)
    problems: list[dict[str, str]] = judged.problems
    return problems


@pytest.mark.parametrize(("release", "codes"), [("4.14.336", ["preflight.kernel"]), ("4.15.0-213-generic", []), ("6.18.44", []), ("10.0", [])])
def test_a_kernel_is_compared_by_numbers_not_by_text(release: str, codes: list[str]) -> None:
    problems = found_by(preflight.check_machine, {"kernel_minimum": "4.15"}, release=lambda: release, machine=lambda: "x86_64")

    assert [problem["code"] for problem in problems] == codes


def test_another_architecture_is_a_problem() -> None:
    problems = found_by(preflight.check_machine, {"kernel_minimum": "4.15"}, release=lambda: "6.1", machine=lambda: "aarch64")

    assert [problem["code"] for problem in problems] == ["preflight.architecture"]


DISTRIBUTIONS = {
    "python_minimum": "3.10", "needs_python": True, "distributions": {"Debian": ["12", "13"], "Ubuntu": ["22.04"]},
    "ansible": "2.16.19", "ansible_python": "3.6",
}  # fmt: skip


@pytest.mark.parametrize(
    ("identity", "python", "codes"),
    [
        ({"ID": "debian", "VERSION_ID": "12"}, (3, 11), []),
        ({"ID": "ubuntu", "VERSION_ID": "22.04"}, (3, 10), []),
        ({"ID": "debian", "VERSION_ID": "11"}, (3, 9), ["preflight.distribution", "preflight.python"]),
        ({"ID": "fedora"}, (3, 13), ["preflight.distribution"]),
        ({}, (3, 13), ["preflight.distribution"]),
    ],
)
def test_only_known_distributions_pass(identity: dict[str, str], python: tuple[int, int], codes: list[str]) -> None:
    problems = found_by(preflight.check_distribution, DISTRIBUTIONS, read=lambda: identity, python=python)

    assert [problem["code"] for problem in problems] == codes


def test_a_full_disk_is_named_once_and_a_standing_site_needs_less(tmp_path: Path) -> None:
    spec = {"disk_gib": "12", "disk_gib_again": "2", "disk_paths": [f"{tmp_path}/a/b", f"{tmp_path}/c"], "memory_gib": 0}
    five_gib_free = lambda path: SimpleNamespace(f_bavail=5 * 2**18, f_frsize=4096)  # noqa: E731
    installed = tmp_path / "installed.json"

    first = found_by(preflight.check_space, {**spec, "installed": str(installed)}, statvfs=five_gib_free)
    installed.write_text("{}", encoding="utf-8")
    again = found_by(preflight.check_space, {**spec, "installed": str(installed)}, statvfs=five_gib_free)

    assert [problem["found"] for problem in first] == ["5.0 GiB are free, 12 GiB are needed"]
    assert again == []


HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def proc_with(tmp_path: Path, listening: dict[str, str], processes: dict[int, tuple[int, str, str]]) -> str:
    """A /proc with sockets `{table: lines}` and processes `{pid: (parent, command line, inode)}`."""
    (tmp_path / "net").mkdir()
    for table, lines in listening.items():
        (tmp_path / "net" / table).write_text(HEADER + lines, encoding="utf-8")
    for pid, (parent, words, inode) in processes.items():
        folder = tmp_path / str(pid)
        (folder / "fd").mkdir(parents=True)
        (folder / "fd" / "3").symlink_to(f"socket:[{inode}]")
        (folder / "cmdline").write_bytes(words.replace(" ", "\0").encode())
        (folder / "stat").write_text(f"{pid} (a name) with) S {parent} 0 0", encoding="utf-8")
    return str(tmp_path)


def line_of(address: str, port: int, state: str, inode: str) -> str:
    return f"   0: {address}:{port:04X} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000     0        0 {inode} 1\n"


WANTED = {
    "own": ["/etc/kalium/"],
    "ports": [{"address": "10.137.0.1", "port": "3306", "for": "the database", "variable": "kalium_database_port"}],
}
ANY, LOOPBACK, BRIDGE = "00000000", "0100007F", "0100890A"


@pytest.mark.parametrize(
    ("address", "state", "count"),
    [(ANY, "0A", 1), (BRIDGE, "0A", 1), (LOOPBACK, "0A", 0), (BRIDGE, "01", 0)],
)
def test_a_port_is_busy_where_ours_would_clash_and_only_there(tmp_path: Path, address: str, state: str, count: int) -> None:
    """A database on loopback stays beside ours on the bridge; an established connection holds no port."""
    proc = proc_with(tmp_path, {"tcp": line_of(address, 3306, state, "77")}, {40: (1, "/usr/sbin/mysqld", "77")})

    problems = found_by(preflight.check_ports, WANTED, proc=proc)

    assert len(problems) == count
    if count:
        assert "process 40 (/usr/sbin/mysqld)" in problems[0]["found"]
        assert "kalium_database_port=3307" in problems[0]["next"]


def test_a_port_of_every_address_of_ipv6_is_busy(tmp_path: Path) -> None:
    proc = proc_with(tmp_path, {"tcp": "", "tcp6": line_of("0" * 32, 3306, "0A", "77")}, {})

    assert [problem["found"] for problem in found_by(preflight.check_ports, WANTED, proc=proc, is_root=True)] == ["a process of another user has it"]
    assert found_by(preflight.check_ports, WANTED, proc=proc, is_root=False) == []  # it may be ours: nobody can say


def test_a_port_that_our_own_service_holds_is_free_for_us(tmp_path: Path) -> None:
    """Also when only the process that started it names us, as with a program that takes no configuration."""
    proc = proc_with(
        tmp_path, {"tcp": line_of(BRIDGE, 3306, "0A", "77")}, {40: (39, "/usr/bin/server", "77"), 39: (1, "supervisord -c /etc/kalium/x", "0")}
    )

    assert found_by(preflight.check_ports, WANTED, proc=proc) == []


ROUTES = "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n"
NETWORK = {"bridge": {"name": "kalium0", "address": "10.137.0.1", "prefix": "24"}}


@pytest.mark.parametrize(
    ("interface", "destination", "mask", "count"),
    [
        ("eth0", "00000000", "00000000", 0),  # the default route is no claim
        ("kalium0", "0000890A", "00FFFFFF", 0),  # our own bridge
        ("docker0", "000011AC", "0000FFFF", 0),  # 172.17.0.0/16
        ("tun0", "0000000A", "000000FF", 1),  # 10.0.0.0/8 contains ours
        ("br0", "0A00890A", "FFFFFFFF", 1),  # 10.137.0.10/32 lies in ours
    ],
)
def test_the_bridge_takes_no_network_that_is_somebody_elses(tmp_path: Path, interface: str, destination: str, mask: str, count: int) -> None:
    routes = tmp_path / "route"
    routes.write_text(f"{ROUTES}{interface}\t{destination}\t00000000\t0001\t0\t0\t0\t{mask}\t0\t0\t0\n", encoding="utf-8")

    assert len(found_by(preflight.check_network, NETWORK, routes=str(routes))) == count


def test_packages_that_would_push_others_out_are_a_problem() -> None:
    spec = {"packages": ["pebble", "mariadb-server-core"], "package_names": {"Ubuntu 22.04": {"pebble": [], "mariadb-server-core": ["m-10.6"]}}}
    asked: list[list[str]] = []

    def ask(words: list[str]) -> tuple[int, str]:
        asked.append(words)
        return 0, "Inst m-10.6 (1)\nRemv mysql-server [8.0]\n"

    problems = found_by(preflight.check_packages, spec, ask=ask, read=lambda: {"ID": "ubuntu", "VERSION_ID": "22.04"})

    assert asked[0][-2:] == ["install", "m-10.6"]
    assert [problem["found"] for problem in problems] == ["that would remove mysql-server"]


@pytest.mark.parametrize(("release", "count"), [("18.04", 1), ("22.04", 0)])
def test_a_distribution_without_a_database_is_told_before_anything_changes(release: str, count: int) -> None:
    spec = {
        "packages": ["mariadb-server-core"], "indispensable": {"mariadb-server-core": "the database"},
        "package_names": {"Ubuntu 18.04": {"mariadb-server-core": []}, "Ubuntu 22.04": {"mariadb-server-core": ["m-10.6"]}},
    }  # fmt: skip

    problems = found_by(preflight.check_packages, spec, ask=lambda words: (0, ""), read=lambda: {"ID": "ubuntu", "VERSION_ID": release})

    assert ["no package of it there is new enough" in problem["found"] for problem in problems] == [True] * count


# The list of what was installed, and its removal


def read_list(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def test_what_was_there_before_is_never_in_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed, theirs, ours = tmp_path / "var" / "installed.json", tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()

    record.main(str(listed), [f"path:{theirs}", f"path:{ours}", "user:root", "user:kalium-nobody", "bridge:lo"])
    ours.mkdir()
    record.main(str(listed), [f"path:{theirs}", f"path:{listed.parent}", f"path:{ours}"])

    assert capsys.readouterr().out.split() == ["changed", "unchanged"]
    # The folder of the list was not there before either.
    paths = [str(listed.parent), str(ours)]
    listed_kinds = {kind: names for kind, names in read_list(listed).items() if names}
    assert listed_kinds == {"schema": record.SCHEMA, "users": ["kalium-nobody"], "paths": paths}
    assert stat.S_IMODE(listed.stat().st_mode) == 0o644


SIMULATION = """cat <<'TEXT'
Inst libnew (1.0 Debian)
Inst libold [0.9] (1.0 Debian)
Inst pebble (2.4 Debian)
Conf pebble (2.4 Debian)
TEXT"""


def test_new_packages_are_listed_and_upgraded_ones_are_not(tmp_path: Path, command: Callable[[str, str], Path]) -> None:
    command("apt-get", SIMULATION)

    record.main(str(tmp_path / "list.json"), ["packages:pebble"])

    assert read_list(tmp_path / "list.json")["packages"] == ["libnew", "pebble"]


def test_an_installation_that_removes_a_package_is_refused(tmp_path: Path, command: Callable[[str, str], Path]) -> None:
    command("apt-get", "echo 'Remv docker.io [20]'; echo 'Inst podman (4)'")

    with pytest.raises(SystemExit, match=r"remove docker\.io"):
        record.main(str(tmp_path / "list.json"), ["packages:podman"])

    assert not (tmp_path / "list.json").exists()


@pytest.mark.parametrize("content", ["{", '{"schema": "kalium-installed/v9"}'])
def test_a_list_that_cannot_be_read_is_an_error_and_stays(tmp_path: Path, content: str) -> None:
    """Overwriting it would forget what is ours."""
    path = tmp_path / "list.json"
    path.write_text(content, encoding="utf-8")

    with pytest.raises(SystemExit, match=r"error\[installed\."):
        record.main(str(path), ["path:/nowhere/at/all"])

    assert path.read_text(encoding="utf-8") == content


@pytest.mark.usefixtures("only_stand_ins")
def test_a_reset_removes_what_the_list_says_and_nothing_else(
    tmp_path: Path, command: Callable[[str, str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    # Whatever goes with `shared` takes a package of somebody else's with it.
    purged = command(
        "apt-get", 'case "$*" in *--simulate*ours*) echo "Purg ours [1]";; esac; case "$*" in *--simulate*shared*) echo "Purg theirs [1]";; esac'
    )
    command("dpkg-query", "printf 'installed ours\\ninstalled shared\\n'")
    removed = command("podman", 'case "$*" in *--format*Image*) echo "c1 localhost/kalium/f:1"; echo "c2 docker.io/x:1";; *--quiet*) echo c2;; esac')
    ours, beside = tmp_path / "ours", tmp_path / "beside"
    for folder in (ours, beside):
        folder.mkdir()
        (folder / "file").write_text("x", encoding="utf-8")
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"packages": ["ours", "shared"], "users": [], "bridges": [], "paths": [str(ours)]}), encoding="utf-8")

    remove.main(str(path), str(tmp_path / "opt"), str(tmp_path / "etc"))

    assert [ours.exists(), beside.exists(), path.exists()] == [False, True, False]
    assert "--quiet=2 --yes purge ours\n" in purged.read_text(encoding="utf-8")
    assert "--yes purge ours shared" not in purged.read_text(encoding="utf-8")
    assert "rm --force c1\n" in removed.read_text(encoding="utf-8")
    assert "rm --force c2" not in removed.read_text(encoding="utf-8")
    assert "left package shared" in capsys.readouterr().out


@pytest.mark.usefixtures("only_stand_ins")
def test_a_reset_takes_our_images_out_of_a_containerd_that_stays(tmp_path: Path, command: Callable[[str, str], Path]) -> None:
    asked = command("ctr", 'case "$*" in *ls*) echo "localhost/kalium/f:1"; echo "localhost/kalium/g:2";; esac')
    path = tmp_path / "list.json"
    path.write_text(json.dumps({"packages": [], "users": [], "bridges": [], "paths": []}), encoding="utf-8")

    remove.main(str(path), str(tmp_path / "opt"), str(tmp_path / "etc"))

    listed, removed = asked.read_text(encoding="utf-8").splitlines()
    assert "--namespace k8s.io images ls --quiet name~=^localhost/kalium/" in listed
    assert removed.endswith("images rm localhost/kalium/f:1 localhost/kalium/g:2")


@pytest.mark.usefixtures("only_stand_ins")
def test_a_reset_removes_the_folder_of_the_list_after_everything_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """While the list is there, a reset that was interrupted can be repeated."""
    folders = [tmp_path / "a-longer-name" / "inner", tmp_path / "var", tmp_path / "etc"]
    for folder in folders:
        folder.mkdir(parents=True)
    path = tmp_path / "var" / "list.json"
    path.write_text(json.dumps({"packages": [], "users": [], "bridges": [], "paths": [str(folder) for folder in folders]}), encoding="utf-8")

    remove.main(str(path), str(tmp_path / "opt"), str(tmp_path / "etc"))

    removed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("removed ")]
    assert removed == [f"removed {folder}" for folder in (folders[0], folders[2], folders[1])]
    assert not folders[1].exists()


@pytest.mark.usefixtures("only_stand_ins")
def test_a_second_reset_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remove.main(str(tmp_path / "list.json"), str(tmp_path), str(tmp_path))

    assert capsys.readouterr().out.split()[-1] == "unchanged"


# Services


@pytest.fixture
def described(tmp_path: Path, command: Callable[[str, str], Path]) -> dict[str, Any]:
    """A service whose supervisor is a script of the test: it keeps the state in a file, and starts what it is told."""
    state = tmp_path / "state"
    command("supervisorctl", f'case "$3" in status) echo "$4 $(cat {state} 2>/dev/null || echo STOPPED) pid 1";; start) echo RUNNING >{state};; esac')
    (tmp_path / "binary").write_text("one", encoding="utf-8")
    return {
        "manager": "supervisor", "supervisorctl": str(tmp_path / "bin" / "supervisorctl"), "supervisor_conf": "conf",
        "supervisor_programs": str(tmp_path / "programs"), "name": "kalium-x", "description": "X", "command": ["/bin/x", "--rate", "5%", "a b", ""],
        "user": "kalium", "environment": {"B": 'say "%"', "A": "1"}, "log": str(tmp_path / "x.log"), "inputs": [str(tmp_path / "binary")],
        "writes": ["/var/x", "/run/a b"], "hides": ["/etc/keys"],
        "confinement": {
            "PrivateTmp": "yes", "SystemCallFilter": ["@system-service", "~@privileged"], "ProtectHome": None, "CapabilityBoundingSet": "",
        },
        "ready": ["true"], "ready_environment": {}, "ready_seconds": "1", "stop_seconds": "5",
    }  # fmt: skip


def test_a_service_is_started_once_and_again_when_what_it_is_made_of_changed(
    described: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unit = tmp_path / "programs" / "kalium-x.conf"

    service.main(json.dumps(described))
    first = unit.read_text(encoding="utf-8")
    service.main(json.dumps(described))
    (tmp_path / "binary").write_text("two", encoding="utf-8")
    service.main(json.dumps(described))
    (tmp_path / "state").write_text("EXITED", encoding="utf-8")
    service.main(json.dumps(described))

    assert capsys.readouterr().out.split() == ["changed", "unchanged", "changed", "changed"]
    assert unit.read_text(encoding="utf-8") != first


def test_both_managers_are_told_the_same_words(described: dict[str, Any]) -> None:
    """A percent sign is doubled for both, and quotes are kept."""
    supervisor, systemd = (make({**described, "stop_seconds": 5}).text("r1") for make in (service.Supervisor, service.Systemd))

    assert 'command=/bin/x --rate 5%% "a b" ""' in supervisor.splitlines()
    assert 'ExecStart=/bin/x --rate 5%% "a b" ""' in systemd.splitlines()
    assert r'environment=A="1",B="say \"%%\"",KALIUM_REVISION="r1"' in supervisor.splitlines()
    assert r'Environment="B=say \"%%\""' in systemd.splitlines()


@pytest.mark.parametrize(("kind", "log", "is_rotated"), [("Systemd", "/var/log/x.log", True), ("Unit", "the journal", False)])
def test_the_log_of_a_service_has_a_rule_and_the_journal_has_none(
    described: dict[str, Any], command: Callable[[str, str], Path], tmp_path: Path, kind: str, log: str, is_rotated: bool
) -> None:
    command("systemctl", "echo active")
    manager = getattr(service, kind)({**described, "log": log, "run_folders": {}, "stop_seconds": 5})
    manager.write = lambda _revision: False
    manager.rotation = str(tmp_path / "rotated" / "kalium-x")

    for has_logrotate in (False, True):
        assert manager.apply("r1") is True
        assert Path(manager.rotation).exists() is (has_logrotate and is_rotated)
        (tmp_path / "rotated").mkdir(exist_ok=True)

    assert not is_rotated or Path(manager.rotation).read_text(encoding="utf-8").splitlines()[1:3] == [f"{log} {{", "    size 50M"]


@pytest.mark.parametrize("version", [237, 252])
def test_a_unit_of_systemd_says_what_the_service_may_do(described: dict[str, Any], monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    """An old systemd takes a group of system calls that it does not know for an empty one: the service would be killed at its first call."""
    monkeypatch.setattr(service, "systemd_version", lambda: version)

    lines = service.Systemd({**described, "stop_seconds": 5}).text("r1").splitlines()

    confined = [line for line in lines if line.partition("=")[0] in (*described["confinement"], "ReadWritePaths", "InaccessiblePaths")]
    calls = ["SystemCallFilter=@system-service", "SystemCallFilter=~@privileged"] if version > 237 else []
    paths = ['ReadWritePaths="/var/x" "/run/a b"', 'InaccessiblePaths="-/etc/keys"']
    assert confined == ["CapabilityBoundingSet=", "PrivateTmp=yes", *calls, *paths]
    assert lines.index("[Service]") < lines.index(confined[0]) < lines.index("[Install]")


def test_only_a_unit_is_made_anew_when_the_service_may_do_something_else(described: dict[str, Any]) -> None:
    other = {**described, "writes": []}

    assert service.revision_of(other) == service.revision_of(described)
    assert service.revision_of({**other, "manager": "systemd"}) != service.revision_of({**described, "manager": "systemd"})


@pytest.mark.parametrize(("said", "number"), [("systemd 252 (252.39-1~deb12u1)\n+PAM", 252), ("", 0), ("bash: systemctl: not found", 0)])
def test_the_version_of_systemd_is_a_number(command: Callable[[str, str], Path], said: str, number: int) -> None:
    command("systemctl", f"printf '{said}'")

    assert service.systemd_version() == number


def test_a_service_that_never_answers_fails_with_its_answer_and_its_log(described: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x.log").write_text("first\nlast words\n", encoding="utf-8")

    with pytest.raises(SystemExit) as stopped:
        service.main(json.dumps({**described, "ready": ["sh", "-c", "echo not yet; exit 1"], "ready_seconds": 0}))

    assert "error[service.not_ready]: cannot start kalium-x" in str(stopped.value)
    assert "not yet" in str(stopped.value)
    assert "last words" in str(stopped.value)


def test_a_service_without_its_binary_is_an_error_before_anything_is_written(described: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "binary").unlink()

    with pytest.raises(SystemExit, match=r"error\[service.input\]"):
        service.main(json.dumps(described))

    assert not (tmp_path / "programs").exists()


# Python, Go, and the last line of CI


def test_the_environment_is_made_again_only_for_new_requirements_and_the_package_only_for_a_new_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    venv, lock, archive, wheel = tmp_path / "venv", tmp_path / "lock.txt", tmp_path / "wheels.tar", tmp_path / "kalium.whl"
    venv.mkdir()
    tarfile.open(archive, "w").close()
    ran: list[str] = []
    monkeypatch.setattr(install, "run", lambda words: ran.append("wheel" if str(wheel) in words else "venv" if "venv" in words else "lock"))

    for change in (lock, lock.with_name("nothing"), wheel, lock):
        change.write_text(f"{lock.exists()}{len(ran)}", encoding="utf-8")
        wheel.touch()
        if change == lock and ran:
            (venv / ".package").unlink()  # as `venv --clear` does
        install.main(str(venv), str(lock), str(archive), str(wheel))

    assert ran == ["venv", "lock", "wheel", "wheel", "venv", "lock", "wheel"]
    assert capsys.readouterr().out.split() == ["changed", "unchanged", "changed", "changed"]


def test_an_archive_of_wheels_is_unpacked_flat_or_not_at_all(tmp_path: Path) -> None:
    def packed(name: str) -> str:
        entry = tarfile.TarInfo(name)
        entry.size = 3
        with tarfile.open(tmp_path / "wheels.tar", "w") as tar:
            tar.addfile(entry, io.BytesIO(b"zip"))
        return str(tmp_path / "wheels.tar")

    folder = tmp_path / "wheels"
    folder.mkdir()
    install.unpack(packed("a-1.whl"), str(folder))
    assert (folder / "a-1.whl").read_bytes() == b"zip"

    for name in ("../a-1.whl", "/tmp/a-1.whl", "a/b.whl"):
        with pytest.raises(SystemExit, match=r"error\[python\.archive\]: cannot unpack .*: it holds "):
            install.unpack(packed(name), str(folder))
    assert [path.name for path in folder.iterdir()] == ["a-1.whl"]
    assert not (tmp_path / "a-1.whl").exists()


@pytest.mark.parametrize(
    ("said", "minimum", "found"),
    [
        ("go1.26.8", "1.26.3", True),
        ("go1.26.3", "1.26.3", True),
        ("go1.26.2", "1.26.3", False),
        ("go1.9", "1.26", False),
        ("go1.27rc1", "1.26.3", True),
    ],
)
def test_a_go_is_taken_when_it_is_new_enough(
    said: str, minimum: str, found: bool, command: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command("go", f"echo {said}")
    monkeypatch.setattr(find_go, "ELSEWHERE", [])
    monkeypatch.setattr(find_go, "OURS", "/nowhere/go")

    status = find_go.main(minimum)

    assert status == (0 if found else 1)
    assert bool(capsys.readouterr().out) == found


def counted(tmp_path: Path, events: list[dict[str, Any]]) -> tuple[int, dict[str, int]]:
    target = tmp_path / "reports" / "go.json"
    lines = "".join(json.dumps(event) + "\n" for event in events)
    done = subprocess.run(
        [sys.executable, ROOT / ".ci/report.py", "go", target], input=lines, text=True, capture_output=True, check=False, timeout=30
    )
    return done.returncode, read_list(target)


def test_tests_of_both_languages_are_added_up(tmp_path: Path) -> None:
    events = [{"Action": "pass", "Package": "p", "Test": "A"}, {"Action": "skip", "Package": "p", "Test": "B"}, {"Action": "pass", "Package": "p"}]
    status, counts = counted(tmp_path, events)
    (tmp_path / "reports" / "python.xml").write_text('<s><testsuite tests="5" failures="1" errors="1" skipped="1"/></s>', encoding="utf-8")

    done = subprocess.run(
        [sys.executable, ROOT / ".ci/report.py", "sum", tmp_path / "reports", "0"], text=True, capture_output=True, check=False, timeout=30
    )

    assert (status, counts) == (0, {"passed": 1, "failed": 0, "skipped": 1})
    assert done.stdout.splitlines()[-1] == "3 passed, 2 failed, 2 skipped"
    assert done.returncode == 1


@pytest.mark.parametrize(
    "events",
    [
        [],
        [{"Action": "fail", "Package": "p", "Test": "A"}, {"Action": "fail", "Package": "p"}],
        [{"Action": "pass", "Package": "p", "Test": "A"}, {"Action": "build-fail", "ImportPath": "q"}, {"Action": "fail", "Package": "q"}],
    ],
)
def test_a_go_run_without_a_test_or_with_a_broken_one_fails(tmp_path: Path, events: list[dict[str, Any]]) -> None:
    assert counted(tmp_path, events)[0] == 1


def test_a_step_that_fails_outside_of_the_tests_counts_as_one(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / ".ci/report.py", "sum", tmp_path, "2"], text=True, capture_output=True, check=False, timeout=30)

    assert done.stdout.splitlines()[-1] == "0 passed, 1 failed"
    assert done.returncode == 2
