# ruff: noqa: UP006, UP035 - on a cluster this file runs on a host, with that host's own python3, from 3.6 on
"""The attacker's server: accepts any TCP connection, answers as an HTTP server would, and logs what arrived.

A program of its own, so that what it saw does not depend on the runner: `python -m experiments.attacks.receiver HOST PORT LOG`
prints `listening` when it does, and appends one JSON object for each connection to LOG. With `-` as LOG the objects go to standard
output, as they come, and `listening` to standard error: so it runs on another host and its log is here.
"""

import contextlib
import json
import socketserver
import sys
import threading
import time
from pathlib import Path
from typing import List, Tuple

CONNECTION_BYTES_MAX = 1 << 20
CONNECTION_SECONDS_MAX = 5.0
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n"


class Receiver(socketserver.ThreadingTCPServer):
    """Listens until it is terminated; one log line for each connection, in the order they end."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: Tuple[str, int], log: Path) -> None:
        self.log = log
        self._lock = threading.Lock()
        super().__init__(address, Connection)

    def keep(self, line: str) -> None:
        """Log one line; it is written as a whole."""
        with self._lock:
            if str(self.log) == "-":
                print(line, flush=True)
                return
            with self.log.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


class Connection(socketserver.BaseRequestHandler):
    """Reads until the peer stops, its request is complete, or a bound is reached."""

    def handle(self) -> None:
        received = b""
        self.request.settimeout(CONNECTION_SECONDS_MAX)
        ended = "complete"
        try:
            while len(received) < CONNECTION_BYTES_MAX and not request_is_complete(received):
                piece = self.request.recv(65536)
                if not piece:
                    break
                received += piece
        except OSError as error:
            ended = type(error).__name__
        assert isinstance(self.server, Receiver), "only a Receiver makes these"
        line = {
            "time_ms": time.time_ns() // 1_000_000,
            "peer": f"{self.client_address[0]}:{self.client_address[1]}",
            "bytes": len(received),
            "ended": ended,
            "data": received.decode("latin-1"),
        }
        # Logged before it is answered: whoever has the answer may read the log.
        self.server.keep(json.dumps(line))
        with contextlib.suppress(OSError):  # the peer may be gone, and what it sent counts all the same
            self.request.sendall(ANSWER)


def request_is_complete(data: bytes) -> bool:
    """Whether `data` holds an HTTP request whose announced body has arrived; the answer to a raw stream waits for its end."""
    head, blank, body = data.partition(b"\r\n\r\n")
    for line in head.split(b"\r\n")[1:]:
        name, _, value = line.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return bool(blank) and len(body) >= int(value)
    return False


def main(arguments: List[str]) -> int:
    """Serve until terminated."""
    host, port, log = arguments
    if log != "-":
        Path(log).touch()
    with Receiver((host, int(port)), Path(log)) as server:
        print("listening", file=sys.stderr if log == "-" else sys.stdout, flush=True)
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
