"""The seam that every sharpness measure fills."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from workers.science.summaries import Numbers

Curves = dict[str, list[float | int | str | None]]
OnProgress = Callable[[int, int], None]
"""`on_progress(done, total)`, called after every unit of work; what it raises ends the measure."""


@dataclass(frozen=True)
class MeasureReport:
    """`numbers` by name, null where there is none; `curves` by name, lists that may be plotted against each other."""

    numbers: Numbers
    curves: Curves = field(default_factory=dict)


class Measure(Protocol):
    """A measure of `model`, a network in eval mode with its head already scaled. It leaves the network as it was.

    `train_x, test_x [n, C, H, W]` float32 in [0, 1] (train without augmentation) and labels `[n]` int64, in the order
    of the fixed permutation and on the network's device; a measure looks at the split that its definition names, and
    at no more than its first `images`. All randomness comes from `seed`. `batch_size` bounds memory and, up to
    rounding, changes no number. Further keywords are the measure's own.
    Raises `NonFinite` for NaN or infinities, `NoLinearHead` where the measure needs one, `ValueError` for bad values.
    """

    def __call__(
        self,
        model: nn.Module,
        train_x: Tensor,
        train_y: Tensor,
        test_x: Tensor,
        test_y: Tensor,
        *,
        seed: int,
        batch_size: int,
        on_progress: OnProgress | None = None,
    ) -> MeasureReport:
        """The numbers of one network."""


def no_progress(_done: int, _total: int) -> None:
    """For a caller that does not watch."""


def first(x: Tensor, y: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """The first `images` of a split. Raises `ValueError` where there is nothing."""
    if images < 1 or not len(y):
        raise ValueError("a measure needs at least one image")
    return x[:images], y[:images]
