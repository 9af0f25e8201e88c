"""The device of a worker: whether it computes, what an error says about it, and its memory."""

import errno
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from service.errors import UncannyError
from workers.science.seeding import deterministic

# Words for exhausted memory of the libraries under torch, from the messages in their C++ sources. cuDNN finds no
# engine, and cuBLAS makes no handle, if their workspace does not fit into the free memory.
OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "std::bad_alloc",
    "not enough memory",
    "ran out of memory",
    "unable to find an engine to execute this computation",
    "unable to find a valid cudnn algorithm",
    "no valid execution plans built",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",
    "cudnn_status_alloc_failed",
    "device_allocation_failed",
    "cusolver_status_alloc_failed",
    "cusolver_status_not_initialized",
    "cufft_alloc_failed",
    "cusparse_status_insufficient_resources",
    "nvml_success ==",  # while torch words its own message, if the driver's library does not answer
)

CONTEXT_BYTES = 600 << 20  # of a GPU's memory, for the context and the libraries of one process
CACHE_SHARE = 0.25  # of a GPU's memory that a worker may use, for the networks and data that it keeps between tasks
BATCH_IMAGES = 256
IMAGES_GIB = 16  # of a GPU's memory, for each `BATCH_IMAGES` that a process takes at a time
MOST_BATCHES = 4
PROBE_SIZE = 16
PYTHON_HEADERS = "Python.h (python3-dev)"


class DeviceUnfit(UncannyError):
    """A device cannot compute what every task needs."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether a task's exception says that memory of its device or of its machine ran out, by its type and message.

    >>> ran_out_of_memory(RuntimeError("GET was unable to find an engine to execute this computation"))
    True
    >>> ran_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    False
    """
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    message = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in message for words in OF_MEMORY)


def probe(device: torch.device) -> None:
    """Compute a small product, a convolution and their gradients as tasks do, and compare them with the CPU's.

    Raises `DeviceUnfit` if that fails: torch was not built for the device's architecture, its driver is too old, it has
    fallen off the bus, or an earlier error has left it broken in this process.
    """
    try:
        with deterministic(device):
            computed = _small_step(device)
        expected = _small_step(torch.device("cpu"))
    except (RuntimeError, MemoryError, AssertionError) as error:  # the latter if torch was built without CUDA
        raise DeviceUnfit(f"{_name(device)} cannot run a small convolution: {_first_line(error)}") from error
    if not torch.allclose(computed, expected, rtol=1e-3, atol=1e-3):
        raise DeviceUnfit(f"{_name(device)} computes a small convolution wrongly: set it aside and have it tested")


def computes(device: torch.device) -> bool:
    """Whether the device still computes in this process, after an error that may have broken it. A full one counts."""
    try:
        probe(device)
    except DeviceUnfit as unfit:
        return ran_out_of_memory(unfit.__cause__ or unfit)
    return True


def has_kernels(capability: str, built_for: Iterable[str]) -> bool:
    """Whether a torch that is built for these (`torch.cuda.get_arch_list()`) has kernels for a GPU of that capability.

    `sm_` is machine code: for the same major capability, and a minor one that is not below it. `compute_` is code that
    the driver compiles for any GPU that is not older.

    >>> wheel = ["sm_75", "sm_80", "sm_90"]
    >>> [has_kernels(gpu, wheel) for gpu in ("7.0", "7.5", "8.9", "9.0", "10.0")]
    [False, True, True, True, False]
    >>> has_kernels("10.0", [*wheel, "compute_90"])
    True
    """
    major, minor = map(int, capability.split("."))
    for kind, _, digits in (name.partition("_") for name in built_for):
        code = divmod(int(digits.rstrip("af")), 10)
        if (major, minor) >= code and (kind == "compute" or major == code[0]):
            return True
    return False


def all_described() -> tuple[list[dict[str, Any]], str]:
    """Every GPU that torch can use, and an empty string. If torch can use no GPU of this machine, such as with an old
    driver, the second value is the reason.
    """
    count = torch.cuda.device_count()  # by the driver's own library, so an old driver counts them too
    try:
        return [described(torch.device("cuda", index)) for index in range(count)], ""
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        return [], _first_line(error)


def described(device: torch.device) -> dict[str, Any]:
    """A GPU and its state: `name`, `uuid`, `capability`, whether torch `fits` it, `total_bytes`, `free_bytes`, and what
    is wrong with it in `trouble`, which is empty if it computes or is merely full.
    """
    of = torch.cuda.get_device_properties(device)
    capability = f"{of.major}.{of.minor}"
    fits = has_kernels(capability, torch.cuda.get_arch_list())
    about = {"name": of.name, "uuid": str(of.uuid), "capability": capability, "fits": fits}
    free, total, trouble = 0, of.total_memory, ""
    try:
        free, total = torch.cuda.mem_get_info(device)
        probe(device)
    except (RuntimeError, DeviceUnfit) as error:
        # A full GPU shows in `free_bytes`. If there is room, words for exhausted memory mean that torch does not fit.
        full = free < CONTEXT_BYTES and ran_out_of_memory(error.__cause__ or error)
        trouble = "" if full else str(error)
    return {**about, "total_bytes": total, "free_bytes": free, "trouble": trouble}


def lacks_for_compile(device_type: str) -> list[str]:
    """What `torch.compile` needs and this machine lacks, looked for as torch's and Triton's sources do.

    Torch compiles C++. On a GPU Triton compiles a module of Python in C, which calls the driver.
    """
    lacks = [] if _has_program("CXX", "clang++" if sys.platform == "darwin" else "g++") else ["C++ compiler (g++)"]
    if device_type == "cuda":
        lacks += [] if _has_program("CC", "gcc", "clang") else ["C compiler (gcc)"]
        lacks += [] if Path(sysconfig.get_paths(_scheme())["include"], "Python.h").is_file() else [PYTHON_HEADERS]
    return lacks


def _has_program(variable: str, *usual: str) -> bool:
    """Whether the program that the environment variable names exists; without a name, one of the usual programs."""
    command = os.environ.get(variable)
    return any(shutil.which(name) for name in (usual if command is None else command.split()[:1]))


def _scheme() -> str:
    """The scheme of Python's folders. Debian's own scheme has no headers, so Triton takes the one beneath it."""
    scheme = sysconfig.get_default_scheme()
    return "posix_prefix" if scheme == "posix_local" else scheme


def bound_memory(device: torch.device, share: float) -> None:
    """Keep this process to its share of a GPU's memory. The share includes its context, which torch does not count.

    A process that takes more than its share runs out of memory; its neighbours do not.
    """
    torch.cuda.set_per_process_memory_fraction(memory_fraction(share, _total_bytes(device)), device)


def memory_fraction(share: float, total_bytes: int) -> float:
    """The part of a GPU's memory that torch may allocate in a process that has this share of the GPU.

    >>> memory_fraction(1.0, 80 << 30), round(memory_fraction(0.5, 80 << 30), 4)
    (1.0, 0.4927)
    """
    if share >= 1:
        return 1.0
    return max(share / 2, share - CONTEXT_BYTES / total_bytes)


def cache_bytes(device: torch.device, share: float, most_bytes: int) -> int:
    """How much a worker keeps on its device between tasks: a part of what it may use there, at most `most_bytes`."""
    if device.type != "cuda":
        return most_bytes
    total = _total_bytes(device)
    return min(most_bytes, int(CACHE_SHARE * memory_fraction(share, total) * total))


def batch_images(device: torch.device, share: float) -> int:
    """How many images an attack takes at a time. It depends on the memory that the process may allocate, never on the
    memory that is free now, so a task has the same batches whenever it runs.
    """
    if device.type != "cuda":
        return BATCH_IMAGES
    total = _total_bytes(device)
    allowed = int(memory_fraction(share, total) * total)
    return BATCH_IMAGES * min(max(1, allowed // (IMAGES_GIB << 30)), MOST_BATCHES)


def release(device: torch.device) -> None:
    """Give back the memory of a GPU that no tensor uses, so that other processes can have it."""
    if device.type == "cuda" and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        # Every call on a broken context raises. Its memory is freed when the process ends. An error raised here would
        # hide the exit of a worker, or be blamed on the next GPU of the process.
        with suppress(RuntimeError), torch.cuda.device(device):
            torch.cuda.empty_cache()


def _total_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)


def _small_step(device: torch.device) -> torch.Tensor:
    """The output of a small network and the gradient of its input, as one tensor on the CPU."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, 3, PROBE_SIZE, PROBE_SIZE, generator=generator)
    kernel = torch.rand(4, 3, 3, 3, generator=generator)
    head = torch.rand(4, 5, generator=generator)
    x = images.to(device).requires_grad_()
    features = nn.functional.conv2d(x, kernel.to(device), padding=1).relu().mean(dim=(2, 3))
    out = features @ head.to(device)
    (slope,) = torch.autograd.grad(out.logsumexp(1).sum(), x)
    return torch.cat([out.detach().flatten(), slope.flatten()]).cpu()


def _name(device: torch.device) -> str:
    return "the CPU" if device.type == "cpu" else str(device)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
