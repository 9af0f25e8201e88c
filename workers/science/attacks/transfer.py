"""Transfer: examples made on another network, or at another scale, and judged on this one."""

from collections.abc import Callable

from torch import Tensor, nn

from workers.science.attacks.base import AttackOutput, Observer, OnProgress, look, misclassified, refuse_observer
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
    clean_wrong = misclassified(look(model, x)[1], y)
    broken = clean_wrong | misclassified(look(model, made.x_adv)[1], y)
    forward_calls = made.forward_calls + 2 * len(x)
    return AttackOutput(
        made.x_adv, broken, broken, made.zero_gradient, made.gradient_calls, forward_calls, made.norm, made.eps
    )
