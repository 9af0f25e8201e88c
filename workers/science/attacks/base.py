"""The seam that every attack fills: its input, its output, and the gradient that all attacks take."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from workers.science.cross_entropy import others
from workers.science.heads import features_and_logits

OnProgress = Callable[[int, int], None]
"""`on_progress(step, steps)`, called after every step; what it raises ends the attack."""


class Observer(Protocol):
    """Sees every iterate t = 0..T of restart 0, with what the attack's own forward pass computed, detached."""

    def __call__(self, t: int, x_t: Tensor, phi: Tensor, logits: Tensor, /) -> None:
        """`x_t [n, C, H, W]`, `phi [n, m]`, `logits [n, k]`, float32. The tensors are the observer's to keep."""


@dataclass(frozen=True)
class AttackInput:
    """The images that an attack starts from, the seed, and who follows the attack.

    x            [n, C, H, W] float32 in [0, 1]
    y            [n] int64 true labels
    index        [n] int64 positions in the data set. All randomness of an example is drawn from its position and
                 `seed`, so that it does not depend on the batch
    seed         the attack's seed
    scale        s of the linear head, already in the network's weights; only a loss that divides by s reads it
    observer     called with every iterate, if there is one
    on_progress  called after every step, if there is one
    """

    x: Tensor
    y: Tensor
    index: Tensor
    seed: int = 0
    scale: float = 1.0
    observer: Observer | None = None
    on_progress: OnProgress | None = None

    def at(self, positions: Tensor) -> "AttackInput":
        """The same with only the examples at `positions [m]`, in rising order."""
        return replace(self, x=self.x[positions], y=self.y[positions], index=index_of(positions, self.index))

    def report(self, step: int, steps: int) -> None:
        """Call `on_progress`, if there is one."""
        if self.on_progress is not None:
            self.on_progress(step, steps)


@dataclass(frozen=True)
class AttackOutput:
    """The result of an attack. `broken` is true exactly if the model misclassifies `x` or `x_adv`, or for `non_finite`.

    x_adv               [n, C, H, W] the judged example: that of the first restart that broke it, else of restart 0
    broken              [n] bool: misclassified on the judged iterate of some restart, or without any attack
    broken_any_iterate  [n] bool: misclassified at any point that the attack evaluated; contains `broken`
    zero_gradient       [n] bool: the input gradient at step 0 is exactly 0; None if the attack takes no gradient
    non_finite          [n] bool: the attack met a logit, a loss or a gradient that is NaN or infinite; x_adv is x there
    gradient_calls      forward and backward passes, counted per example
    forward_calls       forward passes without a backward pass, counted per example
    norm, eps           the ball that contains `x_adv`; eps is None if there is none
    """

    x_adv: Tensor
    broken: Tensor
    broken_any_iterate: Tensor
    zero_gradient: Tensor | None
    non_finite: Tensor
    gradient_calls: int
    forward_calls: int
    norm: str
    eps: float | None


class FeatureLoss(Protocol):
    """What an attack may climb instead of a loss of the logits: `[n]` from features `phi [n, m]` and labels `y [n]`."""

    def __call__(self, phi: Tensor, y: Tensor) -> Tensor:
        """`[n]`, higher is nearer to what the attack wants; differentiable in `phi`."""


class Attack(Protocol):
    """An attack on `model`, any network in eval mode that returns logits. It leaves the network as it was.

    Keywords are the attack's own parameters (`eps`, `steps`, ...), each with a default.
    An example with NaN or infinities is `non_finite` in the output, and changes the outcome of no other example.
    Raises `ValueError` for parameters that make no sense.
    """

    def __call__(self, model: nn.Module, inputs: AttackInput) -> AttackOutput:
        """The judged examples and their outcomes, in the order of `inputs.x`."""


@dataclass(frozen=True)
class Step:
    """What one forward and backward pass gives: `loss [n]`, `gradient [n, C, H, W]`, `logits [n, k]`, maybe `phi`."""

    loss: Tensor
    gradient: Tensor
    logits: Tensor
    phi: Tensor | None = None

    @property
    def zero_gradient(self) -> Tensor:
        """`[n]` bool: the gradient is exactly 0 at every pixel."""
        return (self.gradient == 0).flatten(1).all(1)


def take_gradient(
    model: nn.Module,
    x_t: Tensor,
    loss: Callable[[Tensor], Tensor],
    *,
    with_features: bool = False,
    of_features: Callable[[Tensor], Tensor] | None = None,
) -> Step:
    """Gradient of `sum_i loss(logits)_i` with respect to `x_t`; of `of_features(phi)` instead, if that is given.

    No `.grad` is written anywhere.
    """
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_()
        with_features = with_features or of_features is not None
        phi, logits = features_and_logits(model, x_t) if with_features else (None, model(x_t))
        values = loss(logits) if of_features is None or phi is None else of_features(phi)
        (gradient,) = torch.autograd.grad(values.sum(), x_t)
    return Step(values.detach(), gradient, logits.detach(), None if phi is None else phi.detach())


@torch.no_grad()
def look(model: nn.Module, x_t: Tensor, *, with_features: bool = False) -> tuple[Tensor | None, Tensor]:
    """`phi [n, m]` (None without `with_features`) and `logits [n, k]` of one forward pass."""
    return features_and_logits(model, x_t) if with_features else (None, model(x_t))


def show(observer: Observer | None, t: int, x_t: Tensor, phi: Tensor | None, logits: Tensor) -> None:
    """Call the observer, if there is one."""
    if observer is not None and phi is not None:
        observer(t, x_t, phi, logits)


def misclassified(logits: Tensor, y: Tensor) -> Tensor:
    """[n] bool, by the logits as they are (float32)."""
    return logits.argmax(1) != y


def highest_wrong(logits: Tensor, y: Tensor) -> Tensor:
    """[n] int64: the class with the highest logit that is not `y`."""
    return others(logits, y).argmax(1)


def highest_wrong_classes(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """[n, min(count, k - 1)] int64: the wrong classes with the highest logits, in this order."""
    return others(logits, y).topk(min(count, logits.shape[1] - 1), dim=1).indices


def per_example(values: Tensor, like: Tensor) -> Tensor:
    """`values [n]` as `[n, 1, 1, 1]`, to go with images."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def index_of(alive: Tensor, index: Tensor) -> Tensor:
    """The entries of `index [n]` for the examples `alive`, positions in rising order.

    If all are alive that is `index` itself, and a GPU is not waited for.
    """
    return index if len(alive) == len(index) else index[alive.to(index.device)]


def refuse_observer(inputs: AttackInput, attack: str) -> None:
    """Raises `ValueError` if there is an observer: `attack` has no iterates to show."""
    if inputs.observer is not None:
        raise ValueError(f"{attack} has no trajectory to record")


class Outcomes:
    """What an attack has seen so far of each of the examples `x [n, C, H, W]`; `output` makes its report of it.

    `alive [m]` are positions among the n, in rising order: the examples that the attack still works on.
    `zero_gradient` is False for an example until its first gradient, and None for attacks that take none.
    """

    def __init__(self, x: Tensor, *, takes_gradients: bool = True) -> None:
        no_example = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.x, self.x_adv, self.clean_wrong = x, x.clone(), no_example
        self.broken, self.broken_any = no_example.clone(), no_example.clone()
        self.zero_gradient = no_example.clone() if takes_gradients else None
        self.gradient_calls = self.forward_calls = 0
        self._largest = x.new_zeros(len(x))

    def classify(self, model: nn.Module, y: Tensor) -> Tensor:
        """Logits `[n, k]` of the clean images. The misclassified ones are broken without any attack."""
        logits = self.look(model, self.x)
        self.clean_wrong = misclassified(logits, y)
        return logits

    def look(
        self,
        model: nn.Module,
        x_t: Tensor,
        alive: Tensor | None = None,
        *,
        observer: Observer | None = None,
        t: int = 0,
    ) -> Tensor:
        """Logits `[m, k]` of a forward pass at `x_t`, of the examples `alive` or of all. `observer` sees it as iterate
        `t`.
        """
        phi, logits = look(model, x_t, with_features=observer is not None)
        self.note_finite(logits, alive)
        self.forward_calls += len(x_t)
        show(observer, t, x_t, phi, logits)
        return logits

    def count(self, alive: Tensor, step: Step) -> None:
        """A gradient was taken of the examples `alive`. The first one decides `zero_gradient`."""
        if self.zero_gradient is not None and self.gradient_calls == 0:
            self.zero_gradient[alive] = step.zero_gradient
        self.gradient_calls += len(alive)
        for values in (step.gradient, step.logits, step.loss[:, None]):
            self.note_finite(values, alive)

    def note_finite(self, values: Tensor, alive: Tensor | None = None) -> None:
        """Note whether `values [n, ...]`, of the examples `alive` or of all, are finite: a sign or an argmax hides NaN.

        The maximum keeps NaN and infinities until the end, so a GPU need not wait for a look at every step.
        """
        largest = values.flatten(1).abs().amax(1).to(self._largest)
        if alive is None or len(alive) == len(self._largest):
            self._largest = torch.maximum(self._largest, largest)
        else:
            self._largest[alive] = torch.maximum(self._largest[alive], largest)

    def lose(self, alive: Tensor, non_finite: Tensor) -> None:
        """Note which of the examples `alive` were `non_finite` in another attack."""
        self._largest[alive] = self._largest[alive].masked_fill(non_finite, torch.inf)

    @property
    def non_finite(self) -> Tensor:
        """`[n]` bool: NaN or infinities were met."""
        return ~torch.isfinite(self._largest)

    def see(self, alive: Tensor, x_t: Tensor, wrong: Tensor, *, judged: bool) -> Tensor:
        """Note which of the examples `alive` are `wrong` at `x_t`; the first judged one is the example's `x_adv`."""
        self.broken_any[alive] |= wrong
        if judged:
            new = wrong & ~self.broken[alive]
            self.x_adv[alive[new]] = x_t[new]
            self.broken[alive] |= wrong
        return wrong

    def keep(self, alive: Tensor, x_t: Tensor) -> None:
        """`x_t` is the `x_adv` of those that are not broken."""
        self.x_adv[alive] = torch.where(per_example(self.broken[alive], x_t), self.x_adv[alive], x_t)

    def robust(self) -> Tensor:
        """Positions of the examples that nothing has broken yet."""
        return (~self.broken & ~self.clean_wrong & ~self.non_finite).nonzero().squeeze(1)

    def output(self, norm: str, eps: float | None) -> AttackOutput:
        """The result of an attack in the ball `eps` of `norm`. A non-finite example is returned as it was."""
        self.note_finite(self.x_adv)
        lost = self.non_finite
        return AttackOutput(
            torch.where(per_example(lost, self.x), self.x, self.x_adv),
            self.broken | self.clean_wrong | lost,
            self.broken_any | self.clean_wrong | lost,
            None if self.zero_gradient is None else self.zero_gradient & ~lost,
            lost,
            self.gradient_calls,
            self.forward_calls,
            norm,
            eps,
        )
