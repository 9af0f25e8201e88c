"""What succeeded tasks took, kept where estimates find it by one look into an index."""

from collections.abc import Collection, Mapping
from typing import Any

from sqlalchemy import Connection, delete, or_, select

from service.model.estimates import Timing, Workload, units, workload
from service.model.json import JsonObject
from service.store.listed import insert_rows, listed
from service.store.states import CURRENT, DIGEST
from service.store.tables import attempts, tasks, timings

NEWEST = 200  # timings that an estimate rests on


def keep(connection: Connection, now: float, succeeded: Collection[str]) -> None:
    """Note what these tasks took, as far as their workers said so."""
    columns = (tasks.c.id, tasks.c.spec, tasks.c.train_digest, attempts.c.provenance)
    query = select(*columns).join(attempts, CURRENT).where(tasks.c.id.in_(listed(succeeded)))
    done = [row for row in connection.execute(query) if _seconds(row.provenance) is not None]
    named = listed({row.train_digest for row in done})
    of_training = select(DIGEST, tasks.c.spec).where(or_(tasks.c.digest.in_(named), tasks.c.former_digest.in_(named)))
    training = dict(connection.execute(of_training).all())
    rows = [_row(row, training[row.train_digest], now) for row in done]
    connection.execute(delete(timings).where(timings.c.task_id.in_(listed(row["task_id"] for row in rows))))
    insert_rows(connection, timings, rows)


def newest(connection: Connection, like: Workload) -> list[Timing]:
    """The last timings of such tasks, the newest first."""
    same = [getattr(timings.c, name) == value for name, value in vars(like).items()]
    query = select(timings.c.device, timings.c.device_seconds, timings.c.units).where(*same)
    found = connection.execute(query.order_by(timings.c.at.desc()).limit(NEWEST))
    return [Timing(row.device, row.device_seconds / row.units) for row in found]


def _row(found: Any, train_spec: Mapping[str, Any], now: float) -> dict[str, Any]:
    device = str(found.provenance.get("device") or "unknown")[:200]
    return {
        "task_id": found.id,
        **vars(workload(found.spec, train_spec)),
        "device": device,
        "device_seconds": _seconds(found.provenance),
        "units": units(found.spec),
        "at": now,
    }


def _seconds(provenance: JsonObject | None) -> float | None:
    """Device seconds, or wall seconds of a worker that says no more."""
    said = (provenance or {}).get("device_seconds", (provenance or {}).get("wall_seconds"))
    return float(said) if isinstance(said, (int, float)) else None
