"""Connections to a SQLite file, or to a database in memory."""

import math
import sqlite3
import time
from pathlib import Path

from pydantic_core import from_json
from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.pool import ConnectionPoolEntry, StaticPool

from service.store.listed import stored_json
from service.store.patience import BUSY_SECONDS

STEPS = 1_000_000  # of SQLite's virtual machine between two looks at the clock: some hundredths of a second


def engine_for(url: str, path: Path | None, statement_seconds: float | None) -> Engine:
    engine = create_engine(
        make_url(url).set(database=str(path) if path else None),  # the path as it is: a URL object is not parsed again
        json_serializer=stored_json,
        json_deserializer=from_json,
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False, "isolation_level": None},
        **({"poolclass": StaticPool} if path is None else {}),
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
        cursor = connection.cursor()
        _use_wal(cursor)
        for pragma in ("synchronous=FULL", "foreign_keys=ON", "temp_store=MEMORY"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    if statement_seconds is not None:
        _limit_statements(engine, statement_seconds)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A deferred transaction that reads first and then writes fails at once with "database is locked".
        immediate = connection.get_execution_options().get("uncanny_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _limit_statements(engine: Engine, seconds: float) -> None:
    """Interrupt statements that take longer. Fetching rows counts too: SQLite finds each row when it is fetched."""
    deadline = "uncanny_deadline"

    @event.listens_for(engine, "connect")
    def _watch(connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
        def is_late() -> bool:
            return bool(time.monotonic() > entry.info.get(deadline, math.inf))

        connection.set_progress_handler(is_late, STEPS)

    @event.listens_for(engine, "before_cursor_execute")
    def _begin(connection: Connection, *_: object) -> None:
        connection.info[deadline] = time.monotonic() + seconds


def _use_wal(cursor: DBAPICursor) -> None:
    """If two processes make the file at once, SQLite does not wait for the other one by itself."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
