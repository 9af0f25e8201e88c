"""Conditions on a task's state that partial indices have, expressions of current attempts, and every change of a state.

The conditions are literal text in a statement, not bound parameters: otherwise SQLite does not use the partial indices.
"""

from collections.abc import Collection

from sqlalchemy import ColumnElement, Update, and_, case, func, literal, literal_column, update

from service.model.jobs import JOB_TRANSITIONS, TRANSITIONS, JobState, TaskState, check_transitions
from service.store.tables import attempts, jobs, tasks
from service.store.typed import json_text, unindexed

QUEUED = tasks.c.state == literal_column(f"'{TaskState.QUEUED}'")
CLAIMABLE = and_(QUEUED, ~tasks.c.paused)
SHARED = and_(CLAIMABLE, tasks.c.shared)
RUNNING = tasks.c.state == literal_column(f"'{TaskState.RUNNING}'")
CURRENT = (attempts.c.task_id == tasks.c.id) & (attempts.c.number == tasks.c.attempt)
# The SHA-256 of the weights that an attempt used, and of those that a transfer's examples come from; null if unknown.
WEIGHTS_USED = json_text(attempts.c.provenance, literal("weights_sha256"))
SOURCE_USED = json_text(attempts.c.provenance, literal("source_weights_sha256"))
# The digest of a task's spec, also if the task has given it up to a newer generation.
DIGEST = func.coalesce(tasks.c.former_digest, tasks.c.digest)


def move_tasks(
    before: Collection[TaskState], after: TaskState, *, unless: tuple[ColumnElement[bool], TaskState] | None = None
) -> Update:
    """An UPDATE of the tasks in one of the states `before`: to `after`, or to the state of `unless` if that is true.

    No other statement changes `tasks.state`: the tests refuse an update that has not the option `moves`.
    Raises `NoTransition` unless `TRANSITIONS` has each of these moves.
    """
    check_transitions(TRANSITIONS, before, {after, unless[1]} if unless else {after})
    state = case((unless[0], str(unless[1])), else_=str(after)) if unless else after
    return update(tasks).where(tasks.c.state.in_(before)).values(state=state).execution_options(moves=True)


def move_jobs(before: Collection[JobState], after: JobState) -> Update:
    """An UPDATE of the jobs in one of the states `before`: to `after`. The caller says which, by their ids.

    No other statement changes `jobs.state`. Raises `NoTransition` unless `JOB_TRANSITIONS` has each of these moves.
    """
    check_transitions(JOB_TRANSITIONS, before, {after})
    moved = update(jobs).where(unindexed(jobs.c.state).in_(before)).values(state=after)
    return moved.execution_options(moves=True)
