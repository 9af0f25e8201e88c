"""The home folder as processes share it: a lock for one service at a time, and a note of its address."""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import IO, TypedDict

import psutil

from service import private
from service.errors import UncannyError
from service.settings import Settings

CHILDREN_STOP_SECONDS = 40.0  # the children of a killed supervisor get so long to stop
CLOCK_TOLERANCE_SECONDS = 5.0  # setting the clock moves the time at which a process began


class Note(TypedDict):
    """The address of a home's service, and its process."""

    url: str
    pid: int
    process_began_at: float


class AlreadyServing(UncannyError):
    """Another process serves this home."""


def lock(settings: Settings) -> IO[str]:
    """The home's lock: it is held while the file is open here, or in a child process that inherited it.

    Waits for the children of a supervisor that was killed. Raises `AlreadyServing`.
    """
    file = private.opened(private.folder(settings.home) / "serve.lock", "a+")
    deadline = time.monotonic() + CHILDREN_STOP_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            note = _note(settings)
            if (note is not None and _serves(note)) or time.monotonic() > deadline:
                by = f"{note['url']} (process {note['pid']})" if note else "an unknown address (process unknown)"
                raise AlreadyServing(
                    f"{settings.home} is already served at {by}: use that one, stop it, or take another --home"
                ) from None
            time.sleep(0.2)


def announce(settings: Settings, url: str) -> None:
    """Write the note with the address of this home's service."""
    path = _path(settings)
    me = psutil.Process()
    note: Note = {"url": url, "pid": me.pid, "process_began_at": me.create_time()}
    with private.opened(path.with_suffix(".new"), "w") as file:
        json.dump(note, file)
    os.replace(path.with_suffix(".new"), path)


def forget(settings: Settings) -> None:
    _path(settings).unlink(missing_ok=True)


def running_url(settings: Settings) -> str | None:
    """The address of this home's service; None if none runs."""
    note = _note(settings)
    return note["url"] if note is not None and _serves(note) else None


def service_url(settings: Settings) -> str:
    """The address that a client uses: the setting `url`, else that of the home's service, else the usual port."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return (settings.url or running_url(settings) or f"http://{host}:{settings.port}").rstrip("/")


def _path(settings: Settings) -> Path:
    return settings.home / "serve.json"


def _note(settings: Settings) -> Note | None:
    try:
        note = json.loads(_path(settings).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(note, dict) or not note.keys() >= Note.__required_keys__:
        return None
    return Note(url=note["url"], pid=note["pid"], process_began_at=note["process_began_at"])


def _serves(note: Note) -> bool:
    """Whether the process that wrote the note still runs. Another process may have its number by now."""
    try:
        process = psutil.Process(int(note["pid"]))
        began_at = process.create_time()
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
    except psutil.Error:
        return False
    return abs(began_at - float(note["process_began_at"])) < CLOCK_TOLERANCE_SECONDS
