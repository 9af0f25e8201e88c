"""Whole tables, row by row, as backups read and fill them."""

from collections.abc import Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, LargeBinary, Table, delete, func, insert, select, update

from service.store.tables import artifact_roots, leases, metadata
from service.store.values import Values

BATCH = 1000


def tables() -> dict[str, list[str]]:
    """The columns of each table, by its name; a table comes after those that it refers to."""
    return {table.name: [column.name for column in table.columns] for table in metadata.sorted_tables}


def binary_columns(table: str) -> set[str]:
    """The columns of a table that hold bytes."""
    return {column.name for column in metadata.tables[table].columns if isinstance(column.type, LargeBinary)}


def rows(connection: Connection, table: str) -> Iterator[Sequence[Any]]:  # Any: each has the type of its column
    """All rows of a table in the order of their keys, some at a time."""
    source = metadata.tables[table]
    query = select(source).order_by(*source.primary_key)
    yield from connection.execution_options(yield_per=BATCH).execute(query)


def filled(connection: Connection) -> list[str]:
    """The tables that have rows. The mark of the artifact root does not count: it is made at the first start."""
    others = (table for table in metadata.sorted_tables if table is not artifact_roots)
    return [table.name for table in others if _has_rows(connection, table)]


def empty(connection: Connection) -> None:
    """Delete every row of every table."""
    for table in reversed(metadata.sorted_tables):
        connection.execute(delete(table))


def fill(connection: Connection, table: str, values: Sequence[Values]) -> None:
    if values:
        connection.execute(insert(metadata.tables[table]), values)


def after_filling(connection: Connection) -> None:
    """End the lease of the leader that the rows name, and let PostgreSQL's sequences continue after the last id."""
    connection.execute(update(leases).values(epoch=leases.c.epoch + 1, expires_at=0.0))
    if connection.dialect.name != "postgresql":
        return
    for table in metadata.sorted_tables:
        if (column := table.autoincrement_column) is not None:
            last = select(func.max(column)).scalar_subquery()
            sequence = func.pg_get_serial_sequence(table.name, column.name)
            connection.execute(select(func.setval(sequence, last)).where(last.is_not(None)))


def _has_rows(connection: Connection, table: Table) -> bool:
    return connection.execute(select(1).select_from(table).limit(1)).one_or_none() is not None
