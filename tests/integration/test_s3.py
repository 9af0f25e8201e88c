"""An artifact root in an S3 bucket: real trainings and attacks, uploads, the doctor and the collector of garbage."""

import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import SERVE, serving

from api.client import Client
from service.lab.artifacts import Artifacts
from service.operations import doctor, housekeeping
from service.queue.dispatcher import Dispatcher
from service.queue.inprocess import InProcessExecutor
from service.store import Database
from workers.context import Context
from workers.run import execute

pytestmark = pytest.mark.slow
JOB = {"architecture": "mlp", "dataset": "digits", "samples": 40, "attack": "pgd_linf", "recipe": {"epochs": 2}}


@pytest.fixture
def server(start_server: Any, s3_root: str, tmp_path: Path) -> Iterator[Any]:
    """A server whose tasks really run, in threads, with all of their bytes in a bucket."""
    with start_server(tmp_path / "home", dispatching=False, artifact_root=s3_root) as running:
        artifacts = Artifacts(running.settings.artifacts)
        context = Context(artifacts, running.settings.data, epoch_state_seconds=0.0)
        executor = InProcessExecutor(partial(execute, context=context), cpus=2)
        database, stop = Database(running.settings.database), threading.Event()
        thread = threading.Thread(
            target=Dispatcher(database, artifacts, executor, running.settings, "real").run, args=(stop,)
        )
        thread.start()
        try:
            yield running
        finally:
            stop.set()
            thread.join()
            database.close()


def test_a_sweep_with_all_of_its_bytes_in_a_bucket(server: Any, tmp_path: Path) -> None:
    sweep = server.client.sweep(name="s3", base=JOB, grid={"scale": [1, 5], "attack": ["pgd_linf", "pgd_l2"]})
    assert sweep.wait()["state"] == "succeeded"
    rows = list(sweep.results())
    assert len({row["weights_sha256"] for row in rows}) == 1
    assert server.client.trajectory(rows[0]["job_id"])["attack"]["trajectory"]["step"]

    artifacts = Artifacts(server.settings.artifacts)
    stored = {one.digest for one in artifacts.stored()}
    assert rows[0]["weights_sha256"] in stored
    for digest in stored:
        with artifacts.local(digest) as path:
            assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert not (server.settings.home / "artifacts").exists()

    content = bytes(range(256)) * 5000
    (tmp_path / "bytes").write_bytes(content)
    url = f"{server.url}/v1/artifacts/{server.client.upload(tmp_path / 'bytes')}"
    assert httpx.get(url).content == content
    part = httpx.get(url, headers={"Range": "bytes=1000-1009"})
    assert (part.status_code, part.content) == (206, content[1000:1010])

    database = Database(server.settings.database)
    policy = housekeeping.Policy(age_seconds=-3600.0)  # an hour older than all of it
    before = len({one.digest for one in artifacts.stored()})
    report = housekeeping.collect(database, artifacts, policy)
    database.close()
    assert report.unreferenced.count >= 1
    left = {one.digest for one in artifacts.stored()}
    assert len(left) == report.kept.count < before
    assert rows[0]["weights_sha256"] in left
    more = server.client.sweep(name="again", base=JOB, grid={"scale": [2]})
    assert more.wait()["state"] == "succeeded"
    assert more.accepted["known"]["train"] == 1


@pytest.mark.timeout(300)
def test_ray_s_workers_have_what_the_bucket_asks_for(s3_root: str, s3_server: dict[str, str], tmp_path: Path) -> None:
    """`uncanny serve` as a process: the keys reach the workers of its own head, and no artifact is elsewhere."""
    home = tmp_path / "home"
    settings = {"UNCANNY_ARTIFACT_ROOT": s3_root, "OMP_NUM_THREADS": "1", **s3_server}
    with serving(home, SERVE, **settings) as (_, url), Client(url, patience_seconds=60) as client:
        job = client.submit(JOB)
        assert job.wait()["state"] == "succeeded"
        [row] = client.results(job_id=job.id)
        assert client.trajectory(job.id)["attack"]["trajectory"]["step"]
    artifacts = Artifacts(s3_root)
    assert row["weights_sha256"] in {one.digest for one in artifacts.stored()}
    with artifacts.local(row["weights_sha256"]) as path:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["weights_sha256"]
    assert not (home / "artifacts").exists()


def test_the_doctor_tries_the_bucket_and_names_one_that_is_not_there(server: Any) -> None:
    def examined(root: str) -> doctor.Check:
        settings = server.settings.model_copy(update={"artifact_root": root})
        checks = doctor.examine(settings, lambda _: {"error": "not looked at"})
        return next(check for check in checks if check.name == "artifacts")

    assert examined(server.settings.artifacts).state == "ok"
    missing = examined("s3://nowhere/artifacts")
    assert (missing.state, "s3://nowhere/artifacts" in missing.said) == ("fail", True)
    assert "bucket" in missing.said
