"""The operator's signature over a compiled policy: the Python twin of runtime/internal/policy/envelope.go.

No daemon holds the private key. The signed bytes begin with the envelope's format, so that no signature over another kind
of document is one over a policy. Ed25519 (RFC 8032) is deterministic: same policy, same key, same envelope.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from kalium.errors import EXIT_ENVIRONMENT, EXIT_NO, KaliumError
from kalium.policy.automaton import CompiledPolicy, decode, malformed, object_of, one_of, text_of
from kalium.policy.limits import ENVELOPE_BYTES_MAX

SIGNED_FORMAT = "kalium-signed/v1"
_SIGNATURE_BYTES = 64


@dataclass(frozen=True)
class Envelope:
    """What an envelope says, its form checked and nothing believed yet."""

    key_id: str
    compiled: bytes
    signature: bytes


def canonical(document: Any) -> bytes:
    """The one spelling of a JSON document: ASCII, sorted names, no spaces, no final line feed."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def key_id(key: Ed25519PublicKey) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the raw public key: it names the key to people and decides nothing."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def sign(compiled: bytes, key: Ed25519PrivateKey) -> bytes:
    """The envelope of `compiled`. Raises KaliumError policy.malformed rather than sign what no guard would take."""
    CompiledPolicy.parse(compiled)
    signature = key.sign(_signed_bytes(compiled))
    return canonical(
        {
            "format": SIGNED_FORMAT,
            "key_id": key_id(key.public_key()),
            "policy": base64.b64encode(compiled).decode("ascii"),
            "signature": base64.b64encode(signature).decode("ascii"),
        }
    )


def read(envelope: bytes) -> Envelope:
    """The parts of an envelope, unverified: for showing it and for naming what is wrong with it."""
    if len(envelope) > ENVELOPE_BYTES_MAX:
        raise malformed(f"an envelope of {len(envelope)} bytes, at most {ENVELOPE_BYTES_MAX}")
    fields = object_of(decode(envelope), "the envelope", "format key_id policy signature")
    one_of(fields["format"], "the envelope's format", [SIGNED_FORMAT])
    return Envelope(
        text_of(fields["key_id"], "the envelope's key_id", 64),
        _base64(fields["policy"], "the envelope's policy"),
        _base64(fields["signature"], "the envelope's signature"),
    )


def verify(envelope: bytes, key: Ed25519PublicKey) -> CompiledPolicy:
    """The policy inside, if the operator signed it. Nothing inside is looked at before the signature over it holds.

    The version is compared with nothing: the caller keeps the highest one that it has seen. Raises KaliumError
    policy.malformed or policy.signature.
    """
    opened = read(envelope)
    if opened.key_id != key_id(key):
        raise _refused(f"it names key {opened.key_id}, the operator's key is {key_id(key)}")
    if len(opened.signature) != _SIGNATURE_BYTES:
        raise _refused(f"a signature of {len(opened.signature)} bytes, not {_SIGNATURE_BYTES}")
    try:
        key.verify(opened.signature, _signed_bytes(opened.compiled))
    except InvalidSignature as error:
        raise _refused(f"the signature does not hold under key {opened.key_id}") from error
    return CompiledPolicy.parse(opened.compiled)


def private_key(pem: bytes, where: str) -> Ed25519PrivateKey:
    """The operator's private key from an unencrypted PEM; `where` names its file in errors."""
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _no_key(where, "an unencrypted private key in PEM") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(where, "an Ed25519 key")
    return key


def public_key(pem: bytes, where: str) -> Ed25519PublicKey:
    """The operator's public key from PEM; `where` names its file in errors."""
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise _no_key(where, "a public key in PEM") from error
    if not isinstance(key, Ed25519PublicKey):
        raise _no_key(where, "an Ed25519 key")
    return key


def _signed_bytes(compiled: bytes) -> bytes:
    return SIGNED_FORMAT.encode("ascii") + b"\n" + compiled


def _base64(value: Any, path: str) -> bytes:
    text = text_of(value, path, ENVELOPE_BYTES_MAX)
    try:
        data = base64.b64decode(text.encode("ascii"), validate=True)
    except ValueError as error:
        raise malformed(f"{path} is not base64") from error
    if base64.b64encode(data).decode("ascii") != text:  # bits behind the last byte: a second spelling of the same bytes
        raise malformed(f"{path} is not base64")
    return data


def _refused(found: str) -> KaliumError:
    return KaliumError(
        "policy.signature", "cannot load a policy", found,
        "sign it again with `kalium policy sign` and the key whose public half the site was given", EXIT_NO,
    )  # fmt: skip


def _no_key(where: str, wanted: str) -> KaliumError:
    return KaliumError(
        "policy.key", f"cannot read the operator's key {where}", f"it is not {wanted}",
        "name the file that `site.yml` made: operator.key signs, operator.pub verifies", EXIT_ENVIRONMENT,
    )  # fmt: skip
