"""Arrays are kept beside a number and make it no other number: what is there with them is not computed without."""

from typing import Any

import pytest
from sqlalchemy import update

from service.lab.access import NotAllowed
from service.model.query import parse
from service.queue import retractions
from service.results.insights import Insights
from service.store import result_tables, tables
from service.store.retractions import MARK


def attacks(lab: Any) -> list[tuple[float, bool, str]]:
    """Scale, whether with arrays, and state of every attack task."""
    rows = lab.rows(tables.tasks, kind="attack")
    return sorted((row.spec["scale"], row.spec["arrays"], str(row.state)) for row in rows)


def test_a_job_without_arrays_joins_the_attack_that_has_them(lab: Any) -> None:
    kept = lab.submit(scale=5, arrays=True)
    under_way = lab.submit(scale=5, user="bob")
    lab.finish()
    plain = lab.submit(scale=5, user="eve")
    assert lab.job_states() == {"succeeded": 3}, "the last one needed nothing computed"
    assert attacks(lab) == [(1.0, True, "succeeded"), (5.0, True, "succeeded")]
    assert len({lab.job(job_id).attack_task_id for job_id in (kept, under_way, plain)}) == 1
    assert [lab.job(job_id).spec["arrays"] for job_id in (kept, plain)] == [True, False]
    assert Insights(lab.database).result(plain)["robust_accuracy"] == 1.0


def test_a_job_with_arrays_computes_what_is_there_without_them(lab: Any) -> None:
    lab.submit(scale=5)
    lab.finish()
    lab.submit(scale=5, arrays=True)
    lab.finish()
    assert attacks(lab) == [(scale, arrays, "succeeded") for scale in (1.0, 5.0) for arrays in (False, True)]
    lab.submit(scale=5, user="bob")
    assert len(lab.rows(tables.attack_results)) == 4, "where both are there, the plain one is joined"
    assert lab.job_states() == {"succeeded": 3}


def test_a_sweep_that_asks_for_both_computes_one(lab: Any) -> None:
    body = lab.submit_sweep({"scale": [1, 5], "arrays": [False, True]})
    assert body["tasks"]["attack"] == 2
    lab.finish()
    assert lab.job_states() == {"succeeded": 4}
    assert attacks(lab) == [(1.0, True, "succeeded"), (5.0, True, "succeeded")]


def test_what_failed_with_arrays_is_computed_without(lab: Any) -> None:
    lab.submit(arrays=True)
    lab.succeed(*lab.grant("train"))
    for grant in lab.grant("attack"):
        lab.fail(grant)
    lab.submit(user="bob")
    lab.finish()
    assert attacks(lab) == [(1.0, False, "succeeded"), (1.0, True, "failed")]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("by", ["job", "task", "filter"])
def test_what_is_wrong_is_wrong_with_arrays_and_without(lab: Any, first: bool, by: str) -> None:
    """Retracted by one of the two, hidden with the other, and restored with it."""
    pair = [lab.submit(scale=5, arrays=False)]
    lab.finish()
    pair.append(lab.submit(scale=5, arrays=True, user="bob"))
    unharmed = lab.submit(scale=2, arrays=True)
    lab.finish()
    one, other = pair if first else reversed(pair)
    attack_id = lab.job(one).attack_task_id
    assert attack_id != lab.job(other).attack_task_id

    def hidden() -> set[str]:
        return {row.job_id for row in lab.rows(result_tables.results) if row.retracted_at is not None}

    nodes = [parse(f"job_id = {one}")]
    if by == "job":
        retractions.retract(lab.service, one, "wrong", user="ann", admin=True)
    elif by == "task":
        retractions.retract_task(lab.service, attack_id, "wrong", user="ann", admin=True)
    else:
        retractions.retract_all(lab.service, nodes, "wrong", user="ann")
    assert hidden() == set(pair)
    assert unharmed not in hidden()
    if by == "job":
        retractions.restore(lab.service, other, user="ann", admin=True)
    elif by == "task":
        retractions.restore_task(lab.service, attack_id, user="ann", admin=True)
    else:
        retractions.restore_all(lab.service, nodes, user="ann")
    assert hidden() == set()


@pytest.mark.parametrize("submitted", ["before", "after"])
@pytest.mark.parametrize("with_arrays", [True, False])
@pytest.mark.parametrize("by", ["job", "filter"])
def test_what_was_wrong_before_its_twin_was_there_is_wrong_in_both(
    lab: Any, submitted: str, with_arrays: bool, by: str
) -> None:
    """The twin is queued when the numbers are retracted, or is asked for afterwards: its result is filed as retracted,
    a baseline that shows them is no evidence, and one restoration shows both."""
    wrong = lab.submit(arrays=with_arrays)
    lab.finish()

    def twins() -> list[str]:
        return [lab.submit(arrays=not with_arrays, user="bob"), lab.submit(arrays=not with_arrays, scale=5, user="bob")]

    later = twins() if submitted == "before" and not with_arrays else []
    nodes = [parse(f"job_id = {wrong}")]
    if by == "job":
        retractions.retract(lab.service, wrong, "wrong", user="ann", admin=True)
    else:
        retractions.retract_all(lab.service, nodes, "wrong", user="ann")
    later = later or twins()
    lab.finish()
    shown = {row.job_id: row for row in lab.rows(result_tables.results)}
    twin, scaled = later
    assert {name: getattr(shown[twin], name) for name in MARK} == {name: getattr(shown[wrong], name) for name in MARK}
    assert shown[twin].retracted_at is not None
    assert shown[scaled].retracted_at is None, "at another scale it is another attack"
    assert lab.job(scaled).verdict_checks["masked"] == "not_checked", "its baseline is the one that was retracted"
    if by == "job":
        retractions.restore(lab.service, twin, user="ann", admin=True)
    else:
        retractions.restore_all(lab.service, nodes, user="ann")
    assert {row.retracted_at for row in lab.rows(result_tables.results)} == {None}
    assert lab.job(scaled).verdict_checks["masked"] != "not_checked"


def test_a_twin_that_is_computed_after_the_retraction_of_ones_own_is_new(lab: Any) -> None:
    """Who is no admin decides nothing for others: from then on everybody's jobs have the numbers computed again."""
    wrong = lab.submit(scale=5, user="ann")
    lab.finish()
    retractions.retract(lab.service, wrong, "wrong", user="ann", admin=False)
    again = [lab.submit(scale=5, user="bob"), lab.submit(scale=5, arrays=True, user="bob")]
    lab.finish()
    hidden = {row.job_id for row in lab.rows(result_tables.results) if row.retracted_at is not None}
    assert hidden == {wrong}
    assert {lab.job(job_id).state for job_id in again} == {"succeeded"}


def test_ones_own_twin_that_waits_is_as_wrong(lab: Any) -> None:
    wrong = lab.submit(scale=5, user="ann")
    lab.finish()
    waiting = lab.submit(scale=5, arrays=True, user="ann")
    retractions.retract(lab.service, wrong, "wrong", user="ann", admin=False)
    lab.finish()
    assert {row.job_id for row in lab.rows(result_tables.results) if row.retracted_at} == {wrong, waiting}


def test_an_attack_from_before_there_was_an_order_has_its_twin(lab: Any) -> None:
    plain = lab.submit(scale=5)
    lab.finish()
    attack_id = lab.job(plain).attack_task_id
    spec = {name: value for name, value in lab.task(attack_id).spec.items() if name != "order"}
    with lab.database.write() as connection:
        connection.execute(update(tables.tasks).where(tables.tasks.c.id == attack_id).values(spec=spec))
    kept = lab.submit(scale=5, arrays=True)
    lab.finish()
    assert retractions.retract(lab.service, plain, "wrong", user="ann", admin=True)["retracted"] == sorted(
        [plain, kept]
    )


def test_who_is_no_admin_hides_no_results_of_others_with_arrays(lab: Any) -> None:
    mine = lab.submit(scale=5, user="ann")
    lab.finish()
    lab.submit(scale=5, arrays=True, user="bob")
    lab.finish()
    with pytest.raises(NotAllowed, match="bob"):
        retractions.retract(lab.service, mine, "wrong", user="ann", admin=False)
    with pytest.raises(NotAllowed, match="bob"):
        retractions.retract_task(lab.service, lab.job(mine).attack_task_id, "wrong", user="ann", admin=False)


def test_what_was_retracted_without_arrays_is_computed_again(lab: Any) -> None:
    plain = lab.submit()
    lab.finish()
    kept = lab.submit(arrays=True)
    lab.finish()
    retractions.retract_task(lab.service, lab.job(plain).attack_task_id, "wrong", user="ann", admin=True)
    again = lab.submit(user="bob")
    assert lab.job(again).attack_task_id not in (lab.job(plain).attack_task_id, lab.job(kept).attack_task_id)
    lab.finish()
    assert lab.job(again).state == "succeeded"
