"""TLS 1.3 with certificates on both sides, and what is wrong with them in words, before a handshake says it in a number."""

from __future__ import annotations

import ssl
from datetime import datetime, timezone
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from kalium.controller.config import TlsFiles
from kalium.errors import KaliumError

ISSUE = "issue it anew: `kalium pki issue`"


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """A context for a listener that serves only peers with a certificate of our CA. Raises KaliumError as `check` does."""
    return _context(files, ssl.PROTOCOL_TLS_SERVER)


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """A context for a client that proves itself by its own certificate. Raises KaliumError as `check` does."""
    return _context(files, ssl.PROTOCOL_TLS_CLIENT)


def _context(files: TlsFiles, protocol: int) -> ssl.SSLContext:
    check(files)
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cafile=str(files.ca))
        context.load_cert_chain(str(files.cert), str(files.key))
    except (OSError, ssl.SSLError) as error:
        raise _refused(files.cert, str(error), ISSUE) from error
    return context


def stamps(files: TlsFiles) -> tuple[tuple[int, int, int], ...]:
    """Changes when one of the files does; a file that is away has a stamp too."""
    return tuple(_stamp(path) for path in (files.ca, files.cert, files.key))


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return 0, 0, 0  # whoever reads it next says why
    return found.st_mtime_ns, found.st_size, found.st_ino


def check(files: TlsFiles, *, now: datetime | None = None) -> None:
    """Raise KaliumError unless the key belongs to the certificate, the CA signed it, and both are valid now."""
    now = now or datetime.now(timezone.utc)
    ca, certificate = _certificate(files.ca), _certificate(files.cert)
    for path, each in ((files.ca, ca), (files.cert, certificate)):
        if now >= each.not_valid_after_utc:
            raise _refused(path, f"it expired on {each.not_valid_after_utc:%Y-%m-%d}", ISSUE)
        if now < each.not_valid_before_utc:
            raise _refused(path, f"it is valid from {each.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on", "set this machine's clock")
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise _refused(files.cert, f"the CA {files.ca} did not issue it", "use the CA that did, or " + ISSUE) from error
    try:
        key = load_pem_private_key(_read(files.key), password=None)
    except (ValueError, TypeError) as error:
        raise _refused(files.key, "it is not an unencrypted private key in PEM", ISSUE) from error
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise _refused(files.key, f"it is not the key of {files.cert}", ISSUE)


def not_after_s(files: TlsFiles) -> float:
    """When this side's certificate ends, in seconds since 1970. Raises KaliumError as `check` does."""
    return _certificate(files.cert).not_valid_after_utc.timestamp()


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise _refused(path, "it is not a certificate in PEM", ISSUE) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refused(path, error.strerror or str(error), "check the path in the configuration and the file's owner and mode") from error


def _refused(path: Path, found: str, next_step: str) -> KaliumError:
    return KaliumError("controller.tls", f"cannot use {path}", found, next_step)
