"""The verdict: can a number be believed? A pure function of stored outcome bits and checks.

Definitions: science/README.md, "Scaling" and "Controls".

A verdict is computed when the last task of a job lands. A changed rule is a new `VERSION`, by which stored bits are
judged again (`service/operations/upgrading.py`); statistics never mix two.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

VERSION = 6
"""2: masked means right at s = 1 and broken there. 3: masked is a fraction of the images that the twin ran on, null for
attacks without a gradient; not_converged looks at the attack itself; nothing_correct, non_finite, not_checked.
4: evidence of other weights than the attack's is left out. 5: chance is the fraction of the most frequent label.
6: not_converged compares with the attack at s = 1, as the panel ran there."""
CHALLENGERS = ("fgsm", "noise", "margin", "square")
CHECKS = (
    "zero_gradient",
    "masked",
    "outside_ball",
    *(f"weaker_than:{name}" for name in CHALLENGERS),
    "not_converged",
    "eps_zero",
    "train_mode",
    "random_forward",
    "nothing_correct",
    "non_finite",
)
REASONS = (*CHECKS, "weak_loss")
VERDICTS = ("trusted", "suspect", "invalid", "not_checked")
OUTCOMES = ("passed", "suspect", "invalid", "not_checked")
"""Of a check."""
WITHOUT_GRADIENT = frozenset({"noise", "square", "transfer"})
"""Attacks whose own network gives them no gradient: nothing can be masked from them, and they do not converge."""

BitArray = NDArray[np.bool_]


class Level(IntEnum):
    """How bad a finding is; a verdict is as bad as its worst one."""

    PASSED = 0
    SUSPECT = 1
    INVALID = 2


@dataclass(frozen=True)
class AttackBits:
    """The outcome of one attack for each of the n examples: bool arrays `[n]` in sample order.

    `zero_gradient` is None if the attack takes no gradient, `non_finite` None if all was finite (no NaN or infinite
    logit or gradient), `outside` how many examples left the ball or [0,1].
    """

    clean_correct: BitArray
    robust: BitArray
    zero_gradient: BitArray | None = None
    outside: int | None = None
    non_finite: BitArray | None = None


@dataclass(frozen=True)
class Controls:
    """The panel on the first m of the samples: robust bits `[m]` per challenger, and counts of the network's checks.

    `robust` has the challengers by name, and `pgd` and `more_steps`: the plain attack, and with four times the steps.
    """

    robust: Mapping[str, BitArray]
    numbers: Mapping[str, float | int | None]


@dataclass(frozen=True)
class Evidence:
    """All evidence of a verdict: an attack of type `attack` at `scale` on a network, its controls, and `chance`.

    `chance` is the fraction of the most frequent label among the images attacked (`chance_of`).
    `at_one` is the same attack at s = 1; None if that was on other weights. `controls` is None if the panel does
    not hold: an attack without a ball, a head whose bias was not scaled, or other weights. `twin`, robust bits `[m]` of
    the first m samples, is this attack with the margin loss at s = 1; None if it was not run.
    """

    attack: str
    scale: float
    chance: float
    at_scale: AttackBits
    at_one: AttackBits | None
    controls: Controls | None = None
    twin: BitArray | None = None


@dataclass(frozen=True)
class Verdict:
    """One of `VERDICTS`, the reasons for it, each check's outcome and its counts, and the masked fractions.

    `counts` has `[count, of how many]` for each check that counts images. `masked_fraction` is of `masked_n` images:
    those that the margin twin ran on, or all if there is no twin. It is null for attacks without a gradient. Without
    the same attack at s = 1, both it and `reverse_fraction` are null.
    """

    verdict: str
    reasons: tuple[str, ...]
    checks: dict[str, str]
    counts: dict[str, list[int]]
    masked_fraction: float | None
    masked_fraction_of_correct: float | None
    masked_n: int | None
    reverse_fraction: float | None
    version: int = field(default=VERSION)


@dataclass(frozen=True)
class Finding:
    """How bad a check came out, the reason that it gives, and in how many of how many images, if it counts images."""

    level: Level
    reason: str
    count: int | None = None
    of: int = 0


Findings = dict[str, Finding]  # by check


def unpack(n: int, packed: bytes) -> BitArray:
    """Stored bits as a bool array `[n]`."""
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=n).astype(bool)


def judge(evidence: Evidence) -> Verdict:
    """The verdict on an attack, as bad as its worst finding."""
    at_scale, at_one = evidence.at_scale, evidence.at_one
    masked, masked_correct, masked_n = _masked(evidence)
    reverse = None
    if at_one is not None:
        reverse = int((at_scale.clean_correct & ~at_scale.robust & at_one.robust).sum()) / at_scale.robust.size
    findings = _correctness(evidence) | _blindness(evidence, masked, masked_n)
    if at_scale.outside is not None:
        findings["outside_ball"] = _any("outside_ball", at_scale.outside, at_scale.robust.size)
    if evidence.controls is not None:
        findings |= _panel(evidence, evidence.controls)
    reasons = dict.fromkeys(finding.reason for finding in findings.values() if finding.level)
    worst = max(finding.level for finding in findings.values())
    clean = "not_checked" if evidence.controls is None or at_one is None else "trusted"
    return Verdict(
        clean if worst is Level.PASSED else worst.name.lower(),
        tuple(reasons),
        {check: findings[check].level.name.lower() if check in findings else "not_checked" for check in CHECKS},
        {check: [finding.count, finding.of] for check, finding in findings.items() if finding.count is not None},
        None if masked is None else masked / masked_n,
        masked / masked_correct if masked is not None and masked_correct else None,
        None if masked is None else masked_n,
        reverse,
    )


def chance_of(majority_share: float | None, classes: int) -> float:
    """The fraction of images that the best constant answer gets right: that of their most frequent label.

    An attack of an earlier version left no such fraction; then the labels are taken to be equally frequent.

    >>> chance_of(0.9, 2), chance_of(None, 2)
    (0.9, 0.5)
    """
    return 1 / classes if majority_share is None else majority_share


def wilson(count: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """The Wilson score interval of a fraction, `count` of `n` > 0; 95 % unless `z` says otherwise (Wilson 1927).

    >>> [round(bound, 4) for bound in wilson(0, 10)]
    [0.0, 0.2775]
    """
    fraction, z2 = count / n, z * z
    middle = (fraction + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(fraction * (1 - fraction) / n + z2 / (4 * n * n))
    return (0.0 if count == 0 else middle - half), (1.0 if count == n else middle + half)


def _masked(evidence: Evidence) -> tuple[int | None, int, int]:
    """The masked examples, the clean-correct examples, and all examples among which these two were counted.

    Masked: clean-correct and robust at s, and broken at s = 1 by this attack or by its margin twin. Both are counted
    over the images that the twin ran on.
    """
    at_scale, at_one = evidence.at_scale, evidence.at_one
    if evidence.attack in WITHOUT_GRADIENT or at_one is None:
        return None, 0, 0
    n = at_scale.robust.size if evidence.twin is None else evidence.twin.size
    broken = at_one.clean_correct[:n] & ~at_one.robust[:n]  # with the bias left alone, classes change with s
    if evidence.twin is not None:
        broken = broken | ~evidence.twin
    correct = at_scale.clean_correct[:n]
    return int((correct & at_scale.robust[:n] & broken).sum()), int(correct.sum()), n


def _correctness(evidence: Evidence) -> Findings:
    """Whether there was anything to attack, and whether all of it was a number."""
    n, correct = evidence.at_scale.clean_correct.size, int(evidence.at_scale.clean_correct.sum())
    by_chance = correct == 0 or wilson(correct, n)[0] <= evidence.chance
    level = Level.INVALID if by_chance else Level.PASSED
    findings = {"nothing_correct": Finding(level, "nothing_correct", correct, n)}
    if evidence.at_scale.non_finite is not None:
        findings["non_finite"] = _any("non_finite", int(evidence.at_scale.non_finite.sum()), n)
    return findings


def _blindness(evidence: Evidence, masked: int | None, masked_n: int) -> Findings:
    findings: Findings = {}
    attack, n_correct, blind = evidence.at_scale, int(evidence.at_scale.clean_correct.sum()), 0
    if attack.zero_gradient is not None:
        blind = int((attack.zero_gradient & attack.clean_correct).sum())
        level = _above(blind / n_correct, 0.01, 0.10) if n_correct else Level.PASSED
        findings["zero_gradient"] = Finding(level, "zero_gradient", blind, n_correct)
    if masked is not None:
        # Up to s = 1 a loss can be too weak to break an example without its gradient being zero: that masks nothing.
        reason = "weak_loss" if evidence.scale <= 1 and blind == 0 else "masked"
        findings["masked"] = Finding(_above(masked / masked_n, 0.05, 0.20), reason, masked, masked_n)
    return findings


def _panel(evidence: Evidence, controls: Controls) -> Findings:
    m = controls.robust["margin"].size
    ours = evidence.at_scale.robust[:m]
    after_twin = ours & controls.robust["margin"]
    findings: Findings = {}
    for name in CHALLENGERS:
        weaker = int((ours & ~controls.robust[name]).sum())
        level = _above(weaker, max(5, 0.05 * m), max(10, 0.20 * m))
        closed = int((after_twin & ~controls.robust[name]).sum()) <= 0.01 * m
        reason = "weak_loss" if closed else f"weaker_than:{name}"
        findings[f"weaker_than:{name}"] = Finding(level, reason, weaker, m)
    if evidence.attack not in WITHOUT_GRADIENT:
        # The panel ran at s = 1, so this attack is taken at s = 1 too: examples that the scale masks lack no steps.
        at_one = ours if evidence.at_one is None else ours & evidence.at_one.robust[:m]
        newly = int((at_one & ~controls.robust["more_steps"]).sum())
        level = Level.SUSPECT if newly > max(0.02 * m, 3) else Level.PASSED
        findings["not_converged"] = Finding(level, "not_converged", newly, m)
    counts = controls.numbers
    findings["eps_zero"] = _any("eps_zero", counts["eps_zero_changed"], m)
    findings["random_forward"] = _any("random_forward", counts["random_forward_changed"], m)
    in_train_mode = (counts["train_mode_modules"] or 0) + (counts["batch_dependent_changed"] or 0)
    findings["train_mode"] = Finding(Level.INVALID if in_train_mode else Level.PASSED, "train_mode")
    return findings


def _above(value: float, suspect: float, invalid: float) -> Level:
    return Level((value > suspect) + (value > invalid))


def _any(reason: str, count: float | None, images: int) -> Finding:
    return Finding(Level.INVALID if count else Level.PASSED, reason, int(count or 0), images)
