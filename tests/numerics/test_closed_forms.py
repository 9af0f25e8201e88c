"""The closed forms against automatic differentiation, against 60-digit arithmetic, and against themselves."""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import hessian
from torch.nn import functional

from workers.science.closed_forms import LOG_MEASURES, ClosedForms, log_dataset_top_eigenvalue
from workers.science.errors import NonFinite, WrongShape

# torch.func.hessian imports a module of torch that still uses the deprecated torch.jit.script
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")


def example(n: int = 6, k: int = 4, m: int = 5, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(n, m, generator=generator).relu() + 0.1
    weight, bias = (torch.randn(*shape, generator=generator) * scale for shape in ((k, m), (k,)))
    return phi, weight, bias


def dense_hessian(phi: Tensor, weight: Tensor, bias: Tensor, y: int) -> Tensor:
    """[k, m, k, m] of the cross-entropy with respect to the weight, by autograd in float64."""

    def loss(w: Tensor) -> Tensor:
        return functional.cross_entropy((w @ phi.double() + bias.double())[None], torch.tensor([y]))

    dense: Tensor = hessian(loss)(weight.double())
    return dense


@pytest.mark.parametrize("k", [2, 3, 7])
@pytest.mark.parametrize("label", [0, 1])
def test_equal_to_the_autograd_hessian(k: int, label: int) -> None:
    phi, weight, bias = example(k=k)
    forms = ClosedForms.of(phi, weight, bias)
    W = weight.double()
    norm, centred = W.norm(), (W - W.mean(0)).norm()
    for i in range(len(phi)):
        H = dense_hessian(phi[i], weight, bias, label)
        trace = torch.einsum("iaia->", H)
        want = {
            "log_hessian_trace": trace,
            "log_relative_sharpness": norm**2 * trace,
            "log_relative_sharpness_unsquared": norm * trace,
            "log_gauge_fixed_relative_sharpness": centred**2 * trace,
            "log_relative_flatness": torch.einsum("st,sata->", W @ W.T, H),
            "log_top_eigenvalue": torch.linalg.eigvalsh(H.reshape(W.numel(), -1))[-1],
        }
        assert set(want) == set(LOG_MEASURES)
        for name, value in want.items():
            assert float(getattr(forms, name)[i].exp()) == pytest.approx(float(value), rel=1e-8), name


@pytest.mark.parametrize(("n", "k", "m"), [(1, 2, 3), (8, 3, 4), (30, 5, 6)])
def test_dataset_top_eigenvalue_equal_to_the_dense_one(n: int, k: int, m: int) -> None:
    phi, weight, bias = example(n, k, m)
    dense = torch.stack([dense_hessian(p, weight, bias, 0) for p in phi]).mean(0).reshape(k * m, -1)
    value, lanczos = log_dataset_top_eigenvalue(phi, weight, bias)
    assert lanczos.converged
    assert math.exp(value) == pytest.approx(float(torch.linalg.eigvalsh(dense)[-1]), rel=1e-8)


def test_dataset_top_eigenvalue_at_a_scale_where_it_underflows() -> None:
    phi, weight, bias = example(1)
    for s in (1.0, 1000.0):
        forms = ClosedForms.of(phi, s * weight, s * bias)
        value, _ = log_dataset_top_eigenvalue(phi, s * weight, s * bias)
        assert value == pytest.approx(float(forms.log_top_eigenvalue[0]), rel=1e-12)
    assert value < -745


def test_dataset_top_eigenvalue_where_the_only_unsure_sample_has_no_features() -> None:
    """Its weight relative to the others would be beyond float64, times zero."""
    phi, weight, bias = example(1)
    with_zero, no_bias = torch.cat([torch.zeros_like(phi), phi]), torch.zeros_like(bias)
    forms = ClosedForms.of(with_zero, 5000 * weight, no_bias)
    assert float(forms.log_rest[0] - forms.log_rest[1]) > 710
    value, _ = log_dataset_top_eigenvalue(with_zero, 5000 * weight, no_bias)
    assert value == pytest.approx(float(forms.log_top_eigenvalue[1]) - math.log(2), rel=1e-12)


@pytest.mark.parametrize("scale", [0.3, 30.0, 1000.0])
def test_equal_to_sixty_digits(scale: float) -> None:
    phi, weight, bias = example(n=4, k=5, scale=scale)
    forms = ClosedForms.of(phi, weight, bias)
    with mpmath.workdps(1000):
        W = mpmath.matrix(weight.double().tolist())
        for i in range(len(phi)):
            z = W * mpmath.matrix(phi[i].double().tolist()) + mpmath.matrix(bias.double().tolist())
            total = mpmath.fsum(mpmath.exp(a) for a in z)
            p = [mpmath.exp(a) / total for a in z]
            r2 = mpmath.fsum(mpmath.mpf(a) ** 2 for a in phi[i].double().tolist())
            pairs = [(a, b) for a in range(5) for b in range(a)]
            trace = 2 * mpmath.fsum(p[a] * p[b] for a, b in pairs) * r2
            flatness = r2 * mpmath.fsum(
                p[a] * p[b] * mpmath.fsum((W[a, c] - W[b, c]) ** 2 for c in range(W.cols)) for a, b in pairs
            )
            want = {
                "log_hessian_trace": trace,
                "log_relative_flatness": flatness,
                "log_relative_sharpness": trace * mpmath.fsum(v**2 for v in W),
                "log_rest": 1 - max(p),
            }
            for name, value in want.items():
                assert float(getattr(forms, name)[i]) == pytest.approx(float(mpmath.log(value)), rel=1e-11, abs=1e-11)
            loss = forms.cross_entropy(torch.full((4,), 2))[i]
            assert float(loss) == pytest.approx(float(-mpmath.log(p[2])), rel=1e-10, abs=1e-300)
            S = mpmath.diag(p) - mpmath.matrix(p) * mpmath.matrix(p).T
            if scale < 1000:
                top = max(mpmath.eigsy(S, eigvals_only=True)) * r2
                assert float(forms.log_top_eigenvalue[i]) == pytest.approx(float(mpmath.log(top)), rel=1e-11, abs=1e-11)


def test_log_domain_equal_to_naive_float64_where_that_is_accurate() -> None:
    phi, weight, bias = example(n=500, k=10, m=32, scale=0.05)
    forms = ClosedForms.of(phi, weight, bias)
    p = forms.logits.softmax(1)
    assert float(p.max()) < 0.9
    naive = phi.double().square().sum(1) * (p * (1 - p)).sum(1)
    torch.testing.assert_close(forms.log_hessian_trace.exp(), naive, rtol=1e-12, atol=0)
    mean = p @ weight.double()
    flat = phi.double().square().sum(1) * (p @ weight.double().square().sum(1) - mean.square().sum(1))
    torch.testing.assert_close(forms.log_relative_flatness.exp(), flat, rtol=1e-11, atol=0)
    S = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    top = torch.linalg.eigvalsh(S)[:, -1] * phi.double().square().sum(1)
    torch.testing.assert_close(forms.log_top_eigenvalue.exp(), top, rtol=1e-10, atol=0)
    torch.testing.assert_close(forms.confidence, p.amax(1))


def test_finite_at_a_thousand_and_falling_like_the_margin() -> None:
    phi, weight, bias = example(n=200, k=10, m=64)
    one, thousand = ClosedForms.of(phi, weight, bias), ClosedForms.of(phi, 1000 * weight, 1000 * bias)
    top = one.logits.topk(2).values
    for name in LOG_MEASURES:
        assert bool(torch.isfinite(getattr(thousand, name)).all()), name
    margin = top[:, 0] - top[:, 1]
    clear = margin > 0.1
    slope = (thousand.log_hessian_trace - 2 * thousand.log_feature_norm)[clear] + 1000 * margin[clear]
    assert float(slope.abs().max()) < 3


scales = st.sampled_from([0.01, 0.3, 1.0, 5.0, 50.0, 1000.0])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(2, 12), m=st.integers(1, 20), scale=scales)
def test_inequalities(seed: int, k: int, m: int, scale: float) -> None:
    """relative_flatness <= ||W||_2^2 hessian_trace <= relative_sharpness; trace / (k - 1) <= lambda_max <= trace."""
    phi, weight, bias = example(5, k, m, seed, scale)
    forms = ClosedForms.of(phi, weight, bias)
    spectral = 2 * torch.linalg.matrix_norm(weight.double(), ord=2).log()
    assert bool((forms.log_relative_flatness <= spectral + forms.log_hessian_trace + 1e-9).all())
    assert bool((spectral + forms.log_hessian_trace <= forms.log_relative_sharpness + 1e-9).all())
    assert bool((forms.log_top_eigenvalue <= forms.log_hessian_trace + 1e-9).all())
    assert bool((forms.log_hessian_trace - math.log(k - 1) <= forms.log_top_eigenvalue + 1e-9).all())
    assert bool((forms.log_top_eigenvalue <= 2 * forms.log_feature_norm - math.log(2) + 1e-9).all())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), c=st.sampled_from([0.25, 2.0, 8.0]), scale=scales)
def test_invariant_when_weight_and_features_trade_size(seed: int, c: float, scale: float) -> None:
    phi, weight, bias = example(5, 4, 6, seed, scale)
    one, other = ClosedForms.of(phi, weight, bias), ClosedForms.of(phi / c, weight * c, bias)  # c a power of two: exact
    for name in ("log_relative_sharpness", "log_relative_flatness", "log_gauge_fixed_relative_sharpness"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-12, atol=1e-11)
    moved = {"log_hessian_trace": -2, "log_top_eigenvalue": -2, "log_relative_sharpness_unsquared": -1}
    for name, power in moved.items():
        want = getattr(one, name) + power * math.log(c)
        torch.testing.assert_close(want, getattr(other, name), rtol=1e-12, atol=1e-11)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_invariant_when_every_row_moves_alike(seed: int) -> None:
    phi, weight, bias = (v.double() for v in example(5, 4, 6, seed))
    shift = torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    one, other = ClosedForms.of(phi, weight, bias), ClosedForms.of(phi, weight + shift, bias)
    for name in ("log_relative_flatness", "log_gauge_fixed_relative_sharpness", "log_hessian_trace"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-9, atol=1e-10)
    assert float((one.log_relative_sharpness - other.log_relative_sharpness).abs().max()) > 1e-3


def test_zero_features_are_an_exact_zero_and_nan_is_refused() -> None:
    _, weight, bias = example()
    forms = ClosedForms.of(torch.zeros(2, 5), weight, bias)
    assert all(bool(torch.isneginf(getattr(forms, name)).all()) for name in LOG_MEASURES)
    assert log_dataset_top_eigenvalue(torch.zeros(2, 5), weight, bias)[0] == -math.inf
    with pytest.raises(NonFinite):
        ClosedForms.of(torch.full((1, 5), math.nan), weight, bias)
    with pytest.raises(NonFinite):
        ClosedForms.of(torch.ones(1, 5), weight * math.inf, bias)
    with pytest.raises(WrongShape):
        ClosedForms.of(torch.ones(1, 4), weight, bias)
    with pytest.raises(WrongShape):
        ClosedForms.of(torch.ones(1, 5), weight[:1], bias[:1])


def test_ties_and_equal_rows() -> None:
    """Equal probabilities, and a flatness that lives on classes that the nearest ones hide by hundreds of nats."""
    uniform = ClosedForms.of(torch.ones(1, 3), torch.zeros(4, 3), None)
    assert float(uniform.log_top_eigenvalue.exp()) == pytest.approx(3 / 4)
    assert float(uniform.log_relative_flatness) == -math.inf
    weight = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    hidden = ClosedForms.of(torch.tensor([[500.0, 0.0]]), weight, None)
    want = 2 * math.log(500) + math.log(2 * 0.5 * 0.5 * 4) - 1000
    assert float(hidden.log_relative_flatness) == pytest.approx(want, rel=1e-12)


def test_the_chunk_changes_nothing() -> None:
    phi, weight, bias = example(n=50)
    whole, parts = ClosedForms.of(phi, weight, bias), ClosedForms.of(phi, weight, bias, chunk=7)
    for name in LOG_MEASURES:
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=1e-13, atol=1e-13)
    empty = ClosedForms.of(phi[:0], weight, bias)
    assert empty.log_top_eigenvalue.shape == (0,)
    assert len(whole.select(torch.arange(50) < 3).logits) == 3
