"""What each kind of task does: from its spec to the science functions, and from their reports to an Outcome."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from service.errors import ArtifactMissing
from service.model.executor import ArtifactRef, Bits, Grant, Numbers, Outcome, Progress
from service.model.names import OWN_DATASET
from service.specs import AttackTask, ControlTask, DatasetRef, MeasureTask, TrainTask
from service.specs.attacks import AnyAttack, Transfer
from service.specs.attacks import parameters as attack_parameters
from service.specs.recipes import Imported
from service.specs.recipes import parameters as recipe_parameters
from workers.context import Context
from workers.devices import lacks_for_compile
from workers.provenance import conditions, machine
from workers.science import architectures
from workers.science.attacks import ATTACKS, WITH_TRAJECTORY, prepare
from workers.science.augmentation import Augmentation
from workers.science.bounds import bound_numbers, returned_bound_numbers
from workers.science.controls import Geometry, Twin, run_controls
from workers.science.datasets import (
    DATASETS,
    ImageData,
    Order,
    read_npz,
    sample_indices,
    to_unit,
    training_indices,
)
from workers.science.errors import DataFolderUnusable, DatasetCorrupt, DatasetMissing, ScienceError, WrongState
from workers.science.evaluation import PROBES, AttackReport, evaluate_attack, evaluate_clean
from workers.science.heads import linear_head, scale_head
from workers.science.imported import as_saved, is_at_chance, require_accuracy
from workers.science.sharpness import MEASURES, MeasureInput, MeasureReport
from workers.science.summaries import merged
from workers.science.training import EpochReport, State, StepReport, TrainReport, train
from workers.science.trajectory import Recorder, analyse
from workers.science.weights import load_state, load_weights, save_state, save_weights

Report = Callable[[Progress], None]
OnProgress = Callable[[int, int], None]
MEASURE_BATCH = 256
EPOCH_STATES_SHARE = 0.02
NUMERICS = ("precision", "channels_last", "fold_batch_norm", "compile")
COUNTED = frozenset({"n", "n_clean_correct", "n_non_finite"})  # the attack counts the same images


class CheckpointMissing(ArtifactMissing):
    """The checkpoint of a training is missing from the artifact root, or damaged: the training must run again."""

    def __init__(self, digest: str, why: ArtifactMissing) -> None:
        super().__init__(f"{why}; retry the job, and its training runs again")
        self.digest = digest


class Subject:
    """The data set of a training and, on request, its trained network; both from the cache if they are in it."""

    def __init__(self, training: TrainTask, checkpoint: ArtifactRef | None, context: Context) -> None:
        self.training, self.checkpoint, self.context = training, checkpoint, context
        key = (context.device, training.dataset)
        self.data, self.data_sha256 = context.cache.get(key, self._read)

    def network(self) -> nn.Module:
        """The trained network in eval mode, on the device, unscaled. It is shared, so it must not be changed."""
        if self.checkpoint is None:
            raise ArtifactMissing("the training of this network has left no checkpoint: submit its job again")
        key = (self.context.device, self.checkpoint.digest, self.training.architecture, self.training.dataset)
        return self.context.cache.get(key, self._load)

    def samples(self, n: int, order: Order) -> tuple[Tensor, Tensor, Tensor]:
        """`index, x, y` of the first `n` test images of the fixed permutation, or of the file."""
        index = torch.from_numpy(sample_indices(len(self.data.test_y), n, order))
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
                path = stack.enter_context(stored(self.context, self.checkpoint.digest))
            except ArtifactMissing as error:
                raise CheckpointMissing(self.checkpoint.digest, error) from error
            model = as_saved(model, path)
            load_weights(model, path)
        model.to(self.context.device).eval()
        return model, sum(tensor.nbytes for tensor in model.state_dict().values())


def run_training(task: TrainTask, grant: Grant, data: ImageData, context: Context, report: Report) -> Outcome:
    """Train, and save epoch states on the way. Without a fitting epoch state the training runs from its start."""
    if isinstance(task.recipe, Imported):
        return _imported(task, task.recipe, data, context)
    if task.recipe.compile:
        _require_compiler(context.device)
    recipe = task.recipe
    note: dict[str, Any] = {}
    here = {**machine(context.device, context.device_share), "after_epoch": 0}
    states = EpochStates(context, [here])

    def tell(fraction: float, detail: dict[str, Any], resume: ArtifactRef | None = None) -> None:
        report(Progress(grant.task_id, grant.attempt, fraction, {**detail, **note}, resume))

    def on_step(step: StepReport) -> None:
        tell((step.epoch - 1 + step.step / step.steps) / step.epochs, vars(step))

    def on_epoch(epoch: EpochReport, state: Callable[[], State]) -> None:
        resume = states.save(state) if epoch.epoch < epoch.epochs else None
        tell(epoch.epoch / epoch.epochs, vars(epoch), resume)

    state = None
    if grant.resume is not None:
        try:
            with stored(context, grant.resume.digest) as path:
                state = load_state(path)
            note["resumed_after_epoch"] = len(state.get("reports", ()))
            states.machines = _machines_of(state, here)
        except (ArtifactMissing, ScienceError) as error:
            note["started_anew"] = str(error)
    try:
        model, done = _trained(task, data, context, state, on_epoch, on_step)
    except WrongState as error:
        note, states.machines = {"started_anew": str(error)}, [here]
        model, done = _trained(task, data, context, None, on_epoch, on_step)
    checkpoint = context.artifacts.write("checkpoint", lambda path: save_weights(path, model))
    numbers, curves = _training_numbers(done, model)
    made: dict[str, Any] = {**conditions(model, recipe.precision), **done.flags, "machines": states.machines}
    return Outcome(numbers, curves, artifacts=(checkpoint,), provenance=made)


def _trained(
    task: TrainTask,
    data: ImageData,
    context: Context,
    resume: State | None,
    on_epoch: Callable[[EpochReport, Callable[[], State]], None],
    on_step: Callable[[StepReport], None],
) -> tuple[nn.Module, TrainReport]:
    """The network that the recipe makes, from the start or from the state `resume`. Errors as `train`."""
    recipe, model = task.recipe, build(task.architecture, data, task.seed)
    assert not isinstance(recipe, Imported)
    augmentation = Augmentation(recipe.crop_padding or 0, bool(recipe.flip), recipe.rotation_degrees or 0.0)
    done = train(
        model,
        data,
        seed=task.seed,
        device=context.device,
        resume=resume,
        on_epoch=on_epoch,
        on_step=on_step,
        recipe=recipe.name,
        recipe_params=recipe_parameters(recipe),
        augmentation=augmentation,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        train_samples=recipe.train_samples,
        keep=getattr(recipe, "keep", "last"),
        held_out=getattr(recipe, "held_out", 0),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        schedule=recipe.schedule,
        precision=recipe.precision,
        channels_last=recipe.channels_last,
        compile=recipe.compile,
        cuda_graphs=recipe.cuda_graphs,
    )
    return model, done


class EpochStates:
    """The states that a training leaves on the way, each with the `machines` that it has run on so far.

    One is saved no sooner than `context.epoch_state_seconds` after the one before, and only while saving has taken no
    more than `EPOCH_STATES_SHARE` of the time. With 0 seconds, one is saved after every epoch.
    """

    def __init__(
        self, context: Context, machines: list[dict[str, Any]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.context, self.machines, self._clock = context, machines, clock
        self._started = self._saved = clock()
        self._spent = 0.0

    def save(self, state: Callable[[], State]) -> ArtifactRef | None:
        """Save the state, if it is time."""
        now, every = self._clock(), self.context.epoch_state_seconds
        too_dear = self._spent > EPOCH_STATES_SHARE * (now - self._started)
        if every > 0 and (too_dear or now - self._saved < every):
            return None
        whole = {**state(), "machines": self.machines}
        saved = self.context.artifacts.write("epoch_state", lambda path: save_state(path, whole))
        self._saved = self._clock()
        self._spent += self._saved - now
        return saved


def _machines_of(state: State, here: dict[str, Any]) -> list[dict[str, Any]]:
    """The machines that the training has run on, this one last. A machine that resumes its own training stands once."""
    before = list(state.get("machines", ()))
    if before and {**before[-1], "after_epoch": 0} == here:
        return before
    return [*before, {**here, "after_epoch": len(state.get("reports", ()))}]


def _require_compiler(device: torch.device) -> None:
    if lacks := lacks_for_compile(device.type):
        raise ScienceError(
            f"compile: true fails on this worker's machine, which has no {', no '.join(lacks)}: install that there and "
            "retry the job, or submit it with compile: false"
        )


def _imported(task: TrainTask, recipe: Imported, data: ImageData, context: Context) -> Outcome:
    """Nothing is trained: the registered weights are the checkpoint. They are evaluated on the test images."""
    started = time.monotonic()
    model = build(task.architecture, data, task.seed)
    with stored(context, recipe.weights_sha256 or "") as path:
        size_bytes = path.stat().st_size
        model = as_saved(model, path)
        load_weights(model, path)
    model.to(context.device).eval()
    clean = evaluate_clean(model, data.test_x, data.test_y, device=context.device)
    require_accuracy(clean.accuracy, len(data.test_y), recipe.expected_clean_accuracy, recipe.tolerance)
    of_test = _test_numbers(model, clean.accuracy, clean.loss, clean.top5_accuracy)
    more: Numbers = {
        "clean_accuracy_at_chance": int(is_at_chance(clean.correct, data.test_y)),
        "test_n_non_finite": int(clean.non_finite.sum()),
        "seconds": time.monotonic() - started,
    }
    assert recipe.weights_sha256 is not None
    weights = ArtifactRef(recipe.weights_sha256, size_bytes, "checkpoint")
    return Outcome(merged(of_test, more), artifacts=(weights,), provenance=conditions(model))


def run_measure(task: MeasureTask, subject: Subject, on_progress: OnProgress) -> Outcome:
    model = scale_head(subject.network(), task.scale, scale_bias=task.scale_bias)
    params = {name: getattr(task.measure, name) for name in type(task.measure).model_fields if name != "type"}
    report = _measure(task.measure.type, model, subject, task.scale, (task.samples, task.order), params, on_progress)
    made = conditions(subject.network())
    made |= {"batch_images": subject.context.batch_images} if task.measure.type == "closed_forms" else {}
    return Outcome(report.numbers, {"measure": report.curves} if report.curves else {}, provenance=made)


def run_attack(task: AttackTask, subject: Subject, source: Subject | None, on_progress: OnProgress) -> Outcome:
    """The attack, its trajectory if there is one, the bounds, and the closed forms at x_0.

    The bounds are about the path, if its trajectory starts at the image; else about the way from the image to the
    returned example. So every result has `bound_...` numbers.
    Images with NaN or infinities are counted (`n_non_finite`). Of these numbers only the accuracies include them.
    There is no trajectory for attacks without iterates, for `judge: any_step`, which leaves out broken examples, for
    gradients in bf16, whose features are not the float32 ones, and for a compiled network, which gives no features.
    """
    if getattr(_gradients_of(task.attack), "compile", False):
        _require_compiler(subject.context.device)
    network = subject.network()
    model = scale_head(network, task.scale, scale_bias=task.scale_bias)
    head = linear_head(model)
    recorder = Recorder(head.weight, head.bias) if _can_be_followed(task.attack) else None
    report = _attacked(task, model, subject, source, recorder, on_progress)
    chosen = (task.samples, task.order)
    at_start = _measure("closed_forms", model, subject, task.scale, chosen, {}, None, train=False).numbers
    parts = [report.numbers, {name: value for name, value in at_start.items() if name not in COUNTED}]
    curves: dict[str, Any] = {}
    arrays: tuple[ArtifactRef, ...] = ()
    trajectory = None if recorder is None else recorder.trajectory(report.bits["non_finite"])
    if trajectory is not None:
        along, curves["trajectory"] = analyse(trajectory, getattr(task.attack, "norm", "l2"))
        parts.append(along)
        if task.arrays:
            arrays = (subject.context.artifacts.write("arrays", partial(save_file, trajectory.tensors())),)
    if trajectory is not None and trajectory.starts_at_image:
        parts.append(bound_numbers(trajectory, head.weight, head.bias))
    elif report.returned is not None:
        parts.append(returned_bound_numbers(report.returned, head.weight, head.bias))
    done_with = conditions(network, getattr(_gradients_of(task.attack), "precision", "float32"))
    done_with["batch_images"] = subject.context.batch_images
    return Outcome(merged(*parts), curves, _packed(report.bits), arrays, done_with)


def _attacked(
    task: AttackTask,
    model: nn.Module,
    subject: Subject,
    source: Subject | None,
    recorder: Recorder | None,
    on_progress: OnProgress,
) -> AttackReport:
    """The attack alone, on `model`, the network of `subject` with its head scaled."""
    index, x, y = subject.samples(task.samples, task.order)
    params, numerics = _attack_arguments(task, (source or subject).network(), subject)
    try:
        return evaluate_attack(
            model,
            x,
            y,
            index,
            attack=task.attack.type,
            params=params,
            attack_seed=task.attack_seed,
            scale=task.scale,
            batch_size=subject.context.batch_images,
            device=subject.context.device,
            observer_factory=recorder,
            on_progress=on_progress,
            **numerics,
        )
    except ValueError as error:  # parameters that make no sense together
        raise ScienceError(str(error)) from error


def run_control(task: ControlTask, subject: Subject, on_progress: OnProgress) -> Outcome:
    index, x, y = subject.samples(task.samples, task.order)
    geometry = Geometry(task.norm, task.eps, task.step_size, task.steps)
    device = subject.context.device
    twin = Twin(task.twin.type, attack_parameters(task.twin)) if task.twin is not None else None
    report = run_controls(subject.network(), x, y, index, geometry, twin=twin, device=device, on_progress=on_progress)
    return Outcome(report.numbers, bits=_packed(report.bits), provenance=conditions(subject.network()))


def build(architecture: str, data: ImageData, seed: int) -> nn.Module:
    if architecture not in architectures.ARCHITECTURES:
        raise ScienceError(f"this worker knows no architecture {architecture!r}: it runs other code than the service")
    return architectures.build(architecture, data.shape, data.n_classes, seed)


def read_dataset(dataset: DatasetRef, context: Context) -> ImageData:
    """By name from the data folder; a lab's own (`npz:NAME`) from the artifacts that its digests name.

    Raises `DataFolderUnusable` if the files are not here: another machine may have them, or this one later.
    """
    if not dataset.name.startswith(OWN_DATASET):
        if dataset.name not in DATASETS:
            raise ScienceError(f"this worker knows no data set {dataset.name!r}: it runs other code than the service")
        try:
            return DATASETS[dataset.name].read(context.data_dir)
        except (DatasetMissing, DatasetCorrupt, OSError) as error:
            raise DataFolderUnusable(f"the data folder cannot give {dataset.name}: {error}") from error
    digests = {"train.npz": dataset.train_sha256, "test.npz": dataset.test_sha256}
    with tempfile.TemporaryDirectory(prefix="uncanny-") as parent, ExitStack() as stack:
        folder = Path(parent) / dataset.name.removeprefix(OWN_DATASET)
        folder.mkdir()
        for file, digest in digests.items():
            (folder / file).symlink_to(stack.enter_context(stored(context, digest or "")).absolute())
        return read_npz(folder)


@contextmanager
def stored(context: Context, digest: str) -> Iterator[Path]:
    """A local file with the bytes of an artifact.

    Raises `ArtifactMissing` if this artifact is missing or damaged, `ArtifactRootUnusable` if the whole root is.
    """
    with ExitStack() as stack:
        try:
            path = stack.enter_context(context.artifacts.local(digest))
        except ArtifactMissing:
            context.artifacts.require_root()
            raise
        yield path


def _training_numbers(done: TrainReport, model: nn.Module) -> tuple[Numbers, dict[str, Any]]:
    """Training numbers are those of the epoch whose weights are kept."""
    numbers: Numbers = {
        "train_accuracy": done.kept.accuracy,
        "train_loss": done.kept.loss,
        "train_samples": done.train_samples,
        "dropped_samples": done.dropped_samples,
        "kept_epoch": done.kept_epoch,
        "held_out_robust_accuracy": done.kept.held_out_robust_accuracy,
        "epochs": len(done.epochs),
        "seconds": done.seconds,
        "images_per_second": done.train_samples * len(done.epochs) / done.seconds,
    }
    names = ["epoch", "lr", "loss", "accuracy", "images_per_second", "seconds"]
    names += ["held_out_robust_accuracy"] if done.kept.held_out_robust_accuracy is not None else []
    curves = {"epochs": {name: [getattr(epoch, name) for epoch in done.epochs] for name in names}}
    of_test = _test_numbers(model, done.clean_accuracy, done.clean_loss, done.top5_accuracy)
    return merged(of_test, numbers), curves


def _test_numbers(model: nn.Module, accuracy: float, loss: float, top5_accuracy: float | None) -> Numbers:
    """What a trained and an imported network both have, from `evaluate_clean` on all test images."""
    return {
        "test_accuracy": accuracy,
        "test_loss": loss,
        "test_top5_accuracy": top5_accuracy,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def _measure(
    name: str,
    model: nn.Module,
    subject: Subject,
    scale: float,
    chosen: tuple[int, Order],
    params: dict[str, Any],
    on_progress: OnProgress | None,
    *,
    train: bool = True,
) -> MeasureReport:
    """A measure on the first `chosen` images of each split, or on its own number of them (`images`).

    Of the training split, only on those that the network was trained on: the first of the same order.
    """
    (samples, order), data = chosen, subject.data
    n = int(params.get("images", samples))
    trained_on = _trained_on(subject, order)[: n if train else 0]
    tested_on = sample_indices(len(data.test_y), min(n, len(data.test_y)), order)
    train_split, test_split = (
        (to_unit(x[index]), y[index])
        for x, y, index in (
            (data.train_x, data.train_y, torch.from_numpy(trained_on)),
            (data.test_x, data.test_y, torch.from_numpy(tested_on)),
        )
    )
    batch_size = MEASURE_BATCH  # other measures differentiate twice, which takes more memory
    if name == "closed_forms":
        params, batch_size = {**params, "scale": scale}, subject.context.batch_images
    inputs = MeasureInput(*train_split, *test_split, batch_size=batch_size, on_progress=on_progress)
    try:
        return MEASURES[name](model, inputs, **params)
    except ValueError as error:  # parameters that make no sense together
        raise ScienceError(str(error)) from error


def _trained_on(subject: Subject, order: Order) -> NDArray[np.int64]:
    """Positions in the training split of the images that the network was trained on, in this order."""
    recipe, n = subject.training.recipe, len(subject.data.train_y)
    index = training_indices(n, getattr(recipe, "train_samples", None), getattr(recipe, "held_out", 0))[0]
    return np.sort(index) if order == "file" else index


def _can_be_followed(attack: AnyAttack) -> bool:
    plain = getattr(attack, "precision", "float32") == "float32" and not getattr(attack, "compile", False)
    return attack.type in WITH_TRAJECTORY and plain and getattr(attack, "judge", "final") == "final"


def _attack_arguments(task: AttackTask, made_on: nn.Module, subject: Subject) -> tuple[dict[str, Any], dict[str, Any]]:
    """The attack's own parameters, and how its gradients are taken; `made_on` is the network of a transfer's source."""
    attack = task.attack
    if not isinstance(attack, Transfer):
        return attack_parameters(attack), {name: getattr(attack, name) for name in NUMERICS}
    source = scale_head(made_on, attack.source_scale, scale_bias=task.scale_bias)
    numerics = {name: getattr(attack.attack, name) for name in NUMERICS}
    probe = to_unit(subject.samples(min(PROBES, task.samples), task.order)[1])
    climbed = prepare(source, probe=probe, batch_size=min(subject.context.batch_images, task.samples), **numerics)
    made_by = {"source_attack": ATTACKS[attack.attack.type], "source_scale": attack.source_scale}
    return {"source": climbed, **made_by, **attack_parameters(attack.attack)}, {}


def _gradients_of(attack: AnyAttack) -> AnyAttack:
    """The attack that takes the gradients: of a transfer, the one that makes its examples."""
    return attack.attack if isinstance(attack, Transfer) else attack


def _packed(bits: dict[str, Tensor]) -> dict[str, Bits]:
    return {name: Bits(len(of), np.packbits(of.numpy()).tobytes()) for name, of in bits.items()}
