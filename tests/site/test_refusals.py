"""What cannot work stops in pre-flight: every reason in one list, each with its next step, and nothing is changed."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
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


def test_a_whole_cluster_is_refused_in_one_sentence(ansible: Ansible) -> None:
    """Nobody is asked over the network for what cannot be done anyway."""
    before = state_of_the_site()

    refused = ansible.play("site.yml", "inventory/cloudlab")

    assert refused.status == 2, refused.end()
    assert set(errors(refused)) == {"preflight.problems", "preflight.cluster"}, refused.end()
    assert "Kubernetes" in errors(refused)["preflight.cluster"]
    assert "next: " in refused.text
    assert refused.changed_tasks() == []
    assert state_of_the_site() == before


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
