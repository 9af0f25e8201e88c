"""Questions about results: the numbers of a succeeded job, joined from the tasks that it shares with others."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, Select, case, func, select

from service.model.flags import FLAGS, names_of
from service.model.jobs import TaskState
from service.model.json import JsonObject
from service.model.query import Node
from service.model.results import CellSpec, FurtherMeasure, Result, ResultKey
from service.model.verdict import BitArray, unpack
from service.specs.numbers import INDEXED, METRICS
from service.specs.versions import LATER
from service.store.conditions import by_cell, condition
from service.store.fields import Column
from service.store.keyset import Among, Order, Page, Position
from service.store.listed import listed, numbered
from service.store.own_weights import left_out
from service.store.result_fields import RESULTS
from service.store.result_tables import cells, results
from service.store.states import CURRENT, DIGEST, WEIGHTS_USED
from service.store.tables import (
    artifacts,
    attack_results,
    attempts,
    curves,
    job_tasks,
    jobs,
    measurements,
    outcome_bits,
    tasks,
)
from service.store.task_kinds import TASK_KINDS

RETRACTION = ("retracted_at", "retracted_by", "retraction_reason", "retracted_with")
MOST_HIDDEN = 1000  # the most hidden results that are counted
MADE = ("job_id", "flags", "metrics")  # fields of `Result` that are no columns of the query
AS_STORED = tuple(field.name for field in fields(Result) if field.name not in MADE)
# Any in rows and queries: SQLAlchemy cannot type a row of expressions.


class Columns(NamedTuple):
    """A page of results by column: the cell of each, and the values of the columns that were asked for."""

    cell_ids: Sequence[int]
    values: Sequence[Sequence[Any]]  # Any: whatever the columns hold
    end: Position | None


@cache  # SQLAlchemy compiles a statement only once if it gets the same object again
def _whole() -> Select[Any]:
    """Whole results: the job's id, then `FLAGS`, `METRICS` and `AS_STORED`, in this order."""
    attack = tasks.alias("attack_task")
    of_results = (*METRICS, *FLAGS, *RETRACTION, "cell_id", "weights_sha256")
    by_name = {
        **jobs.c,
        **{name: results.c[name] for name in of_results},
        "attack_numbers": attack_results.c.numbers,
        "measure_numbers": case((~left_out(results.c.measure_task_id), measurements.c.numbers)),
        "attack_digest": func.coalesce(attack.c.former_digest, attack.c.digest),
        "provenance": attempts.c.provenance,
    }
    return (
        select(jobs.c.id, *(by_name[name].label(name) for name in (*FLAGS, *METRICS, *AS_STORED)))
        .join(results, results.c.job_id == jobs.c.id)
        .join(attack_results, attack_results.c.task_id == jobs.c.attack_task_id)
        .outerjoin(measurements, measurements.c.task_id == jobs.c.measure_task_id)
        .join(attack, attack.c.id == jobs.c.attack_task_id)
        .outerjoin(attempts, (attempts.c.task_id == attack.c.id) & (attempts.c.number == attack.c.attempt))
    )


def keys(
    connection: Connection, nodes: Sequence[Node], order: Order, after: Position | None, limit: int, *, retracted: bool
) -> Page[ResultKey]:
    """A page of results, in order. Retracted ones are among them only if `retracted`."""
    where, among = _where(connection, nodes, order, retracted)
    page = order.page(connection, select(results.c.job_id, results.c.cell_id).where(*where), after, limit, among)
    return Page([ResultKey(row.job_id, row.cell_id) for row in page.rows], page.end)


def columns(
    connection: Connection,
    nodes: Sequence[Node],
    order: Order,
    after: Position | None,
    limit: int,
    wanted: Sequence[Column],
    *,
    retracted: bool,
) -> Columns:
    """The columns `wanted` of a page of results."""
    where, among = _where(connection, nodes, order, retracted)
    labelled = [column.label(f"column_{i}") for i, column in enumerate(wanted)]
    query = select(results.c.cell_id, *labelled).where(*where)
    page = order.page(connection, query, after, limit, among)
    cell_ids, *values = zip(*page.rows, strict=True) if page.rows else ([] for _ in range(1 + len(wanted)))
    return Columns(cell_ids, values[: len(wanted)], page.end)


def selected(
    connection: Connection, nodes: Sequence[Node], *, retracted: bool = False, scanning: bool = False
) -> list[Column]:
    """The conditions that choose results."""
    shown: list[Column] = [] if retracted else [results.c.retracted_at.is_(None)]
    return [*shown, condition(connection, nodes, RESULTS, scanning=scanning)]


def hidden(connection: Connection, nodes: Sequence[Node]) -> int:
    """How many results that the filters choose are hidden because they are retracted, counted up to `MOST_HIDDEN`."""
    which = (results.c.retracted_at.is_not(None), condition(connection, nodes, RESULTS))
    few = select(results.c.job_id).where(*which).limit(MOST_HIDDEN).subquery()
    return int(connection.execute(select(func.count()).select_from(few)).scalar_one())


def _where(
    connection: Connection, nodes: Sequence[Node], order: Order, retracted: bool
) -> tuple[list[Column], Among | None]:
    """The conditions that choose results; apart, the cells they allow, if few and each has an index in `order`."""
    indexed = _is_indexed(order)
    of_cells = by_cell(connection, nodes, RESULTS) if indexed and not retracted else None
    if of_cells is None:
        return selected(connection, nodes, retracted=retracted, scanning=indexed), None
    ids, rest = of_cells
    return [results.c.retracted_at.is_(None), rest], Among(results.c.cell_id, cells.c.id, ids)


def _is_indexed(order: Order) -> bool:
    columns = [term.field.column for term in order.terms]
    return not columns or (len(columns) == 1 and any(columns[0] is results.c[name] for name in INDEXED))


def of_jobs(connection: Connection, job_ids: Sequence[str]) -> list[Result]:
    """The results of these jobs, whole and in this order."""
    rows = {row.id: row for row in connection.execute(_whole().where(jobs.c.id.in_(listed(job_ids))))}
    return [_result(rows[job_id]) for job_id in job_ids if job_id in rows]


def of_job(connection: Connection, job_id: str) -> Result | None:
    row = connection.execute(_whole().where(jobs.c.id == job_id)).one_or_none()
    return None if row is None else _result(row)


def _result(row: Row[Any]) -> Result:
    """By position: a page has 5,000 values, and each name of a row is looked up."""
    values = row[1:]
    metrics_at, stored_at = len(FLAGS), len(FLAGS) + len(METRICS)
    return Result(
        job_id=row[0],
        flags=names_of(*values[:metrics_at]),
        metrics=dict(zip(METRICS, values[metrics_at:stored_at], strict=True)),
        **dict(zip(AS_STORED, values[stored_at:], strict=True)),
    )


def cell_specs(connection: Connection, ids: Iterable[int]) -> dict[int, CellSpec]:
    """The spec of each of these cells, without seeds and with the versions of its tasks."""
    wanted = list(ids)
    query = select(cells.c.id, cells.c.spec).where(cells.c.id.in_(numbered(wanted)))
    return {cell_id: {**LATER, **spec} for cell_id, spec in connection.execute(query)} if wanted else {}


def further_measures(connection: Connection, chosen: Sequence[Result]) -> dict[str, list[FurtherMeasure]]:
    """The measures of the chosen results beyond the closed forms, by the id of the job.

    A measure has no numbers if it failed, was retracted, or used other weights than the attack.
    """
    measures: dict[str, list[FurtherMeasure]] = defaultdict(list)
    by_job = {result.job_id: result for result in chosen}
    measured = [result.job_id for result in chosen if result.spec["measures"]]
    retraction = (tasks.c.retracted_at, tasks.c.retraction_reason)
    of_task = (tasks.c.id, tasks.c.spec, tasks.c.state, tasks.c.reason, *retraction, measurements.c.numbers)
    used = WEIGHTS_USED.label("used")
    query = (
        select(job_tasks.c.job_id, *of_task, used)
        .join(tasks, tasks.c.id == job_tasks.c.task_id)
        .outerjoin(measurements, measurements.c.task_id == tasks.c.id)
        .outerjoin(attempts, CURRENT)
        .where(job_tasks.c.job_id.in_(listed(measured)), tasks.c.kind == "measure")
        .order_by(DIGEST)
    )
    for row in connection.execute(query) if measured else ():
        result = by_job[row.job_id]
        if row.id != result.measure_task_id:
            measures[row.job_id].append(_further(row, result))
    return measures


def _further(row: Row[Any], result: Result) -> FurtherMeasure:
    spec = row.spec["measure"]
    if row.retracted_at is not None:
        return FurtherMeasure(spec, {}, f"retracted: {row.retraction_reason}")
    if result.mixed_weights and row.used not in (None, result.weights_sha256):
        return FurtherMeasure(spec, {}, f"it used other weights ({row.used}) than the attack")
    return FurtherMeasure(spec, row.numbers or {}, row.reason if row.state == TaskState.FAILED else None)


def numbers_of(connection: Connection, task_id: str, kind: str) -> JsonObject:
    table = TASK_KINDS[kind].numbers
    numbers = connection.execute(select(table.c.numbers).where(table.c.task_id == task_id)).scalar_one_or_none()
    return dict(numbers or {})


def curve_names(connection: Connection, task_id: str) -> list[str]:
    return list(connection.scalars(select(curves.c.name).where(curves.c.task_id == task_id).order_by(curves.c.name)))


def curves_of(connection: Connection, task_id: str) -> JsonObject:
    query = select(curves.c.name, curves.c.points).where(curves.c.task_id == task_id).order_by(curves.c.name)
    return {name: points for name, points in connection.execute(query)}


def bit_names(connection: Connection, task_id: str) -> dict[str, int]:
    """The names of the stored outcome bits, and of how many examples each are."""
    query = select(outcome_bits.c.name, outcome_bits.c.n).where(outcome_bits.c.task_id == task_id)
    return {name: n for name, n in connection.execute(query.order_by(outcome_bits.c.name))}


def artifacts_of(connection: Connection, task_id: str) -> dict[str, dict[str, str | int]]:
    """The artifacts of a task by kind: `arrays`, `checkpoint`, ..."""
    query = select(artifacts).where(artifacts.c.task_id == task_id).order_by(artifacts.c.kind, artifacts.c.created_at)
    return {row.kind: {"digest": row.digest, "size_bytes": row.size_bytes} for row in connection.execute(query)}


def bits_of(connection: Connection, task_ids: Sequence[str], name: str) -> dict[str, BitArray]:
    """One kind of outcome bits of these tasks, as bool arrays in sample order."""
    query = select(outcome_bits).where(outcome_bits.c.task_id.in_(listed(task_ids)), outcome_bits.c.name == name)
    return {row.task_id: unpack(row.n, row.packed) for row in connection.execute(query)}
