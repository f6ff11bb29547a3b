"""The throw-away host is what the role tests need: reached strictly, bare, able to install, and gone afterwards."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import Ansible
from nspawn import NAME, TEST_LINK, host_running
from throwaway.host import AS_ROOT, Host, HostError, make_key

GONE_S_MAX = 30.0


def inventory_of(host: Host, path: Path) -> Path:
    """Write an inventory with `host` alone."""
    path.write_text(yaml.safe_dump({"all": {"hosts": {host.name: host.inventory_variables()}}}), encoding="utf-8")
    return path


def traces() -> list[str]:
    """What a host leaves on this machine while it is there: its link and its processes' groups."""
    links = subprocess.run(["ip", "-brief", "link"], check=True, capture_output=True, text=True, timeout=10).stdout
    # A group of that name of each hierarchy, or a slice of that name where systemd runs the machine; the host's own groups are below.
    groups = (Path(group) for top in Path("/sys/fs/cgroup").glob(f"**/{NAME}*") for group, _, _ in os.walk(top))
    return [
        *(line for line in links.splitlines() if line.startswith(TEST_LINK)),
        *(f"{group}: {pids}" for group in groups if (pids := (group / "cgroup.procs").read_text(encoding="utf-8").split())),
    ]


@pytest.fixture
def host(private_folder: Path) -> Iterator[Host]:
    with host_running(private_folder) as running:
        yield running


def test_ansible_reaches_the_host_as_an_ordinary_user_and_installs_a_package_as_root(host: Host, ansible: Ansible, private_folder: Path) -> None:
    """The package comes from the registry through the host's own apt, with the interpreter of the distribution."""
    inventory = inventory_of(host, private_folder / "hosts.yml")

    installed = ansible.module(inventory, "ansible.builtin.apt", "name=tree update_cache=true")
    asked = host.run("id -un; command -v tree; which -a python3; systemctl is-system-running --wait")

    assert installed.status == 0, installed.end()
    assert "CHANGED" in installed.text
    assert asked.stdout.split() == [host.user, "/usr/bin/tree", "/usr/bin/python3", "/bin/python3", "running"]


def test_another_host_key_is_refused(host: Host, ansible: Ansible, private_folder: Path) -> None:
    """Ansible stops before a task runs when known_hosts holds a key that is not the host's."""
    inventory = inventory_of(host, private_folder / "hosts.yml")
    other = make_key(private_folder / "other_key")
    host.known_hosts.write_text(f"{host.address} {other}\n", encoding="utf-8")

    refused = ansible.module(inventory, "ansible.builtin.ping", "")

    assert refused.status != 0, refused.end()
    assert "UNREACHABLE" in refused.text
    assert "SUCCESS" not in refused.text
    assert "Host key verification failed" in refused.text


def test_the_host_does_not_reach_this_machines_loopback(host: Host) -> None:
    """The user-mode network leads outwards; what listens on 127.0.0.1 here is not a service of the host's network."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        asked = host.run(f"timeout 5 bash -c 'exec 3<>/dev/tcp/10.0.2.2/{port}' && echo reached || echo refused")

    assert asked.stdout == "refused\n", asked.stderr


def test_nothing_is_left_after_the_test(private_folder: Path) -> None:
    with host_running(private_folder):
        assert len(traces()) >= 2  # so that none afterwards means something

    assert traces() == []


def test_nothing_runs_on_after_the_root_half_was_killed_and_the_next_host_starts(private_folder: Path) -> None:
    """The kernel ends what could not be ended in order; the next run clears the folders."""
    first, second = private_folder / "first", private_folder / "second"
    first.mkdir(mode=0o700)
    second.mkdir(mode=0o700)

    with pytest.raises(HostError, match="cannot end host"), host_running(first) as host:
        subprocess.run([*(AS_ROOT if os.geteuid() else ()), "sh", "-c", f"kill -KILL {host.root_half_pid}"], check=True, timeout=10)
    deadline = time.monotonic() + GONE_S_MAX
    while traces():
        assert time.monotonic() < deadline, traces()
        time.sleep(0.05)

    with host_running(second) as host:
        assert host.run("hostname").stdout == f"{NAME}\n"


def test_a_restarted_host_keeps_its_files_and_answers_again(host: Host) -> None:
    """What a role installed has to come back by itself; what lives in /run has not."""
    host.run("touch kept; sudo touch /run/lost")

    host.reboot()

    assert host.run("ls kept /run/lost").stdout == "kept\n"
    assert host.run("systemctl is-system-running").stdout == "running\n"
