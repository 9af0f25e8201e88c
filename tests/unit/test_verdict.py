"""The verdict on hand-made bits: every threshold of science/README.md (Controls) just below and just above its edge."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from service.model.verdict import (
    CHALLENGERS,
    CHECKS,
    REASONS,
    VERDICTS,
    VERSION,
    WITHOUT_GRADIENT,
    AttackBits,
    BitArray,
    Controls,
    Evidence,
    Verdict,
    unpack,
    wilson,
)
from service.model.verdict import judge as judge_evidence

N = 1000
COUNTS = {
    "train_mode_modules": 0,
    "random_forward_changed": 0,
    "batch_dependent_changed": 0,
    "eps_zero_changed": 0,
}


def first(count: int, n: int = N) -> BitArray:
    """[n] bool: the first `count` are true."""
    return np.arange(n) < count


def attack(robust: int, n: int = N, correct: int | None = None, blind: int | None = None, **more: Any) -> AttackBits:
    zero_gradient = None if blind is None else first(blind, n)
    return AttackBits(first(n if correct is None else correct, n), first(robust, n), zero_gradient, **more)


def panel(robust: int, n: int = N, counts: dict[str, int] | None = None, **others: int) -> Controls:
    """A panel under which `robust` of n survive everything, except where `others` says otherwise."""
    names = (*CHALLENGERS, "pgd", "more_steps")
    return Controls({name: first(others.get(name, robust), n) for name in names}, COUNTS | (counts or {}))


def judge(
    scale: float, at_scale: AttackBits, at_one: AttackBits, controls: Controls | None, *, name: str = "pgd",
    chance: float = 0.1, twin: BitArray | None = None,
) -> Verdict:  # fmt: skip
    """The verdict on PGD, whose margin twin is the panel's, unless another attack or twin is named."""
    panel_twin = controls.robust["margin"] if controls is not None and name == "pgd" else None
    twin = panel_twin if twin is None else twin
    return judge_evidence(Evidence(name, scale, chance, at_scale, at_one, controls, twin))


def at_one(robust: int, *, controls: Controls | None, n: int = N) -> Verdict:
    return judge(1.0, attack(robust, n), attack(robust, n), controls)


def test_nothing_found_is_trusted() -> None:
    whole = attack(600, blind=0, outside=0, non_finite=first(0))
    verdict = judge(5.0, whole, attack(600), panel(600))
    counts = {
        "nothing_correct": [N, N],
        **{check: [0, N] for check in CHECKS if check not in ("nothing_correct", "train_mode")},
    }
    assert verdict == Verdict("trusted", (), dict.fromkeys(CHECKS, "passed"), counts, 0.0, 0.0, N, 0.0, VERSION)


def test_what_was_wrong_at_one_masks_nothing() -> None:
    """With the weights alone scaled, images change their class with s: what came right is no failure of the attack."""
    verdict = judge(5.0, attack(900), attack(robust=600, correct=600), None)
    assert (verdict.verdict, verdict.masked_fraction) == ("not_checked", 0.0)
    assert judge(5.0, attack(900), attack(robust=600, correct=800), None).masked_fraction == 0.2


def test_what_was_not_run_says_so() -> None:
    """Without a panel there is nothing to trust, as of an attack without a ball."""
    verdict = at_one(600, controls=None)
    assert verdict.verdict == "not_checked"
    assert (verdict.checks.pop("masked"), verdict.checks.pop("nothing_correct")) == ("passed", "passed")
    assert set(verdict.checks.values()) == {"not_checked"}


@pytest.mark.parametrize(
    ("blind", "level"), [(0, "trusted"), (8, "trusted"), (9, "suspect"), (80, "suspect"), (81, "invalid")]
)
def test_zero_gradient_is_a_share_of_the_clean_correct(blind: int, level: str) -> None:
    """Above 1 % and 10 % of 800 clean-correct ones."""
    bits = attack(0, correct=800, blind=blind)
    verdict = judge(1.0, bits, bits, panel(0))
    assert verdict.verdict == level
    assert verdict.counts["zero_gradient"] == [blind, 800]
    assert verdict.checks["zero_gradient"] == ("passed" if level == "trusted" else level)
    assert verdict.reasons == (() if level == "trusted" else ("zero_gradient",))


def test_zero_gradients_of_images_that_were_wrong_anyway_do_not_count() -> None:
    bits = AttackBits(first(500), first(0), ~first(500))
    assert judge(1.0, bits, bits, panel(0)).verdict == "trusted"


@pytest.mark.parametrize(("masked", "level"), [(50, "trusted"), (51, "suspect"), (200, "suspect"), (201, "invalid")])
def test_masked_is_a_share_of_all(masked: int, level: str) -> None:
    """Above 5 % and 20 % of n: robust at s, broken at s = 1."""
    verdict = judge(10.0, attack(300 + masked, correct=800), attack(300, correct=800), None)
    assert verdict.verdict == ("not_checked" if level == "trusted" else level)
    assert verdict.counts["masked"] == [masked, N]
    assert verdict.reasons == (() if level == "trusted" else ("masked",))
    assert (verdict.masked_fraction, verdict.masked_fraction_of_correct) == (masked / N, masked / 800)


def test_the_margin_twin_counts_as_breaking_at_one() -> None:
    verdict = judge(10.0, attack(600), attack(600), panel(600, margin=300))
    assert verdict.masked_fraction == 0.3
    assert "masked" in verdict.reasons


@pytest.mark.parametrize("n", [256, 1000, 10_000])
def test_what_is_masked_entirely_is_masked_entirely_however_many_images_there_are(n: int) -> None:
    """The twin breaks all of its 256 images: 1.0, and not 256 / n."""
    verdict = judge(10.0, attack(n, n), attack(n, n), panel(256, 256, margin=0))
    assert (verdict.masked_fraction, verdict.masked_n, verdict.counts["masked"]) == (1.0, 256, [256, 256])
    assert verdict.verdict == "invalid"
    assert "masked" in verdict.reasons


def test_both_parts_of_masked_count_the_same_images() -> None:
    """Broken at s = 1 are images behind the twin's, which nobody has looked at with it."""
    behind = attack(1000), AttackBits(first(1000), first(256))
    verdict = judge(10.0, *behind, panel(256, 256))
    assert (verdict.masked_fraction, verdict.masked_n) == (0.0, 256)
    alone = judge(10.0, *behind, None)
    assert (alone.masked_fraction, alone.masked_n) == (0.744, 1000)


@pytest.mark.parametrize("name", sorted(WITHOUT_GRADIENT))
def test_an_attack_without_a_gradient_masks_nothing_and_is_weaker_instead(name: str) -> None:
    verdict = judge(10.0, attack(900), attack(215), panel(900, margin=215, more_steps=100), name=name)
    assert (verdict.masked_fraction, verdict.masked_fraction_of_correct, verdict.masked_n) == (None, None, None)
    assert (verdict.checks["masked"], verdict.checks["not_converged"]) == ("not_checked", "not_checked")
    assert verdict.checks["weaker_than:margin"] == "invalid"


def test_apgd_is_compared_with_its_own_twin() -> None:
    """Not with the panel's short PGD, which breaks more here."""
    verdict = judge(
        10.0, attack(256, 256), attack(256, 256), panel(256, 256, margin=0), name="apgd", twin=first(200, 256)
    )
    assert verdict.counts["masked"] == [56, 256]
    without = judge(10.0, attack(256, 256), attack(200, 256), panel(256, 256, margin=0), name="apgd")
    assert without.counts["masked"] == [56, 256]  # a stored panel of before has none: this attack's own bits at s = 1


def test_only_the_clean_correct_can_be_masked() -> None:
    bits = AttackBits(first(100), first(100) | ~first(700)), AttackBits(first(100), first(100))
    assert judge(10.0, *bits, None).masked_fraction == 0


def test_reverse_is_shown_and_no_reason() -> None:
    verdict = judge(10.0, attack(100), attack(700), None)
    assert (verdict.verdict, verdict.reverse_fraction, verdict.masked_fraction) == ("not_checked", 0.6, 0)


@pytest.mark.parametrize("scale", [0.25, 1.0])
@pytest.mark.parametrize(("blind", "reason"), [(0, "weak_loss"), (1, "masked")])
def test_up_to_scale_one_an_excess_without_zero_gradients_is_a_weak_loss(scale: float, blind: int, reason: str) -> None:
    verdict = judge(scale, attack(300, blind=blind), attack(0, blind=0), None)
    assert verdict.reasons == (reason,)
    assert verdict.checks["masked"] == "invalid"


@pytest.mark.parametrize("name", CHALLENGERS)
@pytest.mark.parametrize(
    ("n", "weaker", "level"),
    [
        *((1000, 50, "trusted"), (1000, 51, "suspect"), (1000, 200, "suspect"), (1000, 201, "invalid")),
        *((40, 5, "trusted"), (40, 6, "suspect"), (40, 10, "suspect"), (40, 11, "invalid")),
    ],
)
def test_weaker_than_a_challenger(name: str, n: int, weaker: int, level: str) -> None:
    """Above max(5, .05 n) and max(10, .20 n)."""
    verdict = at_one(n, n=n, controls=panel(n, n, None, **{name: n - weaker}))
    assert verdict.checks[f"weaker_than:{name}"] == ("passed" if level == "trusted" else level)
    if name == "margin":  # the twin closes its own gap, and the masked fraction has its own thresholds
        assert set(verdict.reasons) <= {"weak_loss"}
    else:
        assert verdict.verdict == level
        assert verdict.reasons == (() if level == "trusted" else (f"weaker_than:{name}",))


@pytest.mark.parametrize(("gap", "reason"), [(10, "weak_loss"), (11, "weaker_than:square")])
def test_where_the_twin_closes_the_gap_the_loss_was_weak(gap: int, reason: str) -> None:
    """Up to 1 % of n left that the square attack breaks and the margin twin does not."""
    verdict = at_one(600, controls=panel(600, square=400, margin=400 + gap))
    assert reason in verdict.reasons
    assert ("weaker_than:square" in verdict.reasons) == (gap == 11)
    assert verdict.checks["weaker_than:square"] == "suspect"


@pytest.mark.parametrize(
    ("n", "newly", "level"),
    [
        *((1000, 20, "trusted"), (1000, 21, "suspect"), (1000, 600, "suspect")),
        *((100, 3, "trusted"), (100, 4, "suspect")),
    ],
)
def test_not_converged_is_suspect_at_worst(n: int, newly: int, level: str) -> None:
    """Above max(2 % of n, 3)."""
    verdict = at_one(n, n=n, controls=panel(n, n, more_steps=n - newly))
    assert verdict.verdict == level
    assert verdict.reasons == (() if level == "trusted" else ("not_converged",))


def test_a_panel_that_has_not_converged_says_nothing_of_an_attack_that_has() -> None:
    """APGD with restarts breaks all that four times the panel's steps break, of which the panel's own break half."""
    panel_of_few_steps = panel(500, pgd=1000, more_steps=500)
    assert judge(1.0, attack(500), attack(500), panel_of_few_steps, name="apgd").verdict == "trusted"
    assert judge(1.0, attack(521), attack(521), panel_of_few_steps, name="fgsm").checks["not_converged"] == "suspect"


def test_what_the_scale_masks_is_no_lack_of_steps() -> None:
    """The panel's attack with more steps ran at s = 1: it is compared with this attack at s = 1."""
    masked = judge(5.0, attack(540), attack(500), panel(500))
    assert (masked.checks["not_converged"], masked.counts["not_converged"]) == ("passed", [0, N])
    weak_at_one_too = judge(5.0, attack(540), attack(530), panel(500))
    assert weak_at_one_too.counts["not_converged"] == [30, N]
    assert weak_at_one_too.checks["not_converged"] == "suspect"


@pytest.mark.parametrize(("correct", "chance"), [(0, 0.1), (107, 0.1), (118, 0.1), (500, 0.5), (904, 0.904)])
def test_a_network_that_is_right_by_chance_has_nothing_to_attack(correct: int, chance: float) -> None:
    """10.7 % of ten classes (a normalisation in grey levels) was trusted. The Wilson interval decides."""
    bits = attack(0, correct=correct)
    verdict = judge(1.0, bits, bits, panel(0), chance=chance)
    assert (verdict.verdict, verdict.reasons) == ("invalid", ("nothing_correct",))
    assert verdict.counts["nothing_correct"] == [correct, N]


@pytest.mark.parametrize(("correct", "chance"), [(121, 0.1), (950, 0.1), (540, 0.5), (930, 0.904)])
def test_a_network_that_is_right_above_chance(correct: int, chance: float) -> None:
    bits = attack(0, correct=correct)
    assert judge(1.0, bits, bits, panel(0), chance=chance).verdict == "trusted"


def test_values_that_are_no_numbers_are_never_robust() -> None:
    bits = attack(0, 100, non_finite=first(40, 100))
    verdict = judge(1.0, bits, bits, panel(0, 100))
    assert (verdict.verdict, verdict.reasons) == ("invalid", ("non_finite",))
    assert verdict.counts["non_finite"] == [40, 100]


@pytest.mark.parametrize(("count", "n"), [(0, 10), (3, 10), (10, 10), (1, 1), (215, 1000), (9_999, 10_000)])
def test_wilson_is_scipys(count: int, n: int) -> None:
    interval = binomtest(count, n).proportion_ci(method="wilson")
    assert wilson(count, n) == pytest.approx((interval.low, interval.high), abs=1e-12)


@pytest.mark.parametrize(
    ("count", "reason"),
    [
        ("eps_zero_changed", "eps_zero"),
        ("random_forward_changed", "random_forward"),
        ("train_mode_modules", "train_mode"),
        ("batch_dependent_changed", "train_mode"),
    ],
)
def test_one_is_too_many(count: str, reason: str) -> None:
    verdict = at_one(600, controls=panel(600, counts={count: 1}))
    assert (verdict.verdict, verdict.reasons) == ("invalid", (reason,))


def test_one_example_outside_the_ball_is_too_many() -> None:
    verdict = judge(1.0, attack(600, outside=1), attack(600, outside=0), None)
    assert (verdict.verdict, verdict.reasons) == ("invalid", ("outside_ball",))


def test_the_panel_may_cover_fewer_examples_than_the_attack() -> None:
    """Its thresholds are shares of its own examples; behind them only the attack at s = 1 speaks."""
    verdict = judge(1.0, attack(1000), attack(1000), panel(256, 256, square=243))
    assert verdict.checks["weaker_than:square"] == "suspect"  # 13 > .05 * 256
    assert judge(1.0, attack(1000), attack(1000), panel(256, 256, square=244)).verdict == "trusted"


def test_a_verdict_is_as_bad_as_its_worst_finding_and_names_each_reason_once() -> None:
    verdict = judge(
        100.0,
        attack(900, correct=900, blind=900, outside=0),
        attack(0, correct=900),
        panel(0, counts={"eps_zero_changed": 3}),
    )
    assert verdict.verdict == "invalid"
    assert verdict.reasons == ("zero_gradient", "masked", "weak_loss", "eps_zero")


def test_nobody_clean_correct() -> None:
    bits = attack(0, correct=0, blind=700, outside=0)
    verdict = judge(1.0, bits, bits, panel(0))
    assert (verdict.verdict, verdict.masked_fraction_of_correct) == ("invalid", None)
    assert verdict.reasons == ("nothing_correct",)


def test_stored_bits_are_unpacked_as_they_were() -> None:
    bits = np.random.RandomState(0).rand(77) < 0.5
    assert np.array_equal(unpack(77, np.packbits(bits).tobytes()), bits)


@given(st.data())
def test_any_bits_give_a_verdict(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    m = data.draw(st.integers(1, n))

    def bits(size: int) -> BitArray:
        return np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=np.bool_)

    correct = bits(n)
    at_scale, one = (AttackBits(correct, bits(n) & correct, bits(n), data.draw(st.integers(0, n))) for _ in range(2))
    names = (*CHALLENGERS, "pgd", "more_steps")
    controls = Controls({name: bits(m) & correct[:m] for name in names}, COUNTS)
    kept = one.robust.copy()
    name = data.draw(st.sampled_from(["pgd", "fgsm", "noise", "cw"]))
    verdict = judge(
        data.draw(st.floats(0.1, 100)), at_scale, one, data.draw(st.sampled_from([controls, None])), name=name
    )
    assert np.array_equal(kept, one.robust)
    assert verdict.verdict in VERDICTS
    assert set(verdict.reasons) <= set(REASONS)
    assert bool(verdict.reasons) == (verdict.verdict in ("suspect", "invalid"))
    assert set(verdict.checks) == set(CHECKS)
    assert set(verdict.checks.values()) <= {"passed", "suspect", "invalid", "not_checked"}
    assert verdict.verdict == "trusted" or verdict.verdict in verdict.checks.values()
    assert verdict.masked_fraction is None or 0 <= verdict.masked_fraction <= 1
    assert all(0 <= count <= of for count, of in verdict.counts.values())
