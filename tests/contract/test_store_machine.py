"""The store beside a model of it that fits on a page: whatever happens, in whatever order, both say the same.

What happens: submissions, claims by two dispatchers from what they saw a while ago, renewed and expired leases, answers
of every kind (also late ones, twice, and of attempts that were superseded), cancellations, retries, pauses, dispatchers
that crash, a clock of the database that is set back and forth, and errors just before or just after a commit, upon
which everyone does what callers do: the same again. On both databases; and the machine finds faults that are planted.
"""

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection, delete, func, select, text
from store_lab import Lab

from service.errors import Conflict, DatabaseAway
from service.lab.artifacts import Artifacts
from service.model import jobs as model_jobs
from service.model import retrying
from service.model.executor import ArtifactRef, Failed, Grant, Lost, Message, Progress, Succeeded
from service.model.retrying import Patience
from service.queue.plans import plans_of
from service.queue.verbs import Idempotency, Service
from service.specs import JobSpec, Sweep
from service.store import Database, claiming, joining, recording, settling, sqlite, tables
from service.store import database as database_module
from service.store.patience import BUSY_SECONDS
from service.store.task_kinds import TASK_KINDS
from service.store.typed import json_number

LEASE = 20.0
START = 1e9  # what the database's clock says at first, long before any other clock
PATIENCE = Patience(max_errors=2, max_suspect_losses=2, backoff_seconds=0.0)
COSTLY = ("worker_died", "out_of_memory")
FREE = ("node_died", "preempted", "executor_lost", "given_back", "cancelled")
BEFORE, AFTER = "error before the commit", "error after the commit"


class Store(Database):
    """The real one, with a clock that can be set, and a next writing transaction that can fail as it commits."""

    clock = START
    fault: str | None = None

    def now(self, connection: Connection) -> float:
        return self.clock

    @contextmanager
    def write(self, *, in_turn: bool = True) -> Iterator[Connection]:
        fault, self.fault = self.fault, None
        with super().write(in_turn=in_turn) as connection:
            yield connection
            if fault == BEFORE:
                raise DatabaseAway(fault)
        if fault == AFTER:
            raise DatabaseAway(fault)


@dataclass
class Task:
    """What the model knows of a task; `recorded` is the attempt whose numbers are stored."""

    parents: tuple[str, ...]
    state: str = "cancelled"  # until a job opens it
    attempt: int = 0
    holder: str | None = None
    lease_expires_at: float | None = None
    errors: int = 0
    suspect_losses: int = 0
    not_before: float = 0.0
    resume_digest: str | None = None
    recorded: int | None = None

    def stop(self, state: str) -> None:
        self.state, self.holder, self.lease_expires_at = state, None, None

    def succeed(self) -> None:
        self.stop("succeeded")
        self.recorded, self.resume_digest = self.attempt, None


@dataclass
class Job:
    """A job's state; its tasks by id, parents first; the sweep that it came in."""

    tasks: tuple[str, ...]
    sweep: str | None
    state: str = "queued"

    @property
    def live(self) -> bool:
        return self.state in ("queued", "running", "held")


@dataclass
class Model:
    """The oracle: what the store has to say after each step."""

    tasks: dict[str, Task] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    paused_sweeps: set[str] = field(default_factory=set)
    paused: bool = False
    leader: tuple[str, int, float] | None = None  # holder, epoch, when its lease expires

    def needed(self, task_id: str, *, unpaused: bool = False) -> bool:
        jobs = (job for job in self.jobs.values() if job.live and task_id in job.tasks)
        return any(not unpaused or job.sweep not in self.paused_sweeps for job in jobs)

    def grantable(self, task_id: str) -> bool:
        return self.tasks[task_id].state == "queued" and self.needed(task_id, unpaused=True)

    def open(self, job: Job, *states: str) -> None:
        """A job begins, or begins again: those of its tasks that are in these states do, too."""
        job.state = "queued"
        for task in map(self.tasks.__getitem__, job.tasks):
            if task.state in states:
                task.state, task.errors, task.suspect_losses, task.not_before = "blocked", 0, 0, 0.0
        self.settle()

    def settle(self) -> None:
        """Tasks follow their parents, jobs their tasks, and what no live job needs ends: until nothing changes."""
        before: tuple[list[str], list[str]] | None = None
        while before != (before := ([of.state for of in self.tasks.values()], [of.state for of in self.jobs.values()])):
            for task in self.tasks.values():
                parents = {self.tasks[parent].state for parent in task.parents}
                if task.state == "blocked" and parents & {"failed", "cancelled"}:
                    task.state = "cancelled"
                elif task.state == "blocked" and parents <= {"succeeded"}:
                    task.state = "queued"
            for job in self.jobs.values():
                if job.live:
                    job.state = self._derived({self.tasks[task_id].state for task_id in job.tasks})
            for task_id, task in self.tasks.items():
                if task.state in ("blocked", "queued", "held") and not self.needed(task_id):
                    task.state = "cancelled"

    @staticmethod
    def _derived(states: set[str]) -> str:
        if states & {"failed", "cancelled"}:
            return "failed"
        if "held" in states:
            return "held"
        if states == {"succeeded"}:
            return "succeeded"
        return "running" if states & {"running", "succeeded"} else "queued"

    def beat(self, name: str, epoch: int | None, known: set[tuple[str, int]], now: float) -> int | None:
        """`name` leads, or hears that it does not; then its leases are renewed, and what is lost is queued again."""
        holder, last, expires_at = self.leader or (name, 0, now)
        if epoch is None and (holder == name or expires_at <= now):
            epoch = last + 1
        elif self.leader is None or (holder, last) != (name, epoch):
            return None
        assert epoch is not None
        self.leader = (name, epoch, now + LEASE)
        for task_id, task in self.tasks.items():
            if task.holder == name:
                task.lease_expires_at = now + LEASE
            expired = task.lease_expires_at is not None and task.lease_expires_at < now
            if expired or (task.holder == name and (task_id, task.attempt) not in known):
                task.stop("queued")
        self.settle()
        return epoch

    def grant(self, name: str, task_ids: list[str], now: float) -> dict[str, int]:
        """Attempt number of each task that is granted."""
        granted = {}
        for task_id in filter(self.grantable, task_ids):
            task = self.tasks[task_id]
            task.state, task.holder, task.lease_expires_at = "running", name, now + LEASE
            granted[task_id] = task.attempt = task.attempt + 1
        self.settle()
        return granted


@dataclass
class Dispatcher:
    """What a dispatcher remembers: its epoch, what it was granted, and the queue when it last looked."""

    epoch: int | None = None
    known: set[tuple[str, int]] = field(default_factory=set)
    queue: list[str] = field(default_factory=list)


faults = st.sampled_from([None, None, None, BEFORE, AFTER])
names = st.sampled_from(["d1", "d1", "d2"])
pick = st.integers(0, 20)  # of what there is, the n-th, counted around


class Machine(RuleBasedStateMachine):
    """Does everything twice, to the store and to the model, and compares them after each step."""

    grants = Bundle("grants")

    def __init__(self, lab: Lab, store: Store, intruder: Database) -> None:
        super().__init__()
        self.lab, self.store, self.intruder = lab, store, intruder
        self.store.clock, self.store.fault = START, None
        self.model = Model()
        self.dispatchers = {"d1": Dispatcher(), "d2": Dispatcher()}
        self.submitted = 0
        with self.store.write() as connection:
            for table in reversed(tables.metadata.sorted_tables):
                connection.execute(delete(table))

    def until_it_is_heard(self, fault: str | None, do: Callable[[], Any], then: Callable[[bool, Any], None]) -> None:
        """Do it, and if an error comes back do it again. `then(heard, result)` after each commit, heard of or not."""
        self.store.fault = fault
        try:
            result = do()
        except DatabaseAway:
            if fault == AFTER:
                then(False, None)
            result = do()
        then(True, result)

    @initialize(target=grants, scales=st.sampled_from([[1], [5], [1, 5]]), trained=st.booleans())
    def begin(self, scales: list[int], trained: bool) -> Any:
        """Something runs: a training, or what rests on it."""
        self.submit(0, scales, None)
        self.renew("d1", 0.0, None)
        training = self.claim("d1", 1, True, None)
        if not trained:
            return training
        self.complete(training.values[0], None)
        return self.claim("d1", 4, True, None)

    # What users do.

    @rule(seed=st.integers(0, 1), scales=st.sampled_from([[1], [5], [1, 5]]), fault=faults)
    def submit(self, seed: int, scales: list[int], fault: str | None) -> None:
        """A job, or a sweep of two."""
        self.submitted += 1
        base = {**self.lab.BASE, "seed": seed}
        jobs = [JobSpec.model_validate({**base, "scale": scale}) for scale in scales]
        once = Idempotency(f"request {self.submitted}", "0" * 64)

        def do() -> Any:
            if len(jobs) == 1:
                return self.lab.service.submit(jobs[0], user="ann", idempotency=once)
            sweep = Sweep.model_validate({"name": "sweep", "base": base, "grid": {"scale": scales}})
            return self.lab.service.submit_sweep(sweep, user="ann", idempotency=once)

        def then(heard: bool, _reply: Any) -> None:
            new = [row for row in self.lab.rows(tables.jobs) if row.id not in self.model.jobs]
            assert len(new) == (len(jobs) if heard != (fault == AFTER) else 0), "one request, done once"
            with self.store.read() as connection:
                new.sort(key=lambda row: row.sequence)
                for row, plan in zip(new, plans_of(connection, jobs[: len(new)]), strict=True):
                    ids = {digest: one for digest, (one, _) in joining.existing_tasks(connection, plan.tasks).items()}
                    for digest, task in plan.tasks.items():
                        parents = tuple(ids[parent] for parent in task.parents)
                        self.model.tasks.setdefault(ids[digest], Task(parents))
                    job = self.model.jobs[row.id] = Job(tuple(ids.values()), row.sweep_id)
                    self.model.open(job, "failed", "cancelled")

        self.until_it_is_heard(fault, do, then)

    def change(self, n: int, fault: str | None, verb: Any, legal: Any, then: Callable[[Job], None]) -> None:
        """Do `verb` to the n-th job; where that is not `legal`, it is refused."""
        job_id, job = list(self.model.jobs.items())[n % len(self.model.jobs)]

        def do() -> None:
            allowed = legal(job)
            try:
                verb(job_id, user="ann")
                assert allowed
            except Conflict:
                assert not allowed

        def after(_heard: bool, _result: None) -> None:
            if legal(job):
                then(job)

        self.until_it_is_heard(fault, do, after)

    @rule(n=pick, fault=faults)
    def cancel(self, n: int, fault: str | None) -> None:
        def then(job: Job) -> None:
            job.state = "cancelled"
            self.model.settle()

        self.change(n, fault, self.lab.service.cancel_job, lambda job: job.live, then)

    @rule(n=pick, fault=faults)
    def retry(self, n: int, fault: str | None) -> None:
        def then(job: Job) -> None:
            self.model.open(job, "failed", "cancelled", "held")

        stopped = ("failed", "cancelled", "held")
        self.change(n, fault, self.lab.service.retry_job, lambda job: job.state in stopped, then)

    @precondition(lambda self: self.sweeps)
    @rule(n=pick, paused=st.booleans())
    def pause_sweep(self, n: int, paused: bool) -> None:
        sweeps = self.sweeps
        sweep = sweeps[n % len(sweeps)]
        if not paused:
            self.lab.service.resume_sweep(sweep, user="ann")
            self.model.paused_sweeps.discard(sweep)
        elif any(job.live for job in self.model.jobs.values() if job.sweep == sweep):
            self.lab.service.pause_sweep(sweep, user="ann")
            self.model.paused_sweeps.add(sweep)

    @property
    def sweeps(self) -> list[str]:
        return list({job.sweep: None for job in self.model.jobs.values() if job.sweep})

    @rule(paused=st.sampled_from([True, False, False]))
    def pause_queue(self, paused: bool) -> None:
        (self.lab.service.pause_queue if paused else self.lab.service.resume_queue)(user="ann")
        self.model.paused = paused

    # What dispatchers do.

    @rule(name=names, passed=st.sampled_from([0.0, LEASE / 2, 0.9 * LEASE]), fault=faults)
    def renew(self, name: str, passed: float, fault: str | None) -> None:
        """A dispatcher's heartbeat: it leads if it may, renews its leases, and reaps those that have expired."""
        self.store.clock += passed
        mine = self.dispatchers[name]

        def do() -> int | None:
            with self.store.write() as connection:
                now = self.store.now(connection)
                epoch = claiming.lead(connection, now, name, mine.epoch, LEASE, {})
                if epoch is not None:
                    claiming.renew(connection, now, name, LEASE)
                    claiming.reap(connection, now, name)
                    unknown = claiming.held_by(connection, name).keys() - mine.known
                    claiming.take_back(connection, now, name, [task_id for task_id, _ in unknown])
                return epoch

        def then(heard: bool, epoch: int | None) -> None:
            expected = self.model.beat(name, mine.epoch, mine.known, self.store.clock)
            if heard:
                assert epoch == expected
                mine.epoch = epoch
                if epoch is None:
                    mine.known.clear()

        self.until_it_is_heard(fault, do, then)

    @rule(target=grants, name=names, most=st.integers(1, 4), look=st.booleans(), fault=faults)
    def claim(self, name: str, most: int, look: bool, fault: str | None) -> Any:
        """Take the first of the queue as it is, or as it was when this dispatcher last looked."""
        mine = self.dispatchers[name]
        if look or not mine.queue:
            self.look(mine)
        granted: list[Grant] = []

        def do() -> dict[str, Grant] | None:
            with self.store.write() as connection:
                if not claiming.still_leads(connection, name, mine.epoch):
                    return None
                self.try_to_write_too()
                if claiming.is_paused(connection):
                    return {}
                return claiming.grant(connection, self.store.now(connection), name, LEASE, mine.queue[:most])

        def then(heard: bool, result: dict[str, Grant] | None) -> None:
            leads = self.model.leader is not None and self.model.leader[:2] == (name, mine.epoch)
            allowed = leads and not self.model.paused
            expected = self.model.grant(name, mine.queue[:most] if allowed else [], self.store.clock)
            if heard:
                assert (result is not None) == leads
                granted.extend((result or {}).values())
                assert {grant.task_id: grant.attempt for grant in granted} == expected
                mine.known |= expected.items()

        self.until_it_is_heard(fault, do, then)
        return multiple(*granted)

    def look(self, mine: Dispatcher) -> None:
        now = self.store.clock
        with self.store.read() as connection:
            mine.queue = [one.task_id for one in claiming.waiting(connection, now, 1000)]
        waiting = {one for one, task in self.model.tasks.items() if self.model.grantable(one) if task.not_before <= now}
        assert sorted(mine.queue) == sorted(waiting)

    def try_to_write_too(self) -> None:
        """In the middle of a writing transaction another process wants to write: it has to wait for its turn."""
        turns = str(database_module.TAKE_TURNS).replace(f"'{BUSY_SECONDS}s'", "'10ms'")
        with pytest.MonkeyPatch.context() as impatient:
            impatient.setattr(database_module, "TAKE_TURNS", text(turns))
            try:
                with self.intruder.write() as connection:
                    claiming.lead(connection, 2 * START, "intruder", None, LEASE, {})
            except DatabaseAway:
                return
        raise AssertionError("two wrote at once")

    @rule(name=names)
    def crash(self, name: str) -> None:
        """The process is gone, its workers may answer yet. The next one of its name may not claim before it leads."""
        self.dispatchers[name] = Dispatcher()
        self.claim(name, 1, True, None)

    @rule(target=grants)
    def expire(self) -> Any:
        """All leases run out: another dispatcher than the leader notices, and is granted what was lost."""
        self.store.clock += LEASE + 1
        other = "d2" if self.model.leader and self.model.leader[0] == "d1" else "d1"
        self.renew(other, 0.0, None)
        return self.claim(other, 4, True, None)

    @rule(seconds=st.sampled_from([-LEASE, LEASE / 2, LEASE]))
    def step_clock(self, seconds: float) -> None:
        self.store.clock += seconds

    # What workers answer, in time, late, or twice.

    def answer(self, message: Message, fault: str | None, change: Callable[[Task], None]) -> None:
        """It changes the task as the model says while its attempt runs, and nothing at all otherwise."""

        def do() -> None:
            with self.store.write() as connection:
                recording.record(connection, self.store.now(connection), "d", [message, message], PATIENCE)

        def then(_heard: bool, _result: None) -> None:
            task = self.model.tasks[message.task_id]
            if (task.state, task.attempt) == ("running", message.attempt):
                change(task)
                self.model.settle()

        self.until_it_is_heard(fault, do, then)

    @rule(grant=grants, fault=faults)
    def complete(self, grant: Grant, fault: str | None) -> None:
        self.answer(self.success(grant), fault, Task.succeed)

    def success(self, grant: Grant) -> Message:
        """Its numbers say whose they are."""
        return Succeeded(grant.task_id, grant.attempt, self.lab.outcome(grant, attempt=grant.attempt))

    @rule(grant=grants, kind=st.sampled_from(["configuration", "error"]), fault=faults)
    def fail(self, grant: Grant, kind: Any, fault: str | None) -> None:
        def change(task: Task) -> None:
            task.errors += 1
            final = kind == "configuration" or task.errors == PATIENCE.max_errors
            task.stop("failed" if final else "queued")
            task.not_before = task.not_before if final else self.store.clock

        self.answer(Failed(grant.task_id, grant.attempt, kind, "it broke"), fault, change)

    @rule(grant=grants, reason=st.sampled_from([*COSTLY, *FREE]), fault=faults)
    def lose(self, grant: Grant, reason: Any, fault: str | None) -> None:
        def change(task: Task) -> None:
            task.stop("queued")
            if reason in COSTLY:
                task.suspect_losses, task.not_before = task.suspect_losses + 1, self.store.clock
                task.state = "held" if task.suspect_losses == PATIENCE.max_suspect_losses else "queued"

        self.answer(Lost(grant.task_id, grant.attempt, reason, "it is gone"), fault, change)

    @rule(grant=grants, fault=faults)
    def checkpoint(self, grant: Grant, fault: str | None) -> None:
        resume = ArtifactRef(f"{grant.attempt:064}", 10, "epoch_state")

        def change(task: Task) -> None:
            task.resume_digest, task.suspect_losses = resume.digest, 0

        self.answer(Progress(grant.task_id, grant.attempt, 0.5, {}, resume), fault, change)

    def teardown(self) -> None:
        if sys.exc_info()[0] is None:  # otherwise what has failed already is to be seen
            self.finish()

    def finish(self) -> None:
        """Everything resumes and whatever is granted succeeds: each accepted job comes to its end."""
        for sweep in sorted(self.model.paused_sweeps):
            self.lab.service.resume_sweep(sweep, user="ann")
        self.lab.service.resume_queue(user="ann")
        self.model.paused_sweeps, self.model.paused = set(), False
        self.dispatchers = {"d1": Dispatcher(), "d2": Dispatcher()}
        self.store.clock += 1000 * LEASE
        self.renew("d1", 0.0, None)
        for _ in ("trainings", "what rests on them"):
            grants = self.claim("d1", 1000, True, None).values
            self.lab.record(*map(self.success, grants), at=self.store.clock)
            for grant in grants:
                self.model.tasks[grant.task_id].succeed()
            self.model.settle()
        assert {job.state for job in self.model.jobs.values() if job.live} <= {"held"}
        self.agree()
        self.lab.check()

    @invariant()
    def agree(self) -> None:
        """The store says what the model says, of every task and job."""
        kinds = [kind.numbers for kind in TASK_KINDS.values()]
        recorded = json_number(func.coalesce(*(table.c.numbers for table in kinds)), "attempt")
        query = select(tables.tasks, recorded.label("recorded"))
        for table in kinds:
            query = query.outerjoin(table, table.c.task_id == tables.tasks.c.id)
        with self.store.read() as connection:
            rows = connection.execute(query).all()
            jobs = dict(connection.execute(select(tables.jobs.c.id, tables.jobs.c.state)).all())
        same = ("state", "attempt", "holder", "lease_expires_at", "errors", "suspect_losses", "resume_digest")
        stored = {row.id: {name: getattr(row, name) for name in same} | {"recorded": row.recorded} for row in rows}
        model = {
            one: {name: getattr(task, name) for name in (*same, "recorded")} for one, task in self.model.tasks.items()
        }
        assert stored == model
        assert jobs == {job_id: job.state for job_id, job in self.model.jobs.items()}
        stopping = {row.id for row in rows if row.state == "running" and row.cancel_requested}
        running = {one for one, task in self.model.tasks.items() if task.state == "running"}
        assert stopping == {one for one in running if not self.model.needed(one)}


EASY = settings(deadline=None, stateful_step_count=25, suppress_health_check=list(HealthCheck))


def run(url: str, artifacts: Artifacts, how: settings) -> None:
    with pytest.MonkeyPatch.context() as impatient:
        impatient.setattr(sqlite, "BUSY_SECONDS", 0)
        intruder = Database(url)
    with closing(Store(url)) as store, closing(intruder):
        lab = Lab(store, artifacts)
        run_state_machine_as_test(lambda: Machine(lab, store, intruder), settings=how)  # type: ignore[arg-type]


@pytest.mark.timeout(900)  # a failure is made as small as it can be
def test_the_store_does_what_the_model_says(database_url: str, artifacts: Artifacts) -> None:
    run(database_url, artifacts, settings(EASY, max_examples=15, derandomize=True, database=None))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_does_so_at_length(database_url: str, artifacts: Artifacts) -> None:
    run(database_url, artifacts, settings(EASY, max_examples=200, database=None))


# What somebody might take out of the store: `(function, what it says, what it says then)`.
MUTANTS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "no attempt guard": (recording._fence, ", current.in_(listed(keys))", ""),
    "completed without a look at the state": (
        recording._write_successes,
        "move_tasks({TaskState.RUNNING}, TaskState.SUCCEEDED)",
        "update(tasks).values(state=TaskState.SUCCEEDED)",
    ),
    "claimed without a lock on what is claimed": (
        claiming.grant,
        "move_tasks({TaskState.QUEUED}, TaskState.RUNNING).where(tasks.c.id.in_(listed(task_ids)), ~tasks.c.paused)",
        "update(tasks).values(state=TaskState.RUNNING).where(tasks.c.id.in_(listed(task_ids)))",
    ),
    "writers do not take turns": (sqlite.engine_for, '"BEGIN IMMEDIATE" if immediate else ', ""),
    "leases by age": (claiming.reap, "tasks.c.lease_expires_at <", "tasks.c.started_at + 20 <"),
    "leases by the local clock": (
        claiming.reap,
        "lease_expires_at < now",
        "lease_expires_at < __import__('time').time()",
    ),
    "leases are not renewed": (claiming.renew, "lease_expires_at=now + lease_seconds", "lease_expires_at=now"),
    "anyone may lead": (claiming.lead, "not led_by_another(row, now, holder)", "True"),
    "an old leader may claim": (
        claiming.still_leads,
        "(row.holder, row.epoch) == (holder, epoch)",
        "row.holder == holder",
    ),
    "the count of attempts begins anew": (joining.reopen, '"errors": 0,', '"errors": 0, "attempt": 0,'),
    "a request is done as often as it is sent": (Service._once, "stored is not None", "False"),
    "cancelled for all who need it": (
        settling.release_tasks,
        "unneeded = and_(tasks.c.id.in_(which), ~of_live_jobs(select(1)).exists())",
        "unneeded = tasks.c.id.in_(which)",
    ),
    "a lost node is held against the task": (retrying.after_loss, "end in COSTLY", "end"),
    "children do not wait": (model_jobs.first_state, "is not TaskState.SUCCEEDED", "is None"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_the_machine_finds(name: str, sqlite_url: str, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch, *MUTANTS[name])
    find(sqlite_url, artifacts)


@pytest.mark.slow
def test_the_machine_finds_that_writers_do_not_take_turns_on_postgresql(
    postgresql_url: str, artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "TAKE_TURNS", text("SELECT 1"))
    find(postgresql_url, artifacts)


def find(url: str, artifacts: Artifacts) -> None:
    how = settings(
        EASY, max_examples=1000, derandomize=True, report_multiple_bugs=False, phases=[Phase.generate], database=None
    )
    with pytest.raises(Exception) as caught:
        run(url, artifacts, how)
    assert not isinstance(caught.value, HypothesisException), "it was not the store that failed"


def mutate(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], old: str, new: str) -> None:
    """Let a function do what it would if it said `new` where it says `old`, for as long as the test takes."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{function.__qualname__} does not say `{old}` once any more: plant this fault anew"
    made: dict[str, Any] = {}
    exec(source.replace(old, new), {**function.__globals__}, made)
    monkeypatch.setattr(function, "__code__", made[function.__name__].__code__)
