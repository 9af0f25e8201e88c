"""Three trained networks are three observations, however often each of them was attacked."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select

from service.queue.dispatcher import Dispatcher
from service.queue.inprocess import InProcessExecutor
from service.queue.verbs import Service
from service.results import aggregates
from service.settings import Settings
from service.specs import Sweep
from service.store.tables import jobs
from workers.context import Context
from workers.run import execute

pytestmark = pytest.mark.slow

BASE = {
    "architecture": "mlp", "dataset": "digits", "samples": 200, "recipe": {"epochs": 5},
    "attack": {"type": "pgd", "norm": "linf", "eps": 0.1, "step_size": 0.02, "steps": 8},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """How many threads share a sum decides in which network a training ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(service: Service, home: Path, **more: Any) -> None:
    sweep = Sweep.model_validate({"name": "three", "base": {**BASE, **more}, "grid": {"seed": [0, 1, 2]}})
    service.submit_sweep(sweep, user="ann")
    context = Context(service.artifacts, home)
    executor = InProcessExecutor(partial(execute, context=context), cpus=2)
    dispatcher = Dispatcher(service.database, service.artifacts, executor, Settings(home=home), "one")
    deadline = time.monotonic() + 100
    live = select(jobs.c.id).where(jobs.c.finished_at.is_(None))
    while time.monotonic() < deadline:
        dispatcher.tick()
        with service.database.read() as connection:
            if not connection.execute(live).all():
                break
    executor.close()


def asked(service: Service, *by: str) -> list[dict[str, Any]]:
    metrics = aggregates.metrics_of("robust_accuracy:mean,std,ci95,count")
    items: list[dict[str, Any]] = aggregates.aggregate(service.database, [], by, metrics)["items"]
    return items


def test_attack_seeds_replicates_and_arrays_add_no_network(service: Service, tmp_path: Path) -> None:
    run(service, tmp_path)
    [first] = asked(service)
    assert (first["results"], first["networks"], first["robust_accuracy"]["count"]) == (3, 3, 3)
    assert 0 <= first["robust_accuracy"]["ci95_low"] < first["robust_accuracy"]["ci95_high"] <= 1
    for more in ({"attack_seed": 1}, {"attack_seed": 2}, {"arrays": True}, {"replicate": 1}):
        run(service, tmp_path, **more)
    [again] = asked(service)
    assert (again["results"], again["networks"]) == (15, 3)
    # Nothing in this attack is random; sums and values differ by their rounding.
    numbers, numbers_again = (dict(item["robust_accuracy"]) for item in (first, again))
    assert numbers.pop("ci95_of") == numbers_again.pop("ci95_of") == "networks"
    assert numbers_again == pytest.approx(numbers, rel=1e-9)
    for item in asked(service, "seed"):
        assert (item["results"], item["networks"], item["robust_accuracy"]["count"]) == (5, 1, 1)
        assert item["robust_accuracy"]["std"] is None
