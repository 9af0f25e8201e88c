"""The event feed: one poll of the database serves all readers of events."""

import asyncio
import json
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar, TypeVarTuple

from anyio import CapacityLimiter, to_thread
from fastapi.sse import format_sse_event

from api.http.turns import Busy
from service.errors import DatabaseAway, Unauthenticated
from service.lab.access import Access, Caller
from service.model.json import JsonObject
from service.results.insights import Insights
from service.store.history import PAGE

POLL_SECONDS = 0.3
PAUSE_FACTOR, LONGEST_PAUSE_SECONDS = 9, 2.0  # the pause between two polls: so many times as long as one took
RENEW_SECONDS = 5.0  # between two checks that the callers' tokens are still valid
MOST_READERS = 2000
MOST_PENDING = 64  # polls that may wait for a reader; one that is further behind reads from the database again
READERS_AT_ONCE = 16  # that are woken in one turn of the event loop
OF_ACCESS = ("user.", "token.")  # events that only admins see, and the user who caused them

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")
Piece = tuple[int | None, bytes]
"""An event as bytes to send, with its id; progress has no id."""


@dataclass(eq=False)
class Reader:
    """An open stream of the events of a sweep or a job, or of all, with the pieces that wait to be sent on it.

    It is given the events after `since`. `behind` says that some were left out, because too many were waiting.
    """

    caller: Caller
    sweep_id: str | None = None
    job_id: str | None = None
    since: int = 0
    fresh: bool = True  # it has not been sent the progress of the running tasks yet
    behind: bool = False
    ended: bool = False
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    _pending: deque[list[Piece]] = field(default_factory=deque)

    @property
    def group(self) -> tuple[str | None, str | None, str | None]:
        """Readers of one group are sent the same pieces."""
        return self.sweep_id, self.job_id, None if self.caller.may("admin") else self.caller.name

    def give(self, pieces: list[Piece]) -> None:
        if len(self._pending) >= MOST_PENDING:
            self.behind = True
            self._pending.clear()
        elif not self.behind:
            self._pending.append(pieces)
        self.woken.set()

    def taken(self) -> Iterator[Piece]:
        """The pieces that wait; they wait no longer. `woken` is set when there are more."""
        self.woken.clear()
        while self._pending:
            yield from self._pending.popleft()

    def end(self) -> None:
        self.ended = True
        self.woken.set()


class Feed:
    """Polls the database every `POLL_SECONDS` while there are readers, and gives each of them the new events.

    `is_stopping` says whether the server is ending its streams.
    """

    def __init__(self, insights: Insights, users: Access, is_stopping: Callable[[], bool]) -> None:
        self._insights, self._users, self._is_stopping = insights, users, is_stopping
        self._readers: dict[Reader, None] = {}
        self._position: int | None = None
        self._task: asyncio.Task[None] | None = None
        self._thread = CapacityLimiter(1)
        self._needed_by: dict[str, set[str]] = {}
        self._followed: tuple[set[str], set[str]] = (set(), set())
        self._progress: dict[str, tuple[object, object]] = {}
        self._renewed_at = 0.0

    async def join(self, reader: Reader) -> None:
        """Give this reader the events from now on. Raises `DatabaseAway`, or `Busy` if there are too many readers."""
        if len(self._readers) >= MOST_READERS:
            raise Busy(f"{MOST_READERS} streams of events are open: try again in a moment")
        newest = self._position
        if newest is None or self._task is None or self._task.done():
            newest = await self._run(self._insights.last_event)
        if self._task is None or self._task.done():
            self._position, self._renewed_at = newest, time.monotonic()
            self._task = asyncio.get_running_loop().create_task(self._poll())
        assert self._position is not None
        reader.since = self._position
        self._readers[reader] = None

    def leave(self, reader: Reader) -> None:
        self._readers.pop(reader, None)

    async def _poll(self) -> None:
        try:
            while self._readers and not self._is_stopping():
                began = time.monotonic()
                is_full = await self._give_news()
                pause = PAUSE_FACTOR * (time.monotonic() - began)
                if time.monotonic() - self._renewed_at >= RENEW_SECONDS:
                    await self._renew()
                if not is_full:
                    await asyncio.sleep(max(POLL_SECONDS, min(pause, LONGEST_PAUSE_SECONDS)))
        except DatabaseAway:
            pass  # clients connect again, and are answered 503 then
        finally:
            for reader in self._readers:
                reader.end()
            self._readers.clear()

    async def _give_news(self) -> bool:
        """Give out the new events. Returns whether there may be more of them already."""
        assert self._position is not None
        sweeps = {reader.sweep_id for reader in self._readers if reader.sweep_id}
        jobs = {reader.job_id for reader in self._readers if reader.job_id}
        if self._followed != (sweeps, jobs):
            self._followed, self._needed_by = (sweeps, jobs), {}
        ask = partial(self._insights.news, sweep_ids=sweeps, job_ids=jobs, known=self._needed_by)
        events, running, self._needed_by = await self._run(ask, self._position)
        if events:
            self._position = events[-1]["id"]
        progress = {task["task_id"]: (task["progress"], task["detail"]) for task in running}
        changed = {task_id for task_id, state in progress.items() if self._progress.get(task_id) != state}
        self._progress = progress
        await self._give(events, running, changed)
        return len(events) >= PAGE

    async def _give(self, new_events: list[JsonObject], running: list[JsonObject], changed: set[str]) -> None:
        events = [(event, event_piece(event)) for event in new_events]
        progress = [(task, progress_piece(task)) for task in running]
        groups: dict[tuple[str | None, str | None, str | None, bool], list[Reader]] = defaultdict(list)
        for reader in self._readers:
            groups[*reader.group, reader.fresh].append(reader)
            reader.fresh = False
        for (sweep_id, job_id, name, fresh), readers in groups.items():
            wanted = partial(self._wanted, sweep_id, job_id)
            pieces: list[Piece] = [
                (event["id"], piece) for event, piece in events if may_see(event, name) and wanted(event)
            ]
            pieces += [
                (None, piece) for task, piece in progress if (fresh or task["task_id"] in changed) and wanted(task)
            ]
            for start in range(0, len(readers) if pieces else 0, READERS_AT_ONCE):
                for reader in readers[start : start + READERS_AT_ONCE]:
                    reader.give(pieces)
                await asyncio.sleep(0)

    def _wanted(self, sweep_id: str | None, job_id: str | None, row: JsonObject) -> bool:
        """Whether an event or progress belongs to that sweep or job, or to a task that it needs."""
        if sweep_id is None and job_id is None:
            return True
        needed_by = self._needed_by.get(row["task_id"], set())
        return all(
            ident is None or row.get(name) == ident or ident in needed_by
            for name, ident in (("sweep_id", sweep_id), ("job_id", job_id))
        )

    async def _renew(self) -> None:
        """End the readers whose tokens are no longer valid."""
        callers = {reader.caller for reader in self._readers}
        renewed = await self._run(self._renewed, callers)
        self._renewed_at = time.monotonic()
        for reader in self._readers:
            if reader.caller in callers:
                caller = renewed.get(reader.caller)
                if caller is None:
                    reader.end()
                else:
                    reader.caller = caller

    def _renewed(self, callers: Iterable[Caller]) -> dict[Caller, Caller]:
        renewed = {}
        for caller in callers:
            try:
                renewed[caller] = self._users.renewed(caller)
            except Unauthenticated:
                continue
        return renewed

    async def _run(self, ask: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
        return await to_thread.run_sync(ask, *arguments, limiter=self._thread)


def may_see(event: JsonObject, name: str | None) -> bool:
    """Whether a user may see the event. `name` is None for admins."""
    return name is None or not event["kind"].startswith(OF_ACCESS) or event["actor"] == name


def event_piece(event: JsonObject) -> bytes:
    return format_sse_event(data_str=json.dumps(event), event=event["kind"], id=str(event["id"]))


def progress_piece(task: JsonObject) -> bytes:
    return format_sse_event(data_str=json.dumps(task), event="progress")
