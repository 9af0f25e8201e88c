"""AutoAttack (Croce & Hein 2020), the standard ensemble: each member attacks what the others before it left robust.

A re-implementation of `fra31/auto-attack` 0.1 (commit a392200), `version="standard"`, not the original code: the same
members, budgets and order. It differs in the random numbers, which each example has of its own, and in the points that
`apgd`, `fab` and `square` name.
It is compared with the authors' code image by image (`tests/numerics/test_autoattack_original.py`).
"""

from collections.abc import Callable
from dataclasses import replace

from torch import nn

from workers.science.attacks.apgd import apgd
from workers.science.attacks.base import (
    AttackInput,
    AttackOutput,
    OnProgress,
    Outcomes,
    refuse_observer,
)
from workers.science.attacks.fab import fab
from workers.science.attacks.norms import geometry
from workers.science.attacks.square import square


def autoattack(
    model: nn.Module,
    inputs: AttackInput,
    *,
    norm: str = "linf",
    eps: float = 8 / 255,
    steps: int = 100,
    targets: int = 9,
    queries: int = 5000,
) -> AttackOutput:
    """APGD on cross-entropy, APGD on the targeted dlr loss, targeted FAB, square; one restart each; k >= 4 classes.

    `steps` of the first three, `targets` the number of target classes (at most k - 1), `queries` of square. The
    defaults are the published standard. `zero_gradient` is that of the first member. It has no trajectory: raises
    `ValueError` for an observer, `WrongShape` for k < 4; other errors as in `pgd`.
    """
    refuse_observer(inputs, "autoattack")
    geometry(norm)
    x, y = inputs.x.detach(), inputs.y
    members: list[Callable[..., AttackOutput]] = [apgd, apgd, fab, square]
    params: list[dict[str, object]] = [
        {"steps": steps, "loss": "cross_entropy"},
        {"steps": steps, "loss": "dlr", "targeted": True, "targets": targets},
        {"steps": steps, "targets": targets},
        {"queries": queries},
    ]
    outcomes = Outcomes(x, takes_gradients=False)
    outcomes.classify(model, y)
    for stage, (member, its) in enumerate(zip(members, params, strict=True)):
        alive = outcomes.robust() if stage else (~outcomes.broken).nonzero().squeeze(1)
        if len(alive):
            left = replace(inputs.at(alive), on_progress=_share_of(inputs.on_progress, stage, len(members)))
            output = member(model, left, norm=norm, eps=eps, **its)
            outcomes.gradient_calls += output.gradient_calls
            outcomes.forward_calls += output.forward_calls
            outcomes.lose(alive, output.non_finite)
            if stage == 0:
                outcomes.zero_gradient = output.zero_gradient
                outcomes.keep(alive, output.x_adv)
            outcomes.see(alive, output.x_adv, output.broken, judged=True)
        inputs.report((stage + 1) * RESOLUTION, len(members) * RESOLUTION)
    return outcomes.output(norm, eps)


RESOLUTION = 1000
"""Steps of progress that each member is reported as."""


def _share_of(on_progress: OnProgress | None, stage: int, stages: int) -> OnProgress | None:
    if on_progress is None:
        return None
    return lambda step, steps: on_progress(stage * RESOLUTION + step * RESOLUTION // steps, stages * RESOLUTION)
