"""Trained networks: the weights that trainings of this service made."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Select, func, select

from service.model.jobs import TaskState
from service.model.results import TrainedNetwork
from service.store.listed import listed
from service.store.tables import job_tasks, tasks, trainings

# Any in queries: SQLAlchemy cannot type a row of expressions.
RECIPE: ColumnElement[str] = tasks.c.spec["recipe", "name"].as_string()
FIELDS: Mapping[str, ColumnElement[str] | Column[str]] = {
    "weights_sha256": trainings.c.checkpoint_digest,
    "architecture": tasks.c.spec["architecture"].as_string(),
    "dataset": tasks.c.spec["dataset", "name"].as_string(),
    "recipe": RECIPE,
}
"""The fields by which networks can be filtered."""


def page(connection: Connection, filters: Mapping[str, str], after: str | None, limit: int) -> list[TrainedNetwork]:
    """The newest first; `after` is the last task's id of the page before. UUIDv7 ids are in the order of creation."""
    query = _made_here().where(*(FIELDS[name] == value for name, value in filters.items()))
    if after is not None:
        query = query.where(trainings.c.task_id < after)
    return _networks(connection, query.order_by(trainings.c.task_id.desc()).limit(limit))


def by_weights(connection: Connection, sha256: str) -> list[TrainedNetwork]:
    """The trainings that made these weights, the earliest first."""
    query = _made_here().where(trainings.c.checkpoint_digest == sha256)
    return _networks(connection, query.order_by(trainings.c.task_id))


def job_counts(connection: Connection, task_ids: Sequence[str]) -> dict[str, int]:
    """How many jobs need each of these trainings."""
    query = select(job_tasks.c.task_id, func.count()).where(job_tasks.c.task_id.in_(listed(task_ids)))
    return {task_id: count for task_id, count in connection.execute(query.group_by(job_tasks.c.task_id))}


def _networks(connection: Connection, query: Select[Any]) -> list[TrainedNetwork]:
    return [TrainedNetwork(*row) for row in connection.execute(query)]


def _made_here() -> Select[Any]:
    """Finished trainings as `TrainedNetwork` has them. Imports are left out: their weights were made elsewhere."""
    query = select(
        trainings.c.task_id,
        tasks.c.digest,
        tasks.c.former_digest,
        tasks.c.spec,
        trainings.c.checkpoint_digest,
        trainings.c.checkpoint_bytes,
        trainings.c.test_accuracy,
        tasks.c.finished_at,
        tasks.c.retracted_at,
        tasks.c.retracted_by,
        tasks.c.retraction_reason,
    )
    joined = query.join(tasks, tasks.c.id == trainings.c.task_id)
    return joined.where(tasks.c.state == TaskState.SUCCEEDED, RECIPE != "imported")
