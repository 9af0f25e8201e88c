"""Statistics over groups of results: n is the number of trained networks, however many results each of them has.

The results of a group may differ in seeds only. If they differ in anything else (eps, samples, recipe, task version
...), an interval over them would mean nothing: the group is refused with the fields that differ, unless mixing is
allowed.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from service.errors import InvalidQuery
from service.model.dotted import flat
from service.model.json import JsonMapping, JsonObject
from service.model.observations import FRACTIONS, Moments, Observations, accuracy_interval, range_of
from service.model.observations import interval as interval
from service.model.query import Node, fields_of
from service.model.results import CellSpec
from service.model.times import iso
from service.model.unit import UNITS, Unit
from service.results.distinct_images import DistinctImages
from service.store import Connection, aggregating
from service.store import results as store
from service.store.aggregating import CellSums
from service.store.database import Database
from service.store.fields import Column, Field
from service.store.result_fields import RESULTS
from service.store.result_tables import results

STATISTICS = ("mean", "std", "ci95", "median", "min", "max", "count", "best", "worst")
BEST = ("best", "worst")
QUANTILE = re.compile(r"q\d\d")
DEFAULT = "robust_accuracy:mean,std,ci95,count"
MAX_GROUPS = 10_000
MAX_METRICS = MAX_KEYS = 20
MAX_BEST = 1000  # groups whose best or worst result is looked up
LONG = {"attack": "attack.type", "norm": "attack.norm", "recipe": "recipe.name"}
SUMS = 5  # values that `CellSums` has for each metric
SPREADS = ("std", "ci95")
VERDICT_VERSION = "verdict_version"
OF_VERDICT = ("masked_fraction", "masked_fraction_of_correct", "masked_n", "reverse_fraction")
"""Numbers that the rule of verdicts counts. They depend on its version, as the fields of the verdict do."""
Key = tuple[Any, ...]  # Any: the values of the fields that are grouped by


@dataclass
class Group:
    """One group: its `rows` and `networks`. Sums count each network once only if it has one row (`is_plain`)."""

    cells: set[int] = field(default_factory=set)
    rows: int = 0
    repeats: int = 0
    networks: int = 0
    metrics: dict[str, Moments] = field(default_factory=lambda: defaultdict(Moments))

    @property
    def is_plain(self) -> bool:
        return len(self.cells) == 1 and not self.repeats


def metrics_of(text: str) -> dict[str, tuple[str, ...]]:
    """`robust_accuracy:mean,std,clean_accuracy:mean` as statistics by metric. Raises `InvalidQuery`."""
    statistics_of: dict[str, list[str]] = {}
    last = ""
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, colon, statistic = part.partition(":")
        if colon or not _is_statistic(part):
            last = name
            statistics_of.setdefault(last, [])
        else:
            statistic = part
        if not last:
            raise InvalidQuery("metrics", f"{part!r} is a statistic of no metric: write as in {DEFAULT!r}")
        if statistic:
            if not _is_statistic(statistic):
                raise InvalidQuery(
                    "metrics", f"unknown statistic {statistic!r} (known are: {', '.join(STATISTICS)}, q05)"
                )
            statistics_of[last].append(statistic)
    if len(statistics_of) > MAX_METRICS:
        raise InvalidQuery("metrics", f"these are {len(statistics_of)}; at most {MAX_METRICS} can be asked for at once")
    return {name: tuple(dict.fromkeys(statistics)) or ("mean", "count") for name, statistics in statistics_of.items()}


def _is_statistic(text: str) -> bool:
    return text in STATISTICS or QUANTILE.fullmatch(text) is not None


def aggregate(
    database: Database,
    nodes: Sequence[Node],
    by: Sequence[str],
    metrics: Mapping[str, Sequence[str]],
    *,
    unit: Unit = "network",
    allow_mixed: bool = False,
    retracted: bool = False,
) -> JsonObject:
    """Statistics of `metrics` in groups of equal `by`, in order, over networks or over one network's attack seeds.

    Raises `InvalidQuery`, also for mixed groups.
    """
    with database.read() as connection:
        keys = keys_of(connection, by)
        where = store.selected(connection, nodes, retracted=retracted)
        question = Grouping(connection, where, keys, metrics, unit, judged=is_judged([*fields_of(nodes), *by]))
        groups = question.groups()
        mixed = question.mixed(groups)
        if mixed and not allow_mixed:
            raise InvalidQuery("by", _refusal(mixed))
        if len(groups) > MAX_BEST and any(not set(BEST).isdisjoint(statistics) for statistics in metrics.values()):
            raise InvalidQuery("metrics", f"best and worst are for {MAX_BEST:,} groups at most, not {len(groups):,}")
        question.take_values(groups)
        items = [question.item(key, group) for key, group in sorted(groups.items(), key=lambda entry: _rank(entry[0]))]
        hidden = 0 if retracted else store.hidden(connection, nodes)
    listed = {name: list(statistics) for name, statistics in metrics.items()}
    answer = {"by": list(by), "metrics": listed, "spread_of": UNITS[unit], "items": items, "mixed": mixed}
    return {**answer, "retracted": hidden}


class Grouping:
    """Results in groups of equal `keys` (fields by name), with statistics of `metrics` over their `unit`s."""

    def __init__(
        self,
        connection: Connection,
        where: Sequence[Column],
        keys: Mapping[str, Field],
        metrics: Mapping[str, Sequence[str]],
        unit: Unit = "network",
        *,
        judged: bool = False,
    ) -> None:
        self.connection, self.where, self.by, self.statistics, self.unit = connection, where, list(keys), metrics, unit
        self.keys, self.judged = list(keys.values()), judged
        self.metrics = {name: _number(connection, name) for name in metrics}
        self.own = [key.column for key in self.keys if key.of_cell is None]
        self.of_cell: dict[int, Key] = {}
        self._images = DistinctImages(connection, where, self.own, self._key)

    def groups(self) -> dict[Key, Group]:
        """All groups with the sums of every metric."""
        columns = [metric.column for metric in self.metrics.values()]
        shared = [key.of_cell for key in self.keys if key.of_cell is not None]
        groups: dict[Key, Group] = defaultdict(Group)
        with closing(aggregating.moments(self.connection, self.where, self.own, columns)) as batches:
            for batch in batches:
                fresh = {sums.cell_id for sums in batch} - self.of_cell.keys()
                self.of_cell |= aggregating.of_cells(self.connection, fresh, shared)
                self._take(batch, groups)
        return groups

    def _take(self, batch: Sequence[CellSums], groups: dict[Key, Group]) -> None:
        starts = {name: SUMS * i for i, name in enumerate(self.metrics)}
        for cell_id, keys, count, repeats, sums in batch:
            group = groups[self._key(cell_id, keys)]
            group.cells.add(cell_id)
            group.rows += count
            group.repeats += repeats
            group.networks += count
            for name, start in starts.items():
                group.metrics[name].add(*sums[start : start + SUMS])
            if len(groups) > MAX_GROUPS:
                raise InvalidQuery("by", f"that makes more than {MAX_GROUPS:,} groups: filter, or group by less")

    def _key(self, cell_id: int, own: Sequence[object]) -> Key:
        shared, own_values = iter(self.of_cell[cell_id]), iter(own)
        return tuple(next(own_values) if key.of_cell is None else next(shared) for key in self.keys)

    def mixed(self, groups: Mapping[Key, Group]) -> dict[str, list[object]]:
        """The fields, other than seeds and those grouped by, that differ within a group, with up to five values."""
        several = [sorted(group.cells) for group in groups.values() if len(group.cells) > 1]
        specs = _without_common(store.cell_specs(self.connection, set().union(*several)))
        grouped = {LONG.get(name, name) for name in self.by}
        differing: dict[str, dict[object, None]] = {}
        for cell_ids in several:
            for name, values in _distinct(specs[cell_id] for cell_id in cell_ids).items():
                # Parts that thousands of cells share, such as their attack, are taken apart once.
                parts = [dict(flat({name: value})) for value in values]
                for inner in set().union(*parts) - grouped:
                    seen = dict.fromkeys(part.get(inner) for part in parts)
                    if len(seen) > 1:
                        differing.setdefault(inner, {}).update(seen)
        for name, values in self._measured().items():
            if name not in grouped:
                differing.setdefault(name, {}).update(dict.fromkeys(values))
        return {name: list(differing[name])[:5] for name in sorted(differing)}

    def _measured(self) -> dict[str, list[object]]:
        """The ways of measuring that differ within a group, with their values: parameters and versions of further
        measures, and the version of the verdict that counted masked examples or chose the results."""
        differing: dict[str, dict[object, None]] = {}
        for name, metric in self.metrics.items():
            specs_of: dict[Key, list[JsonObject]] = defaultdict(list)
            if self.judged or name in OF_VERDICT:
                judged = aggregating.verdict_versions(self.connection, self.where, self.own, metric.column)
                for cell_id, own, (version,) in judged:
                    specs_of[self._key(cell_id, own)].append({VERDICT_VERSION: version})
            if metric.measure is not None:
                made_by = aggregating.measures(self.connection, self.where, self.own, metric.column, metric.measure)
                for cell_id, own, (measure, version) in made_by:
                    spec = {**json.loads(measure), "version": version}
                    parameters = {f"measures.{spec['type']}.{part}": value for part, value in spec.items()}
                    specs_of[self._key(cell_id, own)].append(parameters)
            for specs in specs_of.values():
                for part, values in _distinct(specs).items():
                    if len(values) > 1:
                        differing.setdefault(part, {}).update(dict.fromkeys(values))
        return {name: list(values) for name, values in differing.items()}

    def take_values(self, groups: Mapping[Key, Group]) -> None:
        """Read the value of each network if sums are not enough: they count one twice, tell no quantile, or cancel.

        Raises `InvalidQuery` if attack seeds are to be counted and a group has several networks.
        """
        every = {id(group) for group in groups.values() if self.unit != "network" or not group.is_plain}
        needing = {name: every | self._needing(name, groups) for name in self.metrics}
        wanted = every.union(*needing.values())
        if wanted:
            of_cells = set().union(*(group.cells for group in groups.values() if id(group) in wanted))
            few = 2 * len(of_cells) < len(self.of_cell)
            metrics = {name: metric for name, metric in self.metrics.items() if needing[name]}
            self._read(groups, of_cells if few else None, metrics)
        if any("ci95" in statistics for name, statistics in self.statistics.items() if name in FRACTIONS):
            self._images.look_up(set().union(*(group.cells for group in groups.values())))

    def _needing(self, name: str, groups: Mapping[Key, Group]) -> set[int]:
        statistics = self.statistics[name]
        ranked = any(statistic == "median" or QUANTILE.fullmatch(statistic) for statistic in statistics)
        spread = any(statistic in SPREADS for statistic in statistics)
        pairs = ((group, group.metrics[name]) for group in groups.values())
        return {id(group) for group, moments in pairs if ranked or moments.leaves_range or (spread and moments.cancels)}

    def _read(self, groups: Mapping[Key, Group], of_cells: set[int] | None, metrics: Mapping[str, Field]) -> None:
        """Take the values of the networks in these cells, or in all, for the groups that lie in them."""
        columns = [
            (results.c.attack_task_id if metric.task is None else metric.task, metric.column)
            for metric in metrics.values()
        ]
        observed: Observations[int] = Observations(len(columns))
        number_of: dict[tuple[object, ...], int] = {}  # a group's number is hashed in a fraction of the time of its key
        numbers: dict[Key, int] = {}
        with closing(aggregating.observations(self.connection, self.where, self.own, columns, of_cells)) as batches:
            for batch in batches:
                rows = list(zip(batch.cell_ids, *batch.keys, strict=True))
                for row in set(rows) - number_of.keys():
                    number_of[row] = numbers.setdefault(self._key(row[0], row[1:]), len(numbers))
                groups_of = [number_of[row] for row in rows]
                observed.add(groups_of, batch.networks, batch.attack_seeds, *batch.metrics)
        keys = list(numbers)
        networks = observed.networks()
        for number, count in networks.items():
            groups[keys[number]].networks = count
        if self.unit == "attack_seed" and (most := max(networks.values(), default=1)) > 1:
            sentence = f"attack seeds are counted within one network, and a group has {most:,}"
            raise InvalidQuery("unit", f"{sentence}: filter, or group by weights_sha256 too")
        for i, name in enumerate(metrics):
            for number, values in observed.values(i, self.unit).items():
                groups[keys[number]].metrics[name].take(values)

    def item(self, key: Key, group: Group) -> JsonObject:
        grouped_by = {
            name: iso(value) if field.kind == "time" else value
            for name, field, value in zip(self.by, self.keys, key, strict=True)
        }
        statistics = {
            name: dict(pair for statistic in chosen for pair in self._statistic(key, group, name, statistic))
            for name, chosen in self.statistics.items()
        }
        return {**grouped_by, "results": group.rows, "networks": group.networks, **statistics}

    def _statistic(self, key: Key, group: Group, name: str, statistic: str) -> Iterator[tuple[str, float | str | None]]:
        moments = group.metrics[name]
        match statistic:
            case "mean":
                yield statistic, moments.mean
            case "std":
                yield statistic, moments.std
            case "count":
                yield statistic, moments.n
            case "min":
                yield statistic, moments.least
            case "max":
                yield statistic, moments.most
            case "ci95":
                yield from zip(("ci95_low", "ci95_high", "ci95_of"), self._interval(key, group, name), strict=True)
            case "best" | "worst":
                value = moments.high if statistic == "best" else moments.low
                yield statistic, value
                yield f"{statistic}_job_id", self._holder(key, group, name, value)
            case _:
                yield statistic, moments.quantile(0.5 if statistic == "median" else int(statistic[1:]) / 100)

    def _interval(self, key: Key, group: Group, name: str) -> tuple[float | None, float | None, str | None]:
        """The 95 % interval of a metric's mean, and its sample: the units, or the images that it is a fraction of.

        Equal networks, or a single one, give no interval. If the metric is a fraction, the distinct images give one.
        """
        moments, within = group.metrics[name], range_of(name)
        if self.unit == "network" and within is not None and moments.least == moments.most:
            images = (
                self._images.count(name, self.metrics[name].column, key, group.cells) if name in FRACTIONS else None
            )
            low, high = accuracy_interval(moments.mean, images)
            return low, high, None if low is None else "images"
        low, high = interval(moments.n, moments.mean, moments.std, within=within)
        return low, high, None if low is None else UNITS[self.unit]

    def _holder(self, key: Key, group: Group, name: str, value: float | None) -> str | None:
        if value is None:
            return None
        in_group: list[Column] = [results.c.cell_id.in_(sorted(group.cells))]
        in_group += [
            field.column.is_not_distinct_from(part)
            for field, part in zip(self.keys, key, strict=True)
            if field.of_cell is None
        ]
        return aggregating.first(self.connection, [*self.where, *in_group], self.metrics[name].column == value)


def is_judged(names: Iterable[str]) -> bool:
    """Whether one of these fields depends on the rule of verdicts."""
    return any(name in OF_VERDICT or (name.startswith("verdict") and name != VERDICT_VERSION) for name in names)


def _without_common(specs: Mapping[int, CellSpec]) -> dict[int, CellSpec]:
    """The specs without the fields in which all are equal, which need no comparison."""
    if not specs:
        return {}
    first, *others = specs.values()
    differing = {name for spec in others for name in spec.keys() ^ first.keys()}
    for name in first.keys() - differing:
        value = first[name]
        if any(spec[name] != value for spec in others):
            differing.add(name)
    return {cell_id: {name: spec[name] for name in spec if name in differing} for cell_id, spec in specs.items()}


def _distinct(specs: Iterable[JsonMapping]) -> dict[str, list[object]]:
    """The values that each field of these specs has, in order and each once; null for a spec without it."""
    seen: dict[str, JsonObject] = defaultdict(dict)
    count = 0
    counts: Counter[str] = Counter()
    for spec in specs:
        count += 1
        for name, value in spec.items():
            counts[name] += 1
            seen[name].setdefault(repr(value), value)
    return {name: [*values.values(), *([None] if counts[name] < count else [])] for name, values in seen.items()}


def keys_of(connection: Connection, by: Sequence[str]) -> dict[str, Field]:
    """The fields to group by. Raises `InvalidQuery`."""
    if len(by) > MAX_KEYS:
        raise InvalidQuery("by", f"these are {len(by)} fields; at most {MAX_KEYS} can be grouped by")
    return {name: scalar(connection, "by", name) for name in by}


def scalar(connection: Connection, parameter: str, name: str) -> Field:
    scalar_field = RESULTS.find(connection, name, parameter)
    if scalar_field.kind == "list":
        raise InvalidQuery(parameter, f"{name} is a list, by which nothing can be grouped")
    return scalar_field


def _number(connection: Connection, name: str) -> Field:
    number_field = RESULTS.find(connection, name, "metrics")
    if number_field.kind not in ("number", "integer"):
        raise InvalidQuery("metrics", f"{name} is a {number_field.kind}; statistics are of numbers")
    return number_field


def _refusal(mixed: Mapping[str, Sequence[object]]) -> str:
    differences = "; ".join(f"{name} ({', '.join(map(str, values))})" for name, values in mixed.items())
    names = ",".join(list(mixed)[:3])
    return (
        f"the results of a group differ in more than seeds: {differences}. Filter them, group by them too "
        f"(by: {names}), or allow mixing (allow_mixed)"
    )


def _rank(key: Key) -> list[tuple[bool, Any]]:  # Any: parts of one field are of one kind
    return [(part is None, "" if part is None else part) for part in key]
