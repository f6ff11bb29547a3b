"""The key pair of a log's writer: the private half signs heads, the public half verifies them."""

from __future__ import annotations

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from kalium.errors import KaliumError

KEY_BYTES_MAX = 64 * 1024


def private_key(path: Path) -> Ed25519PrivateKey:
    """The key that signs. Raises KaliumError audit.key."""
    try:
        key = load_pem_private_key(_read(path), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _refused(path, "it is not an unencrypted private key in PEM") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _refused(path, "it is not an Ed25519 key")
    return key


def public_key(path: Path) -> Ed25519PublicKey:
    """The key that verifies. Raises KaliumError audit.key."""
    try:
        key = load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _refused(path, "it is not a public key in PEM") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _refused(path, "it is not an Ed25519 key")
    return key


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(KEY_BYTES_MAX)
    except OSError as error:
        raise _refused(path, error.strerror or str(error)) from error


def _refused(path: Path, found: str) -> KaliumError:
    return KaliumError(
        "audit.key", f"cannot read the audit key {path}", found, "make it by `kalium pki audit-key`, and name NAME.key to write, NAME.pub to verify"
    )
