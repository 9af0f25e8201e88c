"""What is unfinished in a store is simulated with its timings, and nothing in it changes; on each kind of database."""

from dataclasses import replace
from typing import Any

import pytest

from service.errors import InvalidSpec
from service.model.executor import Grant, Succeeded
from service.operations.simulation import Submission, nodes_with, simulate
from service.operations.what_if import STATED_SECONDS, lab_of
from service.settings import Settings
from service.specs import JobSpec
from service.store import claiming, users
from service.store.simulated import have_used
from service.store.tables import jobs, tasks

SETTINGS = Settings()
ONE_GPU = nodes_with(1, 4)
SECONDS = {"train": 50.0, "measure": 5.0, "attack": 10.0, "control": 15.0}


def succeed(lab: Any, grant: Grant) -> None:
    """Succeed, after as many device seconds as tasks of this kind take here."""
    made = lab.outcome(grant)
    took = {"device": "gpu", "device_seconds": SECONDS[grant.spec["kind"]]}
    lab.record(Succeeded(grant.task_id, grant.attempt, replace(made, provenance={**made.provenance, **took})))


@pytest.fixture
def queued(lab: Any) -> Any:
    """A job is done; of Ann's second job the network is trained, and Bob's has not begun. Zoe's sweep is paused."""
    lab.submit("ann", seed=1)
    while grants := lab.grant():
        for grant in grants:
            succeed(lab, grant)
    lab.submit("ann", seed=2)
    for grant in lab.grant("train"):
        succeed(lab, grant)
    lab.submit("bob", seed=3)
    paused = lab.submit_sweep({"seed": [4]}, user="zoe")
    lab.service.pause_sweep(paused["id"], user="zoe")
    return lab


def test_what_is_unfinished_takes_the_time_that_such_tasks_took(queued: Any) -> None:
    before = queued.dump()
    now = lab_of(queued.database, SETTINGS, STATED_SECONDS)
    done = simulate(now.load, ONE_GPU, now.lengths, SETTINGS)
    assert queued.dump() == before
    assert (done.tasks, done.left, now.lengths.assumed) == (3 + 4, {}, {})
    assert done.makespan_seconds == pytest.approx(2 * (5 + 10 + 15) + 50, abs=0.1)
    assert {user.name: user.tasks for user in done.users} == {"ann": 3, "bob": 4}


def test_what_a_file_adds_is_computed_only_if_the_store_has_it_not(queued: Any) -> None:
    now = lab_of(queued.database, SETTINGS, STATED_SECONDS)
    cells = [JobSpec.model_validate({**queued.BASE, "seed": seed, "scale": 1}) for seed in (1, 2)]
    done = simulate(replace(now.load, submissions=[Submission(0.0, "eve", cells)]), ONE_GPU, now.lengths, SETTINGS)
    assert (done.tasks, [user.name for user in done.users if user.tasks]) == (3, ["eve"])


def test_a_running_task_goes_on_from_where_it_is(queued: Any) -> None:
    [training] = queued.grant("train")
    with queued.database.write() as connection:
        connection.execute(tasks.update().where(tasks.c.id == training.task_id).values(progress=0.8))
    now = lab_of(queued.database, SETTINGS, STATED_SECONDS)
    done = simulate(now.load, ONE_GPU, now.lengths, SETTINGS)
    assert done.makespan_seconds == pytest.approx(2 * (5 + 10 + 15) + 10, abs=0.1)


def test_users_bring_their_weights_caps_and_what_they_have_used(queued: Any) -> None:
    with queued.database.write() as connection:
        limits = {"weight": 2.0, "max_gpus": 3.0}
        users.put_user(connection, queued.database.now(connection), "ann", limits)
        have_used(connection, queued.database.now(connection), "ann", 500.0)
    now = lab_of(queued.database, SETTINGS, STATED_SECONDS)
    ann, bob = now.load.users["ann"], now.load.users["bob"]
    assert (ann.weight, ann.max_gpus, bob.weight, bob.max_gpus) == (2.0, 3.0, 1.0, None)
    assert ann.device_seconds == pytest.approx(500.0, abs=1.0)
    assert bob.device_seconds == 0.0


def test_a_boosted_job_is_boosted_there_too(queued: Any) -> None:
    [job] = queued.rows(jobs, user="bob")
    queued.service.boost_job(job.id, user="admin")
    load = lab_of(queued.database, SETTINGS, STATED_SECONDS).load
    assert {submission.user: submission.boosted for submission in load.submissions} == {"ann": False, "bob": True}


@pytest.mark.parametrize(
    ("capacity", "gpus"),
    [
        ({"cpus": 8.0, "gpus": 2.0, "nodes": [{"CPU": 4, "GPU": 1}, {"CPU": 4, "GPU": 1}], "names": ["a", "b"]}, 2),
        ({"cpus": 8.0, "gpus": 0.0, "nodes": [], "names": []}, 0),
        ({"cpus": 0.0, "gpus": 0.0, "nodes": [], "names": []}, None),
    ],
)
def test_the_cluster_is_the_one_that_was_reported_last(queued: Any, capacity: Any, gpus: float | None) -> None:
    assert lab_of(queued.database, SETTINGS, STATED_SECONDS).nodes is None
    with queued.database.write() as connection:
        now = queued.database.now(connection)
        claiming.lead(connection, now, "d1", None, 60.0, {"capacity": capacity})
    nodes = lab_of(queued.database, SETTINGS, STATED_SECONDS).nodes
    assert (None if nodes is None else sum(node["GPU"] for node in nodes.values())) == gpus
    assert (None if nodes is None else sum(node["CPU"] for node in nodes.values())) == (None if gpus is None else 8)


def test_a_job_that_this_version_refuses_is_named(queued: Any) -> None:
    [job] = queued.rows(jobs, user="bob")
    with queued.database.write() as connection:
        connection.execute(jobs.update().where(jobs.c.id == job.id).values(spec={**job.spec, "scale": -1}))
    with pytest.raises(InvalidSpec, match=f"/scale: .* \\(in job {job.id}"):
        lab_of(queued.database, SETTINGS, STATED_SECONDS)
