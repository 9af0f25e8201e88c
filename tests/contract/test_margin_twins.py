"""Which margin twin a verdict looks at: from the panel's bits in the store to the result."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from service.model.executor import Bits, Outcome, Succeeded
from service.results.insights import Insights
from service.results.questions import Question

N, PANEL = 300, 256  # images that are attacked, and those of them that the panel runs on
CLEAN_WRONG = range(4)
BROKEN_AT_ONE = range(250, 300)  # by the attack itself at s = 1; at s = 5 it breaks nothing
BROKEN_BY_PANELS_MARGIN, BROKEN_BY_TWIN = range(10), range(30)
BY_PANELS_MARGIN, BY_TWIN, BY_ITSELF = [6 + 6, PANEL], [26 + 6, PANEL], [50, N]

WALK = {"norm": "linf", "eps": 0.1, "step_size": 0.03, "steps": 4}
PGD, BALL = {"type": "pgd", **WALK}, {"norm": "linf", "eps": 0.1}
APGD = {"type": "apgd", **BALL, "steps": 10}
MASKED: list[tuple[dict[str, Any], list[int] | None]] = [
    (PGD, BY_PANELS_MARGIN),
    ({**PGD, "loss": "stable_cross_entropy"}, BY_PANELS_MARGIN),
    ({**PGD, "precision": "bf16"}, BY_PANELS_MARGIN),
    ({**PGD, "restarts": 3}, BY_TWIN),
    ({**PGD, "random_start": True}, BY_TWIN),
    ({**PGD, "judge": "any_step"}, BY_TWIN),
    ({**PGD, "targeted": True}, BY_TWIN),
    (APGD, BY_TWIN),
    ({**APGD, "loss": "dlr"}, BY_TWIN),
    ({"type": "fgsm", **BALL}, BY_ITSELF),
    ({"type": "autoattack", **BALL}, BY_ITSELF),
    ({"type": "cw"}, BY_ITSELF),
    ({"type": "noise", "kind": "uniform", **BALL}, None),
    ({"type": "square", **BALL}, None),
    ({"type": "transfer", "attack": PGD}, None),
    ({"type": "transfer", "attack": APGD}, None),
]
"""For each attack `[masked, of how many]`, or None where nothing can be masked."""


def all_but(n: int, broken: Iterable[int]) -> Bits:
    robust = np.ones(n, bool)
    robust[[place for place in broken if place < n]] = False
    return Bits(n, np.packbits(robust).tobytes())


def finish(lab: Any) -> None:
    """Every panel leaves both kinds of bits, whether it was asked for a twin or not: who judges must choose."""

    def answer(grant: Any) -> Outcome:
        outcome: Outcome = lab.outcome(grant)
        bits = {**outcome.bits}
        if grant.spec["kind"] == "attack":
            bits["clean_correct"] = all_but(N, CLEAN_WRONG)
            broken_here = BROKEN_AT_ONE if grant.spec["scale"] == 1 else ()
            bits["robust"] = all_but(N, [*CLEAN_WRONG, *broken_here])
        elif grant.spec["kind"] == "control":
            bits["robust_margin"] = all_but(PANEL, BROKEN_BY_PANELS_MARGIN)
            bits["robust_twin"] = all_but(PANEL, BROKEN_BY_TWIN)
        return replace(outcome, bits=bits)

    while grants := lab.grant():
        lab.record(*(Succeeded(grant.task_id, grant.attempt, answer(grant)) for grant in grants))


def judged(lab: Any, **more: Any) -> dict[str, dict[str, Any]]:
    """The result of each attack at s = 5, by the attack as it was asked for."""
    asked_for = {lab.submit(samples=N, scale=5, attack=attack, **more): str(attack) for attack, _ in MASKED}
    finish(lab)
    rows = Insights(lab.database).results(Question(limit=100))["items"]
    return {asked_for[row["job_id"]]: row for row in rows}


def test_each_attack_is_judged_by_its_own_twin(lab: Any) -> None:
    rows = judged(lab)
    for attack, masked in MASKED:
        row = rows[str(attack)]
        assert row["verdict_counts"].get("masked") == masked, attack
        assert row["masked_n"] == (masked and masked[1]), attack
        assert row["masked_fraction"] == (masked and masked[0] / masked[1]), attack
        assert (row["verdict_checks"]["masked"] == "not_checked") == (masked is None), attack
        if masked in (BY_PANELS_MARGIN, BY_TWIN):  # a twin is planned where the verdict looks at one
            panel = lab.task(lab.job(row["job_id"]).control_task_id)
            assert (panel.spec["twin"] is not None) == (masked is BY_TWIN), attack


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_panel_at_one_says_nothing_of_a_head_whose_bias_was_left_alone(lab: Any) -> None:
    rows = judged(lab, scale_bias=False)
    for attack, masked in MASKED:
        assert rows[str(attack)]["verdict_counts"].get("masked") == (masked and BY_ITSELF), attack
