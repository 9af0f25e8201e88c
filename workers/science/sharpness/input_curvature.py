"""Curvature of the loss in input space: `||Hessian_x l||_2` per image (Moosavi-Dezfooli 2019; Srinivas et al. 2022).

With t the top class and `g = logsumexp_{j != t} z_j - z_t` the loss is `log(1 + exp g) + z_t - z_y`, so
`H = (1 - p_t) (Hessian g + p_t grad g grad g^T) + Hessian (z_t - z_y)`. The last term is 0 for images that are right,
and for networks made of ReLUs, whose logits bend nowhere: there the power method runs on the bracket, whose size has
nothing to do with confidence, and `log(1 - p_t)` is added. A lower estimate, close after a few steps.
"""

import torch
from torch import Tensor, nn

from workers.science.closed_forms import Head
from workers.science.cross_entropy import at, log_odds, log_sigmoid
from workers.science.curvature import batches
from workers.science.heads import linear_head
from workers.science.sharpness.base import MeasureInput, MeasureReport
from workers.science.sharpness.input_gradient_norm import both_populations, require_finite, watched


def input_curvature(
    model: nn.Module,
    inputs: MeasureInput,
    *,
    iterations: int = 20,
    images: int = 1024,
) -> MeasureReport:
    """`log_input_curvature_{statistic}` and the same with `_clean_correct`, on test images.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    >>> with torch.no_grad(): _ = net[1].weight.copy_(torch.tensor([[4.0], [0.0]])), net[1].bias.zero_()
    >>> x, y = torch.zeros(1, 1, 1, 1), torch.tensor([0])
    >>> report = input_curvature(net, MeasureInput(x, y, x, y))
    >>> round(report.numbers["log_input_curvature_median"], 6)  # log(4^2 / 4)
    1.386294
    """
    x, y = inputs.test(images)
    layer, generator = linear_head(model), inputs.generator()
    head = Head(layer.weight, layer.bias)
    values, correct, done = [], [], 0
    for xb, yb in batches(x, y, inputs.batch_size):
        start = torch.randn(xb.flatten(1).shape, generator=generator).to(xb).double()
        curvature, right = _log_curvature(model, xb, yb, head, start, iterations)
        values.append(curvature.cpu())
        correct.append(right.cpu())
        done += len(xb)
        inputs.report(done, len(x))
    return MeasureReport(both_populations(torch.cat(values), torch.cat(correct), "log_input_curvature"))


def _log_curvature(
    model: nn.Module, x: Tensor, y: Tensor, head: Head, v: Tensor, iterations: int
) -> tuple[Tensor, Tensor]:
    """`log ||H||` `[n]` float64 by the power method from `v [n, C H W]`, and which images are right."""
    leaf, phi, logits = watched(model, x)
    with torch.enable_grad():
        z = head.logits(phi)
        top = z.detach().argmax(1)
        g, lead = log_odds(z, top), at(z, top) - at(z, y)
        field, lead_field = (torch.autograd.grad(f.sum(), leaf, create_graph=True)[0] for f in (g, lead))
    require_finite(g, field)
    wrong = (top != y)[:, None]
    bends = wrong & (_derivative_along(lead_field, leaf, v) != 0).any(1, keepdim=True)
    log_rest = log_sigmoid(g.detach())[:, None]
    log_unit = torch.where(bends, 0.0, log_rest)
    rest, p_top = (log_rest - log_unit).exp(), log_sigmoid(-g.detach())[:, None].exp()
    slope, size = field.detach().flatten(1).double(), torch.zeros_like(log_rest)
    for _ in range(iterations):
        v = v / torch.where(size > 0, size, v.norm(dim=1, keepdim=True))
        bent = rest * _derivative_along(field, leaf, v)
        if bool(bends.any()):
            bent = bent + bends * _derivative_along(lead_field, leaf, v)
        v = bent + rest * p_top * (slope * v).sum(1, keepdim=True) * slope
        size = v.norm(dim=1, keepdim=True)
        v = torch.where(size > 0, v, 1.0)
    return (log_unit + size.log())[:, 0], logits.argmax(1) == y


def _derivative_along(field: Tensor, leaf: Tensor, v: Tensor) -> Tensor:
    """Derivative of the gradient field `[n, C, H, W]` along `v [n, C H W]`, by its symmetry; float64 `[n, C H W]`."""
    if not field.requires_grad:  # the function is linear in x
        return torch.zeros_like(v)
    inner = (field * v.to(field).view_as(field)).sum()
    (product,) = torch.autograd.grad(inner, leaf, retain_graph=True, materialize_grads=True)
    return product.flatten(1).double()
