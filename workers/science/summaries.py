"""Order statistics and log-domain means, as they are stored (README.md, "Notation", Summaries)."""

import math
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

# `service/specs/numbers/base.py` has the names that follow from it: `tests/contract/test_numbers.py` compares them.
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
Numbers = dict[str, float | int | None]
"""Numbers by name; null is an undefined number."""
V = TypeVar("V")


def merged(*parts: Mapping[str, V]) -> dict[str, V]:
    """All numbers (or curves) of `parts` in one dict. One name is one number: raises `KeyError` with a second one's.

    >>> merged({"n": 1}, {"loss": 0.5})
    {'n': 1, 'loss': 0.5}
    """
    out: dict[str, V] = {}
    for part in parts:
        if twice := out.keys() & part.keys():
            raise KeyError(f"two numbers are called {', '.join(sorted(twice))}")
        out.update(part)
    return out


def quantile(values: Tensor, q: float) -> float | None:
    """The order statistic `inverted_cdf` of `values [n]` at `q`; null for no values. It commutes with the logarithm."""
    n = values.numel()
    if n == 0:
        return None
    # On the CPU: older versions of torch have no deterministic form of it on a GPU.
    return finite(float(values.flatten().cpu().kthvalue(rank(q, n)).values))


def log_mean(log_values: Tensor) -> float | None:
    """`log(mean(v))` from `log v [n]`; -inf entries count as v = 0. Null for no values or all zeros."""
    if log_values.numel() == 0:
        return None
    return finite(float(torch.logsumexp(log_values.double(), 0) - math.log(log_values.numel())))


def mean(values: Tensor) -> float | None:
    """The mean of `values [n]` in float64; null for no values, and if it is not finite."""
    return finite(float(values.double().mean())) if values.numel() else None


def share(mask: Tensor, population: Tensor) -> float | None:
    """The part of `population [n]` bool where `mask [n]` is true as well; null for an empty population.

    >>> share(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
    0.5
    """
    n = int(population.sum())
    return int((mask & population).sum()) / n if n else None


def majority_share(y: Tensor) -> float:
    """The share of the most frequent label among `y [n]`, n > 0: what the best constant answer gets right.

    >>> majority_share(torch.tensor([0, 2, 2, 1]))
    0.5
    """
    return float(y.cpu().bincount().max()) / len(y)


def finite(value: float) -> float | None:
    """The number, or null if JSON has none: NaN and infinities never leave the science."""
    return value if math.isfinite(value) else None


def summary(values: Tensor, name: str, *, log: bool = False) -> dict[str, float | int | None]:
    """`{name_q05, name_q25, name_median, name_q75, name_q95, name_mean | name_log_mean}` of `values [n]`.

    With `log=True` the values are logarithms: -inf is an exact zero, sorted first and counted in `name_n_zero`.
    """
    out: dict[str, float | int | None] = {}
    values = values.cpu()  # once, instead of a wait for the GPU at every number
    for q in QUANTILES:
        out[f"{name}_{label_of(q)}"] = quantile(values, q)
    if log:
        out[f"{name}_log_mean"] = log_mean(values)
        out[f"{name}_n_zero"] = int(torch.isneginf(values).sum())
    else:
        out[f"{name}_mean"] = mean(values)
    return out


def label_of(q: float) -> str:
    """`median`, `q05`, ...: how a quantile is called in the name of a number."""
    return "median" if q == 0.5 else f"q{round(q * 100):02d}"


def rank(q: float, n: int) -> int:
    """Position, counted from 1, of the order statistic `inverted_cdf` at `q` among `n` values."""
    return max(math.ceil(q * n - 1e-9), 1)  # 1e-9: 0.05 * 20 must be rank 1, whatever the last bit says


def row_summaries(values: Tensor, name: str, *, log: bool = False) -> dict[str, list[float | int | None]]:
    """`summary` of every row of `values [r, n]`: `{name_q05: [r numbers], ...}`; with no values, rows of nulls."""
    rows = [summary(row, name, log=log) for row in values]
    return {key: [row[key] for row in rows] for key in summary(values.new_zeros(0), name, log=log)}
