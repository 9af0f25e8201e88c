"""ASAM sharpness: SAM's step in a metric that follows the size of each weight (Kwon et al. 2021).

`mean over batches B of m:  L_B(w + rho T^2 g / ||T g||) - L_B(w)`,  T = |w| + eta elementwise.
"""

from torch import nn

from workers.science.curvature import parameters_of
from workers.science.sharpness.base import MeasureInput, MeasureReport
from workers.science.sharpness.sam_sharpness import one_step


def asam_sharpness(
    model: nn.Module,
    inputs: MeasureInput,
    *,
    rho: float = 0.5,
    eta: float = 0.01,
    m: int = 128,
    images: int = 1024,
) -> MeasureReport:
    """`asam_sharpness` and `log_asam_sharpness` (null if the loss does not rise) on unaugmented training images, `m`
    in each batch.

    >>> import torch
    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    >>> x, y = torch.rand(8, 1, 1, 1), torch.tensor([0, 1] * 4)
    >>> asam_sharpness(net, MeasureInput(x, y, x, y)).numbers["asam_sharpness"] > 0
    True
    """
    T = {name: p.abs() + eta for name, p in parameters_of(model).items()}
    rise, log_rise = one_step(model, inputs, T, rho=rho, m=m, images=images)
    return MeasureReport({"asam_sharpness": rise, "log_asam_sharpness": log_rise})
