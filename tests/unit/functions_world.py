"""What the functions' tests stand on: functions loaded from the files of their image, and small servers for what they call."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import socket
import socketserver
import ssl
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

from kalium.builder.stack import read_stack
from kalium.pki.authority import Role, issue, new_ca

ROOT = Path(__file__).resolve().parents[2]
STACK = ROOT / "functions" / "stack.yml"
CLIENT_SSL = 1 << 11
SERVER_CAPABILITIES = 0x81FFFFFF & ~(1 << 5) & ~(1 << 24)  # everything, TLS too, but COMPRESS and DEPRECATE_EOF
COM_QUIT, COM_QUERY = 1, 3


def write_files(name: str, folder: Path) -> Path:
    """The files that the image of `name` has under /function, in a folder of their own."""
    (target,) = read_stack(STACK, name)
    place = folder / name.replace("/", "-")
    for path, contents in target.files.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_bytes(contents)
    return place


def load(place: Path) -> tuple[ModuleType, ModuleType]:
    """The modules `watchdog` and `handler` of these files; no other function's modules are touched."""
    names = {path.stem for path in place.glob("*.py")} - {"__main__"}
    sys.path.insert(0, str(place))
    try:
        return importlib.import_module("watchdog"), importlib.import_module("handler")
    finally:
        sys.path.remove(str(place))
        importlib.invalidate_caches()
        for module in names:
            sys.modules.pop(module, None)


@contextlib.contextmanager
def served(watchdog: ModuleType, handle: Callable[[Any], object]) -> Iterator[str]:
    """Serve a handler while the `with` lasts; its value is the URL."""
    told, tell = os.pipe()
    server = watchdog.Server(handle, ("127.0.0.1", 0))
    thread = threading.Thread(target=server.serve, args=(told,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        os.write(tell, b"x")
        thread.join(15)
        assert not thread.is_alive()
        os.close(told)
        os.close(tell)


class _Image(BaseHTTPRequestHandler):
    server: ImageWorld
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.paths.append(self.path)
        body = self.server.picture if self.path == "/image.jpg" else b"there is none"
        self.send_response(200 if self.path == "/image.jpg" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None: ...


class ImageWorld(ThreadingHTTPServer):
    """An HTTPS server whose certificate nobody signed; it counts connections."""

    daemon_threads = True

    def __init__(self, folder: Path, picture: bytes) -> None:
        self.picture = picture
        self.paths: list[str] = []
        self.connections = 0
        now = datetime.now(timezone.utc)
        identity = issue(new_ca(now=now), "images", ("IP:127.0.0.1",), role=Role.SERVER, days=1, now=now)
        (folder / "images.pem").write_bytes(identity.certificate_pem() + identity.key_pem())
        self.settings = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.settings.load_cert_chain(folder / "images.pem")
        super().__init__(("127.0.0.1", 0), _Image)

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.server_address[1]}/image.jpg"

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, peer = self.socket.accept()
        self.connections += 1
        return self.settings.wrap_socket(connection, server_side=True, do_handshake_on_connect=False), peer


class DatabaseWorld(socketserver.ThreadingTCPServer):
    """Speaks MySQL to a client that authenticates as it likes. `connections` holds the statements of each, the last being QUIT."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, tables: dict[str, dict[str, str]]) -> None:
        self.tables = tables
        self.connections: list[list[str]] = []
        self.client_flags: list[int] = []
        self.fails: str | None = None  # a statement that begins so is answered with an error
        super().__init__(("127.0.0.1", 0), _Database)

    def settled(self) -> list[list[str]]:
        """The statements of each connection once all have ended: the client does not wait for its goodbye to be read."""
        deadline = time.monotonic() + 30
        while not all(statements and statements[-1].startswith(("QUIT", "went away")) for statements in self.connections):
            assert time.monotonic() < deadline, self.connections
            time.sleep(0.005)
        return self.connections

    @property
    def environment(self) -> dict[str, str]:
        return {"DB_HOST": "127.0.0.1", "DB_PORT": str(self.server_address[1]), "DB_USER": "abc", "DB_PASSWORD": "xyz", "DB_NAME": "helloRetail"}


class _Database(socketserver.BaseRequestHandler):
    server: DatabaseWorld

    def send(self, sequence: int, *payloads: bytes) -> None:
        for number, payload in enumerate(payloads, sequence):
            self.request.sendall(len(payload).to_bytes(3, "little") + bytes([number]) + payload)

    def receive(self) -> bytes:
        head = self.request.recv(4, socket.MSG_WAITALL)
        if len(head) < 4:
            return bytes([COM_QUIT, 0])  # the peer went away without saying so: told apart from a quit
        return bytes(self.request.recv(int.from_bytes(head[:3], "little"), socket.MSG_WAITALL))

    def handle(self) -> None:
        low, high = SERVER_CAPABILITIES & 0xFFFF, SERVER_CAPABILITIES >> 16 & 0xFFFF
        greeting = b"\x0a5.5.5-10.11.0-MariaDB\0" + struct.pack("<I8sxHBHHB10x13s", 7, b"saltsalt", low, 45, 2, high, 21, b"saltsaltsalt\0")
        self.send(0, greeting + b"mysql_native_password\0")
        self.server.client_flags.append(struct.unpack_from("<I", self.receive())[0])
        ok = b"\0\0\0\x02\0\0\0"
        self.send(2, ok)
        statements: list[str] = []
        self.server.connections.append(statements)
        while (packet := self.receive())[0] == COM_QUERY:
            statement = packet[1:].decode()
            statements.append(statement)
            if self.server.fails and statement.startswith(self.server.fails):
                self.send(1, b"\xff" + struct.pack("<H", 1146) + b"#42S02no such table")
            elif statement.startswith(("SHOW", "SELECT")):
                self.rows(self.answer(statement))
            else:
                self.send(1, ok)
        statements.append("QUIT" if packet == bytes([COM_QUIT]) else f"went away with {packet!r}")

    def answer(self, statement: str) -> list[str]:
        if shown := re.fullmatch(r"SHOW TABLES LIKE '(\w+)'", statement):
            return [shown[1]] if shown[1] in self.server.tables else []
        selected = re.fullmatch(r"SELECT rowvalues FROM (\w+) WHERE rowkey = '(\w+)'", statement)
        assert selected, statement
        value = self.server.tables[selected[1]].get(selected[2])
        return [] if value is None else [value]

    def rows(self, values: list[str]) -> None:
        def text(value: bytes) -> bytes:
            return (bytes([len(value)]) if len(value) < 251 else b"\xfd" + len(value).to_bytes(3, "little")) + value

        column = b"".join(map(text, (b"def", b"", b"t", b"t", b"v", b"v"))) + b"\x0c" + struct.pack("<HIBHB2x", 45, 1 << 20, 0xFD, 0, 0)
        end = b"\xfe\0\0\x02\0"
        self.send(1, b"\x01", column, end, *(text(value.encode()) for value in values), end)


@contextlib.contextmanager
def running(server: socketserver.BaseServer) -> Iterator[None]:
    """Serve in a thread while the `with` lasts."""
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
        assert not thread.is_alive()
