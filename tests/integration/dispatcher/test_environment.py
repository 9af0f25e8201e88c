"""The environment's fault, end to end: nobody is charged, the owner is set aside, all say why, and it goes on."""

from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from dispatching import PATIENT, Scripted, dispatcher, passes, succeeds, tick_until_idle

from service.errors import DatabaseFull
from service.model.environment import FIRST_WAIT_SECONDS
from service.model.executor import Bundle, Capacity, Failed, Fault, Grant, Lost, Message, Started
from service.operations import doctor
from service.queue.dispatcher import Dispatcher
from service.queue.explaining import explain
from service.queue.pausing import MOST_IN_A_ROW
from service.results.insights import Insights
from service.store import Database
from service.store.tables import attempts, events, jobs, sweeps, tasks

NODES = Capacity(True, 4.0, 0.0, ({"CPU": 2.0, "memory": 1e9},) * 2, ("good", "bad"))
ROOM = "there is no room under the artifact root /srv/artifacts"
FULL = Fault("artifact_root", "/srv/artifacts", "", writing=True)


class Nodes(Scripted):
    """Two nodes of two places; bundles go to the first that has room and that they do not avoid, the bad one first.

    A worker that cannot use its device stays in its place, as on Ray.
    """

    def __init__(self, lab: Any, breaks: Callable[[Bundle], Message | None]) -> None:
        super().__init__()
        self.room, self.lab, self.breaks = NODES, lab, breaks
        self.waiting: list[Bundle] = []
        self.running: dict[str, tuple[str, Bundle]] = {}
        self.kept_away = self.held = 0

    def submit(self, bundle: Bundle) -> None:
        self.bundles.append(bundle)
        self.waiting.append(bundle)

    def cancel(self, task_id: str, attempt: int) -> None:
        super().cancel(task_id, attempt)
        self.waiting = [one for one in self.waiting if (task_id, attempt) not in keys(one)]
        self.said.append(Lost(task_id, attempt, "cancelled", "before it started"))

    def poll(self, timeout_seconds: float) -> list[Message]:
        """What ran ends, and others take its place before the dispatcher hears of it, as in Ray."""
        for node in ("bad", "good"):
            for bundle in [one for at, one in self.running.values() if at == node]:
                del self.running[bundle.id]
                self._end(node, bundle)
            self._start(node)
        return super().poll(timeout_seconds)

    def _start(self, node: str) -> None:
        for bundle in list(self.waiting):
            if node in bundle.avoid:
                self.kept_away += 1
            elif sum(at == node for at, _ in self.running.values()) < 2 - self.held * (node == "bad"):
                self.waiting.remove(bundle)
                self.running[bundle.id] = node, bundle
                self.said.append(Started(*keys(bundle)[0], f"{node} pid 1", node))

    def _end(self, node: str, bundle: Bundle) -> None:
        broken = self.breaks(bundle) if node == "bad" else None
        others = bundle.grants[1:]
        if broken is None:
            self.said += [succeeds(self.lab)(grant) for grant in bundle.grants]
        else:
            self.held += isinstance(broken, Lost) and broken.fault is not None and broken.fault.owner == "device"
            self.said += [broken, *(Lost(one.task_id, one.attempt, "given_back", "not started") for one in others)]


def keys(bundle: Bundle) -> list[tuple[str, int]]:
    return [(grant.task_id, grant.attempt) for grant in bundle.grants]


def of_environment(owner: Any, name: str, dataset: str = "") -> Callable[[Bundle], Message]:
    def lose(bundle: Bundle) -> Message:
        fault = Fault(owner, name, "bad", dataset, writing=owner == "artifact_root")
        return Lost(*keys(bundle)[0], "environment", f"{owner} is broken", fault)

    return lose


WAYS = {
    "a worker that cannot import its libraries": of_environment("node", "host"),
    "a device that does not wake up": of_environment("device", "cuda:0 of host"),
    "a read-only artifact root": of_environment("artifact_root", "/srv/artifacts"),
    "a data folder without the files": of_environment("data_folder", "/srv/data", "digits"),
    "whatever it is": lambda bundle: Failed(*keys(bundle)[0], "error", "OSError: it does not work here"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_sweep_of_eight_on_two_nodes_of_which_one_is_broken(lab: Any, way: str) -> None:
    """It succeeds with at most 5 attempts lost."""
    body = lab.submit_sweep({"seed": list(range(8))})
    executor = Nodes(lab, WAYS[way])
    one = dispatcher(lab, executor)
    for _ in range(200):
        one.tick()
        passes(0.2)
        if lab.job_states() == {"succeeded": 8}:
            break
    assert lab.job_states() == {"succeeded": 8}, f"{body['id']}: {lab.task_states()}"
    ends = Counter(row.end for row in lab.rows(attempts))
    lost = sum(count for end, count in ends.items() if end not in ("succeeded", "given_back"))
    assert 0 < lost <= 5, ends
    assert ends["given_back"] <= 5, ends
    assert executor.kept_away or executor.held == 2
    charged = {(row.errors, row.suspect_losses) for row in lab.rows(tasks)}
    assert charged == {(0, 0)} or way == "whatever it is"
    [told] = [event.data for event in lab.rows(events, kind="environment.set_aside")][:1]
    assert told["node"] == "bad"
    lab.check()


def fourteen_cells(lab: Any) -> list[str]:
    lab.submit_sweep({"scale": [0.25, 0.5, 1, 2.5, 5, 10, 50], "attack": ["pgd_l2", "pgd_linf"], "seed": [0]})
    return [row.id for row in lab.rows(tasks, kind="train")]


def no_room(grant: Grant) -> Message:
    return Lost(grant.task_id, grant.attempt, "disk_full", ROOM, FULL)


class TestFullDisk:
    """The artifact root's disk is full under a sweep of 14 cells."""

    @pytest.fixture
    def full(self, lab: Any) -> Dispatcher:
        fourteen_cells(lab)
        return dispatcher(lab, Scripted(no_room))

    def test_it_costs_at_most_six_attempts_a_minute(self, lab: Any, full: Dispatcher) -> None:
        minutes = []
        for _ in range(5):
            before = len(lab.rows(attempts))
            for _ in range(60):
                full.tick()
                passes(1.0)
            minutes.append(len(lab.rows(attempts)) - before)
        assert max(minutes) <= 6, minutes
        assert sum(minutes) >= 3, "it is tried again"
        assert {(row.state, row.errors, row.suspect_losses) for row in lab.rows(tasks, kind="train")} == {
            ("queued", 0, 0)
        }

    def test_all_who_are_asked_say_so(self, lab: Any, full: Dispatcher) -> None:
        for _ in range(3):
            full.tick()
        job = lab.rows(jobs)[0]
        sentence = explain(lab.database, PATIENT, job.id)["sentence"]
        assert f"artifact root /srv/artifacts is set aside and is tried again in {FIRST_WAIT_SECONDS:.0f} s" in sentence
        assert ROOM in sentence
        [seen] = Insights(lab.database).cluster()["set_aside"]
        assert (seen["owner"], seen["name"], seen["reason"]) == ("artifact_root", "/srv/artifacts", ROOM)
        checks = {check.name: check for check in doctor._dispatcher(lab.database)}
        check = checks["artifact root /srv/artifacts"]
        assert (check.state, ROOM in check.said, bool(check.advice)) == ("fail", True, True)
        [event] = lab.rows(events, kind="environment.set_aside")
        assert event.data["reason"] == ROOM

    def test_it_goes_on_by_itself_once_there_is_room(self, lab: Any, full: Dispatcher) -> None:
        for _ in range(3):
            full.tick()
        executor = full.executor
        assert isinstance(executor, Scripted)
        executor.answers = succeeds(lab)
        tick_until_idle(full)
        assert lab.task_states("train") == {"queued": 1}, "not before its time"
        passes(FIRST_WAIT_SECONDS)
        tick_until_idle(full)
        assert lab.job_states() == {"succeeded": 14}
        assert [event.kind for event in lab.rows(events) if event.kind.startswith("environment.")] == [
            "environment.set_aside",
            "environment.returned",
        ]
        full.tick()
        assert Insights(lab.database).cluster()["set_aside"] == []

    def test_the_next_dispatcher_does_not_try_it_at_once(self, lab: Any, full: Dispatcher) -> None:
        for _ in range(3):
            full.tick()
        before = len(lab.rows(attempts))
        other = dispatcher(lab, Scripted(no_room))
        tick_until_idle(other)
        assert other.leading
        assert len(lab.rows(attempts)) == before
        passes(FIRST_WAIT_SECONDS)
        tick_until_idle(other)
        assert len(lab.rows(attempts)) == before + 1


def test_other_data_sets_go_on_while_the_files_of_one_are_missing(lab: Any) -> None:
    """A neighbour whose data set nobody has put there stops nobody else."""
    missing = Fault("data_folder", "/srv/data", "", dataset="cifar10")

    def answer(grant: Grant) -> Message:
        if grant.spec.get("dataset", {}).get("name") == "cifar10":
            return Lost(grant.task_id, grant.attempt, "environment", "put the files there", missing)
        return succeeds(lab)(grant)

    theirs = lab.submit(user="bob", dataset="cifar10")
    one = dispatcher(lab, Scripted(answer))
    one.tick()
    one.tick()
    lab.submit(user="ann")
    tick_until_idle(one)
    assert lab.job_states() == {"succeeded": 1, "queued": 1}
    sentence = explain(lab.database, PATIENT, theirs)["sentence"]
    assert "data folder /srv/data is set aside for cifar10" in sentence
    assert "put the files there" in sentence


def test_a_full_disk_under_the_database_is_named(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only that nobody leads: no dispatcher can."""
    job = lab.submit()
    assert "no dispatcher leads" in explain(lab.database, PATIENT, job)["sentence"]
    left = SimpleNamespace(total=1 << 30, used=1 << 30, free=0)

    def full(_: Database, *, doubt: bool = False) -> None:
        raise DatabaseFull("the database's disk is full (0 bytes left): make room")

    if lab.database.is_sqlite:
        monkeypatch.setattr("service.store.database.shutil.disk_usage", lambda _: left)
    else:
        monkeypatch.setattr(Database, "check_room", full)
    assert "the database's disk is full (0 bytes left" in explain(lab.database, PATIENT, job)["sentence"]
    check = doctor._writable(lab.database)
    assert (check.state, "disk is full" in check.said, "make room" in check.advice) == ("fail", True, True)


class TestPausing:
    """One task after the other fails at once, and nobody knows whose doing it is."""

    @pytest.fixture
    def failing(self, lab: Any) -> Dispatcher:
        lab.submit_sweep({"seed": list(range(20))})
        lab.submit(user="bob", seed=99)
        lab.submit_sweep({"seed": [200, 201]}, user="cyd")

        def answer(grant: Grant) -> Message:
            if grant.spec.get("seed", 0) < 20 and grant.spec["kind"] == "train":
                return Failed(grant.task_id, grant.attempt, "error", f"OSError: no such device ({grant.digest[:4]})")
            return succeeds(lab)(grant)

        return dispatcher(lab, Scripted(answer), backoff_seconds=3600.0)

    def test_the_sweep_is_paused_with_the_reason_and_the_others_go_on(self, lab: Any, failing: Dispatcher) -> None:
        tick_until_idle(failing)
        [theirs] = [row for row in lab.rows(sweeps) if row.user == "ann"]
        tried = len([row for row in lab.rows(attempts) if row.end == "error"])
        assert MOST_IN_A_ROW <= tried <= 2 * MOST_IN_A_ROW, "what was handed over is finished"
        assert theirs.paused
        assert "attempts in a row ended within 10 s of their start, the last: OSError: no such device" in (
            theirs.pause_reason
        )
        assert lab.job_states()["succeeded"] == 3
        assert lab.job_states()["failed"] == 0, "none has used up what it may try"
        [event] = lab.rows(events, kind="sweep.paused")
        assert (event.sweep_id, event.data["reason"], event.actor) == (theirs.id, theirs.pause_reason, "d1")
        shown = Insights(lab.database).sweep(theirs.id)
        assert (shown["state"], shown["pause_reason"]) == ("paused", theirs.pause_reason)
        [job] = [row for row in lab.rows(jobs, sweep_id=theirs.id)][:1]
        assert "no such device" in explain(lab.database, PATIENT, job.id)["sentence"]

    def test_it_can_be_resumed(self, lab: Any, failing: Dispatcher) -> None:
        tick_until_idle(failing)
        [theirs] = [row for row in lab.rows(sweeps) if row.user == "ann"]
        assert isinstance(failing.executor, Scripted)
        failing.executor.answers = succeeds(lab)
        lab.service.resume_sweep(theirs.id, user="ann")
        [row] = lab.rows(sweeps, id=theirs.id)
        assert (row.paused, row.pause_reason) == (False, None)
        passes(2 * 3600.0)
        tick_until_idle(failing)
        assert lab.job_states() == {"succeeded": 23}

    def test_configuration_errors_and_a_success_between_pause_nothing(self, lab: Any) -> None:
        lab.submit_sweep({"seed": list(range(24))})

        def answer(grant: Grant) -> Message:
            seed = grant.spec.get("seed", 0)
            if grant.spec["kind"] == "train" and seed % 2:
                return Failed(grant.task_id, grant.attempt, "configuration" if seed % 4 == 1 else "error", "it broke")
            return succeeds(lab)(grant)

        tick_until_idle(dispatcher(lab, Scripted(answer), max_errors=1))
        assert lab.job_states() == {"succeeded": 12, "failed": 12}
        assert not lab.rows(events, kind="sweep.paused")
