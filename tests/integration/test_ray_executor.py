"""The dispatcher's process with a local Ray, from a submitted job to its verdict, and how it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Select, func, select

from service.artifacts import Artifacts
from service.settings import Settings
from service.specs import JobSpec
from service.store import Database
from service.store.tables import jobs, tasks
from service.submission import Service

PATIENCE_SECONDS = 400.0


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, ray_address="")


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    database = Database(settings.database)
    database.upgrade()
    yield database
    database.close()


def start(settings: Settings) -> "subprocess.Popen[bytes]":
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {
        "UNCANNY_HOME": str(settings.home),
        "UNCANNY_EPOCH_STATE_SECONDS": "0",
        "UNCANNY_CPUS_PER_TASK": "2",
    }
    with (settings.home / "dispatch.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "workers.dispatch", "--name", "lab"], env=environment, stdout=log, stderr=log
        )


def wait_for(what: str, database: Database, query: Select[tuple[int]]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        with database.read() as connection:
            if connection.execute(query).scalar_one():
                return
        assert time.monotonic() < deadline, f"not yet: {what}"
        time.sleep(0.1)


def processes_of(settings: Settings) -> list[str]:
    """Command lines of the processes, other than zombies, that mention this home."""
    found = []
    for folder in Path("/proc").iterdir():
        if re.fullmatch(r"\d+", folder.name) and int(folder.name) != os.getpid():
            try:
                line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if str(settings.home) in line:
                found.append(line)
    return found


def wait_until_gone(settings: Settings) -> None:
    deadline = time.monotonic() + 30
    while left := processes_of(settings):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def job(**changes: object) -> JobSpec:
    spec = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 32, "recipe": {"epochs": 2}}
    return JobSpec.model_validate({**spec, **changes})


@pytest.mark.timeout(900)
def test_a_job_survives_its_dispatcher_and_is_judged(settings: Settings, database: Database) -> None:
    service = Service(database, Artifacts(settings.artifacts))
    service.submit(job(recipe={"epochs": 5_000}, seed=1), user="ada", priority=10)
    first = start(settings)
    try:
        checkpointed = select(func.count()).where(tasks.c.resume_digest.is_not(None))
        wait_for("an epoch state", database, checkpointed)
    finally:
        first.kill()
        first.wait()
    wait_until_gone(settings)  # a local Ray, and the training with it, ends with the process that started it

    service.submit(job(scale=5), user="ada", priority=20)
    second = start(settings)
    try:
        wait_for("a job", database, select(func.count()).where(jobs.c.state == "succeeded"))
        resumed = tasks.c.detail["resumed_after_epoch"].as_integer() > 0
        wait_for("the training that goes on", database, select(func.count()).where(resumed))
        started = time.monotonic()
        second.send_signal(signal.SIGTERM)
        assert second.wait(30) == 0
        assert time.monotonic() - started < 20
    finally:
        second.kill()
        second.wait()
    wait_until_gone(settings)
    with database.read() as connection:
        verdict = connection.execute(select(jobs.c.verdict).where(jobs.c.state == "succeeded")).scalar_one()
        held = connection.execute(select(func.count()).where(tasks.c.state == "running")).scalar_one()
        costs = connection.execute(select(func.max(tasks.c.suspect_losses + tasks.c.errors))).scalar_one()
    assert verdict in {"trusted", "suspect"}
    assert (held, costs) == (0, 0)  # what ran was given back, and held against nobody


def test_a_database_of_another_schema_is_refused(settings: Settings) -> None:
    dispatcher = start(settings)
    assert dispatcher.wait(120) == 3
    assert "uncanny db upgrade" in (settings.home / "dispatch.log").read_text()
