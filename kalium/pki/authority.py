"""Certificates and keys as values: a CA, what it issues, and whether something that was issued is still good.

EC P-256 with SHA-256 (FIPS 186-5) for certificates, because every TLS stack has it; extensions as RFC 5280 asks, strictly
enough for OpenSSL's X509_V_FLAG_X509_STRICT. Time comes in as an argument.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from kalium.errors import EXIT_USAGE, KaliumError

CA_DAYS = 3650
RENEW_DAYS = 30  # a certificate is renewed when less of it remains
DAYS_MAX = 825  # what public CAs allow at most for a certificate that is not a CA's
BACKDATED = timedelta(minutes=5)  # hosts' clocks differ
NAME_LENGTH_MAX = 64  # of a common name, RFC 5280 ub-common-name
IDENTITY_LENGTH_MAX = 253  # of a host's name, RFC 1035
SCHEME = "kalium"  # of the URI that says who a certificate's owner is to the other parts

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


class Role(str, enum.Enum):
    """What the owner of a certificate is to the others. All but servers have a URI kalium://ROLE/IDENTITY among their names."""

    AGENT = "agent"
    CONTROLLER = "controller"
    CLIENT = "client"  # of a controller: asks for its status and no more
    SERVER = "server"  # anything that only serves; nothing of Kalium takes it for a peer


USES: Mapping[Role, tuple[ObjectIdentifier, ...]] = {
    Role.AGENT: (ExtendedKeyUsageOID.CLIENT_AUTH,),
    Role.CONTROLLER: (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH),  # its status is asked for with its own
    Role.CLIENT: (ExtendedKeyUsageOID.CLIENT_AUTH,),
    Role.SERVER: (ExtendedKeyUsageOID.SERVER_AUTH,),
}
# There is no list of revoked certificates: one that was stolen is good until it ends, so those that open doors here end soon.
DAYS: Mapping[Role, int] = {Role.AGENT: 7, Role.CONTROLLER: 7, Role.CLIENT: 7, Role.SERVER: 365}


@dataclass(frozen=True)
class Identity:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def certificate_pem(self) -> bytes:
        """For a .crt file."""
        return self.certificate.public_bytes(Encoding.PEM)

    def key_pem(self) -> bytes:
        """For a .key file, unencrypted: whoever may read it is who it names."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def is_whole(self) -> bool:
        """Whether the key is the certificate's."""
        return _public_der(self.key.public_key()) == _public_der(self.certificate.public_key())


def read(certificate_pem: bytes, key_pem: bytes) -> Identity | None:
    """The identity in two PEM files, of several certificates that of the key; None when they are not a certificate and its EC key."""
    try:
        certificates = x509.load_pem_x509_certificates(certificate_pem)
        key = load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError):
        return None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        return None
    return next((identity for each in certificates if (identity := Identity(each, key)).is_whole()), None)


def new_ca(*, now: datetime, key: ec.EllipticCurvePrivateKey | None = None) -> Identity:
    """A CA for CA_DAYS. With the `key` of an old one, everything that the old one issued stays valid under the new."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Kalium site CA")])
    certificate = (
        _builder(name, name, key, now=now, until=now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(is_ca=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Identity(certificate, key)


def issue(ca: Identity, name: str, sans: tuple[str, ...], *, role: Role, days: int, now: datetime, identity: str = "") -> Identity:
    """A certificate for `name` with a key of its own, never valid longer than the CA. Without `identity` the URI's is `name`.

    Raises:
        KaliumError: pki.usage, a name or a number that cannot be.
    """
    check_name("--name", name, NAME_LENGTH_MAX)
    check_name("--identity", identity or name, IDENTITY_LENGTH_MAX)
    if name == "ca":
        raise _usage_error(f"--name {name}", "its files would be the CA's", "use another name")
    if not 1 <= days <= DAYS_MAX:
        raise _usage_error(f"--days {days}", f"it is not from 1 to {DAYS_MAX}", "give a number of days from that range")
    key = ec.generate_private_key(ec.SECP256R1())
    until = min(now + timedelta(days=days), ca.certificate.not_valid_after_utc)
    authority = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    names = general_names(name, sans)
    if role is not Role.SERVER:
        names.append(x509.UniformResourceIdentifier(f"{SCHEME}://{role.value}/{identity or name}"))
    certificate = (
        _builder(_subject(name), ca.certificate.subject, key, now=now, until=until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(is_ca=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(USES[role]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(authority), critical=False)
        .sign(ca.key, hashes.SHA256())
    )
    return Identity(certificate, key)


def general_names(name: str, sans: tuple[str, ...]) -> list[x509.GeneralName]:
    """The alternative names: `name` itself when none is given. Raises KaliumError pki.usage for one that cannot be."""
    found: list[x509.GeneralName] = []
    for san in sans or (f"DNS:{name}",):
        kind, _, value = san.partition(":")
        try:
            if kind == "IP":
                found.append(x509.IPAddress(ipaddress.ip_address(value)))
                continue
            if kind == "DNS" and value.isascii() and _NAME.fullmatch(value.removeprefix("*.")):
                found.append(x509.DNSName(value))
                continue
        except ValueError:
            pass  # no address: refused below, like every other text
        raise _usage_error(f"--san {san}", "it is neither DNS:NAME nor IP:ADDRESS", "write for example --san DNS:controller --san IP:127.0.0.1")
    return found


def names_of(certificate: x509.Certificate) -> list[x509.GeneralName]:
    """All alternative names; none for a certificate without the extension."""
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return []


def sans_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The names that `issue` was given as `sans`."""
    kinds = {x509.DNSName: "DNS", x509.IPAddress: "IP"}
    return tuple(f"{kinds[type(name)]}:{name.value}" for name in names_of(certificate) if type(name) in kinds)


def role_of(certificate: x509.Certificate) -> tuple[Role, str] | None:
    """Role and identity as the URI says and the uses confirm; ("server", "") without one; None for what `issue` never makes."""
    uris = [str(name.value) for name in names_of(certificate) if isinstance(name, x509.UniformResourceIdentifier)]
    try:
        uses = tuple(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except x509.ExtensionNotFound:
        return None
    for role in Role:
        start = f"{SCHEME}://{role.value}/"
        if uses == USES[role] and role is not Role.SERVER and len(uris) == 1 and uris[0].startswith(start):
            return role, uris[0].removeprefix(start)
    return (Role.SERVER, "") if uses == USES[Role.SERVER] and not uris else None


def why_not_good(found: Identity, wanted: Identity, ca: Identity, *, days: int, now: datetime) -> str:
    """Why `found` has to give way to `wanted`, which `issue` has just made; "" when it says the same, and for long enough."""
    if not is_issued_by(found.certificate, ca.certificate):
        return "another CA issued it"
    if found.certificate.subject != wanted.certificate.subject:
        return "it is for another name"
    if role_of(found.certificate) != role_of(wanted.certificate):
        return "its role is another"
    if names_of(found.certificate) != names_of(wanted.certificate):
        return "its alternative names are others"
    if lifetime_of(found.certificate) > timedelta(days=days) + BACKDATED:
        return f"it is valid for more than {days} days"
    return why_expiring(found.certificate, now=now)


def is_issued_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether `ca`, or an older certificate of the same key, has signed `certificate`."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def lifetime_of(certificate: x509.Certificate) -> timedelta:
    """From the first moment of its validity to the last."""
    return certificate.not_valid_after_utc - certificate.not_valid_before_utc


def why_expiring(certificate: x509.Certificate, *, now: datetime) -> str:
    """Why the validity of a certificate is not enough any more; "" when it is.

    One made for less than 90 days is renewed in its last third: otherwise one of 30 days would be renewed by every run.
    """
    if now < certificate.not_valid_before_utc:
        return "it is not valid yet"
    if certificate.not_valid_after_utc - now < min(timedelta(days=RENEW_DAYS), lifetime_of(certificate) / 3):
        return f"it expires on {certificate.not_valid_after_utc:%Y-%m-%d}"
    return ""


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, now: datetime, until: datetime) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, is_ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not is_ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_ca,
        crl_sign=is_ca,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def check_name(option: str, name: str, length_max: int) -> None:
    """Raise KaliumError pki.usage for a name that cannot be a file's, or a part of a URI without escapes."""
    if len(name) > length_max or _NAME.fullmatch(name) is None:
        found = "it cannot be the name of a certificate"
        raise _usage_error(f"{option} {name}", found, f"use up to {length_max} letters, digits, dots and dashes")


def _public_der(key: CertificatePublicKeyTypes | ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _usage_error(attempted: str, found: str, next_step: str) -> KaliumError:
    return KaliumError("pki.usage", f"cannot use {attempted}", found, next_step, EXIT_USAGE)
