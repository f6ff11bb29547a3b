"""The CloudLab profile under the real geni-lib: what it requests, and which parameters it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

ROOT = Path(__file__).resolve().parents[2]
RSPEC = "{http://www.geni.net/resources/rspec/3}"
EMULAB = "{http://www.protogeni.net/resources/rspec/ext/emulab/1}"
UBUNTU22 = "urn:publicid:IDN+emulab.net+image+emulab-ops//UBUNTU22-64-STD"


def run(tmp_path: Path, **parameters: object) -> subprocess.CompletedProcess[str]:
    """Run profile.py as the portal does, with what a person chose in its form; everything else has its default."""
    chosen = tmp_path / "parameters.json"
    chosen.write_text(json.dumps(parameters), encoding="utf-8")
    environment = {**os.environ, "GENILIB_PORTAL_MODE": "1", "GENILIB_PORTAL_PARAMS_PATH": str(chosen)}
    command = [sys.executable, str(ROOT / "tests/unit/cloudlab_portal.py"), str(ROOT / "profile.py")]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=60)


def request(tmp_path: Path, **parameters: object) -> ET.Element:
    done = run(tmp_path, **parameters)
    assert done.returncode == 0, done.stderr
    return ET.fromstring(done.stdout)


def addresses(rspec: ET.Element) -> dict[str, list[str]]:
    """LAN addresses by node."""
    return {node.attrib["client_id"]: [ip.attrib["address"] for ip in node.iter(f"{RSPEC}ip")] for node in rspec.iter(f"{RSPEC}node")}


def members(rspec: ET.Element) -> list[str]:
    (lan,) = rspec.iter(f"{RSPEC}link")
    assert [kind.attrib["name"] for kind in lan.iter(f"{RSPEC}link_type")] == ["lan"]
    return [member.attrib["client_id"].partition(":")[0] for member in lan.iter(f"{RSPEC}interface_ref")]


def test_the_default_is_the_papers_topology(tmp_path: Path) -> None:
    """Four workers and a control plane on one LAN; the controller is a machine of the same kind outside it."""
    rspec = request(tmp_path)

    assert addresses(rspec) == {**{f"node{number}": [f"10.10.1.{number + 1}"] for number in range(5)}, "node5": []}
    assert members(rspec) == [f"node{number}" for number in range(5)]
    nodes = list(rspec.iter(f"{RSPEC}node"))
    assert {image.attrib["name"] for node in nodes for image in node.iter(f"{RSPEC}disk_image")} == {UBUNTU22}
    assert {kind.attrib["name"] for node in nodes for kind in node.iter(f"{RSPEC}hardware_type")} == {"c220g1"}
    assert [kind.attrib["name"] for node in nodes for kind in node.iter(f"{RSPEC}sliver_type")] == ["raw"] * 6
    assert {node.attrib["exclusive"] for node in nodes} == {"true"}


def test_every_machine_has_the_extra_disk_under_a_name_of_its_own(tmp_path: Path) -> None:
    disks = list(request(tmp_path).iter(f"{EMULAB}blockstore"))

    assert [(disk.attrib["mountpoint"], disk.attrib["size"]) for disk in disks] == [("/mydata", "60GB")] * 6
    assert len({disk.attrib["name"] for disk in disks}) == 6


def test_the_lan_is_shaped_only_when_a_speed_is_chosen(tmp_path: Path) -> None:
    assert list(request(tmp_path).iter(f"{RSPEC}property")) == []
    assert {shape.attrib["capacity"] for shape in request(tmp_path, speed=25_000_000).iter(f"{RSPEC}property")} == {"25000000"}


def test_each_parameter_changes_what_it_names(tmp_path: Path) -> None:
    rspec = request(tmp_path, workers=2, hardware="d430", image=UBUNTU22.replace("22", "18"), disk=0, controllerInLan=True)

    assert addresses(rspec) == {f"node{number}": [f"10.10.1.{number + 1}"] for number in range(4)}
    assert members(rspec) == ["node0", "node1", "node2", "node3"]
    assert {kind.attrib["name"] for kind in rspec.iter(f"{RSPEC}hardware_type")} == {"d430"}
    assert {image.attrib["name"] for image in rspec.iter(f"{RSPEC}disk_image")} == {UBUNTU22.replace("22", "18")}
    assert list(rspec.iter(f"{EMULAB}blockstore")) == []


def test_no_script_runs_on_the_machines(tmp_path: Path) -> None:
    """What the site needs is installed by Ansible, from the person's own machine, and nowhere else."""
    rspec = request(tmp_path)

    assert [element for tag in ("execute", "install", "services") for element in rspec.iter(f"{RSPEC}{tag}")] == []


def test_the_portal_shows_what_comes_next(tmp_path: Path) -> None:
    done = run(tmp_path)

    assert "fab inventory --from-manifest" in done.stdout


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"workers": 0}, ["workers"]),
        ({"workers": 33}, ["workers"]),
        ({"workers": "four"}, ["workers"]),
        ({"disk": 5}, ["disk"]),
        ({"disk": -1}, ["disk"]),
        ({"speed": 7}, ["speed"]),
        ({"image": "urn:publicid:IDN+emulab.net+image+emulab-ops//CENTOS7-64-STD"}, ["image"]),
        ({"workers": 0, "disk": 5}, ["workers", "disk"]),
    ],
)
def test_a_parameter_that_cannot_be_is_refused_by_its_name(tmp_path: Path, parameters: dict[str, object], named: list[str]) -> None:
    """All at once, in the portal's own form, and nothing is requested."""
    done = run(tmp_path, **parameters)

    assert done.returncode == 100 + len(named), done.stderr
    assert [error["params"] for error in json.loads(done.stderr)] == [[name] for name in named]
    assert done.stdout == ""
