"""The dispatcher's loop between a real store and an executor that does as it is told: bundles, room, leads."""

from collections import Counter
from typing import Any

import pytest
from dispatching import (
    LEASE_SECONDS,
    PATIENT,
    Scripted,
    dispatcher,
    passes,
    running,
    succeeds,
    take_over,
    take_the_lead,
    tick_until_idle,
)
from waiting import until

from service.errors import Conflict
from service.model.executor import (
    Capacity,
    Failed,
    Grant,
    Lost,
    Message,
    Progress,
    Succeeded,
)
from service.model.scheduling import MAX_BUNDLE
from service.queue import claims
from service.queue.dispatcher import Dispatcher
from service.settings import Settings
from service.store.tables import attempts, tasks


class TestFlow:
    def test_a_sweep_to_its_end(self, lab: Any) -> None:
        lab.submit_sweep()
        executor = Scripted(succeeds(lab))
        tick_until_idle(dispatcher(lab, executor))
        assert lab.job_states() == {"succeeded": 28}
        assert Counter(grant.spec["kind"] for grant in executor.grants) == {
            "train": 2, "measure": 14, "attack": 28, "control": 4,
        }  # fmt: skip
        assert {(row.number, row.worker, row.end) for row in lab.rows(attempts)} == {(1, "worker 1", "succeeded")}

    def test_a_bundle_has_the_network_it_works_on(self, lab: Any) -> None:
        lab.submit_sweep()
        executor = Scripted(succeeds(lab))
        tick_until_idle(dispatcher(lab, executor))
        trained = {grant.digest: grant for grant in executor.grants if grant.spec["kind"] == "train"}
        for bundle in executor.bundles:
            first = bundle.grants[0]
            if first.spec["kind"] == "train":
                assert (len(bundle.grants), bundle.train_spec, bundle.checkpoint) == (1, first.spec, None)
            else:
                [checkpoint] = {grant.spec["checkpoint"] for grant in bundle.grants}
                assert bundle.train_spec == trained[checkpoint].spec
                assert bundle.checkpoint == lab.outcome(trained[checkpoint]).artifacts[0]
        assert len({bundle.id for bundle in executor.bundles}) == len(executor.bundles)

    def test_bundles_are_filled_with_tasks_from_further_down_the_queue(
        self, lab: Any, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Seven tasks on each checkpoint, of which the window of the queue shows three."""
        monkeypatch.setattr(claims, "QUEUE_WINDOW", MAX_BUNDLE)
        lab.submit_sweep({"scale": [1, 2, 5], "seed": list(range(20))})
        lab.succeed(*lab.grant("train"))
        dispatcher(lab, scripted).tick()
        assert {len(bundle.grants) for bundle in scripted.bundles} == {7}

    def test_a_transfers_bundle_has_the_other_network_too(self, lab: Any) -> None:
        attack = {"type": "fgsm", "norm": "linf", "eps": 0.1}
        lab.submit(attack={"type": "transfer", "attack": attack, "source": {"architecture": "simple_cnn"}})
        executor = Scripted(succeeds(lab))
        tick_until_idle(dispatcher(lab, executor))
        [other] = [grant for grant in executor.grants if grant.spec.get("architecture") == "simple_cnn"]
        with_source = [bundle for bundle in executor.bundles if bundle.sources]
        assert with_source
        for bundle in with_source:
            assert bundle.sources == {other.digest: (other.spec, lab.outcome(other).artifacts[0])}

    def test_it_claims_what_fits_and_a_little_more(self, lab: Any, scripted: Scripted) -> None:
        lab.submit_sweep({"seed": list(range(10))})
        one = dispatcher(lab, scripted)
        for _ in range(3):
            one.tick()
        assert len(scripted.bundles) == 3 + PATIENT.lookahead
        first = scripted.grants[0]
        scripted.said = [Lost(first.task_id, first.attempt, "node_died", "gone")]
        one.tick()
        assert len(scripted.bundles) == 5 + PATIENT.lookahead - 1

    def test_places_that_come_free_faster_than_it_looks_do_not_stay_empty(self, lab: Any) -> None:
        lab.submit_sweep({"seed": list(range(60))})
        executor = Scripted(succeeds(lab))
        one = dispatcher(lab, executor)
        claimed = []
        for _ in range(6):
            before = len(executor.bundles)
            one.tick()
            claimed.append(len(executor.bundles) - before)
        assert claimed[:5] == [4, 7, 10, 13, 16], "three places, and what ended since the last look"
        executor.answers = None
        one.tick()
        before = len(executor.bundles)
        one.tick()
        assert len(executor.bundles) == before, "none has ended, so none more may wait"

    @pytest.mark.parametrize(
        ("room", "settings", "bundles"),
        [
            (Capacity(True, 8.0, 0.0), {"cpus_per_task": 2.0}, 4),
            (Capacity(True, 0.5, 0.0), {}, 1),
            (Capacity(True, 8.0, 2.0), {"gpus_per_task": 0.5}, 4),
            (Capacity(True, 8.0, 0.3), {"gpus_per_task": 0.1}, 3),
            (Capacity(True, 2.0, 1.0), {"gpus_per_task": 0.0}, 2),
            (Capacity(False, 8.0, 2.0), {}, 0),
        ],
    )
    def test_room(self, lab: Any, scripted: Scripted, room: Capacity, settings: Any, bundles: int) -> None:
        lab.submit_sweep({"seed": list(range(10))})
        scripted.room = room
        dispatcher(lab, scripted, settings=Settings(lookahead=0, **settings)).tick()
        assert len(scripted.bundles) == bundles

    def test_a_bundle_that_loses_one_task_goes_on_with_the_others(self, lab: Any) -> None:
        lab.submit_sweep({"scale": [1, 5]})
        unlucky = iter([True])

        def answer(grant: Grant) -> Message:
            if grant.spec["kind"] == "measure" and next(unlucky, False):
                return Failed(grant.task_id, grant.attempt, "error", "bad luck")
            return Succeeded(grant.task_id, grant.attempt, lab.outcome(grant))

        tick_until_idle(dispatcher(lab, Scripted(answer)))
        assert lab.job_states() == {"succeeded": 2}
        assert Counter(row.end for row in lab.rows(attempts)) == {"succeeded": 6, "error": 1}

    def test_run_works_until_it_is_stopped(self, lab: Any) -> None:
        executor = Scripted(succeeds(lab))
        with running(dispatcher(lab, executor)):
            lab.submit_sweep()
            until(lambda: lab.job_states() == {"succeeded": 28})
        assert executor.closed


class TestCrash:
    def test_what_was_handed_over_is_taken_back_by_the_next_of_the_same_name(self, lab: Any) -> None:
        lab.submit_sweep()
        dispatcher(lab, Scripted()).tick()
        executor = Scripted(succeeds(lab))
        tick_until_idle(dispatcher(lab, executor))
        assert lab.job_states() == {"succeeded": 28}
        assert Counter(row.end for row in lab.rows(attempts)) == {"succeeded": 48, "given_back": 2}
        assert {(row.errors, row.suspect_losses) for row in lab.rows(tasks)} == {(0, 0)}

    def test_what_was_finished_but_not_recorded_is_done_again(self, lab: Any) -> None:
        lab.submit()
        first = Scripted(succeeds(lab))
        dispatcher(lab, first).tick()
        assert first.said
        second = Scripted(succeeds(lab))
        tick_until_idle(dispatcher(lab, second))
        assert lab.job_states() == {"succeeded": 1}
        assert (first.grants[0].attempt, second.grants[0].attempt) == (1, 2)

    def test_what_was_recorded_is_not_done_again(self, lab: Any) -> None:
        lab.submit()
        first = Scripted(succeeds(lab))
        one = dispatcher(lab, first)
        one.tick()
        one.tick()
        tick_until_idle(dispatcher(lab, second := Scripted(succeeds(lab))))
        assert Counter(grant.spec["kind"] for grant in first.grants + second.grants)["train"] == 1

    def test_a_training_goes_on_from_its_last_epoch(self, lab: Any, scripted: Scripted, one: Dispatcher) -> None:
        [grant] = scripted.grants
        epoch = lab.artifacts.write_chunks("epoch_state", [b"epoch 1"])
        scripted.said = [Progress(grant.task_id, 1, 0.5, {"epoch": 1}, epoch)]
        one.tick()
        again = Scripted()
        dispatcher(lab, again).tick()
        assert [(grant.attempt, grant.resume) for grant in again.grants] == [(2, epoch)]

    def test_another_waits_for_the_lease_and_takes_all_over(self, lab: Any) -> None:
        lab.submit_sweep({"seed": [0, 1]})
        dispatcher(lab, first := Scripted()).tick()
        other = dispatcher(lab, executor := Scripted(succeeds(lab)), "d2")
        for _ in range(3):
            other.tick()
            passes(0.25 * LEASE_SECONDS)
        other.tick()
        assert executor.bundles == [], "it did not wait"
        for _ in range(2):
            passes(0.25 * LEASE_SECONDS)
            other.tick()
        assert executor.bundles, "it has seen the lease run out: no need to wait more"
        tick_until_idle(other)
        assert lab.job_states() == {"succeeded": 2}
        assert {grant.attempt for grant in first.grants} == {1}


class TestStandby:
    def test_it_changes_nothing(self, lab: Any) -> None:
        lab.submit_sweep()
        dispatcher(lab, Scripted()).tick()
        before = lab.dump()
        standby = dispatcher(lab, executor := Scripted(), "d2")
        for _ in range(5):
            assert not standby.tick()
        assert lab.dump() == before
        assert (standby.leading, executor.bundles) == (False, [])

    def test_a_newcomer_lets_others_leases_run_out_before_it_reaps(self, lab: Any) -> None:
        """The database may only just have come back: whoever runs these could not renew them either."""
        lab.submit()
        lab.grant(holder="d0", lease_seconds=0.0)
        newcomer = dispatcher(lab, executor := Scripted(), "d2")
        for _ in range(3):
            newcomer.tick()
            assert newcomer.leading
            assert executor.bundles == []
            passes(0.4 * LEASE_SECONDS)
        newcomer.tick()
        assert executor.grants[0].attempt == 2

    def test_of_two_one_works_and_the_other_carries_on_when_it_stops(self, lab: Any) -> None:
        first, second = (Scripted(succeeds(lab)) for _ in range(2))
        one, two = dispatcher(lab, first, "d1"), dispatcher(lab, second, "d2")
        with running(one) as stop:
            until(lambda: one.leading)
            with running(two):
                lab.submit_sweep()
                until(lambda: lab.job_states() == {"succeeded": 28})
                assert (bool(first.bundles), second.bundles) == (True, [])
                stop.set()
                until(lambda: two.leading)
                lab.submit(seed=1)
                until(lambda: lab.job_states() == {"succeeded": 29})
                assert second.bundles
        assert {row.number for row in lab.rows(attempts)} == {1}


class TestFrozen:
    """A leader that is frozen (SIGSTOP) past its lease, and wakes up when another one leads."""

    def supersede(self, lab: Any) -> Dispatcher:
        other = dispatcher(lab, executor := Scripted(), "d2")
        take_over(other)
        assert executor.bundles
        return other

    def test_it_writes_nothing_and_stops_what_it_runs(self, lab: Any, scripted: Scripted) -> None:
        lab.submit_sweep({"seed": [0, 1]})
        frozen = dispatcher(lab, scripted)
        frozen.tick()
        self.supersede(lab)
        scripted.said = [succeeds(lab)(grant) for grant in scripted.grants[:1]]
        before = lab.dump()
        frozen.tick()
        assert not frozen.leading
        assert set(scripted.cancelled) == {(grant.task_id, grant.attempt) for grant in scripted.grants}
        scripted.said = [Lost(grant.task_id, grant.attempt, "cancelled", "stopped") for grant in scripted.grants[1:]]
        assert not frozen.tick()
        assert lab.dump() == before
        assert len(scripted.bundles) == 2

    def test_it_wakes_up_with_outcomes_in_its_hands(self, lab: Any, scripted: Scripted) -> None:
        lab.submit_sweep({"seed": [0, 1]})
        frozen = dispatcher(lab, scripted)
        frozen.tick()
        scripted.said = [succeeds(lab)(scripted.grants[0])]
        frozen._collect(0.0)
        self.supersede(lab)
        before = lab.dump()
        frozen._write()
        assert lab.dump() == before
        assert not frozen.leading
        assert scripted.cancelled == [(grant.task_id, grant.attempt) for grant in scripted.grants[1:]]

    def test_it_wakes_up_before_its_task_was_given_to_another(self, lab: Any, scripted: Scripted) -> None:
        lab.submit()
        frozen = dispatcher(lab, scripted)
        frozen.tick()
        scripted.said = [succeeds(lab)(scripted.grants[0])]
        frozen._collect(0.0)
        with lab.database.write() as connection:  # another has the lead, and has not reaped yet
            take_the_lead(connection, "d2")
        before = lab.dump()
        frozen._write()
        assert lab.dump() == before

    def test_it_wakes_up_about_to_claim(self, lab: Any, scripted: Scripted) -> None:
        frozen = dispatcher(lab, scripted)
        frozen.tick()
        lab.submit()
        with lab.database.write() as connection:
            take_the_lead(connection, "d2")
        before = lab.dump()
        frozen.claim()
        assert (scripted.bundles, frozen.leading) == ([], False)
        assert lab.dump() == before

    def test_it_may_lead_again_and_has_all_its_room(self, lab: Any, scripted: Scripted) -> None:
        lab.submit_sweep({"seed": [0, 1, 2, 3]})
        frozen = dispatcher(lab, scripted)
        frozen.tick()
        assert len(scripted.bundles) == 4
        self.supersede(lab)._stop()
        until(lambda: frozen.tick() and frozen.leading and len(scripted.cancelled) == 4)
        old = list(scripted.grants)
        assert len(scripted.bundles) == 4, "the old bundles still hold their places"
        scripted.said = [Lost(grant.task_id, grant.attempt, "cancelled", "stopped") for grant in old]
        until(lambda: frozen.tick() and len(scripted.bundles) == 8)
        scripted.answers = succeeds(lab)
        scripted.said = [succeeds(lab)(grant) for grant in scripted.grants[4:]]
        tick_until_idle(frozen)
        assert lab.job_states() == {"succeeded": 4}

    def test_it_wakes_up_when_its_own_name_was_started_anew(self, lab: Any, scripted: Scripted) -> None:
        lab.submit()
        frozen = dispatcher(lab, scripted)
        frozen.tick()
        successor = dispatcher(lab, executor := Scripted(succeeds(lab)))
        successor.tick()
        scripted.said = [succeeds(lab)(scripted.grants[0])]
        before = lab.dump()
        with pytest.raises(Conflict, match="each needs a name of its own"):
            frozen.tick()
        assert lab.dump() == before
        assert scripted.cancelled == []  # it has answered for all that it ran
        tick_until_idle(successor)
        assert lab.job_states() == {"succeeded": 1}
        assert {grant.attempt for grant in executor.grants if grant.spec["kind"] == "train"} == {2}

    def test_a_leader_that_slept_alone_goes_on(self, lab: Any, scripted: Scripted, one: Dispatcher) -> None:
        passes(1.5 * LEASE_SECONDS)
        scripted.said = [succeeds(lab)(scripted.grants[0])]
        one.tick()
        assert lab.task_states("train") == {"succeeded": 1}
        assert scripted.cancelled == []
