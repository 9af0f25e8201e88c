"""Every random number comes from an explicit seed, and every flag that changes numbers is set in one place.

The random numbers of an example depend on (attack_seed, dataset index, restart, stream) only (README.md, "Notation"):
Philox4x64 (Salmon et al. 2011), a counter-based generator, is keyed with the seed and started at a counter made of the
other three. They are made on the CPU and then moved, so that a GPU attacks with the same numbers: the generators of a
GPU give other numbers on another model of GPU.
"""

import hashlib
import math
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.science.ahead import drawn

STREAM = "start"
"""The default use of an example's numbers. Another use takes another name, and gets unrelated numbers."""

_cudnn: Any = torch.backends.cudnn  # its stubs leave out `conv`
_memory: Any = torch.utils.deterministic  # and these `fill_uninitialized_memory`
_KEY = 0x556E63616E6E79  # the second half of Philox's key: separates these numbers from anyone else's Philox(seed)


def example_bits(seed: int, index: int, restart: int = 0, stream: str = STREAM) -> np.random.Philox:
    """The bit generator of one example. Two that differ in any argument never overlap (each has 2^64 blocks)."""
    use = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    return np.random.Philox(
        counter=np.array([0, index, restart, use], np.uint64), key=np.array([seed, _KEY], np.uint64)
    )


def uniform_per_example(
    seed: int, index: Tensor | Sequence[int], restart: int, shape: Sequence[int], stream: str = STREAM
) -> Tensor:
    """Uniform numbers `[n, *shape]` in [0, 1), float32 on the CPU, for the examples `index [n]` (any device).

    Row i depends on (seed, index[i], restart, stream) only: not on the batch, its order or its device.
    """
    return drawn(_uniform, _listed(index), seed, restart, tuple(shape), stream)


def _uniform(index: list[int], seed: int, restart: int, shape: tuple[int, ...], stream: str) -> Tensor:
    size = math.prod(shape)
    out = np.empty((len(index), size), np.float32)
    for row, bits in zip(out, _streams(seed, index, restart, stream), strict=True):
        row[:] = bits.random_raw(size) >> np.uint64(40)  # 24 bits: exact in float32
    return torch.from_numpy(np.multiply(out, np.float32(2.0**-24), out=out)).reshape(-1, *shape)


def normal_per_example(
    seed: int, index: Tensor | Sequence[int], restart: int, shape: Sequence[int], stream: str = STREAM
) -> Tensor:
    """Standard normal numbers `[n, *shape]`, float32 on the CPU; otherwise like `uniform_per_example`.

    Box and Muller (1958) in float64, on 53 bits each.
    """
    return drawn(_normal, _listed(index), seed, restart, tuple(shape), stream)


def _normal(index: list[int], seed: int, restart: int, shape: tuple[int, ...], stream: str) -> Tensor:
    size = math.prod(shape)
    half = (size + 1) // 2
    out = np.empty((len(index), size), np.float32)
    for row, bits in zip(out, _streams(seed, index, restart, stream), strict=True):
        unit = ((bits.random_raw(2 * half) >> np.uint64(11)) + 0.5) * 2.0**-53  # never 0
        radius, angle = np.sqrt(-2 * np.log(unit[:half])), 2 * np.pi * unit[half:]
        row[:half] = radius * np.cos(angle)
        row[half:] = (radius * np.sin(angle))[: size - half]
    return torch.from_numpy(out).reshape(-1, *shape)


def _listed(index: Tensor | Sequence[int]) -> list[int]:
    return index.tolist() if isinstance(index, Tensor) else list(index)


def _streams(seed: int, index: list[int], restart: int, stream: str) -> Iterator[np.random.Philox]:
    """`example_bits` of each example in turn: one object that is moved, because a new one takes as long as its numbers.

    Example by example the numbers stay in the processor's cache.
    """
    bits = example_bits(seed, 0, restart, stream)
    state: Any = bits.state
    for i in index:
        state["state"]["counter"][1] = i
        bits.state = state
        yield bits


def generator(seed: int, stream: str = STREAM) -> torch.Generator:
    """A torch generator on the CPU. Another `stream` of the same seed gives unrelated numbers."""
    digest = hashlib.sha256(f"{stream} {seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def moved(numbers: Tensor, device: torch.device) -> Tensor:
    """`numbers`, made on the CPU, on `device`; a GPU is not waited for, so numbers are made while it works."""
    numbers = numbers.pin_memory() if device.type == "cuda" else numbers
    return numbers.to(device, non_blocking=True)


@contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Inside, `torch.nn.init` on the CPU draws from `seed`; the process's own random state is restored afterwards.

    The random state is the process's, so one thread at a time is inside.
    """
    with _initialisation_lock, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the GPUs too
        yield


@contextmanager
def deterministic(device: torch.device | str = "cpu", *, tf32: bool = False) -> Iterator[None]:
    """Inside, equal inputs give bit-equal outputs on one device, and float32 means float32 (TF32 only with `tf32`).

    On a GPU, bit-equal holds for one model of GPU that nothing else uses: cuDNN silently takes another plan if there is
    no memory for its workspace, so on a share of a GPU two runs may differ by rounding.
    Uninitialised memory is not filled with NaN, as torch would by default: no number is made of it, and filling it
    takes time.
    An operation that has no deterministic form raises RuntimeError. The flags are the process's: they are restored when
    the last block ends, and two threads must not need different ones. On CUDA, enter before the first matrix product.
    """
    if torch.device(device).type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, and reads it once
    precision = "tf32" if tf32 else "ieee"
    chosen = _Flags(True, False, False, True, False, precision, precision)
    with _inside_lock:
        if not _inside:
            _inside.append(_flags())  # as they were outside
        _inside.append(chosen)
        _set_flags(chosen)
    try:
        yield
    finally:
        with _inside_lock:
            _inside.pop(next(i for i, flags in enumerate(_inside) if flags is chosen))
            _set_flags(_inside[-1])
            if len(_inside) == 1:
                _inside.clear()


def flags() -> dict[str, bool | str]:
    """The flags that change numbers, by name, as they are now: for the provenance, called where the number is made."""
    now = _flags()
    return {
        "deterministic_algorithms": now.algorithms,
        "cudnn_deterministic": now.cudnn,
        "cudnn_benchmark": now.benchmark,
        "matmul_precision": now.matmul,
        "convolution_precision": now.convolution,
    }


class _Flags(NamedTuple):
    algorithms: bool
    warn_only: bool
    fill: bool
    cudnn: bool
    benchmark: bool
    matmul: str
    convolution: str


_inside: list[_Flags] = []
_initialisation_lock = threading.Lock()
_inside_lock = threading.Lock()


def _flags() -> _Flags:
    return _Flags(
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        _memory.fill_uninitialized_memory,
        _cudnn.deterministic,
        _cudnn.benchmark,
        torch.backends.cuda.matmul.fp32_precision,
        _cudnn.conv.fp32_precision,
    )


def _set_flags(flags: _Flags) -> None:
    if "torch._inductor.config" in sys.modules:
        torch.use_deterministic_algorithms(flags.algorithms, warn_only=flags.warn_only)  # also of what it makes
    else:  # the same without importing the compiler, which takes 5 s and is loaded by who compiles
        mode = "default" if not flags.algorithms else "warn" if flags.warn_only else "error"
        torch.set_deterministic_debug_mode(mode)
    _memory.fill_uninitialized_memory = flags.fill
    _cudnn.deterministic = flags.cudnn
    _cudnn.benchmark = flags.benchmark
    torch.backends.cuda.matmul.fp32_precision = flags.matmul
    _cudnn.conv.fp32_precision = flags.convolution
