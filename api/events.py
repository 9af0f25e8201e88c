"""The live stream of what happens, as server-sent events: the only async code here."""

import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any

from anyio import sleep, to_thread
from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api.deps import CurrentCaller, Questions, SaysTruth, Users
from api.errors import documented
from api.schemas import JOB_ID
from service.errors import DatabaseAway, Unauthenticated

router = APIRouter(prefix="/v1/events", tags=["events"])
POLL_SECONDS = 0.3
RENEW_SECONDS = 5.0  # so often it is asked whether the caller's token is still good
END = "end"  # of a stream that does not go on
LAST_ID = 2**63 - 1
OF_ACCESS = ("user.", "token.")  # what only admins are told, and who did it


def _start(
    insights: Questions,
    sweep: Annotated[
        str | None, Query(description="Only events of this sweep, its jobs and their tasks.", examples=[JOB_ID])
    ] = None,
    job: Annotated[
        str | None, Query(description="Only events of this job and of the tasks that it needs.", examples=[JOB_ID])
    ] = None,
    after: Annotated[
        int | None,
        Query(ge=0, le=LAST_ID, description="Start behind this event; as `Last-Event-ID`.", examples=[0]),
    ] = None,
    last_event_id: Annotated[int | None, Header(ge=0, le=LAST_ID)] = None,
) -> tuple[int, dict[str, str | None]]:
    """Where the stream starts: where it broke off; else at the beginning of that sweep or job; else now.

    Refuses what is not there before the stream begins.
    """
    if sweep is not None:
        sweep = insights.sweep(insights.identify("sweep", sweep))["id"]
    if job is not None:
        job = insights.job(insights.identify("job", job))["id"]
    resumed = last_event_id if last_event_id is not None else after
    newest = insights.last_event()  # asked for in any case: where the database is away, that is said by a status
    if resumed is None:
        resumed = 0 if sweep or job else newest
    return resumed, {"sweep_id": sweep, "job_id": job}


@router.get("", response_class=EventSourceResponse, responses=documented(404, 409, 422))
async def follow_events(
    request: Request,
    insights: Questions,
    users: Users,
    caller: CurrentCaller,
    start: Annotated[tuple[int, dict[str, str | None]], Depends(_start)],
    follow: Annotated[bool, SaysTruth, Query(description="False: send what there is, and end.")] = True,
) -> AsyncIterator[ServerSentEvent]:
    """State changes with their ids (`event: task.succeeded` and so on), and `progress` of running tasks without one.

    A client that comes back with `Last-Event-ID` misses no state change: the stream begins with the `id` that it
    starts behind, without data. With `follow=false` the last is `event: end`: where it is missing, the stream was
    broken off. Comments keep a silent stream open. What changes of users and tokens is told to admins, and to who
    changed it. The stream ends within seconds when the caller's token is revoked or has expired.
    """
    last_id, of = start
    renewed_at = time.monotonic()
    yield ServerSentEvent(id=str(last_id))
    told: dict[str, Any] = {}
    while not (follow and getattr(request.app.state, "stopping", False)):
        try:
            if time.monotonic() - renewed_at >= RENEW_SECONDS:
                caller, renewed_at = await to_thread.run_sync(users.renewed, caller), time.monotonic()
            happened, running = await to_thread.run_sync(partial(insights.events, last_id, **of))
        except (DatabaseAway, Unauthenticated):
            return  # the client comes back, and then is told so
        for event in happened:
            last_id = event["id"]
            if event["kind"].startswith(OF_ACCESS) and not (caller.may("admin") or event["actor"] == caller.name):
                continue
            yield ServerSentEvent(data=event, event=event["kind"], id=str(last_id))
        news = [task for task in running if told.get(task["task_id"]) != (task["progress"], task["detail"])]
        told = {task["task_id"]: (task["progress"], task["detail"]) for task in running}
        for task in news:
            yield ServerSentEvent(data=task, event="progress")
        if happened:
            continue  # there may be more than one answer holds
        if not follow:
            yield ServerSentEvent(data={"last_id": last_id}, event=END)
            return
        await sleep(POLL_SECONDS)
