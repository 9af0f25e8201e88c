"""What the dictionary of numbers is made of: units, numbers, and groups of numbers that one file computes."""

import string
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal

from service.model.observations import FRACTIONS
from service.model.verdict import CHECKS
from service.settings import Kind as TaskKind

Kind = Literal[TaskKind, "job"]
"""The kind of task that leaves a number; `job`: the service computes it from what the tasks left."""

PAPER = "arXiv 2510.14231"
OURS = "this project"


@dataclass(frozen=True)
class Unit:
    """What a number counts in, and the range that it lies in; no bound is infinity."""

    text: str
    low: float | None = None
    high: float | None = None
    whole: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` can be in this unit.

        >>> SHARE.holds(0.5), SHARE.holds(1.5), COUNT.holds(0.5)
        (True, False, False)
        """
        above = self.low is None or self.low <= value
        below = self.high is None or value <= self.high
        return above and below and (not self.whole or value == int(value))


SHARE = Unit("share", 0, 1)
COUNT = Unit("count", 0, whole=True)
FLAG = Unit("0 or 1", 0, 1, whole=True)
LOSS = Unit("nats", 0)
LOSS_CHANGE = Unit("nats, signed")
LOG = Unit("natural logarithm")
LOG_SHARE = Unit("natural logarithm of at most 1", high=0)
DISTANCE = Unit("distance, images in [0, 1]", 0)
FEATURES = Unit("norm of phi", 0)
LIPSCHITZ = Unit("norm of phi by l2 distance", 0)
STEPS = Unit("steps of the attack", 0, whole=True)
SECONDS = Unit("seconds", 0)
POSITIVE = Unit("no unit, at least 0", 0)
REAL = Unit("no unit, signed")

QUANTILES = ("q05", "q25", "median", "q75", "q95")
PARTS: dict[str, tuple[str, ...]] = {
    "split": ("", "train_"),
    "population": ("", "_clean_correct"),
    "quantile": QUANTILES,
    "statistic": (*QUANTILES, "mean"),
    "log_statistic": (*QUANTILES, "log_mean"),
    "threshold": ("e001", "e01", "log2", "logk"),
    "bound": ("relayed_relative_sharpness", "relayed_relative_flatness", "corrected_taylor", "certificate"),
    "valley": ("relative_sharpness", "softmax_trace", "feature_norm_squared"),
    "strength": ("001", "01", "1"),
    "share": tuple(FRACTIONS),
    "end": ("low", "high"),
    "check": tuple(check for check in CHECKS if check != "train_mode"),  # which counts no images
}
"""What may stand for a part of a name in braces, as `{quantile}` in `take_off_{quantile}`.

`workers/science` has quantiles, thresholds, bounds and strengths too: `tests/contract/test_numbers.py` compares them.
"""


@dataclass(frozen=True)
class Number:
    """A stored number, or all those whose names follow one pattern.

    `formula` is a line, `null` when there is none, `source` empty where it is that of the group.
    """

    name: str
    formula: str
    unit: Unit
    null: str = "never"
    source: str = ""

    def names(self) -> Iterator[str]:
        """Every name that the pattern stands for.

        >>> list(Number("n{population}", "images", COUNT).names())
        ['n', 'n_clean_correct']
        """
        parts = list(dict.fromkeys(part for _, part, _, _ in string.Formatter().parse(self.name) if part))
        for values in product(*(PARTS[part] for part in parts)):
            yield self.name.format(**dict(zip(parts, values, strict=True)))


@dataclass(frozen=True)
class Group:
    """Numbers that one file computes for one kind of task: a task leaves all numbers of a group or none.

    `of` names the type of measure, or says in words which tasks of the kind leave them.
    """

    name: str
    kind: Kind
    of: str
    file: str
    source: str
    numbers: tuple[Number, ...]

    def names(self) -> Iterator[str]:
        for number in self.numbers:
            yield from number.names()
