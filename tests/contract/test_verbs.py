"""Pausing, changing, extending, limits and estimates, on each kind of database."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from dispatching import Scripted
from sqlalchemy import update

from service.errors import Changed, Conflict, InvalidSpec, NotFound, QuotaExceeded
from service.limits import Limits
from service.model import estimates
from service.model.executor import Lost, Outcome, Started, Succeeded
from service.model.scheduling import AGEING_SECONDS, Cluster, choose
from service.queue import decisions
from service.queue.dispatcher import Dispatcher
from service.queue.explaining import explain, queue_status
from service.queue.verbs import Idempotency, Service
from service.results.views import version
from service.settings import Settings
from service.specs import JobSpec, Sweep
from service.store import claiming, quotas, users
from service.store.tables import attempts, events, jobs, sweeps, tasks, timings, usage

pytestmark = pytest.mark.slow

SETTINGS = Settings(lookahead=0, backoff_seconds=0.0)


def dispatcher(lab: Any, workers: Scripted, settings: Settings = SETTINGS) -> Dispatcher:
    return Dispatcher(lab.database, lab.artifacts, workers, settings, "d1")


def in_use(lab: Any) -> dict[str, float]:
    with lab.database.read() as connection:
        return quotas.devices_in_use(connection)


def limit(lab: Any, name: str, **limits: float) -> None:
    with lab.database.write() as connection:
        users.put_user(connection, lab.database.now(connection), name, limits)


class TestPause:
    def test_a_paused_sweep_is_claimed_no_more(self, lab: Any) -> None:
        sweep = lab.submit_sweep()["id"]
        lab.service.pause_sweep(sweep, user="ann")
        assert lab.grant() == []
        assert lab.job_states() == {"queued": 28}
        lab.service.resume_sweep(sweep, user="ann")
        lab.finish()
        assert lab.job_states() == {"succeeded": 28}
        kinds = [event.kind for event in lab.rows(events, sweep_id=sweep) if event.job_id is None]
        assert kinds == ["sweep.submitted", "sweep.paused", "sweep.resumed"]

    def test_what_runs_is_finished_and_what_follows_waits(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1, 5]})["id"]
        [train] = lab.grant()
        lab.service.pause_sweep(sweep, user="ann")
        assert not lab.task(train.task_id).cancel_requested
        lab.succeed(train)
        assert lab.task_states() == {"succeeded": 1, "queued": 5}
        assert lab.grant() == []
        lab.service.resume_sweep(sweep, user="ann")
        assert len(lab.grant()) == 5

    def test_what_is_lost_while_it_is_paused_waits_too(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1, 5]})["id"]
        lab.grant()
        lab.service.pause_sweep(sweep, user="ann")
        lab.expire()
        assert lab.task_states("train") == {"queued": 1}
        assert lab.grant() == []

    def test_shared_tasks_rank_as_the_best_unpaused_job(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1, 5]}, priority=9)["id"]
        lab.submit(user="bob", scale=5, priority=-3)
        [train] = lab.rows(tasks, kind="train")
        assert (train.priority, train.sponsor, train.needed_by) == (9, "ann", 3)
        lab.service.pause_sweep(sweep, user="ann")
        [train] = lab.rows(tasks, kind="train")
        assert (train.priority, train.sponsor, train.needed_by, train.paused) == (-3, "bob", 1, False)
        lab.finish()
        states = {job.user: job.state for job in lab.rows(jobs, scale=5.0)}
        # All that ann's job at this scale needs was computed for bob.
        assert states == {"ann": "succeeded", "bob": "succeeded"}
        assert lab.task_states() == {"succeeded": 5, "queued": 1}
        assert {row.paused for row in lab.rows(tasks, state="queued")} == {True}
        lab.service.resume_sweep(sweep, user="ann")
        [task] = lab.rows(tasks, state="queued")
        assert (task.priority, task.sponsor, task.paused) == (9, "ann", False)

    def test_cancelling_the_last_unpaused_job_pauses_what_it_shared(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1, 5]})["id"]
        other = lab.submit(user="bob", scale=5)
        lab.service.pause_sweep(sweep, user="ann")
        assert len(lab.rows(tasks, paused=False)) == 5
        lab.service.cancel_job(other, user="bob")
        assert {row.paused for row in lab.rows(tasks)} == {True}
        assert lab.task_states() == {"queued": 1, "blocked": 5}

    def test_a_new_job_takes_up_what_was_paused(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1, 5]}, priority=5)["id"]
        lab.service.pause_sweep(sweep, user="ann")
        lab.submit(user="bob", scale=5)
        [train] = lab.grant()
        row = lab.task(train.task_id)
        assert (row.sponsor, row.priority) == ("bob", 0)

    def test_time_in_a_pause_is_no_wait(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1]})["id"]
        [before] = lab.rows(tasks, kind="train")
        lab.service.pause_sweep(sweep, user="ann")
        lab.service.resume_sweep(sweep, user="ann")
        [after] = lab.rows(tasks, kind="train")
        assert after.waiting_since > before.waiting_since
        assert after.due - after.waiting_since == pytest.approx(before.due - before.waiting_since, abs=1e-3)

    def test_twice_is_once_and_an_ended_sweep_cannot_be_paused(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1]})["id"]
        for verb in (lab.service.pause_sweep, lab.service.resume_sweep):
            verb(sweep, user="ann")
            before = lab.dump()
            verb(sweep, user="ann")
            assert lab.dump() == before
        lab.finish()
        with pytest.raises(Conflict, match="has ended, so it cannot be paused"):
            lab.service.pause_sweep(sweep, user="ann")
        for verb in (lab.service.pause_sweep, lab.service.resume_sweep):
            with pytest.raises(NotFound, match="there is no sweep"):
                verb("nope", user="ann")

    def test_a_paused_queue_is_claimed_by_nobody(self, lab: Any) -> None:
        lab.submit()
        workers = Scripted(cpus=2.0)
        one = dispatcher(lab, workers)
        lab.service.pause_queue(user="root")
        one.tick()
        assert workers.bundles == []
        assert queue_status(lab.database, SETTINGS)["paused_by"] == "root"
        lab.service.resume_queue(user="root")
        one.tick()
        assert len(workers.bundles) == 1
        assert [event.kind for event in lab.rows(events) if event.kind.startswith("queue")] == [
            "queue.paused",
            "queue.resumed",
        ]


class TestChange:
    def test_the_priority_of_a_job_ranks_its_tasks_anew(self, lab: Any) -> None:
        first, second = lab.submit(user="ann"), lab.submit(user="bob", scale=5)
        lab.service.change_job(second, user="bob", priority=3)
        [train] = lab.rows(tasks, kind="train")
        assert (train.priority, train.sponsor, train.sequence) == (3, "bob", 2)
        lab.service.change_job(second, user="bob", priority=-1)
        [train] = lab.rows(tasks, kind="train")
        assert (train.priority, train.sponsor, train.sequence) == (0, "ann", 1)
        assert train.due == pytest.approx(train.waiting_since - 1.0, abs=1e-3)
        assert {row.priority for row in lab.rows(tasks, kind="measure")} == {0, -1}
        [event] = lab.rows(events, job_id=second, kind="job.changed")[-1:]
        assert event.data == {"priority": -1}
        assert lab.job(first).priority == 0

    def test_the_priority_and_labels_of_a_sweep_are_those_of_its_jobs(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1, 5]})["id"]
        lab.succeed(*lab.grant())
        lab.service.change_sweep(sweep, user="ann", priority=7, labels={"paper": "x"})
        [row] = lab.rows(sweeps)
        assert (row.priority, row.labels) == (7, {"paper": "x"})
        assert {(job.priority, tuple(job.labels.items())) for job in lab.rows(jobs)} == {(7, (("paper", "x"),))}
        assert {task.priority for task in lab.rows(tasks, state="queued")} == {7}
        assert {task.priority for task in lab.rows(tasks, state="succeeded")} == {0}

    def test_only_what_was_seen_is_changed(self, lab: Any) -> None:
        job = lab.submit()
        row = lab.job(job)
        seen = version(row.id, row.priority, row.labels)
        lab.service.change_job(job, user="ann", seen=[seen, "another"], labels={"a": "1"})
        with pytest.raises(Changed, match="was changed since you looked at it"):
            lab.service.change_job(job, user="ann", seen=[seen], labels={"a": "2"})
        assert lab.job(job).labels == {"a": "1"}

    def test_an_ended_job_keeps_its_priority_but_not_its_labels(self, lab: Any) -> None:
        job = lab.submit()
        lab.finish()
        with pytest.raises(Conflict, match="is succeeded, so its priority cannot be changed"):
            lab.service.change_job(job, user="ann", priority=1)
        lab.service.change_job(job, user="ann", labels={"a": "1"})
        assert lab.job(job).labels == {"a": "1"}
        with pytest.raises(NotFound, match="there is no job nope"):
            lab.service.change_job("nope", user="ann", priority=1)


class TestRetryFailed:
    def test_it_runs_the_failed_cells_again_and_no_others(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1, 5, 10]})["id"]
        lab.succeed(*lab.grant("train"))
        [wrong] = [grant for grant in lab.grant("measure") if grant.spec["scale"] == 5]
        lab.fail(wrong, "out of luck")
        lab.expire()
        lab.finish()
        assert lab.job_states() == {"succeeded": 2, "failed": 1}
        before = {row.id: row.attempt for row in lab.rows(tasks)}
        assert lab.service.retry_failed(sweep, user="ann")[0] == 1
        lab.finish()
        assert lab.job_states() == {"succeeded": 3}
        again = {row.id for row in lab.rows(tasks) if row.attempt > before[row.id]}
        # The one that failed, and the attack that was let go of with the job.
        assert {lab.task(task_id).kind for task_id in again} == {"measure", "attack"}
        assert {lab.task(task_id).spec["scale"] for task_id in again} == {5.0}


class TestExtend:
    def extend(self, lab: Any, sweep: str, key: str = "", **grid: list[Any]) -> Any:
        idempotency = Idempotency(key, "a" * 64) if key else None
        return lab.service.extend(sweep, grid, user="ann", idempotency=idempotency).body

    def test_only_new_cells_are_computed(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1, 5], "attack": ["pgd_linf"]}, priority=2, labels={"a": "b"})["id"]
        lab.finish()
        ran = len(lab.rows(attempts))
        body = self.extend(lab, sweep, scale=[5, 100])
        assert (body["id"], body["jobs"]) == (sweep, 1)
        assert body["to_compute"] == {"train": 0, "attack": 1, "control": 0, "measure": 1}
        [job] = lab.rows(jobs, scale=100.0)
        assert (job.priority, job.labels, job.sweep_id) == (2, {"a": "b"}, sweep)
        lab.finish()
        assert lab.job_states() == {"succeeded": 3}
        assert len(lab.rows(attempts)) == ran + 2
        [row] = lab.rows(sweeps)
        assert row.spec["grid"] == {"scale": [1, 5, 100], "attack": ["pgd_linf"]}

    def test_axes_multiply(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1, 5], "seed": [0]})["id"]
        assert self.extend(lab, sweep, scale=[10], seed=[1, 2])["jobs"] == 3 * 3 - 2
        assert len(lab.rows(jobs)) == 9

    def test_what_is_there_already_is_not_submitted_again(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1, 5]})["id"]
        before = lab.dump()
        assert self.extend(lab, sweep, scale=[5, "1.0"])["jobs"] == 0
        assert lab.dump() == before

    def test_jobs_of_an_earlier_canonical_form_are_not_submitted_again(self, lab: Any) -> None:
        """The order of measures was part of a job's digest once."""
        grid = {"scale": [1], "measures": [["sam_sharpness", "fisher_rao"]]}
        sweep = lab.submit_sweep(grid)["id"]
        with lab.database.write() as connection:
            connection.execute(update(jobs).values(spec_digest="0" * 64))
        assert self.extend(lab, sweep, scale=[5], measures=[["fisher_rao", "sam_sharpness"]])["jobs"] == 1

    def test_a_paused_sweep_stays_paused(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1]})["id"]
        lab.service.pause_sweep(sweep, user="ann")
        self.extend(lab, sweep, scale=[5])
        assert lab.grant() == []
        lab.service.resume_sweep(sweep, user="ann")
        lab.finish()
        assert lab.job_states() == {"succeeded": 2}

    def test_a_replay_is_the_same_answer(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1]})["id"]
        assert self.extend(lab, sweep, key="k", scale=[5]) == self.extend(lab, sweep, key="k", scale=[5])
        assert len(lab.rows(jobs)) == 2

    def test_bad_axes_and_values_are_refused_whole(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1]})["id"]
        before = lab.dump()
        with pytest.raises(InvalidSpec, match=r"/grid/sede: `sede` is not an axis of the sweep \(they are: `scale`\)"):
            self.extend(lab, sweep, sede=[1])
        for scales, entry in (([5, -1], 1), ([-1, 5], 0), ([True, 1], 0), ([1, {"a": 1}], 1)):
            with pytest.raises(InvalidSpec, match=f"/grid/scale/{entry}: "):
                self.extend(lab, sweep, scale=scales)
        with pytest.raises(NotFound, match="there is no sweep nope"):
            self.extend(lab, "nope", scale=[5])
        assert lab.dump() == before


class TestLimits:
    def test_jobs_beyond_the_limit_are_refused(self, lab: Any) -> None:
        limit(lab, "ann", max_queued_jobs=3)
        sweep = lab.submit_sweep({"scale": [1, 5]})["id"]
        before = lab.dump()
        with pytest.raises(QuotaExceeded, match="ann may have 3 jobs waiting or running and has 2; 2 more do not fit"):
            lab.submit_sweep({"scale": [10, 50]})
        with pytest.raises(QuotaExceeded):
            lab.service.extend(sweep, {"scale": [10, 50]}, user="ann")
        assert lab.dump() == before
        lab.submit(scale=10)
        lab.submit_sweep({"scale": [10, 50]}, user="bob")
        lab.finish()
        lab.submit_sweep({"scale": [2, 3]})

    def test_what_is_tried_again_counts_too(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1, 5]})["id"]
        lab.service.cancel_sweep(sweep, user="ann")
        lab.submit(scale=10)
        limit(lab, "ann", max_queued_jobs=2)
        job = lab.rows(jobs, sweep_id=sweep)[0].id
        before = lab.dump()
        with pytest.raises(QuotaExceeded, match="ann may have 2 jobs waiting or running and has 1; 2 more do not fit"):
            lab.service.retry_failed(sweep, user="bob", states=["cancelled"])
        assert lab.dump() == before
        lab.service.retry_job(job, user="ann")
        with pytest.raises(QuotaExceeded):
            lab.service.retry_failed(sweep, user="ann", states=["cancelled", "failed"])

    def test_the_default_is_that_of_the_settings(self, lab: Any) -> None:
        service = Service(lab.database, lab.artifacts, Settings(max_queued_jobs=0).limits)
        with pytest.raises(QuotaExceeded, match="may have 0 jobs"):
            service.submit(JobSpec.model_validate(lab.BASE), user="cyd")
        limit(lab, "cyd", max_queued_jobs=1)
        service.submit(JobSpec.model_validate(lab.BASE), user="cyd")

    def test_a_user_has_no_more_devices_than_allowed(self, lab: Any) -> None:
        limit(lab, "ann", max_gpus=2)
        lab.submit_sweep({"seed": list(range(6))}, priority=5)
        lab.submit_sweep({"seed": list(range(10, 16))}, user="bob")
        workers = Scripted(cpus=5)
        one = dispatcher(lab, workers)
        for _ in range(100):
            one.tick()
            assert in_use(lab).get("ann", 0.0) <= 2
            if not workers.open:
                break
            assert len(workers.open) == 5 or in_use(lab)["ann"] <= 2
            workers.finish(lab.outcome)
        assert lab.job_states() == {"succeeded": 12}


class TestUsage:
    def test_sponsors_are_charged_as_their_tasks_run(self, lab: Any) -> None:
        lab.submit(user="ann")
        [train] = lab.grant(at=1000.0)
        lab.record(Started(train.task_id, 1, "w"), at=1010.0)
        with lab.database.write() as connection:
            claiming.renew(connection, 1017.0, "d1", 20.0)
        [row] = lab.rows(usage)
        assert (row.user, row.recent_seconds) == ("ann", pytest.approx(7.0))
        lab.record(Succeeded(train.task_id, 1, lab.outcome(train)), at=1020.0)
        [row] = lab.rows(usage)
        assert row.recent_seconds == pytest.approx(10.0 + quotas.HANDLING_SECONDS)
        with lab.database.write() as connection:
            claiming.renew(connection, 2000.0, "d1", 20.0)
        assert lab.rows(usage) == [row], "it ran no longer"

    def test_who_takes_a_running_task_over_pays_from_then_on(self, lab: Any) -> None:
        first = lab.submit(user="ann", priority=1)
        lab.submit(user="bob", scale=5)
        [train] = lab.grant(at=1000.0)
        lab.record(Started(train.task_id, 1, "w"), at=1000.0)
        with lab.database.write() as connection:
            claiming.renew(connection, 1030.0, "d1", 1e9)
        lab.service.cancel_job(first, user="ann")
        with lab.database.write() as connection:
            claiming.renew(connection, 1040.0, "d1", 1e9)
        assert {row.user: row.recent_seconds for row in lab.rows(usage)} == {
            "ann": pytest.approx(30.0),
            "bob": pytest.approx(10.0),
        }

    def test_it_decays_by_the_half_life(self, lab: Any) -> None:
        with lab.database.write() as connection:
            row = {"user": "ann", "device_seconds": 0.0, "as_of": 0.0, "recent_seconds": 80.0}
            connection.execute(usage.insert().values(row))
            quotas.fold(connection, 100.0, 1000.0)
            seconds = [
                quotas.accounts(connection, now, ["ann"], 1000.0, Limits())["ann"].device_seconds
                for now in (100.0, 1100.0, 3100.0)
            ]
        assert seconds == pytest.approx([80.0, 40.0, 10.0])

    def test_one_users_flood_does_not_hide_the_others(self, lab: Any) -> None:
        for user, first, seeds in (("ann", 0, 60), ("bob", 1000, 1), ("cyd", 2000, 2)):
            for seed in range(seeds):
                lab.submit(user=user, seed=first + seed)
        with lab.database.read() as connection:
            window = claiming.waiting(connection, 1e12, 30)
            assert claiming.waiting_sponsors(connection) == ["ann", "bob", "cyd"]
        assert [sum(task.sponsor == user for task in window) for user in ("ann", "bob", "cyd")] == [16, 1, 2]

    def test_a_training_that_others_join_goes_before_its_equals(self, lab: Any) -> None:
        lab.submit(seed=0)
        lab.submit(seed=1, scale=5)
        lab.submit(seed=1, scale=10, user="bob", priority=-1)
        lab.submit(seed=1, scale=50)
        with lab.database.read() as connection:
            window = claiming.waiting(connection, 1e12, 8)
        assert [(task.sequence, task.needed_by) for task in window] == [(1, 1), (2, 3)]
        [first] = choose(window, {}, Cluster(1), 0.0)
        assert lab.task(first.task_ids[0]).spec["seed"] == 1

    def test_a_kind_without_room_does_not_hide_the_others(self, lab: Any) -> None:
        lab.submit()
        lab.succeed(*lab.grant("train"))
        able = {row.id for row in lab.rows(tasks, state="queued")}
        for seed in range(1, 41):
            lab.submit(seed=seed, priority=5)
        with lab.database.read() as connection:
            window = claiming.waiting(connection, 1e12, 8)
        assert Counter(task.kind for task in window) == {"train": 8, "measure": 1, "attack": 1, "control": 1}
        no_training = Cluster(3, needs_by_kind={"train": {"GPU": 2.0}}, room={"GPU": 1.0})
        assert {task_id for one in choose(window, {}, no_training, 0.0) for task_id in one.task_ids} == able

    def test_the_window_holds_a_users_best(self, lab: Any) -> None:
        for seed, priority in enumerate([0, 3, -2, 3, 1]):
            lab.submit(seed=seed, priority=priority)
        with lab.database.write() as connection:
            old = tasks.c.priority == -2
            waited = connection.scalar(tasks.select().with_only_columns(tasks.c.due).where(old)) - 4 * AGEING_SECONDS
            connection.execute(tasks.update().where(old).values(due=waited))
            window = claiming.waiting(connection, 1e12, 3)
        assert [(task.priority, task.sequence) for task in window] == [(3, 2), (3, 4), (-2, 3)]

    def test_a_claim_on_a_task_that_another_pays_for_by_now_is_void(self, lab: Any) -> None:
        lab.submit(user="ann")
        [train] = lab.rows(tasks, kind="train")
        lab.submit(user="bob", priority=1)
        place = {train.id: claiming.Placement("ann", "b", 1.0)}
        with lab.database.write() as connection:
            assert claiming.grant(connection, 0.0, "d1", 20.0, [train.id], place) == {}
            place = {train.id: claiming.Placement("bob", "b", 1.0)}
            assert list(claiming.grant(connection, 0.0, "d1", 20.0, [train.id], place)) == [train.id]


class TestDecisions:
    def test_a_recorded_sequence_replays(self, lab: Any) -> None:
        limit(lab, "ann", weight=3.0)
        limit(lab, "bob", max_gpus=1)
        lab.submit_sweep({"seed": [0, 1, 2], "scale": [1, 5]})
        lab.submit_sweep({"seed": [2, 3, 4], "scale": [1, 10]}, user="bob", priority=1)
        workers = Scripted(cpus=3)
        one = dispatcher(lab, workers)
        for _ in range(60):
            one.tick()
            workers.finish(lab.outcome)
        assert lab.job_states() == {"succeeded": 12}
        count, differing = decisions.replay(lab.database)
        assert count >= 5
        assert differing == []
        with lab.database.read() as connection:
            from service.store import deciding

            decided = [one for row in deciding.recorded(connection) for one in row.decided]
        granted = {task_id for one in decided for task_id in one["task_ids"]}
        assert granted == {row.id for row in lab.rows(tasks)}
        assert all("priority" in one["reason"] for one in decided)

    def test_only_the_last_ones_are_kept(self, lab: Any) -> None:
        lab.submit_sweep({"seed": [0, 1, 2, 3, 4]})
        workers = Scripted(cpus=1)
        one = dispatcher(lab, workers, Settings(lookahead=0, decision_log=3))
        for _ in range(40):
            one.tick()
            workers.finish(lab.outcome)
        assert decisions.replay(lab.database) == (3, [])


class TestExplain:
    def explain(self, lab: Any, job: str) -> dict[str, Any]:
        return explain(lab.database, SETTINGS, job)

    def test_from_submission_to_its_end(self, lab: Any) -> None:
        job = lab.submit()
        assert "no dispatcher leads" in self.explain(lab, job)["sentence"]
        workers = Scripted(cpus=1)
        one = dispatcher(lab, workers)
        lab.service.pause_queue(user="root")
        one.tick()
        assert "the queue is paused (by root" in self.explain(lab, job)["sentence"]
        lab.service.resume_queue(user="root")
        for earlier in range(1, 4):
            lab.submit(seed=earlier, priority=1)
        said = self.explain(lab, job)
        assert (
            "train: 3 tasks come before it (ann has used 0 device seconds at weight 1; priority 0 among"
            in said["sentence"]
        )
        assert [line["state"] for line in said["tasks"]] == ["queued", "blocked", "blocked", "blocked"]
        assert "it waits for training" in said["tasks"][1]["sentence"]
        lab.service.change_job(job, user="ann", priority=2)
        assert "it is next" in self.explain(lab, job)["sentence"]
        one.tick()
        assert "handed over and waits for a free worker" in self.explain(lab, job)["sentence"]
        workers.said = [Started(grant.task_id, grant.attempt, "w") for grant in workers.grants]
        one.tick()
        assert "it runs on w, 0 % done" in self.explain(lab, job)["sentence"]
        lab.service.cancel_job(job, user="ann")
        assert self.explain(lab, job)["sentence"] == "it has ended: cancelled (cancelled by ann)"
        with pytest.raises(NotFound):
            self.explain(lab, "nope")

    def test_a_cluster_that_is_full(self, lab: Any) -> None:
        for seed in range(2):
            job = lab.submit(seed=seed)
        one = dispatcher(lab, Scripted(cpus=1.0))
        one.tick()
        one._renewed_at = 0.0  # the leader says again what it has
        one.tick()
        sentence = explain(lab.database, SETTINGS, job)["sentence"]
        assert "train: it is next" in sentence
        assert sentence.endswith("; all 1 slots of the cluster are taken")

    def test_what_no_node_is_large_enough_for(self, lab: Any) -> None:
        job = lab.submit()
        how = Settings.model_validate({"lookahead": 1, "resources": {"train": {"gpus": 1, "memory_bytes": 3 << 29}}})
        one = dispatcher(lab, Scripted(cpus=2.0), how)
        one._hold_leadership()
        nowhere = ", but no node of the cluster is large enough for it: it takes 1 CPU, 1 GPU, 1.5 GiB of memory"
        waits = explain(lab.database, how, job)["sentence"]
        assert "train: it is next" in waits
        assert nowhere in waits
        one.tick()
        handed_over = explain(lab.database, how, job)["sentence"]
        assert f"it was handed over and waits for a free worker{nowhere}" in handed_over

    def test_paused_held_limited_and_backing_off(self, lab: Any) -> None:
        sweep = lab.submit_sweep({"scale": [1]}, user="bob")["id"]
        [job] = [row.id for row in lab.rows(jobs)]
        lab.service.pause_sweep(sweep, user="bob")
        assert (
            f"its sweep is paused (0 of its 4 tasks are done): `uncanny resume {sweep}`"
            in (self.explain(lab, job)["sentence"])
        )
        lab.service.resume_sweep(sweep, user="bob")
        workers = Scripted(cpus=2.0)
        one = dispatcher(lab, workers)
        one.tick()
        other = lab.submit(user="bob", seed=5)
        limit(lab, "bob", max_gpus=1)
        assert "bob, its sponsor, uses 1 of 1 GPUs" in self.explain(lab, other)["sentence"]
        [grant] = workers.bundles[0].grants
        for attempt in range(1, 4):
            lab.record(Lost(grant.task_id, attempt, "worker_died", "SIGSEGV"))
            if attempt < 3:
                lab.grant("train")
        said = self.explain(lab, job)["sentence"]
        assert "held for a person to look at" in said
        assert "attempts: worker_died, worker_died, worker_died" in said


class TestEstimates:
    def provenance(self, lab: Any, seconds: float, device: str = "H100") -> Callable[[Any], Outcome]:
        def outcome(grant: Any) -> Outcome:
            made: Outcome = lab.outcome(grant)
            made.provenance.update(device=device, device_seconds=seconds * estimates.units(grant.spec))
            return made

        return outcome

    def run(self, lab: Any, seconds: float, device: str = "H100", **changed: Any) -> None:
        lab.submit(**changed)
        outcome = self.provenance(lab, seconds, device)
        while grants := lab.grant():
            lab.record(*(Succeeded(grant.task_id, grant.attempt, outcome(grant)) for grant in grants))

    def test_without_history_there_is_no_number_but_a_reason(self, lab: Any) -> None:
        said = lab.service.dry_run(JobSpec.model_validate(lab.BASE), user="ann")["estimate"]
        assert (said["device_seconds_p50"], said["eta_seconds"]) == (None, None)
        assert "nothing like it has run here yet: train standard of mlp on digits (1)" in said["reason"]
        assert "no dispatcher has said yet" in said["eta_reason"]

    def test_by_what_tasks_like_it_took_on_the_device_of_late(self, lab: Any) -> None:
        self.run(lab, 50.0, device="old", seed=0)
        for seed, seconds in enumerate([1.0, 2.0, 3.0, 4.0, 10.0], start=1):
            self.run(lab, seconds, seed=seed)
        assert len(lab.rows(timings)) == 6 * 4
        dispatcher(lab, Scripted(cpus=4)).tick()
        sweep = Sweep(name="s", base=lab.BASE, grid={"seed": [1, 9], "scale": [1, 5]})
        said = lab.service.dry_run(sweep, user="ann")
        assert said["known"] == {"train": 1, "attack": 1, "control": 1, "measure": 1}
        by_kind = {row["kind"]: row for row in said["estimate"]["history"]}
        epochs = lab.rows(tasks, kind="train")[0].spec["recipe"]["epochs"]
        assert by_kind["train"]["device_seconds_p50"] == pytest.approx(3.0 * epochs)
        assert by_kind["train"]["device_seconds_p90"] == pytest.approx(10.0 * epochs)
        assert (by_kind["train"]["device"], by_kind["train"]["timings"], by_kind["train"]["tasks"]) == ("H100", 5, 1)
        assert by_kind["measure"]["device_seconds_p50"] == pytest.approx(3.0 * 3 * 16)
        total = sum(row["device_seconds_p50"] for row in by_kind.values())
        assert said["estimate"]["device_seconds_p50"] == pytest.approx(total)
        assert said["estimate"]["eta_seconds"] >= total / 4
        assert said["estimate"]["eta_reason"] == "at 4 of 4 slots, 0 other users waiting"

    def test_others_who_wait_and_limits_make_it_longer(self, lab: Any) -> None:
        for seed in range(3):
            self.run(lab, 1.0, seed=seed)
        dispatcher(lab, Scripted(cpus=4)).tick()
        sweep = Sweep(name="s", base=lab.BASE, grid={"seed": list(range(10, 40))})
        alone = lab.service.dry_run(sweep, user="ann")
        lab.submit(user="bob", seed=77)
        beside = lab.service.dry_run(sweep, user="ann")
        assert beside["estimate"]["eta_seconds"] == pytest.approx(2 * alone["estimate"]["eta_seconds"], rel=1e-3)
        assert beside["queue"] == {"paused": False, "own_tasks_before": 0, "other_users_waiting": 1}
        limit(lab, "ann", max_gpus=1, max_queued_jobs=20)
        limited = lab.service.dry_run(sweep, user="ann")
        assert limited["estimate"]["eta_seconds"] == pytest.approx(4 * alone["estimate"]["eta_seconds"], rel=1e-3)
        assert limited["quota"] == {
            "user": "ann", "weight": 1.0, "max_queued_jobs": 20, "max_gpus": 1.0, "unfinished_jobs": 0,
            "unfinished_jobs_after": 30, "fits": False, "gpus_in_use": 0.0,
        }  # fmt: skip

    def test_what_is_known_takes_no_time(self, lab: Any) -> None:
        self.run(lab, 1.0)
        before = lab.dump()
        said = lab.service.dry_run(JobSpec.model_validate(lab.BASE), user="bob")["estimate"]
        assert (said["device_seconds_p50"], said["eta_seconds"], said["reason"]) == (0, 0.0, None)
        assert lab.dump() == before


class TestCancel:
    def test_a_shared_task_goes_on_while_another_job_needs_it(self, lab: Any) -> None:
        first, second = lab.submit(), lab.submit(user="bob", scale=5)
        workers = Scripted(cpus=2.0)
        one = dispatcher(lab, workers)
        one.tick()
        [grant] = workers.bundles[0].grants
        lab.service.cancel_job(first, user="ann")
        one._looked_at = 0.0
        one.tick()
        assert lab.task(grant.task_id).state == "running"
        lab.service.cancel_job(second, user="bob")
        one._looked_at = 0.0
        one.tick()
        assert workers.cancelled == [(grant.task_id, grant.attempt)]
        workers.said = [Lost(grant.task_id, grant.attempt, "cancelled", "cancelled")]
        one.tick()
        assert lab.task(grant.task_id).state == "cancelled"
