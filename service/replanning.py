"""Jobs that need tasks of an older version: they are planned again, and need tasks of this one."""

import logging
from collections.abc import Collection, Iterable
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Connection, Row, select

from service.errors import InvalidSpec
from service.executor import Grant
from service.jobs import LIVE_JOB
from service.plan import JobPlan
from service.planning import plans_of
from service.specs import JobSpec, problems
from service.specs.versions import version_of_spec
from service.store import submitting
from service.store.listed import listed
from service.store.tables import job_tasks, jobs

log = logging.getLogger("uncanny.replanning")


def outdated(grants: Iterable[Grant]) -> list[str]:
    """The ids of those tasks whose version is older than what this code computes."""
    return [grant.task_id for grant in grants if grant.spec["version"] < version_of_spec(grant.spec)]


def replan(connection: Connection, now: float, actor: str, task_ids: Collection[str]) -> int:
    """Plan the live jobs that need these tasks again; returns how many those are.

    One whose spec this version refuses is cancelled, and its reason says why.
    """
    needing = select(job_tasks.c.job_id).where(job_tasks.c.task_id.in_(listed(task_ids)))
    live = jobs.c.id.in_(needing) & jobs.c.state.in_(LIVE_JOB)
    rows = connection.execute(select(jobs).where(live).order_by(jobs.c.sequence)).all()
    plans: list[tuple[Row[Any], JobPlan]] = []
    for row in rows:
        try:
            plans += [(row, plan) for plan in plans_of(connection, [JobSpec.model_validate(row.spec)])]
        except (InvalidSpec, ValidationError) as error:
            refused = problems(error) if isinstance(error, ValidationError) else error.errors
            reason = "this version refuses its spec: " + "; ".join(map(": ".join, refused))
            submitting.cancel_jobs(connection, now, actor, [row.id], reason)
    if plans:
        submitting.replan_jobs(connection, now, actor, plans)
        log.info("%d jobs were planned again: they needed tasks of an older version", len(plans))
    return len(plans)
