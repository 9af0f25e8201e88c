"""A store and what goes on around it, moved by hand: who submits, who grants, who answers; and what must then hold."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from sqlalchemy import Connection, Table, Update, select
from sqlalchemy import event as sql_event

from service.lab.artifacts import Artifacts
from service.model.executor import Bits, Failed, Grant, Message, Outcome, Succeeded
from service.model.jobs import ENDED_TASK, LIVE_JOB, TRANSITIONS, JobState, TaskState, job_state
from service.model.retrying import Patience
from service.queue.verbs import Service
from service.specs import JobSpec, Sweep
from service.store import Database, claiming, recording, tables


def _rows(connection: Connection, table: Table, **values: Any) -> list[Any]:
    query = select(table).where(*(table.c[name] == value for name, value in values.items()))
    return list(connection.execute(query.order_by(*table.primary_key)))


RESULTS = (tables.trainings, tables.measurements, tables.attack_results, tables.control_results)
CHECKED = (tables.events, tables.task_edges, tables.tasks, tables.jobs, tables.job_tasks, tables.attempts, *RESULTS)


def refuse_unchecked_moves(
    connection: Connection, statement: Any, several: Any, parameters: Any, options: Mapping[str, Any]
) -> None:
    """States are changed by `move_tasks` and `move_jobs` alone, which look into the tables of transitions."""
    if isinstance(statement, Update) and statement.table in (tables.tasks, tables.jobs) and "moves" not in options:
        assignments = str(statement.compile(dialect=connection.dialect)).partition(" WHERE ")[0]
        assert not re.search(r"\bstate=", assignments), f"it goes around `move_tasks` and `move_jobs`: {assignments}"


class Lab:
    """A store and what goes on around it: users who submit, a dispatcher that grants, workers that answer."""

    BASE: ClassVar[dict[str, Any]] = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 16}
    DEMO: ClassVar[dict[str, Any]] = {
        "architecture": ["mlp", "simple_cnn"],
        "scale": [0.25, 0.5, 1, 2.5, 5, 10, 50],
        "attack": ["pgd_l2", "pgd_linf"],
    }
    PATIENCE = Patience(max_errors=3, max_suspect_losses=3, backoff_seconds=0.0)

    def __init__(self, database: Database, artifacts: Artifacts) -> None:
        self.database = database
        self.artifacts = artifacts
        self.service = Service(database, artifacts)
        if not sql_event.contains(database.engine, "before_execute", refuse_unchecked_moves):
            sql_event.listen(database.engine, "before_execute", refuse_unchecked_moves)
        self._used: dict[tuple[str, int], dict[str, str]] = {}  # the weights that attempts were granted on

    def submit(self, user: str = "ann", priority: int = 0, **changed: Any) -> str:
        """Submit a job, the same one but for `changed`; returns its id."""
        job = JobSpec.model_validate({**self.BASE, **changed})
        body: dict[str, Any] = self.service.submit(job, user=user, priority=priority).body
        return str(body["id"])

    def submit_sweep(self, grid: dict[str, list[Any]] | None = None, user: str = "ann", **more: Any) -> dict[str, Any]:
        """Submit a sweep, the demo's 28 jobs unless another grid is given; returns the reply's body."""
        sweep = Sweep.model_validate({"name": "sweep", "base": self.BASE, "grid": grid or self.DEMO, **more})
        return self.service.submit_sweep(sweep, user=user).body

    def grant(
        self, *kinds: str, holder: str = "d1", lease_seconds: float = 1e6, at: float | None = None
    ) -> list[Grant]:
        """Grant all that is queued, or of that only these kinds, trainings first."""
        with self.database.write() as connection:
            now = self.database.now(connection) if at is None else at
            queue = [task for task in claiming.waiting(connection, now, 10_000) if not kinds or task.kind in kinds]
            queue.sort(key=lambda task: (task.kind != "train", task.sequence, task.task_id))
            ids = [task.task_id for task in queue]
            granted = claiming.grant(connection, now, holder, lease_seconds, ids)
            made: dict[str, str] = {}
            for one in granted.values():
                named = {"weights_sha256": one.spec.get("checkpoint"), "source_weights_sha256": one.spec.get("source")}
                for digest in set(filter(None, named.values())) - made.keys():
                    checkpoint = claiming.checkpoints_of(connection, [digest])[digest][1]
                    assert checkpoint is not None, "it was granted before its network was trained"
                    made[digest] = checkpoint.digest
                used = {name: made[digest] for name, digest in named.items() if digest}
                self._used[one.task_id, one.attempt] = used
            return [granted[task_id] for task_id in ids]

    def record(self, *messages: Message, patience: Patience | None = None, at: float | None = None) -> list[str]:
        with self.database.write() as connection:
            now = self.database.now(connection) if at is None else at
            return recording.record(connection, now, "d1", messages, patience or self.PATIENCE)

    def succeed(self, *grants: Grant) -> None:
        self.record(*(Succeeded(grant.task_id, grant.attempt, self.outcome(grant)) for grant in grants))

    def fail(self, grant: Grant, message: str = "it broke") -> None:
        self.record(Failed(grant.task_id, grant.attempt, "configuration", message))

    def outcome(self, grant: Grant, weights: str = "weights", **numbers: Any) -> Outcome:
        """What a worker would leave of such a task: plausible numbers and bits, a checkpoint that exists.

        Provenance has the weights of the training when the attempt was granted.
        """
        used = self._used.get((grant.task_id, grant.attempt), {})
        made: dict[str, Any] = {"provenance": {"torch": "2", "attempt": grant.attempt, **used}}
        if grant.spec["kind"] == "train":
            ref = self.artifacts.write_chunks("checkpoint", [f"{weights} of {grant.digest}".encode()])
            made["provenance"]["weights_sha256"] = ref.digest
            return Outcome({"test_accuracy": 0.9, **numbers}, {"epochs": {"loss": [1.0]}}, artifacts=(ref,), **made)
        if grant.spec["kind"] == "measure":
            return Outcome({"log_relative_sharpness_median": -2.5, **numbers}, **made)
        n = grant.spec["samples"]
        every, none = (Bits(n, np.packbits(np.full(n, bit)).tobytes()) for bit in (True, False))
        if grant.spec["kind"] == "attack":
            bits = {"clean_correct": every, "robust": every, "zero_gradient": none}
            return Outcome({"robust_accuracy": 1.0, "outside_ball": 0, **numbers}, {"steps": [0, 1]}, bits, **made)
        names = ("fgsm", "noise", "margin", "square", "pgd", "more_steps")
        checks = ("train_mode_modules", "random_forward_changed", "batch_dependent_changed", "eps_zero_changed")
        return Outcome(dict.fromkeys(checks, 0) | numbers, bits={f"robust_{name}": every for name in names}, **made)

    def finish(self) -> None:
        """Grant and answer until nothing is queued."""
        while grants := self.grant():
            self.succeed(*grants)

    def expire(self) -> int:
        """Let every lease run out, and reap; returns how many tasks were taken back."""
        with self.database.write() as connection:
            return claiming.reap(connection, self.database.now(connection) + 1e9, "d1")

    def rows(self, table: Table, **values: Any) -> list[Any]:
        """The rows of a table that have these values."""
        with self.database.read() as connection:
            return _rows(connection, table, **values)

    def task(self, task_id: str) -> Any:
        [row] = self.rows(tables.tasks, id=task_id)
        return row

    def job(self, job_id: str) -> Any:
        [row] = self.rows(tables.jobs, id=job_id)
        return row

    def task_states(self, kind: str | None = None) -> Counter[str]:
        return Counter(row.state for row in self.rows(tables.tasks, **({"kind": kind} if kind else {})))

    def job_states(self) -> Counter[str]:
        return Counter(row.state for row in self.rows(tables.jobs))

    def dump(self) -> dict[str, list[Any]]:
        """Everything that is stored, to be compared."""
        with self.database.read() as connection:
            return {table.name: _rows(connection, table) for table in tables.metadata.sorted_tables}

    def check(self) -> None:
        """What must hold of any store at any time, also of its past, as far as events tell."""
        with self.database.read() as connection:
            stored = {table: _rows(connection, table) for table in CHECKED}
        events = stored[tables.events]
        assert [event.id for event in events] == list(range(1, len(events) + 1)), "events have gaps"
        self._check_tasks(events, stored)
        self._check_jobs(events, stored)

    def _check_tasks(self, events: list[Any], stored: dict[Table, list[Any]]) -> None:
        parents: dict[str, list[str]] = defaultdict(list)
        for edge in stored[tables.task_edges]:
            parents[edge.child_id].append(edge.parent_id)
        states: dict[str, TaskState] = {}
        for event in events:
            verb = event.kind.removeprefix("task.")
            if event.kind == verb or verb not in set(TaskState):
                continue
            after, before = TaskState(verb), states.get(event.task_id)
            legal = TRANSITIONS[before] if before else {TaskState.BLOCKED, TaskState.QUEUED}
            assert after in legal, f"event {event.id} moves a task from {before} to {after}"
            states[event.task_id] = after
            if after in (TaskState.QUEUED, TaskState.RUNNING):
                assert all(states[parent] is TaskState.SUCCEEDED for parent in parents[event.task_id]), "child first"
        rows = stored[tables.tasks]
        assert {row.id: row.state for row in rows} == states, "the events tell another story than the tasks"
        live = {row.id for row in stored[tables.jobs] if row.state in LIVE_JOB}
        needed = {row.task_id for row in stored[tables.job_tasks] if row.job_id in live}
        attempts: dict[str, list[Any]] = defaultdict(list)
        for attempt in stored[tables.attempts]:
            attempts[attempt.task_id].append(attempt)
        for row in rows:
            assert [attempt.number for attempt in attempts[row.id]] == list(range(1, row.attempt + 1))
            running = [attempt.number for attempt in attempts[row.id] if attempt.ended_at is None]
            assert running == ([row.attempt] if row.state == TaskState.RUNNING else [])
            assert (row.holder is not None) == (row.lease_expires_at is not None) == (row.state == TaskState.RUNNING)
            assert row.state not in (TaskState.FAILED, TaskState.CANCELLED, TaskState.HELD) or row.reason
            if row.state not in ENDED_TASK:
                assert row.id in needed or row.cancel_requested, f"nobody needs {row.kind} {row.id}, yet it waits"
        recorded = {row.task_id for table in RESULTS for row in stored[table]}
        assert {row.id for row in rows if row.state == TaskState.SUCCEEDED} <= recorded

    def _check_jobs(self, events: list[Any], stored: dict[Table, list[Any]]) -> None:
        states: dict[str, JobState] = {}
        for event in events:
            verb = event.kind.removeprefix("job.")
            if event.kind == verb or verb in (
                "changed",
                "boosted",
                "unboosted",
                "replanned",
            ):  # its rank, labels, tasks
                continue
            before, after = (
                states.get(event.job_id),
                JobState({"submitted": "queued", "retried": "queued"}.get(verb, verb)),
            )
            if verb == "submitted":
                assert before is None
            elif verb == "retried":
                assert before in (JobState.FAILED, JobState.CANCELLED, JobState.HELD)
            else:
                assert before in LIVE_JOB, f"event {event.id} moves a job from {before} to {after}"
            states[event.job_id] = after
        needs: dict[str, list[TaskState]] = defaultdict(list)
        named: dict[str, set[str]] = defaultdict(set)
        task_of = {row.id: row for row in stored[tables.tasks]}
        job_of = {row.id: row for row in stored[tables.jobs]}
        lost = {row.task_id for row in stored[tables.attempts] if row.end == "missing_checkpoint"}
        for row in stored[tables.job_tasks]:
            task = task_of[row.task_id]
            further = task.kind == "measure" and task.id != job_of[row.job_id].measure_task_id
            does_without = further and task.state == TaskState.FAILED and task.id not in lost
            needs[row.job_id].append(TaskState.SUCCEEDED if does_without else TaskState(task.state))
            named[row.job_id].add(row.task_id)
        rows = stored[tables.jobs]
        assert {row.id: row.state for row in rows} == states, "the events tell another story than the jobs"
        assert named.keys() == {row.id for row in rows}
        for row in rows:
            parts = {value for name, value in row._mapping.items() if name.endswith("_task_id") and value}
            assert parts <= named[row.id]
            if row.state in LIVE_JOB:
                assert row.state == job_state(needs[row.id]), (
                    f"job {row.id} is {row.state}, its tasks are {needs[row.id]}"
                )
            stopped = row.state in (JobState.FAILED, JobState.CANCELLED, JobState.HELD)
            assert stopped == (row.reason is not None)
            assert (row.state in LIVE_JOB) == (row.finished_at is None)
            assert (row.state == JobState.SUCCEEDED) == (row.verdict is not None)
