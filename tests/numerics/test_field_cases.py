"""Cases of the field with known answers: exact radii, a step that only chance finds, a last batch of one image.

Public reports of attack libraries tell of each: robustness that grows with the scale of the logits, attacks that need
restarts, and last batches of a single image.
"""

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typed import linear

from workers.science.architectures import build
from workers.science.attacks import ATTACKS, WITH_TRAJECTORY
from workers.science.bounds import Anchor, bound_numbers, radius, returned_bound_numbers
from workers.science.controls import Geometry, run_controls
from workers.science.cross_entropy import softplus
from workers.science.datasets import digits
from workers.science.evaluation import evaluate_attack, evaluate_clean
from workers.science.heads import linear_head, scale_head
from workers.science.recipes import RECIPES
from workers.science.seeding import uniform_per_example
from workers.science.sharpness import MEASURES, MeasureInput
from workers.science.training import train
from workers.science.trajectory import Recorder, analyse

# -- two images at known distances from a hyperplane ----------------------------------------------------------------

DISTANCES = (0.155, 0.555)
SLOPE = 1.2 / DISTANCES[0]
"""Of the margin: 1.2 and 4.3 at s = 1. The gradient of the first image is e^-60 at s = 50 and 0 in float32 at 125."""
PGD_L2: dict[str, Any] = {"norm": "l2", "eps": 0.3, "step_size": 0.05, "steps": 10}


def half_spaces() -> tuple[nn.Module, Tensor, Tensor]:
    """Two classes, one hyperplane, and the two images, both of class 0 and far from the walls of the box."""
    direction = torch.tensor([1.0, -1.0]).repeat(8) / 4
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    with torch.no_grad():
        linear(model, 1).bias.zero_()
        linear(model, 1).weight.zero_()
        linear(model, 1).weight[1] = SLOPE * direction
    x = torch.stack([0.5 - distance * direction for distance in DISTANCES]).view(2, 1, 4, 4)
    return model, x, torch.tensor([0, 0])


def attack_l2(s: float, **options: Any) -> Any:
    model, x, y = half_spaces()
    return evaluate_attack(
        scale_head(model, s), x, y, torch.arange(2), attack="pgd", params={**PGD_L2, **options}, scale=s
    )


@pytest.mark.parametrize(("s", "robust"), [(1.0, 0.5), (20.0, 0.5), (50.0, 0.5), (125.0, 1.0)])
def test_exact_l2_radii_at_every_scale(s: float, robust: float) -> None:
    """The true robust accuracy is .5 at every scale: float32 hides it at 125, and that is masked."""
    plain = attack_l2(s)
    assert plain.numbers["robust_accuracy"] == robust
    for loss in ("rescaled_cross_entropy", "stable_cross_entropy", "margin"):
        assert attack_l2(s, loss=loss).bits["robust"].tolist() == [False, True]
    at_1 = attack_l2(1.0).bits["robust"]
    masked = plain.bits["clean_correct"] & plain.bits["robust"] & ~at_1
    assert float(masked.double().mean()) == robust - 0.5
    assert plain.bits["zero_gradient"].tolist() == [s == 125, s >= 50]


@pytest.mark.parametrize("s", [1.0, 20.0, 50.0, 125.0])
def test_no_attack_finds_less_than_the_radius_and_rescaled_cross_entropy_finds_it(s: float) -> None:
    for eps, robust in ((0.154, [True, True]), (0.156, [False, True]), (0.554, [False, True]), (0.556, [False, False])):
        found = attack_l2(s, eps=eps, loss="rescaled_cross_entropy", steps=20)
        assert found.bits["robust"].tolist() == robust, eps
    model, x, y = half_spaces()
    head = linear_head(scale_head(model, s))
    at = Anchor.of(x.flatten(1), y, head.weight, head.bias)
    for i, distance in enumerate(DISTANCES):  # features are pixels, L = 1: the loss is log 2 at the hyperplane
        rise = math.log(2) - float(softplus(at.log_s)[i])
        assert float(radius(at, rise, 1.0)[i]) == pytest.approx(distance, rel=1e-5)


# -- a step that no gradient shows ----------------------------------------------------------------------------------

EPS, N = 0.25, 1000
FOUND = 0.344
"""Chance that a uniform start within eps lies beyond the step: .656, .430, .185 and .034 survive 1, 2, 4 and 8."""


class Step(nn.Module):
    """Class 1 where the first pixel is above `threshold`; the derivative of `sign` is 0."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold, self.head = threshold, nn.Linear(1, 2)
        with torch.no_grad():
            self.head.weight.copy_(torch.tensor([[-1.0], [1.0]]))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head((x.flatten(1)[:, :1] - self.threshold).sign())
        return logits


def robust_of_step(restarts: int, attack_seed: int = 0, **options: Any) -> Tensor:
    x = torch.full((N, 1, 2, 2), 0.5)
    found = evaluate_attack(
        Step(0.5 + EPS * (1 - 2 * FOUND)).eval(), x, torch.zeros(N, dtype=torch.int64), torch.arange(N), attack="pgd",
        params={"eps": EPS, "step_size": 0.05, "steps": 2, "restarts": restarts, **options}, attack_seed=attack_seed,
    )  # fmt: skip
    assert found.numbers["zero_gradient_fraction"] == 1.0
    return found.bits["robust"]


@pytest.mark.parametrize("attack_seed", [0, 7])
def test_restarts_find_a_step_as_often_as_chance_does(attack_seed: int) -> None:
    starts = [uniform_per_example(attack_seed, torch.arange(N), r, (1, 2, 2))[:, 0, 0, 0] for r in range(8)]
    before_step = torch.stack(starts) <= 1 - FOUND
    for restarts, expected in ((1, 0.656), (2, 0.430), (4, 0.185), (8, 0.034)):
        robust = robust_of_step(restarts, attack_seed, random_start=True)
        assert torch.equal(robust, before_step[:restarts].all(0))
        assert (1 - FOUND) ** restarts == pytest.approx(expected, abs=5e-4)
        slack = 4 * math.sqrt(expected * (1 - expected) / N)
        assert float(robust.double().mean()) == pytest.approx(expected, abs=slack)


def test_the_first_start_is_the_image_itself() -> None:
    assert bool(robust_of_step(1).all())
    two = float(robust_of_step(2).double().mean())
    assert two == pytest.approx(1 - FOUND, abs=4 * math.sqrt(FOUND * (1 - FOUND) / N))


# -- 129 images: a batch of 128, and one ----------------------------------------------------------------------------

QUICK_ATTACKS: dict[str, dict[str, Any]] = {
    "pgd": {"eps": 0.1, "step_size": 0.03, "steps": 4, "random_start": True, "restarts": 2},
    "fgsm": {"eps": 0.1},
    "apgd": {"eps": 0.1, "steps": 5},
    "square": {"eps": 0.1, "queries": 20},
    "autoattack": {"eps": 0.1, "steps": 3, "targets": 2, "queries": 10},
    "cw": {"steps": 4},
    "noise": {"kind": "uniform", "eps": 0.1, "points": 3},
    "transfer": {"eps": 0.1, "step_size": 0.03, "steps": 4},
}
QUICK_MEASURES: dict[str, dict[str, Any]] = {
    "hessian_trace_network": {"probes": 2},
    "top_eigenvalue_network": {"iterations": 5},
    "adaptive_average": {"draws": 2},
    "adaptive_worst": {"steps": 3},
    "pac_bayes_flatness": {"draws": 2, "bisections": 4},
    "input_curvature": {"iterations": 3},
    "lipschitz": {"iterations": 3},
    "detector": {"steps": 3},
}


@pytest.fixture(scope="module")
def vectors() -> tuple[nn.Module, Tensor, Tensor]:
    """A network with a batch norm of vectors, which refuses a single one in train mode; 129 scans, a third wrong."""
    x = digits.read().test_x[:129].float() / 255
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 10))
    for _ in range(50):  # running statistics
        model(x)
    y = model.eval()(x).argmax(1)
    y[::3] = (y[::3] + 1) % 10
    return model, x, y


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_an_attack_on_129_images(attack: str, vectors: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = vectors
    head, index = linear_head(model), torch.arange(129)
    params = {**QUICK_ATTACKS[attack], **({"source": model} if attack == "transfer" else {})}
    numbers, bits = [], []
    for batch_size in (128, 129):
        recorder = Recorder(head.weight, head.bias) if attack in WITH_TRAJECTORY else None
        found = evaluate_attack(
            model, x, y, index, attack=attack, params=params, batch_size=batch_size, observer_factory=recorder
        )
        parts = [found.numbers]
        if recorder is not None:
            path = recorder.trajectory(found.bits["non_finite"])
            parts += [analyse(path, "linf")[0], bound_numbers(path, head.weight, head.bias)]
        assert found.returned is not None
        returned = returned_bound_numbers(found.returned, head.weight, head.bias)
        parts.append({f"returned_{name}": value for name, value in returned.items()})
        numbers.append({name: value for part in parts for name, value in part.items()})
        bits.append(found.bits)
    assert {name: of.tolist() for name, of in bits[0].items()} == {name: of.tolist() for name, of in bits[1].items()}
    assert 0 < int(bits[0]["clean_correct"].sum()) < 129
    assert numbers[0].pop("n") == numbers[1].pop("n") == 129
    known = ({name: value for name, value in of.items() if value is not None} for of in numbers)
    assert next(known) == pytest.approx(next(known), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("measure", list(MEASURES))
def test_a_measure_of_129_images(measure: str, vectors: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = vectors
    one, other = (
        MEASURES[measure](model, MeasureInput(x, y, x, y, batch_size=size), **QUICK_MEASURES.get(measure, {})).numbers
        for size in (128, 129)
    )
    assert one.keys() == other.keys()
    assert [name for name in one if (one[name] is None) != (other[name] is None)] == []
    known = ({name: value for name, value in of.items() if value is not None} for of in (one, other))
    assert next(known) == pytest.approx(next(known), rel=1e-4, abs=1e-6)


def test_the_panel_on_129_images(vectors: tuple[nn.Module, Tensor, Tensor]) -> None:
    """In eval mode the last image is like the others; one that would be alone in a batch norm has company."""
    model, x, y = vectors
    ball, index = Geometry("linf", 0.05, 0.02, 3), torch.arange(129)
    one, other = (run_controls(model, x, y, index, ball, batch_size=size) for size in (128, 129))
    assert one.numbers == other.numbers
    assert {name: of.tolist() for name, of in one.bits.items()} == {
        name: of.tolist() for name, of in other.bits.items()
    }
    assert isinstance(model, nn.Sequential)
    left = nn.Sequential(*model)
    left[2] = nn.BatchNorm1d(20, track_running_stats=False)
    found = run_controls(left.eval(), x, y, index, ball, batch_size=128).numbers
    assert (found["n"], found["n_non_finite"]) == (129, 0)
    assert found["batch_dependent_changed"] == 16  # those of the first batch; the last image was alone before


def test_clean_accuracy_of_129_images(vectors: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = vectors
    one, other = (asdict(evaluate_clean(model, x, y, batch_size=size)) for size in (128, 129))
    for name in ("correct", "non_finite"):
        assert torch.equal(one[name], other[name])
    torch.testing.assert_close(one["losses"], other["losses"], rtol=1e-4, atol=1e-7)
    assert one["accuracy"] == other["accuracy"]


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_training_on_129_images(recipe: str) -> None:
    """The last one would be a batch of its own: it is left out of each epoch, and counted."""
    model, data = build("simple_cnn", (1, 8, 8), 10, seed=0), digits.read()
    params = {"steps": 1} if RECIPES[recipe].attacks else {}
    done = train(model, data, recipe=recipe, recipe_params=params, epochs=2, batch_size=128, train_samples=129)
    assert (done.train_samples, done.dropped_samples) == (128, 1)
    counters = {int(value) for name, value in model.state_dict().items() if "num_batches_tracked" in name}
    assert counters == {4 if recipe == "trades" else 2}  # trades looks at clean and attacked images
    whole = train(model, data, recipe=recipe, recipe_params=params, epochs=1, batch_size=127, train_samples=129)
    assert (whole.train_samples, whole.dropped_samples) == (129, 0)
