"""Does a measure rank networks as their robustness does? Asked of the whole history.

Definition: science/README.md, "Further measures".
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from service.errors import InvalidQuery
from service.model.correlation import MINIMUM, correlate, tau
from service.model.observations import Observations
from service.model.query import Comparison, Node, Value, fields_of
from service.model.threat_model import of_adversaries, threat_model
from service.model.verdict import VERSION
from service.results.aggregates import is_judged, keys_of
from service.store import Connection, Database, Row
from service.store import results as store
from service.store.fields import RESULTS, Field
from service.store.points import points

MAX_POINTS = 200_000
MAX_PAIRS = 10_000_000  # of networks that are compared, each 2,000 times: seconds
LEAST_PAIRS = 10_000  # what a small group costs, in time of pairs
CONFOUNDED = "confounded by design: points of one network at several scales share the true robust accuracy"
TWO_SCALINGS = "results whose bias was scaled and results whose bias was left are other networks: filter scale_bias"
ASKED = ("measure", "target")
SAME = ("dataset", "attack", "samples", "order")
TRUSTED = (("verdict", "trusted"), ("verdict_version", str(VERSION)))


def correlations(
    database: Database, nodes: Sequence[Node], measure: str, *, target: str = "robust_accuracy",
    by: Sequence[str] = (), trusted: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Kendall's tau-b of `measure` with `target`, for each data set, attack, samples, their order, versions of the
    tasks and `by`; where a number is one of a further measure, for each of its parameters and versions too, and for
    each version of the verdict where it chose the results or counted a number.

    One point per trained network at s = 1, the mean of its repeats, and only those that today's rule trusts unless told
    otherwise; only of attacks in a ball. The same over all scales stands apart, as what it is; none where the bias was
    scaled with some of them only. Raises `InvalidQuery`.
    """
    believed = [Comparison(name, "=", (Value(value),)) for name, value in TRUSTED] if trusted else []
    asked = [*nodes, *of_adversaries(), *believed]
    with database.read() as connection:
        keys = keys_of(connection, by)
        numbers = [_number(connection, name, of) for name, of in zip(ASKED, (measure, target), strict=True)]
        judged = is_judged([*fields_of(asked), *by, measure, target])
        rows = points(connection, asked, dict(zip(ASKED, numbers, strict=True)), list(keys.values()), MAX_POINTS + 1)
        if len(rows) > MAX_POINTS:
            raise InvalidQuery("filter", f"these are more than {MAX_POINTS:,} points: filter")
        specs = store.cell_specs(connection, {row.cell_id for row in rows})
    groups: dict[str, list[Row[Any]]] = defaultdict(list)
    for row in rows:
        spec = specs[row.cell_id]
        versions = {"version": spec["versions"]["attack"], "measure_version": spec["versions"]["measure"]}
        measures = {"measure_spec": _spec(row.measure_spec), "target_spec": _spec(row.target_spec)}
        same = {**{name: spec[name] for name in SAME}, "threat_model": threat_model(spec["attack"]).ball}
        same |= versions | measures | ({"verdict_version": row.judged_by} if judged else {})
        groups[json.dumps([same, list(row[len(row) - len(keys) :])], sort_keys=True)].append(row)
    networks = [len({row.network for row in of_group}) for of_group in groups.values()]
    if sum(max(count**2, LEAST_PAIRS) for count in networks if count >= MINIMUM) > MAX_PAIRS:
        sentence = f"{sum(networks):,} networks in {len(groups):,} groups are too many to resample"
        raise InvalidQuery("filter", f"{sentence}: filter, or group otherwise")
    return [_group(json.loads(key), keys, of_group, specs) for key, of_group in sorted(groups.items())]


def _group(
    key: list[Any], keys: Mapping[str, Field], rows: Sequence[Row[Any]], specs: Mapping[int, dict[str, Any]]
) -> dict[str, Any]:
    same, values = key
    observed = Observations(len(ASKED))
    scales = [specs[row.cell_id]["scale"] for row in rows]
    biases = [scale == 1 or specs[row.cell_id]["scale_bias"] for scale, row in zip(scales, rows, strict=True)]
    places = list(zip(scales, [row.network for row in rows], biases, strict=True))
    architecture = {row.network: specs[row.cell_id]["architecture"] for row in rows}
    columns = ((row.measure_task, row.measure, row.target_task, row.target) for row in rows)
    observed.add(places, [row.network for row in rows], [row.attack_seed for row in rows], *zip(*columns, strict=True))
    measured, targets = (observed.values(i, "network") for i in range(len(ASKED)))
    every = sorted(measured)  # equal points in an equal order are resampled alike
    x, y = (np.array([of[place][0] for place in every], np.float64) for of in (measured, targets))
    at_one = np.array([scale == 1 for scale, *_ in every], bool)
    networks = [network for scale, network, _ in every if scale == 1]
    found = correlate(x[at_one], y[at_one], [architecture[network] for network in networks], networks)
    mixed = len({bias for scale, bias in zip(scales, biases, strict=True) if scale != 1}) > 1
    over_scales = {"n": len(every), "tau": None if mixed else tau(x, y), "note": TWO_SCALINGS if mixed else CONFOUNDED}
    counted = {"results": sum(scale == 1 for scale in scales), "over_scales": {**over_scales, "results": len(rows)}}
    return {**same, **dict(zip(keys, values, strict=True)), **asdict(found), **counted}


def _spec(measure: Any) -> dict[str, Any] | None:
    return None if measure is None else {**measure["measure"], "version": measure["version"]}


def _number(connection: Connection, parameter: str, name: str) -> Field:
    found = RESULTS.find(connection, name, parameter)
    if found.kind not in ("number", "integer"):
        raise InvalidQuery(parameter, f"{name} is a {found.kind}; ranks are of numbers")
    return found
