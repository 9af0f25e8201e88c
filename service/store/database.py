"""The database: connections, transactions, the clock, migrations. SQLite (WAL) embedded, PostgreSQL for the lab.

Writing transactions take turns: on SQLite by `BEGIN IMMEDIATE`, on PostgreSQL by one advisory lock. So both behave
alike, event ids are gap-free and in commit order, writers cannot deadlock, and no conflict makes one of them start
over. Writers are fast because they batch rows.
"""

import logging
import math
import shutil
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

import psycopg
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from pydantic_core import from_json
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.exc import DatabaseError, DataError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry, StaticPool

from service.errors import DatabaseAway, DatabaseDamaged, DatabaseFull, InvalidQuery, SchemaOutdated
from service.store.listed import stored_json
from service.store.pooling import Pooling, postgresql_url

log = logging.getLogger("uncanny.database")

WRITER_LOCK = 7_265_011  # the advisory lock that the one writing transaction holds
WRITTEN = "uncanny_written"  # the channel that every writing transaction notifies when it commits
BUSY_SECONDS = 30  # the longest wait for the turn to write
FROZEN_SECONDS = 15  # PostgreSQL ends a writing transaction that idles for so long; shorter than a lease
CONNECT_SECONDS = 5
PING_SECONDS = 5  # the longest wait for the answer of a pooled connection, before it is used
POOL_SECONDS = 10  # the longest wait for a free connection of the pool
GRACE_SECONDS = 10  # beyond a statement's limit: for the server to say itself that the statement took too long
# PostgreSQL's codes of errors that may pass by themselves: a broken connection, a standby server, a writer that idled,
# a conflict, no resources left, no turn in time, a shutdown or time-out, an input or output error.
AWAY = ("08", "25006", "25P03", "40", "53", "55P03", "57", "58")
FULL = "53100"  # the one of these codes for a full disk
DAMAGED = ("XX001", "XX002")  # data pages and index pages that cannot be read
DAMAGED_SQLITE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
LEAST_BYTES = 1 << 20  # a SQLite file's disk with fewer free bytes counts as full
ROOM_ROWS = 200  # that `check_room` writes: more than fit into a few pages that are not full yet
STEPS = 1_000_000  # of SQLite's virtual machine between two looks at the clock: some hundredths of a second
SILENT_SECONDS = 20  # a server on the network that does not answer for so long counts as gone

TAKE_TURNS = text(
    f"SELECT set_config('lock_timeout', '{BUSY_SECONDS}s', true), "
    f"set_config('idle_in_transaction_session_timeout', '{FROZEN_SECONDS}s', true), "
    f"pg_advisory_xact_lock({WRITER_LOCK}), pg_notify('{WRITTEN}', '')"
)
LIMIT_STATEMENTS = text("SELECT set_config('statement_timeout', :limit, true)")


class _Impatient(psycopg.Connection[Any]):  # Any: the rows of any statement
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


class Database:
    """A store's database by SQLAlchemy URL. Opening it never writes; `sqlite://` is the small real one in memory.

    With `statement_seconds`, statements that take longer end with `DatabaseAway`, even if PostgreSQL sends nothing.
    """

    def __init__(self, url: str, *, statement_seconds: float | None = None) -> None:
        self.url = url
        self._statement_seconds = statement_seconds
        self.is_sqlite = url.startswith("sqlite")
        parsed, declared = postgresql_url(url)
        file = parsed.database if self.is_sqlite else None
        self.path = Path(unquote(file)) if file else None
        """The file of a SQLite database; None in memory, and for PostgreSQL."""
        self._pooling = Pooling(declared)
        self.engine = (
            _sqlite_engine(url, self.path, statement_seconds)
            if self.is_sqlite
            else _postgresql_engine(parsed, statement_seconds, self._pooling)
        )
        self._full = False  # whether the last write of this object found the disk full

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the store and changes nothing."""
        with _translated(), self.engine.connect() as connection:
            if not self.is_sqlite:
                connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
                self._limit(connection)
            yield connection
            connection.commit()  # at a rollback psycopg forgets which statements it has prepared

    def is_pooled(self) -> bool:
        """Whether PostgreSQL is behind a pooler: then no notices arrive. Raises `DatabaseAway`, `UnfitDatabase`."""
        if not self.is_sqlite and self._pooling.is_present is None:
            with self.read():
                pass
        return bool(self._pooling.is_present)

    def server_version(self, connection: Connection) -> str:
        """As the database reports it: `PostgreSQL 18.1 on ...`, or the bare number of SQLite's version."""
        return str(connection.scalar(text(f"SELECT {'sqlite_version()' if self.is_sqlite else 'version()'}")))

    @contextmanager
    def write(self, *, in_turn: bool = True) -> Iterator[Connection]:
        """A writing transaction, one at a time: committed as a whole at the end, or not at all.

        On PostgreSQL, one that is not `in_turn` waits for no other; it may change only rows that nobody else changes.

        Raises `DatabaseAway` if the database cannot be reached, `DatabaseFull` if its disk is full. Then nothing was
        written, unless the connection broke during the commit itself.
        """
        try:
            with _translated(), self.engine.connect().execution_options(uncanny_write=True) as connection:
                with connection.begin():
                    if not self.is_sqlite:
                        if in_turn:
                            connection.execute(TAKE_TURNS)
                        self._limit(connection)
                    yield connection
        except DatabaseFull:
            self._full = True
            raise
        self._full = False

    def check_room(self, *, doubt: bool = False) -> None:
        """Raises `DatabaseFull` if the database's disk is full.

        In `doubt`, and after a write that found the disk full, some pages of rows are written and deleted to find out:
        on SQLite in turn with other writers, on PostgreSQL without waiting for them.
        """
        if self.path and (free := shutil.disk_usage(self.path.parent).free) < LEAST_BYTES:
            raise DatabaseFull(f"the database's disk is full ({free} bytes left at {self.path.parent}): make room")
        if doubt or self._full:
            prefix = f"room {uuid4().hex[:16]}"
            with self.write(in_turn=False) as connection:
                rows = [{"name": f"{prefix} {n:018}"} for n in range(ROOM_ROWS)]
                connection.execute(text("INSERT INTO counters (name, value) VALUES (:name, 0)"), rows)
                connection.execute(text("DELETE FROM counters WHERE name LIKE :names"), {"names": f"{prefix}%"})

    def _limit(self, connection: Connection) -> None:
        """Limit statements of this transaction only: a pooler would lose, or refuse, an option of the connection."""
        if self._statement_seconds is not None:
            limit = f"{self._statement_seconds * 1000:.0f}"
            connection.execute(LIMIT_STATEMENTS, {"limit": limit})

    def now(self, connection: Connection) -> float:
        """Seconds since 1970 by the clock of the database, which alone decides when leases expire."""
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
        """Upgrade the schema to this version's, or to an earlier one. Two runs, also at once, do no harm."""
        if self.path:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(OSError):  # SQLite will say what is wrong; it gives the files beside this one the same mode
                self.path.touch(mode=0o600, exist_ok=False)
        config = _alembic()
        with self.write() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, revision)

    def check_schema(self) -> None:
        """Raises `SchemaOutdated` if the schema is not this version's, with a sentence that says what to run."""
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


def _postgresql_engine(url: URL, statement_seconds: float | None, pooling: Pooling) -> Engine:
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

    def ping_in_time(dbapi_connection: Any) -> bool:  # Any: SQLAlchemy does not know that it is an `_Impatient`
        usual = dbapi_connection.silent_seconds
        dbapi_connection.silent_seconds = PING_SECONDS
        try:
            return ping(dbapi_connection)
        finally:
            dbapi_connection.silent_seconds = usual

    pooling.install(engine)  # before `_connect` below, which connects with the options that this sets

    @event.listens_for(engine, "do_connect")
    def _connect(_dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:  # Any: events have no types
        connection = _Impatient.connect(*arguments, **options)
        if statement_seconds is not None:
            connection.silent_seconds = max(statement_seconds, BUSY_SECONDS) + GRACE_SECONDS
        return connection

    engine.dialect.do_ping = ping_in_time  # type: ignore[method-assign]
    return engine


def _sqlite_engine(url: str, path: Path | None, statement_seconds: float | None) -> Engine:
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
        _limit_sqlite(engine, statement_seconds)

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A deferred transaction that reads first and then writes fails at once with "database is locked".
        immediate = connection.get_execution_options().get("uncanny_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if immediate else "BEGIN")

    return engine


def _limit_sqlite(engine: Engine, seconds: float) -> None:
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


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except DatabaseError as error:
        if isinstance(error, DataError) and "NUL" in str(error.orig):
            sentence = "a text in it contains a NUL character, which no database keeps"
            raise InvalidQuery("request", sentence) from error
        if _is_damaged(error.orig):
            raise _damaged(error) from error
        if not isinstance(error, (OperationalError, InternalError)):
            raise
        if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR or not _is_away(error.orig):
            raise  # a mistake in a statement, such as a missing table
        raise _away(error) from error
    except InterfaceError as error:
        if not _is_away(error.orig):
            raise
        raise _away(error) from error
    except (psycopg.Error, sqlite3.Error) as error:  # the driver's own, such as of a COPY
        if _is_damaged(error):
            raise _damaged(error) from error
        if not isinstance(error, (psycopg.OperationalError, sqlite3.OperationalError)) or not _is_away(error):
            raise
        raise _away(error) from error
    except PoolTimeout as error:
        raise DatabaseAway("all connections to the database are busy: it will be tried again") from error


def _is_damaged(error: BaseException | None) -> bool:
    code = getattr(error, "sqlite_errorcode", None)
    return (code is not None and code & 0xFF in DAMAGED_SQLITE) or getattr(error, "sqlstate", None) in DAMAGED


def _damaged(error: Exception) -> DatabaseDamaged:
    return DatabaseDamaged(
        f"the database is damaged ({_first_line(error)}): stop the service, keep a copy of the database, and restore a "
        "backup into a new one (`uncanny db restore FILE`)"
    )


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]


def _is_away(error: BaseException | None) -> bool:
    """Whether the error may pass by itself. Those without a code are of the connection, or of SQLite."""
    state = getattr(error, "sqlstate", None)
    return state is None or state.startswith(AWAY)


def _away(error: Exception) -> DatabaseAway:
    origin = getattr(error, "orig", None) or error
    message = _first_line(error)
    if getattr(origin, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL or getattr(origin, "sqlstate", None) == FULL:
        return DatabaseFull(f"the database's disk is full ({message}): make room; nothing was written")
    if "statement timeout" in message or getattr(origin, "sqlite_errorcode", None) == sqlite3.SQLITE_INTERRUPT:
        return DatabaseAway(
            f"this takes the database too long ({message}): narrow the filter, ask for fewer rows or fields, or ask "
            "when the database has less to do"
        )
    return DatabaseAway(f"the database does not answer ({message}): it will be tried again")
