"""`uncanny serve` on real Ray while each of its processes is frozen or killed; then the history of its store."""

import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from history_checks import violations
from processes import SERVE, command_of, gone, serving
from sqlalchemy import select
from waiting import until

from api.client import Client, Sweep
from service.store import Database, tables

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LEASE_SECONDS = 3.0
FROZEN_SECONDS = LEASE_SECONDS + 1.5
PATIENCE_SECONDS = 200.0  # a busy machine takes a minute to have Ray and its workers again
SETTINGS = {"OMP_NUM_THREADS": "1", "UNCANNY_LEASE_SECONDS": str(LEASE_SECONDS)}
SETTINGS |= {"UNCANNY_EPOCH_STATE_SECONDS": "0.3", "UNCANNY_STOP_SECONDS": "2"}
BASE = {"architecture": "mlp", "dataset": "digits", "samples": 16, "recipe": {"epochs": 40}}
GRID = {"scale": [1, 5], "attack": ["pgd_l2", "pgd_linf"]}
OURS = ("api", "dispatcher", "guard", "worker")
RAYS = ("ray start", "gcs_server", "raylet", "dashboard", "dashboard agent", "runtime agent")
IN_COMMAND = {
    "api.cli": "supervisor", "api.serve.server": "api", "workers.dispatch": "dispatcher", "workers.head": "guard",
    "ray::DashboardAgent": "dashboard agent", "ray::RuntimeEnvAgent": "runtime agent", "ray::IDLE": "worker",
    "ray::bundle": "worker", "ray start": "ray start", "dashboard/dashboard.py": "dashboard",
}  # fmt: skip


def role_of(process: psutil.Process) -> str:
    """What a process of `serve` is; its command where nobody has thought of it."""
    if process.name() in ("gcs_server", "raylet"):
        return process.name()
    command = command_of(process)
    return next((role for mark, role in IN_COMMAND.items() if mark in command), command)


@dataclass
class Serve:
    """A `uncanny serve`, its store, and the sweeps that it was given."""

    process: "subprocess.Popen[str]"
    client: Client
    database: Database
    sweeps: list[Sweep] = field(default_factory=list)

    def submit(self) -> None:
        seed = len(self.sweeps)
        self.sweeps.append(self.client.sweep(name=f"sweep {seed}", base={**BASE, "seed": seed}, grid=GRID))

    def family(self) -> list[psutil.Process]:
        supervisor = psutil.Process(self.process.pid)
        return [supervisor, *supervisor.children(recursive=True)]

    def roles(self) -> set[str]:
        return {role_of(process) for process in self.family()}

    def training(self) -> Any:
        """The row of the last sweep's training."""
        with self.database.read() as connection:
            rows = connection.execute(select(tables.tasks).where(tables.tasks.c.kind == "train")).all()
        return next(row for row in rows if row.spec["seed"] == len(self.sweeps) - 1)

    def worker(self) -> psutil.Process | None:
        """The one that runs this training, if it lives."""
        row = self.training()
        number = re.search(r" pid (\d+)", row.worker or "") if row.state == "running" else None
        return next((process for process in self.family() if number and process.pid == int(number[1])), None)

    def part(self, role: str) -> psutil.Process | None:
        return self.worker() if role == "worker" else next((p for p in self.family() if role_of(p) == role), None)

    def ends(self) -> Counter[str]:
        """How many attempts have ended in which way."""
        with self.database.read() as connection:
            ended = select(tables.attempts.c.end).where(tables.attempts.c.ended_at.is_not(None))
            return Counter(str(end) for end in connection.scalars(ended))

    def strike(self, role: str, fault: Callable[[psutil.Process], None]) -> None:
        """Do this to that process while the training of a new sweep runs, and wait for its end."""
        began = time.monotonic()
        self.submit()
        found(self.worker)
        process, before = found(lambda: self.part(role)), self.ends()
        ran = time.monotonic()
        fault(process)
        until(lambda: self.training().state == "succeeded", PATIENCE_SECONDS)
        ended, lost = time.monotonic(), self.ends() - before - Counter(succeeded=1 << 30)
        print(f"  {role}: ran after {ran - began:.1f} s, succeeded {ended - ran:.1f} s later; lost {dict(lost)}")

    def finish(self) -> None:
        """All that was accepted succeeds, serve stops and leaves nothing running, and the history is sound."""
        for sweep in self.sweeps:
            status = sweep.wait()
            assert status["state"] == "succeeded", status
        family = self.family()
        self.process.terminate()
        assert self.process.wait(60) == 0
        until(lambda: gone(family), 10)
        self.check()

    def check(self) -> None:
        with self.database.read() as connection:
            jobs = connection.execute(select(tables.jobs.c.id, tables.jobs.c.state)).all()
        assert [state for _, state in jobs] == ["succeeded"] * (len(self.sweeps) * 4), "lost, or doubled"
        assert not list(violations(self.database, [job_id for job_id, _ in jobs]))
        print(f"  {len(jobs)} jobs succeeded, 0 lost, 0 doubled; attempts ended {dict(self.ends())}")


def found(what: Callable[[], Any]) -> Any:
    """What it gives once there is something; processes may end while it looks."""

    def look() -> Any:
        try:
            return what()
        except psutil.NoSuchProcess:
            return None

    return until(look, PATIENCE_SECONDS)


def kill(process: psutil.Process) -> None:
    process.kill()
    until(lambda: gone([process]))


def freeze(process: psutil.Process) -> None:
    process.send_signal(signal.SIGSTOP)
    time.sleep(FROZEN_SECONDS)
    process.send_signal(signal.SIGCONT)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest) -> str:
    """The URL of an empty store of each kind."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@contextmanager
def running(home: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    for name in [name for name in os.environ if name.startswith(("RAY_", "UNCANNY_"))]:
        monkeypatch.delenv(name)
    settings = {**SETTINGS, "UNCANNY_DATABASE_URL": store}
    with serving(home, SERVE, **settings) as (process, url), Client(url) as client:
        database = Database(store)
        yield Serve(process, client, database)
        database.close()


@pytest.fixture
def serve(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    with running(tmp_path / "home", store, monkeypatch) as serve:
        yield serve


@pytest.mark.parametrize("roles", [OURS, RAYS], ids=["ours", "of ray"])
def test_each_process_is_killed(serve: Serve, roles: tuple[str, ...]) -> None:
    for role in roles:
        serve.strike(role, kill)
    until(lambda: serve.roles() == {"supervisor", *OURS, *RAYS})  # no process is forgotten here
    serve.finish()


@pytest.mark.parametrize("roles", [("supervisor", *OURS), RAYS], ids=["ours", "of ray"])
def test_each_process_is_frozen_for_longer_than_a_lease(serve: Serve, roles: tuple[str, ...]) -> None:
    for role in roles:
        serve.strike(role, freeze)
    serve.finish()


def test_a_killed_supervisor_leaves_nothing_running_and_the_next_serve_goes_on(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path / "home", store, monkeypatch) as serve:
        serve.submit()
        found(serve.worker)
        family = serve.family()
        serve.process.kill()
        serve.process.wait()
        until(lambda: gone(family), 20)
        sweeps = serve.sweeps
    with running(tmp_path / "home", store, monkeypatch) as after:
        after.sweeps = [Sweep(after.client, sweep.id, sweep.accepted) for sweep in sweeps]
        after.finish()


@pytest.mark.parametrize("store", ["sqlite"], indirect=True)
def test_it_stops_also_while_all_its_parts_are_frozen(serve: Serve) -> None:
    serve.submit()
    found(serve.worker)
    family = serve.family()
    for process in family[1:]:
        process.send_signal(signal.SIGSTOP)
    serve.process.terminate()
    serve.process.wait(60)
    until(lambda: gone(family), 10)
