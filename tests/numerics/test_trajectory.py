"""The recorder against a second computation, and paths made by hand with known valleys, widths and take-offs."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workers.science.attacks import AttackInput
from workers.science.attacks.pgd import pgd
from workers.science.closed_forms import ClosedForms
from workers.science.cross_entropy import log_odds
from workers.science.errors import NonFinite, WrongShape
from workers.science.heads import features_and_logits, linear_head
from workers.science.trajectory import Recorder, Trajectory, analyse, basin_widths, first_flip, take_off, valleys


def hand_made(
    loss: list[list[float]],
    *,
    kappa: list[list[float]] | None = None,
    wrong: list[list[int]] | None = None,
    distance: list[list[float]] | None = None,
    classes: int = 10,
) -> Trajectory:
    """Rows are examples, columns iterates; label 0, `wrong` marks another prediction; `||phi|| = ||W|| = 1`."""

    def columns(rows: Any, default: Any) -> Tensor:
        return torch.tensor(default if rows is None else rows, dtype=torch.float64).T

    n, steps = len(loss), len(loss[0])
    zeros = torch.zeros(steps, n, dtype=torch.float64)
    moved = columns(distance, [[0.1 * t for t in range(steps)]] * n)
    return Trajectory(
        y=torch.zeros(n, dtype=torch.int64),
        index=torch.arange(n),
        log_odds=columns(loss, None).clamp(min=1e-300).expm1().log(),
        loss=columns(loss, None),
        log_rest=zeros - 1,
        predicted=columns(wrong, [[0] * steps] * n).long(),
        log_softmax_trace=columns(kappa, [[1.0] * steps] * n).log(),
        log_feature_norm=zeros,
        log_relative_flatness=zeros,
        linf=moved,
        l2=2 * moved,
        feature_moved=zeros,
        phi_0=torch.ones(n, 1),
        log_weight_norm=0.0,
        classes=classes,
    )


FLIPS = [0, 1, 1, 1]


@pytest.mark.parametrize(
    ("kappa", "loss", "valley", "loose", "at_start"),
    [
        ([1.0, 10.0, 5.0, 1.0], [0.1, 1.0, 2.0, 3.0], 1, 0, 0),  # exactly ten times, both ways
        ([1.0, 20.0, 5.0, 1.0], [0.1, 1.0, 2.0, 3.0], 1, 1, 0),
        ([1.0, 9.0, 5.0, 0.5], [0.1, 1.0, 2.0, 3.0], 0, 1, 0),  # does not rise enough
        ([1.0, 50.0, 20.0, 6.0], [0.1, 1.0, 2.0, 3.0], 0, 0, 0),  # does not fall enough
        ([1.0, 1.0, 50.0, 50.0], [0.1, 1.0, 2.0, 3.0], 0, 0, 0),  # a tie of the peak: the first one counts
        ([1.0, 50.0, 50.0, 1.0], [0.1, 1.0, 4.0, 3.0], 1, 1, 0),  # a tie: loss 1 at the first peak is below the last
        ([1.0, 50.0, 5.0, 1.0], [0.1, 3.0, 2.0, 3.0], 0, 1, 0),  # loss ends where it was at the peak
        ([1.0, 2.0, 5.0, 50.0], [0.1, 1.0, 2.0, 3.0], 0, 0, 0),  # still rising
        ([50.0, 50.0, 5.0, 1.0], [0.1, 1.0, 2.0, 3.0], 0, 1, 1),  # downhill from the start
        ([0.0, 1.0, 0.5, 0.0], [0.1, 1.0, 2.0, 3.0], 1, 1, 0),  # exact zeros
        ([0.0, 0.0, 0.0, 0.0], [0.1, 1.0, 2.0, 3.0], 0, 0, 1),
    ],
)
def test_valley(kappa: list[float], loss: list[float], valley: int, loose: int, at_start: int) -> None:
    found = valleys(hand_made([loss], kappa=[kappa], wrong=[FLIPS]))
    names = ("valley", "valley_loose", "peak_at_start")
    assert tuple(found[f"{name}_relative_sharpness"] for name in names) == (valley, loose, at_start)
    assert found["valley_softmax_trace"] == valley
    assert found["valley_feature_norm_squared"] == 0
    assert found["peak_at_start_feature_norm_squared"] == 1


def test_valley_counts_only_who_flips_and_moved_but_loose_counts_all() -> None:
    path, loss = [1.0, 50.0, 5.0, 1.0], [0.1, 1.0, 2.0, 3.0]
    still = [0.0, 0.0, 0.0, 0.0]
    away = [0.0, 0.1, 0.2, 0.3]
    found = valleys(
        hand_made(
            [loss] * 5,
            kappa=[path, path, path, [1.0] * 4, path],
            wrong=[FLIPS, [0, 0, 0, 0], [1, 1, 1, 1], FLIPS, [0, 1, 0, 0]],
            distance=[away, away, away, away, still],
        )
    )
    assert found["valley_n"] == 2
    assert found["valley_relative_sharpness"] == 1 / 2
    assert found["valley_loose_relative_sharpness"] == 4 / 5


def test_no_flip_no_share() -> None:
    found = valleys(hand_made([[0.1, 0.2]]))
    assert found["valley_n"] == 0
    assert found["valley_relative_sharpness"] is None


def test_basin_width() -> None:
    log2 = math.log(2)
    loss = [
        [0.0, 0.01, 0.02, 5.0],  # 0.01 is not "more than 0.01"
        [1.0, 1.05, 1.2, 1.0 + 2 * log2],
        [0.0, 0.0, 0.0, 0.005],  # never: censored
        [0.0, 0.0, 0.0, 0.0],  # did not move: blind
        [9.0, 9.0, 9.0, 19.0],  # not clean-correct
    ]
    distance = [[0.0, 0.1, 0.2, 0.3]] * 3 + [[0.0] * 4] + [[0.0, 0.1, 0.2, 0.3]]
    wrong = [[0] * 4] * 4 + [[1] * 4]
    found = basin_widths(hand_made(loss, wrong=wrong, distance=distance), "linf")
    assert (found["basin_n"], found["basin_n_blind"]) == (3, 1)
    assert found["basin_width_e001_q05"] == 0.1  # example 1: 1.05
    assert found["basin_width_e001_median"] == 0.2  # example 0
    assert found["basin_width_e001_q95"] is None
    assert found["basin_steps_e001_median"] == 2
    assert found["basin_width_l2_e001_median"] == 0.4
    assert found["basin_censored_fraction_e001"] == pytest.approx(1 / 3)
    assert found["basin_width_log2_median"] == 0.3
    assert found["basin_width_logk_median"] is None
    assert found["basin_censored_fraction_logk"] == pytest.approx(2 / 3)
    in_l2 = basin_widths(hand_made(loss, wrong=wrong, distance=distance), "l2")
    assert in_l2["basin_width_e001_median"] == in_l2["basin_width_l2_e001_median"] == 0.4


def test_nobody_to_measure() -> None:
    found = basin_widths(hand_made([[0.0, 1.0]], wrong=[[1, 1]]), "linf")
    assert found["basin_n"] == 0
    assert found["basin_width_e01_median"] is None
    assert found["basin_censored_fraction_e01"] is None


def test_take_off() -> None:
    loss = torch.tensor([[0.0, 0, 0, 5, 20], [0.0, 1, 2, 3, 4], [0.0, 2, 3, 3.5, 3.6], [0.0, 0, 2, 2, 4]]).T
    assert take_off(loss).tolist() == [3, -1, -1, 1]  # the largest bend; none; concave; the first of a tie
    assert take_off(loss[:2]).tolist() == [-1] * 4


def test_first_flip() -> None:
    path = hand_made([[0.0] * 4] * 4, wrong=[[0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1], [0, 1, 1, 1]])
    assert first_flip(path).tolist() == [2, -1, -1, 1]


def test_curves_aligned_on_the_first_flip() -> None:
    path = hand_made(
        [[0.0, 1.0, 2.0, 3.0], [10.0, 11.0, 12.0, 13.0], [7.0] * 4], wrong=[[0, 0, 1, 1], FLIPS, [0, 0, 0, 0]]
    )
    numbers, curves = analyse(path, "linf")
    assert curves["aligned_offset"] == [-2, -1, 0, 1, 2]
    assert curves["aligned_n"] == [1, 2, 2, 2, 1]
    assert curves["aligned_loss_mean"] == [0.0, 5.5, 6.5, 7.5, 13.0]
    assert curves["loss_median"] == [7.0, 7.0, 7.0, 7.0]
    assert curves["error_rate"] == [0.0, 1 / 3, 2 / 3, 2 / 3]
    assert numbers["trajectory_flip_rate"] == 2 / 3
    assert numbers["trajectory_loss_increase_median"] == pytest.approx(3.0, rel=1e-12)
    never = analyse(hand_made([[0.0, 1.0]]), "linf")[1]
    assert never["aligned_offset"] == never["aligned_loss_mean"] == []
    json.dumps([numbers, curves, never], allow_nan=False)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 16), nn.ReLU(), nn.Linear(16, 5)
    ).eval()


def test_the_recorder_sees_what_the_closed_forms_see() -> None:
    model, x = network(), torch.rand(9, 3, 8, 8)
    y, index, head = model(x).argmax(1), torch.arange(9) + 100, linear_head(model)
    iterates: list[Tensor] = []
    recorder, whole = Recorder(head.weight, head.bias), Recorder(head.weight, head.bias)
    for part in (slice(0, 4), slice(4, 9)):
        batch = x[part], y[part], index[part]
        pgd(model, AttackInput(*batch, observer=recorder(*batch)), steps=3)
    watch = whole(x, y, index)

    def both(t: int, x_t: Tensor, phi: Tensor, logits: Tensor) -> None:
        iterates.append(x_t.clone())
        watch(t, x_t, phi, logits)

    pgd(model, AttackInput(x, y, index, observer=both), steps=3)
    path = recorder.trajectory()
    for name, values in whole.trajectory().tensors().items():
        torch.testing.assert_close(path.tensors()[name], values, rtol=1e-4, atol=1e-5)
    assert path.index.tolist() == index.tolist()
    for t, x_t in enumerate(iterates):
        with torch.no_grad():
            phi, logits = features_and_logits(model, x_t)
        forms = ClosedForms.of(phi, head.weight, head.bias)
        for name in ("log_hessian_trace", "log_relative_sharpness", "log_relative_flatness", "log_feature_norm"):
            torch.testing.assert_close(getattr(path, name)[t], getattr(forms, name), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(path.loss[t], forms.cross_entropy(y), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(path.log_odds[t], log_odds(forms.logits, y), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(path.confidence[t], forms.confidence, rtol=1e-4, atol=1e-6)
        assert path.predicted[t].tolist() == logits.argmax(1).tolist()
        delta = (x_t.double() - x.double()).flatten(1)
        torch.testing.assert_close(path.linf[t], delta.abs().amax(1), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(path.l2[t], delta.norm(dim=1), rtol=1e-5, atol=1e-7)
    numbers, curves = analyse(path, "linf")
    json.dumps([numbers, curves], allow_nan=False)
    assert numbers["basin_n"] == 9


def test_what_the_recorder_refuses() -> None:
    recorder = Recorder(torch.ones(2, 3), None)
    with pytest.raises(WrongShape):
        recorder.trajectory()
    x, y = torch.rand(1, 3, 2, 2), torch.tensor([0])
    watch = recorder(x, y, y)
    with pytest.raises(WrongShape):
        watch(1, x, torch.ones(1, 3), torch.ones(1, 2))
    watch(0, x, torch.full((1, 3), math.nan), torch.ones(1, 2))
    with pytest.raises(NonFinite):
        recorder.trajectory()
