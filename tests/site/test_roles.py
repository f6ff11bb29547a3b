"""The roles set up a real remote host: ordinary user with sudo, systemd, the distribution's Python, a host key known beforehand.

The services are asked from this side of the link, as other hosts of a site ask them, with keys and roots read from the host over SSH.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import shlex
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import pymysql
import pytest
import yaml
from conftest import ROOT, Ansible, Outcome
from nspawn import TEST_ADDRESS, host_running
from standalone import make_standalone
from throwaway.footprint import footprint
from throwaway.host import Host, make_key

PLAYBOOK = "playbooks/services.yml"
NODE = Path(__file__).with_name("node.yml")
GROUPS_OF_THE_HOST = ("function_nodes", "controller", "images", "database")
IMAGE_BYTES = 122_620
IMAGE_NAME = "images.kalium.test"
UNITS = (
    "kalium-controller",
    "kalium-agent",
    "kalium-imageserver",
    "kalium-mailsink",
    "kalium-database",
    "kalium-pebble",
    "kalium-challtestsrv",
    "kalium-pki",
)
# What `systemd-analyze security` makes of each, from 0 (nothing is exposed) to 10; a unit without a line of its own about it has 9.6.
EXPOSURE_MAX = 2.0
# The application's user and tables, as the benchmark publishes them.
SCHEMA, USER, PASSWORD = "helloRetail", "abc", "xyz"
TABLES = 8
ANSWER_S_MAX = 60


@dataclass(frozen=True)
class Standing:
    """A host after the first run of the playbook."""

    host: Host
    folder: Path
    inventory: Path
    artifacts: Path
    before: frozenset[str]
    first: Outcome

    def file(self, path: str) -> Path:
        """A copy of a file that only root may read there."""
        copy = self.folder / Path(path).name
        answer = self.host.run("sudo cat", path)
        assert answer.returncode == 0, answer.stderr
        copy.write_text(answer.stdout, encoding="utf-8")
        return copy


def inventory_of(host: Host, artifacts: Path) -> dict[str, object]:
    """The site's inventory: this machine builds, the host is everything else; functions would run on Kubernetes, so no engine is set up."""
    form = {
        "kalium_site": "nspawn",
        "kalium_engine": "kubernetes",
        "kalium_service_manager": "systemd",
        # As in inventory/cloudlab: an agent on another host finds the controller, and an interpreter of the site's own runs the services.
        "kalium_controller_address": "0.0.0.0",
        "kalium_python_source": "standalone",
        # containerd is the distribution's; the host is a container, which may not do all that a node does.
        "kalium_containerd_source": "distribution",
        "kalium_containerd_restrict_oom_score": True,
        "kalium_containerd_apparmor": False,
        "kalium_node_swap": "keep",
        "kalium_artifact_folder": str(artifacts),
        "kalium_artifact_digests": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in artifacts.iterdir()},
    }
    empty: dict[str, object] = {"hosts": {}}
    return {
        "all": {
            "hosts": {
                host.name: {**host.inventory_variables(), "kalium_layout_address": host.address},
                "localhost": {"ansible_connection": "local", "kalium_layout_address": TEST_ADDRESS},
            },
            "vars": form,
            "children": {
                "build": {"hosts": {"localhost": {}}},
                **{group: {"hosts": {host.name: {}}} for group in GROUPS_OF_THE_HOST},
                "kube_control": {"hosts": {host.name: {}}},
                "client": empty,
            },
        }
    }


def archive_of_the_interpreter() -> str:
    """The name under which the pinned interpreter is looked for."""
    pins = yaml.safe_load((ROOT / "roles/kalium_versions/defaults/main.yml").read_text(encoding="utf-8"))
    return Path(pins["kalium_versions_python"]["url"]).name


@pytest.fixture(scope="module")
def standing(ansible: Ansible) -> Iterator[Standing]:
    with tempfile.TemporaryDirectory(prefix="kalium-site-") as name:
        folder = Path(name)
        with host_running(folder) as host:
            inventory, artifacts = folder / "hosts.yml", folder / "artifacts"
            artifacts.mkdir()
            make_standalone(archive_of_the_interpreter(), artifacts)
            inventory.write_text(yaml.safe_dump(inventory_of(host, artifacts)), encoding="utf-8")
            before = footprint(host)
            for playbook in ("pki", "store", "controller"):  # what they would do is told before anything is there
                rehearsed = ansible.play(f"playbooks/{playbook}.yml", inventory, "--check", "--diff", "-e", "kalium_controller_store=redis")
                assert rehearsed.status == 0, rehearsed.end()
            assert footprint(host) == before
            first = ansible.play(PLAYBOOK, inventory)
            assert first.status == 0, first.end()
            yield Standing(host, folder, inventory, artifacts, before, first)
            ansible.close()


def status_of_the_controller(standing: Standing, **tls: Path) -> subprocess.CompletedProcess[str]:
    """`kalium controller status`, run on this machine against the host's port 5000."""
    config = {
        "listen": {"host": standing.host.address, "port": 5000},
        "tls": {name: str(path) for name, path in tls.items()},
        "operator_key": str(standing.file("/etc/kalium/operator/operator.pub")),
        "policies_dir": str(standing.folder),
    }
    path = standing.folder / "controller.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    command = [sys.executable, "-m", "kalium.cli.main", "controller", "status", "--config", str(path), "--output", "json"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def image_over_https(standing: Standing, context: ssl.SSLContext) -> http.client.HTTPResponse:
    """GET /image.jpg from the host, which is asked for by the name in its certificate."""
    address, port = standing.host.address, 4443

    class ByName(http.client.HTTPSConnection):
        """Connects to the host's address whatever the name leads to: nobody's name server knows it."""

        def connect(self) -> None:
            http.client.HTTPConnection.connect(self)
            self.sock = context.wrap_socket(self.sock, server_hostname=IMAGE_NAME)

    connection = ByName(address, port, timeout=ANSWER_S_MAX)
    connection.request("GET", "/image.jpg", headers={"Host": f"{IMAGE_NAME}:{port}"})
    return connection.getresponse()


def tables_seen_by_the_application(standing: Standing) -> int:
    connected = pymysql.connect(host=standing.host.address, port=3306, connect_timeout=ANSWER_S_MAX, user=USER, password=PASSWORD, database=SCHEMA)
    with closing(connected) as connection, connection.cursor() as cursor:
        cursor.execute("select count(*) from information_schema.tables where table_schema = %s", (SCHEMA,))
        row = cursor.fetchone()
    assert row is not None
    return int(row[0])


def test_the_first_run_sets_the_host_up_and_changes_it(standing: Standing) -> None:
    counts = standing.first.counts(standing.host.name)

    assert counts["failed"] == counts["unreachable"] == 0
    assert counts["changed"] > 0


def test_every_service_is_a_unit_of_systemd_and_active(standing: Standing) -> None:
    asked = standing.host.run("systemctl is-active", *UNITS)

    assert asked.stdout.split() == ["active"] * len(UNITS), standing.host.run("systemctl --no-pager --lines=5 status", *UNITS).stdout


def test_every_unit_may_do_little_beside_its_work(standing: Standing) -> None:
    asked = standing.host.run(f"for unit in {' '.join(UNITS)}; do systemd-analyze --no-pager security $unit.service | tail -n 1; done")

    found = {unit: float(line.rpartition(":")[0].rpartition(":")[2].split()[0]) for unit, line in zip(UNITS, asked.stdout.splitlines(), strict=True)}
    assert max(found.values()) <= EXPOSURE_MAX, found


def test_no_daemon_has_a_privilege_of_root_or_reads_the_keys_that_sign(standing: Standing) -> None:
    """Also those that run as root: the agent, because its sockets are for root's processes, and the renewal, which gives a key to its owner."""
    for unit in UNITS:
        process = f"$(systemctl show --property MainPID --value {unit})"
        status = dict(line.split(":\t", 1) for line in standing.host.run(f"cat /proc/{process}/status").stdout.splitlines() if ":\t" in line)
        chown, search, owner = 1 << 0, 1 << 2, 1 << 3  # linux/capability.h
        assert int(status["CapBnd"], 16) == (chown | search | owner if unit == "kalium-pki" else 0), unit
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2"), unit
        keys = ["/etc/kalium/operator/operator.key", *(["/etc/kalium/pki/ca.key"] if unit != "kalium-pki" else [])]
        # By a root with all privileges in the service's own view of the files, whose text outside is not empty.
        for key in keys:
            assert standing.host.run(f"sudo nsenter --mount --target {process} cat {key} 2>/dev/null").stdout == "", (unit, key)
            assert standing.host.run("sudo cat", key).stdout.startswith("-----BEGIN PRIVATE KEY-----"), key


def test_the_log_of_a_service_is_rotated_and_goes_on(standing: Standing) -> None:
    """By the rules that were written for it, with every unit's taken by logrotate; the next line stands at the beginning of the emptied file."""
    log = "/var/log/kalium/controller.log"
    before = standing.host.run("sudo cat", log).stdout
    rules = [f"/etc/logrotate.d/{unit}" for unit in UNITS]

    checked = standing.host.run("sudo logrotate --debug", *rules, "2>&1")
    rotated = standing.host.run("sudo logrotate --state /run/rotated --force /etc/logrotate.d/kalium-controller 2>&1")

    assert (checked.returncode, "error" in checked.stdout) == (0, False), checked.stdout
    assert (rotated.returncode, rotated.stdout) == (0, ""), rotated.stdout
    assert standing.host.run(f"sudo cat {log}.1").stdout.startswith(before)
    with socket.create_connection((standing.host.address, 5000)) as stranger:
        stranger.sendall(b"this is no handshake")
        assert stranger.recv(1024)[:1] in (b"", b"\x15"), "an alert of TLS, or the end"
    deadline = time.monotonic() + ANSWER_S_MAX
    while not (first := standing.host.run("sudo head -n 1", log).stdout) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert json.loads(first)["event"] == "connection_refused"


def test_the_controller_answers_who_has_a_certificate_of_the_site(standing: Standing) -> None:
    """STATUS over TLS from another machine; the node's agent is connected and the site's policies are served."""
    ca, cert, key = (standing.file(f"/etc/kalium/pki/{name}") for name in ("ca.crt", "agent.crt", "agent.key"))

    answer = status_of_the_controller(standing, ca=ca, cert=cert, key=key)

    assert answer.returncode == 0, answer.stderr
    status = json.loads(answer.stdout)
    assert status["agents"] == 1
    assert set(status["policies"]) == {"hello-retail", "hello-retail-audit", "hello-retail-strict", "e2"}


def test_the_controller_refuses_a_certificate_of_another_site(standing: Standing) -> None:
    """The certificate is right in everything but who signed it."""
    other = standing.folder / "other-pki"
    for words in (("init",), ("issue", "--role", "client", "--name", "agent")):
        made = [sys.executable, "-m", "kalium.cli.main", "pki", words[0], "--dir", str(other), *words[1:]]
        subprocess.run(made, cwd=ROOT, check=True, capture_output=True, timeout=60)

    answer = status_of_the_controller(standing, ca=standing.file("/etc/kalium/pki/ca.crt"), cert=other / "agent.crt", key=other / "agent.key")

    assert answer.returncode == 3, answer.stdout
    assert answer.stderr.startswith("error[controller."), answer.stderr


def test_the_image_comes_over_https_and_its_certificate_holds(standing: Standing) -> None:
    """Exactly the bytes of the benchmark, under the root of the ACME server that issued the certificate."""
    context = ssl.create_default_context(cafile=str(standing.file("/var/lib/kalium/www/roots.pem")))

    answer = image_over_https(standing, context)
    body = answer.read()

    assert answer.status == 200
    assert len(body) == IMAGE_BYTES
    assert body[:3] == b"\xff\xd8\xff"  # a JPEG file begins so


def test_the_images_certificate_does_not_hold_for_whom_it_is_a_stranger(standing: Standing) -> None:
    """Without the test's own root the same request fails: the one above really verified."""
    with pytest.raises(ssl.SSLCertVerificationError):
        image_over_https(standing, ssl.create_default_context())


def test_the_database_answers_the_applications_user(standing: Standing) -> None:
    assert tables_seen_by_the_application(standing) == TABLES


def test_both_runtimes_run_on_the_host_and_are_the_ones_built_here(standing: Standing) -> None:
    """Built on this machine, copied, and the same gVisor."""
    stock, guarded = (standing.host.run(f"/opt/kalium/bin/{name}", "--version") for name in ("runsc-stock", "runsc-kalium"))

    assert stock.returncode == guarded.returncode == 0, stock.stderr + guarded.stderr
    assert stock.stdout.splitlines()[0].startswith("runsc version ")
    assert guarded.stdout.splitlines()[0] == stock.stdout.splitlines()[0]


def test_the_hosts_own_python_is_still_the_only_one_on_its_path(standing: Standing) -> None:
    """The services' environment stands beside it, below /opt/kalium."""
    assert set(standing.host.run("which -a python3").stdout.split()) == {"/usr/bin/python3", "/bin/python3"}
    assert standing.host.run("dpkg --search $(realpath /usr/bin/python3)").stdout.startswith("python3.")


def test_services_run_under_the_interpreter_of_the_site(standing: Standing) -> None:
    """Not under the distribution's, whose modules Ansible uses: both programs are there, and the process says which it is."""
    for unit in ("kalium-controller", "kalium-imageserver", "kalium-mailsink"):
        program = standing.host.run(f"sudo readlink /proc/$(systemctl show --property MainPID --value {unit})/exe").stdout.strip()
        assert program.startswith("/opt/kalium/python/bin/python3"), (unit, program)


def test_the_database_runs_without_privilege_and_opens_to_the_site_alone(standing: Standing) -> None:
    owner = standing.host.run("ps -o user= -p $(systemctl show --property MainPID --value kalium-database)").stdout.strip()
    asked = f"select Host from mysql.global_priv where User = '{USER}' order by Host"  # noqa: S608  # the test's own words
    client = ("sudo", "mariadb", "--no-defaults", "--socket=/run/kalium/database/mysql.sock", "--batch", "--skip-column-names")
    granted = standing.host.run(*client, "--execute", shlex.quote(asked))

    assert owner.startswith("kalium-")
    assert granted.stdout.split() == ["10.138.0.1", "10.138.0.2", "10.217.0.0/255.255.0.0"], granted.stderr


def test_an_interpreter_of_another_digest_is_refused_and_the_one_that_is_there_stays(standing: Standing, ansible: Ansible) -> None:
    digests = json.dumps({"kalium_artifact_digests": {archive_of_the_interpreter(): "0" * 64}})

    refused = ansible.play("playbooks/python.yml", standing.inventory, "-e", digests)

    assert refused.status == 2, refused.end()
    assert "error[artifact.digest]: cannot install the services' Python: " in refused.text, refused.end()
    assert standing.host.run("/opt/kalium/python/bin/python3 --version").returncode == 0
    assert standing.host.run("systemctl is-active", *UNITS).stdout.split() == ["active"] * len(UNITS)


def test_private_keys_are_for_those_who_need_them(standing: Standing) -> None:
    """An ordinary user of the host reads neither the CA's key nor the one that signs policies."""
    for path in ("/etc/kalium/pki/ca.key", "/etc/kalium/operator/operator.key", "/etc/kalium/pki/agent.key"):
        assert standing.host.run("test -r", path).returncode == 1, path
        assert standing.host.run("sudo test -r", path).returncode == 0, path


def test_a_changed_host_key_is_refused_and_nothing_is_done(standing: Standing, ansible: Ansible) -> None:
    """An open connection of the first run must not carry this one."""
    ansible.close()
    strange = standing.folder / "strange_known_hosts"
    strange.write_text(f"{standing.host.address} {make_key(standing.folder / 'strange_key')}\n", encoding="utf-8")
    inventory = standing.folder / "strange.yml"
    inventory.write_text(yaml.safe_dump(inventory_of(replace(standing.host, known_hosts=strange), standing.artifacts)), encoding="utf-8")

    refused = ansible.play(PLAYBOOK, inventory)

    assert refused.status == 2, refused.end()
    assert "Host key verification failed" in refused.text
    assert f"error[preflight.unreachable]: cannot reach it on {standing.host.name}" in refused.text, refused.end()
    assert "known_hosts" in refused.text
    assert refused.changed_tasks() == []


def test_the_second_run_changes_nothing(standing: Standing, ansible: Ansible) -> None:
    second = ansible.play(PLAYBOOK, standing.inventory)

    assert second.status == 0, second.end()
    assert second.changed_tasks() == [], second.text
    assert {second.counts(host)["changed"] for host in (standing.host.name, "localhost")} == {0}


def test_a_rehearsal_finds_nothing_to_change(standing: Standing, ansible: Ansible) -> None:
    rehearsed = ansible.play(PLAYBOOK, standing.inventory, "--check", "--diff")

    assert rehearsed.status == 0, rehearsed.end()
    assert rehearsed.changed_tasks() == [], rehearsed.text


AGE = """
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path
from kalium.pki import authority, files
folder = Path("/etc/kalium/pki")
for name in ("controller", "agent"):
    path = folder / f"{name}.crt"
    certificate = files._certificates(path)[0]
    role, identity = authority.role_of(certificate)
    path.unlink()
    then = datetime.now(timezone.utc) - timedelta(days=5)
    files.issue(folder, name, authority.sans_of(certificate), role=role, identity=identity, days=7, now=then)
"""


def test_certificates_that_are_due_are_renewed_and_taken_without_a_restart(standing: Standing) -> None:
    """Both pairs of the CA's host, as if they had been issued five days ago; the controller shows the new one to whoever comes."""
    host = standing.host
    processes = "systemctl show --property MainPID --value kalium-controller kalium-agent"
    before = host.run(processes).stdout
    aged = host.run(f"sudo /opt/kalium/venv/bin/python -c {shlex.quote(AGE)}")
    assert aged.returncode == 0, aged.stderr
    due = [standing.file(f"/etc/kalium/pki/{name}.crt").read_text(encoding="utf-8") for name in ("controller", "agent")]

    host.run("sudo systemctl restart kalium-pki")

    deadline = time.monotonic() + ANSWER_S_MAX
    while any(standing.file(f"/etc/kalium/pki/{name}.crt").read_text(encoding="utf-8") in due for name in ("controller", "agent")):
        assert time.monotonic() < deadline, host.run("sudo tail /var/log/kalium/pki.log").stdout
        time.sleep(0.5)
    assert host.run("sudo stat --format %U:%a /etc/kalium/pki/controller.key /etc/kalium/pki/agent.key").stdout.split() == ["kalium:600", "root:600"]
    while ssl.get_server_certificate((host.address, 5000)) != standing.file("/etc/kalium/pki/controller.crt").read_text(encoding="utf-8"):
        assert time.monotonic() < deadline, host.run("sudo tail /var/log/kalium/controller.log").stdout
        time.sleep(0.5)
    ca, cert, key = (standing.file(f"/etc/kalium/pki/{name}") for name in ("ca.crt", "agent.crt", "agent.key"))
    assert json.loads(status_of_the_controller(standing, ca=ca, cert=cert, key=key).stdout)["agents"] == 1
    assert host.run(processes).stdout == before


def test_the_public_halves_of_the_keys_of_audit_logs_are_kept_beside_the_ca(standing: Standing, ansible: Ansible) -> None:
    """Who replaces log and key together is found by the next run, and by whoever verifies with what the CA's host has."""
    host = standing.host
    logs = "sudo ls /var/log/kalium/agent/audit.jsonl /var/log/kalium/controller/audit.jsonl"
    assert host.run(logs).returncode == 0
    for who in ("agent", "controller"):
        known = f"/etc/kalium/audit/known/{host.name}-{who}.pub"
        assert host.run(f"cmp {known} /etc/kalium/audit/{who}.pub").returncode == 0
        verified = host.run(f"sudo /opt/kalium/venv/bin/kalium audit verify /var/log/kalium/{who}/audit.jsonl --key {known}")
        assert verified.returncode == 0, verified.stdout + verified.stderr
    host.run("sudo mv /etc/kalium/audit/agent.key /root/a.key; sudo mv /etc/kalium/audit/agent.pub /root/a.pub")

    refused = ansible.play("playbooks/pki.yml", standing.inventory)

    host.run("sudo mv /root/a.key /etc/kalium/audit/agent.key; sudo mv /root/a.pub /etc/kalium/audit/agent.pub")
    assert refused.status == 2, refused.end()
    assert "error[pki.audit_key]: cannot take the key of the agent's audit log" in refused.text, refused.end()
    assert ansible.play("playbooks/pki.yml", standing.inventory).changed_tasks() == []


def test_controllers_can_share_their_calls_in_a_store(standing: Standing, ansible: Ansible) -> None:
    """One controller as one of several: it finds the store over TLS, by its own certificate and the password, and nobody else gets in."""
    host = standing.host
    for _ in range(2):
        plays = [
            ansible.play(f"playbooks/{name}.yml", standing.inventory, "-e", "kalium_controller_store=redis")
            for name in ("packages", "pki", "store", "controller")
        ]
        assert [play.status for play in plays] == [0] * 4, "\n".join(play.end() for play in plays if play.status)

    assert [play.changed_tasks() for play in plays] == [[]] * 4
    ca, cert, key = (standing.file(f"/etc/kalium/pki/{name}") for name in ("ca.crt", "agent.crt", "agent.key"))
    status = json.loads(status_of_the_controller(standing, ca=ca, cert=cert, key=key).stdout)
    assert (status["store"], status["agents"]) == ("redis", 1)
    asked = host.run("systemctl is-active kalium-store redis-server; systemd-analyze --no-pager security kalium-store.service | tail -n 1").stdout
    assert asked.splitlines()[:2] == ["active", "inactive"], asked
    assert float(asked.splitlines()[2].rpartition(":")[0].rpartition(":")[2].split()[0]) <= EXPOSURE_MAX, asked
    assert host.run("sudo ss -Hltn 'sport = :6390' | awk '{print $4}'").stdout.split() == ["127.0.0.1:6390"]
    client = "redis-cli -p 6390 --no-auth-warning"
    agent = "--tls --cacert /etc/kalium/pki/ca.crt --cert /etc/kalium/pki/agent.crt --key /etc/kalium/pki/agent.key"
    account = "--user kalium --pass $(cat /etc/kalium/store.password)"
    refusals = {
        f"{client} ping": "Error: ",
        f"{client} --tls --cacert /etc/kalium/pki/ca.crt ping": "Error: ",
        f"{client} {agent} ping": "NOAUTH",
        f"{client} {agent} --user kalium --pass guessed ping": "WRONGPASS",
        f"{client} {agent} {account} flushall": "NOPERM",
        f"{client} {agent} {account} config set maxmemory 1": "NOPERM",
        f"{client} {agent} {account} get other:key": "NOPERM",
    }
    for command, refusal in refusals.items():
        said = host.run(f"sudo sh -c {shlex.quote(command)} 2>&1").stdout
        assert refusal in said, (command, said)


def test_the_certificate_is_renewed_by_a_timer_that_leaves_a_good_one_alone(standing: Standing) -> None:
    certificate = "sudo sha256sum /var/lib/kalium/certs/live/kalium-images/fullchain.pem"
    before = standing.host.run(certificate).stdout

    renewed = standing.host.run("sudo systemctl start kalium-renewal.service; systemctl is-active kalium-renewal.timer")

    assert (renewed.returncode, renewed.stdout) == (0, "active\n"), standing.host.run("sudo journalctl -u kalium-renewal -n 20").stdout
    assert before and standing.host.run(certificate).stdout == before


def test_a_host_becomes_a_node_with_both_handlers_and_the_second_run_changes_nothing(standing: Standing, ansible: Ansible) -> None:
    first, second = ansible.play(NODE, standing.inventory), ansible.play(NODE, standing.inventory)

    assert (first.status, second.status) == (0, 0), first.end() + second.end()
    assert first.changed_tasks() != [] and second.changed_tasks() == [], second.changed_tasks()
    handlers = standing.host.run(
        "sudo containerd config dump | grep -o 'runtimes[.][a-z]*]'; sudo ctr version >/dev/null && systemctl is-active containerd"
    )
    assert set(handlers.stdout.split()) == {"runtimes.runc]", "runtimes.gvisor]", "runtimes.kalium]", "active"}, handlers
    settings = standing.host.run("cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/bridge/bridge-nf-call-iptables; getent hosts", standing.host.name)
    assert settings.stdout.split()[:3] == ["1", "1", standing.host.address], settings


def test_the_services_come_back_with_the_host(standing: Standing, ansible: Ansible) -> None:
    """After a restart of the host nobody has to run Ansible."""
    ansible.close()

    standing.host.reboot()

    active = standing.host.run("systemctl is-active", *UNITS)
    assert active.stdout.split() == ["active"] * len(UNITS), standing.host.run("systemctl --no-pager --lines=5 status", *UNITS).stdout
    assert tables_seen_by_the_application(standing) == TABLES


def test_reset_leaves_the_host_as_it_was_found(standing: Standing, ansible: Ansible) -> None:
    """Packages, accounts and files that the site brought are gone, and nothing else is. This machine, which builds, is left alone."""
    removed = ansible.play("reset.yml", standing.inventory, "--limit", standing.host.name)

    assert removed.status == 0, removed.end()
    after = footprint(standing.host)
    left, lost = sorted(after - standing.before), sorted(standing.before - after)
    assert (left, lost) == ([], []), "\n".join([*(f"left: {thing}" for thing in left), *(f"lost: {thing}" for thing in lost)])
