"""Findings across the history, shown wherever a result is: a stored verdict never changes by them (SCIENCE.md 8)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row

from service.dotted import flat
from service.store import networks
from service.store import results as store
from service.store.filing import STRENGTH

NOT_MONOTONE = "not_monotone"
Flag = dict[str, Any]


class Place(NamedTuple):
    """A network, by the SHA-256 of its weights, and a cell."""

    weights_sha256: str | None
    cell_id: int


def flags_of(connection: Connection, rows: Sequence[Any]) -> list[list[Flag]]:
    """What other results of the same networks say against each of these: `rows` have `weights_sha256` and `cell_id`.

    A network's repeats in one cell (attack seeds, replicates) are one number, their mean. Retracted results say
    nothing, and nothing is said against one that no repeat of it stands for.
    """
    means = networks.means(connection, {row.weights_sha256 for row in rows}, {row.cell_id for row in rows})
    specs = store.cell_specs(connection, {mean.cell_id for mean in means})
    known = {cell_id: dict(flat(_judged(spec))) for cell_id, spec in specs.items()}
    found = _found(means, known)
    return [found.get(Place(row.weights_sha256, row.cell_id), []) for row in rows]


def names_of(flags: Sequence[Flag]) -> list[str]:
    """The names of the flags, each once."""
    return list(dict.fromkeys(flag["flag"] for flag in flags))


def not_monotone(mine: Any, others: Sequence[Any], specs: Mapping[int, Mapping[str, Any]]) -> list[Flag]:
    """The results, equal but for eps, steps or restarts, where more of it left more examples robust.

    More than max(.02, 3/n), by either of the two; `specs` are the flat specs of the cells of `mine` and `others`.
    """
    found = []
    for other in others:
        field = _only_strength(specs[mine.cell_id], specs[other.cell_id])
        if field is None or None in (mine.robust_accuracy, other.robust_accuracy):
            continue
        weaker, stronger = specs[mine.cell_id][field], specs[other.cell_id][field]
        rise = other.robust_accuracy - mine.robust_accuracy
        rise = rise if weaker < stronger else -rise
        if rise > max(0.02, 3 / specs[mine.cell_id]["samples"]) + 1e-9:
            found.append(
                {
                    "flag": NOT_MONOTONE, "field": field, "job_id": other.job_id, "value": stronger,
                    "robust_accuracy": other.robust_accuracy, "results": other.results,
                }
            )  # fmt: skip
    return found


def _found(means: Sequence[Row[Any]], specs: Mapping[int, Mapping[str, Any]]) -> dict[Place, list[Flag]]:
    together: dict[tuple[str, str], list[Row[Any]]] = defaultdict(list)
    for mean in means:
        together[mean.weights_sha256, mean.family].append(mean)
    return {
        Place(mean.weights_sha256, mean.cell_id): flags
        for alike in together.values()
        if len(alike) > 1
        for mean in alike
        if (flags := not_monotone(mean, alike, specs))
    }


def _judged(spec: Mapping[str, Any]) -> dict[str, Any]:
    """What a cell's attack on a network is: its spec without what trained the network or was measured beside it."""
    kept = {name: value for name, value in spec.items() if name not in ("recipe", "versions")}
    return {**kept, "version": spec["versions"]["attack"]}


def _only_strength(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str | None:
    """The one field in which two attacks differ, where that is their strength."""
    apart = [name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name)]
    return apart[0] if len(apart) == 1 and apart[0].rpartition(".")[2] in STRENGTH else None
