"""Accepting jobs, on each kind of database: tasks are joined, reopened and let go of; requests are replayed."""

import re
import threading
from typing import Any

import pytest
from sqlalchemy import update

from service.errors import Conflict, IdempotencyMismatch, InvalidSpec, NotFound
from service.model.executor import Failed
from service.queue.verbs import Idempotency
from service.specs import JobSpec, Sweep
from service.store import tables
from service.store.tables import artifacts, attempts, events, idempotency_keys, jobs, tasks

PGD: dict[str, Any] = {"type": "pgd", "norm": "linf", "eps": "8/255", "step_size": "2/255", "steps": 10}
APGD: dict[str, Any] = {"type": "apgd", "norm": "linf", "eps": "8/255"}


def test_the_demos_sweep(lab: Any) -> None:
    body = lab.submit_sweep()
    expected = {"train": 2, "attack": 28, "measure": 14, "control": 4}
    assert body["jobs"] == 28
    assert body["tasks"] == body["to_compute"] == expected
    assert (body["known"], body["under_way"]) == ({}, {})
    assert lab.task_states() == {"queued": 2, "blocked": 46}
    assert lab.job_states() == {"queued": 28}
    assert {job.sweep_id for job in lab.rows(jobs)} == {body["id"]}
    assert len(lab.rows(tables.job_tasks)) == 28 * 5 - 4  # at s = 1 the attack is its own baseline


def test_a_second_equal_sweep_joins_what_is_under_way(lab: Any) -> None:
    lab.submit_sweep()
    body = lab.submit_sweep(user="bob")
    assert body["under_way"] == body["tasks"]
    assert not any(body["to_compute"].values())
    assert len(lab.rows(tasks)) == 48
    assert lab.job_states() == {"queued": 56}


def test_a_sweep_of_what_is_known_has_succeeded_as_it_is_accepted(lab: Any) -> None:
    lab.submit_sweep()
    lab.finish()
    first = lab.rows(jobs)
    body = lab.submit_sweep(user="bob")
    assert body["known"] == body["tasks"]
    second = lab.rows(jobs, sweep_id=body["id"])
    assert {job.state for job in second} == {"succeeded"}
    assert sorted((job.spec_digest, job.verdict) for job in second) == sorted((j.spec_digest, j.verdict) for j in first)
    assert len(lab.rows(attempts)) == 48
    assert [event.kind for event in lab.rows(events, job_id=second[0].id)] == ["job.submitted", "job.succeeded"]


def test_joining_a_running_task_runs(lab: Any) -> None:
    lab.submit()
    lab.grant()
    joined = lab.submit(user="bob", scale=5)
    assert lab.job(joined).state == "running"


def test_dry_run_writes_nothing_and_says_what_would_be(lab: Any) -> None:
    lab.submit()
    lab.finish()
    before = lab.dump()
    sweep = Sweep(name="s", base=lab.BASE, grid={"scale": [1, 5]})
    preview = lab.service.dry_run(sweep, user="ann")
    assert preview["known"] == {"train": 1, "measure": 1, "attack": 1, "control": 1}
    assert preview["to_compute"] == {"train": 0, "measure": 1, "attack": 1, "control": 0}
    assert lab.dump() == before


def test_a_submitted_job_says_where_it_is(lab: Any) -> None:
    reply = lab.service.submit(JobSpec.model_validate(lab.BASE), user="ann", labels={"paper": "x"})
    assert (reply.status, reply.location) == (201, f"/v1/jobs/{reply.body['id']}")
    job = lab.job(reply.body["id"])
    assert (job.user, job.labels, job.sequence, job.state) == ("ann", {"paper": "x"}, 1, reply.body["state"])
    assert set(reply.body["tasks"]) == {task.digest for task in lab.rows(tasks)}


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_what_failed_or_was_cancelled_is_reopened_by_a_new_job(lab: Any, end: str) -> None:
    first = lab.submit()
    [train] = lab.grant()
    if end == "failed":
        lab.fail(train, "no such file")
    else:
        lab.service.cancel_job(first, user="ann")
        lab.expire()
    assert set(lab.task_states()) <= {"failed", "cancelled"}
    second = lab.submit(user="bob", priority=7)
    assert lab.task_states() == {"queued": 1, "blocked": 3}
    row = lab.task(train.task_id)
    assert (row.generation, row.attempt, row.errors, row.reason) == (2, 1, 0, None)
    assert (row.sponsor, row.priority, row.sequence) == ("bob", 7, 2)
    lab.finish()
    assert (lab.job(first).state, lab.job(second).state) == (end, "succeeded")
    assert lab.task(train.task_id).attempt == 2


def test_a_child_that_was_cancelled_alone_does_not_wait_for_its_parent_again(lab: Any) -> None:
    job = lab.submit()
    lab.succeed(*lab.grant("train"))
    lab.service.cancel_job(job, user="ann")
    assert lab.task_states() == {"succeeded": 1, "cancelled": 3}
    lab.submit()
    assert lab.task_states() == {"succeeded": 1, "queued": 3}


def test_joining_a_held_task_is_held_with_its_reason(lab: Any) -> None:
    from service.model.executor import Lost

    lab.submit()
    for _ in range(3):
        [train] = lab.grant()
        lab.record(Lost(train.task_id, train.attempt, "worker_died", "SIGSEGV"))
    job = lab.job(lab.submit(user="bob"))
    assert job.state == "held"
    assert "SIGSEGV" in job.reason


class TestRank:
    def test_a_shared_task_ranks_as_its_best_job_which_pays_for_it(self, lab: Any) -> None:
        lab.submit(user="ann")
        best = lab.submit(user="bob", priority=5, scale=5)
        lab.submit(user="cyd", priority=5, scale=10)
        [train] = lab.rows(tasks, kind="train")
        assert (train.priority, train.sponsor, train.sequence) == (5, "bob", 2)
        lab.service.cancel_job(best, user="bob")
        [train] = lab.rows(tasks, kind="train")
        assert (train.priority, train.sponsor, train.sequence) == (5, "cyd", 3)

    def test_the_queue_is_in_this_order(self, lab: Any) -> None:
        from service.store import claiming

        for seed, priority in enumerate([0, 5, -3, 5]):
            lab.submit(seed=seed, priority=priority)
        with lab.database.read() as connection:
            queue = claiming.waiting(connection, 0.0, 3)
        assert [(task.priority, task.sequence) for task in queue] == [(5, 2), (5, 4), (0, 1)]


class TestCancelAndRetry:
    def test_cancelling_ends_what_nobody_else_needs(self, lab: Any) -> None:
        mine = lab.submit()
        lab.submit(user="bob", scale=5)
        lab.service.cancel_job(mine, user="ann")
        job = lab.job(mine)
        assert (job.state, job.reason) == ("cancelled", "cancelled by ann")
        # Train, panel and the attack at s = 1 serve bob too.
        assert lab.task_states() == {"queued": 1, "blocked": 4, "cancelled": 1}
        [cancelled] = lab.rows(tasks, state="cancelled")
        assert (cancelled.kind, cancelled.reason) == ("measure", "no live job needs it")

    def test_cancelling_asks_for_what_runs_to_be_stopped(self, lab: Any) -> None:
        job = lab.submit()
        [train] = lab.grant()
        lab.service.cancel_job(job, user="ann")
        row = lab.task(train.task_id)
        assert (row.state, row.cancel_requested) == ("running", True)

    def test_a_new_job_takes_the_request_back(self, lab: Any) -> None:
        job = lab.submit()
        [train] = lab.grant()
        lab.service.cancel_job(job, user="ann")
        lab.submit(user="bob")
        assert not lab.task(train.task_id).cancel_requested
        assert lab.task_states() == {"running": 1, "blocked": 3}

    def test_an_ended_job_cannot_be_cancelled(self, lab: Any) -> None:
        job = lab.submit()
        lab.finish()
        with pytest.raises(Conflict, match="is succeeded, so it cannot be cancelled"):
            lab.service.cancel_job(job, user="ann")

    def test_a_live_job_cannot_be_retried(self, lab: Any) -> None:
        with pytest.raises(Conflict, match="is queued, so it cannot be retried"):
            lab.service.retry_job(lab.submit(), user="ann")

    def test_there_is_no_such_job_or_sweep(self, lab: Any) -> None:
        for verb in (lab.service.cancel_job, lab.service.retry_job):
            with pytest.raises(NotFound, match="there is no job"):
                verb("nope", user="ann")
        for verb in (lab.service.cancel_sweep, lab.service.retry_failed):
            with pytest.raises(NotFound, match="there is no sweep"):
                verb("nope", user="ann")

    def test_retrying_reopens_only_what_did_not_succeed(self, lab: Any) -> None:
        job = lab.submit(scale=5)
        lab.succeed(*lab.grant("train"))
        grants = lab.grant()
        lab.succeed(*grants[1:])
        lab.fail(grants[0], "out of luck")
        assert (lab.job(job).state, lab.job(job).reason) == ("failed", "out of luck")
        lab.service.retry_job(job, user="ann")
        assert (lab.job(job).state, lab.job(job).reason) == ("running", None)
        assert lab.task_states() == {"succeeded": 4, "queued": 1}
        lab.finish()
        assert lab.job(job).state == "succeeded"

    def test_retrying_one_job_frees_others_that_were_held_by_the_same_task(self, lab: Any) -> None:
        from service.model.executor import Lost

        first, second = lab.submit(), lab.submit(user="bob", scale=5)
        for _ in range(3):
            [train] = lab.grant()
            lab.record(Lost(train.task_id, train.attempt, "out_of_memory", "killed"))
        assert lab.job_states() == {"held": 2}
        lab.service.retry_job(first, user="ann")
        assert lab.job_states() == {"queued": 2}
        lab.finish()
        assert lab.job(second).state == "succeeded"

    def test_what_is_held_waits_for_a_person_where_only_failed_jobs_are_retried(self, lab: Any) -> None:
        """Also the task that a failed job needs: another one failed it, and this one took its workers down."""
        from service.model.executor import Lost

        sweep = lab.submit_sweep({"scale": [5, 10]})["id"]
        lab.succeed(*lab.grant("train"))
        [wrong] = [grant for grant in lab.grant("attack") if grant.spec["scale"] == 5]
        lab.expire()
        for _ in range(3):
            [control] = lab.grant("control")
            lab.record(Lost(control.task_id, control.attempt, "out_of_memory", "killed"))
        assert lab.job_states() == {"held": 2}
        [wrong] = [grant for grant in lab.grant("attack") if grant.spec["scale"] == 5]
        lab.fail(wrong)
        assert lab.job_states() == {"failed": 1, "held": 1}
        lab.expire()
        assert lab.service.retry_failed(sweep, user="ann") == (1, {"failed": 1, "held": 1, "cancelled": 0})
        assert lab.task(control.task_id).state == "held"
        assert lab.service.retry_failed(sweep, user="ann", states=["failed", "held"])[0] == 2
        lab.finish()
        assert lab.job_states() == {"succeeded": 2}

    def test_a_job_that_failed_lets_go_of_its_other_tasks(self, lab: Any) -> None:
        lab.submit(scale=5)
        lab.succeed(*lab.grant("train"))
        lab.fail(lab.grant("control")[0])
        assert lab.task_states() == {"succeeded": 1, "failed": 1, "cancelled": 3}

    def test_a_sweep_is_cancelled_and_its_failed_jobs_are_retried(self, lab: Any) -> None:
        sweep = lab.submit_sweep()["id"]
        other = lab.submit(user="bob", scale=5)
        [mlp, cnn] = lab.grant("train")
        lab.fail(cnn)
        lab.succeed(mlp)
        assert lab.service.cancel_sweep(sweep, user="ann") == 14
        assert lab.job_states() == {"failed": 14, "cancelled": 14, "running": 1}
        assert lab.service.cancel_sweep(sweep, user="ann") == 0
        there_were = {"failed": 14, "held": 0, "cancelled": 14}
        assert lab.service.retry_failed(sweep, user="ann") == (14, there_were)
        assert lab.job_states() == {"queued": 14, "cancelled": 14, "running": 1}
        again = lab.service.retry_failed(sweep, user="ann", states=["cancelled"])
        assert again == (14, {**there_were, "failed": 0})
        lab.finish()
        assert lab.job_states() == {"succeeded": 29}
        assert lab.job(other).state == "succeeded"


PGD = {"type": "pgd", "norm": "linf", "eps": 0.1, "step_size": 0.02, "steps": 5}


def not_found(lab: Any, *grants: Any, made_on: str | None = None) -> None:
    """These tasks do not find the checkpoint of their network, or of another one (a training's digest)."""
    for grant in grants:
        [train] = lab.rows(tasks, digest=made_on or lab.task(grant.task_id).train_digest)
        [left] = lab.rows(tables.trainings, task_id=train.id)
        missing = left.checkpoint_digest
        lab.record(Failed(grant.task_id, grant.attempt, "missing_checkpoint", "not under the root", missing=missing))


class TestLostCheckpoint:
    def test_retrying_runs_its_training_again_and_keeps_what_had_succeeded(self, lab: Any) -> None:
        done = lab.submit()
        lab.finish()
        before = lab.rows(tables.attack_results)
        lost = lab.submit(scale=5)
        not_found(lab, *lab.grant())
        assert lab.job(lost).state == "failed"
        assert {row.end for row in lab.rows(attempts)} == {"succeeded", "missing_checkpoint"}
        lab.service.retry_job(lost, user="ann")
        assert lab.task_states() == {"queued": 1, "blocked": 2, "succeeded": 3}
        [train] = lab.rows(tasks, kind="train")
        assert (train.state, train.generation, train.attempt, train.sponsor) == ("queued", 2, 1, "ann")
        assert (lab.job(done).state, lab.rows(tables.attack_results)) == ("succeeded", before)
        lab.finish()
        assert (lab.job(lost).state, lab.task(train.id).attempt) == ("succeeded", 2)

    def test_what_is_queued_or_runs_on_it_waits_for_it_too(self, lab: Any) -> None:
        mine, other = lab.submit(), lab.submit(user="bob", scale=5)
        lab.succeed(*lab.grant("train"))
        lost, runs = lab.grant("measure")
        not_found(lab, lost)
        assert (lab.job(mine).state, lab.job(other).state) == ("failed", "running")
        assert lab.task_states() == {"succeeded": 1, "failed": 1, "running": 1, "queued": 3}
        lab.service.retry_job(mine, user="ann")
        assert lab.task_states() == {"queued": 1, "blocked": 5}
        assert (lab.job(mine).state, lab.job(other).state) == ("queued", "queued")
        not_found(lab, runs)  # which is nobody's any more
        assert lab.task_states() == {"queued": 1, "blocked": 5}
        lab.finish()
        assert lab.job_states() == {"succeeded": 2}

    def test_one_that_failed_before_its_training_ran_again_does_not_ask_for_that_once_more(self, lab: Any) -> None:
        first, second = lab.submit(), lab.submit(scale=5)
        lab.succeed(*lab.grant("train"))
        not_found(lab, *lab.grant())
        lab.service.retry_job(first, user="ann")
        lab.finish()
        lab.service.retry_job(second, user="ann")
        assert lab.task_states("train") == {"succeeded": 1}
        not_found(lab, *lab.grant("attack"))  # it is lost again
        lab.service.retry_job(second, user="ann")
        assert lab.task_states("train") == {"queued": 1}
        lab.finish()
        assert lab.job_states() == {"succeeded": 2}

    def test_a_new_job_that_needs_such_a_task_runs_its_training_again(self, lab: Any) -> None:
        lab.submit()
        lab.succeed(*lab.grant("train"))
        not_found(lab, *lab.grant())
        again = lab.submit(user="bob", priority=3)
        assert lab.task_states() == {"queued": 1, "blocked": 3}
        [train] = lab.rows(tasks, kind="train")
        assert (train.sponsor, train.priority) == ("bob", 3)
        lab.finish()
        assert lab.job(again).state == "succeeded"

    def test_of_a_transfer_only_the_training_whose_checkpoint_is_lost(self, lab: Any) -> None:
        job = lab.submit(attack={"type": "transfer", "attack": PGD, "source": {"architecture": "simple_cnn"}})
        lab.succeed(*lab.grant("train"))
        [source] = [row for row in lab.rows(tasks, kind="train") if row.spec["architecture"] == "simple_cnn"]
        [attack] = lab.grant("attack")
        not_found(lab, attack, made_on=source.digest)
        lab.service.retry_job(job, user="ann")
        assert {row.spec["architecture"]: row.state for row in lab.rows(tasks, kind="train")} == {
            "simple_cnn": "queued",
            "mlp": "succeeded",
        }
        assert lab.task(attack.task_id).state == "blocked"
        lab.finish()
        assert lab.job(job).state == "succeeded"


class TestIdempotency:
    JOB = Idempotency("key", "a" * 64)

    def submit(self, lab: Any, idempotency: Idempotency, user: str = "ann") -> Any:
        return lab.service.submit(JobSpec.model_validate(lab.BASE), user=user, idempotency=idempotency)

    def test_a_replay_is_the_same_answer_and_no_second_job(self, lab: Any) -> None:
        first = self.submit(lab, self.JOB)
        before = lab.dump()
        again = self.submit(lab, self.JOB)
        assert (again.status, again.location, again.body) == (first.status, first.location, first.body)
        assert (first.replayed, again.replayed) == (False, True)
        assert lab.dump() == before

    def test_a_replay_is_what_was_answered_then(self, lab: Any) -> None:
        self.submit(lab, self.JOB)
        lab.finish()
        assert self.submit(lab, self.JOB).body["state"] == "queued"

    def test_another_body_is_refused(self, lab: Any) -> None:
        self.submit(lab, self.JOB)
        with pytest.raises(IdempotencyMismatch, match="another body"):
            self.submit(lab, Idempotency("key", "b" * 64))

    def test_keys_are_each_users_own(self, lab: Any) -> None:
        self.submit(lab, self.JOB)
        assert not self.submit(lab, Idempotency("key", "b" * 64), user="bob").replayed

    def test_what_was_refused_leaves_the_key_free(self, lab: Any) -> None:
        wrong = JobSpec.model_validate({**lab.BASE, "dataset": "npz:unheard"})
        with pytest.raises(InvalidSpec):
            lab.service.submit(wrong, user="ann", idempotency=self.JOB)
        assert lab.rows(idempotency_keys) == []
        assert not self.submit(lab, self.JOB).replayed

    def test_a_sweep_too(self, lab: Any) -> None:
        sweep = Sweep(name="s", base=lab.BASE, grid=lab.DEMO)
        replies = [lab.service.submit_sweep(sweep, user="ann", idempotency=self.JOB) for _ in range(2)]
        assert replies[0].body == replies[1].body
        assert lab.job_states() == {"queued": 28}

    def test_one_key_from_many_threads_is_one_job(self, lab: Any) -> None:
        barrier = threading.Barrier(8)
        replies: list[Any] = []

        def submit() -> None:
            barrier.wait()
            replies.append(self.submit(lab, self.JOB))

        threads = [threading.Thread(target=submit) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({reply.body["id"] for reply in replies}) == 1
        assert sorted(reply.replayed for reply in replies) == [False] + [True] * 7
        assert len(lab.rows(jobs)) == 1


class TestOwnDatasets:
    @pytest.fixture
    def files(self, lab: Any) -> tuple[str, str]:
        import io

        import numpy as np

        def upload(n: int) -> str:
            buffer = io.BytesIO()
            np.savez(buffer, x=np.zeros((n, 4, 4, 3), np.uint8), y=np.arange(n) % 2)
            return str(lab.artifacts.write_chunks("dataset", [buffer.getvalue()]).digest)

        return upload(10), upload(6)

    def test_registering_and_using(self, lab: Any, files: tuple[str, str]) -> None:
        found = lab.service.register_dataset("mine", *files, user="ann")
        assert (found["name"], found["classes"], found["test_count"]) == ("npz:mine", 2, 6)
        assert {row.digest for row in lab.rows(artifacts, kind="dataset")} == set(files)
        lab.submit(dataset="npz:mine", samples=6)
        [train] = lab.rows(tasks, kind="train")
        assert train.spec["dataset"] == {"name": "npz:mine", "train_sha256": files[0], "test_sha256": files[1]}

    def test_samples_left_out_are_all_of_a_small_test_set(self, lab: Any, files: tuple[str, str]) -> None:
        lab.service.register_dataset("mine", *files, user="ann")
        job = {name: value for name, value in lab.BASE.items() if name != "samples"} | {"dataset": "npz:mine"}
        left_out = lab.service.submit(JobSpec.model_validate(job), user="ann").body
        assert lab.job(left_out["id"]).spec["samples"] == 6
        written = lab.service.submit(JobSpec.model_validate({**job, "samples": 6}), user="bob").body
        assert written["tasks"] == left_out["tasks"]
        sweep = {"name": "both", "base": job, "grid": {"scale": [1, 5]}, "include": [{"samples": 6}, {"samples": 3}]}
        body = lab.service.submit_sweep(Sweep.model_validate(sweep), user="ann").body
        assert (body["jobs"], body["repetitions"]) == (3, 1)
        longer = lab.service.extend(body["id"], {"scale": [1, 5, 9]}, user="ann").body
        assert longer["jobs"] == 1  # the cells that were there are known by their digests

    def test_the_same_again_changes_nothing_and_others_are_refused(self, lab: Any, files: tuple[str, str]) -> None:
        lab.service.register_dataset("mine", *files, user="ann")
        before = lab.dump()
        lab.service.register_dataset("mine", *files, user="bob")
        assert lab.dump() == before
        with pytest.raises(Conflict, match="registered with other files"):
            lab.service.register_dataset("mine", files[1], files[0], user="ann")

    def test_the_same_files_under_two_names(self, lab: Any, files: tuple[str, str]) -> None:
        lab.service.register_dataset("mine", *files, user="ann")
        lab.service.register_dataset("ours", *files, user="bob")
        assert len(lab.rows(artifacts, kind="dataset")) == 2

    def test_unregistered_or_too_small(self, lab: Any, files: tuple[str, str]) -> None:
        lab.service.register_dataset("mine", *files, user="ann")
        with pytest.raises(InvalidSpec, match=r"/dataset: npz:yours is not registered \(registered: npz:mine\)"):
            lab.submit(dataset="npz:yours", samples=6)
        with pytest.raises(InvalidSpec, match="/samples: npz:mine has 6 test images, 7 were asked for"):
            lab.submit(dataset="npz:mine", samples=7)
        grid = {"dataset": ["npz:mine"], "samples": [1, 7]}
        said = (
            "/grid/samples/1: npz:mine has 6 test images, 7 were asked for (in the cell dataset 'npz:mine', samples 7)"
        )
        with pytest.raises(InvalidSpec, match=re.escape(said)):
            lab.submit_sweep(grid)
        assert lab.rows(jobs) == []

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"attack": "apgd_dlr"}, "/attack: the dlr loss needs at least 3 classes, the data set has 2"),
            ({"attack": {**PGD, "loss": "dlr"}}, "/attack/loss: the dlr loss needs at least 3 classes"),
            ({"attack": {**APGD, "loss": "dlr", "targeted": True}}, "/attack/loss: the targeted dlr loss needs at"),
            ({"attack": "autoattack"}, "/attack: autoattack needs at least 4 classes, the data set has 2"),
            ({"attack": {"type": "autoattack", "norm": "l2", "eps": 1}}, "/attack/type: autoattack needs at least 4"),
            ({"attack": {"type": "transfer", "attack": {**PGD, "loss": "dlr"}}}, "/attack/attack/loss: the dlr loss"),
            ({"attack": {**APGD, "targeted": True, "targets": 2}}, "/attack/targets: 2 targets, but an image has 1"),
            ({"attack": {**PGD, "norm": "l2", "eps": 7}}, "/attack/eps: 7 is more than 6.928, the l2 distance"),
            ({"attack": {**PGD, "norm": "l2", "step_size": 7}}, "/attack/step_size: 7 is more than 6.928"),
            ({"architecture": "simple_cnn"}, "/architecture: simple_cnn takes images of at least 8x8 pixels"),
            (
                {"attack": {"type": "transfer", "attack": PGD, "source": {"architecture": "vgg11_bn"}}},
                "/attack/source/architecture: vgg11_bn takes images of at least 32x32 pixels, these are 4x4",
            ),
            ({"recipe": {"train_samples": 99}}, "/recipe/train_samples: 99 images to train on were asked for, of"),
            (
                {"recipe": {"name": "trades", "keep": "best", "held_out": 99}},
                "/recipe/held_out: 0 of",
            ),
        ],
    )
    def test_what_its_images_or_classes_do_not_allow(
        self, lab: Any, files: tuple[str, str], changed: dict[str, Any], said: str
    ) -> None:
        lab.service.register_dataset("mine", *files, user="ann")
        where = {**lab.BASE, "architecture": "mlp", "dataset": "npz:mine", "samples": 6}
        with pytest.raises(InvalidSpec, match=re.escape(said)):
            lab.service.submit(JobSpec.model_validate({**where, **changed}), user="ann")
        sweep = {"name": "s", "base": where, "grid": {"scale": [1, 5]}, "include": [changed]}
        name = next(iter(changed))
        with pytest.raises(InvalidSpec) as caught:
            lab.service.submit_sweep(Sweep.model_validate(sweep), user="ann")
        [(pointer, sentence)] = caught.value.errors
        assert (f"/include/0{said.partition(':')[0]}", True) == (pointer, f"(in the cell {name} " in sentence)
        assert lab.rows(jobs) == []

    def test_what_they_just_allow(self, lab: Any, files: tuple[str, str]) -> None:
        lab.service.register_dataset("mine", *files, user="ann")
        for attack in ({**APGD, "targeted": True}, {**PGD, "norm": "l2", "eps": "6.928", "step_size": 6}):
            lab.submit(dataset="npz:mine", architecture="mlp", samples=6, attack=attack)
        assert len(lab.rows(jobs)) == 2

    def test_imported_weights_on_them(self, lab: Any, files: tuple[str, str]) -> None:
        lab.service.register_dataset("mine", *files, user="ann")
        recipe = {"name": "imported", "checkpoint": "theirs"}
        with pytest.raises(InvalidSpec, match="/attack: autoattack needs at least 4 classes"):
            lab.submit(dataset="npz:mine", architecture="mlp", samples=6, recipe=recipe, attack="autoattack")

    def test_the_answer_counts_test_images_that_are_training_images(self, lab: Any, files: tuple[str, str]) -> None:
        assert lab.service.register_dataset("mine", *files, user="ann")["test_images_in_train"] == 6
        [event] = lab.rows(events, kind="dataset.registered")
        assert event.data["test_images_in_train"] == 6
        with pytest.raises(InvalidSpec, match=r"/test: train\.npz and test\.npz are the same file"):
            lab.service.register_dataset("again", files[0], files[0], user="ann")


def test_a_sweep_is_accepted_whole_or_not_at_all(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.store import jobs

    def fails(*_: Any) -> None:
        raise RuntimeError("the machine stops here")

    before = lab.dump()
    monkeypatch.setattr(jobs, "settle_jobs", fails)
    monkeypatch.setattr(jobs, "rerank", fails)
    with pytest.raises(RuntimeError):
        lab.submit_sweep()
    assert lab.dump() == before


def test_measures_beyond_the_closed_forms_are_tasks_of_the_job(lab: Any) -> None:
    job = lab.submit(measures=["sam_sharpness", "fisher_rao"])
    assert lab.task_states() == {"queued": 1, "blocked": 5}
    lab.finish()
    assert lab.job(job).state == "succeeded"


def test_a_transfer_waits_for_both_networks(lab: Any) -> None:
    attack = {"type": "fgsm", "norm": "linf", "eps": 0.1}
    job = lab.submit(attack={"type": "transfer", "attack": attack, "source": {"architecture": "simple_cnn"}})
    trains = lab.grant()
    assert [grant.spec["architecture"] for grant in trains] == ["mlp", "simple_cnn"]
    lab.succeed(trains[0])
    assert lab.task_states("attack") == {"blocked": 1}
    assert lab.task_states("control") == {"queued": 1}
    lab.fail(trains[1], "it diverged")
    assert lab.job(job).state == "failed"
    assert lab.job(job).reason == "it diverged"
    lab.service.retry_job(job, user="ann")
    lab.finish()
    assert lab.job(job).state == "succeeded"


def test_a_thousand_jobs_keep_their_order(lab: Any) -> None:
    body = lab.submit_sweep({"scale": [1 + i / 1000 for i in range(1000)]})
    found = lab.rows(jobs, sweep_id=body["id"])
    assert [job.sequence for job in found] == list(range(1, 1001))
    assert [job.scale for job in found] == [1 + i / 1000 for i in range(1000)]
    assert [job.spec["scale"] for job in found] == [job.scale for job in found]
    submitted = [event for event in lab.rows(events) if event.kind == "job.submitted"]
    assert [event.job_id for event in submitted] == [job.id for job in found]


def test_numbers_are_stored_to_the_last_bit(lab: Any) -> None:
    job = lab.job(lab.submit(attack={"type": "fgsm", "norm": "l2", "eps": "1/3"}, scale="1e-3"))
    assert (job.eps, job.scale) == (1 / 3, 0.001)
    [attack] = {row.spec["attack"]["eps"] for row in lab.rows(tasks, kind="attack")}
    assert attack == 1 / 3


def test_a_verdict_is_fixed(lab: Any) -> None:
    job = lab.submit()
    lab.finish()
    with lab.database.write() as connection:
        connection.execute(update(tables.outcome_bits).values(packed=b"\0\0"))
    before = lab.job(job)
    later = lab.submit(user="bob")
    assert lab.job(job) == before
    assert lab.job(later).verdict is not None
