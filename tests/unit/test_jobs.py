"""The state machine as data: every state has a way in and a way out, and jobs follow from their tasks."""

from itertools import product

import pytest

from service.model.jobs import ENDED_TASK, LIVE_JOB, TRANSITIONS, JobState, TaskState, job_state


def test_every_state_has_its_row() -> None:
    assert set(TRANSITIONS) == set(TaskState)


def test_every_state_can_be_reached_from_a_new_task_and_left_again() -> None:
    reached = {TaskState.BLOCKED}
    while more := {after for state in reached for after in TRANSITIONS[state]} - reached:
        reached |= more
    assert reached == set(TaskState)
    assert all(TRANSITIONS[state] for state in TaskState)


def test_only_what_runs_can_succeed_fail_or_be_held() -> None:
    for end in (TaskState.SUCCEEDED, TaskState.FAILED, TaskState.HELD):
        assert [state for state in TaskState if end in TRANSITIONS[state]] == [TaskState.RUNNING]


def test_what_has_ended_only_begins_anew() -> None:
    for state in ENDED_TASK - {TaskState.HELD}:
        assert TRANSITIONS[state] == {TaskState.BLOCKED, TaskState.QUEUED}


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("succeeded", JobState.SUCCEEDED),
        ("queued blocked", JobState.QUEUED),
        ("running blocked", JobState.RUNNING),
        ("succeeded queued", JobState.RUNNING),
        ("succeeded failed", JobState.FAILED),
        ("running cancelled", JobState.FAILED),
        ("held failed", JobState.FAILED),
        ("held running succeeded", JobState.HELD),
    ],
)
def test_a_job_is_as_its_tasks(tasks: str, expected: JobState) -> None:
    assert job_state([TaskState(state) for state in tasks.split()]) is expected


def test_a_job_ends_exactly_when_no_task_of_it_can_change_that() -> None:
    for tasks in product(TaskState, repeat=3):
        state = job_state(list(tasks))
        assert (state is JobState.SUCCEEDED) == (set(tasks) == {TaskState.SUCCEEDED})
        assert (state in LIVE_JOB) == (
            not {TaskState.FAILED, TaskState.CANCELLED} & set(tasks) and state is not JobState.SUCCEEDED
        )
