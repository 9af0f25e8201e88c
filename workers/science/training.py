"""Training: the one loop of all recipes (SCIENCE.md section 4).

The data set lies on the device as one tensor of bytes; order, augmentation and the recipe draw from one generator.
Measured: `standard` on `digits`, seeds 0 to 3, one thread of a server CPU, torch 2.15: simple_cnn, 10 epochs, 98.6 to
99.0 % in 2 s; mlp, 30 epochs, batch 64, 96.6 to 97.6 % in 1 s.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from workers.science.augmentation import Augmentation, augment, default_augmentation
from workers.science.datasets import ImageData, sample_indices, to_unit
from workers.science.errors import Diverged, NonFinite, ScienceError, WrongState
from workers.science.recipes import RECIPES
from workers.science.seeding import deterministic
from workers.science.seeding import generator as seeded_generator
from workers.science.weights import load_state, load_weights, save_state, save_weights, weights_to_bytes

Precision = Literal["float32", "tf32", "bf16"]
Schedule = Literal["cosine", "constant"]
STEP_REPORT_SECONDS = 0.5


@dataclass(frozen=True)
class StepReport:
    """Progress within an epoch: `step` of `steps` is done, its batch had this loss. Epochs and steps count from 1."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    images_per_second: float


@dataclass(frozen=True)
class EpochReport:
    """An epoch that is done: means over its (augmented, or attacked) training images, and its learning rate."""

    epoch: int
    epochs: int
    lr: float
    loss: float
    accuracy: float
    images_per_second: float
    seconds: float


@dataclass(frozen=True)
class TrainReport:
    """A training that is done. Test numbers are of all test images, in eval mode; top-5 only where k > 5.

    `seconds` are those of all epochs, those before a resume included.
    """

    epochs: tuple[EpochReport, ...]
    train_samples: int
    clean_accuracy: float
    clean_loss: float
    top5_accuracy: float | None
    seconds: float


State = dict[str, Any]
"""All that a training needs to go on: weights, optimiser, generator, epoch, reports. Dicts, numbers and tensors."""


def train(
    model: nn.Module,
    data: ImageData,
    *,
    recipe: str = "standard",
    epochs: int = 100,
    batch_size: int = 128,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    schedule: Schedule = "cosine",
    augmentation: Augmentation | None = None,
    recipe_params: Mapping[str, float] | None = None,
    train_samples: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    precision: Precision = "float32",
    channels_last: bool = False,
    compile: bool = False,
    resume: State | None = None,
    on_epoch: Callable[[EpochReport, Callable[[], State]], None] | None = None,
    on_step: Callable[[StepReport], None] | None = None,
) -> TrainReport:
    """Train `model` in place by SGD; it ends in eval mode, on `device`, with the weights of the last epoch.

    recipe, recipe_params  a name of `RECIPES` and its parameters where they are not the defaults
    schedule       cosine: `lr (1 + cos(pi e / epochs)) / 2` in epoch e = 0, 1, ...; constant
    augmentation   None: what suits the data set (`default_augmentation`)
    train_samples  train on the first so many of the fixed permutation (`sample_indices`); None: on all
    seed           order, augmentation and the recipe's own randomness; the initialisation is `architectures.build`'s
    precision      float32, tf32 (matrix products and convolutions), bf16 (autocast; weights stay float32)
    resume         a state from `on_epoch`, saved and loaded by `save_state` and `load_state`; on the CPU the end is
                   bit-equal to that of an uninterrupted training
    on_epoch       called after every epoch with a function that makes the state; what it raises ends the training
    on_step        called at most about twice a second; what it raises ends the training

    A last batch of one image is left out: batch norm cannot take it. Raises `Diverged`, `WrongShape`, `WrongState`
    (`resume` is of another training; `model` may have some of its weights by then), `ScienceError` for batches of one
    image, `KeyError` and `TypeError` for unknown recipes and parameters.
    """
    how = RECIPES[recipe]
    unknown = set(recipe_params or {}) - set(how.params)
    if unknown:
        raise TypeError(f"recipe {recipe} has no parameter {', '.join(sorted(unknown))}")
    params = {**how.params, **(recipe_params or {})}
    augmentation = default_augmentation(data.name) if augmentation is None else augmentation
    device = torch.device(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    forward: nn.Module = torch.compile(model) if compile else model  # type: ignore[assignment]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    generator = seeded_generator(seed, device, stream="training")
    chosen = torch.from_numpy(sample_indices(len(data.train_y), train_samples or len(data.train_y)))
    train_x, train_y = data.train_x[chosen].to(device), data.train_y[chosen].to(device)

    if min(len(chosen), batch_size) < 2:
        raise ScienceError("a batch needs at least 2 images: raise batch_size or train_samples")

    settings = {
        "data": data.name,
        "train_samples": len(chosen),
        "recipe": recipe,
        "recipe_params": params,
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "augmentation": asdict(augmentation),
        "seed": seed,
        "precision": precision,
    }
    reports: list[EpochReport] = []
    if resume is not None:
        reports = _restore(resume, settings, model, optimizer, generator)

    with deterministic(device, tf32=precision == "tf32"):
        for epoch in range(len(reports), epochs):
            epoch_lr = lr * (1 + math.cos(math.pi * epoch / epochs)) / 2 if schedule == "cosine" else lr
            for group in optimizer.param_groups:
                group["lr"] = epoch_lr
            forward.train()
            order = torch.randperm(len(train_y), generator=generator, device=device)
            batches = [batch for batch in torch.split(order, batch_size) if len(batch) > 1]
            watch = _Watch(epoch + 1, epochs, len(batches), on_step, reports[-1].loss if reports else math.nan)
            for batch in batches:
                x = to_unit(augment(train_x[batch], augmentation, generator)).contiguous(memory_format=layout)
                y = train_y[batch]

                def loss_of_batch(x: Tensor = x, y: Tensor = y) -> tuple[Tensor, Tensor]:
                    with _autocast(device, precision):
                        return how.loss(forward, x, y, generator, **params)

                optimizer.zero_grad()
                loss, logits = how.backward(model, loss_of_batch, **params)
                optimizer.step()
                watch.after_step(loss.detach(), logits.detach(), y)
            reports.append(watch.after_epoch(epoch_lr))
            _require_finite_weights(model, reports[-1])
            if on_epoch is not None:
                on_epoch(reports[-1], lambda: _state(settings, model, optimizer, generator, reports))
    with deterministic(device):  # no TF32: what is reported is measured in float32, however it was trained
        try:
            clean = evaluate_test_set(model, data, device=device)
        except NonFinite as error:  # the last step left weights that are finite, but so large that logits are not
            raise Diverged(
                f"the network gave NaN or infinite logits after epoch {epochs} of {epochs}; the last finite loss was "
                f"{reports[-1].loss:.6g}: choose a smaller learning rate"
            ) from error
    return TrainReport(
        epochs=tuple(reports), train_samples=len(chosen), seconds=sum(report.seconds for report in reports), **clean
    )


class _Watch:
    """Losses and hits of one epoch. They stay on the device, so that a GPU is not made to wait at every step."""

    def __init__(
        self, epoch: int, epochs: int, steps: int, on_step: Callable[[StepReport], None] | None, last_finite: float
    ) -> None:
        self.epoch, self.epochs, self.steps, self.on_step = epoch, epochs, steps, on_step
        self.last_finite = last_finite
        self.losses: list[Tensor] = []
        self.hits: list[Tensor] = []
        self.sizes: list[int] = []
        self.started = self.looked = time.perf_counter()

    def after_step(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        self.losses.append(loss)
        self.hits.append((logits.argmax(1) == y).sum())
        self.sizes.append(len(y))
        now = time.perf_counter()
        if now - self.looked >= STEP_REPORT_SECONDS:
            self.require_finite()
            self.looked = now
            if self.on_step is not None:
                rate = sum(self.sizes) / (now - self.started)
                step = len(self.losses)
                self.on_step(StepReport(self.epoch, self.epochs, step, self.steps, float(loss), rate))

    def after_epoch(self, lr: float) -> EpochReport:
        self.require_finite()
        images = sum(self.sizes)
        loss = sum(x * n for x, n in zip(torch.stack(self.losses).tolist(), self.sizes, strict=True)) / images
        accuracy = int(torch.stack(self.hits).sum()) / images
        seconds = time.perf_counter() - self.started
        return EpochReport(self.epoch, self.epochs, lr, loss, accuracy, images / seconds, seconds)

    def require_finite(self) -> None:
        for step, loss in enumerate(torch.stack(self.losses).tolist(), start=1):
            if not math.isfinite(loss):
                raise Diverged(
                    f"the loss became {loss} in epoch {self.epoch} of {self.epochs}, step {step} of {self.steps}; the "
                    f"last finite loss was {self.last_finite:.6g}: choose a smaller learning rate"
                )
            self.last_finite = loss


def _autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def _require_finite_weights(model: nn.Module, report: EpochReport) -> None:
    """The last step of an epoch may have ruined the weights without any loss that shows it."""
    if not all(bool(torch.isfinite(value).all()) for value in model.state_dict().values()):
        raise Diverged(
            f"weights became NaN or infinite in epoch {report.epoch} of {report.epochs}; the last finite loss was "
            f"{report.loss:.6g}: choose a smaller learning rate"
        )


def _state(
    settings: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    reports: list[EpochReport],
) -> State:
    """A copy on the CPU, which later steps do not touch."""
    live = {"model": dict(model.state_dict()), "optimizer": optimizer.state_dict(), "generator": generator.get_state()}
    state: State = {"settings": settings, "reports": [asdict(report) for report in reports], **_copy(live)}
    return state


def _copy(value: Any) -> Any:
    match value:
        case Tensor():
            return value.detach().to("cpu", copy=True)
        case dict():
            return {key: _copy(entry) for key, entry in value.items()}
        case list():
            return [_copy(entry) for entry in value]
        case _:
            return value


def _restore(
    state: State,
    settings: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> list[EpochReport]:
    """The reports of the epochs before. Raises `WrongState`."""
    try:
        changed = [name for name in settings if state["settings"].get(name) != settings[name]]
        if changed:
            raise WrongState(f"the saved state is of another training ({', '.join(changed)} differ): start anew")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        return [EpochReport(**report) for report in state["reports"]]
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:  # whatever torch makes of it
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise WrongState(f"the saved state does not fit this training ({why}): start anew") from error


@torch.no_grad()
def evaluate_test_set(
    model: nn.Module, data: ImageData, *, device: torch.device | str = "cpu", batch_size: int = 512
) -> dict[str, Any]:
    """`clean_accuracy`, `clean_loss` (mean, float64 from the float32 logits), `top5_accuracy` on all test images.

    Leaves the network in eval mode. Raises `NonFinite` where a logit is NaN or infinite.
    """
    model.eval()
    hits = top5 = 0
    loss = 0.0
    for x, y in zip(torch.split(data.test_x, batch_size), torch.split(data.test_y, batch_size), strict=True):
        y = y.to(device)
        logits = model(to_unit(x.to(device)))
        if not bool(torch.isfinite(logits).all()):
            raise NonFinite("the trained network gives NaN or infinite logits: choose a smaller learning rate")
        hits += int((logits.argmax(1) == y).sum())
        top5 += int((logits.topk(min(5, data.n_classes)).indices == y[:, None]).sum())
        loss += float(cross_entropy(logits.double(), y, reduction="sum"))
    n = len(data.test_y)
    return {
        "clean_accuracy": hits / n,
        "clean_loss": loss / n,
        "top5_accuracy": top5 / n if data.n_classes > 5 else None,
    }


__all__ = [
    "Augmentation",
    "EpochReport",
    "StepReport",
    "TrainReport",
    "default_augmentation",
    "evaluate_test_set",
    "load_state",
    "load_weights",
    "save_state",
    "save_weights",
    "train",
    "weights_to_bytes",
]
