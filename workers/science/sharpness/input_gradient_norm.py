"""Norm of the loss's gradient with respect to the image (Drucker and Le Cun 1992; Ross and Doshi-Velez 2018).

With `g = logsumexp_{j != y} z_j - z_y`, the loss is `log(1 + exp g)` and `||grad_x l|| = (1 - p_y) ||grad_x g||`. The
first factor is known to the last bit in the log domain: the number does not underflow where a float32 gradient does.
"""

import torch
from torch import Tensor, nn

from workers.science.closed_forms import Head
from workers.science.cross_entropy import log_odds, log_sigmoid
from workers.science.curvature import batches
from workers.science.errors import NonFinite
from workers.science.heads import features_and_logits, linear_head
from workers.science.sharpness.base import MeasureInput, MeasureReport
from workers.science.summaries import merged, summary


def input_gradient_norm(
    model: nn.Module,
    inputs: MeasureInput,
    *,
    images: int = 10_000,
) -> MeasureReport:
    """`log_input_gradient_norm_{statistic}` and the same with `_clean_correct`, l2 over C x H x W, on test images.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    >>> with torch.no_grad(): _ = net[1].weight.copy_(torch.tensor([[4.0], [0.0]])), net[1].bias.zero_()
    >>> x, y = torch.zeros(1, 1, 1, 1), torch.tensor([0])
    >>> report = input_gradient_norm(net, MeasureInput(x, y, x, y))
    >>> round(report.numbers["log_input_gradient_norm_median"], 6)  # log(4 / 2)
    0.693147
    """
    x, y = inputs.test(images)
    layer = linear_head(model)
    head = Head(layer.weight, layer.bias)
    values, correct, done = [], [], 0
    for xb, yb in batches(x, y, inputs.batch_size):
        leaf, phi, logits = watched(model, xb)
        g = log_odds(head.logits(phi), yb)
        (gradient,) = torch.autograd.grad(g.sum(), leaf)
        norm = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)
        require_finite(g, norm)
        values.append((log_sigmoid(g.detach()) + norm.log()).cpu())
        correct.append((logits.argmax(1) == yb).cpu())
        done += len(xb)
        inputs.report(done, len(x))
    return MeasureReport(both_populations(torch.cat(values), torch.cat(correct), "log_input_gradient_norm"))


def both_populations(values: Tensor, correct: Tensor, name: str) -> dict[str, float | int | None]:
    """`summary` of log values `[n]` over all samples and, with the suffix `_clean_correct`, over the correct ones."""
    of_correct = {f"{key}_clean_correct": v for key, v in summary(values[correct], name, log=True).items()}
    return merged(summary(values, name, log=True), of_correct)


def watched(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images `[n, C, H, W]` as a leaf, their features `[n, m]` with the graph, and their logits `[n, k]` without."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        phi, logits = features_and_logits(model, leaf)
    return leaf, phi, logits.detach()


def require_finite(*values: Tensor) -> None:
    """Raises `NonFinite` for NaN or infinities."""
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise NonFinite("a logit or an input gradient is NaN or infinite")
