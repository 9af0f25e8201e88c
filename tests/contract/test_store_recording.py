"""What attempts report: recorded once, and only while the attempt is the current one. On each kind of database."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from service.model.executor import (
    ArtifactRef,
    Bits,
    Failed,
    Grant,
    Lost,
    Message,
    Outcome,
    Progress,
    Started,
    Succeeded,
)
from service.model.retrying import Patience
from service.store import tables
from service.store.listed import listed
from service.store.settling import settle_jobs
from service.store.tables import artifacts, attempts, events, outcome_bits, tasks, trainings

EPOCH = ArtifactRef("e" * 64, 10, "epoch_state")


def messages_of(grant: Grant, lab: Any) -> list[Message]:
    """Every kind of thing that an attempt can say, in every variant that is written differently."""
    task, attempt = grant.task_id, grant.attempt
    return [
        Started(task, attempt, "late pid 1"),
        Progress(task, attempt, 0.9, {"epoch": 9}),
        Progress(task, attempt, 0.9, {"epoch": 9}, EPOCH),
        Succeeded(task, attempt, lab.outcome(grant)),
        Failed(task, attempt, "error", "late"),
        Failed(task, attempt, "configuration", "late", "traceback"),
        *(
            Lost(task, attempt, reason, "late")
            for reason in ("worker_died", "out_of_memory", "node_died", "executor_lost", "cancelled", "given_back")
        ),
    ]


def superseded_by_a_new_grant(lab: Any, grant: Grant) -> None:
    lab.expire()
    assert lab.grant()[0].attempt == grant.attempt + 1


def superseded_by_an_expired_lease(lab: Any, grant: Grant) -> None:
    lab.expire()


def superseded_by_its_own_answer(lab: Any, grant: Grant) -> None:
    lab.succeed(grant)


def superseded_by_its_own_failure(lab: Any, grant: Grant) -> None:
    lab.fail(grant)


def superseded_by_a_new_generation(lab: Any, grant: Grant) -> None:
    lab.fail(grant)
    lab.submit(user="bob")
    lab.grant()


def superseded_by_a_success_of_another(lab: Any, grant: Grant) -> None:
    lab.expire()
    lab.succeed(*lab.grant())


def superseded_by_a_cancellation(lab: Any, grant: Grant) -> None:
    for job in lab.rows(tables.jobs):
        lab.service.cancel_job(job.id, user="ann")
    lab.record(Lost(grant.task_id, grant.attempt, "cancelled", "stopped"))


@pytest.mark.parametrize(
    "supersede",
    [
        superseded_by_a_new_grant, superseded_by_an_expired_lease, superseded_by_its_own_answer,
        superseded_by_its_own_failure, superseded_by_a_new_generation, superseded_by_a_success_of_another,
        superseded_by_a_cancellation,
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["train", "attack"])
def test_a_superseded_attempt_changes_nothing_at_all(
    lab: Any, supersede: Callable[[Any, Grant], None], kind: str
) -> None:
    lab.submit()
    if kind == "attack":
        lab.succeed(*lab.grant("train"))
    grant = lab.grant(kind)[0]
    late = messages_of(grant, lab)
    supersede(lab, grant)
    before = lab.dump()
    for message in late:
        assert lab.record(message) == []
        assert lab.dump() == before, f"{type(message).__name__} was written"
    assert lab.record(*late) == []
    assert lab.dump() == before


def test_nobodys_messages_change_nothing(lab: Any) -> None:
    lab.submit()
    [grant] = lab.grant()
    unheard = Grant("no such task", 1, "d", {"kind": "train"})
    ahead = Grant(grant.task_id, grant.attempt + 1, grant.digest, grant.spec)
    before = lab.dump()
    lab.record(*messages_of(unheard, lab), *messages_of(ahead, lab))
    assert lab.dump() == before


def test_one_batch_with_two_answers_counts_the_first(lab: Any) -> None:
    lab.submit()
    [grant] = lab.grant()
    answer = Succeeded(grant.task_id, grant.attempt, lab.outcome(grant))
    lab.record(answer, Failed(grant.task_id, grant.attempt, "error", "late"), answer)
    assert lab.task(grant.task_id).state == "succeeded"
    assert [event.kind for event in lab.rows(events, task_id=grant.task_id)].count("task.succeeded") == 1


class TestSuccess:
    def test_numbers_bits_curves_and_provenance_are_kept(self, lab: Any) -> None:
        lab.submit()
        lab.succeed(*lab.grant("train"))
        [grant] = lab.grant("attack")
        bits = {"clean_correct": Bits(16, b"\xff\xf0"), "robust": Bits(16, b"\x0f\xf0")}
        numbers = {"robust_accuracy": 0.5, "clean_accuracy": 0.75, "steps_taken": 10, "blind": None}
        outcome = Outcome(numbers, {"trajectory": {"loss": [0.5, 1.5]}}, bits, (), {"device": "cpu"})
        lab.record(Started(grant.task_id, 1, "host pid 7 cpu"), Succeeded(grant.task_id, 1, outcome))
        [row] = lab.rows(tables.attack_results)
        assert (row.robust_accuracy, row.clean_accuracy, row.robust_loss, row.numbers) == (0.5, 0.75, None, numbers)
        assert {row.name: (row.n, row.packed) for row in lab.rows(outcome_bits, task_id=grant.task_id)} == {
            name: (bit.n, bit.packed) for name, bit in bits.items()
        }
        [curve] = lab.rows(tables.curves, task_id=grant.task_id)
        assert (curve.name, curve.points) == ("trajectory", {"loss": [0.5, 1.5]})
        [attempt] = lab.rows(attempts, task_id=grant.task_id)
        assert (attempt.worker, attempt.end, attempt.provenance) == ("host pid 7 cpu", "succeeded", {"device": "cpu"})
        task = lab.task(grant.task_id)
        assert (task.state, task.progress, task.worker) == ("succeeded", 1.0, "host pid 7 cpu")

    def test_there_is_no_nan_in_json(self, lab: Any) -> None:
        lab.submit()
        [grant] = lab.grant()
        lab.record(Progress(grant.task_id, 1, 0.5, {"loss": math.nan, "past": [1.0, math.inf]}))
        assert lab.task(grant.task_id).detail == {"loss": None, "past": [1.0, None]}
        outcome = lab.outcome(grant, train_loss=math.nan, test_loss=-math.inf, deep=1.5)
        lab.record(Succeeded(grant.task_id, 1, outcome))
        [row] = lab.rows(trainings)
        assert (row.train_loss, row.test_loss, row.numbers["train_loss"], row.numbers["deep"]) == (
            None,
            None,
            None,
            1.5,
        )

    def test_children_are_queued_and_know_the_checkpoint(self, lab: Any) -> None:
        from service.store import claiming

        lab.submit()
        [train] = lab.grant()
        with lab.database.read() as connection:
            assert claiming.checkpoints_of(connection, [train.digest])[train.digest] == (train.spec, None)
        lab.succeed(train)
        assert lab.task_states() == {"succeeded": 1, "queued": 3}
        [checkpoint] = lab.outcome(train).artifacts
        with lab.database.read() as connection:
            assert claiming.checkpoints_of(connection, [train.digest])[train.digest] == (train.spec, checkpoint)
        [row] = lab.rows(artifacts)
        assert (row.digest, row.task_id, row.kind) == (checkpoint.digest, train.task_id, "checkpoint")

    def test_the_last_task_to_land_gives_the_verdict(self, lab: Any) -> None:
        job = lab.submit(scale=5)
        lab.succeed(*lab.grant("train"))
        grants = lab.grant()
        lab.succeed(*grants[:-1])
        assert (lab.job(job).state, lab.job(job).verdict) == ("running", None)
        lab.succeed(grants[-1])
        row = lab.job(job)
        assert (row.state, row.verdict, row.verdict_reasons, row.masked_fraction) == ("succeeded", "trusted", [], 0.0)
        assert row.verdict_checks["masked"] == "passed"

    def test_a_masked_job_says_so(self, lab: Any) -> None:
        job = lab.submit(scale=5)
        lab.succeed(*lab.grant("train"))
        for grant in lab.grant():
            outcome = lab.outcome(grant)
            if grant.spec["kind"] == "attack":
                robust = b"\xff\xff" if grant.spec["scale"] == 5 else b"\0\0"
                outcome.bits["robust"] = Bits(16, robust)
            lab.record(Succeeded(grant.task_id, grant.attempt, outcome))
        row = lab.job(job)
        assert (row.verdict, row.verdict_reasons, row.masked_fraction) == ("invalid", ["masked"], 1.0)

    def test_a_retrained_network_replaces_what_was_there(self, lab: Any) -> None:
        lab.submit()
        [train] = lab.grant()
        lab.succeed(train)
        with lab.database.write() as connection:  # its bytes are lost: a new generation
            from service.model.jobs import TaskState
            from service.store import joining

            joining.reopen(connection, 0.0, "ann", {train.task_id: TaskState.QUEUED})
            settle_jobs(connection, 0.0, "ann", listed([lab.rows(tables.jobs)[0].id]))
        [again] = lab.grant("train")
        lab.record(Succeeded(again.task_id, again.attempt, lab.outcome(again, test_accuracy=0.1)))
        [row] = lab.rows(trainings)
        assert (again.attempt, row.test_accuracy) == (2, 0.1)


class TestProgress:
    def test_it_is_seen(self, lab: Any) -> None:
        lab.submit()
        [grant] = lab.grant()
        lab.record(Started(grant.task_id, 1, "w"), Progress(grant.task_id, 1, 0.25, {"epoch": 1}))
        row = lab.task(grant.task_id)
        assert (row.progress, row.detail, row.worker) == (0.25, {"epoch": 1}, "w")

    def test_a_training_resumes_from_its_last_epoch_state(self, lab: Any) -> None:
        lab.submit()
        [grant] = lab.grant()
        second = ArtifactRef("f" * 64, 20, "epoch_state")
        assert lab.record(Progress(grant.task_id, 1, 0.1, {}, EPOCH)) == []
        assert lab.record(Progress(grant.task_id, 1, 0.2, {}, second)) == [EPOCH.digest]
        assert [row.digest for row in lab.rows(artifacts)] == [second.digest]
        lab.expire()
        [again] = lab.grant()
        assert again.resume == second
        lab.succeed(again)
        assert [row.kind for row in lab.rows(artifacts)] == ["checkpoint"]
        assert lab.task(grant.task_id).resume_digest is None

    def test_success_hands_back_the_epoch_state(self, lab: Any) -> None:
        lab.submit()
        [grant] = lab.grant()
        lab.record(Progress(grant.task_id, 1, 0.1, {}, EPOCH))
        assert lab.record(Succeeded(grant.task_id, 1, lab.outcome(grant))) == [EPOCH.digest]

    def test_the_same_epoch_state_twice_is_still_needed(self, lab: Any) -> None:
        lab.submit()
        [grant] = lab.grant()
        for _ in range(2):
            assert lab.record(Progress(grant.task_id, 1, 0.1, {}, EPOCH)) == []

    def test_bytes_that_another_training_rests_on_stay(self, lab: Any) -> None:
        lab.submit()
        lab.submit(replicate=1)  # on one CPU the same bytes, bit by bit
        first, second = lab.grant()
        lab.record(Progress(first.task_id, 1, 0.1, {}, EPOCH), Progress(second.task_id, 1, 0.1, {}, EPOCH))
        assert lab.record(Succeeded(first.task_id, 1, lab.outcome(first))) == []
        assert lab.record(Succeeded(second.task_id, 1, lab.outcome(second))) == [EPOCH.digest]

    def test_a_superseded_attempts_bytes_are_not_deleted_under_its_successor(self, lab: Any) -> None:
        lab.submit()
        [old] = lab.grant()
        lab.expire()
        [new] = lab.grant()
        lab.record(Progress(new.task_id, new.attempt, 0.1, {}, EPOCH))
        assert lab.record(Progress(old.task_id, old.attempt, 0.1, {}, EPOCH)) == []


class TestFailure:
    def test_an_error_is_tried_again_and_again_but_not_for_ever(self, lab: Any) -> None:
        job = lab.submit()
        for attempt in (1, 2, 3):
            [grant] = lab.grant()
            assert grant.attempt == attempt
            lab.record(Failed(grant.task_id, attempt, "error", f"bad luck {attempt}", "Traceback ..."))
        row = lab.task(grant.task_id)
        assert (row.state, row.errors, row.reason) == ("failed", 3, "bad luck 3")
        assert [(row.end, row.message) for row in lab.rows(attempts)] == [
            ("error", "bad luck 1"),
            ("error", "bad luck 2"),
            ("failed", "bad luck 3"),
        ]
        assert lab.rows(attempts)[0].traceback == "Traceback ..."
        assert (lab.job(job).state, lab.job(job).reason) == ("failed", "bad luck 3")

    def test_a_configuration_error_is_final(self, lab: Any) -> None:
        lab.submit()
        [grant] = lab.grant()
        lab.record(Failed(grant.task_id, 1, "configuration", "put the files into data/"))
        assert (lab.task(grant.task_id).state, lab.task(grant.task_id).errors) == ("failed", 1)

    def test_the_wait_before_a_retry_doubles(self, lab: Any) -> None:
        lab.submit()
        patience = Patience(max_errors=9, max_suspect_losses=3, backoff_seconds=10.0)
        for expected in (10, 20, 40, 80):
            [grant] = lab.grant(at=1e12)
            lab.record(Failed(grant.task_id, grant.attempt, "error", "bad luck"), patience=patience, at=1000.0)
            wait = lab.task(grant.task_id).not_before - 1000.0
            assert 0.75 * expected <= wait <= 1.25 * expected
            assert lab.grant(at=1000.0 + 0.7 * expected) == []

    def test_waits_do_not_overflow(self) -> None:
        assert math.isfinite(Patience(1, 1, 5.0).wait_seconds(10_000))

    def test_children_are_cancelled_and_jobs_fail_with_the_reason(self, lab: Any) -> None:
        lab.submit_sweep({"scale": [1, 5]})
        [train] = lab.grant()
        lab.fail(train, "diverged at epoch 3, loss 1e9")
        assert lab.task_states() == {"failed": 1, "cancelled": 5}
        assert {row.reason for row in lab.rows(tasks, state="cancelled")} == {"upstream: diverged at epoch 3, loss 1e9"}
        assert {(row.state, row.reason) for row in lab.rows(tables.jobs)} == {
            ("failed", "diverged at epoch 3, loss 1e9")
        }

    def test_others_go_on(self, lab: Any) -> None:
        lab.submit(architecture="simple_cnn")
        lab.submit()
        first, _ = lab.grant()
        lab.fail(first)
        lab.expire()
        lab.finish()
        assert lab.job_states() == {"failed": 1, "succeeded": 1}

    def test_what_nobody_wants_any_more_is_not_tried_again(self, lab: Any) -> None:
        job = lab.submit()
        [grant] = lab.grant()
        lab.service.cancel_job(job, user="ann")
        lab.record(Failed(grant.task_id, 1, "error", "bad luck"))
        assert (lab.task(grant.task_id).state, lab.task(grant.task_id).reason) == ("cancelled", "no live job needs it")


class TestLoss:
    @pytest.mark.parametrize("reason", ["worker_died", "out_of_memory"])
    def test_what_kills_its_worker_is_held(self, lab: Any, reason: Any) -> None:
        job = lab.submit()
        other = lab.submit(user="bob", architecture="simple_cnn")
        for attempt in (1, 2, 3):
            grants = lab.grant("train")
            lab.succeed(*grants[1:])
            lab.record(Lost(grants[0].task_id, attempt, reason, "SIGKILL"))
        row = lab.task(grants[0].task_id)
        assert (row.state, row.suspect_losses, row.errors) == ("held", 3, 0)
        assert row.reason == "held for review: it lost its worker 3 times, last: SIGKILL"
        assert (lab.job(job).state, lab.job(job).reason) == ("held", row.reason)
        lab.finish()
        assert lab.job(other).state == "succeeded"
        lab.service.retry_job(job, user="ann")
        lab.finish()
        assert lab.job(job).state == "succeeded"

    @pytest.mark.parametrize("reason", ["node_died", "executor_lost", "given_back", "cancelled"])
    def test_a_lost_node_or_dispatcher_costs_and_holds_nothing(self, lab: Any, reason: Any) -> None:
        lab.submit()
        for attempt in range(1, 11):
            [grant] = lab.grant()
            lab.record(Lost(grant.task_id, attempt, reason, "gone"))
        row = lab.task(grant.task_id)
        assert (row.state, row.suspect_losses, row.errors, row.not_before) == ("queued", 0, 0, 0.0)

    def test_a_new_epoch_clears_the_suspicion(self, lab: Any) -> None:
        lab.submit()
        for attempt in range(1, 11):
            [grant] = lab.grant()
            epoch = ArtifactRef(f"{attempt:064}", 10, "epoch_state")
            lab.record(Progress(grant.task_id, attempt, 0.1, {}, epoch))
            lab.record(Lost(grant.task_id, attempt, "worker_died", "SIGKILL"))
        assert (lab.task(grant.task_id).state, lab.task(grant.task_id).suspect_losses) == ("queued", 1)

    def test_what_was_cancelled_ends_and_is_not_tried_again(self, lab: Any) -> None:
        job = lab.submit()
        [grant] = lab.grant()
        lab.service.cancel_job(job, user="ann")
        lab.record(Lost(grant.task_id, 1, "cancelled", "stopped"))
        assert (lab.task(grant.task_id).state, lab.task(grant.task_id).reason) == ("cancelled", "no live job needs it")
        assert lab.rows(attempts)[0].end == "cancelled"

    def test_who_wants_what_is_being_stopped_pays_for_it(self, lab: Any) -> None:
        job = lab.submit(user="ann")
        [grant] = lab.grant()
        lab.service.cancel_job(job, user="ann")
        lab.submit(user="bob")
        row = lab.task(grant.task_id)
        assert (row.sponsor, row.cancel_requested) == ("bob", False)

    def test_a_cancelled_attempt_that_someone_wants_after_all_is_queued_again(self, lab: Any) -> None:
        job = lab.submit()
        [grant] = lab.grant()
        lab.service.cancel_job(job, user="ann")
        lab.submit(user="bob")
        lab.record(Lost(grant.task_id, 1, "cancelled", "stopped"))
        assert lab.task(grant.task_id).state == "queued"

    def test_a_result_that_came_before_the_cancellation_is_kept(self, lab: Any) -> None:
        job = lab.submit()
        [grant] = lab.grant()
        lab.service.cancel_job(job, user="ann")
        lab.succeed(grant)
        assert lab.task(grant.task_id).state == "succeeded"
        assert lab.job(job).state == "cancelled"
