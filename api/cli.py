"""`uncanny`: the commands. Exit codes: 0 done, 1 failed, 2 bad usage or a refused spec, 3 nobody answers."""

import sys

import typer

from api.client import ApiError, Unreachable
from api.commands import (
    access,
    asking,
    changing,
    checkpoints,
    exporting,
    operating,
    reading,
    serving,
    storing,
    submitting,
)
from api.commands.options import BadUsage
from api.demo import demo
from service.errors import InvalidSpec, UncannyError

EPILOG = "Exit codes: 0 done; 1 failed jobs or an error; 2 bad usage or a refused spec; 3 no service answers."
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
    changing.explain,
    changing.queue,
    reading.jobs,
    reading.sweeps,
    reading.results,
    asking.aggregate,
    asking.leaderboard,
    asking.compare,
    asking.correlations,
    exporting.report,
    exporting.export,
    exporting.verify,
    asking.retract,
):
    app.command(epilog=EPILOG)(command)
for operation in (operating.doctor, operating.gc):
    app.command(epilog=operating.EPILOG)(operation)
app.add_typer(storing.data, name="data")
app.add_typer(storing.db, name="db")
app.add_typer(checkpoints.checkpoint, name="checkpoint")
app.add_typer(access.user, name="user")
app.add_typer(access.token, name="token")


def main() -> None:
    try:
        app()
    except UncannyError as error:
        print(f"uncanny: {error}", file=sys.stderr)
        sys.exit(exit_code(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("api", "service", "workers"):
            raise
        whole = "this needs more than the client: pip install 'uncanny-bench[service]'"
        print(f"uncanny: {error.name} is not installed; {whole}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)


def exit_code(error: UncannyError) -> int:
    refused = isinstance(error, ApiError) and error.status in (400, 413, 422)
    if refused or isinstance(error, (BadUsage, InvalidSpec)):
        return 2
    return 3 if isinstance(error, Unreachable) else 1


if __name__ == "__main__":
    main()
