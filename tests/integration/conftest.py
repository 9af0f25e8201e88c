"""A real server on loopback whose dispatcher hands tasks to threads that make up numbers: HTTP and SQL are real."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from made_up import made_up
from waiting import until

from api.binding import listen
from api.client import ENDED, Client
from api.http.app import create_app
from api.serve.server import Server
from service.lab.artifact_root import of_database
from service.lab.artifacts import Artifacts
from service.queue.dispatcher import Dispatcher
from service.queue.inprocess import InProcessExecutor
from service.settings import Settings
from service.store import Database


@dataclass(frozen=True)
class RunningServer:
    """`url`, the home of its store, a client for it, and the application itself."""

    url: str
    settings: Settings
    client: Client
    http: httpx.Client
    app: FastAPI

    def sweep(self, name: str, *, seed: int = 0, **grid: list[Any]) -> dict[str, Any]:
        """A small sweep that is done, as GET shows it."""
        base = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 20, "seed": seed}
        handle = self.client.sweep(name=name, base=base, grid=grid or {"scale": [1, 5]})
        return handle.wait()

    def idle(self) -> None:
        """Wait until nothing waits or runs, so that nothing changes by itself."""
        until(
            lambda: (
                not any(
                    count and state in ("blocked", "queued", "running")
                    for of_kind in self.client.queue()["tasks"].values()
                    for state, count in of_kind.items()
                )
            )
        )

    def running(self, job_id: str) -> None:
        """Wait until it runs."""
        until(lambda: self.client.job(job_id)["state"] == "running")

    def ended(self, path: str) -> dict[str, Any]:
        """The job or sweep at this path, at its end."""
        while True:
            seen: dict[str, Any] = self.http.get(path, params={"wait": 10}).json()
            if seen["state"] in ENDED:
                return seen


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """The API on a free port, with a store of its own and a dispatcher; shared by the tests of a session."""
    with running_server(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="session")
def start_server() -> Callable[..., AbstractContextManager[RunningServer]]:
    """For tests that need a server of their own: `with start_server(home, auth=True) as server`."""
    return running_server


@pytest.fixture(scope="session")
def start_dispatcher() -> Callable[..., AbstractContextManager[None]]:
    """For tests with an API process of their own: `with start_dispatcher(settings)`."""
    return running_dispatcher


@contextmanager
def running_dispatcher(settings: Settings, hold: threading.Event | None = None) -> Iterator[None]:
    """A dispatcher in a thread. Trainings end once `hold` is set, where one is given."""
    database = Database(settings.database)
    executor = InProcessExecutor(partial(made_up, hold=hold), cpus=2, grace_seconds=1)
    dispatcher = Dispatcher(database, Artifacts(settings.artifacts), executor, settings, "dispatcher-of-tests")
    stop = threading.Event()
    thread = threading.Thread(target=dispatcher.run, args=(stop,), name="dispatcher")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        database.close()


@contextmanager
def running_server(
    home: Path, *, dispatching: bool = True, hold: threading.Event | None = None, **options: Any
) -> Iterator[RunningServer]:
    settings = Settings(home=home, port=0, **options)
    database = Database(settings.database)
    database.upgrade()
    of_database(database, settings.artifacts).require_mark()
    database.close()
    app = create_app(settings)
    listening = listen("127.0.0.1", 0)
    web = Server(app, grace_seconds=1)
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listening]}, name="api")
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        with (
            running_dispatcher(settings, hold) if dispatching else nullcontext(),
            Client(url, user="ada") as client,
            httpx.Client(base_url=url, timeout=20) as http,
        ):
            client.ready()
            yield RunningServer(url, settings, client, http, app)
    finally:
        app.state.stopping = True
        web.should_exit = True
        thread.join()
