"""Lipschitz constants of the features, and the certificate's radius with them (README.md, "Bounds")."""

import torch
from torch import nn

from workers.science.bounds import Anchor, lipschitz_jacobian, lipschitz_upper, radius_numbers
from workers.science.curvature import batches
from workers.science.heads import features_and_logits, linear_head
from workers.science.sharpness.base import MeasureInput, MeasureReport
from workers.science.summaries import Numbers, merged, quantile, summary


def lipschitz(
    model: nn.Module,
    inputs: MeasureInput,
    *,
    iterations: int = 20,
    images: int = 256,
) -> MeasureReport:
    """Of phi from image to features, l2 to l2: `lipschitz_upper` (a bound, loose; null for networks with a part that
    has none, such as attention), and `lipschitz_jacobian_{statistic}` and `_max` at test images (local, from below).

    `certified_radius_{e001 | e01 | log2 | logk}_{q}` with the bound is a guarantee in l2, for every image;
    `estimated_radius_jacobian_...` with the largest Jacobian norm is an estimate. The third estimate, on an attack's
    path, is among the numbers of every attack.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False), nn.Linear(2, 2))
    >>> with torch.no_grad(): _ = net[1].weight.copy_(torch.diag(torch.tensor([3.0, -4.0])))
    >>> x, y = torch.rand(4, 1, 1, 2), torch.tensor([0, 1, 0, 1])
    >>> numbers = lipschitz(net, MeasureInput(x, y, x, y)).numbers
    >>> numbers["lipschitz_upper"], round(numbers["lipschitz_jacobian_max"], 3)
    (4.0, 4.0)
    """
    x, y = inputs.test(images)
    head = linear_head(model)
    features, norms = [], []
    for xb, _ in batches(x, y, inputs.batch_size):
        norms.append(lipschitz_jacobian(model, xb, seed=inputs.seed, iterations=iterations).cpu())
        with torch.no_grad():
            features.append(features_and_logits(model, xb)[0].cpu())
        inputs.report(sum(map(len, norms)), len(x))
    jacobian, bias = torch.cat(norms), None if head.bias is None else head.bias.detach().cpu()
    at = Anchor.of(torch.cat(features), y.cpu(), head.weight.detach().cpu(), bias)
    upper, largest = lipschitz_upper(model), quantile(jacobian, 1.0)
    numbers: Numbers = {"lipschitz_upper": upper, "lipschitz_jacobian_max": largest}
    certified = radius_numbers(at, upper, "certified_radius") if upper else {}
    estimated = radius_numbers(at, largest, "estimated_radius_jacobian") if largest else {}
    return MeasureReport(merged(numbers, summary(jacobian, "lipschitz_jacobian"), certified, estimated))
