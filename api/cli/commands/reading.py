"""`jobs`, `sweeps` and `results`: lists, and one job or result whole."""

import csv
import itertools
import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Annotated

import typer
from rich.table import Table

from api.cli.commands.options import (
    AsJson,
    Filter,
    Filters,
    Home,
    Retracted,
    Url,
    client_of,
    filters_of,
    print_json,
    whole_number,
)
from api.cli.report import images, meaning
from api.client import Client, Json
from api.client.render import (
    Columns,
    fields_table,
    jobs_table,
    number,
    results_table,
    say,
    show,
    sweeps_table,
    table,
    table_of,
    tell,
)
from service.limits import MAX_LIMIT
from service.model.dotted import flat

Limit = Annotated[int, typer.Option("--limit", "-n", metavar="N", parser=whole_number(1), help="At most so many rows.")]
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
        if job_id := _ident(filters):
            return _show_job(client, client.job(job_id), as_json)
        matching = client.jobs(filter, sort=sort, limit=_page(limit), **filters_of(filters))
        rows = _first(matching, limit, "--limit shows more")
        return print_json(rows) if as_json else _show(jobs_table, client, rows, "jobs")


def sweeps(limit: Limit = 20, home: Home = None, url: Url = None, as_json: AsJson = False) -> None:
    """List sweeps with their progress, the newest first."""
    with client_of(home, url) as client:
        rows = _first(client.sweeps(limit=_page(limit)), limit, "--limit shows more")
        return print_json(rows) if as_json else _show(sweeps_table, client, rows, "sweeps")


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
        if job_id := _ident(filters):
            result = client.result(job_id)
            return print_json(result) if as_json else _show_result(client, result)
        matching = client.results(
            filter,
            sort=sort,
            fields=fields,
            limit=_page(limit),
            include_retracted=include_retracted,
            **filters_of(filters),
        )
        rows = _first(matching, limit, "--limit shows more, `uncanny export FILE` writes all of them")
        short = _short(client, rows) if fields and not (as_json or as_csv) else {}
        if not as_json and (hidden := matching.retracted):
            tell(f"{hidden:,} retracted results are hidden (--include-retracted shows them).")
        if not (as_json or as_csv or fields):
            return _show(results_table, client, rows, "results")
    if as_json:
        return print_json(rows)
    flattened = [dict(flat(row)) for row in rows]
    if as_csv:
        names = list(dict.fromkeys(name for row in flattened for name in row))
        writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")  # for `$(...)` of a shell
        writer.writeheader()
        return writer.writerows(flattened)
    return show(fields_table(flattened), lambda: fields_table(flattened, short)) if rows else _tell_nothing("results")


def _show(made: Callable[..., Table], client: Client, rows: list[Json], noun: str) -> None:
    """Print a table with whole ids if there is room for them, else with their shortest unique prefixes."""
    if not rows:
        return _tell_nothing(noun)
    short = cache(lambda: client.short_ids(str(row.get("id") or row["job_id"]) for row in rows))
    levels = (lambda: made(rows, short()), lambda: made(rows, short(), narrow=1), lambda: made(rows, short(), narrow=2))
    return show(made(rows), *levels)


def _short(client: Client, rows: Iterable[Json]) -> dict[str, str]:
    """The shortest unique prefixes of the ids in these results."""
    ids = {str(row[name]) for row in rows for name in ("job_id", "sweep_id") if row.get(name)}
    return client.short_ids(sorted(ids))


def _tell_nothing(noun: str) -> None:
    """Say on stderr that nothing matches. On stdout it would look like a row."""
    tell(f"No {noun} match{' (--include-retracted shows retracted ones too)' if noun == 'results' else ''}.")


def _page(limit: int) -> int:
    """Rows of a page: one more than are shown, to see whether there are more."""
    return min(limit + 1, MAX_LIMIT)


def _first(matching: Iterable[Json], limit: int, advice: str) -> list[Json]:
    """The rows to show. If there are more, a sentence on stderr says so."""
    rows = list(itertools.islice(matching, limit + 1))
    if len(rows) > limit:
        tell(f"There are more than {'this one' if limit == 1 else f'these {limit}'}: {advice}.")
    return rows[:limit]


def _ident(filters: list[str] | None) -> str | None:
    """The ID, if one was given instead of filters."""
    return filters[0] if filters and len(filters) == 1 and "=" not in filters[0] else None


def _show_result(client: Client, result: Json) -> None:
    """Print every number and reason of a result. Its tasks are in `--json` only."""
    if result["retracted_at"]:
        say(f"RETRACTED {result['retracted_at']} by {result['retracted_by']}: {result['retraction_reason']}")
    _show(results_table, client, [result], "results")
    for reason in result["verdict_reasons"] or ():
        counted = images((result["verdict_counts"] or {}).get(reason))
        say(f"{reason}{counted and f', {counted}'}: {meaning(reason)}")
    say("")
    rows = [[name, number(value)] for name, value in flat({**result, "parts": None}) if value not in (None, "")]
    short = cache(lambda: _short(client, [result]))
    show(
        table(["field", "value"], rows),
        lambda: table(["field", "value"], [[name, short().get(value, value)] for name, value in rows]),
    )


TASKS: Columns = {
    "task": lambda task: task["digest"][:12],
    "kind": lambda task: task["kind"],
    "part": lambda task: ", ".join(task["roles"]),
    "state": lambda task: task["state"],
    "attempt": lambda task: str(task["attempt"]),
    "reason": lambda task: task["reason"] or "",
}


def _show_job(client: Client, job: Json, as_json: bool) -> None:
    if as_json:
        return print_json(job)
    _show(jobs_table, client, [job], "jobs")
    say("")
    return show(table_of(TASKS, job["tasks"]))
