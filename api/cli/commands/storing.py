"""`data`, `artifacts` and `db`: the lab's own data sets, the artifact root, schema and backup of the database."""

from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from api.cli.commands.options import EPILOG, AsJson, Home, Url, client_of, print_json, settings_of
from api.client.render import err, say, show, table
from service.errors import SchemaOutdated

if TYPE_CHECKING:
    from service.store import Database

DB_EPILOG = "Exit codes: 0 done; 1 an error; 2 bad usage."
STATUS_EPILOG = "Exit codes: 0 the schema is this version's; 1 it is not, or an error; 2 bad usage."
data = typer.Typer(help="Data sets of your own.", no_args_is_help=True, epilog=EPILOG)
artifacts = typer.Typer(help="The artifact root.", no_args_is_help=True, epilog=DB_EPILOG)
db = typer.Typer(help="The database: its schema, backup and restore.", no_args_is_help=True, epilog=DB_EPILOG)


@data.command("add", epilog=EPILOG)
def add_data(
    name: Annotated[str, typer.Argument(help="It is used as npz:NAME.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="With train.npz and test.npz: x uint8 NHWC, y int64.")],
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Upload a folder with train.npz and test.npz and register it."""
    with client_of(home, url) as client:
        dataset = client.register_dataset(name, folder)
    if as_json:
        return print_json(dataset)
    shape = f"{dataset['channels']}x{dataset['height']}x{dataset['width']}"
    counts = f"{dataset['train_count']} training and {dataset['test_count']} test images"
    registered_as, classes = dataset["name"], dataset["classes"]
    say(f"{registered_as}: {counts} of {shape}, {classes} classes. Use it as `dataset: {registered_as}`.")
    if both := dataset["test_images_in_train"]:
        of_all = f"{both} of the {dataset['test_count']} test images"
        say(f"{of_all} are training images too: an accuracy on them says little.")
    return None


@data.command("list", epilog=EPILOG)
def list_data(home: Home = None, url: Url = None, as_json: AsJson = False) -> None:
    """List the registered data sets."""
    with client_of(home, url) as client:
        rows = client.datasets()
    if as_json:
        return print_json(rows)
    columns = ["name", "channels", "height", "width", "classes", "train_count", "test_count", "created_by"]
    return show(table(columns, [[str(row[name]) for name in columns] for row in rows]))


@artifacts.command("adopt", epilog=DB_EPILOG)
def adopt(home: Home = None, as_json: AsJson = False) -> None:
    """Accept the folder of UNCANNY_ARTIFACT_ROOT as the artifact root, where an operator has moved or restored it."""
    from service.lab.artifact_root import adopt as accept

    with closing(_database(home)) as database:
        made = accept(database, settings_of(home=home).artifacts)
    if as_json:
        return print_json(asdict(made))
    say(f"{made.root} is the artifact root from now on: {len(made.missing)} of {made.named} artifacts are not in it")
    return None


@db.command("upgrade", epilog=DB_EPILOG)
def upgrade(home: Home = None, as_json: AsJson = False) -> None:
    """Bring the database up to this version: its schema and its verdicts. Make a backup first."""
    from service.operations import upgrading

    database = _database(home)
    before = database.revision() if _exists(database) else None
    done = upgrading.upgrade(database)
    after = database.revision()
    if as_json:
        url = database.engine.url.render_as_string()
        return print_json({"database": url, "before": before, "schema": after, **asdict(done)})
    say(f"schema {before or 'none'} -> {after}")
    if done.judged:
        say(f"{done.judged:,} results were judged again, {done.changed:,} of them have another verdict than before")
    return None


@db.command("status", epilog=STATUS_EPILOG)
def status(home: Home = None, as_json: AsJson = False) -> None:
    """Say which schema the database has; exit code 1 where it is not this version's."""
    database = _database(home)
    revision, sentence, current = None, "there is no database yet: run `uncanny db upgrade`", False
    if _exists(database):
        revision = database.revision()
        try:
            database.check_schema()
            sentence, current = f"the database has schema {revision}, which is this version's", True
        except SchemaOutdated as error:
            sentence = str(error)
    if as_json:
        print_json({"database": database.engine.url.render_as_string(), "schema": revision, "current": current})
    else:
        say(sentence)
    raise typer.Exit(0 if current else 1)


@db.command("backup", epilog=DB_EPILOG)
def backup(
    target: Annotated[Path, typer.Argument(metavar="FILE", help="A new file, or a folder for one named by the time.")],
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Write all rows of the database, the index of artifacts among them, into one file. Safe while the service runs."""
    from service.operations.backup import backup as write

    settings = settings_of(home=home)
    with closing(_database(home)) as database, err.status("reading the database"):
        made = write(database, target)
    if as_json:
        return print_json(asdict(made))
    say(f"{made.path}: {sum(made.rows.values()):,} rows, schema {made.schema}. Now copy {settings.artifacts}.")
    return None


@db.command("restore", epilog=DB_EPILOG)
def restore(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="What `uncanny db backup` has written.")],
    replace: Annotated[bool, typer.Option("--replace", help="Delete what the database has now.")] = False,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Put a backup into an empty database, of either kind. Stop the service first."""
    from service.lab.artifacts import Artifacts
    from service.operations.backup import restore as put_back

    root = Artifacts(settings_of(home=home).artifacts)
    with closing(_database(home)) as database, err.status("reading the backup"):
        made = put_back(database, root, source, replace=replace)
    if as_json:
        return print_json(asdict(made))
    then = datetime.fromtimestamp(made.made_at, UTC)
    say(f"{sum(made.rows.values()):,} rows are back, as they were at {then:%F %T} UTC.")
    if made.missing_artifacts:
        say(f"{len(made.missing_artifacts)} artifacts are not under {root.root}, so copy them there:")
        for digest in made.missing_artifacts:
            say(f"  {digest}")
    if not made.is_root:
        say(
            f"{root.root} is not the artifact root of the backup: put that one there, with its `.root`, or accept "
            "this one with `uncanny artifacts adopt`."
        )
    return None


def _database(home: Path | None) -> "Database":
    from service.store import Database  # slow to import, so not for every command

    return Database(settings_of(home=home).database)


def _exists(database: "Database") -> bool:
    """Whether there is a database. Opening a missing SQLite file would make one."""
    path = database.engine.url.database
    return not database.is_sqlite or (path is not None and Path(path).exists())
