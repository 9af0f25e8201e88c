"""Values of the store as the JSON that users see, with the same names in REST, CSV and the CLI. Pure functions."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Protocol

from service.model import records
from service.model.environment import SetAside
from service.model.jobs import JobState, TaskState
from service.model.json import JsonMapping, JsonObject
from service.model.observations import Count, intervals_of
from service.model.records import Attempt, Job, RegisteredDataset, RunningTask, Sweep, TaskCount
from service.model.results import CellSpec, FurtherMeasure, Result
from service.model.threat_model import threat_model
from service.model.times import iso
from service.specs.canonical import canonical
from service.specs.tasks import Task
from service.specs.versions import LATER
from service.store import reading

# Numbers that a row has only if they are named: quantiles, subsets and the training split.
DETAIL = re.compile(r"^train_|_q\d\d(_|$)|_clean_correct|_n_zero$|_iterations$|_converged$")
VERDICT = ("verdict", "verdict_reasons", "verdict_checks", "verdict_counts", "verdict_version")
TASK_STATES = tuple(str(state) for state in TaskState)


def job_view(job: Job, progress: float) -> JsonObject:
    return {
        "id": job.id,
        "state": job.state,
        "reason": job.reason,
        "progress": round(progress, 4),
        "sweep_id": job.sweep_id,
        "user": job.user,
        "priority": job.priority,
        "boosted": job.boosted,
        "labels": job.labels,
        "spec": job.spec,
        "spec_digest": job.spec_digest,
        "verdict": job.verdict,
        "created_at": iso(job.created_at),
        "finished_at": iso(job.finished_at),
    }


def version(ident: str, priority: int, labels: Mapping[str, str]) -> str:
    """The version of a job or sweep, for conditional changes: a digest of its id and of all fields that can change."""
    return hashlib.sha256(json.dumps([ident, priority, sorted(labels.items())]).encode()).hexdigest()[:32]


def task_line(task: records.Task, roles: list[str]) -> JsonObject:
    """A task as one line of its job."""
    return {
        "id": task.id,
        "digest": task.own_digest,
        "kind": task.kind,
        "roles": roles,
        "state": task.state,
        "reason": task.reason,
        "progress": task.progress,
        "attempt": task.attempt,
        "worker": task.worker,
        "started_at": iso(task.started_at),
        "finished_at": iso(task.finished_at),
    }


def task_view(task: records.Task, spec: Task, attempts: Sequence[Attempt], jobs: list[str]) -> JsonObject:
    """A whole task: its spec, the canonical form whose SHA-256 is its digest, and every attempt."""
    return {
        **{key: value for key, value in task_line(task, []).items() if key != "roles"},
        "spec": task.spec,
        "canonical": canonical(spec),
        "generation": task.generation,
        "errors": task.errors,
        "suspect_losses": task.suspect_losses,
        "cancel_requested": task.cancel_requested,
        "detail": task.detail,
        "holder": task.holder,
        "created_at": iso(task.created_at),
        "jobs": jobs,
        **retracted(task),
        "retracted_with": task.retracted_with,
        "joined": task.former_digest is None,
        "attempts": [_attempt_view(attempt) for attempt in attempts],
    }


def _attempt_view(attempt: Attempt) -> JsonObject:
    return {
        "number": attempt.number,
        "holder": attempt.holder,
        "worker": attempt.worker,
        "started_at": iso(attempt.started_at),
        "ended_at": iso(attempt.ended_at),
        "end": attempt.end,
        "message": attempt.message,
        "traceback": attempt.traceback,
        "provenance": attempt.provenance,
    }


def set_aside(fault: SetAside) -> JsonObject:
    """A part of the environment that gets no work, and the time from which it is tried again."""
    return {**fault.as_data(), "since": iso(fault.since), "retry_at": iso(fault.retry_at)}


def sweep_view(
    sweep: Sweep, jobs: dict[str, int], counts: Sequence[TaskCount], seconds: dict[str, float], slots: float
) -> JsonObject:
    total = sum(count.n for count in counts)
    done = sum(count.n if count.state == TaskState.SUCCEEDED else count.progress for count in counts)
    by_state = {state: sum(c.n for c in counts if c.state == state) for state in TASK_STATES}
    state = sweep_state(jobs, sweep.paused)
    return {
        "id": sweep.id,
        "name": sweep.name,
        "user": sweep.user,
        "state": state,
        "priority": sweep.priority,
        "labels": sweep.labels,
        "created_at": iso(sweep.created_at),
        "pause_reason": sweep.pause_reason if state == "paused" else None,
        "jobs": {"total": sum(jobs.values()), **jobs},
        "tasks": {"total": total, **by_state},
        "progress": round(done / total, 4) if total else 1.0,
        "eta_seconds": eta_seconds(counts, seconds, slots) if state == "running" else None,
    }


def sweep_state(jobs: Mapping[str, int], paused: bool) -> str:
    """The state of a sweep, by the counts of its jobs. Held jobs wait for a person: with only these left, it failed."""
    if jobs[JobState.QUEUED] or jobs[JobState.RUNNING]:
        return "paused" if paused else "running"
    if jobs[JobState.FAILED] or jobs[JobState.HELD]:
        return "failed"
    return "cancelled" if jobs[JobState.CANCELLED] else "succeeded"


def eta_seconds(counts: Sequence[TaskCount], seconds: Mapping[str, float], slots: float) -> float | None:
    """Seconds until the remaining tasks are done on all slots, if each takes as long as its kind did; None: unknown."""
    if not seconds or slots <= 0:
        return None
    usual = max(seconds.values())  # for kinds of which none has finished yet
    left, tasks = 0.0, 0
    for count in counts:
        if count.state in (TaskState.BLOCKED, TaskState.QUEUED, TaskState.RUNNING):
            left += (count.n - count.progress) * seconds.get(count.kind, usual)
            tasks += count.n
    return round(left / max(1.0, min(slots, tasks)), 1)


def result_row(
    result: Result, further: Sequence[FurtherMeasure], cell: CellSpec, *, test_samples: int | None, whole: bool
) -> JsonObject:
    """One result: its spec, the headline numbers, the verdict, each measure's summary, times, provenance.

    `test_samples` is how many test images the data set has. Only a `whole` row has the details of the numbers.
    """
    verdict = {name: getattr(result, name) for name in VERDICT}
    headline = {**result.metrics, "masked_n": result.masked_n, **verdict, "weights_sha256": result.weights_sha256}
    shown = {name: value for name, value in _numbers(result, further).items() if whole or not _is_detail(name)}
    counts: dict[Count, int | None] = {
        "samples": result.spec["samples"],
        "n_clean_correct": result.attack_numbers.get("n_clean_correct"),
        "test_samples": test_samples,
    }
    threat = threat_model(result.spec["attack"])
    return {
        "job_id": result.job_id,
        "sweep_id": result.sweep_id,
        "user": result.user,
        "labels": result.labels,
        **{name: value for name, value in {**LATER, **result.spec}.items() if name != "measures"},
        "measures": [measure["type"] for measure in result.spec["measures"]],
        "measures_failed": {measure.type: measure.failed for measure in further if measure.failed is not None},
        "threat_model": threat.ball,
        "adversary": threat.adversary,
        **headline,
        "flags": result.flags,
        **{name: value for name, value in shown.items() if name not in headline},
        **intervals_of({**shown, **headline}, counts),
        "versions": cell["versions"],
        "spec_digest": result.spec_digest,
        "attack_digest": result.attack_digest,
        "created_at": iso(result.created_at),
        "finished_at": iso(result.finished_at),
        **retracted(result),
        "provenance": result.provenance,
    }


def _numbers(result: Result, further: Sequence[FurtherMeasure]) -> JsonObject:
    """All numbers of a result by name. Of two with one name the later one counts, unless that is null."""
    numbers: JsonObject = dict(result.measure_numbers or {})
    for later in (*(measure.numbers for measure in further), result.attack_numbers):
        numbers |= {name: value for name, value in later.items() if value is not None or name not in numbers}
    return numbers


class Retractable(Protocol):
    """A result or a task, which stands as long as `retracted_at` is None."""

    @property
    def retracted_at(self) -> float | None: ...
    @property
    def retracted_by(self) -> str | None: ...
    @property
    def retraction_reason(self) -> str | None: ...


def retracted(value: Retractable) -> dict[str, str | None]:
    """When, by whom and why a result or task was retracted; nulls if it stands."""
    return {
        "retracted_at": iso(value.retracted_at),
        "retracted_by": value.retracted_by,
        "retraction_reason": value.retraction_reason,
    }


@lru_cache(maxsize=10_000)
def _is_detail(name: str) -> bool:
    return DETAIL.search(name) is not None


def registered_dataset(dataset: RegisteredDataset) -> JsonObject:
    shown = asdict(dataset)
    return {**shown, "name": dataset.reference, "created_at": iso(dataset.created_at)}


def event_view(event: JsonMapping) -> JsonObject:
    return {**event, "at": iso(event["at"])}


def running_view(task: RunningTask) -> JsonObject:
    return {
        "task_id": task.id,
        "digest": task.digest,
        "kind": task.kind,
        "attempt": task.attempt,
        "worker": task.worker,
        "progress": task.progress,
        "detail": task.detail,
    }


def roles_of(job: Job, tasks: Sequence[records.Task]) -> list[JsonObject]:
    return [task_line(task, reading.roles(job, task)) for task in tasks]
