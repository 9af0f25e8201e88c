"""What can be asked for, and what it makes the workers compute. Frozen values; no I/O."""

from service.specs.canonical import canonical, digest, fields
from service.specs.job import JobSpec
from service.specs.sweep import Sweep, problems
from service.specs.tasks import AttackTask, ControlTask, DatasetRef, MeasureTask, Task, TrainTask

__all__ = [
    "AttackTask",
    "ControlTask",
    "DatasetRef",
    "JobSpec",
    "MeasureTask",
    "Sweep",
    "Task",
    "TrainTask",
    "canonical",
    "digest",
    "fields",
    "problems",
]
