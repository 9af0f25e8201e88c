"""Every measure against a dense computation on a network small enough for one, and the seam that all of them fill."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn import functional
from typed import linear

from workers.science.closed_forms import ClosedForms
from workers.science.curvature import lanczos
from workers.science.errors import NonFinite
from workers.science.heads import linear_head, scale_head
from workers.science.sharpness import MEASURES, MeasureInput

# torch.func.hessian imports a module of torch that still uses the deprecated torch.jit.script
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
N, K = 12, 3
FAST: dict[str, dict[str, Any]] = {
    "hessian_trace_network": {"probes": 4},
    "pac_bayes_flatness": {"draws": 2, "bisections": 3},
}


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, K)).double().eval()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.rand(N, 1, 2, 2, generator=g, dtype=torch.float64), torch.randint(0, K, (N,), generator=g)


def run(
    name: str, model: nn.Module, data: tuple[Tensor, Tensor], *, seed: int = 0, batch_size: int = 5, **params: Any
) -> dict[str, Any]:
    return dict(MEASURES[name](model, MeasureInput(*data, *data, seed, batch_size), **params).numbers)


def dense(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[Tensor, list[str]]:
    """Hessian `[P, P]` over all parameters, and the parameter that each row belongs to."""
    x, y = data
    shapes = {n: p.shape for n, p in model.named_parameters()}

    def loss(vector: Tensor) -> Tensor:
        parts = torch.split(vector, [s.numel() for s in shapes.values()])
        parameters = {n: part.view(s) for part, (n, s) in zip(parts, shapes.items(), strict=True)}
        return functional.cross_entropy(functional_call(model, parameters, (x,)), y)

    vector = torch.cat([p.detach().flatten() for p in model.parameters()])
    return hessian(loss)(vector), [n for n, s in shapes.items() for _ in range(s.numel())]


@pytest.mark.parametrize("name", list(MEASURES))
def test_every_measure_fills_the_seam(name: str, net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    """Same seed, same numbers; the network untouched; nothing that JSON cannot hold; progress within its total."""
    before = {n: v.clone() for n, v in net.state_dict().items()}
    seen: list[tuple[int, int]] = []
    inputs, params = MeasureInput(*data, *data, seed=3, batch_size=5), FAST.get(name, {})
    watched = replace(inputs, on_progress=lambda done, total: seen.append((done, total)))
    one = MEASURES[name](net, watched, **params)
    two = MEASURES[name](net, inputs, **params)
    assert one == two
    json.dumps([one.numbers, one.curves], allow_nan=False)
    assert one.numbers
    assert seen
    assert all(0 < done <= total for done, total in seen)
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("name", [n for n in MEASURES if n != "closed_forms"])
def test_the_batch_size_changes_nothing(name: str, net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    if name == "input_curvature":
        pytest.skip("its start vectors are drawn batch by batch: equal only as far as the power method has converged")
    one, two = (run(name, net, data, batch_size=b, **FAST.get(name, {})) for b in (5, 12))
    for key, value in one.items():
        assert value is two[key] is None or value == pytest.approx(two[key], rel=1e-6, abs=1e-12), key


def test_nothing_to_measure(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    empty = data[0][:0], data[1][:0]
    for name in MEASURES:
        if name != "closed_forms":
            with pytest.raises(ValueError):
                MEASURES[name](net, MeasureInput(*empty, *empty))


@pytest.mark.slow
def test_hutchinson_finds_the_trace_and_the_shares(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    H, owners = dense(net, data)
    report = MEASURES["hessian_trace_network"](net, MeasureInput(*data, *data, batch_size=5), probes=600)
    trace, error = report.numbers["hessian_trace_network"], report.numbers["hessian_trace_network_standard_error"]
    assert trace is not None
    assert error is not None
    assert abs(trace - float(H.trace())) < 4 * error < 0.4 * trace
    head = torch.tensor([o == "3.weight" for o in owners])
    penultimate = report.numbers["hessian_trace_penultimate"]
    slack = report.numbers["hessian_trace_penultimate_standard_error"]
    assert slack is not None
    assert penultimate == pytest.approx(float(H.diagonal()[head].sum()), abs=4 * slack)
    forms = ClosedForms.of(net[:3](data[0]).detach(), linear_head(net).weight, linear_head(net).bias)
    assert penultimate == pytest.approx(float(forms.log_hessian_trace.exp().mean()), abs=4 * slack)
    assert report.curves["layer"] == ["1", "3"]
    assert sum(s for s in report.curves["layer_share"] if isinstance(s, float)) == pytest.approx(1)


def test_lanczos_finds_the_top_eigenvalue(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    H, _ = dense(net, data)
    found = run("top_eigenvalue_network", net, data, tolerance=1e-9)
    assert found["top_eigenvalue_network"] == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-9)
    assert found["top_eigenvalue_network_converged"] == 1


@pytest.mark.parametrize("size", [1, 2, 30])
def test_lanczos_against_eigvalsh(size: int) -> None:
    g = torch.Generator().manual_seed(size)
    A = torch.randn(size, size, generator=g, dtype=torch.float64)
    A = A + A.T - 5 * torch.eye(size)
    found = lanczos(
        lambda v: A @ v, torch.randn(size, generator=g, dtype=torch.float64), iterations=99, tolerance=1e-10
    )
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(A)[-1]), rel=1e-9)
    with pytest.raises(NonFinite):
        lanczos(lambda v: v * math.nan, torch.ones(3), iterations=3, tolerance=0.1)


def linear_problem(data: tuple[Tensor, Tensor]) -> tuple[nn.Sequential, np.ndarray, np.ndarray, np.ndarray]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, K, bias=False)).double().eval()
    return model, linear(model, 1).weight.detach().numpy(), data[0].flatten(1).numpy(), np.eye(K)[data[1].numpy()]


def numpy_loss(W: np.ndarray, x: np.ndarray, onehot: np.ndarray) -> float:
    z = x @ W.T
    return float((np.log(np.exp(z).sum(1)) - (z * onehot).sum(1)).mean())


def numpy_gradient(W: np.ndarray, x: np.ndarray, onehot: np.ndarray) -> np.ndarray:
    p = np.exp(x @ W.T)
    p /= p.sum(1, keepdims=True)
    gradient: np.ndarray = (p - onehot).T @ x / len(x)
    return gradient


def test_sam_and_asam_by_their_formulas(data: tuple[Tensor, Tensor]) -> None:
    model, W, x, onehot = linear_problem(data)
    sam, asam = [], []
    for part in (slice(0, 8), slice(8, 12)):
        g, L = numpy_gradient(W, x[part], onehot[part]), numpy_loss(W, x[part], onehot[part])
        T = np.abs(W) + 0.01
        weight = (part.stop - part.start) / N
        sam.append(weight * (numpy_loss(W + 0.05 * g / np.linalg.norm(g), x[part], onehot[part]) - L))
        step = 0.5 * T**2 * g / np.linalg.norm(T * g)
        asam.append(weight * (numpy_loss(W + step, x[part], onehot[part]) - L))
    assert run("sam_sharpness", model, data, m=8)["sam_sharpness"] == pytest.approx(sum(sam), rel=1e-9)
    assert run("asam_sharpness", model, data, m=8)["asam_sharpness"] == pytest.approx(sum(asam), rel=1e-9)


def test_adaptive_worst_is_between_a_sample_and_the_corner_maximum(data: tuple[Tensor, Tensor]) -> None:
    """The loss of a linear model is convex in W, so the maximum over the box is at one of its 2^12 corners."""
    model, W, x, onehot = linear_problem(data)
    corners = np.array(np.meshgrid(*[[-1, 1]] * W.size)).reshape(W.size, -1).T.reshape(-1, *W.shape)
    best = max(numpy_loss(W + 0.1 * np.abs(W) * c, x, onehot) for c in corners) - numpy_loss(W, x, onehot)
    found = run("adaptive_worst", model, data, rho=0.1)["adaptive_worst"]
    assert 0.98 * best <= found <= best + 1e-12


@pytest.mark.slow
def test_adaptive_average_has_the_second_order_mean(data: tuple[Tensor, Tensor]) -> None:
    model, W, *_ = linear_problem(data)
    H, _ = dense(model, data)
    rho = 0.01
    want = rho**2 / 2 * float((H.diagonal() * torch.from_numpy(W).flatten().square()).sum())
    found = run("adaptive_average", model, data, rho=rho, draws=1500)
    assert abs(found["adaptive_average"] - want) < 4 * found["adaptive_average_standard_error"]


def test_normalised_values_do_not_depend_on_the_scale(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    scaled = scale_head(net, 7.0)
    for name in ("adaptive_average", "adaptive_worst"):
        one, other = run(name, net, data), run(name, scaled, data)
        assert one[f"{name}_normalised"] == pytest.approx(other[f"{name}_normalised"], rel=1e-9)
        assert one[name] != pytest.approx(other[name], rel=0.01)


def test_fisher_rao_by_its_definition(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    z = net(data[0]).detach()
    inner = ((z.softmax(1) - functional.one_hot(data[1], K)) * z).sum(1)
    assert run("fisher_rao", net, data)["fisher_rao"] == pytest.approx(float(inner.square().mean()), rel=1e-9)


@pytest.mark.slow
def test_pac_bayes_sigma_is_where_the_accuracy_has_fallen(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    x = torch.rand(200, 1, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    mine = x, net(x).argmax(1)
    wide, narrow = (run("pac_bayes_flatness", net, mine, drop=d) for d in (0.3, 0.1))
    assert 0 < narrow["pac_bayes_sigma"] < wide["pac_bayes_sigma"]
    assert 0.05 < narrow["pac_bayes_accuracy_drop"] <= 0.1
    assert narrow["pac_bayes_flatness"] == pytest.approx(narrow["pac_bayes_sigma"] ** -2)
    hopeless = x, (net(x).argmax(1) + 1) % K
    assert run("pac_bayes_flatness", net, hopeless)["pac_bayes_flatness"] is None


def input_oracle(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    def loss(image: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(net(image.view(1, 1, 2, 2)), label[None])

    norms, sizes = [], []
    for image, label in zip(data[0].flatten(1), data[1], strict=True):
        norms.append(torch.func.grad(loss)(image, label).norm())
        sizes.append(torch.linalg.eigvalsh(hessian(loss)(image, label)).abs().max())
    return torch.stack(norms).detach(), torch.stack(sizes).detach()


def test_input_gradient_and_curvature(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    norms, sizes = input_oracle(net, data)
    found = run("input_gradient_norm", net, data)["log_input_gradient_norm_log_mean"]
    assert found == pytest.approx(float(norms.mean().log()), rel=1e-9)
    curvature = run("input_curvature", net, data, iterations=500)["log_input_curvature_log_mean"]
    assert curvature == pytest.approx(float(sizes.mean().log()), abs=1e-3)


def test_input_measures_do_not_underflow(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    huge = scale_head(net.float(), 1000.0)
    x = data[0].float()
    for name, label in (("input_gradient_norm", "log_input_gradient_norm"), ("input_curvature", "log_input_curvature")):
        found = run(name, huge, (x, huge(x).argmax(1)))
        assert found[f"{label}_n_zero"] == 0
        assert found[f"{label}_median"] < -10


def test_closed_forms_of_both_splits_and_populations(net: nn.Sequential, data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    inputs = MeasureInput(x[:5], y[:5], x, y, batch_size=4)
    numbers = MEASURES["closed_forms"](scale_head(net, 5.0), inputs, scale=5.0).numbers
    head = linear_head(net)
    forms = ClosedForms.of(net[:3](x).detach(), head.weight * 5, head.bias * 5)
    correct = net(x).argmax(1) == y
    assert numbers["n"] == 12
    assert numbers["train_n"] == 5
    assert numbers["n_clean_correct"] == int(correct.sum())
    assert numbers["log_relative_sharpness_median"] == pytest.approx(
        float(forms.log_relative_sharpness.sort().values[5]), rel=1e-9
    )
    assert numbers["log_relative_sharpness_log_mean_clean_correct"] == pytest.approx(
        float(forms.log_relative_sharpness[correct].exp().mean().log()), rel=1e-9
    )
    assert numbers["loss_mean"] == pytest.approx(float(forms.cross_entropy(y).mean()), rel=1e-9)
    assert numbers["weight_norm"] == pytest.approx(5 * float(head.weight.detach().norm()))
    assert numbers["weight_norm_unscaled"] == pytest.approx(float(head.weight.detach().norm()))
    for name in ("log_dataset_top_eigenvalue", "train_feature_norm_q01", "train_log_top_eigenvalue_q95_clean_correct"):
        assert name in numbers
