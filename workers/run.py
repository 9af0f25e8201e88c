"""run(grant) -> Outcome: one match on the kind of task; and execute(bundle), its grants one after the other."""

import errno
import gc
import itertools
import logging
import os
import queue
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

import torch
from pydantic import TypeAdapter, ValidationError

from service.errors import ArtifactMissing, ArtifactRootFull, ArtifactRootUnusable
from service.interrupt import interrupt
from service.model.executor import (
    Bundle,
    Failed,
    Fault,
    Grant,
    Lost,
    Message,
    Outcome,
    Progress,
    Reason,
    Started,
    Succeeded,
)
from service.specs import AttackTask, ControlTask, MeasureTask, Task, TrainTask, problems
from service.specs.versions import version_of_spec
from workers import devices, provenance, tasks
from workers.context import Context
from workers.science.errors import DataFolderUnusable, ScienceError
from workers.science.seeding import deterministic, flags
from workers.science.summaries import merged

log = logging.getLogger("uncanny.worker")

TASK: TypeAdapter[Task] = TypeAdapter(Task)
PROGRESS_SECONDS = 0.5
POLL_INTERVAL_SECONDS = 0.02  # how often an interrupt of the reading thread can be delivered
OTHERS_BYTES = 1 << 30  # a GPU counts as shared if others hold more of its memory; a driver holds some itself
BATCH_WINDOW_SECONDS = 0.005  # messages within it are sent as one batch
INTERRUPT_AGAIN_SECONDS = 1.0  # an interrupt that lands in a destructor is lost
OF_MEMORY: set[Reason] = {"out_of_memory", "out_of_shared_memory"}
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE}
OF_A_FOLDER = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EACCES,
    errno.EPERM,
}  # in the temporary folder they are the node's fault


def run(grant: Grant, bundle: Bundle, context: Context, report: Callable[[Progress], None]) -> Outcome:
    """Compute the task of the grant's spec on the context's device. The provenance says how it was computed.

    Raises `ScienceError`, `ArtifactMissing` or pydantic's `ValidationError` for a task that would fail again. Other
    exceptions pass.
    """

    def on_progress(done: int, total: int) -> None:
        report(Progress(grant.task_id, grant.attempt, done / total, {"step": done, "steps": total}))

    meter = provenance.Meter(context.device, context.device_share)
    task = _task_of(grant)
    training = TrainTask.model_validate(bundle.train_spec)
    with deterministic(context.device):
        subject = tasks.Subject(training, bundle.checkpoint, context)
        match task:
            case TrainTask():
                outcome = tasks.run_training(task, grant, subject.data, context, report)
            case MeasureTask():
                outcome = tasks.run_measure(task, subject, on_progress)
            case AttackTask():
                outcome = tasks.run_attack(task, subject, _source(task, bundle, context), on_progress)
            case ControlTask():
                outcome = tasks.run_control(task, subject, on_progress)
            case _:
                assert_never(task)
        determinism = flags()
    made_from = _inputs_of(task, grant, bundle, subject, outcome)
    made_by = provenance.environment(context.device)
    # A training sets flags of its own, which replace these. Only tasks whose batches depend on the device have
    # `batch_images`.
    conditions = {"batch_images": None, **determinism, **outcome.provenance}
    return replace(outcome, provenance=merged(made_by, made_from, conditions, meter.read()))


def _task_of(grant: Grant) -> Task:
    """The task of the grant's spec. Raises `ScienceError` for a version that this worker does not compute."""
    task = TASK.validate_python(grant.spec)
    if task.version != (computed := version_of_spec(grant.spec)):
        raise ScienceError(
            f"this task is of version {task.version}, and this worker computes version {computed}: install one version "
            "of Uncanny everywhere, then retry the job"
        )
    return task


def _inputs_of(task: Task, grant: Grant, bundle: Bundle, subject: tasks.Subject, outcome: Outcome) -> dict[str, Any]:
    """For the provenance: the task, its seeds, and the data and weights that its numbers were made from."""
    weights = next((ref for ref in outcome.artifacts if ref.kind == "checkpoint"), bundle.checkpoint)
    training = subject.training
    return {
        "task_kind": task.kind,
        "task_version": task.version,
        "task_digest": grant.digest,
        "weights_sha256": weights.digest if weights else None,
        "source_weights_sha256": _source_weights(task, bundle),
        "seed": training.seed,
        "attack_seed": getattr(task, "attack_seed", None),
        "dataset": training.dataset.name,
        "dataset_sha256": subject.data_sha256,
        "dataset_files_sha256": [training.dataset.train_sha256, training.dataset.test_sha256],
    }


def _source(task: AttackTask, bundle: Bundle, context: Context) -> tasks.Subject | None:
    """The network that a transfer's examples are made on, if it is another one."""
    if task.source is None:
        return None
    spec, checkpoint = bundle.sources[task.source]
    return tasks.Subject(TrainTask.model_validate(spec), checkpoint, context)


def _source_weights(task: Task, bundle: Bundle) -> str | None:
    source = bundle.sources[task.source][1] if isinstance(task, AttackTask) and task.source else None
    return source.digest if source else None


def execute(bundle: Bundle, context: Context) -> Iterator[Message]:
    """Run the grants in order, and yield the messages of each while it runs. A failed grant does not stop the next.

    The grants run in a thread of their own, while the caller's thread waits for messages. An exception in the caller's
    thread (KeyboardInterrupt, by a soft cancel) first stops the grants, and so does closing this generator.
    Raises `DeviceBroken` if this process can compute nothing any more; all grants are answered then.
    """
    return itertools.chain.from_iterable(batches(bundle, context))


def batches(bundle: Bundle, context: Context) -> Iterator[list[Message]]:
    """The messages of `execute`, those that come close together in one list."""
    arrived: queue.SimpleQueue[Message | _Ended] = queue.SimpleQueue()
    begun, stopped = threading.Event(), threading.Event()
    todo = (bundle, context, arrived.put, begun, stopped)
    producer = threading.Thread(target=_produce, args=todo, name=bundle.id, daemon=True)
    try:
        producer.start()
        while True:
            batch = _gather(arrived)
            messages = [item for item in batch if not isinstance(item, _Ended)]
            if messages:
                yield messages
            if batch and isinstance(batch[-1], _Ended):
                producer.join()
                if batch[-1].device_broken:
                    raise DeviceBroken("the GPU gave up in this process; it needs a new one")
                return
    finally:
        stopped.set()  # for a thread that has not begun yet: no interrupt reaches it
        _end(producer, begun)


def _end(producer: threading.Thread, begun: threading.Event) -> None:
    """Wait for the thread to end, even if this thread is interrupted: nothing else would stop the other."""
    while producer.is_alive():
        try:
            if begun.is_set():
                interrupt(producer)
            producer.join(INTERRUPT_AGAIN_SECONDS)
        except KeyboardInterrupt:
            continue


class DeviceBroken(RuntimeError):
    """After some errors of a GPU, such as an illegal memory access, every later call in the process fails too."""


@dataclass(frozen=True)
class _Ended:
    device_broken: bool


def _gather(arrived: "queue.SimpleQueue[Message | _Ended]") -> list[Message | _Ended]:
    try:
        batch = [arrived.get(timeout=POLL_INTERVAL_SECONDS)]
    except queue.Empty:
        return []
    if not isinstance(batch[0], _Ended):
        time.sleep(BATCH_WINDOW_SECONDS)
    while not arrived.empty():
        batch.append(arrived.get())
    return batch


def _produce(
    bundle: Bundle,
    context: Context,
    put: Callable[[Message | _Ended], None],
    begun: threading.Event,
    stopped: threading.Event,
) -> None:
    worker = f"{socket.gethostname()} pid {os.getpid()} {context.device}"
    device_broken = False
    unfit = ""  # why this worker starts no further grant of the bundle
    try:
        begun.set()  # from here on an interrupt is caught
        for grant in bundle.grants:
            if stopped.is_set():
                break
            if unfit:
                put(Lost(grant.task_id, grant.attempt, "given_back", f"not started: {unfit}"))
                continue
            put(Started(grant.task_id, grant.attempt, worker, context.node, pid=os.getpid()))
            answer, device_broken = _answer(grant, bundle, context, put, stopped)
            put(answer)
            if device_broken:
                unfit = "the worker's GPU gave up before"
            elif isinstance(answer, Lost) and answer.fault is not None:
                unfit = answer.message
    except KeyboardInterrupt:
        log.info("bundle %s was stopped", bundle.id)
    finally:
        put(_Ended(device_broken))


def _answer(
    grant: Grant, bundle: Bundle, context: Context, put: Callable[[Message], None], stopped: threading.Event
) -> tuple[Succeeded | Failed | Lost, bool]:
    """How the grant ended, and whether the device is broken from now on."""
    resume = grant.resume
    reported_at = -PROGRESS_SECONDS

    def report(progress: Progress) -> None:
        nonlocal reported_at, resume
        if stopped.is_set():  # an interrupt may be lost in a destructor
            raise KeyboardInterrupt
        if progress.resume is not None or time.monotonic() - reported_at >= PROGRESS_SECONDS:
            reported_at = time.monotonic()
            resume = progress.resume or resume
            put(progress)

    answer, broken = _try(grant, bundle, context, report)
    if isinstance(answer, Lost) and answer.reason in OF_MEMORY and not broken:
        # Run again in place: the cache of this process, or a neighbour for a moment, may have held the memory.
        _empty(context)
        log.warning("%s is run again, with an empty cache and fewer images at a time: %s", grant, answer.message)
        fewer = replace(context, batch_images=max(1, context.batch_images // 2))
        answer, broken = _try(replace(grant, resume=resume), bundle, fewer, report)
        _empty(context)
    return answer, broken


def _try(
    grant: Grant, bundle: Bundle, context: Context, report: Callable[[Progress], None]
) -> tuple[Succeeded | Failed | Lost, bool]:
    """How one run of the grant ended, and whether the device is broken. On return nothing holds the task's tensors."""
    task, attempt = grant.task_id, grant.attempt
    try:
        return Succeeded(task, attempt, run(grant, bundle, context, report)), False
    except (ArtifactRootUnusable, DataFolderUnusable, ImportError) as error:
        return _of_the_environment(grant, bundle, context, error), False
    except ValidationError as error:
        sentences = "; ".join(f"{pointer}: {sentence}" for pointer, sentence in problems(error))
        return Failed(task, attempt, "configuration", f"this worker cannot read the task's spec: {sentences}"), False
    except tasks.CheckpointMissing as error:
        return Failed(task, attempt, "missing_checkpoint", str(error), missing=error.digest), False
    except (ScienceError, ArtifactMissing) as error:
        return Failed(task, attempt, "configuration", str(error)), False
    except Exception as error:  # noqa: BLE001 - any other error in a task is that task's failure
        if isinstance(error, OSError) and (error.errno in DISK_ERRORS or _of_temporary_folder(error)):
            return _of_the_environment(grant, bundle, context, error), False
        if devices.ran_out_of_memory(error):
            reason: Reason = "out_of_shared_memory" if _shared(context) else "out_of_memory"
            answer: Failed | Lost = Lost(task, attempt, reason, f"{context.device} ran out of memory: {error}")
        else:
            answer = Failed(task, attempt, "error", f"{type(error).__name__}: {error}", traceback.format_exc())
    # Here the exception is gone, whose frames hold the task's tensors. The device is probed even if the message is
    # about memory: on a broken device cuBLAS makes no handle either.
    if devices.computes(context.device):
        return answer, False
    # The device may have broken by itself, or by an access of the task. As when a worker dies, that cannot be told.
    log.warning("%s does not compute any more after %s: %s", context.device, grant, answer)
    return Lost(task, attempt, "worker_died", f"{context.device} gave up: {answer.message}"), True


def _of_temporary_folder(error: OSError) -> bool:
    """Whether there is no usable temporary folder, or a path in it is missing or closed to this process.

    If `tempfile` finds no folder that takes a file, it raises ENOENT without a path each time it is asked for one.
    """
    if error.errno not in OF_A_FOLDER:
        return False
    try:
        folder = Path(tempfile.gettempdir())
    except OSError:
        return True
    paths = (Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes))
    return any(path.is_relative_to(folder) for path in paths)


def _empty(context: Context) -> None:
    """Give back all memory that this process keeps between tasks."""
    context.cache.clear()
    gc.collect()
    devices.release(context.device)


def _of_the_environment(grant: Grant, bundle: Bundle, context: Context, error: Exception) -> Lost:
    """The loss, with the part of the environment that owns the fault."""
    node, message = context.node, str(error)
    reason: Reason = "disk_full" if isinstance(error, ArtifactRootFull) else "environment"
    match error:
        case ArtifactRootUnusable():
            fault = Fault("artifact_root", context.artifacts.root, node, writing=error.writing)
        case DataFolderUnusable():
            fault = Fault("data_folder", str(context.data_dir), node, dataset=bundle.dataset)
        case _:
            fault = Fault("node", socket.gethostname(), node)
            message = f"{fault.name} cannot run tasks: {type(error).__name__}: {error}"
    return Lost(grant.task_id, grant.attempt, reason, message, fault)


def _shared(context: Context) -> bool:
    """Whether the memory that ran out is shared with other processes, so that any of them may have taken it."""
    if context.device.type != "cuda":
        return False
    if context.device_share < 1:
        return True
    try:
        free, total = torch.cuda.mem_get_info(context.device)
    except RuntimeError:  # a broken device, which the probe finds next
        return False
    return total - free - torch.cuda.memory_reserved(context.device) > OTHERS_BYTES
