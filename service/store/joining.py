"""Tasks that jobs share: a task that exists is joined, one that ended without success runs again, others are made."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sqlalchemy import ColumnElement, Connection, and_, bindparam, case, func, select, update
from uuid_utils import uuid7

from service.model.jobs import ENDED_TASK, REOPENED_TASK, TaskState, first_state
from service.model.retrying import MISSING_CHECKPOINT, UNWANTED
from service.model.scheduling import AGEING_SECONDS, due
from service.specs.plan import JobPlan, PlannedTask
from service.store import history
from service.store.listed import insert_rows, json_object, listed
from service.store.settling import of_live_jobs
from service.store.states import move_tasks
from service.store.tables import attempts, task_edges, tasks, trainings
from service.store.values import Values

ExistingTasks = Mapping[str, tuple[str, TaskState]]
"""`digest -> (task id, state)`."""


@dataclass(frozen=True)
class Rank:
    """What a new task gets from the first job that needs it; later it is ranked by all jobs that need it."""

    user: str
    priority: int
    waiting_since: float
    paused: bool = False


class PlannedJob(NamedTuple):
    """A job's plan, its sequence and the rank that its new tasks begin with."""

    plan: JobPlan
    sequence: int
    rank: Rank


@dataclass(frozen=True)
class Joined:
    """The tasks that some jobs need, by digest: ids, states, and how many of the jobs need each.

    `new` were inserted. `reopened` have ended and are to run again; among them are the `lost` trainings, whose
    checkpoints are gone.
    """

    ids: dict[str, str]
    states: dict[str, TaskState]
    needed_by: Counter[str]
    new: list[str]
    reopened: list[str]
    lost: list[str] = field(default_factory=list)

    def ids_of(self, digests: Iterable[str]) -> list[str]:
        return [self.ids[digest] for digest in digests]


def new_id() -> str:
    return str(uuid7())


def existing_tasks(connection: Connection, digests: Iterable[str]) -> dict[str, tuple[str, TaskState]]:
    """Those of these digests that have a task already: `digest -> (id, state)`."""
    query = select(tasks.c.digest, tasks.c.id, tasks.c.state).where(tasks.c.digest.in_(listed(digests)))
    return {digest: (task_id, TaskState(state)) for digest, task_id, state in connection.execute(query)}


def retracted_digests(connection: Connection, digests: Iterable[str]) -> list[str]:
    """Those of these digests of which a task was retracted."""
    former = tasks.c.former_digest
    return list(connection.scalars(select(former).where(former.in_(listed(digests))).distinct()))


def join_tasks(connection: Connection, now: float, jobs: Sequence[PlannedJob], existing: ExistingTasks) -> Joined:
    """Insert the tasks of these jobs that do not exist, and choose which of the `existing` ones are to run again.

    `run_again` reopens the chosen tasks, after the caller has inserted its jobs.
    """
    needed: dict[str, tuple[PlannedTask, PlannedJob]] = {}
    needed_by: Counter[str] = Counter()
    for job in jobs:
        for digest, task in job.plan.tasks.items():
            needed.setdefault(digest, (task, job))
        needed_by.update(job.plan.tasks.keys())
    ids = {digest: task_id for digest, (task_id, _) in existing.items()}
    states = {digest: state for digest, (_, state) in existing.items()}
    reopened = [digest for digest, state in states.items() if state in REOPENED_TASK]
    lost = lost_trainings(connection, tasks.c.id.in_(listed(ids[digest] for digest in reopened))) if reopened else []
    reopened += lost
    new = [digest for digest in needed if digest not in existing]
    # Parents first: whether a child waits depends on whether its parent has succeeded, or is reopened too.
    for digest in sorted([*reopened, *new], key=lambda digest: bool(needed[digest][0].parents)):
        states[digest] = first_state(states[parent] for parent in needed[digest][0].parents)
    ids |= {digest: new_id() for digest in new}
    generation = _generations(connection, new)
    rows = [
        _task_row(*needed[digest], ids[digest], states[digest], now)
        | {"needed_by": needed_by[digest], "generation": generation[digest]}
        for digest in new
    ]
    insert_rows(connection, tasks, rows)
    edges = [
        {"parent_id": ids[parent], "child_id": ids[digest]} for digest in new for parent in needed[digest][0].parents
    ]
    insert_rows(connection, task_edges, edges)
    return Joined(ids, states, needed_by, new, reopened, lost)


def run_again(connection: Connection, now: float, actor: str, joined: Joined) -> list[str]:
    """Reopen the tasks that are to run again, and let the tasks that use the lost checkpoints wait.

    Returns the tasks whose state has consequences for other jobs: the caller settles them.
    """
    reopen(connection, now, actor, {joined.ids[digest]: joined.states[digest] for digest in joined.reopened})
    return let_wait(connection, now, actor, joined.ids_of(joined.lost))


def append_new(connection: Connection, now: float, actor: str, joined: Joined) -> None:
    """Append an event for each new task; its kind is the state that the task begins in."""
    kind = json_object(kind=tasks.c.kind)
    history.append_for_tasks(connection, now, actor, None, listed(joined.ids_of(joined.new)), kind)


def need_more(connection: Connection, jobs_by_training: Mapping[str, int]) -> None:
    """Count further jobs that need these trainings: at equal rank, the training that more jobs need goes first."""
    more = update(tasks).where(tasks.c.id == bindparam("task"), tasks.c.finished_at.is_(None))
    more = more.values(needed_by=tasks.c.needed_by + bindparam("more"))
    if jobs_by_training:
        connection.execute(more, [{"task": task_id, "more": count} for task_id, count in jobs_by_training.items()])


def reopen(connection: Connection, now: float, actor: str, first_states: Mapping[str, TaskState]) -> None:
    """Start a new generation of ended tasks, each in its first state. Attempts count on: they are the fence."""
    if not first_states:
        return
    blocked = listed(task_id for task_id, state in first_states.items() if state is TaskState.BLOCKED)
    unless_blocked = (tasks.c.id.in_(blocked), TaskState.BLOCKED)
    statement = move_tasks(ENDED_TASK, TaskState.QUEUED, unless=unless_blocked)
    as_new = {"errors": 0, "suspect_losses": 0, "not_before": 0.0, "progress": 0.0, "detail": {}, "reason": None}
    rank = {"waiting_since": now, "due": now - tasks.c.priority * AGEING_SECONDS, "boosted": False}
    statement = statement.where(tasks.c.id.in_(listed(first_states))).values(
        **as_new, **rank, started_at=None, finished_at=None, cancel_requested=False, generation=tasks.c.generation + 1
    )
    connection.execute(statement)
    generation = json_object(generation=tasks.c.generation)
    history.append_for_tasks(connection, now, actor, None, listed(first_states), generation)


def lost_trainings(connection: Connection, which: ColumnElement[bool]) -> list[str]:
    """The digests of succeeded trainings whose checkpoints failed tasks among these did not find.

    The last attempt of each failed task has the checkpoint's digest. An attempt that had begun before the training
    succeeded does not count: the bytes that it missed have been replaced since.
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


def let_wait(connection: Connection, now: float, actor: str, trainings_again: Sequence[str]) -> list[str]:
    """Tasks that are queued or running on the checkpoints of these reopened trainings wait for the new checkpoints.

    If no live job needs such a task, it ends. A running one is taken back at no cost: it would fail where the old
    checkpoint is not in its worker's memory. Returns the trainings and all tasks that were changed.
    """
    if not trainings_again:
        return []
    children = select(task_edges.c.child_id).where(task_edges.c.parent_id.in_(listed(trainings_again)))
    needed = of_live_jobs(select(1)).exists()
    moved = move_tasks({TaskState.QUEUED, TaskState.RUNNING}, TaskState.CANCELLED, unless=(needed, TaskState.BLOCKED))
    ended = {"reason": case((needed, None), else_=UNWANTED), "finished_at": case((needed, None), else_=now)}
    moved = moved.where(tasks.c.id.in_(children)).values(**ended, holder=None, lease_expires_at=None)
    waiting = list(connection.scalars(moved.returning(tasks.c.id)))
    running = and_(attempts.c.task_id.in_(listed(waiting)), attempts.c.ended_at.is_(None))
    taken_back = {"ended_at": now, "end": "given_back", "message": "its network is trained again"}
    connection.execute(update(attempts).where(running).values(taken_back))
    history.append_for_tasks(connection, now, actor, None, listed(waiting), json_object(reason=tasks.c.reason))
    return [*trainings_again, *waiting]


def _generations(connection: Connection, digests: Iterable[str]) -> dict[str, int]:
    """Which generation the new task of each digest is: the first, or the one after those that were retracted."""
    former = tasks.c.former_digest
    query = select(former, func.max(tasks.c.generation)).where(former.in_(listed(digests))).group_by(former)
    return dict.fromkeys(digests, 1) | {digest: last + 1 for digest, last in connection.execute(query)}


def _task_row(task: PlannedTask, first_job: PlannedJob, task_id: str, state: TaskState, now: float) -> Values:
    rank = first_job.rank
    identity = {"id": task_id, "digest": task.digest, "train_digest": task.train_digest, "spec": task.spec_json}
    kind = {"kind": task.spec.kind, "version": task.spec.version}
    unstarted = {"attempt": 0, "errors": 0, "suspect_losses": 0, "not_before": 0.0, "cancel_requested": False}
    return (
        identity
        | kind
        | unstarted
        | {
            "state": state,
            "sequence": first_job.sequence,
            "progress": 0.0,
            "detail": {},
            "created_at": now,
            "priority": rank.priority,
            "sponsor": rank.user,
            "waiting_since": rank.waiting_since,
            "paused": rank.paused,
            "due": due(rank.waiting_since, rank.priority, task.spec.kind),
        }
    )
