"""`report`, `export` and `verify`: results as Markdown, as files, and as snapshots that need no service."""

from pathlib import Path
from typing import Annotated

import typer

from api.cli import snapshots
from api.cli.commands.options import (
    FAILED,
    AsJson,
    BadUsage,
    Filter,
    Filters,
    Home,
    Retracted,
    Url,
    client_of,
    filters_of,
    print_json,
)
from api.cli.report import report as report_of
from api.client.questions import ENDINGS, whole
from api.client.render import say, tell

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder made by `uncanny export --snapshot DIR`.")]


def report(
    filters: Filters = None,
    filter: Filter = "",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write it to this file.")] = None,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Results as Markdown: a table per attack, and what the verdicts found; with a sweep's ID alone, of that sweep."""
    spelled_out = [f"sweep={filters[0]}"] if filters and len(filters) == 1 and "=" not in filters[0] else filters
    with client_of(home, url) as client:
        made = report_of(client, filter or None, **filters_of(spelled_out))
    if output is not None:
        with whole(output) as partial:
            partial.write_text(made.as_markdown(), encoding="utf-8")
    if as_json:
        return print_json(made.as_json())
    return say(made.as_markdown() if output is None else f"{output}: {len(made.groups)} rows")


def export(
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Ends in .csv, .ndjson or .parquet.")] = "",
    filters: Filters = None,
    filter: Filter = "",
    snapshot: Annotated[
        Path | None, typer.Option("--snapshot", help="Freeze the rows in this new folder, with checksums and specs.")
    ] = None,
    fields: Annotated[str, typer.Option("--fields", help="Comma-separated names of the columns; `*` for all.")] = "",
    sort: Annotated[str, typer.Option("--sort", help="Fields; `-` in front for descending.")] = "-created_at",
    include_retracted: Retracted = False,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Write every result that matches to FILE as it streams, or freeze them all with --snapshot DIR."""
    if snapshot is not None:
        every = [*([file] if file else []), *(filters or [])]
        if fields:
            raise BadUsage("a snapshot has all fields: leave --fields out")
        with client_of(home, url) as client:
            made = snapshots.freeze(client, snapshot, filter, include_retracted=include_retracted, **filters_of(every))
        text = f"Froze {made['results']} results in {snapshot}, checksum {made['sha256']}."
        return print_json({"path": str(snapshot), **made}) if as_json else say(text)
    if not file.endswith(ENDINGS):
        raise BadUsage(f"say which file to write, ending in {', '.join(ENDINGS)}, or --snapshot DIR")
    options = {"sort": sort, "fields": fields, "include_retracted": include_retracted, **filters_of(filters)}
    with client_of(home, url) as client:
        path = client.export(file, filter, **options)
        if not as_json and (hidden := client.results(filter, **options).retracted):
            tell(f"{hidden:,} retracted results are left out (--include-retracted takes them along).")
    size_bytes = path.stat().st_size
    return print_json({"file": str(path), "size_bytes": size_bytes}) if as_json else say(f"{path}: {size_bytes} bytes")


def verify(folder: Folder, as_json: AsJson = False) -> None:
    """Check a snapshot, without any service: exit code 1 where a file is changed, missing or was added."""
    verified = snapshots.verify(folder)
    if as_json:
        print_json({"path": str(folder), "sha256": verified.sha256, "wrong": verified.wrong})
    elif verified.wrong:
        say("\n".join(verified.wrong))
    else:
        say(f"{folder} is as it was frozen: {verified.files} files, checksum {verified.sha256}.")
    raise typer.Exit(FAILED if verified.wrong else 0)
