"""Results by the network that they are of: the SHA-256 of the weights that their attack used."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, func, select

from service.model.flags import FLAGS
from service.store.listed import listed, numbered
from service.store.result_tables import cells, results
from service.store.tables import jobs, outcome_bits

AT_ONCE = 200  # networks whose bits are in memory together


def means(connection: Connection, networks: Collection[str | None], cell_ids: Collection[int]) -> list[Row[Any]]:
    """What these networks have in these cells and in those of the same families, their repeats averaged.

    `weights_sha256, cell_id, family, robust_accuracy, results, job_id`, the job being their first; in the order of it.
    """
    families = select(cells.c.family).where(cells.c.id.in_(numbered(cell_ids)))
    first = func.min(results.c.sequence)
    query = (
        select(
            results.c.weights_sha256, results.c.cell_id, cells.c.family,
            func.avg(results.c.robust_accuracy).label("robust_accuracy"), func.count().label("results"),
            func.min(results.c.job_id).label("job_id"),
        )
        .join(cells, cells.c.id == results.c.cell_id)
        .where(results.c.weights_sha256.in_(listed(sorted(filter(None, networks)))), cells.c.family.in_(families))
        .where(results.c.retracted_at.is_(None), ~results.c.repeated)
        .group_by(results.c.weights_sha256, results.c.cell_id, cells.c.family)
        .order_by(first)
    )  # fmt: skip
    return list(connection.execute(query))


def asked(connection: Connection, where: Sequence[ColumnElement[Any]]) -> list[Row[Any]]:
    """The results that `where` chooses, a row per network and cell: `weights_sha256, cell_id, results`, and the means
    of `robust_accuracy` and `clean_accuracy` over distinct computations; so many of the results are flagged."""
    whose = (results.c.weights_sha256, results.c.cell_id)
    computed = (
        select(
            *whose, func.count().label("results"), func.max(results.c.robust_accuracy).label("robust_accuracy"),
            func.max(results.c.clean_accuracy).label("clean_accuracy"),
            *(func.count(func.nullif(results.c[flag], False)).label(flag) for flag in FLAGS),
        )
        .where(*where, results.c.weights_sha256.is_not(None), results.c.robust_accuracy.is_not(None))
        .group_by(*whose, results.c.attack_task_id)
        .subquery()
    )  # fmt: skip
    of = computed.c
    query: Select[Any] = select(
        of.weights_sha256, of.cell_id, func.sum(of.results).label("results"),
        func.avg(of.robust_accuracy).label("robust_accuracy"), func.avg(of.clean_accuracy).label("clean_accuracy"),
        *(func.sum(of[flag]).label(flag) for flag in FLAGS),
    )  # fmt: skip
    return list(connection.execute(query.group_by(of.weights_sha256, of.cell_id)))


def attacks_in_a_ball(connection: Connection, networks: Collection[str]) -> Iterator[Sequence[Row[Any]]]:
    """Every attack in a ball on these networks that is not retracted, each computation once, some networks at a time:
    `job_id, weights_sha256, cell_id, robust_accuracy, verdict_reasons`, its flags, and the `packed` bits of its `n`
    examples."""
    ordered = sorted(networks)
    named = ("job_id", "weights_sha256", "cell_id", "robust_accuracy", *FLAGS)
    of = [results.c[name] for name in named]
    for start in range(0, len(ordered), AT_ONCE):
        query: Select[Any] = (
            select(*of, jobs.c.verdict_reasons, outcome_bits.c.n, outcome_bits.c.packed)
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
        yield connection.execute(query).all()
