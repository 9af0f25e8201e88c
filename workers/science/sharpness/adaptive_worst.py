"""Worst-case adaptive sharpness, with and without logit normalisation (Andriushchenko et al. 2023).

`mean over batches B of m:  max_{|delta_i| <= rho |w_i|} L_B(w + delta) - L_B(w)`, the maximum by Auto-PGD on the
weights (Croce and Hein 2020: momentum 0.75, first step 2 rho, halved at checkpoints without progress), so a lower
estimate.
"""

import math

import torch
from torch import Tensor, nn

from workers.science.cross_entropy import log_softplus, mean_increase
from workers.science.curvature import Parameters, batches, log_odds_of, loss_direction, parameters_of
from workers.science.sharpness.base import MeasureInput, MeasureReport


def adaptive_worst(
    model: nn.Module,
    inputs: MeasureInput,
    *,
    rho: float = 0.002,
    steps: int = 20,
    m: int = 128,
    images: int = 1024,
) -> MeasureReport:
    """`adaptive_worst` and `adaptive_worst_normalised` on unaugmented training images, `m` in each batch;
    `log_adaptive_worst`, null if the loss does not rise.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    >>> x, y = torch.rand(8, 1, 1, 1), torch.tensor([0, 1] * 4)
    >>> adaptive_worst(net, MeasureInput(x, y, x, y)).numbers["adaptive_worst"] > 0
    True
    """
    if steps < 1 or rho < 0 or m < 1:
        raise ValueError("steps and m must be at least 1, rho not negative")
    x, y = inputs.train(images)
    names = {"adaptive_worst": False, "adaptive_worst_normalised": True}
    odds: dict[str, list[Tensor]] = {name: [] for name in names}  # [2, m]: before, after
    done = 0
    for xb, yb in batches(x, y, m):
        for name, normalise in names.items():
            odds[name].append(_worst_odds(model, xb, yb, rho, steps, inputs.batch_size, normalise=normalise))
        done += len(xb)
        inputs.report(done, len(x))
    (rise, log_rise), (normalised, _) = (mean_increase(*torch.cat(parts, 1)) for parts in odds.values())
    return MeasureReport(
        {"adaptive_worst": rise, "log_adaptive_worst": log_rise, "adaptive_worst_normalised": normalised}
    )


def _worst_odds(
    model: nn.Module, x: Tensor, y: Tensor, rho: float, steps: int, batch_size: int, *, normalise: bool
) -> Tensor:
    """Log odds `[2, n]` of the images at the weights as they are, and at the worst ones found."""
    centre = parameters_of(model)
    radius = {n: rho * p.abs() for n, p in centre.items()}

    def project(parameters: Parameters) -> Parameters:
        return {n: p.clamp(centre[n] - radius[n], centre[n] + radius[n]) for n, p in parameters.items()}

    def odds_at(parameters: Parameters) -> Tensor:
        return log_odds_of(model, parameters, x, y, batch_size, normalise=normalise)

    odds = best_odds = odds_at(centre)
    start = _log_loss(odds)
    here, before, best, best_loss = centre, centre, centre, start
    step, halved, best_at_check, improved, last_check = 2.0, False, start, 0, 0
    checks = _checkpoints(steps)
    loss_here = start
    for i in range(steps):
        g = loss_direction(model, here, x, y, batch_size, normalise=normalise)
        z = project({n: p + step * radius[n] * g[n].sign() for n, p in here.items()})
        momentum = 0.75 if i > 0 else 1.0
        following = project({n: p + momentum * (z[n] - p) + (1 - momentum) * (p - before[n]) for n, p in here.items()})
        before, here = here, following
        odds_here = odds_at(here)
        previous, loss_here = loss_here, _log_loss(odds_here)
        improved += loss_here > previous
        if loss_here > best_loss:
            best, best_odds, best_loss = here, odds_here, loss_here
        if i + 1 in checks:
            stuck = improved < 0.75 * (i + 1 - last_check) or (not halved and best_loss == best_at_check)
            halved, best_at_check, improved, last_check = stuck, best_loss, 0, i + 1
            if stuck:
                step, here, before, loss_here = step / 2, best, best, best_loss
    return torch.stack([odds, best_odds])


def _log_loss(odds: Tensor) -> float:
    """Log of the summed losses: it orders weights also where every loss is below what float64 holds."""
    return float(log_softplus(odds).logsumexp(0))


def _checkpoints(steps: int) -> set[int]:
    """Croce and Hein's: fractions 0, 0.22, then gaps that shrink by 0.03 down to 0.06, of the steps."""
    fractions = [0.0, 0.22]
    while fractions[-1] < 1:
        fractions.append(fractions[-1] + max(fractions[-1] - fractions[-2] - 0.03, 0.06))
    return {math.ceil(f * steps) for f in fractions[1:]}
