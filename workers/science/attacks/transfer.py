"""Transfer: examples made on another network, or at another scale, and judged on this one."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from workers.science.attacks.base import (
    AttackOutput,
    Observer,
    OnProgress,
    look,
    misclassified,
    per_example,
    refuse_observer,
)
from workers.science.attacks.pgd import pgd


def transfer(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    index: Tensor,
    source: nn.Module,
    source_attack: Callable[..., AttackOutput] = pgd,
    attack_seed: int = 0,
    observer: Observer | None = None,
    on_progress: OnProgress | None = None,
    scale: float = 1.0,
    **params: object,
) -> AttackOutput:
    """`source_attack` with `params` on `source`, whose head's scale is `scale`; only its examples are judged here.

    `zero_gradient` and `gradient_calls` are the source's. Raises `ValueError` for an observer, else as the attack.
    """
    refuse_observer(observer, "transfer")
    made = source_attack(
        source, x, y, index=index, attack_seed=attack_seed, on_progress=on_progress, scale=scale, **params
    )
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
