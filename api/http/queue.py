"""The queue as a whole: its counts, pause and resume."""

from api.http.deps import Questions, ServerSettings, User, Verbs
from api.http.errors import documented
from api.http.permissions import scope
from api.http.routing import Answer, Router
from api.http.schemas.queue import Queue
from service.model.json import JsonObject
from service.queue.explaining import queue_status
from service.results.insights import Insights
from service.settings import Settings

router = Router(prefix="/v1", tags=["queue"])


@router.get("/queue", dependencies=[scope("read")], response_model=Queue, responses=documented())
def get_queue(insights: Questions, settings: ServerSettings) -> Answer:
    """Jobs by state, tasks by kind and state, whether the queue is paused, and each user's share and usage."""
    return _status(insights, settings)


@router.post("/queue:pause", dependencies=[scope("admin")], response_model=Queue, responses=documented())
def pause_queue(service: Verbs, insights: Questions, settings: ServerSettings, user: User) -> Answer:
    """Claim nothing more, of nobody. What runs is finished; jobs are accepted as always."""
    service.pause_queue(user=user)
    return _status(insights, settings)


@router.post("/queue:resume", dependencies=[scope("admin")], response_model=Queue, responses=documented())
def resume_queue(service: Verbs, insights: Questions, settings: ServerSettings, user: User) -> Answer:
    """Go on."""
    service.resume_queue(user=user)
    return _status(insights, settings)


def _status(insights: Insights, settings: Settings) -> JsonObject:
    return {**insights.queue(), **queue_status(insights.database, settings)}
