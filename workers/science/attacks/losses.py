"""The losses that an attack climbs (README.md, "Attacks"), per example, from float32 logits.

All take `logits [n, k]`, `y [n]` and the scale `s` of the head, and give `[n]`. Higher is nearer to a wrong class.
Targeted, an attack climbs minus the loss at the target; only `dlr` has a targeted form of its own.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from workers.science.cross_entropy import at, log_odds, others
from workers.science.errors import WrongShape

Loss = Callable[[Tensor, Tensor, float], Tensor]


def cross_entropy(logits: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """Plain cross-entropy in the logits' own precision, as the field runs it: it underflows for confident logits.

    >>> bool(cross_entropy(torch.tensor([[200.0, 0.0]]), torch.tensor([0])) == 0)
    True
    """
    return functional.cross_entropy(logits, y, reduction="none")


def stable_cross_entropy(logits: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """`logsumexp_{j != y} z_j - z_y`: the gradient is that of cross-entropy divided by `1 - p_y`, without underflow.

    >>> stable_cross_entropy(torch.tensor([[200.0, 0.0]]), torch.tensor([0])).item()
    -200.0
    """
    return log_odds(logits, y)


def rescaled_cross_entropy(logits: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """Cross-entropy of the logits divided by the scale `s` of the head: the loss of the unscaled network."""
    return functional.cross_entropy(logits / scale, y, reduction="none")


def margin(logits: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """`max_{j != y} z_j - z_y` (Carlini & Wagner 2017): positive exactly where misclassified, up to ties."""
    return others(logits, y).amax(1) - at(logits, y)


def dlr(logits: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """Difference of logits ratio, `(max_{j != y} z_j - z_y) / (z_(1) - z_(3))` (Croce & Hein 2020, eq. 6); k >= 3."""
    if logits.shape[1] < 3:
        raise WrongShape("the dlr loss needs at least 3 classes")
    top = logits.topk(3, dim=1)
    best_wrong = torch.where(top.indices[:, 0] == y, top.values[:, 1], top.values[:, 0])
    return (best_wrong - at(logits, y)) / (top.values[:, 0] - top.values[:, 2] + 1e-12)


def targeted_dlr(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """`(z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)` (Croce & Hein 2020, eq. 7); k >= 4."""
    if logits.shape[1] < 4:
        raise WrongShape("the targeted dlr loss needs at least 4 classes")
    top = logits.topk(4, dim=1).values
    return (at(logits, target) - at(logits, y)) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12)


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "stable_cross_entropy": stable_cross_entropy,
    "rescaled_cross_entropy": rescaled_cross_entropy,
    "margin": margin,
    "dlr": dlr,
}


def objective(name: str, y: Tensor, scale: float, target: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """The function of the logits `[n, k]` that an attack climbs; with `target [n]`, towards that class."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; there are {', '.join(LOSSES)}")
    loss = LOSSES[name]
    if target is None:
        return lambda logits: loss(logits, y, scale)
    if name == "dlr":
        return lambda logits: targeted_dlr(logits, y, target)
    return lambda logits: -loss(logits, target, scale)
