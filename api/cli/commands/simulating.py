"""`simulate`: a load of jobs in virtual time, on the cluster there is or on another one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from api.cli.commands.options import AsJson, BadUsage, Home, print_json, settings_of
from api.cli.commands.submitting import is_sweep, read_spec
from api.client.render import err, say, show, table
from service.errors import InvalidSpec

if TYPE_CHECKING:
    from service.operations.simulation import Load, Nodes, Submission
    from service.operations.simulation_report import Report
    from service.operations.what_if import Lab
    from service.settings import Settings
    from service.specs import JobSpec

CPUS_PER_GPU = 4  # of nodes that are made up
MOST_GPUS = 100_000
WHO = "somebody"  # who submits the files if no user is named


Files = Annotated[list[Path] | None, typer.Argument(metavar="FILE", help="Sweeps to submit.")]
Users = Annotated[
    list[str] | None,
    typer.Option("--user", metavar="NAME=WEIGHT", help="Who submits them; several take them in turn."),
]
FromStore = Annotated[
    bool, typer.Option("--from-store", help="Take what is unfinished in the store, its cluster and its timings.")
]
Gpus = Annotated[str | None, typer.Option("--gpus", metavar="N|+N", help="GPUs, or that many more.")]
Cpus = Annotated[
    float | None,
    typer.Option("--cpus", min=1, max=10 * MOST_GPUS, help=f"CPUs of these GPUs' nodes [{CPUS_PER_GPU} for each GPU]."),
]
Weights = Annotated[
    list[str] | None, typer.Option("--weight", metavar="NAME=WEIGHT", help="What if that were a user's weight?")
]
Seconds = Annotated[
    list[str] | None,
    typer.Option("--seconds", metavar="KIND=SECONDS", help="How long a task runs that has no timings yet."),
]


def simulate(
    files: Files = None,
    user: Users = None,
    from_store: FromStore = False,
    gpus: Gpus = None,
    cpus: Cpus = None,
    weight: Weights = None,
    seconds: Seconds = None,
    home: Home = None,
    as_json: AsJson = False,
) -> None:
    """Say when a load of jobs would be done and who would get what, without running it. Nothing is changed."""
    from service.operations.simulation import simulate

    if not files and not from_store:
        raise BadUsage("say what to simulate: files with sweeps, or --from-store for what is unfinished now")
    settings = settings_of(home=home)
    lab = _lab(settings, _lengths(seconds), from_store)
    load = _load(lab, settings, files or [], _numbers("--user", user), _numbers("--weight", weight))
    nodes = _nodes(lab.nodes, gpus, cpus)
    try:
        with err.status("simulating"):
            report = simulate(load, nodes, lab.lengths, settings)
    except InvalidSpec as error:
        raise BadUsage(f"it cannot be simulated: {error}") from None
    finally:
        if load.planning is not None:
            load.planning.close()
    assumed = {str(like): count for like, count in lab.lengths.assumed.items()}
    if as_json:
        return print_json({**report.as_json(), "assumed": assumed})
    return _show(report, assumed)


def _lab(settings: "Settings", stated: Mapping[str, float], from_store: bool) -> "Lab":
    """The lab of the settings, or an empty one."""
    from service.operations.simulation import Load
    from service.operations.what_if import STATED_SECONDS, Lab, TaskLengths, lab_of
    from service.store import Database

    lengths = {kind: stated.get(kind, seconds) for kind, seconds in STATED_SECONDS.items()}
    if not from_store:
        return Lab(Load([]), None, TaskLengths(lengths))
    database = Database(settings.database)
    database.check_schema()
    try:
        lab = lab_of(database, settings, lengths)
    except InvalidSpec as error:
        raise BadUsage(f"the store has a job that this version refuses: {error}") from None
    return lab


def _load(
    lab: "Lab", settings: "Settings", files: Sequence[Path], users: dict[str, float], weights: dict[str, float]
) -> "Load":
    """What the lab has and the files add, with these users' weights."""
    from service.model.scheduling import Account

    submissions = [*lab.load.submissions, *_submissions(files, list(users) or [WHO])]
    if not submissions:
        raise BadUsage("there is nothing to simulate: all jobs of the store have ended, or their sweeps are paused")
    known = lab.load.users
    there = {submission.user for submission in submissions}
    if unknown := weights.keys() - there:
        raise BadUsage(
            f"--weight: {', '.join(sorted(unknown))} has submitted nothing (users: {', '.join(sorted(there))})"
        )
    default = Account(weight=settings.weight, max_gpus=settings.max_gpus)
    accounts: dict[str, Account] = {}
    for name in sorted(there):
        own = known.get(name, default)
        accounts[name] = replace(own, weight=weights.get(name, users.get(name, own.weight)))
    return replace(lab.load, submissions=submissions, users=accounts)


def _submissions(files: Sequence[Path], users: Sequence[str]) -> "list[Submission]":
    """File by file and user by user in turn, until each has had a turn.

    A sweep that several users submit is a sweep of its own for each of them: its networks are trained independently.
    """
    from service.operations.simulation import Submission

    cells = [_sweep(file) for file in files]
    made = []
    for turn in range(max(len(files), len(users)) if files else 0):
        jobs, priority = cells[turn % len(files)]
        again = turn // len(files)
        own = [job.model_copy(update={"replicate": job.replicate + again}) for job in jobs] if again else jobs
        made.append(Submission(0.0, users[turn % len(users)], own, priority))
    return made


def _sweep(file: Path) -> "tuple[Sequence[JobSpec], int]":
    """The cells of the sweep in a file, or its one job, and their priority."""
    from pydantic import ValidationError

    from service.specs import JobSpec, Sweep, problems

    spec = read_spec(file)
    try:
        if not is_sweep(spec):
            return [JobSpec.model_validate(spec)], 0
        sweep = Sweep.model_validate(spec)
        return sweep.cells(), sweep.priority
    except ValidationError as error:
        raise BadUsage(f"{file}: {InvalidSpec(problems(error))}") from None
    except InvalidSpec as error:
        raise BadUsage(f"{file}: {error}") from None


def _nodes(nodes: "Nodes | None", gpus: str | None, cpus: float | None) -> "Nodes":
    """The cluster there is, with so many GPUs more, or another one."""
    from service.operations.simulation import nodes_with

    if gpus is None:
        if nodes is None or cpus is not None:
            there = "" if nodes is not None else ", for no dispatcher has reported a cluster to this store"
            raise BadUsage(f"say how many GPUs the cluster has, as --gpus 8{there}")
        return nodes
    more = gpus.startswith("+")
    count = _number("--gpus", gpus.removeprefix("+"), least=0.0)
    if count > MOST_GPUS:
        raise BadUsage(f"--gpus: a cluster of {count:,.0f} GPUs is too large (at most {MOST_GPUS:,})")
    made = nodes_with(
        count, cpus if cpus is not None else max(1.0, CPUS_PER_GPU * count), name="new" if more else "node"
    )
    if not more:
        return made
    if nodes is None:
        raise BadUsage(f"--gpus {gpus} adds to a cluster, and there is none: write --gpus {gpus.removeprefix('+')}")
    return {**nodes, **made}


def _lengths(options: Sequence[str] | None) -> dict[str, float]:
    from service.settings import KINDS

    stated = _numbers("--seconds", options)
    if unknown := stated.keys() - {*KINDS}:
        raise BadUsage(f"--seconds: {', '.join(sorted(unknown))} is no kind of task (kinds: {', '.join(KINDS)})")
    return stated


def _numbers(option: str, pairs: Sequence[str] | None) -> dict[str, float]:
    """`["ann=2", "bob=1"]` as `{"ann": 2.0, "bob": 1.0}`."""
    numbers: dict[str, float] = {}
    for pair in pairs or ():
        name, equals, value = pair.rpartition("=")
        if not name or not equals:
            raise BadUsage(f"{option}: {pair!r} is not of the form NAME=NUMBER")
        if name in numbers:
            raise BadUsage(f"{option}: {name} is there twice")
        numbers[name] = _number(option, value)
    return numbers


def _number(option: str, text: str, least: float | None = None) -> float:
    """A finite number above 0, or not below `least`."""
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    fits = number > 0 if least is None else number >= least
    if not fits or number == float("inf"):
        allowed = "above 0" if least is None else f"of at least {least:g}"
        raise BadUsage(f"{option}: {text!r} is no number {allowed}")
    return number


def _show(report: "Report", assumed: Mapping[str, int]) -> None:
    for line in report.lines():
        say(line)
    if assumed:
        tasks, named = sum(assumed.values()), ", ".join(list(assumed)[:3])
        say(f"Stated lengths were taken for {tasks:,} tasks, of which there are no timings: {named} ... (--seconds)")
    cells = [
        [
            *(user.name, f"{user.weight:g}", f"{user.tasks:,}", f"{user.device_seconds:,.0f}"),
            *(
                _percent(user.share),
                _percent(user.due),
                _hours(user.longest_wait_seconds),
                _hours(user.done_at_seconds),
            ),
        ]
        for user in report.users
    ]
    show(table(("user", "weight", "tasks", "device s", "share", "due", "longest wait", "done after"), cells))


def _hours(seconds: float | None) -> str:
    from service.operations.simulation_report import duration

    return "–" if seconds is None else duration(seconds)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
