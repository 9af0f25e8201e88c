"""Rows of the store as the plain JSON that users see: the same names in REST, CSV and the CLI. Pure functions."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from service.model import records
from service.model.environment import SetAside
from service.model.flags import FLAGS, names_of
from service.model.jobs import JobState, TaskState
from service.model.observations import Count, intervals_of
from service.model.records import Attempt, Job, RegisteredDataset, RunningTask, Sweep, TaskCount
from service.model.threat_model import threat_model
from service.model.times import iso
from service.specs.canonical import canonical
from service.specs.numbers import METRICS
from service.specs.tasks import Task
from service.specs.versions import LATER
from service.store import Row, reading

# A row shows medians and means; quantiles, subsets and the training split are there for who asks for them by name.
DETAIL = re.compile(r"^train_|_q\d\d(_|$)|_clean_correct|_n_zero$|_iterations$|_converged$")
VERDICT = ("verdict", "verdict_reasons", "verdict_checks", "verdict_counts", "verdict_version")
TASK_STATES = tuple(str(state) for state in TaskState)


def job_view(job: Job, progress: float) -> dict[str, Any]:
    return {
        "id": job.id, "state": job.state, "reason": job.reason, "progress": round(progress, 4),
        "sweep_id": job.sweep_id, "user": job.user, "priority": job.priority, "boosted": job.boosted,
        "labels": job.labels, "spec": job.spec, "spec_digest": job.spec_digest, "verdict": job.verdict,
        "created_at": iso(job.created_at), "finished_at": iso(job.finished_at),
    }  # fmt: skip


def version(ident: str, priority: int, labels: Mapping[str, str]) -> str:
    """What a job or sweep is known by to who changes it: a digest of all that can be changed."""
    return hashlib.sha256(json.dumps([ident, priority, sorted(labels.items())]).encode()).hexdigest()[:32]


def task_line(task: records.Task, roles: list[str]) -> dict[str, Any]:
    """A task as one line of its job."""
    return {
        "id": task.id, "digest": task.own_digest, "kind": task.kind, "roles": roles, "state": task.state,
        "reason": task.reason, "progress": task.progress, "attempt": task.attempt, "worker": task.worker,
        "started_at": iso(task.started_at), "finished_at": iso(task.finished_at),
    }  # fmt: skip


def task_view(task: records.Task, spec: Task, attempts: Sequence[Attempt], jobs: list[str]) -> dict[str, Any]:
    """A task whole: its spec and the canonical form that its digest is the SHA-256 of, and every attempt."""
    return {
        **{key: value for key, value in task_line(task, []).items() if key != "roles"},
        "spec": task.spec, "canonical": canonical(spec), "generation": task.generation, "errors": task.errors,
        "suspect_losses": task.suspect_losses, "cancel_requested": task.cancel_requested, "detail": task.detail,
        "holder": task.holder, "created_at": iso(task.created_at), "jobs": jobs, **retracted(task),
        "retracted_with": task.retracted_with, "joined": task.former_digest is None,
        "attempts": [
            {
                "number": a.number, "holder": a.holder, "worker": a.worker, "started_at": iso(a.started_at),
                "ended_at": iso(a.ended_at), "end": a.end, "message": a.message, "traceback": a.traceback,
                "provenance": a.provenance,
            }
            for a in attempts
        ],
    }  # fmt: skip


def set_aside(one: SetAside) -> dict[str, Any]:
    """A part of the environment that gets no work, and from when on it is tried again."""
    return {**one.as_data(), "since": iso(one.since), "retry_at": iso(one.retry_at)}


def sweep_view(
    sweep: Sweep, jobs: dict[str, int], counts: Sequence[TaskCount], seconds: dict[str, float], slots: float
) -> dict[str, Any]:
    total = sum(count.n for count in counts)
    done = sum(count.n if count.state == TaskState.SUCCEEDED else count.progress for count in counts)
    by_state = {state: sum(c.n for c in counts if c.state == state) for state in TASK_STATES}
    state = sweep_state(jobs, sweep.paused)
    return {
        "id": sweep.id, "name": sweep.name, "user": sweep.user, "state": state, "priority": sweep.priority,
        "labels": sweep.labels, "created_at": iso(sweep.created_at),
        "pause_reason": sweep.pause_reason if state == "paused" else None,
        "jobs": {"total": sum(jobs.values()), **jobs}, "tasks": {"total": total, **by_state},
        "progress": round(done / total, 4) if total else 1.0,
        "eta_seconds": eta_seconds(counts, seconds, slots) if state == "running" else None,
    }  # fmt: skip


def sweep_state(jobs: Mapping[str, int], paused: bool) -> str:
    """One word for the counts of its jobs. Held ones wait for a person, so with nothing else left it has failed."""
    if jobs[JobState.QUEUED] or jobs[JobState.RUNNING]:
        return "paused" if paused else "running"
    if jobs[JobState.FAILED] or jobs[JobState.HELD]:
        return "failed"
    return "cancelled" if jobs[JobState.CANCELLED] else "succeeded"


def eta_seconds(counts: Sequence[TaskCount], seconds: Mapping[str, float], slots: float) -> float | None:
    """What is left, at what a task of each kind took so far, over the places to run; None while nothing is known."""
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
    row: Row[Any], further: Sequence[dict[str, Any]], cell: Mapping[str, Any], *, test_samples: int | None, whole: bool
) -> dict[str, Any]:
    """One result: what was asked for, the headline numbers, the verdict, each measure's summary, times, provenance.

    `test_samples` is how many test images the data set has.
    """
    numbers: dict[str, Any] = {**(row.measure_numbers or {})}
    for more in (*(measure["numbers"] for measure in further), row.attack_numbers):
        numbers |= {name: value for name, value in more.items() if value is not None or name not in numbers}
    headline = {
        **{name: getattr(row, name) for name in (*METRICS, "masked_n", *VERDICT)},
        "weights_sha256": row.weights_sha256,
    }  # fmt: skip
    shown = {name: value for name, value in numbers.items() if whole or not _is_detail(name)}
    correct = (row.attack_numbers or {}).get("n_clean_correct")
    counts: dict[Count, int | None] = {
        "samples": row.spec["samples"],
        "n_clean_correct": correct,
        "test_samples": test_samples,
    }
    threat, flags = threat_model(row.spec["attack"]), names_of(*(getattr(row, name) for name in FLAGS))
    return {
        "job_id": row.id, "sweep_id": row.sweep_id, "user": row.user, "labels": row.labels,
        **{name: value for name, value in {**LATER, **row.spec}.items() if name != "measures"},
        "measures": [measure["type"] for measure in row.spec["measures"]],
        "measures_failed": {of["measure"]["type"]: of["failed"] for of in further if of["failed"] is not None},
        "threat_model": threat.ball, "adversary": threat.adversary, **headline, "flags": flags,
        **{name: value for name, value in shown.items() if name not in headline},
        **intervals_of({**shown, **headline}, counts),
        "versions": cell["versions"], "spec_digest": row.spec_digest, "attack_digest": row.attack_digest,
        "created_at": iso(row.created_at), "finished_at": iso(row.finished_at), **retracted(row),
        "provenance": row.provenance,
    }  # fmt: skip


def retracted(row: records.Task | Row[Any]) -> dict[str, Any]:
    """When, by whom and why a task or a result was retracted; nulls for one that stands."""
    return {
        "retracted_at": iso(row.retracted_at), "retracted_by": row.retracted_by,
        "retraction_reason": row.retraction_reason,
    }  # fmt: skip


@lru_cache(maxsize=10_000)
def _is_detail(name: str) -> bool:
    return DETAIL.search(name) is not None


def registered_dataset(dataset: RegisteredDataset) -> dict[str, Any]:
    shown = asdict(dataset)
    return {**shown, "name": f"npz:{dataset.name}", "created_at": iso(dataset.created_at)}


def event_view(event: Mapping[str, Any]) -> dict[str, Any]:
    return {**event, "at": iso(event["at"])}


def running_view(task: RunningTask) -> dict[str, Any]:
    return {
        "task_id": task.id, "digest": task.digest, "kind": task.kind, "attempt": task.attempt, "worker": task.worker,
        "progress": task.progress, "detail": task.detail,
    }  # fmt: skip


def roles_of(job: Job, tasks: Sequence[records.Task]) -> list[dict[str, Any]]:
    return [task_line(task, reading.roles(job, task)) for task in tasks]
