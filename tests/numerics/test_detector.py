"""The stump against brute force and scikit-learn, folds that keep an image together, and the hiding loss."""

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from workers.science.attacks import AttackInput
from workers.science.attacks.pgd import pgd
from workers.science.closed_forms import ClosedForms
from workers.science.detector import (
    LAMBDAS,
    auroc,
    clean_mean,
    cross_validation,
    detector_numbers,
    flipped_pairs,
    hiding_loss,
    stump,
)
from workers.science.heads import linear_head
from workers.science.sharpness import MeasureInput
from workers.science.sharpness.detector import detector
from workers.science.trajectory import Recorder, Trajectory

numbers = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)


@settings(deadline=None)
@given(numbers, numbers)
def test_the_stump_is_the_best_of_all(clean: list[float], attacked: list[float]) -> None:
    n = min(len(clean), len(attacked))  # equal numbers, as the detector has them
    a, b = np.array(clean[:n]), np.array(attacked[:n])
    cuts = np.arange(-5, 5.5, 0.5)
    want = max(max((a < c).sum() + (b >= c).sum(), (a > c).sum() + (b <= c).sum()) for c in cuts)
    threshold, direction = stump(a, b)
    above_a, above_b = (v >= threshold if direction > 0 else v <= threshold for v in (a, b))
    assert (~above_a).sum() + above_b.sum() == want


@given(numbers, numbers)
def test_auroc_is_scikit_learns(clean: list[float], attacked: list[float]) -> None:
    want = roc_auc_score([0] * len(clean) + [1] * len(attacked), clean + attacked)
    assert auroc(np.array(clean), np.array(attacked)) == pytest.approx(want)


def test_separable_reversed_and_indistinguishable() -> None:
    g = torch.Generator().manual_seed(0)
    low, high = torch.rand(100, generator=g), torch.rand(100, generator=g) + 2
    for clean, attacked, direction in ((low, high, 1), (high, low, -1)):
        found, curves = cross_validation(clean, attacked)
        assert (found["detector_accuracy"], found["detector_auroc"], found["detector_n"]) == (1.0, 1.0, 100)
        assert curves["detector_direction"] == [direction] * 5
    found, _ = cross_validation(torch.rand(2000, generator=g), torch.rand(2000, generator=g))
    assert found["detector_accuracy"] == pytest.approx(0.5, abs=0.05)
    assert found["detector_auroc"] == pytest.approx(0.5, abs=0.05)


def test_too_few_and_exact_zeros() -> None:
    assert cross_validation(torch.ones(4), torch.ones(4))[0]["detector_accuracy"] is None
    found, _ = cross_validation(torch.full((10,), -torch.inf), torch.zeros(10))
    assert found["detector_accuracy"] == 1.0
    with pytest.raises(ValueError):
        cross_validation(torch.ones(4), torch.ones(5))


@cache
def attacked(eps: float, step_size: float, steps: int) -> Trajectory:
    """Sixty images that one network classifies correctly, under PGD."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 20), nn.ReLU(), nn.Linear(20, 4)).eval()
    x, index, head = torch.rand(60, 3, 3, 3), torch.arange(60), linear_head(model)
    y = model(x).argmax(1)
    recorder = Recorder(head.weight, head.bias)
    inputs = AttackInput(x, y, index, observer=recorder(x, y, index))
    pgd(model, inputs, eps=eps, step_size=step_size, steps=steps)
    return recorder.trajectory()


def test_on_an_attack() -> None:
    path = attacked(eps=0.3, step_size=0.05, steps=10)
    clean, flipped = flipped_pairs(path)
    assert len(clean) == len(flipped) > 10
    found = detector_numbers(path, dict.fromkeys(LAMBDAS, path))
    assert found["detector_adaptive_accuracy"] == found["detector_accuracy"]
    assert found["detector_adaptive_strength"] == 0.01  # the first of equals
    assert found["detector_adaptive_flip_rate"] == len(clean) / 60
    aim = clean_mean(path)
    assert aim == pytest.approx(float(path.log_relative_sharpness[0].mean()))


FEWEST, SOME, MOST = (0.15, 0.05, 3), (0.2, 0.1, 3), (0.3, 0.05, 10)


@pytest.mark.parametrize("order", [(FEWEST, SOME, MOST), (MOST, FEWEST, SOME), (SOME, MOST, FEWEST)], ids=str)
def test_each_strength_has_its_own_numbers_and_the_worst_is_that_of_the_lowest_accuracy(
    order: tuple[tuple[float, float, int], ...],
) -> None:
    """The lowest accuracy comes first, in the middle and last, and is that of the attack that flips the fewest."""
    paths = dict(zip(LAMBDAS, (attacked(*how) for how in order), strict=True))
    alone = {strength: cross_validation(*flipped_pairs(path))[0] for strength, path in paths.items()}
    for name in ("detector_accuracy", "detector_n"):
        assert len({one[name] for one in alone.values()}) == 3, "or this test says nothing"
    plain = attacked(eps=0.5, step_size=0.1, steps=10)
    found = detector_numbers(plain, paths)
    assert {name: found[name] for name in alone[0.01]} == cross_validation(*flipped_pairs(plain))[0]

    names = dict(zip(LAMBDAS, ("lambda001", "lambda01", "lambda1"), strict=True))
    for strength, one in alone.items():
        for name in ("accuracy", "auroc", "n"):
            assert found[f"detector_adaptive_{names[strength]}_{name}"] == one[f"detector_{name}"]
        assert found[f"detector_adaptive_{names[strength]}_flip_rate"] == (one["detector_n"] or 0) / 60
    worst = min(alone, key=lambda strength: alone[strength]["detector_accuracy"] or 0)
    assert alone[worst]["detector_n"] == min(one["detector_n"] or 0 for one in alone.values())
    assert found["detector_adaptive_strength"] == worst
    for name in ("accuracy", "auroc", "n", "flip_rate"):
        assert found[f"detector_adaptive_{name}"] == found[f"detector_adaptive_{names[worst]}_{name}"]


def test_an_attack_that_flips_too_few_is_not_the_worst() -> None:
    few, path = attacked(eps=0.1, step_size=0.03, steps=3), attacked(eps=0.3, step_size=0.05, steps=10)
    found = detector_numbers(path, {0.01: few, 0.1: path, 1.0: few})
    assert [found[f"detector_adaptive_{name}_accuracy"] for name in ("lambda001", "lambda1")] == [None, None]
    assert found["detector_adaptive_strength"] == 0.1
    assert found["detector_adaptive_n"] == found["detector_n"]
    assert "detector_adaptive_strength" not in detector_numbers(path, dict.fromkeys(LAMBDAS, few))


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-33])
def test_the_hiding_loss_has_a_gradient_without_features(size: float) -> None:
    """Of float32 features of 0, as ReLU networks have them, or next to 0: log kappa is -inf or its slope infinite."""
    torch.manual_seed(0)
    weight, bias = torch.randn(3, 4), torch.randn(3)
    phi = torch.full((2, 4), size, requires_grad=True)
    values = hiding_loss(weight, bias, -2.0, 0.1)(phi, torch.tensor([0, 1]))
    (gradient,) = torch.autograd.grad(values.sum(), phi)
    assert bool(torch.isfinite(values).all())
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient != 0).any(1).all())


class Dark(nn.Module):
    """Images that are black have features of 0, the others those of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.first((x.flatten(1) - 0.1).relu()))
        return logits


def test_images_without_features_are_attacked_like_the_others() -> None:
    torch.manual_seed(0)
    model, x = Dark().eval(), torch.rand(30, 1, 2, 2)
    x[:10] = 0
    y = model(x).argmax(1)
    report = detector(model, MeasureInput(x, y, x, y, batch_size=8), eps=0.3, step_size=0.1, steps=4)
    numbers = report.numbers
    assert numbers["detector_accuracy"] is not None
    for name in ("lambda001", "lambda01", "lambda1"):
        n, share = numbers[f"detector_adaptive_{name}_n"], numbers[f"detector_adaptive_{name}_flip_rate"]
        assert n == round(30 * float(share or 0))  # of all thirty, none of which is lost


@pytest.mark.parametrize("part", ["head", "features"])
def test_nothing_to_hide(part: str) -> None:
    """kappa is 0 for every image: there is no adaptive attack, and the measure has a result."""
    model, x = Dark().eval(), torch.rand(12, 1, 2, 2)
    with torch.no_grad():
        (model.head if part == "head" else model.first).weight.zero_()
    y = model(x).argmax(1)
    numbers = detector(model, MeasureInput(x, y, x, y, batch_size=8), steps=2).numbers
    assert numbers["detector_n"] == 0
    assert not any(name.startswith("detector_adaptive") for name in numbers)


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_the_hiding_loss_and_its_gradient(scale: float) -> None:
    torch.manual_seed(0)
    weight, bias, y = torch.randn(4, 6) * scale, torch.randn(4) * scale, torch.tensor([0, 1, 2])
    phi = torch.rand(3, 6, dtype=torch.float64, requires_grad=True)
    loss = hiding_loss(weight, bias, -2.0, 0.1)
    forms = ClosedForms.of(phi, weight, bias)
    want = forms.cross_entropy(y) - 0.1 * (forms.log_relative_sharpness + 2.0).square()
    torch.testing.assert_close(loss(phi, y), want)
    (gradient,) = torch.autograd.grad(loss(phi, y).sum(), phi)
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient != 0).any(1).all())
    step = 1e-6 * gradient / gradient.norm()
    with torch.no_grad():
        rise = float((loss(phi + step, y) - loss(phi - step, y)).sum()) / 2
    assert rise == pytest.approx(float((gradient * step).sum()), rel=1e-4)
