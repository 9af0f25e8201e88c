"""Adversarial training (Madry et al. 2018): cross-entropy on PGD-linf examples only, attacked in eval mode."""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from workers.science.recipes.common import BatchNoise, LossAndLogits, pgd_linf


def loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    noise: BatchNoise,
    /,
    eps: float,
    step_size: float,
    steps: float,
) -> LossAndLogits:
    """`steps` steps of `step_size` in the box of half-width `eps`, from a uniform random start in it, as Madry et al.

    Training accuracy is then that on the adversarial examples.
    """
    x_adv = pgd_linf(
        model,
        x,
        (x + eps * (noise.uniform(x) * 2 - 1)).clamp(0, 1),
        lambda logits: cross_entropy(logits.float(), y, reduction="sum"),
        eps=eps,
        step_size=step_size,
        steps=int(steps),
    )
    logits = model(x_adv)
    return cross_entropy(logits.float(), y), logits
