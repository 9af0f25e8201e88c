"""What can go wrong in the science, each with a sentence that says what to do."""


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
    """Weights, logits or a loss are NaN or infinite."""


class Diverged(NonFinite):
    """A training's loss became NaN or infinite."""
