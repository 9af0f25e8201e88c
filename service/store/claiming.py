"""Leadership, grants and leases: who may run what, by the database's clock and never by age."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

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
from service.store.listed import listed
from service.store.settling import UNPAUSED, rerank, settle, start_jobs
from service.store.states import CLAIMABLE, RUNNING, SHARED, move_tasks
from service.store.tables import attempts, job_tasks, jobs, leases, queues, sweeps, tasks, trainings
from service.store.values import Values, one

LEADER = "dispatcher"
QUEUE = "default"
REASONS = {
    "lease_expired": "its dispatcher was silent for a whole lease",
    "given_back": "its dispatcher stopped, or started anew",
}


def lead(
    connection: Connection, now: float, holder: str, epoch: int | None, lease_seconds: float, status: JsonObject
) -> int | None:
    """Become the leading dispatcher for one lease, or stay it in `epoch`. Returns the epoch; None while another leads.

    One that is started under the leader's name takes over at once: the process that had it is gone, or has to go.
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
    """Whether that lease of `leader` is a valid one of another dispatcher."""
    return lease is not None and lease.holder != holder and lease.expires_at > now


def still_leads(connection: Connection, holder: str, epoch: int | None) -> bool:
    """Whether nobody else has taken the lead since that epoch began (its lease may have expired)."""
    row = leader(connection)
    return row is not None and (row.holder, row.epoch) == (holder, epoch)


def resign(connection: Connection, now: float, holder: str) -> None:
    """Let the next dispatcher take over at once."""
    mine = (leases.c.role == LEADER) & (leases.c.holder == holder)
    connection.execute(update(leases).where(mine).values(expires_at=now))


def leader(connection: Connection) -> Lease | None:
    """The lease of the last dispatcher that led, expired or not; None before the first one."""
    return one(connection, Lease, select(leases).where(leases.c.role == LEADER))


@dataclass(frozen=True)
class Placement:
    """Where a task goes when it is claimed: at whose expense, in which bundle, with how many devices."""

    sponsor: str
    bundle: str
    share: float


def _best_of_each_kind() -> CompoundSelect[Any]:
    columns = (
        tasks.c.id,
        tasks.c.kind,
        tasks.c.train_digest,
        tasks.c.sponsor,
        tasks.c.priority,
        tasks.c.sequence,
        tasks.c.waiting_since,
        tasks.c.needed_by,
    )
    ran_out = (attempts.c.task_id == tasks.c.id) & (attempts.c.end == "out_of_shared_memory")
    whole = and_(tasks.c.attempt > 0, exists().where(ran_out)).label("whole")
    asked = (CLAIMABLE, tasks.c.sponsor == bindparam("payer"), tasks.c.not_before <= bindparam("now"))
    best = (
        select(*columns, whole, tasks.c.boosted)
        .where(*asked, tasks.c.kind == literal(kind))
        .order_by(tasks.c.due, tasks.c.sequence)
        .limit(bindparam("each", type_=Integer))
        .subquery(f"best_{kind}")
        for kind in KINDS
    )
    return union_all(*(select(of_kind) for of_kind in best))


BEST_OF_EACH_KIND = _best_of_each_kind()


def waiting(connection: Connection, now: float, limit: int) -> list[Waiting]:
    """The best of each user's queue, about `limit` in all; those that back off or are paused are left out.

    However many tasks one user has queued, each other user's best are there too, and so are the best of each kind: one
    for which there is no room hides no other. Nothing is read but these.
    """
    sponsors = waiting_sponsors(connection)
    each = max(limit // max(1, len(sponsors) * len(KINDS)), min(limit, MAX_BUNDLE))
    found: list[Waiting] = []
    for sponsor in sponsors:
        rows = connection.execute(BEST_OF_EACH_KIND, {"payer": sponsor, "now": now, "each": each}).all()
        found += [Waiting(*row) for row in rows]
    return found


def _each_sponsor() -> Select[str]:
    first = select(func.min(tasks.c.sponsor).label("sponsor")).where(CLAIMABLE).cte("sponsors", recursive=True)
    later = tasks.alias("later")
    queued = later.c.state == literal_column(f"'{TaskState.QUEUED}'")
    following = select(func.min(later.c.sponsor)).where(queued, ~later.c.paused, later.c.sponsor > first.c.sponsor)
    sponsors = first.union_all(select(following.scalar_subquery()).where(first.c.sponsor.is_not(None)))
    return select(sponsors.c.sponsor).where(sponsors.c.sponsor.is_not(None))


EACH_SPONSOR = _each_sponsor()


def waiting_sponsors(connection: Connection) -> list[str]:
    """The users who have something queued that is not paused, by one look into the index for each of them."""
    return list(connection.scalars(EACH_SPONSOR))


def any_shared(connection: Connection) -> bool:
    """Whether a task waits that jobs of several users need."""
    return connection.execute(select(tasks.c.id).where(SHARED).limit(1)).first() is not None


def sponsored_too_late(connection: Connection, turns: Mapping[str, int], most: int) -> list[str]:
    """Up to `most` of the tasks that wait for their sponsor's turn while that of another user who needs them is
    earlier; `turns` are users' places in line. What is boosted waits for nobody's turn.
    """
    place = [case(turns, value=user, else_=0) for user in (tasks.c.sponsor, jobs.c.user)]
    needing = tasks.join(job_tasks, job_tasks.c.task_id == tasks.c.id).join(jobs, jobs.c.id == job_tasks.c.job_id)
    needing = needing.outerjoin(sweeps, sweeps.c.id == jobs.c.sweep_id)
    query = select(tasks.c.id).distinct().select_from(needing).where(SHARED, ~tasks.c.boosted)
    earlier = (jobs.c.state.in_(LIVE_JOB), UNPAUSED, place[1] < place[0])
    return list(connection.scalars(query.where(*earlier).limit(most)))


def change_sponsors(connection: Connection, now: float, task_ids: Collection[str], turns: Mapping[str, int]) -> None:
    """Have these tasks, where they still wait, sponsored by the user whose turn is first of those who need them."""
    rerank(connection, now, and_(tasks.c.id.in_(listed(task_ids)), SHARED), turns)


def queued_of(connection: Connection, sponsor: str, most: int) -> int:
    """How many tasks wait at this user's expense, counted up to `most`."""
    mine = select(tasks.c.id).where(CLAIMABLE, tasks.c.sponsor == sponsor).limit(most).subquery()
    return int(connection.execute(select(func.count()).select_from(mine)).scalar_one())


def places(connection: Connection) -> float:
    """How many tasks the leader's cluster can run at once, as far as it has said."""
    row = leader(connection)
    capacity = (row.status if row else {}).get("capacity", {})
    return float(capacity.get("gpus") or capacity.get("cpus") or 0.0)


def is_paused(connection: Connection) -> bool:
    """Whether the whole queue is."""
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

    With `placements` (by task id), only those whose sponsor is still the same: whoever pays has been asked.
    """
    mine = move_tasks({TaskState.QUEUED}, TaskState.RUNNING).where(tasks.c.id.in_(listed(task_ids)), ~tasks.c.paused)
    if placements is not None:
        payers = listed(f"{task_id}:{placements[task_id].sponsor}" for task_id in task_ids)
        mine = mine.where((tasks.c.id + literal(":", String) + tasks.c.sponsor).in_(payers))
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
    made_of = (tasks.c.digest, tasks.c.spec, tasks.c.resume_digest, tasks.c.resume_bytes)
    granted: dict[str, Grant] = {}
    for row in connection.execute(mine.values(values).returning(tasks.c.id, tasks.c.attempt, *made_of)):
        resume = ArtifactRef(row.resume_digest, row.resume_bytes, "epoch_state") if row.resume_digest else None
        granted[row.id] = Grant(row.id, row.attempt, row.digest, row.spec, resume)
    if granted:
        given = [granted[task_id] for task_id in task_ids if task_id in granted]
        connection.execute(insert(attempts), [_attempt(one, now, holder, placements) for one in given])
        happened = [Event(EventKind.TASK_RUNNING, task_id=one.task_id, attempt=one.attempt) for one in given]
        history.append(connection, now, holder, happened)
        start_jobs(connection, now, holder, list(granted))
    return granted


def _attempt(one: Grant, now: float, holder: str, placements: Mapping[str, Placement] | None) -> Values:
    place = placements[one.task_id] if placements else None
    return {
        "task_id": one.task_id,
        "number": one.attempt,
        "holder": holder,
        "started_at": now,
        "bundle": place.bundle if place else None,
        "device_share": place.share if place else None,
    }


def checkpoint_of(connection: Connection, train_digest: str) -> tuple[JsonObject, ArtifactRef | None]:
    """The spec of a training and, once it has succeeded, its checkpoint."""
    query = (
        select(tasks.c.spec, trainings.c.checkpoint_digest, trainings.c.checkpoint_bytes)
        .outerjoin(trainings, trainings.c.task_id == tasks.c.id)
        .where(tasks.c.digest == train_digest)
    )
    row = connection.execute(query).one()
    if row.checkpoint_digest is None:
        return row.spec, None
    return row.spec, ArtifactRef(row.checkpoint_digest, row.checkpoint_bytes, "checkpoint")


def datasets_of(connection: Connection, train_digests: Collection[str]) -> dict[str, str]:
    """The names of the data sets of these trainings, by their digests."""
    name = tasks.c.spec["dataset"]["name"].as_string()
    query = select(tasks.c.digest, name).where(tasks.c.digest.in_(listed(train_digests)))
    return {digest: dataset for digest, dataset in connection.execute(query)}


def renew(connection: Connection, now: float, holder: str, lease_seconds: float) -> None:
    """Prolong the leases of everything that `holder` runs, and charge its sponsors so far."""
    mine = (tasks.c.holder == holder) & (RUNNING)
    connection.execute(update(tasks).where(mine).values(lease_expires_at=now + lease_seconds))
    quotas.charge_running(connection, now, holder)


def held_by(connection: Connection, holder: str) -> dict[tuple[str, int], bool]:
    """What `holder` runs: `(task id, attempt) -> cancel requested`."""
    query = select(tasks.c.id, tasks.c.attempt, tasks.c.cancel_requested)
    mine = query.where(tasks.c.holder == holder, RUNNING)
    return {(task_id, attempt): unwanted for task_id, attempt, unwanted in connection.execute(mine)}


def reap(connection: Connection, now: float, actor: str) -> int:
    """Take back what runs under an expired lease, at no cost to the task. Returns how many."""
    return _requeue(connection, now, actor, tasks.c.lease_expires_at < now, "lease_expired")


def take_back(connection: Connection, now: float, holder: str, task_ids: Collection[str] | None = None) -> int:
    """Take back what `holder` runs, or of that only these tasks: nothing of it runs any more."""
    mine = tasks.c.holder == holder
    if task_ids is not None:
        mine &= tasks.c.id.in_(listed(task_ids))
    return _requeue(connection, now, holder, mine, "given_back")


def _requeue(connection: Connection, now: float, actor: str, which: ColumnElement[bool], end: str) -> int:
    """Queue running tasks again, or cancel those that no live job needs."""
    unwanted = tasks.c.cancel_requested
    mine = move_tasks({TaskState.RUNNING}, TaskState.QUEUED, unless=(unwanted, TaskState.CANCELLED))
    values = {
        "reason": case((unwanted, UNWANTED), else_=tasks.c.reason),
        "finished_at": case((unwanted, now), else_=None),
        "holder": None,
        "lease_expires_at": None,
    }
    mine = mine.where(RUNNING, which).values(values)  # RUNNING again, as a text: so SQLite can use its partial index
    rows = connection.execute(mine.returning(tasks.c.id, tasks.c.attempt, tasks.c.state)).all()
    if not rows:
        return 0
    this = (attempts.c.task_id == bindparam("task")) & (attempts.c.number == bindparam("attempt"))
    ended = update(attempts).where(this).values(ended_at=now, end=end)
    connection.execute(ended, [{"task": row.id, "attempt": row.attempt} for row in rows])
    happened = [
        Event(
            EventKind.of_task(row.state), task_id=row.id, attempt=row.attempt, data={"end": end, "reason": REASONS[end]}
        )
        for row in rows
    ]
    history.append(connection, now, actor, happened)
    settle(connection, now, actor, [row.id for row in rows])
    return len(rows)
