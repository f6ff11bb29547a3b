"""The verbs `apply`, `history` and `rollback` of `kalium policy`: what is in force, and what was.

The controller takes a policy by itself when its file changes. Here the answer is waited for: what it does not take is not left
where it would be found at the next start, and what it took is kept under its version. Their options are in kalium.cli.policy.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from kalium.cli.files import read_file, write_atomically
from kalium.controller import client
from kalium.controller.config import Config, load
from kalium.controller.store import SUFFIX
from kalium.errors import EXIT_DONE, EXIT_NO, KaliumError
from kalium.policy import envelope
from kalium.policy.automaton import CompiledPolicy
from kalium.policy.limits import ENVELOPE_BYTES_MAX

HISTORY = "history"
HISTORY_MAX = 256  # versions kept of an app; the oldest go first
KEY_BYTES_MAX = 64 * 1024
APP = re.compile("[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")  # as the schema of policies has it: also a name of a file and of a folder
POLL_S = 0.1
WITHDRAWN_S = 2.0  # a controller that has read the file just before it was taken back says so within this


@dataclass(frozen=True)
class Kept:
    """A signed policy in the history of its app. `policy` is None when its signature does not hold any more, and `fault` says why."""

    version: int
    file: Path
    data: bytes
    policy: CompiledPolicy | None
    fault: str


class PolicyFiles:
    """The directory of signed policies of one controller, as `kalium policy` changes it."""

    def __init__(self, directory: Path, key: Ed25519PublicKey) -> None:
        self.directory = directory
        self.key = key

    def file(self, app: str) -> Path:
        """Where the controller looks for the policy of `app`. Raises KaliumError for what cannot be the name of one."""
        if APP.fullmatch(app) is None:
            raise KaliumError("policy.value", f"cannot look for the policy of {app}", "it is no name of an application", "name one", EXIT_NO)
        return self.directory / f"{app}{SUFFIX}"

    def there(self, app: str) -> bytes | None:
        """What the controller finds now; None for no file."""
        path = self.file(app)
        return read_file(path, ENVELOPE_BYTES_MAX) if path.is_file() else None

    def verified(self, data: bytes | None) -> CompiledPolicy | None:
        """The policy in `data`, if the operator has signed it: what a file holds that anybody could have written counts for nothing."""
        try:
            return envelope.verify(data, self.key) if data else None
        except KaliumError:
            return None

    def put(self, app: str, data: bytes | None) -> None:
        """Make the file hold `data`, whole; None: remove it."""
        if data is None:
            self.file(app).unlink(missing_ok=True)
        else:
            write_atomically(self.file(app), data)

    def history(self, app: str) -> list[Kept]:
        """The versions that were in force, rising."""
        folder = self.file(app).parent / HISTORY / app
        names = [path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}")] if folder.is_dir() else []
        versions = sorted(int(name) for name in names if name.isascii() and name.isdigit())
        return [self._kept(folder / f"{version}{SUFFIX}", version, app) for version in versions]

    def folder(self, app: str) -> Path:
        """Where the history of `app` is kept; made, if it is not there."""
        folder = self.directory / HISTORY / app
        try:
            folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        except OSError as error:
            raise KaliumError("cli.file", f"cannot make {folder}", error.strerror or str(error), "check what is there, and your rights") from error
        return folder

    def _kept(self, path: Path, version: int, app: str) -> Kept:
        data = read_file(path, ENVELOPE_BYTES_MAX)
        try:
            policy = envelope.verify(data, self.key)
        except KaliumError as error:
            return Kept(version, path, data, None, error.found)
        if (policy.app, policy.version) != (app, version):
            return Kept(version, path, data, None, f"it is version {policy.version} of {policy.app}")
        return Kept(version, path, data, policy, "")

    def keep(self, data: bytes) -> None:
        """Add a signed policy to the history of its app. What does not verify is not worth keeping."""
        policy = self.verified(data)
        if policy is None:
            return
        write_atomically(self.folder(policy.app) / f"{policy.version}{SUFFIX}", data)
        for kept in self.history(policy.app)[:-HISTORY_MAX]:
            kept.file.unlink(missing_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else applies meanwhile."""
        handle = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def run_apply(arguments: argparse.Namespace) -> int:
    """Put a signed policy in force."""
    config, files = _site(arguments.config)
    data = read_file(arguments.file, ENVELOPE_BYTES_MAX)
    policy = envelope.verify(data, files.key)
    with files.alone():
        return _apply(arguments, config, files, policy, data, f"version {policy.version}")


def run_rollback(arguments: argparse.Namespace) -> int:
    """Sign the compiled form of an old version under the next one, and put it in force."""
    config, files = _site(arguments.config)
    private = envelope.private_key(read_file(arguments.key, KEY_BYTES_MAX), str(arguments.key))
    attempted = f"cannot go back to version {arguments.to} of {arguments.app}"
    if envelope.key_id(private.public_key()) != envelope.key_id(files.key):
        raise KaliumError(
            "policy.signature", attempted, f"{arguments.key} is not the key whose public half is {config.operator_key}",
            "name the operator's private key by --key", EXIT_NO,
        )  # fmt: skip
    with files.alone():
        kept = {version.version: version for version in files.history(arguments.app)}
        found = kept.get(arguments.to)
        if found is None or found.policy is None:
            raise KaliumError(
                "policy.version", attempted, found.fault if found else "it is not in the history",
                f"`kalium policy history {arguments.app}` lists what is; sign the old source under a new version otherwise", EXIT_NO,
            )  # fmt: skip
        in_force = client.status(config).policies.get(arguments.app, 0)
        if in_force == found.version:
            raise KaliumError("policy.version", attempted, "it is in force", "name another version by --to", EXIT_NO)
        there = files.verified(files.there(arguments.app))
        newest = max(in_force, *kept, there.version if there else 0)
        document = json.loads(envelope.read(found.data).compiled)
        compiled = envelope.canonical(document | {"version": newest + 1})
        policy = CompiledPolicy.parse(compiled)
        what = f"version {policy.version}, the text of version {found.version},"
        return _apply(arguments, config, files, policy, envelope.sign(compiled, private), what)


def run_history(arguments: argparse.Namespace) -> int:
    """Print the versions that were in force."""
    _, files = _site(arguments.config)
    there = files.there(arguments.app)
    history = files.history(arguments.app)
    if arguments.output == "json":
        print(json.dumps([_kept_for_programs(kept, there) for kept in history], indent=2, sort_keys=True))
    else:
        for kept in history:
            print(_kept_for_people(kept, there))
        if not history:
            print(f"no version of {arguments.app} was applied; {files.file(arguments.app)} is {'there' if there else 'not there'}")
    return EXIT_DONE if history else EXIT_NO


def _kept_for_programs(kept: Kept, there: bytes | None) -> dict[str, Any]:
    policy = kept.policy
    return {
        "version": kept.version,
        "file": str(kept.file),
        "sha256": hashlib.sha256(kept.data).hexdigest(),
        "time": _moment(kept),
        "mode": policy.mode.value if policy else None,
        "source_sha256": policy.source_sha256 if policy else None,
        "in_place": kept.data == there,
        "fault": kept.fault,
    }


def _kept_for_people(kept: Kept, there: bytes | None) -> str:
    about = f"mode {kept.policy.mode.value}, source {kept.policy.source_sha256[:12]}" if kept.policy else f"cannot be used: {kept.fault}"
    return f"{'*' if kept.data == there else ' '} {kept.version:<10} {_moment(kept)}  {about}"


def _moment(kept: Kept) -> str:
    return datetime.fromtimestamp(kept.file.stat().st_mtime, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _site(path: Path) -> tuple[Config, PolicyFiles]:
    config = load(path)
    key = envelope.public_key(read_file(config.operator_key, KEY_BYTES_MAX), str(config.operator_key))
    if not config.policies_dir.is_dir():
        raise KaliumError(
            "cli.file", f"cannot use the policies in {config.policies_dir}", "it is no folder", f"make the one that policies_dir of {path} names"
        )
    return config, PolicyFiles(config.policies_dir, key)


def _apply(arguments: argparse.Namespace, config: Config, files: PolicyFiles, policy: CompiledPolicy, data: bytes, what: str) -> int:
    """Put `data` in force, or say that it is, or raise; what was there before is there again when the controller does not take it."""
    before = files.there(policy.app)
    in_force = client.status(config).policies.get(policy.app, 0)
    _refuse_going_back(files, policy, data, before, in_force)
    is_new = in_force != policy.version
    is_changed = is_new or before != data
    if arguments.dry_run:
        _tell(arguments, policy, is_changed=is_changed, text=f"{what} {'would be put in force' if is_changed else 'is in force'}")
        return EXIT_DONE
    if is_changed:
        files.folder(policy.app)  # that what is in force cannot be kept has to be known before it is
        if before is not None:
            files.keep(before)
        files.put(policy.app, data)
        if is_new and not _is_taken(config, policy, arguments.wait):
            _take_back(config, files, policy, data, before, arguments.wait)
        files.keep(data)
    _tell(arguments, policy, is_changed=is_changed, text=f"{what} is in force")
    return EXIT_DONE


def _refuse_going_back(files: PolicyFiles, policy: CompiledPolicy, data: bytes, before: bytes | None, in_force: int) -> None:
    """Raise for what the controller would refuse: a version that does not grow, or the same one with other bytes."""
    there = files.verified(before)
    is_known = data == before or any(kept.data == data for kept in files.history(policy.app))
    highest = max(in_force, there.version if there and there.app == policy.app else 0)
    if policy.version > highest or (policy.version == highest == in_force and is_known):
        return
    same = f"version {highest} is in force{'' if highest == in_force else ' or about to be'}"
    found = f"{same}, with another text as far as is known here" if policy.version == highest else same
    raise KaliumError(
        "policy.version", f"cannot apply version {policy.version} of {policy.app}", f"{found}, and versions only grow",
        f"write `version: {highest + 1}` into the policy and sign it; `kalium policy rollback` goes back to an old text", EXIT_NO,
    )  # fmt: skip


def _is_taken(config: Config, policy: CompiledPolicy, wait_s: float) -> bool:
    """Whether the controller has it in force within `wait_s`. One that is restarting meanwhile counts as one that has not yet."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            if client.status(config).policies.get(policy.app) == policy.version:
                return True
        except KaliumError:
            if time.monotonic() >= deadline:
                return False
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL_S)


def _take_back(config: Config, files: PolicyFiles, policy: CompiledPolicy, data: bytes, before: bytes | None, wait_s: float) -> None:
    """Restore what was there, and raise; unless the controller had already read the new file, which then has to stay."""
    files.put(policy.app, before)
    if _is_taken(config, policy, WITHDRAWN_S):
        files.put(policy.app, data)
        return
    restored = f"{files.file(policy.app)} is {'as it was' if before is not None else 'removed again'}"
    raise KaliumError(
        "policy.not_taken", f"cannot apply version {policy.version} of {policy.app}",
        f"the controller has not taken it within {wait_s:.0f} s; {restored}",
        "its log says why (`policy_refused`, `policies_unreadable`): another operator_key or policies_dir than when it started", EXIT_NO,
    )  # fmt: skip


def _tell(arguments: argparse.Namespace, policy: CompiledPolicy, *, is_changed: bool, text: str) -> None:
    if arguments.output == "json":
        told = {"app": policy.app, "version": policy.version, "mode": policy.mode.value, "changed": is_changed, "dry_run": arguments.dry_run}
        print(json.dumps(told, indent=2, sort_keys=True))
    else:
        print(f"{'changed' if is_changed else 'unchanged'}: {policy.app}: {text}, mode {policy.mode.value}")
