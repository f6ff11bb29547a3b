"""TLS that ends in the guard: clients that log no keys, of which the policy's `tls: terminate` opens the connections.

Go and Java gate, where they are here; Python, Node.js and curl show that the same environment serves all.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from .interpreters import GATING, pythons, with_clients
from .lab import ROOT, Lab, Sandbox, go_program
from .servers import HTTPS_PORT, PROGRAMS, Https

POLICY = """\
schema: kalium/v1
app: {app}
version: 1
mode: {mode}
on_unavailable: {{app_edge: deny, deadline_ms: 60000}}
peers:
  web: {{host: web.test, port: 4443, protocol: https}}
  strange: {{host: strange.test, port: 4443, protocol: https}}
entries: [caller]
functions:
  caller:
    tls: {tls}
    messages:
      - repeat:
          - choice:
              - {{https: GET, peer: web, path: /allowed}}
              - {{https: GET, peer: strange, path: /allowed}}
        at_most: 256
"""
NAMES = {"web.test": "10.199.0.3", "strange.test": "10.199.0.4"}
TERMINATE = {"kalium.io/tls": "terminate"}


@dataclass(frozen=True)
class Client:
    """A program that is given a URL; `gating` ones have to work under `tls: terminate`."""

    name: str
    argv: tuple[str, ...]
    keys: bool = True  # it logs them where it is asked to


def java() -> Client | None:
    program = shutil.which("java")
    if program is None:
        return None
    memory = ("-Xmx96m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
    return Client("Java", (os.path.realpath(program), *memory, str(PROGRAMS / "JavaClient.java")), keys=False)


class Site:
    """The lab, its servers, and a Go client that was built for it."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self.lab, self.stack = lab, stack
        h2 = with_clients(next(version for version in (*GATING, *pythons()) if version in pythons()))
        addresses = {name: lab.world.address(int(address.rsplit(".", maxsplit=1)[1])) for name, address in NAMES.items()}
        self.web = stack.enter_context(Https(lab, addresses["web.test"], "web.test", python=h2))
        self.strange = stack.enter_context(Https(lab, addresses["strange.test"], "elsewhere.test", python=h2))
        self.clients = {client.name: client for client in self._clients(h2)}
        self._sandboxes: dict[tuple[str, bool], Sandbox] = {}

    def _clients(self, python: Path) -> Iterator[Client]:
        binary = self.lab.folder / "go_client"
        environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GO111MODULE": "off"}
        command = [go_program(), "build", "-trimpath", "-o", str(binary), str(PROGRAMS / "go_client.go")]
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        yield Client("Go", (str(binary),), keys=False)
        if program := java():
            yield program
        script = str(PROGRAMS / "python_client.py")
        for library in ("http_client", "requests", "httpx_http2", "aiohttp"):
            yield Client(f"Python {library}", (str(python), script, library))
        yield Client("curl", ("curl", "-sS", "-m", "60"))

    def sandbox(self, app: str, annotated: bool = True) -> Sandbox:
        """A sandbox of `app`, the same for all tests."""
        key = (app, annotated)
        if key not in self._sandboxes:
            env = {} if annotated else {"SSL_CERT_FILE": str(self.lab.folder / "pki" / "ca.crt")}
            made = self.lab.sandbox(app, "caller", annotations=TERMINATE if annotated else {}, env=env)
            self._sandboxes[key] = self.stack.enter_context(made)
            # In mode off the guard answers no names.
            self._sandboxes[key].name_peers()
        return self._sandboxes[key]


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    apps = {
        "ending": POLICY.format(app="ending", mode="enforce", tls="terminate"),
        "auditing": POLICY.format(app="auditing", mode="audit", tls="terminate"),
        "resting": POLICY.format(app="resting", mode="off", tls="terminate"),
        "opening": POLICY.format(app="opening", mode="enforce", tls="open"),
    }
    with Lab(apps, NAMES) as lab, ExitStack() as stack:
        yield Site(lab, stack)


def url(path: str, host: str = "web.test") -> str:
    return f"https://{host}:{HTTPS_PORT}/{path}"


NAMED = ("Go", "Java", "Python http_client", "Python requests", "Python httpx_http2", "Python aiohttp", "curl")


def named(site: Site, name: str) -> Client:
    if name not in site.clients:
        pytest.skip(f"no {name} on this machine")
    return site.clients[name]


@pytest.mark.parametrize("name", NAMED)
def test_the_allowed_request_arrives_and_the_refused_one_does_not(site: Site, name: str) -> None:
    client, sandbox = named(site, name), site.sandbox("ending")
    sandbox.verdicts()
    site.web.requests()

    allowed = sandbox.program(*client.argv, url("allowed"), seconds=120)
    assert (allowed["code"], allowed["stdout"].strip()) == (0, "ok"), (allowed, sandbox.verdicts())
    assert sandbox.denials() == []
    assert [request["path"] for request in site.web.requests()] == ["/allowed"]

    refused = sandbox.program(*client.argv, url("refused"), seconds=120)
    assert refused["code"] != 0
    assert sandbox.denials()[0] == "https not_in_policy"
    assert site.web.requests() == []


@pytest.mark.parametrize("name", NAMED)
def test_a_server_with_anothers_certificate_hears_nothing(site: Site, name: str) -> None:
    client, sandbox = named(site, name), site.sandbox("ending")
    sandbox.verdicts()

    done = sandbox.program(*client.argv, url("allowed", "strange.test"), seconds=120)

    assert done["code"] != 0
    assert sandbox.denials()[0] == "https unknown_peer"
    assert site.strange.requests() == []


@pytest.mark.parametrize("name", ["Go", "Java"])
def test_without_it_the_verdict_names_the_way_out(site: Site, name: str) -> None:
    client, sandbox = named(site, name), site.sandbox("opening", annotated=False)
    trust = {"JAVA_TOOL_OPTIONS": f"-Djavax.net.ssl.trustStore={keystore(site)}"} if name == "Java" else {}
    sandbox.verdicts()
    site.web.requests()

    done = sandbox.program(*client.argv, url("allowed"), env=trust, seconds=120)

    denied = [verdict for verdict in sandbox.verdicts() if not verdict["allowed"]]
    assert done["code"] != 0
    assert denied[0]["reason"] == "no_key"
    assert "the program logs no keys: `tls: terminate` for this function opens it" in denied[0]["message"]
    assert site.web.requests() == []


def keystore(site: Site) -> Path:
    """The lab's CA as Java reads it."""
    path = site.lab.folder / "ca.jks"
    if not path.exists():
        command = ["keytool", "-importcert", "-noprompt", "-alias", "ca", "-file", str(site.lab.folder / "pki" / "ca.crt")]
        subprocess.run([*command, "-storetype", "JKS", "-keystore", str(path), "-storepass", "changeit"], check=True, capture_output=True)
    return path


def test_an_annotation_without_the_policy_fails_closed_and_says_so(site: Site) -> None:
    sandbox = site.sandbox("opening", annotated=True)
    sandbox.verdicts()

    done = sandbox.program(*site.clients["Go"].argv, url("allowed"))

    denied = [verdict for verdict in sandbox.verdicts() if not verdict["allowed"]]
    assert done["code"] != 0
    assert denied[0]["reason"] == "no_key"
    assert denied[0]["message"].endswith("the bundle's annotation kalium.io/tls says so, and the policy does not")
    assert site.web.requests() == []


def test_the_policy_without_an_annotation_fails_closed_and_says_so(site: Site) -> None:
    sandbox = site.sandbox("ending", annotated=False)
    sandbox.verdicts()

    done = sandbox.program(*site.clients["Go"].argv, url("allowed"))

    denied = [verdict for verdict in sandbox.verdicts() if not verdict["allowed"]]
    assert done["code"] != 0
    assert denied[0]["reason"] == "policy_mismatch"
    assert "annotation kalium.io/tls: terminate" in denied[0]["message"]
    assert site.web.requests() == []


def test_audit_marks_and_passes(site: Site) -> None:
    sandbox = site.sandbox("auditing")
    sandbox.verdicts()
    site.web.requests()

    for path in ("allowed", "refused"):
        assert sandbox.program(*site.clients["Go"].argv, url(path))["stdout"].strip() == "ok"

    assert sandbox.denials() == ["https not_in_policy"]
    assert [request["path"] for request in site.web.requests()] == ["/allowed", "/refused"]


def test_off_passes_and_programs_trust_the_server_itself(site: Site) -> None:
    sandbox = site.sandbox("resting")
    for name in ("Go", "Python http_client"):
        assert sandbox.program(*site.clients[name].argv, url("refused"))["stdout"].strip() == "ok"


def test_a_denied_write_resets_the_connection(site: Site) -> None:
    """The bytes are judged behind the write that brought them, so its error comes from the next call, and is not EPERM."""
    code = f"""
import errno, os, socket, ssl
connection = ssl.create_default_context().wrap_socket(socket.create_connection(("web.test", {HTTPS_PORT})), server_hostname="web.test")
below = socket.socket(fileno=os.dup(connection.fileno()))  # Python's ssl tells a reset from an end of file to nobody
connection.sendall(b"GET /refused HTTP/1.1\\r\\nHost: web.test:{HTTPS_PORT}\\r\\n\\r\\n")
try:
    result = below.recv(1).decode("latin-1")
except OSError as error:
    result = errno.errorcode.get(error.errno, str(error))
"""
    assert site.sandbox("ending").python(code)["result"] == "ECONNRESET"


def test_what_it_costs_for_each_connection(site: Site) -> None:
    """Figures, printed: a connection with one request, ended in the guard and passed unseen, in turns; the best median of a few."""
    rounds, count = int(os.environ.get("KALIUM_TERMINATE_ROUNDS", "2")), 40
    times: dict[str, list[int]] = {"ending": [], "resting": []}
    for _ in range(rounds):
        for app, medians in times.items():
            sandbox = site.sandbox(app)
            done = sandbox.program(*site.clients["Go"].argv, url("allowed"), str(count))
            assert done["code"] == 0, (done, sandbox.verdicts()[-1:])
            medians.append(int(done["stdout"]))
    ending, resting = (min(medians) for medians in times.values())
    print(f"\na connection and one request: {ending} us ended in the guard, {resting} us in mode off")
    assert ending < 1_000_000
