"""What cannot work stops in pre-flight: every reason in one list, each with its next step, and nothing is changed."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Ansible, Outcome

ERROR = re.compile(r"error\[(?P<code>[a-z._]+)\]: (?P<sentence>[^\n]+)")
PLACES = ("/opt/kalium", "/etc/kalium", "/var/lib/kalium/installed.json")


def errors(outcome: Outcome) -> dict[str, str]:
    """The sentence of each error code in what Ansible printed."""
    return {match["code"]: match["sentence"] for match in ERROR.finditer(outcome.text)}


def state_of_the_site() -> list[tuple[str, int]]:
    """Everything that a site has on this machine, with the time of its last change."""
    roots = [Path(place) for place in PLACES]
    paths = [path for root in roots if root.exists() for path in (root, *root.rglob("*")) if not path.is_symlink()]
    return sorted((str(path), path.stat().st_mtime_ns) for path in paths if path.exists())


@pytest.mark.parametrize("inventory", ["inventory/cloudlab", "inventory/sample"])
def test_an_inventory_that_nobody_filled_in_is_refused_in_one_sentence(ansible: Ansible, inventory: str) -> None:
    """Nobody is asked over the network: the names are the example's."""
    before = state_of_the_site()

    refused = ansible.play("site.yml", inventory)

    assert refused.status == 2, refused.end()
    assert set(errors(refused)) == {"preflight.problems", "preflight.example"}, refused.end()
    assert "next: " in refused.text
    assert refused.changed_tasks() == []
    assert "unreachable=1" not in refused.text
    assert state_of_the_site() == before


def cluster(folder: Path, **hosts: dict[str, object]) -> Path:
    """An inventory with one worker, a control plane and a controller that nothing answers for, changed by `hosts`."""
    nobody = {"ansible_host": "127.0.0.1", "ansible_port": 1}
    machines: dict[str, dict[str, object]] = {
        "here": {"ansible_connection": "local"},
        "control": {**nobody, "ansible_host": "127.0.0.2", "kalium_layout_address": "10.10.1.2"},
        "worker": {**nobody, "ansible_host": "127.0.0.3", "kalium_layout_address": "10.10.1.1"},
        "guard": {**nobody, "ansible_host": "127.0.0.4", "kalium_layout_address": "10.10.1.3"},
    }
    groups = {
        "build": ["here"], "kube_control": ["control"], "function_nodes": ["worker"], "controller": ["guard"], "images": ["guard"],
        "database": ["control"], "client": ["control"],
    }  # fmt: skip
    site = {
        "all": {
            "hosts": {name: {**of, **hosts.get(name, {})} for name, of in machines.items()},
            "vars": {
                "kalium_site": "nowhere",
                "kalium_engine": "kubernetes",
                "kalium_service_manager": "systemd",
                "kalium_imageserver_issuer": "letsencrypt",
            },
            "children": {group: {"hosts": {name: {} for name in names}} for group, names in groups.items()},
        }
    }
    path = folder / "hosts.yml"
    path.write_text(yaml.safe_dump(site), encoding="utf-8")
    return path


def test_a_cluster_with_mistakes_is_refused_with_all_of_them(ansible: Ansible, tmp_path: Path) -> None:
    """Those of the inventory and those of the hosts in one list; nothing is changed anywhere."""
    inventory = cluster(tmp_path, worker={"kalium_layout_address": "10.10.1.2", "ansible_host": "127.0.0.2"}, guard={"kalium_layout_address": ""})

    refused = ansible.play("playbooks/preflight.yml", inventory)

    assert refused.status == 2, refused.end()
    assert set(errors(refused)) >= {"preflight.duplicate", "preflight.address", "preflight.name", "preflight.unreachable"}, refused.end()
    assert len(re.findall(r"error\[preflight.unreachable\]: cannot reach it on (control|worker|guard)", refused.text)) == 3, refused.end()
    assert refused.text.count("next: ") == len(ERROR.findall(refused.text)) - 1
    assert refused.changed_tasks() == []


@pytest.mark.parametrize("inventory", ["inventory/nowhere", os.devnull])
def test_an_inventory_that_is_not_there_is_named_with_the_missing_groups(ansible: Ansible, inventory: str) -> None:
    refused = ansible.play("site.yml", inventory)

    assert refused.status == 2, refused.end()
    assert inventory in errors(refused)["preflight.inventory"]
    assert "function_nodes" in errors(refused)["preflight.inventory"]
    assert refused.changed_tasks() == []


def test_a_busy_port_is_named_with_its_holder_and_the_variable_that_moves_ours(ansible: Ansible) -> None:
    """Only the pre-flight is played: a check that failed to notice must not go on to set up a site here."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        refused = ansible.play("playbooks/preflight.yml", "inventory/local", "-e", f"kalium_controller_port={port}")

    assert refused.status == 2, refused.end()
    assert f"127.0.0.1:{port}/tcp for the controller" in errors(refused)["preflight.port"]
    assert f"process {os.getpid()} " in errors(refused)["preflight.port"]
    assert f"-e kalium_controller_port={port + 1}" in refused.text


def test_all_problems_are_told_at_once(ansible: Ansible) -> None:
    """A person mends everything before the next try, not one thing a try."""
    with socket.create_server(("127.0.0.1", 0)) as busy:
        settings = {"kalium_mail_port": busy.getsockname()[1], "kalium_mail_address": "127.0.0.1"}
        settings |= {"kalium_preflight_memory_gib": 1_000_000, "kalium_preflight_disk_gib": 1_000_000, "kalium_preflight_disk_gib_again": 1_000_000}
        options = [word for name, value in settings.items() for word in ("-e", f"{name}={value}")]
        refused = ansible.play("playbooks/preflight.yml", "inventory/local", *options)

    assert refused.status == 2, refused.end()
    assert {"preflight.port", "preflight.memory", "preflight.disk"} <= set(errors(refused)), refused.end()
    assert refused.counts("localhost")["changed"] == 0


def test_this_machine_passes(ansible: Ansible) -> None:
    """The refusals above are about what they name: without it the same pre-flight has nothing to say."""
    passed = ansible.play("playbooks/preflight.yml", "inventory/local")

    assert passed.status == 0, passed.end()
    assert errors(passed) == {}
    assert passed.counts("localhost")["changed"] == 0


def test_site_yml_begins_with_the_preflight() -> None:
    imported = re.findall(r"import_playbook: (\S+)", (ROOT / "site.yml").read_text(encoding="utf-8"))

    assert imported[0] == "playbooks/preflight.yml"


@pytest.mark.parametrize("fault", [{"breaks": True}, {"ansible_connection": "ssh", "ansible_host": "127.0.0.3", "ansible_port": 1}])
def test_a_host_that_fails_or_goes_away_ends_the_run_for_all(ansible: Ansible, tmp_path: Path, fault: dict[str, object]) -> None:
    """Otherwise the last playbook calls a site ready that has a node which is not."""
    nodes = {"one": {"ansible_connection": "local"}, "two": {"ansible_connection": "local", **fault}}
    hosts = {"nodes": {"hosts": nodes}, "build": {"hosts": {"here": {"ansible_connection": "local"}}}}
    inventory = tmp_path / "hosts.yml"
    inventory.write_text(yaml.safe_dump({"all": {"children": hosts}}), encoding="utf-8")
    work = [{"name": "Work", "ansible.builtin.command": "{{ 'false' if breaks | default(false) else 'true' }}"}]
    last = [{"name": "Say it", "ansible.builtin.debug": {"msg": "the site is ready"}}]
    plays = [{"hosts": "nodes", "gather_facts": False, "tasks": work}, {"hosts": "build", "gather_facts": False, "tasks": last}]
    playbook = tmp_path / "plays.yml"
    playbook.write_text(yaml.safe_dump(plays), encoding="utf-8")

    ended = ansible.play(playbook, inventory)

    assert ended.status != 0, ended.end()
    assert re.search(r"two +: .*(failed|unreachable)=1", ended.text), ended.end()
    assert "the site is ready" not in ended.text
