"""The live stream of events, as server-sent events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, Header, Query, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from api.http.deps import CurrentCaller, EventFeed, Questions, TruthFromText, Users, WholeFromText
from api.http.errors import documented
from api.http.feed import RENEW_SECONDS, Feed, Reader, event_piece, may_see, progress_piece
from api.http.permissions import scope
from api.http.routing import Router
from api.http.schemas.examples import JOB_ID
from service.errors import DatabaseAway, InvalidQuery, Unauthenticated
from service.lab.access import Access, Caller
from service.model.json import JsonObject
from service.results.insights import Insights

router = Router(prefix="/v1/events", tags=["events"])
PING_SECONDS = 15.0  # the longest silence of a stream, before a comment is sent
CATCHING_UP = CapacityLimiter(4)  # threads that read past events
END = "end"  # the last event of a stream that does not follow
GAP = "gap"  # stands for events that were dropped before they could be sent
LAST_ID = 2**63 - 1
MEDIA_TYPE = "text/event-stream"
EVENT = {
    "type": "object",
    "properties": {
        "data": {"type": "string"},
        "event": {"type": "string"},
        "id": {"type": "string"},
        "retry": {"type": "integer", "minimum": 0},
    },
}


@dataclass(frozen=True)
class Start:
    """A stream starts behind event `after` with event `first`, or a later one, of the sweep or job in `of`."""

    after: int
    first: int
    subject: dict[str, str | None]


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
        WholeFromText,
        Query(ge=0, le=LAST_ID, description="Start behind this event; as `Last-Event-ID`.", examples=[0]),
    ] = None,
    last_event_id: Annotated[int | None, WholeFromText, Header(ge=0, le=LAST_ID)] = None,
) -> Start:
    """The start of the stream: where it broke off; else the beginning of the sweep or job; else now.

    An unknown sweep or job is refused before the stream begins. So is an id that no event has yet, because the reader
    would miss the events up to it.
    """
    if sweep is not None:
        sweep = insights.sweep(insights.identify("sweep", sweep))["id"]
    if job is not None:
        job = insights.job(insights.identify("job", job))["id"]
    resumed = last_event_id if last_event_id is not None else after
    newest = insights.last_event()  # always read, so that a database that is away is answered with a status
    if resumed is None:
        resumed = 0 if sweep or job else newest
    if resumed > newest:
        name = "after" if last_event_id is None else "Last-Event-ID"
        raise InvalidQuery(name, f"there is no event {resumed} yet: the newest is {newest}")
    subject = {"sweep_id": sweep, "job_id": job}
    return Start(resumed, insights.first_event(resumed, **subject), subject)


@router.get(
    "",
    dependencies=[scope("read")],
    response_class=Response,
    responses={200: {"content": {MEDIA_TYPE: {"itemSchema": EVENT}}}, **documented(404, 409, 422)},
)
async def follow_events(
    insights: Questions,
    users: Users,
    feed: EventFeed,
    caller: CurrentCaller,
    start: Annotated[Start, Depends(_start)],
    follow: Annotated[bool, TruthFromText, Query(description="False: send what there is, and end.")] = True,
) -> Response:
    """State changes with their ids (`event: task.succeeded` and so on), and `progress` of running tasks without one.

    A client that comes back with `Last-Event-ID` misses no state change: the stream begins with the `id` that it
    starts behind, without data. With `follow=false` the last is `event: end`: where it is missing, the stream was
    broken off. Comments keep a silent stream open. What changes of users and tokens is told to admins, and to who
    changed it. The stream ends within seconds when the caller's token is revoked or has expired. Old events may have
    been dropped (`UNCANNY_EVENT_DAYS`): where some are missing that belong here, `event: gap` says so in their place,
    with the ids `from` and `to` of what is gone; also to who reads so slowly that they go meanwhile.
    """
    past = _Past(insights, users, caller, start)
    if follow:
        reader = Reader(caller, start.subject["sweep_id"], start.subject["job_id"])
        await feed.join(reader)
        pieces = _followed(past, reader, feed)
    else:
        pieces = _listed(past)
    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return StreamingResponse(pieces, headers=headers, media_type=MEDIA_TYPE)


class _Past:
    """The past events after `last_id`, in pages. `last_id` moves on with the events that were sent."""

    def __init__(self, insights: Insights, users: Access, caller: Caller, start: Start) -> None:
        self._insights, self._users, self._caller, self._subject = insights, users, caller, start.subject
        self._start = start
        self.last_id = start.after
        self.running: list[JsonObject] = []
        self._renewed_at = time.monotonic()

    def started(self) -> bytes:
        """The beginning of a stream: the id that it starts after, and a gap if events were dropped."""
        return format_sse_event(id=str(self.last_id)) + self._gap(self._start.first)

    def _gap(self, first: int) -> bytes:
        """A gap if events between the last one and `first`, the oldest that is kept, were dropped; else nothing."""
        if first <= self.last_id + 1:
            return b""
        gap = {"from": self.last_id + 1, "to": first - 1}
        self.last_id = first - 1
        return format_sse_event(data_str=json.dumps(gap), event=GAP, id=str(self.last_id))

    async def pages(self) -> AsyncIterator[bytes]:
        """Raises `DatabaseAway`, and `Unauthenticated` if the caller's token is no longer valid."""
        while True:
            if time.monotonic() - self._renewed_at >= RENEW_SECONDS:
                self._caller = await to_thread.run_sync(self._users.renewed, self._caller, limiter=CATCHING_UP)
                self._renewed_at = time.monotonic()
            ask = partial(self._insights.events, self.last_id, **self._subject)
            first, events, self.running = await to_thread.run_sync(ask, limiter=CATCHING_UP)
            if gap := self._gap(first):
                yield gap
            if not events:
                return
            self.last_id = events[-1]["id"]
            name = None if self._caller.may("admin") else self._caller.name
            yield b"".join(event_piece(event) for event in events if may_see(event, name))


async def _listed(past: _Past) -> AsyncIterator[bytes]:
    yield past.started()
    try:
        async for page in past.pages():
            yield page
    except (DatabaseAway, Unauthenticated):
        return  # the client connects again, and is answered 503 or 401 then
    end = format_sse_event(data_str=json.dumps({"last_id": past.last_id}), event=END)
    yield b"".join(progress_piece(task) for task in past.running) + end


async def _followed(past: _Past, reader: Reader, feed: Feed) -> AsyncIterator[bytes]:
    try:
        yield past.started()
        while not reader.ended:
            if past.last_id < reader.since or reader.behind:
                reader.since, reader.behind = 0, False
                async for page in past.pages():
                    yield page
            news = []
            for event_id, piece in reader.taken():
                if event_id is None or event_id > past.last_id:
                    past.last_id = event_id or past.last_id
                    news.append(piece)
            if news:
                yield b"".join(news)
            elif not reader.ended and not reader.behind:
                try:
                    async with asyncio.timeout(PING_SECONDS):
                        await reader.woken.wait()
                except TimeoutError:
                    yield KEEPALIVE_COMMENT
    except (DatabaseAway, Unauthenticated):
        return
    finally:
        feed.leave(reader)
