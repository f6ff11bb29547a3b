"""A table as a store of text by key: one MySQL connection for each instance of Table, closed with it."""

from __future__ import annotations

import os
from types import TracebackType

import pymysql

CONNECT_SECONDS_MAX = 10
CALL_SECONDS_MAX = 30


class Table:
    """Table `name` of the database that the environment names. Raises LookupError when there is no such table.

    What goes over the wire, in order: the handshake and `SET NAMES`, the look-up of the table, then each method's own
    statements, and at the end a quit.
    """

    def __init__(self, name: str) -> None:
        assert name.isidentifier(), "names of tables are constants of the program"
        self.name = name
        # The database is in the same network and offers no TLS; without `ssl_disabled` PyMySQL would load the machine's
        # certificate authorities for each connection before it asks. With `autocommit` as the server has it, it sends no SET.
        self._connection = pymysql.connect(
            host=os.environ["DB_HOST"],
            port=int(os.environ.get("DB_PORT", "3306")),
            user=os.environ["DB_USER"],
            password=os.environ["DB_PASSWORD"],
            database=os.environ["DB_NAME"],
            charset="utf8mb4",
            autocommit=True,
            ssl_disabled=True,
            connect_timeout=CONNECT_SECONDS_MAX,
            read_timeout=CALL_SECONDS_MAX,
            write_timeout=CALL_SECONDS_MAX,
        )
        self._cursor = self._connection.cursor()
        if not self._cursor.execute("SHOW TABLES LIKE %s", (name,)):
            self.close()
            raise LookupError(f"the database has no table {name}")

    def __enter__(self) -> Table:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def get(self, key: str) -> str | None:
        """The value of `key`; None when there is none."""
        self._cursor.execute(f"SELECT rowvalues FROM {self.name} WHERE rowkey = %s", (key,))  # noqa: S608  see __init__
        row = self._cursor.fetchone()
        return None if row is None else row[0]

    def put(self, key: str, value: str) -> None:
        """Replace the value of `key`. When it fails on the way, the connection's end takes everything back."""
        self._cursor.execute("START TRANSACTION")
        self._cursor.execute(f"DELETE FROM {self.name} WHERE rowkey = %s", (key,))  # noqa: S608  see __init__
        self._cursor.execute(f"INSERT INTO {self.name} (rowkey, rowvalues) VALUES (%s, %s)", (key, value))  # noqa: S608  see __init__
        self._cursor.execute("COMMIT")

    def close(self) -> None:
        """Say goodbye to the server and close the connection; closing twice is closing once."""
        if self._connection.open:
            self._connection.close()
