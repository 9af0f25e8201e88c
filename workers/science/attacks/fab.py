"""FAB, targeted (Croce & Hein 2020b): the nearest point of the linearised boundary, again and again.

The third member of AutoAttack. It minimises the perturbation, and breaks an example if that fits into the ball.
"""

import torch
from torch import Tensor, nn

from workers.science.attacks.base import (
    AttackInput,
    AttackOutput,
    Outcomes,
    highest_wrong_classes,
    misclassified,
    per_example,
    refuse_observer,
    take_gradient,
)
from workers.science.attacks.norms import geometry
from workers.science.cross_entropy import at

NEWTON_STEPS = 25


def fab(
    model: nn.Module,
    inputs: AttackInput,
    *,
    norm: str = "linf",
    eps: float = 8 / 255,
    steps: int = 100,
    targets: int = 9,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
) -> AttackOutput:
    """`steps` steps towards each of the `targets` highest wrong classes, from x itself (one restart, nothing random).

    A step projects the iterate and x on the hyperplane `z_target = z_y`, linearised at the iterate, inside [0, 1];
    overshoots by `eta`; mixes both with a weight of x of at most `alpha_max`; and after a success goes back towards x
    by `beta`. Examples leave when broken within `eps`. Raises `ValueError` for an observer; other errors as in `pgd`.
    """
    refuse_observer(inputs, "fab")
    if steps < 1 or targets < 1 or eps < 0:
        raise ValueError("fab needs steps >= 1, targets >= 1 and eps >= 0")
    ball, x, y = geometry(norm), inputs.x.detach(), inputs.y
    outcomes = Outcomes(x)
    classes = highest_wrong_classes(outcomes.classify(model, y), y, targets)

    for run in range(classes.shape[1]):
        alive = outcomes.robust()
        x_0, y_0, target = x[alive], y[alive], classes[alive, run]
        x_t = x_0
        for t in range(steps):
            if not len(alive):
                break
            step = take_gradient(model, x_t, lambda z, y=y_0, k=target: at(z, k) - at(z, y))  # type: ignore[misc]
            outcomes.count(alive, step)
            normal = step.gradient
            offset = (normal * x_t).flatten(1).sum(1) - step.loss
            from_x_t = to_hyperplane(x_t, normal, offset, norm)
            from_x_0 = to_hyperplane(x_0, normal, offset, norm)
            near, far = (ball.size(d).clamp_min(1e-8) for d in (from_x_t, from_x_0))
            alpha = per_example((near / (near + far)).clamp(0, alpha_max), x_t)
            x_t = ((1 - alpha) * (x_t + eta * from_x_t) + alpha * (x_0 + eta * from_x_0)).clamp(0, 1)

            wrong = misclassified(outcomes.look(model, x_t, alive), y_0)
            within = ball.size(x_t - x_0) <= eps
            outcomes.see(alive, x_t, wrong & within, judged=True)
            x_t = torch.where(per_example(wrong, x_t), x_0 + beta * (x_t - x_0), x_t)
            keep = ~(wrong & within)
            alive, x_0, y_0, target, x_t = (v[keep] for v in (alive, x_0, y_0, target, x_t))
            inputs.report(run * steps + t + 1, classes.shape[1] * steps)
    return outcomes.output(norm, eps)


def to_hyperplane(x: Tensor, normal: Tensor, offset: Tensor, norm: str) -> Tensor:
    """The smallest `d [n, C, H, W]` with `<normal, x + d> = offset` and `x + d` in [0, 1]; if there is none, the
    corner of the box that comes nearest to the plane.

    `d = sign * min(t * speed, room)`, per pixel, with speed 1 for linf and |normal| for l2. `|<normal, d>|` is concave
    and piecewise linear in t, so Newton's method from t = 0 rises to the root and stops there.
    """
    weight = normal.flatten(1).abs()
    largest = weight.amax(1, keepdim=True)
    weight = weight / torch.where(largest > 0, largest, torch.ones_like(largest))
    gap = (offset - (normal * x).flatten(1).sum(1))[:, None] / torch.where(
        largest > 0, largest, torch.ones_like(largest)
    )
    direction = normal.flatten(1).sign() * gap.sign()
    pixels = x.flatten(1)
    room = torch.where(direction > 0, 1 - pixels, pixels) * (direction != 0)
    speed = (weight > 0).to(weight) if norm == "linf" else weight
    t = torch.zeros_like(gap)
    for _ in range(NEWTON_STEPS):
        moved = torch.minimum(t * speed, room)
        missing = gap.abs() - (weight * moved).sum(1, keepdim=True)
        slope = (weight * speed * (t * speed < room)).sum(1, keepdim=True)
        t = torch.where((slope > 0) & (missing > 0), t + missing / slope.clamp_min(1e-30), t)
    full = (weight * room).sum(1, keepdim=True) <= gap.abs()
    return (direction * torch.where(full, room, torch.minimum(t * speed, room))).reshape(x.shape)
