"""Flags of results, renewed whenever a result is filed, retracted or restored, so that questions only read them."""

from collections.abc import Collection

from sqlalchemy import Connection, bindparam, func, select, update

from service.model.dotted import flat
from service.model.flags import TRAINED_AGAIN, Flag, NetworkInCell, compared, flags_of_cells
from service.store import network_results
from service.store.listed import listed, numbered
from service.store.result_tables import cells, results
from service.store.tables import job_tasks, trainings

AT_ONCE = 200  # networks that are looked at together


def flags_of(connection: Connection, place: NetworkInCell) -> list[Flag]:
    """The flags that a network's other results raise against its results in a cell, whose repeats are averaged.

    Retracted results raise no flags. A cell in which all results of the network are retracted has none.
    """
    return _flags(connection, {place.weights_sha256}, {place.cell_id}).get(place, [])


def trained_again(connection: Connection, job_id: str) -> list[Flag]:
    """The networks of this result, its own and a transfer's source, whose weights were lost and came back as others."""
    columns = (trainings.c.task_id, trainings.c.checkpoint_digest, trainings.c.trained_again_as)
    query = select(*columns).join(job_tasks, job_tasks.c.task_id == trainings.c.task_id)
    rows = connection.execute(query.where(job_tasks.c.job_id == job_id, trainings.c.trained_again_as.is_not(None)))
    return [
        {"flag": TRAINED_AGAIN, "task_id": task_id, "weights_sha256": weights, "trained_again_as": others}
        for task_id, weights, others in rows
    ]


def renew(connection: Connection, job_ids: Collection[str]) -> None:
    """Update the flags of all results of these jobs' networks in the families of these jobs' cells."""
    query = select(results.c.weights_sha256, results.c.cell_id).where(results.c.job_id.in_(listed(job_ids))).distinct()
    places = [NetworkInCell(*row) for row in connection.execute(query) if row.weights_sha256 is not None]
    several = _of_several_strengths(connection, {place.cell_id for place in places})
    places = sorted(place for place in places if place.cell_id in several)
    for start in range(0, len(places), AT_ONCE):
        batch = places[start : start + AT_ONCE]
        _renew(connection, {place.weights_sha256 for place in batch}, {place.cell_id for place in batch})


def _renew(connection: Connection, weights: Collection[str | None], cell_ids: Collection[int]) -> None:
    flagged = _flags(connection, weights, cell_ids).keys()
    alike = select(cells.c.id).where(
        cells.c.family.in_(select(cells.c.family).where(cells.c.id.in_(numbered(cell_ids))))
    )
    stored = (
        select(results.c.weights_sha256, results.c.cell_id, results.c.not_monotone)
        .where(results.c.weights_sha256.in_(listed(filter(None, weights))), results.c.cell_id.in_(alike))
        .distinct()
    )
    wrong = [
        {"network": row.weights_sha256, "cell": row.cell_id, "flag": not row.not_monotone}
        for row in connection.execute(stored)
        if row.not_monotone != (NetworkInCell(row.weights_sha256, row.cell_id) in flagged)
    ]
    if wrong:
        here = (results.c.weights_sha256 == bindparam("network")) & (results.c.cell_id == bindparam("cell"))
        connection.execute(update(results).where(here).values(not_monotone=bindparam("flag")), wrong)


def _flags(
    connection: Connection, weights: Collection[str | None], cell_ids: Collection[int]
) -> dict[NetworkInCell, list[Flag]]:
    means = network_results.means(connection, weights, cell_ids)
    query = select(cells.c.id, cells.c.spec).where(cells.c.id.in_(numbered({mean.cell_id for mean in means})))
    specs = {cell_id: dict(flat(compared(spec))) for cell_id, spec in connection.execute(query)} if means else {}
    return flags_of_cells(means, specs)


def _of_several_strengths(connection: Connection, cell_ids: Collection[int]) -> set[int]:
    """The cells among these whose family has other cells: results in the rest have nothing to be compared with."""
    families = select(cells.c.family).where(cells.c.id.in_(numbered(cell_ids)))
    shared = select(cells.c.family).where(cells.c.family.in_(families)).group_by(cells.c.family)
    shared = shared.having(func.count() > 1)
    query = select(cells.c.id).where(cells.c.id.in_(numbered(cell_ids)), cells.c.family.in_(shared))
    return set(connection.scalars(query))
