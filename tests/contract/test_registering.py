"""Weights made elsewhere: what is refused when they are registered, and what their first task says of them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from typed import number

from api.http.app import create_app
from service.errors import Conflict, InvalidSpec
from service.lab import checkpoints
from service.lab.artifacts import Artifacts
from service.lab.checkpoints import TensorsDiffer, Upload, register
from service.model.executor import Bundle, Failed, Grant, Succeeded
from service.settings import Settings
from service.specs import DatasetRef, JobSpec
from service.specs.plan import plan_job
from service.store import Database
from workers import importing, run
from workers.context import Context
from workers.science.architectures import build
from workers.science.datasets import digits, to_unit

MEAN, STD = 0.3, 0.35
JOB = {"architecture": "mlp", "dataset": "digits", "samples": 60, "attack": "pgd_linf", "checkpoint": "theirs"}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """What is so small only waits for its own threads where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def fitted_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights are looked at in this process, which has PyTorch already; the slow tests start one for it."""

    def run_here(_: Any, *, input: bytes, **more: Any) -> CompletedProcess[bytes]:
        return CompletedProcess([], 0, json.dumps(importing.answer(json.loads(input))).encode())

    patient = SimpleNamespace(run=run_here, PIPE=-1, TimeoutExpired=TimeoutError)
    monkeypatch.setattr(checkpoints, "subprocess", patient)


@pytest.fixture(scope="module")
def foreign() -> nn.Module:
    """A network trained by other code, on images that were normalised."""
    data = digits.read()
    x = (to_unit(data.train_x) - MEAN) / STD
    model = build("mlp", (1, 8, 8), 10, seed=9)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(x), data.train_y))
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def accuracy(foreign: nn.Module) -> float:
    data = digits.read()
    with torch.no_grad():
        right = foreign((to_unit(data.test_x) - MEAN) / STD).argmax(1) == data.test_y
    return float(right.double().mean())


Registered = Callable[..., dict[str, Any]]


@pytest.fixture
def registered(database: Database, artifacts: Artifacts, tmp_path: Path) -> Registered:
    def do(state: dict[str, Tensor], **options: Any) -> dict[str, Any]:
        path = tmp_path / "weights.safetensors"
        save_file({name: value.contiguous().clone() for name, value in state.items()}, path)
        with path.open("rb") as file:
            uploaded = artifacts.write_chunks("upload", [file.read()])
        asked = {"name": "theirs", "architecture": "mlp", "dataset": "digits", "keys": {}, "mean": [MEAN], "std": [STD]}
        return register(
            database, artifacts, Upload(**{**asked, "uploaded_sha256": uploaded.digest, **options}), user="a"
        )

    return do


def looked_at(database: Database, artifacts: Artifacts, tmp_path: Path) -> Succeeded | Failed:
    """The task of an imported network, as a worker does it."""
    with database.read() as connection:
        weights = checkpoints.weights_of(connection, "theirs", "mlp", "digits")
    task = plan_job(JobSpec(**JOB), DatasetRef(name="digits"), {"theirs": weights}).train
    bundle = Bundle("b", (Grant("t", 1, task.digest, task.stored_spec, None),), task.stored_spec, None)
    [answer] = [m for m in run.execute(bundle, Context(artifacts, tmp_path)) if isinstance(m, (Succeeded, Failed))]
    return answer


class TestExpectedAccuracy:
    def test_a_normalisation_in_grey_levels_fails_before_anything_else(
        self,
        foreign: nn.Module,
        registered: Registered,
        accuracy: float,
        database: Database,
        artifacts: Artifacts,
        tmp_path: Path,
    ) -> None:
        """Nine of ten images are wrong then, and such a network was `trusted`."""
        grey = {"mean": [MEAN * 255], "std": [STD * 255]}
        row = registered(foreign.state_dict(), **grey, expected_clean_accuracy=accuracy)
        assert (row["expected_clean_accuracy"], row["tolerance"]) == (accuracy, 0.01)
        answer = looked_at(database, artifacts, tmp_path)
        assert isinstance(answer, Failed)
        assert answer.kind == "configuration"
        for said in (
            "all 500 test images is ",
            f"and {accuracy:.1%} (within 1.0%) was expected",
            "grey levels of 0 to 255",
        ):
            assert said in answer.message

    @pytest.mark.parametrize("off", [0.0, 0.009, -0.009])
    def test_what_is_expected_is_what_is_found(
        self,
        foreign: nn.Module,
        registered: Registered,
        accuracy: float,
        database: Database,
        artifacts: Artifacts,
        tmp_path: Path,
        off: float,
    ) -> None:
        registered(foreign.state_dict(), expected_clean_accuracy=accuracy + off)
        answer = looked_at(database, artifacts, tmp_path)
        assert isinstance(answer, Succeeded)
        assert answer.outcome.numbers["test_accuracy"] == accuracy > 0.9
        assert answer.outcome.numbers["clean_accuracy_at_chance"] == 0

    def test_a_tolerance_of_its_own(
        self,
        foreign: nn.Module,
        registered: Registered,
        accuracy: float,
        database: Database,
        artifacts: Artifacts,
        tmp_path: Path,
    ) -> None:
        registered(foreign.state_dict(), expected_clean_accuracy=accuracy - 0.05, tolerance=0.04)
        assert isinstance(looked_at(database, artifacts, tmp_path), Failed)

    def test_chance_is_said_where_nothing_is_expected(
        self, foreign: nn.Module, registered: Registered, database: Database, artifacts: Artifacts, tmp_path: Path
    ) -> None:
        swapped = {
            name: value.flip(0) if name.startswith("5.") else value for name, value in foreign.state_dict().items()
        }
        registered(swapped)  # its classes are in another order
        answer = looked_at(database, artifacts, tmp_path)
        assert isinstance(answer, Succeeded)
        assert number(answer.outcome.numbers, "test_accuracy") < 0.2
        assert answer.outcome.numbers["clean_accuracy_at_chance"] == 1

    def test_another_expectation_is_another_checkpoint(self, foreign: nn.Module, registered: Registered) -> None:
        made = registered(foreign.state_dict(), expected_clean_accuracy=0.95)
        assert registered(foreign.state_dict(), expected_clean_accuracy=0.95, tolerance=0.01) == made
        for other in ({}, {"expected_clean_accuracy": 0.9}, {"expected_clean_accuracy": 0.95, "tolerance": 0.02}):
            with pytest.raises(Conflict, match="take a new name"):
                registered(foreign.state_dict(), **other)


@pytest.mark.parametrize(
    ("options", "pointer", "said"),
    [
        ({"mean": [76.5]}, "/mean", "mean 76.5 looks like grey levels of 0 to 255, .* did you mean 0.3000?"),
        ({"std": [89.25]}, "/std", "std 89.25 looks like grey levels of 0 to 255, .* did you mean 0.3500?"),
        ({"tolerance": 0.1}, "/tolerance", "`expected_clean_accuracy`, which is left out"),
        ({"name": "0" * 64}, "/name", "64 hexadecimal digits name weights by their SHA-256"),
        ({"name": "../x"}, "/name", "cannot be a name"),
    ],
)
def test_what_is_refused_whatever_the_weights_are(
    foreign: nn.Module, registered: Registered, options: dict[str, Any], pointer: str, said: str
) -> None:
    with pytest.raises(InvalidSpec, match=said) as refused:
        registered(foreign.state_dict(), **options)
    assert [place for place, _ in refused.value.errors] == [pointer]


def test_images_that_were_trained_on_in_grey_levels_are_no_mistake(foreign: nn.Module, registered: Registered) -> None:
    row = registered(foreign.state_dict(), mean=[0.0], std=[1 / 255])
    assert (row["mean"], row["std"], row["expected_clean_accuracy"], row["tolerance"]) == ([0.0], [1 / 255], None, None)


def test_what_was_done_to_the_file_is_said_then_and_later(
    foreign: nn.Module, registered: Registered, database: Database
) -> None:
    halves = {f"_orig_mod.module.{name}": value.half() for name, value in foreign.state_dict().items()}
    row = registered(halves)
    assert (row["stripped_prefix"], row["converted_from"]) == ("_orig_mod.module.", ["float16"])
    assert registered(halves) == row
    assert checkpoints.registered(database) == [row]
    plain = registered({name: value.float() for name, value in foreign.state_dict().items()}, name="plain")
    assert (plain["stripped_prefix"], plain["converted_from"]) == (None, [])


def test_all_tensors_that_do_not_fit_are_in_the_problem(foreign: nn.Module, registered: Registered) -> None:
    state = {f"theirs.{name}": value for name, value in foreign.state_dict().items()}
    with pytest.raises(TensorsDiffer) as refused:
        registered(state)
    names = sorted(foreign.state_dict())
    assert refused.value.tensors == {
        "missing": names,
        "unknown": sorted(state),
        "misshapen": [],
        "copies": ["theirs."],
    }
    with pytest.raises(TensorsDiffer) as refused:
        registered(foreign.state_dict(), dataset="mnist")
    [misshapen] = refused.value.tensors["misshapen"]
    assert misshapen == {"name": "1.weight", "found": "(256, 64)", "expected": "(256, 784)"}
    assert "1.weight is (256, 64), the network has (256, 784)" in str(refused.value)


def test_over_http(foreign: nn.Module, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    database = Database(settings.database)
    database.upgrade()
    state = foreign.state_dict()
    both = {prefix + name: value.clone() for prefix in ("ema.", "model.") for name, value in state.items()}
    path = tmp_path / "both.safetensors"
    save_file(both, path)
    ref = Artifacts(settings.artifacts).write_chunks("upload", [path.read_bytes()])
    body: dict[str, Any] = {"name": "both", "architecture": "mlp", "dataset": "digits", "weights_sha256": ref.digest}
    body |= {"mean": [MEAN], "std": [STD], "expected_clean_accuracy": "0.95"}
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as http:
        refused = http.post("/v1/checkpoints", json=body)
        assert refused.status_code == 422
        [error] = refused.json()["errors"]
        assert error["pointer"] == "/weights_sha256"
        assert error["tensors"] == {"missing": [], "unknown": [], "misshapen": [], "copies": ["ema.", "model."]}
        assert "'ema.' (--key ema.=) or 'model.' (--key model.=)" in error["detail"]
        made = http.post("/v1/checkpoints", json={**body, "keys": {"ema.": ""}})
        assert made.status_code == 201, made.text
        assert made.json()["expected_clean_accuracy"] == 0.95
        assert http.get("/v1/checkpoints").json()["items"] == [made.json()]
        assert http.post("/v1/checkpoints", json={**body, "expected_clean_accuracy": 95}).status_code == 422
        assert http.get("/v1/networks", params={"recipe": "sam", "limit": 5}).json() == {
            "items": [],
            "next_cursor": None,
        }
        for wrong in ({"weights_sha256": "x"}, {"recipe": "\x00"}, {"cursor": "x"}):
            assert http.get("/v1/networks", params=wrong).status_code == 422, wrong
        job = http.post("/v1/jobs", json={**JOB, "checkpoint": made.json()["weights_sha256"]})
        assert job.status_code == 201, job.text
        assert http.post("/v1/jobs", json={**JOB, "checkpoint": "\x00"}).status_code == 422
    database.close()
