"""What happens along an attack's path: sharpness, loss and distance per iterate (README.md, "Trajectory").

`Recorder` watches the forward passes that the attack does anyway; `analyse` turns them into numbers and curves.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from workers.science.closed_forms import Head, Softmax
from workers.science.cross_entropy import log_odds, loss_increase, softplus
from workers.science.errors import NonFinite, WrongShape
from workers.science.summaries import QUANTILES, Numbers, label_of, merged, quantile, row_summaries, share, summary

Curves = dict[str, list[float | int | None]]
# `service/specs/numbers/base.py` names numbers by these: `tests/contract/test_numbers.py` compares them.
THRESHOLDS = ("e001", "e01", "log2", "logk")
VALLEY_RATIO = 10.0
ROUNDING = 1e-5
"""Of a pixel: Carlini and Wagner's way through tanh and back changes one by 1e-6."""


@dataclass(frozen=True)
class Trajectory:
    """The iterates t = 0..T of n examples: `[T + 1, n]` on the CPU, float64 unless said otherwise.

    log_odds               logsumexp_{j != y} z_j - z_y
    loss                   cross-entropy, log(1 + exp log_odds)
    log_rest               log(1 - p_top), p_top being the confidence
    predicted              int64, by the float32 logits
    log_softmax_trace      log Tr S(p)
    log_feature_norm       log ||phi||; -inf for phi = 0
    log_relative_flatness
    linf, l2               distance from the clean image, units of [0, 1], l2 over C x H x W
    feature_moved          ||phi(x_t) - phi(x)||, x being iterate 0 (the clean image unless the attack starts at random)
    y, index `[n]` int64: label and place in the data set. phi_0 `[n, m]` float32: features of iterate 0.
    log_weight_norm: log ||W||_F of the head as attacked; classes: k.
    Examples with NaN or infinities on their way are not among the n.
    """

    y: Tensor
    index: Tensor
    log_odds: Tensor
    loss: Tensor
    log_rest: Tensor
    predicted: Tensor
    log_softmax_trace: Tensor
    log_feature_norm: Tensor
    log_relative_flatness: Tensor
    linf: Tensor
    l2: Tensor
    feature_moved: Tensor
    phi_0: Tensor
    log_weight_norm: float
    classes: int

    @property
    def log_hessian_trace(self) -> Tensor:
        """`log Tr H [T + 1, n]`, of the Hessian with respect to the head's weight."""
        return self.log_softmax_trace + 2 * self.log_feature_norm

    @property
    def log_relative_sharpness(self) -> Tensor:
        """`log (||W||_F^2 Tr H) [T + 1, n]`."""
        return self.log_hessian_trace + 2 * self.log_weight_norm

    @property
    def confidence(self) -> Tensor:
        """`p_top [T + 1, n]`."""
        return -torch.expm1(self.log_rest)

    @property
    def clean_correct(self) -> Tensor:
        """`[n]` bool: iterate 0 is classified as y."""
        return self.predicted[0] == self.y

    @property
    def starts_at_image(self) -> bool:
        """Iterate 0 is the clean image, up to rounding: not so for a random start, as of Auto-PGD.

        Only then do distances from the image go with changes since iterate 0.
        """
        return bool((self.linf[0] <= ROUNDING).all())

    @property
    def moved(self) -> Tensor:
        """`[n]` bool: some iterate differs from the clean image."""
        return (self.linf > 0).any(0)

    def tensors(self) -> dict[str, Tensor]:
        """Every stored array by name, for an artifact."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


class Recorder:
    """Watches an attack on a network with head `weight [k, m]`, `bias [k]`, scale applied.

    `recorder(x, y, index)` is the observer of one batch (an attack's `ObserverFactory`), `recorder.trajectory()` all
    batches so far, in order. Watching waits for no device: only `trajectory` looks for NaN, and leaves it out.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.head = Head(weight, bias)
        self._batches: list[_Batch] = []

    def __call__(self, x: Tensor, y: Tensor, index: Tensor) -> "_Batch":
        """The observer of `x [n, C, H, W]`, `y [n]`, `index [n]`."""
        self._batches.append(_Batch(self.head, x.detach(), y, index))
        return self._batches[-1]

    def trajectory(self, non_finite: Tensor | None = None) -> Trajectory:
        """Of all examples but those with NaN or infinite features or logits, and those that `non_finite [n]` names.

        Raises `WrongShape` for no steps or unequal numbers of them, `NonFinite` if no example is left.
        """
        lengths = {len(batch.rows) for batch in self._batches}
        if len(lengths) != 1 or 0 in lengths:
            raise WrongShape(f"no trajectory: the batches have {sorted(lengths) or 'no'} iterates")
        columns = [torch.cat([batch.column(i) for batch in self._batches], 1).cpu() for i in range(len(_Batch.COLUMNS))]
        by_name = dict(zip(_Batch.COLUMNS, columns, strict=True))
        kept = (torch.isfinite(by_name["loss"]) & torch.isfinite(by_name["feature_moved"])).all(0)
        kept = kept if non_finite is None else kept & ~non_finite.cpu()
        if not bool(kept.any()):
            raise NonFinite.of("a feature or a logit along the attack's path", ~kept)
        return Trajectory(
            y=torch.cat([batch.y for batch in self._batches]).cpu()[kept],
            index=torch.cat([batch.index for batch in self._batches]).cpu()[kept],
            phi_0=torch.cat([batch.phi_0 for batch in self._batches]).cpu()[kept],
            log_weight_norm=self.head.log_norm,
            classes=len(self.head.weight),
            **{name: column[:, kept] for name, column in by_name.items()},
        )


class _Batch:
    """The observer of one batch; `rows[t]` are the `COLUMNS` of iterate t, `[n]` each, on the attack's device."""

    COLUMNS = (
        "log_odds",
        "loss",
        "log_rest",
        "predicted",
        "log_softmax_trace",
        "log_feature_norm",
        "log_relative_flatness",
        "linf",
        "l2",
        "feature_moved",
    )

    def __init__(self, head: Head, x: Tensor, y: Tensor, index: Tensor) -> None:
        self.head, self.x, self.y, self.index = head, x, y, index
        self.rows: list[tuple[Tensor, ...]] = []

    @torch.no_grad()
    def __call__(self, t: int, x_t: Tensor, phi: Tensor, logits: Tensor, /) -> None:
        if t != len(self.rows):
            raise WrongShape(f"iterate {t} came after {len(self.rows)} others")
        if t == 0:
            self.phi_0 = phi.clone()
        precise = self.head.logits(phi)
        softmax, odds = Softmax.of(precise), log_odds(precise, self.y)
        norm = torch.linalg.vector_norm(phi, dim=1, dtype=torch.float64).log()
        delta = (x_t - self.x).flatten(1)
        self.rows.append(
            (
                odds,
                softplus(odds),
                softmax.log_rest,
                logits.argmax(1),
                softmax.log_trace,
                norm,
                softmax.log_weighted_spread(self.head) + 2 * norm,
                delta.abs().amax(1).double(),  # 10x faster than vector_norm(ord=inf) on a CPU
                torch.linalg.vector_norm(delta, dim=1, dtype=torch.float64),
                torch.linalg.vector_norm(phi.double() - self.phi_0.double(), dim=1),
            )
        )

    def column(self, i: int) -> Tensor:
        return torch.stack([row[i] for row in self.rows])


def analyse(trajectory: Trajectory, norm: Literal["linf", "l2"]) -> tuple[Numbers, Curves]:
    """Valley, basin width, take-off, loss increase and flips as README.md, "Trajectory" has them, and curves per step.

    No basin width for a path that does not start at the clean image.

    Curves: `{quantity}_{q05 | q25 | median | q75 | q95 | mean | log_mean}` `[T + 1]` over all examples, with the suffix
    `_clean_correct` over those, and `aligned_...` over the flipping clean-correct ones at `aligned_offset` steps from
    their first flip, `aligned_n` of them. Shares of nothing are null.
    """
    moved_correct = trajectory.clean_correct & trajectory.moved
    numbers: Numbers = {
        "trajectory_n": len(trajectory.y),
        "trajectory_n_clean_correct": _count(trajectory.clean_correct),
    }
    widths = basin_widths(trajectory, norm) if trajectory.starts_at_image else {}
    take_offs, increase = _take_off_numbers(trajectory.loss[:, moved_correct]), _loss_increase(trajectory)
    return merged(numbers, valleys(trajectory), widths, take_offs, increase), curves(trajectory)


def first_flip(trajectory: Trajectory) -> Tensor:
    """`[n]` int64: the first iterate of a clean-correct example that is classified as another class; else -1."""
    wrong = trajectory.predicted != trajectory.y
    flips = trajectory.clean_correct & wrong.any(0)
    return torch.where(flips, _first_true(wrong), torch.full_like(trajectory.y, -1))


def valleys(trajectory: Trajectory) -> Numbers:
    """Uncanny valley statistics of relative sharpness, of `Tr S(p)` alone and of `||phi||^2` alone.

    `valley_{quantity}` and `peak_at_start_{quantity}` are shares of the `valley_n` clean-correct examples that flip and
    moved, `valley_loose_{quantity}` of all. The peak is the first largest value. The ratio 10 of the criterion is
    passed more easily the larger the scale.
    """
    population = (first_flip(trajectory) >= 0) & trajectory.moved
    numbers: Numbers = {"valley_n": _count(population)}
    for name, log_v in (
        ("relative_sharpness", trajectory.log_relative_sharpness),
        ("softmax_trace", trajectory.log_softmax_trace),
        ("feature_norm_squared", 2 * trajectory.log_feature_norm),
    ):
        t_peak, valley, loose = valley_bits(log_v, trajectory.loss)
        numbers[f"valley_{name}"] = share(valley, population)
        numbers[f"valley_loose_{name}"] = share(loose, torch.ones_like(population))
        numbers[f"peak_at_start_{name}"] = share(t_peak == 0, population)
    return numbers


def valley_bits(log_v: Tensor, loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`t_peak`, `valley` and `valley_loose` `[n]` of `log_v` and `loss` `[T + 1, n]`, of any examples.

    >>> log_v = torch.log(torch.tensor([[1.0], [100.0], [2.0]]))
    >>> [t.item() for t in valley_bits(log_v, torch.tensor([[0.1], [0.7], [3.0]]))]
    [1, True, True]
    """
    last, jump = len(log_v) - 1, math.log(VALLEY_RATIO)
    peak = log_v.amax(0)
    t_peak = _first_true(log_v == peak)
    loss_at_peak = loss.gather(0, t_peak[None])[0]
    falls, before_end = log_v[-1] <= peak - jump, t_peak < last
    valley = (t_peak > 0) & before_end & (peak >= log_v[0] + jump) & falls & (loss[-1] > loss_at_peak)
    return t_peak, valley, before_end & (log_v[-1] < peak - jump)


def basin_widths(trajectory: Trajectory, norm: Literal["linf", "l2"]) -> Numbers:
    """How far the attack goes until the loss has grown by more than 0.01, 0.1, log 2, log k.

    Clean-correct examples that moved (`basin_n`; `basin_n_blind` did not and are left out). Per threshold `e001, e01,
    log2, logk`: `basin_width_{e}_{q}` in the attack's norm, `basin_width_l2_{e}_{q}`, `basin_steps_{e}_{q}`, and
    `basin_censored_fraction_{e}`, the share that never gets there and counts as +inf: a quantile there is null.
    """
    population = trajectory.clean_correct & trajectory.moved
    distance = {"linf": trajectory.linf, "l2": trajectory.l2}[norm][:, population]
    l2, loss = trajectory.l2[:, population], trajectory.loss[:, population]
    numbers: Numbers = {
        "basin_n": _count(population),
        "basin_n_blind": _count(trajectory.clean_correct & ~trajectory.moved),
    }
    for name, e in zip(THRESHOLDS, (0.01, 0.1, math.log(2), math.log(trajectory.classes)), strict=True):
        steps = reached(loss, e)
        censored = steps < 0
        at = steps.clamp(min=0)[None]
        for label, values in (
            ("width", distance.gather(0, at)[0]),
            ("width_l2", l2.gather(0, at)[0]),
            ("steps", steps.double()),
        ):
            values = values.masked_fill(censored, math.inf)
            for q in QUANTILES:
                numbers[f"basin_{label}_{name}_{label_of(q)}"] = quantile(values, q)
        numbers[f"basin_censored_fraction_{name}"] = share(censored, torch.ones_like(censored))
    return numbers


def reached(loss: Tensor, e: float) -> Tensor:
    """`[n]` int64: the first t with `loss_t - loss_0 > e`, for `loss [T + 1, n]`; -1 if there is none.

    >>> reached(torch.tensor([[0.0, 0.0], [0.5, 0.1], [0.2, 0.2]]), 0.2)
    tensor([ 1, -1])
    """
    over = loss - loss[0] > e
    return torch.where(over.any(0), _first_true(over), -1)


def take_off(loss: Tensor) -> Tensor:
    """`[n]` int64: t + 1 of the first largest `loss_{t+2} - 2 loss_{t+1} + loss_t`, -1 if that is not positive.

    >>> take_off(torch.tensor([[0.0, 0.0], [0.0, 2.0], [1.0, 3.0], [9.0, 3.5]]))
    tensor([ 2, -1])
    """
    if len(loss) < 3:
        return torch.full(loss.shape[1:], -1)
    bend = loss[2:] - 2 * loss[1:-1] + loss[:-2]
    largest = bend.amax(0)
    return torch.where(largest > 0, _first_true(bend == largest) + 1, -1)


def curves(trajectory: Trajectory) -> Curves:
    """The curves of `analyse`."""
    correct, flip = trajectory.clean_correct, first_flip(trajectory)
    last = len(trajectory.loss) - 1
    flipping = (flip >= 0).nonzero()[:, 0]
    offsets = list(range(-int(flip.max()), last - int(flip[flipping].min()) + 1)) if len(flipping) else []
    steps = flip[flipping] + torch.tensor(offsets, dtype=torch.int64)[:, None]  # [offsets, flipping]
    inside = (steps >= 0) & (steps <= last)
    out: Curves = {"step": list(range(last + 1))}
    wrong = (trajectory.predicted != trajectory.y).double().mean(1) if len(trajectory.y) else torch.zeros(last + 1)
    out["error_rate"] = wrong.tolist()
    out["aligned_offset"] = list(offsets)
    out["aligned_n"] = inside.sum(1).tolist()
    for name, log, values in _quantities(trajectory):
        of_all = row_summaries(values, name, log=log)
        of_correct = row_summaries(values[:, correct], name, log=log)
        aligned = values[:, flipping].gather(0, steps.clamp(0, last)) if offsets else values[:0]
        rows = [summary(row[mask], f"aligned_{name}", log=log) for row, mask in zip(aligned, inside, strict=True)]
        keys = summary(values.new_zeros(0), f"aligned_{name}", log=log)
        out = merged(
            out,
            of_all,
            {f"{key}_clean_correct": curve for key, curve in of_correct.items()},
            {key: [row[key] for row in rows] for key in keys},
        )
    return out


def _quantities(trajectory: Trajectory) -> list[tuple[str, bool, Tensor]]:
    return [
        ("loss", False, trajectory.loss),
        ("confidence", False, trajectory.confidence),
        ("log_rest", True, trajectory.log_rest),
        ("log_softmax_trace", True, trajectory.log_softmax_trace),
        ("log_hessian_trace", True, trajectory.log_hessian_trace),
        ("log_relative_sharpness", True, trajectory.log_relative_sharpness),
        ("log_relative_flatness", True, trajectory.log_relative_flatness),
        ("log_feature_norm", True, trajectory.log_feature_norm),
        ("linf", False, trajectory.linf),
        ("l2", False, trajectory.l2),
    ]


def _take_off_numbers(loss: Tensor) -> Numbers:
    """Over the clean-correct examples that moved: `take_off_{q}` of those that have one, how many have none."""
    steps = take_off(loss)
    have = steps[steps >= 0]
    numbers: Numbers = {f"take_off_{label_of(q)}": quantile(have, q) for q in QUANTILES}
    return merged(numbers, {"take_off_n": len(have), "take_off_n_none": len(steps) - len(have)})


def _loss_increase(trajectory: Trajectory) -> Numbers:
    """`loss_T - loss_0`, and the share of clean-correct examples that end in, or pass through, another class.

    All are about iterates 0 and T of restart 0, hence `trajectory_`: the attack's own `loss_increase` and `flip_rate`
    compare the clean image with the judged example. `trajectory_still_rising_fraction`, of those whose loss still
    rises at the last step, is a diagnostic: true of most on honest networks.
    """
    odds, correct = trajectory.log_odds, trajectory.clean_correct
    increase = loss_increase(odds[0], odds[-1])
    of_correct = summary(increase[correct], "trajectory_loss_increase")
    rising = share(odds[-1] > odds[-2], correct) if len(odds) > 1 else None
    return merged(
        summary(increase, "trajectory_loss_increase"),
        {f"{name}_clean_correct": value for name, value in of_correct.items()},
        {
            "trajectory_flip_rate": share(trajectory.predicted[-1] != trajectory.y, correct),
            "trajectory_flip_rate_any_iterate": share(first_flip(trajectory) >= 0, correct),
            "trajectory_still_rising_fraction": rising,
        },
    )


def _first_true(mask: Tensor) -> Tensor:
    """`[n]` int64: the first true row of `mask [r, n]`, 0 if there is none."""
    return torch.from_numpy(mask.numpy().argmax(0))


def _count(mask: Tensor) -> int:
    return int(mask.sum())
