"""Kendall's tau against its definition, Simpson's paradox, and the bootstrap."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from service.model.correlation import correlate, tau


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=15))
def test_tau_b_by_its_definition(points: list[tuple[int, int]]) -> None:
    x, y = (np.array(v, dtype=np.float64) for v in zip(*points, strict=True))
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in combinations(range(len(x)), 2)]
    untied = [sum(s[side] != 0 for s in signs) for side in (0, 1)]
    found = tau(x, y)
    if 0 in untied:
        assert found is None
    else:
        want = sum(a * b for a, b in signs) / np.sqrt(untied[0] * untied[1])
        assert found == pytest.approx(float(want))


def ids(n: int) -> list[str]:
    return [f"checkpoint-{i}" for i in range(n)]


def test_within_architectures_the_sign_may_be_the_other_one() -> None:
    measure = [*range(8), *range(100, 108)]
    target = [*range(8, 0, -1), *range(108, 100, -1)]
    found = correlate(measure, target, ["a"] * 8 + ["b"] * 8, ids(16), resamples=200)
    assert found.within == pytest.approx(-1)
    assert found.pooled is not None
    assert found.pooled > 0
    assert found.pooled_low is not None
    assert found.pooled_high is not None
    assert found.pooled_low <= found.pooled <= found.pooled_high
    assert (found.n, found.architectures) == (16, 2)


def test_the_bootstrap_is_that_of_scipy() -> None:
    random = np.random.RandomState(3)
    x, y = random.randint(0, 6, (2, 30)).astype(np.float64)
    x[:2] = np.inf, -np.inf
    kinds = np.array(["a"] * 10 + ["b"] * 17 + ["c"] * 3)
    found = correlate(x, y, kinds.tolist(), ids(30), resamples=200)
    picks = np.random.RandomState(0)
    pooled, within = [], []
    for pick in (picks.randint(0, 30, 30) for _ in range(200)):
        ranks = np.argsort(np.argsort(x, kind="stable"), kind="stable")  # kendalltau knows no infinities
        ranks = np.array([ranks[x == value].min() for value in x])
        pooled.append(stats.kendalltau(ranks[pick], y[pick]).statistic)
        each = [stats.kendalltau(ranks[pick][of], y[pick][of]).statistic
                for of in (kinds[pick] == kind for kind in "abc") if of.sum() > 1]  # fmt: skip
        within.append(np.nanmean(each))
    assert (found.pooled_low, found.pooled_high) == pytest.approx(tuple(np.quantile(pooled, (0.025, 0.975))))
    assert (found.within_low, found.within_high) == pytest.approx(tuple(np.quantile(within, (0.025, 0.975))))


def test_the_interval_of_no_relation_contains_zero_nineteen_times_in_twenty() -> None:
    random, hits = np.random.RandomState(0), 0
    for _ in range(60):
        x, y = random.rand(2, 40).tolist()
        found = correlate(x, y, ["a"] * 40, ids(40), resamples=100)
        assert found.pooled_low is not None
        assert found.pooled_high is not None
        hits += found.pooled_low < 0 < found.pooled_high
    assert 52 <= hits <= 60
    assert found == correlate(x, y, ["a"] * 40, ids(40), resamples=100)


def test_what_is_refused() -> None:
    few = correlate(range(9), range(9), ["a"] * 9, ids(9))
    assert few.n == 9
    assert few.pooled is None
    constant = correlate([1] * 12, range(12), ["a"] * 12, ids(12), resamples=5)
    assert constant.pooled is None
    assert constant.within_low is None
    with pytest.raises(ValueError, match="more than once"):
        correlate(range(12), range(12), ["a"] * 12, ["same"] * 12)
    with pytest.raises(ValueError):
        correlate([float("nan")] * 12, range(12), ["a"] * 12, ids(12))
