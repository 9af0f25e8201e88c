"""The rows of registered checkpoints: weights that were made elsewhere."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from service.store.tables import checkpoints


def named(connection: Connection, name: str) -> Row[Any] | None:
    return connection.execute(select(checkpoints).where(checkpoints.c.name == name)).one_or_none()


def of_weights(connection: Connection, weights_sha256: str) -> list[Row[Any]]:
    """Those that have these weights, by name."""
    query = select(checkpoints).where(checkpoints.c.weights_sha256 == weights_sha256)
    return list(connection.execute(query.order_by(checkpoints.c.name)))


def registered(connection: Connection) -> list[Row[Any]]:
    """All of them, by name."""
    return list(connection.execute(select(checkpoints).order_by(checkpoints.c.name)))


def some_names(connection: Connection) -> list[str]:
    """The names of at most twenty."""
    return list(connection.scalars(select(checkpoints.c.name).limit(20)))


def register(connection: Connection, values: Mapping[str, Any]) -> None:
    connection.execute(insert(checkpoints).values(values))
