"""The seam that every attack fills: what it is given, what it hands back, and the gradient that they all take."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from workers.science.errors import NonFinite
from workers.science.heads import features_and_logits

OnProgress = Callable[[int, int], None]
"""`on_progress(step, steps)`, called after every step; what it raises ends the attack."""


class Observer(Protocol):
    """Sees every iterate t = 0..T of restart 0, with what the attack's own forward pass computed, detached."""

    def __call__(self, t: int, x_t: Tensor, phi: Tensor, logits: Tensor, /) -> None:
        """`x_t [n, C, H, W]`, `phi [n, m]`, `logits [n, k]`, float32. The tensors are the observer's to keep."""


@dataclass(frozen=True)
class AttackOutput:
    """What an attack found. `broken` is set exactly where the model misclassifies `x` or `x_adv`.

    x_adv               [n, C, H, W] the judged example: that of the first restart that broke it, else of restart 0
    broken              [n] bool: misclassified on the judged iterate of some restart, or without any attack
    broken_any_iterate  [n] bool: misclassified at any point that the attack evaluated; contains `broken`
    zero_gradient       [n] bool: the input gradient at step 0 is exactly 0; None where the attack takes no gradient
    gradient_calls      forward and backward passes, counted per example
    forward_calls       forward passes without a backward pass, counted per example
    norm, eps           the ball that `x_adv` promises to lie in; eps is None where there is none
    """

    x_adv: Tensor
    broken: Tensor
    broken_any_iterate: Tensor
    zero_gradient: Tensor | None
    gradient_calls: int
    forward_calls: int
    norm: str
    eps: float | None


class FeatureLoss(Protocol):
    """What an attack may climb instead of a loss of the logits: `[n]` from features `phi [n, m]` and labels `y [n]`."""

    def __call__(self, phi: Tensor, y: Tensor) -> Tensor: ...


class Attack(Protocol):
    """An attack on `model`, any network in eval mode that returns logits. It leaves the network as it was.

    `x [n, C, H, W]` float32 in [0, 1], `y [n]` int64 true labels, `index [n]` int64 positions in the data set, from
    which (with `attack_seed`) all randomness of an example is drawn, so that it does not depend on the batch.
    `scale` is the s of the head, which is in `model` already. Further keywords are the attack's own.
    Raises `NonFinite` where the attack ends in NaN, `ValueError` for parameters that make no sense.
    """

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        *,
        index: Tensor,
        attack_seed: int = 0,
        observer: Observer | None = None,
        on_progress: OnProgress | None = None,
        scale: float = 1.0,
    ) -> AttackOutput: ...


@dataclass(frozen=True)
class Step:
    """What one forward and backward pass gives: `loss [n]`, `gradient [n, C, H, W]`, `logits [n, k]`, maybe `phi`."""

    loss: Tensor
    gradient: Tensor
    logits: Tensor
    phi: Tensor | None = None


def take_gradient(
    model: nn.Module,
    x_t: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    with_features: bool = False,
    of_features: Callable[[Tensor], Tensor] | None = None,
) -> Step:
    """Gradient of `sum_i loss(logits)_i` with respect to `x_t`; of `of_features(phi)` instead, where that is given.

    No `.grad` is written anywhere.
    """
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        phi, logits = features_and_logits(model, x_t) if with_features else (None, model(x_t))
        values = loss(logits) if of_features is None or phi is None else of_features(phi)
        (gradient,) = torch.autograd.grad(values.sum(), x_t)
    return Step(values.detach(), gradient, logits.detach(), None if phi is None else phi.detach())


@torch.no_grad()
def look(model: nn.Module, x_t: Tensor, *, with_features: bool = False) -> tuple[Tensor | None, Tensor]:
    """`phi [n, m]`, if wanted, and `logits [n, k]` of one forward pass."""
    return features_and_logits(model, x_t) if with_features else (None, model(x_t))


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """[n] bool, by the logits as they are (float32)."""
    return logits.argmax(1) != y


def highest_wrong(logits: Tensor, y: Tensor) -> Tensor:
    """[n] int64: the class with the highest logit that is not `y`."""
    return logits.scatter(1, y[:, None], -torch.inf).argmax(1)


def highest_wrong_classes(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """[n, min(count, k - 1)] int64: the wrong classes with the highest logits, in this order."""
    others = logits.scatter(1, y[:, None], -torch.inf)
    return others.topk(min(count, logits.shape[1] - 1), dim=1).indices


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """`values [n]` as `[n, 1, 1, 1]`, to go with images."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def require_finite(values: Tensor, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NonFinite(f"the attack met NaN or infinite {what}; check the weights and the scale")


def refuse_observer(observer: Observer | None, attack: str) -> None:
    if observer is not None:
        raise ValueError(f"{attack} has no trajectory to record")


class Found:
    """What is known so far about each of the examples `x [n, C, H, W]`."""

    def __init__(self, x: Tensor, clean_wrong: Tensor | None = None) -> None:
        nobody = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.x_adv = x.clone()
        self.clean_wrong = nobody if clean_wrong is None else clean_wrong
        self.broken, self.broken_any = nobody.clone(), nobody.clone()
        self.zero_gradient: Tensor | None = None
        self.gradient_calls = self.forward_calls = 0
        self._largest_gradient = x.new_full((), -torch.inf)

    def count(self, gradient: Tensor) -> None:
        """A gradient was taken. NaN in it counts at the end: a sign hides it, and to look now makes a GPU wait."""
        self.gradient_calls += len(gradient)
        self._largest_gradient = torch.maximum(self._largest_gradient, gradient.amax())

    def see(self, alive: Tensor, x_t: Tensor, wrong: Tensor, *, judged: bool) -> Tensor:
        """Note which of the examples `alive` are `wrong` at `x_t`; the first judged one is the example's `x_adv`."""
        self.broken_any[alive] |= wrong
        if judged:
            new = wrong & ~self.broken[alive]
            self.x_adv[alive[new]] = x_t[new]
            self.broken[alive] |= wrong
        return wrong

    def keep(self, alive: Tensor, x_t: Tensor) -> None:
        """`x_t` is what there is to show for those that are not broken."""
        self.x_adv[alive] = torch.where(per_example(self.broken[alive], x_t), self.x_adv[alive], x_t)

    def robust(self) -> Tensor:
        """Positions of the examples that nothing has broken yet."""
        return (~self.broken & ~self.clean_wrong).nonzero().squeeze(1)

    def output(self, norm: str, eps: float | None) -> AttackOutput:
        require_finite(self.x_adv, "pixels")
        if bool(self._largest_gradient.isnan()):
            raise NonFinite("the attack met a gradient that is NaN; check the weights and the scale")
        return AttackOutput(
            self.x_adv,
            self.broken | self.clean_wrong,
            self.broken_any | self.clean_wrong,
            self.zero_gradient,
            self.gradient_calls,
            self.forward_calls,
            norm,
            eps,
        )
