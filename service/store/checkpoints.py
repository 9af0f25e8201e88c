"""The rows of registered checkpoints: weights that were made elsewhere."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, insert, select

from service.model.records import RegisteredCheckpoint
from service.store.tables import checkpoints
from service.store.values import every, one


def named(connection: Connection, name: str) -> RegisteredCheckpoint | None:
    return one(connection, RegisteredCheckpoint, select(checkpoints).where(checkpoints.c.name == name))


def of_weights(connection: Connection, weights_sha256: str) -> list[RegisteredCheckpoint]:
    """All checkpoints with these weights, by name."""
    query = select(checkpoints).where(checkpoints.c.weights_sha256 == weights_sha256)
    return every(connection, RegisteredCheckpoint, query.order_by(checkpoints.c.name))


def registered(connection: Connection) -> list[RegisteredCheckpoint]:
    """All registered checkpoints, by name."""
    return every(connection, RegisteredCheckpoint, select(checkpoints).order_by(checkpoints.c.name))


def some_names(connection: Connection) -> list[str]:
    """The names of at most twenty."""
    return list(connection.scalars(select(checkpoints.c.name).limit(20)))


def register(connection: Connection, values: Mapping[str, Any]) -> None:  # Any: each has the type of its column
    connection.execute(insert(checkpoints).values(values))
