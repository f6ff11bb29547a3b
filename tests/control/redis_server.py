"""A real Redis for tests: its own directory, a Unix socket, or a port where something stands between it and its clients."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import hiredis

STARTS_S_MAX = 10.0
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
LOSSY = ("--appendonly", "yes", "--appendfsync", "everysec")
FORGETFUL = ("--appendonly", "no")


class RedisServer:
    """`with RedisServer(folder) as server`: `url` is what a controller is configured with."""

    def __init__(self, folder: Path, *options: str, port: int = 0) -> None:
        program = shutil.which("redis-server")
        assert program is not None, "there is no redis-server: run `ansible-playbook playbooks/developer.yml -i inventory/local`"
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.socket = folder / "redis.sock"
        self.port = port
        self._command = [
            program, "--port", str(port), "--bind", "127.0.0.1", "--unixsocket", str(self.socket), "--dir", str(folder), "--save", "",
            "--daemonize", "no", "--logfile", str(folder / "redis.log"), *(options or FORGETFUL),
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}" if not self.port else f"redis://127.0.0.1:{self.port}"

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and wait until it has read its disk."""
        self.socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + STARTS_S_MAX
        while True:
            try:
                if self.ask("PING") == "PONG":
                    return
            except (OSError, hiredis.ReplyError):  # not yet, or it reads its disk
                pass
            assert self._process.poll() is None, (self.folder / "redis.log").read_text(encoding="utf-8")
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.01)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """As a crash: nothing is written any more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def ask(self, *words: str) -> str:
        """Ask it one thing, on a connection of its own; a list is answered one word a line."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(STARTS_S_MAX)
            connection.connect(str(self.socket))
            connection.sendall(hiredis.pack_command(words))  # type: ignore[arg-type]  # its stub has the tuple of one word
            reader = hiredis.Reader()
            while (reply := reader.gets()) is False:
                data = connection.recv(65536)
                if not data:
                    raise ConnectionError("it closed the connection")
                reader.feed(data)
        if isinstance(reply, Exception):
            raise reply
        return "\n".join(map(_text, reply)) if isinstance(reply, list) else _text(reply)


def _text(word: object) -> str:
    return word.decode(errors="replace") if isinstance(word, bytes) else str(word)
