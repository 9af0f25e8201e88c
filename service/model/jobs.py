"""The states of a task and of a job, and what moves them. Imports nothing of ours.

Who moves a task into each state:

    blocked    submission: a parent (its checkpoint's training) has not succeeded yet, or is to run again
    queued     submission, if it waits for no parent; the last parent's success; a lost or backed-off attempt
    running    the dispatcher's claim, which counts `attempt` up: that number fences every later write
    succeeded  the outcome of the current attempt was recorded
    failed     a configuration error, or `max_errors` application errors
    cancelled  no live job needs it any more, or (upstream) a parent failed
    held       it keeps killing its worker: a person must look at it
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from itertools import product
from typing import TypeVar


class TaskState(StrEnum):
    BLOCKED = "blocked"
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    HELD = "held"


class JobState(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    HELD = "held"


TRANSITIONS: dict[TaskState, frozenset[TaskState]] = {
    TaskState.BLOCKED: frozenset({TaskState.QUEUED, TaskState.CANCELLED}),
    # Blocked again: its parent was reopened, because its bytes were lost.
    TaskState.QUEUED: frozenset({TaskState.RUNNING, TaskState.CANCELLED, TaskState.BLOCKED}),
    TaskState.RUNNING: frozenset(
        {
            TaskState.SUCCEEDED,
            TaskState.FAILED,
            TaskState.QUEUED,
            TaskState.CANCELLED,
            TaskState.HELD,
            TaskState.BLOCKED,
        }
    ),
    TaskState.SUCCEEDED: frozenset({TaskState.BLOCKED, TaskState.QUEUED}),  # its bytes were lost: a new generation
    TaskState.FAILED: frozenset({TaskState.BLOCKED, TaskState.QUEUED}),  # reopened: a new generation
    TaskState.CANCELLED: frozenset({TaskState.BLOCKED, TaskState.QUEUED}),  # reopened
    TaskState.HELD: frozenset({TaskState.BLOCKED, TaskState.QUEUED, TaskState.CANCELLED}),  # released by a person
}

_ANY = frozenset(JobState)
JOB_TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    # A live job is cancelled by its owner, or follows its tasks (`job_state`) from any state to any other.
    JobState.QUEUED: _ANY - {JobState.QUEUED},
    JobState.RUNNING: _ANY - {JobState.RUNNING},
    JobState.HELD: _ANY - {JobState.HELD},
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),  # retried
    JobState.CANCELLED: frozenset({JobState.QUEUED}),  # retried
}

ENDED_TASK = frozenset({TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED, TaskState.HELD})
REOPENED_TASK = frozenset({TaskState.FAILED, TaskState.CANCELLED})  # they run again if a new or retried job needs them
LIVE_JOB = frozenset({JobState.QUEUED, JobState.RUNNING, JobState.HELD})
STOPPED_JOB = frozenset(JobState) - {JobState.QUEUED, JobState.RUNNING}  # a held one waits for a person
RETRIABLE = (JobState.FAILED, JobState.HELD, JobState.CANCELLED)  # states from which a job can be run again


State = TypeVar("State", TaskState, JobState)


class NoTransition(ValueError):
    """The table of transitions does not have this one."""


def check_transitions(table: Mapping[State, frozenset[State]], before: Iterable[State], after: Iterable[State]) -> None:
    """Raises `NoTransition` unless the table has every transition from a state of `before` to one of `after`."""
    for old, new in product(before, after):
        if new not in table[old]:
            raise NoTransition(f"{type(new).__name__}: nothing moves from {old} to {new}")


def first_state(parents: Iterable[TaskState]) -> TaskState:
    """The state in which a task begins, or begins again: it waits until all `parents` have succeeded."""
    waits = any(state is not TaskState.SUCCEEDED for state in parents)
    return TaskState.BLOCKED if waits else TaskState.QUEUED


def reopened_by_retry(states: Iterable[JobState]) -> frozenset[TaskState]:
    """The task states that a retry of jobs in these states reopens.

    A held task waits for a person to look at it, so only a retry of held jobs reopens it.
    """
    return REOPENED_TASK | {TaskState.HELD} if JobState.HELD in states else REOPENED_TASK


def job_state(tasks: list[TaskState]) -> JobState:
    """The state of a job that was not cancelled, from the states of the tasks that it needs.

    A further measure that failed does not fail the job: the store counts it as succeeded (`settling`).
    """
    states = set(tasks)
    if states <= {TaskState.SUCCEEDED}:
        return JobState.SUCCEEDED
    if states & {TaskState.FAILED, TaskState.CANCELLED}:
        return JobState.FAILED
    if TaskState.HELD in states:
        return JobState.HELD
    if states & {TaskState.RUNNING, TaskState.SUCCEEDED}:
        return JobState.RUNNING
    return JobState.QUEUED
