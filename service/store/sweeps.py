"""The rows of sweeps: a new one, and the spec of one that is extended."""

from sqlalchemy import Connection, insert, update

from service.model.events import EventKind
from service.model.json import JsonObject
from service.store import history
from service.store.history import Event
from service.store.joining import new_id
from service.store.tables import sweeps


def insert_sweep(
    connection: Connection,
    now: float,
    *,
    name: str,
    user: str,
    spec: JsonObject,
    priority: int,
    labels: dict[str, str],
) -> str:
    sweep_id = new_id()
    row = {"id": sweep_id, "name": name, "user": user, "spec": spec, "priority": priority, "labels": labels}
    connection.execute(insert(sweeps).values(**row, paused=False, created_at=now))
    history.append(connection, now, user, [Event(EventKind.SWEEP_SUBMITTED, sweep_id=sweep_id, data={"name": name})])
    return sweep_id


def extend_sweep(connection: Connection, sweep_id: str, spec: JsonObject) -> None:
    """Replace the sweep's spec."""
    connection.execute(update(sweeps).where(sweeps.c.id == sweep_id).values(spec=spec))
