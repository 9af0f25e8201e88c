"""Weights made elsewhere: fitted to one of our networks, with the normalisation of the inputs as its first layer."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from workers.science.errors import WrongShape
from workers.science.weights import check_weights

MEAN, STD = "normalise.mean", "normalise.std"
COUNTER = "num_batches_tracked"  # of a batch norm; says nothing about what a network computes


class Normalised(nn.Module):
    """`body((x - mean) / std)`: images in [0, 1] go in, as everywhere (SCIENCE.md section 1)."""

    def __init__(self, body: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.normalise = _Normalise(mean, std)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
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
    """The network as the weights of that file need it: with a layer that normalises, where they have one."""
    try:
        with safe_open(path, framework="pt") as file:
            if MEAN not in file.keys():  # noqa: SIM118 - it is no dict
                return model
            shape = file.get_slice(MEAN).get_shape()
    except SafetensorError:
        return model  # `load_weights` says what is wrong
    return Normalised(model, torch.zeros(shape), torch.ones(shape))


def fit(
    model: nn.Module,
    path: Path,
    *,
    keys: Mapping[str, str] | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    channels: int = 3,
) -> nn.Module:
    """The network with the weights of a safetensors file, made elsewhere, in eval mode.

    `keys` maps prefixes of the file's names to the network's (the longest that fits; `{"module.": ""}`). Floating-point
    tensors become float32. `mean` and `std`, one number a channel, normalise images in [0, 1].
    Raises `WrongShape` with what does not fit, `NonFinite` for NaN and infinities.
    """
    if bool(mean) != bool(std) or (mean and (len(mean) != channels or len(std) != channels)):
        raise WrongShape(f"`mean` and `std` need {channels} numbers each, one a channel, or must both be left out")
    if any(not value > 0 for value in std):
        raise WrongShape("`std` must be above 0")
    own = model.state_dict()
    state = {name: torch.zeros_like(own[name]) for name in own if name.endswith(COUNTER)}
    with _opened(path) as file:
        names = {name: _renamed(name, keys or {}) for name in file.keys()}  # noqa: SIM118 - it is no dict
        _check_shapes(file, names, own)
        for name, renamed in names.items():
            value = file.get_tensor(name)
            state[renamed] = value.float() if value.is_floating_point() else value
    check_weights(model, state)
    model.load_state_dict(state)
    if mean:
        shape = (channels, 1, 1)
        model = Normalised(model, torch.tensor(mean).reshape(shape), torch.tensor(std).reshape(shape))
    return model.eval()


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, of which only the names and shapes are read as yet. Raises `WrongShape` where it is none."""
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise WrongShape(
            f"these bytes are not safetensors ({error}): save the state dict with safetensors.torch.save_file; "
            "a pickle (.pt, .pth) is refused, because reading one runs the code in it"
        ) from error
    with file as opened:
        yield opened


def _check_shapes(file: Any, names: Mapping[str, str], own: Mapping[str, Tensor]) -> None:
    """Raises `WrongShape` before a tensor is read: a file of another network may be larger than the memory."""
    counts = Counter(names.values())
    if twice := [name for name, count in counts.items() if count > 1]:
        raise WrongShape(f"two tensors of the file become {twice[0]}: check the key map")
    needed = {name for name in own if not name.endswith(COUNTER)}
    missing, extra = sorted(needed - counts.keys()), sorted(counts.keys() - own.keys())
    if missing or extra:
        raise WrongShape(
            f"the weights are of another network: {len(missing)} tensors are missing (such as {missing[:1]}), "
            f"{len(extra)} are unknown to it (such as {extra[:1]})"
        )
    for name, renamed in names.items():
        shape = tuple(file.get_slice(name).get_shape())
        if shape != tuple(own[renamed].shape):
            raise WrongShape(
                f"{renamed} is {shape}, the network has {tuple(own[renamed].shape)}: check architecture, image shape "
                "and number of classes"
            )


def _renamed(name: str, keys: Mapping[str, str]) -> str:
    prefix = max((prefix for prefix in keys if name.startswith(prefix)), key=len, default=None)
    return name if prefix is None else keys[prefix] + name.removeprefix(prefix)
