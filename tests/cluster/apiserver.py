"""A Kubernetes API server with an etcd, as two plain processes on loopback: what admission and rights need, and no node."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kalium.pki.authority import Identity, Role, issue, new_ca

PROGRAMS = ("etcd", "kube-apiserver", "kubectl")
READY_SECONDS_MAX = 60.0
STOP_SECONDS_MAX = 20.0
COMMAND_SECONDS_MAX = 30.0


@dataclass(frozen=True)
class Answer:
    """What kubectl came to."""

    status: int
    text: str


class Cluster:
    """An API server, and kubectl as any of its users."""

    def __init__(self, programs: Path, folder: Path, server: str, authority: Identity) -> None:
        self._programs, self._folder, self._server, self._authority = programs, folder, server, authority

    def kubectl(self, *words: str, user: str = "admin", group: str = "system:masters", stdin: Any = None) -> Answer:
        """Run kubectl; `stdin` is text, or an object that it gets as JSON."""
        text = stdin if stdin is None or isinstance(stdin, str) else json.dumps(stdin)
        done = subprocess.run(
            [self._programs / "kubectl", "--kubeconfig", self.kubeconfig(user, group), *words],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_SECONDS_MAX,
            env={"HOME": str(self._folder), "PATH": os.environ["PATH"]},
        )
        return Answer(done.returncode, done.stdout + done.stderr)

    def kubeconfig(self, user: str, group: str) -> Path:
        """A kubeconfig with a certificate of `user` in `group`."""
        path = self._folder / f"{user.replace(':', '-')}.conf"
        if path.exists():
            return path
        identity = _member(self._authority, user, group)
        files = {"certificate": path.with_suffix(".crt"), "key": path.with_suffix(".key")}
        files["certificate"].write_bytes(identity.certificate_pem())
        files["key"].write_bytes(identity.key_pem())
        cluster = {"server": self._server, "certificate-authority": str(self._folder / "ca.crt")}
        credentials = {"client-certificate": str(files["certificate"]), "client-key": str(files["key"])}
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "k", "user": "u"}}],
            "clusters": [{"name": "k", "cluster": cluster}],
            "users": [{"name": "u", "user": credentials}],
        }
        path.write_text(json.dumps(content))
        return path


def _member(authority: Identity, user: str, group: str) -> Identity:
    """A certificate whose organization is a group, as kubeadm makes them."""
    made = issue(authority, "client", ("DNS:client",), role=Role.CLIENT, days=1, now=datetime.now(timezone.utc))
    builder = x509.CertificateBuilder(
        issuer_name=authority.certificate.subject,
        subject_name=x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, group), x509.NameAttribute(NameOID.COMMON_NAME, user)]),
        public_key=made.key.public_key(),
        serial_number=x509.random_serial_number(),
        not_valid_before=made.certificate.not_valid_before_utc,
        not_valid_after=made.certificate.not_valid_after_utc,
    ).add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
    assert isinstance(authority.key, ec.EllipticCurvePrivateKey)
    return Identity(builder.sign(authority.key, hashes.SHA256()), made.key)


@contextmanager
def running(programs: Path, folder: Path) -> Iterator[Cluster]:
    """Start both, and end both, whatever happens."""
    authority = new_ca(now=datetime.now(timezone.utc))
    server = issue(authority, "server", ("IP:127.0.0.1", "DNS:kubernetes"), role=Role.SERVER, days=1, now=datetime.now(timezone.utc))
    for name, content in (("ca.crt", authority.certificate_pem()), ("server.crt", server.certificate_pem()), ("server.key", server.key_pem())):
        (folder / name).write_bytes(content)
    clients, peers, port = _free_ports(3)
    etcd, api = f"http://127.0.0.1:{clients}", f"https://127.0.0.1:{port}"
    peer = f"http://127.0.0.1:{peers}"
    etcd_flags = [
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls={etcd}",
        f"--advertise-client-urls={etcd}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=default={peer}",
        "--unsafe-no-fsync",
    ]
    api_flags = [
        f"--etcd-servers={etcd}",
        f"--secure-port={port}",
        "--bind-address=127.0.0.1",
        "--endpoint-reconciler-type=none",
        "--service-cluster-ip-range=10.96.0.0/16",
        f"--cert-dir={folder}",
        f"--tls-cert-file={folder / 'server.crt'}",
        f"--tls-private-key-file={folder / 'server.key'}",
        f"--client-ca-file={folder / 'ca.crt'}",
        f"--service-account-key-file={folder / 'server.crt'}",
        f"--service-account-signing-key-file={folder / 'server.key'}",
        f"--service-account-issuer={api}",
        "--authorization-mode=RBAC",
        "--anonymous-auth=false",
        "--allow-privileged",  # as kubeadm says
        "--disable-admission-plugins=ServiceAccount",  # nobody makes accounts here, and pods of functions have none
    ]
    with ExitStack() as stack:
        stack.enter_context(_process(folder / "etcd.log", programs / "etcd", *etcd_flags))
        server_process = stack.enter_context(_process(folder / "apiserver.log", programs / "kube-apiserver", *api_flags))
        cluster = Cluster(programs, folder, api, authority)
        deadline = time.monotonic() + READY_SECONDS_MAX
        while cluster.kubectl("get", "--raw", "/readyz").text != "ok":
            log = (folder / "apiserver.log").read_text(errors="replace")[-3000:]
            assert server_process.poll() is None and time.monotonic() < deadline, log
            time.sleep(0.2)
        yield cluster


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [listener.getsockname()[1] for listener in listeners]


@contextmanager
def _process(log: Path, program: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as file, subprocess.Popen([program, *words], stdin=subprocess.DEVNULL, stdout=file, stderr=file) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
