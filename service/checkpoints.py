"""Weights made elsewhere: checked and fitted to a known architecture once, and named by jobs from then on."""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, insert, select

from service.artifacts import Artifacts
from service.datasets import NAME
from service.errors import Conflict, InvalidSpec, UncannyError
from service.specs import catalog
from service.store import Database, history
from service.store.history import Event
from service.store.tables import artifacts as artifact_rows
from service.store.tables import checkpoints, datasets
from service.views import iso

FITTING_SECONDS = 300  # PyTorch is imported, the network built and saved
TURN_SECONDS = 30  # that a request waits while others are checked
FITTING = threading.BoundedSemaphore(2)  # processes at once: each has PyTorch and a network in memory


class NotChecked(UncannyError):
    """Weights could not be checked right now, which says nothing about them."""


@dataclass(frozen=True)
class Upload:
    """What is registered: an uploaded safetensors file for `architecture` on images and classes of `dataset`.

    `keys` maps prefixes of the file's tensor names to the network's; `mean` and `std` are one number a channel.
    """

    name: str
    architecture: str
    dataset: str
    uploaded_sha256: str
    keys: Mapping[str, str]
    mean: Sequence[float]
    std: Sequence[float]


def register(database: Database, artifacts: Artifacts, upload: Upload, *, user: str) -> dict[str, Any]:
    """Check the weights against the network, in a process of its own that has PyTorch, and keep them as it saves them.

    The same again changes nothing. Raises `InvalidSpec` for weights that do not fit, `Conflict` for a name that is
    taken by others, `ArtifactMissing`, `NotChecked`.
    """
    if not NAME.fullmatch(upload.name):
        said = f"{upload.name!r} cannot be a name: letters, digits, `_`, `.` and `-`, at most 100"
        raise InvalidSpec([("/name", said)])
    with database.read() as connection:
        shape, classes = _shape(connection, upload.dataset)
        known = _row(connection, upload.name)
    asked = {**vars(upload), "keys": dict(upload.keys), "mean": list(upload.mean), "std": list(upload.std)}
    if known is not None:
        return _the_same(known, asked)
    made: dict[str, Any] = {}

    def fill(out: Path) -> None:
        with artifacts.local(upload.uploaded_sha256) as weights:
            request = {**asked, "shape": shape, "classes": classes, "weights": str(weights), "out": str(out)}
            made.update(_fitted(request))

    ref = artifacts.write("checkpoint", fill)
    with database.write() as connection:
        now = database.now(connection)
        if (known := _row(connection, upload.name)) is not None:  # by another request, meanwhile
            return _the_same(known, asked)
        row = {
            **asked, "channels": shape[0], "height": shape[1], "width": shape[2], "classes": classes,
            "weights_sha256": ref.digest, "size_bytes": ref.size_bytes, "parameters": made["parameters"],
            "created_by": user, "created_at": now,
        }  # fmt: skip
        connection.execute(insert(checkpoints).values(row))
        _own(connection, now, ref.digest, ref.size_bytes)
        data = {"name": upload.name, "weights_sha256": ref.digest}
        history.append(connection, now, user, [Event("checkpoint.registered", data=data)])
        made_row = _row(connection, upload.name)
        assert made_row is not None
        return view(made_row)


def _the_same(known: Row[Any], asked: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint that is asked for again. Raises `Conflict` where it is another of that name."""
    if any(getattr(known, name) != value for name, value in asked.items()):
        raise Conflict(f"checkpoint {known.name} is registered with other weights or options: take a new name")
    return view(known)


def registered(database: Database) -> list[dict[str, Any]]:
    """All of them, by name."""
    with database.read() as connection:
        return [view(row) for row in connection.execute(select(checkpoints).order_by(checkpoints.c.name))]


def weights_of(connection: Connection, name: str, architecture: str, dataset: str) -> str:
    """The SHA-256 of the weights that a job names. Raises `ValueError` where they are not of such a network."""
    row = _row(connection, name)
    if row is None:
        known = ", ".join(connection.scalars(select(checkpoints.c.name).limit(20))) or "none"
        raise ValueError(f"checkpoint {name!r} is not registered (registered: {known}): `uncanny checkpoint add`")
    if row.architecture != architecture:
        raise ValueError(f"checkpoint {name} is a {row.architecture}, not a {architecture}")
    shape, classes = _shape(connection, dataset)
    if (shape, classes) != ((row.channels, row.height, row.width), row.classes):
        raise ValueError(
            f"checkpoint {name} is for {row.classes} classes of {row.channels}x{row.height}x{row.width} images, "
            f"{dataset} has {classes} of {'x'.join(map(str, shape))}"
        )
    return str(row.weights_sha256)


def view(row: Row[Any]) -> dict[str, Any]:
    shown = {name: value for name, value in row._mapping.items() if name != "created_at"}
    return {**shown, "created_at": iso(row.created_at)}


def _fitted(request: dict[str, Any]) -> dict[str, Any]:
    """What `workers.importing` says. It runs apart because this half of the service has no PyTorch loaded."""
    with _turn(), tempfile.TemporaryFile() as complaints:
        try:
            done = subprocess.run(
                [sys.executable, "-m", "workers.importing"], input=json.dumps(request).encode(),
                stdout=subprocess.PIPE, stderr=complaints, timeout=FITTING_SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise NotChecked(f"the weights were not checked within {FITTING_SECONDS} s: try again later") from None
        if done.returncode != 0:
            complaints.seek(0)
            last = complaints.read().decode(errors="replace").strip().splitlines()[-1:] or ["no message"]
            why = f"signal {-done.returncode} ended the process" if done.returncode < 0 else last[0]
            raise NotChecked(f"the weights could not be checked ({why}): try again later")
    said: dict[str, Any] = json.loads(done.stdout)
    if "error" in said:
        raise InvalidSpec([("/weights_sha256", said["error"])])
    return said


@contextmanager
def _turn() -> Iterator[None]:
    """Raises `NotChecked` where others are checked for too long."""
    if not FITTING.acquire(timeout=TURN_SECONDS):
        raise NotChecked("the weights of others are being checked: try again later")
    try:
        yield
    finally:
        FITTING.release()


def _shape(connection: Connection, dataset: str) -> tuple[tuple[int, int, int], int]:
    if dataset in catalog.DATASETS:
        return catalog.DATASETS[dataset].shape, catalog.DATASETS[dataset].classes
    query = select(datasets).where(datasets.c.name == dataset.removeprefix("npz:"))
    row = connection.execute(query).one_or_none() if dataset.startswith("npz:") else None
    if row is None:
        raise InvalidSpec([("/dataset", f"{dataset} is no known or registered data set: see /v1/catalog")])
    return (row.channels, row.height, row.width), row.classes


def _row(connection: Connection, name: str) -> Row[Any] | None:
    return connection.execute(select(checkpoints).where(checkpoints.c.name == name)).one_or_none()


def _own(connection: Connection, now: float, sha256: str, size_bytes: int) -> None:
    """Weights that a registration names are kept, like those of a training."""
    present = (artifact_rows.c.digest == sha256) & (artifact_rows.c.task_id == "")
    if connection.execute(select(artifact_rows.c.digest).where(present)).one_or_none() is None:
        row = {"digest": sha256, "task_id": "", "kind": "checkpoint", "size_bytes": size_bytes, "created_at": now}
        connection.execute(insert(artifact_rows).values(row))
