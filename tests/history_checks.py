"""What a history of the store must never show, as pure functions of its rows. Each yields a sentence for a violation.

Rows are anything with the columns of `service/store/tables.py` as attributes. `violations` has them from a store.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from sqlalchemy import Table, select

from service.store import Database, tables

JOB_ENDS = {"job.succeeded", "job.failed", "job.cancelled"}
TASK_ENDS = {"task.succeeded", "task.failed", "task.cancelled"}
WAITS = {"task.queued", "task.blocked"}
NUMBERS = (tables.trainings, tables.measurements, tables.attack_results, tables.control_results)


def violations(database: Database, accepted: Collection[str]) -> Iterator[str]:
    """All that any store must not show once its jobs have ended; `accepted` has the ids of those that were promised."""

    def rows(table: Table) -> list[Any]:
        return list(connection.execute(select(table).order_by(*table.primary_key)))

    with database.read() as connection:
        events, attempts, tasks, edges = map(rows, (tables.events, tables.attempts, tables.tasks, tables.task_edges))
        numbers = Counter(task_id for table in NUMBERS for task_id in connection.scalars(select(table.c.task_id)))
    yield from gaps(events)
    yield from ends_of_jobs(events, accepted)
    yield from overlaps(attempts)
    yield from recorded(tasks, attempts, numbers)
    yield from after_the_end(events)
    yield from before_parents(events, edges)


def gaps(events: Sequence[Any]) -> Iterator[str]:
    """Event ids count from 1 without a gap."""
    for place, event in enumerate(events, 1):
        if event.id != place:
            yield f"event {place} is missing: {event.id} is there"
            return


def ends_of_jobs(events: Iterable[Any], accepted: Collection[str]) -> Iterator[str]:
    """Each accepted job has come to one end: it is taken up again only after another than success, by a retry."""
    ends: dict[str, str] = dict.fromkeys(accepted, "")
    for event in events:
        if event.kind in JOB_ENDS:
            if before := ends.get(event.job_id):
                yield f"{event.kind} of job {event.job_id} after {before} (event {event.id})"
            ends[event.job_id] = event.kind
        elif event.kind in ("job.submitted", "job.retried", "job.queued", "job.running"):
            if ends.get(event.job_id) == "job.succeeded":
                yield f"{event.kind} of job {event.job_id}, which had succeeded (event {event.id})"
            ends[event.job_id] = ""
    yield from (f"job {job_id} has not ended" for job_id, end in ends.items() if not end)


def overlaps(attempts: Iterable[Any]) -> Iterator[str]:
    """A task has one attempt at a time, and they are counted without a gap."""
    by_task: dict[str, list[Any]] = defaultdict(list)
    for attempt in attempts:
        by_task[attempt.task_id].append(attempt)
    for task_id, of_task in by_task.items():
        of_task.sort(key=lambda attempt: attempt.number)
        if [attempt.number for attempt in of_task] != list(range(1, len(of_task) + 1)):
            yield f"the attempts of task {task_id} are not counted from 1 without a gap"
        for earlier, later in pairwise(of_task):
            if earlier.ended_at is None or later.started_at < earlier.ended_at:
                yield f"attempt {later.number} of task {task_id} began before attempt {earlier.number} had ended"


def recorded(tasks: Iterable[Any], attempts: Iterable[Any], with_numbers: Mapping[str, int]) -> Iterator[str]:
    """What has succeeded has one set of numbers, that of its last attempt; nothing else has any."""
    succeeded: dict[str, list[int]] = defaultdict(list)
    for attempt in attempts:
        if attempt.end == "succeeded":
            succeeded[attempt.task_id].append(attempt.number)
    for task in tasks:
        expected = [task.attempt] if task.state == "succeeded" else []
        if succeeded[task.id] != expected:
            yield f"task {task.id} is {task.state} at attempt {task.attempt}, but {succeeded[task.id]} succeeded"
        if with_numbers.get(task.id, 0) != len(expected):
            yield f"task {task.id} is {task.state} and has {with_numbers.get(task.id, 0)} sets of numbers"


def after_the_end(events: Iterable[Any]) -> Iterator[str]:
    """Once a task has ended, above all was cancelled, nothing is recorded of it until it is wanted again."""
    ended: dict[str, str] = {}
    for event in events:
        if event.kind in WAITS:
            ended.pop(event.task_id, None)
        elif event.kind.startswith("task.") and event.task_id in ended:
            yield f"{event.kind} of task {event.task_id} after {ended[event.task_id]} (event {event.id})"
        elif event.kind in TASK_ENDS:
            ended[event.task_id] = event.kind


def before_parents(events: Iterable[Any], edges: Iterable[Any]) -> Iterator[str]:
    """No task runs before all that it is computed from has succeeded."""
    parents: dict[str, list[str]] = defaultdict(list)
    for edge in edges:
        parents[edge.child_id].append(edge.parent_id)
    done: set[str] = set()
    for event in events:
        if event.kind == "task.succeeded":
            done.add(event.task_id)
        elif event.kind == "task.running":
            for parent in parents[event.task_id]:
                if parent not in done:
                    yield f"task {event.task_id} ran before {parent} had succeeded (event {event.id})"


def over_quota(events: Iterable[Any], user_of: Mapping[str, str], limits: Mapping[str, int]) -> Iterator[str]:
    """At no time has a user more unfinished jobs than allowed, by a submission or by a retry."""
    unfinished: dict[str, set[str]] = defaultdict(set)
    for event in events:
        user = user_of.get(event.job_id or "")
        if user is None:
            continue
        if event.kind in ("job.submitted", "job.retried"):
            unfinished[user].add(event.job_id)
            if len(unfinished[user]) > limits.get(user, 1 << 62):
                yield f"{user} has {len(unfinished[user])} unfinished jobs (event {event.id})"
        elif event.kind in JOB_ENDS:
            unfinished[user].discard(event.job_id)


def over_devices(
    attempts: Iterable[Any], sponsor_of: Mapping[tuple[str, float], str], limits: Mapping[str, float]
) -> Iterator[str]:
    """At no time do a user's bundles take more devices than allowed. `sponsor_of` by task and time of its grant."""
    spans: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for attempt in attempts:
        user = sponsor_of.get((attempt.task_id, attempt.started_at))
        if user is not None and user in limits:
            spans[user, attempt.bundle].append(attempt)
    changes: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (user, _), of_bundle in spans.items():
        share = of_bundle[0].device_share
        changes[user].append((min(attempt.started_at for attempt in of_bundle), share))
        if all(attempt.ended_at is not None for attempt in of_bundle):
            changes[user].append((max(attempt.ended_at for attempt in of_bundle), -share))
    for user, of_user in changes.items():
        taken = 0.0
        for at, change in sorted(of_user):
            taken += change
            if taken > limits[user] + 1e-9:
                yield f"{user} takes {taken:g} devices at {at:.3f}, and may take {limits[user]:g}"
