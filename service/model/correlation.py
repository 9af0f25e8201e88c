"""Does a measure rank networks as their robustness does? Kendall's tau-b with a bootstrap.

Definition: science/README.md, "Further measures".

The caller chooses the points: s = 1, one point per trained network, equal data set, attack and samples,
verdict `trusted`. Points of one network at several scales share the true robust accuracy and must not be mixed in.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
MINIMUM = 10


@dataclass(frozen=True)
class Correlation:
    """`pooled` tau-b over all points and `within`, the mean of the taus of the architectures that have one (two points
    that differ in both values), with 95 % percentile intervals over resampled checkpoints. Null if undefined; all are
    null below ten points.
    """

    n: int
    architectures: int
    pooled: float | None
    pooled_low: float | None
    pooled_high: float | None
    within: float | None
    within_low: float | None
    within_high: float | None


def correlate(
    measure: Sequence[float] | Floats,
    target: Sequence[float] | Floats,
    architecture: Sequence[str],
    checkpoint: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 2000,
) -> Correlation:
    """Tau-b of `measure [n]` with `target [n]`, point i being `checkpoint[i]` of `architecture[i]`.

    Infinite values rank as such. Raises `ValueError` for NaN, unequal lengths, or a checkpoint that appears twice.

    >>> points = list(range(12))
    >>> round(correlate(points, points, ["a"] * 12, [str(i) for i in points], resamples=10).pooled, 9)
    1.0
    """
    x, y = np.asarray(measure, np.float64), np.asarray(target, np.float64)
    groups = np.asarray(architecture, dtype=np.str_)
    n = len(x)
    if not len(y) == len(groups) == len(checkpoint) == n or np.isnan(x).any() or np.isnan(y).any():
        raise ValueError("correlate needs a measure, a target, an architecture and a checkpoint for every point")
    if len(set(checkpoint)) != n:
        raise ValueError("a checkpoint appears more than once; keep one point of each")
    kinds = len(set(architecture))
    if n < MINIMUM:
        return Correlation(n, kinds, None, None, None, None, None, None)
    random = np.random.RandomState(seed)
    drawn = random.randint(0, n, (resamples, n)) + n * np.arange(resamples)[:, None]
    picks = np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n)
    pooled = _taus(x, y, picks)
    masks = [groups == group for group in np.unique(groups)]
    each = np.stack([_taus(x[mask], y[mask], picks[:, mask]) for mask in masks])
    defined = ~np.isnan(each).all(0)
    within = np.nanmean(each[:, defined], 0)
    return Correlation(n, kinds, tau(x, y), *_interval(pooled), _mean_within(x, y, groups), *_interval(within))


def tau(x: Floats, y: Floats) -> float | None:
    """Kendall's tau-b, null if either side is constant or there are fewer than two points.

    >>> round(tau(np.array([1.0, 2.0, 3.0]), np.array([1.0, 3.0, 2.0])), 6)
    0.333333
    """
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return None
    from scipy.stats import kendalltau  # a second that other questions need not wait for

    # the p-value is not used; scipy's fast one divides by zero for two points
    return float(kendalltau(x, y, method="asymptotic" if len(x) > 2 else "exact").statistic)


def _mean_within(x: Floats, y: Floats, groups: NDArray[np.str_]) -> float | None:
    taus = [t for group in np.unique(groups) if (t := tau(x[groups == group], y[groups == group])) is not None]
    return sum(taus) / len(taus) if taus else None


def _taus(x: Floats, y: Floats, counts: NDArray[np.int64]) -> Floats:
    """Tau-b `[r]` of `x [n]` with `y [n]` if point i is there `counts[r, i]` times; NaN if it is undefined.

    All numbers are whole and below 2^24, so float32 is exact: 2,000 resamples are three products of matrices.
    """
    a, b = (np.unique(values, return_inverse=True)[1].astype(np.float32) for values in (x, y))
    a, b = np.sign(a[:, None] - a), np.sign(b[:, None] - b)
    times = counts.astype(np.float32)
    agreeing, untied_x, untied_y = (
        ((times @ signs).astype(np.float64) * times).sum(1) for signs in (a * b, np.abs(a), np.abs(b))
    )
    pairs = np.sqrt(untied_x * untied_y)
    taus: Floats = np.divide(agreeing, pairs, out=np.full(len(counts), np.nan), where=pairs > 0)
    return taus


def _interval(values: Floats) -> tuple[float | None, float | None]:
    defined = values[~np.isnan(values)]
    if not defined.size:
        return None, None
    low, high = np.quantile(defined, (0.025, 0.975))
    return float(low), float(high)
