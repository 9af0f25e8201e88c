"""The corrected bounds are never broken; the relayed one is; the Lipschitz estimates against dense Jacobians."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev

from workers.science.attacks.pgd import pgd
from workers.science.bounds import (
    BOUNDS,
    Anchor,
    bound_numbers,
    certificate,
    corrected_taylor,
    lipschitz_jacobian,
    lipschitz_upper,
    radius,
    violations,
)
from workers.science.heads import linear_head
from workers.science.sharpness.closed_forms import closed_forms
from workers.science.trajectory import Recorder


def trial(seed: int, n: int = 1000) -> tuple[Anchor, Tensor, Tensor, Tensor]:
    """Random heads, features and displacements of every size, half of them straight towards another class."""
    g = torch.Generator().manual_seed(seed)
    k, m = int(torch.randint(2, 12, (1,), generator=g)), int(torch.randint(1, 30, (1,), generator=g))
    size = 10 ** float(torch.rand(1, generator=g) * 4 - 2)
    weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) * size for s in ((k, m), (k,)))
    phi = torch.randn(n, m, generator=g, dtype=torch.float64)
    y = torch.randint(0, k, (n,), generator=g)
    other = (y + torch.randint(1, k, (n,), generator=g)) % k
    random = torch.randn(n, m, generator=g, dtype=torch.float64)
    direction = torch.where(torch.rand(n, 1, generator=g) < 0.5, random, weight[other] - weight[y])
    length = 10 ** (torch.rand(n, generator=g, dtype=torch.float64) * 5 - 3)
    moved_phi = phi + direction / direction.norm(dim=1, keepdim=True) * length[:, None]
    before, after = (closed_forms(p, weight, bias).cross_entropy(y) for p in (phi, moved_phi))
    return Anchor.of(phi, y, weight, bias), (moved_phi - phi).norm(dim=1), length / 3, after - before


def test_never_broken_in_twenty_thousand_trials() -> None:
    broken = dict.fromkeys(BOUNDS, 0)
    for seed in range(20):
        for name, mask in violations(*trial(seed)).items():
            broken[name] += int(mask.sum())
    assert broken["corrected_taylor"] == broken["certificate"] == 0
    assert broken["relayed_relative_sharpness"] > 0
    assert broken["relayed_relative_flatness"] >= broken["relayed_relative_sharpness"]


def test_the_certificate_is_attained_with_two_classes() -> None:
    phi = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    weight, bias = torch.tensor([[1.0, 0.0], [0.0, 1.5]], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    y, moved = torch.tensor([0]), torch.tensor([0.7], dtype=torch.float64)
    direction = (weight[1] - weight[0]) / (weight[1] - weight[0]).norm()
    at = Anchor.of(phi, y, weight, bias)
    before, after = (closed_forms(p, weight, bias).cross_entropy(y) for p in (phi, phi + 0.7 * direction))
    assert float(certificate(at, moved)) == pytest.approx(float(after - before), rel=1e-12)
    assert bool(corrected_taylor(at, moved) > after - before)


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


@pytest.mark.parametrize("s", [1.0, 100.0])
def test_an_attack_never_breaks_the_corrected_bounds(s: float) -> None:
    model, x = network(), torch.rand(16, 1, 6, 6)
    head = linear_head(model)
    with torch.no_grad():
        head.weight.mul_(s)
        head.bias.mul_(s)
    y, index = model(x).argmax(1), torch.arange(16)
    recorder = Recorder(head.weight, head.bias)
    pgd(model, x, y, index=index, observer=recorder(x, y, index), loss="margin", eps=0.2, step_size=0.05)
    numbers = bound_numbers(recorder.trajectory(), head.weight, head.bias)
    assert numbers["bound_n"] == 160
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
        return self.head(b.mean((2, 3)))


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
