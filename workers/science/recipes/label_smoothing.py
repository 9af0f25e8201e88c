"""Cross-entropy with smoothed labels (Szegedy et al. 2016): `(1 - a) e_y + a / k`."""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from workers.science.recipes.common import LossAndLogits


def loss(model: nn.Module, x: Tensor, y: Tensor, _noise: object, /, smoothing: float) -> LossAndLogits:
    """`smoothing` a in [0, 1), spread over all k classes, the true one included."""
    logits = model(x)
    return cross_entropy(logits.float(), y, label_smoothing=smoothing), logits
