"""Flags across the history, on SQLite and on PostgreSQL: found in both results, and never part of a verdict."""

from types import SimpleNamespace
from typing import Any

import pytest

from service import retraction
from service.executor import Succeeded
from service.flags import not_monotone
from service.insights import Insights

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
    apart = [  # each differs in more than one thing
        lab.submit(attack={**STEPS, "steps": 40, "eps": 0.2}, samples=300),
        lab.submit(attack={**STEPS, "steps": 40}, samples=299),
        lab.submit(attack={**STEPS, "steps": 40}, samples=300, scale=5),
        lab.submit(attack={**STEPS, "steps": 40}, samples=300, attack_seed=1),
        lab.submit(attack={**STEPS, "steps": 40}, samples=300, seed=1),
    ]
    lab.submit(attack={**STEPS, "steps": 40}, samples=300, user="bob")  # the same number again
    answer(lab, {(0.1, 10, 1): 0.5, (0.1, 40, 1): 0.53, (0.2, 10, 1): 0.51, (0.1, 10, 5): 0.1, (0.2, 40, 1): 0.5})
    [flag] = insights.result(ten)["flags"]
    wanted = {"flag": "not_monotone", "field": "attack.steps", "job_id": forty, "value": 40, "robust_accuracy": 0.53}
    assert flag == wanted
    assert [one["job_id"] for one in insights.result(forty)["flags"]] == [ten]
    for job_id in (larger, restarted, *apart):
        assert insights.result(job_id)["flags"] == []
    assert insights.result(ten)["verdict"] == "trusted"
    retraction.retract(lab.service, forty, "a bug", user="ann", admin=True)
    assert insights.result(ten)["flags"] == []


@pytest.mark.parametrize(("n", "rise", "flagged"), [(1000, 0.02, False), (1000, 0.021, True), (50, 0.06, False)])
@pytest.mark.parametrize("field", ["attack.eps", "attack.steps", "attack.restarts", "attack.attack.eps"])
def test_the_threshold(n: int, rise: float, flagged: bool, field: str) -> None:
    weak, strong = (SimpleNamespace(job_id=str(i), cell_id=i, robust_accuracy=0.3 + i * rise) for i in (0, 1))
    specs = {i: {"samples": n, "scale": 1.0, field: 1 + i} for i in (0, 1)}
    assert bool(not_monotone(weak, [strong], specs)) == bool(not_monotone(strong, [weak], specs)) == flagged
    strong.robust_accuracy = 0.3 - rise
    assert not_monotone(weak, [strong], specs) == not_monotone(strong, [weak], specs) == []
    specs[1]["scale"] = 5.0
    strong.robust_accuracy = 0.9
    assert not_monotone(weak, [strong], specs) == []
    strong.robust_accuracy = None
    assert not_monotone(weak, [strong], {**specs, 1: {**specs[1], "scale": 1.0}}) == []
