"""A host over SSH: one connection by Fabric with strict host keys, watched, opened again when it was lost, and never waited for without end."""

from __future__ import annotations

import contextlib
import shlex
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import paramiko
from fabric import Connection

from experiments.errors import ExperimentError
from experiments.machine import CALL_SECONDS_MAX, OUTPUT_BYTES_MAX, READ_FROM, STOP_SECONDS_MAX, Done, Machine, Stream
from experiments.site import Host

CONNECT_SECONDS_MAX = 15
ALIVE_SECONDS = 10  # between two signs of life on a silent connection
DEAD_SECONDS = 40  # after which bytes that nobody acknowledged mean that the link is lost
PIECE_BYTES = 1 << 16
WINDOW_BYTES = 1 << 23


class LinkLostError(Exception):
    """The connection ended under a command, which may or may not have run."""


def connect(host: Host) -> Connection:
    """A connection to `host` that accepts only a host key it already knows; it opens on first use."""
    arguments: dict[str, Any] = {"banner_timeout": CONNECT_SECONDS_MAX, "auth_timeout": CONNECT_SECONDS_MAX}
    if host.key_file:
        arguments |= {"key_filename": str(Path(host.key_file).expanduser()), "look_for_keys": False, "allow_agent": False}
    connection = Connection(
        host.address or host.name, user=host.user or None, port=host.port, connect_timeout=CONNECT_SECONDS_MAX, connect_kwargs=arguments
    )
    # Fabric itself accepts any unknown key; a host that changed its key must stop the run instead.
    connection.client.set_missing_host_key_policy(paramiko.RejectPolicy())
    if host.known_hosts:
        connection.client.load_host_keys(str(Path(host.known_hosts).expanduser()))
    else:
        connection.client.load_system_host_keys()
    return connection


def _start(channel: paramiko.Channel, command: Sequence[str], seconds_max: float) -> None:
    """Have `command` run. paramiko waits for the host's consent without end, and an sshd that is stuck keeps its link: so the channel is closed."""
    deadline = time.monotonic() + seconds_max
    watch = threading.Timer(seconds_max, channel.close)
    watch.daemon = True
    watch.start()
    try:
        channel.exec_command(shlex.join(command))
    except paramiko.SSHException as error:
        if time.monotonic() >= deadline:
            raise TimeoutError from error
        raise
    finally:
        watch.cancel()


class SshMachine(Machine):
    """One remote host. Safe to use from several threads."""

    def __init__(self, host: Host) -> None:
        super().__init__(host)
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._is_root: bool | None = None

    # The connection

    def _transport(self) -> paramiko.Transport:
        with self._lock:
            if self._connection is not None:
                transport: paramiko.Transport | None = self._connection.client.get_transport()
                if transport is not None and transport.is_active():
                    return transport
                self._drop()
            try:
                connection = connect(self.host)
                connection.open()
            except (OSError, EOFError, paramiko.SSHException) as error:
                raise self._unreachable(error) from error
            opened: paramiko.Transport | None = connection.client.get_transport()
            assert opened is not None, "it was just opened"
            opened.set_keepalive(ALIVE_SECONDS)
            if isinstance(opened.sock, socket.socket):  # behind a jump host it is a channel, whose own connection is watched
                opened.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_SECONDS * 1000)
            self._connection = connection
            return opened

    def _drop(self) -> None:
        if self._connection is not None:
            with contextlib.suppress(Exception):
                self._connection.close()
        self._connection = None

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _unreachable(self, error: BaseException) -> ExperimentError:
        if isinstance(error, paramiko.AuthenticationException):
            hint = f"give the inventory the user and key that `ssh {self.host.address or self.host.name}` works with"
        elif isinstance(error, paramiko.SSHException) and "known_hosts" in str(error):
            hint = f"compare the key of {self.host.name} and put it into your known_hosts (inventory/README.md)"
        else:
            hint = f"see that {self.host.name} runs and that `ssh {self.host.address or self.host.name}` works without a question"
        return ExperimentError("host.unreachable", f"reach host {self.host} over SSH", f"{type(error).__name__}: {error}", hint)

    def _lost(self, what: str, found: str) -> ExperimentError:
        return ExperimentError(
            "host.lost", f"{what} on host {self.host}", found, f"see that {self.host.name} runs and that its link is up, then run the task again"
        )

    def _open(self, kind: str, **more: Any) -> paramiko.Channel:
        """A channel. Nothing has run yet when one cannot be opened, so a connection that proves dead is replaced once."""
        for attempt in (1, 2):
            transport = self._transport()
            try:
                return transport.open_channel(kind, window_size=WINDOW_BYTES, timeout=CONNECT_SECONDS_MAX, **more)
            except paramiko.ChannelException as error:
                raise self._lost("open a channel", f"{error}; sshd there has to allow sessions and TCP forwarding") from error
            except (OSError, EOFError, paramiko.SSHException) as error:
                self.close()
                if attempt == 2:
                    raise self._lost("open a channel", f"{type(error).__name__}: {error}") from error
        raise AssertionError("the second attempt returns or raises")

    # Commands

    def _as_root(self, command: Sequence[str]) -> list[str]:
        if self._is_root is None:
            done = self._repeat(["id", "-u"], b"", CALL_SECONDS_MAX, again=True, sink=None)
            self._is_root = done.out.strip() == b"0"
        return list(command) if self._is_root else ["sudo", "-n", "--", *command]

    def run(
        self, command: Sequence[str], *, root: bool = False, stdin: bytes = b"", seconds_max: float = CALL_SECONDS_MAX, again: bool = False
    ) -> Done:
        return self._repeat(self._as_root(command) if root else command, stdin, seconds_max, again=again, sink=None)

    def copy(self, command: Sequence[str], output: IO[bytes], *, root: bool = False, seconds_max: float) -> Done:
        return self._repeat(self._as_root(command) if root else command, b"", seconds_max, again=False, sink=output.write)

    def _repeat(self, command: Sequence[str], stdin: bytes, seconds_max: float, *, again: bool, sink: Callable[[bytes], object] | None) -> Done:
        what = f"run `{shlex.join(command)[:120]}`"
        for attempt in (1, 2):
            channel = self._open("session")
            try:
                return self._run(channel, command, stdin, seconds_max, sink)
            except TimeoutError as error:
                raise self._lost(what, f"no end after {seconds_max:.0f} s") from error
            except (LinkLostError, EOFError, paramiko.SSHException, OSError) as error:
                self.close()
                if attempt == 2 or not again:
                    raise self._lost(what, f"the connection was lost: {error}") from error
            finally:
                channel.close()
        raise AssertionError("the second attempt returns or raises")

    def _run(
        self, channel: paramiko.Channel, command: Sequence[str], stdin: bytes, seconds_max: float, sink: Callable[[bytes], object] | None
    ) -> Done:
        deadline = time.monotonic() + seconds_max

        def left() -> float:
            seconds = deadline - time.monotonic()
            if seconds <= 0:  # also of a command that prints all the time, so that nothing is ever waited for
                raise TimeoutError
            return seconds

        _start(channel, command, left())
        channel.settimeout(left())
        with contextlib.suppress(OSError):  # a command that reads no input may be over: its exit status tells
            channel.sendall(stdin)
            channel.shutdown_write()
        out, err = bytearray(), bytearray()
        while True:
            channel.settimeout(left())
            piece = channel.recv(PIECE_BYTES)
            if not piece:
                break
            if sink is not None:
                self._keep(sink, piece)
                continue
            out += piece
            if len(out) > OUTPUT_BYTES_MAX:
                raise self._lost(f"run `{shlex.join(command)[:120]}`", f"it printed more than {OUTPUT_BYTES_MAX} bytes")
        while piece := channel.recv_stderr(PIECE_BYTES):
            err += piece
            channel.settimeout(left())
        if not channel.status_event.wait(left()):
            raise TimeoutError
        if channel.exit_status < 0:
            raise LinkLostError("it ended before the command told its exit status")
        return Done(channel.exit_status, bytes(out), bytes(err))

    def _keep(self, sink: Callable[[bytes], object], piece: bytes) -> None:
        try:
            sink(piece)
        except OSError as error:  # of the file here, and no fault of the link
            raise ExperimentError(
                "results.write", f"keep what host {self.host} sends", str(error), "make room on this machine, then run the task again"
            ) from error

    # Programs and files

    def stream(self, command: Sequence[str], output: Path, *, root: bool = False) -> Stream:
        whole = self._as_root(command) if root else command
        file = output.open("xb", buffering=0)
        try:
            channel = self._open("session")
            _start(channel, whole, CALL_SECONDS_MAX)
        except (OSError, EOFError, paramiko.SSHException) as error:
            file.close()
            raise self._lost(f"start `{shlex.join(command)[:120]}`", f"{type(error).__name__}: {error}") from error
        except ExperimentError:
            file.close()
            raise
        return _SshStream(self, channel, file, shlex.join(command)[:120])

    def tunnel(self, address: str, port: int, *, seconds_max: float) -> paramiko.Channel:
        channel = self._open("direct-tcpip", dest_addr=(address, port), src_addr=("127.0.0.1", 0))
        channel.settimeout(seconds_max)
        return channel

    def read_bytes(self, path: Path) -> bytes:
        done = self.run(["cat", "--", str(path)], root=True, again=True)
        if done.status != 0:
            raise ExperimentError(
                "hostfiles.unreadable", f"read {path} on host {self.host}", done.complaint(),
                "give the user sudo without a password there, or set the site up again if the file is gone",
            )  # fmt: skip
        return done.out

    def read_from(self, path: Path, offset: int) -> tuple[int, bytes]:
        done = self.run(["sh", "-c", READ_FROM, "sh", str(path), str(offset)], root=True, again=True)
        size, _, data = done.out.partition(b"\n")
        if done.status != 0 or not size.isdigit():
            raise ExperimentError(
                "hostfiles.unreadable", f"read {path} on host {self.host}", done.complaint(), "give the user sudo without a password there"
            )
        return int(size), data


class _SshStream:
    """Pumps of one program's two outputs; a link that is lost is told when the program is stopped."""

    def __init__(self, machine: SshMachine, channel: paramiko.Channel, file: IO[bytes], what: str) -> None:
        self._machine, self._channel, self._file, self._what = machine, channel, file, what
        self._said = bytearray()
        self._fault = ""
        channel.settimeout(None)
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._keep, self._listen)]
        for thread in self._threads:
            thread.start()

    def _keep(self) -> None:
        try:
            with self._file:
                while piece := self._channel.recv(PIECE_BYTES):
                    left = memoryview(piece)
                    while left:  # unbuffered: on a disk that is almost full a part is written, without an error
                        left = left[self._file.write(left) :]
        except OSError as error:  # of the file here: what comes from now on would be missing in it
            self._fault = f"its output could not be kept here: {error}"
            self._channel.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while piece := self._channel.recv_stderr(PIECE_BYTES):
                self._said += piece

    def said(self) -> bytes:
        return bytes(self._said)

    def stop(self) -> None:
        with contextlib.suppress(OSError, EOFError, paramiko.SSHException):
            self._channel.shutdown_write()
        ended = self._channel.status_event.wait(STOP_SECONDS_MAX)
        for thread in self._threads:
            thread.join(STOP_SECONDS_MAX)
        status = self._channel.exit_status
        self._channel.close()
        if self._fault or not ended or status < 0:
            found = self._fault or ("it did not end" if not ended else "the connection was lost while it ran")
            raise ExperimentError(
                "host.lost", f"run `{self._what}` on host {self._machine.host}", found,
                f"see that {self._machine.host.name} runs, that its link is up and that this machine has room, then run the task again",
            )  # fmt: skip
