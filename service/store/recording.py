"""What attempts report. Each write says in its UPDATE that its attempt is still the current one, or changes nothing."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, takewhile
from typing import Any, NamedTuple, assert_never

from sqlalchemy import ColumnElement, Connection, String, and_, bindparam, cast, delete, insert, select, update

from service.model.events import EventKind
from service.model.executor import Failed, Lost, Message, Outcome, Progress, Started, Succeeded
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
from service.store.listed import listed
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
    """Write messages down, each if its attempt is the current one, and what follows from them.

    Returns digests of artifacts that nobody points to any more.
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
    for worker, those in started.items():
        _write_worker(connection, now, worker, those)
    if succeeded:
        ended += _write_successes(connection, now, actor, succeeded)
        superseded += _forget_epoch_states(connection, ended, keep=None)
    for message in rare:
        if _stopped(connection, now, actor, message, patience):
            ended.append(message.task_id)
    settle(connection, now, actor, ended)
    return superseded


def _fence(reports: Iterable[Message]) -> ColumnElement[bool]:
    """True of the tasks whose current attempt is that of one of these reports; only one that runs may write."""
    keys = [f"{report.task_id}:{report.attempt}" for report in reports]
    ids = [key.rpartition(":")[0] for key in keys]
    theirs = tasks.c.id + ":" + cast(tasks.c.attempt, String)
    return and_(tasks.c.id.in_(listed(ids)), theirs.in_(listed(keys)))


def _current(connection: Connection, message: Message, **values: Any) -> bool:
    """The fence: one UPDATE that hits the task only while `message.attempt` is its running attempt."""
    return connection.execute(update(tasks).where(_fence([message]), RUNS).values(**values)).rowcount == 1


def _write_worker(connection: Connection, now: float, worker: str, reports: Sequence[Started]) -> None:
    mine = update(tasks).where(_fence(reports), RUNS).values(worker=worker).returning(tasks.c.id, tasks.c.attempt)
    rows = [{"task": row.id, "attempt": row.attempt} for row in connection.execute(mine)]
    if rows:
        connection.execute(update(attempts).where(THIS_ATTEMPT).values(worker=worker, charged_until=now), rows)


class _Done(NamedTuple):
    """A task that has succeeded, and the attempt that its numbers are of."""

    id: str
    attempt: int
    kind: str
    generation: int


def _write_successes(connection: Connection, now: float, actor: str, reports: Mapping[Key, Succeeded]) -> list[str]:
    """Returns the tasks that have succeeded, whose report was of their current attempt, and those that ended for it."""
    values = {"reason": None, "finished_at": now, "progress": 1.0}
    nothing_left = {"holder": None, "lease_expires_at": None, "resume_digest": None, "resume_bytes": None}
    mine = move_tasks({TaskState.RUNNING}, TaskState.SUCCEEDED).where(_fence(reports.values()))
    columns = (tasks.c.id, tasks.c.attempt, tasks.c.kind, tasks.c.generation)
    done = [_Done(*row) for row in connection.execute(mine.values(**values, **nothing_left).returning(*columns))]
    if not done:
        return []
    left = [reports[row.id, row.attempt].outcome for row in done]
    replaced = other_weights(connection, now, actor, _trained_again(done, left))
    done = [row._replace(**_instead(replaced.get(row.id))) for row in done]
    outcomes = {row.id: outcome for row, outcome in zip(done, left, strict=True)}
    provenance = [{"task": row.id, "attempt": row.attempt, "made": finite(outcomes[row.id].provenance)} for row in done]
    made = {"ended_at": now, "end": "succeeded", "provenance": bindparam("made")}
    connection.execute(update(attempts).where(THIS_ATTEMPT).values(made), provenance)
    for kind in {row.kind for row in done}:
        _store_outcomes(connection, now, kind, {row.id: outcomes[row.id] for row in done if row.kind == kind})
    if again := [row.id for row in done if row.generation > 1]:
        filing.refresh(connection, again)
    happened = [Event(EventKind.TASK_SUCCEEDED, task_id=row.id, attempt=row.attempt) for row in done]
    history.append(connection, now, actor, happened)
    return [*outcomes, *chain.from_iterable(one.ended for one in replaced.values())]


def _trained_again(done: Sequence[_Done], outcomes: Sequence[Outcome]) -> list[Made]:
    """The weights of those that are no first generation of a training."""
    return [
        Made(row.id, row.attempt, ref.digest)
        for row, outcome in zip(done, outcomes, strict=True)
        if row.kind == "train" and row.generation > 1
        for ref in outcome.artifacts
        if ref.kind == "checkpoint"
    ]


def _instead(replaced: Replaced | None) -> Values:
    return {} if replaced is None else {"id": replaced.task_id, "attempt": replaced.attempt}


def _attempt(connection: Connection, report: Message, **values: Any) -> None:
    this = (attempts.c.task_id == report.task_id) & (attempts.c.number == report.attempt)
    connection.execute(update(attempts).where(this).values(**values))


def _progress(connection: Connection, now: float, message: Progress) -> list[str]:
    detail = finite(message.detail)
    values: Values = {"progress": message.fraction, "detail": detail}
    if message.resume is None:
        _current(connection, message, **values)
        return []
    resume = {"resume_digest": message.resume.digest, "resume_bytes": message.resume.size_bytes, "suspect_losses": 0}
    if not _current(connection, message, **values, **resume):
        return []  # its bytes stay for the collector of garbage: the current attempt may have written the same
    superseded = _forget_epoch_states(connection, [message.task_id], keep=message.resume.digest)
    _artifact(connection, now, message.task_id, message.resume.digest, "epoch_state", message.resume.size_bytes)
    data = {"detail": detail}
    happened = Event(EventKind.TASK_CHECKPOINTED, task_id=message.task_id, attempt=message.attempt, data=data)
    history.append(connection, now, "worker", [happened])
    return superseded


def _store_outcomes(connection: Connection, now: float, kind: str, outcomes: Mapping[str, Outcome]) -> None:
    """Numbers into the table of their kind: known ones in their columns, all of them in `numbers`."""
    table = TASK_KINDS[kind].numbers
    named = [column.name for column in table.columns if column.name not in ("task_id", "numbers")]
    rows, bits, points = [], [], []
    # A reopened task replaces what an earlier generation left.
    for old in (table, outcome_bits, curves):
        connection.execute(delete(old).where(old.c.task_id.in_(listed(outcomes))))
    for task_id, outcome in outcomes.items():
        numbers = finite(outcome.numbers)
        row = {"task_id": task_id, "numbers": numbers, **{name: numbers.get(name) for name in named}}
        for ref in outcome.artifacts:
            _artifact(connection, now, task_id, ref.digest, ref.kind, ref.size_bytes)
            if ref.kind == "checkpoint":
                row |= {"checkpoint_digest": ref.digest, "checkpoint_bytes": ref.size_bytes}
        rows.append(row)
        bits += [{"task_id": task_id, "name": name, **vars(of)} for name, of in outcome.bits.items()]
        points += [{"task_id": task_id, "name": name, "points": finite(of)} for name, of in outcome.curves.items()]
    for into, these in ((table, rows), (outcome_bits, bits), (curves, points)):
        if these:
            connection.execute(insert(into), these)
    if TASK_KINDS[kind].asked_for:
        filing.note_names(connection, kind, [row["numbers"] for row in rows])


def _stopped(connection: Connection, now: float, actor: str, message: Failed | Lost, patience: Patience) -> bool:
    """An attempt ended without success: write down what follows by `retrying`."""
    columns = (tasks.c.errors, tasks.c.suspect_losses, tasks.c.cancel_requested, tasks.c.kind, tasks.c.spec)
    task = connection.execute(select(*columns).where(tasks.c.id == message.task_id)).one_or_none()
    if task is None:
        return False
    counts, more = Counts(task.errors, task.suspect_losses), {}
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
    _attempt(connection, message, ended_at=now, end=ending.end, message=message.message, **more)
    kind, data = EventKind.of_task(ending.state), {"end": ending.end, "reason": ending.reason}
    history.append(connection, now, actor, [Event(kind, task_id=message.task_id, attempt=message.attempt, data=data)])
    return True


def _fits_on_no_gpu(connection: Connection, message: Lost) -> bool:
    """Whether it ran out of memory so often in a row with a whole GPU that no neighbour is to blame any more."""
    if message.reason not in PATIENT:
        return False
    until = (attempts.c.task_id == message.task_id) & (attempts.c.number <= message.attempt)
    last = select(attempts.c.end, attempts.c.device_share).where(until).order_by(attempts.c.number.desc())
    this, *before = connection.execute(last.limit(MAX_PATIENT_LOSSES)).all()
    whole = [row for row in (this, *before) if (row.device_share or 0.0) >= 1]
    return len(whole) == MAX_PATIENT_LOSSES and all(row.end in OF_MEMORY for row in before)


def _in_a_row(connection: Connection, message: Lost) -> int:
    """How many attempts before this one ended for a reason as patient, one after the other."""
    before = (attempts.c.task_id == message.task_id) & (attempts.c.number < message.attempt)
    last = select(attempts.c.end).where(before).order_by(attempts.c.number.desc()).limit(20)
    return len(list(takewhile(PATIENT.__contains__, connection.scalars(last).all())))


def note_stalled(connection: Connection, now: float, actor: str, still_seconds: Mapping[Key, float]) -> None:
    """Say of these attempts that they have not advanced for so long: as an event, and in the detail until they do."""
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


def _artifact(connection: Connection, now: float, task_id: str, digest: str, kind: str, size_bytes: int) -> None:
    same = (artifacts.c.digest == digest) & (artifacts.c.task_id == task_id)
    connection.execute(delete(artifacts).where(same))
    row = {"digest": digest, "task_id": task_id, "kind": kind, "size_bytes": size_bytes, "created_at": now}
    connection.execute(insert(artifacts).values(**row))


def _forget_epoch_states(connection: Connection, task_ids: Sequence[str], *, keep: str | None) -> list[str]:
    """Drop the rows of trainings' earlier epoch states; returns those digests that nothing else points to."""
    theirs = (artifacts.c.task_id.in_(listed(task_ids))) & (artifacts.c.kind == "epoch_state")
    old = delete(artifacts).where(theirs, artifacts.c.digest != (keep or "")).returning(artifacts.c.digest)
    digests = list(connection.scalars(old))
    used = set(connection.scalars(select(artifacts.c.digest).where(artifacts.c.digest.in_(listed(digests)))))
    return [digest for digest in dict.fromkeys(digests) if digest not in used]


def finite(value: Any) -> Any:
    """The same without NaN and infinities, which JSON does not have: null, as where there is no number."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
