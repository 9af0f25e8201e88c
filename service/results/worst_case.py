"""The worst case of a network in a threat model: the images that it still gets right under all of its stored attacks.

Definition: science/README.md, "Controls".
"""

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from operator import itemgetter

from service.errors import InvalidQuery
from service.model.json import JsonObject
from service.model.query import Node
from service.model.results import AttackBits, CellSpec
from service.model.threat_model import of_adversaries, threat_model
from service.model.verdict import wilson
from service.specs.attacks import PRESETS
from service.specs.versions import version_of_attack
from service.store import Connection, network_results
from service.store import results as store
from service.store.database import Database

NO_EVIDENCE = ("outside_ball", "non_finite", "eps_zero", "train_mode", "random_forward")
"""Reasons of verdicts with which a broken image proves nothing: the network may be right everywhere in the ball. A
blind or weak attack is no such reason: it breaks too few images, and other attacks make up for that."""
SUPERSEDED = "superseded"
MAX_SCOPES = 10_000  # in one answer


@dataclass(frozen=True)
class Scope:
    """A network, a ball and images over which a worst case is taken. `scale` is 1 if the bias is scaled too: then the
    predictions are equal at every s, and an image that is broken at one s is broken at all of them."""

    network: str
    threat_model: str
    dataset: str
    samples: int
    order: str | None
    scale: float


@dataclass
class Attack:
    """The results of one attack taken together: `robust` has a bit for each of the `n` images that all left right."""

    spec: JsonObject
    version: int
    n: int
    robust: int
    results: int = 0
    scales: set[float] = field(default_factory=set)

    @property
    def robust_accuracy(self) -> float:
        return self.robust.bit_count() / self.n

    def as_json(self) -> JsonObject:
        return {
            "attack": self.spec,
            "preset": preset_of(self.spec),
            "version": self.version,
            "results": self.results,
            "scales": sorted(self.scales),
            "robust_accuracy": self.robust_accuracy,
        }


@dataclass
class WorstCase:
    """A worst case over `n` images. `left_out` counts the results that prove nothing, by reason; `flags` are those of
    the other results."""

    n: int
    attacks: dict[str, Attack] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    flags: set[str] = field(default_factory=set)

    @property
    def robust(self) -> int:
        """The images that withstand all attacks, as bits."""
        left = -1
        for attack in self.attacks.values():
            left &= attack.robust
        return left

    @property
    def robust_accuracy(self) -> float:
        return self.robust.bit_count() / self.n

    def as_json(self) -> JsonObject:
        """With the Wilson interval over the images, and every attack by name, the strongest first."""
        low, high = wilson(self.robust.bit_count(), self.n)
        strongest = sorted(self.attacks.values(), key=lambda attack: attack.robust.bit_count())
        return {
            "robust_accuracy": self.robust_accuracy,
            "ci95_low": low,
            "ci95_high": high,
            "n": self.n,
            "attacks": [attack.as_json() for attack in strongest],
            "results": sum(attack.results for attack in strongest),
            "left_out": dict(self.left_out),
            "flags": sorted(self.flags),
        }


def scope_of(network: str | None, cell: CellSpec) -> Scope | None:
    """The scope of a result's worst case; None without a ball, or if the network's weights are unknown."""
    ball = threat_model(cell["attack"]).ball
    if network is None or ball is None:
        return None
    scale = 1.0 if cell["scale_bias"] else cell["scale"]
    return Scope(network, ball, cell["dataset"], cell["samples"], cell.get("order"), scale)


def is_current(cell: CellSpec) -> bool:
    """Whether this version of the attack computed the cell. Results of different versions are never mixed."""
    return bool(cell["versions"]["attack"] == version_of_attack(cell["attack"]))


def why_left_out(verdict_reasons: Iterable[str] | None, cell: CellSpec) -> str | None:
    """Why a result proves nothing in a worst case; None if it counts."""
    if not is_current(cell):
        return SUPERSEDED
    return next((reason for reason in verdict_reasons or () if reason in NO_EVIDENCE), None)


def worst_cases(connection: Connection, scopes: Collection[Scope]) -> Iterator[tuple[Scope, WorstCase]]:
    """The worst case of each scope, some networks at a time. A scope without evidence from this version has none."""
    wanted = set(scopes)
    specs: dict[int, CellSpec] = {}
    for attacks in network_results.attacks_in_a_ball(connection, {scope.network for scope in wanted}):
        specs |= store.cell_specs(connection, {attack.cell_id for attack in attacks} - specs.keys())
        cases: dict[Scope, WorstCase] = {}
        for attack in attacks:
            scope = scope_of(attack.weights_sha256, specs[attack.cell_id])
            if scope in wanted:
                _add(cases.setdefault(scope, WorstCase(attack.n)), attack, specs[attack.cell_id])
        yield from ((scope, worst) for scope, worst in cases.items() if worst.attacks)


def of_networks(database: Database, nodes: Sequence[Node]) -> list[JsonObject]:
    """The worst case of each network that `nodes` choose by their results, in each threat model of those results.

    `nodes` choose networks only: a worst case is always over all stored attacks of the threat model. Raises
    `InvalidQuery`, also for more than `MAX_SCOPES`.
    """
    scopes: dict[Scope, CellSpec] = {}
    with database.read() as connection:
        networks = network_results.by_network(connection, store.selected(connection, [*nodes, *of_adversaries()]))
        specs = store.cell_specs(connection, {network.cell_id for network in networks})
        for network in networks:
            scope = scope_of(network.weights_sha256, specs[network.cell_id])
            if scope is not None:
                scopes.setdefault(scope, specs[network.cell_id])
        if len(scopes) > MAX_SCOPES:
            raise InvalidQuery("filter", f"that chooses {len(scopes):,} worst cases, at most {MAX_SCOPES:,}: filter")
        items = [_item(scope, scopes[scope], worst) for scope, worst in worst_cases(connection, scopes.keys())]
    key = itemgetter("dataset", "threat_model", "samples", "robust_accuracy_worst_case", "weights_sha256", "scale")
    return sorted(items, key=key)


def worst_case_of(connection: Connection, network: str | None, cell: CellSpec) -> JsonObject | None:
    """The worst case of a result's network in its threat model, as JSON; None if there is none."""
    scope = scope_of(network, cell)
    if scope is None:
        return None
    cases = dict(worst_cases(connection, [scope]))
    return {"threat_model": scope.threat_model, **cases[scope].as_json()} if scope in cases else None


def preset_of(attack: Mapping[str, object]) -> str | None:
    """The name of the preset that an attack's spec is equal to."""
    return next((name for name, preset in presets().items() if attack == preset), None)


@cache
def presets() -> dict[str, JsonObject]:
    """The spec of each preset, as it is stored."""
    return {name: attack.model_dump(mode="json") for name, attack in PRESETS.items()}


def _item(scope: Scope, cell: CellSpec, worst: WorstCase) -> JsonObject:
    shown = worst.as_json()
    return {
        "weights_sha256": scope.network,
        "architecture": cell["architecture"],
        "recipe": cell["recipe"],
        "train_version": cell["versions"]["train"],
        "dataset": scope.dataset,
        "threat_model": scope.threat_model,
        "samples": scope.samples,
        **({} if scope.order is None else {"order": scope.order}),
        "scale": scope.scale,
        "robust_accuracy_worst_case": shown.pop("robust_accuracy"),
        "attack_count": len(worst.attacks),
        **shown,
    }


def _add(worst: WorstCase, result: AttackBits, cell: CellSpec) -> None:
    if unfit := why_left_out(result.verdict_reasons, cell):
        worst.left_out[unfit] += 1
        return
    worst.flags.update(result.flags)
    bits = int.from_bytes(result.robust)
    name = json.dumps(cell["attack"], sort_keys=True)
    attack = worst.attacks.get(name)
    if attack is None:
        attack = worst.attacks[name] = Attack(cell["attack"], cell["versions"]["attack"], result.n, bits)
    attack.robust &= bits
    attack.results += 1
    attack.scales.add(cell["scale"])
