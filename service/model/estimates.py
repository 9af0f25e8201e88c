"""How long a task will take, by stored timings of tasks with the same workload. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from service.model.json import JsonMapping
from service.model.task_kinds import method_of


@dataclass(frozen=True)
class Workload:
    """Tasks of one workload take equally long per unit of their size. `method` is the recipe, attack or measure."""

    kind: str
    method: str
    architecture: str
    dataset: str

    def __str__(self) -> str:
        return f"{self.kind} {self.method} of {self.architecture} on {self.dataset}"


@dataclass(frozen=True)
class Timing:
    """A succeeded task: the device that it ran on, and device seconds per unit of its size."""

    device: str
    seconds_per_unit: float


@dataclass(frozen=True)
class Estimate:
    """Device seconds per unit: median and 90th percentile of `count` timings on `device`, the one last used."""

    device: str
    count: int
    p50: float
    p90: float


def workload(spec: JsonMapping, train_spec: JsonMapping) -> Workload:
    """The workload of a task, by its stored spec and that of the training it works on."""
    method = method_of(spec) or "panel"
    return Workload(spec["kind"], method, train_spec["architecture"], train_spec["dataset"]["name"])


def units(spec: JsonMapping) -> float:
    """The size of a task: a training's epochs, otherwise images, times the attack's steps if it has any."""
    if spec["kind"] == "train":
        return float(max(1, spec["recipe"].get("epochs") or 1))
    steps = spec.get("attack", spec).get("steps") or 1
    return float(max(1, spec["samples"])) * float(steps)


def estimate(newest_first: Sequence[Timing]) -> Estimate | None:
    """An estimate from the timings on the device that was used last; None without timings."""
    if not newest_first:
        return None
    device = newest_first[0].device
    took = sorted(timing.seconds_per_unit for timing in newest_first if timing.device == device)
    return Estimate(device, len(took), _percentile(took, 0.5), _percentile(took, 0.9))


def _percentile(ascending: Sequence[float], fraction: float) -> float:
    """The percentile by nearest rank, which is always a measured value."""
    return ascending[max(0, math.ceil(fraction * len(ascending)) - 1)]
