"""The rows of the decision log: the last claims, each with what the scheduler saw and decided."""

from sqlalchemy import Connection, delete, insert, select

from service.model.json import JsonObject
from service.model.records import Decision
from service.store import counters
from service.store.tables import decisions
from service.store.values import every


def keep(connection: Connection, now: float, actor: str, seen: bytes, decided: list[JsonObject], most: int) -> None:
    """Store a decision, and delete all but the last `most`."""
    number = counters.take(connection, "decisions", 1)
    row = {"id": number, "at": now, "actor": actor, "seen": seen, "decided": decided}
    connection.execute(insert(decisions).values(row))
    connection.execute(delete(decisions).where(decisions.c.id <= number - most))


def recorded(connection: Connection) -> list[Decision]:
    """All decisions that are kept, oldest first."""
    return every(connection, Decision, select(decisions).order_by(decisions.c.id))
