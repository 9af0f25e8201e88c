"""Curvature of the loss in input space: `||Hessian_x l||_2` per image (Moosavi-Dezfooli 2019; Srinivas et al. 2022).

With g and p_y as in `input_gradient`: `H = (1 - p_y) (Hessian g + p_y grad g grad g^T)`; the power method runs on the
bracket, whose size has nothing to do with confidence, and `log(1 - p_y)` is added. A lower estimate, close after a few
steps. For ReLU networks the second derivative of the logits is zero almost everywhere, and only the softmax bends.
"""

import torch
from torch import Tensor, nn

from workers.science.curvature import batches
from workers.science.heads import linear_head
from workers.science.sharpness.base import MeasureReport, OnProgress, first, no_progress
from workers.science.sharpness.closed_forms import Head
from workers.science.sharpness.input_gradient import both_populations, slope


def input_curvature(
    model: nn.Module,
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    seed: int,
    batch_size: int,
    on_progress: OnProgress | None = None,
    iterations: int = 20,
    images: int = 1024,
) -> MeasureReport:
    """`log_input_curvature_{statistic}` and the same with `_clean_correct`, on test images.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    >>> with torch.no_grad(): _ = net[1].weight.copy_(torch.tensor([[4.0], [0.0]])), net[1].bias.zero_()
    >>> x, y = torch.zeros(1, 1, 1, 1), torch.tensor([0])
    >>> report = input_curvature(net, x, y, x, y, seed=0, batch_size=1)
    >>> round(report.numbers["log_input_curvature_median"], 6)  # log(4^2 / 4)
    1.386294
    """
    x, y = first(test_x, test_y, images)
    layer, generator = linear_head(model), torch.Generator().manual_seed(seed)
    head = Head(layer.weight, layer.bias)
    values, correct, done = [], [], 0
    for xb, yb in batches(x, y, batch_size):
        found = slope(model, xb, yb, head, twice=True)
        flat = found.gradient.detach().flatten(1)
        right = -torch.expm1(found.log_wrong).to(flat)[:, None]
        v = torch.randn(flat.shape, generator=generator).to(flat)
        size = torch.zeros(len(xb), device=flat.device)
        for _ in range(iterations):
            v = v / v.norm(dim=1, keepdim=True).clamp(min=1e-30)
            inner = (found.gradient * v.view_as(found.gradient)).sum()
            second = torch.zeros_like(flat)
            if inner.requires_grad:  # not so where g is linear in x
                (bent,) = torch.autograd.grad(inner, found.x, retain_graph=True, materialize_grads=True)
                second = bent.flatten(1)
            v = second + right * (flat * v).sum(1, keepdim=True) * flat
            size = v.norm(dim=1)
        values.append((found.log_wrong + size.double().log()).cpu())
        correct.append(found.correct.cpu())
        done += len(xb)
        (on_progress or no_progress)(done, len(x))
    return MeasureReport(both_populations(torch.cat(values), torch.cat(correct), "log_input_curvature"))
