"""Two numbers of each result beside each other, with what each rests on: the points of a correlation."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row, null, select

from service.model.query import Node
from service.store.aggregating import NETWORK
from service.store.fields import Column, Field
from service.store.listed import json_object
from service.store.result_tables import results
from service.store.results import selected
from service.store.tables import tasks


def points(
    connection: Connection, nodes: Sequence[Node], numbers: Mapping[str, Field], keys: Sequence[Field], limit: int
) -> list[Row[Any]]:
    """The results that have all of these `numbers`, in the order of their submission, at most `limit`.

    Each with its `cell_id, network, attack_seed, judged_by`, the numbers by their names, for each of them the task that
    left it (`NAME_task`) and the spec of the further measure that computed it (`NAME_spec`), and last the `keys`.
    """
    columns = {name: number.column for name, number in numbers.items()}
    wanted = [
        results.c.cell_id,
        NETWORK.label("network"),
        results.c.attack_seed,
        results.c.verdict_version.label("judged_by"),
        *(column.label(name) for name, column in columns.items()),
        *(_task_of(number).label(f"{name}_task") for name, number in numbers.items()),
        *(_measure_of(number).label(f"{name}_spec") for name, number in numbers.items()),
        *(key.column for key in keys),
    ]
    known = [column.is_not(None) for column in columns.values()]
    query = select(*wanted).where(*selected(connection, nodes), *known).order_by(results.c.sequence).limit(limit)
    return list(connection.execute(query))


def _task_of(number: Field) -> Column:
    return results.c.attack_task_id if number.task is None else number.task


def _measure_of(number: Field) -> Column:
    """The spec and the version of the further measure that computed a number, as JSON; null where none did."""
    if number.measure is None:
        return null()
    found = select(json_object(measure=tasks.c.spec["measure"], version=tasks.c.version))
    return found.where(tasks.c.id == number.measure).correlate(results).scalar_subquery()
