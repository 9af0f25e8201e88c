"""The live stream of what happens, as server-sent events: the only async code here."""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from anyio import sleep, to_thread
from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api.deps import CurrentCaller, Questions, SaysTruth, Users
from api.errors import documented
from api.schemas import JOB_ID
from service.errors import DatabaseAway, InvalidQuery, Unauthenticated

router = APIRouter(prefix="/v1/events", tags=["events"])
POLL_SECONDS = 0.3
RENEW_SECONDS = 5.0  # so often it is asked whether the caller's token is still good
END = "end"  # of a stream that does not go on
GAP = "gap"  # of what was dropped before it could be sent
LAST_ID = 2**63 - 1
OF_ACCESS = ("user.", "token.")  # what only admins are told, and who did it


@dataclass(frozen=True)
class Start:
    """A stream starts behind event `after` with event `first`, or a later one, of the sweep or job in `of`."""

    after: int
    first: int
    of: dict[str, str | None]


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
) -> Start:
    """Where the stream starts: where it broke off; else at the beginning of that sweep or job; else now.

    Refuses what is not there before the stream begins, and an id that no event has yet: what comes would be missed.
    """
    if sweep is not None:
        insights.sweep(sweep)
    if job is not None:
        insights.job(job)
    resumed = last_event_id if last_event_id is not None else after
    newest = insights.last_event()  # asked for in any case: where the database is away, that is said by a status
    if resumed is None:
        resumed = 0 if sweep or job else newest
    if resumed > newest:
        name = "after" if last_event_id is None else "Last-Event-ID"
        raise InvalidQuery(name, f"there is no event {resumed} yet: the newest is {newest}")
    of = {"sweep_id": sweep, "job_id": job}
    return Start(resumed, insights.first_event(resumed, **of), of)


@router.get("", response_class=EventSourceResponse, responses=documented(404, 422))
async def follow_events(
    request: Request,
    insights: Questions,
    users: Users,
    caller: CurrentCaller,
    start: Annotated[Start, Depends(_start)],
    follow: Annotated[bool, SaysTruth, Query(description="False: send what there is, and end.")] = True,
) -> AsyncIterator[ServerSentEvent]:
    """State changes with their ids (`event: task.succeeded` and so on), and `progress` of running tasks without one.

    A client that comes back with `Last-Event-ID` misses no state change: the stream begins with the `id` that it
    starts behind, without data. With `follow=false` the last is `event: end`: where it is missing, the stream was
    broken off. Comments keep a silent stream open. What changes of users and tokens is told to admins, and to who
    changed it. The stream ends within seconds when the caller's token is revoked or has expired. Old events may have
    been dropped (`UNCANNY_EVENT_DAYS`): where some are missing that belong here, `event: gap` says so first, with the
    ids `from` and `to` of what is gone.
    """
    last_id, of = start.after, start.of
    renewed_at = time.monotonic()
    yield ServerSentEvent(id=str(last_id))
    if start.first > last_id + 1:
        gap = {"from": last_id + 1, "to": start.first - 1}
        last_id = start.first - 1
        yield ServerSentEvent(data=gap, event=GAP, id=str(last_id))
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
