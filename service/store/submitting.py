"""Writing accepted jobs: they join the tasks that exist, and bring the ones that do not."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    or_,
    select,
    union_all,
    update,
)  # fmt: skip
from uuid_utils import uuid7

from service.model.events import EventKind
from service.model.jobs import ENDED_TASK, LIVE_JOB, RETRIABLE, JobState, TaskState
from service.model.json import JsonObject
from service.model.records import Job
from service.model.retrying import MISSING_CHECKPOINT, UNWANTED
from service.model.scheduling import AGEING_SECONDS, due
from service.specs import JobSpec, digest
from service.specs.plan import JobPlan, PlannedTask
from service.store import counters, history
from service.store.history import Event
from service.store.listed import insert_rows, json_object, listed
from service.store.settling import (
    of_live_jobs,
    release,
    release_tasks,
    rerank,
    settle,
    settle_jobs,
)
from service.store.states import move_jobs, move_tasks
from service.store.tables import attempts, job_tasks, jobs, sweeps, task_edges, tasks, trainings
from service.store.values import Values

BASELINE = jobs.c.baseline_task_id  # at s = 1 the attack itself
REOPENED = (TaskState.FAILED, TaskState.CANCELLED)  # by a new job that needs them


def new_id() -> str:
    return str(uuid7())


def insert_sweep(
    connection: Connection,
    now: float,
    *,
    name: str,
    user: str,
    spec: JsonObject,
    priority: int,
    labels: dict[str, str],
) -> str:
    sweep_id = new_id()
    row = {"id": sweep_id, "name": name, "user": user, "spec": spec, "priority": priority, "labels": labels}
    connection.execute(insert(sweeps).values(**row, paused=False, created_at=now))
    history.append(connection, now, user, [Event(EventKind.SWEEP_SUBMITTED, sweep_id=sweep_id, data={"name": name})])
    return sweep_id


def extend_sweep(connection: Connection, sweep_id: str, spec: JsonObject) -> None:
    """From now on this is the sweep's spec."""
    connection.execute(update(sweeps).where(sweeps.c.id == sweep_id).values(spec=spec))


def known_tasks(connection: Connection, digests: Iterable[str]) -> dict[str, tuple[str, TaskState]]:
    """Which of these digests are tasks already: `digest -> (id, state)`."""
    query = select(tasks.c.digest, tasks.c.id, tasks.c.state).where(tasks.c.digest.in_(listed(digests)))
    return {digest: (task_id, TaskState(state)) for digest, task_id, state in connection.execute(query)}


def retracted_digests(connection: Connection, digests: Iterable[str]) -> list[str]:
    """Those of these digests of which a task was retracted."""
    former = tasks.c.former_digest
    return list(connection.scalars(select(former).where(former.in_(listed(digests))).distinct()))


def insert_jobs(
    connection: Connection,
    now: float,
    plans: Sequence[JobPlan],
    known: dict[str, tuple[str, TaskState]],
    *,
    user: str,
    sweep_id: str | None,
    priority: int,
    labels: dict[str, str],
    paused: bool = False,
) -> list[str]:
    """Insert jobs with the tasks they need. Live and succeeded tasks are joined, failed and cancelled ones reopened,
    with the trainings whose checkpoints these have not found (see `retry_jobs`).

    `known` are those of their tasks that there are already; `paused` says that their sweep is.
    """
    sequence = counters.take(connection, "jobs", len(plans))
    rank = Rank(user, priority, now, paused=paused)
    ranked = [(plan, sequence + offset, rank) for offset, plan in enumerate(plans)]
    ids, states, needed_by, fresh, again, lost = _join_tasks(connection, now, ranked, known)
    rows = [
        _job_row(plan, ids, sequence + offset, now)
        | {"user": user, "sweep_id": sweep_id, "priority": priority, "labels": labels}
        for offset, plan in enumerate(plans)
    ]
    insert_rows(connection, jobs, rows)
    these = jobs.c.sequence.between(rows[0]["sequence"], rows[-1]["sequence"])
    _insert_needs(connection, these, [(row["id"], plan) for row, plan in zip(rows, plans, strict=True)], ids)
    job_ids = [row["id"] for row in rows]
    history.append_for_jobs(connection, now, user, EventKind.JOB_SUBMITTED, listed(job_ids))
    kind = json_object(kind=tasks.c.kind)
    history.append_for_tasks(connection, now, user, None, listed(ids[task_digest] for task_digest in fresh), kind)

    reopen(connection, now, user, {ids[task_digest]: states[task_digest] for task_digest in again})
    moved = _let_wait(connection, now, user, [ids[task_digest] for task_digest in lost])
    if not paused:
        trainings = {plan.train.digest for plan in plans} & known.keys()
        _need_more(connection, {ids[task_digest]: needed_by[task_digest] for task_digest in trainings})
    joined = tasks.c.id.in_(listed(ids[task_digest] for task_digest in known))
    reopened = tasks.c.id.in_(listed(ids[task_digest] for task_digest in again))
    if not paused:
        others = and_(joined, tasks.c.finished_at.is_(None), tasks.c.sponsor != user, ~tasks.c.shared)
        connection.execute(update(tasks).where(others).values(shared=True))
    lacking = or_(tasks.c.priority < priority, tasks.c.paused, tasks.c.cancel_requested, reopened)
    rerank(connection, now, and_(joined, lacking))
    connection.execute(update(tasks).where(joined, tasks.c.cancel_requested).values(cancel_requested=False))
    settle(connection, now, user, moved)
    # A job may be further already than `queued`: where all of its numbers are known, it has succeeded at once.
    waiting = (TaskState.BLOCKED, TaskState.QUEUED)
    ahead = [
        row["id"]
        for row, plan in zip(rows, plans, strict=True)
        if any(states[task_digest] not in waiting for task_digest in plan.tasks)
    ]
    if ahead:
        settle_jobs(connection, now, user, listed(ahead))
    return job_ids


@dataclass(frozen=True)
class Rank:
    """What a new task gets from the first job that needs it; it is ranked among all that need it afterwards."""

    user: str
    priority: int
    waiting_since: float
    paused: bool = False


class _Joined(NamedTuple):
    """Tasks by digest: ids, states, how many jobs need them; which are `fresh`, reopened (`again`), or `lost`."""

    ids: dict[str, str]
    states: dict[str, TaskState]
    needed_by: Counter[str]
    fresh: list[str]
    again: list[str]
    lost: list[str]


def _join_tasks(
    connection: Connection, now: float, plans: Sequence[tuple[JobPlan, int, Rank]],
    known: Mapping[str, tuple[str, TaskState]],
) -> _Joined:  # fmt: skip
    """Insert the tasks of these jobs that there are not yet, and say which of the others run again.

    `plans` have the job's sequence and rank; `known` are those of their tasks that there are already.
    """
    needed: dict[str, tuple[PlannedTask, int, Rank]] = {}
    needed_by: Counter[str] = Counter()
    for plan, sequence, rank in plans:
        for task_digest, task in plan.tasks.items():
            needed.setdefault(task_digest, (task, sequence, rank))
        needed_by.update(plan.tasks.keys())
    ids = {task_digest: task_id for task_digest, (task_id, _) in known.items()}
    states = {task_digest: state for task_digest, (_, state) in known.items()}
    again = [task_digest for task_digest, state in states.items() if state in REOPENED]
    broken = tasks.c.id.in_(listed(ids[task_digest] for task_digest in again))
    lost = _lost_trainings(connection, broken) if again else []
    again += lost
    fresh = [task_digest for task_digest in needed if task_digest not in known]
    # Parents first: whether a child waits depends on whether its parent has succeeded, or is reopened too.
    for task_digest in sorted([*again, *fresh], key=lambda task_digest: bool(needed[task_digest][0].parents)):
        states[task_digest] = _first_state(needed[task_digest][0].parents, states)
    generation = _generations(connection, fresh)
    rows, edges = [], []
    for task_digest in fresh:
        task, sequence, rank = needed[task_digest]
        task_id = ids[task_digest] = new_id()
        row = _task_row(task, sequence, task_id, states[task_digest], now)
        row |= {"priority": rank.priority, "sponsor": rank.user, "waiting_since": rank.waiting_since}
        row |= {"paused": rank.paused, "needed_by": needed_by[task_digest], "generation": generation[task_digest]}
        rows.append({**row, "due": due(rank.waiting_since, rank.priority, task.spec.kind)})
    for task_digest in fresh:
        edges += [{"parent_id": ids[p], "child_id": ids[task_digest]} for p in needed[task_digest][0].parents]
    insert_rows(connection, tasks, rows)
    insert_rows(connection, task_edges, edges)
    return _Joined(ids, states, needed_by, fresh, again, lost)


def _generations(connection: Connection, digests: Iterable[str]) -> dict[str, int]:
    """Which generation the new task of each digest is: the first, or the one after those that were retracted."""
    former = tasks.c.former_digest
    query = select(former, func.max(tasks.c.generation)).where(former.in_(listed(digests))).group_by(former)
    return dict.fromkeys(digests, 1) | {digest: last + 1 for digest, last in connection.execute(query)}


def replan_jobs(connection: Connection, now: float, actor: str, plans: Sequence[tuple[Job, JobPlan]]) -> None:
    """Give jobs the tasks of new plans; a task of before that no live job needs ends.

    They are live, or a retry in the same transaction makes them so.
    """
    job_ids = [job.id for job, _ in plans]
    ranked = [(plan, job.sequence, Rank(job.user, job.priority, job.created_at)) for job, plan in plans]
    known = known_tasks(connection, {task_digest for _, plan in plans for task_digest in plan.tasks})
    ids, states, _, fresh, again, lost = _join_tasks(connection, now, ranked, known)
    mine = job_tasks.c.job_id.in_(listed(job_ids))
    before = set(connection.scalars(select(job_tasks.c.task_id).where(mine)))
    connection.execute(delete(job_tasks).where(mine))
    roles = [{"job": job.id, **_roles(plan, ids)} for job, plan in plans]
    moved: Values = {name: bindparam(name) for name in roles[0] if name != "job"}
    connection.execute(update(jobs).where(jobs.c.id == bindparam("job")).values(moved), roles)
    _insert_needs(connection, jobs.c.id.in_(listed(job_ids)), [(job.id, plan) for job, plan in plans], ids)
    history.append_for_jobs(connection, now, actor, EventKind.JOB_REPLANNED, listed(job_ids))
    kind = json_object(kind=tasks.c.kind)
    history.append_for_tasks(connection, now, actor, None, listed(ids[task_digest] for task_digest in fresh), kind)
    reopen(connection, now, actor, {ids[task_digest]: states[task_digest] for task_digest in again})
    waiting = _let_wait(connection, now, actor, [ids[task_digest] for task_digest in lost])
    needed = tasks.c.id.in_(listed(ids.values()))
    connection.execute(update(tasks).where(needed, tasks.c.cancel_requested).values(cancel_requested=False))
    release_tasks(connection, now, actor, listed(before - set(ids.values())))
    rerank(connection, now, needed)
    settle(connection, now, actor, waiting)
    settle_jobs(connection, now, actor, listed(job_ids))


def _need_more(connection: Connection, jobs_by_training: Mapping[str, int]) -> None:
    """So many jobs more need these trainings, which go before others of equal rank the more they are needed."""
    more = update(tasks).where(tasks.c.id == bindparam("task"), tasks.c.finished_at.is_(None))
    more = more.values(needed_by=tasks.c.needed_by + bindparam("more"))
    if jobs_by_training:
        connection.execute(more, [{"task": task_id, "more": count} for task_id, count in jobs_by_training.items()])


def reopen(connection: Connection, now: float, actor: str, again: Mapping[str, TaskState]) -> None:
    """A new generation of ended tasks, from the state that each begins in. Attempts count on: they are the fence."""
    if not again:
        return
    blocked = listed(task_id for task_id, state in again.items() if state is TaskState.BLOCKED)
    first_states = (tasks.c.id.in_(blocked), TaskState.BLOCKED)
    connection.execute(
        move_tasks(ENDED_TASK, TaskState.QUEUED, unless=first_states)
        .where(tasks.c.id.in_(listed(again)))
        .values(
            generation=tasks.c.generation + 1, errors=0, suspect_losses=0, not_before=0.0, reason=None,
            progress=0.0, detail={}, started_at=None, finished_at=None, cancel_requested=False,
            waiting_since=now, due=now - tasks.c.priority * AGEING_SECONDS, boosted=False,
        )
    )  # fmt: skip
    generation = json_object(generation=tasks.c.generation)
    history.append_for_tasks(connection, now, actor, None, listed(again), generation)


def _lost_trainings(connection: Connection, which: ColumnElement[bool]) -> list[str]:
    """Digests of the succeeded trainings whose checkpoints those of these tasks that failed have not found.

    The last attempt of each failed task has their digest; one that had begun before the training succeeded is about
    bytes that have been replaced since.
    """
    parent = tasks.alias("parent")
    query = (
        select(parent.c.digest)
        .distinct()
        .select_from(tasks)
        .join(attempts, and_(attempts.c.task_id == tasks.c.id, attempts.c.number == tasks.c.attempt))
        .join(task_edges, task_edges.c.child_id == tasks.c.id)
        .join(parent, parent.c.id == task_edges.c.parent_id)
        .join(trainings, trainings.c.task_id == parent.c.id)
        .where(which, tasks.c.state == TaskState.FAILED, attempts.c.end == MISSING_CHECKPOINT)
        .where(attempts.c.missing_digest == trainings.c.checkpoint_digest)
        .where(parent.c.state == TaskState.SUCCEEDED, parent.c.finished_at <= attempts.c.started_at)
    )
    return list(connection.scalars(query))


def _let_wait(connection: Connection, now: float, actor: str, reopened: Sequence[str]) -> list[str]:
    """What is queued, or runs, on the checkpoints of these reopened trainings waits for the new ones, or ends where no
    live job needs it.

    What runs is taken back at no cost: it would fail where the old one is not in its worker's memory. Returns all tasks
    that this is about.
    """
    if not reopened:
        return []
    children = select(task_edges.c.child_id).where(task_edges.c.parent_id.in_(listed(reopened)))
    needed = of_live_jobs(select(1)).exists()
    waits = (needed, TaskState.BLOCKED)
    theirs = move_tasks({TaskState.QUEUED, TaskState.RUNNING}, TaskState.CANCELLED, unless=waits)
    values = {
        "reason": case((needed, None), else_=UNWANTED), "finished_at": case((needed, None), else_=now),
        "holder": None, "lease_expires_at": None,
    }  # fmt: skip
    theirs = theirs.where(tasks.c.id.in_(children)).values(values)
    waiting = list(connection.scalars(theirs.returning(tasks.c.id)))
    running = and_(attempts.c.task_id.in_(listed(waiting)), attempts.c.ended_at.is_(None))
    taken_back = {"ended_at": now, "end": "given_back", "message": "its network is trained again"}
    connection.execute(update(attempts).where(running).values(taken_back))
    history.append_for_tasks(connection, now, actor, None, listed(waiting), json_object(reason=tasks.c.reason))
    return [*reopened, *waiting]


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


def reopening(
    connection: Connection, job_ids: Sequence[str], states: Collection[JobState] = RETRIABLE
) -> dict[str, int]:  # fmt: skip
    """By how many `retry_jobs` would add to each user's unfinished jobs: held ones are unfinished as they are."""
    ended = (jobs.c.id.in_(listed(job_ids)), jobs.c.state.in_(states), jobs.c.finished_at.is_not(None))
    query = select(jobs.c.user, func.count()).where(*ended).group_by(jobs.c.user)
    return {user: count for user, count in connection.execute(query)}


def retry_jobs(
    connection: Connection, now: float, actor: str, job_ids: Sequence[str], states: Collection[JobState] = RETRIABLE
) -> list[str]:  # fmt: skip
    """Reopen those of these jobs that are in one of `states`, and their tasks that did not succeed. Returns the jobs.

    A task that is held for a person to look at goes on waiting for that unless `states` has `held`.
    A training whose checkpoint these tasks have not found, or found damaged, runs again too, and what is to use it
    waits. If it gives the same weights, what had succeeded on them is still needed; if not, see `trained_again`.
    """
    statement = move_jobs(states, JobState.QUEUED).where(jobs.c.id.in_(listed(job_ids)))
    values = {"reason": None, "finished_at": None}
    retried = list(connection.scalars(statement.values(values).returning(jobs.c.id)))
    if not retried:
        return []
    history.append_for_jobs(connection, now, actor, EventKind.JOB_RETRIED, listed(retried))
    mine = tasks.c.id.in_(select(job_tasks.c.task_id).where(job_tasks.c.job_id.in_(listed(retried))))
    connection.execute(update(tasks).where(mine, tasks.c.cancel_requested).values(cancel_requested=False))
    columns = (tasks.c.id, tasks.c.digest, tasks.c.train_digest, tasks.c.state, tasks.c.spec)
    needed = connection.execute(select(*columns).where(mine)).all()
    state_of = {row.digest: TaskState(row.state) for row in needed}
    again: dict[str, TaskState] = {}
    lost = _lost_trainings(connection, mine)
    ended = (*REOPENED, TaskState.HELD) if JobState.HELD in states else REOPENED
    for row in sorted(needed, key=lambda row: row.digest != row.train_digest):
        if row.state in ended or row.digest in lost:
            made_on = (row.train_digest, row.spec.get("source") or row.train_digest)
            parents = () if row.digest == row.train_digest else made_on
            again[row.id] = state_of[row.digest] = _first_state(parents, state_of)
    reopen(connection, now, actor, again)
    moved = _let_wait(connection, now, actor, [row.id for row in needed if row.digest in lost])
    rerank(connection, now, mine)
    settle(connection, now, actor, [*again, *moved])  # other jobs may have been held by the same tasks
    settle_jobs(connection, now, actor, listed(retried))
    return retried


def _insert_needs(
    connection: Connection, these: ColumnElement[bool], plans: Sequence[tuple[str, JobPlan]], ids: Mapping[str, str]
) -> None:
    """Which job needs which tasks: those that its row names, its further measures, and a transfer's other network.

    `these` are the rows of the jobs, `plans` has their ids, and `ids` those of the tasks by digest.
    """
    parts = [column for column in jobs.columns if column.name.endswith("_task_id")]
    named = [select(jobs.c.id, part).where(these, part.is_not(None)) for part in parts if part.name != BASELINE.name]
    at_scale = select(jobs.c.id, BASELINE).where(these, jobs.c.attack_task_id != BASELINE)
    connection.execute(insert(job_tasks).from_select(["job_id", "task_id"], union_all(*named, at_scale)))
    further = [
        {"job_id": job_id, "task_id": ids[task_digest]}
        for job_id, plan in plans
        for task_digest in {task.digest for task in (*plan.measures, plan.source) if task} - {plan.train.digest}
    ]
    insert_rows(connection, job_tasks, further)


def _first_state(parents: Iterable[str], states: Mapping[str, TaskState]) -> TaskState:
    waits = any(states[parent] is not TaskState.SUCCEEDED for parent in parents)
    return TaskState.BLOCKED if waits else TaskState.QUEUED


def _task_row(task: PlannedTask, sequence: int, task_id: str, state: TaskState, now: float) -> Values:
    return {
        "id": task_id, "digest": task.digest, "kind": task.spec.kind, "version": task.spec.version,
        "spec": task.spec_json, "state": state, "train_digest": task.train_digest,
        "sequence": sequence, "attempt": 0, "errors": 0, "suspect_losses": 0, "not_before": 0.0,
        "cancel_requested": False, "progress": 0.0, "detail": {}, "created_at": now,
    }  # fmt: skip


def _job_row(plan: JobPlan, ids: dict[str, str], sequence: int, now: float) -> Values:
    job: JobSpec = plan.job
    return {
        "id": new_id(), "sequence": sequence, "spec": job.model_dump_json(), "spec_digest": digest(job),
        "architecture": job.architecture, "dataset": job.dataset, "scale": job.scale, "attack": job.attack.type,
        "norm": getattr(job.attack, "norm", None), "eps": getattr(job.attack, "eps", None),
        "recipe": job.recipe.name, "seed": job.seed, "samples": job.samples,
        "state": JobState.QUEUED, "created_at": now, **_roles(plan, ids),
    }  # fmt: skip


def _roles(plan: JobPlan, ids: Mapping[str, str]) -> dict[str, str | None]:
    """The tasks that a job's row names, by its columns."""
    return {
        "train_task_id": ids[plan.train.digest], "measure_task_id": ids[plan.closed_forms.digest],
        "attack_task_id": ids[plan.attack.digest], "baseline_task_id": ids[plan.baseline.digest],
        "control_task_id": ids[plan.control.digest] if plan.control else None,
    }  # fmt: skip
