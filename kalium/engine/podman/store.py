"""The deployments and the secrets of a gateway on podman, in its state folder. Instances do not outlive it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kalium.engine.deployment import Deployment, Guarding, Refused, parse
from kalium.engine.limits import REPLICAS_MAX, SECRETS_MAX
from kalium.engine.state import State, write_whole


class Store:
    """Files in the folders of `state`, one for each deployment and secret."""

    def __init__(self, state: State) -> None:
        self.pid_files = state.root / "pids"
        self._state = state
        self._functions = state.root / "functions"
        self._secrets = state.root / "secrets"

    def open(self) -> None:
        """Make the folders. Raises KaliumError engine.state."""
        for folder in (self.pid_files, self._functions, self._secrets):
            self._state.folder(folder.name)
        for stale in self.pid_files.iterdir():  # the numbers of an engine that was killed are somebody else's by now
            stale.unlink()

    # Deployments

    def save(self, deployment: Deployment, *, replicas: int, created: str) -> None:
        record = {"deployment": deployment.document(), "replicas": replicas, "created": created}
        write_whole(self._functions / f"{deployment.name}.json", json.dumps(record, indent=1, sort_keys=True).encode("utf-8"))

    def forget(self, name: str) -> None:
        (self._functions / f"{name}.json").unlink(missing_ok=True)

    def load(self, runtimes: Mapping[str, Guarding]) -> Iterator[tuple[Path, Deployment, int, str] | tuple[Path, str]]:
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

    def put_secret(self, name: str, value: bytes, *, is_new: bool) -> None:
        """Keep a secret. Raises Refused: 409 for a new one that is there, 404 for a changed one that is not."""
        path = self._secrets / name
        if path.exists() and is_new:
            raise Refused(409, f"secret {name} is there already: use PUT to change it")
        if not path.exists() and not is_new:
            raise Refused(404, f"there is no secret {name}")
        if is_new and len(self.secrets()) >= SECRETS_MAX:
            raise Refused(400, f"there are {SECRETS_MAX} secrets already")
        write_whole(path, value)

    def forget_secret(self, name: str) -> None:
        """Remove a secret. Raises Refused when there is none."""
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
