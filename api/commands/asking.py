"""`aggregate`, `leaderboard`, `compare`, `correlations`, `retract`: questions to all results at once."""

from typing import Annotated, Any

import typer

from api.client import Json
from api.commands.options import (
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
from api.render import attack_name, fields_table, number, percent, percents, say, show, table, tell
from service.dotted import flat
from service.unit import Unit

FAILED = 1
COUNTED = {
    "networks": "n is the number of trained networks: repeats of one are averaged first.",
    "attack_seeds": "n is the number of attack seeds: the spread is that of the attack on one network.",
}
Trusted = Annotated[bool, typer.Option("--trusted/--any-verdict", help="Only results with the verdict `trusted`.")]


def aggregate(
    filters: Filters = None,
    filter: Filter = "",
    by: Annotated[str, typer.Option("--by", help="Fields by comma; without, all is one group.")] = "",
    metrics: Annotated[str, typer.Option("--metrics", help="As robust_accuracy:mean,ci95,clean_accuracy:median.")] = "",
    unit: Annotated[
        Unit, typer.Option("--unit", help="What is counted: networks, or attack seeds of one.")
    ] = "network",
    allow_mixed: Annotated[bool, typer.Option("--allow-mixed", help="Let a group differ in more than seeds.")] = False,
    include_retracted: Retracted = False,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Statistics over groups of results, as `uncanny aggregate dataset=digits --by architecture,scale,attack`."""
    with client_of(home, url) as client:
        found = client.aggregate(
            by,
            metrics,
            filter,
            unit=unit,
            allow_mixed=allow_mixed,
            include_retracted=include_retracted,
            **filters_of(filters),
        )
    if as_json:
        return print_json(found.items)
    if not found.items:
        return tell("No results match.")
    show(fields_table(found.flat()))
    return say(f"\n{COUNTED[found.spread_of]}")


def leaderboard(
    filters: Filters = None,
    filter: Filter = "",
    scale: Annotated[str, typer.Option("--scale", help="Of this scale, or `all`.")] = "1",
    trusted: Trusted = True,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Networks by robust accuracy, as `uncanny leaderboard attack=pgd_linf dataset=digits`."""
    asked: dict[str, Any] = {**filters_of(filters), **({"filter": filter} if filter else {})}
    with client_of(home, url) as client:
        boards = client.leaderboard(scale=scale, trusted=trusted, **asked)
    if as_json:
        return print_json(boards)
    for board in boards:
        title = f"{board['dataset']}, {board['preset'] or attack_name(board['attack'])}, {board['samples']} samples"
        columns = ["rank", "architecture", "recipe", "scale", "seeds", "robust", "95 %", "clean"]
        differs = _differing([dict(flat(row["recipe"])) for row in board["rows"]])
        show(table(columns, [_place(row, differs) for row in board["rows"]], title))
        say("")
    if not boards:
        _tell_nothing(trusted)
    return None


def compare(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB JOB ...", help="Ids of two or more results.")],
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Results side by side: what differs, whether they break the same examples, and the worst case over all."""
    with client_of(home, url) as client:
        found = client.compare(*jobs)
    if as_json:
        return print_json(found)
    differing = [[name, *map(number, values)] for name, values in found["differing"].items()]
    show(table(["differs", *(row["job_id"] for row in found["results"])], differing))
    say("")
    columns = ["a", "b", "only_a", "only_b", "difference", "difference_low", "difference_high", "p_value"]
    show(fields_table([{name: pair[name] for name in columns} for pair in found["pairs"]]))
    say("")
    if found["union"] is None:
        say(f"No worst case over all of them: {found['union_refused']}.")
    else:
        say(f"Robust against all of them: {percent(found['union']['robust_accuracy'])}.")
    return None


def correlations(
    measure: Annotated[str, typer.Argument(help="A number, such as log_relative_sharpness_median.")],
    filters: Filters = None,
    filter: Filter = "",
    trusted: Trusted = True,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Does a measure rank networks as their robust accuracy does? Kendall's tau, one point per network at s = 1."""
    asked: dict[str, Any] = {**filters_of(filters), **({"filter": filter} if filter else {})}
    with client_of(home, url) as client:
        found = client.correlations(measure, trusted=trusted, **asked)
    if as_json:
        return print_json(found)
    rows = [
        {"dataset": row["dataset"], "attack": attack_name(row["attack"]), "samples": row["samples"], **_tau(row)}
        for row in found
    ]
    if not rows:
        return _tell_nothing(trusted)
    show(fields_table(rows))
    say("\nFewer than ten networks give no tau; over_scales is " + found[0]["over_scales"]["note"] + ".")
    return None


def retract(
    job: Annotated[str, typer.Argument(metavar="[JOB]", help="Id of a result.")] = "",
    reason: Annotated[str, typer.Option("--reason", help="Why; it is shown with the result.")] = "",
    filter: Filter = "",
    rerun: Annotated[bool, typer.Option("--rerun", help="Compute them again, as another replicate.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take the retraction of JOB back.")] = False,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Hide a result, or all that --filter chooses, from now on. Nothing is deleted."""
    if undo and (filter or not job):
        raise BadUsage("--undo takes the id of one result, and no --filter")
    if bool(job) == bool(filter):
        raise BadUsage("give the id of one result, or --filter")
    if not (reason or undo):
        raise BadUsage("say why: --reason TEXT")
    with client_of(home, url) as client:
        done = client.restore(job) if undo else client.retract(job, reason, filter=filter, rerun=rerun)
    if as_json:
        print_json(done)
    else:
        for what, job_ids in done.items():
            if job_ids:
                say(f"{what}: {', '.join(job_ids)}")
    if not any(done.values()):
        tell("No result that is shown matches.")
        raise typer.Exit(FAILED)


def _tell_nothing(trusted: bool) -> None:
    tell("No trusted results match (--any-verdict takes all)." if trusted else "No results match.")


def _differing(recipes: list[Json]) -> list[str]:
    """The parameters in which these recipes, if they have the same name, are not all the same."""
    names = dict.fromkeys(name for recipe in recipes for name in recipe if name != "name")
    return [
        name
        for name in names
        if any(
            one["name"] == other["name"] and one.get(name) != other.get(name) for one in recipes for other in recipes
        )
    ]


def _place(row: Json, differing: list[str]) -> list[str]:
    recipe = dict(flat(row["recipe"]))
    shown = [recipe["name"], *(f"{name} {number(recipe[name])}" for name in differing if name in recipe)]
    interval = percents(row["ci95_low"], row["ci95_high"])
    return [
        str(row["rank"]), row["architecture"], ", ".join(shown), number(row["scale"]), str(row["seeds"]),
        percent(row["robust_accuracy"]), interval, percent(row["clean_accuracy"]),
    ]  # fmt: skip


def _tau(row: Json) -> Json:
    left = {"dataset", "attack", "samples", "version", "measure_version"}
    found = {name: value for name, value in row.items() if name not in left}
    return {name: value for name, value in flat(found) if isinstance(value, (int, float, type(None)))}
