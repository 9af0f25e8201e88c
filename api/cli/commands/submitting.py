"""`submit` and `watch`."""

import sys
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from api.cli import written
from api.cli.commands.options import (
    FAILED,
    AsJson,
    BadUsage,
    Home,
    Url,
    client_of,
    print_json,
    print_line,
    program,
)
from api.cli.commands.waiting import reasons_told
from api.client import ENDED, SWEEP_FIELDS, ApiError, Client, Event, Job, Json, Sweep
from api.client.render import attack_name, counted, number, say, sweep_progress, tell

STDIN = Path("-")
NAMED_FAILURES = 5  # failed cells of a sweep that are named


def submit(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A job or a sweep, as YAML or JSON; `-` is stdin.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would mean.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for the end; exit code 1 if a job failed.")] = False,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Submit a job or a sweep."""
    spec = read_spec(file)
    with client_of(home, url) as client:
        if dry_run:
            return _show_preview(client, spec, as_json)
        submitted = client.sweep(spec) if is_sweep(spec) else client.submit(spec)
        if not as_json:
            _say_accepted(submitted, next_commands=not wait)
        if wait:
            client.reach_seconds = client.patience_seconds  # a restart of the service does not end a wait of hours
            return _wait(submitted, str(spec.get("name", file.name)), as_json)
    return print_json(submitted.accepted) if as_json else None


def watch(
    ident: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="A job or a sweep; everything without it.")
    ] = None,
    home: Home = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Follow what happens, until the job or sweep has ended (exit code 1 if it failed) or Ctrl-C."""
    with client_of(home, url) as client:
        kind, status = _look(client, ident) if ident else ("", {"state": ""})
        client.reach_seconds = client.patience_seconds  # a restart of the service does not end a wait of hours
        events = partial(client.events, job=ident if kind == "job" else None, sweep=ident if kind == "sweep" else None)
        last_id: int | None = None
        if status["state"] not in ENDED:
            with reasons_told(client.url, kind, status["id"]) if ident else nullcontext():
                for event in events():
                    _show_event(event, as_json)
                    last_id = event.id or last_id
                    if ident and event.kind.startswith("job."):
                        _, status = _look(client, ident)
                        if status["state"] in ENDED:
                            break
        if ident:  # the events since then, or all of them
            for event in events(after=last_id, follow=False):
                _show_event(event, as_json)
    if not as_json and ident:
        say(f"{kind} {ident} is {status['state']}")
    raise typer.Exit(0 if status["state"] in ("", "succeeded") else FAILED)


def read_spec(file: Path) -> Json:
    """The mapping in a file, or in stdin for `-`, in UTF-8 in every locale. Raises `BadUsage` for anything else."""
    try:
        content = sys.stdin.buffer.read() if file == STDIN else file.read_bytes()
        spec = written.read(content.decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadUsage(f"cannot read {file}: {error}") from None
    except ValueError as error:
        raise BadUsage(f"{file}: {error}") from None
    if not isinstance(spec, dict):
        raise BadUsage(f"{file} must hold one job or one sweep, as a mapping")
    return spec


def is_sweep(spec: Json) -> bool:
    return bool(SWEEP_FIELDS & set(spec))


def _show_preview(client: Client, spec: Json, as_json: bool) -> None:
    preview = client.dry_run(spec)
    if as_json:
        return print_json(preview)
    estimate, quota = preview["estimate"], preview["quota"]
    needs = "needs" if preview["jobs"] == 1 else "need"
    say(f"{counted(preview['jobs'], 'job')}{_repeated(preview)} {needs} {_counted(preview['tasks'])}.")
    say(f"To compute: {_counted(preview['to_compute'])}; known: {_counted(preview['known'])}.")
    say(f"Under way for others: {_counted(preview['under_way'])}.")
    if estimate["reason"]:
        say(f"Device seconds: unknown ({estimate['reason']}).")
    else:
        say(f"Device seconds: {estimate['device_seconds_p50']:.0f} (90 %: {estimate['device_seconds_p90']:.0f}).")
    if estimate["eta_seconds"] is None:
        say(f"Done in: unknown ({estimate['eta_reason']}).")
    else:
        say(f"Done in: about {estimate['eta_seconds']:.0f} s ({estimate['eta_reason']}).")
    if quota["max_queued_jobs"] is not None:
        fits = "" if quota["fits"] else ": it would be refused"
        say(f"Quota: {quota['unfinished_jobs_after']} of {quota['max_queued_jobs']} jobs{fits}.")
    return say("Nothing was submitted.")


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in counts.items() if n) or "nothing"


def _repeated(counts: Json) -> str:
    return f" ({counted(counts['repetitions'], 'repetition')} dropped)" if counts["repetitions"] else ""


def _say_accepted(submitted: Job | Sweep, *, next_commands: bool = True) -> None:
    noun = "sweep" if isinstance(submitted, Sweep) else "job"
    say(f"Accepted {noun} {submitted.id}.")
    if isinstance(submitted, Sweep):
        done = submitted.accepted
        say(f"{counted(done['jobs'], 'job')}{_repeated(done)}.")
        say(f"To compute: {_counted(done['to_compute'])}; known: {_counted(done['known'])}.")
    if next_commands:
        which = f"sweep={submitted.id}" if noun == "sweep" else f"{submitted.id}"
        say(f"Next: {program()} watch {submitted.id}\n      {program()} results {which}")


def _wait(submitted: Job | Sweep, name: str, as_json: bool) -> None:
    try:
        noun = "sweep" if isinstance(submitted, Sweep) else "job"
        with sweep_progress(name) as progress, reasons_told(submitted.client.url, noun, submitted.id):
            status = submitted.wait(progress)
    except KeyboardInterrupt:
        tell(f"Interrupted; the work goes on. Follow it: {program()} watch {submitted.id}")
        raise
    succeeded = status["state"] == "succeeded"
    if isinstance(submitted, Sweep) and not succeeded:
        for job in islice(
            submitted.client.jobs(sweep=submitted.id, state="failed", limit=NAMED_FAILURES), NAMED_FAILURES
        ):
            tell(f"failed: {_cell(job['spec'])} (job {job['id']}): {job['reason']}")
    if as_json:
        print_json(status)
    else:
        say(f"{submitted.id} {status['state']}" + (f": {status['reason']}" if status.get("reason") else ""))
        is_a_sweep = isinstance(submitted, Sweep)
        say(f"Next: {program()} results {'sweep=' if is_a_sweep else ''}{submitted.id}")
        if not succeeded:
            say(f"      {program()} jobs {f'sweep={submitted.id} state=failed' if is_a_sweep else submitted.id}")
            say(f"      {program()} retry {submitted.id}")
    raise typer.Exit(0 if succeeded else FAILED)


def _cell(spec: Json) -> str:
    """The job as a person would name it."""
    scale, attack = number(spec["scale"]), attack_name(spec["attack"])
    return f"{spec['architecture']} on {spec['dataset']}, scale {scale}, {attack}, seed {spec['seed']}"


def _look(client: Client, ident: str) -> tuple[str, Json]:
    try:
        return "job", client.job(ident)
    except ApiError as error:
        if error.status != 404:
            raise
    try:
        return "sweep", client.get_sweep(ident)
    except ApiError as error:
        if error.status != 404:
            raise
        problem = {**error.problem, "detail": f"there is no job and no sweep {ident}"}
        raise ApiError(error.status, problem) from None


def _show_event(event: Event, as_json: bool) -> None:
    if as_json:
        return print_line({"id": event.id, "event": event.kind, "data": event.data})
    data = event.data
    if event.kind == "gap":
        return tell(f"Events {data['from']} to {data['to']} are not kept any more (UNCANNY_EVENT_DAYS).")
    if event.kind == "progress":
        numbers = {name: value for name, value in data["detail"].items() if isinstance(value, (int, float))}
        detail = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        return say(f"{'':12} {data['kind']} {data['digest'][:10]} {100 * data['progress']:3.0f} % {detail}")
    subject = data["job_id"] or data["task_id"] or data["sweep_id"] or ""
    more = ", ".join(f"{name} {value}" for name, value in data["data"].items() if isinstance(value, (str, int, float)))
    return say(f"{data['at'][11:23]} {event.kind:18} {subject} {more}")
