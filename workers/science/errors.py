"""What can go wrong in the science, each with a sentence that says what to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

LISTED = 2000  # characters of names in a sentence


class ScienceError(Exception):
    """A computation cannot give a number. The same computation would fail again."""


class DatasetMissing(ScienceError):
    """The files of a data set are not there, and could not be downloaded."""


class DatasetCorrupt(ScienceError):
    """The files of a data set are not the right ones (checksum, shape, dtype)."""


class DataFolderUnusable(ScienceError):
    """The data folder of this machine does not have the right files of a data set: it is absent, read-only or full, it
    lacks them, or has others. Another machine may have them, or this one later.
    """


class NoLinearHead(ScienceError):
    """The network does not end in a linear layer, so its penultimate layer has no closed form."""


class WrongShape(ScienceError):
    """Network, weights and images do not fit together."""


@dataclass(frozen=True)
class Misshapen:
    """A tensor of the network whose shape (or precision) in a file is another one: `found` there, `expected` here."""

    name: str
    found: str
    expected: str


class WrongTensors(WrongShape):
    """A file has other tensors than the network: all `missing`, `unknown` and `misshapen` ones.

    `copies` are the prefixes under which the file has all tensors of the network.
    """

    def __init__(
        self, missing: Sequence[str], unknown: Sequence[str], misshapen: Sequence[Misshapen], copies: Sequence[str] = ()
    ) -> None:
        self.missing, self.unknown, self.misshapen, self.copies = missing, unknown, misshapen, copies
        super().__init__(self._differences() if missing or unknown or misshapen else self._choice())

    def _differences(self) -> str:
        shapes = [f"{of.name} is {of.found}, the network has {of.expected}" for of in self.misshapen]
        parts = (
            (self.missing, "missing", self.missing),
            (self.unknown, "unknown to the network", self.unknown),
            (self.misshapen, "of another shape", shapes),
        )
        counts = [
            f"{len(of)} {'is' if len(of) == 1 else 'are'} {how} ({listed(names)})" for of, how, names in parts if of
        ]
        there = f"; all tensors of the network are there under {_options(self.copies)}" if self.copies else ""
        return (
            f"the weights are of another network: of their tensors, {', '.join(counts)}{there}; check architecture, "
            "image shape and number of classes"
        )

    def _choice(self) -> str:
        return (
            f"the file holds {len(self.copies)} copies of the network, such as an average beside the weights: choose "
            f"one by its prefix, {_options(self.copies)}"
        )


def _options(prefixes: Sequence[str]) -> str:
    """The prefixes, each with the option of `uncanny checkpoint add` that chooses it."""
    return " or ".join(f"{prefix!r} (--key {prefix}=)" for prefix in prefixes)


def listed(names: Sequence[str]) -> str:
    """The names by comma, as many as a sentence holds, and how many more there are."""
    shown, length = 0, 0
    while shown < len(names) and (not shown or length + len(names[shown]) <= LISTED):
        length += len(names[shown]) + 2
        shown += 1
    more = f" and {len(names) - shown} more" if shown < len(names) else ""
    return ", ".join(names[:shown]) + more


class WrongState(ScienceError):
    """A saved training state is of another training, or does not fit its network, optimiser or device."""


class NonFinite(ScienceError):
    """Weights, logits or a loss are NaN or infinite. `examples` are the positions of the images, if it is about images.

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


class NegativeVariance(ScienceError):
    """A running variance of a batch norm is below zero."""


class WrongAccuracy(ScienceError):
    """Imported weights are not as accurate on clean images as their registration states."""


class Diverged(NonFinite):
    """A training's loss became NaN or infinite."""
