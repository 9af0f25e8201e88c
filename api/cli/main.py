"""`uncanny`: the commands. Exit codes: 0 done, 1 failed, 2 bad usage, 3 no service answers, 4 refused.

If the reader of a pipe closes it early, the exit code is 0.
"""

import sys

import typer

from api.cli.commands import (
    access,
    asking,
    catalog,
    changing,
    checkpoints,
    exporting,
    operating,
    reading,
    serving,
    simulating,
    storing,
    submitting,
)
from api.cli.commands.options import EPILOG, BadUsage, print_json
from api.cli.demo import demo
from api.client import ApiError, Unreachable
from api.client.terminal import plain, spoken_to
from service.errors import InvalidSpec, UncannyError

app = typer.Typer(
    help="Do flat minima make networks robust? A benchmark service.",
    epilog=EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
    demo,
    serving.serve,
    serving.api,
    serving.dispatch,
    serving.openapi,
    submitting.submit,
    submitting.watch,
    changing.cancel,
    changing.retry,
    changing.pause,
    changing.resume,
    changing.extend,
    changing.priority,
    changing.boost,
    changing.explain,
    changing.queue,
    reading.jobs,
    reading.sweeps,
    reading.results,
    catalog.catalog,
    asking.aggregate,
    asking.leaderboard,
    asking.worst_cases,
    asking.compare,
    asking.correlations,
    exporting.report,
    exporting.export,
    exporting.verify,
    asking.retract,
    simulating.simulate,
):
    app.command(epilog=EPILOG)(command)
for operation in (operating.doctor, operating.gc):
    app.command(epilog=operating.EPILOG)(operation)
app.add_typer(storing.data, name="data")
app.add_typer(storing.db, name="db")
app.add_typer(storing.artifacts, name="artifacts")
app.add_typer(checkpoints.checkpoint, name="checkpoint")
app.add_typer(access.user, name="user")
app.add_typer(access.token, name="token")


def main() -> None:
    with spoken_to(sys.stdout, sys.stderr):
        _run()


def _run() -> None:
    try:
        app()
    except UncannyError as error:
        if isinstance(error, ApiError) and "--json" in sys.argv:
            print_json(error.problem)
        print(f"uncanny: {plain(str(error))}", file=sys.stderr)
        sys.exit(exit_code(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("api", "service", "workers"):
            raise
        whole = "this needs more than the client: install uncanny-bench with its extra `service`"
        print(f"uncanny: {error.name} is not installed; {whole}", file=sys.stderr)
        sys.exit(1)


def exit_code(error: UncannyError) -> int:
    match error:
        case BadUsage():
            return 2
        case Unreachable():
            return 3
        case InvalidSpec():
            return 4
        case ApiError(status=status) if 400 <= status < 500:
            return 4
        case _:
            return 1
