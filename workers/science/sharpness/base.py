"""The seam that every sharpness measure fills."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

from workers.science.summaries import Numbers

Curves = dict[str, list[float | int | str | None]]
OnProgress = Callable[[int, int], None]
"""`on_progress(done, total)`, called after every unit of work; what it raises ends the measure."""


@dataclass(frozen=True)
class MeasureInput:
    """The images that a measure may look at, in the order of the fixed permutation and on the network's device.

    train_x, test_x  [n, C, H, W] float32 in [0, 1]; training images without augmentation
    train_y, test_y  [n] int64 true labels
    seed             the source of all randomness of the measure
    batch_size       how many images go through the network at once; it bounds memory and, up to rounding, changes no
                     number
    on_progress      called after every unit of work, if there is one
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    seed: int = 0
    batch_size: int = 256
    on_progress: OnProgress | None = None

    def train(self, images: int) -> tuple[Tensor, Tensor]:
        """The first `images` of the training split, `x` and `y`. Raises `ValueError` if there is none."""
        return _first(self.train_x, self.train_y, images)

    def test(self, images: int) -> tuple[Tensor, Tensor]:
        """The first `images` of the test split, `x` and `y`. Raises `ValueError` if there is none."""
        return _first(self.test_x, self.test_y, images)

    def generator(self) -> torch.Generator:
        """A new generator on the CPU, at the start of the stream of `seed`."""
        return torch.Generator().manual_seed(self.seed)

    def report(self, done: int, total: int) -> None:
        """Call `on_progress`, if there is one."""
        if self.on_progress is not None:
            self.on_progress(done, total)


@dataclass(frozen=True)
class MeasureReport:
    """`numbers` by name, null if undefined; `curves` by name, lists that may be plotted against each other."""

    numbers: Numbers
    curves: Curves = field(default_factory=dict)


class Measure(Protocol):
    """A measure of `model`, a network in eval mode with its head already scaled. It leaves the network as it was.

    It looks at the split that its definition names, and at no more than the first `images` of it. Keywords are the
    measure's own parameters, each with a default.
    Raises `NonFinite` for NaN or infinities, `NoLinearHead` if the measure needs one, `ValueError` for bad values.
    """

    def __call__(self, model: nn.Module, inputs: MeasureInput) -> MeasureReport:
        """The numbers of one network."""


def _first(x: Tensor, y: Tensor, images: int) -> tuple[Tensor, Tensor]:
    if images < 1 or not len(y):
        raise ValueError("a measure needs at least one image")
    return x[:images], y[:images]
