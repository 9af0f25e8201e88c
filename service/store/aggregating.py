"""Sums over results by cell, and each result with its network for statistics that sums cannot give."""

import json
from collections.abc import Generator, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from sqlalchemy import Connection, Float, Integer, Select, Text, bindparam, case, cast, func, literal, select

from service.model.observations import LARGE, SMALL
from service.store.fields import Column
from service.store.listed import elements
from service.store.result_tables import cells, results
from service.store.tables import attack_results, tasks
from service.store.typed import json_number

FETCHED = 10_000  # rows of a batch
# Equal weights are one network, however often they were trained. A result without weights counts by its training.
NETWORK = func.coalesce(results.c.weights_sha256, results.c.train_task_id)


# Any in queries: SQLAlchemy cannot type a row of expressions.


class CellSums(NamedTuple):
    """Of the results of a cell with equal `keys`: how many they are, how many are `repeats`, and sums by metric.

    `sums` has five values for each metric: its number, sum, sum of squares, least and greatest.
    """

    cell_id: int
    keys: tuple[object, ...]
    rows: int
    repeats: int
    sums: tuple[Any, ...]  # Any: integers, floats, and null if no result has a value


class OfKeys(NamedTuple):
    """An answer about the results of a cell with equal `keys`."""

    cell_id: int
    keys: tuple[object, ...]
    values: tuple[Any, ...]  # Any: each question says what they are


class Observed(NamedTuple):
    """Results by column. `metrics` are the task that computed the first one, its value, the task of the second ..."""

    cell_ids: Sequence[int]
    keys: Sequence[Sequence[object]]
    networks: Sequence[str]
    attack_seeds: Sequence[int]
    metrics: Sequence[Sequence[Any]]  # Any: ids and numbers in turn


def moments(
    connection: Connection, where: Sequence[Column], keys: Sequence[Column], metrics: Sequence[Column]
) -> Generator[list[CellSums], None, None]:
    """The sums per cell and `keys`.

    They come in batches, from a generator to be closed. If the results of a cell differ in `keys`, there may be as many
    sums as results.
    """
    sums = [part.label(f"sum_{i}") for i, part in enumerate(chain.from_iterable(map(_sums, metrics)))]
    # PostgreSQL has no sum of booleans.
    repeats = func.count(func.nullif(results.c.repeats_network, False)).label("repeats")
    query: Select[Any] = select(results.c.cell_id, *_labelled(keys), func.count().label("rows"), repeats, *sums)
    query = query.where(*where).group_by(results.c.cell_id, *_labelled(keys))
    if keys:  # without, there are few rows: all at once, which a database may plan for
        query = query.execution_options(yield_per=FETCHED)
    end = 1 + len(keys)
    with connection.execute(query) as rows:
        for batch in rows.partitions(FETCHED):
            yield [CellSums(row[0], row[1:end], row[end], row[end + 1], row[end + 2 :]) for row in batch]


def _sums(metric: Column) -> tuple[Column, ...]:
    real = _real(metric)
    return (
        func.count(metric),
        func.sum(_in_range(real)),
        func.sum(_square(real)),
        func.min(metric),
        func.max(metric),
    )


def _labelled(keys: Sequence[Column]) -> list[Column]:
    return [key.label(f"key_{i}") for i, key in enumerate(keys)]


def _real(metric: Column) -> Column:
    """The metric as a float: sums and squares of integers overflow on one database, and are decimals on the other."""
    return cast(metric, Float(53)) if isinstance(metric.type, Integer) else metric


def _in_range(metric: Column) -> Column:
    """0 for values that are too large to be summed: PostgreSQL fails if a sum overflows. See `Moments.leaves_range`."""
    return case((metric.between(-LARGE, LARGE), metric), else_=0.0)


def _square(metric: Column) -> Column:
    """0 for values that are too large, or too small, to be squared: PostgreSQL fails there."""
    can_be = metric.between(-LARGE, LARGE) & ~metric.between(-SMALL, SMALL)
    return case((can_be, metric * metric), else_=0.0)


def measures(
    connection: Connection, where: Sequence[Column], keys: Sequence[Column], metric: Column, task_id: Column
) -> Iterator[OfKeys]:
    """The spec, as text, and the version of each measure task that computed a metric, each once."""
    spec = cast(tasks.c.spec["measure"], Text).label("measure")
    query: Select[Any] = select(results.c.cell_id, *_labelled(keys), spec, tasks.c.version)
    query = query.select_from(results.join(tasks, tasks.c.id == task_id))
    return _of_keys(connection, query.where(*where, metric.is_not(None)).distinct(), keys)


def verdict_versions(
    connection: Connection, where: Sequence[Column], keys: Sequence[Column], metric: Column
) -> Iterator[OfKeys]:
    """The version of the verdict on each result that has a metric, each once."""
    version = results.c.verdict_version.label("verdict_version")
    query: Select[Any] = select(results.c.cell_id, *_labelled(keys), version)
    return _of_keys(connection, query.where(*where, metric.is_not(None)).distinct(), keys)


def clean_correct(
    connection: Connection, where: Sequence[Column], keys: Sequence[Column], metric: Column
) -> Iterator[OfKeys]:
    """For the results that have a metric: the most images that a network classifies correctly without an attack, and
    how many results, of early versions, lack this number."""
    correct = json_number(attack_results.c.numbers, literal("n_clean_correct"))
    counted = func.max(cast(correct, Integer)).label("most"), (func.count() - func.count(correct)).label("untold")
    query: Select[Any] = select(results.c.cell_id, *_labelled(keys), *counted)
    query = query.select_from(results.join(attack_results, attack_results.c.task_id == results.c.attack_task_id))
    query = query.where(*where, metric.is_not(None)).group_by(results.c.cell_id, *_labelled(keys))
    return _of_keys(connection, query, keys)


def _of_keys(connection: Connection, query: Select[Any], keys: Sequence[Column]) -> Iterator[OfKeys]:
    end = 1 + len(keys)
    return (OfKeys(row[0], row[1:end], row[end:]) for row in connection.execute(query))


def observations(
    connection: Connection,
    where: Sequence[Column],
    keys: Sequence[Column],
    metrics: Sequence[tuple[Column, Column]],
    of_cells: Iterable[int] | None,
) -> Generator[Observed, None, None]:
    """The observation of each result, in batches: of these cells, or of all, in the order of the table.

    `metrics` are `(id of the task that computed it, value)`.
    """
    labelled = [column.label(f"column_{i}") for i, column in enumerate((*keys, NETWORK, results.c.attack_seed))]
    labelled += [column.label(f"metric_{i}") for i, column in enumerate(chain.from_iterable(metrics))]
    query: Select[Any] = select(results.c.cell_id, *labelled).where(*where)
    if of_cells is not None:
        wanted = elements(bindparam(None, json.dumps([str(cell_id) for cell_id in of_cells]), Text))
        query = query.where(results.c.cell_id.in_(select(cast(wanted.c.value, Integer))))
    end = 1 + len(keys)
    with connection.execute(query.execution_options(yield_per=FETCHED)) as rows:
        for batch in rows.partitions(FETCHED):
            columns = list(zip(*batch, strict=True))
            yield Observed(columns[0], columns[1:end], columns[end], columns[end + 1], columns[end + 2 :])


def first(connection: Connection, where: Sequence[Column], condition: Column) -> str | None:
    """The earliest result of these that fulfils `condition`."""
    query = select(results.c.job_id).where(*where, condition).order_by(results.c.sequence).limit(1)
    return connection.scalars(query).one_or_none()


def of_cells(connection: Connection, ids: Iterable[int], columns: Sequence[Column]) -> dict[int, tuple[Any, ...]]:
    """These columns of each of these cells. Any: whatever the columns hold."""
    wanted = set(ids)
    query = select(cells.c.id, *columns)
    if len(wanted) < FETCHED:
        query = query.where(cells.c.id.in_(wanted))
    return {row[0]: tuple(row[1:]) for row in connection.execute(query) if row[0] in wanted}
