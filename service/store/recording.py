"""What attempts report. Each write says in its UPDATE that its attempt is still the current one, or changes nothing."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, takewhile
from typing import Any, NamedTuple, assert_never

from sqlalchemy import ColumnElement, Connection, String, and_, bindparam, cast, delete, select, update

from service.model.events import EventKind
from service.model.executor import ArtifactRef, Failed, Lost, Message, Outcome, Progress, Started, Succeeded
from service.model.jobs import TaskState
from service.model.retrying import (
    MAX_PATIENT_LOSSES,
    OF_MEMORY,
    PATIENT,
    Counts,
    Patience,
    after_error,
    after_loss,
    is_further_measure,
    unless_unwanted,
)
from service.store import filing, history
from service.store.history import Event
from service.store.listed import insert_rows, listed
from service.store.settling import settle
from service.store.states import move_tasks
from service.store.tables import artifacts, attempts, curves, outcome_bits, tasks
from service.store.task_kinds import TASK_KINDS
from service.store.trained_again import Made, Replaced, other_weights
from service.store.values import Values

THIS_ATTEMPT = (attempts.c.task_id == bindparam("task")) & (attempts.c.number == bindparam("attempt"))
RUNS = tasks.c.state == TaskState.RUNNING
Key = tuple[str, int]


def record(
    connection: Connection, now: float, actor: str, messages: Iterable[Message], patience: Patience
) -> list[str]:
    """Store each message whose attempt is the current one, and apply its consequences.

    Returns the digests of replaced epoch states that no artifact row has any more.
    """
    started: dict[str, list[Started]] = defaultdict(list)
    succeeded: dict[Key, Succeeded] = {}
    ended: list[str] = []
    superseded: list[str] = []
    rare: list[Failed | Lost] = []
    for message in messages:
        match message:
            case Started():
                started[message.worker].append(message)
            case Progress():
                superseded += _progress(connection, now, message)
            case Succeeded():
                succeeded.setdefault((message.task_id, message.attempt), message)
            case Failed() | Lost():
                rare.append(message)
            case _:
                assert_never(message)
    for worker, reports in started.items():
        _write_worker(connection, now, worker, reports)
    if succeeded:
        ended += _write_successes(connection, now, actor, succeeded)
        superseded += _forget_epoch_states(connection, ended, keep=None)
    for message in rare:
        if _stopped(connection, now, actor, message, patience):
            ended.append(message.task_id)
    settle(connection, now, actor, ended)
    return superseded


def _fence(reports: Iterable[Message]) -> ColumnElement[bool]:
    """The tasks whose current attempt sent one of these reports. Callers also require that the task is running."""
    keys = [f"{report.task_id}:{report.attempt}" for report in reports]
    ids = [key.rpartition(":")[0] for key in keys]
    current = tasks.c.id + ":" + cast(tasks.c.attempt, String)
    return and_(tasks.c.id.in_(listed(ids)), current.in_(listed(keys)))


def _current(connection: Connection, message: Message, values: Values) -> bool:
    """The fence: one UPDATE that hits the task only while `message.attempt` is its running attempt."""
    return connection.execute(update(tasks).where(_fence([message]), RUNS).values(values)).rowcount == 1


def _write_worker(connection: Connection, now: float, worker: str, reports: Sequence[Started]) -> None:
    statement = update(tasks).where(_fence(reports), RUNS).values(worker=worker).returning(tasks.c.id, tasks.c.attempt)
    rows = [{"task": row.id, "attempt": row.attempt} for row in connection.execute(statement)]
    if rows:
        connection.execute(update(attempts).where(THIS_ATTEMPT).values(worker=worker, charged_until=now), rows)


class _Done(NamedTuple):
    """A task that has succeeded, and the attempt that computed its numbers."""

    id: str
    attempt: int
    kind: str
    generation: int


def _write_successes(connection: Connection, now: float, actor: str, reports: Mapping[Key, Succeeded]) -> list[str]:
    """Store the successes of current attempts.

    Returns the tasks that succeeded, and the tasks that ended because their training made other weights.
    """
    values = {"reason": None, "finished_at": now, "progress": 1.0}
    cleared = {"holder": None, "lease_expires_at": None, "resume_digest": None, "resume_bytes": None}
    statement = move_tasks({TaskState.RUNNING}, TaskState.SUCCEEDED).where(_fence(reports.values()))
    columns = (tasks.c.id, tasks.c.attempt, tasks.c.kind, tasks.c.generation)
    done = [_Done(*row) for row in connection.execute(statement.values(**values, **cleared).returning(*columns))]
    if not done:
        return []
    reported = [reports[row.id, row.attempt].outcome for row in done]
    replaced = other_weights(connection, now, actor, _trained_again(done, reported))
    done = [row._replace(**_instead(replaced.get(row.id))) for row in done]
    outcomes = {row.id: outcome for row, outcome in zip(done, reported, strict=True)}
    provenance = [{"task": row.id, "attempt": row.attempt, "made": finite(outcomes[row.id].provenance)} for row in done]
    made = {"ended_at": now, "end": "succeeded", "provenance": bindparam("made")}
    connection.execute(update(attempts).where(THIS_ATTEMPT).values(made), provenance)
    again = [row.id for row in done if row.generation > 1]
    _forget_outcomes(connection, again)
    for kind in {row.kind for row in done}:
        _store_outcomes(connection, now, kind, {row.id: outcomes[row.id] for row in done if row.kind == kind})
    if again:
        filing.refresh(connection, again)
    events = [Event(EventKind.TASK_SUCCEEDED, task_id=row.id, attempt=row.attempt) for row in done]
    history.append(connection, now, actor, events)
    return [*outcomes, *chain.from_iterable(new.ended for new in replaced.values())]


def _trained_again(done: Sequence[_Done], outcomes: Sequence[Outcome]) -> list[Made]:
    """The weights of the trainings among these that ran again: their generation is not the first."""
    return [
        Made(row.id, row.attempt, ref.digest)
        for row, outcome in zip(done, outcomes, strict=True)
        if row.kind == "train" and row.generation > 1
        for ref in outcome.artifacts
        if ref.kind == "checkpoint"
    ]


def _instead(replaced: Replaced | None) -> Values:
    return {} if replaced is None else {"id": replaced.task_id, "attempt": replaced.attempt}


def _write_attempt(connection: Connection, report: Message, values: Values) -> None:
    this = (attempts.c.task_id == report.task_id) & (attempts.c.number == report.attempt)
    connection.execute(update(attempts).where(this).values(values))


def _progress(connection: Connection, now: float, message: Progress) -> list[str]:
    detail = finite(message.detail)
    values: Values = {"progress": message.fraction, "detail": detail}
    if message.resume is None:
        _current(connection, message, values)
        return []
    resume = {"resume_digest": message.resume.digest, "resume_bytes": message.resume.size_bytes, "suspect_losses": 0}
    if not _current(connection, message, values | resume):
        return []  # the bytes are left to the garbage collection: the current attempt may have written the same ones
    superseded = _forget_epoch_states(connection, [message.task_id], keep=message.resume.digest)
    _store_artifacts(connection, now, [(message.task_id, replace(message.resume, kind="epoch_state"))])
    data = {"detail": detail}
    event = Event(EventKind.TASK_CHECKPOINTED, task_id=message.task_id, attempt=message.attempt, data=data)
    history.append(connection, now, "worker", [event])
    return superseded


def _store_outcomes(connection: Connection, now: float, kind: str, outcomes: Mapping[str, Outcome]) -> None:
    """Store outcomes: all numbers in the column `numbers` of the kind's table, some in columns of their own too."""
    table = TASK_KINDS[kind].numbers
    own_columns = [column.name for column in table.columns if column.name not in ("task_id", "numbers")]
    rows, bits, points, made = [], [], [], []
    for task_id, outcome in outcomes.items():
        numbers = finite(outcome.numbers)
        row = {"task_id": task_id, "numbers": numbers, **{name: numbers.get(name) for name in own_columns}}
        for ref in outcome.artifacts:
            made.append((task_id, ref))
            if ref.kind == "checkpoint":
                row |= {"checkpoint_digest": ref.digest, "checkpoint_bytes": ref.size_bytes}
        rows.append(row)
        bits += [{"task_id": task_id, "name": name, **vars(packed)} for name, packed in outcome.bits.items()]
        points += [
            {"task_id": task_id, "name": name, "points": finite(curve)} for name, curve in outcome.curves.items()
        ]
    for into, new_rows in ((table, rows), (outcome_bits, bits), (curves, points)):
        insert_rows(connection, into, new_rows)
    _store_artifacts(connection, now, made)
    if TASK_KINDS[kind].asked_for:
        filing.note_names(connection, kind, [row["numbers"] for row in rows])


def _stopped(connection: Connection, now: float, actor: str, message: Failed | Lost, patience: Patience) -> bool:
    """Store that an attempt ended without success, and what follows by `retrying`. False if it is not current."""
    columns = (tasks.c.errors, tasks.c.suspect_losses, tasks.c.cancel_requested, tasks.c.kind, tasks.c.spec)
    task = connection.execute(select(*columns).where(tasks.c.id == message.task_id)).one_or_none()
    if task is None:
        return False
    counts = Counts(task.errors, task.suspect_losses)
    more: Values = {}
    if isinstance(message, Failed):
        ending = after_error(message, counts, patience)
        more = {"traceback": message.traceback or None, "missing_digest": message.missing}
    else:
        end = "out_of_memory" if _fits_on_no_gpu(connection, message) else message.reason
        in_a_row = _in_a_row(connection, message) if end in PATIENT else 0
        further = is_further_measure(task.kind, task.spec)
        ending = after_loss(message.message, end, in_a_row, counts, patience, dispensable=further)
    if task.cancel_requested:
        ending = unless_unwanted(ending)
    values: Values = {"reason": ending.reason, "holder": None, "lease_expires_at": None}
    values |= vars(ending.counts) | {"finished_at": None if ending.state is TaskState.QUEUED else now}
    if ending.wait_seconds is not None:
        values["not_before"] = now + ending.wait_seconds
    moved = move_tasks({TaskState.RUNNING}, ending.state).where(_fence([message])).values(values)
    if connection.execute(moved).rowcount != 1:
        return False
    attempt = {"ended_at": now, "end": ending.end, "message": message.message}
    _write_attempt(connection, message, attempt | more)
    kind, data = EventKind.of_task(ending.state), {"end": ending.end, "reason": ending.reason}
    history.append(connection, now, actor, [Event(kind, task_id=message.task_id, attempt=message.attempt, data=data)])
    return True


def _fits_on_no_gpu(connection: Connection, message: Lost) -> bool:
    """Whether the task ran out of memory so often in a row with a whole GPU that no neighbour is to blame any more."""
    if message.reason not in PATIENT:
        return False
    until = (attempts.c.task_id == message.task_id) & (attempts.c.number <= message.attempt)
    last = select(attempts.c.end, attempts.c.device_share).where(until).order_by(attempts.c.number.desc())
    this, *before = connection.execute(last.limit(MAX_PATIENT_LOSSES)).all()
    whole = [row for row in (this, *before) if (row.device_share or 0.0) >= 1]
    return len(whole) == MAX_PATIENT_LOSSES and all(row.end in OF_MEMORY for row in before)


def _in_a_row(connection: Connection, message: Lost) -> int:
    """How many attempts directly before this one ended for a reason in `PATIENT`; 20 are looked at."""
    before = (attempts.c.task_id == message.task_id) & (attempts.c.number < message.attempt)
    last = select(attempts.c.end).where(before).order_by(attempts.c.number.desc()).limit(20)
    return len(list(takewhile(PATIENT.__contains__, connection.scalars(last).all())))


def note_stalled(connection: Connection, now: float, actor: str, still_seconds: Mapping[Key, float]) -> None:
    """Record for how long these attempts have not advanced: as an event, and in their detail until they advance."""
    query = select(tasks.c.attempt, tasks.c.progress, tasks.c.detail).where(tasks.c.state == TaskState.RUNNING)
    for (task_id, attempt), seconds in still_seconds.items():
        task = connection.execute(query.where(tasks.c.id == task_id, tasks.c.attempt == attempt)).one_or_none()
        if task is not None:
            still = {"stalled_seconds": round(seconds, 1)}
            connection.execute(update(tasks).where(tasks.c.id == task_id).values(detail={**task.detail, **still}))
            data = {**still, "progress": task.progress}
            history.append(
                connection, now, actor, [Event(EventKind.TASK_STALLED, task_id=task_id, attempt=attempt, data=data)]
            )


def _forget_outcomes(connection: Connection, task_ids: Sequence[str]) -> None:
    """Delete what earlier generations of these tasks left, which new outcomes replace."""
    if task_ids:
        for table in (*(kind.numbers for kind in TASK_KINDS.values()), outcome_bits, curves):
            connection.execute(delete(table).where(table.c.task_id.in_(listed(task_ids))))


def _store_artifacts(connection: Connection, now: float, made: Sequence[tuple[str, ArtifactRef]]) -> None:
    """Store which task made which bytes. Where a row says so already, its kind is replaced."""
    if not made:
        return
    rows = {(task_id, ref.digest): {"task_id": task_id, "created_at": now, **vars(ref)} for task_id, ref in made}
    pairs = listed(f"{task_id}:{digest}" for task_id, digest in rows)
    same = and_(
        artifacts.c.task_id.in_(listed(task_id for task_id, _ in rows)),
        (artifacts.c.task_id + ":" + artifacts.c.digest).in_(pairs),
    )
    connection.execute(delete(artifacts).where(same))
    insert_rows(connection, artifacts, list(rows.values()))


def _forget_epoch_states(connection: Connection, task_ids: Sequence[str], *, keep: str | None) -> list[str]:
    """Drop the rows of trainings' earlier epoch states; returns the digests that no other artifact row has."""
    states = (artifacts.c.task_id.in_(listed(task_ids))) & (artifacts.c.kind == "epoch_state")
    old = delete(artifacts).where(states, artifacts.c.digest != (keep or "")).returning(artifacts.c.digest)
    digests = list(connection.scalars(old))
    used = set(connection.scalars(select(artifacts.c.digest).where(artifacts.c.digest.in_(listed(digests)))))
    return [digest for digest in dict.fromkeys(digests) if digest not in used]


def finite(value: Any) -> Any:  # Any: a value of JSON
    """The value with null in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
