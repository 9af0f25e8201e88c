"""Two numbers of each result, with the tasks and measures that computed them: the points of a correlation."""

from collections.abc import Sequence

from sqlalchemy import Connection, null, select

from service.model.query import Node
from service.model.results import Point
from service.store.aggregating import NETWORK
from service.store.fields import Column, Field
from service.store.listed import json_object
from service.store.result_tables import results
from service.store.results import selected
from service.store.tables import tasks


def points(
    connection: Connection, nodes: Sequence[Node], measure: Field, target: Field, keys: Sequence[Field], limit: int
) -> list[Point]:
    """The results that have both numbers, in the order of submission, at most `limit`."""
    numbers = (measure, target)
    wanted = [
        results.c.cell_id,
        NETWORK,
        results.c.attack_seed,
        results.c.verdict_version,
        *(number.column for number in numbers),
        *(_task_of(number) for number in numbers),
        *(_measure_of(number) for number in numbers),
    ]
    labelled = [column.label(f"column_{i}") for i, column in enumerate((*wanted, *(key.column for key in keys)))]
    has_both = [number.column.is_not(None) for number in numbers]
    query = select(*labelled).where(*selected(connection, nodes), *has_both).order_by(results.c.sequence).limit(limit)
    return [Point._make((*row[: len(wanted)], row[len(wanted) :])) for row in connection.execute(query)]


def _task_of(number: Field) -> Column:
    return results.c.attack_task_id if number.task is None else number.task


def _measure_of(number: Field) -> Column:
    """The spec and the version of the further measure that computed a number, as JSON; null where none did."""
    if number.measure is None:
        return null()
    query = select(json_object(measure=tasks.c.spec["measure"], version=tasks.c.version))
    return query.where(tasks.c.id == number.measure).correlate(results).scalar_subquery()
