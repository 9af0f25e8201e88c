"""Trace of the whole network's Hessian, and the share of every layer.

A layer's block has `Tr H_ll = E[v^T H_ll v]` for v of independent signs (Hutchinson 1990). Every layer has probes of
its own, with a product that differentiates by that layer alone: other layers add no noise to its estimate, and below
a head of zeros it is exactly 0. The network's trace is the sum over layers, as the trace is, with independent errors:
a probe of all weights at once has the blocks between layers as further noise.
H is that of the mean cross-entropy over unaugmented training images.

Cost: such a product reuses one graph and takes an eighth (resnet18) to a fifth (vit_tiny) of the time of a product with
the whole Hessian, so the layers share `4 probes` of them: together about what `probes` whole products take. The head,
whose product is cheapest, has `probes` of its own.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workers.science.curvature import (
    Parameters,
    batches,
    differentiable_gradient,
    leaves_of,
    log_hessian_unit,
    rademacher_like,
)
from workers.science.heads import linear_head
from workers.science.sharpness.base import Curves, MeasureInput, MeasureReport
from workers.science.summaries import Numbers


def hessian_trace_network(
    model: nn.Module,
    inputs: MeasureInput,
    *,
    probes: int = 100,
    images: int = 1024,
) -> MeasureReport:
    """`hessian_trace_network` and `..._standard_error`; `log_hessian_trace_network`, null if the trace is not
    positive; `hessian_trace_penultimate`, of the weight of the last linear layer alone, with its `_standard_error` and
    `_share`. Curves: `layer` (module names), `layer_probes`, `layer_trace`, `layer_trace_standard_error`,
    `layer_share`. Standard errors are those of means over probes; null for one probe.

    A layer has `min(probes, max(2, 4 probes / layers))` probes, rounded up, the head `probes`.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    >>> with torch.no_grad(): _ = net[1].weight.zero_()
    >>> x, y = torch.ones(1, 1, 1, 1), torch.tensor([0])
    >>> report = hessian_trace_network(net, MeasureInput(x, y, x, y), probes=64)
    >>> abs(report.numbers["hessian_trace_network"] - 0.5) < 3 * report.numbers["hessian_trace_network_standard_error"]
    True
    """
    if probes < 1:
        raise ValueError("probes must be at least 1")
    x, y = inputs.train(images)
    blocks = _blocks(model, probes)
    log_unit = log_hessian_unit(model, x, y, inputs.batch_size)
    estimates = _estimates(model, x, y, blocks, log_unit, inputs)
    traces = [_Trace.of(values) for values in estimates]
    total, unit = _Trace.sum(traces), math.exp(log_unit)
    head = linear_head(model)
    names = [name for name, parameter in model.named_parameters() if parameter is head.weight]
    penultimate = next(t for block, t in zip(blocks, traces, strict=True) if list(block.names) == names)
    numbers: Numbers = {
        "hessian_trace_network": total.mean * unit,
        "hessian_trace_network_standard_error": total.error_in(unit),
        "log_hessian_trace_network": math.log(total.mean) + log_unit if total.mean > 0 else None,
        "hessian_trace_penultimate": penultimate.mean * unit,
        "hessian_trace_penultimate_standard_error": penultimate.error_in(unit),
        "hessian_trace_penultimate_share": penultimate.share_of(total),
    }
    curves: Curves = {
        name: [] for name in ("layer", "layer_probes", "layer_trace", "layer_trace_standard_error", "layer_share")
    }
    for layer in dict.fromkeys(block.layer for block in blocks):
        trace = _Trace.sum([t for block, t in zip(blocks, traces, strict=True) if block.layer == layer])
        curves["layer"].append(layer)
        curves["layer_probes"].append(next(block.probes for block in blocks if block.layer == layer))
        curves["layer_trace"].append(trace.mean * unit)
        curves["layer_trace_standard_error"].append(trace.error_in(unit))
        curves["layer_share"].append(trace.share_of(total))
    return MeasureReport(numbers, curves)


@dataclass(frozen=True)
class _Block:
    """Parameters that are probed together: those of a layer, of the head one by one."""

    layer: str
    names: tuple[str, ...]
    probes: int


@dataclass(frozen=True)
class _Trace:
    mean: float
    variance: float | None
    """Of the mean; null for one probe."""

    @classmethod
    def of(cls, values: Tensor) -> "_Trace":
        n = len(values)
        return cls(float(values.mean()), float(values.var()) / n if n > 1 else None)

    @classmethod
    def sum(cls, parts: list["_Trace"]) -> "_Trace":
        variances = [part.variance for part in parts if part.variance is not None]
        whole = len(variances) == len(parts)
        return cls(math.fsum(part.mean for part in parts), math.fsum(variances) if whole else None)

    def error_in(self, unit: float) -> float | None:
        return None if self.variance is None else math.sqrt(self.variance) * unit

    def share_of(self, total: "_Trace") -> float | None:
        return self.mean / total.mean if total.mean else None


def _blocks(model: nn.Module, probes: int) -> list[_Block]:
    head, layers = linear_head(model), dict[str, list[str]]()
    of_head = {name for name, p in model.named_parameters() if p is head.weight or p is head.bias}
    for name, _ in model.named_parameters():
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    each = min(probes, max(2, math.ceil(4 * probes / len(layers))))
    blocks = []
    for layer, names in layers.items():
        below = tuple(name for name in names if name not in of_head)
        blocks += [_Block(layer, below, each)] if below else []
        blocks += [_Block(layer, (name,), probes) for name in names if name in of_head]
    return blocks


def _estimates(
    model: nn.Module, x: Tensor, y: Tensor, blocks: list[_Block], log_unit: float, inputs: MeasureInput
) -> list[Tensor]:
    """`v^T H v / exp(log_unit)` of every probe, `[probes]` float64 by block."""
    leaves = leaves_of(model)
    estimates = [torch.zeros(block.probes, dtype=torch.float64, device=x.device) for block in blocks]
    done, total = 0, math.ceil(len(x) / inputs.batch_size) * sum(block.probes for block in blocks)
    for xb, yb in batches(x, y, inputs.batch_size):
        generator = inputs.generator()  # the same probes for every batch of images
        gradients = differentiable_gradient(model, leaves, xb, yb, len(x), log_unit)
        for block, values in zip(blocks, estimates, strict=True):
            at = {name: leaves[name] for name in block.names}
            for probe in range(block.probes):
                values[probe] += _quadratic_form(gradients, at, rademacher_like(at, generator))
                done += 1
                inputs.report(done, total)
    return [values.cpu() for values in estimates]


def _quadratic_form(gradients: dict[str, Tensor], at: Parameters, v: Parameters) -> Tensor:
    """`v^T H v` in the block of the parameters `at`."""
    inner = torch.stack([(gradients[name] * v[name]).sum() for name in at]).sum()
    if not inner.requires_grad:  # the loss does not depend on these parameters
        return inner.new_zeros(())
    products = torch.autograd.grad(inner, list(at.values()), retain_graph=True, materialize_grads=True)
    terms = [(v[name] * product).double().sum() for name, product in zip(at, products, strict=True)]
    return torch.stack(terms).sum()
