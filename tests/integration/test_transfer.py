"""A transfer from another network: both trainings are tasks of the job, and travel with the bundle."""

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from service.lab.artifacts import Artifacts
from service.queue.dispatcher import Dispatcher
from service.queue.inprocess import InProcessExecutor
from service.queue.verbs import Service
from service.settings import Settings
from service.specs import JobSpec
from service.store import Database
from service.store.tables import attack_results, jobs, tasks
from workers.context import Context
from workers.run import execute

pytestmark = pytest.mark.slow

JOB: dict[str, Any] = {
    "architecture": "mlp",
    "dataset": "digits",
    "samples": 64,
    "recipe": {"epochs": 3},
    "attack": {
        "type": "transfer",
        "attack": {"type": "pgd", "norm": "linf", "eps": 0.1, "step_size": 0.02, "steps": 5},
        "source": {"architecture": "mlp", "seed": 1},
    },
}


def live(database: Database) -> int:
    with database.read() as connection:
        return len(connection.execute(select(jobs.c.id).where(jobs.c.finished_at.is_(None))).all())


def test_examples_of_another_network_are_judged_on_this_one(service: Service, tmp_path: Path) -> None:
    job_id = service.submit(JobSpec.model_validate(JOB), user="ann").body["id"]
    direct = {**JOB, "attack": JOB["attack"]["attack"]}
    direct_id = service.submit(JobSpec.model_validate(direct), user="ann").body["id"]
    artifacts: Artifacts = service.artifacts
    executor = InProcessExecutor(partial(execute, context=Context(artifacts, tmp_path)), cpus=2)
    settings = Settings(home=tmp_path, backoff_seconds=0)
    database: Database = service.database
    dispatcher = Dispatcher(database, artifacts, executor, settings, "one")
    deadline = time.monotonic() + 60
    while live(database) and time.monotonic() < deadline:
        dispatcher.tick()
    executor.close()

    with database.read() as connection:
        ended = dict(connection.execute(select(jobs.c.id, jobs.c.state)).all())
        robust = dict(
            connection.execute(
                select(jobs.c.id, attack_results.c.robust_accuracy).join(
                    attack_results, attack_results.c.task_id == jobs.c.attack_task_id
                )
            ).all()
        )
        trained = connection.scalars(select(tasks.c.spec).where(tasks.c.kind == "train")).all()
    assert ended == {job_id: "succeeded", direct_id: "succeeded"}
    assert sorted(spec["seed"] for spec in trained) == [0, 1]
    # Another network's examples break fewer images than those that are made on the network itself.
    assert robust[direct_id] < robust[job_id]
