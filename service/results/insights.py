"""Read-only questions about a store, shared by API and CLI. Answers are plain JSON."""

from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

from pydantic import TypeAdapter

from service.errors import InvalidQuery, NotFound
from service.limits import MAX_LIMIT
from service.model.environment import reported
from service.model.json import JsonObject
from service.model.records import Sweep
from service.model.times import iso
from service.results import views
from service.results.questions import ALL_FIELDS, NEWEST_FIRST, Question
from service.results.results import Results
from service.specs import Task
from service.store import Connection, claiming, datasets, history, identifying, meanings, reading
from service.store.job_fields import JOBS
from service.store.keyset import decode_id, encode_id
from service.store.tables import jobs

T = TypeVar("T")
TASK: TypeAdapter[Task] = TypeAdapter(Task)


class Insights(Results):
    """Questions about one store."""

    def jobs(self, question: Question) -> JsonObject:
        """A page of jobs. Raises `InvalidQuery`."""
        with self.database.read() as connection:
            order = question.order(connection, JOBS, jobs.c.sequence)
            page = reading.jobs_page(connection, question.nodes, order, question.after(order), question.limit)
            progress = reading.progress_of_jobs(connection, [job.id for job in page.rows])
        items = [views.job_view(job, progress.get(job.id, 0.0)) for job in page.rows]
        return {"items": items, "next_cursor": question.next_cursor(order, page.end)}

    def job(self, job_id: str) -> JsonObject:
        with self.database.read() as connection:
            job = _existing(reading.job(connection, job_id), f"there is no job {job_id}")
            tasks = reading.tasks_of_job(connection, job_id)
        progress = sum(task.progress for task in tasks) / len(tasks)
        return {**views.job_view(job, progress), "tasks": views.roles_of(job, tasks)}

    def sweeps(self, *, user: str | None, cursor: str | None, limit: int) -> JsonObject:
        """A page of sweeps, the newest first. Raises `InvalidQuery` for an unknown user and for a bad cursor."""
        question = ["sweeps", user]
        after = None if cursor is None else decode_id(question, cursor)
        with self.database.read() as connection:
            if user is not None:
                meanings.checked(connection, meanings.user, "user", user)
            page = reading.sweeps_page(connection, user, after, limit + 1)
            items = self._sweeps(connection, page[:limit])
        return {"items": items, "next_cursor": encode_id(question, page[limit - 1].id) if len(page) > limit else None}

    def sweep(self, sweep_id: str) -> JsonObject:
        with self.database.read() as connection:
            sweep = _existing(reading.sweep(connection, sweep_id), f"there is no sweep {sweep_id}")
            [view] = self._sweeps(connection, [sweep])
        return {**view, "spec": sweep.spec}

    def _sweeps(self, connection: Connection, sweeps: Sequence[Sweep]) -> list[JsonObject]:
        ids = [sweep.id for sweep in sweeps]
        jobs, counts = reading.job_counts(connection, ids), reading.task_counts(connection, ids)
        seconds, slots = reading.seconds_by_kind(connection, ids), claiming.slots(connection)
        tasks = {sweep_id: [count for count in counts if count.sweep_id == sweep_id] for sweep_id in ids}
        return [views.sweep_view(sweep, jobs[sweep.id], tasks[sweep.id], seconds[sweep.id], slots) for sweep in sweeps]

    def task(self, id_or_digest: str) -> JsonObject:
        with self.database.read() as connection:
            task = _existing(reading.task(connection, id_or_digest), f"there is no task {id_or_digest}")
            attempts = reading.attempts_of(connection, task.id)
            jobs = reading.jobs_of_task(connection, task.id, MAX_LIMIT)
        return views.task_view(task, TASK.validate_python(task.spec), attempts, jobs)

    def identify(self, kind: identifying.Kind, given: str, *, user: str | None = None) -> str:
        """The id that is `given`, or the only one that begins with it; raises `AmbiguousId`."""
        given = identifying.canonical(given)
        if not identifying.is_prefix(given):
            return given
        with self.database.read() as connection:
            return identifying.whole(connection, kind, given, user=user)

    def short_ids(self, idents: Sequence[str]) -> dict[str, str]:
        with self.database.read() as connection:
            return identifying.shortest(connection, idents)

    def datasets(self) -> list[JsonObject]:
        with self.database.read() as connection:
            return [views.registered_dataset(row) for row in datasets.registered(connection)]

    def queue(self) -> JsonObject:
        with self.database.read() as connection:
            in_state, tasks = reading.queue_counts(connection)
        return {"jobs": in_state, "tasks": tasks}

    def cluster(self) -> JsonObject:
        """The leading dispatcher, its lease, and the last status of the cluster that it reported."""
        with self.database.read() as connection:
            lease, now = claiming.leader(connection), self.database.now(connection)
        if lease is None:
            return {"leading": False, "dispatcher": None, "lease_expires_at": None, "set_aside": [], "status": {}}
        expires = iso(lease.expires_at)
        return {
            "leading": lease.expires_at > now,
            "dispatcher": lease.holder,
            "lease_expires_at": expires,
            "set_aside": [views.set_aside(fault) for fault in reported(lease.status)],
            "status": lease.status,
        }

    def last_event(self) -> int:
        with self.database.read() as connection:
            return history.last_id(connection)

    def first_event(self, after: int, *, sweep_id: str | None = None, job_id: str | None = None) -> int:
        """The id of the first kept event later than `after`, of everything or of this sweep or job.

        It is `after + 1` if no event in between that may have been one of these was dropped.
        """
        with self.database.read() as connection:
            return self._first_event(connection, after, sweep_id, job_id)

    def _first_event(self, connection: Connection, after: int, sweep_id: str | None, job_id: str | None) -> int:
        first = history.first(connection)
        if first is None or first.id <= after + 1:
            return after + 1
        subject = (reading.sweep(connection, sweep_id) if sweep_id else None) or (
            reading.job(connection, job_id) if job_id else None
        )
        return after + 1 if subject is not None and subject.created_at >= first.at else int(first.id)

    def events(
        self, after: int, *, sweep_id: str | None = None, job_id: str | None = None
    ) -> tuple[int, list[JsonObject], list[JsonObject]]:
        """`(first_event, events later than that id, progress of running tasks)` of everything, a sweep or a job."""
        with self.database.read() as connection:
            first = self._first_event(connection, after, sweep_id, job_id)
            events = history.after(connection, after, sweep_id=sweep_id, job_id=job_id)
            running = reading.running_tasks(connection, sweep_id=sweep_id, job_id=job_id)
        return first, [views.event_view(event) for event in events], [views.running_view(task) for task in running]

    def news(
        self, after: int, *, sweep_ids: Collection[str], job_ids: Collection[str], known: Mapping[str, set[str]]
    ) -> tuple[list[JsonObject], list[JsonObject], dict[str, set[str]]]:
        """`(events, progress, needed_by)` of everything, for many readers: the sweeps and jobs, of these, by task.

        `known` is `needed_by` of an earlier answer. It is used if no event is about a job.
        """
        with self.database.read() as connection:
            events = history.after(connection, after)
            running = reading.running_tasks(connection)
            needed_by = {} if any(event["job_id"] for event in events) else dict(known)
            tasks = {event["task_id"] for event in events if event["task_id"]} | {task.id for task in running}
            needed_by |= history.needing(connection, tasks - needed_by.keys(), sweep_ids, job_ids)
        event_views = [views.event_view(event) for event in events]
        progress = [views.running_view(task) for task in running]
        return event_views, progress, {task_id: needed_by[task_id] for task_id in tasks}


def _existing(value: T | None, otherwise: str) -> T:
    if value is None:
        raise NotFound(otherwise)
    return value


__all__ = ["ALL_FIELDS", "NEWEST_FIRST", "Insights", "InvalidQuery", "Question"]
