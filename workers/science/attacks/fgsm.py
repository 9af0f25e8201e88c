"""The fast gradient sign method (Goodfellow et al. 2015): one PGD step of size eps."""

from torch import nn

from workers.science.attacks.base import AttackInput, AttackOutput
from workers.science.attacks.pgd import pgd


def fgsm(
    model: nn.Module,
    inputs: AttackInput,
    *,
    norm: str = "linf",
    eps: float = 8 / 255,
    loss: str = "cross_entropy",
    targeted: bool = False,
) -> AttackOutput:
    """`clip(x_0 + eps * normalize(gradient))`; parameters, errors and observer as `pgd`'s. Nothing is random."""
    return pgd(model, inputs, norm=norm, eps=eps, step_size=eps, steps=1, loss=loss, targeted=targeted)
