"""Carlini & Wagner (2017), l2: a small perturbation that is misclassified with confidence, by Adam in tanh space."""

import torch
from torch import nn

from workers.science.attacks.base import (
    AttackInput,
    AttackOutput,
    Outcomes,
    misclassified,
    per_example,
    show,
    take_gradient,
)
from workers.science.attacks.losses import margin

INSIDE = 1 - 1e-6
"""Pixels go to tanh space through atanh(INSIDE * (2 x - 1)), which is finite for black and white too."""


def cw(
    model: nn.Module,
    inputs: AttackInput,
    *,
    c: float = 10.0,
    kappa: float = 20.0,
    lr: float = 0.01,
    steps: int = 25,
) -> AttackOutput:
    """Minimises `||x' - x||^2 + c max(z_y - max_{j != y} z_j, -kappa)` over `x' = (tanh w + 1) / 2`; nothing is random.

    There is no ball: the judged example is the misclassified iterate nearest to x (l2), else the last iterate, and
    its size is a number of the report. `kappa` is in units of logits, so it means less the larger the head's scale.
    `c` is fixed (no binary search), and there is no early stop on the batch's cost. Errors as in `pgd`.
    """
    if steps < 1 or c < 0 or kappa < 0 or lr <= 0:
        raise ValueError("cw needs steps >= 1, c >= 0, kappa >= 0 and lr > 0")
    x, y, observer = inputs.x.detach(), inputs.y, inputs.observer
    outcomes = Outcomes(x)
    w = torch.atanh(INSIDE * (2 * x - 1)).requires_grad_()
    adam = torch.optim.Adam([w], lr=lr)
    everyone = torch.arange(len(x), device=x.device)
    nearest = torch.full((len(x),), torch.inf, device=x.device, dtype=x.dtype)
    last = x
    outcomes.classify(model, y)
    for t in range(steps + 1):
        with torch.enable_grad():
            candidate = (torch.tanh(w) + 1) / 2
        last = candidate.detach()
        confidence = lambda logits: -c * margin(logits, y).clamp_max(kappa)  # noqa: E731
        step = take_gradient(model, last, confidence, with_features=observer is not None)
        outcomes.count(everyone, step)
        show(observer, t, last, step.phi, step.logits)
        wrong = misclassified(step.logits, y)
        outcomes.broken_any |= wrong
        outcomes.broken |= wrong
        squared = (last - x).square().flatten(1).sum(1)
        nearer = wrong & (squared < nearest)
        nearest = torch.where(nearer, squared, nearest)
        outcomes.x_adv = torch.where(per_example(nearer, x), last, outcomes.x_adv)
        if t < steps:
            (w.grad,) = torch.autograd.grad(candidate, w, step.gradient + 2 * (last - x))
            adam.step()
        inputs.report(t, steps)
    outcomes.keep(everyone, last)
    return outcomes.output("l2", None)
