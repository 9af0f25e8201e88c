"""The multi-class hinge (Crammer, Singer 2001): it stops pushing at a margin of 1, so confidence stays bounded."""

from torch import Tensor, nn

from workers.science.cross_entropy import others
from workers.science.recipes.common import LossAndLogits


def loss(model: nn.Module, x: Tensor, y: Tensor, _noise: object, /) -> LossAndLogits:
    """Mean of `max_{j != y} (1 + z_j - z_y)_+`."""
    logits = model(x)
    z = logits.float()
    true = z.gather(1, y[:, None])
    highest_wrong = others(z, y).amax(1, keepdim=True)
    return (1 + highest_wrong - true).clamp_min(0).mean(), logits
