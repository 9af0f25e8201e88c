"""`jobs`, `sweeps` and `results`: what is there, and what came out."""

import csv
import itertools
import sys
from collections.abc import Iterable
from typing import Annotated

import typer
from rich.table import Table

from api.client import Json
from api.commands.options import AsJson, Filter, Filters, Home, Retracted, Url, client_of, filters_of, print_json
from api.render import fields_table, jobs_table, number, results_table, say, show, sweeps_table, table, tell
from service.dotted import flat

MAX_PAGE = 1000
Limit = Annotated[int, typer.Option("--limit", "-n", min=1, help="At most so many rows.")]
Sort = Annotated[str, typer.Option("--sort", help="A field; `-` in front for descending.")]


def jobs(
    filters: Filters = None,
    filter: Filter = "",
    sort: Sort = "-created_at",
    limit: Limit = 50,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List jobs; with a job's ID alone, show that one with its tasks."""
    with client_of(home, url) as client:
        if one := _ident(filters):
            return _show_job(client.job(one), as_json)
        found = client.jobs(filter, sort=sort, limit=_page(limit), **filters_of(filters))
        rows = _first(found, limit, "--limit shows more")
    return print_json(rows) if as_json else _show(jobs_table(rows), rows, "jobs")


def sweeps(limit: Limit = 20, home: Home = None, url: Url = None, as_json: AsJson = False) -> None:
    """List sweeps with their progress, the newest first."""
    with client_of(home, url) as client:
        rows = _first(client.sweeps(limit=_page(limit)), limit, "--limit shows more")
    return print_json(rows) if as_json else _show(sweeps_table(rows), rows, "sweeps")


def results(
    filters: Filters = None,
    filter: Filter = "",
    sort: Sort = "-created_at",
    fields: Annotated[str, typer.Option("--fields", help="Comma-separated names of what to show; `*` for all.")] = "",
    limit: Limit = 100,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    include_retracted: Retracted = False,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show results of succeeded jobs, as `uncanny results sweep=ID scale=5`; with a job's ID alone, that one whole."""
    with client_of(home, url) as client:
        if one := _ident(filters):
            result = client.result(one)
            return print_json(result) if as_json else _show_result(result)
        found = client.results(
            filter, sort=sort, fields=fields, limit=_page(limit), include_retracted=include_retracted,
            **filters_of(filters),
        )  # fmt: skip
        rows = _first(found, limit, "--limit shows more, `uncanny export FILE` writes all of them")
        if not as_json and (hidden := found.retracted):
            tell(f"{hidden:,} retracted results are hidden (--include-retracted shows them).")
    if as_json:
        return print_json(rows)
    if as_csv:
        flattened = [dict(flat(row)) for row in rows]
        names = list(dict.fromkeys(name for row in flattened for name in row))
        writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")  # for `$(...)` of a shell
        writer.writeheader()
        return writer.writerows(flattened)
    made = fields_table([dict(flat(row)) for row in rows]) if fields else results_table(rows)
    return _show(made, rows, "results")


def _show(made: Table, rows: list[Json], noun: str) -> None:
    """That nothing matches is no row: it is said on stderr."""
    hidden = " (--include-retracted shows retracted ones too)" if noun == "results" else ""
    return show(made) if rows else tell(f"No {noun} match{hidden}.")


def _page(limit: int) -> int:
    """Rows of a page: one more than are shown, which tells whether there are more."""
    return min(limit + 1, MAX_PAGE)


def _first(found: Iterable[Json], limit: int, advice: str) -> list[Json]:
    """The rows that are shown; what stands on stdout is not all of them where stderr says so."""
    rows = list(itertools.islice(found, limit + 1))
    if len(rows) > limit:
        tell(f"There are more than {'this one' if limit == 1 else f'these {limit}'}: {advice}.")
    return rows[:limit]


def _ident(filters: list[str] | None) -> str | None:
    """The ID that was given instead of filters."""
    return filters[0] if filters and len(filters) == 1 and "=" not in filters[0] else None


def _show_result(result: Json) -> None:
    """Every number and reason; of the tasks that it rests on, `--json` has the rest."""
    show(results_table([result]))
    say("")
    rows = [[name, number(value)] for name, value in flat({**result, "parts": None}) if value not in (None, "")]
    show(table(["field", "value"], rows))


def _show_job(job: Json, as_json: bool) -> None:
    if as_json:
        return print_json(job)
    show(jobs_table([job]))
    say("")
    columns = ["task", "kind", "part", "state", "attempt", "reason"]
    tasks = [
        [
            task["digest"][:12], task["kind"], ", ".join(task["roles"]), task["state"], str(task["attempt"]),
            task["reason"] or "",
        ]
        for task in job["tasks"]
    ]  # fmt: skip
    return show(table(columns, tasks))
