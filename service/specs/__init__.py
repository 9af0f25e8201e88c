"""The jobs and sweeps that users can ask for, and the tasks that these need. Frozen values; no I/O."""

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
