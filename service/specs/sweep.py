"""Sweep: a named grid of jobs, `base` x `grid` + `include` - `exclude`."""

import itertools
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, ValidationError

from service.errors import InvalidSpec
from service.limits import MAX_SWEEP_JOBS
from service.specs.attacks import ATTACKS
from service.specs.base import Labels, Priority, Spec, shorten
from service.specs.job import JobSpec
from service.specs.measures import MEASURES
from service.specs.parameters import no_such_field
from service.specs.recipes import RECIPES

MAX_COMPARISONS = 2_000_000  # of cells with `exclude`
TAGS = frozenset({*ATTACKS, *RECIPES, *MEASURES})
Cell = dict[str, Any]


class Sweep(Spec):
    """A grid of jobs: a key of `grid`, `include`, `exclude` is a JobSpec field; a dotted one reaches inside it."""

    name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
    base: Cell = Field(default_factory=dict, description="JobSpec fields that all cells share.")
    grid: dict[str, list[Any]] = Field(
        default_factory=dict, description="Axes: each field with its values; `recipe.epochs` reaches inside."
    )
    include: list[Cell] = Field(default_factory=list, description="Further cells, each on top of `base`.")
    exclude: list[Cell] = Field(default_factory=list, description="Cells of the grid to leave out, by values of axes.")
    priority: Priority = 0
    labels: Labels = Field(default_factory=dict)

    def cells(self, most: int = MAX_SWEEP_JOBS) -> list[JobSpec]:
        """The distinct jobs of the sweep, in grid order (the last axis runs fastest).

        Raises `InvalidSpec` with a pointer to the offending field or axis, also for more than `most` as written.
        """
        self._check_size(most)
        self._check_exclude()
        # Pairs that look the same are parsed once; those that are the same, such as 1 and "1.0", become one job.
        parsed: dict[str, JobSpec] = {}
        for place, cell in self._written():
            key = repr(cell)
            if key not in parsed:
                parsed[key] = _parse(place, self.base, cell)
        if not parsed:
            raise InvalidSpec([("/grid", "the sweep has no cells: give it a grid or include some")])
        return list(dict.fromkeys(parsed.values()))

    def written(self) -> int:
        """How many cells the sweep has as it is written, with those that say the same as another."""
        return sum(1 for _ in self._written())

    def extended(self, grid: dict[str, list[Any]]) -> "Sweep":
        """The same sweep with more values on its axes. Raises `InvalidSpec` for what is no axis of it."""
        for axis in grid:
            if axis not in self.grid:
                known = ", ".join(f"`{name}`" for name in self.grid) or "none"
                raise InvalidSpec(
                    [(_pointer("grid", axis), f"`{axis}` is not an axis of the sweep (they are: {known})")]
                )
        more = {axis: [value for value in values if value not in self.grid[axis]] for axis, values in grid.items()}
        longer = {axis: [*values, *more.get(axis, [])] for axis, values in self.grid.items()}
        return self.model_copy(update={"grid": longer})

    def pointer(self, field: str) -> str:
        """Where the sweep says what this field of its jobs is."""
        return _pointer("grid" if field in self.grid else "base", field)

    def _check_size(self, most: int) -> None:
        """Before anything is built: a grid of a few bytes can have more cells than there are atoms."""
        empty = [_pointer("grid", axis) for axis, values in self.grid.items() if not values]
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

    def _check_exclude(self) -> None:
        """What is left out must be there: a typing error would otherwise be computed for days."""
        for i, pattern in enumerate(self.exclude):
            for axis, value in pattern.items():
                if axis not in self.grid:
                    raise InvalidSpec([(_pointer("exclude", i, axis), f"`{axis}` is not an axis of the grid")])
                if value not in self.grid[axis]:
                    sentence = f"{shorten(value)} is none of the values of the axis `{axis}`"
                    raise InvalidSpec([(_pointer("exclude", i, axis), sentence)])

    def _written(self) -> Iterator[tuple[str, Cell]]:
        """The cells as they were written, each with a pointer to where."""
        if self.grid:
            for values in itertools.product(*self.grid.values()):
                cell = dict(zip(self.grid, values, strict=True))
                if not any(_covers(pattern, cell) for pattern in self.exclude):
                    yield "/grid", cell
        for i, cell in enumerate(self.include):
            yield _pointer("include", i), cell


def _covers(pattern: Cell, cell: Cell) -> bool:
    return bool(pattern) and all(cell[axis] == value for axis, value in pattern.items())


def _parse(place: str, base: Cell, cell: Cell) -> JobSpec:
    merged = dict(base)
    for key, value in sorted(cell.items(), key=_depth):  # else a field would replace what was set inside it
        outer, *inner = path = key.split(".")
        if not all(path):
            raise InvalidSpec([(place + _pointer(key), f"{shorten(key)} names no field")])
        if inner:
            merged[outer] = _within(merged.get(outer, {}), inner, value, place, key)
        else:
            merged[key] = value
    try:
        return JobSpec.model_validate(merged)
    except ValidationError as error:
        raise InvalidSpec(problems(error, prefix=place, axes=cell)) from None


def _depth(entry: tuple[str, Any]) -> int:
    return entry[0].count(".")


def _within(container: Any, path: list[str], value: Any, place: str, key: str) -> Cell:
    """A copy of `container` in which the field at `path` has `value`."""
    if not isinstance(container, dict):
        outer = key.removesuffix("." + ".".join(path))
        raise InvalidSpec(
            [(place + _pointer(key), f"spell `{outer}` out in `base` to vary `{key}` ({shorten(container)} is a name)")]
        )
    name, *rest = path
    return {**container, name: _within(container.get(name, {}), rest, value, place, key) if rest else value}


def problems(error: ValidationError, *, prefix: str = "", axes: Cell | None = None) -> list[tuple[str, str]]:
    """`(JSON pointer, sentence)` of each thing that pydantic found, pointing at the axis or at `base`."""
    out = []
    for item in error.errors(include_url=False, include_context=False):
        path = _as_written(item["loc"])
        where = prefix + _pointer(*path) if axes is None else _in_cell(path, prefix, axes)
        sentence = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            out.append((where, no_such_field(path)))
            continue
        if item["type"] not in {"missing", "value_error"} and not isinstance(item.get("input"), (dict, list)):
            sentence += f" (it was {shorten(item['input'])})"
        out.append((where, sentence))
    return out


def _as_written(location: tuple[int | str, ...]) -> list[str]:
    """The location without the tags by which pydantic says which kind of attack, recipe or measure it read."""
    path: list[str] = []
    for before, part in itertools.pairwise((None, *location)):
        names_a_kind = before in ("attack", "recipe") or isinstance(before, int)
        if not (names_a_kind and part in TAGS):
            path.append(str(part))
    return path


def _in_cell(path: list[str], prefix: str, axes: Cell) -> str:
    """Where the user wrote the field at `path`: on an axis, perhaps a dotted one, or else in `base`."""
    for end in range(len(path), 0, -1):
        field = ".".join(path[:end])
        for axis in (field, f"{field}.type", f"{field}.name"):  # the last two say which kind `field` is
            if axis in axes:
                return prefix + _pointer(axis, *path[end:])
    return _pointer("base", *path)


def _pointer(*parts: object) -> str:
    """A JSON pointer (RFC 6901)."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)
