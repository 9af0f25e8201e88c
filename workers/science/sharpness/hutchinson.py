"""Trace of the whole network's Hessian, and the share of every layer.

`Tr H = E[v^T H v]` for v of independent signs; a layer's block has `Tr H_ll = E[v_l^T (H v)_l]` with the same probes.
H is that of the mean cross-entropy over unaugmented training images. Source: Hutchinson 1990.
"""

import torch
from torch import Tensor, nn

from workers.science.curvature import hessian_vector_product, parameters_of, rademacher_like
from workers.science.heads import linear_head
from workers.science.sharpness.base import Curves, MeasureReport, Numbers, OnProgress, first, no_progress


def hessian_trace_network(
    model: nn.Module,
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    seed: int,
    batch_size: int,
    on_progress: OnProgress | None = None,
    probes: int = 100,
    images: int = 1024,
) -> MeasureReport:
    """`hessian_trace_network` and `..._standard_error`; `hessian_trace_penultimate`, of the weight of the last linear
    layer alone, with its `_standard_error` and `_share`. Curves: `layer` (module names), `layer_trace`,
    `layer_trace_standard_error`, `layer_share`. The standard error is that of the mean over probes; null for one probe.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> with torch.no_grad(): _ = net[1].weight.zero_()
    >>> x, y = torch.ones(1, 1, 1, 1), torch.tensor([0])
    >>> report = hessian_trace_network(net, x, y, x, y, seed=0, batch_size=1, probes=64)
    >>> abs(report.numbers["hessian_trace_network"] - 0.5) < 3 * report.numbers["hessian_trace_network_standard_error"]
    True
    """
    if probes < 1:
        raise ValueError("probes must be at least 1")
    x, y = first(train_x, train_y, images)
    generator, parameters = torch.Generator().manual_seed(seed), parameters_of(model)
    rows = []
    for probe in range(probes):
        v = rademacher_like(parameters, generator)
        product = hessian_vector_product(model, x, y, v, batch_size)
        rows.append(torch.stack([(v[name] * product[name]).double().sum() for name in parameters]))
        (on_progress or no_progress)(probe + 1, probes)
    estimates = torch.stack(rows).cpu()  # [probes, parameters]
    total, total_error = _mean_and_error(estimates.sum(1))
    head = linear_head(model)
    at_head = [named is head.weight for _, named in model.named_parameters()]
    penultimate, penultimate_error = _mean_and_error(estimates[:, torch.tensor(at_head)].sum(1))
    numbers: Numbers = {
        "hessian_trace_network": total,
        "hessian_trace_network_standard_error": total_error,
        "hessian_trace_penultimate": penultimate,
        "hessian_trace_penultimate_standard_error": penultimate_error,
        "hessian_trace_penultimate_share": penultimate / total if total else None,
    }
    curves: Curves = {"layer": [], "layer_trace": [], "layer_trace_standard_error": [], "layer_share": []}
    owners = [name.rpartition(".")[0] for name in parameters]
    for layer in dict.fromkeys(owners):
        trace, error = _mean_and_error(estimates[:, torch.tensor([owner == layer for owner in owners])].sum(1))
        row: dict[str, float | int | str | None] = {
            "layer": layer,
            "layer_trace": trace,
            "layer_trace_standard_error": error,
            "layer_share": trace / total if total else None,
        }
        for name, value in row.items():
            curves[name].append(value)
    return MeasureReport(numbers, curves)


def _mean_and_error(values: Tensor) -> tuple[float, float | None]:
    n = len(values)
    return float(values.mean()), float(values.std() / n**0.5) if n > 1 else None
