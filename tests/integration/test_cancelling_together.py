"""150 jobs of three users share one training, and three clients cancel them at once while it runs."""

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from history_checks import violations
from store_lab import Lab
from waiting import until

from service.lab.artifacts import Artifacts
from service.store import Database, tables

pytestmark = pytest.mark.slow

USERS = ("ann", "bob", "cid")
BASE = {"architecture": "mlp", "dataset": "digits", "samples": 20, "seed": 1}


@dataclass
class Crowd:
    """The server, the sweep and the jobs of each user, and the event without which no training ends."""

    server: Any
    lab: Any
    hold: threading.Event
    sweeps: dict[str, str]
    jobs: dict[str, list[str]]

    @property
    def all(self) -> list[str]:
        return [job_id for of_user in self.jobs.values() for job_id in of_user]

    def training(self) -> Any:
        [row] = self.lab.rows(tables.tasks, kind="train")
        return row

    def cancel(self, job_ids: list[str], sweeps: list[str], meanwhile: Callable[[], object] = lambda: None) -> None:
        """Three clients, each in its own order: every job is cancelled three times, and these sweeps too."""
        at_once = threading.Barrier(4)

        def one(user: str) -> Counter[int]:
            paths = [f"/v1/jobs/{job_id}:cancel" for job_id in job_ids]
            paths += [f"/v1/sweeps/{sweep_id}:cancel" for sweep_id in sweeps]
            random.Random(user).shuffle(paths)
            with httpx.Client(base_url=self.server.url, headers={"X-Uncanny-User": user}, timeout=60) as http:
                at_once.wait()
                return Counter(http.post(path).status_code for path in paths)

        with ThreadPoolExecutor(len(USERS)) as pool:
            asked = [pool.submit(one, user) for user in USERS]
            at_once.wait()
            meanwhile()
            statuses = sum((one.result() for one in asked), Counter[int]())
        print(f"\n{statuses.total()} cancellations, by status {dict(statuses)}")
        assert statuses.keys() <= {200, 409}

    def states(self) -> Counter[str]:
        return Counter(row.state for row in self.lab.rows(tables.jobs))

    def over(self) -> None:
        """Wait until nothing runs, and look at the history."""
        until(lambda: not self.lab.rows(tables.tasks, state="running"))
        until(lambda: not self.states().keys() - {"succeeded", "cancelled"})
        assert not list(violations(self.lab.database, self.all))
        self.lab.check()
        assert not self.lab.task_states().keys() & {"queued", "blocked", "running"}


@pytest.fixture
def crowd(start_server: Any, database_url: str, tmp_path: Path) -> Iterator[Crowd]:
    hold = threading.Event()
    with start_server(tmp_path, database_url=database_url, hold=hold) as server:
        sweeps, jobs = {}, {}
        for number, user in enumerate(USERS):
            grid = {"scale": [1 + number * 25 + cell for cell in range(25)], "attack": ["pgd_l2", "pgd_linf"]}
            body = {"name": f"of {user}", "base": BASE, "grid": grid}
            made = server.http.post("/v1/sweeps", json=body, headers={"X-Uncanny-User": user})
            assert made.status_code == 201, made.text
            sweeps[user] = made.json()["id"]
            jobs[user] = [job["id"] for job in server.client.jobs(sweep=sweeps[user])]
        database = Database(database_url)
        crowd = Crowd(server, Lab(database, Artifacts(str(tmp_path / "artifacts"))), hold, sweeps, jobs)
        assert len(crowd.all) == 150
        until(lambda: crowd.training().state == "running")
        yield crowd
        hold.set()
    database.close()


@pytest.mark.parametrize("last", USERS)
def test_a_training_goes_on_while_one_job_wants_it(crowd: Crowd, last: str) -> None:
    left = crowd.jobs[last][17]
    crowd.cancel([job_id for job_id in crowd.all if job_id != left], [crowd.sweeps[u] for u in USERS if u != last])
    training = crowd.training()
    assert (training.state, training.attempt, training.cancel_requested) == ("running", 1, False)
    assert (training.sponsor, training.needed_by) == (last, 1)
    assert [row.id for row in crowd.lab.rows(tables.jobs, state="running")] == [left]
    crowd.hold.set()
    crowd.over()
    assert crowd.states() == {"cancelled": 149, "succeeded": 1}
    assert [row.end for row in crowd.lab.rows(tables.attempts, task_id=training.id)] == ["succeeded"]


def test_a_training_is_cancelled_when_no_job_wants_it_and_runs_again_when_one_does(crowd: Crowd) -> None:
    crowd.cancel(crowd.all, list(crowd.sweeps.values()))
    crowd.over()
    training = crowd.training()
    assert (training.state, [row.end for row in crowd.lab.rows(tables.attempts)]) == ("cancelled", ["cancelled"])
    assert crowd.states() == {"cancelled": 150}
    crowd.hold.set()
    for user in USERS:
        retried = crowd.server.http.post(f"/v1/jobs/{crowd.jobs[user][3]}:retry", headers={"X-Uncanny-User": user})
        assert retried.status_code == 200, retried.text
    crowd.over()
    assert crowd.states() == {"cancelled": 147, "succeeded": 3}


def test_a_training_may_end_meanwhile(crowd: Crowd) -> None:
    crowd.cancel(crowd.all, list(crowd.sweeps.values()), meanwhile=crowd.hold.set)
    crowd.over()
    assert crowd.states().total() == 150
