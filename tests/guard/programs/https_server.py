"""An HTTPS server that says each request that reached it: one JSON line `{"version", "method", "path", "host", "body"}`.

HTTP/1.1 and, where the client asks for it by ALPN, HTTP/2 (package h2). `body` is the number of its bytes.
    https_server.py ADDRESS PORT CERTIFICATE KEY [1.2|1.3] [CIPHERS]
"""

import json
import socket
import ssl
import sys
import threading
from typing import BinaryIO

import h2.config
import h2.connection
import h2.events

LOCK = threading.Lock()


def say(**record: object) -> None:
    with LOCK:
        print(json.dumps(record), flush=True)


def http2(connection: ssl.SSLSocket) -> None:
    state = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
    state.initiate_connection()
    connection.sendall(state.data_to_send())
    heads: dict[int, dict[str, str]] = {}
    bodies: dict[int, int] = {}
    while data := connection.recv(65536):
        for event in state.receive_data(data):
            if isinstance(event, h2.events.RequestReceived):
                heads[event.stream_id] = dict(event.headers)
                bodies[event.stream_id] = 0
            elif isinstance(event, h2.events.DataReceived):
                bodies[event.stream_id] += len(event.data)
                state.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                head = heads.pop(event.stream_id)
                say(version="h2", method=head[":method"], path=head[":path"], host=head[":authority"], body=bodies.pop(event.stream_id))
                state.send_headers(event.stream_id, [(":status", "200"), ("content-length", "2")])
                state.send_data(event.stream_id, b"ok", end_stream=True)
        connection.sendall(state.data_to_send())


def chunked(stream: BinaryIO) -> int:
    total = 0
    while size := int(stream.readline(), 16):
        total += size
        stream.read(size + 2)
    stream.readline()
    return total


def http1(connection: ssl.SSLSocket) -> None:
    stream = connection.makefile("rb")
    while line := stream.readline().decode("latin-1").split():
        fields = {}
        while field := stream.readline().decode("latin-1").strip():
            name, _, value = field.partition(":")
            fields[name.lower()] = value.strip()
        length = int(fields.get("content-length", 0))
        if fields.get("transfer-encoding"):
            length = chunked(stream)
        else:
            left = length
            while left:
                left -= len(stream.read(min(left, 65536)))
        say(version="http/1.1", method=line[0], path=line[1], host=fields.get("host", ""), body=length)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")


def serve(raw: socket.socket, context: ssl.SSLContext) -> None:
    try:
        with context.wrap_socket(raw, server_side=True) as connection:
            (http2 if connection.selected_alpn_protocol() == "h2" else http1)(connection)
    except (OSError, ValueError, IndexError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)


def main() -> None:
    address, port, certificate, key, *rest = sys.argv[1:]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.set_alpn_protocols(["h2", "http/1.1"])
    if rest:
        version = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[rest[0]]
        context.minimum_version = context.maximum_version = version
    if len(rest) > 1:
        context.set_ciphers(rest[1])
    with socket.create_server((address, int(port)), backlog=128) as listener:
        say(listening=int(port))
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0], context), daemon=True).start()


if __name__ == "__main__":
    main()
