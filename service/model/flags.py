"""Flags: findings from comparing results across the history. They are shown with a result and never change its verdict.

Definition: science/README.md, "Controls".
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from service.model.json import JsonMapping, JsonObject

NOT_MONOTONE = "not_monotone"
TRAINED_AGAIN = "trained_again"
MIXED_WEIGHTS = "mixed_weights"
FLAGS = (NOT_MONOTONE, TRAINED_AGAIN, MIXED_WEIGHTS)  # columns of `results`
STRENGTH = ("eps", "steps", "restarts")  # of an attack: a higher value breaks no fewer examples
OF_TRAINING = ("recipe", "versions")  # of a cell: equal weights are compared however they were trained
Flag = JsonObject
Specs = Mapping[int, JsonMapping]  # the specs of cells by id, with dotted names


class NetworkInCell(NamedTuple):
    """A network, by the SHA-256 of its weights, and a cell."""

    weights_sha256: str | None
    cell_id: int


class Mean(NamedTuple):
    """The mean robust accuracy of the `results` that a network has in a cell; `job_id` is the job of the first."""

    weights_sha256: str
    cell_id: int
    family: str
    robust_accuracy: float | None
    results: int
    job_id: str


def flags_of_cells(means: Sequence[Mean], specs: Specs) -> dict[NetworkInCell, list[Flag]]:
    """The flags of each network in a cell that has any."""
    together: dict[tuple[str, str], list[Mean]] = defaultdict(list)
    for mean in means:
        together[mean.weights_sha256, mean.family].append(mean)
    return {
        NetworkInCell(mean.weights_sha256, mean.cell_id): flags
        for alike in together.values()
        if len(alike) > 1
        for mean in alike
        if (flags := not_monotone(mean, alike, specs))
    }


def not_monotone(mean: Mean, others: Sequence[Mean], specs: Specs) -> list[Flag]:
    """A flag for each of `others` that contradicts `mean`: the stronger of the two attacks left more examples robust.

    The two differ in one of eps, steps and restarts alone. Differences up to max(0.02, 3/n) are ignored. `specs` has
    the specs of the cells of `mean` and `others`.
    """
    flags, own = [], specs[mean.cell_id]
    least = max(0.02, 3 / own["samples"]) + 1e-9
    for other in others:
        if mean.robust_accuracy is None or other.robust_accuracy is None:
            continue
        rise = other.robust_accuracy - mean.robust_accuracy
        if abs(rise) <= least:
            continue
        other_spec = specs[other.cell_id]
        field = _only_strength(own, other_spec)
        if field is not None and (rise > 0) == (own[field] < other_spec[field]):
            flags.append(
                {
                    "flag": NOT_MONOTONE,
                    "field": field,
                    "job_id": other.job_id,
                    "value": other_spec[field],
                    "robust_accuracy": other.robust_accuracy,
                    "results": other.results,
                }
            )
    return flags


def names_of(*raised: bool) -> list[str]:
    """The names of the flags that are raised; `raised` has a value for each of `FLAGS`."""
    return [name for name, is_raised in zip(FLAGS, raised, strict=True) if is_raised]


def compared(spec: JsonMapping) -> JsonObject:
    """The fields of a cell in which two attacks must agree, apart from their strength, to be compared."""
    kept = {name: value for name, value in spec.items() if name not in OF_TRAINING}
    return {**kept, "version": spec["versions"]["attack"]}


def apart_from_strength(spec: JsonMapping) -> JsonObject:
    """The fields that are equal in all cells whose attacks differ in strength only."""
    attack = {name: value for name, value in spec["attack"].items() if name not in STRENGTH}
    if isinstance(inner := attack.get("attack"), Mapping):  # of a transfer
        attack["attack"] = {name: value for name, value in inner.items() if name not in STRENGTH}
    return {**compared(spec), "attack": attack}


def _only_strength(a: JsonMapping, b: JsonMapping) -> str | None:
    """The one field in which two attacks differ, if it is a field of `STRENGTH`; otherwise None."""
    apart = [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]
    return apart[0] if len(apart) == 1 and apart[0].rpartition(".")[2] in STRENGTH else None
