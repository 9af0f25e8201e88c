"""What follows when tasks change state: children are unblocked or cancelled, jobs get their state and their verdict.

Thousands of jobs may share one task, so a change to all of them is one statement or two, however many they are.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from sqlalchemy import ColumnElement, Connection, Select, Subquery, and_, case, distinct, exists, func, select, update

from service.model.events import EventKind
from service.model.jobs import ENDED_TASK, LIVE_JOB, JobState, TaskState, job_state
from service.model.retrying import MISSING_CHECKPOINT, UNWANTED
from service.model.scheduling import AGEING_SECONDS, BOOST_SECONDS, HEAD_START_SECONDS
from service.store import filing, history, quotas, timings
from service.store.judging import verdicts, write_verdicts
from service.store.listed import json_object, listed
from service.store.states import move_jobs, move_tasks
from service.store.tables import attempts, job_tasks, jobs, sweeps, task_edges, tasks
from service.store.values import Values

UNPAUSED = func.coalesce(sweeps.c.paused, False).is_(False)  # of jobs joined with their sweeps
# One bit for each task state, and for each set of these bits the state of a job whose tasks are in these states.
BITS = {str(state): 1 << position for position, state in enumerate(TaskState)}
STATE_BY_BITS = {
    bits: str(job_state([state for state in TaskState if BITS[state] & bits])) for bits in range(1, 1 << len(TaskState))
}


def start_jobs(connection: Connection, now: float, actor: str, running: Collection[str]) -> None:
    """Move the queued jobs that need one of these running tasks to `running`."""
    needing = select(job_tasks.c.job_id).where(job_tasks.c.task_id.in_(listed(running)))
    waiting = and_(jobs.c.id.in_(needing), jobs.c.state == JobState.QUEUED)
    history.append_for_jobs(connection, now, actor, EventKind.JOB_RUNNING, select(jobs.c.id).where(waiting))
    connection.execute(move_jobs({JobState.QUEUED}, JobState.RUNNING).where(jobs.c.id.in_(needing)))


def settle(connection: Connection, now: float, actor: str, changed: Collection[str]) -> None:
    """Apply the new states of the tasks `changed` to their children and to the jobs that need them."""
    if not changed:
        return
    quotas.charge_ended(connection, now, changed)
    state = dict(connection.execute(select(tasks.c.id, tasks.c.state).where(tasks.c.id.in_(listed(changed)))).all())
    succeeded = [task_id for task_id in changed if state[task_id] == TaskState.SUCCEEDED]
    others = [task_id for task_id in changed if state[task_id] != TaskState.SUCCEEDED]
    if succeeded:
        timings.keep(connection, now, succeeded)
        _unblock(connection, now, actor, succeeded)
        _finish_jobs(connection, now, actor, succeeded)
    if others:
        touched = listed([*others, *_cancel_upstream(connection, now, actor, others)])
        settle_jobs(connection, now, actor, select(job_tasks.c.job_id).where(job_tasks.c.task_id.in_(touched)))


def _unblock(connection: Connection, now: float, actor: str, changed: Collection[str]) -> None:
    """Queue the blocked children whose parents have all succeeded."""
    children = select(task_edges.c.child_id).where(task_edges.c.parent_id.in_(listed(changed)))
    parent = tasks.alias("parent")
    waits = exists().where(
        task_edges.c.child_id == tasks.c.id,
        task_edges.c.parent_id == parent.c.id,
        parent.c.state != TaskState.SUCCEEDED,
    )
    free = and_(tasks.c.id.in_(children), ~waits)
    blocked = select(tasks.c.id).where(free, tasks.c.state == TaskState.BLOCKED)
    history.append_for_tasks(connection, now, actor, EventKind.TASK_QUEUED, blocked)
    connection.execute(move_tasks({TaskState.BLOCKED}, TaskState.QUEUED).where(free))


def _cancel_upstream(connection: Connection, now: float, actor: str, changed: Collection[str]) -> list[str]:
    """Cancel the blocked children of tasks that ended without success."""
    ended = tasks.c.state.in_((TaskState.FAILED, TaskState.CANCELLED))
    failed = connection.execute(select(tasks.c.id, tasks.c.reason).where(tasks.c.id.in_(listed(changed)), ended)).all()
    cancelled: list[str] = []
    for parent_id, reason in failed:
        children = select(task_edges.c.child_id).where(task_edges.c.parent_id == parent_id)
        statement = move_tasks({TaskState.BLOCKED}, TaskState.CANCELLED).where(tasks.c.id.in_(children))
        values = {"reason": f"upstream: {reason}", "finished_at": now}
        cancelled += connection.scalars(statement.values(values).returning(tasks.c.id))
    if cancelled:
        why = json_object(reason=tasks.c.reason)
        history.append_for_tasks(connection, now, actor, EventKind.TASK_CANCELLED, listed(cancelled), why)
    return cancelled


def _finish_jobs(connection: Connection, now: float, actor: str, succeeded: Collection[str]) -> None:
    """Move the live jobs whose last missing tasks are among these to `succeeded`."""
    needing = select(job_tasks.c.job_id).where(job_tasks.c.task_id.in_(listed(succeeded)))
    needs = job_tasks.alias("needs")
    missing = exists().where(
        needs.c.job_id == jobs.c.id,
        needs.c.task_id == tasks.c.id,
        tasks.c.state != TaskState.SUCCEEDED,
        ~_does_without(),
    )
    done = select(jobs.c.id).where(jobs.c.id.in_(needing), jobs.c.state.in_(LIVE_JOB), ~missing)
    _move_jobs(connection, now, actor, connection.scalars(done).all(), JobState.SUCCEEDED)


def settle_jobs(connection: Connection, now: float, actor: str, which: Select[str]) -> None:
    """Derive the state of each live job of `which` (a query of ids) from the states of its tasks."""
    counted = case((_does_without(), str(TaskState.SUCCEEDED)), else_=tasks.c.state)
    seen = func.sum(distinct(case(BITS, value=counted)))
    state = case(STATE_BY_BITS, value=seen)
    needs = jobs.join(job_tasks, job_tasks.c.job_id == jobs.c.id).join(tasks, tasks.c.id == job_tasks.c.task_id)
    live = and_(jobs.c.id.in_(which), jobs.c.state.in_(LIVE_JOB))
    moved: dict[str, list[str]] = defaultdict(list)
    derived = select(jobs.c.id, state).select_from(needs).where(live).group_by(jobs.c.id, jobs.c.state)
    for job_id, new in connection.execute(derived.having(state != jobs.c.state)):
        moved[new].append(job_id)
    for new, ids in moved.items():
        _move_jobs(connection, now, actor, ids, JobState(new))


def _does_without() -> ColumnElement[bool]:
    """Whether a job gets a result without this task, because it is a further measure that failed by itself.

    A measure that did not find its checkpoint does not count: it runs again with its training if the job is retried.
    """
    measure = and_(tasks.c.kind == "measure", tasks.c.id != jobs.c.measure_task_id, tasks.c.state == TaskState.FAILED)
    last = (attempts.c.task_id == tasks.c.id) & (attempts.c.number == tasks.c.attempt)
    lost = exists().where(last, attempts.c.end == MISSING_CHECKPOINT).correlate(tasks)
    return and_(measure, ~lost)


def _move_jobs(connection: Connection, now: float, actor: str, job_ids: Sequence[str], state: JobState) -> None:
    if not job_ids:
        return
    if state is JobState.SUCCEEDED:
        write_verdicts(connection, verdicts(connection, job_ids))
    values: Values = {"reason": None, "finished_at": None if state in LIVE_JOB else now}
    stopped = state in (JobState.FAILED, JobState.HELD)
    if stopped:
        values["reason"] = _reason_of_tasks()
    connection.execute(move_jobs(LIVE_JOB - {state}, state).where(jobs.c.id.in_(listed(job_ids))).values(values))
    if state is JobState.SUCCEEDED:
        filing.file(connection, job_ids)
    data = json_object(reason=jobs.c.reason) if stopped else None
    history.append_for_jobs(connection, now, actor, EventKind.of_job(state), listed(job_ids), data)
    if state is JobState.FAILED:
        release(connection, now, actor, job_ids)


def _reason_of_tasks() -> ColumnElement[str | None]:
    """The reason of the task of a job that failed or is held, rather than of tasks that were cancelled with it."""
    rank = case({str(TaskState.FAILED): 0, str(TaskState.HELD): 1}, value=tasks.c.state, else_=2)
    needed = tasks.join(job_tasks, job_tasks.c.task_id == tasks.c.id)
    query = select(tasks.c.reason).select_from(needed)
    stopped = tasks.c.state.in_((TaskState.FAILED, TaskState.HELD, TaskState.CANCELLED))
    here = query.where(job_tasks.c.job_id == jobs.c.id, stopped, tasks.c.reason.is_not(None))
    return here.order_by(rank, tasks.c.id).limit(1).correlate(jobs).scalar_subquery()


def release(connection: Connection, now: float, actor: str, job_ids: Sequence[str]) -> None:
    """Cancel the tasks of these ended jobs that no live job needs, and rank the others again."""
    if job_ids:
        needed = select(job_tasks.c.task_id).where(job_tasks.c.job_id.in_(listed(job_ids)))
        release_tasks(connection, now, actor, needed)


def release_tasks(connection: Connection, now: float, actor: str, which: Select[str]) -> None:
    """Cancel the tasks among these that no live job needs, and rank the others again; `which` is a query of ids."""
    unneeded = and_(tasks.c.id.in_(which), ~of_live_jobs(select(1)).exists())
    running = tasks.c.state == TaskState.RUNNING
    connection.execute(update(tasks).where(unneeded, running).values(cancel_requested=True))
    waiting = move_tasks({TaskState.BLOCKED, TaskState.QUEUED, TaskState.HELD}, TaskState.CANCELLED).where(unneeded)
    values = {"reason": UNWANTED, "finished_at": now}
    ended = connection.scalars(waiting.values(values).returning(tasks.c.id)).all()
    if ended:
        why = json_object(reason=tasks.c.reason)
        history.append_for_tasks(connection, now, actor, EventKind.TASK_CANCELLED, listed(ended), why)
    rerank(connection, now, and_(tasks.c.id.in_(which), tasks.c.state.not_in(ENDED_TASK - {TaskState.HELD})))


def rerank(
    connection: Connection, now: float, which: ColumnElement[bool], turns: Mapping[str, int] | None = None
) -> None:
    """Give each of these tasks the rank of the highest-ranked live job that needs it and is not paused.

    The owner of that job is the sponsor of the task. `turns` has users' positions in line, the lowest first: with it
    the task has the rank of the highest-ranked job of the user whose turn is first. A task that only paused jobs need
    is paused and keeps its rank; a task that is resumed waits from now on.
    """
    by_rank = _ranked_jobs(select(tasks.c.id).where(which), turns or {})
    since = case((tasks.c.paused, now), else_=tasks.c.waiting_since)
    head_start = case((tasks.c.kind == "train", HEAD_START_SECONDS), else_=0.0)
    boost = case((by_rank.c.boosted, BOOST_SECONDS), else_=0.0)
    of_best_job = ("priority", "sponsor", "sequence", "boosted", "needed_by", "shared")
    rank = {
        **{name: by_rank.c[name] for name in of_best_job},
        "waiting_since": since,
        "paused": False,
        "due": since - by_rank.c.priority * AGEING_SECONDS - head_start - boost,
    }
    unranked = and_(which, tasks.c.state.not_in(ENDED_TASK - {TaskState.HELD}), ~tasks.c.paused)
    wanted = of_live_jobs(select(1), unpaused=True).exists()
    connection.execute(update(tasks).where(unranked, ~wanted, of_live_jobs(select(1)).exists()).values(paused=True))
    best = and_(tasks.c.id == by_rank.c.task_id, by_rank.c.place == 1)
    connection.execute(update(tasks).where(best).values(rank))


def _ranked_jobs(task_ids: Select[str], turns: Mapping[str, int]) -> Subquery:
    """Of each of these tasks, the live jobs that need it and are not paused, with their `place`: the best has 1."""
    turn = [case(turns, value=jobs.c.user, else_=0)] if turns else []
    best_first = (jobs.c.boosted.desc(), *turn, jobs.c.priority.desc(), jobs.c.sequence)
    first, last = (pick(jobs.c.user).over(partition_by=job_tasks.c.task_id) for pick in (func.min, func.max))
    needing = job_tasks.join(jobs, jobs.c.id == job_tasks.c.job_id).outerjoin(sweeps, sweeps.c.id == jobs.c.sweep_id)
    ranked = select(
        job_tasks.c.task_id,
        jobs.c.priority,
        jobs.c.boosted,
        jobs.c.user.label("sponsor"),
        jobs.c.sequence,
        func.row_number().over(order_by=best_first, partition_by=job_tasks.c.task_id).label("place"),
        func.count().over(partition_by=job_tasks.c.task_id).label("needed_by"),
        (first != last).label("shared"),
    )
    live = (job_tasks.c.task_id.in_(task_ids), jobs.c.state.in_(LIVE_JOB), UNPAUSED)
    return ranked.select_from(needing).where(*live).subquery("by_rank")


def of_live_jobs(query: Select[int], *, unpaused: bool = False) -> Select[int]:
    """The query of the live jobs that need the task of the enclosing statement."""
    needing = jobs.join(job_tasks, job_tasks.c.job_id == jobs.c.id).outerjoin(sweeps, sweeps.c.id == jobs.c.sweep_id)
    here = query.select_from(needing).where(job_tasks.c.task_id == tasks.c.id, jobs.c.state.in_(LIVE_JOB))
    return (here.where(UNPAUSED) if unpaused else here).correlate(tasks)
