"""A store in virtual time: its clock is given, nothing of it is durable, and what is asked of it is counted."""

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, cast

from sqlalchemy import Connection, event, func, insert, select
from sqlalchemy.engine.interfaces import DBAPIConnection

from service.model.events import EventKind
from service.model.jobs import TaskState
from service.store.database import Database
from service.store.tables import events, tasks, usage

BEFORE = "uncanny_rows_before"


@dataclass
class Asked:
    """The SQL statements that a store was asked for, and the rows that they inserted, changed or deleted."""

    statements: int = 0
    rows: int = 0


class SimulatedDatabase(Database):
    """A SQLite file whose time is that of `clock`. It does not wait for the disk: nothing of it is kept."""

    def __init__(self, file: Path, clock: Callable[[], float]) -> None:
        super().__init__(f"sqlite:///{file}")
        self._clock = clock
        self.asked = Asked()
        self._count()

    def now(self, connection: Connection) -> float:
        return self._clock()

    def _count(self) -> None:
        @event.listens_for(self.engine, "connect")
        def _hurry(connection: DBAPIConnection, _: object) -> None:
            connection.cursor().execute("PRAGMA synchronous=OFF")

        @event.listens_for(self.engine, "after_cursor_execute")
        def _statement(*_: object) -> None:
            self.asked.statements += 1

        @event.listens_for(self.engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.info[BEFORE] = _changed(connection)

        @event.listens_for(self.engine, "commit")
        def _commit(connection: Connection) -> None:
            self.asked.rows += _changed(connection) - connection.info[BEFORE]


class Turn(NamedTuple):
    """When a task could have run, and when it was granted (None: not yet), for `sponsor`."""

    task_id: str
    kind: str
    sponsor: str
    queued_at: float
    granted_at: float | None


def turns(connection: Connection) -> Iterator[Turn]:
    """The turn of each task that was ever queued."""
    last = select(events.c.task_id, func.max(events.c.at).label("at")).where(
        events.c.kind == EventKind.of_task(TaskState.QUEUED)
    )
    queued = last.group_by(events.c.task_id).subquery()
    query = select(tasks.c.id, tasks.c.kind, tasks.c.sponsor, queued.c.at, tasks.c.started_at)
    for row in connection.execute(query.join(queued, queued.c.task_id == tasks.c.id)):
        yield Turn(*row)


def have_used(connection: Connection, now: float, user: str, device_seconds: float) -> None:
    """Let a user have used so many device seconds before."""
    row = {"user": user, "device_seconds": device_seconds, "as_of": now, "recent_seconds": 0.0}
    connection.execute(insert(usage).values(row))


def _changed(connection: Connection) -> int:
    """How many rows this connection has changed. A cursor does not know it for statements with RETURNING."""
    return cast(sqlite3.Connection, connection.connection.dbapi_connection).total_changes
