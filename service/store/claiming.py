"""Leadership, grants and leases: who may run what, by the database's clock and never by age."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any  # for rows: SQLAlchemy cannot type a row of expressions

from sqlalchemy import (
    CompoundSelect,
    Connection,
    Integer,
    Select,
    String,
    and_,
    bindparam,
    case,
    exists,
    func,
    insert,
    literal,
    literal_column,
    select,
    union_all,
    update,
)
from sqlalchemy.sql import ColumnElement

from service.model.events import EventKind
from service.model.executor import ArtifactRef, Grant
from service.model.jobs import LIVE_JOB, TaskState
from service.model.json import JsonObject
from service.model.records import Lease
from service.model.retrying import UNWANTED
from service.model.scheduling import MAX_BUNDLE, Waiting
from service.settings import KINDS
from service.store import history, quotas
from service.store.history import Event
from service.store.listed import insert_rows, listed
from service.store.settling import UNPAUSED, rerank, settle, start_jobs
from service.store.states import CLAIMABLE, RUNNING, SHARED, move_tasks
from service.store.tables import attempts, job_tasks, jobs, leases, queues, sweeps, tasks, trainings
from service.store.values import Values, one

LEADER = "dispatcher"
QUEUE = "default"
REASONS = {
    "lease_expired": "its dispatcher was silent for a whole lease",
    "given_back": "its dispatcher stopped, or started again",
}


def lead(
    connection: Connection, now: float, holder: str, epoch: int | None, lease_seconds: float, status: JsonObject
) -> int | None:
    """Become the leading dispatcher for one lease, or stay it in `epoch`. Returns the epoch; None while another leads.

    A dispatcher that starts under the leader's name takes over at once: the earlier process of that name is gone, or
    has to go.
    """
    row = leader(connection)
    values = {"holder": holder, "expires_at": now + lease_seconds, "status": status}
    if row is None:
        connection.execute(insert(leases).values(role=LEADER, epoch=1, **values))
        return 1
    if epoch is None and not led_by_another(row, now, holder):
        epoch = row.epoch + 1
    elif (row.holder, row.epoch) != (holder, epoch):
        return None
    connection.execute(update(leases).where(leases.c.role == LEADER).values(epoch=epoch, **values))
    return epoch


def leads_now(connection: Connection, now: float) -> bool:
    """Whether anybody leads."""
    row = leader(connection)
    return row is not None and row.expires_at > now


def led_by_another(lease: Lease | None, now: float, holder: str) -> bool:
    """Whether another dispatcher holds this lease (see `leader`) and it has not expired."""
    return lease is not None and lease.holder != holder and lease.expires_at > now


def still_leads(connection: Connection, holder: str, epoch: int | None) -> bool:
    """Whether nobody else has taken the lead since that epoch began (its lease may have expired)."""
    row = leader(connection)
    return row is not None and (row.holder, row.epoch) == (holder, epoch)


def resign(connection: Connection, now: float, holder: str) -> None:
    """Let the next dispatcher take over at once."""
    own_lease = (leases.c.role == LEADER) & (leases.c.holder == holder)
    connection.execute(update(leases).where(own_lease).values(expires_at=now))


def leader(connection: Connection) -> Lease | None:
    """The lease of the last dispatcher that led, expired or not; None before the first one."""
    return one(connection, Lease, select(leases).where(leases.c.role == LEADER))


@dataclass(frozen=True)
class Placement:
    """Where a claimed task goes: its sponsor, its bundle, and how many devices the bundle takes."""

    sponsor: str
    bundle: str
    share: float


def _waiting() -> Select[Any]:  # Any: a row of expressions
    """The tasks of one user that may be claimed now, with the columns of `Waiting`."""
    ran_out = (attempts.c.task_id == tasks.c.id) & (attempts.c.end == "out_of_shared_memory")
    whole = and_(tasks.c.attempt > 0, exists().where(ran_out)).label("whole")
    names = ("id", "kind", "train_digest", "sponsor", "priority", "sequence", "waiting_since", "needed_by")
    columns = (*(tasks.c[name] for name in names), whole, tasks.c.boosted)
    due_now = (CLAIMABLE, tasks.c.sponsor == bindparam("sponsor"), tasks.c.not_before <= bindparam("now"))
    return select(*columns).where(*due_now)


def _best_of_each_kind() -> CompoundSelect[Any]:
    best = (
        _waiting()
        .where(tasks.c.kind == literal(kind))
        .order_by(tasks.c.due, tasks.c.sequence)
        .limit(bindparam("each", type_=Integer))
        .subquery(f"best_{kind}")
        for kind in KINDS
    )
    return union_all(*(select(of_kind) for of_kind in best))


BEST_OF_EACH_KIND = _best_of_each_kind()
ON_CHECKPOINT = (
    _waiting()
    .where(tasks.c.train_digest == bindparam("train_digest"), tasks.c.priority == bindparam("priority"))
    .where(tasks.c.kind != "train")
    .limit(MAX_BUNDLE)
)


def waiting(connection: Connection, now: float, limit: int) -> list[Waiting]:
    """The first tasks of each user's queue, about `limit` in all, without tasks that back off or are paused.

    Each user's first tasks of each kind are among them, however many tasks another user has queued: a task for which no
    slot is free hides no other task. No other rows are read.
    """
    sponsors = waiting_sponsors(connection)
    each = max(limit // max(1, len(sponsors) * len(KINDS)), min(limit, MAX_BUNDLE))
    first: list[Waiting] = []
    for sponsor in sponsors:
        rows = connection.execute(BEST_OF_EACH_KIND, {"sponsor": sponsor, "now": now, "each": each}).all()
        first += [Waiting(*row) for row in rows]
    return first


def mates_of(connection: Connection, now: float, task: Waiting) -> list[Waiting]:
    """As many tasks as a bundle has, of this task's user and priority, that wait for the same checkpoint."""
    values = {"sponsor": task.sponsor, "now": now, "train_digest": task.train_digest, "priority": task.priority}
    return [Waiting(*row) for row in connection.execute(ON_CHECKPOINT, values)]


def _each_sponsor() -> Select[str]:
    first = select(func.min(tasks.c.sponsor).label("sponsor")).where(CLAIMABLE).cte("sponsors", recursive=True)
    later = tasks.alias("later")
    queued = later.c.state == literal_column(f"'{TaskState.QUEUED}'")
    following = select(func.min(later.c.sponsor)).where(queued, ~later.c.paused, later.c.sponsor > first.c.sponsor)
    sponsors = first.union_all(select(following.scalar_subquery()).where(first.c.sponsor.is_not(None)))
    return select(sponsors.c.sponsor).where(sponsors.c.sponsor.is_not(None))


EACH_SPONSOR = _each_sponsor()


def waiting_sponsors(connection: Connection) -> list[str]:
    """The sponsors of the queued tasks that are not paused, by one index lookup for each sponsor."""
    return list(connection.scalars(EACH_SPONSOR))


def any_shared(connection: Connection) -> bool:
    """Whether jobs of several users need the same waiting task."""
    return connection.execute(select(tasks.c.id).where(SHARED).limit(1)).first() is not None


def sponsored_too_late(connection: Connection, turns: Mapping[str, int], most: int) -> list[str]:
    """Up to `most` waiting tasks that a user whose turn is before their sponsor's turn needs too.

    `turns` has the users' positions in line. Boosted tasks are left out: they wait for nobody's turn.
    """
    turn_of_sponsor, turn_of_owner = (case(turns, value=user, else_=0) for user in (tasks.c.sponsor, jobs.c.user))
    needing = tasks.join(job_tasks, job_tasks.c.task_id == tasks.c.id).join(jobs, jobs.c.id == job_tasks.c.job_id)
    needing = needing.outerjoin(sweeps, sweeps.c.id == jobs.c.sweep_id)
    query = select(tasks.c.id).distinct().select_from(needing).where(SHARED, ~tasks.c.boosted)
    earlier = (jobs.c.state.in_(LIVE_JOB), UNPAUSED, turn_of_owner < turn_of_sponsor)
    return list(connection.scalars(query.where(*earlier).limit(most)))


def change_sponsors(connection: Connection, now: float, task_ids: Collection[str], turns: Mapping[str, int]) -> None:
    """Give each of these tasks that still waits a new sponsor: the user whose turn is first of those who need it."""
    rerank(connection, now, and_(tasks.c.id.in_(listed(task_ids)), SHARED), turns)


def queued_of(connection: Connection, sponsor: str, most: int) -> int:
    """How many waiting tasks this user sponsors, counted up to `most`."""
    queued = select(tasks.c.id).where(CLAIMABLE, tasks.c.sponsor == sponsor).limit(most).subquery()
    return int(connection.execute(select(func.count()).select_from(queued)).scalar_one())


def slots(connection: Connection) -> float:
    """The GPUs of the leader's cluster, or its CPUs if it has no GPU; 0 if the leader has not reported them."""
    row = leader(connection)
    capacity = (row.status if row else {}).get("capacity", {})
    return float(capacity.get("gpus") or capacity.get("cpus") or 0.0)


def is_paused(connection: Connection) -> bool:
    """Whether the whole queue is paused."""
    return bool(connection.scalar(select(queues.c.paused).where(queues.c.name == QUEUE)))


def grant(
    connection: Connection,
    now: float,
    holder: str,
    lease_seconds: float,
    task_ids: Collection[str],
    placements: Mapping[str, Placement] | None = None,
) -> dict[str, Grant]:
    """Give queued tasks to `holder` for one lease. The attempt number that each gets fences every later write.

    With `placements` (by task id), only the tasks that still have the sponsor whose quota the scheduler has checked.
    """
    claimed = move_tasks({TaskState.QUEUED}, TaskState.RUNNING).where(tasks.c.id.in_(listed(task_ids)), ~tasks.c.paused)
    if placements is not None:
        sponsors = listed(f"{task_id}:{placements[task_id].sponsor}" for task_id in task_ids)
        claimed = claimed.where((tasks.c.id + literal(":", String) + tasks.c.sponsor).in_(sponsors))
    values: Values = {
        "attempt": tasks.c.attempt + 1,
        "holder": holder,
        "worker": None,
        "lease_expires_at": now + lease_seconds,
        "started_at": now,
        "finished_at": None,
        "progress": 0.0,
        "detail": {},
    }
    columns = (tasks.c.digest, tasks.c.spec, tasks.c.resume_digest, tasks.c.resume_bytes)
    by_task: dict[str, Grant] = {}
    for row in connection.execute(claimed.values(values).returning(tasks.c.id, tasks.c.attempt, *columns)):
        resume = ArtifactRef(row.resume_digest, row.resume_bytes, "epoch_state") if row.resume_digest else None
        by_task[row.id] = Grant(row.id, row.attempt, row.digest, row.spec, resume)
    if by_task:
        grants = [by_task[task_id] for task_id in task_ids if task_id in by_task]
        insert_rows(connection, attempts, [_attempt(granted, now, holder, placements) for granted in grants])
        events = [Event(EventKind.TASK_RUNNING, task_id=granted.task_id, attempt=granted.attempt) for granted in grants]
        history.append(connection, now, holder, events)
        start_jobs(connection, now, holder, list(by_task))
    return by_task


def _attempt(granted: Grant, now: float, holder: str, placements: Mapping[str, Placement] | None) -> Values:
    placement = placements[granted.task_id] if placements else None
    return {
        "task_id": granted.task_id,
        "number": granted.attempt,
        "holder": holder,
        "started_at": now,
        "bundle": placement.bundle if placement else None,
        "device_share": placement.share if placement else None,
    }


def checkpoints_of(
    connection: Connection, train_digests: Collection[str]
) -> dict[str, tuple[JsonObject, ArtifactRef | None]]:
    """The specs of these trainings, by their digests, and the checkpoints of those that have succeeded."""
    query = (
        select(tasks.c.digest, tasks.c.spec, trainings.c.checkpoint_digest, trainings.c.checkpoint_bytes)
        .outerjoin(trainings, trainings.c.task_id == tasks.c.id)
        .where(tasks.c.digest.in_(listed(train_digests)))
    )
    return {
        row.digest: (
            row.spec,
            ArtifactRef(row.checkpoint_digest, row.checkpoint_bytes, "checkpoint") if row.checkpoint_digest else None,
        )
        for row in connection.execute(query)
    }


def datasets_of(connection: Connection, train_digests: Collection[str]) -> dict[str, str]:
    """The names of the data sets of these trainings, by their digests."""
    name = tasks.c.spec["dataset"]["name"].as_string()
    query = select(tasks.c.digest, name).where(tasks.c.digest.in_(listed(train_digests)))
    return {digest: dataset for digest, dataset in connection.execute(query)}


def renew(connection: Connection, now: float, holder: str, lease_seconds: float) -> None:
    """Prolong the leases of all tasks that `holder` runs, and charge their sponsors up to now."""
    held = (tasks.c.holder == holder) & RUNNING
    connection.execute(update(tasks).where(held).values(lease_expires_at=now + lease_seconds))
    quotas.charge_running(connection, now, holder)


def held_by(connection: Connection, holder: str) -> dict[tuple[str, int], bool]:
    """The attempts that `holder` runs: `(task id, attempt) -> cancel requested`."""
    query = select(tasks.c.id, tasks.c.attempt, tasks.c.cancel_requested)
    held = query.where(tasks.c.holder == holder, RUNNING)
    return {(task_id, attempt): unwanted for task_id, attempt, unwanted in connection.execute(held)}


def reap(connection: Connection, now: float, actor: str) -> int:
    """Take back the running tasks whose leases have expired, at no cost to them. Returns how many."""
    return _requeue(connection, now, actor, tasks.c.lease_expires_at < now, "lease_expired")


def take_back(connection: Connection, now: float, holder: str, task_ids: Collection[str] | None = None) -> int:
    """Take back all tasks of `holder`, or only these of them, which no worker runs any more. Returns how many."""
    held = tasks.c.holder == holder
    if task_ids is not None:
        held &= tasks.c.id.in_(listed(task_ids))
    return _requeue(connection, now, holder, held, "given_back")


def _requeue(connection: Connection, now: float, actor: str, which: ColumnElement[bool], end: str) -> int:
    """Queue running tasks again, or cancel those that no live job needs. Returns how many tasks that changes."""
    unwanted = tasks.c.cancel_requested
    statement = move_tasks({TaskState.RUNNING}, TaskState.QUEUED, unless=(unwanted, TaskState.CANCELLED))
    values = {
        "reason": case((unwanted, UNWANTED), else_=tasks.c.reason),
        "finished_at": case((unwanted, now), else_=None),
        "holder": None,
        "lease_expires_at": None,
    }
    # RUNNING repeats the condition as literal text, so that SQLite can use its partial index.
    statement = statement.where(RUNNING, which).values(values)
    rows = connection.execute(statement.returning(tasks.c.id, tasks.c.attempt, tasks.c.state)).all()
    if not rows:
        return 0
    this = (attempts.c.task_id == bindparam("task")) & (attempts.c.number == bindparam("attempt"))
    ended = update(attempts).where(this).values(ended_at=now, end=end)
    connection.execute(ended, [{"task": row.id, "attempt": row.attempt} for row in rows])
    events = [
        Event(
            EventKind.of_task(row.state), task_id=row.id, attempt=row.attempt, data={"end": end, "reason": REASONS[end]}
        )
        for row in rows
    ]
    history.append(connection, now, actor, events)
    settle(connection, now, actor, [row.id for row in rows])
    return len(rows)
