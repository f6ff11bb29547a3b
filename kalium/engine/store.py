"""What outlives the engine, in its state folder: the deployments and the secrets. Instances do not."""

from __future__ import annotations

import base64
import binascii
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from kalium.engine.config import Runtime
from kalium.engine.deployment import Deployment, Refused, parse, secret_name
from kalium.engine.limits import REPLICAS_MAX, SECRET_BYTES_MAX, SECRETS_MAX
from kalium.errors import KaliumError


def _write(path: Path, data: bytes) -> None:
    """Make `path` hold `data`, for root alone, and never a part of it."""
    handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class Store:
    """Files under `root`, one for each deployment and secret. Two engines cannot have the same one open."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pid_files = root / "pids"
        self._functions = root / "functions"
        self._secrets = root / "secrets"
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Make the folders, and hold the store until `close` or the end of this process. Raises KaliumError engine.state or engine.running."""
        try:
            for folder in (self.root, self.pid_files, self._functions, self._secrets):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = (self.root / "lock").open("w", encoding="ascii")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for stale in self.pid_files.iterdir():  # the numbers of an engine that was killed are somebody else's by now
                stale.unlink()
        except BlockingIOError as error:
            self.close()
            raise KaliumError(
                "engine.running", f"cannot use {self.root}", "an engine is running with it", "stop that one first, or give this one another state_dir"
            ) from error
        except OSError as error:
            raise KaliumError(
                "engine.state", f"cannot use {self.root}", str(error), "run the engine as root; `site.yml` makes this folder"
            ) from error

    def close(self) -> None:
        """Let another engine have it. Closing what is not open is no error."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # Deployments

    def save(self, deployment: Deployment, *, replicas: int, created: str) -> None:
        record = {"deployment": deployment.document(), "replicas": replicas, "created": created}
        _write(self._functions / f"{deployment.name}.json", json.dumps(record, indent=1, sort_keys=True).encode("utf-8"))

    def forget(self, name: str) -> None:
        (self._functions / f"{name}.json").unlink(missing_ok=True)

    def load(self, runtimes: Mapping[str, Runtime]) -> Iterator[tuple[Path, Deployment, int, str] | tuple[Path, str]]:
        """Each saved deployment with its replicas and time; for a file that cannot be used, the reason instead."""
        for path in sorted(self._functions.glob("*.json")):
            try:
                record: Any = json.loads(path.read_bytes())
                deployment = parse(record["deployment"], runtimes)
                replicas, created = int(record["replicas"]), str(record["created"])
            except (OSError, ValueError, KeyError, TypeError, Refused) as error:
                yield path, f"{type(error).__name__}: {error}"
                continue
            if deployment.name == path.stem and 0 <= replicas <= REPLICAS_MAX:
                yield path, deployment, replicas, created
            else:
                yield path, f"it is of {deployment.name}, with {replicas} replicas"

    # Secrets

    def secrets(self) -> list[str]:
        """The names of all secrets; their values are never given to a client."""
        return sorted(path.name for path in self._secrets.iterdir() if not path.name.startswith("."))

    def put_secret(self, document: Mapping[str, Any], *, is_new: bool) -> None:
        """Keep a secret. Raises Refused: 409 for a new one that is there, 404 for a changed one that is not."""
        name = secret_name(document.get("name"))
        path = self._secrets / name
        if path.exists() and is_new:
            raise Refused(409, f"secret {name} is there already: use PUT to change it")
        if not path.exists() and not is_new:
            raise Refused(404, f"there is no secret {name}")
        if is_new and len(self.secrets()) >= SECRETS_MAX:
            raise Refused(400, f"there are {SECRETS_MAX} secrets already")
        _write(path, _secret_value(document))

    def forget_secret(self, document: Mapping[str, Any]) -> None:
        """Remove a secret. Raises Refused when there is none."""
        name = secret_name(document.get("name"))
        try:
            (self._secrets / name).unlink()
        except FileNotFoundError as error:
            raise Refused(404, f"there is no secret {name}") from error

    def secrets_of(self, deployment: Deployment) -> dict[str, bytes]:
        """The secrets that a deployment names. Raises Refused when one is not there."""
        found = {}
        for name in deployment.secrets:
            try:
                found[name] = (self._secrets / name).read_bytes()
            except FileNotFoundError as error:
                raise Refused(400, f"there is no secret {name}: create it first") from error
        return found


def _secret_value(document: Mapping[str, Any]) -> bytes:
    raw, text = document.get("rawValue"), document.get("value")
    try:
        value = base64.b64decode(raw, validate=True) if raw else (text or "").encode("utf-8")
    except (AttributeError, TypeError, binascii.Error, ValueError) as error:
        raise Refused(400, "value is no text, or rawValue is not base64") from error
    if len(value) > SECRET_BYTES_MAX:
        raise Refused(400, f"the secret has more than {SECRET_BYTES_MAX} bytes")
    return value
