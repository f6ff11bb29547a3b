"""`fab inventory --from-manifest`: the folder that a manifest becomes, and manifests that must not become one. All of them are made here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments import inventory, manifest
from experiments.errors import ExperimentError

ROOT = Path(__file__).resolve().parents[2]
DOMAIN = "trial.kalium-PG0.wisc.cloudlab.us"
EVERYBODY = ("alice", "bob")

HEAD = (
    '<rspec xmlns="http://www.geni.net/resources/rspec/3" xmlns:emulab="http://www.protogeni.net/resources/rspec/ext/emulab/1"'
    ' xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" expires="2026-12-01T00:00:00Z" type="manifest">'
)


def node(number: int, *, lan: bool = True, users: tuple[str, ...] = EVERYBODY) -> str:
    """One machine in the public format: its element as CloudLab writes it, an icon and a console among the rest."""
    logins = "".join(
        f'<login authentication="ssh-keys" hostname="c220g1-03061{number}.wisc.cloudlab.us" port="22" username="{user}"/>' for user in users
    )
    interface = (
        f'<interface client_id="node{number}:lan" component_id="urn:publicid:IDN+wisc.cloudlab.us+interface+c220g1-03061{number}:eth1"'
        f' mac_address="90e2ba00000{number}"><ip address="10.10.1.{number + 1}" netmask="255.255.255.0" type="ipv4"/></interface>'
    )
    return f"""
      <node client_id="node{number}" component_id="urn:publicid:IDN+wisc.cloudlab.us+node+c220g1-03061{number}" exclusive="true">
        <icon xmlns="http://www.protogeni.net/resources/rspec/ext/jacks/1" url="https://portal.example/RawPC.svg"/>
        <sliver_type name="raw-pc"><disk_image name="urn:publicid:IDN+emulab.net+image+emulab-ops//UBUNTU22-64-STD"/></sliver_type>
        <services>{logins}<emulab:console server="boss.wisc.cloudlab.us"/></services>
        {interface if lan else ""}
        <emulab:vnode name="c220g1-03061{number}" hardware_type="c220g1"/>
        <host name="node{number}.{DOMAIN}" ipv4="128.105.145.{number + 10}"/>
      </node>"""


def document(nodes: list[str], *, members: int = 5, head: str = HEAD) -> str:
    references = "".join(f'<interface_ref client_id="node{number}:lan"/>' for number in range(members))
    return f'<?xml version="1.0"?>\n{head}{"".join(nodes)}<link client_id="lan">{references}<link_type name="lan"/></link></rspec>'


def of_the_paper(users: tuple[str, ...] = EVERYBODY) -> str:
    return document([node(number, lan=number < 5, users=users) for number in range(6)])


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with nothing but what the command copies."""
    settings = tmp_path / inventory.TEMPLATE
    settings.parent.mkdir(parents=True)
    settings.write_bytes((ROOT / inventory.TEMPLATE).read_bytes())
    return tmp_path


Write = Callable[..., inventory.Written]


@pytest.fixture
def write(checkout: Path) -> Write:
    """`write(XML, user=, out=, force=)`: what the command does with a file of that content."""

    def command(content: str | bytes, user: str | None = "alice", out: str | None = None, *, force: bool = False) -> inventory.Written:
        file = checkout / "manifest.xml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return inventory.write(str(file), user, out, force=force, checkout=checkout)

    return command


def refused(write: Write, content: str | bytes, **options: Any) -> ExperimentError:
    with pytest.raises(ExperimentError) as error:
        write(content, **options)
    return error.value


def as_ansible_sees_it(folder: Path) -> dict[str, Any]:
    program = Path(sys.executable).parent / "ansible-inventory"
    done = subprocess.run([program, "-i", folder, "--list"], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    seen: dict[str, Any] = json.loads(done.stdout)
    return seen


def test_a_manifest_of_the_papers_topology_becomes_its_inventory(write: Write, checkout: Path) -> None:
    written = write(of_the_paper())

    assert written.folder == Path("inventory/trial")
    seen = as_ansible_sees_it(checkout / written.folder)
    hosts = seen["_meta"]["hostvars"]
    assert {name: hosts[name]["ansible_host"] for name in hosts if name != "build-host"} == {f"node{n}": f"node{n}.{DOMAIN}" for n in range(6)}
    assert {name: hosts[name].get("kalium_layout_address") for name in hosts} == {
        "build-host": None, "node0": "10.10.1.1", "node1": "10.10.1.2", "node2": "10.10.1.3", "node3": "10.10.1.4", "node4": "10.10.1.5",
        "node5": "128.105.145.15",
    }  # fmt: skip
    assert {hosts[f"node{n}"]["ansible_user"] for n in range(6)} == {"alice"}
    assert hosts["build-host"]["ansible_connection"] == "local"
    assert hosts["node0"]["kalium_engine"] == "kubernetes"


def test_the_groups_are_those_of_the_inventory_that_is_edited_by_hand(write: Write, checkout: Path) -> None:
    """One topology, written in two places: they may not drift apart."""
    groups = ("build", "kube_control", "function_nodes", "controller", "images", "database", "client")
    by_hand = as_ansible_sees_it(ROOT / "inventory/cloudlab")

    written = as_ansible_sees_it(checkout / write(of_the_paper()).folder)

    assert {group: written[group]["hosts"] for group in groups} == {group: by_hand[group]["hosts"] for group in groups}
    lan = {name: of.get("kalium_layout_address") for name, of in by_hand["_meta"]["hostvars"].items() if name != "node5"}
    assert lan == {name: of.get("kalium_layout_address") for name, of in written["_meta"]["hostvars"].items() if name != "node5"}


def test_the_second_run_changes_nothing_and_says_so(write: Write, checkout: Path) -> None:
    first = write(of_the_paper())
    before = {path: (checkout / path).stat().st_mtime_ns for path in first.files}

    second = write(of_the_paper())

    assert set(first.files.values()) == {"written"}
    assert set(second.files.values()) == {"unchanged"}
    assert {path: (checkout / path).stat().st_mtime_ns for path in second.files} == before


def test_a_file_that_nobody_edited_follows_the_manifest(write: Write, checkout: Path) -> None:
    """The hardware was swapped: the same command brings the folder up to date."""
    write(of_the_paper())

    swapped = write(of_the_paper().replace("128.105.145.15", "128.105.145.99"))

    assert swapped.files[swapped.folder / "hosts.yml"] == "replaced"
    assert "128.105.145.99" in (checkout / swapped.folder / "hosts.yml").read_text(encoding="utf-8")


def test_an_edited_file_is_kept_unless_somebody_insists(write: Write, checkout: Path) -> None:
    hosts = checkout / write(of_the_paper()).folder / "hosts.yml"
    hosts.write_text(hosts.read_text(encoding="utf-8") + "# mine\n", encoding="utf-8")

    error = refused(write, of_the_paper())

    assert error.code == "inventory.edited"
    assert "--force" in error.next_step
    assert hosts.read_text(encoding="utf-8").endswith("# mine\n")
    assert write(of_the_paper(), force=True).files[Path("inventory/trial/hosts.yml")] == "replaced"


def test_a_folder_that_the_command_did_not_write_is_kept(write: Write, checkout: Path) -> None:
    other = checkout / "inventory" / "mine" / "hosts.yml"
    other.parent.mkdir()
    other.write_text("all: {}\n", encoding="utf-8")

    assert refused(write, of_the_paper(), out="inventory/mine").code == "inventory.edited"
    assert other.read_text(encoding="utf-8") == "all: {}\n"


@pytest.mark.parametrize("out", ["inventory/local", "inventory/cloudlab", "inventory/Mine", "inventory/..", "inventory/{{ 1 }}"])
def test_a_folder_of_the_checkouts_own_or_with_an_odd_name_is_refused(write: Write, out: str) -> None:
    assert refused(write, of_the_paper(), out=out).code == "inventory.name"


def test_of_several_logins_the_person_names_theirs(write: Write) -> None:
    """A project has several members, and each may log in."""
    for user, said in ((None, "alice, bob"), ("mallory", "mallory has no login")):
        error = refused(write, of_the_paper(), user=user)
        assert error.code == "manifest.user"
        assert said in error.found
        assert "--user" in error.next_step


def test_the_only_login_needs_not_be_named(write: Write, checkout: Path) -> None:
    written = write(of_the_paper(users=("carol",)), user=None)

    assert "ansible_user: carol" in (checkout / written.folder / "hosts.yml").read_text(encoding="utf-8")


def test_an_unusual_ssh_port_is_kept(write: Write, checkout: Path) -> None:
    written = write(of_the_paper().replace('port="22"', 'port="30754"'))

    assert as_ansible_sees_it(checkout / written.folder)["_meta"]["hostvars"]["node0"]["ansible_port"] == 30754


def test_fewer_workers_and_a_controller_inside_the_lan(write: Write, checkout: Path) -> None:
    written = write(document([node(number) for number in range(3)], members=3))

    seen = as_ansible_sees_it(checkout / written.folder)
    assert [seen[group]["hosts"] for group in ("function_nodes", "kube_control", "controller")] == [["node0"], ["node1"], ["node2"]]
    assert seen["_meta"]["hostvars"]["node2"]["kalium_layout_address"] == "10.10.1.3"


def test_the_order_and_the_prefix_of_elements_do_not_matter(write: Write, checkout: Path) -> None:
    """The public format has both forms."""
    usual = write(of_the_paper(), out="inventory/usual")
    turned = document([node(number, lan=number < 5) for number in reversed(range(6))])
    prefixed = turned.replace('xmlns="http://www.geni.net/resources/rspec/3"', 'xmlns:r="http://www.geni.net/resources/rspec/3"')
    for tag in ("rspec", "node", "services", "login", "interface_ref", "interface", "ip", "host", "link"):
        prefixed = prefixed.replace(f"<{tag} ", f"<r:{tag} ").replace(f"<{tag}>", f"<r:{tag}>").replace(f"</{tag}>", f"</r:{tag}>")

    other = write(prefixed, out="inventory/other")

    assert (checkout / other.folder / "hosts.yml").read_bytes() == (checkout / usual.folder / "hosts.yml").read_bytes()


def test_what_is_printed_says_what_to_type_next(write: Write) -> None:
    text = write(of_the_paper()).text()

    assert "inventory/trial/hosts.yml: written" in text
    assert "ssh-keyscan" in text
    assert "ansible-playbook site.yml -i inventory/trial" in text


BOMB = '<!DOCTYPE rspec [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">]>'
OUTSIDE = '<!DOCTYPE rspec [<!ENTITY a SYSTEM "file:///etc/hostname">]>'


@pytest.mark.parametrize("declaration", [BOMB, OUTSIDE, "<!DOCTYPE rspec>", '<!DOCTYPE rspec SYSTEM "http://127.0.0.1/rspec.dtd">'])
def test_a_document_that_declares_anything_is_refused_before_it_is_read(write: Write, declaration: str) -> None:
    """Neither an entity that grows nor a file of this machine comes in by a manifest."""
    error = refused(write, of_the_paper().replace("?>\n", f"?>\n{declaration}", 1))

    assert error.code == "manifest.content"
    assert "document type" in error.found


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not XML"),
        ("node0 node1", "not XML"),
        (of_the_paper()[:-20], "not XML"),
        (b"\xff\xfe<\x00r", "not XML"),
        ("<rspec/>", "not an rspec of version 3"),
        (of_the_paper().replace("rspec/3", "rspec/2"), "not an rspec of version 3"),
        (of_the_paper().replace('type="manifest"', 'type="request"'), "not a manifest"),
        (HEAD + "<a>" * 40 + "</a>" * 40 + "</rspec>", "more than"),
        (HEAD + "<a/>" * (manifest.ELEMENTS_MAX + 1) + "</rspec>", "more than"),
        (of_the_paper() + " " * manifest.FILE_BYTES_MAX, "longer than"),
        (document([]), "no machine"),
        (document([node(0), node(1)], members=2), "numbered from node0 on"),
        (document([node(0), node(1), node(3)], members=5), "numbered from node0 on"),
        (document([node(0), node(1), node(1)]), "two machines have the name"),
        (document([node(0), node(1), node(2)], members=1), "node1 have no address on the LAN"),
        (of_the_paper().replace("10.10.1.2", "10.10.1.1"), "two machines have the address"),
        (of_the_paper().replace("10.10.1.2", "10.10.2.2"), "several networks"),
        (of_the_paper().replace("10.10.1.2", "10.10.1.2222"), "no IPv4 address"),
        (of_the_paper().replace('netmask="255.255.255.0"', 'netmask="255.0.255.0"'), "netmask"),
        (of_the_paper().replace('client_id="node1"', 'client_id="ctl"'), "not node0, node1"),
        (of_the_paper().replace(f"node1.{DOMAIN}", "c220g1-030611.wisc.cloudlab.us"), "not the name of its place"),
        (of_the_paper().replace("</rspec>", '<link client_id="l2"/></rspec>'), "2 links"),
        (document([node(number, users=()) for number in range(3)], members=3), "no login"),
        (of_the_paper().replace("<host ", "<hosts "), "no name yet"),
        (of_the_paper().replace('port="22"', 'port="0"'), "port"),
        (of_the_paper().replace(' ipv4="128.105.145.15"', ""), "no address at all"),
    ],
)  # fmt: skip
def test_a_manifest_that_cannot_be_one_is_refused_with_what_is_wrong(write: Write, checkout: Path, content: str | bytes, said: str) -> None:
    error = refused(write, content)

    assert (error.code, error.exit_code) == ("manifest.content", 2)
    assert said in error.found
    assert error.next_step
    assert not (checkout / "inventory" / "trial").exists()


@pytest.mark.parametrize(
    "hostile", ["{{ lookup('pipe', 'id') }}", "-oProxyCommand=id", "a b", "x}, ansible_connection: local, y: {", "node0\nnode1", "ä.example"]
)
@pytest.mark.parametrize("place", [f"node0.{DOMAIN}", "c220g1-030610.wisc.cloudlab.us", "alice", '"c220g1"'])
def test_text_that_could_be_read_as_a_template_or_an_option_is_refused(write: Write, place: str, hostile: str) -> None:
    """What the manifest says ends in files that Ansible and ssh read."""
    escaped = hostile.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;").replace("\n", "&#10;")

    error = refused(write, of_the_paper().replace(place, f'"{escaped}"' if place.startswith('"') else escaped), user=None)

    assert error.code.startswith("manifest.")


def test_a_file_that_is_not_there_is_named(checkout: Path) -> None:
    with pytest.raises(ExperimentError) as error:
        inventory.write(str(checkout / "nothing.xml"), None, None, force=False, checkout=checkout)

    assert error.value.code == "manifest.file"
    assert "nothing.xml" in error.value.attempted


def test_what_was_written_is_plain_yaml(write: Write, checkout: Path) -> None:
    written = write(of_the_paper())

    for path in written.files:
        content = (checkout / path).read_text(encoding="utf-8")
        assert inventory.is_ours(content)
        assert isinstance(yaml.safe_load(content), dict)
