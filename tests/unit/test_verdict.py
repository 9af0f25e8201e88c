"""The verdict on hand-made bits: every threshold of SCIENCE.md section 8 just below and just above its edge."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.verdict import CHALLENGERS, CHECKS, VERSION, AttackBits, BitArray, Controls, Verdict, judge, unpack

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


def at_one(robust: int, *, controls: Controls | None, n: int = N) -> Verdict:
    return judge(1.0, attack(robust, n), attack(robust, n), controls)


def test_nothing_found_is_trusted() -> None:
    verdict = judge(5.0, attack(600, blind=0, outside=0), attack(600), panel(600))
    assert verdict == Verdict("trusted", (), dict.fromkeys(CHECKS, "passed"), 0.0, 0.0, 0.0, VERSION)


def test_what_was_wrong_at_one_masks_nothing() -> None:
    """With the weights alone scaled, images change their class with s: what came right is no failure of the attack."""
    verdict = judge(5.0, attack(900), attack(robust=600, correct=600), None)
    assert (verdict.verdict, verdict.masked_fraction) == ("trusted", 0.0)
    assert judge(5.0, attack(900), attack(robust=600, correct=800), None).masked_fraction == 0.2


def test_what_was_not_run_says_so() -> None:
    verdict = at_one(600, controls=None)
    assert verdict.verdict == "trusted"
    assert verdict.checks.pop("masked") == "passed"
    assert set(verdict.checks.values()) == {"not_checked"}


LEVELS = ("trusted", "suspect", "invalid")


@pytest.mark.parametrize(
    ("blind", "level"), [(0, "trusted"), (8, "trusted"), (9, "suspect"), (80, "suspect"), (81, "invalid")]
)
def test_zero_gradient_is_a_share_of_the_clean_correct(blind: int, level: str) -> None:
    """Above 1 % and 10 % of 800 clean-correct ones."""
    bits = attack(0, correct=800, blind=blind)
    verdict = judge(1.0, bits, bits, None)
    assert verdict.verdict == level
    assert verdict.checks["zero_gradient"] == ("passed" if level == "trusted" else level)
    assert verdict.reasons == (() if level == "trusted" else ("zero_gradient",))


def test_zero_gradients_of_images_that_were_wrong_anyway_do_not_count() -> None:
    bits = AttackBits(first(500), first(0), ~first(500))
    assert judge(1.0, bits, bits, None).verdict == "trusted"


@pytest.mark.parametrize(("masked", "level"), [(50, "trusted"), (51, "suspect"), (200, "suspect"), (201, "invalid")])
def test_masked_is_a_share_of_all(masked: int, level: str) -> None:
    """Above 5 % and 20 % of n: robust at s, broken at s = 1."""
    verdict = judge(10.0, attack(300 + masked, correct=800), attack(300, correct=800), None)
    assert verdict.verdict == level
    assert verdict.reasons == (() if level == "trusted" else ("masked",))
    assert (verdict.masked_fraction, verdict.masked_fraction_of_correct) == (masked / N, masked / 800)


def test_the_margin_twin_counts_as_breaking_at_one() -> None:
    verdict = judge(10.0, attack(600), attack(600), panel(600, margin=300))
    assert verdict.masked_fraction == 0.3
    assert "masked" in verdict.reasons


def test_only_the_clean_correct_can_be_masked() -> None:
    bits = AttackBits(first(100), first(100) | ~first(700)), AttackBits(first(100), first(100))
    assert judge(10.0, *bits, None).masked_fraction == 0


def test_reverse_is_shown_and_no_reason() -> None:
    verdict = judge(10.0, attack(100), attack(700), None)
    assert (verdict.verdict, verdict.reverse_fraction, verdict.masked_fraction) == ("trusted", 0.6, 0)


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
    verdict = at_one(n, n=n, controls=panel(n, n, **{name: n - weaker}))
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
    assert (verdict.verdict, verdict.masked_fraction_of_correct) == ("trusted", None)


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
    at_scale, one = (AttackBits(correct, bits(n) & correct, bits(n), data.draw(st.integers(0, 2))) for _ in range(2))
    names = (*CHALLENGERS, "pgd", "more_steps")
    controls = Controls({name: bits(m) & correct[:m] for name in names}, COUNTS)
    kept = one.robust.copy()
    verdict = judge(data.draw(st.floats(0.1, 100)), at_scale, one, controls)
    assert np.array_equal(kept, one.robust)
    assert verdict.verdict in LEVELS
    assert bool(verdict.reasons) == (verdict.verdict != "trusted")
    assert set(verdict.checks) == set(CHECKS)
    assert set(verdict.checks.values()) <= {"passed", "suspect", "invalid", "not_checked"}
    assert verdict.verdict == "trusted" or verdict.verdict in verdict.checks.values()
    assert 0 <= verdict.masked_fraction + verdict.reverse_fraction <= 1
