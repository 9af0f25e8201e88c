"""`checkpoint`: registered weights, which were made elsewhere, and the weights of trainings."""

from pathlib import Path
from typing import Annotated

import typer

from api.cli.commands.options import EPILOG, AsJson, BadUsage, Home, Url, client_of, print_json
from api.client.render import say, show, table

checkpoint = typer.Typer(help="Weights: made elsewhere, or by trainings.", no_args_is_help=True, epilog=EPILOG)
TRAINED = [
    "weights_sha256",
    "architecture",
    "dataset",
    "recipe",
    "seed",
    "replicate",
    "test_accuracy",
    "jobs",
    "retracted_by",
]
PerChannel = Annotated[list[float] | None, typer.Option(help="One number a channel; give the option once for each.")]


@checkpoint.command("add", epilog=EPILOG)
def add(
    name: Annotated[str, typer.Argument(help="Jobs say `checkpoint: NAME` in place of recipe and seed.")],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A state dict as safetensors; pickles are refused.")],
    architecture: Annotated[str, typer.Option(help="As in the catalogue.")],
    dataset: Annotated[str, typer.Option(help="Whose images and classes the network is for.")],
    key: Annotated[
        list[str] | None, typer.Option(metavar="OLD=NEW", help="A prefix of the file's names and ours, as `module.=`.")
    ] = None,
    mean: PerChannel = None,
    std: PerChannel = None,
    expected_clean_accuracy: Annotated[
        float | None, typer.Option(help="On all test images, as in 0.95; jobs fail where it is another.")
    ] = None,
    tolerance: Annotated[float | None, typer.Option(help="How far from it is near enough; 0.01 when left out.")] = None,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Upload weights, check them against a known architecture, and register them."""
    pairs = [item.partition("=") for item in key or []]
    if not all(equals for _, equals, _ in pairs):
        raise BadUsage("--key is of the form OLD=NEW, as in `--key module.=`")
    keys = {old: new for old, _, new in pairs}
    expected = {"expected_clean_accuracy": expected_clean_accuracy, "tolerance": tolerance}
    with client_of(home, url) as client:
        row = client.register_checkpoint(
            name,
            file,
            architecture=architecture,
            dataset=dataset,
            keys=keys,
            mean=mean or [],
            std=std or [],
            **{option: value for option, value in expected.items() if value is not None},
        )
    if as_json:
        return print_json(row)
    say(f"{name}: {row['architecture']} with {row['parameters']:,} parameters for {row['classes']} classes.")
    if row["stripped_prefix"]:
        say(f"All names of its tensors began with `{row['stripped_prefix']}`, which was stripped.")
    if row["converted_from"]:
        say(f"Converted from {', '.join(row['converted_from'])} to float32.")
    return say(f"Use it as `checkpoint: {name}` in place of recipe and seed.")


@checkpoint.command("list", epilog=EPILOG)
def list_all(
    trained: Annotated[bool, typer.Option(help="Those that trainings made, instead of the registered ones.")] = False,
    architecture: Annotated[str | None, typer.Option(help="Only of this architecture.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Only of this data set.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Only of this recipe, with --trained.")] = None,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List the registered checkpoints, or the trained networks; jobs name either as `checkpoint`."""
    if recipe is not None and not trained:
        raise BadUsage("--recipe is for --trained: registered weights have none")
    options = {"architecture": architecture, "dataset": dataset, "recipe": recipe}
    filters = {name: value for name, value in options.items() if value is not None}
    with client_of(home, url) as client:
        rows = list(client.networks(**filters)) if trained else client.checkpoints()
    if not trained:
        rows = [row for row in rows if all(row[name] == value for name, value in filters.items())]
    if as_json:
        return print_json(rows)
    columns = TRAINED if trained else ["name", "architecture", "dataset", "classes", "parameters", "created_by"]
    return show(table(columns, [[_shown(row[name]) for name in columns] for row in rows]))


def _shown(value: object) -> str:
    if value is None:
        return ""
    return str(value["name"] if isinstance(value, dict) else value)
