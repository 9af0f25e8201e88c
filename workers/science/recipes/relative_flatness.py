"""Cross-entropy plus a penalty on relative flatness (Petzka et al. 2021; as a regulariser: Adilova et al. 2023)."""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from workers.science.heads import features_and_logits, linear_head
from workers.science.recipes.common import LossAndLogits


def loss(model: nn.Module, x: Tensor, y: Tensor, _noise: object, /, strength: float) -> LossAndLogits:
    """`CE + strength * mean_i relative_flatness_i`, the closed form of README.md, "Sharpness", which has a gradient."""
    model = getattr(model, "_orig_mod", model)  # a compiled network would not call the hook that sees phi
    phi, logits = features_and_logits(model, x)
    flatness = relative_flatness(phi.float(), logits.float(), linear_head(model).weight.float())
    return cross_entropy(logits.float(), y) + strength * flatness.mean(), logits


def relative_flatness(phi: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
    """`||phi||^2 sum_{i<j} p_i p_j ||w_i - w_j||^2` `[n]`, of `phi [n, m]`, `logits [n, k]`, `weight [k, m]`.

    A sum of positive terms: nothing cancels, whatever the confidence.
    """
    p = logits.softmax(1)
    distances = (weight[:, None] - weight[None]).square().sum(2)
    return phi.square().sum(1) * ((p @ distances) * p).sum(1) / 2
