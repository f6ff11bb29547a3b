"""Serving: SMTP without delivery. Each mail becomes a file of the maildir and a log line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TextIO

from aiosmtpd.smtp import SMTP, Envelope, Session

from kalium.errors import KaliumError
from kalium.mailsink.config import Config

MAIL_BYTES_MAX = 1 << 20
MAILS_MAX = 1000  # beyond it the oldest goes
CONNECTIONS_MAX = 256  # further ones are closed at once
IDLE_SECONDS_MAX = 60.0
HOSTNAME = "mail"

LogLine = Callable[..., None]  # log(event, **fields)


def log_to(stream: TextIO) -> LogLine:
    """A log of JSON lines on `stream`, each flushed."""

    def log(event: str, **fields: Any) -> None:
        stream.write(json.dumps({"event": event, "time_ms": time.time_ns() // 1_000_000, **fields}, separators=(",", ":")) + "\n")
        stream.flush()

    return log


class Maildir:
    """A maildir that holds the last MAILS_MAX mails. Raises KaliumError when it cannot be made."""

    def __init__(self, folder: Path) -> None:
        self.new = folder / "new"
        self._tmp = folder / "tmp"
        try:
            for path in (self.new, self._tmp, folder / "cur"):
                path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            next_step = "make the folder, with rights for this account"
            raise KaliumError("mailsink.maildir", f"cannot keep mail in {folder}", error.strerror or str(error), next_step) from error
        self._names = sorted(path.name for path in self.new.iterdir())
        self._count = 0

    def add(self, mail: bytes) -> str:
        """Keep `mail` whole or not at all; returns the name of its file in new/."""
        self._count += 1
        name = f"{time.time_ns():020d}.{os.getpid()}_{self._count}.{HOSTNAME}"
        temporary = self._tmp / name
        temporary.write_bytes(mail)
        temporary.rename(self.new / name)
        self._names.append(name)
        while len(self._names) > MAILS_MAX:
            (self.new / self._names.pop(0)).unlink(missing_ok=True)
        return name


class _Keeper:
    """aiosmtpd's handler: what it calls by name."""

    def __init__(self, maildir: Maildir, log: LogLine) -> None:
        self._maildir = maildir
        self._log = log

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: ARG002, N802  aiosmtpd's name
        """Keep the mail, whoever it is for."""
        mail = envelope.content if isinstance(envelope.content, bytes) else (envelope.content or "").encode()
        try:
            name = self._maildir.add(mail)
        except OSError as error:
            self._log("mail_lost", detail=str(error))
            return "451 the mail cannot be kept"
        peer = session.peer[0] if isinstance(session.peer, tuple) else ""
        tls = session.ssl["version"] if isinstance(session.ssl, dict) and "version" in session.ssl else bool(session.ssl)
        self._log("mail", peer=peer, sender=envelope.mail_from, recipients=envelope.rcpt_tos, bytes=len(mail), file=name, tls=bool(tls))
        return "250 kept"


class _Closed(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.abort()


class _Counted(SMTP):
    """A connection that tells when it ends."""

    def __init__(self, *args: Any, ended: Callable[[], None], **options: Any) -> None:
        super().__init__(*args, **options)
        self._ended: Callable[[], None] | None = ended

    def connection_lost(self, error: Exception | None) -> None:
        """Pass it on, and tell once."""
        super().connection_lost(error)
        if self._ended is not None:
            self._ended()
            self._ended = None


class MailSink:
    """The mail sink of one configuration; `log` gets a line for each mail. Raises KaliumError for a bad certificate or maildir."""

    def __init__(self, config: Config, log: LogLine) -> None:
        self._config = config
        self._log = log
        self._keeper = _Keeper(Maildir(config.maildir), log)
        self._tls = _tls(config)
        self._connections = 0

    def _protocol(self) -> asyncio.BaseProtocol:
        if self._connections >= CONNECTIONS_MAX:
            self._log("connection_refused", connections=CONNECTIONS_MAX)
            return _Closed()
        self._connections += 1
        return _Counted(
            self._keeper, ended=self._end, data_size_limit=MAIL_BYTES_MAX, hostname=HOSTNAME, ident="ESMTP", timeout=IDLE_SECONDS_MAX,
            tls_context=self._tls, enable_SMTPUTF8=True, loop=asyncio.get_running_loop(),
        )  # fmt: skip

    def _end(self) -> None:
        self._connections -= 1

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[tuple[str, int]]:
        """Serve while the `async with` lasts; its value is the address. Raises KaliumError when it cannot listen there."""
        loop = asyncio.get_running_loop()
        try:
            listener = await loop.create_server(self._protocol, self._config.host, self._config.port)
        except OSError as error:
            attempted = f"cannot listen on {self._config.host}:{self._config.port}"
            raise KaliumError("mailsink.listen", attempted, error.strerror or str(error), "free the port, or give another address") from error
        host, port = listener.sockets[0].getsockname()[:2]
        self._log("listening", host=host, port=port)
        try:
            yield host, port
        finally:
            listener.close()


def _tls(config: Config) -> ssl.SSLContext | None:
    if config.certificate is None or config.key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.certificate, config.key)
    except (OSError, ssl.SSLError) as error:
        attempted = f"cannot use the certificate {config.certificate} with {config.key}"
        raise KaliumError("mailsink.certificate", attempted, str(error), "give a PEM chain and the key that belongs to it") from error
    return context


async def serve(config: Config) -> None:
    """Serve until SIGTERM or SIGINT; the log goes to standard output."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    log = log_to(sys.stdout)
    async with MailSink(config, log).running():
        await stop.wait()
        log("stopping")
