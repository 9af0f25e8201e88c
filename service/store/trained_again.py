"""Trainings that ran again because their checkpoint was lost, and gave other weights: that is another network.

The old task keeps its numbers, its checkpoint's digest, its children and the finished jobs that need it. A new task
takes over its digest and its attempts since. New tasks also take over the digests of the children that live jobs need.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any  # for rows: SQLAlchemy cannot type a row of expressions

from sqlalchemy import Connection, Row, bindparam, insert, or_, select, update
from uuid_utils import uuid7

from service.model.events import EventKind
from service.model.jobs import LIVE_JOB, TaskState
from service.store import history
from service.store.history import Event
from service.store.listed import insert_rows, listed
from service.store.result_tables import results
from service.store.retractions import GIVEN_UP, give_digests_up, new_digest
from service.store.settling import rerank, settle_jobs
from service.store.states import DIGEST, move_tasks
from service.store.tables import artifacts, attempts, job_tasks, jobs, task_edges, tasks, trainings
from service.store.task_kinds import TASK_KINDS
from service.store.values import Values

WHY = "its network was trained again, with other weights"
NOT_YET = (
    *("holder", "lease_expires_at", "worker", "resume_digest", "resume_bytes", "started_at", "finished_at", "reason"),
    *("retracted_at", "retracted_by", "retraction_reason", "retracted_with", "former_digest"),
)
UNTOUCHED: Mapping[str, object] = {
    **dict.fromkeys(NOT_YET),
    **dict.fromkeys(("attempt", "errors", "suspect_losses"), 0),
    **dict.fromkeys(("not_before", "progress"), 0.0),
    "cancel_requested": False,
    "detail": {},
}
"""The columns of a task that nobody has run yet."""


@dataclass(frozen=True)
class Made:
    """The attempt of a training that has just succeeded, with the SHA-256 of the weights that it made."""

    task_id: str
    attempt: int
    weights_sha256: str


@dataclass(frozen=True)
class Replaced:
    """The task and the attempt that the other weights belong to now, and the old network's tasks that this ended."""

    task_id: str
    attempt: int
    ended: Sequence[str]


def other_weights(connection: Connection, now: float, actor: str, made: Iterable[Made]) -> dict[str, Replaced]:
    """Give each training that made other weights before a new task for its new weights; `task id -> replacement`.

    These trainings are `succeeded`; their new numbers are not stored yet.
    """
    by_task = {attempt.task_id: attempt for attempt in made}
    query = select(trainings.c.task_id, trainings.c.checkpoint_digest)
    before = connection.execute(query.where(trainings.c.task_id.in_(listed(by_task)))).all()
    return {
        task_id: _replace(connection, now, actor, by_task[task_id], weights)
        for task_id, weights in before
        if weights != by_task[task_id].weights_sha256
    }


def _replace(connection: Connection, now: float, actor: str, made: Made, weights: str) -> Replaced:
    row = connection.execute(select(tasks).where(tasks.c.id == made.task_id)).one()
    new_id, earlier = _split(connection, now, row)
    replaced = update(trainings).where(trainings.c.task_id == row.id)
    connection.execute(replaced.values(trained_again_as=made.weights_sha256))
    data = {"weights_sha256": weights, "trained_again_as": made.weights_sha256, "task_id": new_id}
    events = [
        Event(EventKind.TASK_OTHER_WEIGHTS, task_id=row.id, attempt=made.attempt, data=data),
        Event(EventKind.TASK_SUCCEEDED, task_id=row.id, attempt=earlier),
        Event(EventKind.TASK_QUEUED, task_id=new_id, data={"kind": row.kind}),
        Event(EventKind.TASK_RUNNING, task_id=new_id, attempt=made.attempt - earlier),
    ]
    history.append(connection, now, actor, events)
    live = _live_jobs(connection, row.id)
    instead = _copy_children(connection, now, row.id, new_id, live)
    _need_instead(connection, live, {"train": {row.id: new_id}} | instead)
    copies = listed(copy for of_kind in instead.values() for copy in of_kind.values())
    history.append_for_tasks(connection, now, actor, EventKind.TASK_BLOCKED, copies)
    history.append_for_jobs(connection, now, actor, EventKind.JOB_REPLANNED, listed(live))
    rerank(connection, now, or_(tasks.c.id == new_id, tasks.c.id.in_(copies)))
    ended = _end_children(connection, now, actor, row.id)
    settle_jobs(connection, now, actor, listed(live))
    needing = select(job_tasks.c.job_id).where(job_tasks.c.task_id == row.id)
    connection.execute(update(results).where(results.c.job_id.in_(needing)).values(trained_again=True))
    return Replaced(new_id, made.attempt - earlier, ended)


def _split(connection: Connection, now: float, row: Row[Any]) -> tuple[str, int]:
    """Move the attempts since this training's earlier success to a new task, which takes its digest.

    Returns the new task's id and the number of the last attempt that the old task keeps.
    """
    new_id = str(uuid7())
    successes = (attempts.c.task_id == row.id, attempts.c.end == "succeeded", attempts.c.number < row.attempt)
    made = connection.execute(select(attempts).where(*successes).order_by(attempts.c.number.desc()).limit(1)).one()
    ran = {"attempt": made.number, "started_at": made.started_at, "finished_at": made.ended_at, "worker": made.worker}
    earlier = {**ran, "detail": {}, "generation": row.generation - 1}
    connection.execute(update(tasks).where(tasks.c.id == row.id).values(new_digest() | earlier))
    taken = {"digest": GIVEN_UP + new_id} if row.former_digest else {}  # a retracted task has given its digest up
    values = {**row._mapping, "id": new_id, "attempt": row.attempt - made.number, "created_at": now, **taken}
    connection.execute(insert(tasks).values(values))
    since = update(attempts).where(attempts.c.task_id == row.id, attempts.c.number > made.number)
    connection.execute(since.values(task_id=new_id, number=attempts.c.number - made.number))
    states = update(artifacts).where(artifacts.c.task_id == row.id, artifacts.c.kind == "epoch_state")
    connection.execute(states.values(task_id=new_id))
    return new_id, made.number


def _live_jobs(connection: Connection, task_id: str) -> list[str]:
    needing = select(jobs.c.id).join(job_tasks, job_tasks.c.job_id == jobs.c.id)
    return list(connection.scalars(needing.where(job_tasks.c.task_id == task_id, jobs.c.state.in_(LIVE_JOB))))


def _copy_children(
    connection: Connection, now: float, old_parent: str, new_parent: str, live: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Let all children of the old network give their digests up, and make new tasks for those that live jobs need.

    Returns `kind -> old task id -> new task id`.
    """
    of_parent = select(task_edges.c.child_id).where(task_edges.c.parent_id == old_parent)
    children = connection.execute(select(tasks, DIGEST.label("own")).where(tasks.c.id.in_(of_parent))).all()
    give_digests_up(connection, [child.id for child in children])
    of_live = select(job_tasks.c.task_id).where(job_tasks.c.job_id.in_(listed(live)))
    needed = set(connection.scalars(of_live.distinct()))
    copies: dict[str, Values] = {}
    instead: dict[str, dict[str, str]] = {}
    for child in children:
        if child.id in needed:
            # A retracted child has given its digest up before, and another child may have it: both get one copy.
            copy = copies.setdefault(child.own, _copy(child, now))
            instead.setdefault(child.kind, {})[child.id] = copy["id"]
    insert_rows(connection, tasks, list(copies.values()))
    by_old = {old: new for of_kind in instead.values() for old, new in of_kind.items()}
    _copy_edges(connection, by_old, {old_parent: new_parent})
    return instead


def _copy(child: Row[Any], now: float) -> Values:
    values = {name: value for name, value in child._mapping.items() if name != "own"}
    waiting_since = now if child.finished_at is not None else child.waiting_since
    return {
        **values,
        **UNTOUCHED,
        "id": str(uuid7()),
        "digest": child.own,
        "state": str(TaskState.BLOCKED),
        "generation": child.generation + 1,
        "waiting_since": waiting_since,
        "created_at": now,
    }


def _copy_edges(connection: Connection, copies: Mapping[str, str], parents: Mapping[str, str]) -> None:
    query = select(task_edges.c.parent_id, task_edges.c.child_id).where(task_edges.c.child_id.in_(listed(copies)))
    edges = {(parents.get(parent, parent), copies[child]) for parent, child in connection.execute(query)}
    rows = [{"parent_id": parent, "child_id": child} for parent, child in sorted(edges)]
    insert_rows(connection, task_edges, rows)


def _need_instead(connection: Connection, live: Sequence[str], instead: Mapping[str, Mapping[str, str]]) -> None:
    """Let these jobs need other tasks: `instead` is `kind -> old task id -> new task id`."""
    of_live = listed(live)
    needs = update(job_tasks).where(job_tasks.c.task_id == bindparam("old"), job_tasks.c.job_id.in_(of_live))
    for kind, of_kind in instead.items():
        pairs = [{"old": old, "new": new} for old, new in of_kind.items()]
        connection.execute(needs.values(task_id=bindparam("new")), pairs)
        needing = select(job_tasks.c.job_id).where(job_tasks.c.task_id == bindparam("new"))
        for column in TASK_KINDS[kind].roles.values():
            moved = update(jobs).where(jobs.c.id.in_(needing), jobs.c.id.in_(of_live), column == bindparam("old"))
            connection.execute(moved.values({column: bindparam("new")}), pairs)


def _end_children(connection: Connection, now: float, actor: str, parent: str) -> list[str]:
    """Cancel the unfinished children, which no job needs any more; running ones are taken back at no cost."""
    children = tasks.c.id.in_(select(task_edges.c.child_id).where(task_edges.c.parent_id == parent))
    open_states = (TaskState.BLOCKED, TaskState.QUEUED, TaskState.RUNNING, TaskState.HELD)
    values = {"reason": WHY, "finished_at": now, "holder": None, "lease_expires_at": None}
    statement = move_tasks(open_states, TaskState.CANCELLED).where(children)
    ended = list(connection.scalars(statement.values(values).returning(tasks.c.id)))
    running = (attempts.c.task_id.in_(listed(ended)), attempts.c.ended_at.is_(None))
    taken_back = {"ended_at": now, "end": "given_back", "message": WHY}
    connection.execute(update(attempts).where(*running).values(taken_back))
    events = [Event(EventKind.TASK_CANCELLED, task_id=task_id, data={"reason": WHY}) for task_id in ended]
    history.append(connection, now, actor, events)
    return ended
