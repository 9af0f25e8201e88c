"""Sharpness-aware minimisation (Foret et al. 2021): the gradient at the worst nearby weights, to first order."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from workers.science.recipes import standard
from workers.science.recipes.common import LossAndLogits


def loss(model: nn.Module, x: Tensor, y: Tensor, noise: object, /, rho: float) -> LossAndLogits:
    """Mean cross-entropy; `rho` is for `backward`."""
    del rho
    return standard.loss(model, x, y, noise)


def backward(model: nn.Module, loss_of_batch: Callable[[], LossAndLogits], /, rho: float) -> LossAndLogits:
    """The gradient at `w + rho g / |g|`, g the gradient at w, both norms over all parameters; w is restored.

    The second pass does not update the running statistics of batch norm. Gives loss and logits at w.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    loss_at_w, logits = loss_of_batch()
    gradients = torch.autograd.grad(loss_at_w, weights)
    gradients = _of_ordinary_size(gradients)
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    saved = [w.detach().clone() for w in weights]
    with torch.no_grad():
        for w, g in zip(weights, gradients, strict=True):
            w.add_(g * (rho / norm.clamp_min(1e-12)))
    with _frozen_statistics(model):
        loss_of_batch()[0].backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for w, before in zip(weights, saved, strict=True):
            w.copy_(before)  # not w - e, which is another number in float32
    return loss_at_w, logits


def _of_ordinary_size(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Times the power of two that brings the largest entry to about 1, so that no square underflows or overflows.

    A power of two changes no digit of `g / |g|`: ordinary steps keep their bits.
    """
    largest = torch.stack([g.abs().amax() for g in gradients]).amax()
    exponent = torch.frexp(largest).exponent.clamp(-126, 126)
    return tuple(torch.ldexp(g, -exponent) for g in gradients)


@contextmanager
def _frozen_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, batch norm still normalises by the batch, but leaves its running statistics alone."""
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
