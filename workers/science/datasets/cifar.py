"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): the original Python batches, checked against torchvision's MD5 sums."""

import hashlib
import io
import os
import pickle
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from workers.science.datasets.files import verified
from workers.science.datasets.image_data import ImageData
from workers.science.errors import DatasetCorrupt, DatasetMissing

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

Checksums = Mapping[str, str]
"""File name -> MD5."""


def checksums(source: "type[CIFAR10]") -> dict[str, str]:
    """The official MD5 sums of the files that make up the data set."""
    return {**dict(source.train_list), **dict(source.test_list), source.meta["filename"]: source.meta["md5"]}


def read_cifar10(folder: Path, md5: Checksums | None = None) -> ImageData:
    """50,000 + 10,000 colour images of 32x32 pixels in 10 classes, from `folder/cifar-10-batches-py`.

    `md5` are the sums that the files must have; None: the official ones, and absent or damaged files are then taken
    from the archive beside that folder, or downloaded. Raises `DatasetMissing`, `DatasetCorrupt`.
    """
    from torchvision.datasets import CIFAR10  # here: it takes seconds to import

    return _read("cifar10", CIFAR10, folder, md5)


def read_cifar100(folder: Path, md5: Checksums | None = None) -> ImageData:
    """50,000 + 10,000 colour images of 32x32 pixels in 100 fine classes, from `folder/cifar-100-python`."""
    from torchvision.datasets import CIFAR100  # here: it takes seconds to import

    return _read("cifar100", CIFAR100, folder, md5)


def _read(name: str, source: "type[CIFAR10]", folder: Path, md5: Checksums | None) -> ImageData:
    base = folder / source.base_folder
    try:
        entries = _entries(base, checksums(source) if md5 is None else md5)
    except (DatasetMissing, DatasetCorrupt) as error:
        if md5 is not None:
            raise
        try:
            _extract(source, folder)
        except (DatasetMissing, DatasetCorrupt) as of_archive:
            raise type(error)(f"{error}; {of_archive}") from of_archive
        entries = _entries(base, checksums(source))
    train_x, train_y = _images([entries[file] for file, _ in source.train_list])
    test_x, test_y = _images([entries[file] for file, _ in source.test_list])
    meta = entries[source.meta["filename"]]
    return ImageData(name, train_x, train_y, test_x, test_y, tuple(meta[source.meta["key"]]))


def _extract(source: "type[CIFAR10]", folder: Path) -> None:
    """Extract the archive. Each file is moved whole into its place: another worker may read it, or extract too.

    Only these files stay, and an archive that was in the folder before.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        parts = tempfile.TemporaryDirectory(prefix=f".{source.base_folder}.", dir=folder)
    except OSError as error:
        raise DatasetMissing(f"{source.filename} cannot be extracted in {folder} ({error})") from error
    with parts as part:
        archive = verified(folder / source.filename, source.tgz_md5, [source.url], into=Path(part))
        with tarfile.open(archive) as tar:
            tar.extractall(part, filter="data")
        (folder / source.base_folder).mkdir(exist_ok=True)
        for file in checksums(source):
            os.replace(Path(part, source.base_folder, file), folder / source.base_folder / file)


def _entries(base: Path, md5: Checksums) -> dict[str, dict[str, Any]]:
    absent = [file for file in md5 if not (base / file).is_file()]
    if absent:
        raise DatasetMissing(f"{base} lacks {', '.join(absent)}: put the files there")
    return {file: _unpickle(base / file, expected) for file, expected in md5.items()}


def _unpickle(path: Path, md5: str) -> dict[str, Any]:
    """The batch of a file. The bytes that are unpickled are those whose sum was checked."""
    content = path.read_bytes()
    actual = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if actual != md5:
        raise DatasetCorrupt(f"{path} has MD5 {actual}, the original has {md5}: delete it and put the original there")
    entry = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    if not isinstance(entry, dict):
        raise DatasetCorrupt(f"{path} is not a CIFAR batch: put the original there")
    return entry


class _Unpickler(pickle.Unpickler):
    """Makes NumPy arrays and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "numpy" and name in {"_reconstruct", "ndarray", "dtype"}:
            return super().find_class(module, name)
        raise DatasetCorrupt(f"a CIFAR batch holds images and labels only, this one asks for {module}.{name}")


def _images(entries: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    x = np.concatenate([np.asarray(entry["data"], np.uint8) for entry in entries]).reshape(-1, 3, 32, 32)
    y = [label for entry in entries for label in entry["labels" if "labels" in entry else "fine_labels"]]
    return torch.from_numpy(x), torch.tensor(y, dtype=torch.int64)
