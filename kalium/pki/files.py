"""The PKI of a site in a directory: ca.crt, ca.key, NAME.crt, NAME.key, and keys that sign: operator.key, operator.pub.

Private files are 0600 and never there in part. A key is written before its certificate; a run that was cut between the two
leaves a pair that does not fit, and the next one makes both anew. Runs that write wait for each other.

A CA is renewed under its own key. It gives way to another in three steps, between which every host gets ca.crt and its pairs:
both are trusted (`next.key` is the new one's), the new one issues, the old one is dropped.
"""

from __future__ import annotations

import base64
import contextlib
import enum
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from cryptography.x509.oid import NameOID

from kalium.errors import KaliumError
from kalium.pki import authority
from kalium.pki.authority import Identity, Role

PRIVATE, PUBLIC = 0o600, 0o644
READABLE_FOR_OTHERS = "the key's file was readable for others"


class CaStep(str, enum.Enum):
    """Of a change of the CA, in this order."""

    BEGIN = "begin"  # ca.crt gets a second CA; the first one still issues
    SWITCH = "switch"  # the second one issues
    FINISH = "finish"  # the first one is dropped


@dataclass(frozen=True)
class Outcome:
    """What a command did to `path`, or in a dry run would do: `why` is "" when everything was good as it was.

    `fault` is what it could not do.
    """

    path: Path
    why: str
    fault: str = ""


@dataclass(frozen=True)
class Shown:
    """One certificate of the directory, for people and programs. `fault` is "" when it can be used."""

    file: str
    subject: str
    role: str  # "ca" for a CA, and "" for a certificate that has none of ours
    identity: str
    names: tuple[str, ...]
    not_after: datetime
    fault: str


def init(directory: Path, *, now: datetime, dry_run: bool = False) -> Outcome:
    """Make the CA, or renew it under its own key, so that what it has issued stays valid."""
    with _alone(directory, dry_run=dry_run):
        return _init(directory, now=now, dry_run=dry_run)


def _init(directory: Path, *, now: datetime, dry_run: bool) -> Outcome:
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
        made = authority.new_ca(now=now, key=found.key if found is not None else None)
        others = [each for each in _certificates(certificate) if each != found.certificate] if found is not None else []
        if found is None:
            _write(key, made.key_pem(), PRIVATE)
        _write(certificate, _pem([made.certificate, *others]), PUBLIC)
    return Outcome(certificate, why or _closed_to_others(key, dry_run=dry_run))


def change_ca(directory: Path, step: CaStep, *, now: datetime, dry_run: bool = False) -> Outcome:
    """Take one step from a CA to another with a key of its own. Raises KaliumError pki.ca for a step whose turn it is not."""
    with _alone(directory, dry_run=dry_run):
        ca, file, key, after = _load_ca(directory, now=now), directory / "ca.crt", directory / "ca.key", directory / "next.key"
        bundle = _certificates(file)
        begun = _identity(file, after)
        if step is CaStep.BEGIN:
            if begun is not None:
                return Outcome(file, "")
            if len(bundle) > 1:
                raise _not_now(directory, step, "the old CA of the last change is still trusted", CaStep.FINISH)
            # A run that was cut has left its key.
            made = authority.new_ca(now=now, key=_ec_key(after) if after.exists() else None)
            if not dry_run:
                _write(after, made.key_pem(), PRIVATE)
                _write(file, _pem([*bundle, made.certificate]), PUBLIC)
            return Outcome(file, "a second CA is trusted")
        if step is CaStep.SWITCH:
            if begun is None:
                if len(bundle) > 1:
                    return Outcome(file, "")
                raise _not_now(directory, step, "there is one CA", CaStep.BEGIN)
            if not dry_run:
                after.replace(key)
            return Outcome(file, "the second CA issues")
        if after.exists():
            raise _not_now(directory, step, "the old CA still issues", CaStep.SWITCH)
        olds = [path.name for path in _pairs(directory) if not authority.is_issued_by(_certificates(path)[0], ca.certificate)]
        if olds:
            found, next_step = f"the old CA issued {', '.join(olds)}", "issue them anew: run playbooks/pki.yml, or remove what nobody uses"
            raise KaliumError("pki.ca", f"cannot drop the old CA in {directory}", found, next_step)
        if len(bundle) > 1 and not dry_run:
            _write(file, _pem([ca.certificate]), PUBLIC)
        return Outcome(file, "the old CA is not trusted any more" if len(bundle) > 1 else "")


def issue(
    directory: Path, name: str, sans: tuple[str, ...], *, role: Role, days: int, now: datetime, identity: str = "", dry_run: bool = False
) -> Outcome:
    """Issue NAME.crt and NAME.key, unless they are what is asked for and valid for long enough."""
    with _alone(directory, dry_run=dry_run):
        ca = _load_ca(directory, now=now)
        # Before a path is made of the name: it judges the arguments.
        made = authority.issue(ca, name, sans, role=role, days=days, now=now, identity=identity)
        certificate, key = directory / f"{name}.crt", directory / f"{name}.key"
        found = _identity(certificate, key)
        why = authority.why_not_good(found, made, ca, days=days, now=now) if found is not None else "there is no certificate with its key yet"
        if why and not dry_run:
            _write_identity(made, certificate, key)
        return Outcome(certificate, why or _closed_to_others(key, dry_run=dry_run))


def renew(directory: Path, *, now: datetime, dry_run: bool = False) -> list[Outcome]:
    """The CA, and each pair that it has issued here, once more for as many days where little remains. Others are faults."""
    done = [init(directory, now=now, dry_run=dry_run)]
    for path in _pairs(directory):
        certificate = _certificates(path)[0]
        role = authority.role_of(certificate)
        common = [str(each.value) for each in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        if role is None or common != [path.stem]:
            done.append(Outcome(path, "", "its role or its name is none of ours: issue it anew"))
        elif not any(authority.is_issued_by(certificate, ca) for ca in _certificates(directory / "ca.crt")):
            done.append(Outcome(path, "", "another CA issued it"))
        else:
            days = max(1, round((authority.lifetime_of(certificate) - authority.BACKDATED) / timedelta(days=1)))
            sans = authority.sans_of(certificate)
            done.append(issue(directory, path.stem, sans, role=role[0], identity=role[1], days=days, now=now, dry_run=dry_run))
    return done


def operator_key(directory: Path, *, dry_run: bool = False) -> Outcome:
    """Make the operator's signing key, unless there is one. A key that is there is never replaced: policies are signed with it."""
    return _signing_key(_operator(directory), dry_run=dry_run)


def audit_key(directory: Path, name: str, *, dry_run: bool = False) -> Outcome:
    """Make the key NAME.key with which an audit log's heads are signed, and NAME.pub. One that is there is never replaced."""
    authority.check_name("--name", name, authority.NAME_LENGTH_MAX)
    what_now = f"run `kalium pki audit-key`, and begin a new log: only the old {name}.pub verifies the one that is there"
    return _signing_key(_SigningKey(directory, name, "audit_key", "audit key", what_now), dry_run=dry_run)


@dataclass(frozen=True)
class _SigningKey:
    """An Ed25519 key in a directory: NAME.key and NAME.pub; and what errors say of it."""

    directory: Path
    name: str
    code: str
    called: str
    what_now: str  # the last step when it is lost

    @property
    def private(self) -> Path:
        return self.directory / f"{self.name}.key"

    @property
    def public(self) -> Path:
        return self.directory / f"{self.name}.pub"

    def unusable(self, path: Path) -> KaliumError:
        return KaliumError(
            f"pki.{self.code}", f"cannot use the {self.called} {path}", "it is not an Ed25519 key in PEM",
            f"restore {self.name}.key from a copy; or remove {self.name}.key and {self.name}.pub, {self.what_now}",
        )  # fmt: skip


def _operator(directory: Path) -> _SigningKey:
    return _SigningKey(directory, "operator", "operator_key", "operator's key", "run `kalium pki operator-key`, and sign every policy anew")


def _signing_key(wanted: _SigningKey, *, dry_run: bool) -> Outcome:
    private, public = wanted.private, wanted.public
    if private.exists():
        key = _signing_private(wanted)
        why = "" if public.exists() and _read(public) == _public_pem(key) else f"{public.name} was not the key's public half"
    elif public.exists():
        raise KaliumError(
            f"pki.{wanted.code}", f"cannot make an {wanted.called} in {wanted.directory}", f"{public.name} is there without {private.name}",
            f"restore {private.name} from a copy; or remove {public.name}, {wanted.what_now}",
        )  # fmt: skip
    else:
        key = Ed25519PrivateKey.generate()
        why = f"there is no {wanted.called} yet"
    if why and not dry_run:
        if not private.exists():
            _write(private, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), PRIVATE)
        _write(public, _public_pem(key), PUBLIC)
    return Outcome(public, why or _closed_to_others(private, dry_run=dry_run))


def operator_raw(directory: Path) -> str:
    """The operator's public key as the runtime is given it: the base64 of its 32 bytes."""
    wanted = _operator(directory)
    try:
        key = load_pem_public_key(_read(wanted.public))
    except ValueError as error:
        raise wanted.unusable(wanted.public) from error
    if not isinstance(key, Ed25519PublicKey):
        raise wanted.unusable(wanted.public)
    return base64.b64encode(key.public_bytes_raw()).decode("ascii")


def show(directory: Path, *, now: datetime) -> list[Shown]:
    """Every certificate of the directory, the CA first."""
    authorities = _certificates(directory / "ca.crt")
    shown = [_shown_ca(directory, each, now) for each in authorities]
    return shown + [_shown(path, _certificates(path)[0], authorities, now) for path in _pairs(directory)]


def _shown_ca(directory: Path, certificate: x509.Certificate, now: datetime) -> Shown:
    file, key = directory / "ca.crt", directory / "ca.key"
    fault = _fault_of_validity(certificate, now)
    if not fault and key.exists():  # hosts that issue nothing have none
        fault = "ca.key is not its key" if _identity(file, key) is None else _fault_of_mode(key)
    return Shown(file.name, certificate.subject.rfc4514_string(), "ca", "", (), certificate.not_valid_after_utc, fault)


def _shown(path: Path, certificate: x509.Certificate, authorities: Sequence[x509.Certificate], now: datetime) -> Shown:
    role = authority.role_of(certificate)
    names = [str(name.value) for name in authority.names_of(certificate)]
    key = path.with_suffix(".key")
    fault = _fault_of_validity(certificate, now)
    if not fault and not any(authority.is_issued_by(certificate, each) for each in authorities):
        fault = "another CA issued it"
    if not fault and role is None:
        fault = "it has no role: issue it anew"
    if not fault:
        fault = f"{key.name} is not its key" if _identity(path, key) is None else _fault_of_mode(key)
    called, identity = (role[0].value, role[1]) if role is not None else ("", "")
    return Shown(path.name, certificate.subject.rfc4514_string(), called, identity, tuple(names), certificate.not_valid_after_utc, fault)


def _fault_of_validity(certificate: x509.Certificate, now: datetime) -> str:
    return "" if certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc else "not valid now"


def _fault_of_mode(key: Path) -> str:
    return f"{key.name} is readable for others" if _has_other_mode(key) else ""


def _pairs(directory: Path) -> list[Path]:
    """Every certificate but the CA's."""
    return sorted(path for path in directory.glob("*.crt") if path.name != "ca.crt")


def _not_now(directory: Path, step: CaStep, found: str, first: CaStep) -> KaliumError:
    next_step = f"run `kalium pki change-ca --dir {directory} --step {first.value}` first"
    return KaliumError("pki.ca", f"cannot {step.value} the change of the CA in {directory}", found, next_step)


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


def _certificates(path: Path) -> list[x509.Certificate]:
    """What is in a file of certificates, at least one."""
    try:
        return x509.load_pem_x509_certificates(_read(path))
    except ValueError as error:
        raise KaliumError(
            "pki.file", f"cannot read {path}", "it is not a certificate in PEM", "remove it, and issue it anew: `kalium pki issue`"
        ) from error


def _ec_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError) as error:
        raise KaliumError("pki.file", f"cannot read {path}", "it is not a private key in PEM", "remove it, and repeat the step") from error
    assert isinstance(key, ec.EllipticCurvePrivateKey)  # nothing of ours writes another
    return key


def _pem(certificates: Sequence[x509.Certificate]) -> bytes:
    return b"".join(each.public_bytes(Encoding.PEM) for each in certificates)


def _signing_private(wanted: _SigningKey) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(_read(wanted.private), password=None)
    except (ValueError, TypeError) as error:
        raise wanted.unusable(wanted.private) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise wanted.unusable(wanted.private)
    return key


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


@contextlib.contextmanager
def _alone(directory: Path, *, dry_run: bool) -> Iterator[None]:
    """Hold the directory against others who write to it: half a pair of each would fit nobody."""
    if dry_run:
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise KaliumError("pki.file", f"cannot use {directory}", error.strerror or str(error), "check --dir, and that you may write to it") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # given back with the handle; whoever holds it writes a few files and ends
        yield
    finally:
        os.close(handle)


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
