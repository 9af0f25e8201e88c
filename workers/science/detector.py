"""Can an attacked image be told by its sharpness? A decision stump on log relative sharpness (README.md, "Trajectory").

Source: arXiv 2510.14231, appendix D.4. Folds are grouped by image; the adaptive attack also hides its sharpness.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.science.closed_forms import Head, Softmax
from workers.science.summaries import Numbers, mean, merged, share
from workers.science.trajectory import Trajectory

Floats = NDArray[np.float64]
FOLDS = 5
# `service/specs/numbers/base.py` names numbers by these: `tests/contract/test_numbers.py` compares them.
LAMBDAS = (0.01, 0.1, 1.0)
FAINT = 1e-30
"""The hiding loss counts a smaller `||phi||` as this: its logarithm has no slope at 0, and none in float32 near it."""


def cross_validation(clean: Tensor, attacked: Tensor) -> tuple[Numbers, dict[str, list[float | int | None]]]:
    """Five-fold accuracy and AUROC of the stump on `clean [n]` and `attacked [n]` log relative sharpness.

    Entry i of both is the same image, and both are in the same fold (`RandomState(0)`); -inf is allowed. Numbers:
    `detector_accuracy` and `detector_auroc`, means over the held-out folds, and `detector_n`; null below five images.
    Curves: `detector_accuracy`, `detector_auroc`, `detector_threshold`, `detector_direction` (1: attacked lies above)
    by fold.

    >>> numbers, _ = cross_validation(torch.arange(10.0), torch.arange(10.0) + 100)
    >>> numbers["detector_accuracy"], numbers["detector_auroc"]
    (1.0, 1.0)
    """
    a, b = clean.double().cpu().numpy(), attacked.double().cpu().numpy()
    if len(a) != len(b) or np.isnan(a).any() or np.isnan(b).any():
        raise ValueError("the detector needs one clean and one attacked number per image")
    numbers: Numbers = {"detector_accuracy": None, "detector_auroc": None, "detector_n": len(a)}
    curves: dict[str, list[float | int | None]] = {
        f"detector_{name}": [] for name in ("accuracy", "auroc", "threshold", "direction")
    }
    if len(a) < FOLDS:
        return numbers, curves
    for held_out in np.array_split(np.random.RandomState(0).permutation(len(a)), FOLDS):
        fit = np.setdiff1d(np.arange(len(a)), held_out)
        threshold, direction = stump(a[fit], b[fit])
        right = np.concatenate([~_above(a[held_out], threshold, direction), _above(b[held_out], threshold, direction)])
        curves["detector_accuracy"].append(float(right.mean()))
        curves["detector_auroc"].append(auroc(direction * a[held_out], direction * b[held_out]))
        curves["detector_threshold"].append(threshold if math.isfinite(threshold) else None)
        curves["detector_direction"].append(direction)
    for name in ("detector_accuracy", "detector_auroc"):
        values = [value for value in curves[name] if value is not None]
        numbers[name] = sum(values) / FOLDS
    return numbers, curves


def stump(clean: Floats, attacked: Floats) -> tuple[float, int]:
    """Threshold and direction of the highest accuracy: attacked is what lies at or above `threshold` (direction 1), or
    at or below it (-1). First best wins; thresholds lie half-way between neighbouring values.

    >>> stump(np.array([1.0, 2.0]), np.array([4.0, 5.0]))
    (3.0, 1)
    """
    values = np.unique(np.concatenate([clean, attacked]))
    with np.errstate(invalid="ignore"):
        middles = (values[1:] + values[:-1]) / 2
    cuts = np.concatenate([values[:1], np.where(np.isfinite(middles), middles, values[1:])])
    below_clean = np.searchsorted(np.sort(clean), cuts, side="left")
    below_attacked = np.searchsorted(np.sort(attacked), cuts, side="left")
    above = below_clean + len(attacked) - below_attacked
    at_or_below_clean = np.searchsorted(np.sort(clean), cuts, side="right")
    at_or_below_attacked = np.searchsorted(np.sort(attacked), cuts, side="right")
    below = len(clean) - at_or_below_clean + at_or_below_attacked
    if above.max() >= below.max():
        return float(cuts[above.argmax()]), 1
    return float(cuts[below.argmax()]), -1


def auroc(negative: Floats, positive: Floats) -> float:
    """Chance that a positive scores above a negative, ties counting half (Mann and Whitney 1947).

    >>> auroc(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
    0.875
    """
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    upto = np.searchsorted(ordered, positive, side="right")
    return float((below + upto).sum() / (2 * len(negative) * len(positive)))


def flipped_pairs(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """Log relative sharpness of the clean-correct images whose last iterate is misclassified, and of those iterates."""
    flipped = trajectory.clean_correct & (trajectory.predicted[-1] != trajectory.y)
    log_kappa = trajectory.log_relative_sharpness
    return log_kappa[0, flipped], log_kappa[-1, flipped]


def clean_mean(trajectory: Trajectory) -> float | None:
    """Mean log relative sharpness of the clean-correct images: the aim of the adaptive attack.

    Images without a sharpness (phi = 0 or a zero head) are left out. Null if no image has one.
    """
    values = trajectory.log_relative_sharpness[0, trajectory.clean_correct]
    return mean(values[torch.isfinite(values)])


def hiding_loss(weight: Tensor, bias: Tensor | None, aim: float, strength: float) -> Callable[..., Tensor]:
    """The loss of the adaptive attack, `l - strength (log kappa - aim)^2`, as `loss(phi, y) -> [n]` float64.

    `weight [k, m]` (not zero), `bias [k]` of the head as attacked, `aim` as `clean_mean`, `strength` one of `LAMBDAS`.
    It is differentiable in `phi [n, m]`, also in phi = 0, exact for confident images, and meant to be climbed.
    """
    head = Head(weight, bias)

    def loss(phi: Tensor, y: Tensor) -> Tensor:
        softmax = Softmax.of(head.logits(phi))
        log_norm: Tensor = torch.linalg.vector_norm(phi.double(), dim=1).clamp(min=FAINT).log()
        log_kappa: Tensor = softmax.log_trace + 2 * log_norm + 2 * head.log_norm
        return softmax.cross_entropy(y) - strength * (log_kappa - aim).square()

    return loss


def detector_numbers(plain: Trajectory, adaptive: Mapping[float, Trajectory]) -> Numbers:
    """The detector against the plain attack and against the adaptive ones, by their strength.

    Each attack has its own stump, fitted and tested on that attack's own flipped iterates (so the detector knows the
    attack). `detector_{accuracy | auroc | n}` for the plain one, n being the images that it flips;
    `detector_adaptive_lambda{001 | 01 | 1}_...` for each adaptive one, with its `_flip_rate`, the share of
    clean-correct images that it flips; `detector_adaptive_...` again for the one with the lowest accuracy, the first of
    equals, with its `_strength`.
    """
    parts, measured = [cross_validation(*flipped_pairs(plain))[0]], []
    for strength, trajectory in adaptive.items():
        flip_rate = share(trajectory.predicted[-1] != trajectory.y, trajectory.clean_correct)
        numbers = merged(cross_validation(*flipped_pairs(trajectory))[0], {"detector_flip_rate": flip_rate})
        parts.append(_renamed(numbers, f"detector_adaptive_lambda{str(strength).rstrip('0').replace('.', '')}"))
        if numbers["detector_accuracy"] is not None:
            measured.append(merged(numbers, {"detector_strength": strength}))
    if measured:
        worst = min(measured, key=lambda numbers: numbers["detector_accuracy"] or 0.0)
        parts.append(_renamed(worst, "detector_adaptive"))
    return merged(*parts)


def _renamed(numbers: Numbers, prefix: str) -> Numbers:
    return {name.replace("detector", prefix, 1): value for name, value in numbers.items()}


def _above(values: Floats, threshold: float, direction: int) -> NDArray[np.bool_]:
    return values >= threshold if direction > 0 else values <= threshold
