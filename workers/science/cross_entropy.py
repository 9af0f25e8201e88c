"""Cross-entropy for logits of any size: nothing cancels and nothing underflows before it must (README.md, "Sharpness").

With the log odds `g = logsumexp_{j != y} z_j - z_y` the loss is `softplus(g) = log(1 + exp g)`, `1 - p_y = sigmoid(g)`,
and the gradient `sigmoid(g) grad g`. From a margin of 37 on, `1 - p_y` computed from p_y is exactly 0 in float64;
`sigmoid(g)` and its logarithm are exact to the last bits at any margin.
"""

import math

import torch
from torch import Tensor


def log_odds(logits: Tensor, classes: Tensor) -> Tensor:
    """`g = logsumexp_{j != c} z_j - z_c` `[n]` of `logits [n, k >= 2]` and `classes [n]`.

    >>> log_odds(torch.tensor([[98.0, 0.0]]), torch.tensor([0])).item()
    -98.0
    """
    return others(logits, classes).logsumexp(1) - at(logits, classes)


def at(logits: Tensor, classes: Tensor) -> Tensor:
    """`z_c` `[n]` of `logits [n, k]` and `classes [n]`."""
    return logits.gather(1, classes[:, None])[:, 0]


def others(logits: Tensor, classes: Tensor) -> Tensor:
    """`logits [n, k]` with -inf in the place of `classes [n]`: what is left for a maximum, a sum or a softmax."""
    return logits.scatter(1, classes[:, None], -math.inf)


def softplus(x: Tensor) -> Tensor:
    """`log(1 + exp x)`; torch's own is linear from 20 on."""
    return torch.logaddexp(x, torch.zeros_like(x))


def log_sigmoid(x: Tensor) -> Tensor:
    """`log(1 / (1 + exp(-x)))`; of log odds, `log(1 - p_y)`. Exact values and derivatives on both sides."""
    return -softplus(-x)


def log_softplus(x: Tensor) -> Tensor:
    """`log(softplus(x))`: the log loss of log odds, also where the loss is below what float64 holds."""
    return torch.where(x < -40, x, softplus(x.clamp(min=-40)).log())


def log_cost(before: Tensor, rise: Tensor) -> Tensor:
    """`log(softplus(before + rise) - softplus(before))` of log odds and their rise >= 0, both `[...]`.

    The difference is `softplus(u)` with `u = log sigmoid(before) + log(exp rise - 1)`: nothing is subtracted, so the
    relative error is that of `rise`, however small.
    """
    return log_softplus(log_sigmoid(before) + rise + (-torch.expm1(-rise)).log())


def log_increase(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """`softplus(after) - softplus(before)` of log odds `[...]`, as its sign and the logarithm of its size.

    Two almost equal losses are never subtracted: the relative error is that of `after - before`.
    """
    rise = after - before
    return rise.sign(), log_cost(torch.minimum(before, after), rise.abs())


def loss_increase(before: Tensor, after: Tensor) -> Tensor:
    """`softplus(after) - softplus(before)` of log odds `[...]`, without cancellation.

    >>> before, after = torch.tensor([-98.0, -97.0], dtype=torch.float64)
    >>> round(float(loss_increase(before, after) / before.exp()), 12)  # e - 1
    1.718281828459
    """
    sign, log_size = log_increase(before, after)
    return sign * log_size.exp()


def mean_increase(before: Tensor, after: Tensor) -> tuple[float, float | None]:
    """Mean of `loss_increase`, and its logarithm: null for a mean that is not positive.

    The mean is 0.0 if it is below what float64 holds (1e-308); the logarithm is a number also then.
    """
    sign, log_size = log_increase(before, after)
    largest = float(log_size.max())
    if largest == -math.inf:
        return 0.0, None
    mean = float((sign * (log_size - largest).exp()).mean())
    return mean * math.exp(largest), math.log(mean) + largest if mean > 0 else None
