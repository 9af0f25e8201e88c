"""Average-case adaptive sharpness, with and without logit normalisation (Andriushchenko et al. 2023).

`E[L(w + delta)] - L(w)`,  delta_i normal with standard deviation `rho |w_i|`. Normalised logits have mean 0 and
standard deviation 1 per example, so that value does not depend on a scale s of head and bias: the natural control.
"""

import statistics

import torch
from torch import Tensor, nn

from workers.science.cross_entropy import mean_increase
from workers.science.curvature import gaussian_like, log_odds_of, parameters_of
from workers.science.sharpness.base import MeasureInput, MeasureReport
from workers.science.summaries import Numbers


def adaptive_average(
    model: nn.Module,
    inputs: MeasureInput,
    *,
    rho: float = 0.1,
    draws: int = 10,
    images: int = 1024,
) -> MeasureReport:
    """`adaptive_average` and `adaptive_average_normalised`, the same draws for both, each with a `_standard_error`
    over draws (null for one), on unaugmented training images; `log_adaptive_average`, null if the loss does not
    rise.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    >>> x, y = torch.rand(8, 1, 1, 1), torch.tensor([0, 1] * 4)
    >>> adaptive_average(net, MeasureInput(x, y, x, y), rho=0.0).numbers["adaptive_average"]
    0.0
    """
    if draws < 1 or rho < 0:
        raise ValueError("draws must be at least 1, rho not negative")
    x, y = inputs.train(images)
    generator, parameters = inputs.generator(), parameters_of(model)
    names = {"adaptive_average": False, "adaptive_average_normalised": True}
    before = {name: log_odds_of(model, parameters, x, y, inputs.batch_size, normalise=n) for name, n in names.items()}
    after: dict[str, list[Tensor]] = {name: [] for name in names}
    for draw in range(draws):
        noise = gaussian_like(parameters, generator)
        moved = {n: p + rho * p.abs() * noise[n] for n, p in parameters.items()}
        for name, normalise in names.items():
            after[name].append(log_odds_of(model, moved, x, y, inputs.batch_size, normalise=normalise))
        inputs.report(draw + 1, draws)
    numbers: Numbers = {}
    for name, odds in after.items():
        rises = [mean_increase(before[name], of_draw)[0] for of_draw in odds]
        numbers[name], log_rise = mean_increase(before[name], torch.stack(odds))
        numbers[f"{name}_standard_error"] = _standard_error(rises)
        if name == "adaptive_average":
            numbers["log_adaptive_average"] = log_rise
    return MeasureReport(numbers)


def _standard_error(values: list[float]) -> float | None:
    """Of the mean; in units of the largest, so that the squares of tiny values do not underflow."""
    if len(values) < 2:
        return None
    largest = max(map(abs, values)) or 1.0
    return float(statistics.stdev(value / largest for value in values) * largest / len(values) ** 0.5)
