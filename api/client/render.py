"""Tables and progress bars for the terminal."""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypedDict

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from api.client.terminal import plain
from api.client.transport import Json, OnProgress


class Plain(TypedDict):
    """Options of a console that shows data as it is."""

    highlight: bool
    markup: bool
    emoji: bool


WIDE = 160  # columns of a table if stdout is no terminal
ID = re.compile("0[0-9a-f]{7}")
SENTENCE = 40  # the least width of a column of sentences
PLAIN: Plain = {"highlight": False, "markup": False, "emoji": False}
out = Console(**PLAIN, width=None if sys.stdout.isatty() else WIDE)
err = Console(**PLAIN, stderr=True)
NAMES: Mapping[str, str] = {}  # short forms of ids: none, so that ids are shown whole
COLOURS = {
    **dict.fromkeys(("succeeded", "trusted"), "green"),
    **dict.fromkeys(("failed", "invalid", "held"), "red"),
    **dict.fromkeys(("cancelled", "queued"), "dim"),
    "suspect": "yellow",
    "running": "cyan",
}
Columns = Mapping[str, Callable[[Json], str]]
"""The columns of a table: the heading, and the function that makes the cell of a row."""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A table. Only the last cell of a row may be broken into lines, because it may be a sentence."""
    made = Table(
        title=Text(plain(title), "table.title") if title else None,
        title_justify="left",
        header_style="bold",
        box=None,
        pad_edge=False,
    )
    for i, column in enumerate(columns):
        numeric = bool(rows) and all(row[i][:1] in "-0123456789–" and not ID.match(row[i]) for row in rows)
        lines = [line for cell in (column, *(row[i] for row in rows)) for line in cell.splitlines()]
        widest = max(map(cell_len, lines), default=0)
        last = i == len(columns) - 1
        made.add_column(
            Text(plain(column)),
            justify="right" if numeric else "left",
            overflow="fold",
            min_width=min(widest, SENTENCE) if last else widest,
            no_wrap=not last,  # or several would be narrowed, and then widened again beyond the edge
        )
    for row in rows:
        made.add_row(*(coloured(cell) for cell in row))
    return made


def table_of(columns: Columns, rows: Sequence[Json], title: str | None = None) -> Table:
    return table(list(columns), [[cell(row) for cell in columns.values()] for row in rows], title)


def show(made: Table, *narrower: Callable[[], Table]) -> None:
    """Print a table. A terminal shows the first of these that fits, or else the first narrower one, cell below cell.

    If stdout is no terminal, it is `made`, as wide as it needs to be.
    """
    if not out.is_terminal:
        needs = _width(made)
        return (out if needs <= out.width else Console(**PLAIN, width=needs)).print(made)
    tables = [made]
    for make in narrower:
        if _width(tables[-1]) <= out.width:
            break
        tables.append(make())
    fits = _width(tables[-1]) <= out.width
    return out.print(tables[-1] if fits else _upright(tables[min(1, len(tables) - 1)]))


def _upright(made: Table) -> Table:
    """The same table turned: a line for each cell, with the name of its column at the left; long cells are folded."""
    turned = Table(title=made.title, title_justify="left", show_header=False, box=None, pad_edge=False)
    turned.add_column(style="bold", overflow="fold")
    turned.add_column(overflow="fold")
    names = [column.header for column in made.columns]
    rows = list(zip(*(column.cells for column in made.columns), strict=True))
    for place, row in enumerate(rows or [("",) * len(names)]):
        if place:
            turned.add_row("", "")
        for name, cell in zip(names, row, strict=True):
            turned.add_row(name, cell)
    return turned


def _width(made: Table) -> int:
    return Measurement.get(out, out.options.update(width=sys.maxsize), made).minimum


def coloured(cell: str) -> Text:
    return Text(plain(cell), COLOURS.get(cell, ""))


def say(text: str) -> None:
    """Print a sentence on stdout, without markup and without line breaks, so that commands in it can be copied."""
    out.print(plain(text), soft_wrap=True)


def tell(text: str) -> None:
    """Print a sentence on stderr, because stdout is for the data (such as `--json`)."""
    err.print(plain(text), soft_wrap=True)


def counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def percents(low: float | None, high: float | None) -> str:
    """An interval of shares, in percent."""
    return "–" if low is None else f"{percent(low)} to {percent(high)}"


def number(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def attack_name(attack: Json) -> str:
    norm = attack.get("norm")
    return f"{attack['type']} {norm} {number(attack['eps'])}" if norm else str(attack["type"])


def done(job_or_sweep: Json) -> str:
    return f"{100 * job_or_sweep['progress']:.0f} %"


JOBS: Columns = {
    "state": lambda job: job["state"],
    "done": done,
    "architecture": lambda job: job["spec"]["architecture"],
    "dataset": lambda job: job["spec"]["dataset"],
    "scale": lambda job: number(job["spec"]["scale"]),
    "attack": lambda job: attack_name(job["spec"]["attack"]),
    "user": lambda job: job["user"],
    "reason": lambda job: job["reason"] or "",
}
SWEEPS: Columns = {
    "name": lambda sweep: sweep["name"],
    "state": lambda sweep: sweep["state"],
    "done": done,
    "succeeded": lambda sweep: f"{sweep['jobs']['succeeded']}/{sweep['jobs']['total']}",
    "failed": lambda sweep: str(sweep["jobs"]["failed"]),
    "left": lambda sweep: duration(sweep["eta_seconds"]),
    "user": lambda sweep: sweep["user"],
}
RESULTS: Columns = {
    "architecture": lambda row: row["architecture"],
    "dataset": lambda row: row["dataset"],
    "scale": lambda row: number(row["scale"]),
    "attack": lambda row: attack_name(row["attack"]),
    "clean": lambda row: percent(row["clean_accuracy"]),
    "robust": lambda row: percent(row["robust_accuracy"]),
    "95 %": lambda row: percents(row["robust_accuracy_ci95_low"], row["robust_accuracy_ci95_high"]),
    "log sharpness": lambda row: number(row.get("log_relative_sharpness_median")),
    "zero gradient": lambda row: percent(row["zero_gradient_fraction"]),
    "masked": lambda row: percent(row["masked_fraction"]),
    "verdict": lambda row: row["verdict"] or "–",
}


def jobs_table(jobs: Sequence[Json], short: Mapping[str, str] = NAMES, narrow: int = 0) -> Table:
    left_out = ((), ("done", "dataset", "user"), ("done", "dataset", "user", "scale", "attack"))[narrow]
    return table_of({"job": _id("id", short), **_without(left_out, JOBS)}, jobs)


def sweeps_table(sweeps: Sequence[Json], short: Mapping[str, str] = NAMES, narrow: int = 0) -> Table:
    left_out = ((), ("done", "left", "user"), ("done", "left", "user", "failed"))[narrow]
    return table_of({"sweep": _id("id", short), **_without(left_out, SWEEPS)}, sweeps)


def results_table(results: Sequence[Json], short: Mapping[str, str] = NAMES, narrow: int = 0) -> Table:
    less = ("dataset", "95 %", "log sharpness", "zero gradient", "masked")
    left_out = ((), less, (*less, "clean", "attack"))[narrow]
    return table_of({"job": _id("job_id", short), **_without(left_out, RESULTS)}, results)


def _id(name: str, short: Mapping[str, str]) -> Callable[[Json], str]:
    return lambda row: short.get(row[name], row[name])


def _without(left_out: Sequence[str], columns: Columns) -> Columns:
    return {name: cell for name, cell in columns.items() if name not in left_out}


def fields_table(rows: Sequence[Json], short: Mapping[str, str] = NAMES) -> Table:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[number(row.get(name)) for name in columns] for row in rows]
    return table(columns, [[short.get(cell, cell) for cell in row] for row in cells])


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


@contextmanager
def sweep_progress(name: str) -> Iterator[OnProgress]:
    """A progress bar on stderr for a sweep or a job. Call the yielded function with each status.

    If stderr is no terminal, or a dumb one, it is a line at the beginning and for every tenth that is done.
    """
    if err.is_dumb_terminal or not (err.is_terminal or err.is_jupyter):
        yield _lines(name)
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        console=err,
        transient=True,
    )
    with bar:
        shown = bar.add_task(plain(name), total=1.0, left="")

        def update(status: Json) -> None:
            bar.update(shown, completed=status["progress"], left=_left(status))

        yield update


def _lines(name: str) -> OnProgress:
    reported: set[int] = set()

    def update(status: Json) -> None:
        tenth = int(10 * status["progress"])
        if tenth not in reported and tenth < 10:
            reported.add(tenth)
            tell(f"{name}: {10 * tenth} %" + (f", {left}" if (left := _left(status)) else ""))

    return update


def _left(status: Json) -> str:
    """The jobs of a sweep that are done, and when all will be; empty for a job."""
    if "jobs" not in status:
        return ""
    jobs = status["jobs"]
    return f"{jobs['succeeded']}/{jobs['total']} jobs, ETA {duration(status['eta_seconds'])}"
