"""`serve`, and its halves for a cluster: `api` and `dispatch`. Slow imports are inside the commands that need them."""

import importlib
import json
import os
import signal
import sys
import threading
import time
from functools import partial
from typing import Annotated

import typer

from api.binding import check_bind, listen
from api.cli.commands.options import AsJson, Auth, Home, Host, Insecure, Port, print_line, settings_of
from api.client.render import err
from service import logs, private
from service.processes import SignalSafeEvent

SAME_SIGNAL_SECONDS = 0.3  # two signals so close together are one Ctrl-C


def serve(
    home: Home = None,
    host: Host = None,
    port: Port = None,
    auth: Auth = None,
    insecure: Insecure = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Logs to the terminal, not to files.")] = False,
    when_needed: Annotated[
        bool, typer.Option("--when-needed", help="Start Ray and the dispatcher only once there is a task to do.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the whole service: API, dispatcher and, unless RAY_ADDRESS names a cluster, a local Ray. Ctrl-C stops it."""
    from api.serve.supervisor import Supervisor

    private.be_private()
    settings = settings_of(home=home, host=host, port=port, auth=auth, insecure=insecure)

    def say(sentence: str) -> None:
        err.print(sentence, soft_wrap=True)

    supervisor = Supervisor(settings, say, verbose=verbose, when_needed=when_needed)
    stop, hurry = SignalSafeEvent(), SignalSafeEvent()
    for which in (signal.SIGTERM, signal.SIGINT):
        signal.signal(which, partial(_on_signal, stop, hurry, []))
    if as_json:
        print_line(
            {"url": supervisor.url, "docs": f"{supervisor.url}/docs", "home": str(settings.home), "pid": os.getpid()}
        )
    say(f"Uncanny answers at {supervisor.url} (documentation: {supervisor.url}/docs); jobs are accepted from now on.")
    say(f"Home is {settings.home}" + ("" if verbose else f", logs are in {settings.logs}") + ". Ctrl-C stops it.")
    supervisor.run(stop, hurry)
    say("Stopped. What was accepted is kept and goes on when it is started again.")


def _on_signal(stop: threading.Event, hurry: threading.Event, times: list[float], *_: object) -> None:
    """The first signal stops the service, a second one hurries it. Under `uv run` each Ctrl-C arrives twice."""
    times.append(time.monotonic())
    stop.set()
    if times[-1] - times[0] > SAME_SIGNAL_SECONDS:
        hurry.set()


def api(home: Home = None, host: Host = None, port: Port = None, auth: Auth = None, insecure: Insecure = None) -> None:
    """Run the API alone; a dispatcher elsewhere works on the same database (UNCANNY_DATABASE_URL)."""
    from api.serve import server
    from service.operations.upgrading import prepare_store

    logs.configure("plain")
    private.be_private()
    settings = settings_of(home=home, host=host, port=port, auth=auth, insecure=insecure)
    if closed := private.tighten(settings):
        err.print(closed, soft_wrap=True)
    check_bind(settings)
    prepare_store(settings)
    server.serve(settings, listen(settings.host, settings.port))


def dispatch(home: Home = None) -> None:
    """Run the dispatcher alone: it hands tasks to the Ray cluster at RAY_ADDRESS, or to a local Ray."""
    importlib.import_module("service.store")  # fails here, with its own message, if only the client is installed
    environment = {**os.environ, **settings_of(home=home).environment()}
    os.execve(sys.executable, [sys.executable, "-m", "workers.dispatch"], environment)


def openapi() -> None:
    """Print the OpenAPI document of the API, sorted, so that a difference between two is a change."""
    from api.http.app import create_app

    json.dump(create_app(settings_of()).openapi(), sys.stdout, indent=1, sort_keys=True, ensure_ascii=False)
    sys.stdout.write("\n")
