"""The whole service on real Ray, in the middle of the demo's sweep: whoever is killed, nothing accepted is lost."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import psutil
import pytest
import waiting
from processes import command_of
from sqlalchemy import select

from api.cli.demo import SWEEP
from api.client import ApiError, Client
from service.lab.artifacts import Artifacts
from service.store import Database
from service.store.tables import attempts, events, tasks, trainings
from workers.science.architectures import build
from workers.science.datasets import read_npz, sample_indices
from workers.science.evaluation import evaluate_clean
from workers.science.weights import load_weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NO_INTERNET = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
NO_INTERNET |= {name.upper(): value for name, value in NO_INTERNET.items()}
FAR_TOO_FAST = {"name": "standard", "epochs": 3, "lr": 1e5}


@dataclass(frozen=True)
class Lab:
    """A `uncanny serve` of its own, with a local Ray."""

    process: "subprocess.Popen[str]"
    home: Path
    client: Client

    def half(self, module: str) -> psutil.Process:
        return next(c for c in psutil.Process(self.process.pid).children() if module in command_of(c))

    def workers(self) -> list[psutil.Process]:
        """The processes that run a task at this moment, as the store has it."""
        with Database(f"sqlite:///{self.home}/uncanny.db").read() as connection:
            names = connection.scalars(select(tasks.c.worker).where(tasks.c.state == "running")).all()
        found = [re.search(r" pid (\d+)", name or "") for name in names]
        return [psutil.Process(int(pid[1])) for pid in found if pid]

    def demo(self, seed: int) -> Any:
        """The demo's sweep, with networks of its own."""
        return self.client.sweep({**SWEEP, "name": f"demo {seed}", "base": {**SWEEP["base"], "seed": seed}})

    def done(self) -> dict[str, int]:
        """Attempt number by the id of each task that has succeeded."""
        with Database(f"sqlite:///{self.home}/uncanny.db").read() as connection:
            found = select(tasks.c.id, tasks.c.attempt).where(tasks.c.state == "succeeded")
            return dict(iter(connection.execute(found)))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    home = tmp_path_factory.mktemp("lab")
    command = [sys.executable, "-m", "api.cli", "serve", "--json", "--port", "0", "--home", str(home)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "UNCANNY_"))}
    environment = {**inherited, **NO_INTERNET, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert process.stdout is not None
    with Client(json.loads(process.stdout.readline())["url"], patience_seconds=60) as client:
        yield Lab(process, home, client)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)


T = TypeVar("T")


def until(what: Callable[[], T | None], seconds: float = 120) -> T:
    """Processes come and go meanwhile, and the one that answers too."""
    return waiting.until(what, seconds, ignoring=(psutil.NoSuchProcess, StopIteration, httpx.TransportError))


def in_the_middle(lab: Lab, seed: int) -> tuple[Any, dict[str, int]]:
    """A demo sweep of which some tasks are done and others run; and those that are done."""
    before = set(lab.done())
    sweep = lab.demo(seed)
    until(lambda: len(set(lab.done()) - before) >= 5 and lab.workers())
    return sweep, lab.done()


def assert_nothing_lost(lab: Lab, sweep: Any, done: dict[str, int]) -> None:
    status = sweep.wait()
    assert status["state"] == "succeeded", status
    assert len(list(sweep.results())) == 28
    after = lab.done()
    assert {task_id: after[task_id] for task_id in done} == done  # what had finished was not computed again
    with Database(f"sqlite:///{lab.home}/uncanny.db").read() as connection:
        ids = connection.scalars(select(events.c.id).order_by(events.c.id)).all()
        succeeded = connection.scalars(select(attempts.c.task_id).where(attempts.c.end == "succeeded")).all()
    assert list(ids) == list(range(1, len(ids) + 1))
    assert len(succeeded) == len(set(succeeded))  # at most one recorded result of a task


def test_the_dispatcher_is_killed(lab: Lab) -> None:
    sweep, done = in_the_middle(lab, 1)
    lab.half("workers.dispatch").kill()
    assert_nothing_lost(lab, sweep, done)


def test_a_worker_is_killed(lab: Lab) -> None:
    sweep, done = in_the_middle(lab, 2)
    until(lab.workers)[0].kill()
    assert_nothing_lost(lab, sweep, done)


def test_the_api_is_killed(lab: Lab) -> None:
    sweep, done = in_the_middle(lab, 3)
    lab.half("api.serve.server").kill()
    assert_nothing_lost(lab, sweep, done)


def test_bad_jobs_fail_with_a_sentence_and_others_go_on(lab: Lab) -> None:
    common = {"architecture": "mlp", "attack": "pgd_linf", "samples": 50, "recipe": {"epochs": 2}}
    absent = lab.client.submit({**common, "dataset": "cifar10"})
    diverging = lab.client.submit({**common, "dataset": "digits", "recipe": FAR_TOO_FAST})
    good = lab.client.submit({**common, "dataset": "digits"})
    assert good.wait()["state"] == "succeeded"
    diverged = diverging.wait()
    assert diverged["state"] == "failed"
    assert re.search(r"epoch \d of 3.* last finite loss was \d", diverged["reason"])
    with pytest.raises(ApiError):
        diverging.result()
    waits = until(lambda: re.search(r"data folder .*", lab.client.explain(absent.id)["sentence"]))[0]
    assert "is set aside for cifar10" in waits
    assert "put" in waits
    assert str(lab.home / "data") in waits, "it goes on by itself when somebody has put the files there"
    assert lab.client.cancel(absent.id)["state"] == "cancelled"


def accuracy_of_the_checkpoint(lab: Lab, images: Path) -> float:
    """What the stored weights get right of the 64 images, computed without the service."""
    with Database(f"sqlite:///{lab.home}/uncanny.db").read() as connection:
        digests = select(trainings.c.checkpoint_digest).join(tasks, tasks.c.id == trainings.c.task_id)
        digest = connection.scalars(digests.order_by(tasks.c.finished_at.desc())).first()
    model = build("resnet18", (3, 32, 32), 10, 0)
    with Artifacts(str(lab.home / "artifacts")).local(str(digest)) as path:
        load_weights(model, path)
    data = read_npz(images)
    index = sample_indices(len(data.test_y), 64)
    return evaluate_clean(model.eval(), data.test_x[index], data.test_y[index]).accuracy


def test_a_labs_own_real_images(lab: Lab, shared_data: Path, tmp_path: Path) -> None:
    """An epoch of ResNet-18 on 2,000 real CIFAR-10 images, measured and attacked on 64, all over HTTP."""
    for split, source, n in (("train", "cifar10_train6000", 6000), ("test", "cifar10_test2000", 500)):
        with np.load(shared_data / f"{source}.npz", allow_pickle=False) as file:
            np.savez(tmp_path / f"{split}.npz", x=file["x"][:n], y=file["y"][:n].astype(np.int64))
    assert lab.client.register_dataset("cifar_sample", tmp_path)["name"] == "npz:cifar_sample"
    job = lab.client.submit(
        {
            "architecture": "resnet18", "dataset": "npz:cifar_sample", "scale": 5, "attack": "pgd_linf", "samples": 64,
            "recipe": {
                "epochs": 1, "train_samples": 2000, "lr": 0.02, "batch_size": 32, "crop_padding": 4, "flip": True,
            },
        }
    )  # fmt: skip
    status = job.wait()
    assert status["state"] == "succeeded", status
    result = job.result()
    assert result["clean_accuracy"] == accuracy_of_the_checkpoint(lab, tmp_path)
    assert 0 < result["clean_accuracy"] <= 1
    assert result["robust_accuracy"] <= result["clean_accuracy"]
    assert result["log_relative_sharpness_median"] is not None
    assert len(lab.client.trajectory(job.id)["attack"]["trajectory"]["step"]) == 11
