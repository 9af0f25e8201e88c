"""Questions about jobs, sweeps, tasks, data sets and the queue. They change nothing."""

from collections.abc import Collection, Sequence
from dataclasses import fields

from sqlalchemy import Connection, Float, cast, exists, func, or_, select

from service.model.jobs import LIVE_JOB, JobState, TaskState
from service.model.query import Node
from service.model.records import Attempt, Job, RunningTask, Sweep, Task, TaskCount
from service.model.results import Result
from service.store.conditions import condition
from service.store.job_fields import JOBS
from service.store.keyset import Order, Page, Position
from service.store.listed import listed
from service.store.settling import UNPAUSED
from service.store.states import DIGEST
from service.store.tables import attempts, job_tasks, jobs, sweeps, tasks
from service.store.task_kinds import TASK_KINDS
from service.store.values import every, one

JOB_COLUMNS = len(fields(Job))


def jobs_page(
    connection: Connection, nodes: Sequence[Node], order: Order, after: Position | None, limit: int
) -> Page[Job]:
    """Up to `limit` jobs behind `after`."""
    query = select(jobs).where(condition(connection, nodes, JOBS))
    page = order.page(connection, query, after, limit)
    return Page([Job(*row[:JOB_COLUMNS]) for row in page.rows], page.end)


def job(connection: Connection, job_id: str) -> Job | None:
    return one(connection, Job, select(jobs).where(jobs.c.id == job_id))


def live_jobs_needing(connection: Connection, task_ids: Collection[str]) -> list[Job]:
    """The live jobs that need one of these tasks, in the order of submission."""
    needing = select(job_tasks.c.job_id).where(job_tasks.c.task_id.in_(listed(task_ids)))
    live = jobs.c.id.in_(needing) & jobs.c.state.in_(LIVE_JOB)
    return every(connection, Job, select(jobs).where(live).order_by(jobs.c.sequence))


def jobs_in(connection: Connection, job_ids: Collection[str], states: Collection[str]) -> list[Job]:
    """Those of these jobs that are in one of these states, in the order of submission."""
    query = select(jobs).where(jobs.c.id.in_(listed(job_ids)), jobs.c.state.in_(states))
    return every(connection, Job, query.order_by(jobs.c.sequence))


def job_state(connection: Connection, job_id: str) -> str | None:
    return connection.execute(select(jobs.c.state).where(jobs.c.id == job_id)).scalar_one_or_none()


def job_ids_of_sweep(connection: Connection, sweep_id: str) -> list[str]:
    """In the order of submission."""
    return list(connection.scalars(select(jobs.c.id).where(jobs.c.sweep_id == sweep_id).order_by(jobs.c.sequence)))


def spec_digests_of_sweep(connection: Connection, sweep_id: str) -> set[str]:
    return set(connection.scalars(select(jobs.c.spec_digest).where(jobs.c.sweep_id == sweep_id)))


def has_live_jobs(connection: Connection, sweep_id: str) -> bool:
    live = (jobs.c.sweep_id == sweep_id) & jobs.c.state.in_(LIVE_JOB)
    return connection.execute(select(jobs.c.id).where(live).limit(1)).one_or_none() is not None


def tasks_of_job(connection: Connection, job_id: str) -> list[Task]:
    query = select(tasks).join(job_tasks, job_tasks.c.task_id == tasks.c.id).where(job_tasks.c.job_id == job_id)
    return every(connection, Task, query.order_by(tasks.c.sequence, tasks.c.id))


def roles(job: Job | Result, task: Task) -> list[str]:
    """The parts that this task plays in the job. At scale 1 the attack plays two: it is its own baseline."""
    kind = TASK_KINDS[task.kind]
    parts = [role for role, column in kind.roles.items() if getattr(job, column.name) == task.id]
    return parts or ([kind.unnamed] if kind.unnamed else [])


def progress_of_jobs(connection: Connection, job_ids: Sequence[str]) -> dict[str, float]:
    """How far each job is, as the mean over its tasks: `job id -> fraction`."""
    query = (
        select(job_tasks.c.job_id, func.avg(tasks.c.progress))
        .join(tasks, tasks.c.id == job_tasks.c.task_id)
        .where(job_tasks.c.job_id.in_(listed(job_ids)))
        .group_by(job_tasks.c.job_id)
    )
    return {job_id: float(fraction) for job_id, fraction in connection.execute(query)}


def sweeps_page(connection: Connection, user: str | None, after: str | None, limit: int) -> list[Sweep]:
    """The newest first; `after` is the last id of the page before. UUIDv7 ids are in the order of creation."""
    query = select(sweeps).order_by(sweeps.c.id.desc()).limit(limit)
    if user is not None:
        query = query.where(sweeps.c.user == user)
    if after is not None:
        query = query.where(sweeps.c.id < after)
    return every(connection, Sweep, query)


def sweep(connection: Connection, sweep_id: str) -> Sweep | None:
    return one(connection, Sweep, select(sweeps).where(sweeps.c.id == sweep_id))


def job_counts(connection: Connection, sweep_ids: Sequence[str]) -> dict[str, dict[str, int]]:
    """`sweep id -> state -> jobs`, with all states."""
    counts = {sweep_id: {str(state): 0 for state in JobState} for sweep_id in sweep_ids}
    query = select(jobs.c.sweep_id, jobs.c.state, func.count()).where(jobs.c.sweep_id.in_(sweep_ids))
    for sweep_id, state, count in connection.execute(query.group_by(jobs.c.sweep_id, jobs.c.state)):
        counts[sweep_id][state] = count
    return counts


def task_counts(connection: Connection, sweep_ids: Sequence[str]) -> list[TaskCount]:
    """The distinct tasks of each sweep by kind and state."""
    needed = (
        select(jobs.c.sweep_id, tasks.c.id, tasks.c.kind, tasks.c.state, tasks.c.progress)
        .join(job_tasks, job_tasks.c.job_id == jobs.c.id)
        .join(tasks, tasks.c.id == job_tasks.c.task_id)
        .where(jobs.c.sweep_id.in_(sweep_ids))
        .distinct()
        .subquery()
    )
    key = (needed.c.sweep_id, needed.c.kind, needed.c.state)
    totals = (func.count().label("n"), func.sum(needed.c.progress).label("progress"))
    return every(connection, TaskCount, select(*key, *totals).group_by(*key))


def seconds_by_kind(connection: Connection, sweep_ids: Sequence[str]) -> dict[str, dict[str, float]]:
    """The mean seconds of a succeeded task of each kind in each sweep, by the workers' own clocks."""
    took = cast(attempts.c.provenance["wall_seconds"].as_float(), Float)
    query = (
        select(jobs.c.sweep_id, tasks.c.kind, func.avg(took))
        .join(job_tasks, job_tasks.c.job_id == jobs.c.id)
        .join(tasks, tasks.c.id == job_tasks.c.task_id)
        .join(attempts, (attempts.c.task_id == tasks.c.id) & (attempts.c.number == tasks.c.attempt))
        .where(jobs.c.sweep_id.in_(sweep_ids), tasks.c.state == TaskState.SUCCEEDED)
        .group_by(jobs.c.sweep_id, tasks.c.kind)
    )
    means: dict[str, dict[str, float]] = {sweep_id: {} for sweep_id in sweep_ids}
    for sweep_id, kind, seconds in connection.execute(query):
        if seconds is not None:
            means[sweep_id][kind] = float(seconds)
    return means


def task(connection: Connection, id_or_digest: str) -> Task | None:
    """By a digest: the task that new jobs join, else the newest of those that had the digest before."""
    if len(id_or_digest) != 64:
        return one(connection, Task, select(tasks).where(tasks.c.id == id_or_digest))
    has_digest = or_(tasks.c.digest == id_or_digest, tasks.c.former_digest == id_or_digest)
    newest = (tasks.c.former_digest.is_not(None), tasks.c.generation.desc())
    return one(connection, Task, select(tasks).where(has_digest).order_by(*newest).limit(1))


def attempts_of(connection: Connection, task_id: str) -> list[Attempt]:
    """In the order of their numbers."""
    query = select(attempts).where(attempts.c.task_id == task_id)
    return every(connection, Attempt, query.order_by(attempts.c.number))


def jobs_of_task(connection: Connection, task_id: str, limit: int) -> list[str]:
    query = select(jobs.c.id).join(job_tasks, job_tasks.c.job_id == jobs.c.id).where(job_tasks.c.task_id == task_id)
    return list(connection.scalars(query.order_by(jobs.c.sequence).limit(limit)))


def running_tasks(
    connection: Connection, *, sweep_id: str | None = None, job_id: str | None = None
) -> list[RunningTask]:
    """The running tasks with their progress: all of them, or those of one sweep or job."""
    query = select(
        tasks.c.id,
        DIGEST.label("digest"),
        tasks.c.kind,
        tasks.c.attempt,
        tasks.c.worker,
        tasks.c.progress,
        tasks.c.detail,
    ).where(tasks.c.state == TaskState.RUNNING)
    needed = (job_tasks.c.task_id == tasks.c.id) & (job_tasks.c.job_id == jobs.c.id)
    if sweep_id is not None:
        query = query.where(exists().where(needed, jobs.c.sweep_id == sweep_id))
    if job_id is not None:
        query = query.where(exists().where(needed, jobs.c.id == job_id))
    return every(connection, RunningTask, query.order_by(tasks.c.sequence))


def waiting_since(connection: Connection, before: float) -> tuple[int, float | None]:
    """How many tasks may run and have waited since before `before`, and since when the first of them has waited."""
    waits = (tasks.c.state == TaskState.QUEUED) & ~tasks.c.paused & (tasks.c.not_before <= before)
    query = select(func.count(), func.min(tasks.c.waiting_since)).where(waits, tasks.c.waiting_since < before)
    count, first = connection.execute(query).one()
    return count, first


def held_tasks(connection: Connection) -> int:
    return int(connection.execute(select(func.count()).where(tasks.c.state == TaskState.HELD)).scalar_one())


def queue_counts(connection: Connection) -> tuple[dict[str, int], dict[str, dict[str, int]]]:
    """Jobs by state, and tasks by kind and state."""
    in_state = select(jobs.c.state, func.count()).group_by(jobs.c.state)
    of_kind = select(tasks.c.kind, tasks.c.state, func.count()).group_by(tasks.c.kind, tasks.c.state)
    by_kind: dict[str, dict[str, int]] = {}
    for kind, state, count in connection.execute(of_kind):
        by_kind.setdefault(kind, {})[state] = count
    return {state: count for state, count in connection.execute(in_state)}, by_kind


def live_jobs(connection: Connection) -> list[Job]:
    """All jobs that have not ended, without those of paused sweeps, in the order of submission."""
    query = select(jobs).outerjoin(sweeps, sweeps.c.id == jobs.c.sweep_id).where(jobs.c.state.in_(LIVE_JOB), UNPAUSED)
    return [Job(*row[:JOB_COLUMNS]) for row in connection.execute(query.order_by(jobs.c.sequence))]
