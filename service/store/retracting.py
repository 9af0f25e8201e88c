"""Retractions: marks on results, by the attack task whose numbers they show."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, Update, func, select, update

from service.store import flagging
from service.store.fields import Column
from service.store.listed import listed
from service.store.result_tables import results
from service.store.tables import job_tasks, jobs


def attacks_of(connection: Connection, where: Sequence[Column]) -> list[str]:
    """The attack tasks of the results that `where` chooses."""
    return list(connection.scalars(select(results.c.attack_task_id).where(*where).distinct()))


def retract(connection: Connection, now: float, user: str, reason: str, task_ids: Sequence[str]) -> list[str]:
    """Mark the results that rest on these attack tasks; returns those that were not marked yet."""
    values = {"retracted_at": now, "retracted_by": user, "retraction_reason": reason}
    statement = update(results).where(_resting_on(task_ids), results.c.retracted_at.is_(None))
    return _marked(connection, statement.values(values))


def restore(connection: Connection, task_id: str) -> list[str]:
    """Take the marks away again; returns the results that had one."""
    values = {"retracted_at": None, "retracted_by": None, "retraction_reason": None}
    statement = update(results).where(_resting_on([task_id]), results.c.retracted_at.is_not(None))
    return _marked(connection, statement.values(values))


def _marked(connection: Connection, statement: Update) -> list[str]:
    """The results whose marks this changes; what they said against others is said no more, or again."""
    changed = sorted(connection.scalars(statement.returning(results.c.job_id)))
    flagging.renew(connection, changed)
    return changed


def specs_of(connection: Connection, job_ids: Sequence[str]) -> list[Row[Any]]:
    """The `cell_id`, `seed` and `spec` of these results."""
    query = select(results.c.cell_id, results.c.seed, jobs.c.spec).join(jobs, jobs.c.id == results.c.job_id)
    return list(connection.execute(query.where(results.c.job_id.in_(listed(job_ids)))))


def last_replicate(connection: Connection, cell_id: int, seed: int) -> int:
    """The highest replicate of which there is a result in this cell."""
    replicate = jobs.c.spec["replicate"].as_integer()
    theirs = select(func.max(replicate)).join(results, results.c.job_id == jobs.c.id)
    where = (results.c.cell_id == cell_id) & (results.c.seed == seed)
    return int(connection.execute(theirs.where(where)).scalar_one() or 0)


def others_of(connection: Connection, job_ids: Sequence[str], user: str) -> list[str]:
    """Whose these results are, apart from `user`."""
    theirs = select(results.c.user).where(results.c.job_id.in_(listed(job_ids)), results.c.user != user)
    return sorted(connection.scalars(theirs.distinct()))


def _resting_on(task_ids: Sequence[str]) -> Column:
    """By the tasks that jobs need, which have an index; a baseline is no attack of the job's own."""
    needing = select(job_tasks.c.job_id).where(job_tasks.c.task_id.in_(listed(task_ids)))
    return results.c.job_id.in_(needing) & results.c.attack_task_id.in_(listed(task_ids))
