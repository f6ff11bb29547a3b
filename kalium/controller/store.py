"""The directory of signed policies: <app>.signed.json, verified with the operator's public key.

`changes` reads files and may block, so the shell calls it in a thread. A file that is bad is reported once for each content,
and what was good before it stays in force: nothing here takes a policy away.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from kalium.errors import KaliumError
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.envelope import verify
from kalium.protocol.limits import ENVELOPE_BYTES_MAX

SUFFIX = ".signed.json"
FILES_MAX = 256
SETTLED_NS = 2_000_000_000  # a file younger than this may be written again within one tick of its clock, so it is read again


@dataclass(frozen=True)
class Found:
    """A file with a new content: a verified policy, or why it is refused."""

    file: str
    envelope: bytes
    policy: CompiledPolicy | None
    refusal: KaliumError | None


@dataclass(frozen=True)
class _Seen:
    """A file as it was read last. `digest` is "" when it could not be read."""

    stamp: tuple[int, int, int]
    digest: str


class PolicyDirectory:
    """Remembers what it has reported. Used by one thread at a time."""

    def __init__(self, directory: Path, key: Ed25519PublicKey, *, clock_ns: Callable[[], int]) -> None:
        """`clock_ns` is the wall clock, against which the times of files are compared."""
        self._directory = directory
        self._key = key
        self._clock_ns = clock_ns
        self._seen: dict[str, _Seen] = {}

    def changes(self) -> list[Found]:
        """What is new since the last call, in the order of the names. Raises KaliumError when the directory cannot be read."""
        try:
            names = sorted(path.name for path in self._directory.iterdir() if path.name.endswith(SUFFIX) and not path.name.startswith("."))
        except OSError as error:
            raise KaliumError(
                "controller.policies", f"cannot read the policies in {self._directory}", error.strerror or str(error),
                "create the directory that `policies_dir` of the configuration names, readable for the controller",
            ) from error  # fmt: skip
        if len(names) > FILES_MAX:
            raise KaliumError(
                "controller.policies", f"cannot read the policies in {self._directory}", f"{len(names)} files *{SUFFIX}, at most {FILES_MAX}",
                "remove the files of apps that are not there any more",
            )  # fmt: skip
        for name in set(self._seen) - set(names):
            del self._seen[name]
        return list(self._changes(names))

    def _changes(self, names: list[str]) -> Iterator[Found]:
        for name in names:
            before = self._seen.get(name)
            try:
                stamp, envelope = self._read(name, before)
            except OSError as error:
                self._seen[name] = _Seen((0, 0, 0), "")
                if before is None or before.digest:
                    yield Found(name, b"", None, self._refusal(name, error.strerror or str(error)))
                continue
            if envelope is None:
                continue
            digest = hashlib.sha256(envelope).hexdigest()
            self._seen[name] = _Seen(stamp, digest)
            if before is None or digest != before.digest:
                yield self._judge(name, envelope)

    def _read(self, name: str, before: _Seen | None) -> tuple[tuple[int, int, int], bytes | None]:
        """The file's stamp and bytes, at most one more than allowed; None for bytes that cannot have changed."""
        # O_NONBLOCK: a pipe of that name must not hold the thread for ever.
        handle = os.open(self._directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise OSError(0, "it is no regular file")
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
            if before is not None and stamp == before.stamp and found.st_mtime_ns < self._clock_ns() - SETTLED_NS:
                return stamp, None
            return stamp, file.read(ENVELOPE_BYTES_MAX + 1)

    def _judge(self, name: str, envelope: bytes) -> Found:
        if len(envelope) > ENVELOPE_BYTES_MAX:
            return Found(name, envelope, None, self._refusal(name, f"more than {ENVELOPE_BYTES_MAX} bytes"))
        try:
            policy = verify(envelope, self._key)
        except KaliumError as error:
            return Found(name, envelope, None, error)
        if name != policy.app + SUFFIX:
            return Found(name, envelope, None, self._refusal(name, f"it holds the policy of app {policy.app}"))
        return Found(name, envelope, policy, None)

    def _refusal(self, name: str, found: str) -> KaliumError:
        return KaliumError(
            "controller.policy_file", f"cannot load {self._directory / name}", found, f"put what `kalium policy sign` wrote into <app>{SUFFIX}"
        )
