"""Every recipe's loss against a hand-written oracle, in plain Python or float64."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from typed import linear

from workers.science.architectures import build
from workers.science.recipes import RECIPES
from workers.science.recipes.common import BatchNoise, pgd_linf
from workers.science.seeding import generator

N, K = 12, 4
SHAPE = (2, 8, 8)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    numbers = generator(1)
    return torch.rand(N, *SHAPE, generator=numbers), torch.randint(0, K, (N,), generator=numbers)


def network(name: str = "simple_cnn") -> nn.Module:
    model = build(name, SHAPE, K, 0).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # logits of different sizes, so that no term is near its trivial value
    return model


def loss(name: str, model: nn.Module, x: Tensor, y: Tensor, **changes: float) -> float:
    recipe = RECIPES[name]
    return float(
        recipe.loss(model, x, y, BatchNoise(5, 0, torch.arange(N)), **{**recipe.params, **changes})[0].detach()
    )


def probabilities(z: list[float]) -> list[float]:
    top = max(z)
    powers = [math.exp(v - top) for v in z]
    return [v / sum(powers) for v in powers]


def logits_of(model: nn.Module, x: Tensor) -> list[list[float]]:
    with torch.no_grad():
        return copy.deepcopy(model)(x).tolist()  # type: ignore[no-any-return]


def test_standard_and_label_smoothing(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = network()
    rows = [probabilities(z) for z in logits_of(model, x)]
    plain = sum(-math.log(p[t]) for p, t in zip(rows, y.tolist(), strict=True)) / N
    assert loss("standard", copy.deepcopy(model), x, y) == pytest.approx(plain, rel=1e-5)
    smooth = 0.0
    for p, t in zip(rows, y.tolist(), strict=True):
        smooth -= sum(((0.9 if j == t else 0.0) + 0.1 / K) * math.log(p[j]) for j in range(K)) / N
    assert loss("label_smoothing", copy.deepcopy(model), x, y) == pytest.approx(smooth, rel=1e-5)


def test_margin(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = network()
    total = 0.0
    for z, t in zip(logits_of(model, x), y.tolist(), strict=True):
        total += max(max(0.0, 1 + z[j] - z[t]) for j in range(K) if j != t)
    assert loss("margin", model, x, y) == pytest.approx(total / N, rel=1e-5)


def test_relative_flatness_penalty(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = network("mlp")
    assert isinstance(model, nn.Sequential)
    phi = model[:-1](x).detach().double()
    head = linear(model, -1).weight.detach().double()
    flatness = 0.0
    for row, z in zip(phi, logits_of(model, x), strict=True):
        p = torch.tensor(probabilities(z), dtype=torch.float64)
        spread = (p * head.square().sum(1)).sum() - (p @ head).square().sum()  # the other form of relative flatness
        flatness += float(row.square().sum() * spread) / N
    plain = loss("standard", model, x, y)
    assert loss("relative_flatness", model, x, y, strength=0.5) == pytest.approx(plain + 0.5 * flatness, rel=1e-4)
    assert flatness > 0.01


def test_adversarial_attacks_in_eval_mode_within_the_ball(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = network()
    seen: list[tuple[bool, Tensor]] = []
    model.register_forward_pre_hook(lambda module, args: seen.append((module.training, args[0].detach())))
    value = loss("adversarial", model, x, y)
    assert [training for training, _ in seen] == [False] * 10 + [True]
    for _, point in seen:
        assert (point - x).abs().max() <= 8 / 255 + 1e-6
        assert point.min() >= 0
        assert point.max() <= 1
    assert not torch.equal(seen[0][1], x)  # the random start
    last = copy.deepcopy(network())
    assert value == pytest.approx(loss("standard", last, seen[-1][1], y), rel=1e-6)
    assert value > loss("standard", network(), x, y)


def test_pgd_linf_against_a_loop_by_hand(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = network("mlp").eval()
    eps, step = 0.05, 0.02
    by_hand = x.clone()
    for _ in range(4):
        by_hand.requires_grad_()
        gradient = torch.autograd.grad(nn.CrossEntropyLoss(reduction="sum")(model(by_hand), y), by_hand)[0]
        moved = by_hand.detach() + step * torch.sign(gradient)
        by_hand = torch.minimum(torch.maximum(moved, (x - eps)), x + eps).clamp(0, 1)
    found = pgd_linf(model, x, x, lambda z: cross_entropy(z, y), eps=eps, step_size=step, steps=4)
    assert torch.allclose(found, by_hand, atol=1e-6)


def test_trades(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = network("mlp")
    seen: list[tuple[bool, Tensor]] = []
    model.register_forward_pre_hook(lambda module, args: seen.append((module.training, args[0].detach())))
    value = loss("trades", model, x, y)
    assert [training for training, _ in seen] == [False] * 11 + [True, True]
    x_adv = seen[-1][1]
    assert (x_adv - x).abs().max() <= 8 / 255 + 1e-6
    clean, adversarial = ([probabilities(z) for z in logits_of(model, points)] for points in (x, x_adv))
    expected = 0.0
    for p, q, t in zip(clean, adversarial, y.tolist(), strict=True):
        expected += (-math.log(p[t]) + 6 * sum(p[j] * math.log(p[j] / q[j]) for j in range(K))) / N
    assert value == pytest.approx(expected, rel=1e-4)
    assert value > loss("standard", model, x, y) + 0.01


def test_sam_takes_the_gradient_at_the_worst_nearby_weights(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model, by_hand = network(), network()
    criterion = nn.CrossEntropyLoss()
    weights = list(by_hand.parameters())
    at_w = torch.autograd.grad(criterion(by_hand(x), y), weights)
    statistics = {k: v.clone() for k, v in by_hand.state_dict().items() if "running" in k or "tracked" in k}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in at_w))
    before = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, at_w, strict=True):
            w.add_(0.05 * g / norm)
    expected = torch.autograd.grad(criterion(by_hand(x), y), weights)

    recipe = RECIPES["sam"]
    value, _ = recipe.backward(model, lambda: recipe.loss(model, x, y, None, rho=0.05), rho=0.05)
    assert float(value.detach()) == pytest.approx(loss("standard", network(), x, y), rel=1e-6)
    for parameter, old, gradient in zip(model.parameters(), before, expected, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
    after = model.state_dict()
    assert statistics
    assert all(torch.equal(after[name], value) for name, value in statistics.items())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_leaves_gradients_everywhere_and_the_mode_alone(name: str, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    recipe, model = RECIPES[name], network()
    numbers = BatchNoise(3, 0, torch.arange(N))
    value, logits = recipe.backward(model, lambda: recipe.loss(model, x, y, numbers, **recipe.params), **recipe.params)
    assert model.training
    assert value.ndim == 0
    assert logits.shape == (N, K)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert int(model.get_buffer("1.num_batches_tracked")) <= 2
