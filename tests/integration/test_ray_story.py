"""One job's whole way on real Ray: HTTP to SQL to the dispatcher's process to Ray's workers and back, and a killing."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from waiting import until

from service.store import Database
from service.store.tables import tasks

EPOCHS = 300  # of a training that is under way when its dispatcher dies
JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 64, "recipe": {"epochs": 2}}


@contextmanager
def dispatcher(home: Path, port: int) -> Iterator["subprocess.Popen[bytes]"]:
    """The dispatcher of this home on the head at this port, whose token it has."""
    shutil.copy(os.environ["RAY_AUTH_TOKEN_PATH"], home / "ray_token")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"UNCANNY_HOME": str(home), "UNCANNY_RAY_PORT": str(port), "UNCANNY_EPOCH_STATE_SECONDS": "0"}
    with (home / "dispatch.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers.dispatch", "--name", "lab"], env=environment, stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.timeout(240)
def test_a_sweep_survives_its_dispatcher(start_server: Callable[..., Any], ray_head: int, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'uncanny.db'}")

    def seen() -> dict[str, Any]:
        with database.read() as connection:
            return {row.id: row for row in connection.execute(select(tasks))}

    def attempts() -> dict[str, int]:
        """Of the tasks that have succeeded."""
        return {row.id: row.attempt for row in seen().values() if row.state == "succeeded"}

    def under_way() -> bool:
        """The long training has left an epoch state, and some of the others have succeeded."""
        rows = seen().values()
        return bool(attempts()) and any(row.state == "running" and row.resume_digest for row in rows)

    with start_server(tmp_path, dispatching=False) as server:
        long = server.client.submit({**JOB, "seed": 1, "recipe": {"epochs": EPOCHS}})
        sweep = server.client.sweep(name="story", base=JOB, grid={"scale": [1, 50], "attack": ["pgd_l2", "pgd_linf"]})
        with dispatcher(tmp_path, ray_head) as first:
            until(under_way)
            before = attempts()
            first.kill()
            first.wait()
        with dispatcher(tmp_path, ray_head) as second:
            assert long.wait()["state"] == "succeeded"
            assert sweep.wait()["state"] == "succeeded"
            after = seen()
            second.send_signal(signal.SIGTERM)
            assert second.wait(30) == 0
        rows = list(sweep.results())
        whole = long.result()

    assert {row.state for row in after.values()} == {"succeeded"}
    assert before.items() <= {name: row.attempt for name, row in after.items()}.items()  # nothing was done twice
    assert all((row.errors, row.suspect_losses) == (0, 0) for row in after.values())  # nor held against anybody
    trainings = [row for row in after.values() if row.kind == "train"]
    assert len(trainings) == 2  # four cells share one
    [resumed] = [row for row in trainings if row.attempt > 1]
    assert 0 < resumed.detail["resumed_after_epoch"] < EPOCHS
    assert whole["parts"]["train"]["numbers"]["epochs"] == EPOCHS
    assert {(row["scale"], row["attack"]["norm"]) for row in rows} == {(s, n) for s in (1, 50) for n in ("l2", "linf")}
    assert len({row["clean_accuracy"] for row in rows}) == 1  # scaling changes no prediction
    assert all(0 <= row["robust_accuracy"] <= row["clean_accuracy"] for row in rows)
    database.close()


def test_a_database_of_another_schema_is_refused(tmp_path: Path) -> None:
    with dispatcher(tmp_path, 1) as process:
        assert process.wait(60) == 3
    assert "uncanny db upgrade" in (tmp_path / "dispatch.log").read_text()
