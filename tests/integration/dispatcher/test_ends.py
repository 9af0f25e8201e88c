"""How what runs comes to an end: cancelled, stopped, lost, stalled, or never storable."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from dispatching import CLOCK, PATIENT, Scripted, dispatcher, passes, running, succeeds, tick_until_idle
from waiting import until

from service.model.executor import (
    ArtifactRef,
    Capacity,
    Failed,
    Grant,
    Lost,
    Message,
    Outcome,
    Progress,
    Reason,
    Started,
    Succeeded,
)
from service.queue.dispatcher import Dispatcher
from service.store import tables
from service.store.tables import attempts, events, tasks
from workers import devices, run
from workers.context import Context

SHARED_MEMORY: Literal["out_of_shared_memory"] = "out_of_shared_memory"


class TestCancellation:
    def test_what_nobody_wants_is_stopped_soon(self, lab: Any, scripted: Scripted, monkeypatch: Any) -> None:
        monkeypatch.setattr("service.queue.dispatcher.CANCEL_CHECK_SECONDS", 0.0)
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
        monkeypatch.setattr("service.queue.dispatcher.CANCEL_CHECK_SECONDS", 0.0)
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
            until(lambda: len(scripted.bundles) == 2)
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
            until(lambda: bool(scripted.bundles))
            scripted.close = lambda: scripted.said.append(succeeds(lab)(scripted.grants[0]))  # type: ignore[method-assign]
        assert lab.task_states("train") == {"succeeded": 1}

    def test_what_runs_may_finish_and_what_waits_is_given_back_at_once(self, lab: Any, scripted: Scripted) -> None:
        lab.submit_sweep({"seed": [0, 1, 2, 3]})
        with running(dispatcher(lab, scripted, settings=PATIENT, stop_seconds=60.0)) as stop:
            until(lambda: len(scripted.bundles) == 4)
            first, second, *waiting = scripted.grants
            scripted.said = [Started(one.task_id, 1, "worker") for one in (first, second)]
            until(lambda: all(lab.task(one.task_id).worker for one in (first, second)))
            stop.set()
            until(lambda: len(scripted.cancelled) == 2)
            assert set(scripted.cancelled) == {(one.task_id, 1) for one in waiting}
            epoch = lab.artifacts.write_chunks("epoch_state", [b"epoch 1"])
            scripted.said = [Lost(one.task_id, 1, "cancelled", "before it started") for one in waiting]
            scripted.said += [succeeds(lab)(first), Progress(second.task_id, 1, 0.5, {}, epoch)]
            until(lambda: len(scripted.cancelled) == 3)
            assert scripted.cancelled[2] == (second.task_id, 1), "once it has left an epoch state"
            assert not scripted.closed
            scripted.said = [Lost(second.task_id, 1, "cancelled", "stopped")]
            until(lambda: scripted.closed)
        assert len(scripted.bundles) == 4, "it takes on nothing new"
        assert lab.task(first.task_id).state == "succeeded"
        assert lab.task(second.task_id).resume_digest == epoch.digest
        assert lab.task_states("train") == {"succeeded": 1, "queued": 3}
        assert Counter(row.end for row in lab.rows(attempts)) == {"succeeded": 1, "given_back": 3}
        assert {(row.errors, row.suspect_losses, row.not_before) for row in lab.rows(tasks)} == {(0, 0, 0.0)}

    def test_the_time_to_finish_is_bounded(self, lab: Any, scripted: Scripted) -> None:
        lab.submit()
        with running(dispatcher(lab, scripted, stop_seconds=0.5)) as stop:
            until(lambda: bool(scripted.bundles))
            scripted.said = [Started(scripted.grants[0].task_id, 1, "worker")]
            until(lambda: lab.task(scripted.grants[0].task_id).worker)
            started = time.monotonic()
            stop.set()
            until(lambda: scripted.closed)
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

    def test_one_that_stands_by_leaves_everything_alone(
        self, lab: Any, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lab.submit()
        dispatcher(lab, Scripted()).tick()
        before = lab.dump()
        ticks: list[bool] = []
        other = dispatcher(lab, scripted, "d2")
        tick = other.tick

        def noted() -> bool:
            ticks.append(tick())
            return ticks[-1]

        monkeypatch.setattr(other, "tick", noted)
        with running(other):
            until(lambda: len(ticks) >= 3)
        assert scripted.closed
        assert lab.dump() == before


class TestLosses:
    """What is held against a task and what is not (service/README.md)."""

    @pytest.mark.parametrize(
        ("reason", "held_against"),
        [
            ("worker_died", 1), ("out_of_memory", 1), ("stalled", 1), ("node_died", 0), ("preempted", 0),
            ("executor_lost", 0), ("given_back", 0), ("disk_full", 0),
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

    def test_who_meets_devices_that_give_up_may_be_their_end(
        self, lab: Any, scripted: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """As a worker answers whose device does not compute any more: a suspect loss each time, and never an error."""

        def broken(*_args: object) -> Outcome:
            raise torch.AcceleratorError("an illegal memory access was encountered")

        monkeypatch.setattr(run, "run", broken)
        monkeypatch.setattr(devices, "computes", lambda device: False)
        lab.submit()
        one = dispatcher(lab, scripted)
        for attempt in range(1, PATIENT.max_suspect_losses + 1):
            one.tick()
            assert scripted.grants[-1].attempt == attempt
            said: list[Message] = []
            with pytest.raises(run.DeviceBroken):
                said.extend(run.execute(scripted.bundles[-1], Context(lab.artifacts, tmp_path)))
            scripted.said = said
            one.tick()
            [row] = lab.rows(tasks, kind="train")
            assert (row.errors, row.suspect_losses) == (0, attempt)
        assert row.state == "held"
        assert "cpu gave up: AcceleratorError: an illegal memory access" in row.reason

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
        until(lambda: one.tick() and len(scripted.bundles) == 3)
        assert (scripted.grants[2].task_id, scripted.bundles[2].needs.gpus) == (first.task_id, 1.0)
        assert [row.device_share for row in lab.rows(attempts, task_id=first.task_id)] == [0.5, 1.0], "and pays for it"

    def test_so_has_an_attack_while_others_on_its_checkpoint_share_one(self, lab: Any, scripted: Scripted) -> None:
        scripted.room = Capacity(True, 8.0, 1.0)
        lab.submit()
        lab.succeed(*lab.grant("train"))
        one = dispatcher(lab, scripted, gpus_per_task=0.5)
        one.tick()
        large = next(grant for grant in scripted.grants if grant.spec["kind"] == "attack")
        others = [grant for grant in scripted.grants if grant is not large]
        scripted.said = [Lost(large.task_id, 1, SHARED_MEMORY, "CUDA out of memory")]
        scripted.said += [Succeeded(grant.task_id, 1, lab.outcome(grant)) for grant in others]
        until(lambda: one.tick() and scripted.bundles[-1].needs.gpus == 1.0)
        assert [grant.task_id for grant in scripted.bundles[-1].grants] == [large.task_id]

    def test_who_finds_no_memory_waits_longer_each_time(self, lab: Any, scripted: Scripted) -> None:
        scripted.room = Capacity(True, 8.0, 1.0)
        lab.submit()
        one = dispatcher(lab, scripted, gpus_per_task=0.5, backoff_seconds=10.0)
        waits = []
        reasons: list[Reason] = [SHARED_MEMORY, SHARED_MEMORY, SHARED_MEMORY, "node_died", SHARED_MEMORY]
        for attempt, reason in enumerate(reasons, 1):
            one.tick()
            [row] = lab.rows(tasks, kind="train")
            scripted.said = [Lost(row.id, attempt, reason, "no room")]
            before = time.time() + CLOCK.ahead
            one.tick()
            waits.append(lab.task(row.id).not_before - before)
            passes(max(0.0, waits[-1]) + 1)
        doubled = [10.0, 20.0, 40.0]
        assert all(0.7 * most < wait < 1.3 * most for wait, most in zip(waits, doubled, strict=False)), waits
        assert waits[4] < 14, "a loss of another kind begins the count anew"

    def test_who_finds_no_memory_on_three_whole_gpus_has_too_little_on_any(self, lab: Any, scripted: Scripted) -> None:
        scripted.room = Capacity(True, 8.0, 1.0)
        lab.submit()
        one = dispatcher(lab, scripted, gpus_per_task=0.5, backoff_seconds=0.0, max_suspect_losses=2)
        for attempt in range(1, 6):
            one.tick()
            [row] = lab.rows(tasks, kind="train")
            assert (row.state, row.attempt) == ("running", attempt)
            scripted.said = [Lost(row.id, attempt, SHARED_MEMORY, "cuda:0 ran out of memory")]
            one.tick()
        rows = lab.rows(attempts, task_id=row.id)
        assert [(row.device_share, row.end) for row in sorted(rows, key=lambda row: row.number)] == [
            (0.5, SHARED_MEMORY), (1.0, SHARED_MEMORY), (1.0, SHARED_MEMORY), (1.0, "out_of_memory"),
            (1.0, "out_of_memory"),
        ]  # fmt: skip
        held = lab.task(row.id)
        assert (held.state, held.suspect_losses) == ("held", 2)


class TestStalled:
    def test_it_is_reported_and_past_a_limit_restarted(self, lab: Any, scripted: Scripted) -> None:
        lab.submit_sweep({"seed": [0, 1]})
        one = dispatcher(lab, scripted, stalled_seconds=200.0, stalled_limit_seconds=1000.0)
        one.tick()
        still, alive = scripted.grants
        scripted.said = [Started(grant.task_id, 1, "worker") for grant in (still, alive)]
        fraction = 0.0

        def is_stalled() -> bool:
            beat()
            return [row.task_id for row in lab.rows(events, kind="task.stalled")] == [still.task_id]

        def is_cancelled() -> bool:
            beat()
            return bool(scripted.cancelled)

        def beat() -> None:
            nonlocal fraction
            passes(150.0)
            fraction += 0.001
            scripted.said += [Progress(still.task_id, 1, 0.5, {"loss": fraction})]
            scripted.said += [Progress(alive.task_id, 1, fraction, {"loss": 1.0})]
            one.tick()

        until(is_stalled)
        until(is_cancelled)
        assert scripted.cancelled == [(still.task_id, 1)]
        assert len(lab.rows(events, kind="task.stalled")) == 1, "said once"
        scripted.said = [Lost(still.task_id, 1, "cancelled", "stopped")]
        until(lambda: one.tick() and len(scripted.grants) == 3)
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

    def test_progress_that_cannot_be_stored_is_no_failure(self, lab: Any, scripted: Scripted, one: Dispatcher) -> None:
        [grant] = scripted.grants
        scripted.said = [Progress(grant.task_id, 1, 0.5, {"loss": object()}), succeeds(lab)(grant)]
        one.tick()
        assert lab.task_states("train") == {"succeeded": 1}

    def test_a_message_that_no_database_takes(self, lab: Any, scripted: Scripted, one: Dispatcher) -> None:
        [grant] = scripted.grants
        scripted.said = [Failed(grant.task_id, 1, "configuration", "a \0 in it", "trace\0back")]
        one.tick()
        [row] = lab.rows(tasks, kind="train")
        assert row.state == "failed"

    def test_bytes_that_cannot_be_deleted(
        self, lab: Any, scripted: Scripted, one: Dispatcher, monkeypatch: Any
    ) -> None:
        [grant] = scripted.grants

        def refuses(_: str) -> None:
            raise PermissionError("read-only file system")

        monkeypatch.setattr(lab.artifacts, "delete", refuses)
        epochs = [ArtifactRef(letter * 64, 1, "epoch_state") for letter in "ab"]
        scripted.said = [Progress(grant.task_id, 1, 0.5, {}, epoch) for epoch in epochs]
        one.tick()
        assert [row.digest for row in lab.rows(tables.artifacts)] == ["b" * 64]

    def test_superseded_epoch_states_are_deleted(self, lab: Any, scripted: Scripted, one: Dispatcher) -> None:
        [grant] = scripted.grants
        epochs = [lab.artifacts.write_chunks("epoch_state", [letter]) for letter in (b"a", b"b")]
        scripted.said = [Progress(grant.task_id, 1, 0.5, {}, epoch) for epoch in epochs]
        one.tick()
        assert [lab.artifacts.exists(epoch.digest) for epoch in epochs] == [False, True]
