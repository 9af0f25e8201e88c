"""The fixed panel of controls: other attacks in the same ball, and checks of the network itself.

Definition: README.md, "Controls".

Run once per checkpoint and attack geometry, at s = 1. With the bias scaled too, its bits hold at every s.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workers.science.attacks import ATTACKS, AttackInput
from workers.science.attacks.base import look, misclassified
from workers.science.errors import NonFinite
from workers.science.evaluation import unit_interval
from workers.science.summaries import Numbers

NOISE_DRAWS = 5
SQUARE_QUERIES = 500
MORE_STEPS = 4
ALONE = 16
"""Examples that are also classified without the others of their batch."""
TOLERANCE = 1e-3
"""What rounding may do to a logit when the batch changes, relative to the largest one."""


@dataclass(frozen=True)
class Geometry:
    """The ball of the attack that is controlled, and the steps that it takes in it. Units as in `pgd`."""

    norm: str
    eps: float
    step_size: float
    steps: int


@dataclass(frozen=True)
class Twin:
    """An attack by name with its parameters: the one that is controlled, with the margin loss."""

    attack: str
    params: Mapping[str, object]


@dataclass(frozen=True)
class ControlReport:
    """`bits` [n] bool, on the CPU: clean_correct, and robust_NAME under each challenger; `numbers` of the checks.

    robust_fgsm, robust_noise (uniform, all draws), robust_margin (PGD on the margin), robust_square, robust_pgd
    (cross-entropy, the geometry's steps), robust_more_steps (those of it that survive four times as many), and
    robust_twin, if there is a twin.
    """

    numbers: Numbers
    bits: dict[str, Tensor]


def run_controls(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    geometry: Geometry,
    *,
    twin: Twin | None = None,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> ControlReport:
    """Challenge `model` (at s = 1, on `device`, left as it is) on `x [n, C, H, W]`, `y [n]`; `index [n]` as in attacks.

    The numbers count:
    train_mode_modules       modules that are not in eval mode
    random_forward_changed   examples whose logits differ between two forward passes
    batch_dependent_changed  of the first 16 of each batch, examples with steady logits that are others without the rest
    eps_zero_changed         examples whose outcome at eps = 0 is not the clean one
    n_non_finite             examples with NaN or infinite clean logits: they are neither clean-correct nor robust, and
                             no check counts them

    `twin` is the attack with the margin loss, if that is not PGD from the image in this geometry.
    Raises the errors of the attacks, and `NonFinite` if no example is finite.
    """
    train_mode_modules = sum(module.training for module in model.modules())
    model = _AtLeastTwo(model)
    parts = [slice(start, start + batch_size) for start in range(0, len(y), batch_size)]
    panel = _panel(geometry, twin)
    stages = len(panel) + 2
    batches: dict[str, list[Tensor]] = {}
    for number, part in enumerate(parts):
        inputs = AttackInput(unit_interval(x[part], device), y[part].to(device), index[part])
        bits = _forward_bits(model, inputs.x, inputs.y)
        for stage, challenge in enumerate(panel):
            output = ATTACKS[challenge.attack](model, inputs, **challenge.params)
            bits[challenge.bit] = ~output.broken & bits["clean_correct"]
            _report(on_progress, number * stages + stage + 1, len(parts) * stages)
        bits["robust_more_steps"] = _robust_with_more_steps(model, inputs, bits["robust_pgd"], geometry)
        _report(on_progress, (number + 1) * stages, len(parts) * stages)
        for name, values in bits.items():
            batches.setdefault(name, []).append(values.cpu())
    joined = {name: torch.cat(values) for name, values in batches.items()}
    checks = {name: joined.pop(name) for name in ("finite", "random_forward", "batch_dependent", "eps_zero")}
    if not bool(checks["finite"].any()):
        raise NonFinite.of("a logit", ~checks["finite"])
    return ControlReport(
        {
            "n": len(y),
            "n_non_finite": int((~checks["finite"]).sum()),
            "train_mode_modules": train_mode_modules,
            "random_forward_changed": int(checks["random_forward"].sum()),
            "batch_dependent_changed": int(checks["batch_dependent"].sum()),
            "eps_zero_changed": int((checks["eps_zero"] != joined["clean_correct"]).sum()),
        },
        joined,
    )


@dataclass(frozen=True)
class _Challenge:
    """An attack of the panel: the images that are right and that it does not break have the bit `bit`."""

    bit: str
    attack: str
    params: Mapping[str, object]


def _panel(geometry: Geometry, twin: Twin | None) -> list[_Challenge]:
    """The attacks on every image, in the order of their bits."""
    ball: dict[str, object] = {"norm": geometry.norm, "eps": geometry.eps}
    walk = {**ball, "step_size": geometry.step_size, "steps": geometry.steps}
    return [
        _Challenge("robust_fgsm", "fgsm", ball),
        _Challenge("robust_noise", "noise", {**ball, "kind": "uniform", "points": 2, "draws": NOISE_DRAWS}),
        _Challenge("robust_margin", "pgd", {**walk, "loss": "margin"}),
        _Challenge("robust_square", "square", {**ball, "queries": SQUARE_QUERIES}),
        _Challenge("robust_pgd", "pgd", walk),
        _Challenge("eps_zero", "pgd", {**walk, "eps": 0.0, "steps": 1}),
        *([] if twin is None else [_Challenge("robust_twin", twin.attack, twin.params)]),
    ]


def _robust_with_more_steps(model: nn.Module, inputs: AttackInput, robust: Tensor, geometry: Geometry) -> Tensor:
    """`[n]` bool: those of the `robust [n]` under PGD that withstand `MORE_STEPS` times as many steps too."""
    withstand = robust.clone()
    left = robust.nonzero().squeeze(1)
    if len(left):
        ball = {"norm": geometry.norm, "eps": geometry.eps, "step_size": geometry.step_size}
        output = ATTACKS["pgd"](model, inputs.at(left), **ball, steps=MORE_STEPS * geometry.steps)
        withstand[left] = ~output.broken
    return withstand


def _forward_bits(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What two forward passes say of each image, bool: `clean_correct`, `finite` and `random_forward` `[n]`, and
    `batch_dependent` of the first `ALONE` images.
    """
    first, again = look(model, x)[1], look(model, x)[1]
    finite = torch.isfinite(first).all(1) | torch.isfinite(again).all(1)
    steady = (first == again).all(1)
    return {
        "clean_correct": ~misclassified(first, y) & torch.isfinite(first).all(1),
        "finite": finite,
        "random_forward": finite & ~steady,
        "batch_dependent": _depends_on_batch(model, x[:ALONE], first) & steady[:ALONE],
    }


class _AtLeastTwo(nn.Module):
    """An image that is alone goes through the network twice: a batch norm in train mode refuses one vector."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model(x if len(x) != 1 else x.expand(2, *x.shape[1:]))
        return logits[: len(x)]


def _depends_on_batch(model: nn.Module, x: Tensor, in_batch: Tensor) -> Tensor:
    """`[n]` bool: whether the logits of `x [n, C, H, W]` differ from `in_batch [>= n, k]`, those in their batch."""
    alone = torch.cat([look(model, x_0[None])[1] for x_0 in x])
    largest = in_batch[torch.isfinite(in_batch)].abs().max() if bool(torch.isfinite(in_batch).any()) else 0.0
    return (alone - in_batch[: len(x)]).abs().amax(1) > TOLERANCE * largest


def _report(on_progress: Callable[[int, int], None] | None, step: int, steps: int) -> None:
    if on_progress is not None:
        on_progress(step, steps)
