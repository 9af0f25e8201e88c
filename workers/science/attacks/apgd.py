"""Auto-PGD (Croce & Hein 2020, algorithm 1): momentum, and a step size that halves if the loss stops rising."""

import torch
from torch import Tensor, nn

from workers.science.attacks.base import (
    AttackInput,
    AttackOutput,
    Outcomes,
    Step,
    highest_wrong_classes,
    index_of,
    misclassified,
    per_example,
    show,
    take_gradient,
)
from workers.science.attacks.losses import objective
from workers.science.attacks.norms import geometry


def apgd(
    model: nn.Module,
    inputs: AttackInput,
    *,
    norm: str = "linf",
    eps: float = 8 / 255,
    steps: int = 100,
    restarts: int = 1,
    rho: float = 0.75,
    loss: str = "cross_entropy",
    targeted: bool = False,
    targets: int = 9,
) -> AttackOutput:
    """`steps` steps per run from a random point of the sphere; a run per restart, and per target class if `targeted`.

    Targets are the `targets` highest wrong classes of the clean logits (at most k - 1), with the targeted form of
    `loss` ("dlr": Croce & Hein's). The judged example is the first misclassified iterate, else the first run's last;
    broken examples leave (unless an observer watches). Differs from the published code in two points: the first count
    of rising steps starts from the loss at the start instead of 0, and the l2 gradient is divided by its largest entry
    before its norm. Errors as in `pgd`.
    """
    if steps < 1 or restarts < 1 or eps < 0 or not 0 < rho <= 1 or targets < 1:
        raise ValueError("apgd needs steps >= 1, restarts >= 1, eps >= 0, 0 < rho <= 1 and targets >= 1")
    ball, x, y = geometry(norm), inputs.x.detach(), inputs.y
    outcomes = Outcomes(x)
    classes = highest_wrong_classes(outcomes.classify(model, y), y, targets if targeted else 1)
    runs = restarts * classes.shape[1]

    for run in range(runs):
        observer = inputs.observer if run == 0 else None
        leave = observer is None
        alive = outcomes.robust() if run > 0 else torch.arange(len(x), device=x.device)
        x_0, y_0, target = x[alive], y[alive], classes[alive, run % classes.shape[1]]
        noise = ball.random_start(x_0, 1.0, seed=inputs.seed, index=index_of(alive, inputs.index), restart=run)
        x_t = (x_0 + noise * per_example(eps / ball.size(noise).clamp_min(1e-12), noise)).clamp(0, 1)
        memory, x_before = _Memory(x_t, steps, rho, 2 * eps), x_t
        for t in range(steps + 1):
            if not len(alive):
                break
            climb = objective(loss, y_0, inputs.scale, target if targeted else None)
            step = take_gradient(model, x_t, climb, with_features=observer is not None)
            outcomes.count(alive, step)
            show(observer, t, x_t, step.phi, step.logits)
            wrong = outcomes.see(alive, x_t, misclassified(step.logits, y_0), judged=True)
            if run == 0 and t == steps:
                outcomes.keep(alive, x_t)
            x_t, gradient = memory.after(t, x_t, step)
            if leave and bool(wrong.any()):
                keep = ~wrong
                memory.keep(keep)
                alive, x_0, y_0, target, x_t, x_before, gradient = (
                    v[keep] for v in (alive, x_0, y_0, target, x_t, x_before, gradient)
                )
            if t < steps:
                ahead = x_t + per_example(memory.step_size, x_t) * ball.normalize(gradient)
                ahead = (x_0 + ball.project(ahead - x_0, eps)).clamp(0, 1)
                a = 0.75 if t > 0 else 1.0
                ahead = x_t + a * (ahead - x_t) + (1 - a) * (x_t - x_before)
                x_before, x_t = x_t, (x_0 + ball.project(ahead - x_0, eps)).clamp(0, 1)
            inputs.report(run * (steps + 1) + t + 1, runs * (steps + 1))
    return outcomes.output(norm, eps)


class _Memory:
    """The best point of each of `n` examples, and the step size `[n]` that halves at checkpoints without progress."""

    def __init__(self, x_t: Tensor, steps: int, rho: float, step_size: float) -> None:
        low = torch.full((len(x_t),), -torch.inf, device=x_t.device, dtype=x_t.dtype)
        self.x_best = self.best_gradient = x_t
        self.loss = self.best_loss = self.best_loss_at_check = low
        self.rises, self.halved = torch.zeros_like(low), torch.ones_like(low, dtype=torch.bool)
        self.step_size = torch.full_like(low, step_size)
        self.rho, self.steps_since_check = rho, 0
        self.window, self.least = max(int(0.22 * steps), 1), max(int(0.06 * steps), 1)
        self.less = max(int(0.03 * steps), 1)

    def after(self, t: int, x_t: Tensor, step: Step) -> tuple[Tensor, Tensor]:
        """Note the loss at `x_t`. Gives the point that the next step starts from, and the gradient there."""
        better = step.loss > self.best_loss
        self.best_loss = torch.where(better, step.loss, self.best_loss)
        self.x_best = torch.where(per_example(better, x_t), x_t, self.x_best)
        self.best_gradient = torch.where(per_example(better, x_t), step.gradient, self.best_gradient)
        if t == 0:
            self.loss, self.best_loss_at_check = step.loss, step.loss
            return x_t, step.gradient
        self.rises = self.rises + (step.loss > self.loss)
        self.loss = step.loss
        self.steps_since_check += 1
        if self.steps_since_check < self.window:
            return x_t, step.gradient
        stuck = (self.rises <= self.rho * self.window) | (~self.halved & (self.best_loss_at_check >= self.best_loss))
        self.halved, self.best_loss_at_check, self.rises = stuck, self.best_loss, torch.zeros_like(self.rises)
        self.step_size = torch.where(stuck, self.step_size / 2, self.step_size)
        self.window, self.steps_since_check = max(self.window - self.less, self.least), 0
        back = per_example(stuck, x_t)
        return torch.where(back, self.x_best, x_t), torch.where(back, self.best_gradient, step.gradient)

    def keep(self, examples: Tensor) -> None:
        """Forget all but these, `[n]` bool."""
        for name in ("x_best", "best_gradient", "loss", "best_loss", "best_loss_at_check", "rises", "halved"):
            setattr(self, name, getattr(self, name)[examples])
        self.step_size = self.step_size[examples]
