"""Tasks, which jobs share."""

from api.http.deps import CurrentCaller, Questions, User, Verbs
from api.http.errors import documented
from api.http.permissions import scope
from api.http.routing import Answer, Router
from api.http.schemas.retractions import Restored, Retracted, Retraction
from api.http.schemas.tasks import Task
from service.queue import retractions

router = Router(prefix="/v1/tasks", tags=["tasks"])


@router.get("/{task_id}", dependencies=[scope("read")], response_model=Task, responses=documented(404))
def get_task(task_id: str, insights: Questions) -> Answer:
    """One task by id or digest: state, attempts with provenance, worker, progress, and how its digest came about."""
    return insights.task(task_id)


@router.post(
    "/{task_id}:retract",
    dependencies=[scope("submit")],
    response_model=Retracted,
    responses=documented(403, 404, 409, 422),
)
def retract_task(task_id: str, body: Retraction, service: Verbs, user: User, caller: CurrentCaller) -> Answer:
    """Hide everything that rests on a task: for a training all its scales, attacks and measures, whoever asked.

    Of a further measure only the numbers are hidden. Live jobs, and all that are submitted from now on, get a new
    generation of what was retracted. Nothing is deleted.
    """
    admin = caller.may("admin")
    return retractions.retract_task(service, task_id, body.reason, user=user, rerun=body.rerun, admin=admin)


@router.post(
    "/{task_id}:restore", dependencies=[scope("submit")], response_model=Restored, responses=documented(403, 404, 409)
)
def restore_task(task_id: str, service: Verbs, user: User, caller: CurrentCaller) -> Answer:
    """Take a retraction back, of all that was retracted with the task."""
    return retractions.restore_task(service, task_id, user=user, admin=caller.may("admin"))
