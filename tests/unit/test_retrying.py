"""What follows when an attempt ends without success, as a rule without a store."""

import pytest

from service.model.executor import Failed
from service.model.jobs import TRANSITIONS, TaskState
from service.model.retrying import (
    COSTLY,
    PATIENT,
    UNWANTED,
    Counts,
    Ending,
    Patience,
    after_error,
    after_loss,
    is_further_measure,
    unless_unwanted,
)

PATIENCE = Patience(max_errors=3, max_suspect_losses=2, backoff_seconds=10.0)


def lost(end: str, losses: int = 0, in_a_row: int = 0, *, dispensable: bool = False) -> Ending:
    return after_loss("gone", end, in_a_row, Counts(1, losses), PATIENCE, dispensable=dispensable)


def test_an_error_is_tried_again_until_there_were_too_many() -> None:
    error = Failed("t", 1, "error", "boom")
    endings = [after_error(error, Counts(errors, 1), PATIENCE) for errors in range(3)]
    assert [(ending.state, ending.end) for ending in endings] == [
        (TaskState.QUEUED, "error"),
        (TaskState.QUEUED, "error"),
        (TaskState.FAILED, "failed"),
    ]
    assert [ending.counts for ending in endings] == [Counts(1, 1), Counts(2, 1), Counts(3, 1)]
    first, second, last = (ending.wait_seconds for ending in endings)
    assert first is not None
    assert 7.5 <= first <= 12.5
    assert second is not None
    assert 15 <= second <= 25
    assert last is None


@pytest.mark.parametrize(
    ("failed", "end"),
    [
        (Failed("t", 1, "configuration", "no such layer"), "failed"),
        (Failed("t", 1, "missing_checkpoint", "gone"), "missing_checkpoint"),
    ],
)
def test_what_would_come_again_fails_at_once(failed: Failed, end: str) -> None:
    assert after_error(failed, Counts(0, 0), PATIENCE) == Ending(TaskState.FAILED, failed.message, end, Counts(1, 0))


@pytest.mark.parametrize("end", sorted(COSTLY))
def test_a_task_that_loses_its_worker_too_often_is_held(end: str) -> None:
    assert (lost(end).state, lost(end).counts) == (TaskState.QUEUED, Counts(1, 1))
    held = lost(end, losses=1)
    assert (held.state, held.counts) == (TaskState.HELD, Counts(1, 2))
    assert held.reason == "held for review: it lost its worker 2 times, last: gone"
    assert lost(end, losses=1, dispensable=True).state is TaskState.FAILED


def test_a_loss_that_is_not_the_tasks_doing_costs_nothing() -> None:
    assert lost("node_lost", losses=1) == Ending(TaskState.QUEUED, "gone", "node_lost", Counts(1, 1))


@pytest.mark.parametrize("end", sorted(PATIENT))
def test_a_patient_loss_waits_the_longer_the_more_of_them_were_in_a_row(end: str) -> None:
    waits = [lost(end, in_a_row=before).wait_seconds or 0.0 for before in (0, 2, 4)]
    assert waits == sorted(waits)
    assert lost(end, losses=9).counts == Counts(1, 9)


def test_an_unwanted_task_is_cancelled_unless_it_has_failed() -> None:
    cancelled = unless_unwanted(lost("worker_died", losses=1))
    assert (cancelled.state, cancelled.reason) == (TaskState.CANCELLED, UNWANTED)
    failed = after_error(Failed("t", 1, "configuration", "no"), Counts(0, 0), PATIENCE)
    assert unless_unwanted(failed) is failed


def test_whatever_follows_is_a_transition_of_what_runs() -> None:
    ends = [lost(end, losses, dispensable=spare) for end in COSTLY for losses in (0, 1) for spare in (True, False)]
    assert {ending.state for ending in [*ends, *map(unless_unwanted, ends)]} <= TRANSITIONS[TaskState.RUNNING]


def test_the_closed_forms_are_no_further_measure() -> None:
    assert not is_further_measure("measure", {"measure": {"type": "closed_forms"}})
    assert is_further_measure("measure", {"measure": {"type": "hessian_trace"}})
    assert not is_further_measure("train", {})
