"""The dispatcher's loop under a moved clock, with an executor that does as it is told."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from service.errors import DatabaseAway
from service.model.executor import (
    Bundle,
    Capacity,
    Executor,
    Grant,
    Message,
    Outcome,
    Started,
    Succeeded,
)
from service.queue.dispatcher import Dispatcher
from service.settings import Settings
from service.store import Database
from service.store.tables import leases

PATIENT = Settings(lease_seconds=60.0, backoff_seconds=0.0, lookahead=1)
LEASE_SECONDS = PATIENT.lease_seconds


class Clock:
    """The dispatchers' clock and the database's, moved on by `passes`: no test waits for a lease, or is too slow."""

    ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


CLOCK = Clock()


def passes(seconds: float) -> None:
    CLOCK.ahead += seconds


class Scripted:
    """Remembers what it is given; says only what a test, or `answers` as soon as a bundle comes, tells it to say."""

    def __init__(self, answers: Callable[[Grant], Message] | None = None, *, cpus: float = 3.0) -> None:
        self.answers = answers
        self.room = Capacity(ready=True, cpus=cpus, gpus=0.0)
        self.bundles: list[Bundle] = []
        self.finished: set[tuple[str, int]] = set()
        self.cancelled: list[tuple[str, int]] = []
        self.closed = False
        self.said: list[Message] = []

    def capacity(self) -> Capacity:
        return self.room

    def submit(self, bundle: Bundle) -> None:
        self.bundles.append(bundle)
        if self.answers:
            for grant in bundle.grants:
                self.said += [Started(grant.task_id, grant.attempt, "worker 1"), self.answers(grant)]

    def poll(self, timeout_seconds: float) -> list[Message]:
        said, self.said = self.said, []
        return said

    def cancel(self, task_id: str, attempt: int) -> None:
        self.cancelled.append((task_id, attempt))

    def close(self) -> None:
        self.closed = True

    @property
    def grants(self) -> list[Grant]:
        return [grant for bundle in self.bundles for grant in bundle.grants]

    @property
    def open(self) -> list[Bundle]:
        """The bundles with a task that `finish` has not finished."""
        return [one for one in self.bundles if any((g.task_id, g.attempt) not in self.finished for g in one.grants)]

    def finish(self, outcome: Callable[[Grant], Outcome], most: int | None = None) -> int:
        """Say that the open tasks have succeeded, the first `most` of them; returns how many those are."""
        grants = [grant for grant in self.grants if (grant.task_id, grant.attempt) not in self.finished][:most]
        for grant in grants:
            self.finished.add((grant.task_id, grant.attempt))
            self.said += [
                Started(grant.task_id, grant.attempt, "worker 1"),
                Succeeded(grant.task_id, grant.attempt, outcome(grant)),
            ]
        return len(grants)


def succeeds(lab: Any) -> Callable[[Grant], Message]:
    return lambda grant: Succeeded(grant.task_id, grant.attempt, lab.outcome(grant))


def dispatcher(
    lab: Any, executor: Executor, name: str = "d1", settings: Settings = PATIENT, **changed: Any
) -> Dispatcher:
    at_home = settings.model_copy(update={"home": Path(lab.artifacts.root).parent, "stop_seconds": 0.0, **changed})
    return Dispatcher(lab.database, lab.artifacts, executor, at_home, name, CLOCK)


def tick_until_idle(one: Dispatcher) -> None:
    for _ in range(100):
        if not one.tick():
            return
    raise AssertionError("it never comes to rest")


@contextmanager
def away(_: Database) -> Iterator[Connection]:
    raise DatabaseAway("the database does not answer")
    yield


@contextmanager
def breaking_after_commit(monkeypatch: pytest.MonkeyPatch, database: Database) -> Iterator[None]:
    """Every writing transaction is committed, and then the connection breaks before that is known."""
    real = Database.write

    @contextmanager
    def write(self: Database) -> Iterator[Connection]:
        with real(self) as connection:
            yield connection
        raise DatabaseAway("the connection broke")

    with monkeypatch.context() as patch:
        patch.setattr(Database, "write", write)
        yield


def leases_over(connection: Connection) -> None:
    connection.execute(leases.update().values(expires_at=0.0))


def take_the_lead(connection: Connection, name: str) -> None:
    connection.execute(leases.update().values(holder=name, epoch=leases.c.epoch + 1, expires_at=1e12))


def take_over(other: Dispatcher) -> None:
    """Stand by until the lease of the one before has run out, and take what that one ran."""
    for _ in range(6):
        other.tick()
        passes(0.25 * LEASE_SECONDS)
    other.tick()
    assert other.leading


@contextmanager
def running(one: Dispatcher) -> Iterator[threading.Event]:
    """Its loop in a thread, stopped in the end, or by the event."""
    stop = threading.Event()
    thread = threading.Thread(target=one.run, args=(stop,))
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join()
