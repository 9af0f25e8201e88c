"""The rows of jobs: inserted, given other tasks, cancelled, run again. `joining` has the tasks that they share."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, and_, bindparam, delete, func, insert, or_, select, union_all, update

from service.model.events import EventKind
from service.model.jobs import LIVE_JOB, RETRIABLE, JobState, TaskState, first_state, reopened_by_retry
from service.model.records import Job
from service.specs import digest
from service.specs.plan import JobPlan
from service.store import counters, history
from service.store.joining import (
    ExistingTasks,
    Joined,
    PlannedJob,
    Rank,
    append_new,
    existing_tasks,
    join_tasks,
    let_wait,
    lost_trainings,
    need_more,
    new_id,
    reopen,
    run_again,
)
from service.store.listed import insert_rows, json_object, listed
from service.store.settling import release, release_tasks, rerank, settle, settle_jobs
from service.store.states import move_jobs
from service.store.tables import job_tasks, jobs, tasks
from service.store.values import Values

BASELINE = jobs.c.baseline_task_id  # at s = 1 the attack itself


@dataclass(frozen=True)
class Origin:
    """What jobs that are accepted together have in common; `paused` is whether their sweep is paused."""

    user: str
    priority: int
    labels: dict[str, str]
    sweep_id: str | None = None
    paused: bool = False


def insert_jobs(
    connection: Connection, now: float, plans: Sequence[JobPlan], existing: ExistingTasks, origin: Origin
) -> list[str]:
    """Insert jobs with the tasks they need. Live and succeeded tasks are joined, failed and cancelled ones reopened,
    with the trainings whose checkpoints were missing (see `retry_jobs`).

    `existing` has those of their tasks that exist. Returns the ids of the jobs.
    """
    user = origin.user
    sequence = counters.take(connection, "jobs", len(plans))
    rank = Rank(user, origin.priority, now, paused=origin.paused)
    planned = [PlannedJob(plan, sequence + offset, rank) for offset, plan in enumerate(plans)]
    joined = join_tasks(connection, now, planned, existing)
    alike = {name: getattr(origin, name) for name in ("user", "sweep_id", "priority", "labels")}
    rows = [_job_row(job, joined.ids, now) | alike for job in planned]
    insert_rows(connection, jobs, rows)
    job_ids = [row["id"] for row in rows]
    inserted = jobs.c.sequence.between(sequence, planned[-1].sequence)
    _insert_needs(connection, inserted, list(zip(job_ids, plans, strict=True)), joined.ids)
    history.append_for_jobs(connection, now, user, EventKind.JOB_SUBMITTED, listed(job_ids))
    append_new(connection, now, user, joined)

    moved = run_again(connection, now, user, joined)
    _rank_existing(connection, now, joined, existing, planned)
    settle(connection, now, user, moved)
    # A job is settled at once if a task of it is beyond waiting: a job whose numbers all exist has succeeded already.
    waiting = (TaskState.BLOCKED, TaskState.QUEUED)
    begun = {digest for digest, state in joined.states.items() if state not in waiting}
    if ahead := [job_id for job_id, plan in zip(job_ids, plans, strict=True) if not begun.isdisjoint(plan.tasks)]:
        settle_jobs(connection, now, user, listed(ahead))
    return job_ids


def _rank_existing(
    connection: Connection, now: float, joined: Joined, existing: ExistingTasks, planned: Sequence[PlannedJob]
) -> None:
    """Rank the existing tasks that new jobs, all of one rank, need: the jobs' owner may become their sponsor."""
    rank = planned[0].rank
    needed = tasks.c.id.in_(listed(joined.ids_of(existing)))
    if not rank.paused:
        trainings = {job.plan.train.digest for job in planned} & existing.keys()
        need_more(connection, {joined.ids[digest]: joined.needed_by[digest] for digest in trainings})
        of_others = and_(needed, tasks.c.finished_at.is_(None), tasks.c.sponsor != rank.user, ~tasks.c.shared)
        connection.execute(update(tasks).where(of_others).values(shared=True))
    reopened = tasks.c.id.in_(listed(joined.ids_of(joined.reopened)))
    may_rise = or_(tasks.c.priority < rank.priority, tasks.c.paused, tasks.c.cancel_requested, reopened)
    rerank(connection, now, and_(needed, may_rise))
    connection.execute(update(tasks).where(needed, tasks.c.cancel_requested).values(cancel_requested=False))


def replan_jobs(connection: Connection, now: float, actor: str, plans: Sequence[tuple[Job, JobPlan]]) -> None:
    """Give jobs the tasks of new plans; a task that they needed before ends if no live job needs it.

    The jobs are live, or a retry in the same transaction makes them so.
    """
    job_ids = [job.id for job, _ in plans]
    planned = [PlannedJob(plan, job.sequence, Rank(job.user, job.priority, job.created_at)) for job, plan in plans]
    existing = existing_tasks(connection, {digest for _, plan in plans for digest in plan.tasks})
    joined = join_tasks(connection, now, planned, existing)
    needs = job_tasks.c.job_id.in_(listed(job_ids))
    before = set(connection.scalars(select(job_tasks.c.task_id).where(needs)))
    connection.execute(delete(job_tasks).where(needs))
    roles = [{"job": job.id, **_roles(plan, joined.ids)} for job, plan in plans]
    moved: Values = {name: bindparam(name) for name in roles[0] if name != "job"}
    connection.execute(update(jobs).where(jobs.c.id == bindparam("job")).values(moved), roles)
    _insert_needs(connection, jobs.c.id.in_(listed(job_ids)), [(job.id, plan) for job, plan in plans], joined.ids)
    history.append_for_jobs(connection, now, actor, EventKind.JOB_REPLANNED, listed(job_ids))
    append_new(connection, now, actor, joined)

    waiting = run_again(connection, now, actor, joined)
    needed = tasks.c.id.in_(listed(joined.ids.values()))
    connection.execute(update(tasks).where(needed, tasks.c.cancel_requested).values(cancel_requested=False))
    release_tasks(connection, now, actor, listed(before - set(joined.ids.values())))
    rerank(connection, now, needed)
    settle(connection, now, actor, waiting)
    settle_jobs(connection, now, actor, listed(job_ids))


def cancel_jobs(connection: Connection, now: float, actor: str, job_ids: Sequence[str], reason: str) -> list[str]:
    """Detach live jobs from their tasks; a task that no other live job needs ends. Returns the jobs that were live."""
    live = move_jobs(LIVE_JOB, JobState.CANCELLED).where(jobs.c.id.in_(listed(job_ids)))
    values = {"reason": reason, "finished_at": now}
    cancelled = list(connection.scalars(live.values(values).returning(jobs.c.id)))
    why = json_object(reason=jobs.c.reason)
    history.append_for_jobs(connection, now, actor, EventKind.JOB_CANCELLED, listed(cancelled), why)
    release(connection, now, actor, cancelled)
    return cancelled


def states_of(connection: Connection, job_ids: Sequence[str]) -> Counter[str]:
    """How many of these jobs are in each state."""
    return Counter(connection.scalars(select(jobs.c.state).where(jobs.c.id.in_(listed(job_ids)))))


def count_retries(
    connection: Connection, job_ids: Sequence[str], states: Collection[JobState] = RETRIABLE
) -> dict[str, int]:
    """How many unfinished jobs each user would have more after `retry_jobs`: a held job is unfinished already."""
    ended = (jobs.c.id.in_(listed(job_ids)), jobs.c.state.in_(states), jobs.c.finished_at.is_not(None))
    query = select(jobs.c.user, func.count()).where(*ended).group_by(jobs.c.user)
    return {user: count for user, count in connection.execute(query)}


def retry_jobs(
    connection: Connection, now: float, actor: str, job_ids: Sequence[str], states: Collection[JobState] = RETRIABLE
) -> list[str]:
    """Reopen those of these jobs that are in one of `states`, and their tasks that did not succeed. Returns the jobs.

    A held task stays held, for a person to look at it, unless `states` has `held`.
    A training whose checkpoint these tasks did not find, or found damaged, runs again too, and the tasks that are to
    use the checkpoint wait. If the training gives the same weights, the tasks that had succeeded on them stay as they
    are; if not, see `trained_again`.
    """
    statement = move_jobs(states, JobState.QUEUED).where(jobs.c.id.in_(listed(job_ids)))
    values = {"reason": None, "finished_at": None}
    retried = list(connection.scalars(statement.values(values).returning(jobs.c.id)))
    if not retried:
        return []
    history.append_for_jobs(connection, now, actor, EventKind.JOB_RETRIED, listed(retried))
    needs = tasks.c.id.in_(select(job_tasks.c.task_id).where(job_tasks.c.job_id.in_(listed(retried))))
    connection.execute(update(tasks).where(needs, tasks.c.cancel_requested).values(cancel_requested=False))
    again, lost = _choose_reopened(connection, needs, reopened_by_retry(states))
    reopen(connection, now, actor, again)
    moved = let_wait(connection, now, actor, lost)
    rerank(connection, now, needs)
    settle(connection, now, actor, [*again, *moved])  # other jobs may have been held by the same tasks
    settle_jobs(connection, now, actor, listed(retried))
    return retried


def _choose_reopened(
    connection: Connection, which: ColumnElement[bool], ended: Collection[TaskState]
) -> tuple[dict[str, TaskState], list[str]]:
    """The tasks among these that run again, by id with the state that each begins in, and the lost trainings.

    The tasks in a state of `ended` run again, and so do the lost trainings: those whose checkpoints are gone.
    """
    columns = (tasks.c.id, tasks.c.digest, tasks.c.train_digest, tasks.c.state, tasks.c.spec)
    needed = connection.execute(select(*columns).where(which)).all()
    state_of = {row.digest: TaskState(row.state) for row in needed}
    lost = lost_trainings(connection, which)
    again: dict[str, TaskState] = {}
    for row in sorted(needed, key=lambda row: row.digest != row.train_digest):  # trainings first: others wait for them
        if row.state in ended or row.digest in lost:
            made_on = (row.train_digest, row.spec.get("source") or row.train_digest)
            parents = () if row.digest == row.train_digest else made_on
            again[row.id] = state_of[row.digest] = first_state(state_of[parent] for parent in parents)
    return again, [row.id for row in needed if row.digest in lost]


def _insert_needs(
    connection: Connection, which: ColumnElement[bool], plans: Sequence[tuple[str, JobPlan]], ids: Mapping[str, str]
) -> None:
    """Store which tasks each job needs: those that its row names, its further measures, and a transfer's other network.

    `which` chooses the rows of the jobs, `plans` has the jobs' ids, and `ids` has the tasks' ids by digest.
    """
    parts = [column for column in jobs.columns if column.name.endswith("_task_id")]
    in_rows = [select(jobs.c.id, part).where(which, part.is_not(None)) for part in parts if part.name != BASELINE.name]
    at_scale = select(jobs.c.id, BASELINE).where(which, jobs.c.attack_task_id != BASELINE)
    connection.execute(insert(job_tasks).from_select(["job_id", "task_id"], union_all(*in_rows, at_scale)))
    further = [
        {"job_id": job_id, "task_id": ids[task_digest]}
        for job_id, plan in plans
        for task_digest in {task.digest for task in (*plan.measures, plan.source) if task} - {plan.train.digest}
    ]
    insert_rows(connection, job_tasks, further)


def _job_row(planned: PlannedJob, ids: Mapping[str, str], now: float) -> Values:
    job = planned.plan.job
    identity = {"id": new_id(), "sequence": planned.sequence, "spec": job.model_dump_json(), "spec_digest": digest(job)}
    attack = {name: getattr(job.attack, name, None) for name in ("norm", "eps")}
    cell = {name: getattr(job, name) for name in ("architecture", "dataset", "scale", "seed", "samples")}
    names = {"attack": job.attack.type, "recipe": job.recipe.name}
    return identity | attack | cell | names | _roles(planned.plan, ids) | {"state": JobState.QUEUED, "created_at": now}


def _roles(plan: JobPlan, ids: Mapping[str, str]) -> dict[str, str | None]:
    """The tasks that a job's row names, by its columns."""
    return {
        "train_task_id": ids[plan.train.digest],
        "measure_task_id": ids[plan.closed_forms.digest],
        "attack_task_id": ids[plan.attack.digest],
        "baseline_task_id": ids[plan.baseline.digest],
        "control_task_id": ids[plan.control.digest] if plan.control else None,
    }
