"""Waiting until somebody writes to the database, so that new rows are seen in milliseconds and not at the next poll.

PostgreSQL notifies those who listen, unless a pooler is in between. SQLite counts the commits of other connections;
reading the count is a look into shared memory.
"""

import sqlite3
import time
from typing import Protocol

from service.store.database import Database

POLL_INTERVAL_SECONDS = 0.005  # between two reads of SQLite's count of commits


class Waking(Protocol):
    """For one thread. A wait may end early for no reason, and notices no write while the database is away."""

    def wait(self, timeout_seconds: float) -> None:
        """Wait until another connection has committed since the last wait ended, at most for so long."""

    def close(self) -> None: ...


def waking(database: Database) -> Waking:
    if not database.is_sqlite:
        from service.store.postgresql import Listening  # imports psycopg

        return Listening(database)
    path = database.engine.url.database
    return _Counting(path) if path else _Sleeping()


class _Sleeping:
    """For a database in memory, to which nobody else writes."""

    def wait(self, timeout_seconds: float) -> None:
        time.sleep(timeout_seconds)

    def close(self) -> None:
        pass


class _Counting:
    def __init__(self, path: str) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._seen = -1

    def wait(self, timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        while (now := self._commits()) == self._seen and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(POLL_INTERVAL_SECONDS, left))
        self._seen = now

    def _commits(self) -> int:
        try:
            if self._connection is None:
                self._connection = sqlite3.connect(self._path, isolation_level=None)
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:  # it is away: callers that need the database will say so
            return self._seen

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
