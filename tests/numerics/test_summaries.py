"""Order statistics and log means, against NumPy's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workers.science.summaries import QUANTILES, log_mean, quantile, row_summaries, summary


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=200))
def test_quantiles_are_numpys_order_statistics(values: list[float]) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    for q in QUANTILES:
        assert quantile(tensor, q) == np.quantile(np.array(values), q, method="inverted_cdf")


def test_quantiles_at_a_whole_rank() -> None:
    """0.05 * 20 and 0.95 * 20 are ranks 1 and 19, whatever floating point makes of the product."""
    values = torch.arange(1.0, 21.0)
    assert [quantile(values, q) for q in QUANTILES] == [1, 5, 10, 15, 19]


def test_zeros_come_first_and_are_counted() -> None:
    log_v = torch.tensor([0.0, -math.inf, math.log(3), -math.inf], dtype=torch.float64)
    found = summary(log_v, "x", log=True)
    assert found["x_n_zero"] == 2
    assert found["x_q05"] is None
    assert found["x_q75"] == 0.0
    assert found["x_log_mean"] == pytest.approx(math.log(1.0))


def test_nothing_that_json_has_no_word_for() -> None:
    assert summary(torch.zeros(0), "x", log=True)["x_median"] is None
    assert log_mean(torch.full((3,), -math.inf)) is None
    assert quantile(torch.tensor([math.inf, 1.0]), 0.95) is None


def test_log_mean_far_below_what_float64_holds() -> None:
    assert log_mean(torch.tensor([-2000.0, -2000.0 + math.log(3)], dtype=torch.float64)) == pytest.approx(
        -2000 + math.log(2)
    )


def test_rows() -> None:
    found = row_summaries(torch.tensor([[3.0, 1.0, 2.0], [6.0, 6.0, 0.0]]), "x")
    assert found["x_median"] == [2.0, 6.0]
    assert found["x_mean"] == [2.0, 4.0]
    assert row_summaries(torch.zeros(2, 0), "x")["x_q05"] == [None, None]
