"""Row 13: how much of a sweep's time its device computes: short tasks on one checkpoint, from HTTP through Ray to SQL.

A place to run is a GPU, or without one a CPU thread. What counts as busy is the time within the tasks' own code
(`wall_seconds` of their provenance), and on a GPU, in a process alone, that within kernels.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.serving import serving
from sqlalchemy import select
from waiting import until

from service.lab.artifacts import Artifacts
from service.model.executor import Bundle, Failed, Grant, Lost, Message, Succeeded
from service.model.jobs import JobState
from service.queue.dispatcher import Dispatcher
from service.settings import Settings
from service.specs import DatasetRef, JobSpec
from service.store import Database
from service.store.tables import attempts, jobs, tasks
from workers.pool import RayExecutor
from workers.worker import WorkerSettings

SCALES = [0.25, 0.5, 1, 2.5, 5, 10, 25, 50]
BASE = {"architecture": "simple_cnn", "dataset": "digits", "samples": 128, "recipe": {"epochs": 1}}
GRID = {"scale": SCALES, "attack": ["pgd_linf", "pgd_l2", "pgd_l2_strong"]}
PATIENCE_SECONDS = 900


def counting(loads: Path) -> Callable[[Bundle, WorkerSettings], Iterator[list[Message]]]:
    """The worker's body, which writes down what it had to load because it was not in memory."""

    def body(bundle: Bundle, settings: WorkerSettings) -> Iterator[list[Message]]:
        import os
        from unittest import mock

        from workers import context
        from workers.worker import run_bundle

        kept = context.Cache.get

        def get(cache: Any, key: Any, load: Callable[[], Any]) -> Any:
            def loading() -> Any:
                with loads.open("a") as file:
                    file.write(f"{os.getpid()} {key[1:]}\n")
                return load()

            return kept(cache, key, loading)

        with mock.patch.object(context.Cache, "get", get):
            yield from run_bundle(bundle, settings)

    return body


def test_share_of_a_sweep(table: Any, new_store: Callable[[str], str], tmp_path: Path, ray_head: int) -> None:
    url, loads = new_store("sqlite"), tmp_path / "loads"
    settings = Settings(home=tmp_path, database_url=url, ray_port=ray_head, cpus_per_task=2, decision_log=10)
    database = Database(url)
    executor = RayExecutor(settings, body=counting(loads))
    with dispatching(Dispatcher(database, Artifacts(settings.artifacts), executor, settings, "benchmark")):
        with serving(url, tmp_path) as api:

            def run(seed: int, grid: dict[str, Any]) -> None:
                sweep = {"name": "short tasks", "base": {**BASE, "seed": seed}, "grid": grid}
                api.http.post("/v1/sweeps", json=sweep).raise_for_status()
                until(lambda: not unfinished(database), PATIENCE_SECONDS)

            run(0, {"scale": [1], "attack": ["pgd_l2"]})  # the worker is warm
            loads.unlink()
            run(1, GRID)
    spans, busy = measured(database)
    share = busy / (spans[-1][1] - spans[0][0])
    gaps = [later[0] - earlier[1] for earlier, later in pairwise(spans)]
    seen = loads.read_text().splitlines()
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "one CPU thread"
    table.tell(
        "13", f"{len(spans)} short tasks on one checkpoint, {where}",
        {"all of it": [spans[-1][1] - spans[0][0]], "within tasks": [busy], "between two tasks": gaps}, share=0.5,
        notes={"all of it": f"busy {100 * share:.1f} % (goal 90 %)",
               "within tasks": f"{len(seen)} loads of {len(set(seen))} things"},
    )  # fmt: skip
    assert len(seen) == len(set(seen)), "a worker loaded something twice"
    database.close()


def test_share_of_kernels(table: Any, gpu: torch.device, tmp_path: Path) -> None:
    """The same attacks on a network and 10,000 images of CIFAR-10's size, in one process, by the profiler."""
    from torch.profiler import ProfilerActivity, profile

    from workers.context import Context
    from workers.run import execute

    bundle = attack_bundle(tmp_path)
    context = Context(Artifacts(str(tmp_path / "artifacts")), tmp_path, gpu)
    assert all(isinstance(one, Succeeded) for one in answers(execute(bundle, context)))
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        answers(execute(bundle, context))
        torch.cuda.synchronize()
    took = time.perf_counter() - started
    kernels = sum(event.self_device_time_total for event in found.key_averages()) / 1e6
    table.tell(
        "13", f"PGD on ResNet-18, {torch.cuda.get_device_name()}", {"all of it": [took], "within kernels": [kernels]},
        share=0.5, notes={"within kernels": f"busy {100 * kernels / took:.1f} % (goal 90 %)"},
    )  # fmt: skip


def attack_bundle(home: Path) -> Bundle:
    """Two attacks at two scales on an untrained ResNet-18."""
    from service.specs.plan import plan_job
    from workers.science.architectures import build
    from workers.science.weights import save_weights

    random = np.random.RandomState(0)
    artifacts, digests = Artifacts(str(home / "artifacts")), []
    for count in (1000, 10_000):
        images = {"x": random.randint(0, 256, (count, 32, 32, 3), dtype=np.uint8), "y": random.randint(0, 10, count)}
        digests.append(artifacts.write("dataset", partial(savez, images=images)).digest)
    data = DatasetRef(name="npz:noise", train_sha256=digests[0], test_sha256=digests[1])
    model = build("resnet18", (3, 32, 32), 10, seed=0).eval()
    checkpoint = artifacts.write("checkpoint", lambda path: save_weights(path, model))
    base = {"architecture": "resnet18", "dataset": "npz:noise", "samples": 10_000}
    plans = [
        plan_job(JobSpec.model_validate({**base, "scale": scale, "attack": attack}), data)
        for scale in (1, 50)
        for attack in ("pgd_linf", "pgd_l2")
    ]
    grants = tuple(Grant(f"t{n}", 1, plan.attack.digest, plan.attack.stored_spec) for n, plan in enumerate(plans))
    return Bundle("b", grants, plans[0].train.stored_spec, checkpoint)


def savez(path: Path, images: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **images)


def answers(messages: Iterator[Message]) -> list[Message]:
    return [message for message in messages if isinstance(message, (Succeeded, Failed, Lost))]


@contextmanager
def dispatching(dispatcher: Dispatcher) -> Iterator[None]:
    stop = threading.Event()
    until(lambda: dispatcher.executor.capacity().ready, PATIENCE_SECONDS)
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def unfinished(database: Database) -> bool:
    with database.read() as connection:
        states = {state for [state] in connection.execute(select(jobs.c.state).distinct())}
    assert JobState.FAILED not in states
    return states != {JobState.SUCCEEDED}


def measured(database: Database) -> tuple[list[tuple[float, float]], float]:
    """When each attack of the second network ran, one after the other, and the seconds in their own code."""
    query = select(tasks.c.spec, attempts.c.ended_at, attempts.c.provenance).join(
        attempts, attempts.c.task_id == tasks.c.id
    )
    with database.read() as connection:
        rows = [row for row in connection.execute(query) if row.spec["kind"] != "train"]
    rows = [row for row in rows if row.provenance["seed"] == 1]
    ended = sorted((row.ended_at, row.provenance["wall_seconds"]) for row in rows)
    return [(at - seconds, at) for at, seconds in ended], sum(seconds for _, seconds in ended)
