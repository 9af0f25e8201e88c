"""Does a measure rank networks as their robustness does? Asked of the whole history.

Definition: science/README.md, "Further measures".
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from service.errors import InvalidQuery
from service.model.correlation import MINIMUM, correlate, tau
from service.model.json import JsonObject
from service.model.observations import Observations
from service.model.query import Comparison, Node, Value, fields_of
from service.model.results import CellSpec, Point
from service.model.threat_model import of_adversaries, threat_model
from service.model.verdict import VERSION
from service.results.aggregates import is_judged, keys_of
from service.store import Connection, Database
from service.store import results as store
from service.store.fields import Field
from service.store.points import points
from service.store.result_fields import RESULTS

MAX_POINTS = 200_000
MAX_PAIRS = 10_000_000  # of networks in one answer: each pair is compared 2,000 times, which takes seconds
LEAST_PAIRS = 10_000  # a small group takes as long as this many pairs
CONFOUNDED = "confounded by design: points of one network at several scales share the true robust accuracy"
TWO_SCALINGS = "results whose bias was scaled and results whose bias was left are other networks: filter scale_bias"
SAME = ("dataset", "attack", "samples", "order")
TRUSTED = (("verdict", "trusted"), ("verdict_version", str(VERSION)))


def correlations(
    database: Database,
    nodes: Sequence[Node],
    measure: str,
    *,
    target: str = "robust_accuracy",
    by: Sequence[str] = (),
    trusted: bool = True,
) -> list[JsonObject]:
    """Kendall's tau-b of `measure` with `target`, for each data set, attack, samples, their order, versions of the
    tasks and `by`; also for each set of parameters and version of a further measure if a number is one of its numbers,
    and for each version of the verdict if it chose the results or counted a number.

    Each trained network gives one point at s = 1, the mean of its repeats, from attacks in a ball only. If `trusted`,
    only results that today's rule trusts count. The tau over all scales is a separate number, marked as confounded; it
    is null if the bias was scaled in some of the results only. Raises `InvalidQuery`.
    """
    believed = [Comparison(name, "=", (Value(value),)) for name, value in TRUSTED] if trusted else []
    conditions = [*nodes, *of_adversaries(), *believed]
    with database.read() as connection:
        keys = keys_of(connection, by)
        numbers = _number(connection, "measure", measure), _number(connection, "target", target)
        chosen = points(connection, conditions, *numbers, list(keys.values()), MAX_POINTS + 1)
        if len(chosen) > MAX_POINTS:
            raise InvalidQuery("filter", f"these are more than {MAX_POINTS:,} points: filter")
        specs = store.cell_specs(connection, {point.cell_id for point in chosen})
    judged = is_judged([*fields_of(conditions), *by, measure, target])
    groups: dict[str, list[Point]] = defaultdict(list)
    for point in chosen:
        same = _same(point, specs[point.cell_id], judged)
        groups[json.dumps([same, list(point.keys)], sort_keys=True)].append(point)
    networks = [len({point.network for point in of_group}) for of_group in groups.values()]
    if sum(max(count**2, LEAST_PAIRS) for count in networks if count >= MINIMUM) > MAX_PAIRS:
        sentence = f"{sum(networks):,} networks in {len(groups):,} groups are too many to resample"
        raise InvalidQuery("filter", f"{sentence}: filter, or group otherwise")
    return [_group(json.loads(key), keys, of_group, specs) for key, of_group in sorted(groups.items())]


def _same(point: Point, cell: CellSpec, judged: bool) -> JsonObject:
    """The values that points must have in common to be ranked together."""
    return {
        **{name: cell[name] for name in SAME},
        "threat_model": threat_model(cell["attack"]).ball,
        "version": cell["versions"]["attack"],
        "measure_version": cell["versions"]["measure"],
        "measure_spec": _spec(point.measure_spec),
        "target_spec": _spec(point.target_spec),
        **({"verdict_version": point.verdict_version} if judged else {}),
    }


def _group(
    key: tuple[JsonObject, list[object]],
    keys: Iterable[str],
    of_group: Sequence[Point],
    specs: Mapping[int, CellSpec],
) -> JsonObject:
    same, values = key
    observed: Observations[tuple[float, str, bool]] = Observations(2)  # the measure and the target
    scales = [specs[point.cell_id]["scale"] for point in of_group]
    biases = [scale == 1 or specs[point.cell_id]["scale_bias"] for scale, point in zip(scales, of_group, strict=True)]
    of_points = [point.network for point in of_group]
    keys_of_points = list(zip(scales, of_points, biases, strict=True))
    architecture = {point.network: specs[point.cell_id]["architecture"] for point in of_group}
    columns = ((point.measure_task, point.measure, point.target_task, point.target) for point in of_group)
    observed.add(keys_of_points, of_points, [point.attack_seed for point in of_group], *zip(*columns, strict=True))
    measured, targets = (observed.values(i, "network") for i in range(2))
    every = sorted(measured)  # equal points in an equal order are resampled alike
    x, y = (np.array([values_of[point][0] for point in every], np.float64) for values_of in (measured, targets))
    at_one = np.array([scale == 1 for scale, *_ in every], bool)
    networks = [network for scale, network, _ in every if scale == 1]
    correlation = correlate(x[at_one], y[at_one], [architecture[network] for network in networks], networks)
    mixed = len({bias for scale, bias in zip(scales, biases, strict=True) if scale != 1}) > 1
    over_scales = {"n": len(every), "tau": None if mixed else tau(x, y), "note": TWO_SCALINGS if mixed else CONFOUNDED}
    counted = {"results": sum(scale == 1 for scale in scales), "over_scales": {**over_scales, "results": len(of_group)}}
    return {
        **dict(zip(keys, values, strict=True)),
        **same,
        **asdict(correlation),
        **counted,
    }  # `attack` is the whole attack


def _spec(measure: JsonObject | None) -> JsonObject | None:
    return None if measure is None else {**measure["measure"], "version": measure["version"]}


def _number(connection: Connection, parameter: str, name: str) -> Field:
    number_field = RESULTS.find(connection, name, parameter)
    if number_field.kind not in ("number", "integer"):
        raise InvalidQuery(parameter, f"{name} is a {number_field.kind}; ranks are of numbers")
    return number_field
