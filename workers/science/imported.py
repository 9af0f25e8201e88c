"""Weights made elsewhere: fitted to one of our networks, with the normalisation of the inputs as its first layer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from workers.science.errors import NegativeVariance, WrongAccuracy, WrongShape, listed
from workers.science.naming import COUNTERS, match
from workers.science.summaries import majority_share
from workers.science.weights import check_weights

MEAN, STD = "normalise.mean", "normalise.std"


class Normalised(nn.Module):
    """`body((x - mean) / std)`: images in [0, 1] go in, as everywhere (README.md, "Notation")."""

    def __init__(self, body: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.normalise = _Normalise(mean, std)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        """`x [n, C, H, W]` in [0, 1] -> logits `[n, k]`."""
        logits: Tensor = self.body(self.normalise(x))
        return logits


class _Normalise(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


def as_saved(model: nn.Module, path: Path) -> nn.Module:
    """The network for the weights of that file: with a layer that normalises, if they have one."""
    try:
        with safe_open(path, framework="pt") as file:
            if MEAN not in file.keys():  # noqa: SIM118 - it is no dict
                return model
            shape = file.get_slice(MEAN).get_shape()
    except SafetensorError:
        return model  # `load_weights` says what is wrong
    return Normalised(model, torch.zeros(shape), torch.ones(shape))


@dataclass(frozen=True)
class Fitted:
    """A network with weights made elsewhere, in eval mode, and the changes to them.

    `stripped_prefix` was in front of all names of the file; `converted_from` are precisions that became float32.
    """

    model: nn.Module
    stripped_prefix: str | None
    converted_from: tuple[str, ...]


def fit(
    model: nn.Module,
    path: Path,
    *,
    keys: Mapping[str, str] | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    channels: int = 3,
) -> Fitted:
    """The network with the weights of a safetensors file, made elsewhere.

    `keys` maps prefixes of the file's names to the network's, see `naming.match`. Floating-point tensors become
    float32. `mean` and `std`, one number a channel, normalise images in [0, 1].
    Raises `WrongTensors` with all that does not fit, `WrongShape`, `NonFinite` for NaN and infinities,
    `NegativeVariance`.
    """
    if bool(mean) != bool(std) or (mean and (len(mean) != channels or len(std) != channels)):
        raise WrongShape(f"`mean` and `std` need {channels} numbers each, one a channel, or must both be left out")
    if any(not value > 0 for value in std):
        raise WrongShape("`std` must be above 0")
    own = model.state_dict()
    state = {name: torch.zeros_like(own[name]) for name in own if name.endswith(COUNTERS)}
    precisions: set[str] = set()
    with _opened(path) as file:
        # Before a tensor is read: a file of another network may be larger than the memory.
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no dict
        matching = match(shapes, {name: tuple(value.shape) for name, value in own.items()}, keys or {})
        for name, renamed in matching.names.items():
            value = file.get_tensor(name)
            if value.is_floating_point():
                precisions.add(str(value.dtype).removeprefix("torch."))
                value = value.float()
            state[renamed] = value
    check_weights(model, state)
    _check_variances(state)
    model.load_state_dict(state)
    if mean:
        shape = (channels, 1, 1)
        model = Normalised(model, torch.tensor(mean).reshape(shape), torch.tensor(std).reshape(shape))
    return Fitted(model.eval(), matching.stripped_prefix, tuple(sorted(precisions - {"float32"})))


def require_accuracy(measured: float, images: int, expected: float | None, tolerance: float | None) -> None:
    """Raises `WrongAccuracy` if the clean accuracy is further than `tolerance` from the expected one, if any."""
    if expected is None or abs(measured - expected) <= (tolerance or 0.0) + 1e-9:
        return
    raise WrongAccuracy(
        f"the clean accuracy on all {images:,} test images is {measured:.1%}, and {expected:.1%} (within "
        f"{tolerance or 0.0:.1%}) was expected of these weights: usually `mean` and `std` are in grey levels of 0 to "
        "255, where images here are in [0, 1], or the classes are in another order, or the key map gives a tensor to "
        "the wrong layer; register the weights again under a new name"
    )


def is_at_chance(correct: Tensor, y: Tensor) -> bool:
    """Whether `correct [n]` is not above what the best constant answer to the labels `y [n]` gets right.

    Above is: with the lower end of its Wilson 95 % interval (Wilson 1927). An attack's verdict has the same rule
    (`service/model/verdict.py`; `tests/contract/test_catalog.py` compares them).
    """
    n, share = len(y), float(correct.double().mean())
    z = 1.959963984540054
    middle, half = share + z**2 / (2 * n), z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return (middle - half) / (1 + z**2 / n) <= majority_share(y)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file; only names and shapes are read so far. Raises `WrongShape` if it is not safetensors."""
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise WrongShape(
            f"these bytes are not safetensors ({error}): save the state dict with safetensors.torch.save_file; "
            "a pickle (.pt, .pth) is refused, because reading one runs the code in it"
        ) from error
    with file as opened:
        yield opened


def _check_variances(state: Mapping[str, Tensor]) -> None:
    counts = {name: int((value < 0).sum()) for name, value in state.items() if name.endswith("running_var")}
    if negative := [f"{name} ({count} of {state[name].numel()})" for name, count in counts.items() if count]:
        raise NegativeVariance(
            f"running variances below zero in {listed(negative)}: the file is damaged, or another tensor was given "
            "this name"
        )
