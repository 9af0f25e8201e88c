"""`checkpoint`: weights made elsewhere."""

from pathlib import Path
from typing import Annotated

import typer

from api.commands.options import EPILOG, AsJson, BadUsage, Home, Url, client_of, print_json
from api.render import say, show, table

checkpoint = typer.Typer(help="Weights made elsewhere.", no_args_is_help=True, epilog=EPILOG)
PerChannel = Annotated[list[float] | None, typer.Option(help="One number a channel; give the option once for each.")]


@checkpoint.command("add", epilog=EPILOG)
def add(
    name: Annotated[str, typer.Argument(help="Jobs say `recipe: {name: imported, checkpoint: NAME}`.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A state dict as safetensors; pickles are refused.")],
    architecture: Annotated[str, typer.Option(help="As in the catalogue.")],
    dataset: Annotated[str, typer.Option(help="Whose images and classes the network is for.")],
    key: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="A prefix of the file's names and ours, as `module.=`.")
    ] = None,
    mean: PerChannel = None,
    std: PerChannel = None,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Upload weights, check them against a known architecture, and register them."""
    pairs = [item.partition("=") for item in key or []]
    if not all(equals for _, equals, _ in pairs):
        raise BadUsage("--key is of the form OLD=NEW, as in `--key module.=`")
    keys = {old: new for old, _, new in pairs}
    with client_of(home, url) as client:
        found = client.register_checkpoint(
            name, file, architecture=architecture, dataset=dataset, keys=keys, mean=mean or [], std=std or []
        )
    if as_json:
        return print_json(found)
    say(f"{name}: {found['architecture']} with {found['parameters']:,} parameters for {found['classes']} classes.")
    return say(f"Use it as `recipe: {{name: imported, checkpoint: {name}}}`.")


@checkpoint.command("list", epilog=EPILOG)
def list_all(home: Home = None, url: Url = None, as_json: AsJson = False) -> None:
    """List the registered checkpoints."""
    with client_of(home, url) as client:
        rows = client.checkpoints()
    if as_json:
        return print_json(rows)
    columns = ["name", "architecture", "dataset", "classes", "parameters", "created_by"]
    return show(table(columns, [[str(row[name]) for name in columns] for row in rows]))
