"""Tasks as a worker runs them, without Ray: outcomes, resuming, caches, and every way in which a task can end."""

import errno
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from service.lab.artifacts import Artifacts
from service.model.executor import (
    ArtifactRef,
    Bundle,
    Failed,
    Fault,
    Grant,
    Lost,
    Message,
    Outcome,
    Progress,
    Started,
    Succeeded,
)
from service.model.jobs import LIVE_JOB
from service.queue.dispatcher import Dispatcher
from service.queue.inprocess import InProcessExecutor
from service.results.results import ROW_FIELDS
from service.settings import Settings
from service.specs import DatasetRef, JobSpec
from service.specs.attacks import PRESETS, AnyAttack, Transfer
from service.specs.measures import MEASURES
from service.specs.numbers import filed
from service.specs.plan import PlannedTask, plan_job
from service.specs.recipes import Imported
from service.store.result_fields import PROVENANCE
from service.store.tables import attempts, trainings
from workers import devices, run, tasks
from workers.context import Cache, Context
from workers.provenance import cudnn, gpu, of_properties
from workers.science.architectures import build
from workers.science.attacks import ATTACKS, AttackInput
from workers.science.datasets import DATASETS
from workers.science.errors import Diverged, ScienceError
from workers.science.summaries import merged
from workers.science.weights import load_state, load_weights, save_state, save_weights

EPOCHS = 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """What is so small only waits for its own threads where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def job(**changes: Any) -> JobSpec:
    recipe = {"name": "standard", "epochs": EPOCHS, **changes.pop("recipe", {})}
    base = {"architecture": "mlp", "dataset": "digits", "attack": "pgd_linf", "scale": 5, "samples": 40}
    return JobSpec(**{**base, "recipe": recipe, **changes})


def grant(task: PlannedTask | dict[str, Any], name: str = "t", resume: ArtifactRef | None = None) -> Grant:
    spec = task if isinstance(task, dict) else task.stored_spec
    return Grant(name, 1, "d" * 64 if isinstance(task, dict) else task.digest, spec, resume)


def answer(messages: list[Message], name: str = "t") -> Message:
    [only] = [m for m in messages if m.task_id == name and isinstance(m, (Succeeded, Failed, Lost))]
    return only


def outcome(messages: list[Message], name: str = "t") -> Outcome:
    found = answer(messages, name)
    assert isinstance(found, Succeeded), found
    return found.outcome


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(Artifacts(str(tmp_path / "artifacts")), tmp_path / "data", epoch_state_seconds=0)


Execute = Callable[..., list[Message]]


@pytest.fixture
def execute(context: Context) -> Execute:
    """Runs the tasks of one training's bundle."""

    def do(train: PlannedTask, *grants: Grant, checkpoint: ArtifactRef | None = None) -> list[Message]:
        return list(run.execute(Bundle("b", grants, train.stored_spec, checkpoint), context))

    return do


@pytest.fixture
def trained(execute: Execute) -> tuple[ArtifactRef, list[Message]]:
    plan = plan_job(job(), DatasetRef(name="digits"))
    messages = execute(plan.train, grant(plan.train))
    return outcome(messages).artifacts[0], messages


def test_a_training_leaves_weights_numbers_and_where_they_come_from(
    trained: tuple[ArtifactRef, list[Message]], context: Context
) -> None:
    checkpoint, messages = trained
    made = outcome(messages)
    assert [type(m) for m in messages if not isinstance(m, Progress)] == [Started, Succeeded]
    assert made.numbers["epochs"] == EPOCHS
    assert 0.5 < float(made.numbers["test_accuracy"] or 0) <= 1
    assert {"test_loss", "train_loss", "seconds", "images_per_second"} <= made.numbers.keys()
    assert made.curves["epochs"]["epoch"] == [1, 2, 3]
    digits = DATASETS["digits"].read(context.data_dir)
    model = build("mlp", digits.shape, digits.n_classes, seed=1)
    with context.artifacts.local(checkpoint.digest) as path:
        load_weights(model, path)
    assert checkpoint.kind == "checkpoint"
    provenance = made.provenance
    assert provenance["weights_sha256"] == checkpoint.digest
    assert provenance["dataset_sha256"] == digits.sha256()
    assert provenance["torch"] == torch.__version__.partition("+")[0]
    assert provenance["deterministic_algorithms"] is True
    assert provenance["wall_seconds"] > 0
    assert {"code_digest", "device", "hostname", "pid", "seed", "task_version"} <= provenance.keys()
    json.dumps([made.numbers, made.curves, provenance], allow_nan=False)


def test_a_resumed_training_ends_in_the_same_weights(
    trained: tuple[ArtifactRef, list[Message]], execute: Execute
) -> None:
    checkpoint, messages = trained
    states = [m.resume for m in messages if isinstance(m, Progress) and m.resume]
    assert len(states) == EPOCHS - 1  # after the last epoch there is nothing to resume
    train = plan_job(job(), DatasetRef(name="digits")).train
    again = execute(train, grant(train, resume=states[0]))
    assert outcome(again).artifacts[0] == checkpoint
    told = [m.detail for m in again if isinstance(m, Progress)]
    assert all(detail["resumed_after_epoch"] == 1 for detail in told)
    assert min(detail["epoch"] for detail in told) == 2


def test_the_provenance_of_a_training_has_the_flags_of_its_steps(execute: Execute) -> None:
    """TF32 is for the steps alone, which the flags around the task do not show."""
    for precision, matmul in (("tf32", "tf32"), ("float32", "ieee")):
        train = plan_job(job(recipe={"epochs": 1, "precision": precision}), DatasetRef(name="digits")).train
        made = outcome(execute(train, grant(train))).provenance
        assert (made["precision"], made["matmul_precision"], made["convolution_precision"]) == (
            precision,
            matmul,
            matmul,
        )


def test_a_resumed_training_names_all_its_machines(
    trained: tuple[ArtifactRef, list[Message]], execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = plan_job(job(), DatasetRef(name="digits")).train
    here = socket.gethostname()

    def resumed(hostname: str, after: list[Message]) -> tuple[list[tuple[str, int]], list[Message]]:
        """What a host that goes on from the last state of `after` says of the machines."""
        state = [m.resume for m in after if isinstance(m, Progress) and m.resume][-1]
        monkeypatch.setattr(socket, "gethostname", lambda: hostname)
        again = execute(train, grant(train, resume=state))
        return [(of["hostname"], of["after_epoch"]) for of in outcome(again).provenance["machines"]], again

    messages = [m for m in trained[1] if not (isinstance(m, Progress) and m.detail["epoch"] > 1)]  # lost after epoch 1
    assert [(of["hostname"], of["after_epoch"]) for of in outcome(trained[1]).provenance["machines"]] == [(here, 0)]
    assert resumed(here, messages)[0] == [(here, 0)]
    machines, messages = resumed("elsewhere", messages)
    assert machines == [(here, 0), ("elsewhere", 1)]
    assert resumed(here, messages)[0] == [(here, 0), ("elsewhere", 1), (here, 2)]


def test_a_machine_is_another_one_with_another_share_or_another_cudnn(
    trained: tuple[ArtifactRef, list[Message]], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both move the last bits of a training on a GPU."""
    train = plan_job(job(), DatasetRef(name="digits")).train
    state = next(m.resume for m in trained[1] if isinstance(m, Progress) and m.resume)
    monkeypatch.setattr("workers.provenance.cudnn", lambda _: 91002)
    bundle = Bundle("b", (grant(train, resume=state),), train.stored_spec)
    machines = outcome(list(run.execute(bundle, replace(context, device_share=0.5)))).provenance["machines"]
    assert [(of["device_share"], of["cudnn"], of["after_epoch"]) for of in machines] == [
        (1.0, None, 0),
        (0.5, 91002, 1),
    ]


def test_the_version_of_cudnn_is_noted_of_a_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert [cudnn(torch.device(name)) for name in ("cuda:0", "cpu")] == [91002, None]


def test_epoch_states_take_a_fiftieth_of_the_time(context: Context) -> None:
    """Epochs of 10 s, and a store that takes 3 s for a state."""
    now = 100.0
    states = tasks.EpochStates(replace(context, epoch_state_seconds=5), [], lambda: now)

    def slow() -> dict[str, Any]:
        nonlocal now
        now += 3
        return {}

    saved = []
    for epoch in range(1, 51):
        now += 10
        if states.save(slow):
            saved.append(epoch)
    assert saved == [1, 15, 30, 45]  # after 10 s, then once 150, 300 and 450 s have gone by
    eager = tasks.EpochStates(context, [], lambda: now)
    assert all(eager.save(slow) for _ in range(3))  # 0 seconds: after every epoch


def test_what_is_noted_of_a_gpu() -> None:
    properties = SimpleNamespace(
        uuid="5e24eac9-0b6d-5ae8-b0ae-7ad7a9a1a6a1",
        total_memory=85 * 10**9,
        major=9,
        minor=0,
        multi_processor_count=132,
    )
    assert of_properties(properties) == {
        "gpu_uuid": "GPU-5e24eac9-0b6d-5ae8-b0ae-7ad7a9a1a6a1",
        "gpu_memory_bytes": 85 * 10**9,
        "gpu_capability": "9.0",
        "gpu_sm_count": 132,
    }
    assert gpu(torch.device("cpu")) == dict.fromkeys(of_properties(properties))


@pytest.mark.parametrize("kind", ["missing", "damaged", "foreign", "unfit"])
def test_a_training_whose_state_is_lost_starts_anew(
    kind: str, trained: tuple[ArtifactRef, list[Message]], execute: Execute, context: Context
) -> None:
    checkpoint, messages = trained
    state = next(m.resume for m in messages if isinstance(m, Progress) and m.resume)
    folder = Path(context.artifacts.root) / state.digest[:2]
    match kind:
        case "missing":
            state = replace(state, digest="0" * 64)
        case "damaged":
            (folder / state.digest).write_bytes(b"half of it")
        case "foreign":
            other = plan_job(job(recipe={"lr": 0.05}), DatasetRef(name="digits")).train
            progress = [m for m in execute(other, grant(other)) if isinstance(m, Progress) and m.resume]
            state = progress[0].resume or state
        case "unfit":
            whole = load_state(folder / state.digest)
            state = context.artifacts.write("epoch_state", lambda path: save_state(path, {**whole, "model": {}}))
    train = plan_job(job(), DatasetRef(name="digits")).train
    again = execute(train, grant(train, resume=state))
    assert outcome(again).artifacts[0] == checkpoint
    assert all(m.detail["started_anew"] for m in again if isinstance(m, Progress))


def test_a_resumed_training_that_diverges_does_not_start_anew(
    trained: tuple[ArtifactRef, list[Message]], execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = next(m.resume for m in trained[1] if isinstance(m, Progress) and m.resume)
    train = plan_job(job(), DatasetRef(name="digits")).train
    resumed = []

    def diverging(*_args: object, resume: object, **_options: object) -> None:
        resumed.append(resume is not None)
        raise Diverged("the loss became nan in epoch 2")

    monkeypatch.setattr(tasks, "train", diverging)
    failed = answer(execute(train, grant(train, resume=state)))
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.message) == ("configuration", "the loss became nan in epoch 2")
    assert resumed == [True]


def test_a_bundle_measures_and_attacks_one_network(
    trained: tuple[ArtifactRef, list[Message]], execute: Execute, context: Context
) -> None:
    checkpoint, _ = trained
    plan = plan_job(job(), DatasetRef(name="digits"))
    assert plan.control is not None
    parts = {"attack": plan.attack, "control": plan.control, "measure": plan.closed_forms}
    context.cache.clear()
    messages = execute(plan.train, *(grant(t, name) for name, t in parts.items()), checkpoint=checkpoint)
    assert len(context.cache) == 2  # the data set and the network, loaded once each
    attack, control, measure = (outcome(messages, name) for name in parts)
    bits = attack.bits["robust"]
    robust = np.unpackbits(np.frombuffer(bits.packed, np.uint8), count=bits.n)
    assert bits.n == 40
    assert robust.mean() == attack.numbers["robust_accuracy"]
    assert attack.numbers["outside_ball"] == 0
    assert len(attack.curves["trajectory"]["loss_median"]) == 11
    assert "valley_n" in attack.numbers
    for name in ("log_relative_sharpness_median", "log_hessian_trace_median", "loss_mean"):
        assert attack.numbers[name] == pytest.approx(measure.numbers[name])
    assert "train_log_relative_sharpness_median" in measure.numbers
    assert control.bits["robust_margin"].n == 40
    for part in (attack, control, measure):
        assert part.provenance["weights_sha256"] == checkpoint.digest
        json.dumps([part.numbers, part.curves, part.provenance], allow_nan=False)


def test_the_panel_of_auto_pgd_runs_it_with_the_margin_loss(
    trained: tuple[ArtifactRef, list[Message]], execute: Execute, context: Context
) -> None:
    own = {"norm": "linf", "eps": 0.2, "steps": 1, "restarts": 2}
    plan = plan_job(job(attack={"type": "apgd", **own}, samples=256), DatasetRef(name="digits"))
    assert plan.control is not None
    bits = outcome(execute(plan.train, grant(plan.control), checkpoint=trained[0])).bits
    found = {name: np.unpackbits(np.frombuffer(of.packed, np.uint8), count=of.n) == 1 for name, of in bits.items()}
    subject = tasks.Subject(plan.train.spec, trained[0], context)  # type: ignore[arg-type]
    index, x, y = subject.samples(256, "permutation")

    def survivors(**changed: Any) -> list[bool]:
        params = {**own, "loss": "margin", **changed}
        output = ATTACKS["apgd"](subject.network(), AttackInput(x.float() / 255, y, index), **params)
        return (~output.broken).tolist()

    twin = found["robust_twin"].tolist()
    assert twin == survivors()
    others = [survivors(**changed) for changed in ({"loss": "cross_entropy"}, {"steps": 100}, {"restarts": 1})]
    assert twin not in [found["robust_margin"].tolist(), *others], "or this test says nothing"


@pytest.mark.parametrize(
    ("attack", "has_trajectory"),
    [
        ("fgsm", True),
        ("pgd_l2", True),
        ({"type": "pgd", "norm": "linf", "eps": 0.1, "step_size": 0.03, "steps": 3, "judge": "any_step"}, False),
        ({"type": "pgd", "norm": "linf", "eps": 0.1, "step_size": 0.03, "steps": 3, "precision": "bf16"}, False),
        ({"type": "square", "norm": "linf", "eps": 0.1, "queries": 20}, False),
        ("noise", True),
        ("transfer", False),
    ],
    ids=str,
)
def test_each_attack_runs_from_its_spec(
    attack: Any, has_trajectory: bool, trained: tuple[ArtifactRef, list[Message]], execute: Execute
) -> None:
    plan = plan_job(job(attack=attack, samples=16), DatasetRef(name="digits"))
    made = outcome(execute(plan.train, grant(plan.attack), checkpoint=trained[0]))
    assert ("trajectory" in made.curves) == has_trajectory
    assert 0 <= float(made.numbers["robust_accuracy"] or 0) <= float(made.numbers["clean_accuracy"] or 0)
    assert made.numbers["bound_n_examples"] == 16
    assert ("lipschitz_path_max" in made.numbers) == has_trajectory
    assert made.numbers["bound_violated_certificate"] == made.numbers["bound_violated_corrected_taylor"] == 0


@pytest.mark.parametrize(
    ("attack", "bounded"),
    [
        ({"type": "pgd", "norm": "l2", "eps": 1, "step_size": 0.3, "steps": 4}, True),
        ({"type": "pgd", "norm": "l2", "eps": 1, "step_size": 0.3, "steps": 4, "random_start": True}, False),
        ({"type": "apgd", "norm": "l2", "eps": 1, "steps": 4}, False),
        ("noise", True),
        ("cw", True),
    ],
)
def test_bounds_are_on_every_result_and_basin_widths_need_a_path_from_the_image(
    attack: Any, bounded: bool, trained: tuple[ArtifactRef, list[Message]], execute: Execute
) -> None:
    """From a random point on, distances from the image do not belong to what changed since that point."""
    plan = plan_job(job(attack=attack, samples=16, arrays=True), DatasetRef(name="digits"))
    made = outcome(execute(plan.train, grant(plan.attack), checkpoint=trained[0]))
    assert (made.curves["trajectory"]["l2_q95"][0] < 1e-4) == bounded
    names = {"lipschitz_path_max", "estimated_radius_path_logk_median", "basin_n", "basin_width_e001_median"}
    otherwise = {"lipschitz_returned_max", "estimated_radius_returned_logk_median"}
    assert made.numbers.keys() & (names | otherwise) == (names if bounded else otherwise)
    assert made.numbers["bound_n_examples"] == 16
    assert (made.numbers["bound_n"] == 16) == (not bounded)
    assert made.numbers["bound_violated_certificate"] == made.numbers["bound_violated_corrected_taylor"] == 0


def test_training_images_are_measured_where_the_network_was_trained_on_them(execute: Execute) -> None:
    plan = plan_job(job(recipe={"train_samples": 100}, samples=300), DatasetRef(name="digits"))
    checkpoint = outcome(execute(plan.train, grant(plan.train))).artifacts[0]
    made = outcome(execute(plan.train, grant(plan.closed_forms), checkpoint=checkpoint))
    assert (made.numbers["train_n"], made.numbers["n"]) == (100, 300)


def test_the_first_images_of_the_file_are_those_of_the_file(
    trained: tuple[ArtifactRef, list[Message]], execute: Execute, context: Context
) -> None:
    plan = plan_job(job(order="file", samples=30, arrays=True), DatasetRef(name="digits"))
    assert plan.control is not None
    parts = {"attack": plan.attack, "measure": plan.closed_forms, "control": plan.control}
    messages = execute(plan.train, *(grant(task, name) for name, task in parts.items()), checkpoint=trained[0])
    attack, measure, control = (outcome(messages, name) for name in parts)
    with context.artifacts.local(attack.artifacts[0].digest) as path:
        assert load_file(path)["index"].tolist() == list(range(30))
    subject = tasks.Subject(plan.train.spec, trained[0], context)  # type: ignore[arg-type]
    with torch.no_grad():
        right = subject.network()(subject.data.test_x[:30].float() / 255).argmax(1) == subject.data.test_y[:30]
    for bits in (attack.bits["clean_correct"], control.bits["clean_correct"]):
        assert np.unpackbits(np.frombuffer(bits.packed, np.uint8), count=30).tolist() == right.int().tolist()
    assert measure.numbers["n_clean_correct"] == int(right.sum())
    trained_on = tasks._trained_on(subject, "file")
    assert trained_on.tolist() == list(range(1297))


def test_held_out_images_are_no_training_images_of_a_measure(execute: Execute) -> None:
    recipe = {"name": "adversarial", "epochs": 2, "steps": 1, "keep": "best", "held_out": 1200}
    for train_samples, order in ((None, "permutation"), (60, "file")):
        spec = job(recipe={**recipe, "train_samples": train_samples}, samples=300, order=order)
        plan = plan_job(spec, DatasetRef(name="digits"))
        made = outcome(execute(plan.train, grant(plan.train)))
        n = train_samples or 97
        assert made.numbers["train_samples"] == n
        curve = made.curves["epochs"]["held_out_robust_accuracy"]
        assert made.numbers["kept_epoch"] == 1 + curve.index(max(curve))
        assert made.numbers["held_out_robust_accuracy"] == max(curve)
        measured = outcome(execute(plan.train, grant(plan.closed_forms), checkpoint=made.artifacts[0]))
        assert (measured.numbers["train_n"], measured.numbers["n"]) == (n, 300)


def test_a_last_image_that_is_dropped_is_in_the_numbers(execute: Execute) -> None:
    plan = plan_job(job(recipe={"train_samples": 65, "batch_size": 32}), DatasetRef(name="digits"))
    numbers = outcome(execute(plan.train, grant(plan.train))).numbers
    assert (numbers["train_samples"], numbers["dropped_samples"], numbers["kept_epoch"]) == (64, 1, EPOCHS)


def test_images_that_a_network_cannot_read_are_counted_and_the_rest_is_measured(
    execute: Execute, context: Context
) -> None:
    """Two units in a row multiply what is bright at one pixel by 1e60: infinite for some images, 0 for the others."""
    digits = DATASETS["digits"].read(context.data_dir)
    model = build("mlp", digits.shape, digits.n_classes, seed=1)
    first, second = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][:2]
    pixel, threshold = 27, 13.5 / 16
    with torch.no_grad():
        first.weight[0].zero_()
        first.weight[0, pixel], first.bias[0] = 1e30, -threshold * 1e30
        second.weight[0].zero_()
        second.weight[0, 0], second.bias[0] = 1e30, 0.0
    checkpoint = context.artifacts.write("checkpoint", lambda path: save_weights(path, model))
    attack = {"type": "pgd", "norm": "linf", "eps": 0.02, "step_size": 0.01, "steps": 3}
    plan = plan_job(job(attack=attack, samples=100), DatasetRef(name="digits"))
    assert plan.control is not None
    parts = {"attack": plan.attack, "measure": plan.closed_forms, "control": plan.control}
    messages = execute(plan.train, *(grant(task, name) for name, task in parts.items()), checkpoint=checkpoint)
    attacked, measured, controlled = (outcome(messages, name) for name in parts)
    _, x, _ = tasks.Subject(plan.train.spec, checkpoint, context).samples(100, "permutation")  # type: ignore[arg-type]
    bright = (x.float() / 255).flatten(1)[:, pixel] > threshold
    assert 5 < int(bright.sum()) < 95
    bits = attacked.bits["non_finite"]
    assert np.unpackbits(np.frombuffer(bits.packed, np.uint8), count=100).tolist() == bright.int().tolist()
    for made in (attacked, measured, controlled):
        assert made.numbers["n_non_finite"] == int(bright.sum())
        json.dumps([made.numbers, made.curves], allow_nan=False)
    assert (attacked.numbers["n"], attacked.numbers["trajectory_n"]) == (100, 100 - int(bright.sum()))
    assert measured.numbers["n"] == 100 - int(bright.sum())
    checks = ("random_forward_changed", "batch_dependent_changed", "eps_zero_changed")
    assert [controlled.numbers[name] for name in checks] == [0, 0, 0]


def test_trained_and_imported_weights_have_the_same_test_numbers(execute: Execute) -> None:
    for dataset, classes in (("digits", 10), ("synthetic", 4)):
        reference = DatasetRef(name=dataset)
        train = plan_job(job(dataset=dataset, architecture="mlp", recipe={"epochs": 1}), reference).train
        made = outcome(execute(train, grant(train)))
        spec = job(dataset=dataset, recipe={}).model_copy(update={"recipe": Imported(checkpoint="it")})
        again = plan_job(spec, reference, {"it": Imported(weights_sha256=made.artifacts[0].digest)}).train
        imported = outcome(execute(again, grant(again)))
        names = ("test_accuracy", "test_loss", "test_top5_accuracy", "parameters")
        assert [imported.numbers[name] for name in names] == [made.numbers[name] for name in names]
        assert (made.numbers["test_top5_accuracy"] is None) == (classes <= 5)
        assert imported.numbers["test_n_non_finite"] == 0


def two_steps(attack: AnyAttack) -> dict[str, Any]:
    """The same attack, done at once."""
    spec = {**attack.model_dump(mode="json"), **({"steps": 2} if hasattr(attack, "steps") else {})}
    spec |= {"queries": 2} if attack.type == "square" else {}
    return spec | ({"attack": two_steps(attack.attack)} if isinstance(attack, Transfer) else {})


@pytest.mark.parametrize("architecture", ["mlp", "simple_cnn"])
def test_no_two_tasks_of_a_job_leave_another_number_of_one_name(
    architecture: str, execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the closed forms, which an attack repeats at its start: the same numbers. Of every attack and measure."""
    small: dict[str, dict[str, Any]] = {
        "hessian_trace_network": {"probes": 2}, "top_eigenvalue_network": {"iterations": 2},
        "adaptive_average": {"draws": 1}, "adaptive_worst": {"steps": 1}, "lipschitz": {"iterations": 1},
        "pac_bayes_flatness": {"draws": 1, "bisections": 1}, "input_curvature": {"iterations": 1},
        "detector": {"steps": 4, "eps": 0.5, "step_size": 0.2, "images": 50},
    }  # fmt: skip
    monkeypatch.setitem(ATTACKS, "autoattack", partial(ATTACKS["autoattack"], steps=2, targets=1, queries=2))
    assert {attack.type for attack in PRESETS.values()} == ATTACKS.keys()
    this: dict[str, Any] = {"architecture": architecture, "samples": 8, "recipe": {"epochs": 4, "train_samples": 300}}
    measures = [{"type": name, "images": 8, **small.get(name, {})} for name in MEASURES]
    plan = plan_job(job(measures=measures, **this), DatasetRef(name="digits"))
    checkpoint = outcome(execute(plan.train, grant(plan.train))).artifacts[0]
    of_measures = {task.spec.measure.type: task for task in plan.measures}  # type: ignore[union-attr]
    of_attacks = {
        name: plan_job(job(attack=two_steps(attack), **this), DatasetRef(name="digits")).attack
        for name, attack in PRESETS.items()
    }
    assert of_measures.keys() == MEASURES.keys() - {"closed_forms"}
    parts = {"closed forms": plan.closed_forms, **of_measures, **of_attacks}
    messages = execute(plan.train, *(grant(task, name) for name, task in parts.items()), checkpoint=checkpoint)
    numbers = {name: outcome(messages, name).numbers for name in parts}
    closed = numbers.pop("closed forms")
    assert numbers["detector"]["detector_adaptive_accuracy"] is not None, "or not all names are there"
    for attack in of_attacks:
        repeated = closed.keys() & numbers[attack].keys()
        assert len(repeated) > 50
        for name in repeated:
            assert closed[name] == pytest.approx(numbers[attack][name], rel=1e-6), (attack, name)
        names = [
            closed.keys() - repeated,
            numbers[attack].keys(),
            *(numbers[measure].keys() for measure in of_measures),
        ]
        counted = Counter(name for part in names for name in part)
        assert [name for name, times in counted.items() if times > 1] == [], attack
        # No number takes the place of what else a result row has, or of what another task gives it.
        assert set(ROW_FIELDS) & counted.keys() <= {*filed("attack"), *filed("measure")}
    with pytest.raises(KeyError, match="two numbers are called clean_loss"):
        merged(numbers["pgd_linf"], {"clean_loss": 0.0})


def test_provenance_says_what_bits_depend_on(trained: tuple[ArtifactRef, list[Message]], execute: Execute) -> None:
    attack = {"type": "pgd", "norm": "linf", "eps": 0.1, "step_size": 0.03, "steps": 1, "precision": "bf16"}
    transfer = {"type": "transfer", "attack": attack}
    plans = [plan_job(job(attack=one), DatasetRef(name="digits")) for one in (attack, transfer)]
    parts = {"bf16": plans[0].attack, "transfer": plans[1].attack, "measure": plans[0].closed_forms}
    messages = execute(plans[0].train, *(grant(task, name) for name, task in parts.items()), checkpoint=trained[0])
    found = {name: outcome(messages, name).provenance for name in parts} | {"train": outcome(trained[1]).provenance}
    assert {name: of["precision"] for name, of in found.items()} == {
        "bf16": "bf16", "transfer": "bf16", "measure": "float32", "train": "float32",
    }  # fmt: skip
    for provenance in found.values():
        assert (provenance["eval_mode"], provenance["threads"]) == (True, 1)
        assert provenance["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
        assert provenance.keys() >= PROVENANCE.keys()


def test_transfer_from_the_same_scale_is_the_attack_itself(
    trained: tuple[ArtifactRef, list[Message]], execute: Execute
) -> None:
    direct, transferred = (
        plan_job(job(attack=attack, scale=1), DatasetRef(name="digits")) for attack in ("pgd_linf", "transfer")
    )
    found = execute(
        direct.train, grant(direct.attack, "direct"), grant(transferred.attack, "transfer"), checkpoint=trained[0]
    )
    assert outcome(found, "direct").bits["robust"] == outcome(found, "transfer").bits["robust"]


def write_npz(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


def npz(folder: Path, artifacts: Artifacts) -> DatasetRef:
    digits = DATASETS["digits"].read(folder)
    sums = []
    for x, y in ((digits.train_x[:200], digits.train_y[:200]), (digits.test_x[:50], digits.test_y[:50])):
        arrays = {"x": x.permute(0, 2, 3, 1).numpy(), "y": y.numpy()}
        sums.append(artifacts.write("dataset", partial(write_npz, arrays=arrays)).digest)
    return DatasetRef(name="npz:scans", train_sha256=sums[0], test_sha256=sums[1])


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_labs_own_images_come_from_the_artifacts(tmp_path: Path, context: Context, execute: Execute) -> None:
    dataset = npz(tmp_path, context.artifacts)
    plan = plan_job(job(dataset="npz:scans"), dataset)
    made = outcome(execute(plan.train, grant(plan.train)))
    assert made.numbers["train_samples"] == 200
    assert made.provenance["dataset_files_sha256"] == [dataset.train_sha256, dataset.test_sha256]
    lost = plan_job(job(dataset="npz:scans"), dataset.model_copy(update={"test_sha256": "0" * 64}))
    failed = answer(execute(lost.train, grant(lost.train)))
    assert isinstance(failed, Failed)
    assert (failed.kind, "0" * 64 in failed.message) == ("configuration", True)


def test_what_would_fail_again_is_a_configuration_error_in_a_sentence(
    trained: tuple[ArtifactRef, list[Message]], execute: Execute
) -> None:
    plan = plan_job(job(), DatasetRef(name="digits"))
    too_small = plan_job(job(architecture="vgg11_bn", dataset="cifar10"), DatasetRef(name="digits")).train
    unknown = {**plan.train.stored_spec, "architecture": "resnet9000"}
    wild = plan_job(job(recipe={"lr": 1e6}), DatasetRef(name="digits")).train
    nonsense = {**plan.attack.stored_spec, "scale": -1}
    many = {**plan.attack.stored_spec, "samples": 501}
    cases: dict[str, PlannedTask | dict[str, Any]]
    cases = {"too_small": too_small, "unknown": unknown, "wild": wild, "nonsense": nonsense, "many": many}
    messages = execute(plan.train, *(grant(t, name) for name, t in cases.items()), checkpoint=trained[0])
    failures = {name: answer(messages, name) for name in cases}
    failures["no_checkpoint"] = answer(execute(plan.train, grant(plan.attack)))
    for name, failed in failures.items():
        assert isinstance(failed, Failed), (name, failed)
        assert failed.kind == "configuration", (name, failed.message)
        assert "\n" not in failed.message
    assert "32x32" in getattr(failures["too_small"], "message", "")
    assert "scale" in getattr(failures["nonsense"], "message", "")
    assert "resnet9000" in getattr(failures["unknown"], "message", "")


def test_a_compiled_training_without_a_compiler_is_refused(
    execute: Execute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    train = plan_job(job(recipe={"compile": True}), DatasetRef(name="digits")).train
    failed = answer(execute(train, grant(train)))
    assert isinstance(failed, Failed), failed
    assert failed.kind == "configuration"
    assert "no C++ compiler (g++)" in failed.message
    assert "compile: false" in failed.message


def test_on_a_gpu_a_compiled_training_needs_what_triton_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def lacks(device_type: str) -> list[str]:
        asked.append(device_type)
        return ["C compiler (gcc)", "Python.h (python3-dev)"]

    monkeypatch.setattr(tasks, "lacks_for_compile", lacks)
    with pytest.raises(ScienceError, match=r"has no C compiler \(gcc\), no Python.h"):
        tasks._require_compiler(torch.device("cuda:1"))
    assert asked == ["cuda"]


@pytest.mark.parametrize(("how", "others"), [("deleted", False), ("damaged", False), ("deleted", True)])
def test_a_lost_checkpoint_is_made_again_when_a_job_that_needs_it_is_retried(
    lab: Any, how: str, others: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, from submitting to the numbers, with the dispatcher and threads for workers.

    Where its training gives other weights the second time, as on other hardware, no part of the job is of the first.
    """
    context = Context(lab.artifacts, tmp_path / "data")
    executor = InProcessExecutor(lambda bundle: run.execute(bundle, context))
    dispatcher = Dispatcher(lab.database, lab.artifacts, executor, Settings(home=tmp_path, ray_address=""), "d1")

    def ended(job_id: str) -> Any:
        deadline = time.monotonic() + 120
        while lab.job(job_id).state in LIVE_JOB and time.monotonic() < deadline:
            dispatcher.tick()
        return lab.job(job_id)

    first = lab.submit(recipe={"epochs": 1})
    assert ended(first).state == "succeeded"
    [left] = lab.rows(trainings)
    checkpoint = Path(lab.artifacts.root) / left.checkpoint_digest[:2] / left.checkpoint_digest
    if how == "deleted":
        checkpoint.unlink()
    else:
        checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    context.cache.clear()  # as in another worker
    second = lab.submit(recipe={"epochs": 1}, scale=5)
    failed = ended(second)
    assert failed.state == "failed"
    assert left.checkpoint_digest in failed.reason
    assert {row.missing_digest for row in lab.rows(attempts, end="missing_checkpoint")} == {left.checkpoint_digest}
    if others:
        as_before = tasks.build
        monkeypatch.setattr(tasks, "build", lambda name, data, seed: as_before(name, data, seed + 1))
    assert "retry the job" in failed.reason
    lab.service.retry_job(second, user="ann")
    assert ended(second).state == "succeeded", lab.job(second).reason
    assert lab.job(first).state == "succeeded"
    assert lab.rows(trainings, task_id=left.task_id)[0].checkpoint_digest == left.checkpoint_digest
    [made] = lab.rows(trainings, task_id=lab.job(second).train_task_id)
    assert (made.checkpoint_digest != left.checkpoint_digest) == others
    for job_id, of in ((first, left), (second, made)):
        row = lab.job(job_id)
        for part in (row.attack_task_id, row.baseline_task_id, row.control_task_id, row.measure_task_id):
            [attempt] = lab.rows(attempts, task_id=part, end="succeeded")
            assert attempt.provenance["weights_sha256"] == of.checkpoint_digest
    with lab.artifacts.local(made.checkpoint_digest):  # whole again
        executor.close()


def test_one_that_fails_does_not_stop_the_next(
    trained: tuple[ArtifactRef, list[Message]], execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_job(job(), DatasetRef(name="digits"))

    def broken(*_args: object, **_options: object) -> Outcome:
        raise RuntimeError("a bug")

    monkeypatch.setattr(tasks, "run_measure", broken)
    messages = execute(
        plan.train, grant(plan.closed_forms, "broken"), grant(plan.attack, "next"), checkpoint=trained[0]
    )
    failed = answer(messages, "broken")
    assert isinstance(failed, Failed)
    assert (failed.kind, failed.message) == ("error", "RuntimeError: a bug")
    assert "in broken" in failed.traceback
    assert outcome(messages, "next").numbers


def no_main_memory() -> Exception:
    """What torch itself raises."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 46, dtype=torch.uint8)
    return raised.value


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("2 GiB"), MemoryError(), no_main_memory(), OSError(errno.ENOMEM, "Cannot allocate memory")],
    ids=["device", "Python", "torch", "system"],
)
def test_running_out_of_memory_loses_the_attempt_and_frees_the_cache(
    error: Exception,
    trained: tuple[ArtifactRef, list[Message]],
    execute: Execute,
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = plan_job(job(), DatasetRef(name="digits"))

    def greedy(*_args: object, **_options: object) -> Outcome:
        raise error

    monkeypatch.setattr(tasks, "run_measure", greedy)
    lost = answer(execute(plan.train, grant(plan.closed_forms), checkpoint=trained[0]))
    assert isinstance(lost, Lost)
    assert lost.reason == "out_of_memory"
    assert len(context.cache) == 0


def test_memory_that_is_there_again_costs_no_attempt(
    trained: tuple[ArtifactRef, list[Message]], execute: Execute, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN finds no engine where its workspace does not fit; without what the process keeps at hand it does."""
    plan, computed, kept = plan_job(job(), DatasetRef(name="digits")), tasks.run_measure, []

    def greedy(*args: Any, **options: Any) -> Outcome:
        kept.append(len(context.cache))
        if len(kept) == 1:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return computed(*args, **options)

    context.cache.get("something else", lambda: ("large", 1 << 20))
    monkeypatch.setattr(tasks, "run_measure", greedy)
    messages = execute(plan.train, grant(plan.closed_forms), checkpoint=trained[0])
    assert outcome(messages, "t").numbers
    assert kept[1] < kept[0], "the cache was emptied before"


def test_what_ran_out_of_memory_is_tried_again_with_half_the_images_at_a_time(
    trained: tuple[ArtifactRef, list[Message]], execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no number depends on how many they are: the same bits, the rest to rounding."""
    plan, attack = plan_job(job(samples=300), DatasetRef(name="digits")), ATTACKS["pgd"]
    both = grant(plan.attack, "attack"), grant(plan.closed_forms, "closed forms")
    at_256 = execute(plan.train, *both, checkpoint=trained[0])
    seen: list[int] = []

    def greedy(model: Any, inputs: AttackInput, **options: Any) -> Any:
        seen.append(len(inputs.x))
        if len(inputs.x) > 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return attack(model, inputs, **options)

    monkeypatch.setitem(ATTACKS, "pgd", greedy)
    halved = execute(plan.train, *both, checkpoint=trained[0])
    assert seen == [256, 128, 128, 44]
    for name, images in (("attack", 128), ("closed forms", 256)):
        before, after = outcome(at_256, name), outcome(halved, name)
        assert (before.provenance["batch_images"], after.provenance["batch_images"]) == (256, images)
        assert after.bits == before.bits
        numbers = {key: value for key, value in before.numbers.items() if value is not None}
        assert {key: after.numbers[key] for key in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-7), name
    assert outcome(trained[1]).provenance["batch_images"] is None


def test_as_many_images_at_a_time_as_the_context_says(
    trained: tuple[ArtifactRef, list[Message]], context: Context
) -> None:
    plan = plan_job(job(samples=300, measures=["sam_sharpness"]), DatasetRef(name="digits"))
    tasks_of = {"attack": plan.attack, "closed forms": plan.closed_forms, "sam": plan.measures[0]}
    grants = tuple(grant(task, name) for name, task in tasks_of.items())
    of = Bundle("b", grants, plan.train.stored_spec, trained[0])
    at_100, at_256 = (list(run.execute(of, replace(context, batch_images=images))) for images in (100, 256))
    assert [outcome(at_100, name).provenance["batch_images"] for name in tasks_of] == [100, 100, None]
    assert outcome(at_100, "attack").bits == outcome(at_256, "attack").bits != {}
    assert outcome(at_100, "sam").numbers == outcome(at_256, "sam").numbers, "it takes 256 wherever it is"


def test_a_training_that_is_tried_again_in_place_goes_on_where_it_was(
    execute: Execute, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, trained, resumed = plan_job(job(), DatasetRef(name="digits")), tasks.run_training, []

    def greedy(task: Any, granted: Grant, data: Any, at: Context, report: Any) -> Outcome:
        resumed.append(granted.resume)

        def tell(progress: Progress) -> None:
            report(progress)
            if len(resumed) == 1 and progress.resume is not None:
                raise MemoryError

        return trained(task, granted, data, at, tell)

    monkeypatch.setattr(tasks, "run_training", greedy)
    messages = execute(plan.train, grant(plan.train))
    assert isinstance(answer(messages), Succeeded)
    saved = next(one.resume for one in messages if isinstance(one, Progress) and one.resume is not None)
    assert resumed == [None, saved]


def test_after_an_error_of_the_device_the_rest_is_given_back(
    trained: tuple[ArtifactRef, list[Message]], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "computes", lambda device: False)
    plan = plan_job(job(), DatasetRef(name="digits"))

    def broken(*_args: object, **_options: object) -> Outcome:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    monkeypatch.setattr(tasks, "run_measure", broken)
    both = (grant(plan.closed_forms, "broken"), grant(plan.attack, "next"))
    messages: list[Message] = []
    with pytest.raises(run.DeviceBroken):
        messages.extend(run.execute(Bundle("b", both, plan.train.stored_spec, trained[0]), context))
    # The device's or the task's doing: no error of the task, but a loss that counts as the death of its worker.
    why = "cpu gave up: AcceleratorError: an illegal memory access was encountered"
    assert answer(messages, "broken") == Lost("broken", 1, "worker_died", why)
    assert answer(messages, "next") == Lost("next", 1, "given_back", getattr(answer(messages, "next"), "message", ""))


def test_the_words_for_memory_of_a_broken_device_are_not_believed(
    trained: tuple[ArtifactRef, list[Message]], context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an illegal memory access cuBLAS makes no handle, as where its workspace does not fit."""
    tried: list[str] = []

    def broken(*_args: object, **_options: object) -> Outcome:
        tried.append("a measure")
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(devices, "computes", lambda device: False)
    monkeypatch.setattr(tasks, "run_measure", broken)
    plan = plan_job(job(), DatasetRef(name="digits"))
    both = (grant(plan.closed_forms, "broken"), grant(plan.attack, "next"))
    messages: list[Message] = []
    with pytest.raises(run.DeviceBroken):
        messages.extend(run.execute(Bundle("b", both, plan.train.stored_spec, trained[0]), context))
    assert isinstance(answer(messages, "broken"), (Failed, Lost))
    assert getattr(answer(messages, "next"), "reason", "") == "given_back"
    assert tried == ["a measure"], "what is broken is not tried again in place"


def test_nobody_asks_a_broken_device_for_its_memory_in_vain(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: torch.device) -> tuple[int, int]:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "mem_get_info", broken)
    assert not run._shared(replace(context, device=torch.device("cuda:0")))


class TestEnvironment:
    """What fails around a task is not the task's: its attempt is lost with the owner of the fault."""

    @pytest.fixture
    def lost(self, request: pytest.FixtureRequest) -> Callable[..., Lost]:
        def lose(context: Context, name: str = "digits", *, training: bool = False) -> Lost:
            plan = plan_job(job(dataset=name), DatasetRef(name=name))
            first = plan.train if training else plan.closed_forms
            grants = grant(first, "first"), grant(plan.attack, "next")
            checkpoint = None if training else request.getfixturevalue("trained")[0]
            bundle = Bundle("b", grants, plan.train.stored_spec, checkpoint)
            messages = list(run.execute(bundle, replace(context, node="n7", cache=Cache())))
            found = answer(messages, "first")
            assert isinstance(found, Lost), found
            given_back = answer(messages, "next")
            assert isinstance(given_back, Lost)
            assert (given_back.reason, given_back.fault) == ("given_back", None)
            return found

        return lose

    @pytest.mark.parametrize("root", ["absent", "empty", "a file"])
    def test_an_artifact_root_that_is_gone(
        self, context: Context, lost: Callable[..., Lost], tmp_path: Path, root: str
    ) -> None:
        away = tmp_path / "away"
        if root == "empty":
            away.mkdir()
        if root == "a file":
            away.write_text("")
        found = lost(replace(context, artifacts=Artifacts(str(away))))
        assert found.reason == "environment"
        assert found.fault == Fault("artifact_root", str(away), "n7")
        assert "mount" in found.message

    @pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
    def test_one_that_takes_no_bytes(
        self, context: Context, lost: Callable[..., Lost], monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        """By the error that the system gives: who runs the tests may write everywhere."""
        real = os.mkdir
        root = context.artifacts.root

        def refuses(path: Any, *args: Any, **options: Any) -> None:
            if str(path).startswith(root):
                raise OSError(number, os.strerror(number), str(path))
            real(path, *args, **options)

        monkeypatch.setattr(os, "mkdir", refuses)
        found = lost(context, training=True)
        full = number in (errno.ENOSPC, errno.EDQUOT)
        assert found.reason == ("disk_full" if full else "environment")
        assert found.fault == Fault("artifact_root", root, "n7", writing=True)
        assert os.strerror(number) in found.message

    def test_one_under_a_file(self, context: Context, lost: Callable[..., Lost], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        found = lost(replace(context, artifacts=Artifacts(str(tmp_path / "file" / "root"))), training=True)
        assert found.fault == Fault("artifact_root", str(tmp_path / "file" / "root"), "n7", writing=True)

    @pytest.mark.parametrize("name", ["cifar10", "mnist", "svhn"])
    @pytest.mark.parametrize("folder", ["absent", "a file", "of other files", "full"])
    def test_a_data_folder_that_has_not_got_the_files(
        self, context: Context, lost: Callable[..., Lost], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
        folder: str,
    ) -> None:  # fmt: skip
        data = tmp_path / "images"
        places = {"cifar10": "cifar-10-batches-py/test_batch", "mnist": "MNIST/raw/train-images-idx3-ubyte.gz"}
        if folder == "a file":
            data.write_text("")
        if folder == "of other files":
            path = data / places.get(name, "train_32x32.mat")
            path.parent.mkdir(parents=True)
            path.write_bytes(b"another file")

        def nowhere(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device") if folder == "full" else OSError("no network here")

        monkeypatch.setattr("urllib.request.urlopen", nowhere)
        found = lost(replace(context, data_dir=data), name, training=True)
        assert (found.reason, found.fault) == ("environment", Fault("data_folder", str(data), "n7", dataset=name))
        assert found.message.startswith(f"the data folder cannot give {name}: ")

    def test_a_library_that_is_not_there(
        self, context: Context, lost: Callable[..., Lost], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
        found = lost(context, "cifar10", training=True)
        assert (found.reason, found.fault) == ("environment", Fault("node", socket.gethostname(), "n7"))
        assert "cannot run tasks: ModuleNotFoundError" in found.message

    @pytest.mark.parametrize(
        ("number", "place"),
        [
            (errno.ENOSPC, None), (errno.ENOSPC, "elsewhere"), (errno.ENOENT, "temporary"), (errno.EACCES, "temporary"),
            (errno.EPERM, "temporary"), (errno.ENOTDIR, "temporary"), (errno.EROFS, "temporary"),
        ],
    )  # fmt: skip
    def test_no_room_for_what_is_temporary(
        self, number: int, place: str | None, context: Context, lost: Callable[..., Lost], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

        def full(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number), *([str(tmp_path / place / "file")] if place else []))

        monkeypatch.setattr(tasks, "run_measure", full)
        found = lost(context)
        assert (found.reason, found.fault) == ("environment", Fault("node", socket.gethostname(), "n7"))

    def test_no_temporary_folder_at_all(
        self, context: Context, lost: Callable[..., Lost], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def none(*_: object) -> str:
            raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

        monkeypatch.setattr(tasks, "run_measure", lambda *_, **__: tempfile.mkdtemp())
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_get_default_tempdir", none)
        found = lost(context)
        assert (found.reason, found.fault) == ("environment", Fault("node", socket.gethostname(), "n7"))

    @pytest.mark.parametrize("number", [errno.ENOENT, errno.EACCES, errno.EPERM])
    def test_a_file_elsewhere_that_is_away_or_closed_is_the_task_s_own_error(
        self, number: int, context: Context, trained: tuple[ArtifactRef, list[Message]], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

        def fail(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number), str(tmp_path / "elsewhere"))

        monkeypatch.setattr(tasks, "run_measure", fail)
        plan = plan_job(job(), DatasetRef(name="digits"))
        bundle = Bundle("b", (grant(plan.closed_forms),), plan.train.stored_spec, trained[0])
        failed = answer(list(run.execute(bundle, replace(context, cache=Cache()))))
        assert isinstance(failed, Failed)
        assert failed.kind == "error"

    def test_a_checkpoint_that_alone_is_missing_is_a_failure(
        self, context: Context, trained: tuple[ArtifactRef, list[Message]]
    ) -> None:
        """The root is there, and has other bytes: waiting would not bring these back."""
        plan = plan_job(job(), DatasetRef(name="digits"))
        context.artifacts.delete(trained[0].digest)
        context.artifacts.write_chunks("arrays", [b"other bytes"])
        bundle = Bundle("b", (grant(plan.closed_forms),), plan.train.stored_spec, trained[0])
        failed = answer(list(run.execute(bundle, replace(context, cache=Cache()))))
        assert isinstance(failed, Failed)
        assert failed.kind == "missing_checkpoint"


def test_closing_the_stream_stops_the_training(context: Context) -> None:
    train = plan_job(job(recipe={"epochs": 10_000}), DatasetRef(name="digits")).train
    stream: Iterator[list[Message]] = run.batches(Bundle("b", (grant(train),), train.stored_spec), context)
    assert isinstance(next(stream)[0], Started)
    while not any(isinstance(m, Progress) for m in next(stream)):
        pass
    started = time.monotonic()
    stream.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 5.0  # all its epochs take minutes
    assert not torch.are_deterministic_algorithms_enabled()  # what the training had set is put back


# It may come while a library opens a file, which is then closed by the garbage collector only.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("when", ["before it begins", "once it runs"])
def test_an_interrupt_while_the_thread_of_the_tasks_starts_stops_it(
    context: Context, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    began: list[threading.Thread] = []

    class Interrupted(threading.Thread):
        def start(self) -> None:
            began.append(self)
            if when == "once it runs":
                super().start()
            raise KeyboardInterrupt

    train = plan_job(job(recipe={"epochs": 10_000}), DatasetRef(name="digits")).train
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(run.batches(Bundle("b", (grant(train),), train.stored_spec), context))
    [thread] = began
    if when == "before it begins":
        threading.Thread.start(thread)
        thread.join(10)
    assert not thread.is_alive()


def test_progress_is_throttled_but_no_epoch_state_is_held_back(
    execute: Execute, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "PROGRESS_SECONDS", 1000.0)
    train = plan_job(job(recipe={"epochs": 5}), DatasetRef(name="digits")).train
    told = [m for m in execute(train, grant(train)) if isinstance(m, Progress)]
    assert sum(m.resume is not None for m in told) == 4
    assert len(told) <= 5


def test_the_cache_drops_what_was_used_longest_ago() -> None:
    cache = Cache(capacity_bytes=100)
    loads: list[str] = []

    def load(name: str, size: int) -> Callable[[], tuple[str, int]]:
        def do() -> tuple[str, int]:
            loads.append(name)
            return name, size

        return do

    for name, size in (("a", 40), ("b", 40), ("a", 40), ("c", 40), ("a", 40), ("b", 40)):
        assert cache.get(name, load(name, size)) == name
    assert loads == ["a", "b", "c", "b"]  # c pushed b out, because a had been used since
    assert cache.size_bytes <= 100
    assert cache.get("large", load("large", 1000)) == "large"  # larger than all: kept alone, else nothing could run
    assert len(cache) == 1
