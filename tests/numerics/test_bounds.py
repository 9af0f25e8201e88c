"""The corrected bounds are never broken; the relayed one is; the Lipschitz estimates against dense Jacobians."""

import math
from dataclasses import replace
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev
from typed import linear

from workers.science.attacks import ATTACKS, AttackInput
from workers.science.attacks.pgd import pgd
from workers.science.bounds import (
    BOUNDS,
    LIPSCHITZ,
    Anchor,
    bound_numbers,
    bounds,
    certificate,
    corrected_taylor,
    lipschitz_jacobian,
    lipschitz_upper,
    radius,
    returned_bound_numbers,
    violations,
)
from workers.science.closed_forms import ClosedForms
from workers.science.cross_entropy import log_odds, loss_increase
from workers.science.evaluation import evaluate_attack
from workers.science.heads import features_and_logits, linear_head
from workers.science.trajectory import Recorder


def trial(seed: int, n: int = 1000) -> tuple[Anchor, Tensor, Tensor, Tensor]:
    """Random heads, features and displacements of every size, half of them straight towards another class; labels at
    random, or as classified (the surer the larger the head); some features are 0, or do not move.
    """
    g = torch.Generator().manual_seed(seed)
    k, m = int(torch.randint(2, 12, (1,), generator=g)), int(torch.randint(1, 30, (1,), generator=g))
    size = 10 ** float(torch.rand(1, generator=g) * 4 - 2)
    weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) * size for s in ((k, m), (k,)))
    phi = torch.randn(n, m, generator=g, dtype=torch.float64)
    phi[:20] = 0
    y = torch.randint(0, k, (n,), generator=g)
    if seed % 2:
        y = (phi @ weight.T + bias).argmax(1)
    other = (y + torch.randint(1, k, (n,), generator=g)) % k
    random = torch.randn(n, m, generator=g, dtype=torch.float64)
    direction = torch.where(torch.rand(n, 1, generator=g) < 0.5, random, weight[other] - weight[y])
    length = 10 ** (torch.rand(n, generator=g, dtype=torch.float64) * 5 - 3)
    step = direction / direction.norm(dim=1, keepdim=True) * length[:, None]
    step[10:30] = 0
    moved_phi = phi + step
    before, after = (log_odds(ClosedForms.of(p, weight, bias).logits, y) for p in (phi, moved_phi))
    return Anchor.of(phi, y, weight, bias), (moved_phi - phi).norm(dim=1), length / 3, loss_increase(before, after)


def test_never_broken_in_twenty_thousand_trials() -> None:
    broken, sure, attained = dict.fromkeys(BOUNDS, 0), 0, 0
    for seed in range(20):
        at, moved, distance, increase = trial(seed)
        for name, mask in violations(at, moved, distance, increase).items():
            broken[name] += int(mask.sum())
        for bound in bounds(at, moved, distance).values():
            assert not bool(bound.isnan().any())
            assert not bool((bound < 0).any())
        tiny = at.log_s < -21  # the loss is below 1e-9
        sure += int(tiny.sum())
        attained += int((tiny & (increase > 0.5 * certificate(at, moved)) & (increase > 0)).sum())
    assert sure > 1000
    assert attained > 50
    assert broken["corrected_taylor"] == broken["certificate"] == 0
    assert broken["relayed_relative_sharpness"] > 0
    assert broken["relayed_relative_flatness"] >= broken["relayed_relative_sharpness"]


def test_the_certificate_is_attained_with_two_classes() -> None:
    phi = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 1.5]], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    y, moved = torch.tensor([0]), torch.tensor([0.7], dtype=torch.float64)
    direction = (weight[1] - weight[0]) / (weight[1] - weight[0]).norm()
    at = Anchor.of(phi, y, weight, bias)
    before, after = (ClosedForms.of(p, weight, bias).cross_entropy(y) for p in (phi, phi + 0.7 * direction))
    assert float(certificate(at, moved)) == pytest.approx(float(after - before), rel=1e-12)
    assert bool(corrected_taylor(at, moved) > after - before)


def two_classes(margin: float) -> Anchor:
    """One image at `phi = (1, 0)` of class 0, which leads by `margin`; `D_y` is 2 margin."""
    weight = torch.tensor([[margin, 0.0], [-margin, 0.0]], dtype=torch.float64) / 2
    return Anchor.of(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), weight, None)


@pytest.mark.parametrize("margin", [1.0, 37.0, 98.0, 700.0])
@pytest.mark.parametrize("share", [1e-18, 1e-6, 0.01, 0.5])
def test_the_bounds_of_a_confident_image_against_mpmath(margin: float, share: float) -> None:
    """What a step straight to the boundary costs, all sizes of loss: the certificate exactly, no violation; half of
    that bound, or the same step with twice the increase, is one. 1e-9 used to hide it from a margin of 21 on.
    """
    at, moved = two_classes(margin), torch.tensor([share], dtype=torch.float64)
    with mpmath.workdps(400):
        rise = mpmath.log1p(mpmath.exp(margin * (mpmath.mpf(share) - 1))) - mpmath.log1p(mpmath.exp(-margin))
        increase = torch.tensor([float(rise)], dtype=torch.float64)
    assert float(certificate(at, moved)) == pytest.approx(float(rise), rel=1e-12, abs=0)
    distance = moved / 3
    names = ("corrected_taylor", "certificate")
    assert not any(bool(violations(at, moved, distance, increase)[name]) for name in names)
    seen = share * margin > 1e-8  # a smaller rise of the log odds is within their rounding
    assert bool(violations(at, moved, distance, increase * 2)["certificate"]) == seen
    assert bool(violations(at, moved / 2, distance, increase)["certificate"]) == seen
    assert not bool(violations(at, moved, distance, -increase)["certificate"])


def test_features_of_zero() -> None:
    """Not moved: no bound is NaN, none is broken. Moved: the second-order term is there, without which corrected Taylor
    breaks; the relayed bound divides by 0.
    """
    weight, bias = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.zeros(2)
    at = Anchor.of(torch.zeros(2, 2), torch.tensor([0, 0]), weight, bias)
    moved = torch.tensor([0.0, 0.01], dtype=torch.float64)
    still, went = torch.stack(list(bounds(at, moved, moved).values())).T
    assert still.tolist() == [0.0] * 4
    assert went[:2].tolist() == [math.inf] * 2
    before = torch.zeros(2, dtype=torch.float64)
    increase = loss_increase(before, 2 * moved)  # straight to class 1: attained
    assert not any(bool(broken.any()) for broken in violations(at, moved, moved, increase).values())
    without = replace(at, flatness=torch.zeros_like(at.flatness))
    assert violations(without, moved, moved, increase)["corrected_taylor"].tolist() == [False, True]


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0, 1000.0])
@pytest.mark.parametrize("e", [0.01, math.log(2), math.log(10)])
def test_the_radius_inverts_the_certificate(scale: float, e: float) -> None:
    phi, weight = torch.rand(20, 8), torch.randn(10, 8) * scale
    at = Anchor.of(phi, torch.arange(20) % 10, weight, None)
    found = certificate(at, radius(at, e, 3.0) * 3.0)
    torch.testing.assert_close(found, torch.full_like(found, e), rtol=1e-7, atol=1e-9)


def test_slope_and_size_equal_autograd() -> None:
    phi, weight, bias, y = torch.rand(6, 4), torch.randn(3, 4), torch.randn(3), torch.tensor([0, 1, 2, 0, 1, 2])
    at = Anchor.of(phi, y, weight, bias)
    leaf = phi.double().requires_grad_()
    loss = nn.functional.cross_entropy(leaf @ weight.double().T + bias.double(), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(at.slope, gradient.norm(dim=1), rtol=1e-10, atol=0)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 4)
    ).eval()


def test_lipschitz_of_the_jacobian_equal_to_the_dense_one() -> None:
    model, x = network(), torch.rand(3, 1, 6, 6)
    found = lipschitz_jacobian(model, x, iterations=100)
    for i in range(3):
        dense = jacrev(lambda image: model[:-1](image[None])[0])(x[i]).reshape(12, -1)
        assert float(found[i]) == pytest.approx(float(torch.linalg.matrix_norm(dense.detach(), ord=2)), rel=1e-4)


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-12, 1e12, 1e30, 1e37])
def test_a_jacobian_of_any_size_has_its_norm(size: float) -> None:
    """In float32 the squares of its entries are 0 or infinite."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(6, 5, bias=False), nn.Linear(5, 2)).eval(), torch.rand(3, 1, 2, 3)
    with torch.no_grad():
        linear(model, 1).weight.mul_(size)
    norm = float(torch.linalg.matrix_norm(linear(model, 1).weight.detach().double(), ord=2))
    assert lipschitz_jacobian(model, x, iterations=60).tolist() == pytest.approx([norm] * 3, rel=1e-6, abs=0)
    assert lipschitz_upper(model) == pytest.approx(norm, rel=1e-12, abs=0)


def test_a_jacobian_of_zero() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2)).eval()
    nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
    assert lipschitz_jacobian(model, torch.rand(2, 1, 2, 2)).tolist() == [0.0, 0.0]


QUICK: dict[str, dict[str, Any]] = {
    "pgd": {"eps": 0.2, "step_size": 0.05, "steps": 5, "random_start": True},
    "fgsm": {"eps": 0.2},
    "apgd": {"eps": 0.2, "steps": 5},
    "square": {"eps": 0.2, "queries": 20},
    "autoattack": {"eps": 0.2, "steps": 3, "targets": 2, "queries": 10},
    "cw": {"steps": 5},
    "noise": {"kind": "uniform", "eps": 0.2, "points": 3},
    "transfer": {"eps": 0.2, "step_size": 0.05, "steps": 5},
}


@pytest.mark.parametrize("s", [1.0, 100.0])
@pytest.mark.parametrize("attack", list(ATTACKS))
def test_bounds_from_the_image_to_what_an_attack_returned(attack: str, s: float) -> None:
    model, x = network(), torch.rand(17, 1, 6, 6)
    head, y, lost = linear_head(model), model(x).argmax(1), torch.arange(17) == 5
    with torch.no_grad():
        head.weight.mul_(s)
        head.bias.mul_(s)
    x[lost] = math.nan
    params = {**QUICK[attack], **({"source": network()} if attack == "transfer" else {})}
    found = evaluate_attack(model, x, y, torch.arange(17), attack=attack, params=params, batch_size=6)
    assert found.returned is not None
    numbers = returned_bound_numbers(found.returned, head.weight, head.bias)
    assert numbers["bound_n"] == numbers["bound_n_examples"] == 16
    assert numbers["bound_violated_corrected_taylor"] == numbers["bound_violated_certificate"] == 0
    assert numbers["bound_violated_examples_certificate"] == 0
    assert not found.numbers.keys() & numbers.keys()
    assert math.isfinite(numbers["lipschitz_returned_max"] or math.nan)
    assert (numbers["estimated_radius_returned_log2_median"] or 0) > 0


def test_what_an_attack_returned_by_a_second_computation() -> None:
    model, x = network(), torch.rand(9, 1, 6, 6)
    y, index, head = torch.arange(9) % 4, torch.arange(9), linear_head(model)
    params: dict[str, Any] = {"eps": 0.2, "step_size": 0.05, "steps": 5, "random_start": True}
    found = evaluate_attack(model, x, y, index, attack="pgd", params=params, batch_size=4).returned
    x_adv = pgd(model, AttackInput(x, y, index), **params).x_adv
    assert found is not None
    with torch.no_grad():
        (clean, _), (after, _) = (features_and_logits(model, of) for of in (x, x_adv))
    want = {
        "y": y,
        "phi": clean,
        "feature_moved": (after.double() - clean.double()).norm(dim=1),
        "l2": (x_adv.double() - x.double()).flatten(1).norm(dim=1),
        "clean_log_odds": log_odds(ClosedForms.of(clean, head.weight, head.bias).logits, y),
        "log_odds": log_odds(ClosedForms.of(after, head.weight, head.bias).logits, y),
    }
    for name, values in want.items():
        torch.testing.assert_close(getattr(found, name), values, rtol=1e-4, atol=1e-5)
    numbers = returned_bound_numbers(found, head.weight, head.bias)
    assert numbers["lipschitz_returned_max"] == float((found.feature_moved / found.l2).max())
    with_capped_logits = nn.Sequential(model, nn.Tanh()).eval()
    capped = evaluate_attack(with_capped_logits, x, y, index, attack="pgd", params=params)
    assert capped.returned is None


@pytest.mark.parametrize("s", [1.0, 100.0])
def test_an_attack_never_breaks_the_corrected_bounds(s: float) -> None:
    model, x = network(), torch.rand(16, 1, 6, 6)
    head = linear_head(model)
    with torch.no_grad():
        head.weight.mul_(s)
        head.bias.mul_(s)
    y, index = model(x).argmax(1), torch.arange(16)
    recorder = Recorder(head.weight, head.bias)
    pgd(model, AttackInput(x, y, index, observer=recorder(x, y, index)), loss="margin", eps=0.2, step_size=0.05)
    numbers = bound_numbers(recorder.trajectory(), head.weight, head.bias)
    assert (numbers["bound_n"], numbers["bound_n_examples"]) == (160, 16)
    assert numbers["bound_violated_corrected_taylor"] == numbers["bound_violated_certificate"] == 0
    assert numbers["bound_violated_examples_certificate"] == 0
    for name in ("relayed_relative_sharpness", "relayed_relative_flatness"):
        assert (numbers[f"bound_violated_examples_{name}"] or 0) >= (numbers[f"bound_violated_{name}"] or 0)
    assert numbers["lipschitz_path_max"] is not None
    assert numbers["lipschitz_path_max"] > 0
    assert numbers["estimated_radius_path_logk_median"] is not None


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(2, 2, 2), nn.Conv2d(4, 4, 3, groups=2, stride=2)]
)
def test_a_convolution_is_bounded_and_not_loosely(layer: nn.Conv2d) -> None:
    """Its dense matrix on a large image comes near the bound from below (with a stride it may stay farther away)."""
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(1, 2)).eval()
    side = 14
    basis = torch.eye(layer.in_channels * side * side).view(-1, layer.in_channels, side, side)
    with torch.no_grad():
        dense = (layer(basis) - layer(torch.zeros_like(basis[:1]))).flatten(1)
    norm, upper = float(torch.linalg.matrix_norm(dense, ord=2)), lipschitz_upper(net)
    assert upper is not None
    assert norm <= upper * (1 + 1e-6)
    if layer.stride == (1, 1):
        assert upper < 1.1 * norm


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.pool, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.MaxPool2d(3, 2, 1), nn.Linear(6, 3)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm(self.first(x)).relu()
        b = self.pool(torch.cat([a + a, torch.relu(a)], 1))
        z: Tensor = self.head(b.mean((2, 3)))
        return z


def test_branches_add_and_the_bound_holds_() -> None:
    torch.manual_seed(0)
    model = Branches().eval()
    upper = lipschitz_upper(model)
    assert upper is not None
    assert float(lipschitz_jacobian(model, torch.rand(200, 2, 6, 6)).max()) <= upper
    parts = lipschitz_upper(nn.Sequential(model.first, nn.Flatten(), nn.Linear(1, 1)))
    assert parts is not None
    assert upper == pytest.approx(parts * 5**0.5 * 2 / (1 + 1e-5) ** 0.5)


def test_what_has_no_bound() -> None:
    attention = nn.Sequential(nn.Flatten(), nn.TransformerEncoderLayer(4, 1, 4), nn.Linear(4, 2)).eval()
    assert lipschitz_upper(attention) is None
    circular = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), nn.Flatten(), nn.Linear(4, 2))
    assert lipschitz_upper(circular.eval()) is None


@pytest.mark.parametrize("gram_bytes", [1, 5000, 1 << 26])
@pytest.mark.parametrize("layer", [nn.Conv2d(6, 4, 3), nn.Conv2d(4, 8, (1, 5), groups=2)])
def test_frequencies_of_a_convolution_may_be_taken_together(
    layer: nn.Conv2d, gram_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one frequency after the other."""
    monkeypatch.setattr("workers.science.bounds.GRAM_BYTES", gram_bytes)
    grid = [1 if size == 1 else max(16, 8 * size) for size in layer.kernel_size]
    missed = math.prod(math.cos(math.pi * (size - 1) / 2 / n) for size, n in zip(layer.kernel_size, grid, strict=True))
    largest = 0.0
    for kernel in layer.weight.detach().double().chunk(layer.groups):
        for matrix in torch.fft.rfft2(kernel, s=grid).permute(2, 3, 0, 1).flatten(0, 1):
            largest = max(largest, float(torch.linalg.svdvals(matrix)[0]))
    assert LIPSCHITZ["Conv2d"](layer) == pytest.approx(largest / missed, rel=1e-12)
