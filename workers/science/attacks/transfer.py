"""Transfer: examples made on another network, or at another scale, and judged on this one."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from workers.science.attacks.base import (
    AttackInput,
    AttackOutput,
    look,
    misclassified,
    per_example,
    refuse_observer,
)
from workers.science.attacks.pgd import pgd


def transfer(
    model: nn.Module,
    inputs: AttackInput,
    *,
    source: nn.Module,
    source_attack: Callable[..., AttackOutput] = pgd,
    source_scale: float = 1.0,
    **params: object,
) -> AttackOutput:
    """`source_attack` with `params` on `source`, a network whose linear head has the scale `source_scale`.

    Only the examples that it makes are judged here. `zero_gradient` and `gradient_calls` are the source's.
    Raises `ValueError` for an observer, else as the attack.
    """
    refuse_observer(inputs, "transfer")
    x, y = inputs.x, inputs.y
    made = source_attack(source, replace(inputs, scale=source_scale), **params)
    clean, judged = look(model, x)[1], look(model, made.x_adv)[1]
    non_finite = made.non_finite | ~torch.isfinite(clean + judged).all(1)
    broken = misclassified(clean, y) | misclassified(judged, y) | non_finite
    return replace(
        made,
        x_adv=torch.where(per_example(non_finite, x), x, made.x_adv),
        broken=broken,
        broken_any_iterate=broken,
        zero_gradient=None if made.zero_gradient is None else made.zero_gradient & ~non_finite,
        non_finite=non_finite,
        forward_calls=made.forward_calls + 2 * len(x),
    )
