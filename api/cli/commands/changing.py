"""Change submitted jobs and sweeps: `cancel`, `retry`, `pause`, `resume`, `extend`, `priority`, `boost`.

`explain` and `queue` show which jobs wait, and why.
"""

from typing import Annotated

import typer

from api.cli import written
from api.cli.commands.options import AsJson, BadUsage, Home, Url, client_of, print_json, whole_number
from api.client import Json
from api.client.render import Columns, counted, say, show, table_of

Ident = Annotated[str, typer.Argument(metavar="ID", help="A job or a sweep.")]
SweepIdent = Annotated[str, typer.Argument(metavar="ID", help="A sweep.")]
SweepOrAll = Annotated[
    str | None, typer.Argument(metavar="[ID]", help="A sweep; the whole queue without it, for everybody.")
]


def cancel(ident: Ident, home: Home = None, url: Url = None, as_json: AsJson = False) -> None:
    """Cancel a job, or the jobs of a sweep that have not ended."""
    with client_of(home, url) as client:
        _report(client.cancel(ident), "cancelled", as_json)


def retry(
    ident: Ident,
    states: Annotated[
        str, typer.Option(metavar="STATE[,STATE ...]", help="Of a sweep: those that are failed, held, cancelled.")
    ] = "failed",
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Run a job again that failed, is held or was cancelled, or the failed ones of a sweep; what succeeded is kept."""
    chosen = states.split(",")
    with client_of(home, url) as client:
        retried = client.retry(ident, states=chosen)
    _report(retried, "retried", as_json)
    left = {state: n for state, n in retried.get("states", {}).items() if n and state not in chosen}
    if left and not as_json:
        counts = " and ".join(f"{n} {state}" for state, n in left.items())
        say(f"{counts} stay so: `uncanny retry {ident} --states {','.join(left)}` takes them")


def pause(ident: SweepOrAll = None, home: Home = None, url: Url = None, as_json: AsJson = False) -> None:
    """Start nothing more for a sweep, or for anybody; what runs is finished."""
    with client_of(home, url) as client:
        _report_pause(client.pause(ident), ident, "is paused: what runs is finished, nothing more is started", as_json)


def resume(ident: SweepOrAll = None, home: Home = None, url: Url = None, as_json: AsJson = False) -> None:
    """Let a paused sweep, or the paused queue, go on."""
    with client_of(home, url) as client:
        _report_pause(client.resume(ident), ident, "goes on", as_json)


def extend(
    ident: SweepIdent,
    axes: Annotated[
        list[str], typer.Argument(metavar="AXIS=VALUE[,VALUE ...] ...", help="Values to add, as scale=100,200.")
    ],
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Add values to axes of a sweep's grid; only the new cells are computed."""
    grid = {}
    for item in axes:
        axis, equals, text = item.partition("=")
        try:
            values = written.read(f"[{text}]")
        except ValueError:
            values = None
        if not axis or not equals or not isinstance(values, list) or not values:
            raise BadUsage(f"{item!r} is not of the form AXIS=VALUE,VALUE")
        grid[axis] = values
    with client_of(home, url) as client:
        extended = client.extend(ident, grid)
    if as_json:
        return print_json(extended)
    made = ", ".join(f"{n} {kind}" for kind, n in extended["to_compute"].items() if n) or "nothing"
    return say(f"{counted(extended['jobs'], 'new job')} in sweep {ident}; to compute: {made}")


def priority(
    ident: Ident,
    value: Annotated[
        int,
        typer.Argument(metavar="N", parser=whole_number(-100, 100), help="-100 to 100. Higher goes first; 0 is usual."),
    ],
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Change the priority of a job, or of a sweep and its live jobs, among your own. Negative: `priority ID -- -5`."""
    with client_of(home, url) as client:
        changed = client.change(ident, priority=value)
    return print_json(changed) if as_json else say(f"{ident} has priority {changed['priority']}")


def boost(
    ident: Ident,
    off: Annotated[bool, typer.Option("--off", help="Let it wait for its owner's turn again.")] = False,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Let a job, or the live jobs of a sweep, go before all other users' work (for admins)."""
    with client_of(home, url) as client:
        _report(client.boost(ident, boosted=not off), "goes in turn again" if off else "boosted", as_json)


def explain(
    ident: Annotated[str, typer.Argument(metavar="ID", help="A job.")],
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Say why a job is not running, and what comes before it."""
    with client_of(home, url) as client:
        explained = client.explain(ident)
    if as_json:
        return print_json(explained)
    say(f"{ident}: {explained['sentence']}")
    if explained["tasks"]:
        show(table_of(WHY, explained["tasks"]))
    return None


def queue(home: Home = None, url: Url = None, as_json: AsJson = False) -> None:
    """Show the queue: how much waits and runs, whether it is paused, and each user's share."""
    with client_of(home, url) as client:
        status = client.queue()
    if as_json:
        return print_json(status)
    say(f"paused by {status['paused_by']}" if status["paused"] else "the queue goes on")
    say("jobs: " + (", ".join(f"{n} {state}" for state, n in sorted(status["jobs"].items())) or "none"))
    return show(table_of(USERS, status["users"]))


WHY: Columns = {
    "kind": lambda task: task["kind"],
    "state": lambda task: task["state"],
    "why": lambda task: task["sentence"],
}
USERS: Columns = {
    "user": lambda user: user["user"],
    "weight": lambda user: f"{user['weight']:g}",
    "device seconds": lambda user: f"{user['device_seconds']:.0f}",
    "devices in use": lambda user: f"{user['gpus_in_use']:g}",
    "GPUs at most": lambda user: "" if user["max_gpus"] is None else f"{user['max_gpus']:g}",
    "waits": lambda user: "yes" if user["waiting"] else "",
}


def _report(changed: Json, verb: str, as_json: bool) -> None:
    if as_json:
        return print_json(changed)
    of_sweep = f"{counted(changed['jobs'], 'job')} of sweep " if "jobs" in changed else "job "
    say(f"{of_sweep}{changed['id']} {verb}")
    return None


def _report_pause(answer: Json, ident: str | None, verb: str, as_json: bool) -> None:
    return print_json(answer) if as_json else say(f"{f'sweep {ident}' if ident else 'the queue'} {verb}")
