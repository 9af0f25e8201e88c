"""Arithmetic at the edge: measures and losses where softmax rounds to 0 and 1, against mpmath and by property."""

import json
import math
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from typed import linear

from workers.science.architectures import build
from workers.science.attacks.losses import LOSSES, targeted_dlr
from workers.science.attacks.norms import NORMS
from workers.science.cross_entropy import log_increase, log_odds, log_softplus, loss_increase, mean_increase
from workers.science.curvature import gaussian_like, log_odds_of, loss_direction, of_unit_norm, parameters_of
from workers.science.datasets import digits, to_unit
from workers.science.heads import linear_head, scale_head
from workers.science.recipes import RECIPES
from workers.science.recipes.common import BatchNoise
from workers.science.sharpness import MEASURES, MeasureInput
from workers.science.training import train

MARGINS = [80.0, 87.5, 88.0, 90.0, 98.0, 104.0, 700.0]
QUICK: dict[str, dict[str, Any]] = {
    "hessian_trace_network": {"probes": 3},
    "top_eigenvalue_network": {"iterations": 5},
    "adaptive_average": {"draws": 2},
    "adaptive_worst": {"steps": 3},
    "pac_bayes_flatness": {"draws": 1, "bisections": 2},
    "input_curvature": {"iterations": 3},
    "lipschitz": {"iterations": 3},
    "detector": {"steps": 2},
}
QUANTILES = ("q05", "q25", "median", "q75", "q95")
LOGS_OF_IMAGES = [
    f"log_{of}" for of in (
        "hessian_trace", "relative_sharpness", "relative_sharpness_unsquared", "relative_flatness",
        "gauge_fixed_relative_sharpness", "top_eigenvalue", "softmax_trace", "rest", "input_gradient_norm",
        "input_curvature",
    )
]  # fmt: skip
ADAPTIVE = [f"detector_adaptive{of}" for of in ("", "_lambda001", "_lambda01", "_lambda1")]
NOT_NEGATIVE = {
    "n", "n_clean_correct", "n_non_finite", "weight_norm", "weight_norm_unscaled", "feature_norm_min",
    "feature_norm_q01", *(f"loss_{of}" for of in (*QUANTILES, "mean")), *(f"{of}_n_zero" for of in LOGS_OF_IMAGES),
    "log_dataset_top_eigenvalue_iterations", "log_dataset_top_eigenvalue_converged",
    "hessian_trace_network_standard_error", "hessian_trace_penultimate", "hessian_trace_penultimate_standard_error",
    "top_eigenvalue_network_residual", "top_eigenvalue_network_iterations", "top_eigenvalue_network_converged",
    "adaptive_average_standard_error", "adaptive_average_normalised_standard_error", "adaptive_worst",
    "adaptive_worst_normalised", "fisher_rao", "pac_bayes_flatness", "pac_bayes_sigma", "lipschitz_upper",
    "lipschitz_jacobian_max", *(f"lipschitz_jacobian_{of}" for of in (*QUANTILES, "mean")),
    *(
        f"{radius}_{threshold}_{of}" for radius in ("certified_radius", "estimated_radius_jacobian")
        for threshold in ("e001", "e01", "log2", "logk") for of in QUANTILES
    ),
    "detector_accuracy", "detector_auroc", "detector_n", "detector_adaptive_strength",
    *(f"{of}_{number}" for of in ADAPTIVE for number in ("accuracy", "auroc", "n", "flip_rate")),
}  # fmt: skip
MAY_BE_NEGATIVE = {
    "log_weight_norm", "log_dataset_top_eigenvalue",
    *(f"{log}_{of}" for log in LOGS_OF_IMAGES for of in (*QUANTILES, "log_mean")),
    "hessian_trace_network", "log_hessian_trace_network", "hessian_trace_penultimate_share", "top_eigenvalue_network",
    "log_top_eigenvalue_network", "sam_sharpness", "log_sam_sharpness", "asam_sharpness", "log_asam_sharpness",
    "adaptive_average", "log_adaptive_average", "adaptive_average_normalised", "log_adaptive_worst", "log_fisher_rao",
    "pac_bayes_accuracy_drop",
}  # fmt: skip
"""Both by whole names, as they are of all images of the test split: see `whole`."""


def whole(name: str) -> str:
    """The name of the same number of all images of the test split."""
    return name.removeprefix("train_").removesuffix("_clean_correct") if name != "n_clean_correct" else name


def run(name: str, model: nn.Module, x: Tensor, y: Tensor, **params: Any) -> dict[str, Any]:
    return dict(MEASURES[name](model, MeasureInput(x, y, x, y, batch_size=3), **params).numbers)


# -- the smallest input -------------------------------------------------------------------------------------


def two_rows(margin: float, dtype: torch.dtype) -> tuple[nn.Module, Tensor, Tensor]:
    """`Linear(4, 2)` with rows (margin / 4, ...) and 0 on an image of ones of class 0."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).to(dtype).eval()
    with torch.no_grad():
        linear(model, 1).weight.zero_()
        linear(model, 1).bias.zero_()
        linear(model, 1).weight[0] = margin / 4
    return model, torch.ones(1, 1, 2, 2, dtype=dtype), torch.tensor([0])


def softplus(x: Any) -> Any:
    return mpmath.log1p(mpmath.exp(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [*MARGINS, 2000.0, 10_000.0])
def test_sam_and_asam_on_one_confident_image(margin: float, dtype: torch.dtype) -> None:
    """`grad g` is minus one at row 0 and its bias, one at row 1: a step moves g by rho ||T grad g||."""
    model, x, y = two_rows(margin, dtype)
    with mpmath.workdps(60):
        T = [margin / 4 + 0.01] * 4 + [0.01] * 6
        moves = {"sam_sharpness": 0.05 * math.sqrt(10), "asam_sharpness": 0.5 * math.sqrt(sum(t * t for t in T))}
        for name, move in moves.items():
            rise = softplus(mpmath.mpf(move) - margin) - softplus(-mpmath.mpf(margin))
            found = run(name, model, x, y)
            slack = 1e-11 * margin if dtype == torch.float64 else 3e-7 * margin  # of the moved weights
            assert found[f"log_{name}"] == pytest.approx(float(mpmath.log(rise)), abs=slack)
            assert found[name] == pytest.approx(float(rise), rel=2 * slack) or margin > 700
            assert found[name] > 0 or margin > 700


@pytest.mark.parametrize("margin", [*MARGINS, 2000.0])
def test_curvature_of_one_confident_image(margin: float) -> None:
    """`H = p (1 - p) (1, -1)(1, -1)^T (x) u u^T`, `u = (1, 1, 1, 1, 1)` with the bias: both values are 10 p (1 - p)."""
    model, x, y = two_rows(margin, torch.float32)
    log_p = -margin - 2 * math.log1p(math.exp(-margin))
    top = run("top_eigenvalue_network", model, x, y)
    assert top["log_top_eigenvalue_network"] == pytest.approx(math.log(10) + log_p, abs=1e-5)
    assert top["top_eigenvalue_network_converged"] == 1
    trace = MEASURES["hessian_trace_network"](model, MeasureInput(x, y, x, y, batch_size=1), probes=100)
    slack = 4 * float(trace.numbers["hessian_trace_network_standard_error"] or 0) * math.exp(min(-log_p, 600))
    assert math.exp(float(trace.numbers["log_hessian_trace_network"] or 0) - log_p) == pytest.approx(
        10, abs=max(slack, 3)
    )
    fisher = run("fisher_rao", model, x, y)["log_fisher_rao"]
    assert fisher == pytest.approx(2 * (math.log(margin) - margin), abs=1e-9)


# -- a network with a hidden layer, against sixty digits ------------------------------------------------------------


class Oracle:
    """Mean cross-entropy of `Linear, tanh, Linear` on images, in mpmath, as a function of all parameters."""

    def __init__(self, model: nn.Sequential, x: Tensor, y: Tensor) -> None:
        self.shapes = [tuple(p.shape) for p in model.parameters()]
        self.w = [mpmath.mpf(v) for p in model.parameters() for v in p.detach().flatten().tolist()]
        self.x, self.y = x.flatten(1).tolist(), y.tolist()

    def loss(self, w: list[Any]) -> Any:
        parts, at = [], 0
        for shape in self.shapes:
            parts.append(w[at : at + math.prod(shape)])
            at += math.prod(shape)
        total = mpmath.mpf(0)
        for image, label in zip(self.x, self.y, strict=True):
            hidden = [mpmath.tanh(v) for v in self._layer(parts[0], parts[1], image)]
            z = self._layer(parts[2], parts[3], hidden)
            total += mpmath.log1p(sum(mpmath.exp(v - z[label]) for j, v in enumerate(z) if j != label))
        return total / len(self.y)

    @staticmethod
    def _layer(weight: list[Any], bias: list[Any], x: list[Any]) -> list[Any]:
        return [b + sum(weight[i * len(x) + j] * v for j, v in enumerate(x)) for i, b in enumerate(bias)]

    def along(self, i: int, h: Any) -> Any:
        return self.loss([v + h if j == i else v for j, v in enumerate(self.w)])

    def gradient(self) -> list[Any]:
        h = mpmath.mpf(10) ** -25
        return [(self.along(i, h) - self.along(i, -h)) / (2 * h) for i in range(len(self.w))]

    def trace(self) -> Any:
        h, middle = mpmath.mpf(10) ** -25, self.loss(self.w)
        return sum((self.along(i, h) - 2 * middle + self.along(i, -h)) / h**2 for i in range(len(self.w)))


def hidden_net(scale: float) -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 3)).double().eval()
    x = torch.rand(3, 1, 2, 2, dtype=torch.float64)
    scaled = scale_head(model, scale)
    assert isinstance(scaled, nn.Sequential)
    return scaled, x, scaled(x).argmax(1)


@pytest.mark.parametrize("scale", [50.0, 10_000.0])
def test_weight_measures_against_sixty_digits(scale: float) -> None:
    model, x, y = hidden_net(scale)
    with mpmath.workdps(60):
        oracle = Oracle(model, x, y)
        before, g = oracle.loss(oracle.w), oracle.gradient()
        for name, rho, T in (
            ("sam_sharpness", 0.05, [mpmath.mpf(1) for _ in oracle.w]),
            ("asam_sharpness", 0.05, [abs(v) + mpmath.mpf(0.01) for v in oracle.w]),
        ):
            size = mpmath.sqrt(sum((t * v) ** 2 for t, v in zip(T, g, strict=True)))
            moved = [w + rho * t**2 * v / size for w, t, v in zip(oracle.w, T, g, strict=True)]
            rise = oracle.loss(moved) - before
            found = run(name, model, x, y, rho=rho)
            assert found[f"log_{name}"] == pytest.approx(float(mpmath.log(rise)), rel=1e-9, abs=1e-9)
            assert found[name] == pytest.approx(float(rise), rel=1e-8)
        noise = gaussian_like(parameters_of(model), torch.Generator().manual_seed(0))
        values = [v for n in noise.values() for v in n.flatten().tolist()]
        moved = [w + mpmath.mpf(0.001) * abs(w) * v for w, v in zip(oracle.w, values, strict=True)]
        average = run("adaptive_average", model, x, y, rho=0.001, draws=1)["adaptive_average"]
        assert average == pytest.approx(float(oracle.loss(moved) - before), rel=1e-6)
        log_trace = mpmath.log(oracle.trace())
        trace = MEASURES["hessian_trace_network"](model, MeasureInput(x, y, x, y, batch_size=3), probes=150).numbers
        assert trace["log_hessian_trace_network"] == pytest.approx(float(log_trace), abs=0.4)


@pytest.mark.slow
def test_the_weight_measures_of_a_trained_mlp_are_those_of_float64() -> None:
    """The issue's: SAM and ASAM sharpness were NaN on the mlp on digits after 60 epochs, at s = 25 and 50."""
    data = digits.read()
    model = build("mlp", (1, 8, 8), 10, seed=0)
    train(model, data, epochs=60, batch_size=64, lr=0.1, seed=0)
    x, y = to_unit(data.train_x[:512]), data.train_y[:512]
    for scale in (1.0, 25.0, 50.0):
        scaled = scale_head(model, scale)
        double = scale_head(model, scale).double()
        for name in ("sam_sharpness", "asam_sharpness", "adaptive_worst", "top_eigenvalue_network", "fisher_rao"):
            found = MEASURES[name](scaled, MeasureInput(x, y, x, y, batch_size=128)).numbers
            exact = MEASURES[name](double, MeasureInput(x.double(), y, x.double(), y, batch_size=128)).numbers
            assert float(found[name] or 0) > 0
            assert found[name] == pytest.approx(exact[name], rel=1e-3), (name, scale)
    faraway = scale_head(model, 400.0)
    for name in ("sam_sharpness", "adaptive_worst", "top_eigenvalue_network", "fisher_rao"):
        log_value = MEASURES[name](faraway, MeasureInput(x, y, x, y, batch_size=128)).numbers[f"log_{name}"]
        assert log_value is not None
        assert -4000 < log_value < -400


# -- differences of almost equal losses -----------------------------------------------------------------------------

ODDS = st.floats(-1e4, 1e4)


@given(ODDS, st.one_of(ODDS, st.floats(-1e-6, 1e-6)), st.booleans())
@example(-98.0, 1e-3, True)
@example(1e4, -2e4, True)
def test_loss_increase_against_mpmath(before: float, other: float, near: bool) -> None:
    after = before + other if near else other
    a, b = (torch.tensor([v], dtype=torch.float64) for v in (before, after))
    sign, log_size = log_increase(a, b)
    with mpmath.workdps(400):
        rise = softplus(mpmath.mpf(after)) - softplus(mpmath.mpf(before))
        assert float(sign) == mpmath.sign(rise)
        if rise:
            assert float(log_size) == pytest.approx(float(mpmath.log(abs(rise))), rel=1e-13, abs=1e-11)
            assert float(loss_increase(a, b)) == pytest.approx(float(rise), rel=1e-9, abs=1e-300)
        log_loss = float(mpmath.log(softplus(mpmath.mpf(after))))
        assert float(log_softplus(b)) == pytest.approx(log_loss, rel=1e-13, abs=1e-13)


def test_mean_increase_of_signs_that_differ_and_of_none() -> None:
    before = torch.tensor([-1000.0, -1000.0], dtype=torch.float64)
    mean, log_mean = mean_increase(before, torch.tensor([-999.0, -1001.0], dtype=torch.float64))
    assert mean == 0.0  # e^-1000 has no float64
    assert log_mean == pytest.approx(-1000 + math.log(((math.e - 1) - (1 - 1 / math.e)) / 2))
    assert mean_increase(before, before) == (0.0, None)
    assert mean_increase(before, before - 1)[1] is None


# -- every measure, every loss, every norm, over sizes --------------------------------------------------------------


SIZES = (1e4, 1e3, 200.0, 100.0, 40.0, 10.0, 1.0, 1e-3)
"""Of the largest logit. Where floats are drawn, most are small, and nothing underflows."""


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, Tensor, Tensor]:
    """A tiny float32 network with logits up to `SIZES`; some with parts that are 0, dead or equal."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    k, n = draw(st.integers(2, 4)), draw(st.integers(1, 6))
    activation = draw(st.sampled_from([nn.ReLU, nn.Tanh, nn.GELU]))
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), activation(), nn.Linear(5, k)).eval()
    kind = draw(st.sampled_from(["plain", "zero head", "dead features", "equal rows", "all zero", "no bias"]))
    x, y = torch.rand(n, 1, 2, 2), torch.randint(0, k, (n,))
    with torch.no_grad():
        if kind in ("zero head", "all zero"):
            linear(model, 3).weight.zero_()
        if kind == "equal rows":
            linear(model, 3).weight[:] = linear(model, 3).weight[0].clone()
        if kind == "dead features":
            linear(model, 1).weight.zero_()
            linear(model, 1).bias.fill_(-1e4)
        if kind in ("no bias", "all zero"):
            linear(model, 1).bias.zero_()
            linear(model, 3).bias.zero_()
        size = draw(st.sampled_from(SIZES))
        largest = float(model(x).abs().max()) or 1.0
        linear(model, 3).weight.mul_(size / largest)
        linear(model, 3).bias.mul_(size / largest)
        if draw(st.booleans()):
            y = model(x).argmax(1)
    return model, x, y


def test_every_number_with_a_sign_is_one_that_a_measure_gives() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(27, 20), nn.ReLU(), nn.Linear(20, 4)).eval()
    x = torch.rand(60, 3, 3, 3)
    y = model(x).argmax(1)
    inputs, found = MeasureInput(x, y, x, y, batch_size=60), set[str]()
    for name, measure in MEASURES.items():
        params = {**QUICK.get(name, {}), **({"eps": 0.5, "step_size": 0.2} if name == "detector" else {})}
        found |= {whole(key) for key in measure(model, inputs, **params).numbers}
    assert found == NOT_NEGATIVE | MAY_BE_NEGATIVE
    assert not NOT_NEGATIVE & MAY_BE_NEGATIVE


@settings(max_examples=10, deadline=None)
@given(networks())
@pytest.mark.parametrize("name", list(MEASURES))
def test_every_measure_is_a_number_or_null(name: str, case: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = case
    report = MEASURES[name](model, MeasureInput(x, y, x, y, batch_size=4), **QUICK.get(name, {}))
    json.dumps([report.numbers, report.curves], allow_nan=False)
    for key, value in report.numbers.items():
        assert whole(key) in NOT_NEGATIVE | MAY_BE_NEGATIVE, f"which of the two is {key}?"
        if value is not None and whole(key) in NOT_NEGATIVE:
            assert value >= 0, key
        log = report.numbers.get(f"log_{key}", 0.0)
        if log is None:
            assert value is not None
            assert value <= 0, key
        elif value is not None and value > 1e-300 and f"log_{key}" in report.numbers:
            assert math.log(value) == pytest.approx(log, abs=1e-6), key


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**16), st.floats(-3, 4), st.sampled_from([0.5, 1.0, 50.0]))
def test_a_convex_loss_only_rises(seed: int, exponent: float, rho: float) -> None:
    """One linear layer: the steps go uphill, and the Hessian has no negative direction."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double().eval()
    x = torch.rand(5, 1, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        linear(model, 1).weight.mul_(10**exponent)
    y = model(x).argmax(1) if seed % 2 else torch.randint(0, 3, (5,))
    for name in ("sam_sharpness", "asam_sharpness"):
        assert run(name, model, x, y, rho=rho)[f"log_{name}"] is not None
    assert run("top_eigenvalue_network", model, x, y)["log_top_eigenvalue_network"] is not None
    assert run("hessian_trace_network", model, x, y, probes=3)["hessian_trace_network"] >= 0


@given(st.integers(0, 2**16), st.integers(2, 6), st.floats(-3, 4), st.booleans())
@pytest.mark.parametrize("name", [*LOSSES, "targeted_dlr"])
def test_every_loss_and_its_gradient_are_numbers(name: str, seed: int, k: int, exponent: float, ties: bool) -> None:
    k = max(k, {"dlr": 3, "targeted_dlr": 4}.get(name, 2))
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(8, k, generator=generator)
    z = (z.round() if ties else z) * 10**exponent
    z = z.clamp(-1e4, 1e4).requires_grad_()
    y = torch.randint(0, k, (8,), generator=generator)
    values = targeted_dlr(z, y, (y + 1) % k) if name == "targeted_dlr" else LOSSES[name](z, y, 7.0)
    (gradient,) = torch.autograd.grad(values.sum(), z)
    assert torch.isfinite(values).all()
    assert torch.isfinite(gradient).all()
    assert "cross_entropy" not in name or name.startswith("stable") or bool((values >= 0).all())


@settings(max_examples=25, deadline=None)
@given(networks(), st.integers(0, 3))
@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_has_a_finite_loss_and_finite_gradients(
    name: str, case: tuple[nn.Module, Tensor, Tensor], epoch: int
) -> None:
    """A step as `train` takes it: the loss, its gradients as the recipe makes them, with nothing left behind."""
    (model, x, y), recipe = case, RECIPES[name]
    model.train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    noise = BatchNoise(0, epoch, torch.arange(len(x)))
    loss, logits = recipe.backward(model, lambda: recipe.loss(model, x, y, noise, **recipe.params), **recipe.params)
    assert torch.isfinite(loss)
    assert torch.isfinite(logits).all()
    assert loss >= 0 or name == "trades"  # whose divergence is a difference of rounded logarithms
    for parameter, was in zip(model.parameters(), before, strict=True):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert torch.equal(parameter, was)


@given(st.integers(0, 2**16), st.floats(-44, 30), st.sampled_from(list(NORMS)))
def test_a_direction_has_norm_one_at_any_size(seed: int, exponent: float, name: str) -> None:
    gradient = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(seed)) * 10**exponent
    gradient[0] = 0
    size = NORMS[name].size(NORMS[name].normalize(gradient))
    assert size.tolist() == pytest.approx((gradient != 0).flatten(1).any(1).float().tolist(), abs=1e-6)
    whole = of_unit_norm({"a": gradient[:2], "b": gradient[2:]})
    norm = float(sum(v.double().square().sum() for v in whole.values())) ** 0.5
    assert norm == pytest.approx(1.0, abs=1e-6) or not gradient.any()


def test_the_direction_is_the_gradient_and_does_not_depend_on_the_batch_size() -> None:
    model, x, y = hidden_net(1.0)
    x, y = torch.cat([x, x.flip(3)]), torch.cat([y, (y + 1) % 3])
    loss = nn.functional.cross_entropy(model(x), y)
    plain = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    for batch_size in (8, 3):
        found = of_unit_norm(loss_direction(model, parameters_of(model), x, y, batch_size))
        flat = torch.cat([g.flatten() for g in found.values()])
        torch.testing.assert_close(flat, plain / plain.norm(), rtol=1e-9, atol=1e-12)


# -- Hutchinson by layer --------------------------------------------------------------------------------------------


def test_a_zero_head_leaves_no_trace_elsewhere() -> None:
    """Its own trace is `mean ||phi||^2 Tr S(p)`, S of uniform p; nothing below it can change the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    with torch.no_grad():
        linear(model, 5).weight.zero_()
        linear(model, 5).bias.zero_()
    x, y = torch.rand(40, 1, 2, 2), torch.randint(0, 3, (40,))
    report = MEASURES["hessian_trace_network"](model, MeasureInput(x, y, x, y, batch_size=16), probes=50)
    assert report.curves["layer"] == ["1", "3", "5"]
    assert report.curves["layer_trace"][:2] == [0.0, 0.0]
    assert report.curves["layer_share"] == [0.0, 0.0, 1.0]
    assert report.curves["layer_probes"] == [50, 50, 50]
    phi = model[:5](x).detach().double()
    want = float(phi.square().sum(1).mean()) * 2 / 3
    error = float(report.numbers["hessian_trace_penultimate_standard_error"] or 0)
    assert report.numbers["hessian_trace_penultimate"] == pytest.approx(want, abs=4 * error)
    assert report.numbers["hessian_trace_network"] == pytest.approx(want + 2 / 3, abs=4 * error + 0.2)


def test_layers_share_the_probes() -> None:
    """About four layer products for every probe asked for, two at least, and `probes` of the head."""
    model = nn.Sequential(nn.Flatten(), *[nn.Linear(4, 4) for _ in range(20)], nn.Linear(4, 2)).eval()
    x, y = torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 0])
    for probes, each in ((1, 1), (2, 2), (3, 2), (21, 4)):
        report = MEASURES["hessian_trace_network"](model, MeasureInput(x, y, x, y, batch_size=3), probes=probes)
        assert report.curves["layer_probes"] == [each] * 20 + [probes]
        assert (report.numbers["hessian_trace_network_standard_error"] is None) == (probes == 1)
        assert report.numbers["hessian_trace_network"] == pytest.approx(sum(map(float, report.curves["layer_trace"])))  # type: ignore[arg-type]


# -- SAM, the recipe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0, -60, -100, -140])
def test_sam_normalises_a_gradient_of_any_size(exponent: int) -> None:
    """The weights of the second pass lie rho from w, to the last bit the same for any power of two in the loss."""
    seen: dict[int, list[Tensor]] = {}
    for power in (0, exponent):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        x, factor = torch.tensor([[1.0, -2.0, 0.5]]), 2.0 ** max(power, -126)
        seen[power] = []

        def loss_of_batch(model: nn.Module = model, x: Tensor = x, power: int = power, factor: float = factor) -> Any:
            seen[power].append(torch.cat([p.detach().flatten() for p in model.parameters()]))
            logits = model(x) * factor * 2.0 ** min(power + 126, 0)
            return logits[0, 0] - 3 * logits[0, 1], logits

        RECIPES["sam"].backward(model, loss_of_batch, rho=0.05)
    (before, after), (_, same) = seen[exponent], seen[0]
    assert float((after - before).norm()) == pytest.approx(0.05, rel=1e-5)
    assert torch.equal(after, same)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sam_without_a_radius_is_sgd_with_its_counters(momentum: float) -> None:
    """Bit for bit: weights, running statistics and `num_batches_tracked`, which a second pass would count twice."""
    data, states, reports = digits.read(), [], []
    for recipe, params in (("standard", {}), ("sam", {"rho": 0.0})):
        model = build("simple_cnn", (1, 8, 8), 10, seed=1)
        report = train(
            model, data, recipe=recipe, recipe_params=params, epochs=2, momentum=momentum, train_samples=150, seed=1
        )
        states.append(model.state_dict())
        reports.append((report.clean_accuracy, report.clean_loss, [epoch.loss for epoch in report.epochs]))
    assert reports[0] == reports[1]
    assert any("num_batches_tracked" in name for name in states[0])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
        if "num_batches_tracked" in name:
            assert value == 4  # two epochs of 128 and 22 images


def test_logits_of_a_float32_network_are_float64_from_the_head_on() -> None:
    """A logit of 5,000 in float32 is up to 2.4e-4 wrong; the log odds are right to 1e-9 of the features."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 50), nn.ReLU(), nn.Linear(50, 3)).eval()
    scaled = scale_head(model, 30_000.0)
    x, y = torch.rand(6, 1, 2, 2), torch.randint(0, 3, (6,))
    head = linear_head(scaled)
    exact = model[:3](x).double() @ head.weight.double().T + head.bias.double()
    found = log_odds_of(scaled, parameters_of(scaled), x, y, 6)
    torch.testing.assert_close(found, log_odds(exact, y).detach(), rtol=1e-12, atol=1e-9)
