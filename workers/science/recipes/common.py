"""The seam that a recipe fills: a loss on a batch, and how a gradient is made from it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

LossAndLogits = tuple[Tensor, Tensor]
"""The scalar that is minimised, and the logits `[n, k]` that training accuracy is counted on."""


Loss = Callable[..., LossAndLogits]
"""`loss(model, x, y, generator, **params)`: `x [n, C, H, W]` float32 in [0, 1], `y [n]` int64, model in train mode.

All randomness comes from `generator`, a torch.Generator on the device of `x`; `params` are numbers.
"""

Backward = Callable[..., LossAndLogits]
"""`backward(model, loss_of_batch, **params)` leaves gradients in `.grad`; `loss_of_batch()` is one forward pass."""


def plain_backward(_model: nn.Module, loss_of_batch: Callable[[], LossAndLogits], /, **_params: float) -> LossAndLogits:
    """One forward and one backward pass."""
    loss, logits = loss_of_batch()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss, logits


@dataclass(frozen=True)
class Recipe:
    """One way to train. `params` are the parameters of `loss` and `backward` with their defaults; all are numbers."""

    loss: Loss
    summary: str
    params: Mapping[str, float] = field(default_factory=dict)
    backward: Backward = plain_backward


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, batch norm uses its running statistics and does not update them."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def pgd_linf(
    model: nn.Module,
    x: Tensor,
    start: Tensor,
    objective: Callable[[Tensor], Tensor],
    *,
    eps: float,
    step_size: float,
    steps: int,
) -> Tensor:
    """Ascend `objective(logits)`, a scalar, within `eps` (linf) of `x` and in [0, 1], from `start`, in eval mode."""
    with eval_mode(model):
        x_t = start
        for _ in range(steps):
            x_t = x_t.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(objective(model(x_t)), x_t)
            x_t = (x + (x_t + step_size * gradient.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    return x_t.detach()
