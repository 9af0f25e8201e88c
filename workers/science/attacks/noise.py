"""Random noise: the control path of README.md, "Attacks".

An example that noise breaks was never robust. A change of sharpness along a path of noise is no effect of an attack.
"""

import numpy as np
import torch
from torch import nn

from workers.science.attacks.base import AttackInput, AttackOutput, Outcomes, misclassified
from workers.science.attacks.norms import geometry, random_point
from workers.science.seeding import moved, normal_per_example


def noise(
    model: nn.Module,
    inputs: AttackInput,
    *,
    kind: str = "gaussian",
    norm: str = "linf",
    eps: float = 8 / 255,
    points: int = 10,
    draws: int = 1,
) -> AttackOutput:
    """The straight path `x + a (end - x)`, a = linspace(0, 1, points), judged at its ends a = 1.

    `kind` "gaussian": the end is `clip(N(.5, .25^2))` per pixel, an image of its own, in no ball (`norm` and `eps` are
    not read). "uniform": the end is uniform in the ball of `norm` and `eps` around x, then clipped. `draws` ends per
    example; the observer sees the first. No gradient is taken. Errors as in `pgd`.
    """
    if kind not in ("gaussian", "uniform") or points < 2 or draws < 1 or eps < 0:
        raise ValueError("noise needs kind gaussian or uniform, points >= 2, draws >= 1 and eps >= 0")
    x, y = inputs.x.detach(), inputs.y
    outcomes, everyone = Outcomes(x, takes_gradients=False), torch.arange(len(x), device=x.device)
    for draw in range(draws):
        observer = inputs.observer if draw == 0 else None
        if kind == "gaussian":
            normal = normal_per_example(inputs.seed, inputs.index, draw, x.shape[1:], stream="noise")
            end = (0.5 + 0.25 * moved(normal, x.device).to(x)).clamp(0, 1)
        else:
            end = random_point(geometry(norm), eps, inputs, draw)
        for t, a in enumerate(np.linspace(0, 1, points).tolist()):
            if t == 0 and draw > 0:
                continue
            x_t = end if t == points - 1 else x + a * (end - x)
            wrong = misclassified(outcomes.look(model, x_t, observer=observer, t=t), y)
            if t == 0:
                outcomes.clean_wrong = wrong
            if t == points - 1 and draw == 0:
                outcomes.keep(everyone, x_t)
            outcomes.see(everyone, x_t, wrong, judged=t == points - 1)
            inputs.report(draw * (points - 1) + t, draws * (points - 1))
    return outcomes.output(norm if kind == "uniform" else "l2", eps if kind == "uniform" else None)
