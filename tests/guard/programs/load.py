"""Round trips of one size from inside of a sandbox, on one kept connection: `run` returns their times in microseconds.

The program does the same whatever judges it; that is what the comparison is about.
"""

import resource
import socket
import ssl
import time

CONNECT_S = 10


HEAD_BYTES_MAX = 1024  # a request up to here is a head alone; a larger one has a body


class Http:
    """Requests of `size` bytes over HTTP/1.1: a head that is padded, or a head and a body."""

    def __init__(self, to, name, size, tls):
        self.connection = socket.create_connection(tuple(to), CONNECT_S)
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:
            self.connection = ssl.create_default_context().wrap_socket(self.connection, server_hostname=name)
        if size <= HEAD_BYTES_MAX:
            head = f"GET /load HTTP/1.1\r\nHost: {name}:{to[1]}\r\nX-Pad: {{}}\r\n\r\n"
            self.data = head.format("x" * max(1, size - len(head) + 2)).encode()
        else:
            head = f"POST /load HTTP/1.1\r\nHost: {name}:{to[1]}\r\nContent-Length: {{:08d}}\r\n\r\n"
            body = size - len(head.format(0))
            self.data = head.format(body).encode() + bytes(body)

    def once(self):
        self.connection.sendall(self.data)
        if not self.connection.recv(4096).endswith(b"ok"):
            raise ConnectionError("no whole answer")

    def close(self):
        self.connection.close()


class Mysql:
    """Statements of `size` bytes."""

    def __init__(self, to, _name, size, _tls):
        import pymysql

        self.database = pymysql.connect(host=to[0], port=to[1], user="abc", password="xyz", database="helloRetail", ssl_disabled=True)
        self.cursor = self.database.cursor()
        text = "SELECT name FROM photos WHERE name = '{}'"
        self.statement = text.format("x" * max(1, size - len(text) + 2))

    def once(self):
        self.cursor.execute(self.statement)

    def close(self):
        self.database.close()


def run(protocol, to, name, size, count):
    load = (Mysql if protocol == "mysql" else Http)(to, name, size, protocol == "https")
    times = []
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(count):
        began = time.perf_counter_ns()
        load.once()
        times.append((time.perf_counter_ns() - began) / 1000)
    after = resource.getrusage(resource.RUSAGE_SELF)
    load.close()
    return {"us": times, "program_cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}
