"""The database: connections, transactions, the clock, migrations. SQLite (WAL) embedded, PostgreSQL for the lab.

Writing transactions take turns: on SQLite by `BEGIN IMMEDIATE`, on PostgreSQL by one advisory lock. So both behave
alike, event ids are gap-free and in commit order, no two writers can deadlock, and nothing is lost to a retry. What is
written is batched instead.
"""

import logging
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote

import psycopg
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from pydantic_core import from_json
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.exc import DataError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry, StaticPool

from service.errors import DatabaseAway, InvalidQuery, SchemaOutdated
from service.store.listed import stored_json
from service.store.pooling import Pooling, postgresql_url

log = logging.getLogger("uncanny.database")

WRITER_LOCK = 7_265_011  # the advisory lock that stands for "I am the writer"
WRITTEN = "uncanny_written"  # the channel on which every commit of a writer is told
BUSY_SECONDS = 30  # the longest wait for one's turn
FROZEN_SECONDS = 15  # a writer that says nothing for so long loses its turn, on PostgreSQL: less than a lease
CONNECT_SECONDS = 5
# Of PostgreSQL's error codes: connections, a server that stands by, a turn lost, conflicts, no room, no turn, stopping.
AWAY = ("08", "25006", "25P03", "40", "53", "55P03", "57", "58")
SILENT_SECONDS = 20  # after which a server on the network that does not answer is taken for gone

TAKE_TURNS = text(
    f"SELECT set_config('lock_timeout', '{BUSY_SECONDS}s', true), "
    f"set_config('idle_in_transaction_session_timeout', '{FROZEN_SECONDS}s', true), "
    f"pg_advisory_xact_lock({WRITER_LOCK}), pg_notify('{WRITTEN}', '')"
)


class Database:
    """A store's database by SQLAlchemy URL. Opening it never writes; `sqlite://` is the small real one in memory."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_sqlite = url.startswith("sqlite")
        parsed, declared = postgresql_url(url)
        named = parsed.database if self.is_sqlite else None
        self.path = Path(unquote(named)) if named else None
        """The file of a SQLite database; None in memory, and for PostgreSQL."""
        self.engine = _sqlite_engine(url, self.path) if self.is_sqlite else _postgresql_engine(parsed)
        self._pooling = Pooling(declared)
        if not self.is_sqlite:
            self._pooling.install(self.engine)

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the store and changes nothing."""
        with _translated(), self.engine.connect() as connection:
            if not self.is_sqlite:
                connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
            yield connection
            connection.commit()  # at a rollback psycopg forgets which statements it has prepared

    def is_pooled(self) -> bool:
        """Whether PostgreSQL is behind a pooler: then no notices arrive. Raises `DatabaseAway`, `UnfitDatabase`."""
        if not self.is_sqlite and self._pooling.found is None:
            with self.read():
                pass
        return bool(self._pooling.found)

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """The one writing transaction at a time: committed as a whole at the end, or not at all.

        Raises `DatabaseAway` where the database cannot be reached or has no room left; then nothing was written,
        unless the connection broke during the commit itself.
        """
        with _translated(), self.engine.connect().execution_options(uncanny_write=True) as connection:
            with connection.begin():
                if not self.is_sqlite:
                    connection.execute(TAKE_TURNS)
                yield connection

    def now(self, connection: Connection) -> float:
        """Seconds since 1970 by the clock of the database, the only one that leases go by."""
        clock = (
            "(julianday('now') - 2440587.5) * 86400.0" if self.is_sqlite else "extract(epoch FROM clock_timestamp())"
        )
        return float(connection.execute(text(f"SELECT {clock}")).scalar_one())

    def revision(self) -> str | None:
        """The schema revision that the database has; None for an empty one."""
        if self.path and not self.path.exists():
            return None  # connecting would make the file
        with self.read() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    def upgrade(self, revision: str = "head") -> None:
        """Bring the schema up to this version's, or to an earlier one. Safe to run twice, or by two at once."""
        if self.path:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(OSError):  # SQLite says what is wrong, and gives the files beside it the same mode
                self.path.touch(mode=0o600, exist_ok=False)
        config = _alembic()
        with self.write() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, revision)

    def check_schema(self) -> None:
        """Raises `SchemaOutdated` where the schema is not this version's, with a sentence that says what to run."""
        have, want = self.revision(), ScriptDirectory.from_config(_alembic()).get_current_head()
        if have != want:
            raise SchemaOutdated(
                f"the database has schema {have or 'none'}, this version needs {want}: run `uncanny db upgrade` "
                "(after a backup), or start the version that it belongs to"
            )

    def close(self) -> None:
        self.engine.dispose()


def _alembic() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def _postgresql_engine(url: URL) -> Engine:
    patience = {
        "client_encoding": "utf8", "connect_timeout": CONNECT_SECONDS, "tcp_user_timeout": SILENT_SECONDS * 1000,
        "keepalives_idle": SILENT_SECONDS // 2, "keepalives_interval": SILENT_SECONDS // 4, "keepalives_count": 2,
    }  # fmt: skip
    return create_engine(url, json_deserializer=from_json, pool_pre_ping=True, pool_size=10, connect_args=patience)


def _sqlite_engine(url: str, path: Path | None) -> Engine:
    engine = create_engine(
        make_url(url).set(database=str(path) if path else None),  # as it is: a URL object is not parsed again
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

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A deferred transaction that reads first and then writes fails at once with "database is locked".
        immediate = connection.get_execution_options().get("uncanny_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _use_wal(cursor: DBAPICursor) -> None:
    """Where two make the file at once, SQLite does not wait for the other one by itself."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, InternalError) as error:
        if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR or not _is_away(error.orig):
            raise  # a mistake in a statement, such as a table that is not there
        raise DatabaseAway(_sentence(error)) from error
    except DataError as error:
        if "NUL" not in str(error.orig):
            raise
        raise InvalidQuery("request", "a text in it contains a NUL character, which no database keeps") from error
    except psycopg.OperationalError as error:  # of a COPY, which is between us and the driver
        if not _is_away(error):
            raise
        raise DatabaseAway(_sentence(error)) from error
    except PoolTimeout as error:
        raise DatabaseAway("all connections to the database are busy: it will be tried again") from error


def _is_away(error: BaseException | None) -> bool:
    """Whether it may pass by itself. An error without a code is of the connection, or of SQLite."""
    state = getattr(error, "sqlstate", None)
    return state is None or state.startswith(AWAY)


def _sentence(error: Exception) -> str:
    said = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
    if "full" in said or "No space left" in said:
        return f"the database's disk is full ({said}): make room; nothing was written"
    return f"the database does not answer ({said}): it will be tried again"
