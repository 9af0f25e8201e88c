"""Curvature without matrices: Hessian-vector products of a mean loss, the Lanczos method, probes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from workers.science.errors import NonFinite

MatVec = Callable[[Tensor], Tensor]
Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class TopEigenvalue:
    """`residual = ||A v - value v||` with `||v|| = 1`: some eigenvalue lies within it; `converged` is as asked for."""

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
    >>> found = lanczos(lambda v: A @ v, torch.ones(3, dtype=torch.float64), iterations=10, tolerance=1e-12)
    >>> round(found.value, 9), found.converged
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
        alpha = float((product * basis[-1]).sum())
        diagonal.append(alpha)
        for _ in range(2):  # twice is enough (Kahan)
            for vector in basis:
                product = product - (product * vector).sum() * vector
        beta = float(product.norm())
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
    """Logits `[n, k]` with mean 0 and standard deviation 1 per example: no scale is left (Tsuzuku et al. 2020)."""
    centred = logits - logits.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)


def logits_of(model: nn.Module, parameters: Parameters, x: Tensor, *, normalise: bool = False) -> Tensor:
    """Logits `[n, k]` float64 of the network with other parameters, which stay differentiable."""
    logits: Tensor = functional_call(model, parameters, (x,))
    return normalise_logits(logits.double()) if normalise else logits.double()


@torch.no_grad()
def mean_loss(
    model: nn.Module, parameters: Parameters, x: Tensor, y: Tensor, batch_size: int, *, normalise: bool = False
) -> float:
    """Mean cross-entropy over `x [n, C, H, W]`, float64 from the logits on. Raises `NonFinite`."""
    total = 0.0
    for xb, yb in batches(x, y, batch_size):
        logits = logits_of(model, parameters, xb, normalise=normalise)
        total += float(functional.cross_entropy(logits, yb, reduction="sum"))
    if not math.isfinite(total):
        raise NonFinite("a loss is NaN or infinite; check the weights and the scale")
    return total / len(x)


def loss_gradient(
    model: nn.Module, parameters: Parameters, x: Tensor, y: Tensor, batch_size: int, *, normalise: bool = False
) -> Parameters:
    """Gradient of `mean_loss` with respect to every parameter."""
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    total = {name: torch.zeros_like(p) for name, p in leaves.items()}
    for xb, yb in batches(x, y, batch_size):
        logits = logits_of(model, leaves, xb, normalise=normalise)
        loss = functional.cross_entropy(logits, yb, reduction="sum") / len(x)
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += gradient
    return total


def hessian_vector_product(model: nn.Module, x: Tensor, y: Tensor, vector: Parameters, batch_size: int) -> Parameters:
    """`H v` of the mean cross-entropy over `x [n, C, H, W]`, at the network's own parameters (Pearlmutter 1994)."""
    leaves = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    total = {name: torch.zeros_like(p) for name, p in leaves.items()}
    for xb, yb in batches(x, y, batch_size):
        loss = functional.cross_entropy(logits_of(model, leaves, xb), yb, reduction="sum") / len(x)
        gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True, materialize_grads=True)
        inner = torch.stack([(g * vector[name]).sum() for name, g in zip(leaves, gradients, strict=True)]).sum()
        products = torch.autograd.grad(inner, list(leaves.values()), materialize_grads=True)
        for name, product in zip(total, products, strict=True):
            total[name] += product
    return total


def gaussian_like(parameters: Parameters, generator: torch.Generator) -> Parameters:
    """Standard normal numbers of the parameters' shapes, made on the CPU so that every device sees the same."""
    return {name: torch.randn(p.shape, generator=generator).to(p) for name, p in parameters.items()}


def rademacher_like(parameters: Parameters, generator: torch.Generator) -> Parameters:
    """-1 or 1 with equal chance, in the parameters' shapes, made on the CPU."""
    return {
        name: torch.randint(0, 2, p.shape, generator=generator).mul_(2).sub_(1).to(p) for name, p in parameters.items()
    }
