"""Sums over results, a cell at a time, and the results of each network where sums do not do."""

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from sqlalchemy import Connection, Float, Integer, Row, Select, Text, bindparam, case, cast, func, literal, select

from service.model.observations import LARGE, SMALL
from service.store.fields import Column
from service.store.listed import elements
from service.store.result_tables import cells, results
from service.store.tables import attack_results, tasks
from service.store.typed import json_number

FETCHED = 10_000
# Equal weights are one network, however often they were trained; a result without them is known by its training.
NETWORK = func.coalesce(results.c.weights_sha256, results.c.train_task_id)


def moments(
    connection: Connection, where: Sequence[Column], keys: Sequence[Column], metrics: Sequence[Column]
) -> Generator[Sequence[Row[Any]], None, None]:
    """Per cell and `keys`: `rows`, how many are `repeats`, and of metric i `n_i, sum_i, squares_i, low_i, high_i`.

    They come in batches, to be closed: with keys that are not of the cell there may be as many as results.
    """
    named = [key.label(f"key_{i}") for i, key in enumerate(keys)]
    of = [
        part.label(f"{name}_{i}")
        for i, metric in enumerate(metrics)
        for name, part in (
            ("n", func.count(metric)), ("sum", func.sum(_in_range(_real(metric)))),
            ("squares", func.sum(_square(_real(metric)))),
            ("low", func.min(metric)), ("high", func.max(metric)),
        )
    ]  # fmt: skip
    # SQLite has no maximum of booleans, PostgreSQL none either.
    repeats = func.count(func.nullif(results.c.repeats_network, False)).label("repeats")
    query: Select[Any] = select(results.c.cell_id, *named, func.count().label("rows"), repeats, *of)
    query = query.where(*where).group_by(results.c.cell_id, *named)
    if keys:  # else all of it at once, which a database may plan for
        query = query.execution_options(yield_per=FETCHED)
    with connection.execute(query) as rows:
        yield from rows.partitions(FETCHED)


def _real(metric: Column) -> Column:
    """Sums and squares of integers leave their range on one database, and are decimals on the other."""
    return cast(metric, Float(53)) if isinstance(metric.type, Integer) else metric


def _in_range(metric: Column) -> Column:
    """0 for what is too large to be summed: PostgreSQL fails where a sum overflows. See `Moments.leaves_range`."""
    return case((metric.between(-LARGE, LARGE), metric), else_=0.0)


def _square(metric: Column) -> Column:
    """0 for what is too large, or too small, to be squared: PostgreSQL fails there."""
    can_be = metric.between(-LARGE, LARGE) & ~metric.between(-SMALL, SMALL)
    return case((can_be, metric * metric), else_=0.0)


def measures(
    connection: Connection, where: Sequence[Column], keys: Sequence[Column], metric: Column, task_id: Column
) -> Iterator[Row[Any]]:
    """`(cell_id, *keys, measure, version)`, each once, of the measure tasks that computed a metric; specs as texts."""
    named = [key.label(f"key_{i}") for i, key in enumerate(keys)]
    spec = cast(tasks.c.spec["measure"], Text).label("measure")
    query: Select[Any] = select(results.c.cell_id, *named, spec, tasks.c.version)
    query = query.select_from(results.join(tasks, tasks.c.id == task_id))
    return iter(connection.execute(query.where(*where, metric.is_not(None)).distinct()))


def verdict_versions(
    connection: Connection, where: Sequence[Column], keys: Sequence[Column], metric: Column
) -> Iterator[Row[Any]]:
    """`(cell_id, *keys, verdict_version)`, each once, of the results that have a metric."""
    named = [key.label(f"key_{i}") for i, key in enumerate(keys)]
    query: Select[Any] = select(results.c.cell_id, *named, results.c.verdict_version.label("verdict_version"))
    return iter(connection.execute(query.where(*where, metric.is_not(None)).distinct()))


def clean_correct(
    connection: Connection, where: Sequence[Column], keys: Sequence[Column], metric: Column
) -> Iterator[Row[Any]]:
    """Per cell and `keys`, of the results that have a metric: the most images that a network gets right without an
    attack, and how many results do not tell it, as those of early versions."""
    named = [key.label(f"key_{i}") for i, key in enumerate(keys)]
    correct = json_number(attack_results.c.numbers, literal("n_clean_correct"))
    counted = func.max(cast(correct, Integer)).label("most"), (func.count() - func.count(correct)).label("untold")
    query: Select[Any] = select(results.c.cell_id, *named, *counted)
    query = query.select_from(results.join(attack_results, attack_results.c.task_id == results.c.attack_task_id))
    return iter(connection.execute(query.where(*where, metric.is_not(None)).group_by(results.c.cell_id, *named)))


def observations(
    connection: Connection, where: Sequence[Column], keys: Sequence[Column],
    metrics: Sequence[tuple[Column, Column]], of_cells: Iterable[int] | None,
) -> Generator[Sequence[Row[Any]], None, None]:  # fmt: skip
    """`(cell_id, *keys, network, attack_seed, task_0, value_0, task_1 ...)` of each result, in batches.

    Of these cells, or of all, which are read in the order in which they lie there.

    `metrics` are `(id of the task that computed it, value)`.
    """
    named = [column.label(f"column_{i}") for i, column in enumerate((*keys, NETWORK, results.c.attack_seed))]
    of = [column.label(f"metric_{i}") for i, column in enumerate(chain.from_iterable(metrics))]
    query: Select[Any] = select(results.c.cell_id, *named, *of).where(*where)
    if of_cells is not None:
        wanted = elements(bindparam(None, json.dumps([str(cell_id) for cell_id in of_cells]), Text))
        query = query.where(results.c.cell_id.in_(select(cast(wanted.c.value, Integer))))
    with connection.execute(query.execution_options(yield_per=FETCHED)) as rows:
        yield from rows.partitions(FETCHED)


def first(connection: Connection, where: Sequence[Column], condition: Column) -> str | None:
    """The earliest result of these that fulfils `condition`."""
    query = select(results.c.job_id).where(*where, condition).order_by(results.c.sequence).limit(1)
    return connection.scalars(query).one_or_none()


def of_cells(connection: Connection, ids: Iterable[int], columns: Sequence[Column]) -> dict[int, tuple[Any, ...]]:
    """These columns of each of these cells."""
    wanted = set(ids)
    query = select(cells.c.id, *columns)
    if len(wanted) < FETCHED:
        query = query.where(cells.c.id.in_(wanted))
    return {row[0]: tuple(row[1:]) for row in connection.execute(query) if row[0] in wanted}
