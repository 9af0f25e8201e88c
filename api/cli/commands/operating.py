"""`doctor` and `gc`: check the installation, and delete bytes that nothing needs."""

from typing import Annotated

import typer

from api.cli.commands.options import AsJson, Home, print_json, settings_of, whole_number
from api.client.render import err, out, say, show, table

EPILOG = "Exit codes: 0 all is well (also with warnings); 1 a check failed, or an error; 2 bad usage."
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor(home: Home = None, as_json: AsJson = False) -> None:
    """Check database, schema, artifacts, disks, clocks, Ray, its nodes, their GPUs and data; say what to do."""
    from service.operations.doctor import examine

    checks = []
    with err.status("looking at Ray takes some seconds"):
        for check in examine(settings_of(home=home)):
            checks.append(check)
            if not as_json:
                out.print(f"{check.state:<5}", end="", style=COLOURS[check.state])
                line = f"{check.name}: {check.said}" + (f" -> {check.advice}" if check.advice else "")
                out.print(line, soft_wrap=True)
    failed = sum(check.state == "fail" for check in checks)
    if as_json:
        print_json({"ok": not failed, "checks": [check.as_json() for check in checks]})
    raise typer.Exit(1 if failed else 0)


def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and change nothing.")] = False,
    age: Annotated[
        float | None, typer.Option("--age", help="Seconds that unreferenced bytes stay [UNCANNY_GC_AGE_SECONDS].")
    ] = None,
    quota: Annotated[
        int | None,
        typer.Option(
            "--quota",
            metavar="N",
            parser=whole_number(0),
            help="Bytes under the artifact root [UNCANNY_ARTIFACT_QUOTA_BYTES].",
        ),
    ] = None,
    event_days: Annotated[
        float | None, typer.Option("--event-days", help="How long events are kept [UNCANNY_EVENT_DAYS].")
    ] = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Delete bytes that nothing refers to, useless epoch states, old events, leftovers. Safe while the service runs."""
    from service.lab.artifact_root import of_database
    from service.operations.housekeeping import Policy, collect
    from service.store import Database

    settings = settings_of(home=home, gc_age_seconds=age, artifact_quota_bytes=quota, event_days=event_days)
    database = Database(settings.database)
    database.check_schema()
    report = collect(
        database, of_database(database, settings.artifacts), Policy.of(settings), home=settings.home, dry_run=dry_run
    )
    database.close()
    if as_json:
        return print_json(report.as_json())
    piles = ("unreferenced", "epoch_states", "arrays", "events", "leftovers", "kept")
    cells = [
        [name, str(pile.count), f"{pile.size_bytes / 1e6:.1f}"] for name in piles for pile in [getattr(report, name)]
    ]
    show(table(["would go" if dry_run else "gone", "count", "MB"], cells))
    if report.over_quota_bytes:
        say(f"Still {report.over_quota_bytes / 1e6:.1f} MB over the quota: all that is left is needed.")
    return None
