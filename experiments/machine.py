"""The hosts of a site as the tasks use them: run a command, read a file, follow a program's output, on this machine or over SSH.

A site on one machine and one on many are asked by the same calls. What fails says on which host, and what to do next.
"""

from __future__ import annotations

import abc
import contextlib
import shlex
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar

from experiments import hostfiles
from experiments.errors import ExperimentError
from experiments.site import Host

Result = TypeVar("Result")

CALL_SECONDS_MAX = 30.0
STOP_SECONDS_MAX = 15.0
READY_POLL_SECONDS = 0.05
OUTPUT_BYTES_MAX = 256 << 20  # what one command may print into memory here
AT_ONCE_MAX = 16  # hosts that are asked at the same time
# Size of a file, then what stands in it after $2 bytes; a file that does not exist has no bytes.
READ_FROM = 'size=$(stat -L -c %s -- "$1" 2>/dev/null || echo 0); echo "$size"; [ "$size" -le "$2" ] || tail -c "+$(($2 + 1))" -- "$1"'
# Ends the program when its input ends: whoever started it let go of it, or the link to him is lost.
UNTIL_INPUT_ENDS = '"$@" & child=$!; cat >/dev/null; kill -TERM "$child" 2>/dev/null; wait "$child"'


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    status: int
    out: bytes
    err: bytes

    def complaint(self) -> str:
        """What it said of its failure."""
        return self.err.decode("utf-8", "replace").strip()[-500:] or f"exit status {self.status}"


class Stream(Protocol):
    """A program that runs on a host while its output goes into a file here."""

    def said(self) -> bytes:
        """What it wrote to standard error so far."""

    def stop(self) -> None:
        """End it, and return when all of its output is in the file. Raises ExperimentError when output was lost."""


class Machine(abc.ABC):
    """One host. Every call has a deadline and raises ExperimentError with the host's name when the host cannot be asked."""

    def __init__(self, host: Host) -> None:
        self.host = host

    @abc.abstractmethod
    def run(
        self, command: Sequence[str], *, root: bool = False, stdin: bytes = b"", seconds_max: float = CALL_SECONDS_MAX, again: bool = False
    ) -> Done:
        """Run `command` to its end. `again`: it changes nothing, so that it may be repeated when the link was lost meanwhile."""

    @abc.abstractmethod
    def stream(self, command: Sequence[str], output: Path, *, root: bool = False) -> Stream:
        """Start `command`, which must end when its standard input does, and write what it prints to the new file `output`."""

    @abc.abstractmethod
    def tunnel(self, address: str, port: int, *, seconds_max: float) -> Any:
        """A TCP connection that begins on this host, as a socket; what it reaches need not be reachable from here."""

    @abc.abstractmethod
    def copy(self, command: Sequence[str], output: IO[bytes], *, root: bool = False, seconds_max: float) -> Done:
        """Run `command` and write what it prints to `output` as it comes; `out` of the result is empty."""

    @abc.abstractmethod
    def read_bytes(self, path: Path) -> bytes:
        """The whole of a file."""

    @abc.abstractmethod
    def read_from(self, path: Path, offset: int) -> tuple[int, bytes]:
        """Size of a file now, and what stands in it after the first `offset` bytes; 0 and nothing when there is none yet."""

    def checked(
        self, command: Sequence[str], *, root: bool = False, stdin: bytes = b"", seconds_max: float = CALL_SECONDS_MAX, again: bool = False
    ) -> bytes:
        """What `command` prints. Raises ExperimentError when it fails."""
        done = self.run(command, root=root, stdin=stdin, seconds_max=seconds_max, again=again)
        if done.status != 0:
            raise ExperimentError(
                "host.command",
                f"run `{shlex.join(command)[:200]}` on host {self.host}",
                done.complaint(),
                f"run it there by hand; see {self.host.name}'s logs",
            )
        return done.out

    def close(self) -> None:  # noqa: B027 - most machines hold nothing
        """Let go of the connection, if there is one."""


class LocalMachine(Machine):
    """This machine. Root's files are asked for with `sudo -n`."""

    def run(
        self,
        command: Sequence[str],
        *,
        root: bool = False,
        stdin: bytes = b"",
        seconds_max: float = CALL_SECONDS_MAX,
        again: bool = False,  # noqa: ARG002 - there is no link to lose
    ) -> Done:
        whole = hostfiles.as_root(list(command)) if root else list(command)
        try:
            done = subprocess.run(whole, input=stdin, capture_output=True, timeout=seconds_max, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise self._failed(command, str(error)) from error
        return Done(done.returncode, done.stdout, done.stderr)

    def copy(self, command: Sequence[str], output: IO[bytes], *, root: bool = False, seconds_max: float) -> Done:
        whole = hostfiles.as_root(list(command)) if root else list(command)
        try:
            done = subprocess.run(whole, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.PIPE, timeout=seconds_max, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise self._failed(command, str(error)) from error
        return Done(done.returncode, b"", done.stderr)

    def stream(self, command: Sequence[str], output: Path, *, root: bool = False) -> Stream:
        whole = hostfiles.as_root(list(command)) if root else list(command)
        try:
            with output.open("xb") as file:
                process = subprocess.Popen(whole, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            raise self._failed(command, str(error)) from error
        return _LocalStream(process)

    def tunnel(self, address: str, port: int, *, seconds_max: float) -> Any:
        return socket.create_connection((address, port), timeout=seconds_max)

    def read_bytes(self, path: Path) -> bytes:
        return hostfiles.read_bytes(path)

    def read_from(self, path: Path, offset: int) -> tuple[int, bytes]:
        size = hostfiles.size(path)
        return size, hostfiles.read_from(path, offset) if size > offset else b""

    def _failed(self, command: Sequence[str], found: str) -> ExperimentError:
        return ExperimentError("host.command", f"run `{shlex.join(command)[:200]}` here", found, "run `sudo -v` first, or the task as root")


class _LocalStream:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._said = bytearray()
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        assert self._process.stderr is not None
        while piece := self._process.stderr.read1(65536):  # type: ignore[attr-defined]
            self._said += piece

    def said(self) -> bytes:
        return bytes(self._said)

    def stop(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(STOP_SECONDS_MAX)
        except subprocess.TimeoutExpired as error:
            raise ExperimentError(
                "host.stuck", f"end process {self._process.pid}", "it did not end when its input did", f"end it with `kill {self._process.pid}`"
            ) from error
        self._thread.join(STOP_SECONDS_MAX)


def _new(host: Host) -> Machine:
    from experiments.ssh import SshMachine  # noqa: PLC0415 - SSH is loaded where a site has a remote host

    return LocalMachine(host) if host.is_local else SshMachine(host)


_machines: dict[Host, Machine] = {}
_lock = threading.Lock()


def of(host: Host) -> Machine:
    """The machine of `host`; one connection to each for the whole task."""
    with _lock:
        if host not in _machines:
            _machines[host] = _new(host)
        return _machines[host]


def close() -> None:
    """Let go of every connection."""
    with _lock:
        for machine in _machines.values():
            machine.close()
        _machines.clear()


def each(hosts: Iterable[Host], action: Callable[[Machine], Result]) -> list[Result]:
    """What `action` returns for each host, asked in parallel, in the order of `hosts`. Raises what the first failing host raised."""
    outcomes = attempt(hosts, action)
    for _, outcome in outcomes:
        if isinstance(outcome, ExperimentError):
            raise outcome
    return [outcome for _, outcome in outcomes if not isinstance(outcome, ExperimentError)]


def attempt(hosts: Iterable[Host], action: Callable[[Machine], Result]) -> list[tuple[Host, Result | ExperimentError]]:
    """Like `each`, but a host that fails gives its error, and the others their results all the same."""

    def one(host: Host) -> tuple[Host, Result | ExperimentError]:
        try:
            return host, action(of(host))
        except ExperimentError as error:
            return host, error

    wanted = list(hosts)
    if len(wanted) == 1:
        return [one(wanted[0])]
    with ThreadPoolExecutor(max(1, min(AT_ONCE_MAX, len(wanted)))) as pool:
        return list(pool.map(one, wanted))


def distinct(hosts: Iterable[Host]) -> list[Host]:
    """Each host once, in order of first appearance."""
    return list(dict.fromkeys(hosts))


@contextlib.contextmanager
def streaming(
    machine: Machine, command: Sequence[str], output: Path, *, ready: bytes, what: str, root: bool = False, seconds_max: float = 15.0
) -> Iterator[Stream]:
    """Run a program while the `with` lasts, from the moment on when it said `ready` on standard error."""
    stream = machine.stream(["sh", "-c", UNTIL_INPUT_ENDS, "sh", *command], output, root=root)
    try:
        _await(stream, ready, f"{what} on host {machine.host}", seconds_max)
        yield stream
    except BaseException:
        with contextlib.suppress(ExperimentError):  # the first failure is the one to tell
            stream.stop()
        raise
    stream.stop()


def _await(stream: Stream, ready: bytes, what: str, seconds_max: float) -> None:
    deadline = time.monotonic() + seconds_max
    while ready not in stream.said():
        if time.monotonic() > deadline:
            said = stream.said().decode("utf-8", "replace").strip()[-300:]
            raise ExperimentError(
                "host.program", what, said or f"it was not ready after {seconds_max:.0f} s", "see the program's message, then run the task again"
            )
        time.sleep(READY_POLL_SECONDS)
