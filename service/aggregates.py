"""Statistics over groups of results, each number counted once however many jobs asked for it.

A group may differ in seeds only: where anything else does (another eps, other samples, recipe, task version ...), an
interval over it would mean nothing, and it is refused with the fields that differ, unless mixing is asked for.
"""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sqlalchemy import Connection, Row

from service.dotted import flat
from service.errors import InvalidQuery
from service.query import Node
from service.store import aggregating
from service.store import results as store
from service.store.database import Database
from service.store.fields import RESULTS, Column, Field
from service.store.result_tables import results
from service.views import iso

STATISTICS = ("mean", "std", "ci95", "median", "min", "max", "count", "best", "worst")
BEST = ("best", "worst")
QUANTILE = re.compile(r"q\d\d")
DEFAULT = "robust_accuracy:mean,std,ci95,count"
MAX_GROUPS = 10_000
MAX_METRICS = MAX_KEYS = 20
MAX_BEST = 1000  # groups whose best or worst result is looked up
LONG = {"attack": "attack.type", "norm": "attack.norm", "recipe": "recipe.name"}
SUMS = ("n", "sum", "squares", "low", "high")
Key = tuple[Any, ...]


@dataclass
class Moments:
    """What sums tell of one metric in one group."""

    n: int = 0
    sum: float = 0.0
    squares: float = 0.0
    low: float | None = None
    high: float | None = None
    values: dict[Any, float] = field(default_factory=dict)  # by task, where sums do not do

    def add(self, n: int, total: float | None, squares: float | None, low: float | None, high: float | None) -> None:
        if not n or low is None or high is None:
            return
        self.n, self.sum, self.squares = self.n + n, self.sum + (total or 0.0), self.squares + (squares or 0.0)
        self.low = low if self.low is None else min(self.low, low)
        self.high = high if self.high is None else max(self.high, high)

    @property
    def mean(self) -> float | None:
        return self.sum / self.n if self.n else None

    @property
    def std(self) -> float | None:
        """Of a sample; null for fewer than two values."""
        if self.n < 2 or self.values:
            return float(np.std(list(self.values.values()), ddof=1)) if len(self.values) > 1 else None
        if self.low == self.high:
            return 0.0
        return math.sqrt(max(self.squares - self.sum * self.sum / self.n, 0.0) / (self.n - 1))


@dataclass
class Group:
    cells: set[int] = field(default_factory=set)
    rows: int = 0
    repeated: bool = False
    metrics: dict[str, Moments] = field(default_factory=lambda: defaultdict(Moments))


def metrics_of(text: str) -> dict[str, tuple[str, ...]]:
    """`robust_accuracy:mean,std,clean_accuracy:mean` as statistics by metric. Raises `InvalidQuery`."""
    found: dict[str, list[str]] = {}
    last = ""
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, colon, statistic = part.partition(":")
        if colon or not _is_statistic(part):
            last = name
            found.setdefault(last, [])
        else:
            statistic = part
        if not last:
            raise InvalidQuery("metrics", f"{part!r} is a statistic of no metric: write as in {DEFAULT!r}")
        if statistic:
            if not _is_statistic(statistic):
                raise InvalidQuery(
                    "metrics", f"unknown statistic {statistic!r} (known are: {', '.join(STATISTICS)}, q05)"
                )
            found[last].append(statistic)
    if len(found) > MAX_METRICS:
        raise InvalidQuery("metrics", f"these are {len(found)}; at most {MAX_METRICS} can be asked for at once")
    return {name: tuple(dict.fromkeys(statistics)) or ("mean", "count") for name, statistics in found.items()}


def _is_statistic(text: str) -> bool:
    return text in STATISTICS or QUANTILE.fullmatch(text) is not None


def aggregate(
    database: Database,
    nodes: Sequence[Node],
    by: Sequence[str],
    metrics: Mapping[str, Sequence[str]],
    *,
    allow_mixed: bool = False,
    retracted: bool = False,
) -> dict[str, Any]:
    """Statistics of `metrics` in groups of equal `by`, in their order. Raises `InvalidQuery`, also for mixed groups."""
    with database.read() as connection:
        keys = keys_of(connection, by)
        question = Grouping(connection, store.selected(connection, nodes, retracted=retracted), keys, metrics)
        groups = question.groups()
        mixed = question.mixed(groups)
        if mixed and not allow_mixed:
            raise InvalidQuery("by", _refusal(mixed))
        if len(groups) > MAX_BEST and any(what in BEST for of in metrics.values() for what in of):
            raise InvalidQuery("metrics", f"best and worst are for {MAX_BEST:,} groups at most, not {len(groups):,}")
        question.take_values(groups)
        items = [question.item(key, group) for key, group in sorted(groups.items(), key=lambda one: _rank(one[0]))]
        hidden = 0 if retracted else store.hidden(connection, nodes)
    asked = {name: list(of) for name, of in metrics.items()}
    return {"by": list(by), "metrics": asked, "items": items, "mixed": mixed, "retracted": hidden}


class Grouping:
    """Results in groups of equal `keys` (fields by name), with statistics of `metrics`."""

    def __init__(
        self, connection: Connection, where: Sequence[Column], keys: Mapping[str, Field],
        metrics: Mapping[str, Sequence[str]],
    ) -> None:  # fmt: skip
        self.connection, self.where, self.by, self.asked = connection, where, list(keys), metrics
        self.keys = list(keys.values())
        self.metrics = {name: _number(connection, name) for name in metrics}
        self.own = [key.column for key in self.keys if key.of_cell is None]
        self.of_cell: dict[int, Key] = {}

    def groups(self) -> dict[Key, Group]:
        """All groups with the sums of every metric."""
        columns = [metric.column for metric in self.metrics.values()]
        shared = [key.of_cell for key in self.keys if key.of_cell is not None]
        groups: dict[Key, Group] = defaultdict(Group)
        with closing(aggregating.moments(self.connection, self.where, self.own, columns)) as batches:
            for rows in batches:
                fresh = {row.cell_id for row in rows} - self.of_cell.keys()
                self.of_cell |= aggregating.of_cells(self.connection, fresh, shared)
                self._take(rows, groups)
        return groups

    def _take(self, rows: Sequence[Row[Any]], groups: dict[Key, Group]) -> None:
        for row in rows:
            group = groups[self._key(row.cell_id, row[1 : 1 + len(self.own)])]
            group.cells.add(row.cell_id)
            group.rows += row.rows
            group.repeated = group.repeated or row.repeated > 0
            for i, name in enumerate(self.metrics):
                group.metrics[name].add(
                    *(getattr(row, f"{part}_{i}") for part in ("n", "sum", "squares", "low", "high"))
                )
            if len(groups) > MAX_GROUPS:
                raise InvalidQuery("by", f"that makes more than {MAX_GROUPS:,} groups: filter, or group by less")

    def join(self, groups: dict[Key, Group], same: Mapping[int, int]) -> dict[Key, Group]:
        """`groups` by cell, those of a cell that stands for others in one: `same` names it for each."""
        joined: dict[Key, Group] = defaultdict(Group)
        self.of_cell = {cell_id: (first,) for cell_id, first in same.items()}
        for group in groups.values():
            into = joined[self._key(min(group.cells), ())]
            into.cells |= group.cells
            into.rows, into.repeated = into.rows + group.rows, into.repeated or group.repeated
            for name, of in group.metrics.items():
                into.metrics[name].add(of.n, of.sum, of.squares, of.low, of.high)
        return joined

    def _key(self, cell_id: int, own: Sequence[Any]) -> Key:
        shared, mine = iter(self.of_cell[cell_id]), iter(own)
        return tuple(next(mine) if key.of_cell is None else next(shared) for key in self.keys)

    def mixed(self, groups: Mapping[Key, Group]) -> dict[str, list[Any]]:
        """The fields, other than seeds and those grouped by, that differ within a group, with up to five values."""
        several = [sorted(group.cells) for group in groups.values() if len(group.cells) > 1]
        specs = store.cell_specs(self.connection, set().union(*several))
        grouped = {LONG.get(name, name) for name in self.by}
        differing: dict[str, dict[Any, None]] = {}
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

    def _measured(self) -> dict[str, list[Any]]:
        """The parameters and versions of further measures that differ within a group, with their values."""
        differing: dict[str, dict[Any, None]] = {}
        for metric in self.metrics.values():
            if metric.measure is None:
                continue
            found: dict[Key, list[dict[str, Any]]] = defaultdict(list)
            for row in aggregating.measures(self.connection, self.where, self.own, metric.column, metric.measure):
                cell_id, *own, measure, version = tuple(row)
                spec = {**json.loads(measure), "version": version}
                named = {f"measures.{spec['type']}.{name}": value for name, value in spec.items()}
                found[self._key(cell_id, own)].append(named)
            for specs in found.values():
                for name, values in _distinct(specs).items():
                    if len(values) > 1:
                        differing.setdefault(name, {}).update(dict.fromkeys(values))
        return {name: list(values) for name, values in differing.items()}

    def take_values(self, groups: Mapping[Key, Group]) -> None:
        """The values themselves, once per task, where sums would count one twice or do not tell a quantile."""
        repeated = any(group.repeated for group in groups.values())
        for name, metric in self.metrics.items():
            task_id = results.c.attack_task_id if metric.task is None else metric.task
            shared = repeated or metric.task is not None
            ranked = any(what == "median" or QUANTILE.fullmatch(what) for what in self.asked[name])
            if not (shared or ranked):
                continue
            rows = aggregating.values(self.connection, self.where, self.own, metric.column, task_id if shared else None)
            into: dict[Key, dict[Any, float]] = {}
            for i, row in enumerate(rows):
                place, task, value = tuple(row[:-2]), row[-2], row[-1]
                if place not in into:
                    into[place] = groups[self._key(place[0], place[1:])].metrics[name].values
                into[place][i if task is None else task] = value
            for group in groups.values():
                found = np.array(list(group.metrics[name].values.values()), np.float64)
                if shared and found.size:
                    group.metrics[name].n, group.metrics[name].sum = found.size, float(found.sum())

    def item(self, key: Key, group: Group) -> dict[str, Any]:
        named = {
            name: iso(value) if field.kind == "time" else value
            for name, field, value in zip(self.by, self.keys, key, strict=True)
        }
        statistics = {
            name: {what: value for asked in of for what, value in self._statistic(key, group, name, asked)}
            for name, of in self.asked.items()
        }
        return {**named, "results": group.rows, **statistics}

    def _statistic(self, key: Key, group: Group, name: str, asked: str) -> Iterator[tuple[str, Any]]:
        of = group.metrics[name]
        match asked:
            case "mean":
                yield asked, of.mean
            case "std":
                yield asked, of.std
            case "count":
                yield asked, of.n
            case "min":
                yield asked, of.low
            case "max":
                yield asked, of.high
            case "ci95":
                yield from zip(("ci95_low", "ci95_high"), interval(of.n, of.mean, of.std), strict=True)
            case "best" | "worst":
                value = of.high if asked == "best" else of.low
                yield asked, value
                yield f"{asked}_job_id", self._holder(key, group, name, value)
            case _:
                yield asked, quantile(list(of.values.values()), 0.5 if asked == "median" else int(asked[1:]) / 100)

    def _holder(self, key: Key, group: Group, name: str, value: float | None) -> str | None:
        if value is None:
            return None
        of_group: list[Column] = [results.c.cell_id.in_(sorted(group.cells))]
        of_group += [
            field.column.is_not_distinct_from(part)
            for field, part in zip(self.keys, key, strict=True)
            if field.of_cell is None
        ]
        return aggregating.first(self.connection, [*self.where, *of_group], self.metrics[name].column == value)


def _distinct(specs: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The values that each field of these specs has, in order and each once; null for a spec without it."""
    seen: dict[str, dict[str, Any]] = defaultdict(dict)
    count = 0
    counts: Counter[str] = Counter()
    for spec in specs:
        count += 1
        for name, value in spec.items():
            counts[name] += 1
            seen[name].setdefault(repr(value), value)
    return {name: [*of.values(), *([None] if counts[name] < count else [])] for name, of in seen.items()}


def interval(n: int, mean: float | None, std: float | None) -> tuple[float | None, float | None]:
    """The 95 % confidence interval of a mean by Student's t; null for fewer than two values."""
    if n < 2 or mean is None or std is None:
        return None, None
    from scipy.special import stdtrit  # a tenth of a second that other questions need not wait for

    half = float(stdtrit(n - 1, 0.975)) * std / math.sqrt(n)
    return mean - half, mean + half


def quantile(values: Sequence[float], q: float) -> float | None:
    """The order statistic, as everywhere here (`inverted_cdf`)."""
    return float(np.quantile(values, q, method="inverted_cdf")) if values else None


def keys_of(connection: Connection, by: Sequence[str]) -> dict[str, Field]:
    """The fields to group by. Raises `InvalidQuery`."""
    if len(by) > MAX_KEYS:
        raise InvalidQuery("by", f"these are {len(by)} fields; at most {MAX_KEYS} can be grouped by")
    return {name: scalar(connection, "by", name) for name in by}


def scalar(connection: Connection, parameter: str, name: str) -> Field:
    found = RESULTS.find(connection, name, parameter)
    if found.kind == "list":
        raise InvalidQuery(parameter, f"{name} is a list, by which nothing can be grouped")
    return found


def _number(connection: Connection, name: str) -> Field:
    found = RESULTS.find(connection, name, "metrics")
    if found.kind not in ("number", "integer"):
        raise InvalidQuery("metrics", f"{name} is a {found.kind}; statistics are of numbers")
    return found


def _refusal(mixed: Mapping[str, Sequence[Any]]) -> str:
    said = "; ".join(f"{name} ({', '.join(map(str, values))})" for name, values in mixed.items())
    names = ",".join(list(mixed)[:3])
    return (
        f"the results of a group differ in more than seeds: {said}. Filter them, group by them too (by: {names}), or "
        "allow mixing (allow_mixed)"
    )


def _rank(key: Key) -> list[tuple[bool, Any]]:
    return [(part is None, "" if part is None else part) for part in key]
