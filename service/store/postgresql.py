"""Connections to PostgreSQL, and its notices of commits. Imported for a PostgreSQL URL only: psycopg is large."""

import math
import time
from typing import Any

import psycopg
from psycopg.sql import SQL, Identifier
from pydantic_core import from_json
from sqlalchemy import URL, Engine, create_engine, event

from service.errors import DatabaseAway
from service.store.database import WRITTEN, Database
from service.store.patience import (
    BUSY_SECONDS,
    CONNECT_SECONDS,
    GRACE_SECONDS,
    PING_SECONDS,
    POOL_SECONDS,
    SILENT_SECONDS,
)
from service.store.pooling import Pooling

LISTEN = SQL("LISTEN {}").format(Identifier(WRITTEN))


class Impatient(psycopg.Connection[Any]):  # Any: the rows of any statement
    """A connection that fails if the server sends nothing for `silent_seconds`.

    The kernel of a frozen server still acknowledges packets, so that no time-out of a socket notices.
    """

    silent_seconds = math.inf

    def wait(self, gen: Any, *arguments: Any, **options: Any) -> Any:  # Any: the types are psycopg's own
        return super().wait(self._bounded(gen), *arguments, **options)

    def _bounded(self, gen: Any) -> Any:
        """The same generator with a deadline. psycopg resumes it with 0 several times a second while nothing comes."""
        deadline = time.monotonic() + self.silent_seconds
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > deadline:
                    self.pgconn.finish()
                    raise psycopg.OperationalError(f"the server has said nothing for {self.silent_seconds:g} s")
                wanted = gen.send(ready)
        except StopIteration as end:
            return end.value


def engine_for(url: URL, statement_seconds: float | None, pooling: Pooling) -> Engine:
    patience = {
        "client_encoding": "utf8",
        "connect_timeout": CONNECT_SECONDS,
        "tcp_user_timeout": SILENT_SECONDS * 1000,
        "keepalives_idle": SILENT_SECONDS // 2,
        "keepalives_interval": SILENT_SECONDS // 4,
        "keepalives_count": 2,
    }
    engine = create_engine(
        url,
        json_deserializer=from_json,
        pool_pre_ping=True,
        pool_size=10,
        pool_timeout=POOL_SECONDS,
        connect_args=patience,
    )
    ping = engine.dialect.do_ping

    def ping_in_time(dbapi_connection: Any) -> bool:  # Any: SQLAlchemy does not know that it is an `Impatient`
        usual = dbapi_connection.silent_seconds
        dbapi_connection.silent_seconds = PING_SECONDS
        try:
            return ping(dbapi_connection)
        finally:
            dbapi_connection.silent_seconds = usual

    pooling.install(engine)  # before `_connect` below, which connects with the options that this sets

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:  # Any: events have no types
        connection = Impatient.connect(*arguments, **options)
        if statement_seconds is not None:
            connection.silent_seconds = max(statement_seconds, BUSY_SECONDS) + GRACE_SECONDS
        return connection

    engine.dialect.do_ping = ping_in_time  # type: ignore[method-assign]
    return engine


class Listening:
    """Waits for notices of commits (`waking.Waking`). Behind a pooler, which loses notices, this only sleeps."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._url = database.engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        self._connection: psycopg.Connection | None = None

    def wait(self, timeout_seconds: float) -> None:
        try:
            if self._database.is_pooled():
                return time.sleep(timeout_seconds)
            if self._connection is None:
                self._connection = psycopg.connect(self._url, autocommit=True, connect_timeout=CONNECT_SECONDS)
                self._connection.execute(LISTEN)
            for _ in self._connection.notifies(timeout=timeout_seconds, stop_after=1):
                pass
        except (psycopg.Error, DatabaseAway):  # it is away: callers that need the database will say so
            self.close()
            time.sleep(timeout_seconds)
        return None

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
