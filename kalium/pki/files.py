"""The PKI of a site in a directory: ca.crt, ca.key, NAME.crt, NAME.key, operator.key, operator.pub.

Private files are 0600 and never there in part. A key is written before its certificate; a run that was cut between the two
leaves a pair that does not fit, and the next one makes both anew.
"""

from __future__ import annotations

import base64
import os
import stat
import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from kalium.errors import KaliumError
from kalium.pki import authority
from kalium.pki.authority import Identity

PRIVATE, PUBLIC = 0o600, 0o644
READABLE_FOR_OTHERS = "the key's file was readable for others"


@dataclass(frozen=True)
class Outcome:
    """What a command did to `path`, or in a dry run would do: `why` is "" when everything was good as it was."""

    path: Path
    why: str


@dataclass(frozen=True)
class Shown:
    """One certificate of the directory, for people and programs. `fault` is "" when it can be used."""

    file: str
    subject: str
    names: tuple[str, ...]
    not_after: datetime
    fault: str


def init(directory: Path, *, now: datetime, dry_run: bool = False) -> Outcome:
    """Make the CA, or renew it under its own key, so that what it has issued stays valid."""
    certificate, key = directory / "ca.crt", directory / "ca.key"
    found = _identity(certificate, key)
    if found is None and (certificate.exists() or key.exists()):
        # Replacing a CA silently would put every agent out; a person has to say so by removing it.
        raise KaliumError(
            "pki.ca", f"cannot use the CA in {directory}", "ca.crt and ca.key are not a certificate and its key",
            "restore both from a copy; or remove both, run this again, and issue every certificate anew",
        )  # fmt: skip
    why = authority.why_expiring(found.certificate, now=now) if found is not None else "there is no CA yet"
    if why and not dry_run:
        _write_identity(authority.new_ca(now=now, key=found.key if found is not None else None), certificate, key)
    return Outcome(certificate, why or _closed_to_others(key, dry_run=dry_run))


def issue(directory: Path, name: str, sans: tuple[str, ...], *, days: int, now: datetime, dry_run: bool = False) -> Outcome:
    """Issue NAME.crt and NAME.key, unless they are what is asked for and valid for long enough."""
    ca = _load_ca(directory, now=now)
    made = authority.issue(ca, name, sans, days=days, now=now)  # before a path is made of the name: it judges the arguments
    certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
    found = _identity(certificate, key)
    why = authority.why_not_good(found, ca, name, sans, now=now) if found is not None else "there is no certificate with its key yet"
    if why and not dry_run:
        _write_identity(made, certificate, key)
    return Outcome(certificate, why or _closed_to_others(key, dry_run=dry_run))


def operator_key(directory: Path, *, dry_run: bool = False) -> Outcome:
    """Make the operator's signing key, unless there is one. A key that is there is never replaced: policies are signed with it."""
    private, public = directory / "operator.key", directory / "operator.pub"
    if private.exists():
        key = _operator_private(private)
        why = "" if public.exists() and _read(public) == _public_pem(key) else "operator.pub was not the key's public half"
    elif public.exists():
        raise KaliumError(
            "pki.operator_key", f"cannot make an operator's key in {directory}", "operator.pub is there without operator.key",
            "restore operator.key from a copy; or remove operator.pub, run this again, and sign every policy anew",
        )  # fmt: skip
    else:
        key = Ed25519PrivateKey.generate()
        why = "there is no operator's key yet"
    if why and not dry_run:
        if not private.exists():
            _write(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), PRIVATE)
        _write(public, _public_pem(key), PUBLIC)
    return Outcome(public, why or _closed_to_others(private, dry_run=dry_run))


def operator_raw(directory: Path) -> str:
    """The operator's public key as the runtime is given it: the base64 of its 32 bytes."""
    path = directory / "operator.pub"
    try:
        key = load_pem_public_key(_read(path))
    except ValueError as error:
        raise _no_operator_key(path) from error
    if not isinstance(key, Ed25519PublicKey):
        raise _no_operator_key(path)
    return base64.b64encode(key.public_bytes_raw()).decode("ascii")


def show(directory: Path, *, now: datetime) -> list[Shown]:
    """Every certificate of the directory, the CA first."""
    ca = _certificate(directory / "ca.crt")
    others = sorted(path for path in directory.glob("*.crt") if path.name != "ca.crt")
    return [_shown(path, _certificate(path), ca, now) for path in (directory / "ca.crt", *others)]


def _shown(path: Path, certificate: x509.Certificate, ca: x509.Certificate, now: datetime) -> Shown:
    names = [
        str(name.value)
        for extension in certificate.extensions
        if isinstance(extension.value, x509.SubjectAlternativeName)
        for name in extension.value
    ]
    key = path.with_suffix(".key")
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        fault = "not valid now"
    elif not authority.is_issued_by(certificate, ca):
        fault = "another CA issued it"
    elif _identity(path, key) is None:
        fault = f"{key.name} is not its key"
    elif _has_other_mode(key):
        fault = f"{key.name} is readable for others"
    else:
        fault = ""
    return Shown(path.name, certificate.subject.rfc4514_string(), tuple(names), certificate.not_valid_after_utc, fault)


def _load_ca(directory: Path, *, now: datetime) -> Identity:
    certificate, key = directory / "ca.crt", directory / "ca.key"
    ca = _identity(certificate, key)
    if ca is None:
        raise KaliumError(
            "pki.ca",
            f"cannot issue with the CA in {directory}",
            "ca.crt and ca.key are not there or do not belong together",
            "make it: `kalium pki init`",
        )
    if now >= ca.certificate.not_valid_after_utc:
        found = f"it expired on {ca.certificate.not_valid_after_utc:%Y-%m-%d}"
        raise KaliumError("pki.ca", f"cannot issue with the CA in {directory}", found, "renew it: `kalium pki init`")
    return ca


def _identity(certificate: Path, key: Path) -> Identity | None:
    """What is in two files; None when one is away or they are not a certificate and its key."""
    if not certificate.exists() or not key.exists():
        return None
    return authority.read(_read(certificate), _read(key))


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise KaliumError(
            "pki.file", f"cannot read {path}", "it is not a certificate in PEM", "remove it, and issue it anew: `kalium pki issue`"
        ) from error


def _operator_private(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:
        raise _no_operator_key(path) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_operator_key(path)
    return key


def _no_operator_key(path: Path) -> KaliumError:
    return KaliumError(
        "pki.operator_key", f"cannot use the operator's key {path}", "it is not an Ed25519 key in PEM",
        "restore it from a copy; or remove operator.key and operator.pub, run `kalium pki operator-key`, and sign every policy anew",
    )  # fmt: skip


def _public_pem(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _has_other_mode(path: Path) -> bool:
    return stat.S_IMODE(path.stat().st_mode) != PRIVATE


def _closed_to_others(key: Path, *, dry_run: bool) -> str:
    """Give a private file its mode, and say so when it had another."""
    if not key.exists() or not _has_other_mode(key):
        return ""
    if not dry_run:
        key.chmod(PRIVATE)
    return READABLE_FOR_OTHERS


def _write_identity(identity: Identity, certificate: Path, key: Path) -> None:
    _write(key, identity.key_pem(), PRIVATE)
    _write(certificate, identity.certificate_pem(), PUBLIC)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KaliumError("pki.file", f"cannot read {path}", error.strerror or str(error), "check --dir and the file's owner and mode") from error


def _write(path: Path, data: bytes, mode: int) -> None:
    """Make `path` hold `data`, never a part of it; the file is born with the mode of a private one.

    A file that is replaced keeps its owner: it may have been given to the account of the program that reads it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.fchmod(file.fileno(), mode)
                if path.exists():
                    os.fchown(file.fileno(), path.stat().st_uid, path.stat().st_gid)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise KaliumError("pki.file", f"cannot write {path}", error.strerror or str(error), "check --dir, and that you may write to it") from error
