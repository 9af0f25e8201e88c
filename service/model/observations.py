"""Statistics over trained networks: one network is one observation, and its repeats are averaged first.

Definitions: science/README.md, "Notation" and "Further measures".

Attack seeds, replicates with the same weights and storage options are repeats of a network, not further networks.
"""

import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Literal, TypeVar, assert_never

import numpy as np
from numpy.typing import NDArray

from service.model.unit import Unit
from service.model.verdict import wilson

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]
Key = TypeVar("Key", bound=Hashable)
T = TypeVar("T")
Column = NDArray[Any]  # Any: codes or values
Interval = tuple[float | None, float | None]
Count = Literal["samples", "n_clean_correct", "test_samples"]
FRACTION = re.compile(
    r"(^|_)(accuracy|fraction|rate|auroc|majority_share|converged)($|_(?!drop))|^valley_(?!n$)|^peak_at_start_"
    r"|^bound_violated_"
)
DROP = re.compile(r"_accuracy_drop$")
FRACTIONS: dict[str, Count] = {
    "clean_accuracy": "samples",
    "robust_accuracy": "samples",
    "robust_accuracy_any_iterate": "samples",
    "robust_top5_accuracy": "samples",
    "robust_accuracy_of_correct": "n_clean_correct",
    "flip_rate": "n_clean_correct",
    "test_accuracy": "test_samples",
}
"""Numbers of a result that are fractions of images, and so have an interval, with the images that they are of.

These are all `samples` of a job, the ones that the network gets right without an attack, or all test images of the data
set.
"""
BOUNDS = ("ci95_low", "ci95_high")
INTERVALS = {f"{name}_{bound}": (name, i) for name in FRACTIONS for i, bound in enumerate(BOUNDS)}
"""The fields of a result that are bounds of a fraction's Wilson interval: which fraction, and which bound."""
MOST_CODES = 2**62
EXACT = 1e-6  # relative error that the rounding of sums may leave in a variance
EPSILON = float(np.finfo(np.float64).eps)
SMALL, LARGE = 1e-140, 1e140
"""Between these, the squares of values and the sums of a million of them are numbers that float64 has."""


@dataclass
class Moments:
    """One metric in one group: sums over its results, and the `values` of its networks if they were read.

    The sums leave out values of a size above `LARGE`, and the squares also values of a size below `SMALL`.
    """

    n: int = 0
    sum: float = 0.0
    squares: float = 0.0
    low: float | None = None
    high: float | None = None
    values: Floats | None = None

    def add(self, n: int, total: float | None, squares: float | None, low: float | None, high: float | None) -> None:
        if not n or low is None or high is None:
            return
        self.n, self.sum, self.squares = self.n + n, self.sum + (total or 0.0), self.squares + (squares or 0.0)
        self.low = low if self.low is None else min(self.low, low)
        self.high = high if self.high is None else max(self.high, high)

    def take(self, values: Floats) -> None:
        """Count these values of the networks from now on; `low` and `high` are still of single results."""
        self.values, self.n = values, len(values)

    @property
    def leaves_range(self) -> bool:
        """Whether sums of these values are unusable: the largest of them is too large, or too small to be squared."""
        largest = max(abs(self.low or 0.0), abs(self.high or 0.0))
        return largest > LARGE or 0 < largest < SMALL

    @property
    def cancels(self) -> bool:
        """Whether the difference of the sums, a variance, would be mostly the rounding of them."""
        if self.n < 2 or self.low == self.high:
            return False
        if self.leaves_range:
            return True
        spread = self.squares - self.sum * self.sum / self.n
        return not spread * EXACT > 2 * self.n * EPSILON * self.squares

    @property
    def mean(self) -> float | None:
        if self.values is not None and self.n:
            scaled, exponent = _scaled(self.values)
            return math.ldexp(float(np.clip(scaled.mean(), scaled[0], scaled[-1])), exponent)
        if not self.n or self.low is None or self.high is None:
            return None
        return float(min(max(self.sum / self.n, self.low), self.high))  # equal values have exactly that mean

    @property
    def least(self) -> float | None:
        return self.low if self.values is None else float(self.values[0]) if self.n else None

    @property
    def most(self) -> float | None:
        return self.high if self.values is None else float(self.values[-1]) if self.n else None

    @property
    def std(self) -> float | None:
        """Of a sample; null for fewer than two values, or if it is more than a float64 can be."""
        if self.n < 2:
            return None
        if self.least == self.most:
            return 0.0
        if self.values is not None:
            scaled, exponent = _scaled(self.values)
            return _finite(float((scaled - scaled[0]).std(ddof=1)), exponent)
        return math.sqrt(max(self.squares - self.sum * self.sum / self.n, 0.0) / (self.n - 1))

    def quantile(self, q: float) -> float | None:
        """The order statistic, as everywhere here (`inverted_cdf`)."""
        return quantile([] if self.values is None else self.values, q)


def averaged(groups: Codes, networks: Codes, seeds: Codes, tasks: Codes, values: Floats) -> tuple[Codes, Floats]:
    """The group `[m]` and the value `[m]` of each network of each group, in the order of group and value.

    The arguments `[n]` have an entry for each result. A task's value counts once; tasks of one attack seed are
    averaged, then the attack seeds of one network. The order of the results changes no bit.

    >>> one = np.zeros(5, np.int64)
    >>> averaged(one, np.array([1, 1, 1, 1, 2]), np.array([0, 0, 0, 9, 0]), np.arange(5), np.array([1., 1, 1, 3, 5]))[1]
    array([2., 5.])
    """
    labels = [groups, networks, seeds, tasks]
    while len(labels) > 1:
        labels, values = _means(labels, values)
        labels = labels[:-1]
    order = np.lexsort((values, labels[0]))
    return labels[0][order], values[order]


def _one_code(labels: Sequence[Codes]) -> Codes:
    """A number for each row of `labels`, equal for equal rows: sorting by one array is faster than by several."""
    code, *others = labels
    for label in others:
        least, size = int(label.min()), int(label.max()) - int(label.min()) + 1
        if (int(code.max()) + 1) * size > MOST_CODES:
            code, label = (np.unique(part, return_inverse=True)[1] for part in (code, label))
            least, size = 0, int(label.max()) + 1
        code = code * size + (label - least)
    return code


def _means(labels: Sequence[Codes], values: Floats) -> tuple[list[Codes], Floats]:
    """The distinct rows of `labels`, and the mean of the values of each."""
    if not values.size:
        return list(labels), values
    code = _one_code(labels)
    order = np.lexsort((values, code))
    labels, code, values = [label[order] for label in labels], code[order], values[order]
    is_first = np.ones(values.size, bool)
    is_first[1:] = code[1:] != code[:-1]
    first = np.flatnonzero(is_first)
    last = np.append(first[1:], values.size)
    largest = np.maximum(np.abs(values[first]), np.abs(values[last - 1]))
    exponents = np.frexp(largest)[1]
    scaled = np.ldexp(values, -np.repeat(exponents, last - first))
    means = np.ldexp(np.add.reduceat(scaled, first) / (last - first), exponents)
    # Equal values have exactly that mean, which a sum may miss by its rounding.
    return [label[first] for label in labels], np.clip(means, values[first], values[last - 1])


def _scaled(values: Floats) -> tuple[Floats, int]:
    """Ascending `values [n]` in units of the power of two above the largest size, and its exponent.

    Sums and squares of these neither overflow nor vanish. Scaling by a power of two rounds nothing.
    """
    exponent = math.frexp(max(abs(float(values[0])), abs(float(values[-1]))))[1]
    return np.ldexp(values, -exponent), exponent


def _finite(value: float, exponent: int) -> float | None:
    """`value` times 2 to the `exponent`, or null if that is more than a float64 can be."""
    try:
        return math.ldexp(value, exponent)
    except OverflowError:
        return None


class Observations(Generic[Key]):
    """Metrics of results by the keys of their groups, in arrays; names are kept as numbers."""

    def __init__(self, metrics: int) -> None:
        self._keys, self._names = _Numbers[Key](), _Numbers[str]()
        self._columns: list[list[Column]] = [[] for _ in range(3 + 2 * metrics)]

    def add(
        self, keys: Sequence[Key], networks: Sequence[str], seeds: Sequence[int], *metrics: Sequence[Any]
    ) -> None:  # Any: ids of tasks and values by turns
        """Of each result the key of its group, its network and its attack seed, and by metric the id of the task that
        computed it and the value, which may be null."""
        coded = [self._keys.codes(keys), self._names.codes(networks), np.array(seeds, np.int64)]
        for tasks, values in zip(metrics[::2], metrics[1::2], strict=True):
            coded += [self._names.codes(tasks), np.array(values, np.float64)]
        for column, part in zip(self._columns, coded, strict=True):
            column.append(part)

    def networks(self) -> dict[Key, int]:
        """How many distinct networks each key has."""
        groups, networks = self._whole(0), self._whole(1)
        if not groups.size:
            return {}
        _, first = np.unique(_one_code([groups, networks]), return_index=True)
        codes, counts = np.unique(groups[first], return_counts=True)
        return self._by_key(codes, counts.tolist())

    def values(self, metric: int, unit: Unit) -> dict[Key, Floats]:
        """The value of each unit of each key, in ascending order."""
        groups, networks, seeds, tasks, values = map(self._whole, (0, 1, 2, 3 + 2 * metric, 4 + 2 * metric))
        match unit:
            case "network":
                units = networks
            case "attack_seed":
                units = seeds
            case _:
                assert_never(unit)
        measured = ~np.isnan(values)
        group, means = averaged(*(part[measured] for part in (groups, units, seeds, tasks, values)))
        codes, first = np.unique(group, return_index=True)
        none: dict[Key, Floats] = dict.fromkeys(self._keys, np.empty(0))
        return none if not codes.size else none | self._by_key(codes, np.split(means, first[1:]))

    def _whole(self, column: int) -> Column:
        parts = self._columns[column]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _by_key(self, codes: Iterable[int], values: Iterable[T]) -> dict[Key, T]:
        keys = list(self._keys)
        return {keys[code]: value for code, value in zip(codes, values, strict=True)}


class _Numbers(dict[Key, int]):
    """A number for each distinct value, in the order in which they are met."""

    def __missing__(self, value: Key) -> int:
        self[value] = len(self)
        return self[value]

    def codes(self, values: Sequence[Key]) -> Codes:
        return np.fromiter(map(self.__getitem__, values), np.int64, len(values))


def range_of(name: str) -> tuple[float, float] | None:
    """The least and the most that a stored number can be; None if it has no bounds.

    >>> range_of("detector_auroc"), range_of("pac_bayes_accuracy_drop"), range_of("robust_loss")
    ((0.0, 1.0), (-1.0, 1.0), None)
    """
    if DROP.search(name) is not None:
        return -1.0, 1.0
    return (0.0, 1.0) if FRACTION.search(name) is not None else None


def interval(n: int, mean: float | None, std: float | None, *, within: tuple[float, float] | None = None) -> Interval:
    """The 95 % confidence interval of a mean by Student's t; null for fewer than two values, or if a bound is more than
    a float64 can be.

    It is cut at the least and the most that such a number can be (`within`). No mean lies outside, so the coverage
    stays the same.
    """
    if n < 2 or mean is None or std is None:
        return None, None
    from scipy.special import stdtrit  # the import takes a tenth of a second

    half = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)
    low, high = mean - half, mean + half
    if not (math.isfinite(low) and math.isfinite(high)):
        return None, None
    return (low, high) if within is None else (max(low, within[0]), min(high, within[1]))


@lru_cache(maxsize=10_000)
def accuracy_interval(accuracy: float | None, images: int | None) -> Interval:
    """The Wilson 95 % interval of one accuracy over so many distinct images, if both are known (Wilson 1927)."""
    return (None, None) if accuracy is None or not images else wilson(accuracy * images, images)


def intervals_of(numbers: Mapping[str, float | None], counts: Mapping[Count, int | None]) -> dict[str, float | None]:
    """The 95 % interval of each fraction among a result's numbers: `robust_accuracy_ci95_low`, ..."""
    return {
        field: accuracy_interval(numbers[name], counts[FRACTIONS[name]])[bound]
        for field, (name, bound) in INTERVALS.items()
        if name in numbers
    }


def quantile(values: Sequence[float] | Floats, q: float) -> float | None:
    """The order statistic, as everywhere here (`inverted_cdf`)."""
    return float(np.quantile(values, q, method="inverted_cdf")) if len(values) else None
