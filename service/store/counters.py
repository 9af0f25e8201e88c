"""Gap-free numbers, taken inside the writing transaction that uses them."""

from sqlalchemy import ColumnElement, Connection, func, insert, select, update

from service.store.tables import counters


def take(connection: Connection, name: str, count: int) -> int:
    """Reserve `count` consecutive numbers of the series `name`; returns the first."""
    statement = update(counters).where(counters.c.name == name).values(value=counters.c.value + count)
    last = connection.execute(statement.returning(counters.c.value)).scalar_one_or_none()
    if last is None:
        connection.execute(insert(counters).values(name=name, value=count))
        return 1
    return int(last) - count + 1


def current(name: str) -> ColumnElement[int]:
    """The last number taken, for a statement that numbers its own rows; `take` as many right after it."""
    return func.coalesce(select(counters.c.value).where(counters.c.name == name).scalar_subquery(), 0)
