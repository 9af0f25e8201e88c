"""Curvature without matrices: Hessian-vector products of a mean loss, the Lanczos method, probes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from workers.science.cross_entropy import at, log_odds, log_sigmoid
from workers.science.errors import NonFinite
from workers.science.seeding import moved

MatVec = Callable[[Tensor], Tensor]
Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class TopEigenvalue:
    """`residual = ||A v - value v||` with `||v|| = 1`: some eigenvalue lies within it of `value`.

    `converged`: the residual is within the tolerance.
    """

    value: float
    residual: float
    iterations: int
    converged: bool


def lanczos(matvec: MatVec, start: Tensor, *, iterations: int, tolerance: float) -> TopEigenvalue:
    """The largest (algebraic) eigenvalue of a symmetric operator, by Lanczos with full reorthogonalisation.

    `matvec` maps a vector of `start`'s shape to one of the same shape. Stops when the residual is at most
    `tolerance * |value|`, the Krylov space is exhausted, or after `iterations` products.
    Source: Golub and Van Loan, Matrix Computations, section 10.1; same limit as power iteration, fewer products.
    Raises `NonFinite` for a product that is NaN or infinite.

    >>> A = torch.diag(torch.tensor([3.0, -5.0, 1.0], dtype=torch.float64))
    >>> top = lanczos(lambda v: A @ v, torch.ones(3, dtype=torch.float64), iterations=10, tolerance=1e-12)
    >>> round(top.value, 9), top.converged
    (3.0, True)
    """
    if not float(start.norm()) > 0:
        raise NonFinite("Lanczos needs a start vector that is not zero")
    basis = [start / start.norm()]
    diagonal: list[float] = []
    below: list[float] = []
    iterations = max(1, min(iterations, start.numel()))
    for done in range(1, iterations + 1):
        product = matvec(basis[-1])
        overlap = (product * basis[-1]).sum().double()
        for _ in range(2):  # twice is enough (Kahan)
            for vector in basis:
                product = product - (product * vector).sum() * vector
        length = torch.linalg.vector_norm(product, dtype=torch.float64)
        alpha, beta = torch.stack([overlap, length]).tolist()  # a GPU is waited for once a product
        diagonal.append(alpha)
        tridiagonal = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        for i, b in enumerate(below):
            tridiagonal[i, i + 1] = tridiagonal[i + 1, i] = b
        if not (torch.isfinite(tridiagonal).all() and beta < float("inf")):
            raise NonFinite("a Hessian-vector product is NaN or infinite")
        values, vectors = torch.linalg.eigh(tridiagonal)
        value, residual = float(values[-1]), beta * abs(float(vectors[-1, -1]))
        scale = float(values.abs().max())
        converged = residual <= tolerance * abs(value) or beta <= 1e-14 * scale
        if converged or done == iterations:
            return TopEigenvalue(value, residual, done, converged)
        below.append(beta)
        basis.append(product / beta)
    raise AssertionError("unreachable")


def parameters_of(model: nn.Module) -> Parameters:
    """Copies of the parameters by name, in the order of the model: what the functions below perturb instead of it."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def batches(x: Tensor, y: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`(x [b, C, H, W], y [b])` in order; the last one may be smaller."""
    for start in range(0, len(x), batch_size):
        yield x[start : start + batch_size], y[start : start + batch_size]


def normalise_logits(logits: Tensor) -> Tensor:
    """Logits `[n, k]` with mean 0 and standard deviation 1 per example: no scale is left (Tsuzuku et al. 2020).

    Logits that are equal up to rounding have no direction: they become 0, with a derivative of 0.
    """
    centred = logits - logits.mean(1, keepdim=True)
    largest = centred.detach().abs().amax(1, keepdim=True)
    flat = largest <= 1e-13 * logits.detach().abs().amax(1, keepdim=True)
    centred = centred / largest.masked_fill(flat, 1.0)
    size = centred.square().mean(1, keepdim=True).masked_fill(flat, 1.0).sqrt()
    return (centred / size).masked_fill(flat, 0.0)


def logits_of(model: nn.Module, parameters: Parameters, x: Tensor, *, normalise: bool = False) -> Tensor:
    """Logits `[n, k]` float64 of the network with other parameters, which stay differentiable.

    The linear head is applied in float64 to the features as they are: a float32 logit of 1000 is 6e-5 wrong, and so
    is every loss made from it. A network whose output is not its last linear layer's gives its own logits.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def head_in_float64(layer: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
        bias = None if layer.bias is None else layer.bias.double()
        seen.append((output, functional.linear(args[0].double(), layer.weight.double(), bias)))

    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    handles = [layer.register_forward_hook(head_in_float64) for layer in layers[-1:]]
    try:
        output: Tensor = functional_call(model, parameters, (x,))
    finally:
        for handle in handles:
            handle.remove()
    logits = seen[0][1] if len(seen) == 1 and seen[0][0] is output else output.double()
    return normalise_logits(logits) if normalise else logits


@torch.no_grad()
def log_odds_of(
    model: nn.Module, parameters: Parameters, x: Tensor, y: Tensor, batch_size: int, *, normalise: bool = False
) -> Tensor:
    """Log odds against the label, `[n]` float64 (`cross_entropy.log_odds`), of `x [n, C, H, W]`. Raises `NonFinite`."""
    parts = [
        log_odds(logits_of(model, parameters, xb, normalise=normalise), yb) for xb, yb in batches(x, y, batch_size)
    ]
    odds = torch.cat(parts)
    if not torch.isfinite(odds).all():
        raise NonFinite("a loss is NaN or infinite; check the weights and the scale")
    return odds


def loss_direction(
    model: nn.Module, parameters: Parameters, x: Tensor, y: Tensor, batch_size: int, *, normalise: bool = False
) -> Parameters:
    """Gradient of the mean loss with respect to every parameter, times an unknown positive number.

    The gradient is `sum_i (1 - p_y)_i grad g_i`. Images are weighted relative to the least confident one, so the sum
    does not underflow in float32 if every image is confident. All zeros only if every `grad g_i` is.
    Raises `NonFinite`.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    unit = -math.inf
    for xb, yb in batches(x, y, batch_size):
        g = log_odds(logits_of(model, leaves, xb, normalise=normalise), yb)
        log_wrong = log_sigmoid(g.detach())
        largest = max(unit, float(log_wrong.max()))
        weight = (log_wrong - largest).exp()
        gradients = torch.autograd.grad(g, list(leaves.values()), weight, materialize_grads=True)
        for (name, before), gradient in zip(total.items(), gradients, strict=True):
            total[name] = before * math.exp(unit - largest) + gradient
        unit = largest
    if not all(bool(torch.isfinite(gradient).all()) for gradient in total.values()):
        raise NonFinite("a gradient is NaN or infinite; check the weights and the scale")
    return total


def of_unit_norm(vectors: Parameters) -> Parameters:
    """Divided by the l2 norm over all of them; by the largest absolute entry first, so that no square underflows."""
    largest = float(torch.stack([v.abs().amax() for v in vectors.values()]).amax())
    if largest == 0:
        return vectors
    scaled = {name: v / largest for name, v in vectors.items()}
    norm = float(torch.stack([v.double().square().sum() for v in scaled.values()]).sum().sqrt())
    return {name: v / norm for name, v in scaled.items()}


def leaves_of(model: nn.Module) -> Parameters:
    """The network's own parameters by name, as leaves to differentiate by."""
    return {name: p.detach().requires_grad_() for name, p in model.named_parameters()}


@torch.no_grad()
def log_hessian_unit(model: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> float:
    """The divisor of `differentiable_gradient`, as a logarithm: the largest weight that an image has in the Hessian.

    `max log(1 - p_top)` if all images are right, or the logits are linear in the parameters; else 0, the weight of
    `Hessian (z_t - z_y)` of a wrong image.
    """
    unit, parameters = -math.inf, leaves_of(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    of_head = {id(p) for layer in layers[-1:] for p in layer.parameters()}
    linear = all(id(p) in of_head for p in model.parameters())
    for xb, yb in batches(x, y, batch_size):
        logits = logits_of(model, parameters, xb)
        if not torch.isfinite(logits).all():
            raise NonFinite("a logit is NaN or infinite; check the weights and the scale")
        top = logits.argmax(1)
        if not linear and bool((top != yb).any()):
            return 0.0
        unit = max(unit, float(log_sigmoid(log_odds(logits, top)).max()))
    return unit


def differentiable_gradient(
    model: nn.Module, leaves: Parameters, x: Tensor, y: Tensor, n: int, log_unit: float
) -> dict[str, Tensor]:
    """`grad (sum of the losses of x) / (n exp log_unit)` by parameter, with the graph for a second derivative.

    With the top class t the loss is `softplus(g_t) + z_t - z_y`, and its Hessian
    `sigmoid(g_t) (Hessian g_t + sigmoid(-g_t) grad g_t grad g_t^T) + Hessian (z_t - z_y)`: every factor is exact,
    where a Hessian made of `p - p^2` is 0 from a margin of 37 on. `log_unit` as `log_hessian_unit`.
    """
    logits = logits_of(model, leaves, x)
    top = logits.detach().argmax(1)
    g, lead = log_odds(logits, top), at(logits, top) - at(logits, y)
    weights = [(log_sigmoid(g) - log_unit).exp() / n, (top != y).to(g) / n]
    gradients = torch.autograd.grad(
        [g, lead], list(leaves.values()), weights, create_graph=True, materialize_grads=True
    )
    return dict(zip(leaves, gradients, strict=True))


def hessian_vector_product(
    model: nn.Module, x: Tensor, y: Tensor, vector: Parameters, batch_size: int, log_unit: float
) -> Parameters:
    """`H v / exp(log_unit)`, H of the mean cross-entropy over `x [n, C, H, W]` at the network's own parameters
    (Pearlmutter 1994); `log_unit` as `log_hessian_unit`.
    """
    leaves = leaves_of(model)
    total = {name: torch.zeros_like(p) for name, p in leaves.items()}
    for xb, yb in batches(x, y, batch_size):
        gradients = differentiable_gradient(model, leaves, xb, yb, len(x), log_unit)
        inner = torch.stack([(g * vector[name]).sum() for name, g in gradients.items()]).sum()
        products = torch.autograd.grad(inner, list(leaves.values()), materialize_grads=True)
        for name, product in zip(total, products, strict=True):
            total[name] += product
    return total


def gaussian_like(parameters: Parameters, generator: torch.Generator) -> Parameters:
    """Standard normal numbers of the parameters' shapes, made on the CPU so that every device sees the same."""
    return {name: moved(torch.randn(p.shape, generator=generator), p.device).to(p) for name, p in parameters.items()}


def rademacher_like(parameters: Parameters, generator: torch.Generator) -> Parameters:
    """-1 or 1 with equal chance, in the parameters' shapes, made on the CPU."""
    return {
        name: moved(torch.randint(0, 2, p.shape, generator=generator).mul_(2).sub_(1), p.device).to(p)
        for name, p in parameters.items()
    }
