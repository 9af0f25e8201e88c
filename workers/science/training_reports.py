"""What a training reports: each step and each epoch while it runs, and the whole when it is done."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.science.errors import Diverged

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
    """An epoch that is done: means over its (augmented, or attacked) training images, and its learning rate.

    `held_out_robust_accuracy` if the best epoch is kept; `seconds` include the time of measuring it.
    """

    epoch: int
    epochs: int
    lr: float
    loss: float
    accuracy: float
    images_per_second: float
    seconds: float
    held_out_robust_accuracy: float | None = None


@dataclass(frozen=True)
class TrainReport:
    """A training that is done. Test numbers are of all test images, in eval mode, as `evaluate_clean` gives them.

    `train_samples` images went into each epoch, `dropped_samples` more would have made a last batch of one image.
    `kept_epoch` is the one whose weights the network has. `seconds` are those of all epochs, those before a resume
    included. `flags` are those of the steps (`seeding.flags`): test numbers are measured without TF32.
    """

    epochs: tuple[EpochReport, ...]
    train_samples: int
    dropped_samples: int
    kept_epoch: int
    clean_accuracy: float
    clean_loss: float
    top5_accuracy: float | None
    seconds: float
    flags: Mapping[str, bool | str]

    @property
    def kept(self) -> EpochReport:
        """The epoch whose weights the network has now."""
        return self.epochs[self.kept_epoch - 1]


class EpochWatch:
    """Losses and hits of one epoch. They stay on the device, so that a GPU is not made to wait at every step."""

    def __init__(
        self, epoch: int, epochs: int, steps: int, on_step: Callable[[StepReport], None] | None, last_finite: float
    ) -> None:
        self.epoch, self.epochs, self.steps, self.on_step = epoch, epochs, steps, on_step
        self.last_finite = last_finite
        self.losses: list[Tensor] = []
        self.hits: list[Tensor] = []
        self.sizes: list[int] = []
        self.started = self.reported_at = time.perf_counter()

    def after_step(self, loss: Tensor, logits: Tensor, y: Tensor) -> None:
        """Note the loss and the hits of a step, and report it if the last report is long ago. Raises `Diverged`."""
        self.losses.append(loss)
        self.hits.append((logits.argmax(1) == y).sum())
        self.sizes.append(len(y))
        now = time.perf_counter()
        if now - self.reported_at >= STEP_REPORT_SECONDS:
            self.require_finite()
            self.reported_at = now
            if self.on_step is not None:
                rate = sum(self.sizes) / (now - self.started)
                step = len(self.losses)
                self.on_step(StepReport(self.epoch, self.epochs, step, self.steps, float(loss), rate))

    def after_epoch(self, lr: float) -> EpochReport:
        """The report of all steps. Raises `Diverged`."""
        self.require_finite()
        images = sum(self.sizes)
        loss = sum(x * n for x, n in zip(torch.stack(self.losses).tolist(), self.sizes, strict=True)) / images
        accuracy = int(torch.stack(self.hits).sum()) / images
        seconds = time.perf_counter() - self.started
        return EpochReport(self.epoch, self.epochs, lr, loss, accuracy, images / seconds, seconds)

    def require_finite(self) -> None:
        """Raises `Diverged` if a loss so far is NaN or infinite. A GPU is waited for."""
        for step, loss in enumerate(torch.stack(self.losses).tolist(), start=1):
            if not math.isfinite(loss):
                raise Diverged(
                    f"the loss became {loss} in epoch {self.epoch} of {self.epochs}, step {step} of {self.steps}; the "
                    f"last finite loss was {self.last_finite:.6g}: choose a smaller learning rate"
                )
            self.last_finite = loss
