"""What a network gets right, clean and under attack: numbers and per-example bits (README.md, "Scaling" and "Attacks").

Classes are decided by the float32 logits; losses come in float64 from the float32 features (README.md, "Notation").
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.science.ahead import ahead_of
from workers.science.attacks import ATTACKS, AttackInput, AttackOutput, Observer, OnProgress, prepare
from workers.science.attacks.norms import geometry
from workers.science.bounds import Returned
from workers.science.cross_entropy import log_odds, loss_increase, softplus
from workers.science.datasets import to_unit
from workers.science.errors import NoLinearHead, NonFinite
from workers.science.heads import features_and_logits, linear_head
from workers.science.summaries import Numbers, majority_share, mean, merged, share, summary

TOP = 5
"""A class among the five highest of no more than five says nothing: top-5 numbers are null there."""

ObserverFactory = Callable[[Tensor, Tensor, Tensor], Observer]
"""`factory(x, y, index)`: the observer of one batch, `x [n, C, H, W]` float32 on the device. Called in order."""


@dataclass(frozen=True)
class CleanReport:
    """`accuracy`, `top5_accuracy` (null for up to five classes), mean `loss`; per example, on the CPU, `correct [n]`
    bool, `losses [n]` float64 and `non_finite [n]` bool: a feature or a logit is NaN or infinite. Such an example is
    not correct, and is left out of the mean loss.
    """

    accuracy: float
    loss: float
    top5_accuracy: float | None
    correct: Tensor
    losses: Tensor
    non_finite: Tensor


@dataclass(frozen=True)
class AttackReport:
    """`numbers` by name; `bits` [n] bool by name: clean_correct, robust, robust_any_iterate, zero_gradient (if the
    attack takes gradients), non_finite. All on the CPU. `returned` is None if the network has no linear head.

    A non-finite example is neither clean-correct nor robust, `n_non_finite` counts them, and losses, top-5 hits and
    sizes are over the others; accuracies are over all `n`, and so is `majority_share`, the share of the most frequent
    label: a network that is right no more often may always give the same answer.
    """

    numbers: Numbers
    bits: dict[str, Tensor]
    returned: Returned | None = None


def evaluate_clean(
    model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 256, device: torch.device | str = "cpu"
) -> CleanReport:
    """`x [n, C, H, W]` uint8 or float32 in [0, 1], `y [n]`; the model is in eval mode and on `device`.

    Raises `NonFinite` if no example has finite logits, `ValueError` for no examples.
    """
    if not len(y):
        raise ValueError("nothing to evaluate: no examples")
    looks = [_look(model, unit_interval(x[part], device), y[part].to(device)) for part in _batches(len(y), batch_size)]
    correct, odds, finite = (
        torch.cat([getattr(batch, name) for batch in looks]) for name in ("correct", "log_odds", "finite")
    )
    losses = softplus(odds)
    if not bool(finite.any()):
        raise NonFinite.of("a logit", ~finite)
    hits = [batch.top5 for batch in looks if batch.top5 is not None]
    top5 = float(torch.cat(hits).double().mean()) if hits else None
    return CleanReport(float(correct.double().mean()), float(losses[finite].mean()), top5, correct, losses, ~finite)


def evaluate_attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    index: Tensor,
    *,
    attack: str,
    params: Mapping[str, object],
    attack_seed: int = 0,
    scale: float = 1.0,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    observer_factory: ObserverFactory | None = None,
    on_progress: OnProgress | None = None,
    precision: str = "float32",
    channels_last: bool = False,
    fold_batch_norm: bool = False,
    compile: bool = False,
) -> AttackReport:
    """Run `ATTACKS[attack]` with `params` on `x [n, C, H, W]` (uint8, or float32 in [0, 1]), batch by batch.

    `model` is the network with its head already scaled, in eval mode and on `device`; `scale` tells the attack s.
    The last four options speed up the attack's gradients (`prepare`); its examples are judged by `model` itself.
    `on_progress(done, total)` counts steps over all batches. Raises `ValueError` for parameters that make no sense
    (an observer needs float32 features), `NonFinite` if every example meets NaN or infinities.
    """
    if attack not in ATTACKS:
        raise ValueError(f"unknown attack {attack!r}; there are {', '.join(ATTACKS)}")
    if observer_factory is not None and (precision != "float32" or compile):
        raise ValueError("a trajectory needs the float32 features: record it with precision float32, not compiled")
    if not len(y):
        raise ValueError("nothing to evaluate: no examples")
    probe = unit_interval(x[:PROBES], device)
    climbed = prepare(
        model,
        precision=precision,
        channels_last=channels_last,
        fold_batch_norm=fold_batch_norm,
        compile=compile,
        batch_size=min(batch_size, len(y)),
        probe=probe,
    )
    parts = _batches(len(y), batch_size)
    batches: list[dict[str, Tensor]] = []
    gradient_calls = forward_calls = 0
    of_batches = [index[part].tolist() for part in parts]
    with ahead_of(of_batches, enabled=torch.device(device).type in DRAWS_AHEAD) as begin:
        for number, part in enumerate(parts):
            begin(number)
            x_0, y_0, index_0 = unit_interval(x[part], device), y[part].to(device), index[part]
            observer = None if observer_factory is None else observer_factory(x_0, y_0, index_0)
            reporting = _of_all(on_progress, number, len(parts))
            inputs = AttackInput(x_0, y_0, index_0, attack_seed, scale, observer, reporting)
            output = ATTACKS[attack](climbed, inputs, **params)
            batches.append(_judge(model, x_0, y_0, output))
            gradient_calls, forward_calls = gradient_calls + output.gradient_calls, forward_calls + output.forward_calls
    seen = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    if bool(seen["non_finite"].all()):
        raise NonFinite.of("a logit, a loss or a gradient", seen["non_finite"])
    calls: Numbers = {"gradient_calls": gradient_calls, "forward_calls": forward_calls}
    more: Numbers = {"majority_share": majority_share(y), **calls}
    numbers = merged(_numbers(seen, norm=output.norm, eps=output.eps), more)
    return AttackReport(numbers, {name: seen[name] for name in BITS if name in seen}, _returned(seen, y))


DRAWS_AHEAD = ("cuda",)
"""Devices beside which the next batch's random numbers are drawn: on a CPU that takes a core away."""
BITS = ("clean_correct", "robust", "robust_any_iterate", "zero_gradient", "non_finite")
PROBES = 8
"""Images that a prepared network is compared on."""


def unit_interval(x: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Images as float32 in [0, 1] on the device: bytes become `to_unit`, float32 is taken as it is."""
    return to_unit(x.to(device)) if x.dtype == torch.uint8 else x.to(device)


@dataclass(frozen=True)
class _Look:
    """The outcome of one forward pass for each example, on the CPU: `correct`, `top5` (None for up to five classes) and
    `finite` [n] bool, `log_odds` [n] float64 against the label; on the device, features `phi` [n, m] (None without a
    linear head). An example that is not finite is neither correct nor among the five.
    """

    correct: Tensor
    top5: Tensor | None
    log_odds: Tensor
    finite: Tensor
    phi: Tensor | None


@torch.no_grad()
def _look(model: nn.Module, x: Tensor, y: Tensor) -> _Look:
    phi: Tensor | None = None
    try:
        features, logits = features_and_logits(model, x)
    except NoLinearHead:  # nothing but the logits to start from
        logits = model(x)
        precise = logits.double()
    else:
        phi, head = features, linear_head(model)
        bias = None if head.bias is None else head.bias.double()
        precise = functional.linear(features.double(), head.weight.double(), bias)
    finite = torch.isfinite(logits).all(1) & torch.isfinite(precise).all(1)
    top5 = None
    if logits.shape[1] > TOP:
        top5 = ((logits.topk(TOP, dim=1).indices == y[:, None]).any(1) & finite).cpu()
    return _Look(((logits.argmax(1) == y) & finite).cpu(), top5, log_odds(precise, y).cpu(), finite.cpu(), phi)


def _judge(model: nn.Module, x: Tensor, y: Tensor, output: AttackOutput) -> dict[str, Tensor]:
    """Per-example outcomes of one batch, on the CPU, by the plain network."""
    clean, judged = _look(model, x, y), _look(model, output.x_adv, y)
    finite = clean.finite & judged.finite & ~output.non_finite.cpu()
    robust = clean.correct & judged.correct & finite
    delta = output.x_adv.double() - x.double()
    seen = {
        "clean_correct": clean.correct & finite,
        "clean_log_odds": clean.log_odds,
        "robust": robust,
        "robust_any_iterate": robust & ~output.broken_any_iterate.cpu(),
        "non_finite": ~finite,
        "log_odds": judged.log_odds,
        "linf": geometry("linf").size(delta).cpu(),
        "l2": geometry("l2").size(delta).cpu(),
        "outside_box": ((output.x_adv < 0) | (output.x_adv > 1)).flatten(1).any(1).cpu(),
    }
    if clean.top5 is not None and judged.top5 is not None:
        seen["robust_top5"] = clean.top5 & judged.top5 & finite
    if output.zero_gradient is not None:
        seen["zero_gradient"] = output.zero_gradient.cpu() & finite
    if clean.phi is not None and judged.phi is not None:
        seen["phi"] = clean.phi.cpu()
        seen["feature_moved"] = torch.linalg.vector_norm(judged.phi.double() - clean.phi.double(), dim=1).cpu()
    return seen


def _returned(seen: Mapping[str, Tensor], y: Tensor) -> Returned | None:
    if "phi" not in seen:
        return None
    finite = ~seen["non_finite"]
    names = ("phi", "feature_moved", "l2", "clean_log_odds", "log_odds")
    return Returned(y.cpu()[finite], **{name: seen[name][finite] for name in names})


def _numbers(seen: Mapping[str, Tensor], *, norm: str, eps: float | None) -> Numbers:
    n, correct, finite = len(seen["robust"]), seen["clean_correct"], ~seen["non_finite"]
    zero, top5 = seen.get("zero_gradient"), seen.get("robust_top5")
    clean_loss, loss = (softplus(seen[name][finite]) for name in ("clean_log_odds", "log_odds"))
    rise = loss_increase(seen["clean_log_odds"], seen["log_odds"])
    return merged(
        {
            "n": n,
            "n_non_finite": n - int(finite.sum()),
            "n_clean_correct": int(correct.sum()),
            "clean_accuracy": mean(correct),
            "clean_loss": mean(clean_loss),
            "robust_accuracy": mean(seen["robust"]),
            "robust_accuracy_of_correct": mean(seen["robust"][correct]),
            "robust_accuracy_any_iterate": mean(seen["robust_any_iterate"]),
            "robust_top5_accuracy": None if top5 is None else mean(top5),
            "robust_loss": mean(loss),
            "flip_rate": share(~seen["robust"], correct),
            "zero_gradient_fraction": None if zero is None else mean(zero[correct]),
            "zero_gradient_fraction_of_all": None if zero is None else mean(zero),
            "max_perturbation_linf": float(seen["linf"][finite].max()),
            "max_perturbation_l2": float(seen["l2"][finite].max()),
            "outside_ball": None if eps is None else int((seen[norm] > ball_limit(norm, eps))[finite].sum()),
            "outside_box": int(seen["outside_box"][finite].sum()),
        },
        summary(rise[finite], "loss_increase"),
        summary(rise[correct], "loss_increase_clean_correct"),
    )


def ball_limit(norm: str, eps: float) -> float:
    """The size from which on an example counts as outside the ball, in float64 (README.md, "Controls")."""
    return eps + 1e-6 if norm == "linf" else eps * (1 + 1e-5) + 1e-6


def _batches(n: int, batch_size: int) -> list[slice]:
    return [slice(i, i + batch_size) for i in range(0, n, batch_size)]


def _of_all(on_progress: OnProgress | None, number: int, batches: int) -> OnProgress | None:
    if on_progress is None:
        return None
    return lambda step, steps: on_progress(number * steps + step, batches * steps)
