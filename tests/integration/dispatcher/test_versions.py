"""A version that computes a number differently: unfinished jobs get the new tasks, and what is finished stays."""

from collections.abc import Callable
from typing import Any

from dispatching import Scripted, dispatcher, succeeds, tick_until_idle

from service.store import tables


def versions_of(lab: Any, job_id: str) -> dict[str, int]:
    """The version of each kind of task that a job needs."""
    needed = {row.task_id for row in lab.rows(tables.job_tasks, job_id=job_id)}
    return {row.kind: row.version for row in lab.rows(tables.tasks) if row.id in needed}


def test_queued_tasks_of_an_older_version_are_planned_again(lab: Any, newer: Callable[..., None]) -> None:
    first, second = lab.submit(scale=5), lab.submit(scale=50)
    lab.succeed(*lab.grant("train"))
    newer("attack/pgd")
    executor = Scripted(succeeds(lab))
    tick_until_idle(dispatcher(lab, executor))
    assert lab.job_states() == {"succeeded": 2}
    for job_id in (first, second):
        assert versions_of(lab, job_id) == {"train": 1, "measure": 1, "attack": 2, "control": 1}
    given = [grant.spec["version"] for grant in executor.grants if grant.spec["kind"] == "attack"]
    assert given == [2, 2, 2]
    assert {row.state for row in lab.rows(tables.tasks, kind="attack", version=1)} == {"cancelled"}
    assert len(lab.rows(tables.attempts, end="given_back")) >= 1


def test_a_training_of_an_older_version_takes_all_that_rests_on_it_along(lab: Any, newer: Callable[..., None]) -> None:
    job_id = lab.submit(scale=5)
    newer("train/standard")
    one = dispatcher(lab, Scripted(succeeds(lab)))
    one.tick()  # it plans again, and gives out nothing
    tick_until_idle(one)
    assert lab.job(job_id).state == "succeeded"
    assert versions_of(lab, job_id)["train"] == 2
    assert {row.state for row in lab.rows(tables.tasks, kind="train", version=1)} == {"cancelled"}
    [old] = lab.rows(tables.tasks, kind="train", version=1)
    assert not {row.state for row in lab.rows(tables.tasks, train_digest=old.digest)} - {"cancelled"}


def test_what_has_succeeded_stays_and_is_joined_by_nobody(lab: Any, newer: Callable[..., None]) -> None:
    before = lab.submit(scale=5)
    lab.finish()
    newer("attack/pgd")
    after = lab.submit(scale=5)
    tick_until_idle(dispatcher(lab, Scripted(succeeds(lab))))
    assert (versions_of(lab, before)["attack"], versions_of(lab, after)["attack"]) == (1, 2)
    assert lab.job_states() == {"succeeded": 2}


def test_a_failed_job_that_is_retried_gets_the_new_tasks(lab: Any, newer: Callable[..., None]) -> None:
    job_id = lab.submit(scale=5)
    lab.succeed(*lab.grant("train"))
    for grant in lab.grant("attack"):
        lab.fail(grant)
    assert lab.job(job_id).state == "failed"
    newer("attack/pgd")
    lab.service.retry_job(job_id, user="ann")
    tick_until_idle(dispatcher(lab, Scripted(succeeds(lab))))
    assert lab.job(job_id).state == "succeeded"
    assert versions_of(lab, job_id)["attack"] == 2


def test_a_task_that_another_users_job_needs_moves_with_it(lab: Any, newer: Callable[..., None]) -> None:
    ids = [lab.submit(user="ann", scale=5), lab.submit(user="ben", scale=5, priority=3)]
    lab.succeed(*lab.grant("train"))
    newer("measure/closed_forms", "attack/pgd")
    tick_until_idle(dispatcher(lab, Scripted(succeeds(lab))))
    assert lab.job_states() == {"succeeded": 2}
    assert [versions_of(lab, job_id)["measure"] for job_id in ids] == [2, 2]
    assert len(lab.rows(tables.tasks, kind="measure", version=2)) == 1


def test_a_spec_that_this_version_refuses_is_cancelled_with_the_reason(lab: Any, newer: Callable[..., None]) -> None:
    job_id = lab.submit(scale=5)
    lab.succeed(*lab.grant("train"))
    with lab.database.write() as connection:
        spec = {**lab.job(job_id).spec, "architecture": "of_before"}
        connection.execute(tables.jobs.update().values(spec=spec))
    newer("attack/pgd")
    tick_until_idle(dispatcher(lab, Scripted(succeeds(lab))))
    job = lab.job(job_id)
    assert job.state == "cancelled"
    assert "this version refuses its spec: /architecture: unknown architecture 'of_before'" in job.reason
