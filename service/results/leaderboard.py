"""Leaderboards: one board per threat model, data set and samples, a row per architecture and recipe.

A row counts networks (distinct weights), each by its worst case over every stored attack of the threat model. Further
attack seeds, replicates and scales of a network do not count as further networks.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev

from service.errors import InvalidQuery
from service.model.dotted import or_rather
from service.model.json import JsonObject
from service.model.observations import accuracy_interval, interval
from service.model.query import Comparison, Node, Value
from service.model.results import CellSpec, NetworkCell
from service.model.threat_model import of_adversaries, threat_model
from service.model.verdict import VERSION
from service.results.worst_case import Scope, WorstCase, is_current, preset_of, presets, scope_of, worst_cases
from service.specs.attacks import PRESETS
from service.specs.base import shorten
from service.store import network_results
from service.store import results as store
from service.store.database import Database

TRUSTED = (Comparison("verdict", "=", (Value("trusted"),)), Comparison("verdict_version", "=", (Value(str(VERSION)),)))


@dataclass
class Network:
    """One network of a board: the robust accuracies of its chosen results by attack, repeats averaged."""

    scope: Scope
    by_attack: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    clean: list[float] = field(default_factory=list)
    results: int = 0
    flags: set[str] = field(default_factory=set)
    worst: WorstCase | None = None

    def add(self, of_cell: NetworkCell, cell: CellSpec) -> None:
        self.by_attack[json.dumps(cell["attack"], sort_keys=True)].append(of_cell.robust_accuracy)
        self.clean += [] if of_cell.clean_accuracy is None else [of_cell.clean_accuracy]
        self.results += of_cell.results
        self.flags.update(of_cell.flags)

    @property
    def robust_accuracy(self) -> float:
        """The accuracy under the strongest single attack."""
        return min(map(fmean, self.by_attack.values()))


Networks = dict[str, Network]  # the networks of a row, by their weights


def leaderboard(
    database: Database,
    nodes: Sequence[Node],
    *,
    attack: str | None = None,
    scale: float | None = 1.0,
    trusted: bool = True,
) -> list[JsonObject]:
    """The boards of the networks that `nodes` choose by their results, best worst case first.

    `attack`, a preset, `scale` and `trusted` choose results too. They choose networks only: a network's worst case is
    always over all stored attacks of the threat model. Only adversaries in a ball rank, and only attacks of this
    version. Raises `InvalidQuery`.
    """
    if attack is not None and attack not in PRESETS:
        raise InvalidQuery("attack", f"unknown attack {shorten(attack)}{or_rather(attack[:100], tuple(PRESETS))}")
    conditions = [*nodes, *of_adversaries(), *(TRUSTED if trusted else ())]
    if scale is not None:
        conditions.append(Comparison("scale", "=", (Value(repr(scale)),), parameter="scale"))
    with database.read() as connection:
        rows = network_results.by_network(connection, store.selected(connection, conditions))
        specs = store.cell_specs(connection, {row.cell_id for row in rows})
        rows = [row for row in rows if _ranks(specs[row.cell_id], attack)]
        boards = _boards(rows, specs)
        every = [network for board in boards.values() for row in board.values() for network in row.values()]
        worst = dict(worst_cases(connection, {network.scope for network in every}))
    for network in every:
        network.worst = worst.get(network.scope)
    return [_board(json.loads(key), rows) for key, rows in sorted(boards.items())]


def _ranks(cell: CellSpec, attack: str | None) -> bool:
    return is_current(cell) and (attack is None or cell["attack"] == presets()[attack])


def _boards(rows: Sequence[NetworkCell], specs: Mapping[int, CellSpec]) -> dict[str, dict[str, Networks]]:
    """The networks by board and row, whose keys are JSON of what they have in common."""
    boards: dict[str, dict[str, Networks]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        cell, scope = specs[row.cell_id], scope_of(row.weights_sha256, specs[row.cell_id])
        if scope is None:
            continue
        threat = threat_model(cell["attack"])
        board = {
            "dataset": scope.dataset,
            "threat_model": scope.threat_model,
            "norm": threat.norm,
            "eps": threat.eps,
            "samples": scope.samples,
            "order": scope.order,
            "scale_bias": cell["scale_bias"],
        }
        same = {
            **{name: cell[name] for name in ("architecture", "recipe", "scale")},
            "version": cell["versions"]["train"],
        }
        of_row = boards[json.dumps(board)][json.dumps(same, sort_keys=True)]
        of_row.setdefault(scope.network, Network(scope)).add(row, cell)
    return boards


def _board(board: JsonObject, rows: Mapping[str, Networks]) -> JsonObject:
    ranked = [
        row for same, networks in rows.items() if (row := _row(json.loads(same), list(networks.values()))) is not None
    ]
    best_first = sorted(ranked, key=_best_first)
    attacks = {name for networks in rows.values() for network in networks.values() for name in network.by_attack}
    spec = json.loads(attacks.pop()) if len(attacks) == 1 else None
    versions = [attack["version"] for row in ranked for attack in row["attacks"]]
    order = board.pop("order")
    return {
        **board,
        **({} if order is None else {"order": order}),
        "attack": spec,
        "preset": None if spec is None else preset_of(spec),
        "version": max(versions, default=0),
        "rows": [{"rank": rank, **row} for rank, row in enumerate(best_first, 1)],
    }


def _best_first(row: JsonObject) -> tuple[float, str, str, float, int]:
    """Order by the worst case, and equal rows by name, so that a board always has the same order."""
    recipe = json.dumps(row["recipe"], sort_keys=True)
    worst_case, version = row["robust_accuracy_worst_case"], row["train_version"] or 0
    return -worst_case, row["architecture"], recipe, row["scale"], version


def _row(same: JsonObject, networks: Sequence[Network]) -> JsonObject | None:
    """A row of networks that were trained alike; None if no result proves anything about any of them."""
    attacked = [(network, network.worst) for network in networks if network.worst is not None]
    if not attacked:
        return None
    accuracies = [worst.robust_accuracy for _, worst in attacked]
    low, high = spread(accuracies, attacked[0][1].n)
    clean = [fmean(network.clean) for network, _ in attacked if network.clean]
    return {
        "architecture": same["architecture"],
        "recipe": same["recipe"],
        "train_version": same["version"],
        "scale": same["scale"],
        "networks": len(attacked),
        "seeds": len(attacked),
        "results": sum(network.results for network, _ in attacked),
        "robust_accuracy_worst_case": fmean(accuracies),
        "ci95_low": low,
        "ci95_high": high,
        "ci95_of": "images" if min(accuracies) == max(accuracies) else "networks",
        "best": max(accuracies),
        "robust_accuracy": fmean(network.robust_accuracy for network, _ in attacked),
        "clean_accuracy": fmean(clean) if clean else None,
        "attacks": _attacks([worst for _, worst in attacked]),
        "left_out": dict(sum((worst.left_out for _, worst in attacked), start=Counter[str]())),
        "flags": sorted(set().union(*(network.flags | worst.flags for network, worst in attacked))),
    }


def _attacks(worst: Sequence[WorstCase]) -> list[JsonObject]:
    """The attacks that these worst cases are over, with how many of the networks each of them met."""
    counted: dict[str, JsonObject] = {}
    for worst_case in worst:
        for name, attack in worst_case.attacks.items():
            same = {"attack": attack.spec, "preset": preset_of(attack.spec), "version": attack.version}
            entry = counted.setdefault(name, {**same, "networks": 0, "results": 0})
            entry["networks"] += 1
            entry["results"] += attack.results
    return [counted[name] for name in sorted(counted, key=lambda name: (-counted[name]["networks"], name))]


def spread(accuracies: Sequence[float], n: int) -> tuple[float | None, float | None]:
    """The 95 % interval of the mean of networks' accuracies of the same `n` images, within [0, 1].

    It is Student's over the networks. If all are equal, or there is only one, it is Wilson's over the images: the same
    images in three networks are not three times as many.
    """
    if min(accuracies) == max(accuracies):
        return accuracy_interval(accuracies[0], n)
    return interval(len(accuracies), fmean(accuracies), stdev(accuracies), within=(0.0, 1.0))
