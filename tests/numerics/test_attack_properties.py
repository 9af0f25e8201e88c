"""Whatever the network, the images and the parameters: in the ball, in the box, in the same place every time."""

import copy
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typed import linear

from workers.science.attacks import ATTACKS, AttackInput
from workers.science.attacks.losses import LOSSES
from workers.science.attacks.norms import NORMS
from workers.science.evaluation import ball_limit, evaluate_attack

slow_machine = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])

shapes = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(4, 9), st.integers(4, 9))
radii = st.one_of(st.just(0.0), st.floats(1e-6, 2.0))
weights = st.sampled_from([1e-20, 1e-3, 1.0, 30.0, 1e4])
images = st.sampled_from(["noise", "black", "white", "binary", "beyond half"])


def case(seed: int, shape: tuple[int, ...], size: float, kind: str) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A random network whose head is scaled by `size`, images of that kind, labels of which most are its own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(shape[1], 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        model.append(nn.Linear(16, 5))
        x = torch.rand(shape)
        y = torch.randint(5, shape[:1])
    model.eval()
    with torch.no_grad():
        linear(model, -1).weight.mul_(size)
    x = {"noise": x, "black": x * 0, "white": x * 0 + 1, "binary": x.round(), "beyond half": x / 2 + 0.5}[kind]
    with torch.no_grad():
        y = torch.where(y > 0, model(x).argmax(1), y)
    return model, x, y, torch.arange(100, 100 + len(x))


@slow_machine
@given(
    seed=st.integers(0, 2**31),
    shape=shapes,
    size=weights,
    kind=images,
    norm=st.sampled_from(sorted(NORMS)),
    eps=radii,
    step_size=st.floats(0, 1),
    steps=st.integers(0, 5),
    loss=st.sampled_from(sorted(LOSSES)),
    random_start=st.booleans(),
    restarts=st.integers(1, 2),
    targeted=st.booleans(),
    judge=st.sampled_from(["final", "any_step"]),
)
def test_pgd(seed: int, shape: tuple[int, ...], size: float, kind: str, **params: Any) -> None:
    model, x, y, index = case(seed, shape, size, kind)
    before = copy.deepcopy(model.state_dict())
    inputs = AttackInput(x, y, index, seed=seed, scale=size)
    output = ATTACKS["pgd"](model, inputs, **params)
    check(model, before, x, y, output.x_adv, params["norm"], params["eps"])
    again = ATTACKS["pgd"](model, inputs, **params)
    assert torch.equal(again.x_adv, output.x_adv)
    with torch.no_grad():
        wrong = (model(x).argmax(1) != y) | (model(output.x_adv).argmax(1) != y)
    assert torch.equal(output.broken, wrong)


@slow_machine
@given(
    name=st.sampled_from(["fgsm", "apgd", "square", "autoattack", "noise", "transfer"]),
    seed=st.integers(0, 2**31),
    shape=shapes,
    size=weights,
    kind=images,
    norm=st.sampled_from(sorted(NORMS)),
    eps=radii,
)
def test_the_others(
    name: str, seed: int, shape: tuple[int, ...], size: float, kind: str, norm: str, eps: float
) -> None:
    model, x, y, index = case(seed, shape, size, kind)
    of: dict[str, dict[str, Any]] = {
        "apgd": {"steps": 6},
        "square": {"queries": 12},
        "autoattack": {"steps": 4, "targets": 2, "queries": 8},
        "noise": {"kind": "uniform", "points": 3},
        "transfer": {"source": copy.deepcopy(model), "step_size": eps / 2, "steps": 3},
    }
    params = of.get(name, {})
    before = copy.deepcopy(model.state_dict())
    output = ATTACKS[name](model, AttackInput(x, y, index, seed=seed), norm=norm, eps=eps, **params)
    check(model, before, x, y, output.x_adv, norm, eps)


@slow_machine
@given(seed=st.integers(0, 2**31), shape=shapes, size=weights, kind=images, steps=st.integers(1, 6))
def test_cw_stays_in_the_box(seed: int, shape: tuple[int, ...], size: float, kind: str, steps: int) -> None:
    model, x, y, index = case(seed, shape, size, kind)
    before = copy.deepcopy(model.state_dict())
    output = ATTACKS["cw"](model, AttackInput(x, y, index), steps=steps, lr=0.1)
    check(model, before, x, y, output.x_adv, "linf", 1.0)


@slow_machine
@given(
    seed=st.integers(0, 2**31),
    shape=shapes,
    batch_size=st.integers(1, 6),
    random_start=st.booleans(),
    norm=st.sampled_from(sorted(NORMS)),
)
def test_bits_do_not_depend_on_the_batch_size(
    seed: int, shape: tuple[int, ...], batch_size: int, random_start: bool, norm: str
) -> None:
    model, x, y, index = case(seed, shape, 30.0, "noise")
    model, x = model.double(), x.double()  # float32 sums may differ with the batch, and sign() makes that visible
    params = {"norm": norm, "eps": 0.2, "step_size": 0.05, "steps": 4, "random_start": random_start, "restarts": 2}
    whole, parts = (
        evaluate_attack(model, x, y, index, attack="pgd", params=params, batch_size=size)
        for size in (len(x), batch_size)
    )
    assert all(torch.equal(whole.bits[name], parts.bits[name]) for name in whole.bits)
    assert whole.numbers["gradient_calls"] == parts.numbers["gradient_calls"]


def check(
    model: nn.Module, before: dict[str, Tensor], x: Tensor, y: Tensor, x_adv: Tensor, norm: str, eps: float
) -> None:
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert bool(((x_adv >= 0) & (x_adv <= 1)).all())
    assert float(NORMS[norm].size(x_adv.double() - x.double()).max()) <= ball_limit(norm, eps)
    if eps == 0:
        assert torch.equal(x_adv, x)
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
