"""Users' limits, and what they have used: charged as their tasks run, to the sponsor of each at that time."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any  # for rows: SQLAlchemy cannot type a row of expressions

from sqlalchemy import ColumnElement, Connection, Row, and_, bindparam, case, func, insert, literal, select, update

from service.limits import Limits
from service.model.scheduling import Account, decayed
from service.store.listed import listed
from service.store.states import CURRENT, RUNNING
from service.store.tables import attempts, jobs, tasks, usage, users

HANDLING_SECONDS = 0.05  # charged per attempt beside its run: also if its start and end are recorded together
FOLD_SECONDS = 60.0  # recent usage is decayed at least so often


def limits(connection: Connection, names: Collection[str], default: Limits) -> dict[str, Limits]:
    """The limits of these users: each is the user's own, or else the default."""
    columns = (users.c.name, users.c.weight, users.c.max_queued_jobs, users.c.max_gpus)
    limits_of = dict.fromkeys(names, default)
    for name, *own in connection.execute(select(*columns).where(users.c.name.in_(listed(names)))):
        fields = zip(("weight", "max_queued_jobs", "max_gpus"), own, strict=True)
        limits_of[name] = replace(default, **{field: value for field, value in fields if value is not None})
    return limits_of


def known(connection: Connection) -> list[str]:
    """Users who were ever charged."""
    return list(connection.scalars(select(usage.c.user).order_by(usage.c.user)))


def with_unfinished_jobs(connection: Connection) -> list[str]:
    """Users who have jobs that have not ended."""
    query = select(jobs.c.user).where(jobs.c.finished_at.is_(None)).distinct()
    return list(connection.scalars(query.order_by(jobs.c.user)))


def unfinished_jobs(connection: Connection, user: str) -> int:
    """How many jobs of this user have not ended."""
    unfinished = (jobs.c.user == user) & (jobs.c.finished_at.is_(None))
    return int(connection.execute(select(func.count()).select_from(jobs).where(unfinished)).scalar_one())


def charge_running(connection: Connection, now: float, holder: str) -> None:
    """Charge the sponsors of the tasks that `holder` runs for the time since their last charge."""
    _charge(connection, now, and_(tasks.c.holder == holder, RUNNING), literal(0.0), until=now)


def charge_ended(connection: Connection, now: float, task_ids: Iterable[str]) -> None:
    """Charge the rest for the last attempts of those of these tasks that do not run any more."""
    ended = and_(tasks.c.id.in_(listed(task_ids)), ~RUNNING)
    _charge(connection, now, ended, literal(HANDLING_SECONDS), until=None)


def _charge(
    connection: Connection, now: float, which: ColumnElement[bool], extra: ColumnElement[float], until: float | None
) -> None:
    open_account = and_(which, CURRENT, attempts.c.charged_until.is_not(None))
    ran = case((attempts.c.charged_until < now, now - attempts.c.charged_until), else_=0.0)
    seconds = func.sum((ran + extra) * func.coalesce(attempts.c.device_share, 1.0))
    rows = connection.execute(select(tasks.c.sponsor, seconds).where(open_account).group_by(tasks.c.sponsor)).all()
    if not rows:
        return
    _open(connection, now, [row.sponsor for row in rows])
    more = update(usage).where(usage.c.user == bindparam("name"))
    more = more.values(recent_seconds=usage.c.recent_seconds + bindparam("more"))
    connection.execute(more, [{"name": sponsor, "more": seconds} for sponsor, seconds in rows])
    connection.execute(update(attempts).where(open_account).values(charged_until=until))


def _open(connection: Connection, now: float, names: Collection[str]) -> None:
    """Have a row of usage for each of these users."""
    existing = set(connection.scalars(select(usage.c.user).where(usage.c.user.in_(listed(sorted(names))))))
    nothing = {"device_seconds": 0.0, "as_of": now, "recent_seconds": 0.0}
    if new := [{"user": name, **nothing} for name in sorted(set(names) - existing)]:
        connection.execute(insert(usage), new)


def fold(connection: Connection, now: float, half_life_seconds: float) -> None:
    """Bring usage that has not been decayed for a while up to date."""
    old = connection.execute(select(usage).where(usage.c.as_of < now - FOLD_SECONDS)).all()
    if old:
        used = update(usage).where(usage.c.user == bindparam("name"))
        used = used.values(device_seconds=bindparam("seconds"), recent_seconds=0.0, as_of=now)
        connection.execute(used, [{"name": row.user, "seconds": _used(row, now, half_life_seconds)} for row in old])


def accounts(
    connection: Connection, now: float, sponsors: Collection[str], half_life_seconds: float, default: Limits
) -> dict[str, Account]:
    """The usage, the devices in use and the limits of these users, for the scheduler."""
    used = {row.user: row for row in connection.execute(select(usage).where(usage.c.user.in_(listed(sponsors))))}
    allowed, devices = limits(connection, sponsors, default), devices_in_use(connection)
    return {
        name: Account(
            _used(used[name], now, half_life_seconds) if name in used else 0.0,
            devices.get(name, 0.0),
            allowed[name].weight,
            allowed[name].max_gpus,
        )
        for name in sorted(sponsors)
    }


def devices_in_use(connection: Connection) -> dict[str, float]:
    """Devices that each sponsor's bundles take now; a bundle counts until the last of its tasks has ended."""
    bundle = func.coalesce(attempts.c.bundle, attempts.c.task_id)
    share = func.max(func.coalesce(attempts.c.device_share, 1.0))
    query = select(tasks.c.sponsor, bundle, share).where(RUNNING, CURRENT).group_by(tasks.c.sponsor, bundle)
    in_use: dict[str, float] = {}
    for sponsor, _, devices in connection.execute(query):
        in_use[sponsor] = in_use.get(sponsor, 0.0) + devices
    return in_use


def _used(row: Row[Any], now: float, half_life_seconds: float) -> float:
    return decayed(row.device_seconds, now - row.as_of, half_life_seconds) + float(row.recent_seconds)
