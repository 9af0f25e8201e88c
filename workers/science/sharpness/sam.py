"""SAM sharpness: the loss after one normalised ascent step on the weights (Foret et al. 2021, m-sharpness).

`mean over batches B of m:  L_B(w + rho g / ||g||) - L_B(w)`,  g the gradient of L_B over all parameters.
"""

import torch
from torch import Tensor, nn

from workers.science.curvature import Parameters, batches, loss_gradient, mean_loss, parameters_of
from workers.science.sharpness.base import MeasureReport, OnProgress, first, no_progress


def sam_sharpness(
    model: nn.Module,
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    seed: int,
    batch_size: int,
    on_progress: OnProgress | None = None,
    rho: float = 0.05,
    m: int = 128,
    images: int = 1024,
) -> MeasureReport:
    """`sam_sharpness` on unaugmented training images; `rho` in units of the l2 norm of all weights, `m` images each.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    >>> x, y = torch.rand(8, 1, 1, 1), torch.tensor([0, 1] * 4)
    >>> sam_sharpness(net, x, y, x, y, seed=0, batch_size=8).numbers["sam_sharpness"] > 0
    True
    """
    x, y = first(train_x, train_y, images)
    unit = {name: torch.ones_like(p) for name, p in parameters_of(model).items()}
    return MeasureReport({"sam_sharpness": one_step(model, x, y, unit, rho, m, batch_size, on_progress)})


def one_step(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    T: Parameters,
    rho: float,
    m: int,
    batch_size: int,
    on_progress: OnProgress | None,
) -> float:
    """Mean loss increase of the step `rho T^2 g / ||T g||`, the best one of `||delta / T|| <= rho` to first order.

    `T` by parameter, as large as it; a batch whose gradient is exactly zero does not move.
    """
    if rho < 0 or m < 1:
        raise ValueError("rho must not be negative, m at least 1")
    parameters = parameters_of(model)
    total, done = 0.0, 0
    for xb, yb in batches(x, y, m):
        g = loss_gradient(model, parameters, xb, yb, batch_size)
        size = float(torch.stack([(T[n] * g[n]).double().square().sum() for n in g]).sum().sqrt())
        step = rho / size if size > 0 else 0.0
        moved = {n: p + step * T[n].square() * g[n] for n, p in parameters.items()}
        before, after = (mean_loss(model, p, xb, yb, batch_size) for p in (parameters, moved))
        total += (after - before) * len(xb)
        done += len(xb)
        (on_progress or no_progress)(done, len(x))
    return total / len(x)
