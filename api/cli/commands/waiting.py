"""Say why a job or a sweep waits while a command follows it, because a silent wait looks like work."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from api.client import Client
from api.client.render import tell
from service.errors import UncannyError

FIRST_SECONDS, POLL_INTERVAL_SECONDS = 3.0, 5.0
LIVE = ("running", "queued")


@contextmanager
def reasons_told(
    url: str,
    noun: str,
    ident: str,
    *,
    first_seconds: float = FIRST_SECONDS,
    every_seconds: float = POLL_INTERVAL_SECONDS,
) -> Iterator[None]:
    """Print the sentence of `explain` on stderr while nothing runs, and again when its words change."""
    stop = threading.Event()
    thread = threading.Thread(
        target=_tell, args=(stop, url, noun, ident, first_seconds, every_seconds), name="reasons", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()


def _tell(stop: threading.Event, url: str, noun: str, ident: str, first_seconds: float, every_seconds: float) -> None:
    last_words, wait = "", first_seconds
    with Client(url, patience_seconds=0) as client:
        while not stop.wait(wait):
            wait = every_seconds
            with suppress(UncannyError):  # the command itself reports an error that persists
                sentence = _reason(client, noun, ident)
                words = re.sub("[0-9]+", "", sentence)  # numbers change all the time
                if sentence and words != last_words and not stop.is_set():
                    last_words = words
                    tell(sentence)


def _reason(client: Client, noun: str, ident: str) -> str:
    """Why no task runs of the job, or of the sweep's first job that has not ended; empty if one runs."""
    job_id = ident if noun == "job" else _live_job(client, ident)
    if job_id is None:
        return ""
    explained = client.explain(job_id)
    waits = explained["state"] in LIVE and all(task["state"] != "running" for task in explained["tasks"])
    return f"{job_id}: {explained['sentence']}" if waits else ""


def _live_job(client: Client, sweep_id: str) -> str | None:
    for state in LIVE:
        for job in client.jobs(sweep=sweep_id, state=state, sort="created_at", limit=1):
            return str(job["id"])
    return None
