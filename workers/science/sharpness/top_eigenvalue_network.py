"""Largest eigenvalue of the whole network's Hessian, by Lanczos (Golub and Van Loan; for networks, Ghorbani 2019).

H is that of the mean cross-entropy over unaugmented training images. Keeps one vector per iteration in memory.
"""

import math

from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from workers.science.curvature import (
    Parameters,
    gaussian_like,
    hessian_vector_product,
    lanczos,
    log_hessian_unit,
    parameters_of,
)
from workers.science.sharpness.base import MeasureInput, MeasureReport


def top_eigenvalue_network(
    model: nn.Module,
    inputs: MeasureInput,
    *,
    iterations: int = 50,
    tolerance: float = 1e-4,
    images: int = 1024,
) -> MeasureReport:
    """`top_eigenvalue_network` (largest, not largest in size), its `_residual`, `_iterations` and `_converged`:
    whether the residual fell to `tolerance` times the value. `log_top_eigenvalue_network` is null if the value is
    not positive.

    >>> import torch
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> with torch.no_grad(): _ = net[1].weight.zero_()
    >>> x, y = torch.ones(1, 1, 1, 1), torch.tensor([0])
    >>> report = top_eigenvalue_network(net, MeasureInput(x, y, x, y))
    >>> round(report.numbers["top_eigenvalue_network"], 6)  # S(1/2, 1/2) has the eigenvalues 0 and 1/2
    0.5
    """
    x, y = inputs.train(images)
    parameters, batch_size, done = parameters_of(model), inputs.batch_size, 0
    log_unit = log_hessian_unit(model, x, y, batch_size)

    def product(v: Tensor) -> Tensor:
        nonlocal done
        done += 1
        inputs.report(min(done, iterations), iterations)
        return _flat(hessian_vector_product(model, x, y, _unflat(v, parameters), batch_size, log_unit))

    start = _flat(gaussian_like(parameters, inputs.generator()))
    top = lanczos(product, start, iterations=iterations, tolerance=tolerance)
    unit = math.exp(log_unit)
    return MeasureReport(
        {
            "top_eigenvalue_network": top.value * unit,
            "log_top_eigenvalue_network": math.log(top.value) + log_unit if top.value > 0 else None,
            "top_eigenvalue_network_residual": top.residual * unit,
            "top_eigenvalue_network_iterations": top.iterations,
            "top_eigenvalue_network_converged": int(top.converged),
        }
    )


def _flat(parameters: Parameters) -> Tensor:
    return parameters_to_vector(list(parameters.values()))


def _unflat(vector: Tensor, like: Parameters) -> Parameters:
    parts = vector.split_with_sizes([p.numel() for p in like.values()])
    return {name: part.view_as(p) for part, (name, p) in zip(parts, like.items(), strict=True)}
