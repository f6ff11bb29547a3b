"""A program that is configured for kernel TLS: its options are refused, so OpenSSL seals by itself and its records are opened."""

from __future__ import annotations

import ssl

import pytest

from .interpreters import GATING, pythons, with_clients
from .lab import PYTHON, Lab
from .servers import HTTPS_PORT, Https

POLICY = """\
schema: kalium/v1
app: kernel-tls
version: 1
mode: enforce
on_unavailable: {app_edge: deny, deadline_ms: 60000}
peers:
  server: {host: server.test, port: 4443, protocol: https}
entries: [caller]
functions:
  caller:
    messages:
      - {https: GET, peer: server, path: /allowed}
"""
CONFIGURATION = """\
openssl_conf = start
[start]
ssl_conf = sections
[sections]
system_default = system
[system]
Options = KTLS
"""
CODE = """\
import http.client, ssl, sys
context = ssl.create_default_context()
assert context.options & 1 << 3, "the configuration was not read"  # SSL_OP_ENABLE_KTLS
connection = http.client.HTTPSConnection("server.test", {port}, timeout=60, context=context)
connection.request("GET", sys.argv[1])
print(connection.getresponse().status)
"""


@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_a_program_that_wants_kernel_tls_seals_by_itself(version: str) -> None:
    if ssl.OPENSSL_VERSION_INFO < (3,):
        pytest.skip("OpenSSL before 3.0 has no kernel TLS")
    python = with_clients(next(version for version in (*GATING, *pythons()) if version in pythons()))
    with Lab({"kernel-tls": POLICY}, {"server.test": "10.199.0.3"}) as lab:
        configuration = lab.folder / "openssl.cnf"
        configuration.write_text(CONFIGURATION, encoding="utf-8")
        environment = {"OPENSSL_CONF": str(configuration), "SSL_CERT_FILE": str(lab.folder / "pki" / "ca.crt")}
        address = lab.world.address(3)
        with (
            Https(lab, address, "server.test", python=python, version=version) as server,
            lab.sandbox("kernel-tls", "caller", env=environment) as sandbox,
        ):
            allowed = sandbox.program(PYTHON, "-c", CODE.format(port=HTTPS_PORT), "/allowed")
            refused = sandbox.program(PYTHON, "-c", CODE.format(port=HTTPS_PORT), "/refused")

            assert allowed["code"] == 0, allowed
            assert allowed["stdout"] == "200\n"
            assert refused["code"] != 0
            assert [request["path"] for request in server.requests()] == ["/allowed"]
            assert sandbox.denials() == ["https not_in_policy"]
