"""What each kind of task does: from its spec to the science functions, and from their reports to an Outcome."""

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from service.errors import ArtifactMissing
from service.executor import ArtifactRef, Bits, Grant, Numbers, Outcome, Progress
from service.specs import AttackTask, ControlTask, DatasetRef, MeasureTask, TrainTask
from service.specs.attacks import AnyAttack, Transfer
from service.specs.attacks import parameters as attack_parameters
from service.specs.recipes import Imported
from service.specs.recipes import parameters as recipe_parameters
from workers.context import Context
from workers.science import architectures
from workers.science.attacks import ATTACKS, WITH_TRAJECTORY, prepare
from workers.science.augmentation import Augmentation
from workers.science.bounds import bound_numbers
from workers.science.controls import Geometry, Twin, run_controls
from workers.science.datasets import DATASETS, ImageData, read_npz, sample_indices, to_unit
from workers.science.errors import ScienceError, WrongState
from workers.science.evaluation import evaluate_attack, evaluate_clean
from workers.science.heads import linear_head, scale_head
from workers.science.imported import as_saved, is_at_chance, require_accuracy
from workers.science.sharpness import MEASURES, MeasureReport
from workers.science.training import EpochReport, State, StepReport, TrainReport, train
from workers.science.trajectory import Recorder, analyse
from workers.science.weights import load_state, load_weights, save_state, save_weights

Report = Callable[[Progress], None]
OnProgress = Callable[[int, int], None]
MEASURE_BATCH = 256
NUMERICS = ("precision", "channels_last", "fold_batch_norm")


class CheckpointMissing(ArtifactMissing):
    """The weights that a training left are not under the artifact root any more, or damaged: it must run again."""


class Subject:
    """The data set of a training and, once asked for, the network that it left; both from the cache where they are."""

    def __init__(self, training: TrainTask, checkpoint: ArtifactRef | None, context: Context) -> None:
        self.training, self.checkpoint, self.context = training, checkpoint, context
        key = (context.device, training.dataset)
        self.data, self.data_sha256 = context.cache.get(key, self._read)

    def network(self) -> nn.Module:
        """In eval mode, on the device, unscaled; shared, so it must not be changed."""
        if self.checkpoint is None:
            raise ArtifactMissing("the training of this network has left no checkpoint: submit its job again")
        key = (self.context.device, self.checkpoint.digest, self.training.architecture, self.training.dataset)
        return self.context.cache.get(key, self._load)

    def samples(self, n: int) -> tuple[Tensor, Tensor, Tensor]:
        """`index, x, y` of the first `n` test images of the fixed permutation."""
        index = torch.from_numpy(sample_indices(len(self.data.test_y), n))
        return index, self.data.test_x[index], self.data.test_y[index]

    def _read(self) -> tuple[tuple[ImageData, str], int]:
        data = read_dataset(self.training.dataset, self.context)
        size = sum(tensor.nbytes for tensor in (data.train_x, data.train_y, data.test_x, data.test_y))
        return (data.to(self.context.device), data.sha256()), size

    def _load(self) -> tuple[nn.Module, int]:
        assert self.checkpoint is not None
        model = build(self.training.architecture, self.data, self.training.seed)
        with ExitStack() as stack:
            try:
                path = stack.enter_context(self.context.artifacts.local(self.checkpoint.digest))
            except ArtifactMissing as error:
                raise CheckpointMissing(f"{error}; retry the job, and its training runs again") from error
            model = as_saved(model, path)
            load_weights(model, path)
        model.to(self.context.device).eval()
        return model, sum(tensor.nbytes for tensor in model.state_dict().values())


def run_training(task: TrainTask, grant: Grant, data: ImageData, context: Context, report: Report) -> Outcome:
    """Train, saving epoch states on the way; a lost or foreign epoch state costs time, not the training."""
    if isinstance(task.recipe, Imported):
        return _imported(task, task.recipe, data, context)
    note: dict[str, Any] = {}
    saved_at = time.monotonic()

    def tell(fraction: float, detail: dict[str, Any], resume: ArtifactRef | None = None) -> None:
        report(Progress(grant.task_id, grant.attempt, fraction, {**detail, **note}, resume))

    def on_step(step: StepReport) -> None:
        tell((step.epoch - 1 + step.step / step.steps) / step.epochs, vars(step))

    def on_epoch(epoch: EpochReport, state: Callable[[], State]) -> None:
        nonlocal saved_at
        resume = None
        if epoch.epoch < epoch.epochs and time.monotonic() - saved_at >= context.epoch_state_seconds:
            resume = context.artifacts.write("epoch_state", lambda path: save_state(path, state()))
            saved_at = time.monotonic()
        tell(epoch.epoch / epoch.epochs, vars(epoch), resume)

    def attempt(resume: State | None) -> tuple[nn.Module, TrainReport]:
        recipe, model = trained, build(task.architecture, data, task.seed)
        augmentation = Augmentation(recipe.crop_padding or 0, bool(recipe.flip), recipe.rotation_degrees or 0.0)
        done = train(
            model, data, seed=task.seed, device=context.device, resume=resume, on_epoch=on_epoch, on_step=on_step,
            recipe=recipe.name, recipe_params=recipe_parameters(recipe), augmentation=augmentation,
            epochs=recipe.epochs, batch_size=recipe.batch_size, train_samples=recipe.train_samples,
            lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, schedule=recipe.schedule,
            precision=recipe.precision, channels_last=recipe.channels_last, compile=recipe.compile,
        )  # fmt: skip
        return model, done

    trained = task.recipe
    state = None
    if grant.resume is not None:
        try:
            with context.artifacts.local(grant.resume.digest) as path:
                state = load_state(path)
            note["resumed_after_epoch"] = len(state.get("reports", ()))
        except (ArtifactMissing, ScienceError) as error:
            note["started_anew"] = str(error)
    try:
        model, done = attempt(state)
    except WrongState as error:
        note = {"started_anew": str(error)}
        model, done = attempt(None)
    checkpoint = context.artifacts.write("checkpoint", lambda path: save_weights(path, model))
    return Outcome(*_training_numbers(done, model), artifacts=(checkpoint,))


def _imported(task: TrainTask, recipe: Imported, data: ImageData, context: Context) -> Outcome:
    """Nothing is trained: the registered weights are looked at on the test images, and are the checkpoint."""
    started = time.monotonic()
    model = build(task.architecture, data, task.seed)
    with context.artifacts.local(recipe.weights_sha256 or "") as path:
        size_bytes = path.stat().st_size
        model = as_saved(model, path)
        load_weights(model, path)
    model.to(context.device).eval()
    clean = evaluate_clean(model, data.test_x, data.test_y, device=context.device)
    require_accuracy(clean.accuracy, len(data.test_y), recipe.expected_clean_accuracy, recipe.tolerance)
    numbers: Numbers = {
        "test_accuracy": clean.accuracy,
        "clean_accuracy_at_chance": int(is_at_chance(clean.correct, data.test_y)),
        "test_loss": clean.loss,
        "test_top5_accuracy": clean.top5_accuracy,
        "seconds": time.monotonic() - started,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    assert recipe.weights_sha256 is not None
    return Outcome(numbers, artifacts=(ArtifactRef(recipe.weights_sha256, size_bytes, "checkpoint"),))


def run_measure(task: MeasureTask, subject: Subject, on_progress: OnProgress) -> Outcome:
    model = scale_head(subject.network(), task.scale, scale_bias=task.scale_bias)
    params = {name: getattr(task.measure, name) for name in type(task.measure).model_fields if name != "type"}
    found = _measure(task.measure.type, model, subject, task.scale, task.samples, params, on_progress)
    return Outcome(found.numbers, {"measure": found.curves} if found.curves else {})


def run_attack(task: AttackTask, subject: Subject, source: Subject | None, on_progress: OnProgress) -> Outcome:
    """The attack, its trajectory where it can be followed, and the closed forms at x_0.

    There is no trajectory for attacks without iterates, for `judge: any_step`, which leaves out what is broken, and for
    gradients in bf16, whose features are not the float32 ones.
    """
    network = subject.network()
    model = scale_head(network, task.scale, scale_bias=task.scale_bias)
    head = linear_head(model)
    index, x, y = subject.samples(task.samples)
    recorder = Recorder(head.weight, head.bias) if _can_be_followed(task.attack) else None
    params, numerics = _attack_arguments(task, (source or subject).network(), subject)
    try:
        found = evaluate_attack(
            model, x, y, index, attack=task.attack.type, params=params, attack_seed=task.attack_seed, scale=task.scale,
            device=subject.context.device, observer_factory=recorder, on_progress=on_progress, **numerics,
        )  # fmt: skip
    except ValueError as error:  # parameters that make no sense together
        raise ScienceError(str(error)) from error
    at_start = _measure("closed_forms", model, subject, task.scale, task.samples, {}, None, train=False)
    numbers: Numbers = dict(at_start.numbers)
    curves: dict[str, Any] = {}
    arrays: tuple[ArtifactRef, ...] = ()
    if recorder is not None:
        trajectory = recorder.trajectory()
        along, curves["trajectory"] = analyse(trajectory, getattr(task.attack, "norm", "l2"))
        numbers |= along
        if trajectory.starts_at_image:  # the bounds are about the way from there
            numbers |= bound_numbers(trajectory, head.weight, head.bias)
        if task.arrays:
            arrays = (subject.context.artifacts.write("arrays", partial(save_file, trajectory.tensors())),)
    return Outcome(numbers | found.numbers, curves, _packed(found.bits), arrays)


def run_control(task: ControlTask, subject: Subject, on_progress: OnProgress) -> Outcome:
    index, x, y = subject.samples(task.samples)
    geometry = Geometry(task.norm, task.eps, task.step_size, task.steps)
    device = subject.context.device
    twin = Twin(task.twin.type, attack_parameters(task.twin)) if task.twin is not None else None
    found = run_controls(subject.network(), x, y, index, geometry, twin=twin, device=device, on_progress=on_progress)
    return Outcome(found.numbers, bits=_packed(found.bits))


def build(architecture: str, data: ImageData, seed: int) -> nn.Module:
    if architecture not in architectures.ARCHITECTURES:
        raise ScienceError(f"this worker knows no architecture {architecture!r}: it runs other code than the service")
    return architectures.build(architecture, data.shape, data.n_classes, seed)


def read_dataset(dataset: DatasetRef, context: Context) -> ImageData:
    """By name from the data folder; a lab's own (`npz:NAME`) from the artifacts that its digests name."""
    if not dataset.name.startswith("npz:"):
        if dataset.name not in DATASETS:
            raise ScienceError(f"this worker knows no data set {dataset.name!r}: it runs other code than the service")
        return DATASETS[dataset.name].read(context.data_dir)
    digests = {"train.npz": dataset.train_sha256, "test.npz": dataset.test_sha256}
    with tempfile.TemporaryDirectory(prefix="uncanny-") as parent, ExitStack() as stack:
        folder = Path(parent) / dataset.name.removeprefix("npz:")
        folder.mkdir()
        for file, digest in digests.items():
            (folder / file).symlink_to(stack.enter_context(context.artifacts.local(digest or "")).absolute())
        return read_npz(folder)


def _training_numbers(done: TrainReport, model: nn.Module) -> tuple[Numbers, dict[str, Any]]:
    last = done.epochs[-1]
    numbers: Numbers = {
        "test_accuracy": done.clean_accuracy,
        "test_loss": done.clean_loss,
        "test_top5_accuracy": done.top5_accuracy,
        "train_accuracy": last.accuracy,
        "train_loss": last.loss,
        "train_samples": done.train_samples,
        "epochs": len(done.epochs),
        "seconds": done.seconds,
        "images_per_second": done.train_samples * len(done.epochs) / done.seconds,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    names = ("epoch", "lr", "loss", "accuracy", "images_per_second", "seconds")
    return numbers, {"epochs": {name: [getattr(epoch, name) for epoch in done.epochs] for name in names}}


def _measure(
    name: str, model: nn.Module, subject: Subject, scale: float, samples: int, params: dict[str, Any],
    on_progress: OnProgress | None, *, train: bool = True,
) -> MeasureReport:  # fmt: skip
    """A measure on the first `samples` images of each split, or on as many as it asks for itself (`images`).

    Of the training split, only on those that the network was trained on: the first of the same permutation.
    """
    data, n = subject.data, int(params.get("images", samples))
    trained_on = getattr(subject.training.recipe, "train_samples", None) or len(data.train_y)
    splits = []
    of_train = min(n, trained_on) if train else 0
    for x, y, wanted in ((data.train_x, data.train_y, of_train), (data.test_x, data.test_y, n)):
        index = torch.from_numpy(sample_indices(len(y), min(wanted, len(y)))) if wanted else torch.zeros(0).long()
        splits += [to_unit(x[index]), y[index]]
    if name == "closed_forms":
        params = {**params, "scale": scale}
    try:
        return MEASURES[name](
            model, *splits, **{"seed": 0, "batch_size": MEASURE_BATCH, **params}, on_progress=on_progress
        )
    except ValueError as error:  # parameters that make no sense together
        raise ScienceError(str(error)) from error


def _can_be_followed(attack: AnyAttack) -> bool:
    plain = getattr(attack, "precision", "float32") == "float32" and getattr(attack, "judge", "final") == "final"
    return attack.type in WITH_TRAJECTORY and plain


def _attack_arguments(task: AttackTask, made_on: nn.Module, subject: Subject) -> tuple[dict[str, Any], dict[str, Any]]:
    """The attack's own parameters, and how its gradients are taken; `made_on` is the network of a transfer's source."""
    attack = task.attack
    if not isinstance(attack, Transfer):
        return attack_parameters(attack), {name: getattr(attack, name) for name in NUMERICS}
    source = scale_head(made_on, attack.source_scale, scale_bias=task.scale_bias)
    numerics = {name: getattr(attack.attack, name) for name in NUMERICS}
    probe = to_unit(subject.samples(min(2, task.samples))[1])
    climbed = prepare(source, probe=probe, **numerics)
    made_by = {"source_attack": ATTACKS[attack.attack.type], "scale": attack.source_scale}
    return {"source": climbed, **made_by, **attack_parameters(attack.attack)}, {}


def _packed(bits: dict[str, Tensor]) -> dict[str, Bits]:
    return {name: Bits(len(of), np.packbits(of.numpy()).tobytes()) for name, of in bits.items()}
