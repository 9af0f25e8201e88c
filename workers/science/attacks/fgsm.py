"""The fast gradient sign method (Goodfellow et al. 2015): one PGD step of size eps."""

from torch import Tensor, nn

from workers.science.attacks.base import AttackOutput, Observer, OnProgress
from workers.science.attacks.pgd import pgd


def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    index: Tensor,
    attack_seed: int = 0,
    observer: Observer | None = None,
    on_progress: OnProgress | None = None,
    norm: str = "linf",
    eps: float = 8 / 255,
    loss: str = "cross_entropy",
    scale: float = 1.0,
    targeted: bool = False,
) -> AttackOutput:
    """`clip(x_0 + eps * normalize(gradient))`; parameters, errors and observer as `pgd`'s. Nothing is random."""
    return pgd(
        model,
        x,
        y,
        index=index,
        attack_seed=attack_seed,
        observer=observer,
        on_progress=on_progress,
        norm=norm,
        eps=eps,
        step_size=eps,
        steps=1,
        loss=loss,
        scale=scale,
        targeted=targeted,
    )
