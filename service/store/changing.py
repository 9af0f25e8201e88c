"""Changes to accepted work: pausing and resuming, priorities, labels, boosts; and pausing the whole queue."""

from collections.abc import Collection

from sqlalchemy import ColumnElement, Connection, and_, exists, insert, literal, select, update

from service.model.events import EventKind
from service.model.jobs import ENDED_TASK, LIVE_JOB, TaskState
from service.model.records import Queue
from service.store import history
from service.store.claiming import QUEUE
from service.store.history import Event
from service.store.listed import listed
from service.store.settling import rerank
from service.store.tables import Json, job_tasks, jobs, queues, sweeps, tasks
from service.store.values import Values, one


def pause_sweep(
    connection: Connection, now: float, actor: str, sweep_id: str, *, paused: bool, reason: str | None = None
) -> bool:
    """Pause a sweep or resume it, and rank its jobs' tasks again. Returns False if nothing changes.

    Paused jobs give their tasks no rank: a task that only paused jobs need is not claimed, but a running task finishes.
    A `reason` is given if the service pauses the sweep by itself.
    """
    changed = update(sweeps).where(sweeps.c.id == sweep_id, sweeps.c.paused.is_not(paused))
    if connection.execute(changed.values(paused=paused, pause_reason=reason)).rowcount == 0:
        return False
    kind, data = EventKind.SWEEP_PAUSED if paused else EventKind.SWEEP_RESUMED, {"reason": reason} if reason else {}
    history.append(connection, now, actor, [Event(kind, sweep_id=sweep_id, data=data)])
    rerank(connection, now, _open_tasks_of(jobs.c.sweep_id == sweep_id))
    return True


def going_on(connection: Connection, task_ids: Collection[str]) -> list[tuple[str, str]]:
    """`(task id, sweep id)` for each sweep that needs one of these tasks, has live jobs, and is not paused."""
    needing = job_tasks.join(jobs, jobs.c.id == job_tasks.c.job_id).join(sweeps, sweeps.c.id == jobs.c.sweep_id)
    other = jobs.alias("other")
    live = exists().where(other.c.sweep_id == sweeps.c.id, other.c.state.in_(LIVE_JOB))
    which = (job_tasks.c.task_id.in_(listed(task_ids)), ~sweeps.c.paused, live)
    query = select(job_tasks.c.task_id, sweeps.c.id).distinct().select_from(needing).where(*which)
    return [(task_id, sweep_id) for task_id, sweep_id in connection.execute(query)]


def pause_queue(connection: Connection, now: float, actor: str, *, paused: bool) -> bool:
    """Stop all claims, or allow them again. False if nothing changes."""
    row = queue(connection)
    if (row is not None and row.paused) == paused:
        return False
    values = {"paused": paused, "changed_by": actor, "changed_at": now}
    if row is None:
        connection.execute(insert(queues).values(name=QUEUE, **values))
    else:
        connection.execute(update(queues).where(queues.c.name == QUEUE).values(values))
    history.append(connection, now, actor, [Event(EventKind.QUEUE_PAUSED if paused else EventKind.QUEUE_RESUMED)])
    return True


def queue(connection: Connection) -> Queue | None:
    """Whether the queue is paused, by whom and since when; None if it never was."""
    return one(connection, Queue, select(queues).where(queues.c.name == QUEUE))


def _change_jobs(
    connection: Connection,
    now: float,
    actor: str,
    which: ColumnElement[bool],
    *,
    priority: int | None,
    labels: dict[str, str] | None,
) -> None:
    """Change the priority of the live jobs, and the labels of all jobs. Their tasks are ranked again."""
    if labels is not None:
        connection.execute(update(jobs).where(which).values(labels=labels))
    if priority is not None:
        connection.execute(update(jobs).where(which, jobs.c.state.in_(LIVE_JOB)).values(priority=priority))
        rerank(connection, now, _open_tasks_of(which))
    changes = literal(_changes(priority, labels), Json)
    history.append_for_jobs(connection, now, actor, EventKind.JOB_CHANGED, select(jobs.c.id).where(which), changes)


def change_sweep(
    connection: Connection,
    now: float,
    actor: str,
    sweep_id: str,
    *,
    priority: int | None,
    labels: dict[str, str] | None,
) -> None:
    """Change the priority and the labels of a sweep, and those of its jobs like `change_job`."""
    changes = _changes(priority, labels)
    connection.execute(update(sweeps).where(sweeps.c.id == sweep_id).values(changes))
    history.append(connection, now, actor, [Event(EventKind.SWEEP_CHANGED, sweep_id=sweep_id, data=changes)])
    _change_jobs(connection, now, actor, jobs.c.sweep_id == sweep_id, priority=priority, labels=labels)


def change_job(
    connection: Connection,
    now: float,
    actor: str,
    job_id: str,
    *,
    priority: int | None,
    labels: dict[str, str] | None,
) -> None:
    """Change the priority of a job if it is live, and its labels. Its tasks are ranked again."""
    _change_jobs(connection, now, actor, jobs.c.id == job_id, priority=priority, labels=labels)


def boost_job(connection: Connection, now: float, actor: str, job_id: str, *, boosted: bool) -> int:
    """Let a live job go before all other users' work, or in its turn again; returns how many jobs change: 0 or 1."""
    return _boost_jobs(connection, now, actor, jobs.c.id == job_id, boosted=boosted)


def boost_sweep(connection: Connection, now: float, actor: str, sweep_id: str, *, boosted: bool) -> int:
    """Do the same for the live jobs of a sweep; returns how many jobs change."""
    return _boost_jobs(connection, now, actor, jobs.c.sweep_id == sweep_id, boosted=boosted)


def _boost_jobs(connection: Connection, now: float, actor: str, which: ColumnElement[bool], *, boosted: bool) -> int:
    changed = and_(which, jobs.c.state.in_(LIVE_JOB), jobs.c.boosted.is_not(boosted))
    ids = list(connection.scalars(update(jobs).where(changed).values(boosted=boosted).returning(jobs.c.id)))
    if ids:
        rerank(connection, now, _open_tasks_of(jobs.c.id.in_(listed(ids))))
        kind = EventKind.JOB_BOOSTED if boosted else EventKind.JOB_UNBOOSTED
        history.append_for_jobs(connection, now, actor, kind, listed(ids))
    return len(ids)


def _changes(priority: int | None, labels: dict[str, str] | None) -> Values:
    return {name: value for name, value in (("priority", priority), ("labels", labels)) if value is not None}


def _open_tasks_of(which: ColumnElement[bool]) -> ColumnElement[bool]:
    """The tasks that have not ended, of live jobs."""
    needing = job_tasks.join(jobs, jobs.c.id == job_tasks.c.job_id)
    needed = select(job_tasks.c.task_id).select_from(needing).where(which, jobs.c.state.in_(LIVE_JOB))
    return and_(tasks.c.id.in_(needed), tasks.c.state.not_in(ENDED_TASK - {TaskState.HELD}))
