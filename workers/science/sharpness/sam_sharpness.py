"""SAM sharpness: the loss after one normalised ascent step on the weights (Foret et al. 2021, m-sharpness).

`mean over batches B of m:  L_B(w + rho g / ||g||) - L_B(w)`,  g the gradient of L_B over all parameters.
"""

import torch
from torch import nn

from workers.science.cross_entropy import mean_increase
from workers.science.curvature import (
    Parameters,
    batches,
    log_odds_of,
    loss_direction,
    of_unit_norm,
    parameters_of,
)
from workers.science.sharpness.base import MeasureInput, MeasureReport


def sam_sharpness(
    model: nn.Module,
    inputs: MeasureInput,
    *,
    rho: float = 0.05,
    m: int = 128,
    images: int = 1024,
) -> MeasureReport:
    """`sam_sharpness` on unaugmented training images; `rho` in units of the l2 norm of all weights, `m` images each.

    `log_sam_sharpness` is its logarithm: null if the loss does not rise, a number if the rise is below 1e-308.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    >>> x, y = torch.rand(8, 1, 1, 1), torch.tensor([0, 1] * 4)
    >>> sam_sharpness(net, MeasureInput(x, y, x, y)).numbers["sam_sharpness"] > 0
    True
    """
    unit = {name: torch.ones_like(p) for name, p in parameters_of(model).items()}
    rise, log_rise = one_step(model, inputs, unit, rho=rho, m=m, images=images)
    return MeasureReport({"sam_sharpness": rise, "log_sam_sharpness": log_rise})


def one_step(
    model: nn.Module, inputs: MeasureInput, T: Parameters, *, rho: float, m: int, images: int
) -> tuple[float, float | None]:
    """Mean loss increase of the step `rho T^2 g / ||T g||`, the best one of `||delta / T|| <= rho` to first order, and
    its logarithm (null if it is not positive).

    On the first training `images`, `m` in each batch. `T` by parameter, as large as it; a batch whose gradient is
    exactly zero does not move. Exact at any confidence: the step is normalised before it is scaled, and the two losses
    are never subtracted.
    """
    if rho < 0 or m < 1:
        raise ValueError("rho must not be negative, m at least 1")
    x, y = inputs.train(images)
    parameters, batch_size = parameters_of(model), inputs.batch_size
    before, after, done = [], [], 0
    for xb, yb in batches(x, y, m):
        g = loss_direction(model, parameters, xb, yb, batch_size)
        step = of_unit_norm({name: T[name] * gradient for name, gradient in g.items()})
        moved = {name: p + rho * T[name] * step[name] for name, p in parameters.items()}
        before.append(log_odds_of(model, parameters, xb, yb, batch_size))
        after.append(log_odds_of(model, moved, xb, yb, batch_size))
        done += len(xb)
        inputs.report(done, len(x))
    return mean_increase(torch.cat(before), torch.cat(after))
