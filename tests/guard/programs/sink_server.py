"""An HTTP/1.1 server that swallows bodies as fast as it can: `sink_server.py ADDRESS PORT [CERTIFICATE KEY]`; with a certificate over TLS 1.3."""

import socket
import ssl
import sys
import threading

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


def serve(connection, context):
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    buffer = bytearray(1 << 18)
    try:
        if context:
            connection = context.wrap_socket(connection, server_side=True)
        kept = b""
        while True:
            while b"\r\n\r\n" not in kept:
                data = connection.recv(65536)
                if not data:
                    return
                kept += data
            head, _, kept = kept.partition(b"\r\n\r\n")
            _, _, length = head.partition(b"Content-Length: ")
            left = int(length.split(b"\r\n")[0] or 0) - len(kept)
            kept = b""
            while left > 0:
                left -= connection.recv_into(buffer)
            connection.sendall(ANSWER)
    except OSError:
        return
    finally:
        connection.close()


def main():
    address, port, *files = sys.argv[1:]
    context = None
    if files:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*files)
    with socket.create_server((address, int(port)), backlog=128) as listener:
        print("listening", flush=True)
        while True:
            threading.Thread(target=serve, args=(listener.accept()[0], context), daemon=True).start()


if __name__ == "__main__":
    main()
