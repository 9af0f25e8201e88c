"""Fisher-Rao norm, without its constant for the depth: `E[<p - e_y, z>^2]` (Liang et al. 2019, eq. for cross-entropy).

`<p - e_y, z> = (1 - p_y) sum_{j != y} q_j (z_j - z_y)` with `q_j = p_j / (1 - p_y)`: it does not cancel for confident
logits, and the first factor is known in the log domain.
"""

import math

import torch
from torch import nn

from workers.science.closed_forms import Head
from workers.science.cross_entropy import log_odds, log_sigmoid, others
from workers.science.curvature import batches
from workers.science.errors import NonFinite
from workers.science.heads import features_and_logits, linear_head
from workers.science.sharpness.base import MeasureInput, MeasureReport
from workers.science.summaries import log_mean


@torch.no_grad()
def fisher_rao(
    model: nn.Module,
    inputs: MeasureInput,
    *,
    images: int = 1024,
) -> MeasureReport:
    """`fisher_rao` and `log_fisher_rao` on training images, float64 from the features on. The logarithm is null for an
    exact zero, and a number if the value is below what float64 holds.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    >>> with torch.no_grad(): _ = net[1].weight.zero_(), net[1].bias.copy_(torch.tensor([2.0, 0.0]))
    >>> x, y = torch.ones(1, 1, 1, 1), torch.tensor([1])
    >>> round(fisher_rao(net, MeasureInput(x, y, x, y)).numbers["fisher_rao"], 6)  # (2 sigmoid(2))^2
    3.103214
    """
    x, y = inputs.train(images)
    layer = linear_head(model)
    head = Head(layer.weight, layer.bias)
    log_squares, done = [], 0
    for xb, yb in batches(x, y, inputs.batch_size):
        z = head.logits(features_and_logits(model, xb)[0])
        gap = (others(z, yb).softmax(1) * (z - z.gather(1, yb[:, None]))).sum(1)
        log_squares.append(2 * (log_sigmoid(log_odds(z, yb)) + gap.abs().log()))
        done += len(xb)
        inputs.report(done, len(x))
    values = torch.cat(log_squares)
    if not bool((values < math.inf).all()):
        raise NonFinite("features or logits are NaN or infinite")
    log_value = log_mean(values)
    return MeasureReport({"fisher_rao": 0.0 if log_value is None else math.exp(log_value), "log_fisher_rao": log_value})
