"""What can go wrong in the science, each with a sentence that says what to do."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class ScienceError(Exception):
    """A computation cannot give a number. Running the same thing again would not help."""


class DatasetMissing(ScienceError):
    """The files of a data set are not there, and could not be downloaded."""


class DatasetCorrupt(ScienceError):
    """The files of a data set are not the ones that were promised (checksum, shape, dtype)."""


class NoLinearHead(ScienceError):
    """The network does not end in a linear layer, so its penultimate layer has no closed form."""


class WrongShape(ScienceError):
    """Network, weights and images do not fit together."""


class WrongState(ScienceError):
    """A saved training state is of another training, or does not fit its network, optimiser or device."""


class NonFinite(ScienceError):
    """Weights, logits or a loss are NaN or infinite. `examples` are the positions of the images, where they are known.

    >>> str(NonFinite("the head's weights are NaN or infinite"))
    "the head's weights are NaN or infinite"
    """

    def __init__(self, message: str, examples: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.examples = examples

    @classmethod
    def of(cls, what: str, non_finite: "Tensor") -> "NonFinite":
        """That `what` is NaN or infinite for the images that `non_finite [n]` bool names, and which share that is."""
        examples = tuple(non_finite.nonzero().flatten().tolist())
        share = f"{len(examples)} of {len(non_finite)} images"
        return cls(f"{what} is NaN or infinite for {share}; check the weights and the scale", examples)


class Diverged(NonFinite):
    """A training's loss became NaN or infinite."""
