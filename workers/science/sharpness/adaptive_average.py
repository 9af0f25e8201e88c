"""Average-case adaptive sharpness, with and without logit normalisation (Andriushchenko et al. 2023).

`E[L(w + delta)] - L(w)`,  delta_i normal with standard deviation `rho |w_i|`. Normalised logits have mean 0 and
standard deviation 1 per example, so that value does not depend on a scale s of head and bias: the natural control.
"""

import torch
from torch import Tensor, nn

from workers.science.curvature import gaussian_like, mean_loss, parameters_of
from workers.science.sharpness.base import MeasureReport, Numbers, OnProgress, first, no_progress


def adaptive_average(
    model: nn.Module,
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    seed: int,
    batch_size: int,
    on_progress: OnProgress | None = None,
    rho: float = 0.1,
    draws: int = 10,
    images: int = 1024,
) -> MeasureReport:
    """`adaptive_average` and `adaptive_average_normalised`, the same draws for both, each with a `_standard_error`
    over draws (null for one), on unaugmented training images.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    >>> x, y = torch.rand(8, 1, 1, 1), torch.tensor([0, 1] * 4)
    >>> adaptive_average(net, x, y, x, y, seed=0, batch_size=8, rho=0.0).numbers["adaptive_average"]
    0.0
    """
    if draws < 1 or rho < 0:
        raise ValueError("draws must be at least 1, rho not negative")
    x, y = first(train_x, train_y, images)
    generator, parameters = torch.Generator().manual_seed(seed), parameters_of(model)
    names = {"adaptive_average": False, "adaptive_average_normalised": True}
    before = {name: mean_loss(model, parameters, x, y, batch_size, normalise=n) for name, n in names.items()}
    rises: dict[str, list[float]] = {name: [] for name in names}
    for draw in range(draws):
        noise = gaussian_like(parameters, generator)
        moved = {n: p + rho * p.abs() * noise[n] for n, p in parameters.items()}
        for name, normalise in names.items():
            rises[name].append(mean_loss(model, moved, x, y, batch_size, normalise=normalise) - before[name])
        (on_progress or no_progress)(draw + 1, draws)
    numbers: Numbers = {}
    for name, values in rises.items():
        spread = torch.tensor(values, dtype=torch.float64)
        numbers[name] = float(spread.mean())
        numbers[f"{name}_standard_error"] = float(spread.std() / draws**0.5) if draws > 1 else None
    return MeasureReport(numbers)
