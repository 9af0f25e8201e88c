"""Events: an append-only row per state change, with the actor. The audit log, and what the live stream sends."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, Table, delete, exists, func, insert, literal, select

from service.model.events import EventKind
from service.model.json import JsonObject
from service.model.records import FirstEvent
from service.store import counters
from service.store.listed import insert_rows
from service.store.tables import Json, events, job_tasks, jobs, tasks
from service.store.values import Values, one

Ids = Select[str]
Value = ColumnElement[Any]  # Any: of whichever type the column has
PAGE = 1000  # events that are read at once


@dataclass(frozen=True)
class Event:
    """Something happened, mostly to a job, a task or a sweep."""

    kind: EventKind
    sweep_id: str | None = None
    job_id: str | None = None
    task_id: str | None = None
    attempt: int | None = None
    data: JsonObject = field(default_factory=dict)


def append(connection: Connection, now: float, actor: str, happened: list[Event]) -> None:
    """Write events in order, with gap-free ids."""
    if not happened:
        return
    first = counters.take(connection, "events", len(happened))
    own = {"at": now, "actor": actor}
    rows = [{**vars(event), "kind": str(event.kind), "id": first + i, **own} for i, event in enumerate(happened)]
    insert_rows(connection, events, rows)


def append_for_jobs(
    connection: Connection, now: float, actor: str, kind: EventKind, which: Ids, data: Value | None = None
) -> None:
    """The same event for each job of `which` (a query of ids), in the order they were submitted.

    `data` is made of columns of `jobs`, as they are at this moment.
    """
    columns = {"sweep_id": jobs.c.sweep_id, "job_id": jobs.c.id}
    _append_for(connection, now, actor, jobs, which, {**columns, "kind": literal(str(kind))}, data)


def append_for_tasks(
    connection: Connection, now: float, actor: str, kind: EventKind | None, which: Ids, data: Value | None = None
) -> None:
    """The same for tasks; without a `kind`, the kind is `task.` and the state that the task is in at this moment."""
    stored = literal(str(kind)) if kind else "task." + tasks.c.state
    _append_for(connection, now, actor, tasks, which, {"task_id": tasks.c.id, "kind": stored}, data)


def _append_for(
    connection: Connection,
    now: float,
    actor: str,
    table: Table,
    which: Ids,
    columns: Mapping[str, Value],
    data: Value | None,
) -> None:
    position = func.row_number().over(order_by=(table.c.sequence, table.c.id))
    values = {
        **columns,
        "id": counters.current("events") + position,
        "at": literal(now),
        "actor": literal(actor),
        "data": literal({}, Json) if data is None else data,
    }
    rows = select(*values.values()).where(table.c.id.in_(which))
    statement = insert(events).from_select(list(values), rows).execution_options(preserve_rowcount=True)
    counters.take(connection, "events", connection.execute(statement).rowcount)


def after(
    connection: Connection, last_id: int, *, sweep_id: str | None = None, job_id: str | None = None, limit: int = PAGE
) -> list[Values]:
    """Events later than `last_id`, oldest first, of everything or of one sweep or job and the tasks that it needs."""
    query = select(events).where(events.c.id > last_id).order_by(events.c.id).limit(limit)
    # Nested EXISTS, so that the planner has to test each event. Listing the tasks beforehand would take long: thousands
    # of jobs may need tens of thousands of tasks.
    needed = exists().where(job_tasks.c.task_id == events.c.task_id)
    if sweep_id is not None:
        of_sweep = exists().where(jobs.c.id == job_tasks.c.job_id, jobs.c.sweep_id == sweep_id)
        query = query.where((events.c.sweep_id == sweep_id) | needed.where(of_sweep.correlate(job_tasks)))
    if job_id is not None:
        query = query.where((events.c.job_id == job_id) | needed.where(job_tasks.c.job_id == job_id))
    return [dict(row._mapping) for row in connection.execute(query)]


def first(connection: Connection) -> FirstEvent | None:
    """The oldest event that is kept; None if there is none."""
    return one(connection, FirstEvent, select(events.c.id, events.c.at).order_by(events.c.id).limit(1))


def older_than(connection: Connection, at: float) -> tuple[int, int]:
    """The ids of the oldest event and of the oldest event from `at` or later: the events between are older than `at`.

    If all events are older, the second id is that of the newest event, which is always kept. Both are 0 without events.
    """
    in_order = select(events.c.id).order_by(events.c.id).limit(1)
    oldest = connection.execute(in_order).scalar_one_or_none()
    if oldest is None:
        return 0, 0
    kept = connection.execute(in_order.where(events.c.at >= at)).scalar_one_or_none()
    return oldest, last_id(connection) if kept is None else kept


def forget(connection: Connection, before_id: int) -> None:
    connection.execute(delete(events).where(events.c.id < before_id))


def needing(
    connection: Connection, task_ids: Collection[str], sweep_ids: Collection[str], job_ids: Collection[str]
) -> dict[str, set[str]]:
    """Which of these sweeps and jobs need each of these tasks."""
    of_sweeps = select(job_tasks.c.task_id, jobs.c.sweep_id).join(jobs, jobs.c.id == job_tasks.c.job_id).distinct()
    of_jobs = select(job_tasks.c.task_id, job_tasks.c.job_id)
    by_task: dict[str, set[str]] = {task_id: set() for task_id in task_ids}
    for column, ids, query in ((jobs.c.sweep_id, sweep_ids, of_sweeps), (job_tasks.c.job_id, job_ids, of_jobs)):
        if ids and task_ids:
            query = query.where(column.in_(ids))
            for task_id, needing_id in connection.execute(query.where(job_tasks.c.task_id.in_(task_ids))):
                by_task[task_id].add(needing_id)
    return by_task


def last_id(connection: Connection) -> int:
    return int(connection.execute(select(events.c.id).order_by(events.c.id.desc()).limit(1)).scalar_one_or_none() or 0)
