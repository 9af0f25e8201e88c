"""All closed forms of the penultimate layer, summarised over the test and train samples (README.md, "Sharpness")."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from workers.science.closed_forms import LOG_MEASURES, ClosedForms, log_dataset_top_eigenvalue
from workers.science.curvature import batches
from workers.science.errors import NoLinearHead, NonFinite
from workers.science.heads import features_and_logits, linear_head
from workers.science.sharpness.base import MeasureInput, MeasureReport
from workers.science.summaries import Numbers, finite, merged, quantile, summary


@torch.no_grad()
def closed_forms(
    model: nn.Module,
    inputs: MeasureInput,
    *,
    scale: float = 1.0,
) -> MeasureReport:
    """`{train_}{quantity}_{statistic}{_clean_correct}`: no prefix is the test split, no suffix all samples.

    Quantities: the six `LOG_MEASURES`, `log_softmax_trace`, `log_rest` (log(1 - confidence)) and `loss`; also
    `log_dataset_top_eigenvalue` (of the mean Hessian; null if it is exactly 0) with its `_iterations` and
    `_converged`, `feature_norm_min`, `feature_norm_q01`, `n`. Samples with NaN or infinite features or logits are left
    out and counted in `{train_}n_non_finite`; raises `NonFinite` if all are.
    `weight_norm` is ||W||_F of the head as it is, `weight_norm_unscaled` that divided by `scale`, the s which the
    model's head already carries; `log_weight_norm` is the logarithm of the first.
    """
    head = linear_head(model)
    weight_norm = head.weight.double().norm()
    norm, log_norm = torch.stack([weight_norm, weight_norm.log()]).tolist()
    numbers: Numbers = {
        "weight_norm": norm,
        "weight_norm_unscaled": norm / scale,
        "log_weight_norm": finite(log_norm),
    }
    splits = (("", inputs.test_x, inputs.test_y, 0), ("train_", inputs.train_x, inputs.train_y, len(inputs.test_x)))
    for prefix, x, y, done in splits:
        if len(x):
            split = _split(model, inputs, x, y, done)
            numbers = merged(numbers, {f"{prefix}{n}": v for n, v in _numbers(split, head, inputs.seed).items()})
    return MeasureReport(numbers)


@dataclass(frozen=True)
class _Split:
    """The finite samples of a split: features `phi [n, m]`, labels `y [n]`, and whether each is `correct [n]`."""

    phi: Tensor
    y: Tensor
    correct: Tensor
    n_non_finite: int


def _split(model: nn.Module, inputs: MeasureInput, x: Tensor, y: Tensor, done: int) -> _Split:
    """Of the images `x [n, C, H, W]`; `done` images went through the network before these."""
    features, correct, readable = [], [], []
    for xb, yb in batches(x, y, inputs.batch_size):
        phi, logits = features_and_logits(model, xb)
        if phi.ndim != 2:
            raise NoLinearHead(f"no linear head: its input has shape {tuple(phi.shape)}, one vector per image needed")
        features.append(phi)
        correct.append(logits.argmax(1) == yb)
        readable.append(torch.isfinite(phi).all(1) & torch.isfinite(logits).all(1))
        done += len(phi)
        inputs.report(done, len(inputs.train_x) + len(inputs.test_x))
    kept = torch.cat(readable)
    if not bool(kept.any()):
        raise NonFinite.of("a feature or a logit", ~kept)
    return _Split(torch.cat(features)[kept], y[kept], torch.cat(correct)[kept], int((~kept).sum()))


def _numbers(split: _Split, head: nn.Linear, seed: int) -> Numbers:
    """The numbers of a split without its prefix."""
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    forms = ClosedForms.of(split.phi, weight, bias)
    quantities = {name: getattr(forms, name) for name in (*LOG_MEASURES, "log_softmax_trace", "log_rest")}
    columns = [*quantities.values(), forms.log_feature_norm.exp(), forms.cross_entropy(split.y)]
    *logs, norms, loss = torch.stack(columns).cpu()  # a GPU is waited for once
    numbers: Numbers = {}
    for suffix, samples in (("", torch.ones_like(split.correct)), ("_clean_correct", split.correct)):
        chosen = samples.cpu()
        of_samples: Numbers = merged(
            {"n": int(chosen.sum()), "feature_norm_min": quantile(norms[chosen], 0.0)},
            {"feature_norm_q01": quantile(norms[chosen], 0.01)},
            *(summary(of[chosen], name, log=True) for name, of in zip(quantities, logs, strict=True)),
            summary(loss[chosen], "loss"),
        )
        if chosen.any():
            value, lanczos = log_dataset_top_eigenvalue(split.phi[samples], weight, bias, seed=seed)
            of_samples["log_dataset_top_eigenvalue"] = value if math.isfinite(value) else None
            of_samples["log_dataset_top_eigenvalue_iterations"] = lanczos.iterations
            of_samples["log_dataset_top_eigenvalue_converged"] = int(lanczos.converged)
        numbers = merged(numbers, {f"{name}{suffix}": value for name, value in of_samples.items()})
    return merged(numbers, {"n_non_finite": split.n_non_finite})
