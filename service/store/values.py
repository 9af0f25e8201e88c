"""Rows as values: a query of all columns of a table, in their order, gives records with these fields."""

from collections.abc import Callable
from itertools import starmap
from typing import Any, TypeVar

from sqlalchemy import Connection, Executable

T = TypeVar("T")

Values = dict[str, Any]  # by column. Any: each value has the type of its column


def one(connection: Connection, record: Callable[..., T], query: Executable) -> T | None:
    """The only row of `query`; None if there is none."""
    row: Any = connection.execute(query).one_or_none()  # Any: `record` takes whatever columns there are
    return None if row is None else record(*row)


def every(connection: Connection, record: Callable[..., T], query: Executable) -> list[T]:
    return list(starmap(record, connection.execute(query)))
