"""Weights made elsewhere, from the upload over HTTP to a verdict, with real computation."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save_file
from torch import nn
from torch.nn import functional

from api.client import ApiError, Client
from service.lab import checkpoints
from service.lab.artifacts import Artifacts
from service.queue.dispatcher import Dispatcher
from service.queue.inprocess import InProcessExecutor
from service.store import Database
from workers.context import Context
from workers.run import execute
from workers.science.architectures import build
from workers.science.datasets import digits, sample_indices, to_unit

pytestmark = pytest.mark.slow

MEAN, STD = 0.3, 0.35
N = 60
JOB = {"architecture": "mlp", "dataset": "digits", "samples": N, "attack": "pgd_linf", "scale": 5}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A network trained on normalised images by other code, its state dict saved as if by DataParallel."""
    data = digits.read()
    x = (to_unit(data.train_x) - MEAN) / STD
    model = build("mlp", (1, 8, 8), 10, seed=9)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(x), data.train_y))
        optimizer.step()
    path = tmp_path_factory.mktemp("elsewhere") / "mlp.safetensors"
    save_file({f"module.{name}": value for name, value in model.state_dict().items()}, path)
    return model.eval(), path


@pytest.fixture(scope="module")
def server(start_server: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A server whose tasks really run, in threads."""
    with start_server(tmp_path_factory.mktemp("home"), dispatching=False) as running:
        artifacts = Artifacts(running.settings.artifacts)
        executor = InProcessExecutor(partial(execute, context=Context(artifacts, running.settings.data)), cpus=2)
        database, stop = Database(running.settings.database), threading.Event()
        dispatcher = Dispatcher(database, artifacts, executor, running.settings, "real")
        thread = threading.Thread(target=dispatcher.run, args=(stop,))
        thread.start()
        try:
            yield running
        finally:
            stop.set()
            thread.join()
            database.close()


def register(server: Any, name: str, path: Path, **more: Any) -> dict[str, Any]:
    options = {"architecture": "mlp", "dataset": "digits", "keys": {"module.": ""}, "mean": [MEAN], "std": [STD]}
    made: dict[str, Any] = server.client.register_checkpoint(name, path, **(options | more))
    return made


def test_a_network_from_elsewhere_is_benchmarked_like_one_of_ours(server: Any, foreign: tuple[nn.Module, Path]) -> None:
    model, path = foreign
    made = register(server, "theirs", path)
    assert made["parameters"] == sum(p.numel() for p in model.parameters())
    assert register(server, "theirs", path) == made, "again with the same: no change"
    job = server.client.submit({**JOB, "recipe": {"name": "imported", "checkpoint": "theirs"}})
    assert job.wait()["state"] == "succeeded"
    result = job.result()

    data, index = digits.read(), torch.from_numpy(sample_indices(500, N))
    x, y = (to_unit(data.test_x) - MEAN) / STD, data.test_y
    with torch.no_grad():
        right = model(x).argmax(1) == y
    assert result["clean_accuracy"] == pytest.approx(float(right[index].double().mean()))
    train = result["parts"]["train"]
    assert train["numbers"]["test_accuracy"] == pytest.approx(float(right.double().mean()))
    assert result["parts"]["attack"]["provenance"]["weights_sha256"] == made["weights_sha256"]
    assert result["verdict"] in {"trusted", "suspect", "invalid"}
    assert result["recipe"] == {"name": "imported", "checkpoint": "theirs"} | dict.fromkeys(
        ("weights_sha256", "expected_clean_accuracy", "tolerance")
    )

    register(server, "the_same_under_another_name", path)
    recipe = {"name": "imported", "checkpoint": "the_same_under_another_name"}
    again = server.client.submit({**JOB, "seed": 7, "recipe": recipe})
    assert again.accepted["tasks"][0] == job.accepted["tasks"][0]
    assert {row["name"] for row in server.client.checkpoints()} >= {"theirs", "the_same_under_another_name"}


def test_a_job_fails_whose_weights_are_not_what_was_expected(server: Any, foreign: tuple[nn.Module, Path]) -> None:
    """The normalisation is in grey levels: one of ten images is right, where more than nine of ten should be."""
    grey = {"keys": {}, "mean": [MEAN * 255], "std": [STD * 255]}
    with pytest.raises(ApiError, match=r"mean 76\.5 looks like grey levels of 0 to 255, and images here are in"):
        register(server, "grey", foreign[1], **grey)
    made = register(server, "grey", foreign[1], **grey, expected_clean_accuracy=0.95, tolerance=0.02)
    assert made["stripped_prefix"] == "module."
    job = server.client.submit({**JOB, "checkpoint": "grey"}).wait()
    assert job["state"] == "failed"
    assert "and 95.0% (within 2.0%) was expected of these weights" in job["reason"]
    right = register(server, "right", foreign[1], expected_clean_accuracy=0.95, tolerance=0.02)
    assert server.client.submit({**JOB, "checkpoint": right["weights_sha256"]}).wait()["state"] == "succeeded"


def test_a_trained_network_is_named_by_the_digest_of_its_weights(server: Any, tmp_path: Path) -> None:
    """From the list to a job that joins its training, with the same numbers and nothing computed again."""
    job = server.client.submit({**JOB, "recipe": {"epochs": 2}, "seed": 8})
    assert job.wait()["state"] == "succeeded"
    before = job.result()
    command = [sys.executable, "-m", "api.cli", "checkpoint", "list", "--trained", "--url", server.url]
    listed = subprocess.run([*command, "--recipe", "standard", "--json"], capture_output=True, check=True)
    [network] = json.loads(listed.stdout)
    assert network["weights_sha256"] == before["parts"]["attack"]["provenance"]["weights_sha256"]
    assert (network["seed"], network["test_accuracy"]) == (8, before["parts"]["train"]["numbers"]["test_accuracy"])
    shown = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert network["weights_sha256"] in shown
    again = server.client.submit({**JOB, "checkpoint": network["weights_sha256"]})
    assert again.accepted["state"] == "succeeded"
    result = again.result()
    assert {name: result[name] for name in ("recipe", "seed", "robust_accuracy", "attack_digest")} == {
        name: before[name] for name in ("recipe", "seed", "robust_accuracy", "attack_digest")
    }
    assert next(server.client.networks(architecture="mlp"))["jobs"] == 2


def test_the_trajectory_of_every_example_is_read_in_ranges(server: Any, foreign: tuple[nn.Module, Path]) -> None:
    _, path = foreign
    register(server, "theirs", path)
    asked = {**JOB, "recipe": {"name": "imported", "checkpoint": "theirs"}, "scale": 1}
    plain, kept = (server.client.submit({**asked, "arrays": arrays}) for arrays in (False, True))
    assert (plain.wait()["state"], kept.wait()["state"]) == ("succeeded", "succeeded")
    assert "arrays" not in plain.result()["parts"]["attack"]["artifacts"]
    result = kept.result()
    found = result["parts"]["attack"]["artifacts"]["arrays"]

    def ranged(first: int, last: int) -> bytes:
        part = server.http.get(f"/v1/artifacts/{found['digest']}", headers={"Range": f"bytes={first}-{last}"})
        assert part.status_code == 206
        assert len(part.content) == last - first + 1
        return bytes(part.content)

    size = int.from_bytes(ranged(0, 7), "little")
    header = json.loads(ranged(8, 7 + size))
    whole = server.http.get(f"/v1/artifacts/{found['digest']}").content
    assert len(whole) == found["size_bytes"]
    tensors = load(whole)
    steps = len(kept.client.trajectory(kept.id)["attack"]["trajectory"]["step"])
    assert {tensors[name].shape for name in ("loss", "l2", "predicted")} == {(steps, N)}
    assert float((tensors["predicted"][0] == tensors["y"]).double().mean()) == result["clean_accuracy"]
    assert header["loss"]["dtype"] == "F64"
    begin, end = (8 + size + offset for offset in header["loss"]["data_offsets"])
    assert np.array_equal(np.frombuffer(ranged(begin, end - 1)).reshape(steps, N), tensors["loss"].numpy())


def test_what_does_not_fit_is_refused_before_it_is_accepted(
    server: Any, foreign: tuple[nn.Module, Path], tmp_path: Path
) -> None:
    _, path = foreign
    torch.save({"weight": torch.zeros(2)}, tmp_path / "pickle.pt")
    for name, file, options, said in (
        ("a", path, {"architecture": "simple_cnn"}, "of another network"),
        ("b", path, {"dataset": "mnist"}, "check architecture, image shape"),
        ("c", path, {"dataset": "npz:nowhere"}, "no known or registered data set"),
        ("d", path, {"keys": {"module.": "theirs."}}, "of another network"),
        ("e", tmp_path / "pickle.pt", {}, "a pickle"),
        ("../f", path, {}, "cannot be a name"),
    ):
        with pytest.raises(ApiError, match=said) as refused:
            register(server, name, file, **options)
        assert refused.value.status == 422
    register(server, "taken", path)
    with pytest.raises(ApiError, match="take a new name") as refused:
        register(server, "taken", path, mean=[0.0], std=[1.0])
    assert refused.value.status == 409
    assert {row["name"] for row in server.client.checkpoints()}.isdisjoint("abcde")


def test_jobs_that_name_a_checkpoint_that_is_not_of_their_network(server: Any, foreign: tuple[nn.Module, Path]) -> None:
    register(server, "for_jobs", foreign[1])
    imported = {"name": "imported", "checkpoint": "for_jobs"}
    for change, pointer, said in (
        ({"recipe": {**imported, "checkpoint": "nobody"}}, "/recipe", "is not registered"),
        ({"recipe": imported, "architecture": "simple_cnn"}, "/recipe", "is a mlp, not a simple_cnn"),
        ({"recipe": imported, "dataset": "mnist"}, "/recipe", "is for 10 classes of 1x8x8 images"),
        ({"recipe": {"name": "imported"}}, "/recipe", "name a registered checkpoint"),
    ):
        answer = server.http.post("/v1/jobs", json={**JOB, **change})
        assert answer.status_code == 422, answer.text
        assert [error["pointer"] for error in answer.json()["errors"]] == [pointer]
        assert said in answer.json()["detail"]
    sweep = {"name": "both", "base": JOB, "grid": {"recipe": ["standard", {**imported, "checkpoint": "nobody"}]}}
    answer = server.http.post("/v1/sweeps", json=sweep)
    assert answer.status_code == 422
    assert "is not registered" in answer.json()["detail"]


def test_two_who_take_one_name_at_once(server: Any, foreign: tuple[nn.Module, Path], monkeypatch: Any) -> None:
    """Both find the name free; who comes second is told of it, and not given the other's weights."""
    both = threading.Barrier(2, timeout=120)
    fitted = checkpoints._fitted

    def together(request: dict[str, Any]) -> dict[str, Any]:
        both.wait()
        return fitted(request)

    monkeypatch.setattr(checkpoints, "_fitted", together)
    said: dict[float, Any] = {}

    def ask(mean: float) -> None:
        with Client(server.url, user="ada") as client:
            try:
                made = client.register_checkpoint(
                    "raced",
                    foreign[1],
                    architecture="mlp",
                    dataset="digits",
                    keys={"module.": ""},
                    mean=[mean],
                    std=[STD],
                )
                said[mean] = made["mean"]
            except ApiError as error:
                said[mean] = error.status

    threads = [threading.Thread(target=ask, args=(mean,)) for mean in (0.1, 0.2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, said.values())) in (["409", "[0.1]"], ["409", "[0.2]"])
    assert all(mean == [asked] for asked, mean in said.items() if mean != 409)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"FITTING_SECONDS": 0.01}, "not checked within 0.01 s: try again later"),
        ({"FITTING": threading.BoundedSemaphore(0), "TURN_SECONDS": 0.01}, "the weights of others are being checked"),
        ({"sys": SimpleNamespace(executable="/bin/false")}, "could not be checked"),
        ({"sys": SimpleNamespace(executable="KILLED")}, "signal 9 ended the process"),
    ],
)
def test_weights_that_cannot_be_checked_now(
    server: Any, foreign: tuple[nn.Module, Path], tmp_path: Path, monkeypatch: Any, change: dict[str, Any], said: str
) -> None:
    (tmp_path / "killed").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "killed").chmod(0o755)
    if "sys" in change and change["sys"].executable == "KILLED":
        change = {"sys": SimpleNamespace(executable=str(tmp_path / "killed"))}
    for name, value in change.items():
        monkeypatch.setattr(checkpoints, name, value)
    with Client(server.url, user="ada", patience_seconds=0) as client, pytest.raises(ApiError, match=said) as refused:
        client.register_checkpoint("unchecked", foreign[1], architecture="mlp", dataset="digits", keys={"module.": ""})
    assert refused.value.status == 503
    assert "unchecked" not in {row["name"] for row in server.client.checkpoints()}
