"""Weights as safetensors, training states as plain tensors: reading them unpickles no objects."""

import os
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from workers.science.errors import Misshapen, NonFinite, WrongShape, WrongTensors, listed


def weights_to_bytes(model: nn.Module) -> bytes:
    """The state dict as safetensors, on the CPU. Equal weights give equal bytes. Raises `NonFinite`."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    _require_finite(state)
    return save(state)


def save_weights(path: Path, model: nn.Module) -> None:
    """`weights_to_bytes` in a file, whole or not at all."""
    _write_atomically(path, weights_to_bytes(model))


def load_weights(model: nn.Module, source: Path | bytes) -> None:
    """Put the weights of a safetensors file (or its bytes) into the network, wherever that is.

    Raises `WrongShape` if names, shapes or dtypes are not the network's, `NonFinite` for NaN and infinities; the
    network is then unchanged.
    """
    content = source if isinstance(source, bytes) else source.read_bytes()
    try:
        state = load(content)
    except SafetensorError as error:
        raise WrongShape(f"these bytes are not safetensors ({error}): save the state dict by safetensors") from error
    check_weights(model, state)
    model.load_state_dict(state)


def check_weights(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Raises `WrongShape` if names, shapes or dtypes are not the network's, `NonFinite` for NaN and infinities."""
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misshapen = [
        Misshapen(name, _kind(state[name]), _kind(value))
        for name, value in sorted(own.items())
        if name in state and _kind(state[name]) != _kind(value)
    ]
    if missing or unknown or misshapen:
        raise WrongTensors(missing, unknown, misshapen)
    _require_finite(state)


def _kind(value: torch.Tensor) -> str:
    return f"{value.dtype} {tuple(value.shape)}"


def _require_finite(state: dict[str, torch.Tensor]) -> None:
    """Raises `NonFinite` with all tensors that hold NaN or infinities, and how many."""
    counts = {name: int((~torch.isfinite(value)).sum()) for name, value in state.items()}
    broken = [f"{name} ({count} of {state[name].numel()})" for name, count in counts.items() if count]
    if broken:
        raise NonFinite(f"NaN or infinite values in {listed(broken)}: these weights cannot be used")


def save_state(path: Path, state: dict[str, Any]) -> None:
    """A training state (dicts, lists, numbers, strings, tensors) in a file, whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        torch.save(state, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_state(path: Path) -> dict[str, Any]:
    """The state that `save_state` wrote, on the CPU. Raises `WrongShape` if the file is not a training state."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError, zipfile.BadZipFile) as error:
        raise WrongShape(
            f"{path.name} is not a training state ({error}): delete it, and the training runs from its start"
        ) from error
    if not isinstance(state, dict):
        raise WrongShape(f"{path.name} is not a training state: delete it, and the training runs from its start")
    return state


def _write_atomically(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
