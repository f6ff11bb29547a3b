"""The podman commands that the engine uses, for every podman from 3.4 on. The package's docstring says why each option is there."""

from __future__ import annotations

import asyncio
import io
import json
import tarfile
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

from kalium.engine.config import Runtime
from kalium.engine.deployment import APP_ANNOTATION, OURS, Deployment
from kalium.engine.limits import CONTAINER_LOG_BYTES_MAX, PODMAN_AT_ONCE, PODMAN_SECONDS_MAX, STOP_SECONDS
from kalium.engine.podman.command import CommandFailed, Done, Programs, checked
from kalium.engine.podman.network import namespace_of

ENGINE_LABEL = OURS + "engine"  # the bridge's name: engines beside each other leave each other's containers alone
INSTANCE_LABEL = OURS + "instance"
FUNCTION_ANNOTATION = OURS + "function"
SECRETS = "var/openfaas/secrets"  # under the container's root, as in OpenFaaS


class ImageAbsent(Exception):
    """There is no such image on this machine, and none is ever fetched."""


@dataclass(frozen=True)
class Surroundings:
    """What every container of an engine gets, whatever its function."""

    engine: str
    nameserver: str
    hosts: Mapping[str, str]
    pid_files: Path


def secrets_archive(secrets: Mapping[str, bytes]) -> bytes:
    """The folder of a function's secrets, readable for whatever user it runs as."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        parts = SECRETS.split("/")
        for depth in range(len(parts)):
            folder = tarfile.TarInfo("/".join(parts[: depth + 1]))
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(folder)
        for name, value in sorted(secrets.items()):
            file = tarfile.TarInfo(f"{SECRETS}/{name}")
            file.size, file.mode = len(value), 0o444
            archive.addfile(file, io.BytesIO(value))
    return packed.getvalue()


class Podman:
    """Containers by podman; at most PODMAN_AT_ONCE commands run at the same time. Raises CommandFailed."""

    def __init__(self, programs: Programs, command: Sequence[str], surroundings: Surroundings) -> None:
        self._run = programs.run
        self._stream = programs.stream
        self._command = tuple(command)
        self._surroundings = surroundings
        self._turn = asyncio.Semaphore(PODMAN_AT_ONCE)

    async def _podman(self, *words: str, runtime: Runtime | None = None, stdin: bytes = b"") -> bytes:
        flags = () if runtime is None else ("--runtime", str(runtime.path), *(f"--runtime-flag={flag}" for flag in runtime.flags))
        async with self._turn:
            argv = [*self._command, "--cgroup-manager", "cgroupfs", *flags, *words]
            return await checked(self._run, argv, seconds_max=PODMAN_SECONDS_MAX, stdin=stdin)

    async def image_id(self, image: str) -> str:
        """The id of a local image. Raises ImageAbsent."""
        try:
            output = await self._podman("image", "inspect", "--format", "{{.Id}}", image)
        except CommandFailed as error:
            absent = ("no such image", "image not known", "unable to find", "failed to find image")
            if any(words in error.found.lower() for words in absent):
                raise ImageAbsent(image) from error
            raise
        return output.decode("ascii", "replace").strip()

    async def create(self, instance: str, deployment: Deployment, image: str, runtime: Runtime, name: str) -> str:
        """Make a container, which does not run yet, and return its id."""
        output = await self._podman(*self._create_words(instance, deployment, image, name), runtime=runtime)
        return output.decode("ascii", "replace").split()[-1]

    def _create_words(self, instance: str, deployment: Deployment, image: str, name: str) -> Iterator[str]:
        around = self._surroundings
        yield from ("create", "--name", name, "--hostname", deployment.name, "--pull", "never", "--restart", "no")
        yield from ("--network", f"ns:/run/netns/{namespace_of(instance)}", "--dns", around.nameserver, "--dns-search", ".")
        yield from (word for host, address in around.hosts.items() for word in ("--add-host", f"{host}:{address}"))
        yield from ("--cap-drop", "all", "--security-opt", "no-new-privileges", "--cgroups", "no-conmon", "--systemd", "false")
        # What an image calls a volume would be a writable folder of the host, which a guarded sandbox does not take.
        yield from ("--image-volume", "tmpfs")
        yield from ("--http-proxy=false", "--stop-timeout", str(STOP_SECONDS), "--pidfile", str(self.pid_file(instance)))
        yield from ("--log-driver", "k8s-file", "--log-opt", f"max-size={CONTAINER_LOG_BYTES_MAX}")
        yield from ("--label", f"{ENGINE_LABEL}={around.engine}", "--label", f"{INSTANCE_LABEL}={instance}")
        # Nothing but what the guard reads becomes an OCI annotation: runsc takes flags out of others.
        yield from ("--annotation", f"{FUNCTION_ANNOTATION}={deployment.name}")
        if deployment.app:
            yield from ("--annotation", f"{APP_ANNOTATION}={deployment.app}")
        yield from (word for key, value in deployment.for_guard.items() for word in ("--annotation", f"{key}={value}"))
        if deployment.is_read_only:
            yield "--read-only"
        if deployment.process:
            yield from ("--env", f"fprocess={deployment.process}")
        yield from (word for key, value in deployment.variables.items() for word in ("--env", f"{key}={value}"))
        yield image

    def pid_file(self, instance: str) -> Path:
        """Where podman writes the process id of an instance's sandbox."""
        return self._surroundings.pid_files / f"{instance}.pid"

    async def put_secrets(self, container: str, secrets: Mapping[str, bytes]) -> None:
        """Write secrets into a container that does not run yet: no volume is shared with anything."""
        await self._podman("cp", "-", f"{container}:/", stdin=secrets_archive(secrets))

    async def start(self, container: str, runtime: Runtime) -> None:
        await self._podman("start", container, runtime=runtime)

    async def logs(self, container: str, *, tail: int, since: str = "") -> list[str]:
        """The last `tail` lines of a container's output, each behind its time, oldest first per stream."""
        words = ("logs", "--timestamps", "--tail", str(tail), *(("--since", since) if since else ()), container)
        async with self._turn:
            argv = [*self._command, "--cgroup-manager", "cgroupfs", *words]
            done: Done = await self._run(argv, seconds_max=PODMAN_SECONDS_MAX)
        if done.code != 0:
            raise CommandFailed(argv, done.told())
        return sorted((done.output + done.error).decode("utf-8", "replace").splitlines(), key=lambda line: line.partition(" ")[0])

    async def follow(self, container: str, *, tail: int, since: str = "") -> AsyncGenerator[str, None]:
        """As `logs`, and then every line as it is printed, until the container ends or nobody reads."""
        words = ("logs", "--follow", "--timestamps", "--tail", str(tail), *(("--since", since) if since else ()), container)
        async with aclosing(self._stream([*self._command, "--cgroup-manager", "cgroupfs", *words])) as lines:
            async for line in lines:
                yield line.decode("utf-8", "replace")

    async def remove(self, container: str) -> None:
        """Stop and remove a container. One that is not there is no error."""
        await self._podman("rm", "--force", "--ignore", container)

    async def leftovers(self) -> dict[str, str]:
        """Containers that an engine of ours left, whoever made them: id of the instance -> name of the container."""
        # Both labels are ours together: a container that somebody labelled as the engine's alone is left where it is.
        labels = (f"label={ENGINE_LABEL}={self._surroundings.engine}", f"label={INSTANCE_LABEL}")
        output = await self._podman("ps", "--all", *(word for label in labels for word in ("--filter", label)), "--format", "json")
        entries = json.loads(output or b"[]") or []
        return {str(entry["Labels"][INSTANCE_LABEL]): str(entry["Id"]) for entry in entries}
