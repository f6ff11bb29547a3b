"""The mail sink over real connections on loopback: what it keeps, what it logs, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import smtplib
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP
from loopback import InThread, free_port

from kalium.cli.main import main
from kalium.errors import EXIT_ENVIRONMENT, EXIT_NO, KaliumError
from kalium.mailsink import server
from kalium.mailsink.check import check
from kalium.mailsink.config import Config, load
from kalium.mailsink.server import Maildir, MailSink
from kalium.pki.authority import Role, issue, new_ca

MAIL = "Subject: photos wanted\r\n\r\nDear abcd,\r\n.\r\nMerchantA\r\n"


class Running(InThread):
    """A mail sink in a thread, and what it logged."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config

    def service(self) -> AbstractAsyncContextManager[tuple[str, int]]:
        return MailSink(self.config, server.log_to(self.log)).running()

    def __enter__(self) -> Running:
        self.start()
        self.config = replace(self.config, port=self.port)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def client(self) -> smtplib.SMTP:
        return smtplib.SMTP("127.0.0.1", self.config.port, timeout=30)

    def kept(self) -> list[bytes]:
        return [path.read_bytes() for path in sorted((self.config.maildir / "new").iterdir())]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config("127.0.0.1", 0, tmp_path / "mail", None, None)


@pytest.fixture
def running(config: Config) -> Iterator[Running]:
    with Running(config) as made:
        yield made


def with_tls(config: Config, folder: Path) -> Config:
    now = datetime.now(timezone.utc)
    identity = issue(new_ca(now=now), "mail", ("DNS:mail",), role=Role.SERVER, days=5, now=now)
    (folder / "cert.pem").write_bytes(identity.certificate_pem())
    (folder / "key.pem").write_bytes(identity.key_pem())
    return replace(config, certificate=folder / "cert.pem", key=folder / "key.pem")


def test_a_mail_is_kept_as_it_was_sent_and_logged_without_its_text(running: Running) -> None:
    with running.client() as client:
        assert client.sendmail("shop@example.org", ["200494@photos.example", "other@photos.example"], MAIL) == {}

    assert running.kept() == [MAIL.encode()]
    (line,) = running.events("mail")
    assert abs(line.pop("time_ms") - time.time() * 1000) < 60_000
    (file,) = (running.config.maildir / "new").iterdir()
    assert line == {
        "event": "mail", "peer": "127.0.0.1", "sender": "shop@example.org", "recipients": ["200494@photos.example", "other@photos.example"],
        "bytes": len(MAIL), "file": file.name, "tls": False,
    }  # fmt: skip
    assert list((running.config.maildir / "tmp").iterdir()) == []


def test_starttls_is_offered_only_with_a_certificate(running: Running, tmp_path: Path) -> None:
    with running.client() as client:
        client.ehlo()
        assert not client.has_extn("starttls")
    with Running(with_tls(replace(running.config, port=0), tmp_path)) as other, other.client() as client:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        client.starttls(context=context)
        client.sendmail("a@example.org", "b@example.org", MAIL)

        assert other.events("mail")[0]["tls"] is True
        with other.client() as plain:
            plain.sendmail("a@example.org", "b@example.org", MAIL)
        assert other.events("mail")[1]["tls"] is False


def test_a_mail_beyond_the_bound_is_refused_and_not_kept(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAIL_BYTES_MAX", 100)
    with running.client() as client, pytest.raises((smtplib.SMTPSenderRefused, smtplib.SMTPDataError)) as error:
        client.sendmail("a@example.org", "b@example.org", "x" * 101)

    assert error.value.smtp_code == 552
    assert running.kept() == []


def test_the_oldest_mail_goes_when_there_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAILS_MAX", 3)
    first = Maildir(tmp_path)
    first.add(b"1")
    first.add(b"2")

    again = Maildir(tmp_path)
    for number in (b"3", b"4", b"5"):
        again.add(number)

    assert [path.read_bytes() for path in sorted(again.new.iterdir())] == [b"3", b"4", b"5"]


def test_a_mail_that_cannot_be_kept_is_not_confirmed(running: Running) -> None:
    (running.config.maildir / "tmp").rmdir()

    with running.client() as client, pytest.raises(smtplib.SMTPDataError) as error:
        client.sendmail("a@example.org", "b@example.org", MAIL)

    assert error.value.smtp_code == 451
    assert running.events("mail_lost")


def test_connections_beyond_the_bound_are_closed_and_places_become_free(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CONNECTIONS_MAX", 1)
    with running.client():
        with pytest.raises((smtplib.SMTPServerDisconnected, ConnectionError)):
            running.client()
        assert running.events("connection_refused")

    deadline = time.monotonic() + 30
    while True:
        with contextlib.suppress(smtplib.SMTPServerDisconnected, ConnectionError), running.client() as client:
            assert client.noop()[0] == 250
            break
        assert time.monotonic() < deadline, "the place of a closed connection is free again"


def test_a_maildir_that_cannot_be_made_is_an_error_with_a_next_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(KaliumError, match="cannot keep mail") as error:
        Maildir(tmp_path / "file" / "mail")

    assert error.value.code == "mailsink.maildir"


def test_a_certificate_that_does_not_fit_is_an_error_at_the_start(config: Config, tmp_path: Path) -> None:
    config = with_tls(config, tmp_path)
    (tmp_path / "key.pem").write_text("no key")

    with pytest.raises(KaliumError, match="cannot use the certificate") as error:
        MailSink(config, server.log_to(io.StringIO()))

    assert error.value.code == "mailsink.certificate"


# --- the command -------------------------------------------------------------------------------------------------------------


def written(folder: Path, **changes: Any) -> Path:
    document = {"listen": {"host": "127.0.0.1", "port": 2525}, "maildir": "/var/lib/kalium/mail", **changes}
    (folder / "mailsink.json").write_text(json.dumps({name: value for name, value in document.items() if value is not None}))
    return folder / "mailsink.json"


def test_a_configuration_is_read_as_written(tmp_path: Path) -> None:
    plain = Config("127.0.0.1", 2525, Path("/var/lib/kalium/mail"), None, None)
    tls = {"certificate": "/c.pem", "key": "/k.pem"}

    assert load(written(tmp_path)) == plain
    assert load(written(tmp_path, tls=tls)) == replace(plain, certificate=Path("/c.pem"), key=Path("/k.pem"))


@pytest.mark.parametrize(
    "changes",
    [
        {"maildir": None},
        {"maildir": "mail"},
        {"surprise": 1},
        {"listen": {"host": "127.0.0.1", "port": "2525"}},
        {"listen": {"host": "127.0.0.1", "port": -1}},
        {"listen": {"port": 1}},
        {"tls": {"certificate": "/c.pem"}},
        {"tls": {"certificate": "c.pem", "key": "/k.pem"}},
        {"tls": [1]},
    ],
)
def test_a_configuration_that_is_not_whole_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(KaliumError) as error:
        load(written(tmp_path, **changes))

    assert error.value.code == "mailsink.config"


def test_check_asks_and_leaves_no_mail(running: Running) -> None:
    assert check(running.config) == f"127.0.0.1:{running.config.port} takes mail, without STARTTLS"
    assert running.kept() == []


def test_check_of_a_sink_that_refuses_is_a_no(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SMTP, "smtp_MAIL", SMTP.smtp_QUIT)  # which refuses the argument

    with pytest.raises(KaliumError, match="it answered 501") as error:
        check(running.config)

    assert error.value.exit_code == EXIT_NO


def test_check_of_a_sink_that_is_not_there_is_the_environments_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, listen={"host": "127.0.0.1", "port": free_port()})

    assert main(["mailsink", "check", "--config", str(path)]) == EXIT_ENVIRONMENT
    assert capsys.readouterr().err.startswith("error[mailsink.unreachable]: cannot hand mail to 127.0.0.1:")


def test_the_service_serves_until_sigterm(tmp_path: Path) -> None:
    path = written(tmp_path, listen={"host": "127.0.0.1", "port": free_port()}, maildir=str(tmp_path / "mail"))
    process = subprocess.Popen(
        [sys.executable, "-m", "kalium.cli.main", "mailsink", "serve", "--config", str(path)], cwd=Path(__file__).resolve().parents[2],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["event"] == "listening"
        assert "takes mail" in check(load(path))

        process.send_signal(signal.SIGTERM)

        assert process.wait(30) == 0
        assert json.loads(process.stdout.readline())["event"] == "stopping"
    finally:
        process.kill()
        process.wait()
