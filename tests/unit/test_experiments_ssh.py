"""A host over SSH is never waited for without end; what was lost with its link is told, and nothing that changes something is done twice.

The connection is one of the test's own, which runs commands here: a real sshd is the business of tests/integration.
"""

from __future__ import annotations

import errno
import subprocess
import threading
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paramiko
import pytest

from experiments import ssh
from experiments.errors import ExperimentError
from experiments.machine import Done, LocalMachine, of, streaming
from experiments.site import Host
from experiments.ssh import SshMachine

HOST = Host("node1", "ssh", "192.0.2.7", user="operator")
LOST = paramiko.SSHException("Server connection dropped")


class FakeChannel:
    """Runs its command here when its input ends; what it gives may be a script instead."""

    def __init__(self) -> None:
        self.command = ""
        self.timeouts: list[float | None] = []
        self.is_closed = False
        self.exit_status = -1
        self.status_event = threading.Event()
        self._input, self._out, self._err = b"", BytesIO(), BytesIO()

    def settimeout(self, seconds: float | None) -> None:
        self.timeouts.append(seconds)

    def exec_command(self, command: str) -> None:
        self.command = command

    def sendall(self, data: bytes) -> None:
        self._input += data

    def shutdown_write(self) -> None:
        done = subprocess.run(["sh", "-c", self.command], input=self._input, capture_output=True, check=False)
        self.ends(done.returncode, done.stdout, done.stderr)

    def ends(self, status: int, out: bytes, err: bytes = b"") -> None:
        self._out, self._err, self.exit_status = BytesIO(out), BytesIO(err), status
        self.status_event.set()

    def recv(self, count: int) -> bytes:
        return self._out.read(count)

    def recv_stderr(self, count: int) -> bytes:
        return self._err.read(count)

    def close(self) -> None:
        self.is_closed = True


def ending(status: int, out: bytes = b"", err: bytes = b"") -> FakeChannel:
    """A command that ends so, without being run. With -1 its link is lost before its exit status is told."""
    channel = FakeChannel()
    channel.shutdown_write = lambda: channel.ends(status, out, err)  # type: ignore[method-assign]
    return channel


def failing(error: BaseException) -> FakeChannel:
    """A command under which that happens while its output is read."""
    channel = FakeChannel()

    def fail(count: int) -> bytes:
        raise error

    channel.recv, channel.shutdown_write = fail, lambda: None  # type: ignore[method-assign]
    return channel


class FakeLink:
    """Every connection to the host: `opening` holds what becomes of each channel in turn, then commands run here."""

    def __init__(self) -> None:
        self.opening: list[FakeChannel | Exception] = []
        self.channels: list[FakeChannel] = []
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.connections = 0
        self.refusal: Exception | None = None
        self.is_active = True
        self.sock = None

    @property
    def commands(self) -> list[str]:
        return [channel.command for channel in self.channels if channel.command != "id -u"]

    # What Fabric's connection and paramiko's transport are asked for

    @property
    def client(self) -> Any:
        transport = SimpleNamespace(
            is_active=lambda: self.is_active, set_keepalive=lambda seconds: None, open_channel=self.open_channel, sock=self.sock
        )
        return SimpleNamespace(get_transport=lambda: transport)

    def open(self) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.connections += 1
        self.is_active = True

    def close(self) -> None:
        self.is_active = False

    def open_channel(self, kind: str, **more: Any) -> FakeChannel:
        self.asked.append((kind, more))
        found = self.opening.pop(0) if self.opening else FakeChannel()
        if isinstance(found, Exception):
            raise found
        self.channels.append(found)
        return found


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> FakeLink:
    found = FakeLink()
    monkeypatch.setattr(ssh, "connect", lambda host: found)
    return found


@pytest.fixture
def node(link: FakeLink) -> SshMachine:
    return SshMachine(HOST)


def failed(action: Callable[[], object]) -> ExperimentError:
    with pytest.raises(ExperimentError) as caught:
        action()
    return caught.value


# Commands


def test_words_input_output_and_status_of_a_command_pass_the_link_as_they_are(node: SshMachine, link: FakeLink) -> None:
    done = node.run(["sh", "-c", 'cat; echo "$1" >&2; exit 3', "sh", "two words; $HOME '"], stdin=b"\0binary\n")

    assert done == Done(3, b"\0binary\n", b"two words; $HOME '\n")
    assert node.run(["true"]) == Done(0, b"", b"") and link.connections == 1
    assert all(channel.is_closed for channel in link.channels)


def test_a_command_that_does_not_end_is_an_error_at_its_deadline_and_is_not_repeated(node: SshMachine, link: FakeLink) -> None:
    """It may be repeated, but it would take as long again; the link is no worse for it."""
    link.opening = [failing(TimeoutError())]

    error = failed(lambda: node.run(["sleep", "9"], seconds_max=5, again=True))

    assert (error.code, error.found) == ("host.lost", "no end after 5 s") and "run `sleep 9` on host node1" in error.attempted
    assert len(link.channels) == 1 and link.channels[0].is_closed and link.is_active
    assert all(seconds is not None and 0 < seconds <= 5 for seconds in link.channels[0].timeouts)


@pytest.mark.parametrize("which", ["run", "copy"])
def test_a_command_that_never_stops_printing_has_a_deadline_too(node: SshMachine, link: FakeLink, which: str) -> None:
    channel = FakeChannel()
    ends = time.monotonic() + 5.0  # of the test, where there is no deadline
    channel.recv = lambda count: b"y\n" if time.monotonic() < ends else b""  # type: ignore[method-assign]
    channel.shutdown_write = lambda: None  # type: ignore[method-assign]
    link.opening = [channel]

    error = failed(lambda: node.run(["yes"], seconds_max=0.05) if which == "run" else node.copy(["yes"], BytesIO(), seconds_max=0.05))

    assert error.found == "no end after 0 s" and time.monotonic() < ends - 2


def stuck() -> FakeChannel:
    """A host whose link holds, and whose sshd answers nothing any more."""
    channel, closed = FakeChannel(), threading.Event()

    def wait(command: str) -> None:
        assert closed.wait(5.0), "it is waited for without end"
        raise paramiko.SSHException("Channel closed.")

    channel.exec_command, channel.close = wait, closed.set  # type: ignore[method-assign]
    return channel


def test_an_sshd_that_never_answers_is_waited_for_until_the_deadline(
    node: SshMachine, link: FakeLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ssh, "CALL_SECONDS_MAX", 0.05)
    link.opening = [stuck(), stuck()]

    assert failed(lambda: node.run(["true"], seconds_max=0.05, again=True)).found == "no end after 0 s"
    assert "TimeoutError" in failed(lambda: node.stream(["tcpdump"], tmp_path / "output")).found


def test_a_command_that_told_no_exit_status_in_time_did_not_end(node: SshMachine, link: FakeLink) -> None:
    channel = FakeChannel()
    channel.shutdown_write = lambda: None  # type: ignore[method-assign]
    link.opening = [channel]

    assert failed(lambda: node.run(["true"], seconds_max=0.02)).found == "no end after 0 s"


@pytest.mark.parametrize("lost", [lambda: failing(LOST), lambda: failing(EOFError()), lambda: failing(ConnectionResetError()), lambda: ending(-1)])
def test_a_command_whose_link_is_lost_is_repeated_once_and_only_if_it_changes_nothing(
    node: SshMachine, link: FakeLink, lost: Callable[[], FakeChannel]
) -> None:
    link.opening = [lost(), ending(0, b"answer")]
    assert node.run(["ask"], again=True).out == b"answer"
    assert (link.commands, link.connections) == (["ask", "ask"], 2)

    link.opening = [lost(), ending(0, b"answer")]
    error = failed(lambda: node.run(["change"]))
    assert error.code == "host.lost" and "the connection was lost" in error.found and "that its link is up" in error.next_step
    assert link.commands[2:] == ["change"]

    link.opening = [lost(), lost(), ending(0)]
    assert failed(lambda: node.run(["ask"], again=True)).code == "host.lost"


def test_output_that_no_memory_holds_is_refused(node: SshMachine, link: FakeLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh, "OUTPUT_BYTES_MAX", 10)
    link.opening = [ending(0, b"0123456789"), ending(0, b"0123456789a")]

    assert node.run(["say"]).out == b"0123456789"
    assert "printed more than 10 bytes" in failed(lambda: node.run(["say"])).found


# Channels and connections


def test_a_connection_that_proves_dead_before_anything_ran_is_replaced_once(node: SshMachine, link: FakeLink) -> None:
    """Whatever the command is: it has not run yet."""
    link.opening = [LOST]
    assert node.run(["echo", "changed"]).out == b"changed\n"
    assert (link.connections, link.commands) == (2, ["echo changed"])

    link.opening = [LOST, LOST]
    assert "SSHException: Server connection dropped" in failed(lambda: node.run(["true"])).found


def test_an_sshd_that_refuses_a_channel_is_not_asked_again(node: SshMachine, link: FakeLink) -> None:
    link.opening = [paramiko.ChannelException(1, "Administratively prohibited")]

    error = failed(lambda: node.tunnel("127.0.0.1", 8080, seconds_max=5.0))

    assert "has to allow sessions and TCP forwarding" in error.found and len(link.asked) == 1


def test_a_connection_that_ended_meanwhile_is_opened_again(node: SshMachine, link: FakeLink) -> None:
    node.run(["true"])
    link.is_active = False

    assert node.run(["echo", "again"]).out == b"again\n" and link.connections == 2


@pytest.mark.parametrize(
    ("refusal", "next_step"),
    [
        (paramiko.AuthenticationException("no key"), "user and key that `ssh 192.0.2.7` works with"),
        (paramiko.SSHException("Server '192.0.2.7' not found in known_hosts"), "compare the key of node1"),
        (ConnectionRefusedError("refused"), "see that node1 runs"),
        (EOFError(), "see that node1 runs"),
    ],
)
def test_a_host_that_cannot_be_reached_is_named_with_what_to_do(node: SshMachine, link: FakeLink, refusal: Exception, next_step: str) -> None:
    link.refusal = refusal

    error = failed(lambda: node.run(["true"], again=True))

    assert error.code == "host.unreachable" and "reach host node1 (operator@192.0.2.7:22) over SSH" in error.attempted
    assert next_step in error.next_step


def test_an_unknown_host_key_is_refused_and_the_sites_own_file_is_read(tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    key = paramiko.ECDSAKey.generate()
    known.write_text(f"192.0.2.7 {key.get_name()} {key.get_base64()}\n", encoding="utf-8")

    connection = ssh.connect(Host("node1", "ssh", "192.0.2.7", port=2222, user="operator", key_file="~/key", known_hosts=str(known)))

    assert isinstance(connection.client._policy, paramiko.RejectPolicy)
    assert list(connection.client.get_host_keys()) == ["192.0.2.7"]
    assert (connection.host, connection.port, connection.user, connection.connect_timeout) == ("192.0.2.7", 2222, "operator", 15)
    assert connection.connect_kwargs["key_filename"] == [str(Path("~/key").expanduser())] and connection.connect_kwargs["allow_agent"] is False


def test_a_tunnel_begins_on_the_host(node: SshMachine, link: FakeLink) -> None:
    channel = node.tunnel("10.0.0.5", 8080, seconds_max=7.0)

    ((kind, more),) = link.asked
    assert (kind, more["dest_addr"]) == ("direct-tcpip", ("10.0.0.5", 8080)) and more["timeout"] == ssh.CONNECT_SECONDS_MAX
    assert isinstance(channel, FakeChannel) and channel.timeouts == [7.0]


def test_letting_go_of_a_host_closes_its_connection(node: SshMachine, link: FakeLink) -> None:
    node.run(["true"])
    node.close()

    assert not link.is_active


def test_a_remote_host_is_asked_over_ssh_and_this_one_is_not(link: FakeLink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.machine._machines", {})

    assert isinstance(of(HOST), SshMachine) and isinstance(of(Host("localhost", "local")), LocalMachine)


# Root


@pytest.mark.parametrize(("user", "prefix"), [(b"0\n", ""), (b"1000\n", "sudo -n -- ")])
def test_root_is_asked_for_by_sudo_without_a_prompt_and_only_where_the_user_is_not_root(
    node: SshMachine, link: FakeLink, tmp_path: Path, user: bytes, prefix: str
) -> None:
    link.opening = [ending(0, user), ending(0), ending(0), ending(0), ending(0)]

    node.run(["mount"], root=True)
    node.run(["mount"])
    node.copy(["mount"], BytesIO(), root=True, seconds_max=5.0)
    node.stream(["mount"], tmp_path / "output", root=True).stop()

    assert link.commands == [f"{prefix}mount", "mount", f"{prefix}mount", f"{prefix}mount"]
    assert [channel.command for channel in link.channels].count("id -u") == 1


# Files


@pytest.fixture
def root(node: SshMachine, link: FakeLink) -> SshMachine:
    """A machine whose user is root, so that its files are those here."""
    node._is_root = True
    return node


def test_a_file_is_read_whole_and_one_that_is_not_there_is_an_error(root: SshMachine, tmp_path: Path) -> None:
    (tmp_path / "a file").write_bytes(b"\0all of it")

    assert root.read_bytes(tmp_path / "a file") == b"\0all of it"
    error = failed(lambda: root.read_bytes(tmp_path / "none"))
    assert error.code == "hostfiles.unreadable" and "on host node1" in error.attempted and "No such file" in error.found


def test_a_log_is_followed_by_its_size_and_what_was_added(root: SshMachine, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert root.read_from(log, 0) == (0, b"")
    log.write_bytes(b"one\ntwo\n")

    assert [root.read_from(log, offset) for offset in (0, 4, 8, 1 << 62)] == [(8, b"one\ntwo\n"), (8, b"two\n"), (8, b""), (8, b"")]


def test_a_log_whose_host_says_something_else_is_an_error(root: SshMachine, link: FakeLink, tmp_path: Path) -> None:
    link.opening = [ending(1, b"", b"sudo: a password is required")]

    error = failed(lambda: root.read_from(tmp_path / "log", 0))

    assert error.found == "sudo: a password is required" and "sudo without a password" in error.next_step


def test_a_copy_goes_to_its_file_as_it_comes(node: SshMachine) -> None:
    output = BytesIO()

    done = node.copy(["sh", "-c", "echo all; echo no >&2; exit 4"], output, seconds_max=5.0)

    assert done == Done(4, b"", b"no\n") and output.getvalue() == b"all\n"


def test_a_full_disk_here_is_no_fault_of_the_link_and_a_copy_is_never_repeated(node: SshMachine, link: FakeLink) -> None:
    def full(data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    output = BytesIO()
    output.write = full  # type: ignore[method-assign,assignment]
    error = failed(lambda: node.copy(["echo"], output, seconds_max=5.0))
    assert error.code == "results.write" and "make room on this machine" in error.next_step and link.is_active

    link.opening = [failing(LOST)]
    assert failed(lambda: node.copy(["echo"], BytesIO(), seconds_max=5.0)).code == "host.lost"
    assert len(link.commands) == 2


# Programs


def flowing(pieces: list[bytes], status: int, err: bytes = b"") -> FakeChannel:
    """A program that has printed `pieces` when it is ended, and then ends so."""
    channel, ended = FakeChannel(), threading.Event()
    left, said = list(pieces), [err]

    def recv(count: int) -> bytes:
        if left:
            return left.pop(0)
        ended.wait(5.0)
        return b""

    def stop() -> None:
        channel.exit_status = status
        channel.status_event.set()
        ended.set()

    channel.recv, channel.shutdown_write = recv, stop  # type: ignore[method-assign]
    channel.recv_stderr = lambda count: said.pop() if said else b""  # type: ignore[method-assign]
    return channel


def test_a_program_runs_while_the_with_lasts_and_all_of_its_output_is_here(node: SshMachine, link: FakeLink, tmp_path: Path) -> None:
    link.opening = [flowing([b"one\n", b"two\n"], 143, b"ready")]

    with streaming(node, ["tcpdump", "-w", "-"], tmp_path / "output", ready=b"ready", what="capture"):
        assert not link.channels[0].is_closed

    assert (tmp_path / "output").read_bytes() == b"one\ntwo\n" and link.channels[0].is_closed
    assert link.commands[0].endswith("sh tcpdump -w -")


def test_a_program_whose_link_was_lost_is_an_error_when_it_is_ended(node: SshMachine, link: FakeLink, tmp_path: Path) -> None:
    link.opening = [flowing([b"one\n"], -1)]

    error = failed(node.stream(["tcpdump"], tmp_path / "output").stop)

    assert error.code == "host.lost" and error.found == "the connection was lost while it ran"


def test_a_program_that_does_not_end_is_an_error_at_its_deadline(
    node: SshMachine, link: FakeLink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = flowing([], 0)
    channel.shutdown_write = lambda: None  # type: ignore[method-assign]
    link.opening = [channel]
    monkeypatch.setattr(ssh, "STOP_SECONDS_MAX", 0.02)

    assert failed(node.stream(["tcpdump"], tmp_path / "output").stop).found == "it did not end" and channel.is_closed


def test_a_program_that_cannot_be_started_is_an_error(node: SshMachine, link: FakeLink, tmp_path: Path) -> None:
    channel = FakeChannel()

    def fail(command: str) -> None:
        raise LOST

    channel.exec_command = fail  # type: ignore[method-assign]
    link.opening = [channel]

    assert "start `tcpdump` on host node1" in failed(lambda: node.stream(["tcpdump"], tmp_path / "output")).attempted


class Narrow(BytesIO):
    """A file that takes few bytes at a time, as an unbuffered one may on a disk that is almost full, and none when it is."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.kept = room, b""

    def write(self, data: Any) -> int:
        if len(self.kept) == self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        piece = bytes(data[: min(3, self.room - len(self.kept))])
        self.kept += piece
        return len(piece)


@pytest.mark.parametrize(("room", "found"), [(100, ""), (8, "could not be kept here: .*No space left"), (7, "No space left"), (0, "No space left")])
def test_no_byte_of_a_programs_output_is_lost_without_a_word(node: SshMachine, link: FakeLink, room: int, found: str) -> None:
    link.opening = [flowing([b"01234567", b"8"], 0)]
    file = Narrow(room)
    stream = node.stream(["tcpdump"], opened(file))

    if found:
        with pytest.raises(ExperimentError, match=found):
            stream.stop()
    else:
        stream.stop()

    assert file.kept == b"012345678"[:room]


def opened(file: BytesIO) -> Any:
    """A path that opens as `file`."""
    return SimpleNamespace(open=lambda mode, buffering: file)
