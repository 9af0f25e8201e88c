"""Grants, leases and leadership by the database's clock, on each kind of database."""

import threading
from typing import Any

import pytest

from service.model.executor import Lost
from service.store import claiming
from service.store.tables import attempts, events, leases, tasks

LEASE = 20.0


def lead(lab: Any, holder: str, now: float, epoch: int | None = None, lease: float = LEASE) -> int | None:
    with lab.database.write() as connection:
        return claiming.lead(connection, now, holder, epoch, lease, {"bundles": 0})


def reap(lab: Any, now: float) -> int:
    with lab.database.write() as connection:
        return int(claiming.reap(connection, now, "d2"))


class TestGrants:
    def test_a_grant_is_all_that_a_worker_needs(self, lab: Any) -> None:
        lab.submit()
        [grant] = lab.grant(at=1000.0, lease_seconds=LEASE)
        row = lab.task(grant.task_id)
        assert (grant.attempt, grant.digest, grant.spec, grant.resume) == (1, row.digest, row.spec, None)
        assert (row.state, row.holder, row.lease_expires_at, row.started_at) == ("running", "d1", 1020.0, 1000.0)
        [attempt] = lab.rows(attempts)
        assert (attempt.number, attempt.holder, attempt.started_at, attempt.ended_at) == (1, "d1", 1000.0, None)

    def test_only_what_is_queued_is_granted(self, lab: Any) -> None:
        lab.submit()
        everything = [row.id for row in lab.rows(tasks)]
        with lab.database.write() as connection:
            assert len(claiming.grant(connection, 0.0, "d1", LEASE, everything)) == 1
            assert claiming.grant(connection, 0.0, "d2", LEASE, everything) == {}
            assert claiming.grant(connection, 0.0, "d2", LEASE, ["no such task"]) == {}
            assert claiming.grant(connection, 0.0, "d2", LEASE, []) == {}

    def test_no_task_is_granted_twice_at_once(self, lab: Any) -> None:
        for seed in range(8):
            lab.submit(seed=seed)
        ids = [row.id for row in lab.rows(tasks, kind="train")]
        barrier = threading.Barrier(4)
        won: list[list[str]] = []

        def claim(holder: str) -> None:
            barrier.wait()
            with lab.database.write() as connection:
                won.append(list(claiming.grant(connection, lab.database.now(connection), holder, LEASE, ids)))

        threads = [threading.Thread(target=claim, args=(f"d{i}",)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(len(granted) for granted in won) == [0, 0, 0, 8]

    def test_attempts_count_on_through_everything(self, lab: Any) -> None:
        job = lab.submit()
        numbers = []
        for _ in range(3):
            [grant] = lab.grant()
            numbers.append(grant.attempt)
            lab.expire()
        [grant] = lab.grant()
        lab.fail(grant)
        lab.service.retry_job(job, user="ann")
        [again] = lab.grant()
        assert [*numbers, grant.attempt, again.attempt] == [1, 2, 3, 4, 5]
        assert lab.task(again.task_id).generation == 2

    def test_a_running_job_is_seen_to_run(self, lab: Any) -> None:
        lab.submit_sweep({"scale": [1, 5, 10]})
        lab.grant()
        assert lab.job_states() == {"running": 3}
        assert [event.kind for event in lab.rows(events)].count("job.running") == 3


class TestLeases:
    def test_a_task_is_taken_back_when_its_lease_has_run_out_and_not_before(self, lab: Any) -> None:
        job = lab.submit()
        [grant] = lab.grant(at=1000.0, lease_seconds=LEASE)
        assert reap(lab, 1000.0) == reap(lab, 1020.0) == 0
        assert reap(lab, 1020.001) == 1
        row = lab.task(grant.task_id)
        assert (row.state, row.holder, row.errors, row.suspect_losses) == ("queued", None, 0, 0)
        assert (lab.job(job).state, lab.rows(attempts)[0].end) == ("queued", "lease_expired")
        assert reap(lab, 1e9) == 0

    def test_a_lease_is_a_matter_of_heartbeats_and_never_of_age(self, lab: Any) -> None:
        lab.submit()
        lab.grant(at=0.0, lease_seconds=LEASE)
        for day in range(30):
            now = day * 86_400.0
            with lab.database.write() as connection:
                claiming.renew(connection, now, "d1", LEASE)
            assert reap(lab, now + LEASE) == 0

    def test_only_the_holder_renews(self, lab: Any) -> None:
        lab.submit()
        lab.grant(at=0.0, lease_seconds=LEASE)
        with lab.database.write() as connection:
            claiming.renew(connection, 1e9, "d2", LEASE)
        assert reap(lab, 100.0) == 1

    def test_a_dispatcher_takes_back_its_own(self, lab: Any) -> None:
        lab.submit()
        lab.submit(seed=1)
        mine, _ = lab.grant(holder="d1")
        with lab.database.write() as connection:
            assert claiming.take_back(connection, 0.0, "d2") == 0
            assert claiming.take_back(connection, 0.0, "d1", []) == 0
            assert claiming.take_back(connection, 0.0, "d1", [mine.task_id, "no such task"]) == 1
            assert claiming.held_by(connection, "d1").keys() == {
                (row.id, 1) for row in lab.rows(tasks, state="running") if row.id != mine.task_id
            }
            assert claiming.take_back(connection, 0.0, "d1") == 1
        assert lab.task_states("train") == {"queued": 2}

    @pytest.mark.parametrize("how", ["reap", "take_back"])
    def test_what_nobody_wants_any_more_ends_there(self, lab: Any, how: str) -> None:
        job = lab.submit()
        lab.grant(at=0.0, lease_seconds=LEASE)
        lab.service.cancel_job(job, user="ann")
        with lab.database.write() as connection:
            if how == "reap":
                claiming.reap(connection, 100.0, "d2")
            else:
                claiming.take_back(connection, 100.0, "d1")
        assert lab.task_states() == {"cancelled": 4}
        assert lab.grant() == []

    def test_an_expired_lease_alone_takes_nothing_from_its_holder(self, lab: Any) -> None:
        lab.submit()
        [grant] = lab.grant(at=0.0, lease_seconds=LEASE)
        lab.record(Lost(grant.task_id, 1, "node_died", "gone"), at=1e9)
        assert lab.rows(attempts)[0].end == "node_died"

    def test_all_of_a_lost_dispatcher_is_taken_back_at_once(self, lab: Any) -> None:
        for seed in range(50):
            lab.submit(seed=seed)
        lab.grant(at=0.0)
        assert lab.expire() == 50
        assert {attempt.end for attempt in lab.rows(attempts)} == {"lease_expired"}


class TestLeadership:
    def test_one_leads_and_others_stand_by_until_its_lease_has_run_out(self, lab: Any) -> None:
        assert lead(lab, "d1", 0.0) == 1
        assert lead(lab, "d2", 19.9) is None
        assert lead(lab, "d1", 19.9, epoch=1) == 1
        assert lead(lab, "d2", 39.8) is None
        assert lead(lab, "d2", 40.0) == 2
        assert lead(lab, "d1", 41.0, epoch=1) is None
        assert lead(lab, "d1", 41.0) is None

    def test_one_that_is_late_but_alone_goes_on(self, lab: Any) -> None:
        assert lead(lab, "d1", 0.0) == 1
        assert lead(lab, "d1", 1e6, epoch=1) == 1

    def test_one_that_was_superseded_does_not_go_on_when_its_successor_has_gone_too(self, lab: Any) -> None:
        lead(lab, "d1", 0.0)
        lead(lab, "d2", 100.0)
        assert lead(lab, "d1", 1e6, epoch=1) is None
        assert lead(lab, "d1", 1e6) == 3

    def test_one_that_resigns_makes_way_at_once(self, lab: Any) -> None:
        lead(lab, "d1", 0.0)
        with lab.database.write() as connection:
            claiming.resign(connection, 1.0, "d2")
        assert lead(lab, "d2", 1.0) is None
        with lab.database.write() as connection:
            claiming.resign(connection, 1.0, "d1")
        assert lead(lab, "d2", 1.0) == 2

    def test_its_own_name_takes_over_at_once_and_for_good(self, lab: Any) -> None:
        assert lead(lab, "d1", 0.0, lease=1e9) == 1
        assert lead(lab, "d1", 1.0, lease=1e9) == 2
        assert lead(lab, "d1", 2.0, epoch=1) is None
        assert lead(lab, "d1", 3.0, epoch=2) == 2

    def test_of_many_at_once_one_leads(self, lab: Any) -> None:
        barrier = threading.Barrier(6)
        won: list[str] = []

        def stand(name: str) -> None:
            barrier.wait()
            if lead(lab, name, 0.0):
                won.append(name)

        threads = [threading.Thread(target=stand, args=(f"d{i}",)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        [row] = lab.rows(leases)
        assert won == [row.holder]

    def test_nobody_else_has_taken_the_lead(self, lab: Any) -> None:
        with lab.database.write() as connection:
            assert not claiming.still_leads(connection, "d1", None)
            assert claiming.leader(connection) is None
            claiming.lead(connection, 0.0, "d1", None, LEASE, {})
            assert claiming.still_leads(connection, "d1", 1)
            assert not claiming.still_leads(connection, "d1", 2)
            assert not claiming.still_leads(connection, "d2", 1)
            row = claiming.leader(connection)
            assert claiming.led_by_another(row, 19.0, "d2")
            assert not claiming.led_by_another(row, 21.0, "d2")
            assert not claiming.led_by_another(row, 19.0, "d1")
