"""What a network gets right, clean and under attack: numbers and per-example bits (SCIENCE.md sections 3 and 5).

Classes are decided by the float32 logits; losses come in float64 from the float32 features (section 1, Precision).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from workers.science.attacks import ATTACKS, AttackOutput, Observer, OnProgress, prepare
from workers.science.attacks.norms import geometry
from workers.science.datasets import to_unit
from workers.science.errors import NoLinearHead, NonFinite
from workers.science.heads import features_and_logits, linear_head
from workers.science.summaries import mean, summary

Numbers = dict[str, float | int | None]

ObserverFactory = Callable[[Tensor, Tensor, Tensor], Observer]
"""`factory(x, y, index)`: the observer of one batch, `x [n, C, H, W]` float32 on the device. Called in order."""


@dataclass(frozen=True)
class CleanReport:
    """`accuracy`, `top5_accuracy`, mean `loss`; per example `correct [n]` bool, `losses [n]` float64, on the CPU."""

    accuracy: float
    loss: float
    top5_accuracy: float
    correct: Tensor
    losses: Tensor


@dataclass(frozen=True)
class AttackReport:
    """`numbers` by name; `bits` [n] bool by name: clean_correct, robust, robust_any_iterate, zero_gradient (where the
    attack takes gradients). All on the CPU."""

    numbers: Numbers
    bits: dict[str, Tensor]


def evaluate_clean(
    model: nn.Module, x: Tensor, y: Tensor, *, batch_size: int = 256, device: torch.device | str = "cpu"
) -> CleanReport:
    """`x [n, C, H, W]` uint8 or float32 in [0, 1], `y [n]`; the model is in eval mode and on `device`.

    Raises `NonFinite` where a logit is NaN or infinite, `ValueError` for no examples.
    """
    if not len(y):
        raise ValueError("nothing to evaluate: no examples")
    looks = [_look(model, unit_interval(x[part], device), y[part].to(device)) for part in _batches(len(y), batch_size)]
    correct, top5, losses = (torch.cat([look[i] for look in looks]) for i in range(3))
    return CleanReport(
        float(correct.double().mean()), float(losses.mean()), float(top5.double().mean()), correct, losses
    )


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
) -> AttackReport:
    """Run `ATTACKS[attack]` with `params` on `x [n, C, H, W]` (uint8, or float32 in [0, 1]), batch by batch.

    `model` is the network with its head already scaled, in eval mode and on `device`; `scale` tells the attack s.
    The last three options speed up the attack's gradients (`prepare`); its examples are judged by `model` itself.
    `on_progress(done, total)` counts steps over all batches. Raises `ValueError` for parameters that make no sense
    (an observer needs float32 features), `NonFinite` where a logit is NaN or infinite.
    """
    if attack not in ATTACKS:
        raise ValueError(f"unknown attack {attack!r}; there are {', '.join(ATTACKS)}")
    if observer_factory is not None and precision != "float32":
        raise ValueError("a trajectory needs the float32 features: record it with precision float32")
    if not len(y):
        raise ValueError("nothing to evaluate: no examples")
    probe = unit_interval(x[:2], device)
    climbed = prepare(
        model, precision=precision, channels_last=channels_last, fold_batch_norm=fold_batch_norm, probe=probe
    )
    parts = _batches(len(y), batch_size)
    batches: list[dict[str, Tensor]] = []
    gradient_calls = forward_calls = 0
    for number, part in enumerate(parts):
        x_0, y_0, index_0 = unit_interval(x[part], device), y[part].to(device), index[part]
        output = ATTACKS[attack](
            climbed,
            x_0,
            y_0,
            index=index_0,
            attack_seed=attack_seed,
            observer=None if observer_factory is None else observer_factory(x_0, y_0, index_0),
            on_progress=_of_all(on_progress, number, len(parts)),
            **{"scale": scale, **params},
        )
        batches.append(_judge(model, x_0, y_0, output))
        gradient_calls, forward_calls = gradient_calls + output.gradient_calls, forward_calls + output.forward_calls
    seen = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    numbers = _numbers(seen, norm=output.norm, eps=output.eps)
    numbers |= {"gradient_calls": gradient_calls, "forward_calls": forward_calls}
    return AttackReport(numbers, {name: seen[name] for name in BITS if name in seen})


BITS = ("clean_correct", "robust", "robust_any_iterate", "zero_gradient")


def masking(
    robust_at_s: Tensor,
    robust_at_1: Tensor,
    clean_correct: Tensor,
    margin_twin: Tensor | None = None,
    clean_correct_at_1: Tensor | None = None,
) -> dict[str, float | None]:
    """How much of a robust accuracy at scale s the attack owes to its own failure (SCIENCE.md section 3).

    All arguments are bits `[n]` bool of the same examples: robust at s, robust at s = 1, clean-correct, and robust at
    s = 1 under the attack's twin with the `margin` loss. Where the bias is not scaled, `clean_correct_at_1` says what
    was right at s = 1: the attack broke nothing else there. `masked_fraction` is the share of all examples that are
    clean-correct, robust at s, and broken at s = 1 by either; `reverse_fraction` the share broken at s and robust at 1.

    >>> bits = torch.tensor([True, True, False, False])
    >>> masking(bits, torch.tensor([True, False, False, True]), torch.tensor([True, True, True, True]))
    {'masked_fraction': 0.25, 'masked_fraction_of_correct': 0.25, 'reverse_fraction': 0.25}
    """
    n, n_correct = len(clean_correct), int(clean_correct.sum())
    breakable = ~robust_at_1 if clean_correct_at_1 is None else clean_correct_at_1 & ~robust_at_1
    breakable = breakable if margin_twin is None else breakable | ~margin_twin
    masked = int((clean_correct & robust_at_s & breakable).sum())
    reverse = int((clean_correct & ~robust_at_s & robust_at_1).sum())
    return {
        "masked_fraction": _share(masked, n),
        "masked_fraction_of_correct": _share(masked, n_correct),
        "reverse_fraction": _share(reverse, n),
    }


def unit_interval(x: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Images as float32 in [0, 1] on the device: bytes become `to_unit`, float32 is taken as it is."""
    return to_unit(x.to(device)) if x.dtype == torch.uint8 else x.to(device)


def log1p_loss(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy `log(1 + sum_{j != y} exp(z_j - z_y))` `[n]` of `logits [n, k]`, precise also where it is tiny."""
    gap = torch.logsumexp(logits.scatter(1, y[:, None], -torch.inf), 1) - logits.gather(1, y[:, None]).squeeze(1)
    return torch.logaddexp(gap, torch.zeros_like(gap))


@torch.no_grad()
def _look(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """correct [n], among the five highest [n], loss [n] float64; on the CPU."""
    try:
        phi, logits = features_and_logits(model, x)
    except NoLinearHead:  # nothing but the logits to start from
        logits = model(x)
        precise = logits.double()
    else:
        head = linear_head(model)
        precise = functional.linear(
            phi.double(), head.weight.double(), None if head.bias is None else head.bias.double()
        )
    if not bool(torch.isfinite(logits).all()):
        raise NonFinite("a logit is NaN or infinite; check the weights and the scale")
    top5 = (logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]).any(1)
    return (logits.argmax(1) == y).cpu(), top5.cpu(), log1p_loss(precise, y).cpu()


def _judge(model: nn.Module, x: Tensor, y: Tensor, output: AttackOutput) -> dict[str, Tensor]:
    """Per-example outcomes of one batch, on the CPU, by the plain network."""
    clean_correct, clean_top5, clean_loss = _look(model, x, y)
    correct, top5, loss = _look(model, output.x_adv, y)
    robust = clean_correct & correct
    delta = output.x_adv.double() - x.double()
    seen = {
        "clean_correct": clean_correct,
        "clean_loss": clean_loss,
        "robust": robust,
        "robust_any_iterate": robust & ~output.broken_any_iterate.cpu(),
        "robust_top5": clean_top5 & top5,
        "loss": loss,
        "linf": geometry("linf").size(delta).cpu(),
        "l2": geometry("l2").size(delta).cpu(),
        "outside_box": ((output.x_adv < 0) | (output.x_adv > 1)).flatten(1).any(1).cpu(),
    }
    if output.zero_gradient is not None:
        seen["zero_gradient"] = output.zero_gradient.cpu()
    return seen


def _numbers(seen: Mapping[str, Tensor], *, norm: str, eps: float | None) -> Numbers:
    n, correct = len(seen["robust"]), seen["clean_correct"]
    n_correct = int(correct.sum())
    zero = seen.get("zero_gradient")
    rise = seen["loss"] - seen["clean_loss"]
    return {
        "n": n,
        "n_clean_correct": n_correct,
        "clean_accuracy": mean(correct),
        "clean_loss": mean(seen["clean_loss"]),
        "robust_accuracy": mean(seen["robust"]),
        "robust_accuracy_of_correct": mean(seen["robust"][correct]),
        "robust_accuracy_any_iterate": mean(seen["robust_any_iterate"]),
        "robust_top5_accuracy": mean(seen["robust_top5"]),
        "robust_loss": mean(seen["loss"]),
        "flip_rate": _share(int((correct & ~seen["robust"]).sum()), n_correct),
        "zero_gradient_fraction": None if zero is None else mean(zero[correct]),
        "zero_gradient_fraction_of_all": None if zero is None else mean(zero),
        "max_perturbation_linf": float(seen["linf"].max()),
        "max_perturbation_l2": float(seen["l2"].max()),
        "outside_ball": None if eps is None else int((seen[norm] > ball_limit(norm, eps)).sum()),
        "outside_box": int(seen["outside_box"].sum()),
        **summary(rise, "loss_increase"),
        **summary(rise[correct], "loss_increase_clean_correct"),
    }


def ball_limit(norm: str, eps: float) -> float:
    """The size from which on an example counts as outside the ball, in float64 (SCIENCE.md section 8)."""
    return eps + 1e-6 if norm == "linf" else eps * (1 + 1e-5) + 1e-6


def _batches(n: int, batch_size: int) -> list[slice]:
    return [slice(i, i + batch_size) for i in range(0, n, batch_size)]


def _share(count: int, n: int) -> float | None:
    return count / n if n else None


def _of_all(on_progress: OnProgress | None, number: int, batches: int) -> OnProgress | None:
    if on_progress is None:
        return None
    return lambda step, steps: on_progress(number * steps + step, batches * steps)
