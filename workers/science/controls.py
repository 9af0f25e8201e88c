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
    robust_twin, where a twin was asked for.
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

    numbers: `train_mode_modules` (modules that are not in eval mode), `random_forward_changed` (examples whose logits
    differ between two forwards), `batch_dependent_changed` (of the first 16 of each batch: whose logits do not, but
    are others without the rest of the batch), `eps_zero_changed` (whose outcome at eps = 0 is not the clean one),
    `n_non_finite` (examples with NaN or infinite clean logits: neither clean-correct nor robust, and none of the
    checks' concern). `twin` is the attack with the margin loss, where that is not PGD from the image in this geometry.
    Raises what the attacks raise, and `NonFinite` where no example is finite.
    """
    train_mode_modules = sum(module.training for module in model.modules())
    model = _InCompany(model)
    parts = [slice(start, start + batch_size) for start in range(0, len(y), batch_size)]
    ball = {"norm": geometry.norm, "eps": geometry.eps}
    walk = {**ball, "step_size": geometry.step_size}
    panel: list[tuple[str, str, dict[str, object]]] = [
        ("robust_fgsm", "fgsm", {**ball}),
        ("robust_noise", "noise", {**ball, "kind": "uniform", "points": 2, "draws": NOISE_DRAWS}),
        ("robust_margin", "pgd", {**walk, "steps": geometry.steps, "loss": "margin"}),
        ("robust_square", "square", {**ball, "queries": SQUARE_QUERIES}),
        ("robust_pgd", "pgd", {**walk, "steps": geometry.steps}),
        ("eps_zero", "pgd", {**walk, "eps": 0.0, "steps": 1}),
        *([] if twin is None else [("robust_twin", twin.attack, {**twin.params})]),
    ]
    stages = len(panel) + 2
    bits: dict[str, list[Tensor]] = {}
    random_forward = batch_dependent = 0
    for number, part in enumerate(parts):
        x_0, y_0 = unit_interval(x[part], device), y[part].to(device)
        inputs = AttackInput(x_0, y_0, index[part])
        first, again = look(model, x_0)[1], look(model, x_0)[1]
        finite = torch.isfinite(first).all(1) | torch.isfinite(again).all(1)
        steady = (first == again).all(1)
        random_forward += int((finite & ~steady).sum())
        batch_dependent += int((_depends_on_batch(model, x_0[:ALONE], first) & steady[:ALONE]).sum())
        clean_correct = ~misclassified(first, y_0) & torch.isfinite(first).all(1)
        found = {"clean_correct": clean_correct, "finite": finite}
        for stage, (name, attack, params) in enumerate(panel):
            output = ATTACKS[attack](model, inputs, **params)
            found[name] = ~output.broken & clean_correct
            _report(on_progress, number * stages + stage + 1, len(parts) * stages)
        found["robust_more_steps"] = found["robust_pgd"].clone()
        left = found["robust_pgd"].nonzero().squeeze(1)
        if len(left):
            longer = {**walk, "steps": MORE_STEPS * geometry.steps}
            output = ATTACKS["pgd"](model, inputs.at(left), **longer)
            found["robust_more_steps"][left] = ~output.broken
        _report(on_progress, (number + 1) * stages, len(parts) * stages)
        for name, values in found.items():
            bits.setdefault(name, []).append(values.cpu())
    joined = {name: torch.cat(values) for name, values in bits.items()}
    eps_zero, finite = joined.pop("eps_zero"), joined.pop("finite")
    if not bool(finite.any()):
        raise NonFinite.of("a logit", ~finite)
    return ControlReport(
        {
            "n": len(y),
            "n_non_finite": int((~finite).sum()),
            "train_mode_modules": train_mode_modules,
            "random_forward_changed": random_forward,
            "batch_dependent_changed": batch_dependent,
            "eps_zero_changed": int((eps_zero != joined["clean_correct"]).sum()),
        },
        joined,
    )


class _InCompany(nn.Module):
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
