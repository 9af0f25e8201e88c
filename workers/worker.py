"""The Ray task body: one bundle, on the CPUs or the GPU that Ray gave, in a process that stays warm for the next."""

import importlib
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from service.model.environment import DEVICE_WAIT_SECONDS
from service.model.executor import Bundle, Fault, Lost, Message, Started

if TYPE_CHECKING:
    import torch

    from workers.context import Cache, Context

DELIVERY_SECONDS = 1.0  # before a process ends: if it ended at once, Ray would drop the last messages of its generator
POLL_INTERVAL_SECONDS = 0.05  # how often an interrupt can be delivered

# Functions import torch and the modules that need it: the dispatcher imports this module too, and needs no torch. They
# also import Ray, whose environment must be prepared before.


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker cannot know by itself. Sizes are per worker process."""

    artifact_root: str
    data_dir: Path
    epoch_state_seconds: float
    root_mark: str = ""  # by which a worker checks that the artifact root is the dispatcher's
    cache_bytes: int = 4 << 30
    idle_seconds: float = 300.0
    gpu_idle_seconds: float = 10.0  # on a GPU, which Ray may have given to another process


def run_bundle(bundle: Bundle, settings: WorkerSettings) -> Iterator[list[Message]]:
    """Stream the messages of a bundle. Messages that come close together are one list.

    A new process first reports where it is: importing torch and waking the GPU come next, and may kill it or never end.
    If the GPU breaks in this process, all grants are answered and the process ends; the next bundle gets a new one.
    The process also ends if it cannot prepare itself: that is the fault of the node or the device, and of no task.
    """
    import ray

    node = ray.get_runtime_context().get_node_id()
    if "torch" not in sys.modules:
        first = bundle.grants[0]
        worker = f"{socket.gethostname()} pid {os.getpid()}, starting"
        yield [Started(first.task_id, first.attempt, worker, node, ready=False, pid=os.getpid())]
    device = "node"
    try:
        import_undisturbed("workers.run")
        device = device_of(ray.get_gpu_ids(), os.environ.get("CUDA_VISIBLE_DEVICES"))
        context = _prepared(bundle, settings, device, node)
    except Exception as error:  # noqa: BLE001 - whatever the error, no task has begun yet
        yield unprepared(bundle, device, node, error)
        # The process keeps its device so long: Ray would give a free one to the next bundle.
        time.sleep(DEVICE_WAIT_SECONDS if device.startswith("cuda") else DELIVERY_SECONDS)
        raise SystemExit(1) from None  # a half imported module stays so in this process
    from workers.devices import release
    from workers.run import DeviceBroken, batches

    try:
        yield from batches(bundle, context)
    except DeviceBroken:
        time.sleep(DELIVERY_SECONDS)
        raise SystemExit(1) from None
    finally:
        _Warm.leave(settings.idle_seconds if context.device.type == "cpu" else settings.gpu_idle_seconds)
        release(context.device)  # Ray gives the GPU to another process next, which needs its memory


def _prepared(bundle: Bundle, settings: WorkerSettings, device_name: str, node: str) -> "Context":
    import torch

    from service.lab.artifacts import Artifacts
    from workers.context import Context
    from workers.devices import batch_images, bound_memory, cache_bytes

    tempfile.gettempdir()  # raises here, before a task has begun, if no temporary folder takes a file
    torch.set_num_threads(max(1, int(bundle.needs.cpus)))
    device = torch.device(device_name)
    share = bundle.needs.gpus if device.type == "cuda" else bundle.needs.cpus
    if device.type == "cuda":
        torch.cuda.set_device(device)
        bound_memory(device, share)
    cache = _Warm.take(device, cache_bytes(device, share, settings.cache_bytes))
    artifacts = Artifacts(settings.artifact_root, settings.root_mark)
    return Context(
        artifacts,
        settings.data_dir,
        device,
        share,
        settings.epoch_state_seconds,
        cache,
        node,
        batch_images(device, share),
    )


def unprepared(bundle: Bundle, device: str, node: str, error: Exception) -> list[Message]:
    """The answers for a bundle whose worker could not get ready; `device` is "node" if it had none yet."""
    host = socket.gethostname()
    fault = Fault("device", f"{device} of {host}", node) if device.startswith("cuda") else Fault("node", host, node)
    why = f"{fault.name} cannot run tasks: {type(error).__name__}: {error}"
    first, *others = bundle.grants
    lost = Lost(first.task_id, first.attempt, "environment", why, fault)
    return [lost, *(Lost(grant.task_id, grant.attempt, "given_back", f"not started: {why}") for grant in others)]


def end_frozen(pid: int) -> bool:
    """Kill the process if it is a stopped worker of this node; whether it was.

    A worker that is not stopped ends itself when Ray tells it to, or runs another bundle by now.
    """
    try:
        process = psutil.Process(pid)
        frozen = process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
        if process.ppid() != os.getppid() or not frozen:
            return False
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def import_undisturbed(name: str) -> None:
    """Import the module in a thread of its own, which no soft cancel reaches: torch cannot be imported a second time.

    Raises KeyboardInterrupt at once while the import continues; the next import of the module waits for it. An error of
    the import is raised as RuntimeError.
    """
    errors: list[BaseException] = []

    def load() -> None:
        try:
            importlib.import_module(name)
        except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=load, name=f"import {name}", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_INTERVAL_SECONDS)
    if errors:
        raise RuntimeError(f"{name} cannot be imported: {type(errors[0]).__name__}: {errors[0]}") from errors[0]


def device_of(gpu_ids: list[int] | list[str], visible: str | None) -> str:
    """The torch device of the GPU that Ray assigned. Ray leaves CUDA_VISIBLE_DEVICES as it was.

    Torch counts the visible devices, Ray names them as the variable does, or counts all of them if it is unset.

    >>> device_of([], None), device_of([3], None), device_of(["3"], "2,3"), device_of(["GPU-b"], "GPU-a,GPU-b")
    ('cpu', 'cuda:3', 'cuda:1', 'cuda:1')
    """
    if not gpu_ids:
        return "cpu"
    first = str(gpu_ids[0])
    return f"cuda:{visible.split(',').index(first) if visible else first}"


class _Warm:
    """What this process keeps between bundles, on one device; dropped after a while without a bundle."""

    cache: "Cache | None" = None
    device: "torch.device | None" = None
    timer: threading.Timer | None = None

    @classmethod
    def take(cls, device: "torch.device", capacity_bytes: int) -> "Cache":
        """The cache of that device. Raises `DeviceUnfit` if the process is new on a GPU that does not compute."""
        from workers.context import Cache
        from workers.devices import probe

        if cls.timer is not None:
            cls.timer.cancel()
        if cls.device != device:
            cls.drop()
            cls.cache = cls.device = None
            if device.type == "cuda":
                probe(device)
            cls.device = device
        if cls.cache is None or cls.cache.capacity_bytes != capacity_bytes:
            cls.cache = Cache(capacity_bytes)
        return cls.cache

    @classmethod
    def leave(cls, idle_seconds: float) -> None:
        cls.timer = threading.Timer(idle_seconds, cls.drop)
        cls.timer.daemon = True
        cls.timer.start()

    @classmethod
    def drop(cls) -> None:
        from workers.devices import release

        if cls.cache is not None:
            cls.cache.clear()
        if cls.device is not None:
            release(cls.device)
