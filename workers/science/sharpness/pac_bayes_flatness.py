"""PAC-Bayes flatness `1 / sigma^2` (Jiang et al. 2020; Neyshabur et al. 2017).

sigma, a standard deviation (the public code's is a variance), is the largest noise `N(0, sigma^2)` on every parameter
at which the mean training accuracy over the draws is not more than 0.1 below the clean one. By doubling and bisection,
with the same draws at every sigma. All parameters are perturbed, those of batch norm too.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from workers.science.curvature import Parameters, batches, gaussian_like, log_odds_of, parameters_of
from workers.science.sharpness.base import MeasureInput, MeasureReport
from workers.science.summaries import Numbers

DOUBLINGS = 20


def pac_bayes_flatness(
    model: nn.Module,
    inputs: MeasureInput,
    *,
    drop: float = 0.1,
    draws: int = 10,
    bisections: int = 15,
    images: int = 1024,
) -> MeasureReport:
    """`pac_bayes_flatness`, `pac_bayes_sigma`, and `pac_bayes_accuracy_drop`, the drop at that sigma.

    sigma is sought between 2^-10 and 2^10; null if the accuracy never falls by `drop` there (an accuracy below `drop`,
    say), or has already fallen so far at the smallest.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    >>> x = torch.rand(64, 1, 1, 1); y = net(x).argmax(1)
    >>> report = pac_bayes_flatness(net, MeasureInput(x, y, x, y))
    >>> report.numbers["pac_bayes_flatness"] == report.numbers["pac_bayes_sigma"] ** -2
    True
    """
    if draws < 1 or not 0 < drop < 1:
        raise ValueError("draws must be at least 1, drop between 0 and 1")
    x, y = inputs.train(images)
    parameters, batch_size, done = parameters_of(model), inputs.batch_size, 0
    log_odds_of(model, parameters, x, y, batch_size)  # refuses a network that is NaN or infinite without any noise
    clean = _accuracy(model, parameters, x, y, batch_size)

    def fall(sigma: float) -> float:
        nonlocal done
        generator, accuracies = inputs.generator(), []
        for _ in range(draws):
            noise = gaussian_like(parameters, generator)
            moved = {n: p + sigma * noise[n] for n, p in parameters.items()}
            accuracies.append(_accuracy(model, moved, x, y, batch_size))
        done += 1
        inputs.report(min(done, DOUBLINGS + bisections + 1), DOUBLINGS + bisections + 1)
        return clean - sum(accuracies) / draws

    sigma, fall_there = _largest_sigma(fall, drop, bisections) or (None, None)
    flatness = None if sigma is None else sigma**-2
    numbers: Numbers = {"pac_bayes_flatness": flatness, "pac_bayes_sigma": sigma, "pac_bayes_accuracy_drop": fall_there}
    return MeasureReport(numbers)


def _largest_sigma(fall: Callable[[float], float], drop: float, bisections: int) -> tuple[float, float] | None:
    """The largest sigma with `fall(sigma) <= drop`, up to the bisections, and its fall.

    None if `fall` is never above `drop`, or already is at the smallest sigma.
    """
    low = 2.0**-10
    low_fall = fall(low)
    for _ in range(DOUBLINGS):
        if (high_fall := fall(2 * low)) > drop:
            break
        low, low_fall = 2 * low, high_fall
    else:
        return None
    if low_fall > drop:
        return None
    high = 2 * low
    for _ in range(bisections):
        middle = (low + high) / 2
        middle_fall = fall(middle)
        if middle_fall > drop:
            high = middle
        else:
            low, low_fall = middle, middle_fall
    return low, low_fall


@torch.no_grad()
def _accuracy(model: nn.Module, parameters: Parameters, x: Tensor, y: Tensor, batch_size: int) -> float:
    """By the float32 logits. NaN has an argmax too, so logits that noise has made infinite or NaN count as wrong."""
    right = 0
    for xb, yb in batches(x, y, batch_size):
        logits = functional_call(model, parameters, (xb,))
        right += int(((logits.argmax(1) == yb) & torch.isfinite(logits).all(1)).sum())
    return right / len(x)
