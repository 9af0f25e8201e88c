"""`python -m workers.dispatch`: the dispatcher's process. It may be killed and started again at any time."""

import argparse
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing
from types import FrameType

from pydantic import ValidationError

from service import private
from service.errors import DatabaseAway, SchemaOutdated, UncannyError
from service.lab.artifact_root import RootMark, of_database
from service.lab.artifacts import Artifacts
from service.logs import configure
from service.operations.housekeeping import keep_house
from service.processes import SignalSafeEvent, adopt_orphans
from service.queue.dispatcher import Dispatcher
from service.settings import Settings
from service.store import Database
from workers.head import end_family, running, use_driver_environment

log = logging.getLogger("uncanny.dispatch")
RECONNECT_SECONDS = 1.0
POLL_INTERVAL_SECONDS = 0.1
SIGNAL_WINDOW_SECONDS = 2.0  # signals within it count as one: a service manager and the supervisor both send one


def main(arguments: list[str] | None = None) -> int:
    """Dispatch until SIGTERM or SIGINT.

    Returns 0; 1 if its own Ray has ended, or if the settings, the database or the artifact root are unusable, which one
    line of the log says; 3 for a database of another schema.
    """
    parser = argparse.ArgumentParser(prog="python -m workers.dispatch", description=__doc__)
    parser.add_argument(
        "--name",
        default=f"{socket.gethostname()}-{os.getpid()}",
        help="what it holds its leases under; one that is started under the name of a dead one takes over at once",
    )
    parser.add_argument("--log-format", choices=["plain", "json"], default="plain")
    options = parser.parse_args(arguments)
    configure(options.log_format)
    logging.getLogger("ray").setLevel(logging.ERROR)  # it warns of settings that are meant

    stop = SignalSafeEvent()
    _stop_on_signals(stop)
    private.be_private()
    try:
        return _work(Settings(), options.name, stop)
    except SchemaOutdated as error:
        log.error("%s", error)
        return 3
    except UncannyError as error:
        log.error("%s", error)
    except ValidationError as error:
        log.error("bad settings: %s", "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()))
    return 1


def _work(settings: Settings, name: str, stop: SignalSafeEvent) -> int:
    if closed := private.tighten(settings):
        log.warning("%s", closed)
    with closing(Database(settings.database)) as database:
        artifacts = of_database(database, settings.artifacts)
        if not _ready(database, stop):
            return 0
        return _beside_ray(settings, database, artifacts, name, stop)


def _beside_ray(settings: Settings, database: Database, artifacts: Artifacts, name: str, stop: SignalSafeEvent) -> int:
    if settings.ray_address or settings.ray_port:
        use_driver_environment(settings.home, local=not settings.ray_address)
        return _dispatch(settings, database, artifacts, name, stop)
    adopt_orphans()
    try:
        with running() as head:  # no cluster is configured: a head for as long as this process runs
            use_driver_environment(head.home, local=True)
            threading.Thread(target=_stop_without, args=(head.guard, stop), daemon=True).start()
            here = settings.model_copy(update={"ray_port": head.port})
            code = _dispatch(here, database, artifacts, name, stop)
            if head.guard.poll() is None:
                return code
            end_family()  # before the folder of the head is deleted
            log.error("the local Ray has ended: %s", head.last_words())
            return code or 1
    finally:
        end_family()  # a guard that was killed leaves processes of Ray


def _stop_without(guard: "subprocess.Popen[bytes]", stop: threading.Event) -> None:
    guard.wait()
    stop.set()


def _dispatch(settings: Settings, database: Database, artifacts: Artifacts, name: str, stop: threading.Event) -> int:
    from workers.pool import RayExecutor  # here: it imports Ray, which reads its environment then

    executor = RayExecutor(settings, root_mark=RootMark(database, settings.artifacts))
    try:
        while not executor.capacity().ready and not stop.is_set():
            stop.wait(POLL_INTERVAL_SECONDS)
        _stop_on_signals(stop)  # again: Ray has replaced the handlers
        log.info("dispatcher %s starts", name)
        dispatcher = Dispatcher(database, artifacts, executor, settings, name)
        keeping = (database, artifacts, settings, lambda: dispatcher.leading, stop)
        threading.Thread(target=keep_house, args=keeping, name="housekeeping", daemon=True).start()
        dispatcher.run(stop)
    finally:
        executor.close()
    log.info("dispatcher %s has stopped", name)
    return 0


def _stop_on_signals(stop: threading.Event) -> None:
    """The first signal stops the dispatcher, which gives running tasks back. A later second one ends it at once."""
    first = math.inf

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal first
        first = min(first, time.monotonic())
        if stop.is_set() and time.monotonic() - first > SIGNAL_WINDOW_SECONDS:
            os._exit(128 + number)
        stop.set()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)


def _ready(database: Database, stop: threading.Event) -> bool:
    """Wait until the database answers; false if the process is to stop before that."""
    while not stop.is_set():
        try:
            database.check_schema()
        except DatabaseAway as error:
            log.warning("%s", error)
            stop.wait(RECONNECT_SECONDS)
        else:
            return True
    return False


if __name__ == "__main__":
    sys.exit(main())
