"""Scenario 1c: the exploited function does its database work as it should, and then writes a second time."""

from experiments.attacks.case import Case, Match
from experiments.entries import RECEIVE

CASE = Case(
    name="repeat-write",
    category="scenario-1",
    claim="a second write reaches the database after the one that the policy allows",
    exploits={
        RECEIVE: """
            import os
            import pymysql, requests
            marker = "@REVERSED@"[::-1]
            def connect():
                return pymysql.connect(host=os.environ["DB_HOST"], port=int(os.environ["DB_PORT"]), user=os.environ["DB_USER"],
                                       password=os.environ["DB_PASSWORD"], database=os.environ["DB_NAME"], autocommit=True)
            requests.get("@IMAGE@", verify=False, timeout=10)
            assignment = connect().cursor()
            assignment.execute("SHOW TABLES LIKE 'photoAssignmentTable'")
            assignment.execute("SELECT rowvalues FROM photoAssignmentTable WHERE rowkey = '200494'")
            stored = connect().cursor()
            stored.execute("SHOW TABLES LIKE 'storedPhotosTable'")
            def put(cursor, key, value):
                cursor.execute("START TRANSACTION")
                cursor.execute("DELETE FROM storedPhotosTable WHERE rowkey = %s", (key,))
                cursor.execute("INSERT INTO storedPhotosTable (rowkey, rowvalues) VALUES (%s, %s)", (key, value))
                cursor.execute("COMMIT")
            put(stored, "1", "{}")
            try:
                put(stored, marker, marker)
            except Exception:
                connect().cursor().execute("INSERT INTO storedPhotosTable (rowkey, rowvalues) VALUES (%s, %s)", (marker, marker))
        """,
    },
    allowed_first=Match(("mysql",), "insert"),
    denied=Match(("mysql",)),
    at_receiver=lambda evidence, marker: evidence.database(marker),
)
