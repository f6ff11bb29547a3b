"""Unmodified TLS clients under the guard: the allowed request arrives, the refused one does not, at the server itself.

Gating: Python 3.10 and 3.13 with http.client, requests, httpx (sync, async, HTTP/2), aiohttp, PyMySQL and smtplib; Node.js 20 with
https, fetch and http2; curl. What else is here is tried, too, and reported in a table (KALIUM_CLIENTS_TABLE names a file for it).
With KALIUM_CLIENTS=all an absent gating client is a failure.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .interpreters import GATING, node, pythons, with_clients
from .lab import Lab, Sandbox
from .servers import HTTPS_PORT, MAIL_PORT, MYSQL_PORT, PROGRAMS, Https, Mail, MariaDB

POLICY = """\
schema: kalium/v1
app: clients
version: 1
mode: enforce
on_unavailable: {app_edge: deny, deadline_ms: 60000}
peers:
  tls13: {host: tls13.test, port: 4443, protocol: https}
  tls12: {host: tls12.test, port: 4443, protocol: https}
  chacha: {host: chacha.test, port: 4443, protocol: https}
  database: {host: database.test, port: 3306, protocol: mysql, schema: helloRetail}
  mail: {host: mail.test, port: 2525, protocol: smtp}
entries: [caller]
functions:
  caller:
    messages:
      - choice:
          - {https: GET, peer: tls13, path: /allowed}
          - {https: GET, peer: tls12, path: /allowed}
          - {https: GET, peer: chacha, path: /allowed}
          - {https: GET, peer: tls13, path: /allowed/info/refs, query: [service]}
          - {mysql: select, peer: database, read: [photos]}
          - {smtp: mail, peer: mail, to: [allowed@shop.test]}
"""
NAMES = {
    "tls13.test": "10.199.0.3",
    "tls12.test": "10.199.0.4",
    "chacha.test": "10.199.0.5",
    "database.test": "10.199.0.6",
    "mail.test": "10.199.0.7",
}
PYTHON_HTTPS = ("http_client", "urllib_request", "requests", "httpx_sync", "httpx_async", "httpx_http2", "aiohttp", "bare_context")
PYTHON_OTHER = ("pymysql", "connector_pure", "smtplib")
ALLOWED_STATEMENT, REFUSED_STATEMENT = "SELECT%20name%20FROM%20photos", "SELECT%20id%20FROM%20secrets"


@dataclass(frozen=True)
class Client:
    """A program, `argv` with {url} in it, and what it is to say when its request was answered; "" for one that wants another answer."""

    name: str
    argv: tuple[str, ...]
    protocol: str = "https"
    says: str = "ok"
    gating: bool = False
    hosts: tuple[str, ...] = ("tls13.test",)


def python_clients() -> Iterator[Client]:
    for version in sorted(pythons(), key=lambda text: tuple(map(int, text.split(".")))):
        script = str(PROGRAMS / "python_client.py")
        if tuple(map(int, version.split("."))) < (3, 10):  # older than the locked clients
            yield Client(f"Python {version} http_client", (str(pythons()[version]), script, "http_client", "{url}"))
            continue
        python, gating = str(with_clients(version)), version in GATING
        for library in PYTHON_HTTPS:
            hosts = ("tls13.test", "tls12.test", "chacha.test") if library in ("http_client", "aiohttp") and gating else ("tls13.test",)
            yield Client(f"Python {version} {library}", (python, script, library, "{url}"), gating=gating, hosts=hosts)
        yield Client(f"Python {version} pymysql", (python, script, "pymysql", "{url}"), "mysql", "one", gating, ("database.test",))
        yield Client(f"Python {version} mysql.connector", (python, script, "connector_pure", "{url}"), "mysql", "one", False, ("database.test",))
        yield Client(f"Python {version} smtplib", (python, script, "smtplib", "{url}"), "smtp", "ok", gating, ("mail.test",))


def clients() -> Iterator[Client]:
    yield from python_clients()
    script = str(PROGRAMS / "node_client.cjs")
    for library in ("https", "fetch", "http2", "worker"):
        hosts = ("tls13.test", "tls12.test", "chacha.test") if library == "https" else ("tls13.test",)
        yield Client(f"Node.js 20 {library}", (str(node()), script, library, "{url}"), gating=library != "worker", hosts=hosts)
    yield Client("curl HTTP/2", ("curl", "-sS", "-m", "60", "--http2", "{url}"), gating=True)
    yield Client("curl HTTP/1.1", ("curl", "-sS", "-m", "60", "--http1.1", "{url}"), gating=True, hosts=("tls13.test", "tls12.test", "chacha.test"))
    if shutil.which("wget"):
        yield Client("wget", ("wget", "-qO-", "-T", "60", "-t", "1", "--ca-certificate={ca}", "{url}"))
    if shutil.which("git"):
        yield Client("git", ("git", "ls-remote", "{url}"), says="")
    if shutil.which("mariadb"):
        yield Client(
            "MariaDB's own client",
            ("mariadb", "--ssl", "--ssl-ca={ca}", "-h{host}", "-uabc", "-pxyz", "helloRetail", "-e{statement}"),
            "mysql",
            "one",
            False,
            ("database.test",),
        )


class Site:
    """The lab with its servers, and one sandbox in which every client runs."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        self.lab = lab
        addresses = {name: lab.world.address(int(address.rsplit(".", maxsplit=1)[1])) for name, address in NAMES.items()}
        h2 = with_clients(next(version for version in (*GATING, *pythons()) if version in pythons()))
        self.https = {
            "tls13.test": stack.enter_context(Https(lab, addresses["tls13.test"], "tls13.test", python=h2, version="1.3")),
            "tls12.test": stack.enter_context(Https(lab, addresses["tls12.test"], "tls12.test", python=h2, version="1.2", ciphers="ECDHE+AESGCM")),
            "chacha.test": stack.enter_context(
                Https(lab, addresses["chacha.test"], "chacha.test", python=h2, version="1.2", ciphers="ECDHE+CHACHA20")
            ),
        }
        self._read: dict[str, int] = {}
        self.database = stack.enter_context(MariaDB(lab, addresses["database.test"], "database.test"))
        self.mail = stack.enter_context(Mail(lab, addresses["mail.test"], "mail.test"))
        self.ca = str(lab.folder / "pki" / "ca.crt")
        trust = dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO"), self.ca)
        self.sandbox: Sandbox = stack.enter_context(lab.sandbox("clients", "caller", env=trust))

    def run(self, client: Client, host: str, *, allowed: bool) -> dict[str, Any]:
        statement = ALLOWED_STATEMENT if allowed else REFUSED_STATEMENT
        url = {
            "https": f"https://{host}:{HTTPS_PORT}/{'allowed' if allowed else 'refused'}",
            "mysql": f"mysql://{host}:{MYSQL_PORT}/helloRetail?{statement}",
            "smtp": f"smtp://{host}:{MAIL_PORT}/{'allowed' if allowed else 'refused'}@shop.test",
        }[client.protocol]
        words = {"url": url, "ca": self.ca, "host": host, "statement": statement.replace("%20", " ")}
        return self.sandbox.program(*(word.format(**words) for word in client.argv), seconds=120)

    def arrived(self, client: Client, host: str) -> set[str]:
        """Which of `allowed` and `refused` the server itself saw since the last call."""
        if client.protocol == "https":
            seen = "".join(request["path"] for request in self.https[host].requests())
        else:
            whole = self.mail.mails() if client.protocol == "smtp" else self.database.queries()
            seen, self._read[client.protocol] = whole[self._read.get(client.protocol, 0) :], len(whole)
            seen = seen.replace("photos", "allowed").replace("secrets", "refused")
        return {word for word in ("allowed", "refused") if word in seen}


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    with Lab({"clients": POLICY}, NAMES) as lab, ExitStack() as stack:
        yield Site(lab, stack)


@pytest.fixture(scope="session")
def table() -> Iterator[list[dict[str, str]]]:
    rows: list[dict[str, str]] = []
    yield rows
    if path := os.environ.get("KALIUM_CLIENTS_TABLE"):
        Path(path).write_text(json.dumps(rows, indent=1), encoding="utf-8")


def test_every_gating_client_is_here() -> None:
    absent = [version for version in GATING if version not in pythons()]
    if absent and os.environ.get("KALIUM_CLIENTS") != "all":
        pytest.skip(f"no Python {' and '.join(absent)} on this machine; KALIUM_CLIENT_PYTHONS names others by path")
    assert not absent, f"install Python {' and '.join(absent)}, or name them in KALIUM_CLIENT_PYTHONS=/path/to/python3.10:..."


@pytest.mark.parametrize(
    ("client", "host"), [pytest.param(client, host, id=f"{client.name} {host}") for client in clients() for host in client.hosts]
)
def test_a_client_is_read_and_judged(site: Site, table: list[dict[str, str]], client: Client, host: str) -> None:
    site.sandbox.verdicts()
    site.arrived(client, host)
    allowed = site.run(client, host, allowed=True)
    denials = site.sandbox.denials()
    came = site.arrived(client, host)
    refused = site.run(client, host, allowed=False)
    refusals = site.sandbox.denials()
    leaked = site.arrived(client, host)
    works = "allowed" in came and not denials and client.says in allowed["stdout"] and (allowed["code"] == 0 or not client.says)
    outcome = "answered" if works else ", ".join(denials) or "failed"
    table.append({"client": client.name, "host": host, "gating": str(client.gating), "allowed": outcome, "refused": ", ".join(refusals)})

    # Whatever the client, what the policy refuses is not at the server, and a verdict says why.
    assert not leaked
    assert refused["code"] != 0
    assert refusals
    if client.gating:
        assert works, (allowed, denials)
        assert refusals[0].endswith("not_in_policy"), refusals
