"""What is counted, against plain Python: a network once, by the mean over its attack seeds, of what each task left."""

import math
import statistics
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from service.model.observations import Moments, Observations, accuracy_interval, averaged, interval, range_of
from service.model.verdict import wilson

Row = tuple[str, str, int, str, float]  # group, network, attack seed, task, value


@st.composite
def observed(draw: st.DrawFn) -> list[Row]:
    """Results of a few networks in two groups; equal tasks have equal values."""
    value = st.floats(-1e6, 1e6, allow_subnormal=False)
    tasks = draw(st.dictionaries(st.tuples(st.sampled_from("ABCD"), st.integers(0, 2), st.integers(0, 1)), value))
    return [
        (draw(st.sampled_from("xy")), network, seed, f"{network}{seed}{place}", found)
        for (network, seed, place), found in tasks.items()
    ]


def counted(rows: list[Row]) -> dict[str, list[float]]:
    of_networks: dict[Any, dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for group, network, seed, task, value in rows:
        of_networks[group, network][seed][task] = value
    values: dict[str, list[float]] = defaultdict(list)
    for (group, _), seeds in of_networks.items():
        means = [math.fsum(tasks.values()) / len(tasks) for tasks in seeds.values()]
        values[group].append(math.fsum(means) / len(means))
    return {group: sorted(of) for group, of in values.items()}


def taken(rows: list[Row]) -> dict[str, Any]:
    found: Observations[str] = Observations(1)
    for start in range(0, len(rows), 3):  # in batches
        groups, networks, seeds, tasks, values = zip(*rows[start : start + 3], strict=True)
        found.add(groups, networks, seeds, tasks, values)
    assert found.networks() == {group: len({row[1] for row in rows if row[0] == group}) for group, *_ in rows}
    return {group: values.tolist() for group, values in found.values(0, "network").items()}


@settings(max_examples=100, deadline=None)
@given(observed(), st.data())
def test_duplicated_and_reordered_rows_change_no_bit(rows: list[Row], data: st.DataObject) -> None:
    found = taken(rows)
    assert found == {group: pytest.approx(values, rel=1e-9, abs=1e-9) for group, values in counted(rows).items()}
    again = data.draw(st.lists(st.sampled_from(rows), max_size=10)) if rows else []
    assert taken(data.draw(st.permutations([*rows, *again]))) == found


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0.1, 0.3, 0.7, 1 / 3]), min_size=1, max_size=4), st.integers(2, 5))
def test_repeats_that_say_the_same_have_exactly_that_mean(values: list[float], times: int) -> None:
    n = len(values) * times
    zeros, networks = np.zeros(n, np.int64), np.repeat(np.arange(len(values)), times)
    _, means = averaged(zeros, networks, np.arange(n), np.arange(n), np.repeat(values, times))
    assert means.tolist() == sorted(values)


def test_a_missing_value_is_no_observation_of_a_network_that_counts() -> None:
    found: Observations[str] = Observations(1)
    found.add(["x", "x", "y"], ["A", "B", "C"], [0, 0, 0], ["1", "2", None], [0.5, None, None])
    assert found.networks() == {"x": 2, "y": 1}
    assert {key: of.tolist() for key, of in found.values(0, "network").items()} == {"x": [0.5], "y": []}
    assert Observations(1).values(0, "network") == Observations(1).networks() == {}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_an_interval_of_shares_is_students_within_0_and_1(shares: list[float]) -> None:
    mean, std = float(np.mean(shares)), float(np.std(shares, ddof=1))
    low, high = interval(len(shares), mean, std, within=(0.0, 1.0))
    half = stats.t.ppf(0.975, len(shares) - 1) * stats.sem(shares)
    assert (low, high) == pytest.approx((max(0.0, mean - half), min(1.0, mean + half)), abs=1e-9)
    assert interval(1, mean, None, within=(0.0, 1.0)) == (None, None)


def test_two_seeds_of_the_issue() -> None:
    """.175 to 1.445 is what Student's t says of these."""
    low, high = interval(2, 0.81, 0.05 * math.sqrt(2))
    assert (low, high) == pytest.approx((0.175, 1.445), abs=1e-3)
    assert interval(2, 0.81, 0.05 * math.sqrt(2), within=(0.0, 1.0)) == (low, 1.0)


@pytest.mark.parametrize(("count", "n"), [(0, 10), (10, 10), (1, 1000), (57, 100), (500, 1000)])
def test_wilson_is_that_of_scipy(count: int, n: int) -> None:
    known = stats.binomtest(count, n).proportion_ci(method="wilson")
    assert wilson(count, n) == pytest.approx((known.low, known.high), abs=1e-12)
    assert accuracy_interval(count / n, n) == pytest.approx((known.low, known.high), abs=1e-12)
    assert accuracy_interval(None, n) == accuracy_interval(0.5, 0) == (None, None)


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e12, 1e12), st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=2, max_size=30))
def test_sums_are_believed_only_where_they_do_not_cancel(middle: float, offsets: list[float]) -> None:
    values = np.sort(middle + np.array(offsets))
    of = Moments()
    of.add(len(values), float(values.sum()), float((values**2).sum()), float(values[0]), float(values[-1]))
    std = statistics.stdev(values.tolist())  # numpy rounds the mean of equal numbers
    if not of.cancels:
        assert of.std == pytest.approx(std, rel=1e-6)
    of.take(values)
    assert of.std == pytest.approx(std, rel=1e-6)


def test_a_mean_of_1e8_and_a_spread_of_1_cancel() -> None:
    of = Moments()
    for value in (1e8 - 1, 1e8, 1e8 + 1):
        of.add(1, value, value * value, value, value)
    assert of.cancels
    small = Moments()
    for value in (0.284, 0.31, 0.338):
        small.add(1, value, value * value, value, value)
    assert not small.cancels


def test_a_mean_of_equal_numbers_has_no_spread() -> None:
    of = Moments()
    for _ in range(3):
        of.add(1, 0.1, 0.1 * 0.1, 0.1, 0.1)
    assert (of.std, of.mean, of.cancels) == (0.0, 0.1, False)
    assert interval(3, of.mean, of.std) == (0.1, 0.1)


SIZES = st.builds(lambda sign, size, exponent: sign * size * 10.0**exponent, st.sampled_from([-1, 1]),
                  st.floats(1, 9.99), st.integers(-300, 299))  # fmt: skip
ALIKE = st.builds(lambda size, exponent: size * 10.0**exponent, st.floats(1, 9.99), st.just(0))


@settings(max_examples=300, deadline=None)
@given(st.lists(SIZES, min_size=2, max_size=12) | st.builds(
    lambda sizes, exponent: [size * 10.0**exponent for size in sizes],
    st.lists(ALIKE, min_size=2, max_size=12), st.integers(-300, 299),
))  # fmt: skip
def test_mean_and_deviation_are_those_of_fractions_whatever_the_size(values: list[float]) -> None:
    """`statistics` computes both in whole fractions."""
    ordered = np.sort(values)
    of = Moments()
    of.add(len(values), None, None, float(ordered[0]), float(ordered[-1]))
    of.take(ordered)
    largest = max(map(abs, values))
    assert of.mean == pytest.approx(statistics.mean(values), rel=1e-12, abs=largest * 1e-14)
    assert of.std == pytest.approx(statistics.stdev(values), rel=1e-9, abs=0)
    assert of.std is None or (of.std > 0) == (ordered[0] != ordered[-1])
    low, high = interval(of.n, of.mean, of.std)
    assert low is not None
    assert high is not None
    assert math.isfinite(low)
    assert math.isfinite(high)
    zeros = np.zeros(len(values), np.int64)
    _, mean = averaged(zeros, zeros, zeros, np.arange(len(values)), np.array(values))
    assert mean[0] == pytest.approx(statistics.mean(values), rel=1e-12, abs=largest * 1e-14)


@pytest.mark.parametrize(
    ("values", "mean", "std"),
    [
        ([1e-170, 2e-170, 3e-170], 2e-170, 1e-170),
        ([1e200, 2e200, 3e200], 2e200, 1e200),
        ([1.2e308, 1.3e308, 1.4e308], 1.3e308, 1e307),
        ([-1.7e308, 1.7e308], 0.0, None),
    ],
)
def test_sums_of_what_leaves_the_range_are_not_believed(values: list[float], mean: float, std: float | None) -> None:
    of = Moments()
    of.add(len(values), 0.0, 0.0, values[0], values[-1])
    assert of.leaves_range
    assert of.cancels
    of.take(np.array(values))
    assert of.mean == pytest.approx(mean, rel=1e-12)
    assert of.std == (None if std is None else pytest.approx(std, rel=1e-9))


SHARES = (
    "robust_accuracy", "robust_accuracy_of_correct", "masked_fraction", "zero_gradient_fraction_of_all", "flip_rate",
    "detector_accuracy", "detector_auroc", "detector_adaptive_auroc", "majority_share", "clean_accuracy_at_chance",
    "trajectory_flip_rate_any_iterate", "basin_censored_fraction_e01", "valley_relative_sharpness",
    "valley_loose_softmax_trace", "peak_at_start_relative_sharpness", "bound_violated_linear",
    "bound_violated_examples_linear", "top_eigenvalue_network_converged",
)  # fmt: skip
WITHOUT_BOUNDS = (
    "robust_loss", "log_hessian_trace_median", "valley_n", "basin_n", "hessian_trace_penultimate_share",
    "basin_width_e01_median", "bound_linear_median", "sam_sharpness",
)  # fmt: skip


def test_which_numbers_have_bounds() -> None:
    """The share of a trace is none of them: other layers may have a negative trace."""
    assert {name: range_of(name) for name in SHARES} == dict.fromkeys(SHARES, (0.0, 1.0))
    assert {name: range_of(name) for name in WITHOUT_BOUNDS} == dict.fromkeys(WITHOUT_BOUNDS)
    assert range_of("pac_bayes_accuracy_drop") == (-1.0, 1.0)
    assert interval(2, 0.81, 0.05 * math.sqrt(2), within=(-1.0, 1.0))[1] == 1.0
