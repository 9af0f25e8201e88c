"""Findings across the history, shown when a result is read: a stored verdict never changes by them (SCIENCE.md 8)."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Row

from service.dotted import flat
from service.store import results as store

MORE_BREAKS_MORE = ("eps", "steps", "restarts")
MAX_COMPARED = 1000  # results of one checkpoint, the earliest ones


def flags_of(connection: Connection, row: Row[Any]) -> list[dict[str, Any]]:
    """What other results of the same checkpoint say against this one; `row` is a result as `store.one` gives it."""
    others = store.of_checkpoint(connection, row.train_task_id, MAX_COMPARED)
    cells = store.cell_specs(connection, {row.cell_id, *(other.cell_id for other in others)})
    specs = {cell_id: dict(flat(spec)) for cell_id, spec in cells.items()}
    return not_monotone(row, [other for other in others if other.attack_seed == row.spec["attack_seed"]], specs)


def not_monotone(row: Any, others: Sequence[Any], specs: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The results, equal but for eps, steps or restarts, where more of it left more examples robust.

    More than max(.02, 3/n), by either of the two; `specs` are the flat specs of the rows' cells.
    """
    mine, found = specs[row.cell_id], []
    for other in others:
        theirs = specs[other.cell_id]
        apart = [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]
        if len(apart) != 1 or apart[0].rpartition(".")[2] not in MORE_BREAKS_MORE:
            continue
        if None in (row.robust_accuracy, other.robust_accuracy):
            continue
        rise = other.robust_accuracy - row.robust_accuracy
        if theirs[apart[0]] < mine[apart[0]]:
            rise = -rise
        if rise > max(0.02, 3 / mine["samples"]) + 1e-9:
            found.append(
                {
                    "flag": "not_monotone",
                    "field": apart[0],
                    "job_id": other.job_id,
                    "value": theirs[apart[0]],
                    "robust_accuracy": other.robust_accuracy,
                }
            )
    return found
