"""What the roles would write for a site of several controllers, read by those who read it on a host. No host is needed: nothing is set up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Ansible

from kalium.controller.config import AuditFiles, Listen, Store, load

WRITE = """
- name: Write what would be on each host
  hosts: function_nodes:controller
  gather_facts: false
  tasks:
    - name: Know the layout
      ansible.builtin.include_role: {name: kalium_layout, tasks_from: record, apply: {when: false}, public: true}
    - name: Know the defaults
      ansible.builtin.include_vars: {file: "{{ item }}"}
      loop: "{{ ['kalium_engine', 'kalium_kubernetes', 'kalium_agent', 'kalium_controller'] | map('regex_replace', '$', '/defaults/main.yml')
                | map('regex_replace', '^', roles ~ '/') }}"
    - name: Know what the agent works out
      ansible.builtin.include_vars: {file: "{{ roles }}/kalium_agent/vars/main.yml"}
    - name: Write the configurations
      ansible.builtin.template:
        src: "{{ roles }}/kalium_{{ item.what }}/templates/{{ item.what }}.json.j2"
        dest: "{{ out }}/{{ inventory_hostname }}.{{ item.what }}.json"
      loop: [{what: controller, group: controller}, {what: agent, group: function_nodes}]
      when: item.group in group_names
"""
NODES = {f"node{number}": f"10.0.0.1{number}" for number in range(5)}


def written(ansible: Ansible, folder: Path, controllers: list[str], store: list[str]) -> Path:
    """The folder with each host's configurations, for a site whose functions run on node0 to node2."""
    playbook, inventory, out = folder / "write.yml", folder / "hosts.yml", folder / "out"
    out.mkdir()
    groups = {
        "build": ["node4"], "kube_control": ["node4"], "function_nodes": ["node0", "node1", "node2"], "controller": controllers,
        "store": store, "images": ["node4"], "database": ["node4"], "client": ["node4"],
    }  # fmt: skip
    shipped = yaml.safe_load((ROOT / "inventory/sample/group_vars/all.yml").read_text(encoding="utf-8"))
    form = {
        "roles": str(ROOT / "roles"), "out": str(out), "ansible_connection": "local", "ansible_host": "elsewhere",
        "kalium_engine": "kubernetes", "kalium_service_manager": "systemd", "kalium_controller_address": shipped["kalium_controller_address"],
    }  # fmt: skip
    children: dict[str, object] = {name: {"hosts": {host: {} for host in hosts}} for name, hosts in groups.items()}
    hosts = {name: {"kalium_layout_address": address} for name, address in NODES.items()}
    inventory.write_text(yaml.safe_dump({"all": {"hosts": hosts, "vars": form, "children": children}}), encoding="utf-8")
    playbook.write_text(WRITE, encoding="utf-8")
    done = ansible.play(playbook, inventory)
    assert done.status == 0, done.end()
    return out


def test_one_controller_keeps_its_calls_and_is_the_only_one_that_agents_know(ansible: Ansible, tmp_path: Path) -> None:
    out = written(ansible, tmp_path, ["node3"], [])

    config = load(out / "node3.controller.json")
    assert (config.name, config.host, config.port, config.store) == ("controller", "10.0.0.13", 5000, Store())
    assert config.audit == AuditFiles(Path("/var/log/kalium/controller/audit.jsonl"), Path("/etc/kalium/audit/controller.key"))
    assert config.metrics == Listen("127.0.0.1", 5001)
    agents = [json.loads((out / f"node{number}.agent.json").read_text(encoding="utf-8")) for number in range(3)]
    assert [agent["controllers"] for agent in agents] == [[{"address": "10.0.0.13:5000", "name": "controller"}]] * 3
    assert [agent["node"] for agent in agents] == ["node0", "node1", "node2"]


@pytest.mark.parametrize(("store", "address"), [(["node4"], "10.0.0.14"), ([], "10.0.0.13")])
def test_several_controllers_share_a_store_and_agents_know_them_all(ansible: Ansible, tmp_path: Path, store: list[str], address: str) -> None:
    out = written(ansible, tmp_path, ["node3", "node4"], store)

    configs = [load(out / f"{name}.controller.json") for name in ("node3", "node4")]
    ca, password = Path("/etc/kalium/pki/ca.crt"), Path("/etc/kalium/store.password")
    assert [(config.name, config.host) for config in configs] == [("controller", "10.0.0.13"), ("controller-node4", "10.0.0.14")]
    assert {config.store for config in configs} == {Store("redis", f"rediss://kalium@{address}:6390/0", "kalium:", ca, password)}
    both = [{"address": "10.0.0.13:5000", "name": "controller"}, {"address": "10.0.0.14:5000", "name": "controller-node4"}]
    agents = [json.loads((out / f"node{number}.agent.json").read_text(encoding="utf-8"))["controllers"] for number in range(3)]
    assert agents == [both] * 3
