"""How a number came about: code, versions, machine, seeds, data, seconds, memory (service/README.md)."""

import os
import platform
import resource
import socket
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workers.revision import code, installed

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "ray")


def environment(device: torch.device) -> dict[str, Any]:
    """Code, versions and machine of this process."""
    return {
        **code(),
        "python": platform.python_version(),
        **{name: installed(name) for name in LIBRARIES},
        "cuda": torch.version.cuda,
        "cudnn": cudnn(device),
        "driver": driver(),
        "device": device_name(device),
        **gpu(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),  # the vector instructions that a CPU's sums use
        "hostname": socket.gethostname(),
        "pid": os.getpid(),
    }


def machine(device: torch.device, device_share: float) -> dict[str, Any]:
    """What may change the last bits of a training in this process. A training has an entry for each machine of its run.

    The device share is part of it: cuDNN takes another plan if its workspace does not fit into the share's memory.
    """
    return {
        "hostname": socket.gethostname(),
        "device": device_name(device),
        "gpu_uuid": gpu(device)["gpu_uuid"],
        "device_share": device_share,
        "threads": torch.get_num_threads(),
        "torch": installed("torch"),
        "cuda": torch.version.cuda,
        "cudnn": cudnn(device),
        "driver": driver(),
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """Identity and size of the GPU; nulls on a CPU."""
    if device.type != "cuda":
        return dict.fromkeys(("gpu_uuid", "gpu_memory_bytes", "gpu_capability", "gpu_sm_count"))
    return of_properties(torch.cuda.get_device_properties(device))


def of_properties(properties: Any) -> dict[str, Any]:
    """`gpu`, from CUDA's properties of a device; the UUID as `nvidia-smi -L` spells it."""
    return {
        "gpu_uuid": f"GPU-{properties.uuid}",
        "gpu_memory_bytes": properties.total_memory,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_sm_count": properties.multi_processor_count,
    }


def conditions(model: nn.Module, precision: str = "float32") -> dict[str, Any]:
    """The conditions of a task's numbers, read from `model` after the task.

    `precision` is that of the training's steps or of the attack's gradients. Reported numbers are always measured in
    float32.
    """
    return {"eval_mode": not any(module.training for module in model.modules()), "precision": precision}


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_cpu_model()} ({platform.machine()})"


def cudnn(device: torch.device) -> int | None:
    """The version of cuDNN that the device's convolutions use, such as 91002."""
    version: int | None = torch.backends.cudnn.version() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    return version


@cache
def driver() -> str | None:
    """The version line of the NVIDIA kernel driver; None without a driver."""
    path = Path("/proc/driver/nvidia/version")
    return path.read_text(encoding="utf-8").partition("\n")[0].strip() if path.is_file() else None


class Meter:
    """Seconds and memory from here to `read()`.

    `device_seconds` is wall time times the device share. The peak of a GPU's memory is this task's; the peak of host
    memory is the process's since it started. `device_free_bytes` is the GPU's memory that was free at the start.
    """

    def __init__(self, device: torch.device, device_share: float) -> None:
        self.device, self.device_share = device, device_share
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._free_bytes: int | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._free_bytes = torch.cuda.mem_get_info(device)[0]

    def read(self) -> dict[str, Any]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        wall = time.perf_counter() - self._wall
        return {
            "wall_seconds": wall,
            "cpu_seconds": time.process_time() - self._cpu,
            "device_seconds": wall * self.device_share,
            "device_share": self.device_share,
            "device_free_bytes": self._free_bytes,
            "peak_host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_device_memory_bytes": (
                torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
            ),
        }


@cache
def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "CPU"
