"""The load generator runs on a client host over SSH: a real sshd of this test's own, on loopback, with strict host keys.

It needs no site: the requests go to a small HTTP server of the test.
"""

from __future__ import annotations

import getpass
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from experiments import client
from experiments.client import Series
from experiments.errors import ExperimentError
from experiments.site import Host

SSHD_SECONDS_MAX = 20.0


class Answering(BaseHTTPRequestHandler):
    """Answers every POST with its own body and remembers who asked; a path with `broken` is answered with 500."""

    seen: list[tuple[str, str]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.seen.append((self.path, self.headers["X-Call-Id"]))
        self.send_response(500 if "broken" in self.path else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the samples are the log."""


@pytest.fixture
def server() -> Iterator[str]:
    """The URL of the fake gateway."""
    Answering.seen.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}"
        http.shutdown()
        thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_key(path: Path) -> str:
    """A fresh key pair; the result is the public key's type and data."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True, timeout=30)
    return path.with_suffix(".pub").read_text(encoding="utf-8").strip()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A client host reached through an sshd that only this test knows: own port, own host key, one authorized key."""
    sshd = shutil.which("sshd") or "/usr/sbin/sshd"
    assert Path(sshd).is_file(), "sshd is missing: apt-get install openssh-server"
    tmp_path.chmod(0o700)
    host_key, user_key, port = make_key(tmp_path / "host_key"), make_key(tmp_path / "user_key"), free_port()
    (tmp_path / "authorized_keys").write_text(user_key + "\n", encoding="utf-8")
    (tmp_path / "known_hosts").write_text(f"[127.0.0.1]:{port} {host_key}\n", encoding="utf-8")
    (tmp_path / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {tmp_path}/host_key\nAuthorizedKeysFile {tmp_path}/authorized_keys\nPidFile none\n"
        # pytest's folders stand in /tmp, which is everybody's; the key file itself is this user's alone.
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
        "Subsystem sftp internal-sftp\n",
        encoding="utf-8",
    )
    if getpass.getuser() == "root":
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd started by root wants it for its privilege separation
    process = subprocess.Popen([sshd, "-D", "-e", "-f", str(tmp_path / "sshd_config")], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + SSHD_SECONDS_MAX
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline, "sshd does not listen"
                time.sleep(0.05)
        yield Host("client", "ssh", "127.0.0.1", port, getpass.getuser(), str(tmp_path / "user_key"), str(tmp_path / "known_hosts"))
    finally:
        process.terminate()
        process.wait(SSHD_SECONDS_MAX)


def series(url: str, *, requests: int = 3) -> Series:
    return Series("entry", "gateway", url, {"answer": {"is": [42]}}, [(("answer", "is", 0), 42)], requests, True, "call")


def test_requests_are_sent_from_the_client_host_and_every_sample_comes_back(host: Host, server: str) -> None:
    """Program, plan and samples travel over SSH; the first sample is cold, the rest warm."""
    samples = client.generate(host, [series(f"{server}/function/a"), series(f"{server}/function/b", requests=2)], seconds_max=60.0)

    assert [(sample.seq, sample.status, sample.warm, sample.problem) for sample in samples] == [
        (0, 200, False, ""), (1, 200, True, ""), (2, 200, True, ""), (0, 200, False, ""), (1, 200, True, ""),
    ]  # fmt: skip
    assert all(0 < sample.seconds < 60 for sample in samples)
    assert Answering.seen == [
        ("/function/a", "call-0"), ("/function/a", "call-1"), ("/function/a", "call-2"), ("/function/b", "call-0"), ("/function/b", "call-1"),
    ]  # fmt: skip


def test_a_wrong_answer_ends_the_plan_and_is_told(host: Host, server: str) -> None:
    samples = client.generate(host, [series(f"{server}/broken"), series(f"{server}/never")], seconds_max=60.0)

    assert [(sample.status, sample.problem[:11]) for sample in samples] == [(500, "status 500:")]
    assert len(Answering.seen) == 1


def test_nothing_of_the_program_stays_on_the_client_host(host: Host, server: str) -> None:
    before = set(Path("/tmp").glob("*/loadgen.py"))

    client.generate(host, [series(server)], seconds_max=60.0)

    assert set(Path("/tmp").glob("*/loadgen.py")) == before


def test_a_host_key_that_is_not_known_is_refused(host: Host, server: str, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("", encoding="utf-8")

    with pytest.raises(ExperimentError, match="not found in known_hosts"):
        client.generate(replace(host, known_hosts=str(tmp_path / "empty")), [series(server)], seconds_max=60.0)

    assert Answering.seen == []


def test_a_host_key_that_changed_is_refused(host: Host, server: str, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other_key")
    (tmp_path / "other").write_text(f"[127.0.0.1]:{host.port} {other}\n", encoding="utf-8")

    with pytest.raises(ExperimentError, match="does not match"):
        client.generate(replace(host, known_hosts=str(tmp_path / "other")), [series(server)], seconds_max=60.0)

    assert Answering.seen == []


def test_the_same_program_runs_as_a_process_on_a_local_site(server: str) -> None:
    samples = client.generate(Host("localhost", "local"), [series(server)], seconds_max=60.0)

    assert [sample.status for sample in samples] == [200, 200, 200]
    assert json.dumps([sample.warm for sample in samples]) == "[false, true, true]"
