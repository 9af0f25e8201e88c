"""Verdicts of an older rule are judged again from the stored bits, and an event says what has changed."""

from typing import Any

import pytest

from service.model.executor import Succeeded
from service.model.verdict import VERSION
from service.operations import upgrading
from service.operations.upgrading import Upgraded
from service.store import tables
from service.store.result_tables import results


@pytest.fixture
def judged_before(lab: Any) -> Any:
    """A lab with three results whose verdicts an older rule gave: one as this rule's, two others."""
    for scale in (1, 5, 50):
        lab.submit(scale=scale)
    lab.finish()
    with lab.database.write() as connection:
        for table in (tables.jobs, results):
            values = {"verdict_version": VERSION - 1, "masked_n": None}
            connection.execute(table.update().values(values))
            connection.execute(
                table.update().where(table.c.sequence > 1).values(verdict="suspect", masked_fraction=0.5)
            )
    return lab


def test_stored_bits_are_judged_by_the_new_rule(judged_before: Any) -> None:
    lab = judged_before
    assert upgrading.upgrade(lab.database) == Upgraded(judged=3, changed=2)
    for table in (tables.jobs, results):
        rows = lab.rows(table)
        assert [(row.verdict, row.verdict_version) for row in rows] == [("trusted", VERSION)] * 3
        assert [(row.masked_fraction, row.masked_n) for row in rows] == [(0.0, 16)] * 3
    events = lab.rows(tables.events, kind="result.judged")
    assert [event.data for event in events] == [{"version": VERSION, "before": "suspect", "verdict": "trusted"}] * 2
    assert {event.actor for event in events} == {"upgrade"}


@pytest.mark.parametrize(("share", "verdict"), [(None, "trusted"), (0.5, "trusted"), (1.0, "invalid")])
def test_chance_is_the_share_of_the_most_frequent_label_where_the_attack_left_it(
    lab: Any, share: float | None, verdict: str
) -> None:
    """All 16 images are right. An attack of before has left no share: its ten classes are taken to be equally many."""
    lab.submit()
    while grants := lab.grant():
        for grant in grants:
            more = {"majority_share": share} if grant.spec["kind"] == "attack" and share is not None else {}
            lab.record(Succeeded(grant.task_id, grant.attempt, lab.outcome(grant, **more)))
    assert [row.verdict for row in lab.rows(results)] == [verdict]
    with lab.database.write() as connection:
        for table in (tables.jobs, results):
            connection.execute(table.update().values(verdict="trusted", verdict_version=4))
    assert upgrading.upgrade(lab.database) == Upgraded(judged=1, changed=int(verdict != "trusted"))
    (row,) = lab.rows(results)
    assert (row.verdict, row.verdict_version) == (verdict, VERSION)
    (job,) = lab.rows(tables.jobs)
    assert list(job.verdict_reasons) == ([] if verdict == "trusted" else ["nothing_correct"])


def test_the_second_time_there_is_nothing_to_do(judged_before: Any) -> None:
    upgrading.upgrade(judged_before.database)
    before = judged_before.dump()
    assert upgrading.upgrade(judged_before.database) == Upgraded()
    assert judged_before.dump() == before


def test_what_has_no_bits_keeps_its_version(judged_before: Any) -> None:
    lab = judged_before
    first, *_ = lab.rows(tables.jobs)
    with lab.database.write() as connection:
        connection.execute(tables.outcome_bits.delete().where(tables.outcome_bits.c.task_id == first.attack_task_id))
    assert upgrading.upgrade(lab.database).judged == 0  # the attack at s = 1 is what all three are compared with
    assert {row.verdict_version for row in lab.rows(results)} == {VERSION - 1}


def test_many_are_judged_a_batch_at_a_time(judged_before: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrading, "AT_ONCE", 2)
    assert upgrading.upgrade(judged_before.database) == Upgraded(judged=3, changed=2)
