"""Can the number be believed? A pure function of stored outcome bits and checks (SCIENCE.md sections 3 and 8).

A verdict is computed once, when the last task of a job lands, and then fixed. A changed rule is a new `VERSION`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

VERSION = 2  # masked: only what was right at s = 1 and is broken there
CHALLENGERS = ("fgsm", "noise", "margin", "square")
CHECKS = (
    "zero_gradient", "masked", "outside_ball", *(f"weaker_than:{name}" for name in CHALLENGERS), "not_converged",
    "eps_zero", "train_mode", "random_forward",
)  # fmt: skip

BitArray = NDArray[np.bool_]


class Level(IntEnum):
    """How bad a finding is; a verdict is as bad as its worst one."""

    PASSED = 0
    SUSPECT = 1
    INVALID = 2


@dataclass(frozen=True)
class AttackBits:
    """What one attack did to each of the n examples: bool arrays `[n]` in sample order.

    `zero_gradient` is None where the attack takes no gradient, `outside` how many examples left the ball or [0,1].
    """

    clean_correct: BitArray
    robust: BitArray
    zero_gradient: BitArray | None = None
    outside: int | None = None


@dataclass(frozen=True)
class Controls:
    """The panel on the first m of the samples: robust bits `[m]` per challenger, and counts of the network's checks.

    `robust` has the challengers by name, and `pgd` and `more_steps`: the plain attack, and with four times the steps.
    """

    robust: Mapping[str, BitArray]
    numbers: Mapping[str, float | int | None]


@dataclass(frozen=True)
class Verdict:
    """`trusted`, `suspect` or `invalid`, the reasons for it, each check's outcome, and the fractions of section 3."""

    verdict: str
    reasons: tuple[str, ...]
    checks: dict[str, str]
    masked_fraction: float
    masked_fraction_of_correct: float | None
    reverse_fraction: float
    version: int = field(default=VERSION)


def unpack(n: int, packed: bytes) -> BitArray:
    """Stored bits as a bool array `[n]`."""
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=n).astype(bool)


def judge(scale: float, at_scale: AttackBits, at_one: AttackBits, controls: Controls | None) -> Verdict:
    """The verdict on an attack at `scale`, given the same attack at s = 1 and the panel of controls.

    `controls` is None where the panel does not hold: an attack without a ball, or a head whose bias was not scaled.
    """
    n, correct = at_scale.robust.size, at_scale.clean_correct
    n_correct = int(correct.sum())
    broken_at_one = at_one.clean_correct & ~at_one.robust  # with the bias left alone, classes change with s
    if controls is not None:
        twin = controls.robust["margin"]
        broken_at_one[: twin.size] |= ~twin
    masked = int((correct & at_scale.robust & broken_at_one).sum())
    reverse = int((correct & ~at_scale.robust & at_one.robust).sum())

    found = _blindness(scale, at_scale, n_correct, masked / n)
    if at_scale.outside is not None:
        found["outside_ball"] = ("outside_ball", _any(at_scale.outside))
    if controls is not None:
        found |= _panel(at_scale.robust, controls)
    reasons = dict.fromkeys(reason for reason, level in found.values() if level)
    worst = max((level for _, level in found.values()), default=Level.PASSED)
    return Verdict(
        "trusted" if worst is Level.PASSED else worst.name.lower(),
        tuple(reasons),
        {check: found[check][1].name.lower() if check in found else "not_checked" for check in CHECKS},
        masked / n,
        masked / n_correct if n_correct else None,
        reverse / n,
    )


Findings = dict[str, tuple[str, Level]]  # check -> (the reason it gives, how bad)


def _blindness(scale: float, attack: AttackBits, n_correct: int, masked_fraction: float) -> Findings:
    found: Findings = {}
    blind = 0.0
    if attack.zero_gradient is not None:
        blind = float((attack.zero_gradient & attack.clean_correct).sum()) / n_correct if n_correct else 0.0
        found["zero_gradient"] = ("zero_gradient", _above(blind, 0.01, 0.10))
    # Up to s = 1 a loss can be too weak to break an example without its gradient being zero: that masks nothing.
    reason = "weak_loss" if scale <= 1 and blind == 0 else "masked"
    found["masked"] = (reason, _above(masked_fraction, 0.05, 0.20))
    return found


def _panel(robust: BitArray, controls: Controls) -> Findings:
    m = controls.robust["margin"].size
    ours = robust[:m]
    after_twin = ours & controls.robust["margin"]
    found: Findings = {}
    for name in CHALLENGERS:
        weaker = int((ours & ~controls.robust[name]).sum())
        level = _above(weaker, max(5, 0.05 * m), max(10, 0.20 * m))
        closed = int((after_twin & ~controls.robust[name]).sum()) <= 0.01 * m
        found[f"weaker_than:{name}"] = ("weak_loss" if closed else f"weaker_than:{name}", level)
    newly = int((controls.robust["pgd"] & ~controls.robust["more_steps"]).sum())
    found["not_converged"] = ("not_converged", Level.SUSPECT if newly > max(0.02 * m, 3) else Level.PASSED)
    counts = controls.numbers
    found["eps_zero"] = ("eps_zero", _any(counts["eps_zero_changed"]))
    found["random_forward"] = ("random_forward", _any(counts["random_forward_changed"]))
    in_train_mode = (counts["train_mode_modules"] or 0) + (counts["batch_dependent_changed"] or 0)
    found["train_mode"] = ("train_mode", _any(in_train_mode))
    return found


def _above(value: float, suspect: float, invalid: float) -> Level:
    return Level((value > suspect) + (value > invalid))


def _any(count: float | None) -> Level:
    return Level.INVALID if count else Level.PASSED
