"""`uncanny demo`: starts the service, runs a sweep over HTTP on a real Ray, and prints a table of robustness."""

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.status import Status
from rich.table import Table

from api import home as homes
from api.binding import listen
from api.cli.commands.options import AsJson, Home, Port, print_json, program, settings_of
from api.client import ApiError, Client, Json, Unreachable
from api.client.render import err, number, percent, say, show, sweep_progress, table, tell
from service import private
from service.errors import UncannyError
from service.processes import die_with_parent
from service.settings import Settings

START_SECONDS = 60.0
SCALES = [0.25, 0.5, 1, 2.5, 5, 10, 50]
ATTACKS: list[Json] = [
    {"type": "pgd", "norm": "l2", "eps": 0.5, "step_size": 0.05, "steps": 20},
    {"type": "pgd", "norm": "linf", "eps": 0.1, "step_size": 0.02, "steps": 10},
]
SWEEP: Json = {
    "name": "demo",
    "base": {"dataset": "digits", "samples": 500, "recipe": {"name": "standard", "epochs": 10}},
    "grid": {"architecture": ["simple_cnn", "mlp"], "attack": ATTACKS, "scale": SCALES},
}


class DemoFailed(UncannyError):
    """The demo's sweep did not succeed."""


def demo(
    home: Home = None,
    port: Port = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the service up until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train two small networks on scikit-learn's scans of digits, scale them, attack them, and print the table."""
    settings = settings_of(home=home, port=port)
    running = homes.running_url(settings)
    began = time.monotonic()
    with _service(settings, running) as url, Client(url) as client:
        while_it_runs = "" if keep or running is not None else ", as long as this runs"
        tell(f"The API answers at {url}{while_it_runs}; its documentation is {url}/docs")
        sweep = client.sweep(SWEEP)
        with sweep_progress("demo") as progress:
            status = sweep.wait(progress)
        seconds = time.monotonic() - began
        rows = list(sweep.results(limit=1000))
        if as_json:
            print_json({"sweep": status, "accepted": sweep.accepted, "seconds": round(seconds, 1), "results": rows})
        else:
            for architecture in SWEEP["grid"]["architecture"]:
                show(_table(architecture, rows))
                say("")
            _say_what_was_computed(sweep.accepted, seconds, running is None)
        if status["state"] != "succeeded":
            failed = next(iter(client.jobs(sweep=sweep.id, state="failed", limit=1)), {})
            raise DemoFailed(f"the demo's sweep is {status['state']}: {failed.get('reason') or 'see `uncanny jobs`'}")
        if not as_json:
            _say_what_next(url, sweep.id, keep or running is not None, home, port)
        if keep and running is None:
            _until_interrupted(url)


@contextmanager
def _service(settings: Settings, running: str | None) -> Iterator[str]:
    """The service of this home: the one that runs already, or one that runs for as long as the demo."""
    if running is not None:
        tell(f"Using the service that runs at {running}.")
        yield running
        return
    listen(settings.host, settings.port).close()  # so that a port in use is an error here, and not in a log
    private.folder(private.folder(settings.home) / settings.logs.name)
    command = [sys.executable, "-m", "api.cli", "serve", "--home", str(settings.home), "--port", str(settings.port)]
    has_store = settings.database_url or (settings.home / "uncanny.db").exists()
    command += ["--when-needed"] if has_store else []  # with stored numbers Ray may not be needed
    with private.opened(settings.logs / "serve.log", "ab") as log:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent(),
        )
    try:
        with Status("Starting the service ...", console=err):
            url = _wait_until_up(settings, server)
        yield url
    finally:
        if server.poll() is None:
            with Status("Stopping the service ...", console=err):
                server.send_signal(signal.SIGTERM)
                server.wait()


def _wait_until_up(settings: Settings, server: subprocess.Popen[bytes]) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        url = homes.running_url(settings)
        if url is not None:
            try:
                with Client(url, patience_seconds=START_SECONDS) as client:
                    client.ready()
                return url
            except (Unreachable, ApiError):
                pass
        time.sleep(0.1)
    log = settings.logs / "serve.log"
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
    raise DemoFailed(f"the service did not start ({last[0]}); its logs are in {settings.logs}")


def _table(architecture: str, rows: list[Json]) -> Table:
    cells = {(row["scale"], row["attack"]["norm"]): row for row in rows if row["architecture"] == architecture}
    lines = []
    for scale in SCALES:
        pair = [cells.get((scale, norm), {}) for norm in ("l2", "linf")]
        either = pair[0] or pair[1]
        if not either:
            continue
        lines.append(
            [
                number(float(scale)),
                _in_percent(either["clean_accuracy"]),
                *(_in_percent(row.get("robust_accuracy")) for row in pair),
                number(either.get("log_relative_sharpness_median")),
                _in_percent(either["zero_gradient_fraction"]),
                *(_in_percent(row.get("masked_fraction")) for row in pair),
                *(row.get("verdict") or "–" for row in pair),
            ]
        )
    # The headings are narrow enough for 80 columns.
    columns = ["scale", "clean\n%", "robust\nl2 %", "robust\nlinf %", "median\nlog\nsharpness", "zero\ngrad.\n%"]
    columns += ["masked\nl2 %", "masked\nlinf %", "verdict\nl2", "verdict\nlinf"]
    l2_eps, linf_eps = (number(attack["eps"]) for attack in ATTACKS)
    return table(columns, lines, f"{architecture} on digits, PGD l2 (eps {l2_eps}) and linf (eps {linf_eps})")


def _in_percent(value: float | None) -> str:
    return percent(value).removesuffix(" %")


def _say_what_was_computed(accepted: Json, seconds: float, own_service: bool) -> None:
    reused = sum(accepted["known"].values())
    new = dict(accepted["to_compute"])
    trainings, others = new.pop("train", 0), sum(new.values())
    took = f"{accepted['jobs']} jobs in {seconds:.1f} s{', the start of the service included' if own_service else ''}"
    if trainings or others or accepted["under_way"]:
        sentence = f"{took}: {trainings} trainings and {others} other tasks computed, {reused} known before."
    else:
        trainings = accepted["known"]["train"]
        without = " without starting Ray" if own_service else ""
        others = reused - trainings
        sentence = f"{took}, from the store{without}: all {trainings} trainings and {others} other tasks were known."
    say(sentence)
    say("Scaling changes no prediction, so the true robust accuracy is the same at every scale:")
    say("where it seems to rise, the attack has grown weak or gone blind, and where that is much, the verdict says so.")


def _say_what_next(url: str, sweep_id: str, stays_up: bool, home: Path | None, port: int | None) -> None:
    uncanny = program()
    at_home = f" --home {shlex.quote(str(home))}" if home else ""
    at_port = f" --port {port}" if port else ""
    say(f"\nDocumentation of the API: {url}/docs" + ("" if stays_up else f" (while `{uncanny} serve` runs)"))
    say("Next:")
    if not stays_up:
        say(f"  {uncanny} serve{at_home}{at_port}       # and then, in another terminal:")
    say(f"  {uncanny} results sweep={sweep_id} --sort -robust_accuracy{at_home}")
    say(f"  {uncanny} submit examples/quick.yaml --wait{at_home}")
    say(f"  curl '{url}/v1/results?scale=50'")


def _until_interrupted(url: str) -> None:
    err.print(f"\nThe service stays up at {url}. Ctrl-C stops it.")
    with suppress(KeyboardInterrupt):
        signal.pause()
