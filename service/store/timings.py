"""How many device seconds succeeded tasks took, in a table where an estimate needs one index lookup."""

from collections.abc import Collection
from typing import Any  # for rows: SQLAlchemy cannot type a row of expressions

from sqlalchemy import Connection, Row, delete, or_, select

from service.model.estimates import Timing, Workload, units, workload
from service.model.json import JsonMapping, JsonObject
from service.store.listed import insert_rows, listed
from service.store.states import CURRENT, DIGEST
from service.store.tables import attempts, tasks, timings
from service.store.values import Values

NEWEST = 200  # timings that an estimate rests on


def keep(connection: Connection, now: float, succeeded: Collection[str]) -> None:
    """Store how many device seconds these tasks took, if their workers reported them."""
    columns = (tasks.c.id, tasks.c.spec, tasks.c.train_digest, attempts.c.provenance)
    query = select(*columns).join(attempts, CURRENT).where(tasks.c.id.in_(listed(succeeded)))
    done = [row for row in connection.execute(query) if _seconds(row.provenance) is not None]
    train_digests = listed({row.train_digest for row in done})
    either = or_(tasks.c.digest.in_(train_digests), tasks.c.former_digest.in_(train_digests))
    training = dict(connection.execute(select(DIGEST, tasks.c.spec).where(either)).all())
    rows = [_row(row, training[row.train_digest], now) for row in done]
    connection.execute(delete(timings).where(timings.c.task_id.in_(listed(row["task_id"] for row in rows))))
    insert_rows(connection, timings, rows)


def newest(connection: Connection, like: Workload) -> list[Timing]:
    """The last timings of tasks with this workload, the newest first."""
    same = [getattr(timings.c, name) == value for name, value in vars(like).items()]
    query = select(timings.c.device, timings.c.device_seconds, timings.c.units).where(*same)
    rows = connection.execute(query.order_by(timings.c.at.desc()).limit(NEWEST))
    return [Timing(row.device, row.device_seconds / row.units) for row in rows]


def _row(row: Row[Any, Any, Any, Any], train_spec: JsonMapping, now: float) -> Values:
    device = str(row.provenance.get("device") or "unknown")[:200]
    return {
        "task_id": row.id,
        **vars(workload(row.spec, train_spec)),
        "device": device,
        "device_seconds": _seconds(row.provenance),
        "units": units(row.spec),
        "at": now,
    }


def _seconds(provenance: JsonObject | None) -> float | None:
    """Device seconds, or wall seconds if the worker reported no others; None if it reported neither."""
    seconds = (provenance or {}).get("device_seconds", (provenance or {}).get("wall_seconds"))
    return float(seconds) if isinstance(seconds, (int, float)) else None
