"""What the controller is measured against, in the same language and on the same loop.

    python -m control.floor echo|plain PORT [--cert FILE --key FILE --ca FILE] [--policies FOLDER --key-file FILE]

`echo` cuts frames and answers each question with a constant that has its id: a controller that decides nothing. `plain` is the
controller's own dispatcher behind a socket without TLS, which the controller itself does not offer.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import secrets
import ssl
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from kalium.controller.calls import MemoryCalls
from kalium.controller.dispatch import Dispatcher
from kalium.controller.identity import PeerIdentity, Role
from kalium.controller.registry import Registry
from kalium.controller.server import INCOMING_BYTES
from kalium.controller.state import State
from kalium.policy.envelope import public_key, verify
from kalium.protocol.codec import encode
from kalium.protocol.frames import Answer

ANSWER = bytearray(encode(1, Answer(True, "allowed", "0" * 31 + "b", "0" * 31 + "c", "0" * 31 + "d")))
PREFIX = struct.Struct(">4sII")


class Server(asyncio.BufferedProtocol):
    """One connection that reads as the controller does, into one buffer of all connections."""

    _incoming = memoryview(bytearray(INCOMING_BYTES))
    _transport: asyncio.Transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._incoming

    def buffer_updated(self, nbytes: int) -> None:
        self.received(bytes(self._incoming[:nbytes]))

    def received(self, data: bytes) -> None:
        raise NotImplementedError


class Echo(Server):
    """The floor."""

    def __init__(self) -> None:
        self._held = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def received(self, data: bytes) -> None:
        data = self._held + data
        at, out = 0, []
        while at + 12 <= len(data):
            _, frame_id, length = PREFIX.unpack_from(data, at)
            if at + 12 + length > len(data):
                break
            at += 12 + length
            if frame_id:
                out.append(ANSWER[:4] + frame_id.to_bytes(4, "big") + ANSWER[8:])
        self._held = data[at:]
        self._transport.write(b"".join(out))


class Plain(Server):
    """One connection to a dispatcher."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._dispatcher.connected(self, identity=PeerIdentity(Role.AGENT, "load"), address="bench", now_ns=time.monotonic_ns())

    def received(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        self._dispatcher.received(self, data, now_ns=now_ns)
        for outgoing in self._dispatcher.outgoing(now_ns=now_ns):
            cast(Plain, outgoing.key)._transport.write(outgoing.data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._dispatcher.disconnected(self, now_ns=time.monotonic_ns())


def dispatcher(policies: Path, key_file: Path) -> Dispatcher:
    """A controller's core with the signed policies of a folder."""
    registry = Registry()
    calls = MemoryCalls(held=registry.held, mint=lambda: secrets.token_hex(16))
    made = Dispatcher(State(registry, calls), log=lambda *_args, **_fields: None)
    key = public_key(key_file.read_bytes(), str(key_file))
    for path in sorted(policies.glob("*.signed.json")):
        envelope = path.read_bytes()
        made.install(verify(envelope, key), envelope, now_ns=time.monotonic_ns())
    return made


async def serve(arguments: argparse.Namespace) -> None:
    """Until the process is ended."""
    context = None
    if arguments.cert:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version, context.verify_mode = ssl.TLSVersion.TLSv1_3, ssl.CERT_REQUIRED
        context.load_verify_locations(arguments.ca)
        context.load_cert_chain(arguments.cert, arguments.key)
    make: Callable[[], Server] = Echo
    if arguments.what == "plain":
        core = dispatcher(arguments.policies, arguments.key_file)
        make = lambda: Plain(core)  # noqa: E731
    server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", arguments.port, ssl=context)
    print("listening", flush=True)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("echo", "plain"))
    parser.add_argument("port", type=int)
    for name in ("--cert", "--key", "--ca"):
        parser.add_argument(name, default="")
    for name in ("--policies", "--key-file"):
        parser.add_argument(name, type=Path)
    run: Any = asyncio.run
    with suppress(ModuleNotFoundError):  # as the controller does it
        run = importlib.import_module("uvloop").run
    run(serve(parser.parse_args(sys.argv[1:])))


if __name__ == "__main__":
    main()
