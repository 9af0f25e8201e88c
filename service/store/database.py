"""The database: connections, transactions, the clock, migrations. SQLite (WAL) embedded, PostgreSQL for the lab.

Writing transactions take turns: on SQLite by `BEGIN IMMEDIATE`, on PostgreSQL by one advisory lock. So both behave
alike, event ids are gap-free and in commit order, writers cannot deadlock, and no conflict makes one of them start
over. Writers are fast because they batch rows.
"""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote
from uuid import uuid4

from sqlalchemy import URL, Connection, make_url, text
from sqlalchemy.exc import ArgumentError

from service.errors import DatabaseFull, SchemaOutdated, UnfitDatabase
from service.store import schema, sqlite
from service.store.failures import translated
from service.store.patience import BUSY_SECONDS, FROZEN_SECONDS

log = logging.getLogger("uncanny.database")

WRITER_LOCK = 7_265_011  # the advisory lock that the one writing transaction holds
WRITTEN = "uncanny_written"  # the channel that every writing transaction notifies when it commits
POOLED = "pgbouncer"  # `?pgbouncer=true` in a URL declares a pooler, as for other clients
LEAST_BYTES = 1 << 20  # a SQLite file's disk with fewer free bytes counts as full
ROOM_ROWS = 200  # that `check_room` writes: more than fit into a few pages that are not full yet

TAKE_TURNS = text(
    f"SELECT set_config('lock_timeout', '{BUSY_SECONDS}s', true), "
    f"set_config('idle_in_transaction_session_timeout', '{FROZEN_SECONDS}s', true), "
    f"pg_advisory_xact_lock({WRITER_LOCK}), pg_notify('{WRITTEN}', '')"
)
LIMIT_STATEMENTS = text("SELECT set_config('statement_timeout', :limit, true)")


class Database:
    """A store's database by SQLAlchemy URL. Opening it never writes; `sqlite://` is the small real one in memory.

    With `statement_seconds`, statements that take longer end with `DatabaseAway`, even if PostgreSQL sends nothing.
    """

    def __init__(self, url: str, *, statement_seconds: float | None = None) -> None:
        self.url = url
        self._statement_seconds = statement_seconds
        self.is_sqlite = url.startswith("sqlite")
        parsed, pooler = parse(url)
        file = parsed.database if self.is_sqlite else None
        self.path = Path(unquote(file)) if file else None
        """The file of a SQLite database; None in memory, and for PostgreSQL."""
        if self.is_sqlite:
            self.engine = sqlite.engine_for(url, self.path, statement_seconds)
        else:
            from service.store import pooling, postgresql  # they import psycopg

            self._pooling = pooling.Pooling(pooler)
            self.engine = postgresql.engine_for(parsed, statement_seconds, self._pooling)
        self._full = False  # whether the last write of this object found the disk full

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the store and changes nothing."""
        with translated(), self.engine.connect() as connection:
            if not self.is_sqlite:
                connection.execute(text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY"))
                self._limit(connection)
            yield connection
            connection.commit()  # at a rollback psycopg forgets which statements it has prepared

    def is_pooled(self) -> bool:
        """Whether PostgreSQL is behind a pooler: then no notices arrive. Raises `DatabaseAway`, `UnfitDatabase`."""
        if self.is_sqlite:
            return False
        if self._pooling.is_present is None:
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
            with translated(), self.engine.connect().execution_options(uncanny_write=True) as connection:
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
            return schema.revision_of(connection)

    def upgrade(self, revision: str = "head") -> None:
        """Upgrade the schema to this version's, or to an earlier one. Two runs, also at once, do no harm."""
        if self.path:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with suppress(OSError):  # SQLite will say what is wrong; it gives the files beside this one the same mode
                self.path.touch(mode=0o600, exist_ok=False)
        if revision == "head" and self.revision() == schema.newest():
            return
        with self.write() as connection:
            schema.upgrade(connection, revision)

    def check_schema(self) -> None:
        """Raises `SchemaOutdated` if the schema is not this version's, with a sentence that says what to run."""
        have, want = self.revision(), schema.newest()
        if have != want:
            raise SchemaOutdated(
                f"the database has schema {have or 'none'}, this version needs {want}: run `uncanny db upgrade` "
                "(after a backup), or start the version that it belongs to"
            )

    def close(self) -> None:
        self.engine.dispose()


def parse(url: str) -> tuple[URL, bool]:
    """The URL without our own option, and whether that declares a pooler. Raises `UnfitDatabase`."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise UnfitDatabase(
            "the database URL cannot be read: write postgresql://USER@HOST:PORT/NAME or sqlite:////PATH"
        ) from None
    declared = str(parsed.query.get(POOLED, "")).lower() in ("1", "true", "yes")
    return parsed.difference_update_query([POOLED]), declared
