"""Weights made elsewhere: checked and fitted to a known architecture once, and named by jobs from then on."""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from service.errors import Conflict, InvalidSpec, UncannyError
from service.lab.artifacts import Artifacts
from service.model.events import EventKind
from service.model.executor import ArtifactRef
from service.model.json import JsonMapping, JsonObject
from service.model.names import DIGEST, OWN_DATASET, REGISTERED, REGISTERED_RULE
from service.model.records import RegisteredCheckpoint
from service.model.times import iso
from service.specs import catalog
from service.specs.recipes import Imported
from service.store import Connection, Database, artifact_index, checkpoints, datasets, history
from service.store.history import Event

TOLERANCE = 0.01  # of an expected accuracy (science/README.md, "Controls")
FITTING_SECONDS = 300  # to import PyTorch, to build the network and to save it
TURN_SECONDS = 30  # how long a request waits while other weights are checked
FITTING = threading.BoundedSemaphore(2)  # processes at once: each has PyTorch and a network in memory


class NotChecked(UncannyError):
    """The weights could not be checked right now. They may be right or wrong."""


@dataclass(frozen=True)
class Upload:
    """An upload to register: a safetensors file for `architecture` on images and classes of `dataset`.

    `keys` maps prefixes of the file's tensor names to the network's; `mean` and `std` are one number a channel.
    `expected_clean_accuracy`, on all test images, is checked before anything else is computed with the weights.
    """

    name: str
    architecture: str
    dataset: str
    uploaded_sha256: str
    keys: Mapping[str, str]
    mean: Sequence[float]
    std: Sequence[float]
    expected_clean_accuracy: float | None = None
    tolerance: float | None = None

    @property
    def as_row(self) -> JsonObject:
        """The upload as columns of a checkpoint."""
        tolerance = TOLERANCE if self.tolerance is None else self.tolerance
        return {
            **vars(self),
            "keys": dict(self.keys),
            "mean": list(self.mean),
            "std": list(self.std),
            "tolerance": None if self.expected_clean_accuracy is None else tolerance,
        }


class TensorsDiffer(InvalidSpec):
    """The tensors of a file are not those of the network; `tensors` has the wrong ones by kind of fault."""

    def __init__(self, sentence: str, tensors: JsonMapping) -> None:
        self.tensors = tensors
        super().__init__([("/weights_sha256", sentence)])


def register(database: Database, artifacts: Artifacts, upload: Upload, *, user: str) -> JsonObject:
    """Check the weights against the network, in a process of its own that has PyTorch, and store the file it saves.

    The same upload again changes nothing. Raises `InvalidSpec` for weights that do not fit, `Conflict` for a name that
    other weights have, `ArtifactMissing`, `NotChecked`.
    """
    _check(upload)
    requested = upload.as_row
    with database.read() as connection:
        shape, classes = _shape(connection, upload.dataset)
        existing = checkpoints.named(connection, upload.name)
    if existing is not None:
        return _the_same(existing, requested)
    ref, made = _fit(artifacts, {**requested, "shape": shape, "classes": classes})
    with database.write() as connection:
        now = database.now(connection)
        if (existing := checkpoints.named(connection, upload.name)) is not None:  # another request was faster
            return _the_same(existing, requested)
        size = dict(zip(("channels", "height", "width"), shape, strict=True))
        weights = {"weights_sha256": ref.digest, "size_bytes": ref.size_bytes, **made}
        row = {**requested, **size, "classes": classes, **weights, "created_by": user, "created_at": now}
        checkpoints.register(connection, row)
        artifact_index.keep_uploads(connection, now, "checkpoint", {ref.digest: ref.size_bytes})
        data = {"name": upload.name, "weights_sha256": ref.digest}
        history.append(connection, now, user, [Event(EventKind.CHECKPOINT_REGISTERED, data=data)])
        checkpoint = checkpoints.named(connection, upload.name)
        assert checkpoint is not None
        return view(checkpoint)


def _check(upload: Upload) -> None:
    """Raises `InvalidSpec` for errors that do not depend on the weights."""
    errors: list[tuple[str, str]] = []
    if not REGISTERED.fullmatch(upload.name):
        errors.append(("/name", f"{upload.name!r} cannot be a name: {REGISTERED_RULE}"))
    elif DIGEST.fullmatch(upload.name):
        errors.append(("/name", "64 hexadecimal digits name weights by their SHA-256: take another name"))
    if upload.expected_clean_accuracy is None:
        errors += [
            (f"/{name}", sentence)
            for name in ("mean", "std")
            if (sentence := _grey_levels(getattr(upload, name), name))
        ]
        if upload.tolerance is not None:
            errors.append(("/tolerance", "it is of `expected_clean_accuracy`, which is left out"))
    if errors:
        raise InvalidSpec(errors)


def _grey_levels(values: Sequence[float], name: str) -> str:
    """A message about numbers that look like grey levels of 0 to 255; empty for others."""
    if all(value <= 1 for value in values):
        return ""
    meant = ", ".join(f"{value / 255:.4f}" for value in values)
    return (
        f"{name} {', '.join(f'{value:g}' for value in values)} looks like grey levels of 0 to 255, and images here are "
        f"in [0, 1]: did you mean {meant}? If not, say which `expected_clean_accuracy` shows that it is right"
    )


def _the_same(existing: RegisteredCheckpoint, requested: JsonMapping) -> JsonObject:
    """An existing checkpoint that is registered again. Raises `Conflict` if the request differs from it."""
    if any(getattr(existing, name) != value for name, value in requested.items()):
        raise Conflict(f"checkpoint {existing.name} is registered with other weights or options: take a new name")
    return view(existing)


def registered(database: Database) -> list[JsonObject]:
    """All registered checkpoints, by name."""
    with database.read() as connection:
        return [view(checkpoint) for checkpoint in checkpoints.registered(connection)]


def is_registered(connection: Connection, name: str) -> bool:
    """Whether there is a checkpoint of that name, or whose weights have that SHA-256."""
    return bool(_candidates(connection, name))


def weights_of(connection: Connection, name: str, architecture: str, dataset: str) -> Imported:
    """The weights of a registered checkpoint, by its name or their SHA-256, with the accuracy expected of them.

    Raises `ValueError` if they are not of such a network, or are registered with several expectations.
    """
    candidates = _candidates(connection, name)
    if not candidates:
        raise ValueError(_not_there(connection, name))
    refusals = [_of_another(connection, checkpoint, architecture, dataset) for checkpoint in candidates]
    fitting = [checkpoint for checkpoint, refusal in zip(candidates, refusals, strict=True) if not refusal]
    if not fitting:
        raise ValueError(refusals[0])
    expecting = [checkpoint for checkpoint in fitting if checkpoint.expected_clean_accuracy is not None]
    expected = {(checkpoint.expected_clean_accuracy, checkpoint.tolerance) for checkpoint in expecting}
    if len(expected) > 1:
        names = ", ".join(checkpoint.name for checkpoint in expecting)
        raise ValueError(f"these weights are registered with different expectations, as {names}: name one of these")
    accuracy, tolerance = next(iter(expected), (None, None))
    return Imported(weights_sha256=fitting[0].weights_sha256, expected_clean_accuracy=accuracy, tolerance=tolerance)


def _not_there(connection: Connection, name: str) -> str:
    if DIGEST.fullmatch(name):
        return (
            f"no weights with the SHA-256 {name} are registered, and no training made them: see `uncanny checkpoint "
            "list`, also with `--trained`"
        )
    names = ", ".join(checkpoints.some_names(connection)) or "none"
    return f"checkpoint {name!r} is not registered (registered: {names}): `uncanny checkpoint add`"


def _of_another(connection: Connection, checkpoint: RegisteredCheckpoint, architecture: str, dataset: str) -> str:
    """Why the weights are not of such a network; empty if they are."""
    if checkpoint.architecture != architecture:
        return f"checkpoint {checkpoint.name} is a {checkpoint.architecture}, not a {architecture}"
    shape, classes = _shape(connection, dataset)
    if (shape, classes) == (checkpoint.shape, checkpoint.classes):
        return ""
    own = f"{checkpoint.classes} classes of {'x'.join(map(str, checkpoint.shape))}"
    return f"checkpoint {checkpoint.name} is for {own} images, {dataset} has {classes} of {'x'.join(map(str, shape))}"


def view(checkpoint: RegisteredCheckpoint) -> JsonObject:
    converted_from, created_at = checkpoint.converted_from or [], iso(checkpoint.created_at)
    return {**asdict(checkpoint), "converted_from": converted_from, "created_at": created_at}


def _fit(artifacts: Artifacts, request: JsonObject) -> tuple[ArtifactRef, JsonObject]:
    """The published weights, as the network saves them, and the other columns that the check gives."""
    made: JsonObject = {}

    def fill(out: Path) -> None:
        with artifacts.local(request["uploaded_sha256"]) as weights:
            made.update(_fitted({**request, "weights": str(weights), "out": str(out)}))

    return artifacts.write("checkpoint", fill), made


def _fitted(request: JsonObject) -> JsonObject:
    """The answer of `workers.importing`, which runs in a process of its own: the service loads no PyTorch."""
    with _turn(), tempfile.TemporaryFile() as complaints:
        try:
            command, body = [sys.executable, "-m", "workers.importing"], json.dumps(request).encode()
            done = subprocess.run(
                command, input=body, stdout=subprocess.PIPE, stderr=complaints, timeout=FITTING_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            raise NotChecked(f"the weights were not checked within {FITTING_SECONDS} s: try again later") from None
        if done.returncode != 0:
            complaints.seek(0)
            last = complaints.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            why = f"signal {-done.returncode} ended the process" if done.returncode < 0 else last[0]
            raise NotChecked(f"the weights could not be checked ({why}): try again later")
    answer: JsonObject = json.loads(done.stdout)
    if "tensors" in answer:
        raise TensorsDiffer(answer["error"], answer["tensors"])
    if "error" in answer:
        raise InvalidSpec([("/weights_sha256", answer["error"])])
    return answer


@contextmanager
def _turn() -> Iterator[None]:
    """A turn to check weights. Raises `NotChecked` if it does not come within `TURN_SECONDS`."""
    if not FITTING.acquire(timeout=TURN_SECONDS):
        raise NotChecked("the weights of others are being checked: try again later")
    try:
        yield
    finally:
        FITTING.release()


def _shape(connection: Connection, dataset: str) -> tuple[tuple[int, int, int], int]:
    if dataset in catalog.DATASETS:
        return catalog.DATASETS[dataset].shape, catalog.DATASETS[dataset].classes
    own = datasets.named(connection, dataset) if dataset.startswith(OWN_DATASET) else None
    if own is None:
        raise InvalidSpec([("/dataset", f"{dataset} is no known or registered data set: see /v1/catalog")])
    return own.shape, own.classes


def _candidates(connection: Connection, name: str) -> list[RegisteredCheckpoint]:
    """The checkpoint of that name, else those whose weights have that SHA-256."""
    checkpoint = checkpoints.named(connection, name)
    return checkpoints.of_weights(connection, name) if checkpoint is None else [checkpoint]
