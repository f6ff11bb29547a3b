"""The world around the sandboxes of a lab: a network namespace with a bridge, servers in it that keep what they receive, a capture."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from experiments.attacks.capture import Capture

Result = TypeVar("Result")

GATEWAY = "10.199.0.1"  # of the world's side; the lab's requests come from here
CLONE_NEWNET = 0x40000000
BRIDGE = "lab0"
_libc = ctypes.CDLL(None, use_errno=True)


def sh(*command: str) -> str:
    """Run a command and return what it printed. Raises RuntimeError with its own words when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


class World:
    """The network namespace. Addresses 10.199.0.1 to 10.199.0.99 are its own, sandboxes get those from 100 on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._next = 100

    def up(self) -> None:
        sh("ip", "netns", "add", self.name)
        sh("ip", "-n", self.name, "link", "add", BRIDGE, "type", "bridge")
        sh("ip", "-n", self.name, "link", "set", "lo", "up")
        sh("ip", "-n", self.name, "addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        sh("ip", "-n", self.name, "link", "set", BRIDGE, "up")

    def down(self) -> None:
        sh("ip", "netns", "del", self.name)

    def address(self, last: int) -> str:
        """Give the world one more address, 10.199.0.`last`, and return it."""
        address = f"10.199.0.{last}"
        sh("ip", "-n", self.name, "addr", "add", f"{address}/24", "dev", BRIDGE)
        return address

    def attach(self, namespace: str) -> str:
        """Make the namespace of a sandbox, joined to the bridge; return the sandbox's address."""
        address, self._next = f"10.199.0.{self._next}", self._next + 1
        end = f"v{address.rsplit('.', maxsplit=1)[1]}"
        sh("ip", "netns", "add", namespace)
        sh("ip", "link", "add", end, "netns", self.name, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        sh("ip", "-n", self.name, "link", "set", end, "master", BRIDGE, "up")
        sh("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        sh("ip", "-n", namespace, "link", "set", "lo", "up")
        sh("ip", "-n", namespace, "link", "set", "eth0", "up")
        sh("ip", "-n", namespace, "route", "add", "default", "via", GATEWAY)
        return address

    def within(self, work: Callable[[], Result]) -> Result:
        """Call `work` on a thread that is in the namespace; sockets that it makes stay there."""
        future: Future[Result] = Future()

        def run() -> None:
            try:
                descriptor = os.open(f"/run/netns/{self.name}", os.O_RDONLY | os.O_CLOEXEC)
                try:
                    if _libc.setns(descriptor, CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                finally:
                    os.close(descriptor)
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  # raised again by result()
                future.set_exception(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return future.result()

    def listen(self, address: str, port: int) -> socket.socket:
        return self.within(lambda: socket.create_server((address, port), backlog=128))

    def connect(self, address: str, port: int, seconds: float) -> socket.socket:
        return self.within(lambda: socket.create_connection((address, port), timeout=seconds))

    def command(self, *command: str) -> list[str]:
        """The command line that runs `command` in the namespace."""
        return ["ip", "netns", "exec", self.name, *command]

    def capture(self, file: Path) -> Capture:
        return Capture(BRIDGE, file, within=("ip", "netns", "exec", self.name))


class Receiver:
    """A server that keeps every byte it receives, per connection, and says what `answer` gives for all bytes so far.

    With `context` it speaks TLS and keeps plaintext; `failures` holds what TLS itself complained about.
    """

    def __init__(
        self,
        world: World,
        address: str,
        port: int,
        *,
        answer: Callable[[bytes], bytes] | None = None,
        context: ssl.SSLContext | None = None,
        greeting: bytes = b"",
    ) -> None:
        self.address, self.port = address, port
        self.connections: list[bytearray] = []
        self.failures: list[str] = []
        self._answer, self._context, self._greeting = answer, context, greeting
        self._listener = world.listen(address, port)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def received(self) -> bytes:
        with self._lock:
            return b"".join(bytes(connection) for connection in self.connections)

    def clear(self) -> None:
        with self._lock:
            self.connections.clear()
            self.failures.clear()

    def close(self) -> None:
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        kept = bytearray()
        with self._lock:
            self.connections.append(kept)
            self._open.add(connection)
        try:
            if self._context:
                connection = self._context.wrap_socket(connection, server_side=True)
            if self._greeting:
                connection.sendall(self._greeting)
            while data := connection.recv(65536):
                with self._lock:
                    kept += data
                if self._answer and (reply := self._answer(bytes(kept))):
                    connection.sendall(reply)
        except ssl.SSLError as error:
            with self._lock:
                self.failures.append(f"{error.reason or error}")
        except OSError:
            pass  # the guard resets what it denies
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def http_answer(kept: bytes) -> bytes:
    """200 for each request that ends here: without a body, or with one that is whole by its Content-Length."""
    before, found, body = kept.rpartition(b"\r\n\r\n")
    head = before.rsplit(b"\r\n\r\n", maxsplit=1)[-1].lower()
    length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), 0)
    return OK if found and len(body) == length else b""
