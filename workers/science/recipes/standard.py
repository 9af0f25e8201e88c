"""Cross-entropy: the paper's recipe."""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from workers.science.recipes.common import LossAndLogits


def loss(model: nn.Module, x: Tensor, y: Tensor, _noise: object, /) -> LossAndLogits:
    """Mean cross-entropy, natural logarithms."""
    logits = model(x)
    return cross_entropy(logits.float(), y), logits
