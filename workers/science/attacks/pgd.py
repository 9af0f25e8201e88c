"""Projected gradient descent (Madry et al. 2018; README.md, "Attacks"): step, project on the ball, clip to [0, 1]."""

from functools import partial

import torch
from torch import nn

from workers.science.attacks.base import (
    AttackInput,
    AttackOutput,
    FeatureLoss,
    Outcomes,
    highest_wrong,
    misclassified,
    show,
    take_gradient,
)
from workers.science.attacks.losses import objective
from workers.science.attacks.norms import geometry, random_point


def pgd(
    model: nn.Module,
    inputs: AttackInput,
    *,
    norm: str = "linf",
    eps: float = 8 / 255,
    step_size: float = 2 / 255,
    steps: int = 10,
    loss: str = "cross_entropy",
    random_start: bool = False,
    restarts: int = 1,
    targeted: bool = False,
    judge: str = "final",
    feature_loss: FeatureLoss | None = None,
) -> AttackOutput:
    """`x_{t+1} = clip(x_0 + project(x_t + step_size * normalize(gradient) - x_0))`, `steps` times.

    `norm` "linf" or "l2" (over C x H x W), `eps` and `step_size` in units of [0, 1]. `loss` is one of `LOSSES`,
    of which only `rescaled_cross_entropy` reads the head's scale. Restart 0 starts at x_0 unless `random_start`,
    later ones at random. `targeted` goes for the highest clean logit that is not y; the outcome is still "not y".
    `judge` "final" looks at the last iterate of every restart, "any_step" at every iterate, and then leaves out
    examples that are already broken (unless an observer wants to see them all).
    `feature_loss(phi, y) -> [n]` is climbed instead of `loss`, for attacks that aim at more than the class.
    Raises `ValueError` for parameters that make no sense.
    """
    if judge not in ("final", "any_step") or steps < 0 or restarts < 1 or eps < 0 or step_size < 0:
        raise ValueError("pgd needs judge final or any_step, steps >= 0, restarts >= 1, eps >= 0 and step_size >= 0")
    any_step, leave = judge == "any_step", judge == "any_step" and inputs.observer is None
    ball, x, y = geometry(norm), inputs.x.detach(), inputs.y
    outcomes = Outcomes(x)
    if random_start or targeted:
        clean_logits = outcomes.classify(model, y)
    target = highest_wrong(clean_logits, y) if targeted else y

    for restart in range(restarts):
        observer = inputs.observer if restart == 0 else None
        alive = outcomes.robust() if leave and restart > 0 else torch.arange(len(x), device=x.device)
        if not len(alive):
            break
        x_0, y_0, target_0 = x[alive], y[alive], target[alive]
        x_t = random_point(ball, eps, inputs.at(alive), restart) if random_start or restart > 0 else x_0
        for t in range(steps):
            if not len(alive):
                break
            climb = objective(loss, y_0, inputs.scale, target_0 if targeted else None)
            of_features = None if feature_loss is None else partial(feature_loss, y=y_0)
            step = take_gradient(model, x_t, climb, with_features=observer is not None, of_features=of_features)
            gradient = step.gradient
            outcomes.count(alive, step)
            show(observer, t, x_t, step.phi, step.logits)
            wrong = outcomes.see(alive, x_t, misclassified(step.logits, y_0), judged=any_step)
            if restart == t == 0 and not random_start:
                outcomes.clean_wrong = wrong
            if leave and bool(wrong.any()):
                keep = ~wrong
                alive, x_0, y_0, target_0, x_t, gradient = (v[keep] for v in (alive, x_0, y_0, target_0, x_t, gradient))
            x_t = x_t + step_size * ball.normalize(gradient)
            x_t = (x_0 + ball.project(x_t - x_0, eps)).clamp(0, 1)
            inputs.report(restart * steps + t + 1, restarts * steps)
        if len(alive):
            logits = outcomes.look(model, x_t, alive, observer=observer, t=steps)
            if restart == 0:
                outcomes.keep(alive, x_t)
            outcomes.see(alive, x_t, misclassified(logits, y_0), judged=True)
    return outcomes.output(norm, eps)
