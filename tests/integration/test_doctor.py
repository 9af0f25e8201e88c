"""`uncanny doctor` on real databases, a real artifact root and a real local Ray."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text, update
from store_lab import Lab

from service.lab.artifacts import Artifacts
from service.model.executor import Lost
from service.model.retrying import Patience
from service.operations import doctor
from service.operations.doctor import Check
from service.queue.verbs import Service
from service.settings import Settings
from service.store import Database, claiming
from service.store.tables import counters, tasks

pytestmark = pytest.mark.slow


NO_RAY = {"error": "not looked at"}


def examine(settings: Settings) -> dict[str, Check]:
    return {check.name: check for check in doctor.examine(settings, lambda _: NO_RAY)}


@pytest.fixture
def settings(database_url: str, tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", database_url=database_url)


def test_a_sound_store(settings: Settings, lab: Lab) -> None:
    with lab.database.write() as connection:
        status = {"capacity": {"ready": True}}
        claiming.lead(connection, lab.database.now(connection), "d1", None, 60.0, status)
    found = examine(settings)
    wrong = {name for name, check in found.items() if check.state == "fail"}
    assert wrong == {"ray"}
    assert found["database"].said.startswith("SQLite 3" if lab.database.is_sqlite else "PostgreSQL")
    assert "d1 leads" in found["dispatcher"].said
    assert not list(Path(settings.artifacts).glob("*/*")), "what was tried does not stay"
    assert not [row.name for row in lab.rows(counters) if row.name.startswith("room ")]


def test_what_waits_for_long_or_is_held_is_said(settings: Settings, lab: Lab) -> None:
    lab.submit()
    lab.submit(dataset="synthetic")
    assert examine(settings)["queue"].state == "ok"
    poison = lab.grant("train")[0]
    once = Patience(max_errors=1, max_suspect_losses=1, backoff_seconds=0)
    lab.record(Lost(poison.task_id, poison.attempt, "worker_died", "its worker died"), patience=once)
    lab.expire()
    with lab.database.write() as connection:
        connection.execute(update(tasks).values(waiting_since=0.0, not_before=0.0))
    found = examine(settings)
    assert (found["queue"].state, found["held"].state, found["dispatcher"].state) == ("warn", "warn", "warn")
    assert found["queue"].said.startswith("1 tasks wait for more than an hour")
    assert found["held"].said.startswith("1 tasks")


@pytest.mark.parametrize("kind", ["sqlite_url", "postgresql_url"])
def test_another_schema_is_said_with_what_to_run(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    database = Database(request.getfixturevalue(kind))
    with database.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    found = examine(Settings(home=tmp_path / "home", database_url=database.url))
    database.close()
    assert found["schema"].state == "fail"
    assert "uncanny db upgrade" in found["schema"].advice
    assert "dispatcher" not in found


def test_a_database_that_may_only_be_read(postgresql_url: str, tmp_path: Path) -> None:
    url = f"{postgresql_url}&options=-cdefault_transaction_read_only=on"
    found = examine(Settings(home=tmp_path, database_url=url))
    assert (found["schema"].state, found["writing"].state) == ("ok", "fail")
    assert "read-only" in found["writing"].said


def test_what_is_not_there_is_not_made(tmp_path: Path) -> None:
    found = examine(Settings(home=tmp_path / "home", artifact_root=str(tmp_path / "artifacts")))
    assert found["database"].state == "warn"
    assert not (tmp_path / "home").exists()
    found = examine(Settings(home=tmp_path, database_url="postgresql://nobody@127.0.0.1:1/nowhere"))
    assert found["database"].state == "fail"


def test_an_artifact_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    check = examine(Settings(home=tmp_path, artifact_root=str(tmp_path / "file")))["artifacts"]
    assert (check.state, "UNCANNY_ARTIFACT_ROOT" in check.advice) == ("fail", True)


def test_a_registered_data_set_whose_bytes_have_changed(settings: Settings, lab: Lab) -> None:
    artifacts = Artifacts(settings.artifacts)
    digests = []
    for n in (8, 4):

        def fill(path: Path, n: int = n) -> None:
            with path.open("wb") as file:
                np.savez(file, x=np.zeros((n, 8, 8, 1), np.uint8), y=np.arange(n) % 2)

        digests.append(artifacts.write("upload", fill).digest)
    Service(lab.database, artifacts).register_dataset("mine", *digests, user="ann")
    assert examine(settings)["data mine"].state == "ok"
    (Path(settings.artifacts) / digests[0][:2] / digests[0]).write_bytes(b"other bytes")
    assert examine(settings)["data mine"].state == "fail"


def test_a_head_that_is_not_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    report = doctor.look_at_cluster(Settings(home=tmp_path, ray_address=f"127.0.0.1:{port}"))
    assert f"nothing answers at 127.0.0.1:{port}" in report["error"]


def test_the_command_on_a_new_home(tmp_path: Path) -> None:
    """All of it: Ray is started and gone again; exit code 1, because a data set is damaged and for nothing else."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test_32x32.mat").write_bytes(b"not the original")
    ended, found = command(tmp_path)
    assert (ended, found["ok"]) == (1, False)
    states = {check["name"]: check["state"] for check in found["checks"]}
    assert states["database"] == "warn"
    assert states["ray"] == states.get("ray token") == "ok", found
    [node] = [name for name in states if name.startswith("node ") and name.endswith(" artifacts")]
    assert states[node] == "ok"
    [failed] = [check for check in found["checks"] if check["state"] == "fail"]
    assert failed["name"].endswith("data svhn")
    assert "train_32x32.mat" in failed["advice"]
    assert "test_32x32.mat" in failed["advice"]


def command(home: Path) -> tuple[int, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UNCANNY_", "RAY_"))}
    done = subprocess.run(
        [sys.executable, "-m", "api.cli", "doctor", "--home", str(home), "--json"],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout)
