"""TRADES (Zhang et al. 2019): cross-entropy plus beta times how far attacked predictions diverge."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from workers.science.recipes.common import BatchNoise, LossAndLogits, eval_mode, pgd_linf


def loss(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    noise: BatchNoise,
    /,
    beta: float,
    eps: float,
    step_size: float,
    steps: float,
    start_std: float,
) -> LossAndLogits:
    """`CE(f(x), y) + beta mean_i KL(p(x_i) || p(x'_i))`.

    x' maximises the KL by PGD-linf in eval mode, from `x + start_std N(0, 1)`. Both terms send gradients through f(x).
    """
    with torch.no_grad(), eval_mode(model):
        log_clean = log_softmax(model(x).float(), 1)
    start = x + start_std * noise.normal(x)
    x_adv = pgd_linf(
        model, x, start, lambda logits: _divergence(log_clean, logits), eps=eps, step_size=step_size, steps=int(steps)
    )
    logits = model(x)
    divergence = _divergence(log_softmax(logits.float(), 1), model(x_adv)) / len(x)
    return cross_entropy(logits.float(), y) + beta * divergence, logits


def _divergence(log_p: Tensor, logits: Tensor) -> Tensor:
    """`sum_i KL(p_i || softmax(logits_i))`."""
    return kl_div(log_softmax(logits.float(), 1), log_p, reduction="sum", log_target=True)
