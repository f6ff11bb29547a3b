"""The application's database, as the experiments use it: put back to its first state, and asked what it received."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pymysql
from pymysql.constants import CLIENT

from experiments import machine
from experiments.errors import ExperimentError
from experiments.site import Site

CONNECT_SECONDS_MAX = 10
CALL_SECONDS_MAX = 60


@contextmanager
def _session(site: Site, attempted: str) -> Iterator[pymysql.cursors.Cursor]:
    database, host = site.database, site.members("database")[0]
    try:
        connection = pymysql.connect(
            host=database.address,
            port=database.port,
            user=database.user,
            password=database.password,
            database=database.schema,
            connect_timeout=CONNECT_SECONDS_MAX,
            read_timeout=CALL_SECONDS_MAX,
            write_timeout=CALL_SECONDS_MAX,
            client_flag=CLIENT.MULTI_STATEMENTS,
            autocommit=True,
            defer_connect=True,
        )
        # A database on another host is asked through that host's SSH connection: its port need not be open for the operator.
        connection.connect(None if host.is_local else machine.of(host).tunnel(database.address, database.port, seconds_max=CONNECT_SECONDS_MAX))
        with connection, connection.cursor() as cursor:
            yield cursor
    except pymysql.err.Error as error:
        raise ExperimentError(
            "database.failed", f"{attempted} in {database.schema} at {database.address}:{database.port}", str(error),
            "see mariadb's log in /var/log/kalium; `make site` starts it and creates its user",
        ) from error  # fmt: skip


class Resetter:
    """Applies the site's reset file; the file is read once, so that every reset of a run is the same."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._sql = machine.of(site.members("database")[0]).read_bytes(site.database.reset).decode("utf-8")

    def reset(self) -> None:
        """Every table holds its first rows again, and nothing else."""
        with _session(self._site, f"apply {self._site.database.reset}") as cursor:
            cursor.execute(self._sql)
            while cursor.nextset():
                cursor.fetchall()


def stored_bytes_with(site: Site, text: str) -> int:
    """Bytes of the rows of storedPhotosTable whose key or value holds `text`: what the database received of it."""
    with _session(site, "look for a marker in storedPhotosTable") as cursor:
        cursor.execute(
            "SELECT COALESCE(SUM(LENGTH(rowkey) + LENGTH(rowvalues)), 0) FROM storedPhotosTable WHERE INSTR(rowkey, %s) OR INSTR(rowvalues, %s)",
            (text, text),
        )
        row = cursor.fetchone()
    assert row is not None, "an aggregate has one row"
    return int(row[0])
