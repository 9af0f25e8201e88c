"""The detector of arXiv 2510.14231, appendix D.4, with the attack that hides from it (README.md, "Trajectory")."""

import torch
from torch import nn

from workers.science.attacks.base import AttackInput, FeatureLoss
from workers.science.attacks.pgd import pgd
from workers.science.curvature import batches
from workers.science.detector import LAMBDAS, clean_mean, cross_validation, detector_numbers, flipped_pairs, hiding_loss
from workers.science.heads import linear_head
from workers.science.sharpness.base import MeasureInput, MeasureReport
from workers.science.trajectory import Recorder, Trajectory


def detector(
    model: nn.Module,
    inputs: MeasureInput,
    *,
    eps: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 10,
    images: int = 1000,
) -> MeasureReport:
    """Numbers as `detector.detector_numbers`: the stump against PGD-linf on the first test `images`, and against each
    of three attacks that climb `l - lambda (log kappa - mean clean log kappa)^2` instead, and the worst of them.
    Curves: by fold, for the plain attack. The paper's are at s = 1. Null if fewer than five images flip. No
    adaptive attack, and none of its numbers, if no clean-correct image has a log kappa to hide.
    """
    x, y = inputs.test(images)
    head = linear_head(model)
    rounds = 1 + len(LAMBDAS)

    def attacked(number: int, loss: FeatureLoss | None) -> Trajectory:
        recorder, start, lost = Recorder(head.weight, head.bias), 0, []
        for xb, yb in batches(x, y, inputs.batch_size):
            index = torch.arange(start, start + len(xb))
            batch = AttackInput(xb, yb, index, observer=recorder(xb, yb, index))
            output = pgd(model, batch, feature_loss=loss, norm="linf", eps=eps, step_size=step_size, steps=steps)
            lost.append(output.non_finite)
            start += len(xb)
            inputs.report(number * len(x) + start, rounds * len(x))
        return recorder.trajectory(torch.cat(lost))

    plain = attacked(0, None)
    adaptive: dict[float, Trajectory] = {}
    if (aim := clean_mean(plain)) is not None:
        for number, strength in enumerate(LAMBDAS, start=1):
            adaptive[strength] = attacked(number, hiding_loss(head.weight, head.bias, aim, strength))
    by_fold = cross_validation(*flipped_pairs(plain))[1]
    return MeasureReport(detector_numbers(plain, adaptive), {name: [*values] for name, values in by_fold.items()})
