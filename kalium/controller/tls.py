"""TLS 1.3 with certificates on both sides, and what is wrong with them in words, before a handshake says it in a number.

The file of the CA may hold several certificates: while a site changes its CA, those of the old one and of the new one are both good.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from kalium.controller.config import TlsFiles
from kalium.controller.identity import NOBODY, PeerIdentity, Role
from kalium.errors import KaliumError

ISSUE = "issue it anew: `kalium pki issue --role controller`"


@dataclass(frozen=True)
class Peer:
    """Who has proven to be at the other end, and until when (seconds since 1970) that proof holds."""

    subject: str
    identity: PeerIdentity
    expires_s: float


def peer_of(certificate: Mapping[str, Any] | None) -> Peer:
    """What `ssl` makes of a verified certificate, as a peer; one of Role.NONE whose proof is over when there is none."""
    found = certificate or {}
    names = [value for part in found.get("subject", ()) for key, value in part if key == "commonName"]
    uris = [value for kind, value in found.get("subjectAltName", ()) if kind == "URI"]
    expires_s = float(ssl.cert_time_to_seconds(found["notAfter"])) if "notAfter" in found else 0.0
    return Peer(names[0] if names else "", identity_of(uris), expires_s)


def identity_of(uris: Sequence[str]) -> PeerIdentity:
    """Whom the URIs of a certificate name. Several name nobody, because readers could differ in which one they take."""
    return PeerIdentity.parse(uris[0]) if len(uris) == 1 else NOBODY


def server_context(files: TlsFiles, *, name: str = "") -> ssl.SSLContext:
    """A context for a listener that serves only peers with a certificate of our CA. Raises KaliumError as `check` does."""
    check(files, name=name)
    context = _context(files, ssl.PROTOCOL_TLS_SERVER)
    # A resumed session is not verified again, so it would outlive its certificate, or the CA that we no longer trust.
    context.num_tickets = 0
    return context


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """A context for a client that proves itself by its own certificate, of any role. Raises KaliumError as `check` does."""
    check(files, roles=(Role.AGENT, Role.CONTROLLER, Role.CLIENT))
    return _context(files, ssl.PROTOCOL_TLS_CLIENT)


def _context(files: TlsFiles, protocol: int) -> ssl.SSLContext:
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


def check(files: TlsFiles, *, roles: tuple[Role, ...] = (Role.CONTROLLER,), name: str = "", now: datetime | None = None) -> None:
    """Raise KaliumError unless key, certificate and CA belong together and are valid now, and its owner has one of `roles` and `name`.

    Without a `name` any will do.
    """
    now = now or datetime.now(timezone.utc)
    authorities, certificate = _authorities(files.ca, now), _certificates(files.cert)[0]
    _check_validity(files.cert, certificate, now)
    if not is_issued_by(certificate, authorities):
        raise _refused(files.cert, f"the CA {files.ca} did not issue it", "use the CA that did, or " + ISSUE)
    identity = identity_of(_uris(certificate))
    if identity.role not in roles:
        raise _refused(files.cert, f"its role is {identity.role.value or 'none'}, not {' or '.join(role.value for role in roles)}", ISSUE)
    if name and identity.name != name:
        raise _refused(files.cert, f"it is of the {identity.role.value} {identity.name}, not {name}", f"set `name` in the configuration, or {ISSUE}")
    try:
        key = load_pem_private_key(_read(files.key), password=None)
    except (ValueError, TypeError) as error:
        raise _refused(files.key, "it is not an unencrypted private key in PEM", ISSUE) from error
    form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*form) != certificate.public_key().public_bytes(*form):
        raise _refused(files.key, f"it is not the key of {files.cert}", ISSUE)


def not_after_s(files: TlsFiles) -> float:
    """When this side's certificate ends, in seconds since 1970. Raises KaliumError as `check` does."""
    return _certificates(files.cert)[0].not_valid_after_utc.timestamp()


def authorities(files: TlsFiles) -> list[x509.Certificate]:
    """Whose certificates are good now. Raises KaliumError when nobody's are."""
    return _authorities(files.ca, datetime.now(timezone.utc))


def is_issued_by(certificate: x509.Certificate, authorities: Iterable[x509.Certificate]) -> bool:
    """Whether one of `authorities` has signed `certificate`."""
    for authority in authorities:
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            continue
        return True
    return False


def _authorities(path: Path, now: datetime) -> list[x509.Certificate]:
    """Those of the file that are valid; one that is over is no fault as long as another one is left."""
    found = _certificates(path)
    valid = [each for each in found if each.not_valid_before_utc <= now < each.not_valid_after_utc]
    if not valid:
        _check_validity(path, found[0], now)
    return valid


def _check_validity(path: Path, certificate: x509.Certificate, now: datetime) -> None:
    if now >= certificate.not_valid_after_utc:
        raise _refused(path, f"it expired on {certificate.not_valid_after_utc:%Y-%m-%d}", ISSUE)
    if now < certificate.not_valid_before_utc:
        raise _refused(path, f"it is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on", "set this machine's clock")


def _uris(certificate: x509.Certificate) -> list[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return names.get_values_for_type(x509.UniformResourceIdentifier)


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise _refused(path, "it is not a certificate in PEM", ISSUE) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _refused(path, error.strerror or str(error), "check the path in the configuration and the file's owner and mode") from error


def _refused(path: Path, found: str, next_step: str) -> KaliumError:
    return KaliumError("controller.tls", f"cannot use {path}", found, next_step)
