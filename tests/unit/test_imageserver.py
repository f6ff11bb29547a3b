"""The image server over real TLS on loopback: what it serves, what it logs, and a certificate renewed while connections are open."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from loopback import InThread, free_port
from PIL import Image

from kalium.cli.main import main
from kalium.errors import EXIT_ENVIRONMENT, EXIT_NO, KaliumError
from kalium.imageserver import picture, server
from kalium.imageserver.certificate import Certificate
from kalium.imageserver.check import check
from kalium.imageserver.config import Config, load
from kalium.imageserver.server import ImageServer, file_at
from kalium.pki.authority import Identity, Role, issue, new_ca

NOW = datetime.now(timezone.utc)
AUTHORITY = new_ca(now=NOW)
WAIT_S = 20.0
IMAGE = bytes(range(256)) * 64


def identity(name: str, *, days: int = 10, since: datetime = NOW) -> Identity:
    return issue(AUTHORITY, name, ("DNS:images.kalium.test",), role=Role.SERVER, days=days, now=since)


def expired() -> Identity:
    return issue(new_ca(now=NOW - timedelta(days=30)), "images", ("DNS:images.kalium.test",), role=Role.SERVER, days=5, now=NOW - timedelta(days=20))


def replace_whole(path: Path, contents: bytes) -> None:
    """As certbot does: whoever reads the file meanwhile sees no half of it."""
    fresh = path.with_suffix(".new")
    fresh.write_bytes(contents)
    fresh.replace(path)


def put(config: Config, new: Identity) -> None:
    """Replace certificate and key, one after the other."""
    replace_whole(config.certificate, new.certificate_pem())
    replace_whole(config.key, new.key_pem())


@pytest.fixture
def config(tmp_path: Path) -> Config:
    root = tmp_path / "www"
    root.mkdir()
    (root / "image.jpg").write_bytes(IMAGE)
    (tmp_path / "secret").write_text("secret")
    made = Config("127.0.0.1", 0, tmp_path / "cert.pem", tmp_path / "key.pem", root, tmp_path / "access.jsonl")
    put(made, identity("images"))
    return made


class Running(InThread):
    """A server in a thread, and what it logged."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.access = io.StringIO()
        self.looked = 0  # how often the certificate's files were looked at

    def service(self) -> AbstractAsyncContextManager[tuple[str, int]]:
        made = ImageServer(self.config, access=server.log_to(self.access), log=server.log_to(self.log))
        reload = made.certificate.reload

        def counted() -> bool:
            self.looked += 1
            return reload()

        made.certificate.reload = counted  # type: ignore[method-assign]
        return made.running()

    def __enter__(self) -> Running:
        self.start()
        self.config = replace(self.config, port=self.port)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def requests(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.access.getvalue().splitlines()]

    def client(self, version: ssl.TLSVersion | None = None) -> http.client.HTTPSConnection:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        if version:
            context.minimum_version = context.maximum_version = version
        return http.client.HTTPSConnection("127.0.0.1", self.config.port, timeout=WAIT_S, context=context)

    def get(self, path: str, method: str = "GET", version: ssl.TLSVersion | None = None) -> tuple[int, bytes]:
        with contextlib.closing(self.client(version)) as client:
            client.request(method, path)
            answer = client.getresponse()
            return answer.status, answer.read()

    def certificate(self) -> bytes:
        """What a new connection is shown, in PEM."""
        with contextlib.closing(self.client()) as client:
            client.connect()
            return shown(client)


def shown(client: http.client.HTTPSConnection) -> bytes:
    assert isinstance(client.sock, ssl.SSLSocket)
    der = client.sock.getpeercert(binary_form=True)
    assert der is not None
    return ssl.DER_cert_to_PEM_cert(der).encode()


@pytest.fixture
def running(config: Config) -> Iterator[Running]:
    with Running(config) as made:
        yield made


def until(claim: Callable[[], Any]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not claim():
        assert time.monotonic() < deadline, f"it did not happen within {WAIT_S} s"
        time.sleep(0.02)


# --- files -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=lambda version: version.name)
def test_the_image_is_served_over_both_versions_of_tls(version: ssl.TLSVersion, running: Running) -> None:
    assert running.get("/image.jpg", version=version) == (200, IMAGE)

    (line,) = running.requests()
    assert abs(line.pop("time_ms") - time.time() * 1000) < 60_000
    assert line == {
        "event": "request", "peer": "127.0.0.1", "method": "GET", "path": "/image.jpg", "status": 200, "bytes": len(IMAGE),
        "tls": {"TLSv1_2": "TLSv1.2", "TLSv1_3": "TLSv1.3"}[version.name],
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
def test_older_tls_is_refused(running: Running) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        running.get("/image.jpg", version=ssl.TLSVersion.TLSv1_1)


def test_head_has_the_length_and_no_body(running: Running) -> None:
    with contextlib.closing(running.client()) as client:
        client.request("HEAD", "/image.jpg")
        answer = client.getresponse()

        assert (answer.status, answer.headers["Content-Length"], answer.headers["Content-Type"]) == (200, str(len(IMAGE)), "image/jpeg")
        assert answer.read() == b""
    assert running.requests()[0]["bytes"] == 0


def test_several_requests_share_a_connection(running: Running) -> None:
    with contextlib.closing(running.client()) as client:
        for _ in range(3):
            client.request("GET", "/image.jpg")
            assert client.getresponse().read() == IMAGE

    assert len(running.requests()) == 3


@pytest.mark.parametrize(
    "path", ["/", "/other.jpg", "/../secret", "/%2e%2e/secret", "/x/../../secret", "//etc/passwd", "/image.jpg%00", "/link", "/out/secret"]
)
def test_what_is_not_a_file_under_the_root_is_not_there(path: str, running: Running) -> None:
    (running.config.root / "link").symlink_to("../secret")
    (running.config.root / "out").symlink_to("..")

    assert running.get(path)[0] == 404
    assert running.requests()[0]["path"] == path, "the log has the path as it was sent"


def test_a_link_that_stays_under_the_root_is_followed(config: Config) -> None:
    (config.root / "link.jpg").symlink_to("image.jpg")
    (config.root / "loop").symlink_to("loop")

    assert file_at(config.root, "/link.jpg") == config.root / "image.jpg"
    assert file_at(config.root, "/loop") is None
    assert file_at(config.root, "image.jpg") is None


def test_a_file_that_is_too_large_is_not_served(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FILE_BYTES_MAX", len(IMAGE) - 1)

    assert file_at(config.root, "/image.jpg") is None


def test_other_methods_are_refused_and_logged(running: Running) -> None:
    assert running.get("/image.jpg", "POST")[0] == 405
    assert (running.requests()[0]["method"], running.requests()[0]["status"]) == ("POST", 405)


def test_a_request_that_cannot_be_read_is_a_line_too(running: Running) -> None:
    with contextlib.closing(running.client()) as client:
        client.connect()
        client.sock.sendall(b"GET /x HTTP/1.1\r\nno colon\r\n\r\n")
        assert b" 400 " in client.sock.recv(1000)

    until(running.requests)
    assert running.requests()[0]["status"] == 400


def test_a_client_that_goes_away_is_logged_with_its_path(running: Running) -> None:
    """The attacker needs no answer: what counts is that the request arrived."""
    with contextlib.closing(running.client()) as client:
        client.connect()
        client.sock.sendall(b"GET /marker HTTP/1.1\r\nHost: x\r\n\r\n")

    until(lambda: [line["path"] for line in running.requests()] == ["/marker"])


def test_connections_beyond_the_bound_are_closed(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 1)
    with contextlib.closing(running.client()) as held:
        held.request("GET", "/image.jpg")
        held.getresponse().read()

        with pytest.raises((ssl.SSLError, ConnectionError)):
            running.get("/image.jpg")

        assert running.events("connection_refused")
        held.request("GET", "/image.jpg")
        assert held.getresponse().read() == IMAGE


def test_many_clients_at_once_are_served(running: Running) -> None:
    results: list[tuple[int, bytes]] = []
    threads = [threading.Thread(target=lambda: results.append(running.get("/image.jpg"))) for _ in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    assert results == [(200, IMAGE)] * 24
    assert len(running.requests()) == 24


# --- the certificate ---------------------------------------------------------------------------------------------------------


def test_a_renewed_certificate_is_taken_up_while_connections_stay_open(running: Running) -> None:
    old = running.certificate()
    with contextlib.closing(running.client()) as open_before:
        open_before.request("GET", "/image.jpg")
        open_before.getresponse().read()

        renewed = identity("renewed")
        put(running.config, renewed)
        until(lambda: running.certificate() == renewed.certificate_pem())

        open_before.request("GET", "/image.jpg")
        assert open_before.getresponse().read() == IMAGE
        assert shown(open_before) == old != renewed.certificate_pem()
    assert [line["certificate_expires"] for line in running.events("certificate_loaded")] == [renewed.certificate.not_valid_after_utc.isoformat()]


def damaged(config: Config) -> None:
    replace_whole(config.certificate, config.certificate.read_bytes()[:-200])


def of_another_key(config: Config) -> None:
    replace_whole(config.certificate, identity("other").certificate_pem())


def too_old(config: Config) -> None:
    put(config, expired())


def missing(config: Config) -> None:
    config.key.unlink()


@pytest.mark.parametrize("break_", [damaged, of_another_key, too_old, missing])
def test_a_bad_certificate_is_refused_once_and_the_old_one_stays(
    break_: Callable[[Config], None], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "RELOAD_SECONDS", 0.05)
    with Running(config) as running:
        refuses_once(break_, running)


def refuses_once(break_: Callable[[Config], None], running: Running) -> None:
    old = running.certificate()

    break_(running.config)
    until(lambda: running.events("certificate_refused"))

    looked = running.looked
    until(lambda: running.looked > looked + 3)
    assert running.certificate() == old
    assert running.get("/image.jpg")[0] == 200
    # Between two files that are replaced one after the other there may be a pair that does not fit: it is another bad one.
    details = [line["detail"] for line in running.events("certificate_refused")]
    assert len(details) == len(set(details)) <= (2 if break_ is too_old else 1)


def test_after_a_bad_certificate_a_good_one_is_taken(running: Running) -> None:
    damaged(running.config)
    until(lambda: running.events("certificate_refused"))

    renewed = identity("renewed")
    put(running.config, renewed)

    until(lambda: running.certificate() == renewed.certificate_pem())


def put_rsa(config: Config) -> None:
    key = rsa.generate_private_key(65537, 2048)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "images.kalium.test")])
    builder = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), NOW, NOW + timedelta(days=5))
    config.certificate.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    config.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def test_a_certificate_with_another_kind_of_key_replaces_the_old_one_for_everybody(config: Config) -> None:
    """A context that was given both kinds would go on showing the old one to clients that prefer it."""
    put_rsa(config)
    with Running(config) as running:
        rsa_only = running.client(ssl.TLSVersion.TLSv1_2)
        rsa_only._context.set_ciphers("ECDHE-RSA-AES256-GCM-SHA384")  # type: ignore[attr-defined]
        rsa_only.connect()
        rsa_only.close()

        renewed = identity("renewed")
        put(running.config, renewed)
        until(lambda: running.certificate() == renewed.certificate_pem())

        with pytest.raises(ssl.SSLError):
            rsa_only.connect()


@pytest.mark.parametrize("break_", [damaged, of_another_key, too_old, missing])
def test_without_a_usable_certificate_the_server_does_not_start(break_: Callable[[Config], None], config: Config) -> None:
    break_(config)

    with pytest.raises(KaliumError) as error:
        Certificate(config.certificate, config.key)

    assert (error.value.code, error.value.exit_code) == ("imageserver.certificate", EXIT_ENVIRONMENT)
    assert "certbot" in error.value.next_step


def test_an_expired_certificate_is_called_that(config: Config) -> None:
    too_old(config)

    with pytest.raises(KaliumError, match="it expired at 20"):
        Certificate(config.certificate, config.key)


# --- the command -------------------------------------------------------------------------------------------------------------


def written(config: Config, folder: Path, **changes: Any) -> Path:
    document = {
        "listen": {"host": config.host, "port": config.port}, "certificate": str(config.certificate), "key": str(config.key),
        "root": str(config.root), "access_log": str(config.access_log),
    } | changes  # fmt: skip
    (folder / "imageserver.json").write_text(json.dumps({name: value for name, value in document.items() if value is not None}))
    return folder / "imageserver.json"


def test_a_configuration_is_read_as_written(config: Config, tmp_path: Path) -> None:
    assert load(written(config, tmp_path)) == config


@pytest.mark.parametrize(
    "changes",
    [
        {"root": None},
        {"surprise": 1},
        {"root": "www"},
        {"root": 1},
        {"listen": {"host": "127.0.0.1"}},
        {"listen": {"host": "", "port": 1}},
        {"listen": {"host": "127.0.0.1", "port": True}},
        {"listen": {"host": "127.0.0.1", "port": 65536}},
        {"listen": []},
    ],
)
def test_a_configuration_that_is_not_whole_is_refused(changes: dict[str, Any], config: Config, tmp_path: Path) -> None:
    with pytest.raises(KaliumError) as error:
        load(written(config, tmp_path, **changes))

    assert error.value.code == "imageserver.config"


def test_check_compares_what_is_served_with_the_files(running: Running) -> None:
    assert f"{len(IMAGE)} bytes, over TLSv1.3" in check(running.config, "/image.jpg")

    other = replace(running.config, root=running.config.root.parent)
    (other.root / "image.jpg").write_bytes(b"another picture")
    with pytest.raises(KaliumError, match="not the file's") as error:
        check(other, "/image.jpg")
    assert error.value.exit_code == EXIT_NO


def test_check_knows_another_certificate(running: Running, tmp_path: Path) -> None:
    (tmp_path / "another.pem").write_bytes(identity("another").certificate_pem())

    with pytest.raises(KaliumError, match="its certificate is not that of") as error:
        check(replace(running.config, certificate=tmp_path / "another.pem"), "/image.jpg")

    assert error.value.exit_code == EXIT_NO


def test_check_of_a_server_that_is_not_there_is_the_environments_failure(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(replace(config, port=free_port()), tmp_path)

    assert main(["imageserver", "check", "--config", str(path)]) == EXIT_ENVIRONMENT
    assert capsys.readouterr().err.startswith("error[imageserver.unreachable]: cannot get https://127.0.0.1:")


def test_the_service_serves_until_sigterm_and_flushes_each_line(config: Config, tmp_path: Path) -> None:
    config = replace(config, port=free_port())
    path = written(config, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "kalium.cli.main", "imageserver", "serve", "--config", str(path)], cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "listening"
        assert "image.jpg" in check(config, "/image.jpg")
        assert json.loads(config.access_log.read_text())["path"] == "/image.jpg", "the line is there while the server runs"

        process.send_signal(signal.SIGTERM)

        assert process.wait(WAIT_S) == 0
        assert json.loads(process.stdout.readline())["event"] == "stopping"
    finally:
        process.kill()
        process.wait()


def test_a_port_that_is_taken_is_an_error_with_a_next_step(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        path = written(replace(config, port=taken.getsockname()[1]), tmp_path)

        assert main(["imageserver", "serve", "--config", str(path)]) == EXIT_ENVIRONMENT

    assert "error[imageserver.listen]: cannot listen on 127.0.0.1:" in capsys.readouterr().err


# --- the picture -------------------------------------------------------------------------------------------------------------


def test_the_picture_has_the_published_size_and_is_drawn_the_same_each_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "image.jpg"

    assert main(["imageserver", "draw", str(out)]) == 0
    assert main(["imageserver", "draw", str(out)]) == 0

    assert capsys.readouterr().out == f"changed {out}\nunchanged {out}\n"
    assert out.stat().st_size == 122_620
    with Image.open(out) as image:
        image.load()
        assert (image.format, image.size) == ("JPEG", (1620, 936))


@pytest.mark.parametrize("missing", [0, 4, 5, 65_537, 65_538, 65_539, 65_540, 65_541, 70_000, 131_074, 131_076])
def test_comments_fill_any_gap_exactly(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also gaps after which less than a segment would be left."""
    plain = picture._jpeg(Image.new("RGB", (16, 16)), 75)
    monkeypatch.setattr(picture, "_jpeg", lambda *_: plain)
    monkeypatch.setattr(picture, "FILE_BYTES", len(plain) + missing)

    data = picture.encode(Image.new("RGB", (16, 16)))

    assert len(data) == len(plain) + missing
    with Image.open(io.BytesIO(data)) as image:
        image.load()


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_a_gap_that_no_comment_fits_takes_a_lower_quality(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "FILE_BYTES", 1000)

    assert not picture._fits(1000 - missing)
    assert picture._fits(1000)
    assert picture._fits(996)
    assert not picture._fits(1001)
