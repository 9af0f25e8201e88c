"""Sweep: a named grid of jobs, `base` x `grid` + `include` - `exclude`."""

import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import FailFast, Field, ValidationError

from service.errors import InvalidSpec
from service.limits import MAX_SWEEP_JOBS
from service.model.json import JsonMapping, JsonObject
from service.model.pointers import pointer_to
from service.specs.attacks import ATTACKS
from service.specs.base import ACROSS, Labels, Priority, Spec, shorten
from service.specs.job import JobSpec
from service.specs.measures import MEASURES
from service.specs.parameters import JOB_FIELDS, no_such_field
from service.specs.recipes import RECIPES
from service.specs.spelling import meaning

MAX_COMPARISONS = 2_000_000  # of cells with `exclude`
TAGS = frozenset({*ATTACKS, *RECIPES, *MEASURES})
Cell = JsonObject
Grid = dict[str, list[Any]]  # Any: values of whichever fields are the axes


class Sweep(Spec):
    """A grid of jobs: a key of `grid`, `include`, `exclude` is a JobSpec field; a dotted one reaches inside it."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
    base: Cell = Field(default_factory=dict, description="JobSpec fields that all cells share.")
    grid: Grid = Field(
        default_factory=dict, description="Axes: each field with its values; `recipe.epochs` reaches inside."
    )
    include: Annotated[list[Cell], FailFast()] = Field(
        default_factory=list, description="Further cells, each on top of `base`."
    )
    exclude: Annotated[list[Cell], FailFast()] = Field(
        default_factory=list, description="Cells of the grid to leave out, by values of axes."
    )
    priority: Priority = 0
    labels: Labels = Field(default_factory=dict)

    def cells(self, most: int = MAX_SWEEP_JOBS) -> list[JobSpec]:
        """The distinct jobs of the sweep, in grid order (the last axis runs fastest).

        Raises `InvalidSpec` with a pointer to the offending field or axis, also for more than `most` as written.
        """
        self._check_size(most)
        # Cells that look the same are parsed once; cells that mean the same, such as 1 and "1.0", become one job.
        parsed: dict[str, JobSpec] = {}
        for cell in self._written():
            key = repr(cell.values)
            if key not in parsed:
                parsed[key] = _parse(self.base, cell)
        if not parsed:
            raise InvalidSpec([("/grid", "the sweep has no cells: give it a grid or include some")])
        return list(dict.fromkeys(parsed.values()))

    def written(self) -> int:
        """How many cells the sweep has as written, with cells that mean the same job."""
        return sum(1 for _ in self._written())

    def extended(self, grid: Grid) -> "Sweep":
        """The same sweep with more values on its axes. Raises `InvalidSpec` for a name that is no axis of the sweep."""
        for axis in grid:
            if axis not in self.grid:
                axes = ", ".join(f"`{name}`" for name in self.grid) or "none"
                raise InvalidSpec(
                    [(pointer_to("grid", axis), f"`{axis}` is not an axis of the sweep (they are: {axes})")]
                )
        here = {axis: {meaning(axis, value) for value in self.grid[axis]} for axis in grid}
        more = {
            axis: [value for value in values if meaning(axis, value) not in here[axis]] for axis, values in grid.items()
        }
        longer = {axis: [*values, *more.get(axis, [])] for axis, values in self.grid.items()}
        return self.model_copy(update={"grid": longer})

    def in_extension(self, grid: Grid, error: InvalidSpec) -> InvalidSpec:
        """The errors of this sweep, which was `extended` by `grid`, as pointers to the entries of `grid`."""

        def moved(pointer: str) -> str:
            for axis in grid:
                entry, slash, rest = pointer.removeprefix(start := pointer_to("grid", axis) + "/").partition("/")
                if pointer.startswith(start) and entry.isdecimal():
                    value = meaning(axis, self.grid[axis][int(entry)])
                    indices = [i for i, other in enumerate(grid[axis]) if meaning(axis, other) == value]
                    return f"{start}{indices[0]}{slash}{rest}" if indices else pointer
            return pointer

        return InvalidSpec([(moved(pointer), sentence) for pointer, sentence in error.errors])

    def located(self, job: JobSpec, error: InvalidSpec) -> InvalidSpec:
        """The errors of one of the jobs, as pointers to the cell that the job comes from."""
        cell = next(cell for cell in self._written() if _parse(self.base, cell) == job)
        errors = ((pointer.split("/")[1:], sentence) for pointer, sentence in error.errors)
        return InvalidSpec([(cell.pointer(path), sentence + cell.in_words()) for path, sentence in errors])

    def _check_size(self, most: int) -> None:
        """Before anything is built: a grid of a few bytes can have more cells than there are atoms."""
        empty = [pointer_to("grid", axis) for axis, values in self.grid.items() if not values]
        if empty:
            raise InvalidSpec([(pointer, "an axis needs at least one value") for pointer in empty])
        count = 1 if self.grid else 0
        for values in self.grid.values():
            count = min(count * len(values), 10**15)
        count += len(self.include)
        if count > most:
            many = f"{count:,}" if count < 10**15 else "more than 10^15"
            raise InvalidSpec([("/grid", f"{many} cells; a sweep has at most {most:,}: split it")])
        if count * len(self.exclude) > MAX_COMPARISONS:
            raise InvalidSpec(
                [("/exclude", f"too many for {count:,} cells; leave out whole values, or split the sweep")]
            )

    def _excluded(self) -> list[dict[int, set[int]]]:
        """The patterns of `exclude`: by the number of an axis, which of its values a pattern means.

        An excluded value must be in the grid: otherwise a typing error would be computed for days.
        """
        axes = list(self.grid)
        on_axis: dict[str, dict[Hashable, set[int]]] = {}
        for axis in {axis for pattern in self.exclude for axis in pattern if axis in self.grid}:
            indices = on_axis.setdefault(axis, {})
            for index, value in enumerate(self.grid[axis]):
                indices.setdefault(meaning(axis, value), set()).add(index)
        for i, pattern in enumerate(self.exclude):
            for axis, value in pattern.items():
                if axis not in self.grid:
                    raise InvalidSpec([(pointer_to("exclude", i, axis), f"`{axis}` is not an axis of the grid")])
                if meaning(axis, value) not in on_axis[axis]:
                    sentence = f"{shorten(value)} is none of the values of the axis `{axis}`"
                    raise InvalidSpec([(pointer_to("exclude", i, axis), sentence)])
        return [
            {axes.index(axis): on_axis[axis][meaning(axis, value)] for axis, value in pattern.items()}
            for pattern in self.exclude
            if pattern
        ]

    def _written(self) -> Iterator["_Written"]:
        """The cells as they were written."""
        if self.grid:
            excluded = self._excluded()
            for entries in itertools.product(*map(enumerate, self.grid.values())):
                indices = tuple(index for index, _ in entries)
                if not any(all(indices[axis] in values for axis, values in pattern.items()) for pattern in excluded):
                    cell = {axis: value for axis, (_, value) in zip(self.grid, entries, strict=True)}
                    yield _Written(cell, indices)
        for i, cell in enumerate(self.include):
            yield _Written(cell, include=i)


@dataclass(frozen=True)
class _Written:
    """One cell: its fields, and the positions of its values on the axes of `grid`, or its own in `include`."""

    values: Cell
    indices: tuple[int, ...] = ()
    include: int | None = None

    def axis(self, name: str) -> list[str]:
        """The path of a field of the cell."""
        return ["grid", name] if self.include is None else ["include", str(self.include), name]

    def pointer(self, path: Sequence[str], *, of_name: bool = False) -> str:
        """The pointer to where the user wrote the field at `path`: on an axis, perhaps a dotted one, or else in `base`.

        With `of_name`, it points to an axis instead of its entry if the axis's name alone is `path`.
        """
        for end in range(len(path), 0, -1):
            field = ".".join(path[:end])
            for name in (field, f"{field}.type", f"{field}.name"):  # the last two say which kind `field` is
                if name in self.values:
                    entry = [] if self.include is not None else [self.indices[list(self.values).index(name)]]
                    return pointer_to(*self.axis(name), *([] if of_name and end == len(path) else entry), *path[end:])
        return pointer_to("base", *path)

    def in_words(self) -> str:
        """The cell as the end of a message, for errors that depend on several of its fields."""
        values = ", ".join(f"{name} {shorten(value)}" for name, value in self.values.items())
        return f" (in the cell {values})" if values else ""


def _parse(base: Cell, cell: _Written) -> JobSpec:
    merged = dict(base)
    # Outer fields first, or they would replace the fields that were set inside them.
    for key, value in sorted(cell.values.items(), key=_depth):
        outer, *inner = path = key.split(".")
        if not all(path):
            raise InvalidSpec([(pointer_to(*cell.axis(key)), f"{shorten(key)} names no field")])
        if inner:
            merged[outer] = _within(merged.get(outer, {}), inner, value, key, cell)
        else:
            merged[key] = value
    try:
        return JobSpec.model_validate(merged)
    except ValidationError as error:
        raise InvalidSpec(problems(error, cell)) from None


def _depth(entry: tuple[str, object]) -> int:
    return entry[0].count(".")


def _within(container: object, path: list[str], value: object, key: str, cell: _Written) -> Cell:
    """A copy of `container` in which the field at `path` has `value`."""
    if not isinstance(container, dict):
        outer = key.removesuffix("." + ".".join(path))
        sentence = f"spell `{outer}` out in `base` to vary `{key}` ({shorten(container)} is a name)"
        raise InvalidSpec([(pointer_to(*cell.axis(key)), sentence)])
    name, *rest = path
    return {**container, name: _within(container.get(name, {}), rest, value, key, cell) if rest else value}


def problems(error: ValidationError, cell: _Written | None = None) -> list[tuple[str, str]]:
    """`(JSON pointer, sentence)` of each of pydantic's errors, pointing at the axis or at `base` of a cell."""
    out = []
    for item in error.errors(include_url=False, include_context=False):
        path, unknown = as_written(item["loc"]), item["type"] == "extra_forbidden"
        where = pointer_to(*path) if cell is None else cell.pointer(path, of_name=unknown)
        depends = item["type"] == ACROSS or (unknown and len(path) > 1)  # on other fields of the job
        out.append((where, sentence_of(item, path) + (cell.in_words() if cell is not None and depends else "")))
    return out


def sentence_of(item: JsonMapping, path: Sequence[str], names: Sequence[str] = JOB_FIELDS) -> str:
    """Pydantic's error in the field at `path` of a body whose fields are `names`, with the value that it had."""
    if item["type"] == "extra_forbidden":
        return no_such_field(path, names)
    sentence = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] in {"missing", "value_error", ACROSS} or isinstance(item.get("input"), (dict, list)):
        return sentence
    return f"{sentence} (it was {shorten(item.get('input'))})"


def as_written(location: Sequence[int | str]) -> list[str]:
    """The location without the steps that pydantic adds: functions, and the kind of attack, recipe or measure."""
    path: list[str] = []
    for before, part in itertools.pairwise((None, *location)):
        names_a_kind = before in ("attack", "recipe") or isinstance(before, int)
        if not (names_a_kind and part in TAGS) and not str(part).startswith("function-"):
            path.append(str(part))
    return path
