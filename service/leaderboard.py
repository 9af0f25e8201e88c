"""Who is most robust: one board per data set and attack, a row per network and recipe, over its seeds."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from service.aggregates import Grouping, interval
from service.errors import InvalidQuery
from service.query import Comparison, Node, Value
from service.specs.attacks import PRESETS
from service.store import results as store
from service.store.database import Database
from service.store.fields import Field
from service.store.result_tables import cells, results

METRICS = {"robust_accuracy": ("mean", "ci95"), "clean_accuracy": ("mean",)}
TRUSTED = "trusted"
BESIDE = ("measure", "control")  # tasks whose versions change nothing of what is ranked


def leaderboard(
    database: Database, nodes: Sequence[Node], *, attack: str | None = None, scale: float | None = 1.0,
    trusted: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """The boards of what `nodes` choose, best first; of one attack preset and scale, and what is trusted, as asked.

    Raises `InvalidQuery`.
    """
    asked = [*nodes]
    if attack is not None and attack not in PRESETS:
        raise InvalidQuery("attack", f"unknown attack {attack!r}; known are: {', '.join(PRESETS)}")
    if scale is not None:
        asked.append(Comparison("scale", "=", (Value(repr(scale)),), parameter="scale"))
    if trusted:
        asked.append(Comparison("verdict", "=", (Value(TRUSTED),)))
    with database.read() as connection:
        keys = {"cell": Field("integer", results.c.cell_id, of_cell=cells.c.id)}
        grouping = Grouping(connection, store.selected(connection, asked), keys, METRICS)
        groups = grouping.groups()
        specs = store.cell_specs(connection, [cell_id for (cell_id,) in groups])
        groups = grouping.join(groups, _first_equal(specs))
        grouping.take_values(groups)
    boards: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for (cell_id,), group in groups.items():
        spec, robust = specs[cell_id], group.metrics["robust_accuracy"]
        if robust.mean is None or (attack is not None and spec["attack"] != _presets()[attack]):
            continue
        low, high = interval(robust.n, robust.mean, robust.std)
        boards[_board(spec)].append(
            {
                "architecture": spec["architecture"], "recipe": spec["recipe"], "scale": spec["scale"],
                "seeds": robust.n, "robust_accuracy": robust.mean, "ci95_low": low, "ci95_high": high,
                "best": robust.high, "clean_accuracy": group.metrics["clean_accuracy"].mean,
            }
        )  # fmt: skip
    return [_ranked(json.loads(board), rows) for board, rows in sorted(boards.items())]


def _first_equal(specs: Mapping[int, dict[str, Any]]) -> dict[int, int]:
    """For each cell the first that is equal but for what was measured and checked beside the attack."""
    same: dict[str, list[int]] = defaultdict(list)
    for cell_id in sorted(specs):
        versions = {kind: version for kind, version in specs[cell_id]["versions"].items() if kind not in BESIDE}
        same[json.dumps({**specs[cell_id], "versions": versions}, sort_keys=True)].append(cell_id)
    return {cell_id: ids[0] for ids in same.values() for cell_id in ids}


def _board(spec: dict[str, Any]) -> str:
    same = {name: spec[name] for name in ("dataset", "attack", "samples", "order", "scale_bias")}
    return json.dumps({**same, "version": spec["versions"]["attack"]}, sort_keys=True)


def _ranked(board: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    preset = next((name for name, attack in _presets().items() if attack == board["attack"]), None)
    best_first = sorted(rows, key=lambda row: (-row["robust_accuracy"], row["architecture"]))
    ranked = [{"rank": rank, **row} for rank, row in enumerate(best_first, 1)]
    return {**board, "preset": preset, "rows": ranked}


@cache
def _presets() -> dict[str, dict[str, Any]]:
    return {name: attack.model_dump(mode="json") for name, attack in PRESETS.items()}
