"""Jobs that need retracted tasks, or tasks of an older version, are planned again: then they need tasks of today."""

import logging
from collections.abc import Collection, Iterable, Sequence

from pydantic import ValidationError

from service.errors import Conflict, InvalidSpec
from service.model.executor import Grant
from service.model.jobs import RETRIABLE
from service.model.records import Job
from service.queue.plans import plans_of
from service.specs import JobSpec, problems
from service.specs.plan import JobPlan
from service.specs.versions import version_of_spec
from service.store import Connection, jobs, reading, retractions

log = logging.getLogger("uncanny.replanning")


class _Refused(Exception):
    """This version refuses a spec that an older one accepted."""


def outdated(grants: Iterable[Grant]) -> list[str]:
    """The ids of the tasks whose version is older than the one that this code computes."""
    return [grant.task_id for grant in grants if grant.spec["version"] < version_of_spec(grant.spec)]


def replan(connection: Connection, now: float, actor: str, task_ids: Collection[str]) -> int:
    """Plan the live jobs again that need these tasks; returns how many were planned.

    A job whose spec this version refuses is cancelled, and its reason says why.
    """
    plans: list[tuple[Job, JobPlan]] = []
    for job in reading.live_jobs_needing(connection, task_ids):
        try:
            plans.append((job, _plan(connection, job)))
        except _Refused as refused:
            jobs.cancel_jobs(connection, now, actor, [job.id], str(refused))
    if plans:
        jobs.replan_jobs(connection, now, actor, plans)
        log.info("%d jobs were planned again: their tasks are of an older version, or retracted", len(plans))
    return len(plans)


def before_retry(
    connection: Connection, now: float, actor: str, job_ids: Sequence[str], states: Collection[str] = RETRIABLE
) -> None:
    """Plan the jobs again that ended in one of these states and need retracted tasks: a retry uses no such task.

    Raises `Conflict` if this version refuses a spec.
    """
    ended = reading.jobs_in(connection, retractions.outlived(connection, job_ids), states)
    try:
        plans = [(job, _plan(connection, job)) for job in ended]
    except _Refused as refused:
        raise Conflict(f"it needs a retracted task, and {refused}: submit it again") from None
    if plans:
        jobs.replan_jobs(connection, now, actor, plans)


def _plan(connection: Connection, job: Job) -> JobPlan:
    try:
        [plan] = plans_of(connection, [JobSpec.model_validate(job.spec)])
    except (InvalidSpec, ValidationError) as error:
        refused = problems(error) if isinstance(error, ValidationError) else error.errors
        raise _Refused("this version refuses its spec: " + "; ".join(map(": ".join, refused))) from None
    return plan
