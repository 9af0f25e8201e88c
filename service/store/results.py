"""Questions about results: the numbers of a succeeded job, joined from the tasks that it shares with others."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from sqlalchemy import Connection, Row, Select, case, func, select

from service.model.flags import FLAGS
from service.model.jobs import TaskState
from service.model.query import Node
from service.model.verdict import BitArray, unpack
from service.specs.numbers import INDEXED, METRICS
from service.specs.versions import LATER
from service.store.conditions import by_cell, condition
from service.store.fields import RESULTS, Column
from service.store.keyset import Among, Order, Position
from service.store.listed import listed, numbered
from service.store.own_weights import left_out
from service.store.result_tables import cells, results
from service.store.states import CURRENT, DIGEST, WEIGHTS_USED
from service.store.tables import (
    NUMBERS,
    artifacts,
    attack_results,
    attempts,
    curves,
    job_tasks,
    jobs,
    measurements,
    outcome_bits,
    tasks,
)  # fmt: skip

RETRACTION = ("retracted_at", "retracted_by", "retraction_reason", "retracted_with")
MOST_HIDDEN = 1000


@cache  # SQLAlchemy compiles a statement once that it is given again
def _rows() -> Select[Any]:
    attack = tasks.alias("attack_task")
    measured = [results.c[name] for name in METRICS]
    return (
        select(
            jobs,
            *measured,
            *(results.c[name] for name in ("cell_id", "weights_sha256", *FLAGS, *RETRACTION)),
            attack_results.c.numbers.label("attack_numbers"),
            case((~left_out(results.c.measure_task_id), measurements.c.numbers)).label("measure_numbers"),
            func.coalesce(attack.c.former_digest, attack.c.digest).label("attack_digest"),
            attempts.c.provenance,
        )
        .join(results, results.c.job_id == jobs.c.id)
        .join(attack_results, attack_results.c.task_id == jobs.c.attack_task_id)
        .outerjoin(measurements, measurements.c.task_id == jobs.c.measure_task_id)
        .join(attack, attack.c.id == jobs.c.attack_task_id)
        .outerjoin(attempts, (attempts.c.task_id == attack.c.id) & (attempts.c.number == attack.c.attempt))
    )


def keys(
    connection: Connection, nodes: Sequence[Node], order: Order, after: Position | None, limit: int, *, retracted: bool
) -> list[Row[Any]]:
    """The `job_id` and `cell_id` of a page of results, in order; retracted ones only where they are asked for."""
    where, among = _where(connection, nodes, order, retracted)
    return order.page(connection, select(results.c.job_id, results.c.cell_id).where(*where), after, limit, among)


def columns(
    connection: Connection, nodes: Sequence[Node], order: Order, after: Position | None, limit: int,
    wanted: Sequence[Column], *, retracted: bool,
) -> list[Row[Any]]:  # fmt: skip
    """The cell's id and these columns, in this order, of a page of results."""
    where, among = _where(connection, nodes, order, retracted)
    named = [column.label(f"column_{i}") for i, column in enumerate(wanted)]
    query = select(results.c.cell_id, *named).where(*where)
    return order.page(connection, query, after, limit, among)


def selected(
    connection: Connection, nodes: Sequence[Node], *, retracted: bool = False, scanning: bool = False
) -> list[Column]:
    """The conditions that choose results."""
    shown: list[Column] = [] if retracted else [results.c.retracted_at.is_(None)]
    return [*shown, condition(connection, nodes, RESULTS, scanning=scanning)]


def hidden(connection: Connection, nodes: Sequence[Node]) -> int:
    """How many results the filters choose that are hidden because they are retracted, counted up to `MOST_HIDDEN`."""
    which = (results.c.retracted_at.is_not(None), condition(connection, nodes, RESULTS))
    few = select(results.c.job_id).where(*which).limit(MOST_HIDDEN).subquery()
    return int(connection.execute(select(func.count()).select_from(few)).scalar_one())


def _where(
    connection: Connection, nodes: Sequence[Node], order: Order, retracted: bool
) -> tuple[list[Column], Among | None]:
    """The conditions that choose results, those that name few cells apart where each cell has an index in `order`."""
    indexed = _is_indexed(order)
    of_cells = by_cell(connection, nodes, RESULTS) if indexed and not retracted else None
    if of_cells is None:
        return selected(connection, nodes, retracted=retracted, scanning=indexed), None
    ids, rest = of_cells
    return [results.c.retracted_at.is_(None), rest], Among(results.c.cell_id, cells.c.id, ids)


def _is_indexed(order: Order) -> bool:
    columns = [term.field.column for term in order.terms]
    return not columns or (len(columns) == 1 and any(columns[0] is results.c[name] for name in INDEXED))


def rows_of(connection: Connection, job_ids: Sequence[str]) -> list[Row[Any]]:
    """The results of these jobs, whole and in this order."""
    found = {row.id: row for row in connection.execute(_rows().where(jobs.c.id.in_(listed(job_ids))))}
    return [found[job_id] for job_id in job_ids if job_id in found]


def one(connection: Connection, job_id: str) -> Row[Any] | None:
    return connection.execute(_rows().where(jobs.c.id == job_id)).one_or_none()


def cell_specs(connection: Connection, ids: Iterable[int]) -> dict[int, dict[str, Any]]:
    """What each of these cells is: a spec without seeds, with the versions of its tasks."""
    wanted = list(ids)
    query = select(cells.c.id, cells.c.spec).where(cells.c.id.in_(numbered(wanted)))
    return {cell_id: {**LATER, **spec} for cell_id, spec in connection.execute(query)} if wanted else {}


def further_measures(connection: Connection, job_rows: Sequence[Row[Any]]) -> dict[str, list[dict[str, Any]]]:
    """The measures beyond the closed forms: `job id -> [{"measure": its spec, "numbers": ..., "failed": why or None}]`.

    One that failed or was retracted has no numbers, and neither has one that used other weights than the attack.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    result = {row.id: row for row in job_rows}
    asked = [row.id for row in job_rows if row.spec["measures"]]
    retraction = (tasks.c.retracted_at, tasks.c.retraction_reason)
    of_task = (tasks.c.id, tasks.c.spec, tasks.c.state, tasks.c.reason, *retraction, measurements.c.numbers)
    used = WEIGHTS_USED.label("used")
    query = (
        select(job_tasks.c.job_id, *of_task, used)
        .join(tasks, tasks.c.id == job_tasks.c.task_id)
        .outerjoin(measurements, measurements.c.task_id == tasks.c.id)
        .outerjoin(attempts, CURRENT)
        .where(job_tasks.c.job_id.in_(listed(asked)), tasks.c.kind == "measure")
        .order_by(DIGEST)
    )
    for row in connection.execute(query) if asked else ():
        of = result[row.job_id]
        if row.id != of.measure_task_id:
            failed = row.reason if row.state == TaskState.FAILED else None
            numbers = row.numbers or {}
            if row.retracted_at is not None:
                numbers, failed = {}, f"retracted: {row.retraction_reason}"
            elif of.mixed_weights and row.used not in (None, of.weights_sha256):
                numbers, failed = {}, f"it used other weights ({row.used}) than the attack"
            found[row.job_id].append({"measure": row.spec["measure"], "numbers": numbers, "failed": failed})
    return found


def numbers_of(connection: Connection, task_id: str, kind: str) -> dict[str, Any]:
    table = NUMBERS[kind]
    numbers = connection.execute(select(table.c.numbers).where(table.c.task_id == task_id)).scalar_one_or_none()
    return dict(numbers or {})


def curve_names(connection: Connection, task_id: str) -> list[str]:
    return list(connection.scalars(select(curves.c.name).where(curves.c.task_id == task_id).order_by(curves.c.name)))


def curves_of(connection: Connection, task_id: str) -> dict[str, Any]:
    query = select(curves.c.name, curves.c.points).where(curves.c.task_id == task_id).order_by(curves.c.name)
    return {name: points for name, points in connection.execute(query)}


def bit_names(connection: Connection, task_id: str) -> dict[str, int]:
    """The outcome bits that are stored, and of how many examples."""
    query = select(outcome_bits.c.name, outcome_bits.c.n).where(outcome_bits.c.task_id == task_id)
    return {name: n for name, n in connection.execute(query.order_by(outcome_bits.c.name))}


def artifacts_of(connection: Connection, task_id: str) -> dict[str, dict[str, Any]]:
    """The bytes that a task left, by what they are: `arrays`, `checkpoint`, ..."""
    query = select(artifacts).where(artifacts.c.task_id == task_id).order_by(artifacts.c.kind, artifacts.c.created_at)
    return {row.kind: {"digest": row.digest, "size_bytes": row.size_bytes} for row in connection.execute(query)}


def bits_of(connection: Connection, task_ids: Sequence[str], name: str) -> dict[str, BitArray]:
    """One kind of outcome bits of these tasks, as bool arrays in sample order."""
    query = select(outcome_bits).where(outcome_bits.c.task_id.in_(listed(task_ids)), outcome_bits.c.name == name)
    return {row.task_id: unpack(row.n, row.packed) for row in connection.execute(query)}
