"""Tasks whose numbers are made up, for tests that need many quick jobs; and a dispatcher's process that does them."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from service.lab.artifacts import Artifacts
from service.logs import configure
from service.model.executor import (
    ArtifactRef,
    Bits,
    Bundle,
    Failed,
    Grant,
    Message,
    Outcome,
    Progress,
    Started,
    Succeeded,
)
from service.processes import SignalSafeEvent
from service.queue.dispatcher import Dispatcher
from service.queue.inprocess import InProcessExecutor
from service.settings import Settings
from service.store import Database

DIVERGES, SLOW = 666, 777  # seeds of trainings that fail at once, and that do not end by themselves
PANEL = ("fgsm", "noise", "margin", "square", "pgd", "more_steps")
LEAK = "--leak"  # to see that whoever looks for leaks finds one


def made_up(bundle: Bundle, hold: threading.Event | None = None) -> Iterator[Message]:
    """Run a bundle without computing anything: the same numbers for the same spec. A training waits for `hold`."""
    for grant in bundle.grants:
        yield Started(grant.task_id, grant.attempt, "made up")
        yield Progress(grant.task_id, grant.attempt, 0.5, {"done": 1, "total": 2})
        if grant.spec["kind"] == "train" and grant.spec["seed"] == DIVERGES:
            yield Failed(grant.task_id, grant.attempt, "configuration", "training diverged in epoch 1: the loss is nan")
            continue
        while grant.spec["kind"] == "train" and (grant.spec["seed"] == SLOW or (hold and not hold.is_set())):
            time.sleep(0.01)
        yield Succeeded(grant.task_id, grant.attempt, outcome_of(grant))


def outcome_of(grant: Grant) -> Outcome:
    spec = grant.spec
    weights = spec.get("checkpoint", grant.digest)  # another training leaves other weights
    provenance = {"torch": "0.0", "device": "none", "wall_seconds": 0.01, "weights_sha256": weights}
    match spec["kind"]:
        case "train":
            epochs = {"epochs": {"epoch": [1, 2], "loss": [1.0, 0.5]}}
            checkpoint = ArtifactRef(grant.digest, 1000, "checkpoint")
            return Outcome({"test_accuracy": 0.9, "seconds": 1.5}, epochs, {}, (checkpoint,), provenance)
        case "measure":
            return Outcome({name: -float(spec["scale"]) for name in NUMBERS}, provenance=provenance)
        case "control":
            bits = {f"robust_{name}": packed([True] * spec["samples"]) for name in PANEL}
            counts = ("eps_zero_changed", "random_forward_changed", "train_mode_modules", "batch_dependent_changed")
            return Outcome(dict.fromkeys(counts, 0), bits=bits, provenance=provenance)
    n = spec["samples"]
    robust = [i % 2 == 0 or spec["scale"] >= 50 for i in range(n)]
    bits = {"clean_correct": packed([True] * n), "robust": packed(robust), "zero_gradient": packed([False] * n)}
    numbers = {"clean_accuracy": 1.0, "clean_loss": 0.1, "robust_accuracy": sum(robust) / n, "robust_loss": 2.0}
    numbers |= {"zero_gradient_fraction": 0.0, "flip_rate": 0.5, "loss_increase_q95": 3.0}
    trajectory = {"trajectory": {"step": [0, 1], "loss_median": [0.1, 2.0]}}
    return Outcome(numbers, trajectory, bits, (), provenance)


NUMBERS = ("log_hessian_trace_median", "log_relative_sharpness_median", "log_relative_flatness_median", "weight_norm")


def packed(bits: list[bool]) -> Bits:
    return Bits(len(bits), np.packbits(np.array(bits)).tobytes())


leaked: list[Any] = []


def leaking(bundle: Bundle) -> Iterator[Message]:
    """The same, with bytes, and for one bundle in ten a descriptor and a thread, that nobody gives back."""
    leaked.append(bytes(64 << 10))
    if len(leaked) % 10 == 0:
        os.open("/dev/null", os.O_RDONLY)
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    yield from made_up(bundle)


def main() -> None:
    """Dispatch until SIGTERM."""
    stop = SignalSafeEvent()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    configure("plain")
    settings = Settings()
    database = Database(settings.database)
    executor = InProcessExecutor(leaking if LEAK in sys.argv else made_up, cpus=2, grace_seconds=1)
    Dispatcher(database, Artifacts(settings.artifacts), executor, settings, "made-up").run(stop)
    database.close()


if __name__ == "__main__":
    main()
