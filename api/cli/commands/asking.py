"""`aggregate`, `leaderboard`, `compare`, `correlations`, `retract`: questions about many results at once."""

from typing import Annotated

import typer

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
from api.client import Json
from api.client.render import (
    Columns,
    attack_name,
    fields_table,
    number,
    percent,
    percents,
    say,
    show,
    table,
    table_of,
    tell,
)
from service.model.dotted import flat
from service.model.unit import Unit

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
        statistics = client.aggregate(
            by,
            metrics,
            filter,
            unit=unit,
            allow_mixed=allow_mixed,
            include_retracted=include_retracted,
            **filters_of(filters),
        )
    if as_json:
        return print_json(statistics.items)
    if statistics.retracted:
        tell(f"{statistics.retracted:,} retracted results are not counted (--include-retracted counts them).")
    if not statistics.items:
        return tell("No results match.")
    show(fields_table(statistics.flat()))
    return say(f"\n{COUNTED[statistics.spread_of]}")


def leaderboard(
    filters: Filters = None,
    filter: Filter = "",
    scale: Annotated[str, typer.Option("--scale", help="Of this scale, or `all`.")] = "1",
    trusted: Trusted = True,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Networks by their worst case over all stored attacks, as `uncanny leaderboard dataset=digits norm=linf`."""
    conditions = _conditions(filters, filter)
    with client_of(home, url) as client:
        boards = client.leaderboard(scale=scale, trusted=trusted, **conditions)
    if as_json:
        return print_json(boards)
    for board in boards:
        attacked = f", with {board['preset'] or board['attack']['type']}" if board["attack"] else ""
        title = f"{board['dataset']}, {board['threat_model']}{attacked}, {board['samples']} samples"
        show(table_of(_board_columns(board["rows"]), board["rows"], title))
        say("")
    if not boards:
        _tell_nothing(trusted)
    return None


def worst_cases(
    filters: Filters = None,
    filter: Filter = "",
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """The worst case of each network over all stored attacks of a threat model, which are named."""
    conditions = _conditions(filters, filter)
    with client_of(home, url) as client:
        rows = client.worst_cases(**conditions)
    if as_json:
        return print_json(rows)
    if not rows:
        return tell("No results match.")
    show(table_of(WORST_CASES, rows))
    return None


def compare(
    jobs: Annotated[list[str], typer.Argument(metavar="JOB JOB ...", help="Ids of two or more results.")],
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Results side by side: what differs, whether they break the same examples, and the worst case over all."""
    with client_of(home, url) as client:
        comparison = client.compare(*jobs)
        short = client.short_ids(row["job_id"] for row in comparison["results"]) if not as_json else {}
    if as_json:
        return print_json(comparison)
    differing = [[name, *map(number, values)] for name, values in comparison["differing"].items()]
    ids = [row["job_id"] for row in comparison["results"]]
    show(
        table(["differs", *ids], differing),
        lambda: table(["differs", *(short.get(ident, ident) for ident in ids)], differing),
    )
    say("")
    columns = ["a", "b", "only_a", "only_b", "difference", "difference_low", "difference_high", "p_value"]
    pairs = [{name: pair[name] for name in columns} for pair in comparison["pairs"]]
    show(fields_table(pairs), lambda: fields_table(pairs, short))
    say("")
    if comparison["union"] is None:
        say(f"No worst case over all of them: {comparison['union_refused']}.")
    else:
        say(f"Robust against all of them: {percent(comparison['union']['robust_accuracy'])}.")
        for job_id, reason in comparison["union"]["left_out"].items():
            say(f"Left out, because it proves nothing: {job_id} ({reason}).")
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
    conditions = _conditions(filters, filter)
    with client_of(home, url) as client:
        items = client.correlations(measure, trusted=trusted, **conditions)
    if as_json:
        return print_json(items)
    rows = [
        {"dataset": row["dataset"], "attack": attack_name(row["attack"]), "samples": row["samples"], **_tau(row)}
        for row in items
    ]
    if not rows:
        return _tell_nothing(trusted)
    show(fields_table(rows))
    say("\nFewer than ten networks give no tau; over_scales is " + items[0]["over_scales"]["note"] + ".")
    return None


def retract(
    job: Annotated[str, typer.Argument(metavar="[JOB]", help="Id of a result.")] = "",
    reason: Annotated[str, typer.Option("--reason", help="Why; it is shown with the result.")] = "",
    filter: Filter = "",
    training: Annotated[str, typer.Option("--training", help="All that rests on the training of this job.")] = "",
    task: Annotated[str, typer.Option("--task", help="All that rests on this task.")] = "",
    measure: Annotated[str, typer.Option("--measure", help="With --filter: only this measure's numbers.")] = "",
    rerun: Annotated[bool, typer.Option("--rerun", help="Compute them again.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Take such a retraction back.")] = False,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Hide a result, all that --filter chooses, or all that rests on a training, from now on. Nothing is deleted."""
    if sum(map(bool, (job, filter, training, task))) != 1:
        raise BadUsage("give one of: the id of a result, --filter, --training JOB, --task ID")
    if measure and not filter:
        raise BadUsage("--measure needs --filter")
    if undo and (reason or rerun):
        raise BadUsage("--undo takes no --reason and no --rerun")
    if not (reason or undo):
        raise BadUsage("say why: --reason TEXT")
    which: dict[str, str] = {"filter": filter, "training": training, "task": task, "measure": measure}
    with client_of(home, url) as client:
        done = client.restore(job, **which) if undo else client.retract(job, reason, rerun=rerun, **which)
    if as_json:
        print_json(done)
    else:
        _say_changes(done)
    if not any(done.values()):
        tell("No retracted result matches." if undo else "No result that is shown matches.")
        raise typer.Exit(FAILED)


def _say_changes(done: Json) -> None:
    """Print which results are hidden or shown again, and how many tasks."""
    for change in ("retracted", "restored", "resubmitted", "unmeasured", "measured"):
        if done.get(change):
            say(f"{change}: {', '.join(done[change])}")
    if done.get("tasks"):
        say(f"tasks: {len(done['tasks']):,}")
    if done.get("replanned"):
        say(f"{done['replanned']:,} jobs that had not ended get a new generation of these tasks.")
    if done.get("still_registered"):
        names = ", ".join(done["still_registered"])
        say(f"The same weights are registered as {names}: what names them so stays, and is not hidden.")
    if done.get("superseded"):
        say(f"{len(done['superseded']):,} of the tasks are joined by no new job: there is a newer generation.")


def _conditions(filters: list[str] | None, filter: str) -> Json:
    return {**filters_of(filters), **({"filter": filter} if filter else {})}


def _tell_nothing(trusted: bool) -> None:
    tell("No trusted results match (--any-verdict takes all)." if trusted else "No results match.")


def _differing(recipes: list[Json]) -> list[str]:
    """The parameters in which recipes of the same name differ."""
    names = dict.fromkeys(name for recipe in recipes for name in recipe if name != "name")
    return [
        name
        for name in names
        if any(
            recipe["name"] == other["name"] and recipe.get(name) != other.get(name)
            for recipe in recipes
            for other in recipes
        )
    ]


def _board_columns(rows: list[Json]) -> Columns:
    """The columns of a leaderboard. Recipes are shown with the parameters in which those of one name differ."""
    differing = _differing([dict(flat(row["recipe"])) for row in rows])
    return {
        "rank": lambda row: str(row["rank"]),
        "architecture": lambda row: row["architecture"],
        "recipe": lambda row: _recipe(row, differing),
        "scale": lambda row: number(row["scale"]),
        "networks": lambda row: str(row["networks"]),
        "results": lambda row: str(row["results"]),
        "worst case": lambda row: percent(row["robust_accuracy_worst_case"]),
        "95 %": lambda row: _interval(row) + (" of images" if row["ci95_of"] == "images" else ""),
        "attacks": _attacks,
        "robust": lambda row: percent(row["robust_accuracy"]),
        "clean": lambda row: percent(row["clean_accuracy"]),
        "flags": _flags,
    }


def _recipe(row: Json, differing: list[str]) -> str:
    recipe = dict(flat(row["recipe"]))
    return ", ".join([recipe["name"], *(f"{name} {number(recipe[name])}" for name in differing if name in recipe)])


def _interval(row: Json) -> str:
    return percents(row["ci95_low"], row["ci95_high"])


def _flags(row: Json) -> str:
    return ", ".join(row["flags"])


def _attacks(row: Json) -> str:
    """The number of attacks, and of those that not every network of the row has met."""
    partly = sum(attack["networks"] < row["networks"] for attack in row["attacks"])
    return str(len(row["attacks"])) + (f", {partly} not on all" if partly else "")


def _attack_names(row: Json) -> str:
    names = ", ".join(attack["preset"] or attack["attack"]["type"] for attack in row["attacks"])
    return f"{row['attack_count']}: {names}"


WORST_CASES: Columns = {
    "network": lambda row: row["weights_sha256"][:12],
    "architecture": lambda row: row["architecture"],
    "recipe": lambda row: row["recipe"]["name"],
    "dataset": lambda row: row["dataset"],
    "threat model": lambda row: row["threat_model"],
    "scale": lambda row: number(row["scale"]),
    "worst case": lambda row: percent(row["robust_accuracy_worst_case"]),
    "95 %": _interval,
    "attacks": _attack_names,
    "flags": _flags,
}


def _tau(row: Json) -> Json:
    left_out = {"dataset", "attack", "samples", "version", "measure_version"}
    shown = {name: value for name, value in row.items() if name not in left_out}
    return {name: value for name, value in flat(shown) if isinstance(value, (int, float, type(None)))}
