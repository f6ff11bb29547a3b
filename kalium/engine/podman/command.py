"""Running the programs that the engine uses, each with a deadline. Nothing here knows what they do."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from kalium.engine.backend import BackendFailed
from kalium.engine.deadline import within
from kalium.engine.limits import ERROR_CHARACTERS_MAX, STREAMED_LINE_BYTES_MAX
from kalium.errors import KaliumError

OUTPUT_BYTES_MAX = 32 << 20
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class CommandFailed(BackendFailed):
    """A program that did not do what it was run for: `found` is in its own words, shortened."""

    def __init__(self, argv: Sequence[str], found: str) -> None:
        super().__init__(f"{argv[0]}: {found}")
        self.found = found


@dataclass(frozen=True)
class Done:
    """A program that has ended."""

    code: int
    output: bytes = b""
    error: bytes = b""

    def told(self) -> str:
        """The last of what it said on standard error, on one line, or its exit status."""
        text = " ".join(self.error.decode("utf-8", "replace").split())
        return text[-ERROR_CHARACTERS_MAX:] if text else f"exit status {self.code}"


class Run(Protocol):
    """Runs a program to its end. Raises CommandFailed when it cannot be run or exceeds `seconds_max`, not for its exit status."""

    async def __call__(self, argv: Sequence[str], *, seconds_max: float, stdin: bytes = b"") -> Done: ...


class Stream(Protocol):
    """Runs a program and gives the lines that it prints, on either stream, until it ends or is read no longer. Raises CommandFailed."""

    def __call__(self, argv: Sequence[str]) -> AsyncGenerator[bytes, None]: ...


async def checked(run: Run, argv: Sequence[str], *, seconds_max: float, stdin: bytes = b"") -> bytes:
    """The output of a program. Raises CommandFailed also for an exit status other than 0."""
    done = await run(argv, seconds_max=seconds_max, stdin=stdin)
    if done.code != 0:
        raise CommandFailed(argv, done.told())
    return done.output


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """What programs get: a supervisor may start us without the folders of administration on PATH, and without HOME."""
    return {**inherited, "PATH": f"{inherited['PATH']}:{SYSTEM_PATH}" if "PATH" in inherited else SYSTEM_PATH, "HOME": inherited.get("HOME", "/root")}


async def run_program(argv: Sequence[str], *, seconds_max: float, stdin: bytes = b"") -> Done:
    """`Run` for real. Its output goes to files: what podman leaves running would keep a pipe open for ever."""
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as error:
        given.write(stdin)
        given.seek(0)
        try:
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=given, stdout=output, stderr=error, start_new_session=True, env=environment(os.environ)
            )
        except OSError as failure:
            raise CommandFailed(argv, f"cannot be run: {failure.strerror or failure}") from failure
        try:
            code = await within(seconds_max, process.wait())
        except asyncio.TimeoutError as failure:
            raise CommandFailed(argv, f"did not end within {seconds_max:.0f} s") from failure
        finally:
            if process.returncode is None:  # too late, or nobody waits for it any more
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        output.seek(0)
        error.seek(0)
        return Done(code, output.read(OUTPUT_BYTES_MAX), error.read(OUTPUT_BYTES_MAX))


async def stream_program(argv: Sequence[str]) -> AsyncGenerator[bytes, None]:
    """`Stream` for real. The program is killed when it is read no longer."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
            start_new_session=True, env=environment(os.environ), limit=STREAMED_LINE_BYTES_MAX,
        )  # fmt: skip
    except OSError as failure:
        raise CommandFailed(argv, f"cannot be run: {failure.strerror or failure}") from failure
    assert process.stdout is not None, "it was asked for"
    try:
        while line := await process.stdout.readline():
            yield line.rstrip(b"\n")
    except ValueError as failure:
        raise CommandFailed(argv, f"printed a line of more than {STREAMED_LINE_BYTES_MAX} bytes") from failure
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


@dataclass(frozen=True)
class Programs:
    """How programs are run."""

    run: Run = run_program
    stream: Stream = stream_program


async def require_program(run: Run, argv: Sequence[str], next_step: str) -> str:
    """The first line of what `argv` answers. Raises KaliumError engine.program when it cannot be run."""
    try:
        output = await checked(run, argv, seconds_max=30.0)
    except CommandFailed as error:
        raise KaliumError("engine.program", f"cannot run {' '.join(argv)}", error.found, next_step) from error
    return output.decode("utf-8", "replace").partition("\n")[0].strip()
