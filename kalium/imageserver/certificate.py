"""The server's certificate: checked before it is used, and replaced while connections are open."""

from __future__ import annotations

import hashlib
import ssl
import tempfile
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from cryptography import x509

from kalium.errors import KaliumError

PEM_BYTES_MAX = 1 << 20
NEXT = "run certbot again, or see its log in /var/log/kalium/certbot; certificate and key must belong together"

Clock = Callable[[], datetime]


def now() -> datetime:
    """The wall clock."""
    return datetime.now(timezone.utc)


class Certificate:
    """The certificate in force, from two files that somebody else replaces. `context` is for the listening socket.

    A connection's settings are chosen when its handshake begins, so replacing them touches no open connection. Raises KaliumError
    imageserver.certificate when there is no usable one to begin with.
    """

    def __init__(self, certificate: Path, key: Path, *, clock: Clock = now) -> None:
        self._certificate = certificate
        self._key = key
        self._clock = clock
        self._seen = ""  # what was looked at last, good or bad
        chain, private = self._read()
        self._current, self.expires = self._settings(chain, private)
        self.context = _server_context()
        # The listening context needs a certificate of its own; the callback then chooses the one in force.
        self.context.sni_callback = self._choose
        _load(self.context, chain, private)

    def _choose(self, connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, listening: ssl.SSLContext) -> None:  # noqa: ARG002
        connection.context = self._current

    def reload(self) -> bool:
        """Look at the files; True when a new certificate is in force. Raises KaliumError once for each bad pair; the old one stays."""
        seen = self._seen
        chain, private = self._read()
        if self._seen == seen:
            return False
        self._current, self.expires = self._settings(chain, private)
        return True

    def _read(self) -> tuple[bytes, bytes]:
        try:
            contents = [_read(self._certificate), _read(self._key)]
        except OSError as error:
            if self._seen == str(error):
                return b"", b""
            self._seen = str(error)
            raise self._refused(f"{error.strerror}: {error.filename}") from error
        self._seen = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in contents)).hexdigest()
        return contents[0], contents[1]

    def _settings(self, chain: bytes, private: bytes) -> tuple[ssl.SSLContext, datetime]:
        try:
            leaf = x509.load_pem_x509_certificates(chain)[0]
            context = _server_context()
            _load(context, chain, private)
        except (ValueError, ssl.SSLError) as error:
            raise self._refused(str(error) or type(error).__name__) from error
        expires = leaf.not_valid_after_utc
        if expires <= self._clock():
            raise self._refused(f"it expired at {expires.isoformat()}")
        return context, expires

    def _refused(self, found: str) -> KaliumError:
        return KaliumError("imageserver.certificate", f"cannot use the certificate {self._certificate} with {self._key}", found, NEXT)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(PEM_BYTES_MAX)


def _server_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    return context


def _load(context: ssl.SSLContext, chain: bytes, private: bytes) -> None:
    """Load what was read, and not the files again: certbot may be replacing them. Python takes file names only."""
    with tempfile.NamedTemporaryFile() as chain_file, tempfile.NamedTemporaryFile() as key_file:
        chain_file.write(chain)
        key_file.write(private)
        chain_file.flush()
        key_file.flush()
        context.load_cert_chain(chain_file.name, key_file.name)
