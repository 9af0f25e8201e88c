"""The seam that a recipe fills: a loss on a batch, and how a gradient is made from it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from workers.science.seeding import moved, normal_per_example, uniform_per_example

LossAndLogits = tuple[Tensor, Tensor]
"""The scalar that is minimised, and the logits `[n, k]` that training accuracy is counted on."""


Loss = Callable[..., LossAndLogits]
"""`loss(model, x, y, noise, **params)`: `x [n, C, H, W]` float32 in [0, 1], `y [n]` int64, model in train mode.

All randomness comes from `noise`, the `BatchNoise` of the batch; `params` are numbers.
"""


@dataclass(frozen=True)
class BatchNoise:
    """The random numbers of a recipe for the images `index [n]` of a batch; each image's are of (seed, epoch, index).

    `index` lies on the CPU, where the numbers are made: a GPU is not waited for.

    Order, crops and flips are drawn from another stream: with equal seeds, every recipe sees the same batches.
    """

    seed: int
    epoch: int
    index: Tensor
    stream: str = "recipe"

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform in [0, 1), shape, dtype and device of `like [n, ...]`."""
        numbers = uniform_per_example(self.seed, self.index, self.epoch, like.shape[1:], self.stream)
        return moved(numbers, like.device).to(like)

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, otherwise as `uniform`."""
        numbers = normal_per_example(self.seed, self.index, self.epoch, like.shape[1:], self.stream)
        return moved(numbers, like.device).to(like)


Backward = Callable[..., LossAndLogits]
"""`backward(model, loss_of_batch, **params)` leaves gradients in `.grad`; `loss_of_batch()` is one forward pass."""


def plain_backward(_model: nn.Module, loss_of_batch: Callable[[], LossAndLogits], /, **_params: float) -> LossAndLogits:
    """One forward and one backward pass."""
    loss, logits = loss_of_batch()
    loss.backward()  # type: ignore[no-untyped-call]
    return loss, logits


@dataclass(frozen=True)
class Recipe:
    """One way to train. `params` are the parameters of `loss` and `backward` with their defaults; all are numbers.

    `attacks` says that the loss attacks its batch, from a random start, with the `eps`, `step_size` and `steps` among
    them.
    """

    loss: Loss
    summary: str
    params: Mapping[str, float] = field(default_factory=dict)
    backward: Backward = plain_backward
    attacks: bool = False


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
