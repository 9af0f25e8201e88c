"""`uncanny serve`: API, dispatcher and Ray head as child processes, started again when they die, stopped together.

The supervisor holds the listening socket, so connections wait while the API is started again, and the home's lock,
which its children inherit: a new service of this home starts when the last process of the old one is gone.
"""

import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

import psutil

from api import home
from api.binding import check_bind, listen
from service import private
from service.errors import UncannyError
from service.model.jobs import ENDED_TASK
from service.processes import adopt_orphans, die_with_parent, free_port
from service.settings import Settings

if TYPE_CHECKING:
    from service.store import Database

POLL_INTERVAL_SECONDS = 0.1
# How long each part may take to stop by itself. With the default of `stop_seconds` it is less than 30 s in all.
API_SECONDS = 6.0
DISPATCHER_SECONDS = 10.0  # beyond `stop_seconds`, in which running tasks may finish
STARTING_SECONDS = 2.0  # for the dispatcher instead, while no task can run yet
HEAD_SECONDS = 5.0
HURRY_SECONDS = 1.0
ORPHAN_SECONDS = 3.0
QUERY_SECONDS = 1.0  # for a question to the database while the service stops
LONGEST_PAUSE_SECONDS = 10.0
HEALTHY_SECONDS = 60.0  # a part that has lived so long is started again at once
LOG_BYTES = 20 << 20
# By default the C library gives each thread an arena of its own, and an arena never shrinks.
API_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}

Say = Callable[[str], None]


@dataclass
class Part:
    """A child process that is kept running. `command` has its own session, so that Ctrl-C does not reach it."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path | None
    inherited: tuple[int, ...]
    death_signal: signal.Signals = signal.SIGKILL  # which it gets when the supervisor is killed
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0
    pause_seconds: float = field(default=0.0)

    def start(self) -> None:
        sink = _open_log(self.log) if self.log else None
        self.process = subprocess.Popen(
            self.command,
            env=self.environment,
            pass_fds=self.inherited,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=sink or sys.stderr,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent(self.death_signal),
        )
        self.started_at = time.monotonic()
        if sink is not None:
            sink.close()

    def died(self) -> str | None:
        """How it died, or None if it has not. A part that died is to be started again after a pause."""
        if self.process is None or self.process.poll() is None:
            return None
        code = self.process.returncode
        lived = time.monotonic() - self.started_at
        self.pause_seconds = (
            0.0 if lived > HEALTHY_SECONDS else min(LONGEST_PAUSE_SECONDS, self.pause_seconds * 2 + 0.5)
        )
        self.process, self.start_at = None, time.monotonic() + self.pause_seconds
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    def bound_log(self) -> None:
        """Empty a large log while the process writes to it. A copy stays as `.log.1`."""
        with suppress(OSError):  # such as a full disk: it is tried again later
            if self.log is not None and self.log.stat().st_size > LOG_BYTES:
                with private.opened(_earlier(self.log), "wb") as copy, self.log.open("rb") as log:
                    shutil.copyfileobj(log, copy)
                os.truncate(self.log, 0)

    def end(self) -> None:
        """Kill it, if it runs."""
        self.send(signal.SIGKILL)
        if self.process is not None:
            self.process.wait()

    def send(self, which: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(which)

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None


class Supervisor:
    """One service for one home. Raises `PortTaken`, `AlreadyServing`, `NotLoopback`, `SchemaOutdated` when made."""

    def __init__(self, settings: Settings, say: Say, *, verbose: bool = False, when_needed: bool = False) -> None:
        """With `when_needed` only the API runs until there is a task to do."""
        check_bind(settings)
        self._needed = not when_needed
        self.settings, self.say = settings, say
        self._lock: IO[str] = home.lock(settings)
        self._socket: socket.socket = listen(settings.host, settings.port)
        host, port = self._socket.getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        if closed := private.tighten(settings):
            say(closed)
        private.folder(settings.logs)
        environment = {**os.environ, **settings.environment()}
        logs = {name: None if verbose else settings.logs / f"{name}.log" for name in ("api", "dispatcher", "head")}
        api = [sys.executable, "-m", "api.serve.server", "--fd", str(self._socket.fileno())]
        dispatcher = [sys.executable, "-m", "workers.dispatch", "--name", dispatcher_name(settings)]
        held = (self._lock.fileno(),)
        # API and dispatcher stop first and together, then the head.
        self.parts = [
            Part("api", api, {**API_ENVIRONMENT, **environment}, logs["api"], (*held, self._socket.fileno())),
            Part("dispatcher", dispatcher, environment, logs["dispatcher"], held),
        ]
        if not settings.ray_address:  # SIGTERM, so that the head's guard can end what Ray would leave behind
            self.parts.append(Part("head", [], environment, logs["head"], held, death_signal=signal.SIGTERM))
        self.parts[0].start()
        try:
            self._database = _prepared(settings)  # slow to import: it happens while the API starts
        except BaseException:
            self.parts[0].end()
            raise

    def run(self, stop: threading.Event, hurry: threading.Event | None = None) -> None:
        """Keep all parts running until `stop` is set. Then stop them in bounded time, and leave no process behind.

        `hurry` ends this time at once.
        """
        adopt_orphans()
        home.announce(self.settings, self.url)
        try:
            while not stop.is_set():
                self._needed = self._needed or self._has_work()
                for part in reversed(self.parts if self._needed else self.parts[:1]):
                    self._look_after(part)
                stop.wait(POLL_INTERVAL_SECONDS)
        finally:
            self._stop(hurry or threading.Event())
            home.forget(self.settings)
            self._database.close()
            self._socket.close()
            self._lock.close()

    def _look_after(self, part: Part) -> None:
        part.bound_log()
        how = part.died()
        if how is not None:
            self._end_orphans()
            log = f"; its log is {part.log}" if part.log else ""
            self.say(f"the {part.name} died {how}; it starts again in {part.pause_seconds:g} s{log}")
        if part.process is None and time.monotonic() >= part.start_at:
            if part.name == "head":
                self._choose_port(part)
            try:
                part.start()
            except OSError as error:  # no memory, no file descriptors, no folder: that may pass
                part.start_at = time.monotonic() + LONGEST_PAUSE_SECONDS
                self.say(f"the {part.name} cannot be started: {error}")

    def _choose_port(self, head: Part) -> None:
        """Choose a free port for the new head. The dispatcher of the old head has lost its cluster and is restarted."""
        dispatcher = self.parts[1]
        dispatcher.end()
        dispatcher.process, dispatcher.start_at = None, 0.0
        port = str(free_port())
        head.command = [sys.executable, "-m", "workers.head", "--home", str(self.settings.home), "--port", port]
        dispatcher.environment = {**dispatcher.environment, "UNCANNY_RAY_PORT": port}

    def _stop(self, hurry: threading.Event) -> None:
        api, dispatcher, *heads = self.parts
        for part in (api, dispatcher):
            part.send(signal.SIGTERM)
        bounded = self.settings.stop_seconds + DISPATCHER_SECONDS
        patience = bounded if self._may_run_tasks() else STARTING_SECONDS
        began = time.monotonic()
        self._wait_for(dispatcher, patience, hurry)
        if dispatcher.runs and patience == bounded and not hurry.is_set():
            self.say(f"the dispatcher did not stop within {bounded:g} s and was killed")
        self._wait_for(api, began + API_SECONDS - time.monotonic(), hurry)
        api.end()
        dispatcher.end()
        for head in heads:
            head.send(signal.SIGTERM)
            self._wait_for(head, HURRY_SECONDS if hurry.is_set() else HEAD_SECONDS, threading.Event())
            head.end()
        self._end_orphans()

    def _wait_for(self, part: Part, seconds: float, hurry: threading.Event) -> None:
        deadline = time.monotonic() + seconds
        while part.runs and time.monotonic() < deadline and not hurry.is_set():
            time.sleep(POLL_INTERVAL_SECONDS)

    def _has_work(self) -> bool:
        from service.results.insights import Insights

        try:
            tasks = Insights(self._database).queue()["tasks"].values()
        except UncannyError:  # the database is away
            return False
        return any(count for of_kind in tasks for state, count in of_kind.items() if state not in ENDED_TASK)

    def _may_run_tasks(self) -> bool:
        """Whether the dispatcher may have running tasks: it has none before its cluster is there."""
        answers: list[bool] = []
        query = threading.Thread(target=lambda: answers.append(self._leads()), daemon=True)  # the database may hang
        query.start()
        query.join(QUERY_SECONDS)
        return answers[0] if answers else True

    def _leads(self) -> bool:
        from service.results.insights import Insights

        try:
            cluster = Insights(self._database).cluster()
        except UncannyError:
            return True
        status = cluster["status"]
        return bool(cluster["leading"] and (status.get("capacity", {}).get("ready") or status.get("bundles")))

    def _end_orphans(self) -> None:
        """Kill the processes that dead parts left behind, such as those of a local Ray.

        It repeats until none is left: the children of a killed process are adopted when it dies.
        """
        ours = {part.process.pid for part in self.parts if part.process is not None and part.runs}
        me, deadline = psutil.Process(), time.monotonic() + ORPHAN_SECONDS
        while orphans := [child for child in me.children() if child.pid not in ours]:
            if time.monotonic() > deadline:
                return
            for process in orphans:
                _kill_family(process)
            psutil.wait_procs(orphans, timeout=1)


def _kill_family(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        for member in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                member.kill()


def _prepared(settings: Settings) -> "Database":
    from service.operations.upgrading import prepare_store
    from service.store.database import Database

    prepare_store(settings)
    return Database(settings.database)


def dispatcher_name(settings: Settings) -> str:
    """The name of this home's dispatcher. It is the same after a restart, which so gets its leases back at once."""
    digest = hashlib.sha256(str(settings.home).encode()).hexdigest()[:8]
    return f"{socket.gethostname()}-{digest}"


def _open_log(path: Path) -> IO[bytes]:
    if path.exists() and path.stat().st_size > LOG_BYTES:
        path.replace(_earlier(path))
    return private.opened(path, "ab")


def _earlier(path: Path) -> Path:
    return path.with_suffix(".log.1")
