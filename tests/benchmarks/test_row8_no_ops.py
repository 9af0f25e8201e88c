"""Row 8: tasks that do nothing, from HTTP through SQL and Ray to SQL, beside Ray alone; when an idle queue wakes."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from benchmarks.serving import serving
from sqlalchemy import func, select
from waiting import until

from service.lab.artifacts import Artifacts
from service.model.executor import ArtifactRef, Bits, Bundle, Grant, Message, Outcome
from service.model.jobs import JobState
from service.queue.dispatcher import Dispatcher
from service.settings import Settings
from service.store import Database
from service.store.tables import attempts, jobs, tasks
from workers.pool import RayExecutor
from workers.worker import WorkerSettings

BASE = {"architecture": "mlp", "dataset": "digits", "samples": 8, "recipe": {"epochs": 1}}
GRID = {"scale": [0.25, 0.5, 1, 2.5, 5, 10, 25, 50], "attack": ["pgd_l2", "pgd_linf"]}
SEEDS, PICKED_UP, PATIENCE_SECONDS = 40, 40, 300


def nothing() -> Callable[[Bundle, WorkerSettings], Iterator[list[Message]]]:
    """The worker's body, where to run a task computes nothing. A function inside, so that it travels there whole."""
    bits = Bits(8, b"\xff")
    checks = ("train_mode_modules", "random_forward_changed", "batch_dependent_changed", "eps_zero_changed")

    def outcome(grant: Grant, *_: object) -> Outcome:
        match grant.spec["kind"]:
            case "train":
                return Outcome(artifacts=(ArtifactRef(grant.digest, 1, "checkpoint"),))
            case "measure":
                return Outcome({"log_relative_sharpness_median": -2.5})
            case "attack":
                every = dict.fromkeys(("robust", "clean_correct", "zero_gradient"), bits)
                return Outcome({"robust_accuracy": 1.0, "outside_ball": 0}, bits=every)
        names = ("fgsm", "noise", "margin", "square", "pgd", "more_steps")
        return Outcome(dict.fromkeys(checks, 0), bits={f"robust_{name}": bits for name in names})

    def body(bundle: Bundle, settings: WorkerSettings) -> Iterator[list[Message]]:
        import torch

        from workers import run
        from workers.context import Cache, Context

        run.run = outcome  # type: ignore[assignment]
        artifacts, cpu, cache = Artifacts(settings.artifact_root), torch.device("cpu"), Cache(settings.cache_bytes)
        yield from run.batches(bundle, Context(artifacts, settings.data_dir, cpu, 1.0, 60.0, cache, "here"))

    return body


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_no_ops(table: Any, new_store: Callable[[str], str], tmp_path: Path, ray_head: int, kind: str) -> None:
    url = new_store(kind)
    settings = Settings(home=tmp_path, database_url=url, ray_port=ray_head)
    database, stop = Database(url), threading.Event()
    executor = RayExecutor(settings, body=nothing())
    dispatcher = Dispatcher(database, Artifacts(settings.artifacts), executor, settings, "benchmark")
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    try:
        until(lambda: executor.capacity().ready, PATIENCE_SECONDS)
        thread.start()
        with serving(url, tmp_path) as api:

            def unfinished() -> int:
                with database.read() as connection:
                    count = select(func.count()).select_from(jobs)
                    assert not connection.execute(count.where(jobs.c.state == JobState.FAILED)).scalar_one()
                    return int(connection.execute(count.where(jobs.c.finished_at.is_(None))).scalar_one())

            def post(first: int, count: int, grid: dict[str, Any]) -> None:
                sweep = {"name": "nothing", "base": BASE, "grid": {**grid, "seed": list(range(first, first + count))}}
                api.http.post("/v1/sweeps", json=sweep).raise_for_status()

            post(10_000, 1, GRID)
            until(lambda: not unfinished(), PATIENCE_SECONDS)  # the workers are warm
            with database.read() as connection:
                before = connection.execute(select(func.count()).select_from(tasks)).scalar_one()
            started = time.perf_counter()
            post(0, SEEDS, GRID)
            until(lambda: not unfinished(), PATIENCE_SECONDS)
            took = time.perf_counter() - started
            with database.read() as connection:
                done = connection.execute(select(func.count()).select_from(tasks)).scalar_one() - before
            alone = ray_alone(done)
            table.tell(
                "8", f"{done:,} tasks that do nothing, {kind}",
                {"Ray alone, plain tasks": [alone], "HTTP to SQL to Ray to SQL": [took]},
                goals={"HTTP to SQL to Ray to SQL": done / 1500}, share=0.5,
                notes={"HTTP to SQL to Ray to SQL": f"{done / took:.0f} a second (goal 1,500)",
                       "Ray alone, plain tasks": f"{done / alone:.0f} a second"},
            )  # fmt: skip
            for number in range(PICKED_UP):
                post(20_000 + number, 1, {"scale": [1], "attack": ["pgd_linf"]})
                until(lambda: not unfinished(), PATIENCE_SECONDS)
        waited = pick_ups(database)[-PICKED_UP:]
        name = "from the commit of the job to the grant"
        for share, goal in ((0.5, 0.02), (0.99, 0.2)):
            table.tell("8", f"pick-up when idle, {kind}", {name: waited}, goals={name: goal}, share=share)
    finally:
        stop.set()
        thread.join()
        executor.close()
        database.close()


def pick_ups(database: Database) -> list[float]:
    """How long each training waited for its first grant, by the database's clock, in the order of submission."""
    first = (attempts.c.task_id == tasks.c.id) & (attempts.c.number == 1)
    query = select(attempts.c.started_at - tasks.c.created_at).join(tasks, first).where(tasks.c.kind == "train")
    with database.read() as connection:
        return list(connection.scalars(query.order_by(tasks.c.sequence)))


def ray_alone(count: int) -> float:
    """Seconds of as many plain tasks of Ray's."""
    import ray  # not before `workers.pool` has prepared its environment

    nothing = ray.remote(num_cpus=1)(lambda: None)
    ray.get([nothing.remote() for _ in range(20)])
    started = time.perf_counter()
    ray.get([nothing.remote() for _ in range(count)])
    return time.perf_counter() - started
