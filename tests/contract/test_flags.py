"""Flags across the history, on SQLite and on PostgreSQL: found in both results, and never part of a verdict."""

import csv
import importlib
import io
from dataclasses import replace
from typing import Any

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import select, update

from service.model.executor import Succeeded
from service.model.flags import Mean, not_monotone
from service.queue import retractions
from service.results import exporting, leaderboard, worst_case
from service.results.insights import Insights, Question
from service.store.result_tables import cells, results

STEPS = {"type": "pgd", "norm": "linf", "eps": 0.1, "step_size": 0.02, "steps": 10}


def answer(lab: Any, accuracy: dict[tuple[float, int, int], float]) -> None:
    """Every attack leaves robust what `accuracy` says of its eps, steps and restarts."""
    while grants := lab.grant():
        for grant in grants:
            numbers = {}
            if grant.spec["kind"] == "attack":
                attack = grant.spec["attack"]
                numbers = {"robust_accuracy": accuracy[attack["eps"], attack["steps"], attack["restarts"]]}
            lab.record(Succeeded(grant.task_id, grant.attempt, lab.outcome(grant, **numbers)))


def test_more_steps_that_break_less(lab: Any) -> None:
    insights = Insights(lab.database)
    ten, forty = (lab.submit(attack={**STEPS, "steps": steps}, samples=300) for steps in (10, 40))
    larger = lab.submit(attack={**STEPS, "eps": 0.2}, samples=300)
    restarted = lab.submit(attack={**STEPS, "restarts": 5}, samples=300)
    repeat = lab.submit(attack={**STEPS, "steps": 40}, samples=300, attack_seed=1)
    apart = [  # each differs in more than one thing
        lab.submit(attack={**STEPS, "steps": 40, "eps": 0.2}, samples=300),
        lab.submit(attack={**STEPS, "steps": 40}, samples=299),
        lab.submit(attack={**STEPS, "steps": 40}, samples=300, scale=5),
        lab.submit(attack={**STEPS, "steps": 40}, samples=300, seed=1),
    ]
    same = lab.submit(attack={**STEPS, "steps": 40}, samples=300, user="bob")  # the same number again
    answer(lab, {(0.1, 10, 1): 0.5, (0.1, 40, 1): 0.53, (0.2, 10, 1): 0.51, (0.1, 10, 5): 0.1, (0.2, 40, 1): 0.5})
    [flag] = insights.result(ten)["flags"]
    wanted = {"flag": "not_monotone", "field": "attack.steps", "job_id": forty, "value": 40, "robust_accuracy": 0.53}
    assert flag == {**wanted, "results": 2}
    for job_id in (forty, repeat, same):
        assert [one["job_id"] for one in insights.result(job_id)["flags"]] == [ten]
    for job_id in (larger, restarted, *apart):
        assert insights.result(job_id)["flags"] == []
    flagged = {ten, forty, repeat, same}
    rows = insights.results(Question(limit=100))["items"]
    assert {row["job_id"] for row in rows if row["flags"] == ["not_monotone"]} == flagged
    assert [row["flags"] for row in rows if row["job_id"] not in flagged] == [[]] * 6
    assert insights.results(Question(fields=("flags",), filter=f"job_id = {ten}"))["items"] == [
        {"flags": ["not_monotone"]}
    ]
    assert {row["job_id"] for row in insights.results(Question(filter="flags = not_monotone"))["items"]} == flagged
    assert len(insights.results(Question(filter="flags is null"))["items"]) == 6
    before = [lab.rows(cells), lab.rows(results)]
    assert migrated_again(lab) == before
    for fields in ((), ("job_id", "flags"), ("*",)):  # from columns, and from whole rows
        table = exporting.table(lab.database, Question(fields=fields))
        lines = list(csv.DictReader(io.StringIO("".join(exporting.csv_lines(table)))))
        assert {line["job_id"] for line in lines if line["flags"] == "not_monotone"} == flagged
    assert insights.result(ten)["verdict"] == "trusted"
    for job_id in (forty, repeat):
        retractions.retract(lab.service, job_id, "a bug", user="ann", admin=True)
    assert insights.result(ten)["flags"] == []
    assert insights.results(Question(filter="flags = not_monotone"))["items"] == []
    retractions.restore(lab.service, forty, user="ann", admin=True)
    shown = insights.results(Question(filter="flags = not_monotone"))["items"]
    assert {row["job_id"] for row in shown} == {ten, forty, same}


def migrated_again(lab: Any) -> list[list[Any]]:
    """Cells and results as the migration leaves them that brought threat models and flags."""
    migration = importlib.import_module("service.store.migrations.versions.0015_threat_models")
    with lab.database.write() as connection:
        connection.execute(update(cells).values(threat_model=None, family=""))
        connection.execute(update(results).values(not_monotone=False))
        with Operations.context(MigrationContext.configure(connection)):
            migration._fill()
            migration._flag()
        return [list(connection.execute(select(table).order_by(*table.primary_key))) for table in (cells, results)]


def test_attack_seeds_are_averaged_before_a_flag_is_raised(lab: Any) -> None:
    """One lucky seed of the stronger attack raises none; nor is a network the training that it came from."""
    insights = Insights(lab.database)
    weak = lab.submit(attack=STEPS, samples=300)
    strong = [lab.submit(attack={**STEPS, "steps": 40}, samples=300, attack_seed=seed) for seed in (0, 1)]
    again = lab.submit(attack={**STEPS, "steps": 80}, samples=300, replicate=1)  # whose training gives equal weights
    left = {(10, 0): 0.5, (40, 0): 0.53, (40, 1): 0.41, (80, 0): 0.6}
    while grants := lab.grant():
        for grant in grants:
            outcome = lab.outcome(grant)
            if grant.spec["kind"] == "train":
                outcome = replace(outcome, artifacts=(lab.artifacts.write_chunks("checkpoint", [b"equal weights"]),))
            if grant.spec["kind"] == "attack":
                attack = grant.spec["attack"]
                outcome.numbers["robust_accuracy"] = left[attack["steps"], grant.spec["attack_seed"]]
            lab.record(Succeeded(grant.task_id, grant.attempt, outcome))
    flags = {job_id: insights.result(job_id)["flags"] for job_id in (weak, *strong, again)}
    assert [flag["job_id"] for flag in flags[weak]] == [again]
    assert [flag["robust_accuracy"] for flag in flags[again]] == [0.5, pytest.approx(0.47)]
    assert flags[strong[0]] == flags[strong[1]] == [
        {"flag": "not_monotone", "field": "attack.steps", "job_id": again, "value": 80, "robust_accuracy": 0.6,
         "results": 1}
    ]  # fmt: skip


def test_a_flag_at_another_scale_is_seen_where_its_attack_counts(lab: Any) -> None:
    """The board is of s = 1, and its worst cases are over the attacks at s = 5 too."""
    plain = lab.submit(attack=STEPS, samples=300)
    for steps in (10, 40):
        lab.submit(attack={**STEPS, "steps": steps}, samples=300, scale=5)
    while grants := lab.grant():
        for grant in grants:
            numbers = {}
            if grant.spec["kind"] == "attack":
                more = grant.spec["scale"] == 5 and grant.spec["attack"]["steps"] == 40
                numbers = {"robust_accuracy": 0.6 if more else 0.5}
            lab.record(Succeeded(grant.task_id, grant.attempt, lab.outcome(grant, **numbers)))
    result = Insights(lab.database).result(plain)
    assert (result["flags"], result["worst_case"]["flags"]) == ([], ["not_monotone"])
    [board] = leaderboard.leaderboard(lab.database, [], trusted=False)
    assert [row["flags"] for row in board["rows"]] == [["not_monotone"]]
    assert [row["flags"] for row in worst_case.of_networks(lab.database, [])] == [["not_monotone"]]


@pytest.mark.parametrize(("n", "rise", "flagged"), [(1000, 0.02, False), (1000, 0.021, True), (50, 0.06, False)])
@pytest.mark.parametrize("field", ["attack.eps", "attack.steps", "attack.restarts", "attack.attack.eps"])
def test_the_threshold(n: int, rise: float, flagged: bool, field: str) -> None:
    weak, strong = (Mean("network", i, "family", 0.3 + i * rise, results=1, job_id=str(i)) for i in (0, 1))
    specs = {i: {"samples": n, "scale": 1.0, field: 1 + i} for i in (0, 1)}
    assert bool(not_monotone(weak, [strong], specs)) == bool(not_monotone(strong, [weak], specs)) == flagged
    strong = strong._replace(robust_accuracy=0.3 - rise)
    assert not_monotone(weak, [strong], specs) == not_monotone(strong, [weak], specs) == []
    specs[1]["scale"] = 5.0
    strong = strong._replace(robust_accuracy=0.9)
    assert not_monotone(weak, [strong], specs) == []
    strong = strong._replace(robust_accuracy=None)
    assert not_monotone(weak, [strong], {**specs, 1: {**specs[1], "scale": 1.0}}) == []
