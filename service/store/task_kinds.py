"""How the kinds of tasks differ in SQL. `service/model/task_kinds.py` has their other differences."""

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Column, Table

from service.store.tables import attack_results, control_results, jobs, measurements, trainings


@dataclass(frozen=True)
class TaskKind:
    """`numbers` is the table of this kind's numbers. If `asked_for`, results can be filtered by each number.

    `roles` are the parts that tasks of this kind play in a job, with the columns of `jobs` that name these tasks.
    `unnamed` is the part of a task that no column names: the training of a transfer's source, a further measure. None
    if there is no such task.
    """

    numbers: Table
    roles: Mapping[str, Column[str]]
    unnamed: str | None = None
    asked_for: bool = False

    @property
    def column(self) -> str:
        """The column of `jobs` that names the task of the job itself, not that of its baseline."""
        return next(iter(self.roles.values())).name


TASK_KINDS: Mapping[str, TaskKind] = {
    "train": TaskKind(trainings, {"train": jobs.c.train_task_id}, unnamed="source"),
    "measure": TaskKind(measurements, {"closed_forms": jobs.c.measure_task_id}, unnamed="measure", asked_for=True),
    "attack": TaskKind(
        attack_results, {"attack": jobs.c.attack_task_id, "baseline": jobs.c.baseline_task_id}, asked_for=True
    ),
    "control": TaskKind(control_results, {"control": jobs.c.control_task_id}),
}
ROLES = {role: column for kind in TASK_KINDS.values() for role, column in kind.roles.items()}
