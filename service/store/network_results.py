"""Results by network. A network is known by the SHA-256 of the weights that the attack of a result used."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, func, select

from service.model.flags import FLAGS, Mean, names_of
from service.model.results import AttackBits, NetworkCell
from service.store.fields import Column
from service.store.listed import listed, numbered
from service.store.result_tables import cells, results
from service.store.tables import jobs, outcome_bits

AT_ONCE = 200  # networks whose bits are in memory together
# Any in rows and queries: SQLAlchemy cannot type a row of expressions.


def means(connection: Connection, networks: Collection[str | None], cell_ids: Collection[int]) -> list[Mean]:
    """The means of these networks in these cells and in the cells of the same families, in the order of first results.

    Repeats count once.
    """
    families = select(cells.c.family).where(cells.c.id.in_(numbered(cell_ids)))
    group = (results.c.weights_sha256, results.c.cell_id, cells.c.family)
    query = (
        select(*group, func.avg(results.c.robust_accuracy), func.count(), func.min(results.c.job_id))
        .join(cells, cells.c.id == results.c.cell_id)
        .where(results.c.weights_sha256.in_(listed(sorted(filter(None, networks)))), cells.c.family.in_(families))
        .where(results.c.retracted_at.is_(None), ~results.c.repeated)
        .group_by(*group)
        .order_by(func.min(results.c.sequence))
    )
    return [Mean(*row) for row in connection.execute(query)]


def by_network(connection: Connection, where: Sequence[Column]) -> list[NetworkCell]:
    """The results that `where` chooses, by network and cell."""
    group = (results.c.weights_sha256, results.c.cell_id)
    computations = (
        select(
            *group,
            func.count().label("results"),
            func.max(results.c.robust_accuracy).label("robust_accuracy"),
            func.max(results.c.clean_accuracy).label("clean_accuracy"),
            *(func.count(func.nullif(results.c[flag], False)).label(flag) for flag in FLAGS),
        )
        .where(*where, results.c.weights_sha256.is_not(None), results.c.robust_accuracy.is_not(None))
        .group_by(*group, results.c.attack_task_id)
        .subquery()
    )
    computed = computations.c
    query: Select[Any] = select(
        computed.weights_sha256,
        computed.cell_id,
        func.sum(computed.results).label("results"),
        func.avg(computed.robust_accuracy).label("robust_accuracy"),
        func.avg(computed.clean_accuracy).label("clean_accuracy"),
        *(func.sum(computed[flag]).label(flag) for flag in FLAGS),
    )
    rows = connection.execute(query.group_by(computed.weights_sha256, computed.cell_id))
    return [_network_cell(row) for row in rows]


def _network_cell(row: Row[Any]) -> NetworkCell:
    weights, cell_id, count, robust_accuracy, clean_accuracy, *flagged = tuple(row)
    return NetworkCell(weights, cell_id, count, robust_accuracy, clean_accuracy, names_of(*(n > 0 for n in flagged)))


def attacks_in_a_ball(connection: Connection, networks: Collection[str]) -> Iterator[list[AttackBits]]:
    """All unretracted attacks in a ball on these networks, each computation once, some networks at a time."""
    ordered = sorted(networks)
    of_result = [results.c[name] for name in ("job_id", "weights_sha256", "cell_id", "robust_accuracy", *FLAGS)]
    for start in range(0, len(ordered), AT_ONCE):
        query: Select[Any] = (
            select(*of_result, jobs.c.verdict_reasons, outcome_bits.c.n, outcome_bits.c.packed)
            .join(cells, cells.c.id == results.c.cell_id)
            .join(jobs, jobs.c.id == results.c.job_id)
            .join(
                outcome_bits,
                (outcome_bits.c.task_id == results.c.attack_task_id) & (outcome_bits.c.name == "robust"),
            )
            .where(results.c.weights_sha256.in_(listed(ordered[start : start + AT_ONCE])))
            .where(results.c.retracted_at.is_(None), ~results.c.repeated, cells.c.threat_model.is_not(None))
            .order_by(results.c.sequence)
        )
        yield [_attack_bits(row) for row in connection.execute(query)]


def _attack_bits(row: Row[Any]) -> AttackBits:
    job_id, weights, cell_id, robust_accuracy, *flagged, reasons, n, packed = tuple(row)
    return AttackBits(job_id, weights, cell_id, robust_accuracy, names_of(*flagged), reasons, n, packed)
