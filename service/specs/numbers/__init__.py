"""The dictionary of every number that a result can have, and which of them have columns of their own.

A number that has a column is an entry of `COLUMNS`: the tables, filing, the filter fields and result rows follow it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from service.model.json import JsonObject
from service.specs.numbers import of_attacks, of_measures, of_tasks
from service.specs.numbers.base import Group, Kind, Number, Unit

GROUPS: tuple[Group, ...] = (*of_attacks.GROUPS, *of_measures.GROUPS, *of_tasks.GROUPS)


@dataclass(frozen=True)
class Column:
    """A number of a kind of task with a column of its own, beside all numbers of the task in JSON.

    `result` is the column of `results` that repeats it, under its own name unless another is given, None if there is
    none. Results can be sorted by an indexed one without looking at all rows.
    """

    kind: Kind
    number: str
    result: str | None = ""
    indexed: bool = False

    @property
    def name(self) -> str | None:
        """That of the column in `results`."""
        return self.number if self.result == "" else self.result


COLUMNS = (
    Column("attack", "clean_accuracy", indexed=True),
    Column("attack", "clean_loss"),
    Column("attack", "robust_accuracy", indexed=True),
    Column("attack", "robust_loss", indexed=True),
    Column("job", "masked_fraction", indexed=True),
    Column("job", "masked_fraction_of_correct"),
    Column("job", "reverse_fraction"),
    Column("attack", "zero_gradient_fraction", indexed=True),
    Column("measure", "log_hessian_trace_median", indexed=True),
    Column("measure", "log_relative_sharpness_median", indexed=True),
    Column("measure", "log_relative_flatness_median", indexed=True),
    Column("train", "test_accuracy"),
    Column("train", "test_loss", result=None),
    Column("train", "train_loss", result=None),
    Column("train", "seconds", result="train_seconds"),
)
"""In the order of the columns of each table; a new one comes last, with a migration that adds and fills it."""
METRICS = tuple(column.name for column in COLUMNS if column.name)
INDEXED = tuple(column.name for column in COLUMNS if column.name and column.indexed)


def stored(kind: str) -> tuple[str, ...]:
    """The numbers with a column in the table of this kind of task."""
    return tuple(column.number for column in COLUMNS if column.kind == kind)


def filed(kind: str) -> dict[str, str]:
    """The columns of `results` that repeat a number of this kind of task, with the name of that number.

    >>> filed("train")
    {'test_accuracy': 'test_accuracy', 'train_seconds': 'seconds'}
    """
    return {column.name: column.number for column in COLUMNS if column.kind == kind and column.name}


def described() -> list[JsonObject]:
    """The dictionary as plain JSON: each number, or pattern of names, with its group."""
    return [_described(group, number) for group in GROUPS for number in group.numbers]


def _described(group: Group, number: Number) -> JsonObject:
    names = tuple(number.names())
    columns = [column for column in COLUMNS if column.kind == group.kind and column.number in names and column.name]
    return {
        "name": number.name,
        "formula": number.formula,
        "unit": number.unit.text,
        "low": number.unit.low,
        "high": number.unit.high,
        "null": number.null,
        "source": number.source or group.source,
        "group": group.name,
        "task_kind": group.kind,
        "of": group.of,
        "file": group.file,
        "names": list(names),
        "columns": [column.name for column in columns],
        "indexed": [column.name for column in columns if column.indexed],
    }


def markdown() -> str:
    """The dictionary as a page: a table for each group. `python -m service.specs.numbers` prints it."""
    return "\n".join(_page())


def _page() -> Iterator[str]:
    yield HEAD
    for group in GROUPS:
        yield f"\n## {group.name}\n\n{KINDS[group.kind]}: {group.of}. File: `{group.file}`. Source: {group.source}.\n"
        yield "| name | formula | unit and range | null if |\n|---|---|---|---|"
        for number in group.numbers:
            source = f" ({number.source})" if number.source else ""
            yield "| " + " | ".join(_cells(group, number, source)) + " |"


def _cells(group: Group, number: Number, source: str) -> tuple[str, ...]:
    shown = _described(group, number)
    name = f"`{number.name}`" + "".join(f", column `{column}`" for column in shown["columns"])
    name += ", indexed" if shown["indexed"] else ""
    cells = (name, number.formula + source, f"{number.unit.text}{_range(number.unit)}", number.null)
    return tuple(cell.replace("|", "\\|") for cell in cells)


def _range(unit: Unit) -> str:
    low, high = ("" if bound is None else f"{bound:g}" for bound in (unit.low, unit.high))
    return f", {low}..{high}" if low or high else ""


KINDS: dict[Kind, str] = {
    "train": "Trainings",
    "measure": "Measures",
    "attack": "Attacks",
    "control": "Controls",
    "job": "Jobs",
}
HEAD = """# Every stored number

Generated from `service/specs/numbers`; `python -m service.specs.numbers > workers/science/NUMBERS.md` writes it again.
`GET /v1/catalog` and `uncanny catalog` show the same.

Braces stand for parts of a name: `{split}` nothing (test images) or `train_`; `{population}` nothing (all images) or
`_clean_correct`; `{quantile}` `q05`, `q25`, `median`, `q75`, `q95`, order statistics; `{statistic}` a quantile or
`mean`; `{log_statistic}` a quantile or `log_mean`, the logarithm of the mean; `{threshold}` of the loss increase e:
`e001`, `e01` (0.01, 0.1), `log2`, `logk` (k classes); `{bound}`, `{valley}`, `{strength}`, `{share}`, `{end}`,
`{check}`: as listed by the catalogue.

Symbols: z logits, p their softmax, l the cross-entropy, phi the features, W the head with rows w_j, s its scale, x_t
iterate t of the last one T, kappa relative sharpness, L a Lipschitz constant of phi, D_y the largest ||w_j - w_y||,
S = sum_{j != y} exp(z_j - z_y). An attack also leaves the test numbers of the closed forms, at its images."""
